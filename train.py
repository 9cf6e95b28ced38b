"""Fine-tune a chat model into a text classifier with QLoRA.

python train.py --epoch 50 --max_seq_length 512
python train.py --base_model_name smollm2 --task mytask.json --dataset_name comments.jsonl --epoch 5
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from huggingface_hub import CommitOperationAdd, HfApi
from trl import SFTConfig

import checkpoints
import modeling
import processes
from command_line import (
    CommandParser,
    UserError,
    hub_errors,
    not_empty,
    number,
    one_line_errors,
    positive_float,
    positive_int,
    seed,
)
from prompts import TASKS, answer_ids, encode_rows, load_task, task_fields
from reports import draw_training_curves, model_card
from rows import read_splits
from shared_prefix import OwnRows, PaddedCollator, SharedPrefixCollator
from trainer import AnswerLossTrainer, EarlyStopping, EvaluateAtEnd, KeepBest, SaveCheckpoints

DEFAULT_TASK = "supp-anti-oth"
DEFAULT_EPOCHS = 10
SCORED_TRAIN_ROWS = 200  # at most, after every epoch
PAD_TO_MULTIPLE_OF = 64  # tokens, on a GPU: about 2 in 100 more of them, and few enough shapes to record each
# What may differ when a run is resumed: no digit of the result depends on it, or (task, data) its content is compared.
FREE_OPTIONS = {
    "adapters_name",
    "overwrite",
    "resume",
    "save_steps",
    "gradient_checkpointing",
    "push_to_hub",
    "report_to",
}
FREE_OPTIONS |= {"task", "dataset_name"}


def add_common_options(parser):
    """Add the options that cross_validate.py has, too; return the group of training and that of its length."""
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--base_model_name",
        type=not_empty,
        default="meta-llama/Llama-2-13b-chat-hf",
        help=f"a Hub model, a folder, or {modeling.EMBEDDED_MODEL}: the small model of a package, for a laptop",
    )
    data.add_argument(
        "--task",
        type=not_empty,
        default=argparse.SUPPRESS,
        help=f"{', '.join(TASKS)}, or the path of a task file "
        f"(default: the task.json in the data set's folder, else {DEFAULT_TASK})",
    )
    data.add_argument(
        "--dataset_name",
        type=not_empty,
        default=argparse.SUPPRESS,
        help="a Hub data set, a folder or a JSON-lines file (default: the one that the task was published as)",
    )
    data.add_argument("--max_seq_length", type=positive_int, default=512, help="tokens a row; longer sentences are cut")
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument(
        "--epoch", type=positive_int, default=argparse.SUPPRESS, help=f"epochs to train (default: {DEFAULT_EPOCHS})"
    )
    training.add_argument("--train_batch_size", type=positive_int, default=16, help="rows a batch in training")
    training.add_argument(
        "--eval_batch_size", type=positive_int, default=8, help="rows a batch when they are scored after an epoch"
    )
    training.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="batches an optimiser step"
    )
    training.add_argument(
        "--learning_rate", type=positive_float, default=2e-4, help="at the start; falls linearly to 0"
    )
    training.add_argument("--seed", type=seed, default=42, help="of the adapter's first weights, row order and dropout")
    training.add_argument(
        "--no_shared_prefix",
        action="store_true",
        help="pad batches instead of computing the rows' common beginning once a batch",
    )
    training.add_argument(
        "--gradient_checkpointing", action="store_true", help="recompute activations in the backward pass: less memory"
    )
    lora = parser.add_argument_group("adapter")
    lora.add_argument("--lora_r", type=positive_int, default=64, help="rank")
    lora.add_argument("--lora_alpha", type=positive_float, default=16, help="scale; updates count alpha / r")
    lora.add_argument("--lora_dropout", type=_dropout, default=0.1, help="dropout on the adapter's input")
    lora.add_argument(
        "--lora_target_modules", nargs="+", default=["q_proj", "v_proj"], metavar="MODULE", help="layers it adapts"
    )
    return training, length


def add_folder_options(parser, name_help):
    """Add the options that say where a run's results go, with `name_help` on --adapters_name; return their group."""
    output = parser.add_argument_group("output")
    output.add_argument("--adapters_name", type=not_empty, default=argparse.SUPPRESS, help=name_help)
    existing = output.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace what has that name, once there is new")
    existing.add_argument(
        "--resume", action="store_true", help="go on from the newest complete checkpoint of a run that was cut off"
    )
    return output


def build_parser():
    parser = CommandParser(prog="train.py", description=__doc__.split("\n")[0])
    training, length = add_common_options(parser)
    length.add_argument(
        "--steps", type=positive_int, default=argparse.SUPPRESS, help="optimiser steps to train, instead of --epoch"
    )
    training.add_argument(
        "--keep",
        choices=("last", "best"),
        default="last",
        help="adapter to save: after the last epoch, or after that with the highest validation macro-F1",
    )
    training.add_argument(
        "--early_stopping_patience",
        type=positive_int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="stop after N evaluations without a higher validation macro-F1",
    )
    output = add_folder_options(
        parser,
        "folder under models/ (default: <last part of the base model's name>-epoch<N> or -step<N>)",
    )
    output.add_argument(
        "--save_steps",
        type=positive_int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="optimiser steps between checkpoints (default: one after every epoch, or ten times in a run by --steps)",
    )
    output.add_argument(
        "--report_to",
        choices=("none", "tensorboard", "wandb", "trackio"),
        default="none",
        help="log the losses there too",
    )
    output.add_argument(
        "--push_to_hub",
        metavar="REPO",
        default=argparse.SUPPRESS,
        help="upload the adapter there; a new repository is private",
    )
    return parser


def _dropout(text):
    value = number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def parse_args(argv=None):
    """Return (args, task): every option resolved, nothing left to a default that is found later."""
    args = build_parser().parse_args(argv)
    for name in ("epoch", "steps", "early_stopping_patience", "push_to_hub", "save_steps"):
        setattr(args, name, getattr(args, name, None))
    if args.steps is None and args.epoch is None:
        args.epoch = DEFAULT_EPOCHS
    task = resolve_task(args)
    if not getattr(args, "adapters_name", None):
        length = f"epoch{args.epoch}" if args.epoch else f"step{args.steps}"
        args.adapters_name = f"{Path(args.base_model_name).name}-{length}"
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise UserError(f"--report_to {args.report_to}: not installed; run: pip install {args.report_to}")
    return args, task


def resolve_task(args):
    """Return the task of the options, and set in `args` what of --task and --dataset_name was left to a default."""
    args.task = getattr(args, "task", None) or _task_beside(getattr(args, "dataset_name", None)) or DEFAULT_TASK
    task = load_task(args.task)
    args.dataset_name = getattr(args, "dataset_name", None) or task.dataset_name
    if args.dataset_name is None:
        raise UserError(f"--dataset_name: task {task.name} was not published with data; name a data set")
    return task


def _task_beside(dataset_name):
    file = Path(dataset_name or "") / "task.json"
    return str(file) if dataset_name and file.is_file() else None


def check_output(args, parent=modeling.MODELS):
    """Return the run's folder in `parent`; raise UserError where its name is no folder name or it cannot be used."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.\-]*", args.adapters_name, re.ASCII):
        raise UserError(f"--adapters_name {args.adapters_name!r}: use letters, digits, '.', '_' and '-' only")
    folder = parent / args.adapters_name
    checkpoints.check_folder(folder, args.resume, args.overwrite)
    return folder


def encode_splits(tokenizer, task, splits, max_seq_length):
    """Return {split: rows as `encode_rows` gives them} for train and validation; prints what was cut."""
    encoded = {}
    for split, rows in (("train", splits.train), ("validation", splits.validation)):
        encoded[split], cut = encode_rows(tokenizer, task, rows, max_seq_length)
        print(f"{split}: {len(rows)} rows, {cut} cut to {max_seq_length} tokens")
    for note in splits.notes:
        print(note)
    return encoded


def sft_dataset(rows):
    """Return encoded rows as a Dataset of input_ids and labels, with -100 for the prompt's tokens."""
    return Dataset.from_list(
        [
            {
                "input_ids": row["prompt_ids"] + row["answer_ids"],
                "labels": [-100] * len(row["prompt_ids"]) + row["answer_ids"],
            }
            for row in rows
        ]
    )


def training_config(args, output_dir, quiet=False):
    """Return the SFTConfig of the options; the learning rate falls linearly, as the trainer does by default."""
    by_step = args.steps is not None
    interval = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
    if by_step:  # ten points on the curve
        every = math.ceil(args.steps / 10)
        interval = {"eval_strategy": "steps", "eval_steps": every, "logging_strategy": "steps", "logging_steps": every}
    dtype = modeling.compute_dtype()
    # accelerate's launcher and its configuration file set these, and would have the last word.
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    config = SFTConfig(
        output_dir=str(output_dir),
        **({"max_steps": args.steps} if by_step else {"num_train_epochs": args.epoch}),
        **interval,
        per_device_train_batch_size=args.train_batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        activation_checkpointing=args.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        max_length=None,  # rows are cut already, in their sentences
        save_strategy="no",  # SaveCheckpoints says when
        metric_for_best_model="eval_macro_f1",
        greater_is_better=True,
        logging_nan_inf_filter=False,
        disable_tqdm=quiet,
        report_to=args.report_to,
    )
    config._n_gpu = min(1, config.n_gpu)  # one process uses one GPU: the model lies on the first
    return config


def build_trainer(model, tokenizer, task, encoded, args, output_dir, on_scores=None):
    """Return the AnswerLossTrainer of a run; `encoded` is what `encode_splits` returns, `on_scores` the trainer's."""
    on_gpu = torch.cuda.is_available()
    sample = torch.randperm(len(encoded["train"]), generator=torch.Generator().manual_seed(args.seed))
    scored = {} if on_scores else {"train": [encoded["train"][row] for row in sample[:SCORED_TRAIN_ROWS].tolist()]}
    callbacks = [EvaluateAtEnd()]
    if args.early_stopping_patience:
        callbacks.append(EarlyStopping(args.early_stopping_patience))
    if args.no_shared_prefix:
        collator = PaddedCollator(tokenizer.pad_token_id)
    else:
        collator = SharedPrefixCollator(tokenizer.pad_token_id, PAD_TO_MULTIPLE_OF if on_gpu else 1)
    with modeling.float32_adapter(model):
        return AnswerLossTrainer(
            model=model,
            args=training_config(args, output_dir, quiet=on_scores is not None),
            train_dataset=sft_dataset(encoded["train"]),
            eval_dataset=sft_dataset(encoded["validation"]),
            processing_class=tokenizer,
            data_collator=OwnRows(collator),
            callbacks=callbacks,
            scored=scored | {"eval": encoded["validation"]},
            on_scores=on_scores,
            answers={label: answer_ids(tokenizer, label) for label in task.labels},
            best=KeepBest() if args.keep == "best" else None,
            # Padded batches have too many shapes, float16 a loss scale that changes, recomputing a random state to set.
            graphed=on_gpu
            and modeling.compute_dtype() == torch.bfloat16
            and not (args.no_shared_prefix or args.gradient_checkpointing),
        )


def train_adapter(model, tokenizer, task, encoded, args, folder, checkpoint=None, on_scores=None):
    """Train the adapter on `model`; return (history, the step whose adapter `model` then holds).

    `encoded` is what `encode_splits` returns; checkpoints go to `folder`, and training goes on from `checkpoint`. The
    history is a DataFrame with a line per evaluation. Columns: step, epoch, train_loss (mean since the line before),
    eval_loss, both in nats per answer token; train_accuracy, train_macro_f1, eval_accuracy and eval_macro_f1 by label
    scoring; learning_rate and grad_norm. With `on_scores`, which is called with the validation rows' log-probabilities
    (rows, labels) at every evaluation, that is all that is wanted of the run: no checkpoint is written, no train row
    scored, no progress shown. Raises UserError where loss or weights become NaN or infinite, memory or disk
    is full.
    """
    advice = (
        f"a batch has {args.train_batch_size} rows of up to {args.max_seq_length} tokens; pass "
        "--gradient_checkpointing, with --resume, too, or start anew with a lower --train_batch_size (and "
        "--gradient_accumulation_steps raised as much), --eval_batch_size or --max_seq_length"
    )
    with modeling.memory_errors(advice), processes.lost_peers():
        trainer = build_trainer(model, tokenizer, task, encoded, args, folder, on_scores)
        if not on_scores:
            trainer.add_callback(SaveCheckpoints(args.save_steps or trainer.args.eval_steps))
        if checkpoint:
            trainer.go_on(checkpoint)
        else:
            trainer.train()
    if trainer.best:
        trainer.best.restore(model)
    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    scores = [f"{split}_{score}" for split in trainer.scored for score in ("accuracy", "macro_f1")]
    columns = ["epoch", "loss", "eval_loss", *scores, "learning_rate", "grad_norm"]
    history = pd.DataFrame(log).groupby("step")[columns].first().rename(columns={"loss": "train_loss"}).reset_index()
    return history, trainer.best.step if trainer.best else trainer.state.global_step


def describe_run(args, task, encoded, data):
    """Return what run.json says of a run before its model is loaded: what it depends on.

    `encoded` is a list of the rows' tokens, as `encode_rows` gives them; `data` is what else there is to say of them.
    """
    tokens = hashlib.sha256(json.dumps([row["prompt_ids"] + row["answer_ids"] for row in encoded]).encode()).hexdigest()
    return {
        "format": checkpoints.RUN_FORMAT,
        "adapters_name": args.adapters_name,
        "options": vars(args),
        "task": task_fields(task),
        "data": {"dataset_name": args.dataset_name, **data, "tokens": tokens},
        "versions": modeling.library_versions(),
        "device": modeling.device_name(),
        "processes": processes.count(),
        "compute_dtype": str(modeling.compute_dtype()).removeprefix("torch."),
    }


def load_base(args, earlier=None):
    """Return (base model, what pins it).

    `earlier` is the dict of the run to resume: raises UserError where the base model is no longer that run's.
    """
    pinned = earlier["base_model"] if earlier else {"revision": None}
    model = modeling.load_base_model(args.base_model_name, pinned["revision"])
    base = processes.on_first(modeling.describe_base_model, args.base_model_name, model)
    if earlier and base != pinned:
        raise UserError(
            f"--base_model_name {args.base_model_name}: its weights or its config.json were others when the run was "
            f"started (fingerprint {pinned['fingerprint'][:12]}) than now ({base['fingerprint'][:12]}); restore them, "
            "or start anew with --overwrite"
        )
    return model, base


def fresh_adapter(model, args):
    """Return the base model with an adapter that has learned nothing, drawn from the seed."""
    return modeling.add_adapter(
        model,
        args.base_model_name,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        seed=args.seed,
    )


def save_run(folder, model, tokenizer, run, history):
    """Write the adapter (safetensors), its tokenizer and all reports to `folder`."""
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    history.to_csv(folder / "history.csv", index=False)
    draw_training_curves(history, folder / "training_curves.png")
    (folder / "README.md").write_text(model_card(run, history), encoding="utf-8")
    run["files"] = sorted([file.name for file in folder.iterdir()] + ["run.json"])
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def create_hub_repository(repository):
    """Make sure before training that the adapter can be uploaded after it."""
    with hub_errors(repository, "--push_to_hub"):
        HfApi().create_repo(repository, private=True, exist_ok=True)


def push_to_hub(folder, repository):
    """Upload the files of the run in `folder` that its run.json lists, in one commit; print where it is.

    Not with upload_folder, which makes several commits of a slow upload: cut off, it would leave a mix at the Hub.
    """
    print(
        f"Uploading {folder}; should that fail, the adapter stays here; --resume instead of --overwrite sends it again"
    )
    names = checkpoints.result_files(folder / "run.json")
    if not names:
        raise UserError(f"{folder / 'run.json'}: does not say which files to upload; train again with this version")
    with hub_errors(repository, "--push_to_hub"):
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        commit = HfApi().create_commit(repository, additions, commit_message="Adapter")
    print(f"Uploaded to {commit.commit_url}")


def run_training(args, task, splits, tokenizer, encoded, folder):
    """Train, or go on with a run that was cut off, and write the result to `folder`; return run.json's dict.

    A run to resume that is finished is left as it is.
    """
    data = {
        "fingerprint": splits.fingerprint(),
        "train_rows": len(splits.train),
        "validation_rows": len(splits.validation),
    }
    run = describe_run(args, task, encoded["train"] + encoded["validation"], data)
    earlier, checkpoint = None, None
    if args.resume:
        earlier, checkpoint = processes.on_first(checkpoints.find_resumable, folder, run, FREE_OPTIONS)
    if earlier and not checkpoint:
        return earlier
    base_model, run["base_model"] = load_base(args, earlier)
    model = fresh_adapter(base_model, args)
    start = time.perf_counter()
    with ExitStack() as stack:
        processes.first_enters(stack, checkpoints.in_progress(folder, None if args.resume else run))
        history, kept_step = train_adapter(model, tokenizer, task, encoded, args, folder, checkpoint)
    run |= {
        "resumed_from": checkpoint and checkpoint.name,
        "steps": int(history["step"].iloc[-1]),
        "kept_step": kept_step,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(modeling.peak_memory_gb(), 2),
    }
    if processes.is_first():
        with checkpoints.result(folder) as part:
            save_run(part, model, tokenizer, run, history)
    return run


@one_line_errors
def main(argv=None):
    args, task = parse_args(argv)
    with processes.joined():
        folder = processes.on_first(check_output, args)
        modeling.check_memory(args.base_model_name)
        splits = read_splits(args.dataset_name, task)
        tokenizer = modeling.load_tokenizer(args.base_model_name)
        encoded = encode_splits(tokenizer, task, splits, args.max_seq_length)
        if args.push_to_hub:
            processes.on_first(create_hub_repository, args.push_to_hub)
        with ExitStack() as stack:
            processes.first_enters(stack, checkpoints.locked(folder, args.resume, args.overwrite))
            command = sys.argv[1:] if argv is None else argv
            stack.enter_context(
                processes.saying_how_to_resume("train.py", command, functools.partial(checkpoints.newest_kept, folder))
            )
            run = run_training(args, task, splits, tokenizer, encoded, folder)
        if args.push_to_hub:
            processes.on_first(push_to_hub, folder, args.push_to_hub)
    print(f"Adapter (after step {run.get('kept_step')} of {run.get('steps')}), history and curves: {folder}")
    print(f"Next: python evaluate.py --adapters_name {args.adapters_name}")


if __name__ == "__main__":
    raise SystemExit(main())
