"""Score a fine-tuned adapter on the rows it was trained on and on those held out.

python evaluate.py --adapters_name Llama-2-13b-chat-hf-epoch10
python evaluate.py --adapters_name smollm2-epoch5 --decoding labels --split validation
"""

import copy
import json
import random
import time

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, LogitsProcessor

import checkpoints
import modeling
import processes
from adapters import add_adapter_options, find_adapter, load_model, probability_columns
from baselines import MAJORITY, TFIDF, ZERO_SHOT, majority_class, tfidf_regression
from checkpoints import read_run
from command_line import (
    CommandParser,
    UserError,
    one_line_errors,
    positive_float,
    positive_int,
    replacing,
    seed,
)
from metrics import (
    System,
    calibration_bins,
    classification_metrics,
    confusion_counts,
    label_probabilities,
    predicted_labels,
    probability_metrics,
    scored_systems,
)
from prompts import answer_ids, encode_rows, parse_answer, task_from_fields
from reports import (
    comparison_sentences,
    draw_comparison,
    draw_confusion_matrices,
    draw_reliability,
    interval_notes,
    results_table,
    score_sentence,
    systems_table,
    write_html_report,
)
from rows import read_splits
from shared_prefix import by_batches, label_log_probs, not_finite, prefix_cache

EVALUATED = "evaluated model"  # beside its baselines


def build_parser():
    parser = CommandParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    add_adapter_options(parser)
    parser.add_argument(
        "--decoding",
        nargs="+",
        choices=("sample", "greedy", "labels"),
        default=["sample", "labels"],
        help="generate answers, as published or greedily, or score every label and take the most probable",
    )
    parser.add_argument("--temperature", type=positive_float, default=0.8, help="of --decoding sample")
    parser.add_argument(
        "--seed", type=seed, default=42, help="of --decoding sample; each row draws from its own stream"
    )
    parser.add_argument("--batch_size", type=positive_int, default=32, help="rows a batch")
    parser.add_argument(
        "--split", nargs="+", choices=("train", "validation"), default=["train", "validation"], help="rows to score"
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="compare with the majority class, TF-IDF and logistic regression, and the model without the adapter",
    )
    parser.add_argument("--base_only", action="store_true", help="score the base model without the adapter")
    return parser


def read_rows(run, task):
    """Return {split: rows}, both, as train.py had them; raise UserError where the data are no longer the same."""
    splits = read_splits(run["data"]["dataset_name"], task)
    if splits.fingerprint() != run["data"]["fingerprint"]:
        raise UserError(
            f"{run['data']['dataset_name']}: its rows are no longer those that the adapter was trained with, so train "
            "and validation rows could be mixed up; restore them or train again"
        )
    return {"train": splits.train, "validation": splits.validation}


class RowSampler(LogitsProcessor):
    """Turns greedy decoding into sampling at `temperature`, each row with random numbers of its own.

    Adds Gumbel noise to the scaled scores: the largest is then a draw from their softmax (the Gumbel-max trick,
    Maddison et al. 2014, arXiv:1411.0030). A row's numbers come from (seed, split, row) alone, neither from the batch
    size nor from the rows beside it.
    """

    def __init__(self, temperature, streams):
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(random.Random(stream).getrandbits(63)) for stream in streams]

    def __call__(self, input_ids, scores):
        """Return scores of shape (rows, vocabulary) whose argmax is the sample."""
        shape = scores.shape[-1]
        uniform = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
        return scores.float() / self.temperature + gumbel.to(scores.device, torch.float32)


def refuse_nan(input_ids, scores):
    """Return `scores` as they are, as a logits processor; raise UserError for NaN, whose argmax is just some token."""
    if scores.isnan().any():
        raise UserError(not_finite("generating"))
    return scores


@torch.inference_mode()
def generate_outputs(model, tokenizer, prompts, *, max_new_tokens, batch_size, sampler=None, description="generate"):
    """Return the texts that `model` generates after each of `prompts` (lists of ids), in their order.

    Stops at EOS and after `max_new_tokens`. `sampler(positions)` returns the RowSampler of a batch; without it decoding
    is greedy. What all prompts begin with is computed once; batches hold prompts of like length, padded behind it.
    Several processes share the batches.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    prefix, length = prefix_cache(model, prompts)

    def generate(positions):
        batch = pad_behind([prompts[position] for position in positions], length, tokenizer.pad_token_id)
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(positions))
        ids = model.generate(
            **{name: tensor.to(model.device) for name, tensor in batch.items()},
            past_key_values=cache,
            generation_config=config,
            logits_processor=[refuse_nan, *([sampler(positions)] if sampler else [])],
        )
        return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return by_batches(prompts, batch_size, generate, description)


def pad_behind(prompts, length, pad_token_id):
    """Return input_ids and attention_mask, both (rows, tokens), of prompts padded behind their first `length` ids."""
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(
            [
                prompt[:length] + [pad_token_id] * gap + prompt[length:]
                for prompt, gap in zip(prompts, gaps, strict=True)
            ]
        ),
        "attention_mask": torch.tensor([[1] * length + [0] * gap + [1] * (longest - length - gap) for gap in gaps]),
    }


def evaluate_split(model, tokenizer, task, split, rows, run, args, decoding, name=None):
    """Return a DataFrame of predictions for one split: split, row, sentence, label_text, prediction and more.

    Generated answers add `output`, their text. Label scoring adds `p_<label>` for every label, the softmax over the
    labels of log P(label, EOS | prompt), and `margin`: the prediction's probability less that of the runner-up.
    """
    encoded, _ = encode_rows(tokenizer, task, rows, run["options"]["max_seq_length"])
    prompts = [row["prompt_ids"] for row in encoded]
    answers = [answer_ids(tokenizer, label) for label in task.labels]
    table = rows.to_pandas()
    table.insert(0, "split", split)
    options = {"batch_size": args.batch_size, "description": f"{name or decoding} {split}"}
    if decoding == "labels":
        log_probs = label_log_probs(model, prompts, answers, **options)
        probabilities = label_probabilities(log_probs)
        table["prediction"] = predicted_labels(task.labels, log_probs)
        table[probability_columns(task)] = probabilities
        runner_up, first = np.sort(probabilities, axis=1)[:, -2:].T
        table["margin"] = first - runner_up
        return table

    def sampler(positions):
        return RowSampler(args.temperature, [f"{args.seed} {split} {position}" for position in positions])

    outputs = generate_outputs(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max(map(len, answers)),
        sampler=sampler if decoding == "sample" else None,
        **options,
    )
    table["prediction"] = [parse_answer(task, output) for output in outputs]
    table["output"] = outputs
    return table


def baseline_systems(model, tokenizer, task, rows, splits, run, args):
    """Return {split: {name: System}} of what the adapter is compared with; the first two learn from the train rows.

    The model without the adapter is scored label by label. With --base_only that is what is evaluated, and left out.
    """
    systems = {}
    for split in splits:
        sentences = rows[split]["sentence"][:]
        systems[split] = {
            MAJORITY: System([majority_class(rows["train"], sentences)]),
            TFIDF: System([tfidf_regression(rows["train"], sentences)]),
        }
        if not args.base_only:
            with model.disable_adapter():
                table = evaluate_split(model, tokenizer, task, split, rows[split], run, args, "labels", ZERO_SHOT)
            probabilities = table[probability_columns(task)].to_numpy()
            systems[split][ZERO_SHOT] = System([table["prediction"].tolist()], probabilities[None])
    return systems


def score(task, predictions, baselines):
    """Return {split: metrics} and {split: confusion counts} of a predictions DataFrame.

    The metrics have the 95% intervals of accuracy and macro-F1, and under "baselines" the numbers of `baselines`
    ({split: {name: System}}), as `scored_systems` gives them.
    """
    metrics, counts = {}, {}
    for split, table in predictions.groupby("split", sort=False):
        predicted = [label if isinstance(label, str) else None for label in table["prediction"]]
        truth = table["label_text"].tolist()
        metrics[split] = classification_metrics(task.labels, truth, predicted)
        counts[split] = confusion_counts(task.labels, truth, predicted)
        if "margin" in table:
            probabilities = table[probability_columns(task)].to_numpy()
            metrics[split] |= probability_metrics(task.labels, truth, probabilities)
        systems = {EVALUATED: System([predicted]), **baselines.get(split, {})}
        numbers = scored_systems(task.labels, truth, systems, compare=EVALUATED)
        own = numbers.pop(EVALUATED)
        metrics[split] |= {f"{name}_interval": own[name]["interval"] for name in ("accuracy", "macro_f1")}
        if numbers:
            metrics[split]["baselines"] = numbers
    return metrics, counts


def compared_systems(metrics):
    """Return {name: numbers} of one split's metrics, in the form of `scored_systems`: of what was evaluated, first."""
    own = metrics | {
        name: {"mean": metrics[name], "sd": None, "interval": metrics[f"{name}_interval"]}
        for name in ("accuracy", "macro_f1")
    }
    return {EVALUATED: own, **metrics.get("baselines", {})}


def summary_sentences(metrics):
    """Return a list of sentences on {split: metrics}: the scores, against what, and what the rows are too few for."""
    sentences = []
    for split, numbers in sorted(metrics.items(), reverse=True):  # validation first
        rows, systems = numbers["n"], compared_systems(numbers)
        own = systems.pop(EVALUATED)
        sentences.append(f"{split.capitalize()}, {rows} rows. {score_sentence(EVALUATED, own)}")
        if numbers["invalid"]:
            sentences.append(f"{split.capitalize()} rows: {numbers['invalid']} of {rows} answers are no label.")
        if split == "train":
            sentences.append("Train rows are those learned from: how well they are known says little about others.")
            continue
        sentences += comparison_sentences(EVALUATED, systems, rows)
        sentences += interval_notes(f"{split} rows", own, rows)
    return sentences


def write_results(folder, task, predictions, metrics, counts, settings, curves):
    """Write metrics.json, predictions.csv, settings.json, pictures and report.html; `folder` is replaced whole.

    `curves` is the path of the adapter's training_curves.png, which belongs into the report where it is there.
    """
    with replacing(folder) as part:
        part.mkdir()
        (part / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        predictions.to_csv(part / "predictions.csv", index=False)
        (part / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        pictures = draw_pictures(part, task, predictions, metrics, counts)
        if curves.is_file():
            pictures.append(("Training: losses and scores over the epochs", curves))
        tables = []
        for split, numbers in sorted(metrics.items(), reverse=True):
            per_class = pd.DataFrame(numbers["per_class"]).T.rename_axis("label").reset_index()
            note = "In square brackets the 95% interval, by a bootstrap over the rows."
            if split == "train":
                note += " The adapter and the baselines but the last have learned from these rows."
            tables.append((f"Scores, {split} rows", systems_table(compared_systems(numbers)), note))
            tables.append((f"Labels, {split} rows", per_class.astype({"support": int}), ""))
        write_html_report(
            part / "report.html",
            title=f"Evaluation: {'base model of ' if settings['base_only'] else ''}{settings['adapters_name']}, "
            f"decoding {settings['decoding']}",
            summary=summary_sentences(metrics),
            tables=tables,
            pictures=pictures,
            settings=settings,
            mistakes=predictions[predictions["prediction"] != predictions["label_text"]],
        )


def draw_pictures(folder, task, predictions, metrics, counts):
    """Draw what there is to draw of an evaluation to `folder`; return a list of (caption, path)."""
    draw_confusion_matrices(task.labels, counts, folder / "confusion_matrix.png")
    pictures = [("Confusion matrix", folder / "confusion_matrix.png")]
    if "margin" in predictions:
        bins = {
            split: calibration_bins(task.labels, table["label_text"], table[probability_columns(task)].to_numpy())
            for split, table in predictions.groupby("split", sort=False)
        }
        draw_reliability(bins, folder / "reliability.png")
        pictures.append(("Reliability: is it as often right as it says?", folder / "reliability.png"))
    for split, numbers in metrics.items():
        if "baselines" in numbers:
            draw_comparison(compared_systems(numbers), folder / f"comparison_{split}.png")
            pictures.append(
                (f"Against the baselines, {split} rows, with 95% intervals", folder / f"comparison_{split}.png")
            )
    return pictures


def evaluate_decoding(model, tokenizer, task, rows, splits, run, args, decoding, advice):
    """Return (predictions DataFrame of all `splits`, settings.json's dict) of one way of decoding."""
    start = time.perf_counter()
    with modeling.memory_errors(advice):
        tables = [evaluate_split(model, tokenizer, task, name, rows[name], run, args, decoding) for name in splits]
    unused = () if decoding == "sample" else ("temperature", "seed")
    settings = {name: value for name, value in vars(args).items() if name not in unused} | {
        "decoding": decoding,
        "device": modeling.device_name(),
        "processes": processes.count(),
        "versions": modeling.library_versions(),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(modeling.peak_memory_gb(), 2),
    }
    return pd.concat(tables), settings


def print_results(results, folders):
    """Print what {decoding: metrics} come to, and where it was written."""
    print(results_table(results))
    print("In square brackets: the 95% interval, by a bootstrap over the rows.")
    for decoding, metrics in results.items():
        print(*[f"{decoding}: {sentence}" for sentence in summary_sentences(metrics)], sep="\n")
    print(f"report.html, metrics.json, predictions.csv and pictures: {', '.join(map(str, folders))}")


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    with processes.joined():
        folder, evaluation = find_adapter(args.adapters_name)
        run = read_run(folder / "run.json", "train the adapter again")
        task = task_from_fields(run["task"], folder / "run.json")
        rows = read_rows(run, task)
        splits = [split for split in rows if split in args.split]
        processes.on_first(checkpoints.check_writable, evaluation, "copy the adapter")
        model, tokenizer = load_model(folder, run, force=args.force, base_only=args.base_only)
        advice = (
            f"a batch has {args.batch_size} rows of up to {run['options']['max_seq_length']} tokens; lower --batch_size"
        )
        with modeling.memory_errors(advice):
            baselines = baseline_systems(model, tokenizer, task, rows, splits, run, args) if args.baselines else {}
        results, folders = {}, []
        for decoding in dict.fromkeys(args.decoding):
            predictions, settings = evaluate_decoding(model, tokenizer, task, rows, splits, run, args, decoding, advice)
            if processes.is_first():
                results[decoding], counts = score(task, predictions, baselines)
                folders.append(evaluation / f"{'base-' if args.base_only else ''}{decoding}")
                curves = folder / "training_curves.png"
                write_results(folders[-1], task, predictions, results[decoding], counts, settings, curves)
        if processes.is_first():
            print_results(results, folders)


if __name__ == "__main__":
    raise SystemExit(main())
