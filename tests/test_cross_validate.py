"""cross_validate.py as a user runs it, on a tiny random Llama in NF4 on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, TOKEN, write_json_lines
from sklearn.metrics import accuracy_score, f1_score

import cross_validate
import evaluate
import train
from rows import stratified_folds

LAST, CHOSEN = cross_validate.LAST, cross_validate.CHOSEN
HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }}"


def write_rows(folder):
    """Write a file of 26 rows, whose last words give the label away in most."""
    records = [
        {"sentence": f"the {place} film , {word}", "label_text": label}
        for place in ("first", "second", "third", "fourth", "fifth", "sixth")
        for word, label in (("good", "positive"), ("bad", "negative"), ("fine", "positive"), ("grim", "negative"))
    ]
    records += [{"sentence": HOSTILE, "label_text": label} for label in ("positive", "negative")]
    records[-1]["sentence"] += " again"
    return write_json_lines(folder / "films.jsonl", records)


@pytest.fixture(scope="module")
def options(tiny_base):
    """The options of the runs here: 2 x 2 folds of 3 epochs."""
    lengths = ["--folds", "2", "--repeats", "2", "--epoch", "3", "--train_batch_size", "4", "--learning_rate", "1e-2"]
    data = ["--base_model_name", str(tiny_base), "--task", "sst2", "--dataset_name", "films.jsonl"]
    return [*data, *lengths, "--adapters_name", "cv"]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A folder with a finished run in cross_validation/cv, and {what each fold was trained with}."""
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder)
    parts, train_adapter = [], train.train_adapter

    def spy(model, tokenizer, task, encoded, *args, **kwargs):
        parts.append({split: [row["prompt_ids"] for row in rows] for split, rows in encoded.items()})
        return train_adapter(model, tokenizer, task, encoded, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "train_adapter", spy)
        assert cross_validate.main(options) == 0
    return folder, parts


@pytest.fixture
def result(finished):
    return finished[0] / "cross_validation" / "cv"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_out_of_fold_rows_never_were_in_their_folds_training_rows(finished):
    _, parts = finished
    assert len(parts) == 4
    for part in parts:
        train_rows, held_out = ({tuple(ids) for ids in part[split]} for split in ("train", "validation"))
        assert not train_rows & held_out
        assert (len(train_rows), len(held_out)) == (13, 13)
    for repeat in (parts[:2], parts[2:]):
        assert len({tuple(ids) for part in repeat for ids in part["validation"]}) == 26


def test_files(result):
    pictures = {"scores_over_epochs.png", "comparison.png", "confusion_matrix.png", "reliability.png"}
    tables = {"metrics.json", "predictions.csv", "epochs.csv", "report.html", "run.json"}
    assert {path.name for path in result.iterdir()} == pictures | tables | {"checkpoints"}
    assert not list(result.rglob("adapter*"))  # its adapters are of use to nobody
    run = json.loads((result / "run.json").read_text())
    assert run["options"]["folds"] == 2 and run["data"]["rows"] == 26
    assert set(run["files"]) == pictures | tables
    assert len(pd.read_csv(result / "epochs.csv")) == 3


def test_numbers_are_those_of_the_predictions(result):
    metrics = metrics_of(result)
    table = pd.read_csv(result / "predictions.csv")
    assert len(table) == 52 and set(table["fold"]) == {1, 2} and set(table["repeat"]) == {1, 2}
    columns = {LAST: "prediction"} | {name: name for name in metrics["systems"] if name != LAST}
    for name, column in columns.items():
        each = [
            (
                accuracy_score(rows["label_text"], rows[column]),
                f1_score(rows["label_text"], rows[column], average="macro", zero_division=0),
            )
            for _, rows in table.groupby("repeat")
        ]
        found = metrics["systems"][name]
        for place, score in enumerate(("accuracy", "macro_f1")):
            assert found[score]["mean"] == pytest.approx(np.mean(each, axis=0)[place])
            assert found[score]["sd"] == pytest.approx(np.std(each, axis=0, ddof=1)[place])
            low, high = found[score]["interval"]
            assert 0 <= low <= found[score]["mean"] <= high <= 1
    true = table["p_positive"].where(table["label_text"] == "positive", table["p_negative"])
    assert metrics["systems"][LAST]["log_loss"] == pytest.approx(-np.log(true).mean(), rel=1e-5)
    confusion = pd.crosstab(table["label_text"], table["prediction"])
    labels = ["positive", "negative"]
    wanted = confusion.reindex(index=labels, columns=labels, fill_value=0).to_numpy()
    assert (np.array(metrics["systems"][LAST]["confusion"])[:, :2] == wanted).all()
    last = metrics["systems"][LAST]
    assert metrics["epochs"][-1]["per_class_f1"] == last["per_class_f1"]
    assert metrics["epochs"][-1]["log_loss"] == last["log_loss"]
    assert metrics["epochs"][-1]["macro_f1"]["mean"] == last["macro_f1"]["mean"]


def test_a_fold_is_what_train_py_gives_on_its_rows(finished, result, options, tmp_path, monkeypatch):
    """The third fold, after two others on the same base model, against a run of train.py on the same cut."""
    monkeypatch.chdir(tmp_path)
    records = [json.loads(line) for line in (finished[0] / "films.jsonl").read_text().splitlines()]
    folds, _ = stratified_folds([record["label_text"] for record in records], 2, 2, seed=42)
    held_out = set(folds[1][0].tolist())
    (tmp_path / "data").mkdir()
    for split, inside in (("train", False), ("validation", True)):
        rows = [record for row, record in enumerate(records) if (row in held_out) == inside]
        write_json_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    keep = (
        options[: options.index("--dataset_name")]
        + options[options.index("--epoch") : options.index("--adapters_name")]
    )
    fold = ["--dataset_name", "data", "--seed", str(42 + 2), "--adapters_name", "fold"]
    assert train.main([*keep, *fold]) == 0
    assert evaluate.main(["--adapters_name", "fold", "--decoding", "labels", "--split", "validation"]) == 0
    alone = pd.read_csv("models/fold/evaluation/labels/predictions.csv")
    table = pd.read_csv(result / "predictions.csv")
    table = table[(table["repeat"] == 2) & (table["fold"] == 1)].reset_index(drop=True)
    assert table["sentence"].tolist() == alone["sentence"].tolist()
    for column in ("p_positive", "p_negative"):
        assert table[column].to_numpy() == pytest.approx(alone[column].to_numpy(), rel=1e-4)
    history = pd.read_csv("models/fold/history.csv")
    right = (table["prediction"] == table["label_text"]).mean()
    assert history["eval_accuracy"].iloc[-1] == pytest.approx(right)


def test_the_report_says_what_can_be_known(finished, result, capsys):
    report = (result / "report.html").read_text(encoding="utf-8")
    metrics = metrics_of(result)
    assert "26 rows, cut 2 times into 2 folds" in report
    assert "optimistic, since the epoch was chosen on the rows that it is scored on" in report
    for name in metrics["systems"]:
        mean, (low, high) = (
            metrics["systems"][name]["accuracy"]["mean"],
            metrics["systems"][name]["accuracy"]["interval"],
        )
        assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in report
    for name in ("majority class", "TF-IDF + logistic regression", "zero-shot, no adapter"):
        assert re.search(rf"against {re.escape(name)}: accuracy is .* (cannot )?tell the two apart", report)
    assert report.count("data:image/png;base64,") == 4
    assert "<script" not in report
    table = pd.read_csv(result / "predictions.csv")
    wrong = set(table.loc[table["prediction"] != table["label_text"], "sentence"])
    right = set(table["sentence"]) - wrong
    assert all(f"<bdi>{escape(sentence)}</bdi>" in report for sentence in wrong)
    assert not any(f"<bdi>{escape(sentence)}</bdi>" in report for sentence in right)


def test_a_finished_run_is_neither_replaced_unasked_nor_done_again(
    finished, result, options, refused, monkeypatch, capfd
):
    monkeypatch.chdir(finished[0])
    line = refused(cross_validate.main, *options, folder=finished[0])
    assert "cross_validation/cv: exists; pass --overwrite" in line
    before = (result / "run.json").stat().st_mtime_ns
    assert cross_validate.main([*options, "--resume"]) == 0
    assert "cross_validation/cv: this run is finished" in capfd.readouterr().out
    assert (result / "run.json").stat().st_mtime_ns == before


CHANGED = {"--folds": ("2", "3"), "--repeats": ("2", "1"), "--seed": ("42", "1"), "--epoch": ("3", "4")}


@pytest.mark.parametrize("option", CHANGED)
def test_a_resumed_run_must_have_the_same_options(finished, options, refused, monkeypatch, option):
    monkeypatch.chdir(finished[0])
    old, new = CHANGED[option]
    line = refused(cross_validate.main, *options, option, new, "--resume", folder=finished[0])
    assert f"{option}: was {old} when the run was started and is {new} now" in line


def start(folder, options):
    environment = {**os.environ, "HF_TOKEN": "hf_" + "y" * 34, "OMP_NUM_THREADS": "1"}
    with open(folder / "output.txt", "w") as output:
        command = [sys.executable, REPOSITORY / "cross_validate.py", *options]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def wait_for_folds(process, folder, count):
    while not (folder / f"cross_validation/cv/checkpoints/checkpoint-{count}").exists():
        assert process.poll() is None, "the run ended before it could be cut off"
        time.sleep(0.001)


def finish(process, folder):
    code, printed = process.wait(timeout=300), (folder / "output.txt").read_text()
    assert "Traceback" not in printed and not TOKEN.search(printed)
    return code, printed


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_goes_on_with_the_next_fold_and_gives_the_same_numbers(stop, options, tmp_path):
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
        write_rows(folder)
    whole, cut = (start(folder, options) for folder in folders)
    wait_for_folds(cut, folders[1], 2)
    cut.send_signal(stop)
    code, printed = finish(cut, folders[1])
    if stop == signal.SIGTERM:
        assert code == 143
        assert "kept: cross_validation/cv/checkpoints/checkpoint-" in printed.splitlines()[-1]
        assert "to go on: python cross_validate.py" in printed.splitlines()[-1]
    assert not (folders[1] / "cross_validation/cv/run.json").exists()
    resumed = start(folders[1], [*options, "--resume"])
    code, printed = finish(resumed, folders[1])
    assert code == 0, printed
    assert re.search(r"Resuming from cross_validation/cv/checkpoints/checkpoint-[23]\n", printed)
    assert "fold 1 of 4" not in printed and "fold 2 of 4" not in printed
    assert finish(whole, folders[0])[0] == 0
    for file in ("metrics.json", "predictions.csv", "epochs.csv"):
        assert (folders[0] / "cross_validation/cv" / file).read_bytes() == (
            folders[1] / "cross_validation/cv" / file
        ).read_bytes()


def test_on_rows_that_a_word_tells_apart_the_score_is_one(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = [
        {"sentence": f"{word} " * (1 + number % 3) + str(number), "label_text": label}
        for number in range(10)
        for word, label in (("good", "positive"), ("bad", "negative"))
    ]
    write_json_lines(tmp_path / "words.jsonl", records)
    modules = ["--lora_target_modules", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    data = ["--base_model_name", str(tiny_base), "--task", "sst2", "--dataset_name", "words.jsonl"]
    length = ["--folds", "2", "--repeats", "1", "--epoch", "40", "--train_batch_size", "8", "--learning_rate", "2e-2"]
    assert cross_validate.main([*data, *length, *modules]) == 0
    metrics = metrics_of(tmp_path / "cross_validation" / f"{tiny_base.name}-sst2-epoch40")
    for name in (LAST, "TF-IDF + logistic regression"):
        assert metrics["systems"][name]["accuracy"] == {"mean": 1, "sd": None, "interval": [1, 1]}
        assert metrics["systems"][name]["macro_f1"]["mean"] == 1
    assert metrics["systems"]["majority class"]["accuracy"]["mean"] == 0.5
    printed = capsys.readouterr().out
    assert "these 20 rows tell the two apart" in printed
    assert "up to 15% of other rows may be different all the same" in printed


def test_a_label_with_fewer_rows_than_folds_is_said_and_scored(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path)
    task = {"system_prompt": "Judge.", "labels": ["positive", "negative", "mixed"], "answer_field": "Sentiment:"}
    Path("task.json").write_text(json.dumps(task))
    with open(file, "a") as rows:
        rows.write('{"sentence": "so , so", "label_text": "mixed"}\n')
    changed = ["--task", "task.json", "--epoch", "1", "--repeats", "1"]
    assert cross_validate.main([*options, *changed]) == 0
    assert (
        "label 'mixed' has 1 row, fewer than 2 folds: it is not learned where it is held out" in capsys.readouterr().out
    )
    metrics = metrics_of(tmp_path / "cross_validation" / "cv")
    assert metrics["labels"]["mixed"] == 1
    assert metrics["systems"]["majority class"]["per_class_f1"]["mixed"] == 0


WRONG = {
    "too many folds": (["--folds", "14"], "--folds 14: no label has as many rows, the most frequent one has 13"),
    "one fold": (["--folds", "1"], "argument --folds: must be 2 or more"),
    "no repeat": (["--repeats", "0"], "argument --repeats: must be 1 or more"),
    "another place": (["--adapters_name", "../cv"], "--adapters_name '../cv': use letters"),
    "no such data": (["--dataset_name", "films.json"], "films.json: no such file"),
    "nothing to resume": (["--resume"], "cross_validation/cv: does not exist"),
    "an option of train.py's output": (["--keep", "best"], "unrecognized arguments: --keep best"),
    "weights that become NaN": (["--learning_rate", "1e38"], "repeat 1, fold 1: step 1: the "),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_said_in_one_line(options, tmp_path, monkeypatch, refused, wrong):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    more, message = WRONG[wrong]
    assert message in refused(cross_validate.main, *options, *more)
