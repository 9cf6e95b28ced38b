"""Label every row of a file, a folder or a Hub data set with a trained adapter.

python predict.py --adapters_name Llama-2-13b-chat-hf-epoch10 --input comments.jsonl --output labels.jsonl
python predict.py --adapters_name smollm2-epoch5 --input comments.csv.gz --output labels.parquet --by subreddit month
accelerate launch --num_processes 4 predict.py ...   # the same with four GPUs
"""

import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import torch
from tqdm import tqdm

import adapters
import modeling
import processes
from checkpoints import held, read_run
from command_line import (
    CommandParser,
    CutOff,
    UserError,
    not_empty,
    number,
    one_line_errors,
    positive_int,
    printable,
    replacing,
)
from metrics import LabelTally, label_probabilities, predicted_labels
from prompts import answer_ids, common_ids, prompt_budget, prompts_ids, read_published_text, task_from_fields
from reports import draw_label_counts, group_table
from rows import SENTENCE_COLUMNS, first_ten
from shared_prefix import LabelScorer, not_finite
from table_files import CHANGED, SPLIT, ColumnTypes, Source, check_format, piece_ending, write_table
from unfinished import Unfinished, check_same

CPU_TOKENS, GPU_TOKENS = 1024, 4096  # a batch; beyond, the mask of all pairs costs more than a larger batch saves
EMPTY, NO_TEXT, TOO_LONG, UNSURE = "empty", "not text", "longer than max_seq_length", "below --min_probability"
# What may differ when a run goes on: no label depends on it.
FREE = ("by", "tokens_per_batch", "device", "versions")
LARGE = 10**8  # bytes of an input that takes a while to look through


def build_parser():
    parser = CommandParser(prog="predict.py", description=__doc__.split("\n")[0])
    adapters.add_adapter_options(parser)
    parser.add_argument(
        "--input",
        type=not_empty,
        required=True,
        help="JSON lines, CSV or Parquet, a folder of these, or a Hub data set",
    )
    parser.add_argument("--output", type=not_empty, required=True, help="JSON lines, CSV or Parquet, by its ending")
    parser.add_argument("--text_column", default=argparse.SUPPRESS, help="default: found, where only one makes sense")
    parser.add_argument("--split", default=argparse.SUPPRESS, help=f"of a Hub data set; default: {SPLIT}")
    parser.add_argument("--probabilities", action="store_true", help="add p_<label>, the probability of every label")
    parser.add_argument(
        "--min_probability", type=_fraction, default=0.0, help="leave rows without a label that are less probable"
    )
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="count labels by the values of these, too"
    )
    parser.add_argument("--strict", action="store_true", help="end with an error at a row that cannot be labelled")
    parser.add_argument(
        "--tokens_per_batch", type=positive_int, default=argparse.SUPPRESS, help="default: found for the device"
    )
    parser.add_argument("--window", type=positive_int, default=1024, help="rows that are ordered and saved together")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the output, once there is a new one")
    existing.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    return parser


def _fraction(text):
    value = number(float, text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def parse_args(argv):
    """Return the options, None where a default is found later."""
    args = build_parser().parse_args(argv)
    for name in ("text_column", "split", "tokens_per_batch"):
        setattr(args, name, getattr(args, name, None))
    check_format("--output", args.output)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Before anything is scored: what is to be done, and whether it can be


def say(text):
    """Print a line with characters that a terminal would obey as escapes."""
    print(printable(text))


def find_text_column(record, wanted, source):
    """Return the column that holds the texts, by the first row of `source`; raise UserError where that is not clear."""
    listed = ", ".join(record)
    if wanted is not None:
        if wanted not in record:
            raise UserError(f"--text_column {wanted}: {source} has no such column, only {listed}")
        return wanted
    for column in SENTENCE_COLUMNS:
        if column in record:
            return column
    texts = [column for column, value in record.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise UserError(f"--input {source}: which column holds the texts? name it with --text_column; it has {listed}")
    return texts[0]


def added_columns(task, probabilities):
    """Return the Arrow schema of the columns that are added to every row."""
    fields = [("prediction", pa.string()), ("probability", pa.float64()), ("reason", pa.string())]
    if probabilities:
        fields += [(column, pa.float64()) for column in adapters.probability_columns(task)]
    return pa.schema(fields)


def check_columns(columns, added, by, source):
    """Raise UserError where a column of the input has the name of one that is added, or one of `by` is missing."""
    if clash := [name for name in added.names if name in columns]:
        raise UserError(f"--input {source}: has a column {clash[0]!r}, which is added to the output; rename it")
    if missing := [name for name in by if name not in columns]:
        raise UserError(f"--by {missing[0]}: {source} has no such column, only {', '.join(columns)}")


def scan(source, args, added):
    """Return (the column of the texts, number of rows, Arrow schema) of `source`, with all of its rows looked at once.

    Those of a Hub data set are not: that would download it twice. The number is then None, as is the schema where the
    output is not Parquet. Raises UserError for what cannot be used.
    """
    first = next(source.rows(), None)
    if first is None:
        raise UserError(f"--input {args.input}: has no rows")
    text_column = find_text_column(first[1], args.text_column, source.name)
    say(f"Texts: column {text_column!r}")
    if source.left_out:
        say(f"Not read in {source.name}: {first_ten(source.left_out)}")
    if source.revision is not None:
        check_columns(first[1], added, args.by, source.name)
        return text_column, None, None
    if source.size() > LARGE:
        say(f"Checking {source.name}")
    source.remember()
    types = ColumnTypes() if piece_ending(args.output) == ".parquet" else None
    by_values = types and not source.is_parquet()
    if types and not by_values:
        for file in source.files:
            types.add_file(file)
    columns, rows = {}, 0
    for window in windows(source.rows(), args.window):
        for place, record in window:
            sentence_of(place, record, text_column, args.strict)
            columns |= dict.fromkeys(record)
        rows += len(window)
        if by_values:
            types.add(window)
    check_columns(columns, added, args.by, source.name)
    if types and types.widened:
        for window in windows(source.rows(), args.window):
            types.check(window)
    return text_column, rows, types and types.schema()


def sentence_of(place, record, text_column, strict):
    """Return (sentence or None, reason why there is none or None) of a row; with `strict` the second is a UserError.

    Of a text in the published template only the sentence counts, as in training.
    """
    if text_column not in record:
        raise UserError(f"{place}: has no {text_column}, where the text of the other rows is; correct it")
    text = record[text_column]
    reason = None
    if text is not None and not isinstance(text, str):
        reason = NO_TEXT
    else:
        published = read_published_text(text) if text and "<s>" in text else None
        text = published["sentence"] if published else text
        if text is None or not text.strip():
            reason = EMPTY
    if strict and reason:
        raise bad_row(place, reason)
    return (None, reason) if reason else (text, None)


def bad_row(place, reason):
    """Return the UserError of a row that --strict does not let pass."""
    return UserError(f"{place}: {reason}; correct it, or leave out --strict to have it without a label")


def make_plan(args, source, task, fingerprint, unfinished, added):
    """Return a dict of text_column, rows and schema (or None), settings, before (of the run that goes on), finished.

    Raises UserError where the run cannot be, or could not give what the one to go on with would have given.
    """
    before, finished = unfinished.settings() if args.resume else (None, False)
    if args.resume and before is None:
        say(f"{args.output}: no run that was cut off, so this one starts at the first row")
    text_column, rows, schema = scan(source, args, added)
    settings = {
        "adapters_name": {"value": args.adapters_name, "sha256": fingerprint},
        "output": unfinished.output.name,
        "input": {"value": source.name, "sha256": source.fingerprint()},
        "text_column": text_column,
        "probabilities": args.probabilities,
        "min_probability": args.min_probability,
        "strict": args.strict,
        "window": args.window,
        "by": args.by,
        "tokens_per_batch": args.tokens_per_batch,
        "device": modeling.device_name(),
        "versions": modeling.library_versions(),
    }
    if before is not None:
        # Windows that were labelled without --strict may hold rows without a label.
        check_same(before, settings, (*FREE, "strict") if before.get("strict") else FREE)
        if finished and (new := [column for column in args.by if column not in before.get("by", [])]):
            raise UserError(f"--by {new[0]}: {args.output} is finished without such counts; they need --overwrite")
        for name in ("device", "versions"):
            if before.get(name) != settings[name]:
                print(f"Note: {name} was {before.get(name)} and is {settings[name]}: last digits may differ")
    plan = {"text_column": text_column, "rows": rows, "schema": schema}
    return plan | {"settings": settings, "before": before, "finished": finished}


def check_places(source, unfinished):
    """Raise UserError where what is written would be read as input, now or when the command is given again."""
    output = unfinished.output
    for path in (output, unfinished.summary, unfinished.picture):
        if path.exists() and any(file.samefile(path) for file in source.files):
            what = "is the input" if path == output else f"{path}, which stands beside it, is the input"
            raise UserError(f"--output {output}: {what}; name another file")
    if Path(source.name).is_dir() and output.resolve().parent == Path(source.name).resolve():
        raise UserError(f"--output {output}: lies in the folder that is the input; name another place")


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


class Unlabelled(CutOff):
    """What --strict says of a row found only when its window is labelled; with it, no run gets past that row."""

    leave_out = ("--strict",)


class Labeller:
    """Gives sentences the probabilities of the task's labels, in all processes together."""

    def __init__(self, model, tokenizer, task, max_seq_length, tokens_per_batch):
        self.tokenizer, self.task, self.tokens_per_batch = tokenizer, task, tokens_per_batch
        self.budget = prompt_budget(tokenizer, task, max_seq_length)
        answers = [answer_ids(tokenizer, label) for label in task.labels]
        self.scorer = LabelScorer(model, common_ids(tokenizer, task), answers)

    def encode(self, sentences):
        """Return {sentence: prompt ids, or None where it is too long} of a list of sentences."""
        encoded = dict.fromkeys(sentences)
        short = [sentence for sentence in encoded if not self._far_too_long(sentence)]
        prompts = prompts_ids(self.tokenizer, self.task, short) if short else []
        fitting = zip(short, prompts, strict=True)
        return encoded | {sentence: prompt for sentence, prompt in fitting if len(prompt) <= self.budget}

    def _far_too_long(self, sentence):
        """Return whether the beginning of a very long text is too long by itself: all of it would take gigabytes.

        Where it is cut a word may give more tokens than whole, but not as many again as fit.
        """
        beginning = sentence[: 64 * self.budget]
        return beginning != sentence and len(self.tokenizer.tokenize(beginning)) > 2 * self.budget

    def score(self, encoded, progress=lambda sentences: None):
        """Return {sentence: float32 array (labels,) of log-probabilities} of `encoded`, {sentence: prompt ids}.

        The batches are the same whatever the number of processes, so the numbers are, too; every process gets all of
        them. `progress(sentences)` is called after each batch of this process.
        """
        sentences, prompts = list(encoded), list(encoded.values())
        batches = self.scorer.batches(prompts, self.tokens_per_batch)

        def score(batch):
            scores = self._score([prompts[row] for row in batch])
            progress([sentences[row] for row in batch])
            return scores

        return {
            sentences[row]: numbers
            for batch, scores in zip(batches, processes.share_out(batches, score), strict=True)
            for row, numbers in zip(batch, scores, strict=True)
        }

    def _score(self, prompts):
        advice = (
            f"a batch has up to {self.tokens_per_batch} tokens; go on with --resume and a lower --tokens_per_batch, "
            "windows that are done are kept"
        )
        with modeling.memory_errors(advice):
            scores = self.scorer.score(prompts)
        if not scores.isfinite().all():
            raise UserError(not_finite("predicting"))
        return scores.numpy()


def default_tokens_per_batch(model):
    """Return how many tokens a batch may have: a fixed number on a CPU, on a GPU fewer where its memory is short.

    Half of the free memory holds the states of all tokens in two layers' worth of buffers and, where every token is
    one of an answer, their logits in float32 beside the model's own.
    """
    if not torch.cuda.is_available():
        return CPU_TOKENS
    config = model.config.get_text_config()
    numbers = 8 * config.hidden_size + 4 * config.intermediate_size
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(min(GPU_TOKENS, max(256, free / 2 / (2 * numbers + 10 * config.vocab_size))))


def label_window(labeller, window, args, text_column, bar):
    """Return the output's records of a window, which is a list of (place, record)."""
    read = [(place, *sentence_of(place, record, text_column, args.strict)) for place, record in window]
    counts = Counter(sentence for _, sentence, reason in read if reason is None)
    encoded = labeller.encode(list(counts))
    if args.strict and (long := [place for place, sentence, _ in read if encoded[sentence] is None]):
        raise Unlabelled(str(bad_row(long[0], TOO_LONG)))
    fitting = {sentence: prompt for sentence, prompt in encoded.items() if prompt is not None}
    shown = bar.n
    scores = labeller.score(fitting, lambda scored: bar.update(sum(counts[sentence] for sentence in scored)))
    bar.update(shown + len(window) - bar.n)
    return [
        record | answer(labeller.task, scores.get(sentence), reason or TOO_LONG, args)
        for (_, record), (_, sentence, reason) in zip(window, read, strict=True)
    ]


def answer(task, scores, reason, args):
    """Return the added columns of a row as a dict; `scores` (labels,) is None where it has none, for `reason`."""
    probabilities = [None] * len(task.labels) if scores is None else label_probabilities(scores[None])[0].tolist()
    best = None if scores is None else max(probabilities)
    label = None if scores is None else predicted_labels(task.labels, scores[None])[0]
    if scores is not None:
        reason = UNSURE if best < args.min_probability else None
    added = {"prediction": None if reason else label, "probability": best, "reason": reason}
    if args.probabilities:
        added |= dict(zip(adapters.probability_columns(task), probabilities, strict=True))
    return added


def windows(rows, size):
    """Yield lists of `size` rows, the last one of what is left."""
    rows = iter(rows)
    while window := list(itertools.islice(rows, size)):
        yield window


# ---------------------------------------------------------------------------------------------------------------------
# The end


def finish(unfinished, task, args, settings, added, rows=None):
    """Make the output, its summary and picture of the pieces, which hold so many `rows`; return the summary.

    None of them takes its place before all are written.
    """
    tally = LabelTally(task.labels, args.by)
    with (
        replacing(unfinished.picture) as picture,
        replacing(unfinished.summary) as numbers,
        replacing(unfinished.output) as table,
    ):
        write_table(table, unfinished.output, unfinished.pieces(), added.names, tally.add)
        summary = tally.summary() | {"settings": settings}
        if rows is not None and summary["rows"] != rows:
            raise UserError(
                f"{unfinished.folder}: damaged, it holds {summary['rows']} of {rows} rows; start anew with --overwrite"
            )
        numbers.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draw_label_counts(summary, picture)
    unfinished.remove()
    return summary


def print_summary(summary, unfinished):
    say(f"{summary['rows']} rows, {summary['labelled']} with a label:")
    for label, numbers in summary["labels"].items():
        mean = "" if numbers["mean_probability"] is None else f", mean probability {numbers['mean_probability']:.3f}"
        say(f"  {label}: {numbers['rows']} ({numbers['share']:.1%} of these){mean}")
    for reason, rows in summary["unlabelled"].items():
        say(f"  without a label, {reason}: {rows}")
    for column, lines in summary["by"].items():
        say(f"By {column}:")
        print(group_table(lines, column).to_string(index=False))
    say(f"Written: {unfinished.output}, {unfinished.summary}, {unfinished.picture}")


def predict(args, labeller, source, plan, unfinished, added):
    """Write a piece for every window that has none yet."""

    def save(*piece):
        source.check_unchanged()
        unfinished.add(*piece)

    rows = plan["rows"]
    first = processes.on_first(lambda: len(unfinished.pieces()))
    skipped = done = first * args.window if rows is None else min(rows, first * args.window)
    wanted = itertools.islice(source.rows(skipped), None if rows is None else rows - skipped)
    with tqdm(total=rows, initial=skipped, unit="row", desc="predict", disable=not processes.is_first()) as bar:
        for place, window in enumerate(windows(wanted, args.window), start=first):
            records = label_window(labeller, window, args, plan["text_column"], bar)
            processes.on_first(save, place, records, plan["schema"], added)
            done += len(window)
    processes.on_first(source.check_unchanged)
    if rows is not None and done < rows:
        raise UserError(f"--input {source.name}: {CHANGED}")


def windows_kept(unfinished):
    """Return in words how many windows are done, empty ones for none."""
    pieces = len(unfinished.pieces())
    return f"{pieces} window{'s' if pieces > 1 else ''}" if pieces else ""


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    with processes.joined(), contextlib.ExitStack() as stack:
        folder, _ = adapters.find_adapter(args.adapters_name)
        run = read_run(folder / "run.json", "train the adapter again")
        task = task_from_fields(run["task"], folder / "run.json")
        source, unfinished = Source(args.input, args.split), Unfinished(args.output)
        check_places(source, unfinished)
        added = added_columns(task, args.probabilities)
        processes.first_enters(stack, held(unfinished.folder, "name another --output"))
        processes.on_first(unfinished.check, args.resume, args.overwrite)
        command, kept = sys.argv[1:] if argv is None else argv, functools.partial(windows_kept, unfinished)
        stack.enter_context(processes.saying_how_to_resume("predict.py", command, kept))
        fingerprint = adapters.fingerprint(folder, run)
        plan = processes.on_first(make_plan, args, source, task, fingerprint, unfinished, added)
        if plan["finished"]:
            processes.on_first(unfinished.remove)  # of what a kill left
            say(f"{args.output}: this run is finished")
            return
        model, tokenizer = adapters.load_model(folder, run, force=args.force)
        tokens = args.tokens_per_batch or (plan["before"] or {}).get("tokens_per_batch")
        tokens = tokens or processes.on_first(default_tokens_per_batch, model)
        labeller = Labeller(model, tokenizer, task, run["options"]["max_seq_length"], tokens)
        settings = plan["settings"] | {"tokens_per_batch": tokens}
        processes.first_enters(stack, unfinished.started(settings, resumed=plan["before"] is not None))
        predict(args, labeller, source, plan, unfinished, added)
        summary = processes.on_first(finish, unfinished, task, args, settings, added, plan["rows"])
        print_summary(summary, unfinished)


if __name__ == "__main__":
    raise SystemExit(main())
