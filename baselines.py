"""What a fine-tuned model must beat: the majority class and TF-IDF with logistic regression, from the same rows.

The third baseline, the model without an adapter, needs the model: cross_validate.py and evaluate.py score it.
"""

from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"
ZERO_SHOT = "zero-shot, no adapter"


def majority_class(train, sentences):
    """Return, for each of `sentences`, the most frequent label of the rows `train`, of equals the first by alphabet.

    `train` is a Dataset or a dict of lists with sentence and label_text.
    """
    model = DummyClassifier(strategy="most_frequent").fit(train["sentence"][:], train["label_text"][:])
    return [str(label) for label in model.predict(sentences)]


def tfidf_regression(train, sentences):
    """Return the labels that a logistic regression on TF-IDF of words and pairs of words gives `sentences`.

    It is learned from the rows `train` alone, its vocabulary too. Labels weigh the same whatever their number of rows,
    since macro-F1 is what is compared; the penalty is scikit-learn's own and not tuned: a hundred rows are too few.
    """
    if len(set(train["label_text"][:])) == 1:  # nothing to tell apart, which LogisticRegression refuses
        return majority_class(train, sentences)
    words = r"\w+|[^\w\s]+"  # single letters, emoji and punctuation, too, so that no sentence is without words
    model = make_pipeline(
        TfidfVectorizer(token_pattern=words, ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )
    model.fit(train["sentence"][:], train["label_text"][:])
    return [str(label) for label in model.predict(sentences)]
