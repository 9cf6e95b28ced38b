"""The four published Politosphere tables, run with train.py and evaluate.py on your copy of the data.

python benchmarks/reproduce_tables.py --data daccord_yifei_v2_leo.json --base_model_name smollm2
python benchmarks/reproduce_tables.py --show smollm2

Adapters go to models/ in the current folder, results to benchmarks/results/. Started again, it goes on with what is
missing. --show prints the results as Markdown beside the published numbers.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import merge_labels  # noqa: E402
import modeling  # noqa: E402
import train  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"

# task: (max_seq_length, {epochs: (train accuracy, train F1, validation accuracy, validation F1) as published})
TABLES = {
    "politosphere-definitions": (
        512,
        {
            10: (0.23, 0.18, 0.48, 0.41),
            20: (0.89, 0.85, 0.35, 0.30),
            50: (1.0, 1.0, 0.43, 0.37),
            100: (1.0, 1.0, 0.48, 0.47),
            200: (1.0, 1.0, 0.43, 0.39),
        },
    ),
    "politosphere": (
        256,
        {
            10: (0.22, 0.18, 0.30, 0.28),
            20: (0.39, 0.36, 0.35, 0.32),
            50: (0.87, 0.86, 0.52, 0.48),
            100: (0.9, 0.91, 0.39, 0.35),
        },
    ),
    "pol-unpol-oth": (
        512,
        {
            10: (0.73, 0.71, 0.48, 0.49),
            20: (0.98, 0.98, 0.70, 0.69),
            50: (0.98, 0.98, 0.70, 0.71),
            100: (0.98, 0.98, 0.74, 0.75),
        },
    ),
    "supp-anti-oth": (
        512,
        {
            10: (0.60, 0.50, 0.70, 0.63),
            20: (0.47, 0.54, 0.39, 0.43),
            50: (0.70, 0.79, 0.48, 0.53),
            100: (0.72, 0.83, 0.43, 0.47),
        },
    ),
}


def call(main, *options):
    """Run one of the scripts; stop where it fails, its line has said why."""
    code = main([str(option) for option in options])
    if code:
        raise SystemExit(code)


def labelled_file(task, data):
    """Return the file with the task's labels: `data` itself, or its merge."""
    if task not in merge_labels.SCHEMES:
        return data
    merged = modeling.MODELS / merge_labels.default_output(data, task).name
    merged.parent.mkdir(exist_ok=True)
    call(merge_labels.main, data, "--scheme", task, "--output", merged, "--overwrite")
    return merged


def run_cell(task, epochs, max_seq_length, data, base_model_name):
    """Train and evaluate one line of a table, unless models/ holds it already; return its numbers."""
    name = f"table-{Path(base_model_name).name}-{task}-epoch{epochs}"
    folder = modeling.MODELS / name
    if not (folder / "run.json").is_file():
        options = ["--task", task, "--dataset_name", data, "--epoch", epochs, "--max_seq_length", max_seq_length]
        call(train.main, "--base_model_name", base_model_name, "--adapters_name", name, *options)
    if not (folder / "evaluation" / "sample" / "metrics.json").is_file():
        call(evaluate.main, "--adapters_name", name)
    run = json.loads((folder / "run.json").read_text())
    metrics = json.loads((folder / "evaluation" / "sample" / "metrics.json").read_text())
    return {
        "epochs": epochs,
        **{
            split: {key: values[key] for key in ("n", "accuracy", "macro_f1", "invalid")}
            for split, values in metrics.items()
        },
        **{key: run[key] for key in ("seconds", "peak_memory_gb", "device", "versions")},
    }


def run_table(task, data, base_model_name):
    """Run one table and write its results after each line."""
    max_seq_length, lines = TABLES[task]
    file = labelled_file(task, data)
    cells = []
    RESULTS.mkdir(exist_ok=True)
    for epochs in lines:
        cells.append(run_cell(task, epochs, max_seq_length, file, base_model_name))
        result = {"task": task, "base_model_name": base_model_name, "max_seq_length": max_seq_length, "lines": cells}
        path = RESULTS / f"tables-{Path(base_model_name).name}-{task}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


def show(model):
    """Print the results in benchmarks/results/ as Markdown, each line beside the published one."""
    for task, (max_seq_length, lines) in TABLES.items():
        file = RESULTS / f"tables-{model}-{task}.json"
        if not file.is_file():
            continue
        cells = json.loads(file.read_text())["lines"]
        print(f"\n**{task}** (max_seq_length {max_seq_length}, {cells[0]['device']})\n")
        print("| epochs | train accuracy | train F1 | val. accuracy | val. F1 | invalid, train + val. |")
        print("| --- | --- | --- | --- | --- | --- |")
        for cell in cells:
            scores = [cell[split][key] for split in ("train", "validation") for key in ("accuracy", "macro_f1")]
            pairs = [f"{score:.2f} ({known:.2f})" for score, known in zip(scores, lines[cell["epochs"]], strict=True)]
            invalid = f"{cell['train']['invalid']} + {cell['validation']['invalid']}"
            print(f"| {cell['epochs']} | {' | '.join(pairs)} | {invalid} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="your copy of daccord_yifei_v2_leo.json")
    what.add_argument("--show", metavar="MODEL", help="print the results of a model as Markdown")
    parser.add_argument("--base_model_name", default="smollm2")
    parser.add_argument("--tasks", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args()
    if args.show:
        show(args.show)
        return
    for task in args.tasks:
        run_table(task, args.data, args.base_model_name)


if __name__ == "__main__":
    main()
