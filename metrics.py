"""The one place where predictions become numbers. Training, evaluation and reports all call it."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import softmax
from scipy.stats import norm
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support

INVALID = -1  # the class index of an output that is no label
CALIBRATION_BINS = 10
GROUPS_SHOWN = 24  # of a column, as many as a day has hours; what is rarer is counted together
NO_GROUP = "(none)"  # the group of rows without a value
RESAMPLES = 10_000  # the ends of an interval then move by about 0.002 from one seed to another
DRAWN_ALONE = 2000  # rows at most, of which each is drawn on its own
BOOTSTRAP_SEED = 42  # not --seed: the same predictions give the same interval
# In cross-validation every row helps to predict the others, and they it: where one of two like rows is right because of
# the other, so is the other. On labels that mean nothing the correlations of a row's hit with the others' add up to
# 2/pi (the arcsine law for the sign of a sum), and the variance of the mean to 1 + 2/pi times that of rows on their
# own, which is all that a bootstrap over rows sees (no unbiased estimate exists: Bengio and Grandvalet 2004).
CROSS_VALIDATED = math.sqrt(1 + 2 / math.pi)


def classification_metrics(labels, label_text, predictions):
    """Return {"n", "accuracy", "macro_f1", "invalid", "per_class"} of `predictions` against `label_text`.

    `labels` are the task's; `predictions` are labels, or None for an output that is no label: it is counted as
    invalid and is wrong. Accuracy is over all rows. Macro-F1 is the mean F1 over the task's labels; a label that
    neither a row nor a prediction has takes no part, since its F1 is 0/0 (scikit-learn's zero_division=nan). A number
    that is 0/0 is None. Precision, recall and F1 are fractions, support is a number of rows.
    """
    truth, predicted = _indices(labels, label_text), _indices(labels, predictions)
    known = list(range(len(labels)))
    per_class = precision_recall_fscore_support(truth, predicted, labels=known, zero_division=math.nan)
    return {
        "n": len(truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=known, average="macro", zero_division=math.nan)),
        "invalid": predicted.count(INVALID),
        "per_class": {
            label: {
                "precision": _number(precision),
                "recall": _number(recall),
                "f1": _number(f1),
                "support": int(support),
            }
            for label, precision, recall, f1, support in zip(labels, *per_class, strict=True)
        },
    }


def predicted_labels(labels, log_probs):
    """Return the most probable label of every row of `log_probs` (rows, labels); of equals the first."""
    return [labels[column] for column in np.asarray(log_probs).argmax(axis=1)]


def label_probabilities(log_probs):
    """Return the softmax over the labels of `log_probs` (rows, labels), as float64."""
    return softmax(np.asarray(log_probs, dtype=np.float64), axis=1)


def probability_metrics(labels, label_text, probabilities):
    """Return {"log_loss", "expected_calibration_error"} of `probabilities` (rows, labels) against `label_text`.

    Log loss is the mean of -ln p(true label), in nats. The calibration error is that of the predicted label's
    probability: |accuracy - mean probability| in ten bins of equal width, weighted by their rows (Guo et al. 2017,
    arXiv:1706.04599); on few rows it is above 0 by chance alone.
    """
    bins = calibration_bins(labels, label_text, probabilities)
    gaps = (bins["accuracy"] - bins["confidence"]).abs()
    return {
        "log_loss": float(log_loss(_indices(labels, label_text), probabilities, labels=range(len(labels)))),
        "expected_calibration_error": float(np.average(gaps, weights=bins["rows"])),
    }


def calibration_bins(labels, label_text, probabilities):
    """Return a DataFrame of confidence, accuracy and rows, a line for each of ten bins that has rows.

    The bins are those of the predicted label's probability, of equal width; `probabilities` is (rows, labels).
    """
    confidence = probabilities.max(axis=1)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    right = probabilities.argmax(axis=1) == np.array(_indices(labels, label_text))
    each = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float), "rows": 1}).groupby(bins)
    return each.agg({"confidence": "mean", "accuracy": "mean", "rows": "sum"}).reset_index(drop=True)


def confusion_counts(labels, label_text, predictions):
    """Return an integer array [true label, predicted label]; its last column counts the invalid outputs."""
    truth, predicted = _indices(labels, label_text), _indices(labels, predictions)
    classes = [*range(len(labels)), INVALID]
    return confusion_matrix(truth, predicted, labels=classes)[:-1]


def _indices(labels, values):
    index = {label: position for position, label in enumerate(labels)}
    return [INVALID if value is None else index[value] for value in values]


def _number(value):
    return None if math.isnan(value) else float(value)


# ---------------------------------------------------------------------------------------------------------------------
# Several predictions of the same rows, and what other rows would have given: the bootstrap


@dataclass(frozen=True)
class System:
    """What a model or a baseline says of some rows, once or in several repeats.

    `predictions` is a list over repeats of lists over rows: labels, or None for what is no label. `probabilities`
    (repeats, rows, labels) may be None: not every system has any. `cross_validated` says that what it says of a row was
    learned from the other rows.
    """

    predictions: list
    probabilities: np.ndarray | None = None
    cross_validated: bool = False


def scored_systems(labels, label_text, systems, compare=None):
    """Return {name: numbers} of `systems`, {name: System}, all on the rows with `label_text`.

    The numbers: accuracy and macro_f1, each a dict of mean and sd over the repeats (sd None for one) and the 95%
    interval of the mean [low, high] by `bootstrap_scores`, wider for a system that was cross-validated; per_class_f1,
    the mean over the repeats; invalid and confusion (as `confusion_counts` gives it, nested lists), summed over them;
    log_loss (nats) and expected_calibration_error over all of them, where there are probabilities. With `compare`, a
    system's name, every other one gets difference: {"accuracy": {"mean", "interval"}, "macro_f1": ..., "rows"}:
    compare's scores less its own, paired, and the number of rows that one gets right more often than the other.
    """
    bootstraps = bootstrap_scores(labels, label_text, {name: system.predictions for name, system in systems.items()})
    found = {}
    for name, system in systems.items():
        found[name] = numbers = _repeated_metrics(labels, label_text, system)
        for score, bootstrap in bootstraps[name].items():
            numbers[score]["interval"] = bootstrap.interval(_widening(system))
        if compare is not None and name != compare:
            paired = {score: bootstraps[compare][score] - bootstraps[name][score] for score in bootstraps[name]}
            numbers["difference"] = {
                score: {
                    "mean": float(difference.estimate),
                    "interval": difference.interval(_widening(system, systems[compare])),
                }
                for score, difference in paired.items()
            } | {"rows": int((_hits(label_text, systems[compare]) != _hits(label_text, system)).sum())}
    return found


def _hits(label_text, system):
    """Return how often, (rows,), a system is right about each row."""
    return (np.array(system.predictions, dtype=object) == np.array(label_text, dtype=object)).sum(axis=0)


def _widening(*systems):
    return CROSS_VALIDATED if any(system.cross_validated for system in systems) else 1.0


def _repeated_metrics(labels, label_text, system):
    """Return the numbers of `scored_systems` that need no bootstrap."""
    each = [classification_metrics(labels, label_text, predictions) for predictions in system.predictions]
    frame = pd.DataFrame(each)[["accuracy", "macro_f1"]]
    f1 = pd.DataFrame([{label: of["per_class"][label]["f1"] for label in labels} for of in each], dtype=float)
    confusion = sum(confusion_counts(labels, label_text, predictions) for predictions in system.predictions)
    numbers = {
        score: {"mean": float(frame[score].mean()), "sd": _number(frame[score].std())} for score in frame.columns
    } | {
        "per_class_f1": {label: _number(f1[label].mean()) for label in labels},
        "invalid": sum(of["invalid"] for of in each),
        "confusion": confusion.tolist(),
    }
    if system.probabilities is not None:
        together = np.concatenate(list(system.probabilities))
        numbers |= probability_metrics(labels, list(label_text) * len(system.probabilities), together)
    return numbers


@dataclass(frozen=True)
class Bootstrap:
    """A score of one set of rows, and what it would be on other sets of rows like it.

    `estimate` is the score; `draws` (resamples,) are those of rows drawn with replacement; `jackknife` (cells,) those
    with one row left out, each of `counts` (cells,) rows alike. The difference of two of the same `bootstrap_scores` is
    paired: both scores come from the same rows every time.
    """

    estimate: float
    draws: np.ndarray
    jackknife: np.ndarray
    counts: np.ndarray
    lowest: float = 0.0  # that there can be; the highest is 1

    def __sub__(self, other):
        differences = (getattr(self, name) - getattr(other, name) for name in ("estimate", "draws", "jackknife"))
        return Bootstrap(*differences, self.counts, lowest=-1.0)

    def interval(self, widening=1.0):
        """Return [low, high], the 95% interval: percentiles of the draws, corrected for bias and skewness (BCa).

        Efron 1987, doi:10.1080/01621459.1987.10478410. Where all draws are alike (every row is right), so are its ends.
        `widening` multiplies the ends' distances from the estimate.
        """
        below = ((self.draws < self.estimate).mean() + (self.draws <= self.estimate).mean()) / 2
        bias = norm.ppf(np.clip(below, 1 / len(self.draws), 1 - 1 / len(self.draws)))
        pulls = np.average(self.jackknife, weights=self.counts) - self.jackknife
        spread = (self.counts * pulls**2).sum() ** 1.5
        skew = (self.counts * pulls**3).sum() / (6 * spread) if spread > 0 else 0.0
        wanted = bias + norm.ppf([0.025, 0.975])
        ends = np.quantile(self.draws, norm.cdf(bias + wanted / (1 - skew * wanted)))
        return np.clip(self.estimate + widening * (ends - self.estimate), self.lowest, 1.0).tolist()


def bootstrap_scores(labels, label_text, systems):
    """Return {name: {"accuracy": Bootstrap, "macro_f1": Bootstrap}}, all from the same draws of the rows.

    `systems` is {name: predictions}, each a list over repeats of lists over rows (labels, or None for what is no
    label): a row is drawn with all its repeats, and a score is the mean over the repeats of what
    `classification_metrics` gives. Of more than 2,000 rows, those that agree in label and all predictions are drawn
    together by their number: the cost grows with the kinds of rows. Of fewer, each is drawn on its own, so that the
    same predictions give the same interval whatever stands beside them.
    """
    columns = [_indices(labels, label_text)]
    for repeats in systems.values():
        columns += [_indices(labels, predictions) for predictions in repeats]
    cells = np.array(columns).T
    counts = np.ones(len(cells), dtype=np.int64)
    if len(cells) > DRAWN_ALONE:
        cells, counts = np.unique(cells, axis=0, return_counts=True)
    rows = counts.sum()
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(rows, counts / rows, size=RESAMPLES)
    left_out = counts - np.eye(len(counts), dtype=np.int64) if rows > 1 else counts[None]
    weights = np.concatenate([counts[None], drawn, left_out]).astype(np.float64)
    found, column = {}, 1
    for name, repeats in systems.items():
        predicted = cells[:, column : column + len(repeats)].T
        column += len(repeats)
        each = [weighted_scores(weights, cells[:, 0], of_repeat, len(labels)) for of_repeat in predicted]
        found[name] = {
            score: Bootstrap(values[0], values[1 : RESAMPLES + 1], values[RESAMPLES + 1 :], counts)
            for score, values in zip(("accuracy", "macro_f1"), np.mean(each, axis=0), strict=True)
        }
    return found


def weighted_scores(weights, truth, predicted, classes):
    """Return accuracy and macro-F1, both (draws,), of rows that count `weights` (draws, rows).

    As `classification_metrics` defines them; `truth` and `predicted` (rows,) are indices of `classes` labels.
    """
    known = np.arange(classes)
    is_true, is_predicted = truth[:, None] == known, predicted[:, None] == known
    right = weights @ (is_true & is_predicted)
    both = weights @ is_true + weights @ is_predicted
    with np.errstate(invalid="ignore"):  # 0/0: a label that neither a row nor a prediction has takes no part
        f1 = 2 * right / both
    return right.sum(axis=1) / weights.sum(axis=1), np.nanmean(f1, axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Rows without a true label: how often each label was given


class LabelTally:
    """Counts rows as they are predicted: all of them, and by the groups of the columns `by`."""

    def __init__(self, labels, by=()):
        self.labels, self.reasons = labels, Counter()
        self.place = {label: place for place, label in enumerate((*labels, None))}
        self.all, self.mean = _Counts(len(labels)), dict.fromkeys(labels, 0.0)
        self.groups = {column: {} for column in by}

    def add(self, record):
        """Count a row: a dict with `prediction` (a label or None), `probability`, `reason` and the columns `by`."""
        label, probability = record["prediction"], record["probability"]
        place = self.place[label]
        self.all.add(place, probability)
        if label is None:
            self.reasons[record["reason"]] += 1
        else:
            self.mean[label] += probability
        for column, groups in self.groups.items():
            group = _group(record.get(column))
            if group not in groups:
                groups[group] = _Counts(len(self.labels))
            groups[group].add(place, probability)

    def summary(self):
        """Return a dict of rows, labelled, mean_probability, labels, unlabelled and by.

        labels has for each label its rows, its share of the labelled rows and the mean probability of its rows;
        unlabelled counts the reasons; by has a list for every column: of the most frequent groups and the rest as one,
        each with group, rows, labels (rows each), unlabelled and mean_probability. Numbers that are 0/0 are None.
        """
        total = self.all.numbers(self.labels)
        labelled = total["rows"] - total["unlabelled"]
        return {
            "rows": total["rows"],
            "labelled": labelled,
            "mean_probability": total["mean_probability"],
            "labels": {
                label: {
                    "rows": rows,
                    "share": rows / labelled if rows else 0.0,
                    "mean_probability": self.mean[label] / rows if rows else None,
                }
                for label, rows in total["labels"].items()
            },
            "unlabelled": dict(self.reasons.most_common()),
            "by": {column: self._most_frequent(groups) for column, groups in self.groups.items()},
        }

    def _most_frequent(self, groups):
        ordered = sorted(groups, key=lambda group: (-groups[group].rows(), group))
        kept, rest = ordered[:GROUPS_SHOWN], ordered[GROUPS_SHOWN:]
        lines = [{"group": group, **groups[group].numbers(self.labels)} for group in _in_own_order(kept)]
        if rest:
            other = _Counts(len(self.labels))
            for group in rest:
                other.add_all(groups[group])
            lines.append({"group": f"other ({len(rest)} groups)", **other.numbers(self.labels)})
        return lines


class _Counts:
    """Rows of each label and without one, and the sum of the labelled rows' probabilities; there may be millions."""

    __slots__ = ("counts", "probability")

    def __init__(self, labels):
        self.counts, self.probability = [0] * (labels + 1), 0.0

    def add(self, place, probability):
        self.counts[place] += 1
        if place < len(self.counts) - 1:
            self.probability += probability

    def add_all(self, other):
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.probability += other.probability

    def rows(self):
        return sum(self.counts)

    def numbers(self, labels):
        *of_labels, unlabelled = self.counts
        labelled = sum(of_labels)
        return {
            "rows": labelled + unlabelled,
            "labels": dict(zip(labels, of_labels, strict=True)),
            "unlabelled": unlabelled,
            "mean_probability": self.probability / labelled if labelled else None,
        }


def _group(value):
    if value is None or value == "":
        return NO_GROUP
    return value if isinstance(value, str) else str(value)


def _in_own_order(groups):
    """Return numbers, months and years in their own order, with rows that have none last; all else as it is."""
    own = [group for group in groups if group != NO_GROUP]
    if all(_is_number(group) for group in own):
        own.sort(key=lambda group: (float(group), group))
    elif all(group[:1].isdigit() for group in own):
        own.sort()
    else:
        return groups
    return own + [NO_GROUP] * (NO_GROUP in groups)


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
