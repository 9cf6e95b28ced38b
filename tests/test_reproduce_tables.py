"""benchmarks/reproduce_tables.py on a tiny random Llama and made-up rows: all lines, resumed, estimated, refused."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, snapshot, write_json_lines

sys.path.append(str(REPOSITORY / "benchmarks"))

import published_tables  # noqa: E402
import reproduce_tables  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402

LABELS = (
    *("Support Gun Polarized", "Support Gun Non-Polarized", "Neutral", "Anti Gun Polarized"),
    *("Anti Gun non-Polarized", "Not Relevant", "Not Sure"),
)
SHORT = {  # epochs, with what the study published for other ones
    "politosphere-definitions": {1: (0.23, 0.18, 0.48, 0.41, None)},
    "politosphere": {2: (0.39, 0.36, 0.35, 0.32, "a few"), 3: (0.87, 0.86, 0.52, 0.48, "a few")},
    "pol-unpol-oth": {1: (0.73, 0.71, 0.48, 0.49, None)},
    "supp-anti-oth": {1: (0.47, 0.54, 0.39, 0.43, "lots")},
    "sst2": {1: (None, None, 0.9140, 0.92, "3")},
}
RUN = ("politosphere", "supp-anti-oth", "sst2")  # in most tests


def change_table(patch, task, **changes):
    patch.setitem(published_tables.TABLES, task, replace(published_tables.TABLES[task], **changes))


def made_up_files(folder):
    """Write 28 comments in the Politosphere's format and 20 + 8 films as pre_processing.ipynb writes SST-2."""
    records = [
        {"id": f"c{number}", "body_cleaned": f"a made-up remark , number {number}", "User label": label}
        for number, label in enumerate(LABELS * 4)
    ]
    write_json_lines(folder / "comments.json", records)
    (folder / "films").mkdir()
    for split, size in (("train", 20), ("validation", 8)):
        films = [
            {"text": f"film {split} {number} is {word}", "label_text": label}
            for number in range(size // 2)
            for word, label in (("fine", "positive"), ("dull", "negative"))
        ]
        write_json_lines(folder / "films" / f"{split}.jsonl", films)


def run(*argv, code=0):
    assert reproduce_tables.main([str(part) for part in argv]) == code


def lines(folder, task):
    """Return {epochs: line} of a table's results."""
    result = json.loads((folder / "results" / f"tables-tiny-llama-{task}.json").read_text())
    return {line["epochs"]: line for line in result["lines"]}


@pytest.fixture(scope="module")
def options(tiny_base):
    return ["--base_model_name", tiny_base, "--results", "results", "--eval_batch_size", 32]


ALL = ["--data", "comments.json", "--sst2", "films"]
SOME = [*ALL, "--tasks", *RUN]
ONE = ["--data", "comments.json", "--tasks", "politosphere"]  # lines of 2 and 3 epochs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On matrices this small threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_tables(monkeypatch):
    shorten(monkeypatch)


def shorten(patch):
    for task, published in SHORT.items():
        change_table(patch, task, published=published, **({"rows": (16, 872)} if task == "sst2" else {}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options):
    """A folder in which four lines were run; its printed.txt is what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    made_up_files(folder)
    with pytest.MonkeyPatch.context() as patch, open(folder / "printed.txt", "w") as printed:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", printed)
        shorten(patch)
        run(*SOME, *options)
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder with the made-up files alone, as the current one."""
    made_up_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counting(monkeypatch):
    """Return a list that gets the adapter's name of every call of train.py and evaluate.py."""
    called = []
    for script in (train, evaluate):
        main = script.main

        def counted(argv, main=main, name=script.__name__):
            called.append((name, argv[argv.index("--adapters_name") + 1], argv))
            return main(argv)

        monkeypatch.setattr(script, "main", counted)
    return called


def test_every_line_is_trained_as_published_and_scored_in_both_ways(finished):
    for task in RUN:
        table = published_tables.TABLES[task]
        assert lines(finished, task).keys() == SHORT[task].keys()
        for epochs, line in lines(finished, task).items():
            folder = finished / "models" / f"table-tiny-llama-{task}-epoch{epochs}"
            given = json.loads((folder / "run.json").read_text())["options"]
            assert (given["task"], given["epoch"]) == (task, epochs)
            for name in ("max_seq_length", "train_batch_size", "learning_rate"):
                assert given[name] == getattr(table, name)
            for split, rows in zip(("train", "validation"), (16, 8) if task == "sst2" else (22, 6), strict=True):
                sampled, by_labels = line[split], line["labels"][split]
                assert sampled["n"] == by_labels["n"] == rows
                for numbers, decoding in ((sampled, "sample"), (by_labels, "labels")):
                    found = json.loads((folder / "evaluation" / decoding / "metrics.json").read_text())[split]
                    assert numbers == {name: found[name] for name in ("n", "accuracy", "macro_f1", "invalid")}
                assert by_labels["invalid"] == 0
            assert not (folder / "checkpoints").exists()


def test_settings_of_the_published_tables():
    shapes = {task: (table.max_seq_length, table.train_batch_size) for task, table in published_tables.TABLES.items()}
    assert shapes == {
        "politosphere-definitions": (512, 16),
        "politosphere": (256, 16),
        "pol-unpol-oth": (512, 16),
        "supp-anti-oth": (512, 16),
        "sst2": (256, 50),
    }
    assert {table.learning_rate for table in published_tables.TABLES.values()} == {2e-4}


def test_published_numbers_are_shown_as_they_were_published(monkeypatch, fresh, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(fresh)
    (fresh / "results").mkdir()
    empty = json.dumps({"lines": [], "data": {"train_rows": 100, "validation_rows": 872}})
    for task in published_tables.TABLES:
        (fresh / "results" / f"tables-none-{task}.json").write_text(empty)
    run("--show", "none", "--results", "results")
    shown = re.findall(r"^\| (\d+) \| (.+) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [int(epochs) for epochs, _ in shown] == [
        *(10, 20, 50, 100, 200),
        *(10, 20, 50, 100) * 3,
        *(1, 10, 20, 50),
    ]
    assert [row for _, row in shown[-4:]] == [
        "– | – | – | – | – (all) | – | –",
        "– | – | – (91.40%) | – (0.92) | – (3) | – | –",
        "– | – | – (93.58%) | – (0.94) | – (0) | – | –",
        "– | – | – (94.50%) | – (0.94) | – (0) | – | –",
    ]
    assert shown[4][1] == "– (1.00) | – (1.00) | – (0.43) | – (0.39) | – (none) | – | –"


def test_sst2_has_the_first_rows_in_the_order_of_the_file_and_all_validation_rows(finished):
    for split, size in (("train", 16), ("validation", 8)):
        given = [json.loads(line) for line in (finished / "films" / f"{split}.jsonl").read_text().splitlines()]
        cut = (finished / "data" / "tables" / "sst2-100" / f"{split}.jsonl").read_text().splitlines()
        expected = [{"sentence": row["text"], "label_text": row["label_text"]} for row in given[:size]]
        assert [json.loads(line) for line in cut] == expected


def test_the_estimate_comes_first_and_the_time_left_after_every_line(finished):
    printed = (finished / "printed.txt").read_text()
    estimate = printed.index("Time that is left with")
    assert printed.index("Measuring the time") < estimate < printed.index("politosphere, 2 epochs: ")
    for task in RUN:
        number = len(SHORT[task])
        assert f"  {task}: {number} of {number} lines, about " in printed
    assert re.search(r"in all: 4 lines, about \d", printed)
    assert [int(count) for count in re.findall(r"Left: (\d+) lines, about \d", printed)] == [3, 2, 1]
    assert not list((finished / "models").glob("*timing*"))  # the adapter that was measured with


def test_results_are_shown_beside_the_published_numbers(copy, capsys):
    run("--show", "tiny-llama", "--results", "results")
    shown = capsys.readouterr().out
    assert shown == (copy / "results" / "tables-tiny-llama.md").read_text()
    line = lines(copy, "politosphere")[2]
    sampled = [f"{line[split][score]:.2f}" for split in ("train", "validation") for score in ("accuracy", "macro_f1")]
    pairs = [f"{score} ({known:.2f})" for score, known in zip(sampled, SHORT["politosphere"][2][:4], strict=True)]
    invalid = f"{line['train']['invalid']} + {line['validation']['invalid']} (a few)"
    by_labels = [f"{line['labels']['validation'][score]:.2f}" for score in ("accuracy", "macro_f1")]
    assert f"| 2 | {' | '.join([*pairs, invalid, *by_labels])} |" in shown.splitlines()
    assert "**politosphere** (7 labels without definitions; 22 training and 6 validation rows; max_seq_" in shown
    film = lines(copy, "sst2")[1]
    rest = f"{film['train']['invalid']} + {film['validation']['invalid']} (3)"
    scores = [film[split]["accuracy"] for split in ("train", "validation")] + [film["validation"]["macro_f1"]]
    assert (
        f"| {scores[0]:.2%} | " in shown
        and f" | {scores[1]:.2%} (91.40%) | {scores[2]:.2f} (0.92) | {rest} | " in shown
    )


def test_started_again_nothing_is_done_twice(copy, options, capfd, monkeypatch):
    called, before = counting(monkeypatch), snapshot(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.glob("models/*/run.json")}
    run(*SOME, *options)
    assert called == []
    assert len(times) == 4 and {path: path.stat().st_mtime_ns for path in times} == times
    assert snapshot(copy) == before
    assert "All 4 lines are there: no time is left" in capfd.readouterr().out


def test_a_line_that_is_missing_is_run_without_measuring_again(copy, options, capfd, monkeypatch):
    shutil.rmtree("models/table-tiny-llama-politosphere-epoch3")
    Path("models/table-tiny-llama-sst2-epoch1/evaluation/labels/metrics.json").unlink()
    Path("models/table-tiny-llama-sst2-epoch1/evaluation/labels/settings.json").unlink()
    called, before = counting(monkeypatch), {task: lines(copy, task) for task in RUN}
    run(*SOME, *options, "--batch_size", 5)
    assert [call[:2] for call in called] == [
        ("train", "table-tiny-llama-politosphere-epoch3"),
        ("evaluate", "table-tiny-llama-politosphere-epoch3"),
        ("evaluate", "table-tiny-llama-sst2-epoch1"),
    ]
    assert [call[2][call[2].index("--batch_size") + 1] for call in called[1:]] == ["5", "5"]
    assert called[2][2][-2:] == ["--decoding", "labels"]
    printed = capfd.readouterr().out
    assert "Measuring" not in printed
    assert "  politosphere: 1 of 2 lines, about " in printed and "  supp-anti-oth: 0 of 1 lines, all done" in printed
    for task, table in before.items():  # the missing one came out the same again
        for epochs, line in table.items():
            assert {split: line[split] for split in ("train", "validation", "labels")} == {
                split: lines(copy, task)[epochs][split] for split in ("train", "validation", "labels")
            }


def test_estimate_trains_no_line(fresh, options, capsys, monkeypatch):
    called = counting(monkeypatch)
    run(*ALL, *options, "--estimate")
    printed = capsys.readouterr().out
    assert "Measuring the time of 2 epochs of politosphere-definitions" in printed
    assert re.search(r"  politosphere: 2 of 2 lines, about [\d.]+ \w+\n", printed)
    assert re.search(r"in all: 6 lines, about [\d.]+ \w+\n", printed)
    assert [call[0] for call in called] == ["train", "evaluate"]
    assert list((fresh / "models").iterdir()) == []
    assert not (fresh / "results").exists()


def test_time_is_extrapolated_by_epochs_tokens_and_lines(copy, options, monkeypatch):
    args = reproduce_tables.parse_args([str(part) for part in [*ONE, *options]])
    job = reproduce_tables.plan(args)[0]
    job.lines = {}
    monkeypatch.setattr(reproduce_tables, "epochs_left", lambda args, job, epochs: epochs)
    own = reproduce_tables.Timing("politosphere", 2, 10.0, 4.0, 7.0, job.tokens)
    assert reproduce_tables.seconds_left(args, job, [own]) == (2 + 3) * 10 + 2 * (4 + 7)
    other = replace(own, task="sst2", epochs=50, tokens=tuple(count / 2 for count in job.tokens))
    assert reproduce_tables.seconds_left(args, job, [other]) == (2 + 3) * 20 + 2 * (8 + 7)
    assert reproduce_tables.seconds_left(args, job, [other, own]) == (2 + 3) * 10 + 2 * (4 + 7)
    unknown = replace(own, epochs=3, epoch_seconds=None, fixed_seconds=None)
    assert reproduce_tables.seconds_left(args, job, [own, unknown]) == (2 + 3) * 10 + 2 * (4 + 7)


def test_sst2_alone_is_measured_too(fresh, options, capsys):
    run("--sst2", "films", *options, "--estimate")
    printed = capsys.readouterr().out
    assert "Measuring the time of 2 epochs of sst2" in printed
    assert re.search(r"  sst2: 1 of 1 lines, about [\d.]+ \w+\n", printed)


def cut_off(patch, batch):
    """Have training interrupted as by Ctrl-C at a batch of the line of 3 epochs."""
    step, batches = train.AnswerLossTrainer.training_step, []

    def interrupted(self, *args):
        if self.args.num_train_epochs == 3:
            batches.append(args)
            if len(batches) == batch:
                raise KeyboardInterrupt
        return step(self, *args)

    patch.setattr(train.AnswerLossTrainer, "training_step", interrupted)


@pytest.mark.parametrize(("batch", "how"), [(5, "--resume"), (2, None)])
def test_a_line_that_was_cut_off_goes_on_from_its_checkpoint_if_it_has_one(
    copy, options, batch, how, capfd, monkeypatch
):
    folder = copy / "models" / "table-tiny-llama-politosphere-epoch3"
    whole = (folder / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        cut_off(patch, batch)
        run(*ONE, *options)
    assert stop.value.code == 130
    assert "Started again with the same options, this goes on where it stopped" in capfd.readouterr().out
    if how is None:  # killed before its first checkpoint
        (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    called = counting(monkeypatch)
    run(*ONE, *options[:-1], 4)  # another --eval_batch_size, which changes no result
    assert [call[:2] for call in called] == [("train", folder.name), ("evaluate", folder.name)]
    assert ("--resume" in called[0][2], "--overwrite" in called[0][2]) == (how == "--resume", how is None)
    assert (folder / "adapter_model.safetensors").read_bytes() == whole
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("epochs", [1, 10, 17, 200])
def test_a_long_line_writes_ten_checkpoints_at_most_each_after_an_epoch(copy, options, epochs):
    args = reproduce_tables.parse_args([str(part) for part in [*ONE, *options]])
    job = reproduce_tables.plan(args)[0]
    chosen = reproduce_tables.cell_options(args, job, epochs)
    every = int(chosen[chosen.index("--save_steps") + 1])
    assert job.steps_per_epoch == 2  # 22 rows
    assert every % 2 == 0 and -(-2 * epochs // every) <= 10
    assert epochs > 10 or every == 2


def test_another_option_in_models_is_refused(copy, options, refused, monkeypatch):
    change_table(monkeypatch, "politosphere", learning_rate=1e-3)
    line = refused(reproduce_tables.main, *ONE, *options)
    folder = "models/table-tiny-llama-politosphere-epoch2"
    assert f"{folder}: was trained with --learning_rate 0.0002, and here it is 0.001; move {folder} away" in line


def test_other_rows_in_models_are_refused(copy, options, refused):
    for name, option in (("comments.json", "--data"), ("films/validation.jsonl", "--sst2")):
        file = Path(name)
        before = file.read_text()
        file.write_text(before.replace("number 1", "NUMBER 1").replace("film", "movie"))
        line = refused(reproduce_tables.main, *SOME, *options)
        assert f"was trained on other rows than {option} has (" in line and "away" in line
        file.write_text(before)


def test_other_base_models_in_models_are_refused(copy, options, refused, tiny_base):
    other = shutil.copytree(tiny_base, copy / "other" / "tiny-llama")
    line = refused(reproduce_tables.main, *ONE, *options[2:], "--base_model_name", other)
    assert f"was trained with --base_model_name {tiny_base}, and here it is {other}; move" in line
    weights = tiny_base / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4] + b"\x00\x00\x00\x40")  # one number is another now, 2.0
        line = refused(reproduce_tables.main, *ONE, *options)
        assert f"was trained on other weights of --base_model_name {tiny_base} (" in line
    finally:
        weights.write_bytes(content)


def test_a_line_that_becomes_nan_is_recorded_and_the_others_run(fresh, options, capfd, monkeypatch):
    change_table(monkeypatch, "politosphere", learning_rate=1e38)
    monkeypatch.setattr(reproduce_tables, "measure", lambda args, jobs: None)  # as where that stops at NaN, too
    tasks = ["--tasks", "politosphere", "supp-anti-oth"]
    run("--data", "comments.json", *tasks, *options)
    printed = capfd.readouterr()
    assert "train.py: error: step " in printed.err and "Traceback" not in printed.err
    for epochs, line in lines(fresh, "politosphere").items():
        assert re.match(r"step \d+: the .+ became NaN or infinite, so training stopped", line["failed"])
        assert f"| {epochs}, stopped: loss or weights not finite | – (" in printed.out
    assert lines(fresh, "supp-anti-oth")[1]["train"]["n"] == 22
    assert [path.name for path in (fresh / "models").iterdir()] == ["table-tiny-llama-supp-anti-oth-epoch1"]
    called = counting(monkeypatch)
    run("--data", "comments.json", *tasks, *options)  # known to fail
    assert called == []
    run("--data", "comments.json", *tasks, *options, "--retry_failed", "--epochs", 2)
    assert [call[1] for call in called] == ["table-tiny-llama-politosphere-epoch2"]
    assert lines(fresh, "politosphere").keys() == {2, 3}


def test_a_measurement_that_becomes_nan_says_nothing_of_the_time(fresh, options, capsys, monkeypatch):
    change_table(monkeypatch, "politosphere", learning_rate=1e38)
    run(*ONE, *options, "--estimate")
    assert "2 lines; how long is not known, since the training that was to tell stopped" in capsys.readouterr().out
    assert not list(fresh.glob("models/*"))


def test_only_some_lines_are_run_and_the_others_results_stay(copy, options, monkeypatch):
    before = lines(copy, "politosphere")
    shutil.rmtree("models")
    called = counting(monkeypatch)
    run(*ONE, *options, "--epochs", 2)
    assert {call[1] for call in called} == {"table-tiny-llama-politosphere-epoch2"}  # and nothing is measured again
    after = lines(copy, "politosphere")
    assert after.keys() == {2, 3} and after[3] == before[3]
    assert after[2]["labels"] == before[2]["labels"]


def test_results_of_older_versions_are_shown_with_dashes(fresh, capsys):
    scores = {"n": 90, "accuracy": 0.5, "macro_f1": 0.25, "invalid": 3}
    line = {"epochs": 2, "train": scores, "validation": scores, "device": "a GPU", "seconds": 1.0}
    (fresh / "results").mkdir()
    (fresh / "results" / "tables-old-politosphere.json").write_text(json.dumps({"lines": [line]}))
    run("--show", "somewhere/old", "--results", "results")
    shown = capsys.readouterr().out.splitlines()
    assert "| 2 | 0.50 (0.39) | 0.25 (0.36) | 0.50 (0.35) | 0.25 (0.32) | 3 + 3 (a few) | – | – |" in shown
    assert "| 3 | – (0.87) | – (0.86) | – (0.52) | – (0.48) | – (a few) | – | – |" in shown


def test_the_projects_own_results_are_shown(capsys):
    run("--show", "smollm2")
    shown = capsys.readouterr().out
    for task in ("politosphere-definitions", "politosphere", "pol-unpol-oth", "supp-anti-oth"):
        assert f"\n**{task}** (" in shown


MISTAKES = {
    "nothing to do": ([], "name your copy of the data with --data"),
    "no such file": (["--data", "nowhere.json"], "--data nowhere.json: no such file"),
    "no such line": ([*ONE, "--epochs", "10"], "--epochs 10: no such line; published are 2, 3"),
    "a task without its data": (["--sst2", "films", "--tasks", "politosphere"], "name your copy with --data"),
    "SST-2 as a file": (["--sst2", "films/train.jsonl"], "must be a folder with train.jsonl and validation.jsonl"),
    "too few films": (["--sst2", "few"], "has 8 training rows, and 16 are needed"),
    "a label of no task": (["--data", "wrong.json"], "wrong.json line 1"),
    "no such model": ([*ONE, "--base_model_name", "./none"], "--base_model_name ./none: no such folder"),
    "results in a file": ([*ONE, "--results", "comments.json"], "is no folder that can be written to"),
    "nothing to show": (["--show", "nothing"], "has no results of nothing"),
    "damaged results": (["--show", "damaged"], "tables-damaged-sst2.json: cannot be read"),
    "an unknown option": ([*ONE, "--epoch", "2"], "unrecognized arguments: --epoch 2"),
    "no whole number": ([*ONE, "--batch_size", "0"], "must be 1 or more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_one_line(fresh, options, mistake, refused):
    shutil.copytree("films", "few")
    shutil.copy("few/validation.jsonl", "few/train.jsonl")
    Path("few/train.jsonl").write_text(Path("few/train.jsonl").read_text().replace("film", "movie"))
    write_json_lines(fresh / "wrong.json", [{"body_cleaned": "a remark", "User label": "Undecided"}])
    Path("results").mkdir()
    Path("results/tables-damaged-sst2.json").write_text('{"lines": [{"epo')
    argv, message = MISTAKES[mistake]
    assert message in refused(reproduce_tables.main, *options, *argv)
