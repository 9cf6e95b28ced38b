"""The pictures and the HTML report, as files; the pictures also as matplotlib laid them out."""

import base64
import warnings
from html.parser import HTMLParser
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from metrics import LabelTally
from prompts import TASKS
from reports import (
    draw_comparison,
    draw_confusion_matrices,
    draw_label_counts,
    draw_reliability,
    draw_scores_over_epochs,
    write_html_report,
)

SEVEN = TASKS["politosphere"].labels
LONG = [f"opposes stricter laws on number {number}, with reasons given in the comment" for number in range(7)]
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></table><h1>Owned</h1>",
    "{{ 7*7 }}{% raw %}",
    "&lt;b&gt; &amp;",
    "\u202egnp.exe",
    "🔫🙅🏽‍♀️ السلاح خطر",
    "$x^2 and $\\frac$",
    "x" * 5000,
)
VOID = {"meta", "img"}
HARMLESS = {"lang", "charset", "http-equiv", "content", "name", "class", "role", "aria-label", "tabindex", "scope"}


@pytest.fixture
def drawn(monkeypatch):
    """A list to which every Figure is added once it is saved, laid out as in the file."""
    figures, save = [], Figure.savefig

    def saved(figure, path, dpi, **more):
        save(figure, path, dpi=dpi, **more)
        figure.set_dpi(dpi)
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def score(mean, half=0.08, sd=0.02):
    return {"mean": mean, "sd": sd, "interval": [max(mean - half, 0), min(mean + half, 1)]}


def epochs(count, top=0.8):
    shape = [1 - 0.5**number for number in range(1, count + 1)]
    return [
        {"epoch": place + 1, "accuracy": score(top * part), "macro_f1": score(0.9 * top * part), "log_loss": 2 - part}
        for place, part in enumerate(shape)
    ]


def size(path):
    """Return the PNG's width and height in pixels; fail where it is blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        grey = np.asarray(image.convert("L"))
    assert 0.5 < (grey > 250).mean() < 0.99 or (grey < 128).mean() > 0.02
    assert len(np.unique(grey)) > 20
    return grey.shape[1], grey.shape[0]


def assert_apart(boxes):
    """No two boxes overlap by more than a pixel in both directions."""
    for one, other in combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert width < 1 or height < 1, (one, other)


def assert_inside(figure, boxes):
    for box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1, box


def upright_boxes(axes):
    """The boxes of an Axes' tick labels inside its limits, its axis labels and title: all upright or turned by 90°."""
    ticks = [
        tick.label1
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in axis.get_major_ticks()
        if low <= tick.get_loc() <= high
    ]
    texts = [*ticks, axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts]
    return [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("count", [1, 2, 3, 20, 200])
@pytest.mark.parametrize("top", [0.05, 0.8, 1.0])
def test_scores_over_epochs(count, top, drawn, tmp_path):
    draw_scores_over_epochs(epochs(count, top), tmp_path / "scores.png", best=count)
    assert size(tmp_path / "scores.png") == (1050, 975)
    (figure,) = drawn
    scores, losses = figure.axes
    low, high = losses.get_xlim()
    ticks = [tick for tick in losses.get_xticks() if low <= tick <= high]
    assert 1 <= len(ticks) <= 12
    assert all(tick == int(tick) for tick in ticks)
    assert low < 1 <= count < high
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["accuracy", "macro-F1"]
    assert set(names[2:]) == {
        *("95% interval", f"epoch {count}: highest macro-F1", "± standard deviation over repeats")
    }
    boxes = [*upright_boxes(scores), *upright_boxes(losses), figure.legends[0].get_window_extent()]
    assert_apart(boxes)
    assert_inside(figure, boxes)


def test_scores_of_one_repeat_and_no_chosen_epoch(drawn, tmp_path):
    lines = epochs(3)
    for line in lines:
        line["accuracy"]["sd"] = line["macro_f1"]["sd"] = None
    draw_scores_over_epochs(lines, tmp_path / "scores.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["accuracy", "macro-F1", "95% interval"]


def test_bands_and_lines_are_the_numbers_given(drawn, tmp_path):
    lines = epochs(20)
    draw_scores_over_epochs(lines, tmp_path / "scores.png")
    scores, losses = drawn[0].axes
    assert losses.lines[0].get_ydata().tolist() == [line["log_loss"] for line in lines]
    for number, name in enumerate(("accuracy", "macro_f1")):
        drawn_line = next(line for line in scores.lines if line.get_label() == name.replace("_f1", "-F1"))
        assert drawn_line.get_ydata().tolist() == [line[name]["mean"] for line in lines]
        heights = scores.collections[2 * number].get_paths()[0].vertices[:, 1]  # a band, then its error bars
        intervals = np.array([line[name]["interval"] for line in lines])
        assert heights.min() == intervals.min()
        assert heights.max() == intervals.max()


@pytest.mark.parametrize("count", [1, 4, 8])
def test_comparison(count, drawn, tmp_path):
    names = ("fine-tuned, last epoch", "majority class", "TF-IDF + logistic regression", "zero-shot (no adapter)")
    names = [*names, "a $system with a \\frac$ that goes on and on and on", "exact", "always wrong", "another"][:count]
    means = [0.78, 0.46, 0.58, 0.33, 0.5, 1.0, 0.0, 0.9]
    systems = {
        name: {"accuracy": score(mean), "macro_f1": score(mean / 2)} for name, mean in zip(names, means, strict=False)
    }
    draw_comparison(systems, tmp_path / "comparison.png")
    assert size(tmp_path / "comparison.png") == (1350, round(150 * (1.2 + 0.6 * count)))
    (figure,) = drawn
    accuracy, macro_f1 = figure.axes
    assert [text.get_text() for text in accuracy.texts][:2] == ["0.78 [0.70, 0.86]", "0.46 [0.38, 0.54]"][:count]
    assert macro_f1.texts[0].get_text() == "0.39 [0.31, 0.47]"
    assert [" ".join(label.get_text().split()) for label in accuracy.get_yticklabels()] == names
    assert accuracy.get_xlim() == macro_f1.get_xlim() == (0, 1)
    assert accuracy.get_ylim() == macro_f1.get_ylim()
    assert accuracy.get_ylim()[0] > accuracy.get_ylim()[1]  # the first on top
    boxes = [*upright_boxes(accuracy), *(box for box in upright_boxes(macro_f1) if box.x0 > accuracy.bbox.x1)]
    assert_apart(boxes)
    assert_inside(figure, boxes)


def bins(*lines):
    return pd.DataFrame(lines, columns=["confidence", "accuracy", "rows"])


def test_reliability(drawn, tmp_path):
    out_of_fold = bins((0.37, 0.5, 2), (0.45, 0.4, 5), (0.66, 0.5, 12), (0.86, 0.75, 70), (0.97, 0.9, 250))
    draw_reliability({"out-of-fold": out_of_fold}, tmp_path / "one.png")
    draw_reliability({"train, $\\frac$": bins((1.0, 1.0, 90)), "validation": out_of_fold}, tmp_path / "two.png")
    assert size(tmp_path / "one.png") == (750, 870)
    assert size(tmp_path / "two.png") == (1410, 870)
    one, two = drawn
    assert [axes.get_title() for axes in two.axes] == ["train, $\\frac$ (90 rows)", "validation (339 rows)", "", ""]
    words = " ".join(text.get_text() for text in one.axes[0].texts)
    assert "over-confident:\nright less often" in words and "under-confident:\nright more often" in words
    points = one.axes[0].collections[-1].get_offsets()
    assert np.asarray(points).tolist() == out_of_fold[["confidence", "accuracy"]].to_numpy().tolist()
    for figure in drawn:
        assert_apart([box for axes in figure.axes for box in upright_boxes(axes)])
        assert_inside(figure, [box for axes in figure.axes for box in upright_boxes(axes)])


def test_the_histogram_puts_every_bin_where_its_confidence_lies(drawn, tmp_path):
    below = np.mean([0.7] * 3)  # 0.6999999999999998
    assert below < 0.7
    draw_reliability({"all": bins((0.65, 1, 3), (below, 1, 3), (0.93, 1, 4), (1.0, 1, 4))}, tmp_path / "bins.png")
    bars = drawn[0].axes[1].patches
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0.65, 0.75, 0.95, 0.95])
    assert [bar.get_height() for bar in bars] == [3, 3, 4, 4]


@pytest.mark.parametrize("labels", [("positive", "negative"), SEVEN, LONG, [*HOSTILE[:6], "$\\frac$"]])
@pytest.mark.parametrize("largest", [3, 140, 250_000])
def test_confusion_matrices_show_every_number_in_its_cell(labels, largest, drawn, tmp_path):
    count = len(labels)
    matrix = np.full((count, count + 1), largest // 3)
    matrix[range(count), range(count)] = largest
    matrix[:, -1] = 0
    invalid = matrix.copy()
    invalid[0, -1] = 2
    draw_confusion_matrices(labels, {"out-of-fold, 3 repeats": matrix}, tmp_path / "one.png")
    draw_confusion_matrices(labels, {"train": matrix, "validation": invalid}, tmp_path / "two.png")
    (width, height), (twice, _) = size(tmp_path / "one.png"), size(tmp_path / "two.png")
    assert 400 < width < 2000
    assert 400 < height < 2000
    assert twice == pytest.approx(2 * width, abs=2)
    one, two = drawn
    assert one.axes[0].get_title() == f"out-of-fold, 3 repeats ({matrix.sum()} rows)"
    names = ["".join(text.get_text().split()).removesuffix("…") for text in one.axes[0].get_yticklabels()]
    assert all("".join(label.split()).startswith(name) for name, label in zip(names, labels, strict=True))
    assert [len(axes.texts) for axes in two.axes] == [count**2, count * (count + 1)]
    for figure in drawn:
        for axes in figure.axes:
            cell = axes.bbox.width / len(axes.get_xticks())
            assert all(text.get_window_extent().width < 0.95 * cell for text in axes.texts)
            assert_apart([label.get_window_extent() for label in axes.get_yticklabels()])
            # Slanted labels: their lines, not the boxes around them, have to be apart.
            lines = max(label.get_text().count("\n") + 1 for label in axes.get_xticklabels())
            assert lines * 10 * 1.2 * figure.dpi / 72 < 0.9 * cell * np.sin(np.radians(40))
            assert_inside(figure, [label.get_window_extent() for label in axes.get_xticklabels()])
            assert_inside(figure, [label.get_window_extent() for label in axes.get_yticklabels()])
            assert_inside(figure, [axes.title.get_window_extent()])


class Page(HTMLParser):
    """What a browser would find: elements as (tag, attributes), texts by tag, tables as lists of rows of cells."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.tables, self.isolated = [], [], [], []
        self.open, self.stray = [], []  # elements not closed, end tags of elements that were not open
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("title", "h1", "h2", "li", "p", "figcaption"):
            self.texts.append((tag, ""))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.stray.append(tag)

    def handle_data(self, data):
        if "bdi" in self.open:
            self.tables[-1][-1][-1] += data
            self.isolated.append(data)
        elif self.open and self.open[-1] in ("title", "h1", "h2", "li", "p", "figcaption"):
            self.texts.append((self.open[-1], self.texts.pop()[1] + data))

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]


def mistakes(sentences=()):
    return pd.DataFrame(
        {"sentence": list(sentences), "label_text": "pro", "prediction": "contra"},
        columns=["sentence", "label_text", "prediction"],
    )


def written(folder, **parts):
    empty = {"title": "A report", "summary": [], "tables": [], "pictures": [], "settings": {}, "mistakes": mistakes()}
    write_html_report(folder / "report.html", **(empty | parts))
    return Page(folder / "report.html")


@pytest.fixture
def hostile(tmp_path):
    """A page in which all that a stranger can write is hostile, and the bytes of its picture."""
    draw_scores_over_epochs(epochs(3), tmp_path / "scores.png")
    everything = "".join(HOSTILE)
    table = pd.DataFrame({everything: HOSTILE, "b": 1.5})
    rows = mistakes(HOSTILE).assign(label_text=HOSTILE, prediction=HOSTILE, output=HOSTILE)
    page = written(
        tmp_path,
        title=everything,
        summary=HOSTILE,
        tables=[(everything, table, everything)],
        pictures=[(everything, tmp_path / "scores.png")],
        settings={text: text for text in HOSTILE} | {"inner": {everything: [everything, everything]}},
        mistakes=rows,
    )
    return page, (tmp_path / "scores.png").read_bytes()


def test_hostile_text_stays_text(hostile):
    page, _ = hostile
    everything = "".join(HOSTILE)
    assert page.of("title") == page.of("h1") == page.of("figcaption") == [everything]
    assert page.of("h2") == ["Summary", everything, "Pictures", "Misclassified rows", "Settings"]
    assert page.of("li") == list(HOSTILE)
    assert everything in page.of("p")
    scores, wrong, settings = page.tables
    assert scores == [[everything, "b"], *([text, "1.500"] for text in HOSTILE)]
    assert wrong[1:] == [[text] * 4 for text in HOSTILE]
    assert settings[1:] == [*([text, text] for text in HOSTILE), [f"inner.{everything}", f"{everything}, {everything}"]]


def test_no_hostile_text_becomes_an_element_or_an_attribute(hostile):
    page, _ = hostile
    assert page.open == page.stray == []
    tags = [tag for tag, _ in page.elements]
    assert set(tags) == {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "section", "h2", "ul", "li", "div", "table"),
        *("thead", "tbody", "tr", "th", "td", "bdi", "p", "figure", "img", "figcaption"),
    }
    assert (tags.count("h1"), tags.count("table"), tags.count("img"), tags.count("style")) == (1, 3, 1, 1)
    for tag, attributes in page.elements:
        assert set(attributes) <= HARMLESS | ({"src", "alt", "width"} if tag == "img" else set())


def test_the_page_needs_no_other_file(hostile, tmp_path):
    page, png = hostile
    (image,) = (attributes for tag, attributes in page.elements if tag == "img")
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data, validate=True) == png
    assert (image["alt"], image["width"]) == ("".join(HOSTILE), "700")
    text = (tmp_path / "report.html").read_text(encoding="utf-8").replace(data, "")
    assert not any(word in text for word in ("http:", "https:", "url(", "@import", "//"))


def test_the_head_says_what_a_browser_may_do(tmp_path):
    page = written(tmp_path)
    metas = [attributes for tag, attributes in page.elements if tag == "meta"]
    assert metas[0] == {"charset": "utf-8"}
    assert metas[1] == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    }
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert page.elements[0] == ("html", {"lang": "en"})


def test_cells_are_isolated_and_heads_have_a_scope(hostile):
    page, _ = hostile
    cells = [attributes for tag, attributes in page.elements if tag in ("td", "th")]
    assert len(page.isolated) >= len(cells) == [tag for tag, _ in page.elements].count("bdi")
    assert {attributes.get("scope") for tag, attributes in page.elements if tag == "th"} == {"col", "row"}
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")


def test_numbers_are_shown_with_three_decimals_and_nothing_as_a_dash(tmp_path):
    table = pd.DataFrame(
        {
            "name": ["0.80 [0.70, 0.90]", None, "", "nan"],
            "score": [0.12345, np.nan, -0.0001, 1],
            "rows": pd.array([23, None, 7, 113], dtype="Int64"),
            "count": [1, 2, 3, 4],
            "mixed": [np.float32(0.5), np.int64(3), True, pd.NaT],
        },
        index=[5, 6, 7, 8],
    )
    page = written(tmp_path, tables=[("Scores", table, "")])
    assert page.tables[0] == [
        ["name", "score", "rows", "count", "mixed"],
        ["0.80 [0.70, 0.90]", "0.123", "23", "1", "0.500"],
        ["–", "–", "–", "2", "3"],
        ["", "0.000", "7", "3", "True"],
        ["nan", "1.000", "113", "4", "–"],
    ]


def test_settings_are_flattened_and_left_as_they_are(tmp_path):
    settings = {
        "learning_rate": 2e-4,
        "steps": None,
        "lora_target_modules": ["q_proj", "v_proj"],
        "versions": {"torch": "2.13.0", "inner": {"deep": False}},
        "none": {},
        7: (),
    }
    assert written(tmp_path, settings=settings).tables[-1] == [
        ["option", "value"],
        ["learning_rate", "0.0002"],
        ["steps", "–"],
        ["lora_target_modules", "q_proj, v_proj"],
        ["versions.torch", "2.13.0"],
        ["versions.inner.deep", "False"],
        ["none", "–"],
        ["7", "–"],
    ]


def paragraph(page):
    return " ".join(page.of("p")[-1].split())


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (1, "1 row was misclassified."),
        (500, "500 rows were misclassified."),
        (501, "501 rows were misclassified. The first 500 are listed here; 1 more are not."),
        (1234, "1234 rows were misclassified. The first 500 are listed here; 734 more are not."),
    ],
)
def test_the_first_500_mistakes_are_listed(count, sentence, tmp_path):
    page = written(tmp_path, mistakes=mistakes(f"sentence {number}" for number in range(count)))
    assert paragraph(page) == sentence
    table = page.tables[0]
    assert len(table) == 1 + min(count, 500)
    assert table[0] == ["sentence", "label_text", "prediction"]
    assert table[-1] == [f"sentence {min(count, 500) - 1}", "pro", "contra"]


def test_a_report_without_mistakes_or_pictures_says_so(tmp_path):
    page = written(tmp_path)
    assert paragraph(page) == "No row was misclassified."
    assert page.of("h2") == ["Summary", "Misclassified rows", "Settings"]
    assert page.tables == [[["option", "value"]]]


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    """As in a file name that is not UTF-8."""
    page = written(tmp_path, title="a \udcff b", summary=["\ud83d"], settings={"dataset_name": "\udcff.jsonl"})
    assert page.of("h1") == ["a ? b"]
    assert page.of("li") == ["?"]
    assert page.tables[-1][1] == ["dataset_name", "?.jsonl"]


def test_parts_stand_in_order(tmp_path):
    draw_comparison({"one": {"accuracy": score(0.5), "macro_f1": score(0.4)}}, tmp_path / "one.png")
    draw_scores_over_epochs(epochs(1), tmp_path / "two.png")
    page = written(
        tmp_path,
        summary=["It is right half the time.", "So is a coin."],
        tables=[("First", pd.DataFrame({"a": [1]}), "a note"), ("Second", pd.DataFrame({"b": [2]}), "")],
        pictures=[("Systems", tmp_path / "one.png"), ("Epochs", tmp_path / "two.png")],
    )
    assert page.of("h2") == ["Summary", "First", "Second", "Pictures", "Misclassified rows", "Settings"]
    assert page.of("li") == ["It is right half the time.", "So is a coin."]
    assert page.of("p") == ["a note", "No row was misclassified."]
    images = [attributes["src"].partition(",")[2] for tag, attributes in page.elements if tag == "img"]
    assert [base64.b64decode(data) for data in images] == [
        (tmp_path / name).read_bytes() for name in ("one.png", "two.png")
    ]


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        (["pro", "contra", "other"], ["2024-01", "2024-02"]),
        (LONG, ["a"]),
        ([f"label {number}" for number in range(45)], ["a", "b"]),
        (["pro $x^2$", "枪 \x1b[2J"], [f"r/{name} {name}" for name in [*LONG, *map(str.upper, LONG)]]),
    ],
)
def test_label_counts(labels, groups, drawn, tmp_path):
    tally = LabelTally(labels, ["a column"])
    for label, group in product([*labels, None], groups):
        reason = None if label else "empty"
        tally.add({"prediction": label, "probability": 0.5, "reason": reason, "a column": group})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_label_counts(tally.summary(), tmp_path / "counts.png")
    assert size(tmp_path / "counts.png")[0] == 1350
    (figure,) = drawn
    (legend,) = figure.legends
    boxes = [*legend.get_texts(), *legend.get_patches()]
    boxes = [*(box.get_window_extent() for box in boxes), *(box for axes in figure.axes for box in upright_boxes(axes))]
    assert len(boxes) > 3 * len(labels) + len(groups)
    assert_apart(boxes)
    assert_inside(figure, boxes)
    styles = [(patch.get_facecolor(), patch.get_hatch()) for patch in legend.get_patches()]
    assert len(set(styles)) == len(styles) == len(labels) + 1
    assert all(max(color[:3]) - min(color[:3]) > 0.05 for color, _ in styles[:-1]), "gray is for rows without a label"
    assert styles[-1][1], "and hatched"
