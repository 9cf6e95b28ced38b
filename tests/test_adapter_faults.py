"""Adapters and base models that must not be used: damaged ones, ones of another base, and ones that carry code."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, snapshot, write_json_lines
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import checkpoints
import evaluate
import modeling
import train
from prompts import load_task
from rows import read_splits


class Payload:
    """Unpickled, it leaves a file: proof that code ran."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A folder with base/, a copy of the tiny model, films.jsonl and models/films, an adapter on it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_base, folder / "base")
    records = [
        {"sentence": f"a {word} film , number {number}", "label_text": label}
        for number in range(10)
        for word, label in (("fine", "positive"), ("dull", "negative"))
    ]
    write_json_lines(folder / "films.jsonl", records)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = "--base_model_name base --task sst2 --dataset_name films.jsonl --adapters_name films --epoch 1"
        assert train.main(options.split()) == 0
        assert evaluate.main(["--adapters_name", "films", "--decoding", "labels"]) == 0
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


EVALUATE = ["--adapters_name", "films", "--decoding", "labels"]
ADAPTER = Path("models/films/adapter_model.safetensors")


def change_weights(change):
    """Write the adapter's weights back as `change` returns them."""
    save_file(change(load_file(ADAPTER)), ADAPTER, metadata={"format": "pt"})


def deeper(weights):
    more = {name.replace("layers.1.", "layers.2."): weight.clone() for name, weight in weights.items()}
    return weights | more


def shallower(weights):
    return {name: weight for name, weight in weights.items() if "layers.1." not in name}


def other_rank(weights):
    return {name: weight[:8].clone() if "lora_A" in name else weight[:, :8].clone() for name, weight in weights.items()}


def not_a_number(weights):
    next(iter(weights.values()))[0, 0] = float("nan")
    return weights


def infinite(weights):
    next(iter(weights.values()))[-1, -1] = float("-inf")
    return weights


def cut_short():
    ADAPTER.write_bytes(ADAPTER.read_bytes()[:-10])


def only_a_pickle():
    ADAPTER.unlink()
    ADAPTER.with_name("adapter_model.bin").write_bytes(pickle.dumps(Payload("ran")))


def not_lora():
    change_config(peft_type="XLORA")


def change_config(**fields):
    config = ADAPTER.with_name("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def no_json():
    ADAPTER.with_name("adapter_config.json").write_text("{")


def with_code():
    folder = ADAPTER.parent
    (folder / "configuration_mine.py").write_text("import pathlib\npathlib.Path('ran').touch()\nMine = object\n")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "configuration_mine.Mine"}}))


ADAPTER_FAULTS = {
    "with code": (with_code, "comes with Python code of its own (auto_map)"),
    "deeper": (lambda: change_weights(deeper), "has more layers than its base model"),
    "shallower": (lambda: change_weights(shallower), "lacks base_model.model.model.layers.1"),
    "other shapes": (lambda: change_weights(other_rank), "does not fit its base model"),
    "NaN": (lambda: change_weights(not_a_number), "holds NaN or infinite numbers"),
    "infinite": (lambda: change_weights(infinite), "holds NaN or infinite numbers"),
    "cut short": (cut_short, "damaged or cut short"),
    "empty": (lambda: ADAPTER.write_bytes(b""), "damaged or cut short"),
    "missing": (ADAPTER.unlink, "has no adapter_model.safetensors; train again"),
    "only a pickle": (only_a_pickle, "only adapter_model.bin, a pickle, which could run code and is never loaded"),
    "not LoRA": (not_lora, "not that of a LoRA adapter"),
    "broken configuration": (no_json, "adapter_config.json: "),
    "configuration of a wrong form": (lambda: change_config(rank_pattern=[1]), "does not fit its base model"),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_damaged_adapter_is_refused_by_name(work, fault, refused):
    spoil, message = ADAPTER_FAULTS[fault]
    spoil()
    line = refused(evaluate.main, *EVALUATE)
    assert "models/films" in line and message in line
    assert not Path("ran").exists()


def test_a_pickle_beside_the_adapter_is_not_touched(work):
    ADAPTER.with_name("adapter_model.bin").write_bytes(pickle.dumps(Payload("ran")))
    Path("base/pytorch_model.bin").write_bytes(pickle.dumps(Payload("ran")))
    assert evaluate.main(EVALUATE) == 0
    assert not Path("ran").exists()


def change_run(**fields):
    file = Path("models/films/run.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


RUN_FAULTS = {
    "missing": (lambda: Path("models/films/run.json").unlink(), "run.json: missing"),
    "not JSON": (lambda: Path("models/films/run.json").write_text('{"options"'), "run.json: not JSON"),
    "in Latin-1": (lambda: Path("models/films/run.json").write_bytes(b'{"\xfc": 1}'), "run.json: not JSON"),
    "of a newer version": (
        lambda: change_run(format=checkpoints.RUN_FORMAT + 1),
        "run.json: written by a newer version of this toolkit",
    ),
    "of no version": (lambda: change_run(format="2"), "run.json: written by a newer version"),
    "a list": (lambda: Path("models/films/run.json").write_text("[]"), "run.json: has no options"),
    "without options": (lambda: change_run(options={}), "run.json: has no max_seq_length in options"),
    "without data": (lambda: change_run(data={}), "run.json: has no dataset_name in data"),
    "without a base model": (lambda: change_run(base_model={}), "run.json: has no name in base_model"),
    "with a number for the data": (
        lambda: change_run(data={"dataset_name": 7, "fingerprint": ""}),
        "run.json: has no dataset_name in data",
    ),
    "without a task": (lambda: change_run(task={}), "run.json: the field 'system_prompt' must be a text"),
}


@pytest.mark.parametrize("fault", RUN_FAULTS)
def test_a_run_json_that_cannot_be_relied_on_is_refused(work, fault, refused):
    spoil, message = RUN_FAULTS[fault]
    spoil()
    assert f"models/films/{message}" in refused(evaluate.main, *EVALUATE)
    if fault not in ("missing", "without a task"):  # then there is no run, or one of another task
        resume = [*TRAIN, "--adapters_name", "films", "--resume"]
        assert f"models/films/{message}" in (line := refused(train.main, *resume))
        assert "the run cannot be resumed, start anew with --overwrite" in line


def test_an_adapter_of_another_base_with_the_same_shapes_is_refused(work, refused, capfd):
    weights = load_file("base/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name] * 1.001}, "base/model.safetensors", metadata={"format": "pt"})
    line = refused(evaluate.main, *EVALUATE)
    assert (
        "models/films: the adapter was trained on other weights or another config.json of base (" in line
        and "--force" in line
    )
    assert evaluate.main([*EVALUATE, "--force"]) == 0
    config = ADAPTER.with_name("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "owner/other"}))
    assert "trained on owner/other, but run.json names base" in refused(evaluate.main, *EVALUATE)


def test_an_adapter_from_before_fingerprints_is_evaluated_and_that_is_said(work, capfd):
    file = Path("models/films/run.json")
    run = json.loads(file.read_text())
    del run["format"], run["base_model"]["fingerprint"]
    file.write_text(json.dumps(run))
    assert evaluate.main(EVALUATE) == 0
    assert "has no fingerprint of the base model" in capfd.readouterr().out


def test_the_fingerprint_is_that_of_the_weights_not_of_the_files(tiny_base, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert modeling.base_fingerprint(str(tmp_path / "sharded")) == modeling.base_fingerprint(str(tiny_base))


def test_where_an_adapter_was_looked_for_is_said(work, refused):
    line = refused(evaluate.main, "--adapters_name", "film")
    assert f"no adapter in models/film/ and film/ of {work}; models/ has films" in line
    shutil.rmtree("models")
    assert "models/ has none" in refused(evaluate.main, "--adapters_name", "films")


def test_results_are_replaced_whole(work):
    folder = Path("models/films/evaluation/labels")
    (folder / "of_an_earlier_run.txt").write_text("old")
    (folder / "metrics.json").write_text("old")
    assert evaluate.main([*EVALUATE, "--split", "validation"]) == 0
    pictures = {"confusion_matrix.png", "reliability.png"}
    texts = {"metrics.json", "predictions.csv", "report.html", "settings.json"}
    assert {path.name for path in folder.iterdir()} == pictures | texts
    assert list(json.loads((folder / "metrics.json").read_text())) == ["validation"]
    assert [path.name for path in folder.parent.iterdir()] == ["labels"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_that_is_killed_leaves_the_earlier_results(work, number):
    """Stopped as soon as the new ones begin to be written."""
    before = snapshot(work)
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "evaluate.py", *EVALUATE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(Path("models/films/evaluation").glob(".labels.*.part")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    hidden = [path for path in snapshot(work) if "/.labels." in path]
    assert {path: content for path, content in snapshot(work).items() if path not in hidden} == before
    assert bool(hidden) == (number == signal.SIGKILL)
    assert evaluate.main(EVALUATE) == 0
    assert not list(Path("models/films/evaluation").glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# Base models

CODE = "import pathlib\npathlib.Path('ran').touch()\n"


def base_with_code():
    Path("base/modeling_mine.py").write_text(CODE + "class Mine:\n    pass\n")
    file = Path("base/config.json")
    config = json.loads(file.read_text())
    for name in ("AutoConfig", "AutoModelForCausalLM"):
        config.setdefault("auto_map", {})[name] = "modeling_mine.Mine"
    file.write_text(json.dumps(config | {"model_type": "mine"}))


def tokenizer_with_code():
    Path("base/tokenization_mine.py").write_text(CODE + "class Mine:\n    pass\n")
    file = Path("base/tokenizer_config.json")
    code = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    file.write_text(json.dumps(json.loads(file.read_text()) | code))


def base_in_a_pickle():
    Path("base/model.safetensors").unlink()
    Path("base/pytorch_model.bin").write_bytes(pickle.dumps(Payload("ran")))


def base_cut_short():
    file = Path("base/model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])


BASE_FAULTS = {
    "code in the model": (base_with_code, "comes with Python code of its own (auto_map), which is never run here"),
    "code in the tokenizer": (tokenizer_with_code, "comes with Python code of its own (auto_map)"),
    "weights in a pickle": (base_in_a_pickle, "model base: cannot be loaded"),
    "weights cut short": (base_cut_short, "model base: cannot be loaded"),
    "a configuration that is no JSON": (
        lambda: Path("base/config.json").write_text("{"),
        "model base: cannot be loaded",
    ),
    "an unknown kind of model": (lambda: Path("base/config.json").write_text("{}"), "model base: cannot be loaded"),
    "no configuration": (lambda: Path("base/config.json").unlink(), "no model in it (config.json)"),
    "no tokenizer": (lambda: [file.unlink() for file in Path("base").glob("tok*")], "model base: cannot be loaded"),
}
TRAIN = [
    "--base_model_name",
    "base",
    "--task",
    "sst2",
    "--dataset_name",
    "films.jsonl",
    "--adapters_name",
    "new",
    "--epoch",
    "1",
]


@pytest.mark.parametrize("fault", BASE_FAULTS)
def test_a_base_model_that_cannot_be_used_is_refused_and_its_code_never_run(work, fault, refused, monkeypatch):
    spoil, message = BASE_FAULTS[fault]
    spoil()
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))  # nobody is asked to run it
    assert message in refused(train.main, *TRAIN)
    assert not Path("ran").exists()


def test_nan_in_the_base_model_stops_at_the_first_step(work, refused):
    weights = load_file("base/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, "base/model.safetensors", metadata={"format": "pt"})
    line = refused(train.main, *TRAIN)
    assert "step 1: the loss became NaN or infinite, so training stopped and no adapter was written; lower" in line


def test_weights_that_overflow_stop_at_that_step_and_earlier_checkpoints_stay(work, capfd):
    """The learning rate falls linearly: at the first step it is far too high, and only then."""
    assert train.main([*TRAIN, "--learning_rate", "1e38", "--epoch", "3"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "step 1: the adapter's weights became NaN or infinite" in line and "--learning_rate (it is 1e+38)" in line
    assert not Path("models/new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Names and values that try to be more than that

NAMES = [
    "__import__('os').system('touch ran')",
    "$(touch ran)",
    "../films",
    "../../work/models/films",
    "/tmp/films",
    "films\n",
    "films\x1b[31m",
    "films\x00",
    "a\tb",
    "films/../films",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_models_or_hold_control_characters_are_refused(work, name, refused):
    if "\x00" not in name:
        assert "--adapters_name" in refused(evaluate.main, "--adapters_name", name)
    line = refused(train.main, *TRAIN, "--adapters_name", name, folder=work.parent)
    assert "--adapters_name" in line and line.isprintable()


def test_options_are_not_code_also_without_assertions(work):
    value = "__import__('pathlib').Path('ran').touch()"
    before = snapshot(work)
    code = f"""
import cross_validate, evaluate, merge_labels, train
names = ({value!r}, "../up", "/tmp/up", "a\\nb", "\\x1b[2J")
codes = [main([*{TRAIN!r}, "--adapters_name", name]) for main in (train.main, cross_validate.main) for name in names]
codes += [evaluate.main(["--adapters_name", name]) for name in (*names, "../work/models/films", "films\\n")]
codes += [merge_labels.main(["films.jsonl", "--merge", {value!r}])]
print(codes)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-O", "-c", code], env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == str([2] * 18), done.stderr
    assert done.stderr.count(": error: --") == 18 and "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert snapshot(work) == before


@pytest.mark.parametrize(
    "option", ["--learning_rate", "--epoch", "--lora_r", "--lora_dropout", "--seed", "--save_steps", "--max_seq_length"]
)
def test_numbers_are_numbers(work, option, refused):
    for value in ("__import__('os').getpid()", "1_0j", "inf", "nan", "-1", ""):
        assert f"argument {option}: " in refused(train.main, *TRAIN, option, value)


# ---------------------------------------------------------------------------------------------------------------------
# A base model that is not what it was, or gives no numbers


def test_a_base_model_with_another_configuration_is_refused(work, refused):
    config = Path("base/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 500.0}))
    assert "trained on other weights or another config.json of base" in refused(evaluate.main, *EVALUATE)
    assert evaluate.main([*EVALUATE, "--force"]) == 0


def test_the_weights_compared_are_the_weights_loaded(work, refused):
    """transformers takes model.safetensors although there is an index of other files."""
    weights = load_file("base/model.safetensors")
    save_file(weights, "base/part.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "part.safetensors")}
    Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    assert evaluate.main(EVALUATE) == 0
    save_file({name: weight * 1.01 for name, weight in weights.items()}, "base/model.safetensors", {"format": "pt"})
    assert "trained on other weights" in refused(evaluate.main, *EVALUATE)


def test_an_adapter_in_the_base_models_folder_is_not_loaded_unasked(work, refused):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path("models/films", file), "base")
    assert "--base_model_name base: holds an adapter" in refused(train.main, *TRAIN, "--adapters_name", "second")


def test_a_base_model_that_gives_nan_is_neither_trained_nor_scored(work, refused):
    """Its vector of one token is NaN, and only a validation row has that token."""
    tokenizer = modeling.load_tokenizer("base")
    validation = read_splits("films.jsonl", load_task("sst2")).validation["sentence"][0]
    marked = Path("films.jsonl").read_text().replace(json.dumps(validation)[1:-1], f"{validation} zebra")
    Path("marked.jsonl").write_text(marked)
    assert train.main([*TRAIN, "--dataset_name", "marked.jsonl", "--adapters_name", "marked"]) == 0
    weights = load_file("base/model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer(" zebra", add_special_tokens=False).input_ids] = float("nan")
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    for decoding in ("labels", "sample", "greedy"):
        options = ["--adapters_name", "marked", "--decoding", decoding, "--split", "validation", "--force"]
        assert "the model's probabilities are NaN or infinite" in refused(evaluate.main, *options)
    more = ["--dataset_name", "marked.jsonl", "--adapters_name", "second"]
    assert "the model's probabilities are NaN or infinite" in refused(train.main, *TRAIN, *more)


# ---------------------------------------------------------------------------------------------------------------------
# Places


def test_a_misspelt_path_under_models_is_not_asked_of_the_hub(work, refused):
    line = refused(evaluate.main, "--adapters_name", "models/film")
    assert "no adapter in models/models/film/ and models/film/" in line and "models/ has films" in line


def test_that_the_evaluation_cannot_be_written_is_said_before_the_model_is_loaded(work, refused, monkeypatch):
    monkeypatch.setattr(modeling, "load_base_model", lambda *args: pytest.fail("loaded"))
    shutil.rmtree("models/films/evaluation")
    Path("models/films/evaluation").write_text("a file")
    assert "models/films/evaluation: is a file" in refused(evaluate.main, *EVALUATE)


LONG = "x" * 300
LONG_NAMES = {
    "train --adapters_name": (train.main, ["--dataset_name", "films.jsonl", "--adapters_name", LONG]),
    "train --task": (train.main, ["--task", LONG]),
    "train --dataset_name": (train.main, ["--base_model_name", "base", "--task", "sst2", "--dataset_name", LONG]),
    "train --base_model_name": (train.main, ["--dataset_name", "films.jsonl", "--base_model_name", LONG]),
    "evaluate --adapters_name": (evaluate.main, ["--adapters_name", LONG]),
}


@pytest.mark.parametrize("option", LONG_NAMES)
def test_names_that_no_file_system_takes_are_refused(work, refused, option):
    main, options = LONG_NAMES[option]
    assert "too long" in refused(main, *options)


@pytest.mark.parametrize("option", ["--dataset_name", "--task", "--adapters_name", "--base_model_name"])
def test_an_empty_option_is_not_taken_for_the_default(work, refused, option):
    assert f"argument {option}: must not be empty" in refused(train.main, *TRAIN, option, "")


@pytest.mark.parametrize(("value", "message"), [(10**13, "below 2147483648"), (2**31 - 1, "lower --lora_r")])
def test_an_adapter_too_large_for_any_memory_is_refused(work, refused, value, message):
    assert message in refused(train.main, *TRAIN, "--adapters_name", "huge", "--lora_r", value)
