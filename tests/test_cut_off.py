"""Training runs that are cut off, as real processes with real signals, full disks and full memory, and resumed."""

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TOKEN, write_json_lines

import evaluate
import train
from command_line import UserError, replacing

KILLS = int(os.environ.get("KILLS", "3"))  # make soak: 20
SHORT = ["--adapters_name", "run", "--task", "sst2", "--train_batch_size", "4", "--learning_rate", "1e-2"]
MOMENTS = ("inside a save", "after a random time", "while the result is written")


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    """A function that makes a folder with the labelled file, for one run of train.py in it."""

    def make():
        folder = tmp_path_factory.mktemp("run")
        records = [
            {"sentence": f"a {word} film , number {number} of its kind", "label_text": label}
            for number in range(4)
            for word, label in (("fine", "positive"), ("dull", "negative"), ("warm", "positive"), ("grim", "negative"))
        ]
        write_json_lines(folder / "films.jsonl", records)
        return folder

    return make


@pytest.fixture(scope="module")
def options(tiny_base):
    """The options of all runs here: 12 epochs of 3 steps."""
    return [*SHORT, "--base_model_name", str(tiny_base), "--dataset_name", "films.jsonl", "--epoch", "12"]


def start(folder, options, **more):
    """Start train.py in `folder`; what it prints goes to output.txt there."""
    environment = {**os.environ, "HF_TOKEN": "hf_" + "y" * 34, "OMP_NUM_THREADS": "1"}
    with open(folder / "output.txt", "w") as output:
        command = [sys.executable, REPOSITORY / "train.py", *options]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, **more)


def finish(process, folder):
    """Wait for a process and return (exit code, what it printed)."""
    code, printed = process.wait(timeout=300), (folder / "output.txt").read_text()
    assert "Traceback" not in printed
    assert not TOKEN.search(printed)
    return code, printed


def run_to_the_end(folder, options):
    code, printed = finish(start(folder, options), folder)
    assert code == 0, printed
    return printed


def wait_for(process, condition):
    """Return as soon as `condition()` is true; fail if the process ends before."""
    while not condition():
        assert process.poll() is None, "the run ended before it could be cut off"
        time.sleep(0.0005)


def first_checkpoint(folder):
    return any(re.fullmatch(r"checkpoint-\d+", path.name) for path in (folder / "models/run/checkpoints").glob("*"))


def result(folder):
    """Return the bytes of a finished run's adapter, history and label probabilities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert evaluate.main(["--adapters_name", "run", "--decoding", "labels"]) == 0
    run = folder / "models" / "run"
    files = ("adapter_model.safetensors", "history.csv", "evaluation/labels/predictions.csv")
    return [(run / file).read_bytes() for file in files]


@pytest.fixture(scope="module")
def uncut(place, options):
    """The result of a run that nothing happened to."""
    folder = place()
    run_to_the_end(folder, options)
    return result(folder)


def kill_and_resume(folder, options, moment, number):
    """Run train.py, kill it with SIGKILL at the moment (a random one of `number`), resume it; return what that said."""
    process, run = start(folder, options), folder / "models" / "run"
    chance = random.Random(number)
    wait_for(process, lambda: first_checkpoint(folder))
    if moment == "inside a save":
        for _ in range(chance.randrange(4)):  # not always the same one
            wait_for(process, lambda: not list(run.glob("checkpoints/.checkpoint-*")))
            wait_for(process, lambda: list(run.glob("checkpoints/.checkpoint-*")))
        wait_for(process, lambda: list(run.glob("checkpoints/.checkpoint-*")))
    elif moment == "while the result is written":
        wait_for(process, lambda: (run / ".result.part").exists())
        time.sleep(chance.random() * 0.05)
    else:
        time.sleep(chance.random())
    process.kill()
    process.wait()
    return run_to_the_end(folder, [*options, "--resume"])


@pytest.fixture(scope="module")
def killed(place, options):
    """{(moment, number): (folder, what the resumed run printed)}, two runs at a time."""
    cases = [(MOMENTS[number % len(MOMENTS)], number) for number in range(KILLS)]
    folders = [place() for _ in cases]
    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda case, folder: kill_and_resume(folder, options, *case), cases, folders))
    return dict(zip(cases, zip(folders, printed, strict=True), strict=True))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_that_is_resumed_gives_the_result_of_one_never_killed(killed, uncut, number):
    folder, printed = killed[MOMENTS[number % len(MOMENTS)], number]
    assert "Resuming from models/run/checkpoints/checkpoint-" in printed or "this run is finished" in printed
    assert result(folder) == uncut
    assert not any(TOKEN.search(path.read_bytes().decode("latin-1")) for path in folder.rglob("*") if path.is_file())
    left = {path.name for path in (folder / "models" / "run").rglob("*")}
    assert not [name for name in left if name.endswith(".part")]
    assert {path.name for path in (folder / "models/run/checkpoints").iterdir()} == {"checkpoint-33", "checkpoint-36"}


def test_a_run_killed_while_its_files_change_places_can_be_resumed(killed, uncut, options, tmp_path):
    folder, _ = killed[MOMENTS[0], 0]
    shutil.copytree(folder, tmp_path / "copy")
    run = tmp_path / "copy" / "models" / "run"
    (run / "run.json").rename(run / "checkpoints" / "run.json")
    (run / "adapter_model.safetensors").unlink()
    assert "Resuming from models/run/checkpoints/checkpoint-36" in run_to_the_end(
        tmp_path / "copy", [*options, "--resume"]
    )
    assert result(tmp_path / "copy") == uncut


@pytest.fixture(scope="module", params=[signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def stopped(request, place, options):
    """(signal, folder, exit code, what was printed) of a run stopped by a signal; a second one was refused."""
    folder = place()
    process = start(folder, options)
    wait_for(process, lambda: first_checkpoint(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        process.send_signal(signal.SIGSTOP)  # so that it is not over before the second one comes
        second = [train.main([*options, option]) for option in ("--overwrite", "--resume")]
        process.send_signal(signal.SIGCONT)
    assert second == [2, 2]
    process.send_signal(request.param)
    return request.param, folder, *finish(process, folder)


def test_a_signal_keeps_the_checkpoint_and_prints_the_command_that_goes_on(stopped, uncut):
    number, folder, code, printed = stopped
    assert code == 128 + number
    last = printed.splitlines()[-1]
    found = re.fullmatch(r"train.py: interrupted; kept: (\S+); to go on: python train.py (.+)", last)
    assert found, last
    assert (folder / found[1] / "contents.json").is_file()
    run_to_the_end(folder, shlex.split(found[2]))
    assert result(folder) == uncut


RUNS = {  # options, and the batch at which Ctrl-C comes
    "between two evaluations": (["--epoch", "3", "--save_steps", "3"], 8),
    "at a run by steps": (["--steps", "21"], 13),
    "while gradients are accumulated": (["--epoch", "3", "--gradient_accumulation_steps", "3", "--save_steps", "1"], 6),
    "with the best kept": (["--epoch", "6", "--keep", "best", "--learning_rate", "3e-2"], 18),
    "before it stops early": (["--epoch", "6", "--early_stopping_patience", "2", "--learning_rate", "3e-2"], 9),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_anywhere_goes_on_as_if_it_had_not_been(name, tiny_base, comments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more, batch = RUNS[name]
    fixed = [*SHORT[2:], "--base_model_name", str(tiny_base), "--dataset_name", str(comments), *more]
    whole, cut = ([*fixed, "--adapters_name", adapter] for adapter in ("whole", "cut"))
    assert train.main(whole) == 0
    batches = []
    step = train.AnswerLossTrainer.training_step

    def interrupted(*args):
        batches.append(args)
        if len(batches) == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.AnswerLossTrainer, "training_step", interrupted)
        assert train.main(cut) == 130
    assert not Path("models/cut/run.json").exists()
    assert train.main([*cut, "--resume"]) == 0
    for file in ("adapter_model.safetensors", "history.csv"):
        assert Path("models/cut", file).read_bytes() == Path("models/whole", file).read_bytes()
    kept = [json.loads(Path("models", adapter, "run.json").read_text())["kept_step"] for adapter in ("whole", "cut")]
    assert kept[0] == kept[1]


@pytest.fixture(scope="module")
def unfinished(place, options):
    """A folder with a run killed after its second checkpoint."""
    folder = place()
    process = start(folder, options)
    wait_for(process, lambda: (folder / "models/run/checkpoints/checkpoint-6").exists())
    process.kill()
    process.wait()
    return folder


@pytest.fixture
def half_done(unfinished, tmp_path, monkeypatch):
    """A copy of that folder, as the current one; returns the run's folder."""
    shutil.copytree(unfinished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy" / "models" / "run"


def test_a_killed_run_leaves_no_lock_and_is_not_replaced_unasked(half_done, options, refused):
    assert "--resume" in (line := refused(train.main, *options)) and "models/run: exists" in line
    assert train.main([*options[:-1], "1", "--overwrite"]) == 0


CHANGED = {
    "--learning_rate": ("1e-2", "1e-3"),
    "--seed": ("42", "7"),
    "--base_model_name": None,
    "--train_batch_size": ("4", "8"),
    "--eval_batch_size": ("8", "4"),
    "--gradient_accumulation_steps": ("1", "2"),
    "--lora_r": ("64", "8"),
    "--lora_alpha": ("16", "32"),
    "--lora_dropout": ("0.1", "0.2"),
    "--lora_target_modules": ("q_proj", "o_proj"),
    "--max_seq_length": ("512", "300"),
    "--epoch": ("12", "13"),
    "--keep": ("last", "best"),
    "--no_shared_prefix": ("False", "True"),
    "--early_stopping_patience": ("None", "2"),
}


@pytest.mark.parametrize("option", CHANGED)
def test_a_resumed_run_must_have_the_same_options(half_done, options, option, refused, tiny_base, tmp_path):
    if option == "--base_model_name":
        shutil.copytree(tiny_base, tmp_path / "other")
        old, new = str(tiny_base), str(tmp_path / "other")
    else:
        old, new = CHANGED[option]
    given = [option] if option == "--no_shared_prefix" else [option, new]
    line = refused(train.main, *options, *given, "--resume")
    assert line.startswith(f"train.py: error: {option}: was ")
    spelled = [str(float(text)) if re.fullmatch(r"1e-\d", text) else text for text in (old, new)]
    assert all(text in line for text in spelled)


def test_a_resumed_run_must_have_the_same_rows_task_and_weights(half_done, options, refused, tiny_base, tmp_path):
    films = Path("films.jsonl")
    before = films.read_text()
    films.write_text(before.replace("fine", "good", 1))
    assert "--dataset_name: the rows were others" in refused(train.main, *options, "--resume")
    films.write_text(before)
    task = {"system_prompt": "Judge.", "labels": ["positive", "negative"], "answer_field": "Sentence:"}
    Path("own.json").write_text(json.dumps(task))
    line = refused(train.main, *options, "--task", "own.json", "--resume")
    assert "--task: its " in line and "when the run was started" in line
    weights = tiny_base / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4] + b"\x00\x00\x00\x40")  # one number is another now, 2.0
        assert "its weights or its config.json were others when the" in refused(train.main, *options, "--resume")
    finally:
        weights.write_bytes(content)
    config = tiny_base / "config.json"
    content = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(content) | {"rms_norm_eps": 1e-3}))
        assert "its weights or its config.json were others when the" in refused(train.main, *options, "--resume")
    finally:
        config.write_text(content)
    tokenizer = tiny_base / "tokenizer.json"
    content = tokenizer.read_text()
    parts = json.loads(content)
    vocabulary = parts["model"]["vocab"]
    vocabulary["Ġfilm"], vocabulary["Ġnumber"] = vocabulary["Ġnumber"], vocabulary["Ġfilm"]
    try:
        tokenizer.write_text(json.dumps(parts))
        assert "its tokenizer gives other tokens than when the run" in refused(train.main, *options, "--resume")
    finally:
        tokenizer.write_text(content)


def test_what_changes_no_result_may_differ(half_done, options, uncut):
    Path("films.jsonl").rename("moved.jsonl")
    more = [
        "--dataset_name",
        "moved.jsonl",
        "--save_steps",
        "5",
        "--gradient_checkpointing",
        "--report_to",
        "tensorboard",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run_to_the_end(Path.cwd(), [*options, *more, "--resume"])
    assert result(Path.cwd()) == uncut


DAMAGES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "missing": Path.unlink,
    "other bytes": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"),
}


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_is_named_and_skipped(half_done, options, name, damage, capfd):
    newest, older = half_done / "checkpoints" / "checkpoint-6", half_done / "checkpoints" / "checkpoint-3"
    if not older.exists():
        pytest.fail("the run was killed too late")
    DAMAGES[damage](newest / name)
    assert train.checkpoints.newest_checkpoint(half_done) == older
    assert f"{newest}: incomplete, skipped" in capfd.readouterr().out


@pytest.mark.parametrize("contents", ["", "null", "[]", "{}", '{"optimizer.pt": 1}', "[1]"])
def test_a_checkpoint_whose_list_of_files_is_damaged_is_incomplete(half_done, contents):
    newest, older = half_done / "checkpoints" / "checkpoint-6", half_done / "checkpoints" / "checkpoint-3"
    (newest / train.checkpoints.CONTENTS).write_text(contents)
    assert train.checkpoints.find_checkpoints(half_done) == ([older], [newest])


def test_the_run_goes_on_from_the_older_checkpoint(half_done, options, uncut):
    newest = half_done / "checkpoints" / "checkpoint-6"
    (newest / "scheduler.pt").unlink()
    shutil.copytree(newest, newest.with_name(".checkpoint-9.part"))  # as a kill inside a save leaves it
    printed = run_to_the_end(Path.cwd(), [*options, "--resume"])
    for name in ("checkpoint-6", ".checkpoint-9.part"):
        assert f"models/run/checkpoints/{name}: incomplete, skipped" in printed
    assert "Resuming from models/run/checkpoints/checkpoint-3" in printed
    assert result(Path.cwd()) == uncut


def test_without_a_complete_checkpoint_there_is_nothing_to_resume(half_done, options, refused):
    for folder in (half_done / "checkpoints").glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    line = refused(train.main, *options, "--resume")
    assert "models/run/checkpoints: no complete checkpoint to resume from; start anew with --overwrite" in line


def refused_line(main, options):
    """Return the last line on stderr of a run that ends with 2 but may leave files, such as checkpoints."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(options) == 2
    return printed.getvalue().splitlines()[-1]


def in_fifth_step(monkeypatch, happen):
    """Have `happen(trainer)` called in the fifth training step from now on."""
    step, steps = train.AnswerLossTrainer.training_step, []

    def counted(trainer, *args):
        steps.append(args)
        if len(steps) == 5:
            happen(trainer)
        return step(trainer, *args)

    monkeypatch.setattr(train.AnswerLossTrainer, "training_step", counted)


def test_weights_that_become_nan_late_stop_there_and_keep_the_checkpoints(half_done, options, monkeypatch):
    in_fifth_step(monkeypatch, lambda trainer: trainer.trained[0].data[0, 0].fill_(float("nan")))
    shutil.rmtree("models")
    assert "step 5: the loss became NaN" in refused_line(train.main, options)
    assert [path.name for path in half_done.glob("checkpoints/checkpoint-*")] == ["checkpoint-3"]
    assert not (half_done / "run.json").exists()


def test_full_memory_in_a_later_epoch_keeps_the_checkpoints_and_says_how_to_go_on(half_done, options, monkeypatch):
    in_fifth_step(monkeypatch, lambda trainer: torch.empty(2**45))  # 140 TB
    shutil.rmtree("models")
    line = refused_line(train.main, options)
    assert "out of memory: a batch has 4 rows of up to 512 tokens; pass --gradient_checkpointing" in line
    assert "kept: models/run/checkpoints/checkpoint-3; to go on: python train.py" in line
    monkeypatch.undo()
    monkeypatch.chdir(half_done.parent.parent)
    assert train.main([*options, "--resume", "--gradient_checkpointing"]) == 0


FAILURES = {"NaN at once": ["--learning_rate", "1e38"], "no such module": ["--lora_target_modules", "x_proj"]}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_with_overwrite_that_fails_at_once_leaves_the_earlier_run(half_done, options, failure, refused):
    (half_done / "runs").mkdir()
    (half_done / "runs" / "log").write_text("of tensorboard")
    refused(train.main, *options, *FAILURES[failure], "--overwrite")  # compares all files before and after
    assert train.checkpoints.newest_checkpoint(half_done).name == "checkpoint-6"


def test_a_run_with_overwrite_that_is_killed_at_once_leaves_the_earlier_run(half_done, options, uncut):
    process = start(Path.cwd(), [*options, "--overwrite"])
    wait_for(process, lambda: (half_done / ".checkpoints.replaced").exists())
    process.kill()
    process.wait()
    assert not (half_done / "checkpoints" / "checkpoint-6").exists()
    assert "Resuming from models/run/checkpoints/checkpoint-6" in run_to_the_end(Path.cwd(), [*options, "--resume"])
    assert result(Path.cwd()) == uncut
    assert not list(half_done.glob(".*.replaced"))


def test_a_signal_that_comes_twice_is_still_answered_with_the_command_to_go_on(place, options):
    folder = place()
    process = start(folder, options)
    wait_for(process, lambda: first_checkpoint(folder))
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.002)
    code, printed = finish(process, folder)
    assert code == 130
    assert "to go on: python train.py" in printed.splitlines()[-1]


def test_a_run_stopped_before_its_first_checkpoint_leaves_nothing(place, options):
    folder = place()
    process = start(folder, options)
    wait_for(process, lambda: (folder / "models/run/.lock").exists())
    process.send_signal(signal.SIGTERM)
    code, printed = finish(process, folder)
    assert code == 143
    assert printed.splitlines()[-1] == "train.py: interrupted"
    assert {path.name for path in folder.iterdir()} == {"films.jsonl", "output.txt"}


def test_a_checkpoint_removes_broken_and_later_ones(half_done):
    folder = half_done / "checkpoints"
    shutil.copytree(folder / "checkpoint-6", folder / ".checkpoint-7.host.1.part")  # as a kill inside a save leaves it
    damaged = folder / "checkpoint-6" / "optimizer.pt"
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    with train.checkpoints.checkpoint(half_done, 5) as part:
        (part / "weights").write_text("new")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-5", "run.json"]


def test_a_run_that_waited_while_another_ended_does_not_replace_it(half_done, options, monkeypatch):
    """The second one finds the folder free, reads its data, and meanwhile the first one comes and goes."""
    shutil.rmtree("models")
    read_splits = train.read_splits

    def slow(*args):
        half_done.mkdir(parents=True)
        (half_done / "run.json").write_text("of the first")
        return read_splits(*args)

    monkeypatch.setattr(train, "read_splits", slow)
    assert "models/run: exists; pass --overwrite to replace it" in refused_line(train.main, options)
    assert (half_done / "run.json").read_text() == "of the first"


def test_a_lock_removed_by_the_run_that_held_it_is_no_lock(half_done, monkeypatch):
    """Opened before the first run ended and locked after it: a third run would make a new one."""
    flock = fcntl.flock

    def late(file, operation):
        (half_done / ".lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        pytest.raises(UserError, match="another run is writing there"),
        train.checkpoints.locked(half_done, True, False),
    ):
        pytest.fail("two runs in one folder")


def test_where_the_file_system_knows_no_locks_that_is_said_and_the_run_goes_on(half_done, options, monkeypatch, capfd):
    def unknown(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert train.main([*options[:-1], "1", "--overwrite"]) == 0
    assert "models/run: this file system knows no locks (No locks available)" in capfd.readouterr().out


def test_overwriting_leaves_nothing_of_the_old_adapter_and_all_that_is_the_users(half_done, options):
    assert train.main([*options[:-1], "1", "--overwrite"]) == 0
    run = json.loads((half_done / "run.json").read_text())
    assert run["files"] == sorted(path.name for path in half_done.glob("[!.]*") if path.is_file())
    (half_done / "vocab.txt").write_text("of another tokenizer")
    (half_done / "run.json").write_text(json.dumps(run | {"files": [*run["files"], "vocab.txt", "../../films.jsonl"]}))
    (half_done / "notes.md").write_text("mine")
    assert train.main([*options[:-1], "1", "--overwrite"]) == 0
    assert not (half_done / "vocab.txt").exists()
    assert (half_done / "notes.md").read_text() == "mine" and Path("films.jsonl").exists()
    assert "notes.md" not in json.loads((half_done / "run.json").read_text())["files"]
    assert not list(half_done.glob(".*"))


@pytest.mark.parametrize("killed_before", ["the second rename", "the removal"])
def test_a_folder_whose_replacement_was_cut_short_is_whole_again(killed_before, tmp_path):
    code = f"""
import os, shutil, signal
from pathlib import Path
from command_line import replacing
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
replace, calls = os.replace, []
def second(*args):
    calls.append(args)
    kill() if len(calls) == 2 else replace(*args)
if {killed_before!r} == "the removal":
    shutil.rmtree = kill
else:
    os.replace = second
with replacing(Path("results")) as part:
    part.mkdir()
    (part / "a").write_text("new")
"""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a").write_text("old")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment).returncode == -signal.SIGKILL
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "results"):
        raise KeyboardInterrupt  # nothing new is written, but what was cut short is put in order
    assert (tmp_path / "results/a").read_text() == ("old" if killed_before == "the second rename" else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("ending", ["part", "old"])
def test_leftovers_of_a_killed_process_of_the_same_number_go_first(ending, tmp_path):
    """In a container every run may be process 1 of the same host."""
    left = tmp_path / f".results.{socket.gethostname()}.{os.getpid()}.{ending}"
    left.mkdir()
    (left / "a").write_text("old")
    if ending == "part":
        with replacing(tmp_path / "results") as part:
            part.mkdir()
            (part / "a").write_text("new")
    else:
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "results"):
            raise KeyboardInterrupt  # nothing new is written, but what was cut short is put in order
    assert (tmp_path / "results" / "a").read_text() == ("new" if ending == "part" else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks and memory


def in_small_disk(folder, options, mount):
    """Run train.py with models/ on a file system of its own, mounted for that process; return (code, printed).

    What it left there is copied to models-kept/.
    """
    (folder / "models").mkdir()
    allowed = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", folder / "models"], capture_output=True)
    if allowed.returncode != 0:
        pytest.skip(f"this machine lets no user mount a file system: {allowed.stderr.decode()}")
    train_py = shlex.join([sys.executable, str(REPOSITORY / "train.py"), *options])
    script = f"mount -t tmpfs {mount} none models && {train_py}; code=$?; cp -a models models-kept; exit $code"
    with open(folder / "output.txt", "w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = ["unshare", "-rm", "sh", "-c", script]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return finish(process, folder)


def test_a_full_disk_is_named_and_the_older_checkpoint_resumes(place, options, uncut):
    folder = place()
    code, printed = in_small_disk(folder, options, "-o size=1000k")  # two checkpoints of 0.4 MB, not three
    assert code == 2
    last = printed.splitlines()[-1]
    assert "models/run/checkpoints/checkpoint-9: the disk is full" in last
    assert "kept: models/run/checkpoints/checkpoint-6; to go on: python train.py" in last
    (folder / "models").rmdir()
    (folder / "models-kept").rename(folder / "models")
    run_to_the_end(folder, [*options, "--resume"])
    assert result(folder) == uncut


def test_a_place_that_cannot_be_written_to_is_said_before_the_model_is_loaded(place, options):
    folder = place()
    code, printed = in_small_disk(folder, options, "-o ro")
    assert code == 2
    assert "train.py: error: models/run: cannot write there (models is not writable)" in printed
    assert "Loading weights" not in printed


@pytest.mark.parametrize("file", ["models", "models/run"])
def test_a_file_in_the_folders_place_is_said_before_the_model_is_loaded(place, options, file, refused, monkeypatch):
    folder = place()
    monkeypatch.chdir(folder)
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text("mine")
    assert f"{file}: is a file" in refused(train.main, *options, folder=folder)
    assert "Loading weights" not in refused.printed


def test_full_memory_is_said_with_batch_and_length(place, options):
    """The mask of a batch of four rows of 25,000 words takes 10 GB."""
    folder = place()
    rows = [
        {"sentence": f"{word} " * 25_000, "label_text": label} for word, label in (("a", "positive"), ("b", "negative"))
    ]
    write_json_lines(
        folder / "films.jsonl", [{**row, "sentence": f"{n} {row['sentence']}"} for n in range(4) for row in rows]
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))

    code, printed = finish(start(folder, [*options, "--max_seq_length", "30000"], preexec_fn=limit), folder)
    assert code == 2, printed
    last = printed.splitlines()[-1]
    assert "out of memory: a batch has 4 rows of up to 30000 tokens; pass --gradient_checkpointing" in last
    assert "or start anew with a lower --train_batch_size" in last
    assert not (folder / "models").exists()


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_loaded(place, tiny_base, monkeypatch, capfd):
    monkeypatch.chdir(place())
    shutil.copytree(tiny_base, "large")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    with open("large/model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**42)  # takes no room on the disk
    os.link("large/model.safetensors", "large/consolidated.safetensors")  # the same again, which is not loaded
    assert train.main([*SHORT, "--base_model_name", "large", "--dataset_name", "films.jsonl"]) == 2
    printed = capfd.readouterr()
    assert re.search(r"--base_model_name large: 1099.5 billion parameters take at least \d+ GB of memory", printed.err)
    assert "try everything with the small embedded model: --base_model_name smollm2" in printed.err
    assert printed.err.count("\n") == 1
