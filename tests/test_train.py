"""train.py as a user runs it, on a tiny random Llama and on SmolLM2, both in NF4 on the CPU."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, snapshot, write_json_lines
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

import evaluate
import modeling
import shared_prefix
import train
from prompts import encode_rows, load_task
from rows import read_splits


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tiny_base, comments, tmp_path):
    """A function that runs train.py on the tiny model with more options and returns the adapter's folder."""

    def run_train(name, *options, code=0):
        fixed = {"--base_model_name": tiny_base, "--task": "sst2", "--dataset_name": comments, "--adapters_name": name}
        given = [str(option) for option in options]
        argv = [str(part) for pair in fixed.items() if pair[0] not in given for part in pair]
        if not {"--epoch", "--steps"} & set(given):
            argv += ["--epoch", "1"]
        assert train.main(argv + given) == code
        return tmp_path / "models" / name

    return run_train


def history(folder):
    return pd.read_csv(folder / "history.csv")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checkpoint_steps(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (folder / "checkpoints").iterdir())


def test_result_folder(run, capsys):
    folder = run("first", "--epoch", "2")
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "history.csv",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_curves.png",
    } <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.bin"))  # no pickled options
    assert [path.name for path in folder.parent.iterdir()] == ["first"]
    result = json.loads((folder / "run.json").read_text())
    assert result["options"]["epoch"] == 2
    assert result["options"]["learning_rate"] == 2e-4
    assert result["task"]["labels"] == ["positive", "negative"]
    assert result["data"]["train_rows"] == 16
    assert result["data"]["validation_rows"] == 4
    assert result["versions"]["trl"]
    assert result["compute_dtype"] == "float32"
    assert result["seconds"] > 0
    assert result["peak_memory_gb"] > 0.1
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "- negative" in card
    assert "python evaluate.py --adapters_name first" in capsys.readouterr().out


def test_loss_trajectory(run):
    """Through the command line, against a trajectory stored by this code: a change of prompt, mask or loss shows."""
    stored = pd.read_csv(REPOSITORY / "tests" / "data" / "tiny_llama_history.csv")
    options = ["--epoch", "3", "--train_batch_size", "4", "--lora_dropout", "0", "--learning_rate", "1e-2"]
    pd.testing.assert_frame_equal(history(run("trajectory", *options)), stored, rtol=1e-3)
    assert stored["eval_loss"].iloc[-1] < stored["eval_loss"].iloc[0]


def test_validation_loss_is_that_of_one_plain_forward_a_row(run, comments):
    folder = run("plain", "--eval_batch_size", "4", "--learning_rate", "1e-2")
    options = json.loads((folder / "run.json").read_text())["options"]
    task, tokenizer = load_task("sst2"), modeling.load_tokenizer(options["base_model_name"])
    model = modeling.load_adapter(modeling.load_base_model(options["base_model_name"]), folder)
    encoded, _ = encode_rows(tokenizer, task, read_splits(str(comments), task).validation, 512)
    losses = []
    for row in encoded:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        labels = torch.tensor([[-100] * len(row["prompt_ids"]) + row["answer_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())  # both labels have two tokens
    assert history(folder)["eval_loss"].iloc[-1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_scores_after_every_epoch_are_those_of_evaluate_py(run):
    folder = run("scored", "--epoch", "3", "--train_batch_size", "4", "--learning_rate", "1e-2")
    lines = history(folder)
    assert lines.columns.tolist() == [
        *("step", "epoch", "train_loss", "eval_loss", "train_accuracy", "train_macro_f1", "eval_accuracy"),
        *("eval_macro_f1", "learning_rate", "grad_norm"),
    ]
    assert not lines.isna().any().any()
    assert evaluate.main(["--adapters_name", "scored", "--decoding", "labels"]) == 0
    metrics = json.loads((folder / "evaluation" / "labels" / "metrics.json").read_text())
    for split, name in (("train", "train"), ("eval", "validation")):
        for score in ("accuracy", "macro_f1"):
            assert lines[f"{split}_{score}"].iloc[-1] == pytest.approx(metrics[name][score])
    assert lines["train_accuracy"].nunique() > 1


def rows_scored(run, *options):
    """Return how many rows each batch held when label scoring was called in a run of train.py."""
    sizes = []
    tree = shared_prefix.LabelTree

    def counted(prompts, *args):
        sizes.append(len(prompts))
        return tree(prompts, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix, "LabelTree", counted)
        run("changed", *options)
    return sizes


def test_at_most_200_training_rows_are_scored(run, tmp_path):
    records = [
        {"sentence": f"film {number}", "label_text": ("positive", "negative")[number % 2]} for number in range(270)
    ]
    data = write_json_lines(tmp_path / "many.jsonl", records)
    sizes = rows_scored(run, "--dataset_name", data, "--train_batch_size", "64", "--eval_batch_size", "100")
    assert sizes == [100, 100, 54]  # 200 of 216 training rows, all validation rows


def test_the_same_seed_gives_the_same_adapter_in_float32(run):
    first, again, other = run("first"), run("again"), run("other", "--seed", "1")
    assert same_weights(first, again)
    assert not same_weights(first, other)
    for weight in weights(first).values():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.to(torch.bfloat16).float())


def test_a_second_run_of_the_same_name_is_refused(run, capsys):
    folder = run("twice")
    before = snapshot(folder)
    run("twice", "--learning_rate", "1e-2", code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: models/twice: exists; pass --overwrite")
    assert snapshot(folder) == before


def test_default_names_and_lengths(monkeypatch):
    args, task = train.parse_args([])
    assert (args.epoch, args.steps, args.adapters_name) == (10, None, "Llama-2-13b-chat-hf-epoch10")
    assert (task.name, args.dataset_name) == (
        "supp-anti-oth",
        "OneFly7/llama2-politosphere-fine-tuning-supp-anti-oth",
    )
    args, task = train.parse_args(["--steps", "7", "--base_model_name", "smollm2", "--task", "sst2"])
    assert (args.epoch, args.steps, args.adapters_name) == (None, 7, "smollm2-step7")


def test_the_task_beside_the_data_is_used(run, comments, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(comments.read_bytes())
    task = {"system_prompt": "Judge it.", "labels": ["negative", "positive"], "answer_field": "Verdict:"}
    (folder / "task.json").write_text(json.dumps(task))
    assert train.parse_args(["--dataset_name", str(folder)])[1].answer_field == "Verdict:"
    assert train.parse_args(["--dataset_name", str(folder), "--task", "sst2"])[1].answer_field == "Sentiment:"


# For every option: options that use it, and what is then different from a run without it.
def cut_rows(run, capfd):
    run("changed", "--max_seq_length", "76")
    assert re.search(r"train: 16 rows, [1-9]\d* cut to 76 tokens", capfd.readouterr().out)


def other_task(run, capfd):
    assert not same_weights(run("base"), run("changed", "--task", "own.json"))


def other_data(run, capfd):
    changed = run("changed", "--dataset_name", "fewer.jsonl")
    assert json.loads((changed / "run.json").read_text())["data"]["train_rows"] == 8


def other_base(run, capfd):
    run("changed", "--base_model_name", "no/such-model-here", code=2)
    assert "model no/such-model-here: " in capfd.readouterr().err


def epochs(run, capfd):
    assert history(run("changed", "--epoch", "3"))["epoch"].tolist() == [1, 2, 3]


def steps(run, capfd):
    assert history(run("changed", "--steps", "22", "--train_batch_size", "8"))["step"].tolist()[-2:] == [21, 22]


def step_count(option, value, expected):
    def check(run, capfd):
        assert history(run("changed", "--train_batch_size", "4", option, value))["step"].tolist() == [expected]

    return check


def eval_batches(run, capfd):
    sizes = rows_scored(run, "--eval_batch_size", "3")
    assert sizes == [3, 3, 3, 3, 3, 1, 3, 1]  # 16 training and 4 validation rows


WAVERING = ["--epoch", "6", "--train_batch_size", "4", "--learning_rate", "3e-2"]


def keep(run, capfd):
    last, best = run("last", *WAVERING), run("changed", *WAVERING, "--keep", "best")
    scores = history(best).set_index("step")["eval_macro_f1"]
    assert scores.idxmax() < scores.index[-1], "choose other settings: the last epoch is the best"
    assert not same_weights(last, best)
    assert json.loads((best / "run.json").read_text())["kept_step"] == scores.idxmax()
    assert json.loads((last / "run.json").read_text())["kept_step"] == scores.index[-1]
    assert "**optimistic**" in (best / "README.md").read_text()
    assert f"macro-F1 {scores.max():.4f}" in (best / "README.md").read_text()
    assert "optimistic" not in (last / "README.md").read_text()
    assert evaluate.main(["--adapters_name", "changed", "--decoding", "labels", "--split", "validation"]) == 0
    metrics = json.loads((best / "evaluation" / "labels" / "metrics.json").read_text())
    assert metrics["validation"]["macro_f1"] == pytest.approx(scores.max())


def patience(run, capfd):
    whole, stopped = run("whole", *WAVERING), run("changed", *WAVERING, "--early_stopping_patience", "2")
    scores = history(stopped)["eval_macro_f1"]
    assert len(scores) < 6
    assert len(scores) - 1 - scores.idxmax() == 2
    pd.testing.assert_frame_equal(history(stopped), history(whole).head(len(scores)))
    assert "Stopped early" in capfd.readouterr().out
    assert f"at most 6 epochs (until {len(scores)} epochs" in (stopped / "README.md").read_text()


def changes_history(*options):
    def check(run, capfd):
        one, other = history(run("base")), history(run("changed", *options))
        assert not one.equals(other)

    return check


def checkpointing(run, capfd):
    calls = []
    forward = LlamaMLP.forward

    def counted(*args):
        calls.append(args)
        return forward(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", counted)
        base = run("base")
        plain = len(calls)
        changed = run("changed", "--gradient_checkpointing")
        assert len(calls) - plain == plain + 2  # 2 layers, once more in the step's backward
    pd.testing.assert_frame_equal(history(base), history(changed), rtol=1e-4)


def padding(run, capfd):
    shapes = []
    forward = LlamaMLP.forward

    def seen(module, hidden):
        if module.training:
            shapes.append(hidden.shape[0])
        return forward(module, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", seen)
        base = run("base", "--lora_dropout", "0")
        assert set(shapes) == {1}  # one sequence a batch
        shapes.clear()
        changed = run("changed", "--lora_dropout", "0", "--no_shared_prefix")
        assert set(shapes) == {16}  # a row each
    pd.testing.assert_frame_equal(history(base), history(changed), rtol=1e-3)


def rank(run, capfd):
    shapes = {min(weight.shape) for weight in weights(run("changed", "--lora_r", "8")).values()}
    assert shapes == {8}


def modules(run, capfd):
    names = weights(run("changed", "--lora_target_modules", "o_proj", "down_proj"))
    assert {name.split(".")[-3] for name in names} == {"o_proj", "down_proj"}
    run("wrong", "--lora_target_modules", "nothing", code=2)
    assert "--lora_target_modules nothing" in capfd.readouterr().err


def name(run, capfd):
    assert run("changed").is_dir()
    for bad in ("../up", "/tmp/up", "a b", "a\nb", ".hidden", "__import__('os')"):
        run("changed", "--adapters_name", bad, code=2)


def overwrite(run, capfd):
    before = run("changed")
    old = weights(before)
    changed = run("changed", "--overwrite", "--learning_rate", "1e-2")
    assert any(not torch.equal(old[key], weight) for key, weight in weights(changed).items())


def resume(run, capfd):
    run("changed", "--resume", code=2)
    assert "models/changed: does not exist" in capfd.readouterr().err
    before = snapshot(run("changed"))
    assert snapshot(run("changed", "--resume")) == before
    assert "this run is finished" in capfd.readouterr().out


def save_steps(run, capfd):
    short = ["--epoch", "2", "--train_batch_size", "4"]
    by_epoch, by_step = run("base", *short), run("changed", *short, "--save_steps", "3")
    assert checkpoint_steps(by_epoch) == [4, 8]
    assert checkpoint_steps(by_step) == [6, 8]
    assert same_weights(by_epoch, by_step)
    by_steps = run("steps", "--steps", "21", "--train_batch_size", "4")
    assert checkpoint_steps(by_steps) == [18, 21]


def reports(run, capfd):
    assert list(run("changed", "--report_to", "tensorboard").glob("runs/*/events*"))
    run("other", "--report_to", "wandb", code=2)
    assert "pip install wandb" in capfd.readouterr().err


OPTIONS = {
    "--base_model_name": other_base,
    "--task": other_task,
    "--dataset_name": other_data,
    "--max_seq_length": cut_rows,
    "--epoch": epochs,
    "--steps": steps,
    "--train_batch_size": step_count("--train_batch_size", "2", 8),
    "--gradient_accumulation_steps": step_count("--gradient_accumulation_steps", "2", 2),
    "--eval_batch_size": eval_batches,
    "--learning_rate": changes_history("--learning_rate", "1e-3"),
    "--seed": changes_history("--seed", "7"),
    "--gradient_checkpointing": checkpointing,
    "--no_shared_prefix": padding,
    "--keep": keep,
    "--early_stopping_patience": patience,
    "--lora_r": rank,
    "--lora_alpha": changes_history("--lora_alpha", "64", "--learning_rate", "1e-2"),
    "--lora_dropout": changes_history("--lora_dropout", "0.6", "--learning_rate", "1e-2"),
    "--lora_target_modules": modules,
    "--adapters_name": name,
    "--overwrite": overwrite,
    "--resume": resume,
    "--save_steps": save_steps,
    "--report_to": reports,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_does_something(option, run, comments, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = {"system_prompt": "Judge.", "labels": ["negative", "positive"], "answer_field": "Verdict:"}
    (tmp_path / "own.json").write_text(json.dumps(task))
    write_json_lines(tmp_path / "fewer.jsonl", [json.loads(line) for line in comments.read_text().splitlines()[:10]])
    OPTIONS[option](run, capfd)


def test_no_option_is_left_out_above():
    options = {action.option_strings[0] for action in train.build_parser()._actions} - {"-h"}
    assert options == {*OPTIONS, "--push_to_hub"}  # that one is in test_hub.py


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epoch", "0"], "argument --epoch: must be 1 or more"),
        (["--epoch", "1", "--steps", "1"], "not allowed with argument"),
        (["--learning_rate", "nan"], "argument --learning_rate"),
        (["--lora_dropout", "1"], "argument --lora_dropout"),
        (["--seed", "-1"], "argument --seed"),
        (["--epochs", "3"], "unrecognized arguments"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_length_that_the_prompt_does_not_fit_is_refused(run, capsys, tmp_path):
    run("short", "--max_seq_length", "40", code=2)
    assert "--max_seq_length is 40" in capsys.readouterr().err
    assert not (tmp_path / "models" / "short").exists()


def test_a_run_that_diverges_writes_no_adapter(run, capsys, tmp_path):
    run("diverged", "--learning_rate", "1e38", "--epoch", "2", code=2)
    assert "NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_no_library_imports_evaluate_py_as_the_package_of_that_name():
    code = "import sys, train, papermill, sklearn; sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.fixture(scope="module")
def smollm2_adapter(tmp_path_factory):
    """A real QLoRA run: SmolLM2 in NF4, 16 rows, 12 steps."""
    folder = tmp_path_factory.mktemp("smollm2")
    sentences = {
        "positive": ["a gem", "warm and funny", "a great film", "pure joy", "smart and moving"] * 2,
        "negative": ["a bore", "dull and flat", "a waste of time", "pure pain", "stupid and cold"] * 2,
    }
    records = [
        {"sentence": f"{text} , take {number}", "label_text": label}
        for label, texts in sentences.items()
        for number, text in enumerate(texts)
    ]
    data = write_json_lines(folder / "films.jsonl", records)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = (
            f"--base_model_name smollm2 --task sst2 --dataset_name {data} --adapters_name films --learning_rate 1e-3"
        )
        assert train.main(f"{options} --steps 10 --train_batch_size 4".split()) == 0
    return folder


def test_a_real_run_learns_and_changes_the_answers(smollm2_adapter, monkeypatch):
    monkeypatch.chdir(smollm2_adapter)
    losses = history(smollm2_adapter / "models" / "films")
    assert losses["eval_loss"].iloc[-1] < 0.5 * losses["eval_loss"].iloc[0]
    assert losses["train_loss"].iloc[-1] < 0.5 * losses["train_loss"].iloc[0]
    options = ["--adapters_name", "films", "--decoding", "greedy", "--split", "train"]
    assert evaluate.main(options) == 0
    assert evaluate.main([*options, "--base_only"]) == 0
    tuned, base = (
        pd.read_csv(smollm2_adapter / "models" / "films" / "evaluation" / decoding / "predictions.csv")
        for decoding in ("greedy", "base-greedy")
    )
    assert (tuned["output"] != base["output"]).mean() > 0.5
    assert tuned["prediction"].notna().all()
    assert (tuned["prediction"] == tuned["label_text"]).mean() >= 0.75


def test_the_adapter_loads_with_peft_alone(smollm2_adapter):
    model = PeftModel.from_pretrained(
        modeling.load_base_model("smollm2"), smollm2_adapter / "models" / "films", torch_dtype=torch.float32
    )
    assert model.peft_config["default"].r == 64
    assert model.peft_config["default"].base_model_name_or_path == "smollm2"
