"""The study's tables as it published them, and results of reproduce_tables.py beside them as Markdown. No torch.

python benchmarks/reproduce_tables.py --show smollm2
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from command_line import UserError

PUBLISHED_MODEL = "Llama-2-13b-chat"
SPLITS = ("train", "validation")
SCORES = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Table:
    """A published table: what the task asks, the study's train and validation rows, its settings, its numbers.

    `published` is {epochs: (train accuracy, train F1, validation accuracy, validation F1, invalid answers)}, with None
    where the study gives no number.
    """

    prompt: str
    rows: tuple[int, int]
    max_seq_length: int
    published: dict
    train_batch_size: int = 16
    learning_rate: float = 2e-4
    accuracy_format: str = ".2f"


_POLITOSPHERE = (90, 23)
TABLES = {
    "politosphere-definitions": Table(
        "7 labels with definitions, as published",
        _POLITOSPHERE,
        512,
        {
            10: (0.23, 0.18, 0.48, 0.41, None),
            20: (0.89, 0.85, 0.35, 0.30, "none"),
            50: (1.0, 1.0, 0.43, 0.37, "none"),
            100: (1.0, 1.0, 0.48, 0.47, "none"),
            200: (1.0, 1.0, 0.43, 0.39, "none"),
        },
    ),
    "politosphere": Table(
        "7 labels without definitions",
        _POLITOSPHERE,
        256,
        {
            10: (0.22, 0.18, 0.30, 0.28, "a few"),
            20: (0.39, 0.36, 0.35, 0.32, "a few"),
            50: (0.87, 0.86, 0.52, 0.48, "a few"),
            100: (0.9, 0.91, 0.39, 0.35, "a few"),
        },
    ),
    "pol-unpol-oth": Table(
        "3 labels with definitions",
        _POLITOSPHERE,
        512,
        {
            10: (0.73, 0.71, 0.48, 0.49, None),
            20: (0.98, 0.98, 0.70, 0.69, None),
            50: (0.98, 0.98, 0.70, 0.71, None),
            100: (0.98, 0.98, 0.74, 0.75, None),
        },
    ),
    "supp-anti-oth": Table(
        "3 labels with definitions",
        _POLITOSPHERE,
        512,
        {
            10: (0.60, 0.50, 0.70, 0.63, None),
            20: (0.47, 0.54, 0.39, 0.43, "lots"),
            50: (0.70, 0.79, 0.48, 0.53, "lots"),
            100: (0.72, 0.83, 0.43, 0.47, "lots"),
        },
    ),
    "sst2": Table(
        "2 labels, the first 100 training rows and all validation rows of SST-2",
        (100, 872),
        256,
        {  # validation rows only
            1: (None, None, None, None, "all"),
            10: (None, None, 0.9140, 0.92, "3"),
            20: (None, None, 0.9358, 0.94, "0"),
            50: (None, None, 0.9450, 0.94, "0"),
        },
        train_batch_size=50,
        accuracy_format=".2%",
    ),
}


def short_name(base_model_name):
    """Return the base model's name as it stands in the names of files and adapters."""
    return re.sub(r"[^\w.\-]", "_", Path(base_model_name).name, flags=re.ASCII)


def results_file(folder, base_model_name, task):
    """Return the path of a table's results in `folder`."""
    return folder / f"tables-{short_name(base_model_name)}-{task}.json"


def read_results(file):
    """Return the dict in a results file, or None where there is none; raise UserError where it is not that."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if all("epochs" in line for line in result["lines"]):
            return result
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); move it away") from error
    raise UserError(f"{file}: a line has no epochs; move it away")


def markdown(folder, base_model_name):
    """Return all results of a base model in `folder` as Markdown; raise UserError where there are none."""
    results = {task: read_results(results_file(folder, base_model_name, task)) for task in TABLES}
    tables = [_table(task, result) for task, result in results.items() if result]
    if not tables:
        raise UserError(f"{folder}: has no results of {base_model_name} (tables-{short_name(base_model_name)}-*.json)")
    return (
        f"Measured with {short_name(base_model_name)} (published with {PUBLISHED_MODEL}). Answers are sampled at "
        "temperature 0.8, as in the study; the last two columns are those of label scoring, which has no invalid "
        "answers.\n\n" + "\n\n".join(tables)
    )


def _table(task, result):
    """Return one table: a line for each published one, and for others in the results."""
    table, lines = TABLES[task], result["lines"]
    by_epochs = {line["epochs"]: line for line in lines}
    measured = next((line for line in lines if "train" in line), None)
    sizes = table.rows
    if measured:
        sizes = [measured[split]["n"] for split in SPLITS]
    elif "data" in result:
        sizes = [result["data"][f"{split}_rows"] for split in SPLITS]
    devices = ", ".join(sorted({line["device"] for line in lines if "device" in line}))
    about = [
        table.prompt,
        f"{sizes[0]} training and {sizes[1]} validation rows",
        f"max_seq_length {table.max_seq_length}",
        *([devices] if devices else []),
    ]
    columns = [f"{split} {score}" for split in ("train", "val.") for score in ("accuracy", "F1")]
    columns = ["epochs", *columns, "invalid, train + val.", "labels: val. accuracy", "labels: val. F1"]
    rows = [_row(table, epochs, by_epochs.get(epochs, {})) for epochs in sorted({*table.published, *by_epochs})]
    grid = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"**{task}** ({'; '.join(about)})", "", *(f"| {' | '.join(cells)} |" for cells in grid)])


def _row(table, epochs, line):
    """Return the texts of one line; `line` is that of the results, or empty where it was not run."""
    formats = (table.accuracy_format, ".2f")
    *known, known_invalid = table.published.get(epochs, (None,) * 5)
    scores = [line.get(split, {}).get(score) for split in SPLITS for score in SCORES]
    pairs = [_beside(score, other, form) for score, other, form in zip(scores, known, formats * 2, strict=True)]
    invalid = f"{line['train']['invalid']} + {line['validation']['invalid']}" if "train" in line else None
    by_labels = line.get("labels", {}).get("validation", {})
    scored = [_beside(by_labels.get(score), None, form) for score, form in zip(SCORES, formats, strict=True)]
    name = f"{epochs}, stopped: loss or weights not finite" if "failed" in line else str(epochs)
    return [name, *pairs, _beside(invalid, known_invalid, ""), *scored]


def _beside(value, published, form):
    """Return 'measured (published)', a dash for what was not measured, and no brackets for what was not published."""
    text = "–" if value is None else format(value, form)
    return text if published is None else f"{text} ({format(published, form)})"
