"""Labelled rows: read them from a Hub data set, a folder or a JSON-lines file, check them, split them.

train.py and evaluate.py both call `read_splits`, so both see the same rows on the same side.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets

from command_line import UserError, hub_errors
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
        rows = [[split["sentence"][:], split["label_text"][:]] for split in (self.train, self.validation)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_json_lines(path):
    """Return a list of (line number from 1, object, the line's text) for the lines of `path` that are not blank.

    Raises UserError naming file and line for what is not a JSON object, and for a file that is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (json.JSONDecodeError, UnicodeEncodeError, RecursionError) as error:
            reason = getattr(error, "msg", None) or getattr(error, "reason", "nested too deeply")
            raise UserError(f"{path}: line {number} is not JSON ({reason}); each line must be one object") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object")
        records.append((number, record, line))
    return records


def read_splits(dataset_name, task):
    """Read `dataset_name` (Hub id, folder or JSON-lines file) as rows of `task`, split into train and validation.

    Separate splits stay as they are. Where there is no validation split, or it repeats the train rows as in the
    published Politosphere sets, the train rows are cut with `train_test_split(test_size=0.2, shuffle=True, seed=42)`.
    A sentence never stands on both sides: of equal ones the first stays before a cut, and a train row with a sentence
    of a separate validation split is dropped. Raises UserError for data that cannot be used.
    """
    found = _load(dataset_name)
    notes = []
    for split, records in found.items():
        if not records:
            raise UserError(f"{dataset_name}: its split {split} has no rows")
    rows = {split: check_records(records, task, notes) for split, records in found.items()}
    validation = rows.get("validation")
    if validation is None or _repeats(rows["train"], validation):
        first = {}
        for row in rows["train"]:
            first.setdefault(row["sentence"].strip(), row)
        distinct = list(first.values())
        if len(distinct) < 2:
            raise UserError(f"{dataset_name}: {len(distinct)} row cannot be split into train and validation")
        if len(distinct) < len(rows["train"]):
            notes.append(f"{len(rows['train']) - len(distinct)} rows left out: their sentences stand in an earlier row")
        cut = _dataset(distinct).train_test_split(test_size=TEST_SIZE, shuffle=True, seed=SPLIT_SEED)
        return Splits(cut["train"], cut["test"], tuple(notes))
    held_out = {row["sentence"].strip() for row in validation}
    train = [row for row in rows["train"] if row["sentence"].strip() not in held_out]
    if len(train) < len(rows["train"]) / 2:
        raise UserError(
            f"{dataset_name}: most sentences of its train split are in its validation split too; split anew"
        )
    if len(train) < len(rows["train"]):
        notes.append(f"{len(rows['train']) - len(train)} train rows left out: their sentences are validation rows too")
    return Splits(_dataset(train), _dataset(validation), tuple(notes))


def _load(dataset_name):
    """Return {split: [(place, record)]} with a `train` split and, where there is one, a `validation` split."""
    path = Path(dataset_name)
    if path.is_file():
        return {"train": _numbered(path)}
    if (path / "train.jsonl").is_file():
        files = {split: path / f"{split}.jsonl" for split in ("train", "validation")}
        return {split: _numbered(file) for split, file in files.items() if file.is_file()}
    named = path.suffix in (".json", ".jsonl", ".csv", ".parquet") or dataset_name.startswith(("/", "."))
    looks_local = named or dataset_name.count("/") > 1 or ("/" in dataset_name and path.parent.is_dir())
    if looks_local and not path.exists():
        raise UserError(f"data set {dataset_name}: no such file or folder")
    with hub_errors(dataset_name, "data set"):
        loaded = datasets.load_dataset(dataset_name)
    if "train" not in loaded:
        raise UserError(f"{dataset_name}: has no split named train, only {', '.join(loaded)}")
    return {
        split: [(f"{dataset_name} {split} row {number}", record) for number, record in enumerate(loaded[split])]
        for split in ("train", "validation")
        if split in loaded
    }


def _numbered(file):
    return [(f"{file} line {number}", record) for number, record, _ in read_json_lines(file)]


def check_records(records, task, notes):
    """Return the rows (dicts of row, sentence and label_text) of `records`, which are pairs of place and dict.

    The label gets the task's spelling; of a `text` in the published template only the sentence stays. Adds to the list
    `notes` what is worth printing. Raises one UserError for all bad rows: the first ten, by their places, and a count.
    """
    rows, problems, other_prompts = [], [], 0
    for number, (place, record) in enumerate(records):
        sentence, label, problem, other_prompt = _read_record(record, task)
        if problem:
            problems.append(f"{place}: {problem}")
        rows.append({"row": number, "sentence": sentence, "label_text": label})
        other_prompts += other_prompt
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        plural = "s" if len(problems) > 1 else ""
        known = f"the labels of task {task.name} are {', '.join(task.labels)}; merge labels or name another --task"
        raise UserError(f"{len(problems)} bad row{plural}: {'; '.join(problems[:10])}{more}; {known}")
    if other_prompts:
        notes.append(f"{other_prompts} rows were written with another prompt; the prompt of task {task.name} is used")
    return rows


def _read_record(record, task):
    """Return (sentence, label, problem or None, whether the row carries a prompt other than the task's)."""
    sentence = next((record[column] for column in SENTENCE_COLUMNS if column in record), None)
    label = next((record[column] for column in LABEL_COLUMNS if column in record), None)
    other_prompt = False
    if not isinstance(sentence, str) or not sentence.strip():
        return None, None, f"no sentence (a text that is not empty in one of {', '.join(SENTENCE_COLUMNS)})", False
    if not isinstance(label, str) or not label.strip():
        return None, None, f"no label (a text that is not empty in one of {', '.join(LABEL_COLUMNS)})", False
    published = read_published_text(sentence)
    if published:
        sentence = published["sentence"]
        own = (task.system_prompt, task.answer_field)
        other_prompt = (published["system_prompt"].strip(), published["answer_field"]) != own
        if not sentence.strip():
            return None, None, "its text has an empty sentence", False
        if published["label"] and match_label(task, published["label"]) != match_label(task, label):
            return None, None, f"its text ends in {published['label']!r} but its label is {label!r}", False
    own_label = match_label(task, label)
    if own_label is None:
        return None, None, f"label {label!r} is not one of the task's", False
    return sentence, own_label, None, other_prompt


def _repeats(train, validation):
    def counted(rows):
        return Counter((row["sentence"].strip(), row["label_text"]) for row in rows)

    return counted(train) == counted(validation)


def _dataset(rows):
    return datasets.Dataset.from_list(rows)
