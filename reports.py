"""Pictures, tables, the model card and the HTML report.

Labels, sentences and names are text of strangers: in pictures a $ starts no formula, in HTML everything is escaped.
"""

import base64
import math
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from command_line import printable
from metrics import CALIBRATION_BINS

SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
WIDE = 0.2  # an interval as wide as that says little
FEW = (
    6  # rows that differ: five, all in one direction, come about by chance in 1 of 16 cases (sign test), six in 1 of 32
)
MISTAKES_SHOWN = 500
BAR, LEGEND_COLUMNS = 0.22, 3  # a bar's height in inches, of the label counts


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
    names = [_wrapped(label, 25) for label in labels]
    lines = 1 + max(name.count("\n") for name in names)
    # Inches a cell: three lines of a slanted label need more.
    side = 1.6 + max(0.62, 0.27 * lines) * len(labels)
    figure = Figure(figsize=((side + 2.2) * len(counts), side + 1.6), layout="constrained")
    for axes, (split, matrix) in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts.items(), strict=True):
        columns = [*names, "(invalid)"] if matrix[:, -1].any() else names
        matrix = matrix[:, : len(columns)]
        axes.imshow(matrix, cmap="Blues", vmin=0)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{split} ({matrix.sum()} rows)", parse_math=False)
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                color = "white" if value > matrix.max() / 2 else "black"
                axes.text(column, row, str(value), ha="center", va="center", color=color)
    figure.savefig(path, dpi=150)


def draw_scores_over_epochs(epochs, path, best=None):
    """Draw the scores of a cross-validation's held-out rows and, below them, the log loss over the epochs to a PNG.

    `epochs` is a list of {"epoch", "accuracy": {"mean", "sd", "interval": [low, high]}, "macro_f1": the same,
    "log_loss": nats}; `sd` is over the repeats and may be None. A line marks epoch `best`.
    """
    numbers = np.array([line["epoch"] for line in epochs], dtype=float)
    every = math.ceil(len(epochs) / 25)
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    scores, losses = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    marker = "o" if len(epochs) <= 50 else None
    # A tenth of an epoch to the left and to the right: the two scores are often close.
    for place, (score, color) in enumerate(zip(SCORES, ("tab:blue", "tab:orange"), strict=True)):
        x = numbers + 0.2 * place - 0.1
        mean, sd = (np.array([line[score][name] for line in epochs], dtype=float) for name in ("mean", "sd"))
        low, high = np.array([line[score]["interval"] for line in epochs], dtype=float).T
        scores.plot(x, mean, color=color, marker=marker, markersize=4, label=SCORES[score])
        # One epoch's band would have no width.
        band = (x, low, high) if len(epochs) > 1 else ([x[0] - 0.05, x[0] + 0.05], [low[0]] * 2, [high[0]] * 2)
        scores.fill_between(*band, color=color, alpha=0.17, linewidth=0)
        bars = {"fmt": "none", "elinewidth": 1, "capsize": 2}
        scores.errorbar(x, mean, sd, ecolor=color, errorevery=(place * (every // 2), every), **bars)
    scores.fill_between([], [], color="gray", alpha=0.3, linewidth=0, label="95% interval")
    if np.isfinite(sd).any():
        scores.errorbar([], [], [], ecolor="gray", label="± standard deviation over repeats", **bars)
    log_loss = np.array([line["log_loss"] for line in epochs], dtype=float)
    losses.plot(numbers, log_loss, color="dimgray", marker=marker, markersize=4)
    if best is not None:
        for axes, label in ((scores, f"epoch {best}: highest macro-F1"), (losses, None)):
            axes.axvline(best, color="black", linewidth=1.2, linestyle=":", label=label)
    scores.set(ylabel="score on held-out rows", ylim=(-0.02, 1.02))
    losses.set(xlabel="epoch", ylabel="log loss (nats)", xlim=(numbers[0] - 0.5, numbers[-1] + 0.5))
    losses.set_ylim(0, 1.15 * log_loss.max())
    losses.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (scores, losses):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def draw_comparison(systems, path):
    """Draw accuracy and macro-F1 of several systems, each with its 95% interval, to a PNG.

    `systems` is {name: {"accuracy": {"mean", "interval": [low, high]}, "macro_f1": the same}} from top to bottom; the
    first is the fine-tuned model, and a thin line continues its score to the others.
    """
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(systems)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, score in zip(panels, SCORES, strict=True):
        for place, system in enumerate(systems.values()):
            color = "dimgray" if place else "tab:blue"
            mean, (low, high) = system[score]["mean"], system[score]["interval"]
            axes.plot([low, high], [place, place], color=color, linewidth=2, clip_on=False)
            axes.plot(mean, place, color=color, marker="o", markersize=7, clip_on=False)
            # The text is a third of the panel wide and stays inside.
            text, center = f"{mean:.2f} [{low:.2f}, {high:.2f}]", min(max(mean, 0.17), 0.83)
            box = {"facecolor": "white", "linewidth": 0, "pad": 1}
            axes.text(center, place - 0.18, text, ha="center", va="bottom", color=color, fontsize=9, bbox=box)
        first = next(iter(systems.values()))[score]["mean"]
        axes.plot([first, first], [0, len(systems)], color="tab:blue", linewidth=0.8, alpha=0.4, zorder=0)
        axes.set(xlabel=SCORES[score], xlim=(0, 1))
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(systems)), [_wrapped(name, 30) for name in systems], parse_math=False)
    panels[0].set_ylim(len(systems) - 0.5, -0.7)
    figure.get_layout_engine().set(w_pad=0.12)
    figure.supxlabel("point: estimate, line: 95% interval", fontsize=9, color="dimgray")
    figure.savefig(path, dpi=150)


def draw_reliability(bins, path):
    """Draw a reliability diagram (Guo et al. 2017, arXiv:1706.04599) and the rows behind it per title to a PNG.

    `bins` is {title: DataFrame of confidence (the mean), accuracy, rows}, one line per non-empty bin of ten of equal
    width. A point's area grows with its rows: a point of two or three rows says little.
    """
    figure = Figure(figsize=(0.6 + 4.4 * len(bins), 5.8), layout="constrained")
    panels = figure.subplots(2, len(bins), sharex=True, squeeze=False, height_ratios=(3, 1))
    for (scores, histogram), (title, table) in zip(panels.T, bins.items(), strict=True):
        confidence, accuracy, rows = (table[name].to_numpy(dtype=float) for name in ("confidence", "accuracy", "rows"))
        scores.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
        scores.fill_between([0, 1], [0, 1], color="tab:red", alpha=0.06, linewidth=0)
        scores.text(0.97, 0.03, "over-confident:\nright less often\nthan it says", ha="right", color="dimgray")
        scores.text(0.03, 0.97, "under-confident:\nright more often\nthan it says", va="top", color="dimgray")
        scores.vlines(confidence, confidence, accuracy, color="tab:blue", linewidth=1)
        area = 15 + 160 * rows / rows.max(initial=1)
        scores.scatter(confidence, accuracy, s=area, color="tab:blue", alpha=0.85, clip_on=False, zorder=3)
        # The mean of equal confidences may lie an ulp below the edge that they lie on.
        places = np.minimum(np.floor(confidence * CALIBRATION_BINS + 1e-9), CALIBRATION_BINS - 1)
        bars = histogram.bar(
            (places + 0.5) / CALIBRATION_BINS, rows, width=0.9 / CALIBRATION_BINS, color="tab:gray", alpha=0.6
        )
        histogram.bar_label(bars, [f"{count:g}" for count in rows], fontsize=8, padding=1)
        scores.set_title(f"{_wrapped(title, 40)} ({rows.sum():g} rows)", parse_math=False)
        scores.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy (share that is right)")
        scores.grid(alpha=0.3)
        histogram.set(xlabel="confidence (probability of the predicted label)", ylabel="rows")
        histogram.set_xticks(np.linspace(0, 1, 6))
        histogram.set_ylim(top=1.2 * rows.max(initial=1))
    figure.savefig(path, dpi=150)


def draw_label_counts(summary, path):
    """Draw how many rows got which label, and for every `by` column the labels' shares in its groups, to a PNG.

    `summary` is the dict of `metrics.LabelTally.summary`; rows without a label are gray and hatched.
    """
    labels = [*summary["labels"], "(no label)"]
    styles = _label_styles(len(summary["labels"]))
    tables = summary["by"].values()
    names = [[_wrapped(printable(label), 40) for label in labels]]
    names += [[f"{_wrapped(printable(line['group']), 40)} ({line['rows']:,})" for line in lines] for lines in tables]
    places = [_places(each) for each in names]
    entries = [_wrapped(printable(label), 30) for label in labels] if summary["by"] else []
    heights = [0.9 + ends[-1] for _, ends in places]
    legend = 0.3 + sum(0.18 * (1 + entry.count("\n")) + 0.1 for entry in entries) / LEGEND_COLUMNS
    figure = Figure(figsize=(9, sum(heights) + legend), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    rows = [*(numbers["rows"] for numbers in summary["labels"].values()), sum(summary["unlabelled"].values())]
    for place, count, style in zip(places[0][0], rows, styles, strict=True):
        bars = panels[0].barh(place, count, BAR, **style)
        panels[0].bar_label(bars, [f"{count:,}"], fontsize=8, padding=2)
    panels[0].set(xlabel="rows", xlim=(0, 1.12 * max(1, *rows)), title=f"{summary['rows']:,} rows")
    for axes, (column, lines), (middles, _) in zip(panels[1:], summary["by"].items(), places[1:], strict=True):
        counts = np.array([[*line["labels"].values(), line["unlabelled"]] for line in lines], dtype=float)
        shares = counts / counts.sum(axis=1, keepdims=True)
        lefts = shares.cumsum(axis=1) - shares
        for part, style in enumerate(styles):
            axes.barh(middles, shares[:, part], BAR, left=lefts[:, part], **style)
        axes.set(xlabel="share of the group's rows", xlim=(0, 1))
        axes.set_title(f"by {_wrapped(printable(column), 60)} (rows)", parse_math=False)
    for axes, of_panel, (middles, ends) in zip(panels, names, places, strict=True):
        axes.set_yticks(middles, of_panel, parse_math=False, fontsize=9)
        axes.set_ylim(ends[-1], 0)
    if entries:
        handles = [Patch(**style) for style in styles]
        place = {"loc": "outside lower center", "ncols": LEGEND_COLUMNS, "frameon": False, "fontsize": 9}
        for text in figure.legend(handles, entries, **place).get_texts():
            text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes stand for them
        figure.savefig(path, dpi=150, format="png")


def _label_styles(count):
    """Return the styles of so many labels' bars and of those without a label: no two look alike."""
    palette = colormaps["tab10" if count < 10 else "tab20"].colors
    palette = [color for color in palette if len(set(color)) > 1]  # gray is for rows without a label
    hatches = ("", "///", "...", "xxx", "ooo")
    styles = [
        {"facecolor": palette[place % len(palette)], "hatch": hatches[place // len(palette) % len(hatches)]}
        for place in range(count)
    ]
    line = {"edgecolor": "white", "linewidth": 0}
    return [*(style | line for style in styles), {"facecolor": "lightgray", "hatch": "\\\\\\"} | line]


def _places(names):
    """Return the middles and the ends of bars with these names, in inches from the top, with room for all lines."""
    heights = np.array([max(0.3, 0.12 + 0.155 * (1 + name.count("\n"))) for name in names])
    ends = heights.cumsum()
    return ends - heights / 2, ends


def group_table(lines, column):
    """Return the DataFrame of texts that shows a `by` column's groups, as `metrics.LabelTally.summary` gives them."""
    heads = [column, "rows", *lines[0]["labels"], "(no label)", "mean probability"]  # which need not be distinct
    rows = [
        [
            printable(line["group"]),
            line["rows"],
            *line["labels"].values(),
            line["unlabelled"],
            "–" if line["mean_probability"] is None else f"{line['mean_probability']:.3f}",
        ]
        for line in lines
    ]
    return pd.DataFrame(rows, columns=list(map(printable, heads)))


def _wrapped(text, width):
    """Return `text` in up to three lines of `width` characters; what is longer is cut."""
    return textwrap.fill(str(text), width, max_lines=3, placeholder=" …", break_on_hyphens=False)


def write_html_report(path, *, title, summary, tables, pictures, settings, mistakes):
    """Write one HTML file that needs no other: no script, no link, and all text of strangers escaped.

    `summary` is a list of sentences; `tables` a list of (heading, DataFrame, note or ""), shown without their index;
    `pictures` a list of (caption, path of a PNG); `settings` a dict, in which dicts may lie; `mistakes` a DataFrame of
    misclassified rows with sentence, label_text, prediction and any other columns.
    """
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = template.from_string(REPORT).render(
        title=title,
        summary=summary,
        tables=[(heading, _shown(table), note) for heading, table, note in tables],
        pictures=[(caption, *_embedded(Path(file).read_bytes())) for caption, file in pictures],
        settings=([("option", "text"), ("value", "text")], _flat(settings)),
        mistakes=_shown(mistakes.head(MISTAKES_SHOWN)),
        mistakes_count=len(mistakes),
    )
    # Half a surrogate pair, which no file can hold, becomes a question mark.
    Path(path).write_text(text, encoding="utf-8", errors="replace", newline="\n")


def _embedded(png):
    """Return (base64, width in CSS pixels) of a PNG's bytes; bytes 16 to 20 are its width in pixels.

    At 150 pixels an inch the pictures would fill the page; two thirds of that give text of the page's size.
    """
    return base64.b64encode(png).decode(), int.from_bytes(png[16:20]) * 2 // 3


def _shown(table):
    """Return ([(column, CSS class)], rows) of a DataFrame; a row is a list of texts."""
    columns = [(str(name), _kind(name, table.iloc[:, place])) for place, name in enumerate(table.columns)]
    return columns, [[_text(value) for value in line] for line in table.itertuples(index=False, name=None)]


def _kind(name, values):
    if name == "sentence":
        return "sentence"
    values = values.dropna()
    return "number" if len(values) and all(isinstance(value, (int, float, np.number)) for value in values) else "text"


def _text(value):
    """Return a cell's text: floats with 3 decimals, a dash where there is no value."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, (float, np.floating)):
        return f"{value:z.3f}"
    return str(value)


def _flat(settings, prefix=""):
    """Return [(option, text)], a dict's own options with its name and a dot in front."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            lines += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            lines.append((f"{prefix}{name}", ", ".join(map(str, value)) or "–"))
        else:
            lines.append((f"{prefix}{name}", "–" if value is None or value == {} else str(value)))
    return lines


def results_table(results):
    """Return the table that evaluate.py prints; `results` is {decoding: {split: metrics}}."""
    short = {"train": "Train.", "validation": "Val."}
    lines = []
    for decoding, splits in results.items():
        line = {"decoding": decoding}
        for split, metrics in splits.items():
            line[f"Accuracy on {short[split]}"] = with_interval(metrics["accuracy"], metrics["accuracy_interval"])
            line[f"F1-score on {short[split]}"] = with_interval(metrics["macro_f1"], metrics["macro_f1_interval"])
            line[f"Invalid on {short[split]}"] = f"{metrics['invalid']} of {metrics['n']}"
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def with_interval(score, interval):
    """Return a score and its interval [low, high] as text: '0.681 [0.593, 0.761]'."""
    low, high = interval
    return f"{score:.3f} [{low:.3f}, {high:.3f}]"


def systems_table(systems, first="system"):
    """Return a DataFrame of texts with a line per system; `systems` as `metrics.scored_systems` gives them.

    `first` is the heading of the column of their names; ± is the standard deviation over the repeats.
    """
    lines = []
    for name, numbers in systems.items():
        line = {first: name}
        for place, (score, title) in enumerate(SCORES.items()):
            line[title] = with_interval(numbers[score]["mean"], numbers[score]["interval"])
            if numbers[score]["sd"] is not None:
                line["±" + " " * place] = f"{numbers[score]['sd']:.3f}"  # two columns of one heading
        for key, title in (("log_loss", "log loss"), ("expected_calibration_error", "calibration error")):
            line[title] = f"{numbers[key]:.3f}" if key in numbers else "–"
        if any(each["invalid"] for each in systems.values()):
            line["no label"] = str(numbers["invalid"])
        lines.append(line)
    return pd.DataFrame(lines).fillna("–")


def score_sentence(name, numbers):
    """Return a system's two scores with their 95% intervals as a sentence."""
    parts = []
    for score, title in SCORES.items():
        low, high = numbers[score]["interval"]
        parts.append(f"{title} {numbers[score]['mean']:.3f} (95% interval {low:.3f} to {high:.3f})")
    return f"{name[0].upper()}{name[1:]}: {', '.join(parts)}."


def comparison_sentences(name, others, rows):
    """Return a sentence for each of `others`, {name: numbers with a difference}: can `rows` rows tell them apart?"""
    sentences = []
    for other, numbers in others.items():
        told, parts = [], []
        for score, title in SCORES.items():
            difference = numbers["difference"][score]
            low, high = difference["interval"]
            direction = "higher" if difference["mean"] > 0 else "lower"
            by = f"{abs(difference['mean']):.3f} {direction}" if difference["mean"] else "the same"
            parts.append(f"{title} is {by} (95% interval of the difference {low:+.3f} to {high:+.3f})")
            if low > 0 or high < 0:
                told.append(title)
        if 0 < numbers["difference"]["rows"] < FEW:
            verdict = f"they differ in only {numbers['difference']['rows']} rows, too few to tell the two apart"
        elif not told:
            verdict = f"these {rows} rows cannot tell the two apart"
        else:
            verdict = f"these {rows} rows tell the two apart" + (f" by {told[0]} only" if len(told) == 1 else "")
        sentences.append(f"{name[0].upper()}{name[1:]}, against {other}: {' and '.join(parts)}: {verdict}.")
    return sentences


def interval_notes(name, numbers, rows):
    """Return a sentence for each interval of a system that is wider than 0.2, or one where they have no width."""
    name = f"{name[0].upper()}{name[1:]}"
    widths = {score: numbers[score]["interval"][1] - numbers[score]["interval"][0] for score in SCORES}
    if widths["accuracy"] == 0:
        what = {0: "wrong", 1: "right"}.get(numbers["accuracy"]["mean"], "alike")
        # The rule of three: 0 of n seen, so with 95% confidence fewer than 3 in n (Hanley and Lippman-Hand 1983).
        return [
            f"{name}: all {rows} rows are {what}, so the bootstrap sees no spread; up to {min(1, 3 / rows):.0%} of "
            "other rows may be different all the same (rule of three)."
        ]
    return [
        f"{name}: the interval of {SCORES[score]} is {width:.2f} wide; {rows} rows are too few to say it more exactly."
        for score, width in widths.items()
        if width > WIDE
    ]


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


REPORT = """\
{% macro grid(name, columns, rows, row_heads) %}
<div class="scroll" role="region" aria-label="{{ name }}" tabindex="0">
<table>
<thead><tr>
{% for column, kind in columns %}
<th scope="col" class="{{ kind }}"><bdi>{{ column }}</bdi></th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr>
{% for text in row %}
{% if row_heads and loop.first %}
<th scope="row" class="{{ columns[loop.index0][1] }}"><bdi>{{ text }}</bdi></th>
{% else %}
<td class="{{ columns[loop.index0][1] }}"><bdi>{{ text }}</bdi></td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #f3f5f7; --line: #d3d8de; --dim: #57606a;
  --widest: 32rem; }
@media (max-width: 40rem) { :root { --widest: 16rem; } }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --page: #14171a; --soft: #1f2429; --line: #3b424a; --dim: #a3acb6; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.note, figcaption { color: var(--dim); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .925rem; overflow-wrap: normal; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--soft); vertical-align: bottom; }
bdi { display: inline-block; max-width: var(--widest); overflow-wrap: break-word; white-space: pre-line; }
tbody bdi { width: max-content; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; padding: .5rem; background: #fff; border: 1px solid var(--line); }
figcaption { margin-top: .4rem; }
@media print {
  :root { color-scheme: light; --text: #000; --page: #fff; --soft: #eee; --line: #bbb; --dim: #444; }
  main { max-width: none; padding: 0; }
  table { font-size: 8pt; }
  .scroll { overflow: visible; }
  tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<section>
<h2>Summary</h2>
<ul>
{% for sentence in summary %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
</section>
{% for heading, (columns, rows), note in tables %}
<section>
<h2>{{ heading }}</h2>
{{ grid(heading, columns, rows, true) }}
{% if note %}
<p class="note">{{ note }}</p>
{% endif %}
</section>
{% endfor %}
{% if pictures %}
<section>
<h2>Pictures</h2>
{% for caption, data, width in pictures %}
<figure>
<img src="data:image/png;base64,{{ data }}" width="{{ width }}" alt="{{ caption }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
</section>
{% endif %}
<section>
<h2>Misclassified rows</h2>
{% if mistakes_count %}
<p>{{ mistakes_count }} {{ "row was" if mistakes_count == 1 else "rows were" }} misclassified.
{% if mistakes_count > mistakes[1] | length %}
The first {{ mistakes[1] | length }} are listed here; {{ mistakes_count - mistakes[1] | length }} more are not.
{% endif %}
</p>
{{ grid("Misclassified rows", mistakes[0], mistakes[1], false) }}
{% else %}
<p>No row was misclassified.</p>
{% endif %}
</section>
<section>
<h2>Settings</h2>
{{ grid("Settings", settings[0], settings[1], true) }}
</section>
</main>
</body>
</html>
"""
