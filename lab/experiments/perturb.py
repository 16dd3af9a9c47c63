"""ALFWorld with observations that say the same in another order or in other words: what training never showed.

Both keep to the words of the tiny model's vocabulary, and both read the official style and the compact one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from envs import TextEnv
from envs.alfworld.engine import listing

# "you see a pen 1, a cd 2, and a mug 1" and, to the end of a compact observation, "see pen cd 2 mug"
OFFICIAL_LIST = re.compile(r"(?<=you see )a \w+ \d+(?:, (?:and )?a \w+ \d+)+")
COMPACT_LIST = re.compile(r"(?<=\bsee )[a-z]+(?: \d+)?(?: [a-z]+(?: \d+)?)+$")

OTHER_WORDS = {
    "see": "find",
    "pick up": "take",
    "is closed": "is not open",
    "happens": "is done",
    "move": "put",
    "using": "with",
    "turn on": "use",
}
WORDS = re.compile(rf"\b(?:{'|'.join(OTHER_WORDS)})\b")

Change = Callable[[str, Random], str]


def shuffled(observation: str, rng: Random) -> str:
    """The objects (and, at first, the receptacles) that an observation lists, in another order."""

    def official(found: re.Match) -> str:
        return listing(_drawn(re.findall(r"a \w+ \d+", found[0]), rng))

    def compact(found: re.Match) -> str:
        return " ".join(_drawn(re.findall(r"[a-z]+(?: \d+)?", found[0]), rng))

    return COMPACT_LIST.sub(compact, OFFICIAL_LIST.sub(official, observation))


def _drawn(items: list[str], rng: Random) -> list[str]:
    return rng.sample(items, len(items))


def reworded(observation: str, rng: Random) -> str:
    """Each wording of OTHER_WORDS replaced with chance 1/2: no wording can be relied on, even within an episode."""
    return WORDS.sub(lambda found: OTHER_WORDS[found[0]] if rng.random() < 0.5 else found[0], observation)


CHANGES: dict[str, Change] = {"order of objects": shuffled, "wording": reworded}


class Perturbed:
    """An ALFWorld environment whose observations are changed before anyone reads them; tasks and actions are not."""

    def __init__(self, env: TextEnv, change: Change, seed: int):
        self.env, self.change, self.seed = env, change, seed

    def reset(self, **options) -> tuple[str, dict]:
        observation, info = self.env.reset(**options)
        self.rng = Random(f"{self.seed} {info['game']}")  # of the game alone: every policy meets the same changes
        return self.change(observation, self.rng), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        observation, *rest = self.env.step(action)
        return self.change(observation, self.rng), *rest

    def __getattr__(self, name: str):
        return getattr(self.env, name)
