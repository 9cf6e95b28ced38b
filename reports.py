"""Pictures, tables and the model card."""

import pandas as pd
from huggingface_hub import ModelCardData
from matplotlib.figure import Figure


def draw_training_curves(history, path):
    """Draw training and validation loss over the epochs of `history` (a DataFrame as history.csv holds it) to a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for column, label in (("train_loss", "training"), ("eval_loss", "validation")):
        points = history.dropna(subset=[column])
        axes.plot(points["epoch"], points[column], marker="o", markersize=3, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats per answer token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def draw_confusion_matrices(labels, counts, path):
    """Draw one confusion matrix per split to a PNG; `counts` is {split: array as metrics.confusion_counts gives it}.

    Rows are the true labels, columns the predictions; the column of invalid outputs is there where there is any.
    """
    side = 1.6 + 0.62 * len(labels)
    figure = Figure(figsize=((side + 2.2) * len(counts), side + 1.6), layout="constrained")
    for axes, (split, matrix) in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts.items(), strict=True):
        columns = [*labels, "(invalid)"] if matrix[:, -1].any() else list(labels)
        matrix = matrix[:, : len(columns)]
        axes.imshow(matrix, cmap="Blues", vmin=0)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{split} ({matrix.sum()} rows)")
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                color = "white" if value > matrix.max() / 2 else "black"
                axes.text(column, row, str(value), ha="center", va="center", color=color)
    figure.savefig(path, dpi=150)


def results_table(results):
    """Return the table that evaluate.py prints; `results` is {decoding: {split: metrics}}."""
    short = {"train": "Train.", "validation": "Val."}
    lines = []
    for decoding, splits in results.items():
        line = {"decoding": decoding}
        for split, metrics in splits.items():
            line[f"Accuracy on {short[split]}"] = f"{metrics['accuracy']:.4f}"
            line[f"F1-score on {short[split]}"] = f"{metrics['macro_f1']:.4f}"
            line[f"Invalid on {short[split]}"] = f"{metrics['invalid']} of {metrics['n']}"
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def model_card(run, history):
    """Return the adapter's README.md as text, from run.json's dict and the history DataFrame."""
    options, task, data = run["options"], run["task"], run["data"]
    metadata = ModelCardData(
        base_model=options["base_model_name"] if run["base_model"]["revision"] else None,
        library_name="peft",
        pipeline_tag="text-classification",
        tags=["lora", "qlora", "trl", "sft"],
    )
    length = f"{options['epoch']} epochs" if options["epoch"] else f"{options['steps']} steps"
    last = history.dropna(subset=["eval_loss"]).iloc[-1]
    labels = "\n".join(f"- {label}" for label in task["labels"])
    settings = "\n".join(f"| {name} | {value} |" for name, value in options.items() if value is not None)
    pinned = run["base_model"]["package"] or f"revision {run['base_model']['revision'] or 'unknown: a local folder'}"
    return f"""---
{metadata.to_yaml()}
---

# {run["adapters_name"]}

A LoRA adapter that makes `{options["base_model_name"]}` ({pinned}, loaded in 4-bit NF4)
a text classifier for the task `{task["name"]}`. It answers with one of these labels:

{labels}

Trained for {length} on {data["train_rows"]} rows; {data["validation_rows"]} other rows were held out. Their loss at the
end was {last["eval_loss"]:.4f} nats per answer token. How often its answers are right is not in this card until
`python evaluate.py --adapters_name {run["adapters_name"]}` has measured it.

## Prompt

The prompt must be the one of training, to the letter (no space after the last bracket; one BOS in front where the
model's tokenizer has one; the answer ends with EOS):

```
[INST] <<SYS>>
{task["system_prompt"]}
<</SYS>>

Sentence: ...
{task["answer_field"]} [/INST]
```

## Settings

| option | value |
| --- | --- |
{settings}

`run.json` holds all of this with library versions, the data's fingerprint and the base model's revision;
`history.csv` holds the losses. {run["seconds"]:.0f} seconds on {run["device"]}.
"""
