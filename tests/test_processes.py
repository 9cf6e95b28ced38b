"""train.py and evaluate.py in several processes on a CPU, started by accelerate launch: the same results as in one."""

import filecmp
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from conftest import REPOSITORY, write_json_lines
from safetensors.torch import load_file

import cross_validate
import evaluate
import train

# --multi_gpu has accelerate start several processes, without a GPU, too; --cpu starts one where there is no MPI.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
# 27 rows in batches of 5, two batches a step: of 2 processes one gets more rows, and of the last batch of 2 rows, 3 get
# no more than one.
TRAIN = [
    "--base_model_name",
    "tiny-llama",
    "--task",
    "sst2",
    "--dataset_name",
    "films.jsonl",
    "--max_seq_length",
    "128",
]
TRAIN += ["--epoch", "2", "--train_batch_size", "5", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
TRAIN += ["--save_steps", "2"]
KEPT = {"adapter_model.safetensors", "history.csv", "training_curves.png", "README.md"}


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    """A folder with a base model and a labelled file of 34 rows, 27 of them to train on."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(tiny_base, folder / "tiny-llama")
    words = ("fine", "positive"), ("dull", "negative"), ("warm", "positive"), ("grim", "negative")
    records = [
        {"sentence": f"a {word} film , number {number} of its kind", "label_text": label}
        for number in range(9)
        for word, label in words
    ]
    write_json_lines(folder / "films.jsonl", records[:34])
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def launch(processes, program, *options, launcher=(), output="output.txt", **environment):
    """Start `program` in several processes; what they print goes to the file `output`."""
    command = [*LAUNCH, str(processes), *launcher, REPOSITORY / program, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_LOG_LEVEL": "error"} | environment
    with open(output, "w") as output:
        return subprocess.Popen(
            list(map(str, command)), env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def finished(process):
    """Return (exit code, what was printed, without the launcher's own report) of a process that was started so."""
    code = process.wait(timeout=240)
    return code, Path("output.txt").read_text().split("ChildFailedError")[0]


def run(processes, program, *options, launcher=()):
    code, printed = finished(launch(processes, program, *options, launcher=launcher))
    assert code == 0, printed
    return printed


def weights(name):
    return load_file(f"models/{name}/adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(place):
    """{number of processes: what was printed}; adapters one, two and three, trained without dropout."""
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert train.main([*TRAIN, "--lora_dropout", "0", "--adapters_name", "one"]) == 0
        for number, name, precision in ((2, "two", "no"), (3, "three", "bf16")):
            options = [*TRAIN, "--lora_dropout", "0", "--adapters_name", name]
            printed[number] = run(number, "train.py", *options, launcher=["--mixed_precision", precision])
    return printed


@pytest.mark.parametrize("name", ["two", "three"])
def test_training_in_several_processes_gives_the_adapter_of_one(trained, name):
    alone, together = weights("one"), weights(name)
    assert alone.keys() == together.keys()
    change = max(weight.abs().max() for key, weight in alone.items() if "lora_B" in key)  # B starts as zeros
    for key, weight in alone.items():
        torch.testing.assert_close(together[key], weight, rtol=0, atol=0.002 * float(change))
    one, several = (pd.read_csv(f"models/{folder}/history.csv") for folder in ("one", name))
    pd.testing.assert_frame_equal(several, one, rtol=1e-3)
    assert several["step"].tolist() == [3, 6]


def test_the_first_process_alone_prints_and_writes(trained):
    assert {path.name for path in Path("models/two").iterdir()} == {path.name for path in Path("models/one").iterdir()}
    assert {path.name for path in Path("models/two/checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert not Path("models/two/checkpoints/run.json").exists()
    assert {path.name for path in Path().iterdir()} == {"films.jsonl", "models", "output.txt", "tiny-llama"}
    assert trained[2].count("2 processes\n") == 1
    assert trained[2].count("train: 27 rows, 0 cut") == trained[2].count("Adapter (after step 6 of 6)") == 1
    run_json = json.loads(Path("models/two/run.json").read_text())
    assert run_json["processes"] == 2


def test_evaluating_on_several_hosts_gives_the_numbers_of_one_process(trained):
    """Two launchers with a process each stand for two hosts with one file system."""
    options = ["--adapters_name", "one", "--batch_size", "3", "--baselines"]
    assert evaluate.main(options) == 0
    shutil.move("models/one/evaluation", "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hosts = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1]]
    first, second = (
        launch(2, "evaluate.py", *options, launcher=[*hosts, "--machine_rank", rank], output=f"output{rank}.txt")
        for rank in (0, 1)
    )
    assert first.wait(240) == second.wait(240) == 0, Path("output0.txt").read_text()
    assert "evaluated" not in Path("output1.txt").read_text().lower()
    printed = Path("output0.txt").read_text()
    assert printed.count("In square brackets") == 1
    for decoding in ("sample", "labels"):
        for file in ("predictions.csv", "metrics.json", "confusion_matrix.png"):
            assert filecmp.cmp(f"alone/{decoding}/{file}", f"models/one/evaluation/{decoding}/{file}", shallow=False)
    assert len(pd.read_csv("models/one/evaluation/labels/predictions.csv")) == 34
    shutil.rmtree("alone")
    Path("output0.txt").unlink()
    Path("output1.txt").unlink()


def test_a_killed_run_of_several_processes_can_be_resumed(trained):
    """With dropout, of which every process has its own random state."""
    run(2, "train.py", *TRAIN, "--adapters_name", "whole")
    assert (
        weights("whole")["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
        .ne(weights("two")["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"])
        .any()
    )
    process = launch(2, "train.py", *TRAIN, "--adapters_name", "cut")
    contents = Path("models/cut/checkpoints/checkpoint-2/contents.json")
    while not contents.exists():
        assert process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in psutil.process_iter(["cmdline"]):  # those that the launcher had put into sessions of their own
        if "cut" in (child.info["cmdline"] or []):
            child.kill()
            child.wait(30)
    assert not Path("models/cut/run.json").exists()
    states = load_file("models/whole/checkpoints/checkpoint-6/random_states.safetensors")
    seeds = [torch.Generator().set_state(states[f"cpu {number}"]).initial_seed() for number in (0, 1)]
    assert len(states) == 2 and seeds == [42, 43]
    printed = run(2, "train.py", *TRAIN, "--adapters_name", "cut", "--resume")
    assert printed.count("Resuming from models/cut/checkpoints/checkpoint-") == 1
    for name in KEPT - {"README.md"}:
        assert filecmp.cmp(f"models/cut/{name}", f"models/whole/{name}", shallow=False), name


def test_a_run_of_several_processes_goes_on_in_one(trained):
    """Without dropout, whose random states are those of the processes."""
    shutil.copytree("models/two", "models/fewer")
    run_json = json.loads(Path("models/fewer/run.json").read_text())
    Path("models/fewer/checkpoints/run.json").write_text(json.dumps(run_json))
    shutil.rmtree("models/fewer/checkpoints/checkpoint-6")
    assert train.main([*TRAIN, "--lora_dropout", "0", "--adapters_name", "fewer", "--resume"]) == 0
    whole = weights("two")
    for key, weight in weights("fewer").items():
        torch.testing.assert_close(weight, whole[key], rtol=0, atol=1e-4)


def test_an_error_is_said_once_and_nothing_is_written(trained):
    Path("models/taken").mkdir()
    write_json_lines(Path("models/taken/a.jsonl"), [{}])
    code, printed = finished(launch(2, "train.py", *TRAIN, "--adapters_name", "taken"))
    assert code != 0
    assert printed.count("error: ") == 1 and "Traceback (most recent call last):\n" not in printed.split("error: ")[0]
    assert "train.py: error: models/taken: exists; pass --overwrite to replace it" in printed
    assert [path.name for path in Path("models/taken").iterdir()] == ["a.jsonl"]
    code, printed = finished(launch(2, "evaluate.py", "--adapters_name", "one", "--batch_size", "0"))
    assert code != 0 and printed.count("error: ") == 1
    assert "evaluate.py: error: argument --batch_size: must be 1 or more, not 0" in printed


STUMBLE = """
import os, sys
import torch
import processes, shared_prefix, train
score, calls = shared_prefix.LabelScorer.score, []
def stumble(scorer, prompts):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 2:
        {what}
    return score(scorer, prompts)
shared_prefix.LabelScorer.score = stumble
sys.exit(train.main())
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise torch.OutOfMemoryError('CUDA out of memory')", "train.py: error: out of memory: a batch has 5 rows"),
        ("os._exit(1)", "train.py: error: another process of this run has ended, so this one cannot go on"),
    ],
)
def test_the_trouble_of_one_process_ends_all_and_the_run_can_go_on(trained, what, said):
    shutil.rmtree("models/stumbled", ignore_errors=True)
    Path("stumble.py").write_text(STUMBLE.format(what=what))
    options = [*TRAIN, "--lora_dropout", "0", "--adapters_name", "stumbled"]
    process = launch(2, Path("stumble.py").resolve(), *options, PYTHONPATH=str(REPOSITORY))
    code, printed = finished(process)
    Path("stumble.py").unlink()
    assert code != 0
    assert printed.count("error: ") == 1 and said in printed, printed
    kept = re.search(r"kept: models/stumbled/checkpoints/checkpoint-(\d); to go on: (.*) train.py (.*)\n", printed)
    assert kept[2] == "accelerate launch --multi_gpu --num_processes 2" and kept[3].endswith(
        "--adapters_name stumbled --resume"
    )
    run(2, "train.py", *kept[3].split())
    for key, weight in weights("stumbled").items():
        torch.testing.assert_close(weight, weights("two")[key], rtol=0, atol=1e-4)


LOAD = """
import os, sys
import modeling, train
load = modeling.load_base_model
def full(*options):
    if os.environ["RANK"] == "{rank}":
        with modeling.memory_errors("take a smaller model"):
            raise MemoryError
    return load(*options)
modeling.load_base_model = full
sys.exit(train.main())
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_trouble_before_training_is_said_in_a_line_too(trained, rank):
    Path("load.py").write_text(LOAD.format(rank=rank))
    options = [*TRAIN, "--adapters_name", "loaded"]
    code, printed = finished(launch(2, Path("load.py").resolve(), *options, PYTHONPATH=str(REPOSITORY)))
    Path("load.py").unlink()
    assert code != 0
    assert "train.py: error: out of memory: take a smaller model" in printed
    assert "RuntimeError" not in printed and not Path("models/loaded").exists()


def test_what_several_processes_cannot_do_is_refused(refused, monkeypatch):
    options = ["--adapters_name", "one"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refused(evaluate.main, *options).endswith(
        "accelerate is set to FSDP; every process holds the whole model here: pass --multi_gpu"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there is no GPU to try it with
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refused(evaluate.main, *options).endswith("4 processes on a host with 2 GPUs; start one for each GPU")


def test_cross_validation_refuses_several_processes(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--base_model_name", "tiny-llama", "--task", "sst2", "--dataset_name", "films.jsonl"]
    line = refused(cross_validate.main, *options)
    assert line.endswith("error: runs in one process, not in several; start it with: python cross_validate.py")
