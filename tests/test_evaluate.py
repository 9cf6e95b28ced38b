"""evaluate.py as a user runs it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import train_on_words
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoTokenizer, GenerationMixin
from transformers.models.llama.modeling_llama import LlamaMLP

import evaluate
import modeling
from evaluate import RowSampler
from metrics import classification_metrics, confusion_counts, probability_metrics
from prompts import answer_ids, build_prompt, load_task
from rows import read_splits

HOT = "0.9"  # a temperature at which the tiny model gives labels and other things


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """A folder with models/tiny, trained until it answers with labels, mostly: 24 rows, some of them long."""
    folder = tmp_path_factory.mktemp("evaluate")
    modules = ["--lora_target_modules", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    train_on_words(folder, tiny_base, "--steps", "60", "--learning_rate", "2e-2", *modules)
    return folder


@pytest.fixture
def run(adapter, tmp_path, monkeypatch):
    """A function that runs evaluate.py on a copy of the adapter and returns the folder of the results."""
    shutil.copytree(adapter, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")

    def run_evaluate(*options, code=0):
        assert evaluate.main(["--adapters_name", "tiny", *map(str, options)]) == code
        return tmp_path / "work" / "models" / "tiny" / "evaluation"

    return run_evaluate


def predictions(folder):
    return pd.read_csv(folder / "predictions.csv", keep_default_na=False)


def test_files_and_numbers(run, capsys):
    folder = run() / "sample"
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "predictions.csv",
        "confusion_matrix.png",
        "report.html",
        "settings.json",
    }
    table, metrics = predictions(folder), json.loads((folder / "metrics.json").read_text())
    assert table.columns.tolist() == ["split", "row", "sentence", "label_text", "prediction", "output"]
    assert list(metrics) == ["train", "validation"]
    assert (metrics["train"]["n"], metrics["validation"]["n"]) == (24, 6)
    for split, rows in table.groupby("split"):
        truth, predicted = rows["label_text"], rows["prediction"]
        labels = ["positive", "negative"]
        assert metrics[split]["accuracy"] == accuracy_score(truth, predicted)
        expected = f1_score(truth, predicted, labels=labels, average="macro", zero_division=0)
        assert metrics[split]["macro_f1"] == pytest.approx(expected)
        assert metrics[split]["invalid"] == (predicted == "").sum()
    last = capsys.readouterr().out.splitlines()
    accuracy = f"{metrics['validation']['accuracy']:.3f}"
    assert any("F1-score on Val." in line for line in last)
    assert any(line.split()[0] == "sample" and accuracy in line for line in last if line.strip())


def test_scores_have_intervals_and_it_is_said_where_these_are_wide(run, capsys):
    folder = run("--decoding", "sample", "--temperature", HOT) / "sample"
    metrics, printed = json.loads((folder / "metrics.json").read_text()), capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.split()[0] == "sample")
    for split, numbers in metrics.items():
        for score in ("accuracy", "macro_f1"):
            low, high = numbers[f"{score}_interval"]
            assert 0 <= low <= numbers[score] <= high <= 1
            assert f"{numbers[score]:.3f} [{low:.3f}, {high:.3f}]" in line
            name = {"accuracy": "accuracy", "macro_f1": "macro-F1"}[score]
            wide = f"{split.capitalize()} rows: the interval of {name} is {high - low:.2f} wide; {numbers['n']} rows"
            assert (wide in printed) == (split == "validation" and high - low > 0.2)
        invalid = f"{split.capitalize()} rows: {numbers['invalid']} of {numbers['n']} answers are no label."
        assert (invalid in printed) == (numbers["invalid"] > 0)
    assert metrics["train"]["invalid"] > 0 and printed.index("Validation, 6 rows.") < printed.index("Train, 24 rows.")
    low, high = metrics["validation"]["accuracy_interval"]
    assert high - low > 0.2  # or nothing was tested here


def test_a_report_holds_the_pictures_the_tables_and_what_went_wrong(run):
    folder = run("--temperature", HOT, "--baselines")
    for decoding, pictures in (("sample", 4), ("labels", 5)):  # curves, matrix, two comparisons; reliability
        report = (folder / decoding / "report.html").read_text(encoding="utf-8")
        assert report.count('<img src="data:image/png;base64,') == pictures
        table = predictions(folder / decoding)
        wrong = table[table["prediction"] != table["label_text"]]
        assert all(f"<bdi>{sentence}</bdi>" in report for sentence in wrong["sentence"])
        assert "zero-shot, no adapter" in report and "versions.torch" in report
    assert (folder / "labels" / "reliability.png").stat().st_size > 5000
    assert not (folder / "sample" / "reliability.png").exists()


def test_the_tiny_model_was_worth_testing_on(run):
    """It answers with both labels and also with what is none, or the tests beside this one could not fail."""
    table = predictions(run("--temperature", HOT, "--split", "train") / "sample")
    assert set(table["prediction"]) == {"positive", "negative", ""}


def test_sampled_answers_repeat_and_do_not_depend_on_the_batch_size(run):
    hot = ["--temperature", HOT, "--batch_size"]
    one, eight, again = (predictions(run(*hot, size) / "sample") for size in (1, 8, 8))
    assert one.equals(eight)
    assert eight.equals(again)
    assert one["output"].nunique() > 5


def test_answers_do_not_depend_on_the_other_rows(run):
    both = predictions(run("--temperature", HOT) / "sample")
    alone = predictions(run("--temperature", HOT, "--split", "validation") / "sample")
    assert both[both["split"] == "validation"].reset_index(drop=True).equals(alone)


def test_greedy_answers_are_those_of_plain_steps_without_cache_or_batch(run, adapter):
    folder = run("--decoding", "greedy", "--split", "train")
    table = predictions(folder / "greedy")
    task = load_task("sst2")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent)
    base = json.loads((folder.parent / "run.json").read_text())["base_model"]["name"]
    model = modeling.load_adapter(modeling.load_base_model(base), folder.parent)
    longest = max(len(answer_ids(tokenizer, label)) for label in task.labels)
    for row in table.itertuples():
        ids = tokenizer(build_prompt(task, row.sentence), add_special_tokens=False).input_ids
        answer = []
        while len(answer) < longest and tokenizer.eos_token_id not in answer:
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer]), use_cache=False).logits
            answer.append(int(logits[0, -1].argmax()))
        assert row.output == tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("tuned", [True, False])
def test_label_scoring_is_that_of_one_plain_forward_a_label(run, tuned):
    """The tuned model is sure of every row, the base model of none: margins are seen in full only there."""
    folder = run("--decoding", "labels", *([] if tuned else ["--base_only"]))
    table = predictions(folder / ("labels" if tuned else "base-labels"))
    task, folder = load_task("sst2"), Path("models/tiny")
    assert table.columns.tolist() == [
        *("split", "row", "sentence", "label_text", "prediction", "p_positive", "p_negative", "margin")
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = json.loads((folder / "run.json").read_text())["base_model"]["name"]
    model = modeling.load_base_model(base)
    if tuned:
        model = modeling.load_adapter(model, folder)
    for row in table.itertuples():
        ids, scores = tokenizer(build_prompt(task, row.sentence), add_special_tokens=False).input_ids, []
        for label in task.labels:
            answer = answer_ids(tokenizer, label)
            with torch.no_grad():
                log_probs = model(torch.tensor([ids + answer]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[len(ids) - 1 + place, id_] for place, id_ in enumerate(answer)))
        expected = torch.stack(scores).softmax(0).tolist()
        assert [row.p_positive, row.p_negative] == pytest.approx(expected, abs=1e-4)
        assert row.margin == pytest.approx(abs(expected[0] - expected[1]), abs=1e-4)
        assert row.prediction == task.labels[expected.index(max(expected))]
    assert len(set(table["prediction"])) == 2


def test_label_scores_do_not_depend_on_the_batch_size_or_the_other_rows(run):
    one, many = (predictions(run("--decoding", "labels", "--batch_size", size) / "labels") for size in (1, 30))
    pd.testing.assert_frame_equal(one, many, rtol=1e-4)
    alone = predictions(run("--decoding", "labels", "--split", "validation") / "labels")
    pd.testing.assert_frame_equal(many[many["split"] == "validation"].reset_index(drop=True), alone, rtol=1e-4)


def test_label_scoring_adds_log_loss_and_calibration_and_has_no_invalid_answer(run):
    folder = run("--decoding", "labels") / "labels"
    metrics, table = json.loads((folder / "metrics.json").read_text()), predictions(folder)
    for split, rows in table.groupby("split"):
        true = rows["p_positive"].where(rows["label_text"] == "positive", rows["p_negative"])
        assert metrics[split]["log_loss"] == pytest.approx(-np.log(true).mean())
        assert 0 <= metrics[split]["expected_calibration_error"] <= 1
        assert metrics[split]["invalid"] == 0
        assert metrics[split]["accuracy"] == (rows["prediction"] == rows["label_text"]).mean()


def test_generation_computes_what_all_prompts_begin_with_once(run, adapter):
    tokens = []
    forward = LlamaMLP.forward

    def seen(module, hidden):
        tokens.append(hidden.shape[0] * hidden.shape[1])
        return forward(module, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", seen)
        run("--decoding", "greedy", "--split", "train", "--batch_size", "24")
    task, tokenizer = load_task("sst2"), AutoTokenizer.from_pretrained("models/tiny")
    rows = read_splits("words.jsonl", task).train
    prompts = [tokenizer(build_prompt(task, row["sentence"]), add_special_tokens=False).input_ids for row in rows]
    prefix = len(os.path.commonprefix(prompts))
    assert tokens[0] == prefix > 40
    assert tokens[2] == 24 * (max(map(len, prompts)) - prefix)  # tokens[1] is the second layer's prefix


def decodings(run, capsys):
    folder = run("--decoding", "greedy")
    assert {path.name for path in folder.iterdir()} == {"greedy"}
    folder = run()
    assert {path.name for path in folder.iterdir()} == {"greedy", "sample", "labels"}
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    start = len(lines) - lines[::-1].index("decoding") - 1
    assert lines[start : start + 3] == ["decoding", "sample", "labels"]  # one table: the published way, label scoring


def temperature(run, capsys):
    cold = predictions(run("--temperature", "1e-6") / "sample")
    greedy = predictions(run("--decoding", "greedy") / "greedy")
    hot = predictions(run("--temperature", "50") / "sample")
    assert cold.equals(greedy)
    assert (hot["output"] != greedy["output"]).mean() > 0.9


def seeds(run, capsys):
    one, other = (predictions(run("--temperature", HOT, "--seed", number) / "sample") for number in (1, 2))
    assert (one["output"] != other["output"]).any()


def batch_size(run, capsys):
    sizes = []
    generate = GenerationMixin.generate

    def counted(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", counted)
        run("--batch_size", "7", "--split", "train", "--decoding", "sample")
    assert sizes == [7, 7, 7, 3]


def splits(run, capsys):
    folder = run("--split", "validation") / "sample"
    assert set(predictions(folder)["split"]) == {"validation"}
    assert list(json.loads((folder / "metrics.json").read_text())) == ["validation"]


def base_only(run, capsys):
    folder = run("--base_only")
    assert {path.name for path in folder.iterdir()} == {"base-sample", "base-labels"}
    assert (predictions(folder / "base-sample")["prediction"] == "").all()  # a random model


def names(run, capsys):
    run("--adapters_name", "models/tiny")
    run("--adapters_name", "tinny", code=2)
    assert "models/ has tiny" in capsys.readouterr().err


def force(run, capsys):
    config = Path("models/tiny/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "another/base"}))
    run(code=2)
    assert "trained on another/base, but run.json names" in capsys.readouterr().err
    assert (run("--force") / "labels").is_dir()


def baselines(run, capsys):
    folder = run("--decoding", "labels", "--baselines", "--batch_size", "30")
    metrics, table = json.loads((folder / "labels" / "metrics.json").read_text()), predictions(folder / "labels")
    printed = capsys.readouterr().out
    base_only = json.loads((run("--base_only", "--decoding", "labels") / "base-labels" / "metrics.json").read_text())
    for split, rows in table.groupby("split"):
        found = metrics[split]["baselines"]
        assert list(found) == ["majority class", "TF-IDF + logistic regression", "zero-shot, no adapter"]
        majority = table.loc[table["split"] == "train", "label_text"].mode()[0]
        assert found["majority class"]["accuracy"]["mean"] == (rows["label_text"] == majority).mean()
        assert found["TF-IDF + logistic regression"]["accuracy"]["mean"] == 1  # a word gives the label away
        zero_shot = found["zero-shot, no adapter"]
        for score in ("accuracy", "macro_f1"):
            assert zero_shot[score]["mean"] == pytest.approx(base_only[split][score])
            difference = zero_shot["difference"][score]
            assert difference["mean"] == pytest.approx(metrics[split][score] - zero_shot[score]["mean"])
            assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]
        assert zero_shot["log_loss"] == pytest.approx(base_only[split]["log_loss"], rel=1e-4)
        assert (folder / "labels" / f"comparison_{split}.png").stat().st_size > 5000
    assert "Evaluated model, against TF-IDF + logistic regression: accuracy is" in printed
    assert printed.count(" the two apart") == 3  # of the validation rows alone


OPTIONS = {
    "--adapters_name": names,
    "--decoding": decodings,
    "--temperature": temperature,
    "--seed": seeds,
    "--batch_size": batch_size,
    "--split": splits,
    "--baselines": baselines,
    "--base_only": base_only,
    "--force": force,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_does_something(option, run, capsys):
    OPTIONS[option](run, capsys)


def test_no_option_is_left_out_above():
    assert {action.option_strings[0] for action in evaluate.build_parser()._actions} - {"-h"} == set(OPTIONS)


def test_data_that_changed_since_training_are_refused(run, capsys):
    file = Path("words.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[1:] + lines[:1]))
    run(code=2)
    assert "words.jsonl: its rows are no longer those that the adapter was trained with" in capsys.readouterr().err


def test_an_adapter_without_run_json_is_refused(run, tmp_path, capsys):
    (tmp_path / "work" / "models" / "tiny" / "run.json").unlink()
    run(code=2)
    assert "run.json: missing" in capsys.readouterr().err


def test_the_name_is_mandatory(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([])
    assert stop.value.code == 2
    assert "--adapters_name" in capsys.readouterr().err


def test_row_sampler_draws_from_the_softmax_at_the_temperature():
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = RowSampler(0.8, [f"42 train {number}" for number in range(20_000)])
    drawn = Counter(sampler(None, scores.repeat(20_000, 1)).argmax(dim=1).tolist())
    for index, probability in enumerate(torch.softmax(scores / 0.8, dim=0).tolist()):
        # four standard errors of a share of 20,000 draws
        assert drawn[index] / 20_000 == pytest.approx(
            probability, abs=4 * (probability * (1 - probability) / 20_000) ** 0.5
        )


def test_metrics_by_hand():
    labels = ("a", "b", "c")
    result = classification_metrics(labels, ["a", "a", "b", "b"], ["a", None, "b", "a"])
    assert result["n"] == 4
    assert result["invalid"] == 1
    assert result["accuracy"] == 0.5
    # a: precision 1/2, recall 1/2; b: precision 1, recall 1/2; c: neither a row nor a prediction, so not in the mean
    assert result["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result["per_class"]["b"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert result["per_class"]["c"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert confusion_counts(labels, ["a", "a", "b", "b"], ["a", None, "b", "a"]).tolist() == [
        [1, 0, 0, 1],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_probability_metrics_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.85, 0.15], [0.35, 0.65], [0.45, 0.55]])
    result = probability_metrics(("a", "b"), ["a", "b", "b", "a"], probabilities)
    assert result["log_loss"] == pytest.approx(-np.log([0.95, 0.15, 0.65, 0.45]).mean())
    # right, wrong, right, wrong, each alone in its bin of a tenth: |1 - .95|, |0 - .85|, |1 - .65|, |0 - .55|
    assert result["expected_calibration_error"] == pytest.approx((0.05 + 0.85 + 0.35 + 0.55) / 4)
    # in one bin the errors cancel: two rows at 0.75, one of them right
    result = probability_metrics(("a", "b"), ["a", "b"], np.array([[0.75, 0.25], [0.75, 0.25]]))
    assert result["expected_calibration_error"] == pytest.approx(0.25)
    assert probability_metrics(("a", "b"), ["a"], np.array([[1.0, 0.0]])) == {
        "log_loss": pytest.approx(0),
        "expected_calibration_error": 0,
    }


def test_rows_are_named_as_in_the_file(run, adapter):
    table = predictions(run() / "sample")
    records = [json.loads(line) for line in (adapter / "words.jsonl").read_text().splitlines()]
    assert [records[row]["sentence"] for row in table["row"]] == table["sentence"].tolist()
    splits = read_splits("words.jsonl", load_task("sst2"))
    assert table[table["split"] == "validation"]["sentence"].tolist() == splits.validation["sentence"][:]


def test_an_adapter_that_is_not_whole_is_refused_by_name(run, tmp_path, capsys):
    folder = tmp_path / "work" / "models" / "tiny"
    for content in ("[]", "{}", '{"options": {}, "task": {}, "data": {}}'):
        (folder / "run.json").write_text(content)
        run(code=2)
        assert "models/tiny/run.json: has no " in capsys.readouterr().err
    (folder / "adapter_model.safetensors").unlink()
    run(code=2)
    assert "models/tiny: has no adapter_model.safetensors" in capsys.readouterr().err


def test_a_base_models_own_generation_defaults_take_no_part(run, tiny_base, adapter):
    """A repetition penalty in the base model's repository would punish the labels, which stand in the prompt."""
    before = predictions(run("--decoding", "greedy") / "greedy")
    file = tiny_base / "generation_config.json"
    text = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(text) | {"repetition_penalty": 50.0, "top_k": 1}))
        assert predictions(run("--decoding", "greedy") / "greedy").equals(before)
    finally:
        file.write_text(text)
