"""What A_skill says to each kind of token while runs go on: python lab/experiments/kinds.py runs/NAME/ARM-*

Reads the samples of run folders, all runs alike. A response's first token says what kind of action it is: of the two
most frequent ones the share of responses and the mean of A_skill are printed. Of the others, which are words, the mean
of A_skill and of -log pi_old, in nats.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from lab.experiments.tables import markdown, show
from runlog.metrics import each_line

EDGES = (0, 4, 8, 12, 16, 20, 30, 60, 120)  # iterations
WORD = ""  # stands for any token but the first


def tokens(episodes: Iterable[dict]) -> Iterator[tuple[int, str, float, float]]:
    """(iteration, the first token or WORD, A_skill, -log pi_old) of each token but a response's last, its end; A_skill
    is NaN where no skill was scored."""
    for episode in episodes:
        for step in episode["steps"]:
            rows = zip(step["tokens"][:-1], step["skill_advantages"], step["old_logprobs"], strict=False)
            for at, (token, shift, logprob) in enumerate(rows):
                yield episode["iteration"], WORD if at else token, float("nan") if shift is None else shift, -logprob


def table(found: list[tuple[int, str, float, float]]) -> str:
    """A row for the iterations between two of EDGES."""
    firsts = Counter(kind for _, kind, _, _ in found if kind != WORD)
    shown = [kind for kind, _ in firsts.most_common(2)]
    head = [
        "iterations",
        *(title for kind in shown for title in (f"{kind}, %", "A_skill")),
        "words: A_skill",
        "-log pi",
    ]
    rows = []
    for begin, end in pairwise(EDGES):
        own = [line for line in found if begin <= line[0] < end]
        responses, row = sum(kind != WORD for _, kind, _, _ in own), [f"{begin} to {end - 1}"]
        for kind in shown:
            count = sum(line[1] == kind for line in own)
            row += [show(100 * count / max(1, responses), 0), mean([shift for _, k, shift, _ in own if k == kind])]
        words = [line for line in own if line[1] == WORD]
        rows.append([*row, mean([shift for _, _, shift, _ in words]), mean([surprise for *_, surprise in words])])
    return markdown(head, rows)


def mean(values: list[float]) -> str:
    """Of those that are no NaN."""
    known = [value for value in values if value == value]
    return show(sum(known) / len(known), 2) if known else "-"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of one arm")
    args = parser.parse_args(argv)
    print(f"{len(args.runs)} runs: {', '.join(run.name for run in args.runs)}\n")
    print(table([token for run in args.runs for token in tokens(each_line(run / "samples.jsonl"))]))


if __name__ == "__main__":
    main()
