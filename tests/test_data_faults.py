"""Faulty data, tasks and merges as a user meets them: refused in one line, with nothing on the disk changed.

Through the commands' own `main`. What must work all the same is at the end, and it trains the tiny model for a step.
"""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, write_json_lines

import merge_labels
import train
from modeling import load_tokenizer
from prompts import answer_ids, encode_rows, load_task, prompt_ids
from rows import read_splits

TASK = load_task("sst2")
RECORDS = [
    {"id": f"c{number}", "sentence": f"film number {number}", "label_text": TASK.labels[number % 2]}
    for number in range(1, 21)
]


def changed(*changes):
    """Return RECORDS as lines of bytes; each change is (line number from 1, what stands there instead)."""
    lines = {number: json.dumps(record).encode() for number, record in enumerate(RECORDS, start=1)}
    for number, line in changes:
        lines[number] = json.dumps(line, ensure_ascii=False).encode() if isinstance(line, dict) else line
    return b"\n".join(lines.values()) + b"\n"


def row(number, **fields):
    """Return the record of that line with other fields; a field that is Ellipsis is left out."""
    record = RECORDS[number - 1] | fields
    return {name: value for name, value in record.items() if value is not ...}


@pytest.fixture(autouse=True)
def in_a_folder_with_an_earlier_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "models" / "x"
    earlier.mkdir(parents=True)
    for name in ("run.json", "adapter_config.json", "adapter_model.safetensors"):
        (earlier / name).write_text(f"the {name} of an earlier run")


@pytest.fixture
def options(tiny_base):
    """train.py's options for the tiny model, without the data."""
    return f"--base_model_name {tiny_base} --task sst2 --adapters_name x --overwrite --epoch 1".split()


ROW_FAULTS = {
    "a label that the task does not know": (row(3, label_text="neutral"), "label 'neutral' is not one of the task's"),
    "a label with a letter more": (row(3, label_text="positives"), "label 'positives' is not one of the task's"),
    "no label column": (row(3, label_text=...), "no label (none of the fields label_text, User label, label)"),
    "no sentence column": (row(3, sentence=...), "no sentence (none of the fields sentence, text, body_cleaned)"),
    "null label": (row(3, label_text=None), "no label (label_text is null"),
    "null sentence": (row(3, sentence=None), "no sentence (sentence is null"),
    "empty label": (row(3, label_text=""), "no label (label_text is ''"),
    "empty sentence": (row(3, sentence=" \t"), "no sentence (sentence is ' \\t'"),
    "numeric label": (row(3, label_text=1), "no label (label_text is 1,"),
    "numeric sentence": (row(3, sentence=2.5), "no sentence (sentence is 2.5,"),
    "true for a label": (row(3, label_text=True), "no label (label_text is True,"),
    "a list for a sentence": (row(3, sentence=["film"]), "no sentence (sentence is ['film'],"),
    "an id that stands twice": (row(3, id="c1"), "id 'c1' stands in comments.jsonl line 1 too"),
    "truncated": (b'{"sentence": "x", "lab', "not one JSON object (Unterminated string starting at: column 19)"),
    "two objects": (b'{"sentence": "x"} {"label_text": "positive"}', "not one JSON object (Extra data: column 19)"),
    "a list of fields": (b'["x", "positive"]', "not one JSON object (an array or a single value)"),
    "Latin-1": ('{"sentence": "schön"}'.encode("latin-1"), "not UTF-8, save the file as that (byte 0xf6: "),
    "cut inside a letter": ('{"sentence": "schö'.encode()[:-1], "not UTF-8, save the file as that (byte 0xc3: "),
    "NaN": (b'{"sentence": "x", "label_text": "positive", "score": NaN}', "(NaN is not a finite number)"),
    "Infinity": (b'{"sentence": "x", "label_text": "positive", "score": [-Infinity]}', "(-Infinity is not a finite"),
    "a number without end": (b'{"sentence": "x", "label_text": "positive", "n": 1e999}', "(1e999 is not a finite"),
    "a key that stands twice": (
        b'{"sentence": "x", "label_text": "positive", "label_text": "negative"}',
        "(the key 'label_text' stands twice in an object)",
    ),
    "half a surrogate pair": (b'{"sentence": "\\ud83d", "label_text": "positive"}', "(half a surrogate pair)"),
    "nested without end": (b"[" * 100_000, "(nested too deeply)"),
}


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_faulty_row_is_named_by_file_and_line(fault, refused, options, tmp_path):
    line, message = ROW_FAULTS[fault]
    (tmp_path / "comments.jsonl").write_bytes(changed((3, line)))
    error = refused(train.main, *options, "--dataset_name", "comments.jsonl")
    assert "error: 1 bad row: comments.jsonl line 3: " in error
    assert message in error
    assert "task sst2's labels (positive, negative); correct the rows" in error


def test_all_faults_of_both_splits_are_named_at_once_in_their_order(refused, options, tmp_path):
    (tmp_path / "data").mkdir()
    faults = (2, row(2, label_text="no")), (5, b"{"), (9, row(9, sentence=None, id="c8")), (10, row(10, id="c8"))
    (tmp_path / "data" / "train.jsonl").write_bytes(changed(*faults))
    (tmp_path / "data" / "validation.jsonl").write_bytes(changed((4, b"[]"), (7, row(7, label_text=0))))
    error = refused(train.main, *options, "--dataset_name", "data")
    assert "error: 6 bad rows: " in error
    assert re.findall(r"(\w+)\.jsonl line (\d+): ", error) == [
        *(("train", number) for number in ("2", "5", "9", "10")),
        *(("validation", number) for number in ("4", "7")),
    ]
    assert "line 9: no sentence (sentence is null, not a text that is not empty), id 'c8' stands in data/train" in error


def test_of_many_faults_the_first_ten_are_named_and_the_others_counted(refused, options, tmp_path):
    faults = [(number, row(number, label_text="?") if number % 2 else b"{") for number in range(3, 16)]
    (tmp_path / "comments.jsonl").write_bytes(changed(*faults))
    error = refused(train.main, *options, "--dataset_name", "comments.jsonl")
    assert "error: 13 bad rows: " in error
    assert re.findall(r"line (\d+): ", error) == [str(number) for number in range(3, 13)]
    assert "; and 3 more; " in error


def test_what_an_error_quotes_is_short(refused, options, tmp_path):
    faults = [(number, row(number, label_text="long " * 20_000)) for number in range(1, 21)]
    (tmp_path / "comments.jsonl").write_bytes(changed(*faults))
    error = refused(train.main, *options, "--dataset_name", "comments.jsonl")
    assert "line 1: label 'long long " in error
    assert len(error) < 2000


PLAIN = changed()
FILE_FAULTS = {
    "empty": (b"", "comments.jsonl: its split train has no rows; add rows"),
    "blank lines alone": (b"\xef\xbb\xbf\r\n\n  \n", "comments.jsonl: its split train has no rows; add rows"),
    "UTF-16": (PLAIN.decode().encode("utf-16"), "comments.jsonl: is UTF-16 text; save it as UTF-8"),
    "UTF-16 without a byte order mark": (PLAIN.decode().encode("utf-16-be"), "comments.jsonl: is UTF-16 text; save"),
    "UTF-32": (PLAIN.decode().encode("utf-32"), "comments.jsonl: is UTF-32 text; save it as UTF-8"),
    "Latin-1": (
        changed((4, row(4, sentence="schön")), (6, row(6, sentence="schöner"))).decode().encode("latin-1"),
        "2 bad rows: comments.jsonl line 4: not UTF-8, save the file as that (byte 0xf6: ",
    ),
    "cut off": (PLAIN[:-20], "1 bad row: comments.jsonl line 20: not one JSON object"),
    "old Mac line ends": (PLAIN.replace(b"\n", b"\r"), "1 bad row: comments.jsonl line 1: not one JSON object (Extra"),
    "one row": (PLAIN.split(b"\n")[0], "comments.jsonl: 1 row cannot be split into train and validation; add rows"),
    "one sentence": (
        changed(*((number, row(number, sentence="same")) for number in range(1, 21))),
        "comments.jsonl: 1 row cannot be split into train and validation; add rows",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_faulty_file_is_named(fault, refused, options, tmp_path):
    content, message = FILE_FAULTS[fault]
    (tmp_path / "comments.jsonl").write_bytes(content)
    assert f"error: {message}" in refused(train.main, *options, "--dataset_name", "comments.jsonl")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_named(split, refused, options, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(b"" if name == split else PLAIN)
    error = refused(train.main, *options, "--dataset_name", "data")
    assert f"error: data: its split {split} has no rows; add rows" in error


FIELDS = {"system_prompt": "Judge it.", "labels": ["für", "gegen"], "answer_field": "Haltung:"}
TASK_FAULTS = {
    "one label": (FIELDS | {"labels": ["für"]}, "the field 'labels' must hold two or more labels"),
    "labels equal but for case": (FIELDS | {"labels": ["für", "gegen", "Für"]}, "the labels 'für' and 'Für' do not"),
    "labels equal but for normal form": (FIELDS | {"labels": ["für", "FU\u0308R"]}, "do not differ in more than case"),
    "the same label twice": (FIELDS | {"labels": ["für", "für"]}, "the labels 'für' and 'für' do not differ"),
    "a key that stands twice": (
        b'{"labels": ["a", "b"], "labels": ["b", "c"]}',
        "not a JSON object (the key 'labels' stands twice in an object)",
    ),
    "NaN": (b'{"labels": NaN}', "not a JSON object (NaN is not a finite number)"),
    "truncated": (b'{\n "labels": ["a",', "not a JSON object (Expecting value: line 2 column 17)"),
    "a list": (b"[]", "a task is a JSON object with system_prompt, labels and answer_field"),
    "empty": (b"", "not a JSON object (Expecting value: column 1)"),
    "UTF-16": (json.dumps(FIELDS).encode("utf-16"), "line 1: not UTF-8; save the file as UTF-8"),
    "Latin-1": (
        json.dumps(FIELDS, ensure_ascii=False, indent=1).encode("latin-1"),
        "line 4: not UTF-8; save the file as UTF-8",
    ),
}


@pytest.mark.parametrize("fault", TASK_FAULTS)
def test_a_faulty_task_file_is_named(fault, refused, options, tmp_path):
    content, message = TASK_FAULTS[fault]
    (tmp_path / "comments.jsonl").write_bytes(PLAIN)
    (tmp_path / "own.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    error = refused(train.main, *options, "--dataset_name", "comments.jsonl", "--task", "own.json")
    assert error.startswith("train.py: error: own.json")
    assert message in error


# ---------------------------------------------------------------------------------------------------------------------
# merge_labels.py

GROUPS = {"good": ["positive"], "bad": ["negative"]}
MERGE_FAULTS = {
    "chained": ({"a": ["positive"], "positive": ["negative"]}, "'positive' is a group and an old label of the group"),
    "chained, another case": ({"a": ["positive"], "POSITIVE ": ["negative"]}, "'POSITIVE ' is a group and an old"),
    "cyclic": ({"positive": ["negative"], "negative": ["positive"]}, "'positive' is a group and an old label of the"),
    "groups equal but for case": ({"a": ["positive"], "A": ["negative"]}, "the groups 'a' and 'A' are spellings"),
    "groups equal but for normal form": ({"é": ["positive"], "e\u0301": ["negative"]}, "are spellings of one label"),
    "a label in two groups": ({"a": ["positive", "negative"], "b": ["Negative"]}, "label 'Negative' is in two groups"),
    "a group twice": ('{"a": ["positive"], "a": ["negative"]}', "not JSON (the key 'a' stands twice in an object)"),
    "truncated": ('{"a": ["positive"', "not JSON (Expecting ',' delimiter: column 18)"),
    "NaN": ('{"a": NaN}', "not JSON (NaN is not a finite number)"),
}


@pytest.fixture
def merge_options(tmp_path):
    """merge_labels.py's options without the merge, over the output of an earlier run."""
    (tmp_path / "comments.jsonl").write_bytes(PLAIN)
    (tmp_path / "out.jsonl").write_bytes(b"an earlier output")
    return ["comments.jsonl", "--field", "label_text", "--output", "out.jsonl", "--overwrite"]


@pytest.mark.parametrize("fault", MERGE_FAULTS)
def test_a_merge_that_contradicts_itself_is_refused(fault, refused, merge_options):
    groups, message = MERGE_FAULTS[fault]
    text = groups if isinstance(groups, str) else json.dumps(groups)
    error = refused(merge_labels.main, *merge_options, "--merge", text)
    assert error.startswith("merge_labels.py: error: --merge: ")
    assert message in error


def test_a_group_may_have_the_name_of_a_label_of_its_own(merge_options, tmp_path):
    groups = {"negative": ["negative"], "POSITIVE": ["positive"]}
    assert merge_labels.main([*merge_options, "--merge", json.dumps(groups)]) == 0
    merged = [json.loads(line)["label_text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert merged == [("negative", "POSITIVE")[record["label_text"] == "positive"] for record in RECORDS]


def test_all_rows_that_cannot_be_merged_are_named_at_once(refused, merge_options, tmp_path):
    faults = {
        2: (b'{"label_text"', "not one JSON object (Expecting ':' delimiter: column 14)"),
        4: (row(4, label_text="neutral"), "label 'neutral' is in no group"),
        5: (row(5, label_text=None), "no text in the field 'label_text'"),
        6: (row(6, label_text=1), "no text in the field 'label_text'"),
        8: (row(8, label_text=...), "no text in the field 'label_text'"),
        9: (row(9, label_text=""), "label '' is in no group"),
        12: (b'{"label_text": "positive", "label_text": "positive"}', "the key 'label_text' stands twice"),
        15: (b'{"label_text": "positive", "score": NaN}', "NaN is not a finite number"),
        20: (b'{"label_text": "\xe4"}', "not UTF-8"),
    }
    (tmp_path / "comments.jsonl").write_bytes(changed(*((number, line) for number, (line, _) in faults.items())))
    error = refused(merge_labels.main, *merge_options, "--merge", json.dumps(GROUPS))
    assert "error: 9 bad rows: " in error
    named = re.findall(r"comments\.jsonl line (\d+): (.*?); ", error)
    assert [int(number) for number, _ in named] == list(faults)
    assert all(message in text for (_, text), (_, message) in zip(named, faults.values(), strict=True))
    assert "name the label's field with --field" in error


@pytest.mark.parametrize(("content", "message"), [(b"", "has no rows"), ("x".encode("utf-16"), "is UTF-16 text; save")])
def test_a_file_that_cannot_be_merged_is_named(content, message, refused, merge_options, tmp_path):
    (tmp_path / "comments.jsonl").write_bytes(content)
    error = refused(merge_labels.main, *merge_options, "--merge", json.dumps(GROUPS))
    assert f"error: comments.jsonl: {message}" in error


def test_labels_that_the_file_does_not_have_are_all_named(refused, merge_options):
    groups = {"good": ["positive", "great"], "bad": ["negative", "poor"]}
    error = refused(merge_labels.main, *merge_options, "--merge", json.dumps(groups))
    assert "error: comments.jsonl: no row has the label 'great' or 'poor'; name the labels that it has" in error


def test_killed_while_it_writes_the_output_is_the_old_or_the_new_one(merge_options, tmp_path):
    text = "a film like many others . " * 100
    records = [{"text": f"{number} {text}", "label_text": TASK.labels[number % 2]} for number in range(20_000)]
    write_json_lines(tmp_path / "comments.jsonl", records)
    output = tmp_path / "out.jsonl"
    old = output.read_bytes()
    command = [sys.executable, REPOSITORY / "merge_labels.py", *merge_options, "--merge", json.dumps(GROUPS)]
    assert merge_labels.main([str(option) for option in command[2:]]) == 0
    new = output.read_bytes()
    output.write_bytes(old)
    part_written = 0
    for share in (1, 0, 0.5):
        for path in hidden_beside(output):
            path.unlink()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        sizes = []
        while process.poll() is None and not (sizes and sizes[-1] >= share * len(new)):
            sizes += [path.stat().st_size for path in hidden_beside(output)]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert output.read_bytes() in (old, new)
        part_written += any(0 < path.stat().st_size < len(new) for path in hidden_beside(output))
        output.write_bytes(old)
    assert part_written
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert output.read_bytes() == new
    assert not hidden_beside(output)


def hidden_beside(output):
    return list(output.parent.glob(f".{output.name}.*"))


# ---------------------------------------------------------------------------------------------------------------------
# What must work


@pytest.fixture
def trained(options, tmp_path, capfd):
    """A function that trains on a file or folder for one step and returns (what was printed, run.json)."""

    def run_trained(data, *more):
        argv = [*options[:-2], "--steps", "1", "--dataset_name", data, *more]
        assert train.main([str(option) for option in argv]) == 0
        run = json.loads((tmp_path / "models" / "x" / "run.json").read_text(encoding="utf-8"))
        return capfd.readouterr().out, run

    return run_trained


SEPARATORS = changed((5, row(5, sentence="a\u2028b\u0085c")), (6, row(6, sentence="schön\u2029, d"))).rstrip()
FORMS = {
    "byte order mark": b"\xef\xbb\xbf" + SEPARATORS,
    "CRLF": SEPARATORS.replace(b"\n", b"\r\n"),
    "blank lines": b"\n \n\t" + SEPARATORS.replace(b"\n", b"\n\n \r\n"),
    "a line end at the end": SEPARATORS + b"\n",
    "all of them": b"\xef\xbb\xbf\r\n" + SEPARATORS.replace(b"\n", b"\r\n\r\n") + b"\r\n\r\n",
}


def test_separators_inside_a_text_do_not_end_a_row(tmp_path):
    (tmp_path / "plain.jsonl").write_bytes(SEPARATORS)
    splits = read_splits("plain.jsonl", TASK)
    sentences = [*splits.train["sentence"], *splits.validation["sentence"]]
    assert len(sentences) == len(RECORDS)
    assert {"a\u2028b\u0085c", "schön\u2029, d"} < set(sentences)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_a_file_does_not_change_its_rows(form, trained, tmp_path):
    (tmp_path / "plain.jsonl").write_bytes(SEPARATORS)
    (tmp_path / "comments.jsonl").write_bytes(FORMS[form])
    assert trained("comments.jsonl")[1]["data"]["fingerprint"] == read_splits("plain.jsonl", TASK).fingerprint()


def cut_counts(printed):
    """Return how many rows of train and validation train.py says it cut."""
    return sum(int(count) for count in re.findall(r"^(?:train|validation): \d+ rows, (\d+) cut", printed, re.MULTILINE))


def test_a_row_at_the_length_limit_is_whole_and_one_over_is_cut(trained, tiny_base, tmp_path):
    sentence = "a film much longer than all the others"
    (tmp_path / "comments.jsonl").write_bytes(changed((3, row(3, sentence=sentence))))
    tokenizer = load_tokenizer(str(tiny_base))
    answer = max(len(answer_ids(tokenizer, label)) for label in TASK.labels)
    limit = len(prompt_ids(tokenizer, TASK, sentence)) + answer
    assert cut_counts(trained("comments.jsonl", "--max_seq_length", limit)[0]) == 0
    assert cut_counts(trained("comments.jsonl", "--max_seq_length", limit - 1)[0]) == 1


@pytest.mark.parametrize("word", ["word ", "w"])
def test_a_sentence_of_100_000_characters_is_cut_and_that_is_said(word, trained, tmp_path):
    sentence = (word * 100_000)[:100_000]
    (tmp_path / "comments.jsonl").write_bytes(changed((3, row(3, sentence=sentence))))
    start = time.perf_counter()
    assert cut_counts(trained("comments.jsonl", "--max_seq_length", "128")[0]) == 1
    assert time.perf_counter() - start < 20


def test_template_and_special_tokens_inside_a_sentence_stay_text(trained, tiny_base, tmp_path):
    tokenizer = load_tokenizer(str(tiny_base))
    marks = ["<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", *tokenizer.all_special_tokens]
    sentences = {number: f"{mark} film {mark}{number}" for number, mark in enumerate(marks, start=1)}
    changes = [(number, row(number, sentence=sentence)) for number, sentence in sentences.items()]
    (tmp_path / "comments.jsonl").write_bytes(changed(*changes))
    splits = read_splits("comments.jsonl", TASK)
    assert trained("comments.jsonl")[1]["data"]["fingerprint"] == splits.fingerprint()
    encoded, _ = encode_rows(tokenizer, TASK, [*splits.train, *splits.validation], 512)
    texts = [tokenizer.decode(found["prompt_ids"]) for found in encoded]
    for sentence in sentences.values():
        assert sum(f"\nSentence: {sentence}\n" in text for text in texts) == 1
    special = set(tokenizer.all_special_ids)
    for found in encoded:
        assert not special & set(found["prompt_ids"][len(tokenizer("").input_ids) :])
        assert special & set(found["answer_ids"]) == {tokenizer.eos_token_id}


def test_a_sentence_of_both_splits_is_left_out_of_train_and_its_place_is_said(trained, tmp_path):
    (tmp_path / "data").mkdir()
    both = write_json_lines(
        tmp_path / "data" / "train.jsonl", RECORDS + [row(2, id="again", sentence="film number 2 ")]
    )
    held_out = [row(number) for number in (2, 5)] + [row(1, id="new", sentence="another")]
    write_json_lines(tmp_path / "data" / "validation.jsonl", held_out)
    printed, run = trained("data")
    places = "; ".join(f"{both.relative_to(tmp_path)} line {number}" for number in (2, 5, 21))
    assert f"3 train rows left out: their sentences are validation rows too ({places})\n" in printed
    assert (run["data"]["train_rows"], run["data"]["validation_rows"]) == (18, 3)


def test_train_rows_of_one_label_are_noted(trained, tmp_path):
    changes = [(number, row(number, label_text="positive")) for number in range(1, 21)]
    (tmp_path / "comments.jsonl").write_bytes(changed(*changes))
    printed, _ = trained("comments.jsonl")
    assert "all 16 train rows have the label 'positive': there is nothing to tell apart\n" in printed


def test_labels_of_the_task_without_a_train_row_are_noted(trained, tmp_path):
    (tmp_path / "comments.jsonl").write_bytes(PLAIN)
    fields = FIELDS | {"labels": ["Positive", "mixed", "negative", "unclear"]}
    (tmp_path / "own.json").write_text(json.dumps(fields))
    printed, _ = trained("comments.jsonl", "--task", "own.json")
    assert "labels without a train row, which are not learned: 'mixed', 'unclear'\n" in printed


def test_labels_of_the_data_get_the_tasks_spelling_whatever_their_case_and_normal_form(trained, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(FIELDS))
    spellings = ("für", "FÜR", "fu\u0308r", " Fu\u0308R ", "gegen", "GEGEN")
    changes = [(number, row(number, label_text=spellings[number % 6])) for number in range(1, 21)]
    (tmp_path / "comments.jsonl").write_bytes(changed(*changes))
    printed, run = trained("comments.jsonl", "--task", "own.json")
    splits = read_splits("comments.jsonl", load_task("own.json"))
    assert {*splits.train["label_text"], *splits.validation["label_text"]} == {"für", "gegen"}
    assert run["data"]["fingerprint"] == splits.fingerprint()
    assert "labels without a train row" not in printed
