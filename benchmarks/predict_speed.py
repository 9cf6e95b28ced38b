"""Speed and memory of labelling many rows, as predict.py does it, against generating the labels in the same run.

python benchmarks/predict_speed.py --model smollm2 --data daccord_yifei_v2_leo.json
python benchmarks/predict_speed.py --shape llama-2-13b --tokenizer FOLDER --data FILE --work FOLDER

predict.py's lines are from the file of rows to the finished output, without loading the model. Generation is timed on
one batch: its time a row does not depend on their number. The rows are the sentences of --data again and again, each
with another number before it: no two are equal, and none begin alike, of which label scoring would make use.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import concatenate_datasets
from evaluate_speed import BATCH, NEW_TOKENS, load, plain_generate
from train_speed import MAIN_TASK, Peak, add_model_options, base_model_name, save_result, synchronize

import modeling
import predict
import processes
from evaluate import generate_outputs
from prompts import TASKS, answer_ids, prompts_ids
from rows import read_splits
from table_files import Source
from unfinished import Unfinished

MAX_SEQ_LENGTH = 512


def numbered_sentences(data, count):
    """Return so many distinct sentences, made from those of the labelled file `data`."""
    splits = read_splits(data, TASKS["politosphere-definitions"])
    sentences = concatenate_datasets([splits.train, splits.validation])["sentence"][:]
    return [f"{number} {sentence}" for number, sentence in zip(range(count), itertools.cycle(sentences), strict=False)]


def predict_rows(model, tokenizer, task, sentences, tokens_per_batch):
    """Return the line of a table for labelling `sentences` with predict.py's functions."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "rows.jsonl"), Path(folder, "labels.jsonl")
        file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in sentences), encoding="utf-8")
        args = predict.parse_args(["--adapters_name", "-", "--input", str(file), "--output", str(output)])
        added, unfinished = predict.added_columns(task, args.probabilities), Unfinished(output)
        peak, start = Peak(), time.perf_counter()
        source = Source(file)
        plan = predict.make_plan(args, source, task, "", unfinished, added)
        tokens = tokens_per_batch or predict.default_tokens_per_batch(model)
        labeller = predict.Labeller(model, tokenizer, task, MAX_SEQ_LENGTH, tokens)
        unfinished.folder.mkdir()
        with unfinished.started(plan["settings"]):
            predict.predict(args, labeller, source, plan, unfinished, added)
            if processes.is_first():
                predict.finish(unfinished, task, args, plan["settings"], added)
        synchronize()
        seconds = time.perf_counter() - start
    name = f"predict.py, {len(sentences):,} rows"
    return line(name, len(sentences), seconds, peak) | {"tokens_per_batch": tokens}


def generate_batch(name, sentences, function):
    """Return the line of a table for `function`, which generates the answers to `sentences`."""
    print(f"--- {name}", flush=True)
    peak, start = Peak(), time.perf_counter()
    function()
    synchronize()
    return line(name, len(sentences), time.perf_counter() - start, peak)


def line(name, rows, seconds, peak):
    return {
        "name": name,
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "peak_memory_gb": peak.gigabytes(),
    }


def measure_all(args, base):
    """Return the lines of all ways; the first call of each kind, which is slower, is not counted."""
    task_name = MAIN_TASK[args.model or args.shape]
    task, tokenizer, model = TASKS[task_name], modeling.load_tokenizer(base), load(base)
    sentences = numbered_sentences(args.data, max(args.rows))
    some = sentences[: BATCH if torch.cuda.is_available() else BATCH // 2]
    prompts = prompts_ids(tokenizer, task, some)
    longest = max(len(answer_ids(tokenizer, label)) for label in task.labels)
    predict_rows(model, tokenizer, task, some, args.tokens_per_batch)
    lines = [predict_rows(model, tokenizer, task, sentences[:rows], args.tokens_per_batch) for rows in args.rows]
    ways = {
        "generate the label alone, KV cache, the prompts' beginning once": lambda: generate_outputs(
            model, tokenizer, prompts, max_new_tokens=longest, batch_size=len(prompts)
        ),
        f"generate {NEW_TOKENS} tokens, KV cache": lambda: plain_generate(model, tokenizer, prompts, NEW_TOKENS, True),
    }
    lines += [generate_batch(name, some, function) for name, function in ways.items()]
    return {"task": task_name, "labels": len(task.labels), "lines": lines}


def table(result):
    """Return the lines that are printed, with the ratio to generation with a KV cache, the last one."""
    slowest = result["lines"][-1]["rows_per_second"]
    return [
        {
            f"{result['labels']} labels": line["name"],
            "rows/s": f"{line['rows_per_second']:.2f}",
            f"times faster than generating {NEW_TOKENS} tokens": f"{line['rows_per_second'] / slowest:.1f}",
            "peak GB": f"{line['peak_memory_gb']:.2f}",
            "measured on": f"{line['rows']:,} rows",
        }
        for line in result["lines"]
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1_000, 10_000], help="rows to label")
    parser.add_argument("--tokens_per_batch", type=int, help="default: predict.py's own")
    args = parser.parse_args()
    args.data = str(Path(args.data).resolve())
    with processes.joined():
        result = measure_all(args, base_model_name(args))
    save_result(f"predict-speed-{args.model or args.shape}", result, table(result))


if __name__ == "__main__":
    main()
