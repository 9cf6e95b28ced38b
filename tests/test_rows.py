"""Reading and splitting labelled rows."""

import json

import datasets
import pytest
from conftest import shared, write_json_lines

from command_line import UserError
from prompts import TASKS, published_text, task_from_fields
from rows import check_records, read_json_lines, read_splits

TASK = TASKS["supp-anti-oth"]


def published_folder(folder, train, validation):
    """Write a folder as the notebook does; rows are (sentence, label)."""
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("validation", validation)):
        records = [
            {"text": published_text(TASK, sentence, label if split == "train" else None), "label_text": label}
            for sentence, label in rows
        ]
        write_json_lines(folder / f"{split}.jsonl", records)
    return str(folder)


def pairs(split):
    return list(zip(split["sentence"], split["label_text"], strict=True))


def test_politosphere_gives_the_published_90_and_23_rows():
    file = shared("data/politosphere/daccord_yifei_v2_leo_supp_anti_oth.json")
    splits = read_splits(str(file), TASK)
    published = datasets.Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])
    cut = published.train_test_split(test_size=0.2, shuffle=True, seed=42)
    assert (len(splits.train), len(splits.validation)) == (90, 23)
    assert pairs(splits.train) == list(zip(cut["train"]["body_cleaned"], cut["train"]["User label"], strict=True))
    assert pairs(splits.validation) == list(zip(cut["test"]["body_cleaned"], cut["test"]["User label"], strict=True))


ROWS = [(f"sentence {number}", TASK.labels[number % 3]) for number in range(10)]


def test_a_validation_split_that_repeats_train_is_cut(tmp_path):
    splits = read_splits(published_folder(tmp_path / "data", ROWS, list(reversed(ROWS))), TASK)
    assert (len(splits.train), len(splits.validation)) == (8, 2)
    assert sorted(pairs(splits.train) + pairs(splits.validation)) == sorted(ROWS)


def test_separate_splits_stay_as_they_are(tmp_path):
    splits = read_splits(published_folder(tmp_path / "data", ROWS[:7], ROWS[7:]), TASK)
    assert pairs(splits.train) == ROWS[:7]
    assert pairs(splits.validation) == ROWS[7:]
    assert splits.train["row"][:] == list(range(7))
    assert splits.notes == ()


def test_a_sentence_is_never_on_both_sides(tmp_path):
    folder = published_folder(tmp_path / "data", ROWS[:7], ROWS[5:])
    splits = read_splits(folder, TASK)
    assert pairs(splits.train) == ROWS[:5]
    assert pairs(splits.validation) == ROWS[5:]
    places = f"{folder}/train.jsonl line 6; {folder}/train.jsonl line 7"
    assert splits.notes == (f"2 train rows left out: their sentences are validation rows too ({places})",)
    twice = [{"sentence": f"{sentence}{end}", "label_text": label} for end in ("", " ") for sentence, label in ROWS]
    file = write_json_lines(tmp_path / "twice.jsonl", [*twice, twice[3]])
    splits = read_splits(str(file), TASK)
    assert sorted(pairs(splits.train) + pairs(splits.validation)) == sorted(ROWS)
    places = "; ".join(f"{file} line {number}" for number in range(11, 21))
    note = f"11 rows left out: their sentences stand in an earlier row ({places}; and 1 more)"
    assert splits.notes == (note,)


def test_labels_that_only_validation_rows_have_are_noted(tmp_path):
    rows = [(sentence, label) for sentence, label in ROWS if label != TASK.labels[1]]
    splits = read_splits(published_folder(tmp_path / "data", rows, [("another", TASK.labels[1])]), TASK)
    assert splits.notes == (f"labels without a train row, which are not learned: {TASK.labels[1]!r}",)


def test_labels_get_the_tasks_spelling_and_raw_columns_are_known(tmp_path):
    records = [{"body_cleaned": sentence, "User label": label.upper()} for sentence, label in ROWS]
    splits = read_splits(str(write_json_lines(tmp_path / "raw.json", records)), TASK)
    assert sorted(pairs(splits.train) + pairs(splits.validation)) == sorted(ROWS)


def test_rows_written_with_another_prompt_are_noted(tmp_path):
    folder = published_folder(tmp_path / "data", ROWS[:7], ROWS[7:])
    other = task_from_fields({"system_prompt": "?", "labels": list(TASK.labels), "answer_field": "A:"}, "other.json")
    splits = read_splits(folder, other)
    assert pairs(splits.train) == ROWS[:7]
    assert splits.notes[0] == "7 rows were written with another prompt; the prompt of task other is used"


def test_the_fingerprint_follows_rows_labels_and_sides(tmp_path):
    prints = [
        read_splits(published_folder(tmp_path / f"data{number}", *rows), TASK).fingerprint()
        for number, rows in enumerate(
            [
                (ROWS[:7], ROWS[7:]),
                (ROWS[:7], ROWS[7:]),
                (ROWS[:6], ROWS[6:]),
                ([(ROWS[0][0], "other"), *ROWS[1:7]], ROWS[7:]),
            ]
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (['{"sentence": "x", "label_text": "pro"}'], ["line 1: label 'pro' is not one of the task's"]),
        (['{"sentence": "x", "label_text": 1}'], ["line 1: no label"]),
        (['{"sentence": "x", "label_text": ""}'], ["line 1: no label"]),
        (['{"sentence": null, "label_text": "other"}'], ["line 1: no sentence"]),
        (['{"label_text": "other"}'], ["line 1: no sentence"]),
        (['{"sentence": "x"}', "", '{"sentence": " ", "label_text": "other"}'], ["2 bad rows", "line 1", "line 3"]),
        (["{", '{"sentence": "x"}', "[]"], ["3 bad rows", "line 1: not one JSON", "line 2: no label", "line 3: not"]),
        (['{"sentence": "x", "label_text": "no"}'] * 12, ["12 bad rows", "line 10", "and 2 more"]),
        (["{"], ["line 1: not one JSON object"]),
        ([], ["its split train has no rows"]),
        (['{"sentence": "x", "label_text": "other"}'], ["1 row cannot be split"]),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, lines, messages):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        read_splits(str(file), TASK)
    assert all(message in str(error.value) for message in [str(file), *messages])


def test_a_text_that_contradicts_its_label_is_refused(tmp_path):
    file = write_json_lines(
        tmp_path / "x.jsonl", [{"text": published_text(TASK, "x", "other"), "label_text": "anti gun"}]
    )
    with pytest.raises(UserError, match="line 1: its text ends in 'other' but its label is 'anti gun'"):
        read_splits(str(file), TASK)


def test_same_rows_with_byte_order_mark_windows_line_ends_and_line_separators_inside(tmp_path):
    records = [{"sentence": f"a\u2028b\u0085{number}", "label_text": "other"} for number in range(10)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join(lines), encoding="utf-8")
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(("\ufeff" + "\r\n\r\n".join(lines) + "\r\n").encode())
    assert read_splits(str(plain), TASK).fingerprint() == read_splits(str(windows), TASK).fingerprint()


@pytest.mark.parametrize("line", ['{"sentence": "\\ud800", "label_text": "other"}', "[" * 100_000])
def test_what_json_allows_but_no_text_holds_is_named(tmp_path, line):
    file = tmp_path / "odd.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match="line 1: not one JSON object"):
        read_splits(str(file), TASK)


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "gone.csv", "{}/gone", "a/b/c"])
def test_missing_local_data_are_not_looked_for_on_the_hub(tmp_path, name):
    with pytest.raises(UserError, match="no such file or folder"):
        read_splits(name.format(tmp_path), TASK)


def test_ids_are_compared_within_a_split_and_as_they_are(tmp_path):
    ids = [1, "1", True, 1.5, [1], "", "", None, None]
    records = [{"id": own, "sentence": f"x{number}", "label_text": "other"} for number, own in enumerate(ids)]
    places = [(f"row {number}", record) for number, record in enumerate(records)]
    assert len(check_records(places, TASK, [])) == len(ids)
    with pytest.raises(UserError, match=r"2 bad rows: row 9: id \[1\] stands in row 4 too; row 10: id 1 .* row 0 too"):
        check_records([*places, ("row 9", records[4]), ("row 10", records[0])], TASK, [])
    (tmp_path / "data").mkdir()
    write_json_lines(tmp_path / "data" / "train.jsonl", records)
    write_json_lines(tmp_path / "data" / "validation.jsonl", [records[0] | {"sentence": "y"}])
    assert len(read_splits(str(tmp_path / "data"), TASK).validation) == 1


def test_all_lines_that_are_no_objects_are_named_at_once(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_bytes(b'{"a": 1}\n{\n\n[]\n{"a": "\xe4"}\n{"a": 1}')
    with pytest.raises(UserError) as error:
        read_json_lines(file)
    for text in ("3 bad rows", "line 2: not one JSON", "line 4: not one JSON", "line 5: not UTF-8", "correct the file"):
        assert text in str(error.value)
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": "\xc3\xa4"}')
    assert read_json_lines(file) == [(1, {"a": 1}, b'{"a": 1}'), (3, {"a": "ä"}, b'{"a": "\xc3\xa4"}')]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"", "cannot be loaded"),
        ("train.csv", b"sentence,label_text\n", "cannot be loaded"),
        ("train.csv", b"sentence,label_text\nx,\ny,other\n", "train row 0: no label (label_text is null"),
        ("train.json", b"", "cannot be loaded (an empty file)"),
        ("train.json", b'{"sentence": "x", "lab', "cannot be loaded"),
        ("train.parquet", b"PAR1", "cannot be loaded"),
    ],
)
def test_faulty_files_that_datasets_reads_are_named_too(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_splits(str(folder), TASK)
    assert str(folder) in str(error.value)
    assert message in str(error.value)
