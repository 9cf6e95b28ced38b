"""Labelled rows: read them from a Hub data set, a folder or a JSON-lines file, check them, split them.

train.py and evaluate.py both call `read_splits`, so both see the same rows on the same side; cross_validate.py takes
all rows and cuts them with `stratified_folds`.
"""

import codecs
import hashlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
from sklearn.model_selection import RepeatedStratifiedKFold

from command_line import UserError, hub_errors, read_json
from prompts import match_label, read_published_text

# Where a sentence and its label are looked for, in this order: this toolkit's names, the published Hub sets' and the
# raw Politosphere files'.
SENTENCE_COLUMNS = ("sentence", "text", "body_cleaned")
LABEL_COLUMNS = ("label_text", "User label", "label")

TEST_SIZE = 0.2
SPLIT_SEED = 42  # not --seed: runs with different seeds are compared on the same validation rows


@dataclass(frozen=True)
class Splits:
    """`train` and `validation` are `datasets.Dataset`s with the columns row, sentence and label_text.

    `row` counts from 0 in the split that was read, before any cut. `notes` are lines to print.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    notes: tuple[str, ...]

    def fingerprint(self):
        """Return a SHA-256 over the sentences and labels of both splits, in order."""
        return fingerprint(self.train, self.validation)


def fingerprint(*parts):
    """Return a SHA-256 over the sentences and labels of Datasets, in order."""
    rows = [[part["sentence"][:], part["label_text"][:]] for part in parts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_json_lines(path):
    """Return a list of (line number from 1, object, the line as bytes) for the lines of `path` that are not blank.

    Raises one UserError for all lines that are not a JSON object in UTF-8, and for a file that cannot be read.
    """
    lines = scan_json_lines(path)
    bad = [f"{path} line {number}: {record}" for number, record, _ in lines if isinstance(record, ValueError)]
    refuse_rows(bad, "each line must be one JSON object in UTF-8; correct the file")
    return lines


def scan_json_lines(path):
    """Return what `read_json_lines` does, but with a ValueError that says why in place of an object that is none.

    So a caller can report these lines together with what else is wrong. Raises UserError for a file that cannot be read
    or is in UTF-16 or UTF-32.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); make it readable or name another file") from error
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8"):
        raise UserError(f"{path}: is {encoding[:6].upper()} text; save it as UTF-8")
    lines = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = read_object(line)
        except ValueError as error:
            record = error
        lines.append((number, record, line))
    return lines


def read_object(line):
    """Return the dict of a line (bytes) of JSON; raise ValueError, which says why, for what is none."""
    try:
        record = read_json(line.decode())
        if not isinstance(record, dict):
            raise ValueError("an array or a single value")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x}: {error.reason}"
        raise ValueError(f"not UTF-8, save the file as that ({byte})") from error
    except ValueError as error:
        raise ValueError(f"not one JSON object ({error})") from error
    return record


def refuse_rows(problems, advice):
    """Raise one UserError for all of `problems`, each "file line 3: what is wrong", with `advice`; none, no error."""
    if problems:
        plural = "s" if len(problems) > 1 else ""
        raise UserError(f"{len(problems)} bad row{plural}: {first_ten(problems)}; {advice}")


def first_ten(texts):
    """Return a list of texts as one text: the first ten, and how many more there are."""
    more = [f"and {len(texts) - 10} more"] if len(texts) > 10 else []
    return "; ".join([*texts[:10], *more])


def read_splits(dataset_name, task):
    """Read `dataset_name` (Hub id, folder or JSON-lines file) as rows of `task`, split into train and validation.

    Separate splits stay as they are. Where there is no validation split, or it repeats the train rows as in the
    published Politosphere sets, the train rows are cut with `train_test_split(test_size=0.2, shuffle=True, seed=42)`.
    A sentence never stands on both sides: of equal ones the first stays before a cut, and a train row with a sentence
    of a separate validation split is dropped. Raises UserError for data that cannot be used.
    """
    found, rows, notes = _read_all(dataset_name, task)
    validation = rows.get("validation")
    if validation is None:
        distinct = _distinct(found, rows["train"], notes)
        if len(distinct) < 2:
            raise UserError(
                f"{dataset_name}: {len(distinct)} row cannot be split into train and validation; add rows with other "
                "sentences"
            )
        cut = _dataset(distinct).train_test_split(test_size=TEST_SIZE, shuffle=True, seed=SPLIT_SEED)
        notes += _missing_labels(cut["train"], task)
        return Splits(cut["train"], cut["test"], tuple(notes))
    held_out = {row["sentence"].strip() for row in validation}
    train = [row for row in rows["train"] if row["sentence"].strip() not in held_out]
    if len(train) < len(rows["train"]) / 2:
        raise UserError(
            f"{dataset_name}: most sentences of its train split are in its validation split too; split anew"
        )
    reason = "train rows left out: their sentences are validation rows too"
    notes += _left_out(found, rows["train"], train, reason)
    train = _dataset(train)
    notes += _missing_labels(train, task)
    return Splits(train, _dataset(validation), tuple(notes))


def read_rows(dataset_name, task):
    """Return (Dataset of all labelled rows, notes to print) of `dataset_name`: both splits, no sentence twice.

    Its columns are split and row, which say where a row stands, sentence and label_text. Raises UserError for data that
    cannot be used.
    """
    found, rows, notes = _read_all(dataset_name, task)
    together = [row for split in rows.values() for row in split]
    distinct = datasets.Dataset.from_list(_distinct(found, together, notes))
    return distinct, (*notes, *_missing_labels(distinct, task))


def stratified_folds(label_text, folds, repeats, seed):
    """Return (folds, notes to print): for every repeat, a list of `folds` integer arrays of the rows that are held out.

    Every row is held out once a repeat, and a label's rows are spread evenly over the folds. A label with fewer rows
    than folds is in some folds' training rows only, and one with a single row is never learned where it is asked for;
    the notes say so. Raises UserError where no label has as many rows as there are folds.
    """
    counts = Counter(label_text)
    most = max(counts.values())
    if most < folds:
        advice = "lower it" if most > 1 else "add rows"
        raise UserError(f"--folds {folds}: no label has as many rows, the most frequent one has {most}; {advice}")
    notes = [
        f"label {label!r} has {count} row{'s' if count > 1 else ''}, fewer than {folds} folds: "
        + ("it is not learned where it is held out" if count == 1 else "some folds hold none of it out")
        for label, count in counts.items()
        if count < folds
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        cuts = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed).split(
            label_text, label_text
        )
        held_out = [rows for _, rows in cuts]
    return [held_out[start : start + folds] for start in range(0, len(held_out), folds)], notes


def _read_all(dataset_name, task):
    """Return ({split: [(place, record)]}, {split: rows}, notes) of `dataset_name`, a validation split only if separate.

    Raises one UserError for all rows that cannot be used.
    """
    found = _load(dataset_name)
    notes, rows, problems = [], {}, []
    for split, records in found.items():
        if not records:
            raise UserError(f"{dataset_name}: its split {split} has no rows; add rows or name other data")
        good, bad = _rows_and_problems(records, task, notes)
        rows[split] = [{"split": split, **row} for row in good]
        problems += bad
    refuse_rows(problems, _rows_wanted(task))
    if "validation" in rows and _repeats(rows["train"], rows["validation"]):
        del rows["validation"]
    return found, rows, notes


def _distinct(found, rows, notes):
    """Return `rows` without those whose sentence stands in an earlier one, and add a note on these."""
    first = {}
    for row in rows:
        first.setdefault(row["sentence"].strip(), row)
    distinct = list(first.values())
    notes += _left_out(found, rows, distinct, "rows left out: their sentences stand in an earlier row")
    return distinct


def _left_out(found, rows, kept, reason):
    """Return a list of one note, or none, on those of `rows` that are not `kept`, with their places in `found`."""
    kept = {(row["split"], row["row"]) for row in kept}
    places = [found[row["split"]][row["row"]][0] for row in rows if (row["split"], row["row"]) not in kept]
    return [f"{len(places)} {reason} ({first_ten(places)})"] if places else []


def _missing_labels(train, task):
    """Return a list of one note, or none, on the labels of `task` that no train row has."""
    there = set(train["label_text"])
    missing = [repr(label) for label in task.labels if label not in there]
    if len(there) == 1:
        return [f"all {len(train)} train rows have the label {there.pop()!r}: there is nothing to tell apart"]
    return [f"labels without a train row, which are not learned: {', '.join(missing)}"] if missing else []


def _load(dataset_name):
    """Return {split: [(place, record)]} with a `train` split and, where there is one, a `validation` split."""
    path = Path(dataset_name)
    if path.is_file():
        return {"train": _numbered(path)}
    if (path / "train.jsonl").is_file():
        files = {split: path / f"{split}.jsonl" for split in ("train", "validation")}
        return {split: _numbered(file) for split, file in files.items() if file.is_file()}
    if looks_local(dataset_name) and not path.exists():
        raise UserError(f"data set {dataset_name}: no such file or folder")
    try:
        with hub_errors(dataset_name, "data set"):
            loaded = datasets.load_dataset(dataset_name)
    except (datasets.exceptions.DatasetsError, StopIteration, ValueError) as error:  # StopIteration: an empty file
        reason = str(error.__cause__ or error) or "an empty file"
        raise UserError(
            f"data set {dataset_name}: cannot be loaded ({reason}); correct its files or name other data"
        ) from error
    if "train" not in loaded:
        raise UserError(f"{dataset_name}: has no split named train, only {', '.join(loaded)}")
    return {
        split: [(f"{dataset_name} {split} row {number}", record) for number, record in enumerate(loaded[split])]
        for split in ("train", "validation")
        if split in loaded
    }


def looks_local(dataset_name):
    """Return whether the name of a data set is rather that of a file or a folder than one of the Hub."""
    path = Path(dataset_name)
    named = path.suffix in (".json", ".jsonl", ".csv", ".parquet") or dataset_name.startswith(("/", "."))
    return named or dataset_name.count("/") > 1 or ("/" in dataset_name and path.parent.is_dir())


def _numbered(file):
    return [(f"{file} line {number}", record) for number, record, _ in scan_json_lines(file)]


def check_records(records, task, notes):
    """Return the rows (dicts of row, sentence and label_text) of `records`, which are pairs of place and dict.

    The label gets the task's spelling; of a `text` in the published template only the sentence stays. Adds to the list
    `notes` what is worth printing. Raises one UserError for all bad rows: the first ten, by their places, and a count.
    """
    rows, problems = _rows_and_problems(records, task, notes)
    refuse_rows(problems, _rows_wanted(task))
    return rows


def _rows_and_problems(records, task, notes):
    """Return (rows, problems), as `check_records` and `refuse_rows` know them; a record may be a ValueError, too."""
    rows, problems, places, other_prompts = [], [], {}, 0
    for number, (place, record) in enumerate(records):
        wrong = []
        try:
            sentence, label, other_prompt = _read_record(record, task)
            rows.append({"row": number, "sentence": sentence, "label_text": label})
            other_prompts += other_prompt
        except ValueError as error:
            wrong.append(str(error))
        if isinstance(record, dict) and record.get("id") not in (None, ""):
            first = places.setdefault(repr(record["id"]), place)  # as text: 1 equals True, and a list has no hash
            if first != place:
                wrong.append(f"id {shown(record['id'])} stands in {first} too")
        if wrong:
            problems.append(f"{place}: {', '.join(wrong)}")
    if other_prompts:
        notes.append(f"{other_prompts} rows were written with another prompt; the prompt of task {task.name} is used")
    return rows, problems


def _rows_wanted(task):
    return (
        f"a row needs a sentence and one of task {task.name}'s labels ({', '.join(task.labels)}); correct the rows, "
        "merge labels or name another --task"
    )


def _read_record(record, task):
    """Return (sentence, label, whether the row carries a prompt other than the task's).

    Raises ValueError for a record without these, and the record itself where it is one.
    """
    if isinstance(record, ValueError):
        raise record
    sentence, label = _field(record, SENTENCE_COLUMNS, "sentence"), _field(record, LABEL_COLUMNS, "label")
    other_prompt = False
    published = read_published_text(sentence)
    if published:
        sentence = published["sentence"]
        own = (task.system_prompt, task.answer_field)
        other_prompt = (published["system_prompt"].strip(), published["answer_field"]) != own
        if not sentence.strip():
            raise ValueError("its text has an empty sentence")
        if published["label"] and match_label(task, published["label"]) != match_label(task, label):
            raise ValueError(f"its text ends in {shown(published['label'])} but its label is {shown(label)}")
    own_label = match_label(task, label)
    if own_label is None:
        raise ValueError(f"label {shown(label)} is not one of the task's")
    return sentence, own_label, other_prompt


def _field(record, columns, meaning):
    """Return the text in the first of `columns` that `record` has; raise ValueError where there is none."""
    column = next((column for column in columns if column in record), None)
    if column is None:
        raise ValueError(f"no {meaning} (none of the fields {', '.join(columns)})")
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {meaning} ({column} is {shown(value)}, not a text that is not empty)")
    return value


def shown(value):
    """Return a value as an error shows it: as JSON has it where it is null, and no longer than a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _repeats(train, validation):
    def counted(rows):
        return Counter((row["sentence"].strip(), row["label_text"]) for row in rows)

    return counted(train) == counted(validation)


def _dataset(rows):
    """Return `rows` without the split that they were read from: from here on it is the one they are put in."""
    return datasets.Dataset.from_list(rows).remove_columns("split")
