"""Scripted Search QA episodes for the warm start (the Script of tiny/plays.py): who answers from the first passage that
fits or nearly does, or searches for the whole question, and who would not. Skills name what is looked for, never a
name: which country it is, only hindsight knows.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache

from data import Skills
from envs.search import SearchEnv
from envs.search import vocabulary as environment_words
from envs.search.env import read_action
from envs.search.expert import SearchExpert, worded_like
from envs.search.facts import HOPS, TITLES, facts
from envs.search.text import shown_passages, words
from tiny.plays import Play, advised_steps, watch

LAYERS = 2
GAMES, PLAYS = 2000, 4
FRESH = 0
FLAWS = {"first doc": 0.45, "whole question": 0.55}
ALONE_TURNS = MAX_STEPS = 5  # two searches and the answer, and room for two slips
HINTED = 0.4
JUDGED, JUDGED_FIRST = 3, 600
SKILL_WORDS = (
    "for first then never answer search each before whole question from read and doc with same name it now one done"
)


class Adviser(SearchExpert):
    """A SearchExpert that copes with commands that it would not have given (plays.Adviser): it goes by the results."""

    def reset(self, question: str) -> None:
        super().reset(question)
        self.plan = tuple(self.hops)
        self.command = self.advice = ""
        self.passages: list[str] = []
        self.misread: str | None = None  # what is said of another name, in the same words
        self.fresh = False  # whether this observation told what the last search was for

    def advise(self, observation: str) -> str:
        self.passages, self.misread, self.fresh = shown_passages(observation), None, False
        if self.hops and self.passages:
            said = worded_like(HOPS[self.hops[0]].sentence, self.passages)
            self.misread = next((found for given, found in said if given != self.known), None)
            if (found := self._read(self.passages)) is not None:
                self.hops.pop(0)
                self.known, self.fresh = found, True
        self.advice = self._search(self.known) if self.hops else f"answer {self.known}"
        return self.advice

    def critical(self) -> bool:
        return True

    def hint(self) -> str:
        """The advice in general words: what is looked for, no name."""
        if self.hops:
            return f"search {query(self.hops[0])}"
        return f"for {query(self.plan[-1])} answer from doc with same name"

    def careless(self, flaws: set[str]) -> str:
        """What somebody with `flaws` does instead of what is advised."""
        advice = self.advice
        if "whole question" in flaws and advice.startswith("search "):
            return f"answer {self._sounds_right()}" if self.passages else f"search {self.question}"
        if "first doc" in flaws and (self.misread is not None or self.fresh):
            return f"answer {self.known if self.misread is None else self.misread}"
        return advice

    def slip(self, admissible: list[str], rng: random.Random) -> str:
        """What a clumsy player does: asks something else about what is known."""
        return f"search {query(rng.choice(list(HOPS)), self.known)}"

    def _search(self, name: str) -> str:
        return f"search {query(self.hops[0], name)}"

    def _sounds_right(self) -> str:
        said = worded_like(HOPS[self.plan[-1]].sentence, self.passages)
        return said[0][1] if said else self.passages[0].split()[-1]


def query(hop: str, name: str = "it") -> str:
    return words(HOPS[hop].query.format(given=name))


def vocabulary() -> set[str]:
    return {*environment_words(), *SKILL_WORDS.split()}


def games(count: int) -> list[str]:
    return SearchEnv().tasks("train")[:count]


def play(game: str, rng: random.Random, flaws: set[str], *, skill: str = "", **chances: float) -> Play:
    return renamed(played(game, rng, flaws, skill=skill, **chances), rng)


def played(
    game: str, rng: random.Random, flaws: set[str], *, prompt: str = "compact", skill: str = "", **chances: float
) -> Play:
    """An episode as it happened, with the names that are in the corpus: the same with either prompt."""
    env = SearchEnv(prompt="compact", max_steps=MAX_STEPS)
    return watch(env, game, Adviser(rng), rng, flaws, every=FLAWS, skill=skill, **chances)


def official(play: Play, t: int, env) -> str:
    kind, text = read_action(play.turns[t][1])
    why = {
        "search": "I do not know that yet, so I search for it." if t else "I have to look this up first.",
        "answer": f"A passage says {text}, so I answer." if t else f"I think that it is {text}.",
    }
    return f"<think>{why[kind]}</think><{kind}>{text}</{kind}>"


@lru_cache
def name_words() -> tuple[str, ...]:
    """The words that stand in names alone, sorted."""
    names = {word for fact in facts() for name in (fact.given, fact.found, fact.near) for word in words(name).split()}
    sentences = [text for hop in HOPS.values() for text in (hop.sentence, *hop.questions, hop.query, hop.phrase)]
    return tuple(sorted(names - set(words(" ".join([*sentences, *TITLES.values()])).split())))


def renamed(play: Play, rng: random.Random) -> Play:
    """The same play with other words in its names. Otherwise a model of this size learns by heart who belongs to whom,
    instead of reading it, and cannot write a name that no demonstration asked about."""
    turns = [text for turn in play.turns for text in turn]
    used = sorted({word for text in (play.task, *turns) for word in text.split()}.intersection(name_words()))
    other = dict(zip(used, rng.sample(name_words(), len(used)), strict=True))

    def rename(text: str) -> str:
        return " ".join(other.get(word, word) for word in text.split())

    turns = [(rename(seen), rename(command), rename(advice)) for seen, command, advice in play.turns]
    return replace(play, task=rename(play.task), turns=turns)


# ---- skills, as a script would write them ---------------------------------------------------------------------------


def plan_of(play: Play) -> list[str]:
    """What has to be searched for, in order, in general words: it follows from the question."""
    expert = SearchExpert(random.Random(0))
    expert.reset(play.task)
    return [query(hop) for hop in expert.hops]


def topic(play: Play) -> str:
    """What a skill has to speak of, to be of use."""
    return " then ".join(plan_of(play))


def workflow(play: Play) -> str:
    """The order of work for this kind of question."""
    return f"for {topic(play)} first search each then answer from doc with same name"


def names() -> dict[str, set[str]]:
    return {"object": {word for hop in HOPS for word in query(hop).split()} - {"it"}}


def flaw_of(play: Play) -> str:
    """What went wrong, read off what was done where something else was called for."""
    return "whole question" if f"search {play.task}" in [command for _, command, _ in play.turns] else "first doc"


def avoidance(play: Play, flaw: str) -> str:
    """What to avoid, and so what to do instead, for one flaw."""
    what = {
        "whole question": "never search whole question first search each",
        "first doc": "never answer from first doc before search each and read doc with same name",
    }
    return f"for {topic(play)} {what[flaw]}"


SUMMARIES = {"whole question": "whole question", "first doc": "doc"}


def hindsight(play: Play) -> Skills:
    if play.success:
        return Skills("done", workflow(play), advised_steps(play))
    flaw = flaw_of(play)
    return Skills(SUMMARIES[flaw], avoidance(play, flaw), advised_steps(play))
