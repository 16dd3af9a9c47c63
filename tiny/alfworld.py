"""Scripted ALFWorld episodes for the warm start (the Script of tiny/plays.py): who forgets half of the task, and who
would not. Skills say where such things are usually found, never where the thing lay in this very game.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data import Skills, Trajectory
from envs.alfworld import cached_games, room_of, words
from envs.alfworld.engine import FastEngine, load_game
from envs.alfworld.expert import TOOLS, Explorer, kind_of
from envs.alfworld.rooms import DATA, FACTS, likely_places
from tiny.plays import SLIP, Play, advised_steps

LAYERS = 3
GAMES, PLAYS = 1900, 3
FRESH = 3800
FLAWS = {"forget": 0.5}
ALONE_TURNS = 14
HINTED = 0.25
JUDGED, JUDGED_FIRST = 5, 450
MAX_STEPS = 20
SKILL_WORDS = "for first then find never every other before stop after one second done closed not and now"


@dataclass(kw_only=True)
class HouseholdPlay(Play):
    task_type: str
    thing: str
    parent: str
    lamp: str
    commands: list[str] = field(default_factory=list)  # as the engine takes them
    held: list[str] = field(default_factory=list)  # what was held before each, "" for nothing


class Adviser(Explorer):
    """An Explorer that can look over a novice's shoulder: it copes with commands that it would not have given."""

    def reset(self, observation: str) -> None:
        super().reset(observation)
        self.treated: set[str] = set()
        self.origin = ""  # where what is held was taken from

    def act(self, observation: str, admissible: Sequence[str] = ()) -> str:
        if self.command == f"go to {self.at}":
            self.command = ""  # from where one is already: nothing happens, and nothing is to be made of it
        return super().act(observation, admissible)

    def _remember(self, observation: str) -> None:
        verb, names = self.command.split()[0], re.findall(r"[a-z]+ \d+", self.command)
        happened = not observation.startswith("Nothing happens")
        if happened and verb == "take":
            self.origin = names[1]
            self.seen.setdefault(names[0], names[1])
        super()._remember(observation)
        if happened and verb in ("clean", "heat", "cool"):
            self.treated.add(names[0])
        elif happened and verb == "take":
            self.ready = self.task_type not in TOOLS or names[0] in self.treated
        elif happened and verb == "close":
            self.closed.add(names[0])

    def _bring(self) -> str:
        if kind_of(self.held) != self.thing:
            return self._reach(self.origin) or f"move {self.held} to {self.origin}"
        return super()._bring()

    def critical(self) -> bool:
        """Whether the step decides something: a chance to open, take, treat, place or use, or the way there."""
        return not self.command.startswith("go ") or bool(self.held)

    def slip(self, engine: FastEngine, rng: random.Random) -> str:
        """What a clumsy player does: something possible, a way there or back, taking what is not here."""
        possible = [command for command in engine.admissible_commands() if command not in ("help", "inventory")]
        wrong = [f"go to {rng.choice(self.receptacles)}", f"take {self.thing} 1 from {self.at or self.receptacles[0]}"]
        return rng.choice([rng.choice(possible), *wrong])

    def forgets(self) -> bool:
        """Whether there is something to forget now: what comes before the thing is put down, or a second one."""
        if self.task_type == "pick_two_obj_and_place":
            return not self.held and bool(self.target)
        if not self.held or (self.task_type in TOOLS and self.ready):
            return False
        return self.task_type in TOOLS or bool(self.at)

    def careless(self, rng: random.Random) -> str | None:
        """What somebody does who forgets half of the task, or None where there is nothing to forget."""
        if not self.forgets():
            return None
        if self.task_type == "pick_two_obj_and_place":
            return f"go to {rng.choice(self.receptacles)}"
        if self.task_type in TOOLS:
            place = self._destination()
            return self._reach(place) or f"move {self.held} to {place}"
        return f"move {self.held} to {self.at}"


# What is done at a step: (adviser, engine, advice) -> a command, or None: be given the advice as a hint, and follow it.
Decide = Callable[[Adviser, FastEngine, str], str | None]


def watch(
    game, rng: random.Random, decide: Decide, *, skill: str = "", slip: float = 0.0, max_steps: int = MAX_STEPS
) -> HouseholdPlay:
    """Play one episode by `decide`, with an adviser who says at each step what a good player would do.
    `slip`: chance, a step, that something else is done instead."""
    engine, adviser = FastEngine(game), Adviser(rng, likely_places)
    observation = engine.reset()
    adviser.reset(observation)
    record = HouseholdPlay(
        words(game.task),
        skill=skill,
        task_type=game.task_type,
        thing=adviser.thing,
        parent=adviser.parent,
        lamp=adviser.lamp,
        game=game.path,
    )
    observation = room_of(observation)
    for t in range(max_steps):
        advice = adviser.act(observation)
        record.critical.append(adviser.critical())
        record.advice_in_words.append(hint(advice, adviser.thing, adviser.held))
        if adviser.forgets():
            record.decisive.add(t)
        if rng.random() < slip:
            command = adviser.slip(engine, rng)
            record.slips.add(t)
        elif (command := decide(adviser, engine, advice)) is None:
            command, record.hints[t] = advice, record.advice_in_words[t]
        record.turns.append((words(observation), words(command), words(advice)))
        record.commands.append(command)
        record.held.append(adviser.held)
        adviser.command = command
        observation = engine.step(command)
        if engine.won:
            record.success = True
            break
    return record


def novice(rng: random.Random, flaws: set[str], hinted: float = 0.0) -> Decide:
    """Somebody who forgets half of the task; follows hints where there are any."""

    def decide(adviser: Adviser, engine: FastEngine, advice: str) -> str | None:
        if rng.random() < hinted:
            return None
        command = advice
        if "forget" in flaws:
            command = adviser.careless(rng) or command
        return command

    return decide


def reciter(commands: list[str]) -> Decide:
    """Somebody who does what was done before (in compact words): to have an adviser look at a finished episode."""
    rest = iter(commands)

    def decide(adviser: Adviser, engine: FastEngine, advice: str) -> str | None:
        command = next(rest)
        return next((c for c in engine.admissible_commands() if words(c) == command), command)

    return decide


def replay(trajectory: Trajectory) -> HouseholdPlay:
    """A finished episode, as an adviser sees it who looks on: what should have been done at each of its steps."""
    commands = [step.action or "nothing" for step in trajectory.steps]
    return watch(load_game(trajectory.game), random.Random(0), reciter(commands), max_steps=len(commands))


def games(count: int) -> list[str]:
    return cached_games("small", "train", count)


def play(game: str, rng: random.Random, flaws: set[str], *, skill: str = "", hinted: float = 0.0) -> HouseholdPlay:
    return watch(load_game(game), rng, novice(rng, flaws, hinted), skill=skill, slip=SLIP)


def played(game: str, rng: random.Random, flaws: set[str], *, prompt: str = "compact", **chances) -> HouseholdPlay:
    return play(game, rng, flaws, **chances)  # the same in either prompt


REASONS = {
    "look": "I have not got the {thing} yet, so I look in the {what}.",
    "light": "I have the {thing} and still need the {lamp}, so I look in the {what}.",
    "go": "I have the {thing}, so I go to the {what}.",
    "open": "The {what} is closed, so I open it.",
    "take": "The {what} is here, so I take it.",
    "clean": "The {what} has to be clean, so I clean it.",
    "heat": "The {what} has to be hot, so I heat it.",
    "cool": "The {what} has to be cool, so I cool it.",
    "move": "I have the {what} and this is the place, so I put it here.",
    "use": "I have the {thing} and the {what} is here, so I use it.",
}


def reason(play: HouseholdPlay, t: int) -> str:
    """Why one would do what was done at turn t, in a sentence."""
    verb, *names = [word for word in play.commands[t].split() if not word.isdigit()]
    if verb in ("go", "examine"):
        on_the_way = "light" if play.task_type == "look_at_obj_in_light" else "go"
        return REASONS[on_the_way if play.held[t] else "look"].format(
            thing=kind_of(play.held[t] or play.thing), lamp=play.lamp, what=names[-1]
        )
    what = names[0] if names else ""
    return REASONS.get(verb, "I try something else.").format(thing=play.thing, lamp=play.lamp, what=what)


def official(play: HouseholdPlay, t: int, env) -> str:
    return f"<think>{reason(play, t)}</think><action>{play.commands[t]}</action>"


def vocabulary() -> set[str]:
    """Every word that the engine can say, and those of the skills."""
    kinds = (name.lower() for name in FACTS["object_types"] + FACTS["receptacle_types"])
    wordings = " ".join(text for goal in FACTS["goals"].values() for text in goal["templates"])
    texts = re.findall(r"[a-z]+", f"{wordings} {(DATA / 'alfred.twl2').read_text()}".lower())
    return {*kinds, *texts, *SKILL_WORDS.split(), "nothing", "happens"}


# ---- skills, as a script would write them ---------------------------------------------------------------------------


def hint(advice: str, thing: str, held: str) -> str:
    """A step skill: the advice in general words, without the numbers that only this game gives to things."""
    verb, *kinds = [word for word in advice.split() if not word.isdigit()]
    if verb == "go":
        return f"for {thing} go to {kinds[-1]}" if held else f"for {thing} look in {kinds[-1]}"
    return f"for {thing} take {kinds[0]}" if verb == "take" else " ".join(["for", thing, verb, *kinds])


def order_of_work(play: HouseholdPlay) -> str:
    """What is done with the thing once it is found."""
    thing, parent = play.thing, play.parent
    if play.task_type in TOOLS:
        verb, tool = TOOLS[play.task_type]
        return f"{verb} {thing} with {tool} then move {thing} to {parent}"
    if play.task_type == "look_at_obj_in_light":
        return f"find {play.lamp} then use {play.lamp}"
    again = f" then find second {thing} then move {thing} to {parent}"
    return f"move {thing} to {parent}" + (again if play.task_type == "pick_two_obj_and_place" else "")


def where(thing: str) -> str:
    """Where such things are usually found."""
    return f"look in {' or '.join(likely_places(thing)[:2])}"


def workflow(play: HouseholdPlay) -> str:
    """The order of work for this kind of task, with where such things are usually found."""
    return f"for {play.thing} first {where(play.thing)} then take {play.thing} then {order_of_work(play)}"


def avoidance(play: HouseholdPlay, flaw: str) -> str:
    """What to avoid, and so what to do instead, for one flaw."""
    thing, parent = play.thing, play.parent
    if play.task_type in TOOLS:
        verb, tool = TOOLS[play.task_type]
        return f"for {thing} never move {thing} to {parent} before you {verb} {thing} with {tool}"
    if play.task_type == "look_at_obj_in_light":
        return f"for {thing} never move {thing} before you use {play.lamp}"
    if play.task_type == "pick_two_obj_and_place":
        return f"for {thing} never stop after one {thing} find second {thing}"
    return f"for {thing} never move {thing} to other place find {parent}"


def topic(play: HouseholdPlay) -> str:
    """What a skill has to speak of, to be of use."""
    return play.thing


def names() -> dict[str, set[str]]:
    kinds = {"object": "object_types", "place": "receptacle_types"}
    return {kind: {name.lower() for name in FACTS[types]} for kind, types in kinds.items()}


def flaw_of(play: HouseholdPlay) -> str:
    """The one that there is."""
    return "forget"


def hindsight(play: HouseholdPlay) -> Skills:
    """The skills of a finished episode. A step skill says what could have been known at its step."""
    steps = advised_steps(play)
    if play.success:
        return Skills("done", workflow(play), steps)
    return Skills("not done", avoidance(play, flaw_of(play)), steps)
