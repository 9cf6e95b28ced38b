"""Fine-tune a chat model into a text classifier with QLoRA.

python train.py --epoch 50 --max_seq_length 512
python train.py --base_model_name smollm2 --task mytask.json --dataset_name comments.jsonl --epoch 5
"""

import argparse
import importlib.util
import json
import math
import re
import time
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

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
from prompts import TASKS, encode_rows, load_task, task_fields
from reports import draw_training_curves, model_card
from rows import read_splits
from shared_prefix import PaddedCollator, SharedPrefixCollator

DEFAULT_TASK = "supp-anti-oth"
DEFAULT_EPOCHS = 10


def build_parser():
    parser = CommandParser(prog="train.py", description=__doc__.split("\n")[0])
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--base_model_name",
        default="meta-llama/Llama-2-13b-chat-hf",
        help=f"a Hub model, a folder, or {modeling.EMBEDDED_MODEL}: the small model of a package, for a laptop",
    )
    data.add_argument(
        "--task",
        default=argparse.SUPPRESS,
        help=f"{', '.join(TASKS)}, or the path of a task file "
        f"(default: the task.json in the data set's folder, else {DEFAULT_TASK})",
    )
    data.add_argument(
        "--dataset_name",
        default=argparse.SUPPRESS,
        help="a Hub data set, a folder or a JSON-lines file (default: the one that the task was published as)",
    )
    data.add_argument("--max_seq_length", type=positive_int, default=512, help="tokens a row; longer sentences are cut")
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument(
        "--epoch", type=positive_int, default=argparse.SUPPRESS, help=f"epochs to train (default: {DEFAULT_EPOCHS})"
    )
    length.add_argument(
        "--steps", type=positive_int, default=argparse.SUPPRESS, help="optimiser steps to train, instead of --epoch"
    )
    training.add_argument("--train_batch_size", type=positive_int, default=16, help="rows a batch in training")
    training.add_argument(
        "--eval_batch_size", type=positive_int, default=8, help="rows a batch for the validation loss"
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
    output = parser.add_argument_group("output")
    output.add_argument(
        "--adapters_name",
        default=argparse.SUPPRESS,
        help="folder under models/ (default: <last part of the base model's name>-epoch<N> or -step<N>)",
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace an adapter of that name once training is done"
    )
    output.add_argument(
        "--report_to",
        choices=("none", "tensorboard", "wandb", "trackio"),
        default="none",
        help="log the losses there too",
    )
    output.add_argument(
        "--push_to_hub", metavar="REPO", default=None, help="upload the adapter there; a new repository is private"
    )
    return parser


def _dropout(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def parse_args(argv=None):
    """Return (args, task): every option resolved, nothing left to a default that is found later."""
    args = build_parser().parse_args(argv)
    args.epoch = getattr(args, "epoch", None)
    args.steps = getattr(args, "steps", None)
    if args.steps is None and args.epoch is None:
        args.epoch = DEFAULT_EPOCHS
    args.task = getattr(args, "task", None) or _task_beside(getattr(args, "dataset_name", None)) or DEFAULT_TASK
    task = load_task(args.task)
    args.dataset_name = getattr(args, "dataset_name", None) or task.dataset_name
    if args.dataset_name is None:
        raise UserError(f"--dataset_name: task {task.name} was not published with data; name a data set")
    if not getattr(args, "adapters_name", None):
        length = f"epoch{args.epoch}" if args.epoch else f"step{args.steps}"
        args.adapters_name = f"{Path(args.base_model_name).name}-{length}"
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise UserError(f"--report_to {args.report_to}: not installed; run: pip install {args.report_to}")
    return args, task


def _task_beside(dataset_name):
    file = Path(dataset_name or "") / "task.json"
    return str(file) if dataset_name and file.is_file() else None


def check_output(args):
    """Return the folder of the adapter; raise UserError where its name is no folder name or it exists."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.\-]*", args.adapters_name, re.ASCII):
        raise UserError(f"--adapters_name {args.adapters_name!r}: use letters, digits, '.', '_' and '-' only")
    folder = modeling.MODELS / args.adapters_name
    if folder.exists() and not args.overwrite:
        raise UserError(f"{folder}: exists; pass --overwrite to replace it, or name another --adapters_name")
    return folder


def encode_splits(tokenizer, task, splits, max_seq_length):
    """Return {split: Dataset of input_ids and labels}, with -100 for the prompt's tokens; prints what was cut."""
    encoded = {}
    for split, rows in (("train", splits.train), ("validation", splits.validation)):
        examples, cut = encode_rows(tokenizer, task, rows, max_seq_length)
        encoded[split] = Dataset.from_list(
            [
                {
                    "input_ids": example["prompt_ids"] + example["answer_ids"],
                    "labels": [-100] * len(example["prompt_ids"]) + example["answer_ids"],
                }
                for example in examples
            ]
        )
        print(f"{split}: {len(rows)} rows, {cut} cut to {max_seq_length} tokens")
    for note in splits.notes:
        print(note)
    return encoded


class AnswerLossTrainer(SFTTrainer):
    """TRL's SFTTrainer with the loss computed at the answers' positions alone, for batches of shared_prefix.py.

    Its own loss projects every position onto the vocabulary where there is no Triton: on a CPU, half of a step's time
    goes into logits of prompt tokens that nobody asked for.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy in nats over the batch's answer tokens (or over `num_items_in_batch`)."""
        total, outputs = self._summed_loss(model, inputs)
        loss = total / (answer_tokens(inputs) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _summed_loss(self, model, inputs):
        labels = inputs["labels"][:, 1:]  # the logits at position i are those of token i + 1
        columns = (labels != -100).any(dim=0).nonzero().flatten()
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest, logits_to_keep=columns, use_cache=False)
        logits = outputs.logits.flatten(0, 1).float()
        return cross_entropy(logits, labels[:, columns].flatten(), reduction="sum"), outputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate one batch, keeping its summed loss and its number of answer tokens for the mean over tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            total, _ = self._summed_loss(model, inputs)
            tokens = answer_tokens(inputs)
        self._evaluated.append((total.item(), tokens.item()))
        return total / tokens, None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate; the loss is the mean over all answer tokens, whatever the batches, which Trainer's own is not."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        totals, tokens = zip(*self._evaluated, strict=True)
        output.metrics[f"{metric_key_prefix}_loss"] = sum(totals) / sum(tokens)
        return output


def answer_tokens(inputs):
    """Return the number of answer tokens in a batch, a scalar tensor."""
    return (inputs["labels"][:, 1:] != -100).sum()


class EvaluateAtEnd(TrainerCallback):
    """Evaluates and logs after the last step, which regular steps may miss."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "steps" and state.global_step == state.max_steps:
            control.should_evaluate = control.should_log = True


def training_config(args, output_dir):
    """Return the SFTConfig of the options; the learning rate falls linearly, as the trainer does by default."""
    by_step = args.steps is not None
    interval = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
    if by_step:  # ten points on the curve
        every = math.ceil(args.steps / 10)
        interval = {"eval_strategy": "steps", "eval_steps": every, "logging_strategy": "steps", "logging_steps": every}
    dtype = modeling.compute_dtype()
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
        save_strategy="no",
        logging_nan_inf_filter=False,
        report_to=args.report_to,
    )
    config._n_gpu = min(1, config.n_gpu)  # one process uses one GPU: the model lies on the first
    return config


def train_adapter(model, tokenizer, encoded, args, output_dir):
    """Train the adapter on `model` and return the history, a DataFrame with a line per evaluation.

    `encoded` is what `encode_splits` returns. Columns: step, epoch, train_loss (mean since the line before),
    eval_loss, both in nats per answer token, learning_rate and grad_norm.
    """
    with modeling.float32_adapter(model):
        trainer = AnswerLossTrainer(
            model=model,
            args=training_config(args, output_dir),
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            data_collator=PaddedCollator(tokenizer.pad_token_id) if args.no_shared_prefix else SharedPrefixCollator(),
            callbacks=[EvaluateAtEnd()],
        )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (math.isfinite(log[-1].get("eval_loss", 0)) and all(parameter.isfinite().all() for parameter in trained)):
        raise UserError(
            "the adapter's weights or loss became NaN or infinite; no adapter written; lower --learning_rate"
        )
    columns = ["epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]
    return pd.DataFrame(log).groupby("step")[columns].first().rename(columns={"loss": "train_loss"}).reset_index()


def describe_run(args, task, splits, model, history, seconds):
    """Return run.json's dict: all that a reader or evaluate.py needs to know of this run."""
    return {
        "adapters_name": args.adapters_name,
        "options": vars(args),
        "task": task_fields(task),
        "data": {
            "dataset_name": args.dataset_name,
            "fingerprint": splits.fingerprint(),
            "train_rows": len(splits.train),
            "validation_rows": len(splits.validation),
        },
        "base_model": modeling.describe_base_model(args.base_model_name, model),
        "versions": modeling.library_versions(),
        "device": modeling.device_name(),
        "compute_dtype": str(modeling.compute_dtype()).removeprefix("torch."),
        "steps": int(history["step"].iloc[-1]),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(modeling.peak_memory_gb(), 2),
    }


def save_run(folder, model, tokenizer, run, history):
    """Write the adapter (safetensors), its tokenizer and all reports to `folder`."""
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    history.to_csv(folder / "history.csv", index=False)
    draw_training_curves(history, folder / "training_curves.png")
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(run, history), encoding="utf-8")


def create_hub_repository(repository):
    """Make sure before training that the adapter can be uploaded after it."""
    with hub_errors(repository, "--push_to_hub"):
        HfApi().create_repo(repository, private=True, exist_ok=True)


def push_to_hub(folder, repository):
    """Upload `folder` in one commit and print where it is."""
    print(f"Uploading {folder}; should that fail, it stays here and can be sent with: hf upload {repository} {folder}")
    with hub_errors(repository, "--push_to_hub"):
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=["runs/*", "evaluation/*"], commit_message="Adapter"
        )
    print(f"Uploaded to {commit.commit_url}")


@one_line_errors
def main(argv=None):
    args, task = parse_args(argv)
    folder = check_output(args)
    splits = read_splits(args.dataset_name, task)
    tokenizer = modeling.load_tokenizer(args.base_model_name)
    encoded = encode_splits(tokenizer, task, splits, args.max_seq_length)
    if args.push_to_hub:
        create_hub_repository(args.push_to_hub)
    model = modeling.add_adapter(
        modeling.load_base_model(args.base_model_name),
        args.base_model_name,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        seed=args.seed,
    )
    with replacing(folder) as part:
        start = time.perf_counter()
        history = train_adapter(model, tokenizer, encoded, args, part)
        run = describe_run(args, task, splits, model, history, time.perf_counter() - start)
        save_run(part, model, tokenizer, run, history)
    if args.push_to_hub:
        push_to_hub(folder, args.push_to_hub)
    print(f"Adapter, history and curves: {folder}\nNext: python evaluate.py --adapters_name {args.adapters_name}")


if __name__ == "__main__":
    raise SystemExit(main())
