"""Score a fine-tuned adapter on the rows it was trained on and on those held out.

python evaluate.py --adapters_name Llama-2-13b-chat-hf-epoch10
python evaluate.py --adapters_name smollm2-epoch5 --decoding labels --split validation
"""

import copy
import json
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor

import modeling
from command_line import (
    CommandParser,
    UserError,
    hub_errors,
    one_line_errors,
    positive_float,
    positive_int,
    replacing,
    seed,
)
from metrics import (
    classification_metrics,
    confusion_counts,
    label_probabilities,
    predicted_labels,
    probability_metrics,
)
from prompts import answer_ids, encode_rows, parse_answer, task_from_fields
from reports import draw_confusion_matrices, results_table
from rows import read_splits
from shared_prefix import label_log_probs, prefix_cache


def build_parser():
    parser = CommandParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--adapters_name", required=True, help="a name under models/, an adapter's folder, or an adapter on the Hub"
    )
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
    parser.add_argument("--base_only", action="store_true", help="score the base model without the adapter")
    parser.add_argument(
        "--force", action="store_true", help="go on although the base model is not the one the adapter was trained on"
    )
    return parser


def find_adapter(adapters_name):
    """Return (the adapter's folder, where its evaluation goes) for a name under models/, a folder or a Hub adapter."""
    parts = Path(adapters_name).parts
    if not adapters_name.isprintable() or not parts or Path(adapters_name).is_absolute() or ".." in parts:
        raise UserError(
            f"--adapters_name {adapters_name!r}: must be a name under models/, a folder below the current one (without "
            "'..'), or a Hub adapter; to use another folder, make a link to it in models/"
        )
    tried = [modeling.MODELS / adapters_name, Path(adapters_name)]
    for folder in tried:
        if (folder / "checkpoints" / "run.json").exists() and not (folder / "run.json").exists():
            raise UserError(f"{folder}: its training is not finished; go on with it: python train.py ... --resume")
        if (folder / "adapter_config.json").is_file():
            return check_files(folder), folder / "evaluation"
    if adapters_name.count("/") != 1 or adapters_name.startswith("."):
        names = sorted(path.parent.name for path in modeling.MODELS.glob("[!.]*/run.json"))
        known = f"models/ has {', '.join(names)}" if names else "models/ has none"
        places = " and ".join(f"{folder}/" for folder in dict.fromkeys(tried))
        raise UserError(f"--adapters_name {adapters_name}: no adapter in {places} of {Path.cwd()}; {known}")
    with hub_errors(adapters_name, "adapter"):
        folder = Path(snapshot_download(adapters_name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.pkl", "*.py"]))
    return check_files(folder), modeling.MODELS / adapters_name / "evaluation"


def check_files(folder):
    """Return `folder`; raise UserError where it holds no adapter in safetensors."""
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").exists()
        what = ", only adapter_model.bin, a pickle, which could run code and is never loaded" if pickled else ""
        raise UserError(f"{folder}: has no adapter_model.safetensors{what}; train again or copy the whole folder")
    return folder


def read_run(folder):
    """Return the dict of the adapter's run.json."""
    file = folder / "run.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; train.py writes it, and without it the data and the prompt are not known")
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); train the adapter again") from error
    missing = {"options", "task", "data", "base_model"} - set(run if isinstance(run, dict) else ())
    if missing:
        raise UserError(f"{file}: has no {sorted(missing)[0]}; it is not what train.py wrote")
    if run.get("format", 0) > modeling.RUN_FORMAT:
        raise UserError(
            f"{file}: written by a newer version of this toolkit (format {run['format']}, here up to "
            f"{modeling.RUN_FORMAT}); update this toolkit, or train the adapter again with it"
        )
    return run


_GO_ON = "train it again on this one, or go on all the same with --force"


def check_base_name(folder, base_model):
    """Raise UserError where the adapter's own configuration names another base model than run.json (`base_model`)."""
    trained_on = modeling.read_adapter_config(folder).get("base_model_name_or_path")
    if trained_on != base_model["name"]:
        raise UserError(
            f"{folder}: the adapter was trained on {trained_on}, but run.json names {base_model['name']}; {_GO_ON}"
        )


def check_base_weights(folder, base_model):
    """Raise UserError where the base model, loaded before, has other weights than the adapter was trained on.

    An adapter fits any base model of the same shapes. Adapters of older versions have no fingerprint to compare.
    """
    trained_on = base_model.get("fingerprint")
    if trained_on is None:
        print(f"Note: {folder / 'run.json'} has no fingerprint of the base model, so its weights were not compared")
        return
    found = modeling.weights_fingerprint(base_model["name"], base_model["revision"])
    if found != trained_on:
        raise UserError(
            f"{folder}: the adapter was trained on other weights of {base_model['name']} (fingerprint "
            f"{trained_on[:12]}, here {found[:12]}); {_GO_ON}"
        )


def read_rows(run, task, splits_wanted):
    """Return {split: rows} as train.py had them; raise UserError where the data are no longer the same."""
    splits = read_splits(run["data"]["dataset_name"], task)
    if splits.fingerprint() != run["data"]["fingerprint"]:
        raise UserError(
            f"{run['data']['dataset_name']}: its rows are no longer those that the adapter was trained with, so train "
            "and validation rows could be mixed up; restore them or train again"
        )
    return {split: getattr(splits, split) for split in ("train", "validation") if split in splits_wanted}


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


@torch.inference_mode()
def generate_outputs(model, tokenizer, prompts, *, max_new_tokens, batch_size, sampler=None, description="generate"):
    """Return the texts that `model` generates after each of `prompts` (lists of ids), in their order.

    Stops at EOS and after `max_new_tokens`. `sampler(positions)` returns the RowSampler of a batch; without it decoding
    is greedy. What all prompts begin with is computed once; batches hold prompts of like length, padded behind it.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    prefix, length = prefix_cache(model, prompts)
    order = sorted(range(len(prompts)), key=lambda position: -len(prompts[position]))
    outputs = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=description, unit="row") as progress:
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            batch = pad_behind([prompts[position] for position in positions], length, tokenizer.pad_token_id)
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(positions))
            processors = [sampler(positions)] if sampler else None
            ids = model.generate(
                **{name: tensor.to(model.device) for name, tensor in batch.items()},
                past_key_values=cache,
                generation_config=config,
                logits_processor=processors,
            )
            texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for position, text in zip(positions, texts, strict=True):
                outputs[position] = text
            progress.update(len(positions))
    return outputs


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


def evaluate_split(model, tokenizer, task, split, rows, run, args, decoding):
    """Return a DataFrame of predictions for one split: split, row, sentence, label_text, prediction and more.

    Generated answers add `output`, their text. Label scoring adds `p_<label>` for every label, the softmax over the
    labels of log P(label, EOS | prompt), and `margin`: the prediction's probability less that of the runner-up.
    """
    encoded, _ = encode_rows(tokenizer, task, rows, run["options"]["max_seq_length"])
    prompts = [row["prompt_ids"] for row in encoded]
    answers = [answer_ids(tokenizer, label) for label in task.labels]
    table = rows.to_pandas()
    table.insert(0, "split", split)
    options = {"batch_size": args.batch_size, "description": f"{decoding} {split}"}
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


def probability_columns(task):
    """Return the columns of predictions.csv that hold the labels' probabilities, in the order of the labels."""
    return [f"p_{label}" for label in task.labels]


def load_model(folder, run, args):
    """Return (model, tokenizer) of the adapter in `folder`, or with --base_only of its base model alone."""
    base_model = run["base_model"]
    if not args.force:
        check_base_name(folder, base_model)
    modeling.check_memory(base_model["name"])
    tokenizer = modeling.load_tokenizer(str(folder))
    model = modeling.load_base_model(base_model["name"], base_model["revision"])
    if not args.force:
        check_base_weights(folder, base_model)
    return (model if args.base_only else modeling.load_adapter(model, folder)), tokenizer


def score(task, predictions):
    """Return {split: metrics} and {split: confusion counts} of a predictions DataFrame."""
    metrics, counts = {}, {}
    for split, table in predictions.groupby("split", sort=False):
        predicted = [label if isinstance(label, str) else None for label in table["prediction"]]
        metrics[split] = classification_metrics(task.labels, table["label_text"], predicted)
        counts[split] = confusion_counts(task.labels, table["label_text"], predicted)
        if "margin" in table:
            probabilities = table[probability_columns(task)].to_numpy()
            metrics[split] |= probability_metrics(task.labels, table["label_text"], probabilities)
    return metrics, counts


def write_results(folder, task, predictions, metrics, counts, settings):
    """Write metrics.json, predictions.csv, confusion_matrix.png and settings.json; `folder` is replaced whole."""
    with replacing(folder) as part:
        part.mkdir()
        (part / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        predictions.to_csv(part / "predictions.csv", index=False)
        draw_confusion_matrices(task.labels, counts, part / "confusion_matrix.png")
        (part / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    folder, evaluation = find_adapter(args.adapters_name)
    run = read_run(folder)
    task = task_from_fields(run["task"], folder / "run.json")
    rows = read_rows(run, task, args.split)
    model, tokenizer = load_model(folder, run, args)
    results, folders = {}, []
    for decoding in dict.fromkeys(args.decoding):
        start = time.perf_counter()
        with modeling.memory_errors(f"a batch has {args.batch_size} rows; lower --batch_size"):
            tables = [evaluate_split(model, tokenizer, task, name, rows[name], run, args, decoding) for name in rows]
        predictions = pd.concat(tables)
        results[decoding], counts = score(task, predictions)
        unused = () if decoding == "sample" else ("temperature", "seed")
        settings = {name: value for name, value in vars(args).items() if name not in unused} | {
            "decoding": decoding,
            "device": modeling.device_name(),
            "versions": modeling.library_versions(),
            "seconds": round(time.perf_counter() - start, 1),
            "peak_memory_gb": round(modeling.peak_memory_gb(), 2),
        }
        folders.append(evaluation / f"{'base-' if args.base_only else ''}{decoding}")
        write_results(folders[-1], task, predictions, results[decoding], counts, settings)
    print(results_table(results))
    print(f"metrics.json, predictions.csv and confusion_matrix.png: {', '.join(map(str, folders))}")


if __name__ == "__main__":
    raise SystemExit(main())
