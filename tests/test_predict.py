"""predict.py as a user runs it: files in and out, killed and resumed, in one process and in two."""

import bz2
import csv
import datetime
import decimal
import errno
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPOSITORY, train_on_words, write_json_lines
from hub_server import HubServer
from hub_server import run as run_logged_in
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP

import evaluate
import predict
import prompts
import shared_prefix
import unfinished as unfinished_output
from checkpoints import held

KILLS = int(os.environ.get("KILLS", "3"))  # make soak: 20
LABELS = ("positive", "negative")


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """A folder with words.jsonl and models/tiny, which is not sure of its labels: their probabilities differ."""
    folder = tmp_path_factory.mktemp("predict")
    train_on_words(folder, tiny_base, "--steps", "4", "--learning_rate", "5e-3", "--max_seq_length", "128")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert evaluate.main(["--adapters_name", "tiny", "--decoding", "labels"]) == 0
    return folder


@pytest.fixture
def work(adapter, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(adapter, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def options(source, output, *more):
    return ["--adapters_name", "tiny", "--input", str(source), "--output", str(output), *map(str, more)]


def run(source, output, *more, code=0):
    assert predict.main(options(source, output, *more)) == code
    return Path(output)


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def summary_of(output):
    return json.loads(Path(f"{str(output).split('.')[0]}.summary.json").read_text())


def texts(count, seed=1):
    """Return so many distinct texts of very different lengths, in no order."""
    chance = random.Random(seed)
    words = ("good", "bad", "film", "Waffe", "naïve", "枪")
    return [" ".join(chance.choices(words, k=chance.randrange(1, 30))) + f" {number}" for number in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Formats

PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
UNPACKED = {
    "": bytes,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": lambda data: pa.CompressedInputStream(pa.BufferReader(data), "zstd").read(),
}
RECORDS = [
    {"id": 7, "text": 'good, "quoted"\nand a second line\r\nthird', "score": None, "share": 0.1, "tags": ["a", "b"]},
    {"id": 2**60, "text": "bad\u2028 separator, ü 枪 😀", "score": 3, "share": 1e-9, "tags": []},
    {"id": -1, "text": "  good \t", "score": 4, "share": -2.5, "tags": ["\x85"]},
]
CSV_RECORDS = [
    {"id": "007", "text": 'good, "quoted"\nand a second line\r\nthird', "empty": "", "NA": "NA", "number": "1.50"},
    {"id": "8", "text": "bad\u2028 separator, ü 枪 😀\rx", "empty": "", "NA": "null", "number": "1e3"},
]


def parts(ending):
    packed = next((packed for packed in PACKED if packed and ending.endswith(packed)), "")
    return ending.removesuffix(packed), packed


def write(path, records, ending):
    kind, packed = parts(ending)
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return
    text = io.StringIO()
    if kind == ".csv":
        writer = csv.DictWriter(text, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    else:
        text.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    path.write_bytes(PACKED[packed](text.getvalue().encode()))


def read(path, ending):
    kind, packed = parts(ending)
    if kind == ".parquet":
        return pq.read_table(path).to_pylist()
    data = UNPACKED[packed](path.read_bytes()).decode()
    if kind == ".csv":
        return list(csv.DictReader(io.StringIO(data, newline=""), strict=True))
    return [json.loads(line) for line in data.split("\n") if line]


def expected_values(records, ending):
    """Return what the values are in a file of that ending."""
    if ".csv" not in ending:
        return records
    return [{name: as_text(value) for name, value in record.items()} for record in records]


def as_text(value):
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


PAIRS = [
    *[(ending, ending) for ending in (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".ndjson.xz", ".json.zst", ".parquet")],
    *[(ending, ending) for ending in (".csv", ".csv.gz", ".csv.zst", ".csv.xz")],
    *[
        (".jsonl", ".csv"),
        (".csv", ".jsonl"),
        (".csv", ".parquet"),
        (".parquet", ".jsonl.gz"),
        (".jsonl.zst", ".parquet"),
    ],
]


@pytest.mark.parametrize(("source", "output"), PAIRS)
def test_every_value_is_kept_in_every_format(work, source, output):
    records = CSV_RECORDS if ".csv" in source else RECORDS
    write(work / f"in{source}", records, source)
    run(f"in{source}", f"out{output}", "--probabilities")
    found = read(work / f"out{output}", output)
    names = ["prediction", "probability", "reason", "p_positive", "p_negative"]
    assert all(list(record) == [*records[0], *names] for record in found)
    assert [{name: record[name] for name in records[0]} for record in found] == expected_values(records, output)
    for record in found:
        assert record["prediction"] in LABELS and record["reason"] in (None, "")
        probabilities = [float(record["p_positive"]), float(record["p_negative"])]
        assert sum(probabilities) == pytest.approx(1) and float(record["probability"]) == max(probabilities)
    assert Path("out.summary.json").exists() and Path("out.label_counts.png").stat().st_size > 5000
    assert not list(work.glob(".*"))


def test_parquet_keeps_its_types(work):
    table = pa.table(
        {
            "text": pa.array(["good", "bad", None], pa.large_string()),
            "when": pa.array([1, 2, None], pa.timestamp("ns", tz="Europe/Berlin")),
            "day": pa.array([datetime.date(2024, 2, 29), None, None], pa.date32()),
            "price": pa.array([decimal.Decimal("1.10"), None, None], pa.decimal128(10, 2)),
            "small": pa.array([1, None, -3], pa.int8()),
            "half": pa.array([0.1, float("nan"), None], pa.float32()),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "raw": pa.array([b"\x00\xff", b"", None], pa.binary()),
            "nothing": pa.nulls(3),
            "pair": pa.array([{"x": 1}, None, {"x": None}], pa.struct([("x", pa.int16())])),
        }
    )
    pq.write_table(table, "in.parquet")
    found = pq.read_table(run("in.parquet", "out.parquet", "--window", 2))
    assert found.schema.names == [*table.schema.names, "prediction", "probability", "reason"]
    assert found.select(table.schema.names).schema.equals(table.schema)
    for name in table.schema.names:
        assert found[name].combine_chunks().to_pandas().equals(table[name].combine_chunks().to_pandas()), name
    as_json = rows_of(run("in.parquet", "json.jsonl"))
    assert as_json[0]["day"] == "2024-02-29" and as_json[0]["price"] == "1.10" and as_json[1]["half"] is None


def test_columns_that_come_late_are_kept_in_every_format(work):
    records = [{"text": "good 1"}, {"text": "good 2", "late": None}, {"text": "good 3", "late": 4, "later": "x"}]
    write_json_lines(work / "in.jsonl", records)
    for ending in (".csv", ".parquet", ".jsonl"):
        run("in.jsonl", f"out{ending}", "--window", 1, "--overwrite")
    assert [list(record)[: len(r)] for record, r in zip(rows_of(Path("out.jsonl")), records, strict=True)] == [
        list(r) for r in records
    ]
    table = pq.read_table("out.parquet")
    assert table["late"].to_pylist() == [None, None, 4] and table["later"].to_pylist() == [None, None, "x"]
    assert table.column_names == ["text", "late", "later", "prediction", "probability", "reason"]
    assert [r["late"] + r["later"] for r in read(Path("out.csv"), ".csv")] == ["", "", "4x"]


def test_a_folder_is_read_by_name_and_formats_may_be_mixed(work, capsys):
    folder = work / "month"
    folder.mkdir()
    write_json_lines(folder / "a.jsonl", [{"text": "good 1"}, {"text": "bad 2"}])
    write(folder / "b.csv.gz", [{"text": "good 3", "more": "x"}], ".csv.gz")
    for name in ("README.txt", ".hidden", *(f"{number}.pdf" for number in range(10))):
        (folder / name).write_text("not a table")
    (folder / "c.jsonl").mkdir()
    found = rows_of(run("month", "out.jsonl", "--window", 2))
    line = next(line for line in capsys.readouterr().out.splitlines() if "Not read" in line)
    assert line == "Not read in month: " + "; ".join(f"{number}.pdf" for number in range(10)) + "; and 2 more"
    assert [r["text"] for r in found] == ["good 1", "bad 2", "good 3"]
    assert found[2]["more"] == "x"


def test_looking_through_a_large_input_is_said(work, capsys, monkeypatch):
    run("words.jsonl", "small.jsonl")
    assert "Checking" not in capsys.readouterr().out
    monkeypatch.setattr(predict, "LARGE", 1000)
    run("words.jsonl", "large.jsonl")
    assert "Checking words.jsonl\n" in capsys.readouterr().out


def test_the_sentence_of_a_published_text_is_scored(work):
    text = prompts.published_text(prompts.load_task("sst2"), "good 3", "negative")
    write_json_lines(work / "in.jsonl", [{"text": text}, {"text": "good 3"}])
    published, plain = rows_of(run("in.jsonl", "out.jsonl"))
    assert published["text"] == text and published["probability"] == plain["probability"]


# ---------------------------------------------------------------------------------------------------------------------
# Labels and probabilities


@pytest.mark.parametrize("tokens", [1, 60, 300, 100_000])
def test_labels_and_probabilities_are_those_of_evaluate(work, tokens):
    lines = (work / "words.jsonl").read_text().splitlines()
    random.Random(tokens).shuffle(lines)
    (work / "shuffled.jsonl").write_text("\n".join(lines))
    found = {
        record["sentence"]: record
        for record in rows_of(
            run("shuffled.jsonl", "out.jsonl", "--probabilities", "--tokens_per_batch", tokens, "--window", 20)
        )
    }
    table = pd.read_csv("models/tiny/evaluation/labels/predictions.csv")
    assert len(table) == len(found) == 30
    for row in table.itertuples():
        record = found[row.sentence]
        assert record["prediction"] == row.prediction
        assert [record["p_positive"], record["p_negative"]] == pytest.approx([row.p_positive, row.p_negative], abs=1e-5)
    assert table["p_positive"].std() > 0.01  # or nothing was compared here


def test_the_order_is_kept_and_equal_texts_are_scored_once_a_window(work, monkeypatch):
    distinct, chance = texts(12), random.Random(5)
    drawn = [text for _ in range(2) for text in chance.sample([*distinct, *chance.choices(distinct, k=12)], 24)]
    records = [{"row": number, "text": text} for number, text in enumerate(drawn)]
    write_json_lines(work / "in.jsonl", records)
    sizes, tokens, forward = [], [], LlamaMLP.forward

    def seen(module, hidden):
        tokens.append(hidden.shape[0] * hidden.shape[1])
        return forward(module, hidden)

    def scored(scorer, prompts):
        sizes.append(len(prompts))
        return score(scorer, prompts)

    score = shared_prefix.LabelScorer.score
    monkeypatch.setattr(shared_prefix.LabelScorer, "score", scored)
    monkeypatch.setattr(LlamaMLP, "forward", seen)
    found = rows_of(run("in.jsonl", "out.jsonl", "--window", 24, "--tokens_per_batch", 400))
    assert [(record["row"], record["text"]) for record in found] == [(r["row"], r["text"]) for r in records]
    assert sum(sizes) == 24 and len(sizes) > 2  # 12 texts in each of two windows
    by_text = {}
    for record in found:
        by_text.setdefault(record["text"], set()).add(record["probability"])
    assert all(len(probabilities) == 1 for probabilities in by_text.values()) and len(by_text) == 12
    assert 40 < tokens[0] < 100 and max(tokens[2:]) <= 400  # the prefix, once; tokens[1] is the second layer's
    assert len(tokens) == 2 + 2 * len(sizes)


def test_a_batch_is_as_full_as_the_tokens_allow_and_holds_like_lengths(smollm2_tokenizer, tiny_model):
    task = prompts.load_task("sst2")
    answers = [prompts.answer_ids(smollm2_tokenizer, label) for label in task.labels]
    scorer = shared_prefix.LabelScorer(tiny_model, prompts.common_ids(smollm2_tokenizer, task), answers)
    encoded = prompts.prompts_ids(smollm2_tokenizer, task, texts(50))
    batches = scorer.batches(encoded, 300)
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    lengths = [len(encoded[row]) for batch in batches for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    costs = [[scorer.cost(encoded[row]) for row in batch] for batch in batches]
    assert all(sum(cost) <= 300 for cost in costs)
    assert all(sum(cost) + following[0] > 300 for cost, following in zip(costs, costs[1:], strict=False))
    for batch in batches:
        own = [encoded[row][len(scorer.prefix) :] for row in batch]
        tree = shared_prefix.LabelTree(own, answers, len(scorer.prefix))
        assert len(tree.ids) <= sum(scorer.cost(encoded[row]) for row in batch)


@pytest.fixture
def tiny_model(tiny_base):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_base).eval()


def test_a_prompt_that_begins_otherwise_is_scored_all_the_same(smollm2_tokenizer, tiny_model):
    task, other = prompts.load_task("sst2"), prompts.load_task("politosphere")
    answers = [prompts.answer_ids(smollm2_tokenizer, label) for label in task.labels]
    encoded = prompts.prompts_ids(smollm2_tokenizer, task, texts(4))
    encoded[1:1] = prompts.prompts_ids(smollm2_tokenizer, other, texts(2))
    scorer = shared_prefix.LabelScorer(tiny_model, prompts.common_ids(smollm2_tokenizer, task), answers)
    expected = shared_prefix.label_log_probs(tiny_model, encoded, answers, batch_size=1)
    batches = scorer.batches(encoded, 1000)
    assert [sorted(batch) for batch in batches] == [[0, 3, 4, 5], [1, 2]]
    for batch in [*batches, *batches]:
        scores = scorer.score([encoded[row] for row in batch])
        torch.testing.assert_close(scores, expected[batch], atol=1e-4, rtol=0)
    assert isinstance(scorer.cache, DynamicCache) and scorer.cache.get_seq_length() == len(scorer.prefix)


@pytest.mark.parametrize(("free", "expected"), [(50e9, 4096), (0.4e9, 390), (1e6, 256)])
def test_a_gpu_with_little_memory_gets_small_batches(monkeypatch, free, expected):
    """At the shape of Llama-2-13b a token takes 2 x (8 x 5120 + 4 x 13824) + 10 x 32000 bytes: 512,512."""
    shape = SimpleNamespace(hidden_size=5120, intermediate_size=13824, vocab_size=32000)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: shape))
    assert predict.default_tokens_per_batch(model) == 1024  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free - 48e6, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 100e6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100e6 - 48e6)
    assert predict.default_tokens_per_batch(model) == expected


@pytest.mark.parametrize("tokenizer", ["smollm2_tokenizer", "llama2_tokenizer"])
def test_the_prompt_of_any_sentence_begins_with_the_common_ids(tokenizer, request):
    tokenizer, task = request.getfixturevalue(tokenizer), prompts.load_task("supp-anti-oth")
    sentences = [*texts(5), " ", "\n\n", "  two", ":)", "://", "\u200b", "枪", "…", "<s>", "0", "'s", "\ufeff", "-" * 9]
    common = prompts.common_ids(tokenizer, task)
    assert len(common) > 100
    assert len(prompts.prompt_ids(tokenizer, task, "")) - len(common) < 15
    together = prompts.prompts_ids(tokenizer, task, sentences)
    for sentence, ids in zip(sentences, together, strict=True):
        assert ids == prompts.prompt_ids(tokenizer, task, sentence)
        assert ids[: len(common)] == common, sentence


def test_unsure_rows_get_no_label_and_keep_their_probability(work):
    all_rows = rows_of(run("words.jsonl", "all.jsonl"))
    limit = sorted(record["probability"] for record in all_rows)[10]
    found = rows_of(run("words.jsonl", "sure.jsonl", "--min_probability", limit))
    unsure = [record for record in found if record["prediction"] is None]
    assert len(unsure) == 10
    assert {record["reason"] for record in unsure} == {"below --min_probability"}
    assert [record["probability"] for record in found] == [record["probability"] for record in all_rows]
    assert all((record["probability"] < limit) == (record["prediction"] is None) for record in found)
    summary = summary_of("sure.jsonl")
    assert (summary["rows"], summary["labelled"]) == (30, 20)
    assert summary["unlabelled"] == {"below --min_probability": 10}


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows

BAD = [
    {"text": "good 1"},
    {"text": ""},
    {"text": " \n"},
    {"text": None},
    {"text": 7},
    {"text": ["bad"]},
    {"text": "long " * 200},
    {"text": "bad 2"},
]
REASONS = [None, "empty", "empty", "empty", "not text", "not text", "longer than max_seq_length", None]


def test_bad_rows_are_kept_with_a_reason_and_counted(work, capsys):
    write_json_lines(work / "bad.jsonl", BAD)
    found = rows_of(run("bad.jsonl", "out.jsonl", "--probabilities"))
    assert [record["text"] for record in found] == [record["text"] for record in BAD]
    assert [record["reason"] for record in found] == REASONS
    assert [record["prediction"] in LABELS for record in found] == [reason is None for reason in REASONS]
    for record, reason in zip(found, REASONS, strict=True):
        assert (record["p_positive"] is None) == (record["probability"] is None) == (reason is not None)
    assert summary_of("out.jsonl")["unlabelled"] == {"empty": 3, "not text": 2, "longer than max_seq_length": 1}
    printed = capsys.readouterr().out
    assert "8 rows, 2 with a label" in printed and "without a label, longer than max_seq_length: 1" in printed


def test_the_longest_sentence_that_fits_is_labelled_and_one_token_more_is_not(work, smollm2_tokenizer):
    task = prompts.load_task("sst2")
    budget = prompts.prompt_budget(smollm2_tokenizer, task, 128)
    words = next(
        n for n in range(200) if len(prompts.prompt_ids(smollm2_tokenizer, task, "good" + " good" * n)) == budget
    )
    write_json_lines(work / "in.jsonl", [{"text": "good" + " good" * (words + more)} for more in (0, 1)])
    assert [r["reason"] for r in rows_of(run("in.jsonl", "out.jsonl"))] == [None, "longer than max_seq_length"]


def test_a_text_that_cannot_fit_is_not_tokenised(work, monkeypatch):
    seen, prompts_ids = [], predict.prompts_ids

    def recorded(tokenizer, task, sentences):
        seen.extend(map(len, sentences))
        return prompts_ids(tokenizer, task, sentences)

    monkeypatch.setattr(predict, "prompts_ids", recorded)
    # This tokenizer has no token for the byte 4: the third text has none at all, and fits.
    write_json_lines(work / "in.jsonl", [{"text": "x" * 10**6}, {"text": "x" * 10**3}, {"text": "\x04" * 10**6}])
    reasons = [r["reason"] for r in rows_of(run("in.jsonl", "out.jsonl"))]
    assert reasons == ["longer than max_seq_length"] * 2 + [None]
    assert seen == [10**3, 10**6]


@pytest.mark.parametrize("row", [1, 4, 6])
def test_strict_names_file_and_line(work, row, refused):
    write_json_lines(work / "bad.jsonl", [BAD[0], BAD[7], BAD[row]])
    line = refused(predict.main, *options("bad.jsonl", "out.jsonl", "--strict"))
    assert f"bad.jsonl line 3: {REASONS[row]}; " in line
    assert ("Loading weights" in refused.printed) == (row == 6)  # only the length needs the tokenizer
    write_json_lines(work / "good.jsonl", [BAD[0], BAD[7]])
    run("good.jsonl", "out.jsonl", "--strict")


def test_windows_before_a_row_that_strict_refuses_are_kept_without_strict(work, refused, capfd):
    write_json_lines(work / "in.jsonl", [*({"text": f"good {number}"} for number in range(4)), BAD[6], BAD[7]])
    run("in.jsonl", "labels.jsonl", "--strict", "--window", 2, code=2)
    line = capfd.readouterr().err.splitlines()[-1]
    assert "in.jsonl line 5: longer than max_seq_length; " in line
    command = line.split("; kept: 2 windows; to go on: python predict.py ")[1].split()
    assert predict.main(command) == 0 and "--strict" not in command
    assert [r["reason"] for r in rows_of(Path("labels.jsonl"))] == [None] * 4 + ["longer than max_seq_length", None]
    assert "--strict: was False when" in refused(predict.main, *command, "--strict")


CUT_SHORT = gzip.compress(b'{"text": "good"}\n' * 999)[:-9]
FAULTS = {
    "no JSON": ("in.jsonl", '{"text": "a"}\n{"text": \n', "in.jsonl line 2: not one JSON object"),
    "a JSON array": ("in.json", '[{"text": "a"}]', "in.json line 1: not one JSON object (an array"),
    "a number": ("in.jsonl", '{"text": "a"}\n\n7\n', "in.jsonl line 3: not one JSON object"),
    "NaN": ("in.jsonl", '{"text": "a", "x": NaN}\n', "NaN is not a finite number"),
    "Latin-1": ("in.jsonl", b'{"text": "a"}\n{"text": "\xfc"}\n', "in.jsonl line 2: not UTF-8"),
    "UTF-16": ("in.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "no rows": ("in.jsonl", "\n", "--input in.jsonl: has no rows"),
    "only a header": ("in.csv", "text,id\n", "--input in.csv: has no rows"),
    "a missing text": ("in.jsonl", '{"text": "a"}\n{"id": 3}\n', "in.jsonl line 2: has no text"),
    "no text column": ("in.jsonl", '{"body": "a", "id": "x"}\n', "name it with --text_column; it has body, id"),
    "too many values": ("in.csv", 'text,id\n"a\nb",1\nc,d,2\n', "in.csv line 4: has 3 values for 2 columns"),
    "too few values": ("in.csv", "text,id\na\n", "in.csv line 2: has 1 values for 2 columns"),
    "an open quote": ("in.csv", 'text,id\na,1\n"b,2\n', "in.csv line 3: not CSV"),
    "a column twice": ("in.csv", "text,text\na,b\n", "the column 'text' stands twice in it; rename one"),
    "CSV in Latin-1": ("in.csv", b"text\n\xfc\n", "in.csv after line"),
    "semicolons": (
        "in.csv",
        "text;id\ngood;1\n",
        "in.csv: its values are separated by semicolons; save it with commas",
    ),
    "tabs": ("in.csv", "text\tid\ngood\t1\n", "in.csv: its values are separated by tabs; save it with commas"),
    "bars": ("in.csv", "text|id\ngood|1\n", "in.csv: its values are separated by vertical bars; save it with commas"),
    "JSON lines": (
        "in.csv",
        '{"text": "a", "id": 1}\n',
        "in.csv: holds JSON lines; give it a name that ends in .jsonl",
    ),
    "no Parquet": ("in.parquet", "text", "in.parquet: damaged, cut short or not what its name says"),
    "no gzip": ("in.jsonl.gz", '{"text": "a"}\n', "in.jsonl.gz: damaged, cut short"),
    "gzip cut short": (
        "in.jsonl.gz",
        gzip.compress(b'{"text": "good"}\n' * 999)[:-9],
        "in.jsonl.gz: damaged, cut short",
    ),
    "no xz": ("in.jsonl.xz", '{"text": "a"}\n', "in.jsonl.xz: damaged, cut short"),
    "no zstd": (
        "in.jsonl.zst",
        '{"text": "a"}\n',
        "; make it anew, or unpack it first if it was packed with zstd --long",
    ),
    "no bz2": ("in.jsonl.bz2", '{"text": "a"}\n', "in.jsonl.bz2: damaged, cut short"),
    "a column that is added": ("in.jsonl", '{"text": "a"}\n{"text": "a", "reason": 1}\n', "has a column 'reason'"),
    "an unknown ending": ("in.txt", "a", "--input in.txt: its name says no known format"),
    "packed Parquet": ("in.parquet.gz", "a", "--input in.parquet.gz: its name says no known format"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_read_are_refused_by_name_and_line(work, fault, refused):
    name, content, message = FAULTS[fault]
    (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(predict.main, *options(name, "out.jsonl"))
    assert "Loading weights" not in refused.printed


def test_names_and_columns_that_do_not_fit_are_refused(work, refused):
    write_json_lines(work / "in.jsonl", [{"text": "good", "p_positive": 1}])

    def line(*more, source="in.jsonl", output="out.jsonl"):
        return refused(predict.main, *options(source, output, *more))

    assert "has a column 'p_positive', which is added" in line("--probabilities")
    assert "--text_column body: in.jsonl has no such column, only text, p_positive" in line("--text_column", "body")
    assert "--by month: in.jsonl has no such column, only text, p_positive" in line("--by", "month")
    assert "--input none.jsonl: no such file or folder" in line(source="none.jsonl")
    assert "--output out.txt: its name says no known format" in line(output="out.txt")
    assert "--output in.jsonl: is the input" in line("--overwrite", output="in.jsonl")
    shutil.copyfile("in.jsonl", "s.summary.json")
    message = "--output s.jsonl: s.summary.json, which stands beside it, is the input; name another file"
    assert message in line("--overwrite", source="s.summary.json", output="s.jsonl")
    os.mkfifo("pipe.jsonl")
    assert "--input pipe.jsonl: is a pipe or a device" in line(source="pipe.jsonl")
    Path("pipe.jsonl").unlink()
    assert "--output models: its name" in line(output="models")
    assert "--split test: in.jsonl is no data set of the Hub" in line("--split", "test")
    assert "must be from 0 to 1, not 2" in line("--min_probability", 2)
    assert "argument --resume: not allowed with argument --overwrite" in line("--overwrite", "--resume")
    (work / "folder").mkdir()
    assert "--input folder: has no file in a known format" in line(source="folder")
    write_json_lines(work / "folder" / "a.jsonl", [{"text": "good"}])
    assert "lies in the folder that is the input" in line(source="folder", output="folder/out.jsonl")
    (work / "dir.jsonl").mkdir()
    assert "--output dir.jsonl: is a folder" in line(output="dir.jsonl")


MIXED = {
    "a text after a number": ([1, "two"], "in.jsonl line 3: column 'x'"),
    "no boolean": ([True, 1], "in.jsonl line 3: column 'x'"),
    "a text in a list": ([[1], [2, "x"]], "in.jsonl line 3: column 'x'"),
    "an object after a list": ([[1], {"a": 1}], "in.jsonl line 3: column 'x'"),
    "more than 64 bits": ([1, 2**70], "in.jsonl line 3: column 'x'"),
    "a number beyond 2**53, then a fraction": ([2**60 + 1, 2.5], ": column 'x'"),
    "a fraction, then a number beyond 2**53": ([2.5, 2**60 + 1], "in.jsonl line 3: column 'x'"),
}


@pytest.mark.parametrize("window", [1, 1024])
@pytest.mark.parametrize("kind", MIXED)
def test_values_that_no_parquet_column_holds_are_refused_before_any_is_labelled(work, kind, window, refused):
    values, message = MIXED[kind]
    write_json_lines(
        work / "in.jsonl", [{"text": "a"}, *({"text": "b", "x": value} for value in values), {"text": "c"}]
    )
    line = refused(predict.main, *options("in.jsonl", "out.parquet", "--window", window))
    assert message in line and "its values are of kinds that one Parquet column cannot hold" in line
    assert line.endswith("; name an --output that ends in .jsonl")
    assert "Loading weights" not in refused.printed


def test_numbers_of_several_kinds_share_a_parquet_column_whatever_the_window(work):
    values = [1, 2.5, None, {"a": 1}, {"b": [2.5]}, {"b": [1]}]
    write_json_lines(work / "in.jsonl", [{"text": "a", "xy"[row > 2]: value} for row, value in enumerate(values)])
    one = run("in.jsonl", "one.parquet", "--window", 1).read_bytes()
    table = pq.read_table(run("in.jsonl", "all.parquet"))
    assert pq.read_table("one.parquet").select(["x", "y"]).equals(table.select(["x", "y"])) and one
    assert table["x"].to_pylist() == [1.0, 2.5, None, None, None, None]
    assert table["y"].to_pylist()[3:] == [{"a": 1, "b": None}, {"a": None, "b": [2.5]}, {"a": None, "b": [1.0]}]


def test_empty_objects_are_null_in_parquet_unless_other_rows_say_their_fields(work):
    records = [{"text": "a", "gildings": {}, "list": [{}], "deep": {"a": {}, "b": 1}, "late": {}}, {"text": "b"}]
    write_json_lines(work / "in.jsonl", [*records, {"text": "c", "late": {"x": 1}}])
    for window in (1, 10):
        found = pq.read_table(run("in.jsonl", f"out{window}.parquet", "--window", window)).to_pylist()
        assert [(r["gildings"], r["list"]) for r in found] == [(None, [None]), (None, None), (None, None)]
        assert found[0]["deep"] == {"a": None, "b": 1}
        assert [r["late"] for r in found] == [{"x": None}, None, {"x": 1}]
    assert rows_of(run("in.jsonl", "out.jsonl"))[0]["gildings"] == {}


def test_parquet_files_of_a_folder_may_have_other_types(work, refused):
    (work / "in").mkdir()

    def write_files(*columns):
        for number, (name, column) in enumerate(columns):
            pq.write_table(pa.table({"text": ["good"] * len(column), name: column}), f"in/{number}.parquet")

    write_files(("x", pa.array([1])), ("x", pa.array(["a"])))
    assert [r["x"] for r in rows_of(run("in", "mixed.jsonl"))] == [1, "a"]
    assert "in/1.parquet: column 'x': its values are of kinds" in refused(predict.main, *options("in", "x.parquet"))
    write_files(("x", pa.array([2**60 + 1])), ("x", pa.array([0.5])))
    assert "in/0.parquet row 0: column 'x': its values" in refused(predict.main, *options("in", "x.parquet"))
    write_files(("x", pa.array(["a"]).dictionary_encode()), ("x", pa.array(["b"])))
    table = pq.read_table(run("in", "texts.parquet"))
    assert table["x"].to_pylist() == ["a", "b"] and table.schema.field("x").type == pa.string()
    write_files(("x", pa.array([1], pa.int8())), ("x", pa.array([300], pa.int16())))
    assert pq.read_table(run("in", "wide.parquet"))["x"].to_pylist() == [1, 300]
    pq.write_table(pa.table([["good"], [1], [2]], names=["text", "x", "x"]), "in/1.parquet")
    for output in ("x.jsonl", "x.parquet"):
        line = refused(predict.main, *options("in", output))
        assert "in/1.parquet: the column 'x' stands twice in it; rename one" in line


def no_utf8():
    return pa.Array.from_buffers(pa.string(), 1, [None, *pa.array(["ab"]).buffers()[1:2], pa.py_buffer(b"\xff\xfe")])


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_values_of_parquet_that_cannot_be_read_are_refused_by_their_row(work, output, refused):
    for values in (pa.array([1, 10**12], pa.timestamp("s")), pa.array([0, 10**8], pa.date32()), no_utf8()):
        texts = ["good", "bad"][: len(values)]
        pq.write_table(pa.table({"text": texts, "x": values}), "in.parquet")
        line = refused(predict.main, *options("in.parquet", output))
        assert f"in.parquet row {len(values) - 1}: the value of 'x' cannot be read (" in line


def test_uuids_are_texts_where_the_output_is_not_parquet(work):
    value = uuid.UUID(int=5)
    pq.write_table(pa.table({"text": ["good"], "id": pa.array([value.bytes], pa.uuid())}), "in.parquet")
    assert rows_of(run("in.parquet", "json.jsonl"))[0]["id"] == str(value)
    assert read(run("in.parquet", "csv.csv"), ".csv")[0]["id"] == str(value)
    assert pq.read_table(run("in.parquet", "out.parquet"))["id"].to_pylist() == [value]


def test_a_blank_line_of_a_csv_file_is_an_empty_row_only_where_it_can_be_one(work):
    (work / "one.csv").write_text("\n\nsentence\n\ngood\n\n\nbad\n\n\n")
    found = read(run("one.csv", "labels.csv"), ".csv")
    assert [r["sentence"] for r in found] == ["", "good", "", "", "bad"]
    assert [r["reason"] for r in found] == ["empty", "", "empty", "empty", ""]
    (work / "two.csv").write_text("sentence,id\n\ngood,1\n\nbad,2\n\n")
    assert [r["id"] for r in read(run("two.csv", "two-labels.csv"), ".csv")] == ["1", "2"]


def test_the_texts_may_be_in_any_column(work, capsys):
    records = [
        {"sentence": "good 1", "text": "bad 1", "number": 3},
        {"sentence": "good 2", "text": "bad 2", "number": 4},
    ]
    write_json_lines(work / "in.jsonl", records)
    first = rows_of(run("in.jsonl", "first.jsonl"))  # of several that are known, the first
    assert "Texts: column 'sentence'\n" in capsys.readouterr().out
    write_json_lines(work / "in.jsonl", [{"body": r["sentence"], "number": r["number"]} for r in records])
    only = rows_of(run("in.jsonl", "only.jsonl"))  # the only text
    write_json_lines(work / "in.jsonl", [{"text": "x", "comment": r["sentence"]} for r in records])
    named = rows_of(run("in.jsonl", "named.jsonl", "--text_column", "comment"))
    assert "Texts: column 'comment'\n" in capsys.readouterr().out
    assert [r["probability"] for r in first] == [r["probability"] for r in only] == [r["probability"] for r in named]
    assert first[0]["probability"] != rows_of(run("in.jsonl", "other.jsonl"))[0]["probability"]


# ---------------------------------------------------------------------------------------------------------------------
# The summary


def test_labels_are_counted_by_the_groups_of_columns(work, capsys):
    records = [
        {"text": text, "month": f"2024-{1 + number % 3:02d}", "subreddit": f"r{min(number, 28 + number % 2)}"}
        for number, text in enumerate(texts(60))
    ]
    records[0] |= {"text": "", "month": None}
    write_json_lines(work / "in.jsonl", records)
    found = pd.DataFrame(rows_of(run("in.jsonl", "out.jsonl", "--by", "month", "subreddit")))
    summary = summary_of("out.jsonl")
    months = {line["group"]: line for line in summary["by"]["month"]}
    assert set(months) == {"2024-01", "2024-02", "2024-03", "(none)"}
    for group, line in months.items():
        own = found[found["month"].isna()] if group == "(none)" else found[found["month"] == group]
        assert line["rows"] == len(own) and line["unlabelled"] == own["prediction"].isna().sum()
        assert line["labels"] == {label: (own["prediction"] == label).sum() for label in LABELS}
        mean = own["probability"].mean()
        assert line["mean_probability"] == (None if group == "(none)" else pytest.approx(mean))
    subreddits = summary["by"]["subreddit"]
    assert len(subreddits) == 25 and subreddits[-1]["group"] == "other (6 groups)" and subreddits[-1]["rows"] == 6
    assert {line["group"] for line in subreddits[:2]} == {"r28", "r29"}
    assert sum(line["rows"] for line in subreddits) == summary["rows"] == 60
    for label in LABELS:
        own = found[found["prediction"] == label]
        numbers = summary["labels"][label]
        assert numbers["rows"] == len(own) > 0
        assert numbers["share"] == pytest.approx(len(own) / 59)
        assert numbers["mean_probability"] == pytest.approx(own["probability"].mean())
    assert summary["mean_probability"] == pytest.approx(found["probability"].mean())
    printed = capsys.readouterr().out
    assert "By month:" in printed and "other (6 groups)" in printed
    assert Path("out.label_counts.png").read_bytes()[:4] == b"\x89PNG"


def test_groups_stand_in_their_own_order_and_rows_without_one_last(work):
    hours = [{"text": "good", "hour": hour, "month": f"2024-{1 + hour:02d}"} for hour in range(11)]
    records = [*hours, hours[10], hours[10], {"text": "bad", "month": "", "hour": None}]
    write_json_lines(work / "in.jsonl", records)
    run("in.jsonl", "out.jsonl", "--by", "hour", "month")
    by = {column: [line["group"] for line in lines] for column, lines in summary_of("out.jsonl")["by"].items()}
    assert by["hour"] == [*map(str, range(11)), "(none)"]
    assert by["month"] == [*(f"2024-{month:02d}" for month in range(1, 12)), "(none)"]


HEADS = ["rows", *LABELS, "(no", "label)", "mean", "probability"]


def test_columns_may_be_named_as_the_summarys_are_and_hold_what_a_terminal_would_obey(work, capsys):
    names = ["rows", "positive", "mean probability", "a\x1b[2Jb"]
    records = [{"text": "good", **dict.fromkeys(names, "one\x1b[31m\ntwo")}]
    write_json_lines(work / "in.jsonl", records)
    run("in.jsonl", "out.jsonl", "--by", *names)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "By a\\x1b[2Jb:" in printed
    for name in names:
        table = printed.split(f"By {name}:\n".replace("\x1b", "\\x1b"))[1].splitlines()
        assert table[0].split() == [*name.replace("\x1b", "\\x1b").split(), *HEADS]
        assert table[1].split()[:2] == ["one\\x1b[31m\\ntwo", "1"]


# ---------------------------------------------------------------------------------------------------------------------
# Cut off, and on again


@pytest.fixture
def long_input(work):
    return write_json_lines(work / "long.jsonl", [{"row": n, "text": text} for n, text in enumerate(texts(150, 2))])


CUT = ["--window", "6", "--probabilities", "--by", "row"]


def start(source, output, *more, program=(REPOSITORY / "predict.py",), **environment):
    command = [sys.executable, *program, *options(source, output, *more)]
    with open("output.txt", "w") as printed:
        return subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=printed, stderr=subprocess.STDOUT
        )


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.0005)


def part_of(output):
    return Path(f".{output.split('.')[0]}.part")


def pieces(output="labels.jsonl"):
    return len(list(part_of(output).glob("piece-*")))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_that_is_resumed_gives_the_output_of_one_never_killed(work, long_input, number):
    output = ("labels.jsonl", "labels.csv.gz", "labels.parquet")[number // 2 % 3]
    whole = run("long.jsonl", f"whole.{output.split('.', 1)[1]}", *CUT).read_bytes()
    chance = random.Random(number)
    process = start("long.jsonl", output, *CUT)
    if number % 3 == 2:
        wait_for(process, lambda: list(work.glob(f".{output}.*.*.part")) or Path(output).exists())
        time.sleep(chance.random() * 0.02)
    else:
        wanted = chance.randrange(24)
        wait_for(process, lambda: (part_of(output) / "settings.json").exists() and pieces(output) >= wanted)
        time.sleep(chance.random() * 0.05)
    process.kill()
    process.wait()
    finished = Path(output).exists() and not (part_of(output) / "settings.json").exists()
    before = 25 if finished else pieces(output)
    assert before == 25 or number % 3 != 2
    scored = []
    with pytest.MonkeyPatch.context() as patch:
        label_window = predict.label_window
        patch.setattr(predict, "label_window", lambda *args: scored.append(1) or label_window(*args))
        run("long.jsonl", output, *CUT, "--resume")
    assert len(scored) == 25 - before
    assert Path(output).read_bytes() == whole
    assert not [path.name for path in work.glob(".*")]


@pytest.fixture
def unfinished(work, long_input, capfd):
    """A run of long.jsonl that Ctrl-C ended in its fourth window; returns what it said."""
    label_window, calls = predict.label_window, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return label_window(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "label_window", interrupted)
        run("long.jsonl", "labels.jsonl", *CUT, code=130)
    assert pieces() == 3
    return capfd.readouterr().err.splitlines()[-1]


def test_ctrl_c_says_how_to_go_on_and_the_number_of_rows_a_batch_may_change(work, unfinished):
    assert "interrupted; kept: 3 windows; to go on: python predict.py --adapters_name tiny" in unfinished
    command = unfinished.split("python predict.py ")[1].split()
    assert command[-1] == "--resume"
    assert predict.main([*command, "--tokens_per_batch", "100"]) == 0
    whole = rows_of(run("long.jsonl", "whole.jsonl", *CUT))
    found = rows_of(Path("labels.jsonl"))
    for one, other in zip(found, whole, strict=True):
        assert one == {
            **other,
            **{name: pytest.approx(other[name], abs=1e-5) for name in other if name[:2] == "p_"},
            "probability": pytest.approx(other["probability"], abs=1e-5),
        }


def test_a_run_that_is_not_finished_is_neither_replaced_nor_mixed_with_another(work, unfinished, refused, tiny_base):
    def line(*more):
        return refused(predict.main, *options("long.jsonl", "labels.jsonl", *more))

    it = "a run that writes it is not finished; pass --resume to go on with it, or --overwrite to start anew"
    assert it in line(*CUT)
    other = options("long.jsonl", "labels.csv", *CUT)
    assert "a run that writes labels.jsonl, with the same summary, is not finished" in refused(predict.main, *other)
    assert "--output: was labels.jsonl when the run was started and is labels.csv now" in refused(
        predict.main, *other, "--resume"
    )
    assert "--window: was 6 when the run was started and is 7 now" in line(*CUT, "--window", 7, "--resume")
    assert "--min_probability: was 0.0 when the run was started and is 0.6 now" in line(
        *CUT, "--min_probability", 0.6, "--resume"
    )
    assert "--probabilities: was True when the run was started and is False now" in line("--window", 6, "--resume")
    assert "--strict: was False" in line(*CUT, "--strict", "--resume")
    copy = (work / "long.jsonl").read_text()
    (work / "long.jsonl").write_text(copy.replace("film", "movie", 1))
    assert "--input: was long.jsonl (fingerprint " in line(*CUT, "--resume")
    (work / "long.jsonl").write_text(copy)
    file = work / "models/tiny/run.json"
    before = json.loads(file.read_text())
    for field, change in {"task": {"answer_field": "Label:"}, "options": {"max_seq_length": 127}}.items():
        file.write_text(json.dumps(before | {field: before[field] | change}))
        assert "--adapters_name: was tiny (fingerprint " in line(*CUT, "--resume")
    file.write_text(json.dumps(before))
    shutil.copytree("models/tiny", "models/same")
    os.utime("long.jsonl")
    assert predict.main([*options("long.jsonl", "labels.jsonl", *CUT), "--adapters_name", "same", "--resume"]) == 0


def test_an_output_is_replaced_only_if_asked_and_only_once_there_is_another(work, long_input, refused, capfd):
    write_json_lines(work / "short.jsonl", [{"text": "good"}])
    before = run("short.jsonl", "labels.jsonl").read_bytes()
    line = refused(predict.main, *options("long.jsonl", "labels.jsonl"))
    assert "labels.jsonl: exists; pass --overwrite to replace it, or name another --output" in line
    for more in ([], ["--resume"]):
        line = refused(predict.main, *options("long.jsonl", "labels.csv", *more))
        assert "labels.summary.json: exists, of another output so named; pass --overwrite to replace it, or" in line
    shutil.copyfile("labels.jsonl", "labels.csv")
    line = refused(predict.main, *options("short.jsonl", "labels.csv", "--resume"))
    assert "--output: was labels.jsonl when the run was started and is labels.csv now" in line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "finish", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        run("long.jsonl", "labels.jsonl", "--overwrite", code=130)
    assert Path("labels.jsonl").read_bytes() == before
    run("long.jsonl", "labels.jsonl", "--resume")
    assert len(rows_of(Path("labels.jsonl"))) == 150
    capfd.readouterr()
    run("long.jsonl", "labels.jsonl", "--resume")
    assert "labels.jsonl: this run is finished" in capfd.readouterr().out
    line = refused(predict.main, *options("long.jsonl", "labels.jsonl", "--resume", "--by", "row"))
    assert "--by row: labels.jsonl is finished without such counts; they need --overwrite" in line
    assert "--input: was long.jsonl" in refused(predict.main, *options("short.jsonl", "labels.jsonl", "--resume"))
    run("short.jsonl", "labels.jsonl", "--overwrite")
    assert Path("labels.jsonl").read_bytes() == before


def test_an_interrupt_in_the_last_step_leaves_all_of_the_old_output(work, long_input, monkeypatch):
    names = ("labels.jsonl", "labels.summary.json", "labels.label_counts.png")
    run("words.jsonl", "labels.jsonl")
    before = [Path(name).read_bytes() for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(predict, "draw_label_counts", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        run("long.jsonl", "labels.jsonl", "--overwrite", code=130)
    assert [Path(name).read_bytes() for name in names] == before
    run("long.jsonl", "labels.jsonl", "--resume")
    assert summary_of("labels.jsonl")["rows"] == len(rows_of(Path("labels.jsonl"))) == 150


CHANGES = {
    "a row more": lambda rows: [*rows, {"text": "late"}],
    "another text": lambda rows: [*rows[:-1], {**rows[-1], "text": "other"}],
    "no row": lambda rows: [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_labelled_gives_no_output(work, long_input, change, capfd, monkeypatch):
    rows, label_window, calls = rows_of(long_input), predict.label_window, []
    before = long_input.read_bytes()

    def changing(*args):
        calls.append(1)
        if len(calls) == 3:
            write_json_lines(long_input, CHANGES[change](rows))
        return label_window(*args)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "label_window", changing)
        run("long.jsonl", "labels.jsonl", *CUT, code=2)
    assert "long.jsonl: has changed while it was read; go on with --resume once it is" in capfd.readouterr().err
    assert not Path("labels.jsonl").exists() and pieces() == 2
    long_input.write_bytes(before)
    run("long.jsonl", "labels.jsonl", *CUT, "--resume")
    assert [r["row"] for r in rows_of(Path("labels.jsonl"))] == list(range(150))


def test_a_damaged_piece_or_setting_is_named(work, unfinished, refused, capfd):
    def line():
        return refused(predict.main, *options("long.jsonl", "labels.jsonl", *CUT, "--resume"))

    piece, settings = Path(".labels.part/piece-00000001.jsonl"), Path(".labels.part/settings.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "finish", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        run("long.jsonl", "labels.jsonl", *CUT, "--resume", code=130)
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-30])
    assert ".labels.part/piece-00000001.jsonl: damaged (" in line() and "start anew with --overwrite" in line()
    piece.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert ".labels.part: damaged, it holds 149 of 150 rows; start anew with --overwrite" in line()
    piece.write_bytes(whole)
    before = settings.read_text()
    for content in ("", "[]", "{}", before[:-9]):
        settings.write_text(content)
        assert "settings.json: not what predict.py wrote; start anew with --overwrite" in line()
    settings.write_text(before)
    run("long.jsonl", "labels.jsonl", *CUT, "--resume")


def test_a_second_process_on_the_same_output_is_refused(work, refused):
    with held(Path(".labels.part"), ""):
        for more in ([], ["--resume"], ["--overwrite"]):
            line = refused(predict.main, *options("words.jsonl", "labels.csv", *more))
            assert ".labels.part: another run is writing there; wait for it, or name another --output" in line


def test_full_memory_names_the_tokens_a_batch_and_keeps_what_is_done(work, long_input, capfd):
    score, calls = shared_prefix.LabelScorer.score, []

    def full(scorer, prompts):
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return score(scorer, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix.LabelScorer, "score", full)
        run("long.jsonl", "labels.jsonl", *CUT, "--tokens_per_batch", 200, code=2)
    line = capfd.readouterr().err.splitlines()[-1]
    assert "a batch has up to 200 tokens; go on with --resume and a lower --tokens_per_batch" in line
    done = pieces()
    assert done > 0 and f"kept: {done} window" in line
    run("long.jsonl", "labels.jsonl", *CUT, "--tokens_per_batch", 50, "--resume")
    assert [record["row"] for record in rows_of(Path("labels.jsonl"))] == list(range(150))


def test_a_full_disk_is_named_and_half_a_window_does_not_count(work, long_input, capfd):
    write_piece = unfinished_output.write_piece

    def half(path, *more):
        write_piece(path, *more)
        if pieces() >= 3:
            path.write_bytes(path.read_bytes()[:-20])
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished_output, "write_piece", half)
        run("long.jsonl", "labels.jsonl", *CUT, code=2)
    line = capfd.readouterr().err.splitlines()[-1]
    assert "piece-00000003.jsonl: the disk is full" in line and "kept: 3 windows; to go on: python predict.py" in line
    whole = run("long.jsonl", "whole.jsonl", *CUT).read_bytes()
    assert run("long.jsonl", "labels.jsonl", *CUT, "--resume").read_bytes() == whole


def test_a_run_that_fails_at_once_leaves_nothing(work, refused, monkeypatch):
    def nan(scorer, prompts):
        return torch.full((len(prompts), 2), float("nan"))

    monkeypatch.setattr(shared_prefix.LabelScorer, "score", nan)
    line = refused(predict.main, *options("words.jsonl", "labels.jsonl"))
    assert "the model's probabilities are NaN or infinite" in line


# ---------------------------------------------------------------------------------------------------------------------
# Size, and several processes

PEAKS = """
import json, resource, sys
import pyarrow
import predict, table_files
peaks = []
for rows in (2_500, 5_000):
    assert sum(1 for _ in table_files.read_file(f"in{rows}.parquet")) == rows
    peaks.append(pyarrow.default_memory_pool().max_memory() / 1e6)
for rows in (2_000, 20_000):
    with open("in.jsonl", "w") as file:
        for row in range(rows):
            file.write(json.dumps({"row": row, "text": f"good {row % 10}", "more": "x" * 10_000}) + "\\n")
    options = ["--adapters_name", "tiny", "--input", "in.jsonl", "--output", f"{rows}.parquet", "--window", "500"]
    assert predict.main(options) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(json.dumps(peaks), file=sys.stderr)
"""


def test_memory_does_not_grow_with_the_rows(work):
    """The longer file has 18,000 rows more, 10 kB each: 180 MB; that of Parquet 2,500 rows, 20 kB each: 50 MB."""
    for rows in (2_500, 5_000):
        pq.write_table(pa.table({"text": [os.urandom(10_000).hex() for _ in range(rows)]}), f"in{rows}.parquet")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", PEAKS], env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    short_parquet, long_parquet, short, long = json.loads(done.stderr.splitlines()[-1])
    assert long_parquet - short_parquet < 10, (short_parquet, long_parquet)
    assert long - short < 30, (short, long)
    assert pq.read_metadata("20000.parquet").num_rows == 20_000


def test_two_processes_write_the_same_bytes_as_one(work, long_input):
    whole = run("long.jsonl", "whole.jsonl", *CUT, "--tokens_per_batch", 100).read_bytes()
    more = [*CUT, "--tokens_per_batch", "100"]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", REPOSITORY / "predict.py")
    process = start("long.jsonl", "two.jsonl", *more, program=launcher, PYTHONPATH=str(REPOSITORY / "tests"))
    wait_for(process, lambda: pieces("two.jsonl") >= 2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert process.wait(120) == 0, Path("output.txt").read_text()
    assert len(children) == 2
    assert Path("two.jsonl").read_bytes() == whole
    assert Path("output.txt").read_text().count("150 rows, 150 with a label") == 1


def test_a_data_set_of_the_hub_is_streamed_also_by_accelerate_launch(work, long_input):
    """On a CPU this launcher starts a single process where there is no MPI; torchrun above starts two."""
    rows = long_input.read_bytes().splitlines(keepends=True)
    (work / "some.jsonl").write_bytes(b"".join(rows[40:]))
    whole = run("some.jsonl", "whole.jsonl", *CUT).read_bytes()
    with HubServer() as hub:
        hub.add_repository("dataset", "someone/comments", {"test.jsonl": b"".join(rows[40:])})
        launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", REPOSITORY / "predict.py"]
        command = [*launcher, *options("someone/comments", "hub.jsonl", "--split", "test", *CUT)]
        printed = run_logged_in(hub, [sys.executable, *command], work)
        assert hub.unanswered == []
    assert "110 rows, 110 with a label" in printed
    assert Path("hub.jsonl").read_bytes() == whole
