"""A player of the generated Search QA questions, for demonstrations. It knows how such questions and passages are
worded, and nothing else: which country it is and what the answer is, it reads.
"""

from __future__ import annotations

import re
from random import Random

from envs.search.facts import HOPS, facts
from envs.search.text import shown_passages, words

# What a novice may do wrong.
FLAWS = {
    "one_hop": "answers with what the first of two searches brought",
    "whole_question": "searches for the question as it stands, and answers with what sounds right",
    "guess": "answers without a search",
    "distractor": "copies from another passage that is worded like the right one",
}


def _pattern(template: str, **named: str) -> str:
    """A template of HOPS as a regular expression over compact words; names that are not given match anything."""
    fields = {name: f"field{name}" for name in ("given", "found", "near")}
    text = words(template.format(**fields))
    for name, field in fields.items():
        text = text.replace(field, re.escape(words(named[name])) if name in named else f"(?P<{name}>.+)")
    return text


def _forms() -> list[tuple[re.Pattern, tuple[str, ...]]]:
    """(question, hops to take) of every wording; two-hop ones first, since a one-hop wording matches them as well."""
    bridges = {name: hop for name, hop in HOPS.items() if hop.phrase}
    targets = {name: hop for name, hop in HOPS.items() if not hop.phrase}
    two = [
        (question.format(given=bridge.phrase), (first, second))
        for first, bridge in bridges.items()
        for second, target in targets.items()
        for question in target.questions
    ]
    one = [(question, (name,)) for name, hop in HOPS.items() for question in hop.questions]
    return [(re.compile(_pattern(question)), hops) for question, hops in (*two, *one)]


FORMS = _forms()


class SearchExpert:
    """Plans the hops, searches for each, reads, answers. `flaws` (keys of FLAWS) make a novice of it.

    `rng` only decides what a guess is. Actions are commands: "search ..." or "answer ...".
    """

    def __init__(self, rng: Random, flaws: set[str] | frozenset[str] = frozenset()):
        if unknown := set(flaws) - FLAWS.keys():
            raise ValueError(f"unknown flaws {', '.join(sorted(unknown))}; known: {', '.join(FLAWS)}")
        self.rng, self.flaws = rng, flaws

    def reset(self, question: str) -> None:
        """Raises ValueError for a question that is not worded like a generated one."""
        self.question = words(question)
        for form, hops in FORMS:
            if match := form.fullmatch(self.question):
                self.hops, self.known = list(hops), match["given"]
                break
        else:
            raise ValueError(f"not a generated question: {question!r}")
        self.searched = False

    def act(self, observation: str) -> str:
        """The next command, after `observation` (the question at first, then search results in either style)."""
        if "guess" in self.flaws:
            return f"answer {self.rng.choice(sorted({words(f.found) for f in facts() if f.hop == self.hops[-1]}))}"
        if self.searched:
            passages = shown_passages(observation)
            found = self._read(passages)
            if found is None:
                return f"answer {self._copied(passages)}"
            self.hops.pop(0)
            self.known = found
            if "one_hop" in self.flaws:
                return f"answer {found}"
        if not self.hops:
            return f"answer {self.known}"
        self.searched = True
        if "whole_question" in self.flaws:
            return f"search {self.question}"
        return f"search {words(HOPS[self.hops[0]].query.format(given=self.known))}"

    def _read(self, passages: list[str]) -> str | None:
        """What the sentence says that names what is known; a careless reader takes another name's sentence."""
        sentence = HOPS[self.hops[0]].sentence
        if "distractor" in self.flaws:
            said = worded_like(sentence, passages)
            return next((found for given, found in said if given != self.known), said[0][1] if said else None)
        right = re.compile(_pattern(sentence, given=self.known))
        return next((match["found"] for passage in passages if (match := right.fullmatch(passage))), None)

    def _copied(self, passages: list[str]) -> str:
        """Where nothing fits: what is said of another name, as an answer to the question would be; else a last word."""
        said = worded_like(HOPS[self.hops[-1]].sentence, passages)
        return said[0][1] if said else passages[0].split()[-1] if passages else "nothing"


def worded_like(sentence: str, passages: list[str]) -> list[tuple[str, str]]:
    """(given, found) of each passage that is worded like `sentence`."""
    worded = re.compile(_pattern(sentence))
    matches = (worded.fullmatch(passage) for passage in passages)
    return [(match["given"], match["found"]) for match in matches if match]
