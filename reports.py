"""Pictures, tables and the model card."""

import pandas as pd
from huggingface_hub import ModelCardData
from matplotlib.figure import Figure


def draw_training_curves(history, path):
    """Draw losses and, below them, scores over the epochs of `history` (as history.csv holds it) to a PNG.

    Accuracy and macro-F1 are those of label scoring; the epoch with the highest validation macro-F1 is marked.
    """
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    for split, name, color in (("train", "training", "tab:blue"), ("eval", "validation", "tab:orange")):
        style = {"color": color, "marker": "o", "markersize": 3}
        points = history.dropna(subset=[f"{split}_loss"])
        losses.plot(points["epoch"], points[f"{split}_loss"], label=name, **style)
        points = history.dropna(subset=["eval_macro_f1"])
        scores.plot(points["epoch"], points[f"{split}_macro_f1"], label=f"{name}, macro-F1", **style)
        scores.plot(points["epoch"], points[f"{split}_accuracy"], label=f"{name}, accuracy", linestyle="--", **style)
    best = best_line(history)
    for axes in (losses, scores):
        axes.axvline(best["epoch"], color="gray", linestyle=":", label=f"best epoch: {best['epoch']:g}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    scores.plot(best["epoch"], best["eval_macro_f1"], color="tab:orange", marker="*", markersize=14)
    losses.set_ylabel("loss (nats per answer token)")
    scores.set_ylabel("score")
    scores.set_ylim(top=1.03)
    scores.set_xlabel("epoch")
    losses.legend()
    scores.legend()
    figure.savefig(path, dpi=150)


def best_line(history):
    """Return the line of `history` with the highest validation macro-F1, the first of equals."""
    return history.loc[history["eval_macro_f1"].idxmax()]


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
    if options["early_stopping_patience"]:
        length = f"at most {length} (until {history['epoch'].iloc[-1]:g} epochs, {run['steps']} steps)"
    kept = history.set_index("step").loc[run["kept_step"]]
    chosen = ""
    if options["keep"] == "best":
        chosen = """
This adapter is the one of all evaluated that scored best on the validation rows: its score on those same rows is
**optimistic**, and other sentences will probably give a lower one.
"""
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

Trained for {length} on {data["train_rows"]} rows; {data["validation_rows"]} other rows were held out. Saved after
epoch {kept["epoch"]:g} (step {run["kept_step"]}). On the rows held out, with the most probable label as the answer:
accuracy {kept["eval_accuracy"]:.4f}, macro-F1 {kept["eval_macro_f1"]:.4f}, loss {kept["eval_loss"]:.4f} nats per answer
token.
{chosen}
`python evaluate.py --adapters_name {run["adapters_name"]}` measures more, generated answers among them.

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
`history.csv` holds losses and scores. {run["seconds"]:.0f} seconds on {run["device"]}.
"""
