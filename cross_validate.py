"""Cross-validate a fine-tuning job: how good its adapters are on rows they have not seen, and how sure that is.

python cross_validate.py --dataset_name comments.jsonl --task stance.json --epoch 20
python cross_validate.py --dataset_name data/smollm2-demo --base_model_name smollm2 --folds 5 --repeats 1 --epoch 3
"""

import argparse
import functools
import gc
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import checkpoints
import modeling
import processes
import train
from baselines import MAJORITY, TFIDF, ZERO_SHOT, majority_class, tfidf_regression
from command_line import CommandParser, UserError, number, one_line_errors, positive_int
from metrics import (
    CROSS_VALIDATED,
    System,
    calibration_bins,
    label_probabilities,
    predicted_labels,
    scored_systems,
    weighted_scores,
)
from prompts import answer_ids, encode_rows
from reports import (
    comparison_sentences,
    draw_comparison,
    draw_confusion_matrices,
    draw_reliability,
    draw_scores_over_epochs,
    interval_notes,
    score_sentence,
    systems_table,
    write_html_report,
)
from rows import fingerprint, read_rows, stratified_folds
from shared_prefix import label_log_probs

RESULTS = Path("cross_validation")  # of the current folder
SCORES = "log_probs.safetensors"  # of a checkpoint: (epochs, repeats, rows, labels), NaN where not yet known
LAST, CHOSEN = "fine-tuned, last epoch", "fine-tuned, epoch chosen on the training part"


def build_parser():
    parser = CommandParser(prog="cross_validate.py", description=__doc__.split("\n")[0])
    train.add_common_options(parser)
    folds = parser.add_argument_group("cross-validation")
    folds.add_argument(
        "--folds", type=_two_or_more, default=5, help="parts; each is held out once, of every label alike"
    )
    folds.add_argument("--repeats", type=positive_int, default=3, help="times that the rows are cut into folds anew")
    train.add_folder_options(
        parser, f"folder under {RESULTS}/ (default: <last part of the base model's name>-<task>-epoch<N>)"
    )
    return parser


def _two_or_more(text):
    value = number(int, text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, not {text}")
    return value


def parse_args(argv=None):
    """Return (args, task): every option resolved, as train.py resolves them."""
    args = build_parser().parse_args(argv)
    args.epoch = getattr(args, "epoch", train.DEFAULT_EPOCHS)
    task = train.resolve_task(args)
    if not getattr(args, "adapters_name", None):
        name = f"{Path(args.base_model_name).name}-{task.name}-epoch{args.epoch}"
        args.adapters_name = re.sub(r"[^\w.\-]", "-", name, flags=re.ASCII)
    return args, task


def fold_args(args, repeat, fold):
    """Return the options of train.py for one fold: a seed of its own, and nothing written."""
    seed = (args.seed + repeat * args.folds + fold) % 2**32
    fixed = {"steps": None, "keep": "last", "early_stopping_patience": None, "save_steps": None, "report_to": "none"}
    return argparse.Namespace(**vars(args) | fixed | {"seed": seed})


def score_fold(base_model, tokenizer, task, encoded, held_out, args, folder, progress):
    """Train on the rows that are not `held_out` (indices); return those' log-probabilities (epochs, rows, labels).

    The adapter is gone afterwards: `base_model` is as it was.
    """
    held_out = set(held_out.tolist())
    parts = {
        "train": [row for place, row in enumerate(encoded) if place not in held_out],
        "validation": [row for place, row in enumerate(encoded) if place in held_out],
    }
    scores = []

    def on_scores(log_probs):
        scores.append(log_probs)
        progress.update()

    model = train.fresh_adapter(base_model, args)
    try:
        train.train_adapter(model, tokenizer, task, parts, args, folder, on_scores=on_scores)
    finally:
        model.unload()
        gc.collect()  # the trainer and its recorded steps, which hold GPU memory
    return torch.stack(scores)


def score_folds(base_model, tokenizer, task, encoded, folds, args, folder, checkpoint):
    """Return the held-out rows' log-probabilities, a float32 tensor (epochs, repeats, rows, labels), of all folds.

    Goes on from `checkpoint`, if there is one, and writes one after every fold.
    """
    shape = (args.epoch, args.repeats, len(encoded), len(task.labels))
    scores = load_file(checkpoint / SCORES)["log_probs"] if checkpoint else torch.full(shape, torch.nan)
    jobs = [(repeat, fold) for repeat in range(args.repeats) for fold in range(args.folds)]
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    total = len(jobs) * args.epoch
    with tqdm(total=total, initial=done * args.epoch, unit="epoch", dynamic_ncols=True) as progress:
        for count, (repeat, fold) in enumerate(jobs[done:], start=done + 1):
            progress.set_description(f"fold {count} of {len(jobs)}")
            rows = folds[repeat][fold]
            try:
                options = fold_args(args, repeat, fold)
                log_probs = score_fold(base_model, tokenizer, task, encoded, rows, options, folder, progress)
            except UserError as error:
                raise type(error)(f"repeat {repeat + 1}, fold {fold + 1}: {error}") from error
            scores[:, repeat, np.sort(rows)] = log_probs
            with checkpoints.checkpoint(folder, count) as part:
                save_file({"log_probs": scores}, part / SCORES)
    return scores


def run_folds(args, task, rows, folds, tokenizer, encoded, folder):
    """Score all folds and the model without an adapter; return (run.json's dict, log-probabilities, those without).

    The log-probabilities are tensors (epochs, repeats, rows, labels) and (rows, labels). Of a run that is finished they
    are None.
    """
    run = train.describe_run(args, task, encoded, {"fingerprint": fingerprint(rows), "rows": len(rows)})
    free = train.FREE_OPTIONS
    earlier, checkpoint = checkpoints.find_resumable(folder, run, free) if args.resume else (None, None)
    if earlier and not checkpoint:
        return earlier, None, None
    base_model, run["base_model"] = train.load_base(args, earlier)
    start = time.perf_counter()
    with checkpoints.in_progress(folder, None if args.resume else run):
        zero_shot = label_log_probs(
            base_model,
            [row["prompt_ids"] for row in encoded],
            [answer_ids(tokenizer, label) for label in task.labels],
            batch_size=args.eval_batch_size,
            description=ZERO_SHOT,
        )
        scores = score_folds(base_model, tokenizer, task, encoded, folds, args, folder, checkpoint)
    run |= {
        "resumed_from": checkpoint and checkpoint.name,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(modeling.peak_memory_gb(), 2),
    }
    return run, scores, zero_shot


def baseline_systems(task, rows, folds, zero_shot):
    """Return {name: System} of the baselines, each learned from the very training rows that the adapters had."""
    sentences = np.array(rows["sentence"][:], dtype=object)
    predictions = {MAJORITY: [], TFIDF: []}
    for cut in folds:
        for name, predict in ((MAJORITY, majority_class), (TFIDF, tfidf_regression)):
            found = np.empty(len(rows), dtype=object)
            for held_out in cut:
                training = rows.select(np.setdiff1d(np.arange(len(rows)), held_out))
                found[held_out] = predict(training, sentences[held_out].tolist())
            predictions[name].append(found.tolist())
    # The majority class is the same in all folds, or nearly so: no row decides what is said of another.
    systems = {name: System(found, cross_validated=name == TFIDF) for name, found in predictions.items()}
    return systems | {ZERO_SHOT: _system(task, zero_shot.expand(len(folds), -1, -1), cross_validated=False)}


def _system(task, log_probs, cross_validated=True):
    """Return the System that takes the most probable label of `log_probs` (repeats, rows, labels)."""
    return System(
        [predicted_labels(task.labels, of_repeat) for of_repeat in log_probs],
        np.stack([label_probabilities(of_repeat) for of_repeat in log_probs]),
        cross_validated,
    )


def choose_epochs(task, label_text, scores, folds):
    """Return the epoch, counted from 0, for every fold of every repeat: (repeats, folds).

    It is the one with the highest macro-F1 on the fold's training rows, as the repeat's other folds, which held them
    out, predicted them; of equals the first. No label of a held-out row is looked at to choose its epoch. (The other
    folds' adapters had it among their training rows; a choice that avoids that, too, costs a cross-validation a fold.)
    """
    truth = np.array([task.labels.index(label) for label in label_text])
    predicted = scores.argmax(dim=-1).numpy()
    chosen = np.empty((len(folds), len(folds[0])), dtype=int)
    for repeat, cut in enumerate(folds):
        weights = np.ones((len(cut), len(truth)))
        for fold, held_out in enumerate(cut):
            weights[fold, held_out] = 0
        macro_f1 = [weighted_scores(weights, truth, of[repeat], len(task.labels))[1] for of in predicted]
        chosen[repeat] = np.argmax(macro_f1, axis=0)
    return chosen


def chosen_scores(scores, folds, chosen):
    """Return log-probabilities (repeats, rows, labels), each row's from the epoch that was chosen for its fold."""
    found = torch.empty_like(scores[0])
    for repeat, cut in enumerate(folds):
        for held_out, epoch in zip(cut, chosen[repeat], strict=True):
            found[repeat, held_out] = scores[epoch, repeat, held_out]
    return found


def evaluate_scores(task, rows, folds, scores, zero_shot):
    """Return (metrics.json's dict, {name: System}) of the log-probabilities that `run_folds` returns."""
    label_text = rows["label_text"][:]
    chosen = choose_epochs(task, label_text, scores, folds)
    systems = {LAST: _system(task, scores[-1])}
    if len(scores) > 1:
        systems[CHOSEN] = _system(task, chosen_scores(scores, folds, chosen))
    systems |= baseline_systems(task, rows, folds, zero_shot)
    every_epoch = {epoch: _system(task, of_epoch) for epoch, of_epoch in enumerate(scores, start=1)}
    epochs = scored_systems(task.labels, label_text, every_epoch)
    best = max(epochs, key=lambda epoch: epochs[epoch]["macro_f1"]["mean"])  # of equals the first
    metrics = {
        "rows": len(rows),
        "labels": {label: label_text.count(label) for label in task.labels},
        "folds": len(folds[0]),
        "repeats": len(folds),
        "systems": scored_systems(task.labels, label_text, systems, compare=LAST),
        "best_epoch": best,
        "chosen_epochs": (chosen + 1).tolist(),
        "epochs": [{"epoch": epoch, **numbers} for epoch, numbers in epochs.items()],
    }
    return metrics, systems


def predictions_table(task, rows, folds, systems):
    """Return a DataFrame with a line per row and repeat: where it was held out, and what every system said of it."""
    tables = []
    for repeat, cut in enumerate(folds):
        table = rows.to_pandas()
        table.insert(0, "repeat", repeat + 1)
        table.insert(1, "fold", 0)
        for fold, held_out in enumerate(cut, start=1):
            table.loc[held_out, "fold"] = fold
        table["prediction"] = systems[LAST].predictions[repeat]
        table[[f"p_{label}" for label in task.labels]] = systems[LAST].probabilities[repeat]
        for name in list(systems)[1:]:
            table[name] = systems[name].predictions[repeat]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def epochs_table(epochs):
    """Return a DataFrame with a line per epoch, of all its numbers but the confusion matrix."""
    table = pd.json_normalize([{key: of[key] for key in of if key != "confusion"} for of in epochs])
    for column in [name for name in table if name.endswith(".interval")]:
        place = table.columns.get_loc(column)
        for offset, end in enumerate(("low", "high")):
            table.insert(place + offset, f"{column.removesuffix('.interval')}.{end}", table[column].str[offset])
    return table.drop(columns=[name for name in table if name.endswith(".interval")])


def mistakes_table(predictions):
    """Return a DataFrame of the rows that were wrong after the last epoch in some repeat, most often wrong first."""
    groups = predictions.groupby(["split", "row", "sentence", "label_text"], sort=False)["prediction"]
    lines = []
    for (split, row, sentence, label_text), found in groups:
        wrong = found[found != label_text]
        answers = ", ".join(f"{label} ({count})" for label, count in wrong.value_counts().items())
        line = {"split": split, "row": row, "sentence": sentence, "label_text": label_text, "prediction": answers}
        lines.append(line | {"wrong": f"{len(wrong)} of {len(found)}", "times": len(wrong)})
    table = pd.DataFrame(lines).sort_values("times", ascending=False, kind="stable")
    return table[table["times"] > 0].drop(columns="times")


def summary_sentences(metrics):
    """Return a list of sentences: how good, how sure, how much of it is the choice of the epoch, and against what."""
    systems, best = metrics["systems"], metrics["epochs"][metrics["best_epoch"] - 1]
    rows, repeats, folds = metrics["rows"], metrics["repeats"], metrics["folds"]
    sentences = [
        f"{rows} rows, cut {repeats} time{'s' if repeats > 1 else ''} into {folds} folds; every row was scored by "
        "adapters that had not seen it.",
        score_sentence(LAST, systems[LAST]),
    ]
    if CHOSEN in systems:
        sentences.append(
            f"The highest macro-F1 of {len(metrics['epochs'])} epochs is {best['macro_f1']['mean']:.3f}, after epoch "
            f"{best['epoch']}: optimistic, since the epoch was chosen on the rows that it is scored on. The honest "
            f"number is this: {score_sentence(CHOSEN, systems[CHOSEN])}"
        )
    others = {name: systems[name] for name in (MAJORITY, TFIDF, ZERO_SHOT)}
    return sentences + comparison_sentences(LAST, others, rows) + interval_notes(LAST, systems[LAST], rows)


def write_results(folder, task, rows, folds, run, metrics, systems):
    """Write all files of the result to `folder`, run.json last."""
    predictions = predictions_table(task, rows, folds, systems)
    predictions.to_csv(folder / "predictions.csv", index=False)
    epochs_table(metrics["epochs"]).to_csv(folder / "epochs.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    title = f"out-of-fold, {len(folds)} repeats" if len(folds) > 1 else "out-of-fold"
    together = np.concatenate(list(systems[LAST].probabilities))
    bins = calibration_bins(task.labels, rows["label_text"][:] * len(folds), together)
    draw_scores_over_epochs(metrics["epochs"], folder / "scores_over_epochs.png", metrics["best_epoch"])
    draw_comparison(metrics["systems"], folder / "comparison.png")
    draw_confusion_matrices(
        task.labels, {title: np.array(metrics["systems"][LAST]["confusion"])}, folder / "confusion_matrix.png"
    )
    draw_reliability({title: bins}, folder / "reliability.png")
    epochs = {of["epoch"]: of for of in metrics["epochs"]}
    per_class = pd.DataFrame({name: of["per_class_f1"] for name, of in metrics["systems"].items()})
    per_class.insert(0, "rows", pd.Series(metrics["labels"]))
    write_html_report(
        folder / "report.html",
        title=f"Cross-validation: {run['adapters_name']}",
        summary=summary_sentences(metrics),
        tables=[
            (
                "Scores",
                systems_table(metrics["systems"]),
                "Mean over the repeats, ± their standard deviation, and the 95% interval by a bootstrap over the rows; "
                f"where a system has learned from the other rows, {CROSS_VALIDATED:.2f} times as wide, since rows that "
                "help to predict one another are not independent.",
            ),
            (
                "Every epoch",
                systems_table(epochs, first="epoch"),
                "As above; metrics.json has the confusion matrices, too.",
            ),
            ("F1 of each label", per_class.rename_axis("label").reset_index(), "Mean over the repeats."),
        ],
        pictures=[
            ("Scores of the held-out rows over the epochs", folder / "scores_over_epochs.png"),
            ("Against the baselines, with 95% intervals", folder / "comparison.png"),
            ("Confusion matrix after the last epoch; a row counts once a repeat", folder / "confusion_matrix.png"),
            ("Reliability after the last epoch; a row counts once a repeat", folder / "reliability.png"),
        ],
        settings={key: value for key, value in run.items() if key != "files"},
        mistakes=mistakes_table(predictions),
    )
    run["files"] = sorted([file.name for file in folder.iterdir()] + ["run.json"])
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


@one_line_errors
def main(argv=None):
    args, task = parse_args(argv)
    processes.refuse_several("cross_validate.py")
    folder = train.check_output(args, RESULTS)
    modeling.check_memory(args.base_model_name)
    rows, notes = read_rows(args.dataset_name, task)
    folds, more_notes = stratified_folds(rows["label_text"][:], args.folds, args.repeats, args.seed)
    tokenizer = modeling.load_tokenizer(args.base_model_name)
    encoded, cut = encode_rows(tokenizer, task, rows, args.max_seq_length)
    print(f"{len(rows)} rows, {cut} cut to {args.max_seq_length} tokens", *notes, *more_notes, sep="\n")
    locked = checkpoints.locked(folder, args.resume, args.overwrite)
    command = sys.argv[1:] if argv is None else argv
    kept = functools.partial(checkpoints.newest_kept, folder)
    with locked, processes.saying_how_to_resume("cross_validate.py", command, kept):
        run, scores, zero_shot = run_folds(args, task, rows, folds, tokenizer, encoded, folder)
        if scores is not None:
            metrics, systems = evaluate_scores(task, rows, folds, scores, zero_shot)
            with checkpoints.result(folder) as part:
                write_results(part, task, rows, folds, run, metrics, systems)
            print(systems_table(metrics["systems"]).to_string(index=False), *summary_sentences(metrics), sep="\n")
    print(f"Report: {folder / 'report.html'}; beside it pictures, metrics.json, epochs.csv and predictions.csv")


if __name__ == "__main__":
    raise SystemExit(main())
