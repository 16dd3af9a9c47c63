"""The best documents of a BM25 index, in an order that is the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np


def ranked(engine: Any, words: list[str], most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` documents of a bm25s index that share a word with a query: their numbers and scores, best first,
    equals in the index' order.

    Not the library's own `retrieve`: numpy sorts equals in another order on each kind of processor, and where many
    documents are equally good, agents on two machines would read different ones.
    """
    known = [word for word in words if word in engine.vocab_dict]
    if not known:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    scores = engine.get_scores(known)  # (documents,)
    found = np.flatnonzero(scores > 0)
    if len(found) > most:
        least = np.partition(scores[found], -most)[-most]
        found = found[scores[found] >= least]
    best = found[np.lexsort((found, -scores[found]))][:most]
    return best, scores[best]
