"""Uploads that the Hub cuts off: what it holds is the old set or the new one, and the next try makes it the new one.

The notebook's upload of a data set, as papermill runs it, and train.py's of an adapter. Each fault lasts for the first
upload to a repository of its own; the uploads run side by side.
"""

import contextlib
import json
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import REPOSITORY, TOKEN
from hub_server import Answer, HubServer, Repository, finish, run, start

import train
from command_line import UserError

OVERLOADED, UNREACHABLE = "the Hub is overloaded or out of order", "the Hub cannot be reached"
FAULTS = {  # name of the repository: the answer to a commit, words of the error, whether the commit is made
    "error-500": (Answer(500), OVERLOADED, False),
    "error-429": (Answer(429), OVERLOADED, False),
    "cut-in-the-body": (Answer(0, read=0.5), UNREACHABLE, False),
    "answer-lost": (Answer(0, done=True), UNREACHABLE, True),
}
MIXED = "mixed-by-the-hub"  # the Hub takes the commit and keeps an old file


@contextlib.contextmanager
def faulty_hub(kind, old):
    """A Hub with a repository of that kind, holding `old`, for each fault."""
    with HubServer() as hub:
        for name in (*FAULTS, MIXED):
            hub.repositories[kind, f"someone/{name}"] = Repository(private=True)
            hub.repositories[kind, f"someone/{name}"].add_commit(old)
        hub.failures.append(lambda request: fault(hub, request))
        yield hub
    assert hub.unanswered == []


def fault(hub, request):
    """Return the answer in place of the right one, or None; every upload begins with one "preupload"."""
    name = next((name for name in (*FAULTS, MIXED) if f"/someone/{name}/" in request.path), None)
    if name is None or sum(f"/someone/{name}/preupload/" in earlier.path for earlier in hub.requests) != 1:
        return None
    if name == MIXED and "/resolve/" in request.path:
        first, *_, last = hub.repositories["dataset", f"someone/{name}"].commits
        last.files["task.json"] = first.files["task.json"]
    return FAULTS[name][0] if name in FAULTS and "/commit/" in request.path else None


def contents(hub, kind, name):
    """Return what a repository held after each of its commits."""
    return [dict(commit.files) for commit in hub.repositories[kind, f"someone/{name}"].commits]


# ---------------------------------------------------------------------------------------------------------------------
# A data set, uploaded by the notebook

OLD_SET = {"README.md": b"old\n", "task.json": b"{}\n", "train.jsonl": b'{"a": 1}\n', "validation.jsonl": b'{"a": 2}\n'}
# As if the upload took the five minutes after which upload_folder of the Hub's client begins another commit.
SLOW_UPLOAD = """
from huggingface_hub import _upload_pipeline

_upload_pipeline.MAX_COMMIT_INTERVAL = 0
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A copy of the notebook that counts no tokens, which is most of its time."""
    book = nbformat.read(REPOSITORY / "pre_processing.ipynb", as_version=4)
    book.cells = [nbformat.v4.new_code_cell(SLOW_UPLOAD), *(cell for cell in book.cells if cell.id != "tokens")]
    copy = tmp_path_factory.mktemp("notebook") / "copy.ipynb"
    nbformat.write(book, copy)
    return copy


def start_notebook(hub, notebook, cwd, name):
    """Start the upload of cwd/set to someone/<name>; the executed notebook is cwd/executed.ipynb."""
    parameters = {"row_limit": 40, "output_dir": cwd / "set", "hub_repository": f"someone/{name}"}
    options = [part for parameter in parameters.items() for part in ("-p", *parameter)]
    executed = cwd / "executed.ipynb"
    return start(hub, [sys.executable, "-m", "papermill", notebook, executed, *options, "--cwd", REPOSITORY], cwd)


@pytest.fixture(scope="module")
def hub():
    with faulty_hub("dataset", OLD_SET) as server:
        yield server


@pytest.fixture(scope="module")
def uploads(hub, notebook, tmp_path_factory):
    """{name: [first upload, second]}; `held` is what the Hub held after each of its commits until then."""
    names = (*FAULTS, MIXED)
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    found = {name: [] for name in names}
    for _ in range(2):
        processes = {name: start_notebook(hub, notebook, folder, name) for name, folder in folders.items()}
        for name, process in processes.items():
            code, stdout, stderr = finish(process)
            executed = (folders[name] / "executed.ipynb").read_text(encoding="utf-8")
            written = {path.name: path.read_bytes() for path in folders[name].glob("set/*")}
            held = contents(hub, "dataset", name)
            upload = SimpleNamespace(code=code, log=stdout + stderr, executed=executed, written=written, held=held)
            found[name].append(upload)
    return found


def cell_error(executed):
    """Return (name, sentence) of the error in an executed notebook."""
    cells = json.loads(executed)["cells"]
    (output,) = (output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "error")
    return output["ename"], output["evalue"]


@pytest.mark.parametrize("name", FAULTS)
def test_notebook_fails_in_a_sentence_and_leaves_the_old_set_or_the_new(uploads, name):
    _, words, made = FAULTS[name]
    upload, _ = uploads[name]
    assert upload.code != 0
    kind, sentence = cell_error(upload.executed)
    assert kind == "UserError" and sentence.startswith(f"data set someone/{name}: {words}") and "\n" not in sentence
    assert f"UserError: {sentence}" in upload.log
    assert upload.held == ([OLD_SET, upload.written] if made else [OLD_SET])


def test_notebook_says_where_the_hub_holds_something_else(uploads):
    upload, _ = uploads[MIXED]
    assert upload.code != 0
    kind, sentence = cell_error(upload.executed)
    assert kind == "UserError" and sentence.startswith(f"someone/{MIXED}: what is there differs from ")
    assert upload.held == [OLD_SET, upload.written | {"task.json": OLD_SET["task.json"]}]


@pytest.mark.parametrize("name", [*FAULTS, MIXED])
def test_notebook_run_again_uploads_the_whole_set_once(uploads, name):
    first, again = uploads[name]
    assert again.code == 0
    assert again.written == first.written != OLD_SET
    assert again.held[len(first.held) :] == ([] if first.held[-1] == first.written else [first.written])
    assert again.held[-1] == first.written


@pytest.mark.parametrize("name", [*FAULTS, MIXED])
def test_notebook_that_failed_holds_no_token(hub, uploads, name):
    assert TOKEN.fullmatch(hub.token)
    assert not any(TOKEN.search(upload.executed + upload.log) for upload in uploads[name])


# ---------------------------------------------------------------------------------------------------------------------
# An adapter, uploaded by train.py

OLD_ADAPTER = {"README.md": b"old\n", "adapter_config.json": b"{}", "adapter_model.safetensors": b"0"}
NEW_ADAPTER = {
    "README.md": b"---\nbase_model: someone/base\n---\n",
    "adapter_config.json": b'{"r": 64}',
    "adapter_model.safetensors": bytes(range(256)) * 4000,
    "tokenizer.json": b"{}",
}
NEW_ADAPTER["run.json"] = json.dumps({"steps": 2, "files": [*NEW_ADAPTER, "run.json"]}).encode()
UPLOADS = (
    SLOW_UPLOAD
    + """
import json, time
from pathlib import Path
import train
from command_line import UserError

time.sleep = lambda seconds: None  # between the tries of the Hub's client

def upload(name):
    try:
        train.push_to_hub(Path("adapter"), f"someone/{name}")
    except UserError as error:
        return str(error)
    return ""

print(json.dumps({name: [upload(name) for _ in range(3)] for name in NAMES}))
"""
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{name: (what each of three uploads said, "" for one that went well; what the Hub held after each commit)}."""
    cwd = tmp_path_factory.mktemp("training")
    (cwd / "adapter").mkdir()
    (cwd / "adapter" / "notes.txt").write_text("the user's own")
    for file, content in NEW_ADAPTER.items():
        (cwd / "adapter" / file).write_bytes(content)
    with faulty_hub("model", OLD_ADAPTER) as hub:
        printed = run(hub, [sys.executable, "-c", UPLOADS.replace("NAMES", repr([*FAULTS]))], cwd)
        said = json.loads(printed.splitlines()[-1])
        return {name: (said[name], contents(hub, "model", name)) for name in FAULTS}


@pytest.mark.parametrize("name", FAULTS)
def test_train_fails_in_a_sentence_and_the_next_upload_is_whole(adapters, name):
    _, words, _ = FAULTS[name]
    (first, *later), held = adapters[name]
    assert first.startswith(f"--push_to_hub someone/{name}: {words}") and "\n" not in first
    assert later == ["", ""]
    assert held == [OLD_ADAPTER, NEW_ADAPTER]


def test_an_adapter_that_does_not_name_its_files_is_not_uploaded_as_nothing(tmp_path):
    (tmp_path / "run.json").write_text('{"steps": 2}')
    with pytest.raises(UserError, match="does not say which files to upload"):
        train.push_to_hub(tmp_path, "someone/adapter")
