"""Training batches whose common beginning is computed once.

Every row of a task starts with the same system prompt, which is most of the row. `SharedPrefixCollator` puts a batch
into one sequence: the common prefix once, then each row's own tokens, which see the prefix and their own row only.
Loss and gradients are those of the padded batch (similar: PrefixGrouper, arXiv:2506.05433).
"""

import os

import torch

PREFIX = -1  # the owner of the prefix's tokens; the others' is the number of their row


class SharedPrefixCollator:
    """Collates rows of `input_ids` and `labels` into one sequence with their common prefix once.

    Returns input_ids, labels and position_ids of shape (1, tokens) and a boolean attention_mask of shape
    (1, 1, tokens, tokens), for models that take a 4-D mask under SDPA. Positions go on from the prefix for every row.
    With N rows of prefix P and own length S a batch has P + N S tokens instead of N (P + S); rows that share nothing
    are packed all the same.
    """

    def __call__(self, rows):
        prefix = shared_length(rows)
        ids, labels = rows[0]["input_ids"][:prefix], [-100] * prefix
        positions, owners = list(range(prefix)), [PREFIX] * prefix
        for number, row in enumerate(rows):
            own = row["input_ids"][prefix:]
            ids = ids + own
            labels = labels + row["labels"][prefix:]
            positions += range(prefix, prefix + len(own))
            owners += [number] * len(own)
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": visible(torch.tensor(owners))[None, None],
        }


class PaddedCollator:
    """Collates rows of `input_ids` and `labels` into a batch padded on the left, so that answers end in one column.

    Returns input_ids, labels and position_ids of shape (rows, tokens) and a boolean attention_mask of shape
    (rows, 1, tokens, tokens). A padding token sees padding only, never nothing: a query without a key has a softmax of
    0/0, which not every attention kernel's backward survives.
    """

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        gaps = [longest - len(row["input_ids"]) for row in rows]
        positions = torch.arange(longest) - torch.tensor(gaps)[:, None]
        return {
            "input_ids": torch.tensor(
                [[self.pad_token_id] * gap + row["input_ids"] for gap, row in zip(gaps, rows, strict=True)]
            ),
            "labels": torch.tensor([[-100] * gap + row["labels"] for gap, row in zip(gaps, rows, strict=True)]),
            "position_ids": positions.clamp(min=0),
            "attention_mask": torch.stack([visible((position >= 0).long()) for position in positions])[:, None],
        }


def shared_length(rows):
    """Return how many first tokens all rows share, less where a row would keep no prompt token of its own.

    The token before the answer must be the row's own: the prefix's last token cannot predict several rows' answers.
    """
    common = len(os.path.commonprefix([row["input_ids"] for row in rows]))
    prompts = [next(place for place, label in enumerate(row["labels"]) if label != -100) for row in rows]
    return min(common, min(prompts) - 1)


def visible(owners):
    """Return the boolean mask (queries, keys) of tokens with `owners`: earlier tokens of one's own or of the prefix."""
    mine = owners[:, None] == owners[None, :]
    return (mine | (owners == PREFIX)[None, :]).tril()
