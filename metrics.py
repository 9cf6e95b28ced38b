"""The one place where predictions become numbers. Training, evaluation and reports all call it."""

import math

import numpy as np
from scipy.special import softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support

INVALID = -1  # the class index of an output that is no label
CALIBRATION_BINS = 10


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
    truth = np.array(_indices(labels, label_text))
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, (predicted == truth) - confidence, minlength=CALIBRATION_BINS)
    return {
        "log_loss": float(log_loss(truth, probabilities, labels=range(len(labels)))),
        "expected_calibration_error": float(np.abs(gaps).sum() / len(truth)),
    }


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
