"""Batches whose common beginning is computed once, in training and in scoring.

Every row of a task starts with the same system prompt, which is most of the row. `SharedPrefixCollator` puts a batch
into one sequence: the common prefix once, then each row's own tokens, which see the prefix and their own row only.
Loss and gradients are those of the padded batch (similar: PrefixGrouper, arXiv:2506.05433). `label_log_probs` scores
every label of every row in a token tree: the rows' tokens branch off the prefix, and the labels' off the rows.
"""

import functools
import os

import torch
from tqdm import tqdm
from transformers import DynamicCache

import processes
from command_line import UserError


class SharedPrefixCollator:
    """Collates rows of `input_ids` and `labels` into one sequence with their common prefix once.

    Returns input_ids, labels and position_ids of shape (1, tokens), a boolean attention_mask of shape
    (1, 1, tokens, tokens), for models that take a 4-D mask under SDPA, and logits_to_keep (see `answer_columns`).
    Positions go on from the prefix for every row. With N rows of prefix P and own length S a batch has P + N S tokens
    instead of N (P + S); rows that share nothing are packed all the same. `pad_to_multiple_of` rounds the number of
    tokens up with `pad_token_id`, so that few different shapes occur; a padding token sees itself alone.
    """

    def __init__(self, pad_token_id=0, pad_to_multiple_of=1):
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows):
        prefix = shared_length(rows)
        ids, labels, positions = rows[0]["input_ids"][:prefix], [-100] * prefix, list(range(prefix))
        ends = [prefix + sum(len(row["input_ids"]) - prefix for row in rows)] * prefix
        for row in rows:
            own = row["input_ids"][prefix:]
            ids = ids + own
            labels = labels + row["labels"][prefix:]
            positions += range(prefix, prefix + len(own))
            ends += [len(ids)] * len(own)
        padding = -len(ids) % self.pad_to_multiple_of
        ends += range(len(ids) + 1, len(ids) + padding + 1)
        labels = torch.tensor([labels + [-100] * padding])
        return {
            "input_ids": torch.tensor([ids + [self.pad_token_id] * padding]),
            "labels": labels,
            "position_ids": torch.tensor([positions + [0] * padding]),
            "attention_mask": visible(torch.tensor(ends))[None, None],
            "logits_to_keep": answer_columns(labels, self.pad_to_multiple_of),
        }


class PaddedCollator:
    """Collates rows of `input_ids` and `labels` into a batch padded on the left, so that answers end in one column.

    Returns input_ids, labels and position_ids of shape (rows, tokens), a boolean attention_mask of shape
    (rows, 1, tokens, tokens) and logits_to_keep. A padding token sees padding only, never nothing: a query without a
    key has a softmax of 0/0, which not every attention kernel's backward survives.
    """

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        gaps = [longest - len(row["input_ids"]) for row in rows]
        positions = torch.arange(longest) - torch.tensor(gaps)[:, None]
        ends = [torch.tensor([gap] * gap + [longest] * (longest - gap)) for gap in gaps]
        labels = torch.tensor([[-100] * gap + row["labels"] for gap, row in zip(gaps, rows, strict=True)])
        return {
            "input_ids": torch.tensor(
                [[self.pad_token_id] * gap + row["input_ids"] for gap, row in zip(gaps, rows, strict=True)]
            ),
            "labels": labels,
            "position_ids": positions.clamp(min=0),
            "attention_mask": torch.stack([visible(end) for end in ends])[:, None],
            "logits_to_keep": answer_columns(labels),
        }


class OwnRows:
    """Collates with `collator` those rows of a batch that are this process's; several processes share every batch.

    Where there is none, another row without its labels stands in, which adds nothing to loss and gradients.
    """

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        own = processes.own_share(rows)
        batch = self.collator(own or rows[:1])
        if not own:
            batch["labels"].fill_(-100)
        return batch


def answer_columns(labels, pad_to_multiple_of=1):
    """Return the columns of `labels` (rows, tokens) whose logits predict an answer token of some row.

    Rounded up with the last column, which predicts nothing. A model takes them as `logits_to_keep` and then projects
    these positions alone onto its vocabulary.
    """
    columns = (labels[:, 1:] != -100).any(dim=0).nonzero().flatten()
    return torch.nn.functional.pad(columns, (0, -len(columns) % pad_to_multiple_of), value=labels.shape[1] - 1)


def shared_length(rows):
    """Return how many first tokens all rows share, less where a row would keep no prompt token of its own.

    The token before the answer must be the row's own: the prefix's last token cannot predict several rows' answers.
    """
    common = len(os.path.commonprefix([row["input_ids"] for row in rows]))
    prompts = [next(place for place, label in enumerate(row["labels"]) if label != -100) for row in rows]
    return min(common, min(prompts) - 1)


def visible(ends):
    """Return the boolean mask (queries, keys) of tokens that stand in a tree's depth-first order.

    `ends[i]` is where the subtree of token i ends: a token sees itself and its ancestors, which are the earlier tokens
    whose subtree it stands in.
    """
    places = torch.arange(len(ends))
    return (places[None, :] <= places[:, None]) & (places[:, None] < ends[None, :])


def common_length(prompts):
    """Return how many first ids all `prompts` (lists of ids) share; every prompt keeps at least its last id."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)


def prefix_cache(model, prompts):
    """Return (cache, length): the keys and values of the longest common beginning of `prompts` (lists of ids).

    It is computed once, for weights that do not change while it is in use. Every prompt keeps at least its last token.
    """
    length = common_length(prompts)
    cache = DynamicCache()
    if length:
        prefix = torch.tensor([prompts[0][:length]], device=model.device)
        model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, length


class LabelTree:
    """The token tree of `prompts` (lists of ids), each continued by each of `answers` (lists of ids that end in EOS).

    `ids`, `positions` (from `start` on) and `ends` (see `visible`) are its tokens in depth-first order. Equal tokens
    after equal beginnings are one. The last id of an answer, EOS, is not in it, since nothing is predicted after it.
    The logits at `places[i]` predict the id `targets[i]` of the answer number `owners[i]`, counted as row x number of
    answers + answer.
    """

    def __init__(self, prompts, answers, start=0):
        self.ids, self.positions, self.ends = [], [], []
        self.places, self.targets, self.owners = [], [], []
        # Sorted sequences, written without what each shares with the one before, are a tree in depth-first order.
        numbered = sorted(
            ([*prompt, *answer[:-1]], row * len(answers) + number, len(prompt), answer)
            for row, prompt in enumerate(prompts)
            for number, answer in enumerate(answers)
        )
        path, before = [], []
        for sequence, owner, prompt_length, answer in numbered:
            shared = len(os.path.commonprefix([before, sequence]))
            self._close(path[shared:])
            path = path[:shared] + list(range(len(self.ids), len(self.ids) + len(sequence) - shared))
            self.ids += sequence[shared:]
            self.positions += range(start + shared, start + len(sequence))
            self.ends += [None] * (len(sequence) - shared)
            self.places += path[prompt_length - 1 :]
            self.targets += answer
            self.owners += [owner] * len(answer)
            before = sequence
        self._close(path)

    def _close(self, path):
        for place in path:
            self.ends[place] = len(self.ids)


class LabelScorer:
    """Scores `answers` (lists of ids that end in EOS) after prompts that begin with the ids `prefix`.

    The prefix is computed once, for all prompts to come; the weights must not change meanwhile. A prompt that begins
    otherwise is scored all the same, for the price of its whole length.
    """

    @torch.no_grad()
    def __init__(self, model, prefix, answers):
        self.model, self.answers = model, answers
        # With any token behind it: a prompt keeps at least its last one.
        self.cache, start = prefix_cache(model, [[*prefix, 0]] * 2)
        self.prefix = list(prefix[:start])

    @functools.cached_property
    def answer_tokens(self):
        """How many tokens the answers add to a prompt's own."""
        return len(LabelTree([[0]], self.answers).ids) - 1

    def cost(self, prompt):
        """Return how many tokens the prompt (a list of ids) adds to a batch, its answers' among them."""
        return len(prompt) + self.answer_tokens - (len(self.prefix) if self._begins(prompt) else 0)

    def batches(self, prompts, tokens):
        """Return a list of lists of the places of `prompts`: batches of like length, the longest prompts first.

        A batch costs at most `tokens`, or has a single prompt. Prompts that begin otherwise are in batches of their
        own, the last ones.
        """
        order = sorted(range(len(prompts)), key=lambda row: (not self._begins(prompts[row]), -len(prompts[row])))
        batches, room, kind = [], 0, None
        for row in order:
            cost, begins = self.cost(prompts[row]), self._begins(prompts[row])
            if cost > room or begins != kind:
                batches.append([])
                room, kind = tokens, begins
            batches[-1].append(row)
            room -= cost
        return batches

    @torch.no_grad()
    def score(self, prompts):
        """Return a float32 tensor (rows, answers) with log P(answer | prompt) in nats, EOS included, on the CPU.

        All of `prompts`, lists of ids, in one forward over their LabelTree. Either all or none begin with the prefix.
        """
        shared = self.prefix and self._begins(prompts[0])
        cache, start = (self.cache, len(self.prefix)) if shared else (DynamicCache(), 0)
        tree = LabelTree([prompt[start:] for prompt in prompts], self.answers, start)
        scores = _score_tree(self.model, tree, cache, start)
        cache.crop(-len(tree.ids))
        return scores.view(len(prompts), len(self.answers))

    def _begins(self, prompt):
        return prompt[: len(self.prefix)] == self.prefix


def by_batches(prompts, batch_size, work, description=None, leave=True):
    """Return a list of what `work(rows)`, called with the places of a batch's prompts, returns for each prompt.

    Batches of `batch_size` hold prompts (lists of ids) of like length, the longest first; several processes share the
    batches. A progress bar shows `description`, and stays as `leave` says.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    hidden = description is None or not processes.is_first()
    results = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=description, unit="row", leave=leave, disable=hidden) as progress:

        def counted(rows):
            done = work(rows)
            progress.update(len(rows))
            return done

        for rows, of_batch in zip(batches, processes.share_out(batches, counted), strict=True):
            for row, result in zip(rows, of_batch, strict=True):
                results[row] = result
        progress.update(len(prompts) - progress.n)  # the other processes' rows
    return results


def label_log_probs(model, prompts, answers, *, batch_size, description=None):
    """Return a float32 tensor (rows, answers) with log P(answer | prompt) in nats, EOS included, on the CPU.

    `prompts` and `answers` are lists of token ids; the answers end in EOS. What all prompts begin with is computed
    once, and each batch of `batch_size` rows in one forward over its LabelTree; several processes share the batches. A
    progress bar shows `description`. Raises UserError where the model gives a row NaN or an infinite number.
    """
    scorer = LabelScorer(model, prompts[0][: common_length(prompts)], answers)

    def score(rows):
        return scorer.score([prompts[row] for row in rows])

    scores = torch.stack(by_batches(prompts, batch_size, score, description, leave=None))
    bad = (~scores.isfinite()).any(dim=1)
    if bad.any():
        raise UserError(not_finite(f"{int(bad.sum())} of {len(bad)} rows, first row {int(bad.nonzero()[0])}"))
    return scores


def not_finite(where):
    """Return the sentence for a model whose numbers cannot be used."""
    return (
        f"{where}: the model's probabilities are NaN or infinite, so there is no score; its weights are damaged, or "
        "float16 overflows: use a GPU that has bfloat16, or another base model"
    )


def _score_tree(model, tree, cache, start):
    """Return the log-probabilities of the tree's answers, a float32 tensor; `cache` grows by the tree's tokens."""
    mask = torch.nn.functional.pad(visible(torch.tensor(tree.ends)), (start, 0), value=True)
    columns, places = torch.tensor(tree.places).unique(return_inverse=True)
    logits = model(
        input_ids=torch.tensor([tree.ids], device=model.device),
        position_ids=torch.tensor([tree.positions], device=model.device),
        attention_mask=mask[None, None].to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=columns.to(model.device),
    ).logits[0]
    places, targets = places.to(model.device), torch.tensor(tree.targets, device=model.device)
    log_probs = logits[places, targets].float() - logits.float().logsumexp(-1)[places]
    sums = torch.zeros(max(tree.owners) + 1, dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(tree.owners), log_probs.double().cpu()).float()
