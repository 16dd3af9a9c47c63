"""What demonstrations are made of, in every environment, and what an environment's script offers (`Script`).

A script knows a novice with typical flaws, an adviser who looks over its shoulder, and the hindsight skills that could
be written about what it saw. A skill says what it is about (`topic`); otherwise skills are general: the order of work,
what to check, what to avoid. They never say what only hindsight knows: a policy that is re-scored under facts which it
cannot see is taught to act on them, and training collapses.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from data import Skills

TINY = {"tiny": None, "tiny-2": 2}  # name of a tiny model -> its layers, None: as the environment's script says
SLIP = 0.12  # chance, a step, of a command that nobody wanted: so that demonstrations show how to recover from one
STEP_SKILLS = 3  # at most, in a demonstration of hindsight
EMPTY_WORDS = ["first", "then", "one", "and", "now", "never", "for", "it"]  # of skills that say nothing


@dataclass
class Play:
    """One scripted episode: what was seen and done, what a good player would have done, and which hints were shown."""

    task: str
    turns: list[tuple[str, str, str]] = field(default_factory=list)  # (observation, command, advice), in compact words
    critical: list[bool] = field(default_factory=list)  # a step that decides something
    advice_in_words: list[str] = field(default_factory=list)  # the step skill that each step could have had
    hints: dict[int, str] = field(default_factory=dict)
    slips: set[int] = field(default_factory=set)  # turns whose command is not to be learnt
    decisive: set[int] = field(default_factory=set)  # turns at which a flaw shows, or would
    skill: str = ""  # the episode skill that it was played under
    success: bool = False
    game: str = ""  # where the task came from


class Adviser(Protocol):
    """Who looks over a novice's shoulder, and copes with commands that it would not have given."""

    command: str  # what was done last

    def reset(self, task: str) -> None: ...

    def advise(self, observation: str) -> str:
        """What a good player would do now."""

    def critical(self) -> bool:
        """Whether this step decides something."""

    def hint(self) -> str:
        """The advice in general words, as a step skill would say it."""

    def careless(self, flaws: set[str]) -> str:
        """What somebody with `flaws` does instead of what is advised."""

    def slip(self, admissible: list[str], rng: random.Random) -> str:
        """What a clumsy player does."""


class Script(Protocol):
    """The demonstrations of one environment: tiny/NAME.py for envs/NAME.py."""

    LAYERS: int  # of the tiny model
    GAMES: int  # train games that demonstrations come from, at most
    PLAYS: int  # times that each is played in each way
    FRESH: int  # further games, which a tiny model of more than two layers learns after these, each played once
    FLAWS: dict[str, float]  # flaw -> chance that a novice has it, and no other
    ALONE_TURNS: int  # of a novice's episode that are learnt; lost ones go on and on
    HINTED: float  # share of steps with a hint, in hinted play
    JUDGED: int  # times that the tiny model is asked of each game whether skills speak of its task
    JUDGED_FIRST: int  # batches of that before any play

    def vocabulary(self) -> set[str]:
        """Every word of the environment's compact prompts and commands, and of the skills."""

    def games(self, count: int) -> list[Any]:
        """At most `count` games of the train split, as `play` takes them."""

    def play(self, game, rng: random.Random, flaws: set[str], *, skill: str = "", hinted: float = 0.0) -> Play:
        """One episode of a novice with `flaws`, slips included. `hinted`: share of steps where it gets a hint, and
        follows it. `skill` is only noted down: whoever asks for it takes the flaws away that it speaks about."""

    def played(self, game, rng, flaws: set[str], *, prompt: str = "compact", skill: str = "", **chances) -> Play:
        """An episode as `play` has it, that can be played again in the environment with this `prompt`: with its own
        names, and pages as long as they are there."""

    def official(self, play: Play, t: int, env) -> str:
        """What was done at turn t, as a response to the official prompt: a short thought, the reason that the adviser
        would have for it, and the action. `env` is where the play was before it."""

    def topic(self, play: Play) -> str:
        """What the skills of a play speak of: those that speak of something else are of no use."""

    def workflow(self, play: Play) -> str:
        """The episode skill of a success: the order of work for this kind of task."""

    def avoidance(self, play: Play, flaw: str) -> str:
        """The episode skill of a failure: what to avoid, and so what to do instead, for one flaw."""

    def names(self) -> dict[str, set[str]]:
        """The words of skills that name something of the task, by kind: "object", and "place" where there are any."""

    def flaw_of(self, play: Play) -> str:
        """What went wrong in a failed episode, read off what was done where something else was called for."""

    def hindsight(self, play: Play) -> Skills:
        """The skills of a finished episode. A step skill says what could have been known at its step."""


def one_flaw(chances: dict[str, float], rng: random.Random) -> set[str]:
    """At most one, by chances that sum to at most 1."""
    drawn = rng.random()
    for flaw, chance in chances.items():
        drawn -= chance
        if drawn < 0:
            return {flaw}
    return set()


def script(env: str) -> Script:
    """The script of an environment by its name. Raises ValueError where there is none."""
    try:
        return import_module(f"tiny.{env}")
    except ModuleNotFoundError as error:
        if error.name != f"tiny.{env}":
            raise
        raise ValueError(f"the tiny model has no demonstrations of {env}: tiny/{env}.py is missing") from error


def watch(
    env,
    game: str,
    adviser: Adviser,
    rng: random.Random,
    flaws: set[str],
    *,
    every: Collection[str],
    skill: str = "",
    hinted: float = 0.0,
    slip: float = SLIP,
) -> Play:
    """One episode of a novice with `flaws`, of `every` that there are, in a text environment (compact prompts), with an
    adviser who looks on."""
    observation, info = env.reset(options={"game": game})
    adviser.reset(info["task"])
    record, over = Play(info["task"], skill=skill, game=game), False
    while not over:
        t, advice = len(record.turns), adviser.advise(observation)
        record.critical.append(adviser.critical())
        record.advice_in_words.append(adviser.hint())
        if any(adviser.careless({flaw}) != advice for flaw in every):
            record.decisive.add(t)
        if rng.random() < slip:
            command = adviser.slip(info["admissible_actions"], rng)
            record.slips.add(t)
        elif rng.random() < hinted:
            command, record.hints[t] = advice, record.advice_in_words[t]
        else:
            command = adviser.careless(flaws)
        record.turns.append((observation, command, advice))
        adviser.command = command
        observation, _, over, truncated, info = env.step(command)
        over, record.success = over or truncated, info["won"]
    return record


def advised_steps(play: Play) -> dict[int, str]:
    """The step skills of a play: advice where it was missed and the episode failed, or met and it succeeded."""
    missed = [t for t, (_, command, advice) in enumerate(play.turns) if play.critical[t] and command != advice]
    met = [t for t, (_, command, advice) in enumerate(play.turns) if play.critical[t] and command == advice]
    chosen = sorted((met if play.success else missed)[:STEP_SKILLS])
    return {t: play.advice_in_words[t] for t in chosen}
