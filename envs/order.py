"""The order of held-out tasks, so that the first N of them tell about every kind alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import TypeVar

T = TypeVar("T")


def alternating(items: Iterable[T], kind: Callable[[T], str]) -> list[T]:
    """One of each kind in turn, kinds by name, each kind's own in the order that they come in."""
    by_kind: dict[str, list[T]] = defaultdict(list)
    for item in items:
        by_kind[kind(item)].append(item)
    rounds = zip_longest(*(by_kind[name] for name in sorted(by_kind)), fillvalue=None)
    return [item for turn in rounds for item in turn if item is not None]
