"""Text of Search QA: the usual answer normalisation and exact match, passages as the two prompt styles show them."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_INFORMATION = re.compile(r"<information>(.*)</information>", re.DOTALL)


def normalize(answer: str) -> str:
    """Lower case, ASCII punctuation and articles off, spaces folded: SQuAD's normalisation, as Search-R1 applies it
    (verl/utils/reward_score/qa_em.py)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golden_answers: str | Iterable[str]) -> bool:
    """Whether `prediction` is one of `golden_answers` (a list, an array or one string) after normalisation.

    An empty list matches nothing. Here this departs from the release: an answer of which normalisation leaves nothing
    ("The The", "A", "!!!") is compared as it stands, case and spaces apart. There an empty prediction would win it.
    """
    if tolist := getattr(golden_answers, "tolist", None):  # an array, perhaps of one string and no dimension
        golden_answers = tolist()
    if isinstance(golden_answers, str):
        golden_answers = [golden_answers]
    return any(_same(prediction, str(answer)) for answer in golden_answers)


def _same(prediction: str, answer: str) -> bool:
    if normalized := normalize(answer):
        return normalize(prediction) == normalized
    plain = answer.lower().split()
    return bool(plain) and prediction.lower().split() == plain


def words(text: str) -> str:
    """A text in the compact style: lower-case words and numbers, articles left out."""
    return " ".join(word for word in re.findall(r"[^\W_]+", text.lower()) if word not in ("a", "an", "the"))


def passage_words(contents: str) -> str:
    """A passage ('"Title"\\ntext') in the compact style, without a title that its text begins with anyway."""
    title, _, text = contents.partition("\n")
    title, text = words(title), words(text)
    return text if f"{text} ".startswith(f"{title} ") else f"{title} {text}".strip()


def official_results(passages: list[str]) -> str:
    """Search results as the authors' release shows them (third_party/skyrl_gym/tools/search.py): JSON between tags."""
    listed = "".join(f"Doc {i}: {contents.strip()}\n" for i, contents in enumerate(passages, 1))
    return f"<information>{json.dumps({'result': listed or 'No search results found.'})}</information>"


def compact_results(passages: list[str]) -> str:
    return " ".join(f"doc {i} {passage_words(contents)}" for i, contents in enumerate(passages, 1)) or "no results"


def shown_passages(observation: str) -> list[str]:
    """What an observation of either style shows, a passage an entry, in compact words. [] where it shows none."""
    if found := _INFORMATION.search(observation):
        listed = json.loads(found[1])["result"]
        return [passage_words(part.strip()) for part in re.split(r"^Doc \d+: ", listed, flags=re.MULTILINE)[1:]]
    return [part.strip() for part in re.split(r"\bdoc \d+\b", observation)[1:]]
