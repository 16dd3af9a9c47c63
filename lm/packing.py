"""Rows of a batch -> the sequences that a model reads: packed where contexts extend one another, with branches.

Shapes: B rows (steps); a micro-batch holds S sequences of padded length L and N response tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Sequence:
    """One row of model input: a conversation (the trunk), then the branches that leave it.

    `responses` lists what is scored in it, in order of position: (row of the batch, first position, length). `branches`
    lists (branching point, first position, length): a branch sees the trunk up to its branching point, and itself.
    """

    ids: list[int]
    responses: list[tuple[int, int, int]]
    branches: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def trunk(self) -> list[int]:
        return self.ids[: self.branches[0][1]] if self.branches else self.ids


def pack(contexts: list[list[int] | None], responses: list[list[int]], *, packed: bool = True) -> list[Sequence]:
    """Rows -> sequences. A row whose context extends the sequence before it, token by token, is packed into it.

    In "chat" style a trajectory of T turns becomes one sequence: one forward pass instead of T, with the same numbers,
    since causal attention gives a position nothing but its past. Where contexts do not extend one another ("window"
    style, or a template that drops old thoughts) every row stays alone, as all do with `packed=False`.
    A row whose context is None is left out.
    Raises ValueError for an empty context or response.
    """
    sequences: list[Sequence] = []
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        if context is None:
            continue
        if not context or not response:
            raise ValueError(f"row {row} has an empty {'response' if context else 'context'}; nothing can be scored")
        last = sequences[-1] if sequences else None
        if not (packed and last and len(context) >= len(last.ids) and context[: len(last.ids)] == last.ids):
            sequences.append(last := Sequence([], []))
        last.ids = context + response
        last.responses.append((row, len(context), len(response)))
    return sequences


def micro_batches(sequences: list[Sequence], token_budget: int) -> list[list[Sequence]]:
    """Group sequences so that S x L stays within `token_budget` (a longer sequence goes alone). Longest first, so that
    a run that does not fit in memory fails at once, and little is lost to padding."""
    batches: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        if not batches or len(batches[-1][0].ids) * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def graft(
    sequences: list[Sequence], contexts: list[list[int] | None], responses: list[list[int]], token_budget: int
) -> list[Sequence]:
    """Hang a second context of each row (None: it has none) on the packed sequence that holds the row.

    The new sequences hold what the old ones did, and the second contexts' responses as rows B + row:

        ids        [h_0 .. y_0 h_1 .. y_1 h_2 .. y_2 | rest of h^_1 from where it differs from h_1, y_1 | ... ]
        position    0 ..       p ..                  | p ..                                             |

    A second context is a sequence of its own where nothing is shared (it differs from the first token on, or its row
    was packed with no other: "window" style), or where the branch would push a sequence over `token_budget`.
    """
    trees = [Sequence(list(s.ids), list(s.responses), list(s.branches)) for s in sequences]
    home = {row: tree for tree in trees if len(tree.responses) > 1 for row, _, _ in tree.responses}
    alone: list[tuple[int, list[int]]] = []  # (row, second context)
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        if context is None:
            continue
        tree = home.get(row)
        # the last token of a context predicts the response, so it always belongs to the branch
        shared = _common(tree.trunk, context[:-1]) if tree else 0
        branch = context[shared:] + response
        if not shared or len(tree.ids) + len(branch) > token_budget:
            alone.append((row, context))
            continue
        start = len(tree.ids)
        tree.branches.append((shared, start, len(branch)))
        tree.responses.append((len(contexts) + row, start + len(branch) - len(response), len(response)))
        tree.ids += branch
    for sequence in pack([context for _, context in alone], [responses[row] for row, _ in alone]):
        placed = [(len(contexts) + alone[i][0], start, size) for i, start, size in sequence.responses]
        trees.append(Sequence(sequence.ids, placed))
    return trees


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
