"""The one place where predictions become numbers. Training, evaluation and reports all call it."""

import math

from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

INVALID = -1  # the class index of an output that is no label


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
