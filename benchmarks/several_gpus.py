"""Speed of training and of labelling in several processes, one a GPU: run once for each number of GPUs.

model="--shape llama-2-13b --tokenizer FOLDER --data FILE --work FOLDER"
for n in 1 2 4; do accelerate launch --num_processes $n benchmarks/several_gpus.py $model; done

Labelling is timed with the adapter as training has it, in float32; predict.py loads it in bfloat16, which is faster.
Each run adds its numbers to the result's file and prints the table of all that are in it; the first one, with one GPU,
begins it anew. A batch has so many rows in all, whatever the number of GPUs. Two CPU processes, to try it:
accelerate launch --multi_gpu --num_processes 2 benchmarks/several_gpus.py --model smollm2 --data FILE ...
"""

import argparse
import json
from pathlib import Path

import train_speed
from predict_speed import numbered_sentences, predict_rows
from train_speed import MAIN_TASK, RESULTS, add_model_options, base_model_name, load_with_adapter, save_result, try_to

import modeling
import processes
from prompts import TASKS


def measure_all(args, base):
    """Return the lines of this number of processes."""
    task = MAIN_TASK[args.model or args.shape]
    model = load_with_adapter(base)
    lines = []
    for batch_size in args.batch_sizes:
        name = f"train.py, batch {batch_size}"
        numbers = try_to(
            name, train_speed.measure_train_py, args, base, model, task, batch_size, args.steps, args.warm_up
        )
        if "seconds_per_step" in numbers:
            numbers["rows_per_second"] = batch_size / numbers["seconds_per_step"]
        lines.append(numbers)
    model.eval()
    tokenizer, sentences = modeling.load_tokenizer(base), numbered_sentences(args.data, args.rows)
    predict_rows(model, tokenizer, TASKS[task], sentences[:64], None)  # the first is slower
    lines.append(predict_rows(model, tokenizer, TASKS[task], sentences, None))
    return lines


def table(runs):
    """Return the lines that are printed: rows/s for every number of GPUs, and how many times those of one."""
    names = [line["name"] for line in next(iter(runs.values()))]
    lines = []
    for place, name in enumerate(names):
        line = {"rows/s": name}
        for gpus, of_run in runs.items():
            speed, alone = of_run[place].get("rows_per_second"), runs["1"][place].get("rows_per_second")
            ratio = f" ({speed / alone:.2f} times)" if speed and alone and gpus != "1" else ""
            memory = f", {of_run[place]['peak_memory_gb']:.1f} GB" if speed else ""
            line[f"{gpus} GPU{'s' if gpus != '1' else ''}"] = f"{speed:.1f}{ratio}{memory}" if speed else "not measured"
        lines.append(line)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32, 64], help="rows a batch, in all GPUs")
    parser.add_argument("--steps", type=int, default=16, help="measured for each batch size")
    parser.add_argument("--warm_up", type=int, default=24, help="steps before these")
    parser.add_argument("--rows", type=int, default=8192, help="rows to label")
    args = parser.parse_args()
    args.data = str(Path(args.data).resolve())
    with processes.joined():
        name = f"several-gpus-{args.model or args.shape}"
        base = processes.on_first(base_model_name, args)
        lines = measure_all(args, base)
        if processes.is_first():
            file = RESULTS / f"{name}.json"
            earlier = json.loads(file.read_text())["runs"] if processes.count() > 1 and file.is_file() else {}
            runs = earlier | {str(processes.count()): lines}
            save_result(name, {"task": MAIN_TASK[args.model or args.shape], "runs": runs}, table(runs))


if __name__ == "__main__":
    main()
