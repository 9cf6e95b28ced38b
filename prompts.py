"""The prompt template, the tasks with their labels, and the token boundaries between prompt and answer. No torch.

One row becomes (Llama-2's chat template, as the published study used it)

    <s>[INST] <<SYS>>\\n{system prompt}\\n<</SYS>>\\n\\nSentence: {sentence}\\n{answer field} [/INST] {label} </s>

Try it: python -c "import prompts; print(prompts.published_text(prompts.TASKS['sst2'], 'a gem', 'positive'))"
"""

import bisect
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from command_line import UserError, read_json


@dataclass(frozen=True)
class Task:
    """What to ask the model. `labels` are spelled as they are written out; `dataset_name` is the published Hub set."""

    name: str
    system_prompt: str
    labels: tuple[str, ...]
    answer_field: str
    dataset_name: str | None = None


_SEVEN_LABELS = (
    "Support Gun Polarized",
    "Support Gun non-Polarized",
    "Neutral",
    "Anti Gun Polarized",
    "Anti Gun non-Polarized",
    "Not relevant",
    "Not Sure",
)
_SEVEN_ROLE = "You are a sentence sentiment polarity classification assistant about gun control. "
_SEVEN_QUESTION = (
    "Please classify the sentiment polarity of the following sentence about gun support into one of the following "
    "categories: 'Support Gun Polarized', 'Support Gun non-Polarized', 'Neutral', 'Anti Gun Polarized', "
    "'Anti Gun non-Polarized', 'Not relevant' or 'Not Sure'."
)
_AGAINST_GUNS = (
    "Explicitly opposes gun ownership or is in favor of legal policies such as banning guns and confiscating "
    "personal guns. "
)
_FOR_GUNS = "Explicitly in favor of individual gun ownership, or against gun bans and gun confiscation. "


def _seven_label_definitions(support, anti, constructive):
    return (
        f"{_SEVEN_ROLE}And here are definitions of labels: Support Gun: {support}Anti Gun: {anti}"
        "Neutral: The statement is centered around the debate on gun control, but there is no clear opinion expressed. "
        "Not Relevant: Don't have any obvious relationship to guns. "
        "Not Sure: The sentence statements are describing gun support for owning / banning guns, but due to a lack of "
        "relevant context, or some other reason, we can sense the emotional inclination, but not the specific opinion "
        "or polarized aspect. And the sentences are considered as polarized if they are or about antagonizing "
        "statements / hostility / belittling / animosity: 'us vs them', inter-group antagonism, radicalization, "
        "conflictive confrontation, and so on. the sentences are considered as non-polarized if they are or "
        f"{constructive} civic conversation, bring together to a common ground, peaceful dialogue, and so on. "
        f"{_SEVEN_QUESTION}"
    )


_HUB = "OneFly7/llama2-politosphere-fine-tuning-"

TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            system_prompt=(
                "You are a helpful, respectful and honest sentiment analysis assistant. And you are supposed to "
                "classify the sentiment of the sentence into one of the following categories: 'positive' or 'negative'."
            ),
            labels=("positive", "negative"),
            answer_field="Sentiment:",
            dataset_name="OneFly7/llama2-SST2-SFT-with-system-prompt",
        ),
        Task(  # As published: the definitions of Support Gun and Anti Gun are the wrong way round.
            name="politosphere-definitions",
            system_prompt=_seven_label_definitions(_AGAINST_GUNS, _FOR_GUNS, "aboutc onstructive"),
            labels=_SEVEN_LABELS,
            answer_field="User label:",
            dataset_name=_HUB + "system-prompt_with_definition",
        ),
        Task(
            name="politosphere-definitions-corrected",
            system_prompt=_seven_label_definitions(_FOR_GUNS, _AGAINST_GUNS, "about constructive"),
            labels=_SEVEN_LABELS,
            answer_field="User label:",
            dataset_name=_HUB + "system-prompt_with_definition",
        ),
        Task(
            name="politosphere",
            system_prompt=_SEVEN_ROLE + _SEVEN_QUESTION,
            labels=_SEVEN_LABELS,
            answer_field="User label:",
            dataset_name=_HUB + "system-prompt-without-definition",
        ),
        Task(
            name="pol-unpol-oth",
            system_prompt=(
                "You are a sentence sentiment polarity classification assistant about gun control. And here are "
                "definitions of labels:Polarized: The sentences are considered as 'polarized' if they are or about "
                "antagonizing statements / hostility / belittling / animosity: 'us vs them', inter-group antagonism, "
                "radicalization, conflictive confrontation, closed to contradiction, trolling, affective, ideological, "
                "bad faith, with cognitive bias, with social or demographic bias, irony, sarcasm, hate speech, "
                "offensive, toxic, fake news, dismiss language, stereotypes and so on.Unpolarized: The sentences are "
                "considered as 'unpolarized' if they are or about constructive civic conversation, bring together to a "
                "common ground, peaceful dialogue, open-minded demeanour focused on learning and forming opinions, "
                "genuinely open to contradiction, open exchange of ideas, educational, humble, good faith and so "
                "on.Other: The sentences are considered as 'other' if they not polarized or unpolarized or hard to "
                "tell.Please classify the sentiment polarity of the following sentence about gun support into one of "
                "the following categories: 'polarized', 'unpolarized' or 'other'."
            ),
            labels=("polarized", "unpolarized", "other"),
            answer_field="User label:",
            dataset_name=_HUB + "pol-unpol-oth",
        ),
        Task(
            name="supp-anti-oth",
            system_prompt=(
                "You are a sentence sentiment political tendency classification assistant about gun control. And here "
                "are definitions of labels: Support Gun: The sentences are considered as 'support gun' if they are "
                "explicitly in favor of individual gun ownership, or against gun bans and gun confiscation. Anti Gun: "
                "The sentences are considered as 'anti gun' if they are explicitly opposes gun ownership or are in "
                "favor of legal policies such as banning guns and confiscating personal guns. Other: The sentences are "
                "considered as 'other' if they are not 'support gun' or 'anti gun' or hard to tell or not relevent to "
                "gun control. Please classify the sentiment political tendency of the following sentence about gun "
                "support into one of the following categories: 'support gun', 'anti gun' or 'other'."
            ),
            labels=("support gun", "anti gun", "other"),
            answer_field="User label:",
            dataset_name=_HUB + "supp-anti-oth",
        ),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and labels


def load_task(name):
    """Return the built-in task of that name, or the one in the JSON file at that path.

    The file holds `system_prompt`, `labels` and `answer_field`, and may hold `name` and `dataset_name`.
    Raises UserError for an unknown name or a file that is not such a task.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--task {name}: no built-in task ({', '.join(TASKS)}) and no such file")
    try:
        fields = read_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}); make it readable or name another --task"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON object ({error}); correct it there") from error
    return task_from_fields(fields, path)


def task_from_fields(fields, source):
    """Build a task from a dict as a task file holds it; `source` names it in the UserError of a bad field."""
    if not isinstance(fields, dict):
        raise UserError(f"{source}: a task is a JSON object with system_prompt, labels and answer_field")
    unknown = set(fields) - {"name", "system_prompt", "labels", "answer_field", "dataset_name"}
    if unknown:
        raise UserError(
            f"{source}: unknown field {sorted(unknown)[0]!r}; a task has system_prompt, labels, answer_field"
        )
    for field in ("system_prompt", "answer_field"):
        if not isinstance(fields.get(field), str) or not fields[field].strip():
            raise UserError(f"{source}: the field {field!r} must be a text that is not empty")
    labels = fields.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise UserError(f"{source}: the field 'labels' must be a list of texts that are not empty")
    labels = tuple(label.strip() for label in labels)
    if len(labels) < 2:
        raise UserError(f"{source}: the field 'labels' must hold two or more labels")
    spelled = {}
    for label in labels:
        folded = fold_label(label)
        if folded in spelled:
            raise UserError(
                f"{source}: the labels {spelled[folded]!r} and {label!r} do not differ in more than case and Unicode "
                "normal form; rename or remove one"
            )
        spelled[folded] = label
    if any("\n" in label for label in labels):
        raise UserError(f"{source}: a label must not hold a line break")
    for field in ("name", "dataset_name"):
        if not isinstance(fields.get(field, ""), str | None):
            raise UserError(f"{source}: the field {field!r} must be a text")
    name = fields.get("name") or Path(source).stem
    return Task(name, fields["system_prompt"], labels, fields["answer_field"], fields.get("dataset_name"))


def task_fields(task):
    """Return the dict that `task_from_fields` reads, for task.json and run.json."""
    return {
        "name": task.name,
        "system_prompt": task.system_prompt,
        "labels": list(task.labels),
        "answer_field": task.answer_field,
        "dataset_name": task.dataset_name,
    }


def fold_label(label):
    """Return what two spellings of a label have in common: no space around it, no case, Unicode normal form NFC."""
    # Folding can take letters apart, so the normal form comes last; NFD first is Unicode's definition D145.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", label.strip()).casefold())


def match_label(task, text):
    """Return the task's own spelling of the label that `text` is, as `fold_label` compares them, or None."""
    folded = fold_label(text)
    return next((label for label in task.labels if fold_label(label) == folded), None)


def parse_answer(task, output):
    """Return the label that a generated `output` gives on its first line, or None where that is no label.

    As the original did: what follows the prompt, its first line only. Leading line breaks make it invalid.
    """
    return match_label(task, output.split("\n", 1)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def build_prompt(task, sentence):
    """Return the prompt without BOS. It ends with `[/INST]`: no trailing space, the space belongs to the answer."""
    return f"[INST] <<SYS>>\n{task.system_prompt}\n<</SYS>>\n\nSentence: {sentence}\n{task.answer_field} [/INST]"


def published_text(task, sentence, label=None):
    """Return the `text` column as published: the whole row, or without a label all up to `[/INST] `."""
    text = f"<s>{build_prompt(task, sentence)} "
    return text if label is None else f"{text}{label} </s>"


_PUBLISHED = re.compile(
    r"\s*<s>\s*\[INST\] <<SYS>>[ ]*\n(?P<system_prompt>.*?)\n<</SYS>>[ ]*\n\nSentence: "
    r"(?P<sentence>.*)\n(?P<answer_field>[^\n]*?) \[/INST\] ?(?P<label>.*)",
    re.DOTALL,
)


def read_published_text(text):
    """Read a published `text` back: a dict of system_prompt, sentence, answer_field and label (None where it ends).

    The LAST ` [/INST]` is the template's, so a sentence may hold template text of its own. Returns None where `text`
    is not in the template. Accepts the spaces that some published rows have at the ends of the template's lines.
    """
    match = _PUBLISHED.fullmatch(text)
    if match is None:
        return None
    return {
        "system_prompt": match["system_prompt"].rstrip(),
        "sentence": match["sentence"],
        "answer_field": match["answer_field"],
        # Not in the pattern: its time would grow with the cube of a run of spaces.
        "label": match["label"].rstrip().removesuffix("</s>").rstrip() or None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Token ids


def _ids(tokenizer, text):
    # split_special_tokens: the text of a special token (`<s>`, `</s>`) inside a sentence stays ordinary characters.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def _bos(tokenizer):
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def prompt_ids(tokenizer, task, sentence):
    """Return the prompt's ids: BOS where the model's tokenizer puts one, and the last id is that of `]`."""
    return _bos(tokenizer) + _ids(tokenizer, build_prompt(task, sentence))


def prompts_ids(tokenizer, task, sentences):
    """Return a list of what `prompt_ids` gives for each of `sentences`, in a tenth of the time for many."""
    bos = _bos(tokenizer)
    return [bos + ids for ids in _ids(tokenizer, [build_prompt(task, sentence) for sentence in sentences])]


def common_ids(tokenizer, task):
    """Return the ids that the prompts of all sentences begin with, up to where a sentence's text can change them."""
    return os.path.commonprefix(prompts_ids(tokenizer, task, ["", "a", "1", ".", " a", "\n"]))


def answer_ids(tokenizer, label):
    """Return the completion's ids: ` label` as it is tokenised right after `[/INST]`, then EOS.

    Raises UserError for a tokenizer that merges `]` with what follows, since then no boundary stands there.
    """
    end = _ids(tokenizer, "[/INST]")
    whole = _ids(tokenizer, f"[/INST] {label}")
    if whole[: len(end)] != end or tokenizer.eos_token_id is None:
        raise UserError(
            f"this model's tokenizer leaves no token boundary between '[/INST]' and ' {label}', or has no EOS"
        )
    return [*whole[len(end) :], tokenizer.eos_token_id]


def prompt_budget(tokenizer, task, max_seq_length):
    """Return how many tokens a prompt may have so that it and ANY of the task's labels fit `max_seq_length`.

    Room is kept for the longest label whatever a row's own label is: a prompt that depended on it would give the
    answer away, and would differ between training and inference. Raises UserError where not even an empty sentence
    fits.
    """
    longest_answer = max(len(answer_ids(tokenizer, label)) for label in task.labels)
    needed = len(prompt_ids(tokenizer, task, "")) + longest_answer
    if needed > max_seq_length:
        raise UserError(
            f"the prompt of task {task.name} takes {needed} tokens with an empty sentence and the longest label, "
            f"but --max_seq_length is {max_seq_length}; raise it to more than {needed}"
        )
    return max_seq_length - longest_answer


def fit_prompt(tokenizer, task, sentence, budget):
    """Return (prompt ids, whether words were cut), with at most `budget` ids, as `prompt_budget` gives it.

    Words go from the end of the sentence; a first word that alone is too long is cut inside.
    """
    ids = prompt_ids(tokenizer, task, sentence)
    if len(ids) <= budget:
        return ids, False

    def too_long(end):
        return len(prompt_ids(tokenizer, task, sentence[:end])) > budget

    ends = [match.end() for match in re.finditer(r"\S+", sentence)]
    kept = bisect.bisect(ends, False, key=too_long)
    if kept == 0 and ends:
        ends = range(1, ends[0] + 1)
        kept = bisect.bisect(ends, False, key=too_long)
    return prompt_ids(tokenizer, task, sentence[: ends[kept - 1]] if kept else ""), True


def encode_rows(tokenizer, task, rows, max_seq_length):
    """Return (encoded rows, number cut) for rows with `sentence` and `label_text`.

    Each encoded row is a dict of `prompt_ids`, `answer_ids` and `label_text`. Training learns prompt + answer with the
    loss on the answer alone; inference starts from the same prompt ids.
    """
    budget = prompt_budget(tokenizer, task, max_seq_length)
    answers = {label: answer_ids(tokenizer, label) for label in task.labels}
    encoded, cut = [], 0
    for row in rows:
        ids, was_cut = fit_prompt(tokenizer, task, row["sentence"], budget)
        label = row["label_text"]
        encoded.append({"prompt_ids": ids, "answer_ids": answers[label], "label_text": label})
        cut += was_cut
    return encoded, cut
