"""Speed and memory of evaluating a data set, as evaluate.py does it, against the original's way in the same run.

python benchmarks/evaluate_speed.py --model smollm2 --data daccord_yifei_v2_leo.json
python benchmarks/evaluate_speed.py --shape llama-2-13b --tokenizer FOLDER --data FILE --work FOLDER

evaluate.py's ways are timed on all rows, the others on one batch and scaled to all rows, which the table says.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import concatenate_datasets
from train_speed import (
    MAIN_TASK,
    Peak,
    add_model_options,
    base_model_name,
    encode_any,
    load_with_adapter,
    save_result,
    synchronize,
)
from transformers import GenerationConfig

import modeling
from evaluate import RowSampler, generate_outputs
from prompts import TASKS, answer_ids
from rows import read_splits
from shared_prefix import label_log_probs

BATCH = 32
NEW_TOKENS = 80  # what the original generated for every row, since it had never learned to stop
ORIGINAL = "generate 80 tokens, no KV cache (the original)"


def load(base):
    """Return the base model with a fresh adapter, loaded from a file as evaluate.py loads it."""
    model = load_with_adapter(base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return modeling.load_adapter(model.unload(), Path(folder))


def timed(name, function, *, repeats, rows, all_rows):
    """Return the line of a table: median seconds of `repeats` calls, after one more, scaled from `rows` to all."""
    print(f"--- {name}", flush=True)
    if repeats > 1:
        function()
    peak, seconds = Peak(), []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        scale, result = function()
        synchronize()
        seconds.append((time.perf_counter() - start) * scale)
    return {
        "name": name,
        "seconds": statistics.median(seconds) * all_rows / rows,
        "rows_measured": rows,
        "token_scale": scale,
        "peak_memory_gb": peak.gigabytes(),
    }, result


def padded(prompts, pad_token_id):
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = [[pad_token_id] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * len(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.inference_mode()
def plain_generate(model, tokenizer, prompts, tokens, use_cache):
    """Generate exactly `tokens` tokens for every prompt, whole rows padded."""
    config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=use_cache,
    )
    batch = {name: tensor.to(model.device) for name, tensor in padded(prompts, tokenizer.pad_token_id).items()}
    return model.generate(**batch, generation_config=config)


@torch.inference_mode()
def one_forward_per_label(model, tokenizer, prompts, answers):
    """Return log P(answer | prompt), (rows, answers), from one padded forward for each label."""
    columns = []
    for answer in answers:
        batch = padded([prompt + answer for prompt in prompts], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions, logits_to_keep=len(answer) + 1).logits[:, :-1]
        targets = torch.tensor(answer, device=model.device).expand(len(prompts), -1)
        columns.append(logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0].sum(1))
    return torch.stack(columns, 1).cpu()


def measure_all(args, base):
    """Return the lines of all ways and the largest difference between label scoring and the plain way, in nats."""
    on_gpu = torch.cuda.is_available()
    name = MAIN_TASK[args.model or args.shape]
    task, tokenizer, model = TASKS[name], modeling.load_tokenizer(base), load(base)
    splits = read_splits(args.data, TASKS["politosphere-definitions"])
    prompts = [
        row["prompt_ids"]
        for row in encode_any(tokenizer, name, concatenate_datasets([splits.train, splits.validation]))
    ]
    answers = [answer_ids(tokenizer, label) for label in task.labels]
    some = prompts[:BATCH] if on_gpu else prompts[: BATCH // 2]
    few = 8 if on_gpu else 1  # tokens without a cache, each as dear as the prompt

    def sampler(positions):
        return RowSampler(0.8, positions)

    def generate():
        return generate_outputs(
            model, tokenizer, prompts, max_new_tokens=max(map(len, answers)), batch_size=BATCH, sampler=sampler
        )

    ways = [
        (
            "evaluate.py --decoding labels",
            lambda: (1, label_log_probs(model, prompts, answers, batch_size=BATCH)),
            True,
        ),
        ("evaluate.py --decoding sample", lambda: (1, generate()), True),
        ("one padded forward per label", lambda: (1, one_forward_per_label(model, tokenizer, some, answers)), False),
        ("generate 80 tokens, KV cache", lambda: (1, plain_generate(model, tokenizer, some, NEW_TOKENS, True)), False),
        (ORIGINAL, lambda: (NEW_TOKENS / few, plain_generate(model, tokenizer, some, few, False)), False),
    ]
    lines, results = [], []
    for title, function, whole in ways:
        rows = len(prompts) if whole else len(some)
        line, result = timed(title, function, repeats=3 if whole else 1, rows=rows, all_rows=len(prompts))
        lines.append(line)
        results.append(result)
    difference = (results[0][: len(some)] - results[2]).abs().max().item()
    return {"task": name, "rows": len(prompts), "labels": len(answers), "lines": lines, "difference_nats": difference}


def table(result):
    """Return the lines that are printed: seconds for all rows, ratio to the original's way, memory."""
    original = next(line["seconds"] for line in result["lines"] if line["name"] == ORIGINAL)
    return [
        {
            f"{result['rows']} rows, {result['labels']} labels": line["name"],
            "seconds": f"{line['seconds']:.2f}",
            "times faster than the original": f"{original / line['seconds']:.1f}",
            "peak GB": f"{line['peak_memory_gb']:.1f}",
            "measured on": f"{line['rows_measured']} rows"
            + (f", {NEW_TOKENS / line['token_scale']:.0f} of 80 tokens" if line["token_scale"] != 1 else ""),
        }
        for line in result["lines"]
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    args = parser.parse_args()
    args.data = str(Path(args.data).resolve())
    result = measure_all(args, base_model_name(args))
    save_result(f"evaluate-speed-{args.model or args.shape}", result, table(result))
    print(f"Label scoring and one padded forward per label differ by at most {result['difference_nats']:.2g} nats.")


if __name__ == "__main__":
    main()
