"""Furnishes ALFWorld's rooms anew: `sample_room(split, seed, size, index)` says what is where and what is to be done.

The rooms are the 120 of AI2-THOR with their own receptacles and kinds of things. What can hold what, the goals, their
wording and which rooms are held out are alfworld's: envs/alfworld/data/, extracted by tools/extract_alfworld_data.py.

Chosen here, as alfworld doesn't state it: how often a thing is where. A kind of receptacle is drawn in proportion to
how many kinds of things it can hold (a countertop 58, a safe 7), then one of its receptacles evenly.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from statistics import fmean

DATA = Path(__file__).resolve().parent / "data"
FACTS = json.loads((DATA / "rooms.json").read_text())
TASK_TYPES = tuple(FACTS["goals"])
SPLITS = ("train", "valid_seen", "valid_unseen")
SIZES = ("full", "small")
TOOLS = {  # kind of task -> the receptacle that changes a thing, and what it can change
    "pick_clean_then_place_in_recep": ("SinkBasin", "cleanable"),
    "pick_heat_then_place_in_recep": ("Microwave", "heatable"),
    "pick_cool_then_place_in_recep": ("Fridge", "coolable"),
}
LAMP_STANDS = ("Desk", "Dresser", "Shelf", "SideTable")  # alfworld's goals want a lamp to be on something
MAX_DUPLICATES = 3  # of one kind of thing: alfworld's MAX_NUM_OF_OBJ_INSTANCES
SEEN_SHARE = 4  # one possible game in this many of the training rooms is valid_seen's


@dataclass(frozen=True)
class Goal:
    task_type: str
    target: str  # the kind of thing to bring or look at
    parent: str  # the kind of receptacle to bring it to; "" where it is only looked at
    lamp: str  # the kind of lamp to look at it under; "" elsewhere

    def avoids(self) -> frozenset[str]:
        """Kinds of receptacle where no target starts: there, (part of) the task would be done already."""
        cool = self.task_type == "pick_cool_then_place_in_recep"
        return frozenset({self.parent, "Fridge"} if cool else {self.parent})


@dataclass
class Room:
    """A furnished room and what is to be done in it."""

    number: str
    goal: Goal
    wording: str
    start: list[int]  # where the agent begins, [x, z, rotation, horizon]
    receptacles: dict[str, list[int]]  # id -> where the agent uses it from
    contents: dict[str, str] = field(default_factory=dict)  # id of a thing -> id of the receptacle it is in or on

    def fingerprint(self) -> int:
        """What makes it this game: not where the agent starts, the numbers of things, or the wording of the goal."""
        inside = Counter((place, kind_of(thing)) for thing, place in self.contents.items())
        text = repr((self.number, self.goal, sorted(self.receptacles), sorted(inside.items())))
        return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def kind_of(name: str) -> str:
    """'Apple|-00.48|+00.95|-01.12' -> 'Apple', 'Sink|-01.90|+00.97|-01.50|SinkBasin' -> 'SinkBasin'."""
    return name.split("|")[0] + ("Basin" if name.endswith("Basin") else "")


def sample_room(split: str, seed: int, size: str, index: int) -> Room:
    """Game `index` of a split. Its fingerprint says whether a game in a training room is train's or valid_seen's."""
    rng = Random(f"{split} {seed} {size} {index}")
    task_type = TASK_TYPES[index % len(TASK_TYPES)]
    numbers = rooms_for(task_type, split == "valid_unseen")
    while True:
        number = rng.choice(numbers)
        goal = rng.choice(goals(number, task_type))
        room = furnish(rng, number, goal, size)
        if split == "valid_unseen" or (room.fingerprint() % SEEN_SHARE == 0) == (split == "valid_seen"):
            return room


@lru_cache
def rooms_for(task_type: str, heldout: bool) -> list[str]:
    return [n for n in FACTS["rooms"] if (int(n) in FACTS["heldout"]) == heldout and goals(n, task_type)]


@lru_cache
def goals(number: str, task_type: str) -> list[Goal]:
    """What a kind of task can ask for in a room: the thing is there, can start elsewhere and can go where it should."""
    room = FACTS["rooms"][number]
    present = sorted({kind_of(name) for name in room["receptacles"]})
    things = [kind for kind in room["objects"] if kind not in FACTS["toggleable"]]
    if room["kind"] not in FACTS["goals"][task_type]["rooms"]:
        return []
    if task_type == "look_at_obj_in_light":
        lamps = [kind for kind in room["objects"] if kind in FACTS["toggleable"]]
        if not set(LAMP_STANDS) & set(present):
            return []
        possible = [Goal(task_type, thing, "", lamp) for thing in things for lamp in lamps]
    else:
        tool, ability = TOOLS.get(task_type, (None, None))
        if tool is not None and tool not in present:
            return []
        possible = [
            Goal(task_type, thing, parent, "")
            for thing in things
            for parent in present
            if thing in FACTS["holds"][parent] and parent != tool and (tool is None or thing in FACTS[ability])
        ]
    return [goal for goal in possible if home_shares(goal.target, present, goal.avoids())]


def home_shares(thing: str, kinds: list[str], avoided: frozenset[str] = frozenset()) -> dict[str, int]:
    """The kinds of receptacle among `kinds` where a kind of thing may start, with their relative frequency."""
    if thing in FACTS["toggleable"]:
        return {kind: 1 for kind in kinds if kind in LAMP_STANDS}
    holds = FACTS["holds"]
    return {kind: len(holds[kind]) for kind in kinds if thing in holds[kind] and kind not in avoided}


def draw_home(rng: Random, thing: str, kinds: list[str], avoided: frozenset[str] = frozenset()) -> str:
    shares = home_shares(thing, kinds, avoided)
    return rng.choices(list(shares), list(shares.values()))[0]


def furnish(rng: Random, number: str, goal: Goal, size: str) -> Room:
    facts = FACTS["rooms"][number]
    receptacles = facts["receptacles"]
    if size == "small":
        receptacles = select_receptacles(rng, receptacles, goal)
    wording = rng.choice(FACTS["goals"][goal.task_type]["templates"]).format(
        obj=goal.target.lower(), recep=goal.parent.lower(), toggle=goal.lamp.lower()
    )
    start = [*rng.choice(facts["starts"]), rng.randrange(4), 30]
    room = Room(number, goal, wording, start, receptacles)
    by_kind: dict[str, list[str]] = {}
    for name in receptacles:
        by_kind.setdefault(kind_of(name), []).append(name)
    kinds = sorted(by_kind)
    for thing in draw_things(rng, facts["objects"], kinds, goal, size):
        home = draw_home(rng, thing, kinds, goal.avoids() if thing == goal.target else frozenset())
        place = rng.choice(by_kind[home])
        room.contents[new_id(rng, thing, place, room.contents)] = place
    return room


def select_receptacles(rng: Random, receptacles: dict[str, list[int]], goal: Goal) -> dict[str, list[int]]:
    """5-8 of a room's receptacles: what the goal needs, then others by chance."""
    names = rng.sample(sorted(receptacles), len(receptacles))
    kinds = sorted({kind_of(name) for name in names})
    needed = [draw_home(rng, goal.target, kinds, goal.avoids()), goal.parent, TOOLS.get(goal.task_type, ("",))[0]]
    if goal.lamp:
        needed.append(draw_home(rng, goal.lamp, kinds))
    chosen: dict[str, list[int]] = {}
    for kind in dict.fromkeys(kind for kind in needed if kind):
        of_kind = [name for name in names if kind_of(name) == kind]
        name = min(of_kind, key=lambda name: receptacles[name] in chosen.values())  # the first at a spot of its own
        chosen[name] = receptacles[name]
    wanted = rng.randint(5, 8)
    for name in names:
        # Receptacles that share a spot are a complication that a small game does without where it can.
        if len(chosen) < wanted and receptacles[name] not in chosen.values():
            chosen[name] = receptacles[name]
    return dict(sorted(chosen.items()))


def draw_things(rng: Random, present: list[str], kinds: list[str], goal: Goal, size: str) -> list[str]:
    """Kinds of things to place, one entry a thing: the goal's, lamps (never two of a kind), others.

    A small game has no more of the goal's kind than it needs, so that searching well matters there too.
    """
    needed = 2 if goal.task_type == "pick_two_obj_and_place" else 1
    others = [kind for kind in present if kind != goal.target and home_shares(kind, kinds)]
    lamps = [kind for kind in others if kind in FACTS["toggleable"]]
    others = [kind for kind in others if kind not in lamps]
    if size == "full":
        number = rng.randint(needed, MAX_DUPLICATES)
        return [goal.target] * number + lamps + [k for k in others for _ in range(rng.randint(1, MAX_DUPLICATES))]
    things = [goal.target] * needed + lamps
    pool = others * MAX_DUPLICATES
    return things + rng.sample(pool, min(len(pool), rng.randint(8, 12) - len(things)))


def new_id(rng: Random, thing: str, place: str, taken: dict[str, str]) -> str:
    """An id in the simulator's form, at coordinates close to the receptacle's."""
    centre = [float(number) for number in place.split("|")[1:4]]
    while True:
        name = "|".join([thing] + [f"{c + rng.uniform(-0.3, 0.3):+06.2f}" for c in centre])
        if name not in taken:
            return name


def likely_places(thing: str) -> list[str]:
    """The kinds of receptacle where a kind of thing may be, where one is likeliest to hold it first (training rooms).

    Kinds are written as games show them: likely_places("mug") -> ["countertop", ...].
    """
    return _likely_places().get(thing, [])


@lru_cache
def _likely_places() -> dict[str, list[str]]:
    # thing -> kind of receptacle -> the chance that one such receptacle holds it, room by room
    chances = defaultdict(lambda: defaultdict(list))
    for number, room in FACTS["rooms"].items():
        if int(number) in FACTS["heldout"]:
            continue
        count = Counter(map(kind_of, room["receptacles"]))
        for thing in room["objects"]:
            shares = home_shares(thing, sorted(count))
            for kind, share in shares.items():
                chances[thing.lower()][kind.lower()].append(share / count[kind] / sum(shares.values()))
    return {thing: sorted(found, key=lambda kind: -fmean(found[kind])) for thing, found in chances.items()}
