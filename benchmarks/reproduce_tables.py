"""The study's four Politosphere tables and its SST-2 lines of 100 examples, run with train.py and evaluate.py.

python benchmarks/reproduce_tables.py --data daccord_yifei_v2_leo.json --base_model_name smollm2
python benchmarks/reproduce_tables.py --sst2 data/sst2-sst2 --base_model_name meta-llama/Llama-2-13b-chat-hf
python benchmarks/reproduce_tables.py --show smollm2

Says first how long it will take. Adapters go to models/ in the current folder, merged labels and SST-2's hundred rows
to data/tables/ there, results to benchmarks/results/. Started again, it goes on with what is missing. data/sst2-sst2 is
what pre_processing.ipynb writes: papermill pre_processing.ipynb out.ipynb -p source sst2 -p task sst2
"""

import argparse
import contextlib
import gc
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from published_tables import SPLITS, TABLES, markdown, read_results, results_file, short_name  # noqa: E402

import checkpoints  # noqa: E402
import evaluate  # noqa: E402
import merge_labels  # noqa: E402
import modeling  # noqa: E402
import train  # noqa: E402
from command_line import CommandParser, UserError, one_line_errors, positive_int, remove, replacing  # noqa: E402
from prompts import TASKS, answer_ids, encode_rows, task_fields  # noqa: E402
from rows import Splits, read_splits  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DATA = Path("data") / "tables"  # of the current folder
SST2 = "sst2"
SAVES = 10  # checkpoints of a cell, at most
MEASURED_ROWS = 100  # of SST-2's validation rows, when the time is measured
NOT_FINITE = "became NaN or infinite"  # what train.py says of a loss and of weights
SAME_RESULT = train.FREE_OPTIONS | {"eval_batch_size"}  # train.py's options that change no number


def build_parser():
    parser = CommandParser(prog="reproduce_tables.py", description=__doc__.split("\n")[0])
    what = parser.add_argument_group("what to run")
    what.add_argument("--data", type=Path, default=argparse.SUPPRESS, help="your copy of daccord_yifei_v2_leo.json")
    what.add_argument(
        "--sst2",
        default=argparse.SUPPRESS,
        help="your copy of SST-2: the folder that pre_processing.ipynb writes with source sst2, or a Hub data set with "
        "such splits; of its training rows the first 100 are taken",
    )
    what.add_argument("--base_model_name", default=modeling.EMBEDDED_MODEL, help="as train.py takes it")
    what.add_argument(
        "--tasks", nargs="+", choices=TABLES, default=argparse.SUPPRESS, help="tables (default: all you have data for)"
    )
    what.add_argument(
        "--epochs", nargs="+", type=positive_int, default=argparse.SUPPRESS, help="lines (default: all published)"
    )
    what.add_argument("--retry_failed", action="store_true", help="run those lines again whose training stopped at NaN")
    speed = parser.add_argument_group("time and memory, not results")
    speed.add_argument("--eval_batch_size", type=positive_int, default=8, help="of train.py")
    speed.add_argument("--batch_size", type=positive_int, default=32, help="of evaluate.py")
    speed.add_argument("--gradient_checkpointing", action="store_true", help="of train.py: less memory, more time")
    output = parser.add_argument_group("output")
    output.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where results are and go")
    only = output.add_mutually_exclusive_group()
    only.add_argument("--estimate", action="store_true", help="say how long it will take, and end")
    only.add_argument("--show", metavar="MODEL", default=argparse.SUPPRESS, help="print a model's results, and end")
    return parser


def parse_args(argv=None):
    """Return the options, with `tables` as {task: epochs to run}; raise UserError where they do not go together."""
    args = build_parser().parse_args(argv)
    for name in ("data", "sst2", "tasks", "epochs", "show"):
        setattr(args, name, getattr(args, name, None))
    if args.show:
        return args
    if args.data is None and args.sst2 is None:
        raise UserError("name your copy of the data with --data, that of SST-2 with --sst2, or a model to --show")
    if args.data is not None and not args.data.is_file():
        raise UserError(f"--data {args.data}: no such file; name your copy of daccord_yifei_v2_leo.json")
    there = [task for task in TABLES if (args.data if task != SST2 else args.sst2) is not None]
    tasks = [task for task in TABLES if task in (args.tasks or there)]
    if lacking := [task for task in tasks if task not in there]:
        option = "--sst2" if lacking[0] == SST2 else "--data"
        raise UserError(f"--tasks {lacking[0]}: its data is not there; name your copy with {option}")
    published = sorted({epochs for task in tasks for epochs in TABLES[task].published})
    if unknown := [epochs for epochs in args.epochs or () if epochs not in published]:
        raise UserError(f"--epochs {unknown[0]}: no such line; published are {', '.join(map(str, published))}")
    wanted = args.epochs or published
    lines = {task: [epochs for epochs in TABLES[task].published if epochs in wanted] for task in tasks}
    args.tables = {task: epochs for task, epochs in lines.items() if epochs}
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What is to be run, and what is there


@dataclass
class Job:
    """One table to run: `epochs` are its lines, `data` what train.py reads, `lines` results that are there already."""

    task: str
    epochs: list[int]
    data: Path
    splits: Splits
    tokens: tuple[float, float]  # as `count_tokens` says
    lines: dict = field(default_factory=dict)

    @property
    def left(self):
        return [epochs for epochs in self.epochs if epochs not in self.lines]

    @property
    def steps_per_epoch(self):
        return math.ceil(len(self.splits.train) / TABLES[self.task].train_batch_size)


def prepare_data(args, task, folder):
    """Return what train.py reads for `task`: the user's copy, or what is made of it in `folder`."""
    if task == SST2:
        return cut_sst2(args.sst2, folder / "sst2-100")
    if task not in merge_labels.SCHEMES:
        return args.data
    merged = folder / merge_labels.default_output(args.data, task).name
    with contextlib.redirect_stdout(io.StringIO()):
        call(merge_labels.main, args.data, "--scheme", task, "--output", merged)
    return merged


def cut_sst2(dataset_name, folder, validation_rows=None):
    """Write SST-2's first training rows, in the order of the file, and its validation rows to `folder`; return it."""
    wanted, path = TABLES[SST2].rows[0], Path(dataset_name)
    if path.exists() and not all((path / f"{split}.jsonl").is_file() for split in SPLITS):
        raise UserError(
            f"--sst2 {dataset_name}: must be a folder with train.jsonl and validation.jsonl, as pre_processing.ipynb "
            "writes it: papermill pre_processing.ipynb out.ipynb -p source sst2 -p task sst2"
        )
    splits = read_splits(dataset_name, TASKS[SST2])
    if len(splits.train) < wanted:
        raise UserError(f"--sst2 {dataset_name}: has {len(splits.train)} training rows, and {wanted} are needed")
    folder.mkdir()
    for split, rows in (("train", splits.train), ("validation", splits.validation)):
        number = wanted if split == "train" else validation_rows or len(rows)
        lines = [
            json.dumps({"sentence": sentence, "label_text": label}) + "\n"
            for sentence, label in zip(rows["sentence"][:number], rows["label_text"][:number], strict=True)
        ]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def plan_job(args, task, tokenizer, scratch):
    """Return the Job of a table, its data read and checked; what is made for it lies in `scratch`."""
    data = prepare_data(args, task, scratch)
    splits = read_splits(str(data), TASKS[task])
    rows = (len(splits.train), len(splits.validation))
    if rows != TABLES[task].rows:
        there, known = (" + ".join(map(str, sizes)) for sizes in (rows, TABLES[task].rows))
        print(f"Note: {task} has {there} training and validation rows here, and had {known} in the study")
    return Job(task, args.tables[task], data, splits, count_tokens(tokenizer, task, splits))


def count_tokens(tokenizer, task, splits):
    """Return the tokens that an epoch and an evaluation compute, which their time is taken to grow with.

    What all prompts begin with counts once a training batch and once a scored split, as it is computed. A training
    token counts as three: its backward pass takes twice a forward pass.
    """
    table = TABLES[task]
    encoded = [encode_rows(tokenizer, TASKS[task], getattr(splits, split), table.max_seq_length)[0] for split in SPLITS]
    common = len(os.path.commonprefix([row["prompt_ids"] for rows in encoded for row in rows]))
    answers = sum(len(answer_ids(tokenizer, label)) for label in TASKS[task].labels)
    trained, validation = ([len(row["prompt_ids"]) - common for row in rows] for rows in encoded)
    batches = math.ceil(len(trained) / table.train_batch_size)
    training = batches * common + sum(trained) + sum(len(row["answer_ids"]) for row in encoded[0])
    per_row = sum(trained) / len(trained) + answers
    scored = 2 * common + sum(validation) + len(validation) * answers
    epoch = 3 * training + scored + min(len(trained), train.SCORED_TRAIN_ROWS) * per_row
    return epoch, scored + len(trained) * per_row


def adapter_folder(args, task, epochs):
    return modeling.MODELS / f"table-{short_name(args.base_model_name)}-{task}-epoch{epochs}"


def cell_options(args, job, epochs):
    """Return train.py's options for one line of a table, without how to start."""
    table = TABLES[job.task]
    options = {
        "--base_model_name": args.base_model_name,
        "--task": job.task,
        "--dataset_name": job.data,
        "--epoch": epochs,
        "--max_seq_length": table.max_seq_length,
        "--train_batch_size": table.train_batch_size,
        "--learning_rate": table.learning_rate,
        "--eval_batch_size": args.eval_batch_size,
        "--save_steps": job.steps_per_epoch * math.ceil(epochs / SAVES),
        "--adapters_name": adapter_folder(args, job.task, epochs).name,
    }
    more = ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    return [str(part) for pair in options.items() for part in pair] + more


def saved_run(folder):
    """Return run.json's dict of the run in an adapter's folder, finished or not, or None where there is none."""
    files = [file for file in (folder / "checkpoints" / "run.json", folder / "run.json") if file.is_file()]
    if not files:
        return None
    try:
        run = json.loads(files[0].read_text(encoding="utf-8"))
        if {"options", "task", "data", "base_model"} <= run.keys():
            return run
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{files[0]}: cannot be read ({error}); move {folder} away") from error
    raise UserError(f"{files[0]}: is not what train.py writes; move {folder} away")


def result_options(options):
    """Return those of a dict of train.py's options that results depend on, without None."""
    return {name: value for name, value in sorted(options.items()) if name not in SAME_RESULT and value is not None}


def wanted_options(args, job, epochs):
    """Return the options that results of one line depend on, as run.json holds them."""
    return result_options(vars(train.build_parser().parse_args(cell_options(args, job, epochs))))


def check_cell(args, job, epochs, fingerprint):
    """Raise UserError where models/ has a run of the line's name that is another; return its base weights' fingerprint.

    `fingerprint` is what that should be, or None where it is not known.
    """
    folder = adapter_folder(args, job.task, epochs)
    run = saved_run(folder)
    if run is None:
        return fingerprint
    advice = f"move {folder} away, or run from another folder"
    before, now = result_options(run["options"]), wanted_options(args, job, epochs)
    for name in sorted(now.keys() | before.keys()):
        # An option that is newer than the run: it was trained as the default says.
        old, new = before.get(name, now.get(name) if name not in run["options"] else None), now.get(name)
        if old != new:
            raise UserError(f"{folder}: was trained with --{name} {old}, and here it is {new}; {advice}")
    if run["task"] != task_fields(TASKS[job.task]):
        raise UserError(f"{folder}: was trained with another prompt of task {job.task}; {advice}")
    old, new = run["data"]["fingerprint"], job.splits.fingerprint()
    if old != new:
        option = "--sst2" if job.task == SST2 else "--data"
        raise UserError(f"{folder}: was trained on other rows than {option} has ({old[:12]}, {new[:12]}); {advice}")
    weights = run["base_model"].get("fingerprint")
    if fingerprint and weights and weights != fingerprint:
        raise UserError(
            f"{folder}: was trained on other weights of --base_model_name {args.base_model_name} ({weights[:12]}, "
            f"{fingerprint[:12]}); {advice}"
        )
    return fingerprint or weights


def plan(args):
    """Return the Jobs, with the results that are there; find all that is wrong before anything is written."""
    nearest = next(path for path in (args.results.absolute(), *args.results.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--results {args.results}: {nearest} is no folder that can be written to; name another")
    tokenizer = modeling.load_tokenizer(args.base_model_name)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [plan_job(args, task, tokenizer, Path(scratch)) for task in args.tables]
        local = args.base_model_name == modeling.EMBEDDED_MODEL or Path(args.base_model_name).is_dir()
        fingerprint = modeling.base_fingerprint(args.base_model_name) if local else None
        for job in jobs:
            for epochs in job.epochs:
                fingerprint = check_cell(args, job, epochs, fingerprint)
        for job in jobs:
            job.lines = earlier_lines(args, job, fingerprint)
        for job in jobs:
            if job.data != args.data:
                job.data = install(job.data)
    for job in jobs:
        for epochs in job.epochs:
            folder = adapter_folder(args, job.task, epochs)
            if checkpoints.is_finished(folder) and not unevaluated(folder):
                timing = job.lines.get(epochs, {}).get("timing")
                job.lines[epochs] = finished_line(folder, epochs, timing)
                remove(folder / "checkpoints")
            elif "failed" not in job.lines.get(epochs, {}):
                job.lines.pop(epochs, None)
    return jobs


def install(path):
    """Copy a file or a folder to data/tables/ in the current folder, in place of an older one; return where it is."""
    with replacing(DATA / path.name) as part:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, part)
    return DATA / path.name


def same_settings(args, job):
    """Return what a results file says of its table: its lines can be kept where this is the same."""
    options = wanted_options(args, job, job.epochs[0])
    del options["epoch"]
    sizes = {f"{split}_rows": len(getattr(job.splits, split)) for split in SPLITS}
    return {
        "task": job.task,
        "base_model_name": args.base_model_name,
        "max_seq_length": TABLES[job.task].max_seq_length,
        "prompt": TASKS[job.task].system_prompt,
        "options": options,
        "data": {"fingerprint": job.splits.fingerprint(), **sizes},
    }


def earlier_lines(args, job, fingerprint):
    """Return {epochs: line} of the results file, without those of other options, data or base weights.

    `fingerprint` is that of the base weights, or None where it is not known yet.
    """
    file = results_file(args.results, args.base_model_name, job.task)
    result = read_results(file)
    if result is None:
        return {}
    if any(result.get(name) != value for name, value in same_settings(args, job).items()):
        print(f"Note: {file} is of other options or data, or of an older version; it is replaced with the first line")
        return {}
    kept = {line["epochs"]: line for line in result["lines"]}
    if fingerprint is not None:
        kept = {epochs: line for epochs, line in kept.items() if line.get("weights") in (None, fingerprint)}
    if args.retry_failed:
        kept = {epochs: line for epochs, line in kept.items() if "failed" not in line or epochs not in job.epochs}
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Running a line


class Tee(io.TextIOBase):
    """Standard error whose end is kept, too."""

    def __init__(self, stream):
        self.stream, self.kept = stream, ""

    def write(self, text):
        self.kept = (self.kept + text)[-10_000:]
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()

    def isatty(self):
        return self.stream.isatty()

    def fileno(self):
        return self.stream.fileno()


class NotFinite(Exception):
    """Training stopped at a loss or weights that are not finite; the message is what train.py said."""


def call(main, *options):
    """Run one of the scripts, return its seconds; stop where it fails, as its line has said why.

    Raises NotFinite where that may be so of this line alone.
    """
    gc.collect()  # the model of the call before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start, tee = time.perf_counter(), Tee(sys.stderr)
    with contextlib.redirect_stderr(tee):
        code = main([str(option) for option in options])
    said = tee.kept.rstrip().split("\n")[-1]
    if code == 2 and NOT_FINITE in said:
        raise NotFinite(said.split(": error: ", 1)[-1])
    if code:
        raise SystemExit(code)
    return time.perf_counter() - start


def unevaluated(folder):
    """Return the decodings that a finished adapter lacks an evaluation of, with evaluate.py's own defaults."""
    wanted = vars(evaluate.build_parser().parse_args(["--adapters_name", folder.name]))
    missing = []
    for decoding in wanted["decoding"]:
        try:
            settings = json.loads((folder / "evaluation" / decoding / "settings.json").read_text(encoding="utf-8"))
            same = all(settings.get(name, wanted[name]) == wanted[name] for name in ("temperature", "seed", "split"))
        except (OSError, ValueError, AttributeError):
            same = False
        if not same:
            missing.append(decoding)
    return missing


def finished_line(folder, epochs, timing=None):
    """Return a line of the results: sampled answers' scores, `labels` with those of label scoring, the run's cost.

    `timing` is what it says about the time, or None: then what run.json and settings.json tell.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    scores, evaluation_seconds = {}, 0
    for decoding in ("sample", "labels"):
        evaluation = folder / "evaluation" / decoding
        metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
        scores[decoding] = {
            split: {key: metrics[split][key] for key in ("n", "accuracy", "macro_f1", "invalid")} for split in SPLITS
        }
        evaluation_seconds += json.loads((evaluation / "settings.json").read_text(encoding="utf-8"))["seconds"]
    if timing is None:
        # The seconds of a resumed run are those since then.
        epoch_seconds = None if run.get("resumed_from") else round(run["seconds"] / epochs, 3)
        timing = {
            "epoch_seconds": epoch_seconds,
            "evaluation_seconds": round(evaluation_seconds, 1),
            "fixed_seconds": None,
        }
    return {
        "epochs": epochs,
        **scores["sample"],
        "labels": scores["labels"],
        **{key: run[key] for key in ("seconds", "peak_memory_gb", "device", "versions")},
        "weights": run["base_model"].get("fingerprint"),
        "timing": timing,
    }


def how_to_start(folder):
    """Return train.py's options for a folder that may hold a run that was cut off."""
    if not folder.exists():
        return []
    run = saved_run(folder)
    whole, _ = checkpoints.find_checkpoints(folder)
    if not whole or not (folder / "checkpoints" / "run.json").is_file():
        return ["--overwrite"]
    return ["--resume", "--eval_batch_size", run["options"]["eval_batch_size"]]  # train.py wants the same one


def run_cell(args, job, epochs):
    """Train and evaluate one line of a table, as far as models/ does not hold it; add it to the job's lines."""
    folder = adapter_folder(args, job.task, epochs)
    print(f"\n{job.task}, {epochs} epochs: {folder}")
    if not checkpoints.is_finished(folder):
        try:
            call(train.main, *cell_options(args, job, epochs), *how_to_start(folder))
        except NotFinite as error:
            job.lines[epochs] = {"epochs": epochs, "failed": str(error), "device": modeling.device_name()}
            forget(folder)
            return
    remove(folder / "checkpoints")  # each is three times the adapter
    missing = unevaluated(folder)
    options = ["--adapters_name", folder.name, "--batch_size", args.batch_size, "--decoding"]
    seconds = call(evaluate.main, *options, *missing)
    line = finished_line(folder, epochs)
    if missing == ["sample", "labels"]:
        line["timing"]["fixed_seconds"] = loading_seconds(seconds, line["timing"]["evaluation_seconds"])
    job.lines[epochs] = line


def forget(folder):
    """Remove the checkpoints of a run that cannot go on, and its folder if there is nothing else."""
    remove(folder / "checkpoints")
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_results(args, job):
    """Write a table's results, if there are any."""
    if job.lines:
        result = same_settings(args, job) | {"lines": [job.lines[epochs] for epochs in sorted(job.lines)]}
        with replacing(results_file(args.results, args.base_model_name, job.task)) as part:
            part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Time


@dataclass
class Timing:
    """What a run took: seconds an epoch, for its evaluation, and besides; None is not known. Tokens as in Job."""

    task: str
    epochs: int
    epoch_seconds: float | None
    evaluation_seconds: float
    fixed_seconds: float | None
    tokens: tuple[float, float]


def loading_seconds(seconds, evaluation_seconds):
    """Return what a line takes besides: the model is loaded twice, by train.py and by evaluate.py, which took this."""
    return round(2 * (seconds - evaluation_seconds), 2)


def known_timings(jobs):
    """Return the Timings of the lines that were run on this device."""
    here = modeling.device_name()
    return [
        Timing(job.task, line["epochs"], **line["timing"], tokens=job.tokens)
        for job in jobs
        for line in job.lines.values()
        if "timing" in line and line["device"] == here
    ]


def is_enough(timings):
    """Return whether an estimate can be made from Timings."""
    return all(
        any(getattr(timing, name) is not None for timing in timings) for name in ("epoch_seconds", "fixed_seconds")
    )


def measure(args, jobs):
    """Return the Timing of a run of two epochs with the longest prompt and its evaluation; nothing of it stays.

    None where its training stopped at NaN, as those of the lines then will.
    """
    job = max(jobs, key=lambda job: job.tokens[1] / (len(job.splits.train) + len(job.splits.validation)))
    prefix = f"table-{short_name(args.base_model_name)}-timing-"
    for left_over in modeling.MODELS.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(left_over.name.removeprefix(prefix))):
            remove(left_over)
    folder = modeling.MODELS / f"{prefix}{os.getpid()}"
    print(f"Measuring the time of 2 epochs of {job.task} and of their evaluation")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if job.task == SST2:
                data = cut_sst2(str(job.data), Path(scratch) / "sst2", MEASURED_ROWS)
                splits = read_splits(str(data), TASKS[SST2])
                tokenizer = modeling.load_tokenizer(args.base_model_name)
                job = Job(SST2, [2], data, splits, count_tokens(tokenizer, SST2, splits))
            options = [*cell_options(args, job, 2), "--adapters_name", folder.name, "--overwrite"]
            call(train.main, *options)
            evaluated = call(evaluate.main, "--adapters_name", folder.name, "--batch_size", args.batch_size)
        return measured_timing(job, folder, evaluated)
    except NotFinite:
        return None
    finally:
        remove(folder)


def measured_timing(job, folder, evaluated):
    """Return the Timing of a run of two epochs, each saved, whose evaluate.py took `evaluated` seconds.

    The second epoch began when the first one's checkpoint was whole and ended when the next one's first file was there:
    so what is done once, as a GPU's kernels being chosen, is not taken for a part of every epoch.
    """
    timing = finished_line(folder, 2)["timing"]
    trained = json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds"]
    first, second = checkpoints.find_checkpoints(folder, read=False)[0]
    begun, whole = ((path / checkpoints.CONTENTS).stat().st_mtime for path in (first, second))
    ended = min(file.stat().st_mtime for file in second.iterdir())
    epoch, save = max(ended - begun, 0.001), max(whole - ended, 0)
    fixed = loading_seconds(evaluated, timing["evaluation_seconds"]) + max(trained - 2 * epoch - 2 * save, 0)
    return Timing(job.task, 2, epoch, timing["evaluation_seconds"], fixed + SAVES * save, job.tokens)


def epochs_left(args, job, epochs):
    """Return how many epochs of a line are still to be trained."""
    folder = adapter_folder(args, job.task, epochs)
    if checkpoints.is_finished(folder):
        return 0
    whole, _ = checkpoints.find_checkpoints(folder, read=False)
    step = int(whole[-1].name.removeprefix("checkpoint-")) if whole else 0
    return max(epochs - step / job.steps_per_epoch, 0)


def seconds_left(args, job, timings):
    """Return how long the lines of a table that are left will take: as its longest one here, or as another table's.

    Times of another table are scaled by the tokens.
    """

    def nearest(name):
        known = [timing for timing in timings if getattr(timing, name) is not None]
        return max(known, key=lambda timing: (timing.task == job.task, timing.epochs))

    trained, evaluated = nearest("epoch_seconds"), nearest("evaluation_seconds")
    epoch_seconds = trained.epoch_seconds * job.tokens[0] / trained.tokens[0]
    evaluation_seconds = evaluated.evaluation_seconds * job.tokens[1] / evaluated.tokens[1]
    fixed = [timing.fixed_seconds for timing in timings if timing.fixed_seconds is not None]
    each = evaluation_seconds + sum(fixed) / len(fixed)
    return sum(epochs_left(args, job, epochs) * epoch_seconds + each for epochs in job.left)


def duration(seconds):
    """Return a time as text, in the unit that it is read in."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


def print_estimate(args, jobs, timings):
    """Print how long every table and all will take."""
    left = sum(len(job.left) for job in jobs)
    print(f"\nTime that is left with {args.base_model_name} on {modeling.device_name()}:")
    if not is_enough(timings):
        print(f"  {left} lines; how long is not known, since the training that was to tell stopped at NaN")
        return
    total = 0
    for job in jobs:
        seconds = seconds_left(args, job, timings)
        total += seconds
        time_left = f"about {duration(seconds)}" if job.left else "all done"
        print(f"  {job.task}: {len(job.left)} of {len(job.epochs)} lines, {time_left}")
    print(f"  in all: {left} lines, about {duration(total)}")


def print_time_left(args, jobs, timings):
    left = sum(len(job.left) for job in jobs)
    if left and is_enough(timings):
        total = sum(seconds_left(args, job, timings) for job in jobs)
        print(f"Left: {left} lines, about {duration(total)}")


def estimate(args, jobs):
    """Print how long it will take; return the Timings that were measured for it."""
    if not any(job.left for job in jobs):
        print(f"\nAll {sum(len(job.epochs) for job in jobs)} lines are there: no time is left")
        return []
    measured = []
    if not is_enough(known_timings(jobs)):
        timing = measure(args, jobs)
        measured = [timing] if timing else []
    print_estimate(args, jobs, measured + known_timings(jobs))
    return measured


def run_all(args, jobs, measured):
    """Run the lines that are left; results and the time that is left are up to date after each."""
    try:
        for job in jobs:
            write_results(args, job)
            for epochs in job.left:
                run_cell(args, job, epochs)
                write_results(args, job)
                print_time_left(args, jobs, measured + known_timings(jobs))
    except SystemExit as stop:
        if stop.code != 2:
            print("Started again with the same options, this goes on where it stopped")
        raise


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.show:
        print(markdown(args.results, args.show))
        return
    jobs = plan(args)
    measured = estimate(args, jobs)
    if args.estimate:
        return
    run_all(args, jobs, measured)
    text = markdown(args.results, args.base_model_name)
    file = args.results / f"tables-{short_name(args.base_model_name)}.md"
    with replacing(file) as part:
        part.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nResults: {file} and the JSON files beside it")


if __name__ == "__main__":
    raise SystemExit(main())
