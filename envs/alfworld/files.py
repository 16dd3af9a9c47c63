"""Loads an ALFWorld game file (game.tw-pddl): `load_game(path) -> Game`, parsed and made ready to be played.

One set of rules is simulated. A file with other rules raises GameFileError rather than play a different game; wordings
that alfworld changed over its versions ("put ... in/on" became "move ... to") are read from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from envs.alfworld.pddl import MARKS, Goal, Grounded, Problem, ground, parse_problem, summarise

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
TASK = "Your task is to: "
# TextWorld lists what is in a receptacle type by type: things before receptacles (a microwave on a countertop).
TYPE_ORDER = ("object", "agent", "location", "otype", "receptacle", "rtype")
ABILITIES = (
    "openable",
    "pickupable",
    "cleanable",
    "heatable",
    "coolable",
    "toggleable",
    "sliceable",
    "isreceptacleobject",
)
TOOLS = {  # type of receptacle -> (verb, what a thing must be for it, what it becomes, what it no longer is)
    "sinkbasintype": ("clean", "cleanable", "isclean", None),
    "microwavetype": ("heat", "heatable", "ishot", "iscool"),
    "fridgetype": ("cool", "coolable", "iscool", "ishot"),
}
# sha256 of alfworld's alfred.pddl, comments and layout aside -> whether it has the `help` action (0.4 and later).
DOMAINS = {
    "915e118f4f32b4d826bf53c99e860dd85831afffb1a31ad333f063ce005b7122": True,
    "b0b8259a4e11c9f45e91c181404bde4c2c936ad872fdc4d368c7e63094eaafac": False,
}
# sha256 of the rest of alfred.twl2, with the wordings that `Texts` holds blanked.
GRAMMAR = "47d3fe16521e13ba0b761fabb155ea034c1c85c8041c1355d7b7c9f54466d051"
MOST_BYTES = 64 * 2**20  # of a game file; alfworld's have less than one MiB
# Both say the same.
GO_COMMANDS = {"go to {r}", "go to [{r.name | receptacleatlocation(r:receptacle, lend:location)}]"}
SEEN = "#examineReceptacle.feedback#"


class GameFileError(ValueError):
    """A game file that can't be played. The message names the file and says what to do."""


class State(NamedTuple):
    """All that changes in a game. Things and receptacles go by their display names: "apple 1", "cabinet 3"."""

    place: str  # the location where the agent is
    holding: str | None
    opened: frozenset[str]  # receptacles
    inside: tuple[tuple[str, ...], ...]  # what each receptacle holds, in the order of `Game.receptacles`
    lying: frozenset[tuple[str, str]]  # (thing, location)
    taken: frozenset[tuple[str, str]]  # (thing, receptacle): taken from there and not put back
    marks: frozenset[tuple[str, str]]  # ("isclean" | "ishot" | "iscool" | "issliced" | "istoggled" | "ison", thing)


@dataclass(frozen=True)
class Texts:
    """The wordings that differ between alfworld's versions."""

    task: str
    put_command: str  # with {o} and {r}
    put_feedback: str  # with {o} and {r}
    arrival: str  # with {r}, or in old files {place}
    help: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Game:
    """A game file, parsed. Whatever lists things or receptacles does so in the official engine's order."""

    path: str
    task: str  # what follows "Your task is to: " in the first observation
    task_type: str  # one of TASK_TYPES
    goal: Goal
    solved: Callable[[State], bool]
    texts: Texts
    start: State
    things: tuple[str, ...]
    receptacles: tuple[str, ...]
    kind: dict[str, str]  # "apple 1" -> "apple", "cabinet 3" -> "cabinet"
    place: dict[str, str]  # receptacle -> location
    at: dict[str, tuple[str, ...]]  # location -> receptacles
    place_names: dict[str, str]  # location -> "loc 12", which old files show
    abilities: dict[str, frozenset[str]]  # one of ABILITIES -> what has it
    accepts: dict[str, frozenset[str]]  # receptacle -> what may be put there
    tools: dict[str, tuple[tuple[str, str, str, str | None], ...]]  # receptacle -> its entries of TOOLS
    knives: frozenset[str]
    on_top: dict[str, tuple[str, ...]]  # plate, bowl, ... -> what examining it lists, for good
    slot: dict[str, int]  # receptacle -> its index in `State.inside`
    order: dict[str, int]  # rank in lists
    travel: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)  # filled by `ways_from`

    def __repr__(self) -> str:
        return f"Game({self.path!r}, task={self.task!r})"

    def ways_from(self, place: str) -> dict[str, tuple[str, ...]]:
        """The `go to` actions at a location; worked out at the first visit, as a room has thousands of pairs."""
        if place not in self.travel:
            self.travel[place] = {f"go to {r}": ("go", r) for r, there in self.place.items() if there != place}
        return self.travel[place]

    def __reduce__(self):
        return load_game, (self.path,)  # pickled as its path: other processes read the file again


# ---- loading ----


def load_game(path: str | Path) -> Game:
    """Read a game file; the same file is parsed once. Raises GameFileError for one that can't be played."""
    path = str(path)
    try:
        state = os.stat(path)
        if state.st_size > MOST_BYTES:
            raise GameFileError(f"{path}: {state.st_size / 2**20:.0f} MiB, and no game has more than 64; leave it out")
        return _load_game(path, state.st_mtime_ns)
    except OSError as error:
        raise GameFileError(f"{path}: can't be read ({error.strerror}); check the path or generate the game") from error


@lru_cache(maxsize=4096)  # a little more than the official training set
def _load_game(path: str, changed: int) -> Game:
    """`changed` is the file's time of change: a file that is written anew is read anew."""
    again = "generate or download the file again"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("solvable") is False:
            raise GameFileError(f"{path}: marked `solvable: false`, its goal can't be reached; leave this game out")
        texts = read_texts(data["pddl_domain"], data["grammar"])
        return build_game(path, texts, parse_problem(data["pddl_problem"]))
    except GameFileError:
        raise
    except KeyError as error:
        raise GameFileError(f"{path}: incomplete, {error} is missing; {again}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, IndexError, RecursionError) as error:
        raise GameFileError(f"{path}: not a game file ({error}); {again}") from error
    except ValueError as error:
        raise GameFileError(f"{path}: {error}; use a file made by alfworld or by envs.alfworld.games") from error


def display_names(problem: Problem) -> dict[str, str]:
    """Id -> name, as alfworld's Demangler without shuffling: "apple_bar__minus_00_dot_48..." -> "apple 2"."""
    ids = sorted({name for facts in problem.facts.values() for fact in facts for name in fact})
    nouns = {i: i.split("_bar_", 1)[0] + ("basin" if "basin" in i else "") for i in ids if "_bar_" in i}
    left = Counter(nouns.values())  # numbers are given out from the highest down
    names = {i: f"{i} " for i in ids}  # what isn't in the room ("appletype") has no number
    for i, noun in nouns.items():
        names[i] = f"{noun} {left[noun]}"
        left[noun] -= 1
    if len(set(names.values())) < len(names):
        raise ValueError("two of its things have the same name")
    return names


def build_game(path: str, texts: Texts, problem: Problem) -> Game:
    """Work out once all that stays the same while a game is played."""
    names = display_names(problem)
    ranked = sorted(names, key=lambda i: (TYPE_ORDER.index(problem.types[i]), i))
    order = {names[i]: rank for rank, i in enumerate(ranked)}
    shown = {i: name if problem.types[i] in ("object", "receptacle") else i for i, name in names.items()}
    facts = {predicate: [tuple(shown[i] for i in fact) for fact in known] for predicate, known in problem.facts.items()}
    receptacles = tuple(names[i] for i in ranked if problem.types[i] == "receptacle")
    where = grouped(set(facts["receptacleatlocation"]))
    if any(len(locations) > 1 for locations in where.values()):
        raise ValueError("one of its receptacles is at two locations")
    place = {receptacle: where[receptacle][0] for receptacle in receptacles if receptacle in where}
    at: dict[str, tuple[str, ...]] = {location: () for location, type_ in problem.types.items() if type_ == "location"}
    for receptacle, location in place.items():
        at[location] += (receptacle,)
    types = grouped(facts["objecttype"] + facts["receptacletype"])
    of_type = grouped((type_, thing) for thing, type_ in facts["objecttype"])
    fitting = grouped(facts["cancontain"])
    on_top = grouped((outer, inner) for inner, outer in facts["inreceptacleobject"])
    goal = summarise(problem.goal)
    return Game(
        path=path,
        task=texts.task.removeprefix(TASK),
        task_type=task_type(path, goal),
        goal=goal,
        texts=texts,
        start=initial_state(facts, receptacles, order),
        solved=compile_goal(ground(problem.goal, problem), names, {r: i for i, r in enumerate(receptacles)}),
        things=tuple(names[i] for i in ranked if problem.types[i] == "object"),
        receptacles=receptacles,
        kind={name: kinds[0].removesuffix("type") for name, kinds in types.items()},
        place=place,
        at=at,
        place_names={i: name for i, name in names.items() if problem.types[i] == "location"},
        abilities={ability: frozenset(name for (name,) in facts[ability]) for ability in ABILITIES},
        accepts={
            r: frozenset(o for t in types.get(r, ()) for ot in fitting.get(t, ()) for o in of_type.get(ot, ()))
            for r in receptacles
        },
        tools={r: tuple(TOOLS[t] for t in types.get(r, ()) if t in TOOLS) for r in receptacles},
        knives=frozenset(of_type.get("knifetype", []) + of_type.get("butterknifetype", [])),
        on_top={outer: tuple(sorted(inner, key=order.__getitem__)) for outer, inner in on_top.items()},
        slot={r: i for i, r in enumerate(receptacles)},
        order=order,
    )


def grouped(pairs: Iterable[tuple[str, ...]]) -> dict[str, list[str]]:
    """(key, value) pairs -> the values of each key."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def initial_state(facts: dict[str, list[tuple]], receptacles: tuple[str, ...], order: dict[str, int]) -> State:
    inside = grouped((receptacle, thing) for thing, receptacle in set(facts["inreceptacle"]))
    held = [thing for _, thing in facts["holds"]]
    if len(facts["atlocation"]) != 1 or len(held) > 1 or len(held) != len(facts["holdsany"]):
        raise ValueError("its agent should be at one location and hold at most one thing")
    return State(
        place=facts["atlocation"][0][1],
        holding=held[0] if held else None,
        opened=frozenset(receptacle for (receptacle,) in facts["opened"]),
        inside=tuple(tuple(sorted(inside.get(receptacle, ()), key=order.__getitem__)) for receptacle in receptacles),
        lying=frozenset(facts["objectatlocation"]),
        taken=frozenset(),
        marks=frozenset((mark, thing) for mark in MARKS for (thing,) in facts[mark]),
    )


def task_type(path: str, goal: Goal) -> str:
    """From traj_data.json beside the file, else from a folder's name, else from the goal."""
    folder = Path(path).parent
    try:
        named = json.loads((folder / "traj_data.json").read_text(encoding="utf-8")).get("task_type")
    except (OSError, ValueError, AttributeError):
        named = None  # the file is a convenience, the game can be played without it
    if known := named if named in TASK_TYPES else named_type(path):
        return known
    if goal.lamp:
        return "look_at_obj_in_light"
    if goal.count > 1:
        return "pick_two_obj_and_place"
    changes = (("isclean", TASK_TYPES[2]), ("ishot", TASK_TYPES[3]), ("iscool", TASK_TYPES[4]))
    return next((kind for need, kind in changes if need in goal.needs), TASK_TYPES[0])


def named_type(path: str) -> str:
    """The task type in the name of a game's folder or the one above: look_at_obj_in_light-Mug-...; "" where none is."""
    folder = Path(path).parent
    kinds = (name.split("-")[0] for name in (folder.name, folder.parent.name))
    return next((kind for kind in kinds if kind in TASK_TYPES), "")


def compile_goal(formula: Grounded, names: dict[str, str], slot: dict[str, int]) -> Callable[[State], bool]:
    """A grounded goal as a function of the state."""
    if isinstance(formula, bool):
        return lambda state: formula
    head, *rest = formula
    if head in ("and", "or", "not"):
        parts = [compile_goal(part, names, slot) for part in rest]
        if head == "and":
            return lambda state: all(part(state) for part in parts)
        if head == "or":
            return lambda state: any(part(state) for part in parts)
        return lambda state: not parts[0](state)
    first, last = names.get(rest[0]), names.get(rest[-1])  # names without facts have no display name
    if head == "inreceptacle":
        return lambda state: last in slot and first in state.inside[slot[last]]
    if head == "atlocation":
        return lambda state: state.place == rest[1]
    if head == "objectatlocation":
        return lambda state: (first, rest[1]) in state.lying
    if head == "holds":
        return lambda state: state.holding is not None and state.holding == last
    if head == "holdsany":
        return lambda state: state.holding is not None
    if head == "opened":
        return lambda state: first in state.opened
    mark = (head, first)
    return lambda state: mark in state.marks


# ---- domain and grammar ----


def read_texts(domain: str, grammar: str) -> Texts:
    """Check that domain and grammar are ALFRED's and read the wordings. ValueError says what differs."""
    # The task's sentence differs from file to file. Cut out, the rest is one text that is read once and remembered.
    task = re.search(r'"task"\s*:\s*\[\s*\{\s*"rhs"\s*:\s*("(?:[^"\\]|\\.)*")', grammar)
    if task is None:
        raise ValueError('the grammar has no "task" entry')
    rest = grammar[: task.start(1)] + '""' + grammar[task.end(1) :]
    has_help = check_domain(domain)
    wordings = read_grammar(rest)
    if has_help != ("help" in wordings):
        raise ValueError("only one of the domain and the grammar has the action `help`")
    return Texts(
        task=as_displayed(json.loads(task.group(1), strict=False)),
        put_command=wordings["put_command"],
        put_feedback=wordings["put_feedback"],
        arrival=wordings["arrival"],
        help=wordings.get("help"),
    )


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=8)
def check_domain(text: str) -> bool:
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text).lower())
    key = fingerprint(" ".join(tokens))
    if key not in DOMAINS:
        raise ValueError("its pddl_domain is not one of alfworld's alfred.pddl (0.3 to 0.5), the rules simulated here")
    return DOMAINS[key]


@lru_cache(maxsize=8)
def read_grammar(text: str) -> dict[str, str]:
    """The wordings of a grammar whose task is cut out, by their names in `Texts`."""
    actions, rules = parse_grammar(text)
    ask, help_rule = actions.pop("help", None), rules.pop("help.feedback", None)
    wordings = {
        "put_command": actions["PutObject"].pop("template"),
        "put_feedback": rules["PutObject.feedback"][0].pop("rhs").replace(".name}", "}"),
        "arrival": rules["GotoLocation.feedback"][0]
        .pop("rhs")
        .replace("{r.name}", "{r}")
        .replace("lend.name", "place"),
    }
    go = actions["GotoLocation"].pop("template")
    slots = [set(re.findall(r'{.*?}|#.*?#|[\[<>|;"{}]', text)) for text in wordings.values()]
    if (
        fingerprint(json.dumps([actions, rules], sort_keys=True)) != GRAMMAR
        or go not in GO_COMMANDS
        or slots[:2] != [{"{o}", "{r}"}] * 2
        or slots[2] not in ({"{r}", SEEN}, {"{place}", SEEN})
    ):
        raise ValueError("its grammar is not one of alfworld's alfred.twl2 (0.3 to 0.5), the texts reproduced here")
    wordings["arrival"] = wordings["arrival"].removesuffix(" " + SEEN)
    if ask is not None:
        # alfworld's script for old files writes the text right where the name of a rule would stand
        wordings["help"] = as_displayed(help_rule[0]["rhs"] if help_rule else ask["feedback"])
    return wordings


def parse_grammar(text: str) -> tuple[dict[str, dict[str, str]], dict[str, list[dict[str, str]]]]:
    """-> ({action: its template and feedback}, {rule: its alternatives}), without what no action uses."""
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    pattern = r'action (?P<name>\w+) \{\s*template :: "(?P<template>[^"]*)";\s*feedback :: "(?P<feedback>[^"]*)";'
    actions = {found["name"]: found.groupdict() for found in re.finditer(pattern, text)}
    rules = {}
    for block in re.findall(r'grammar :: """(.*?)"""', text, flags=re.DOTALL):
        rules.update(json.loads(block))
    unused = [name for name in [*actions, *rules] if "ReceptacleObject" in name]  # commented out of the domain
    for name in unused:
        actions.pop(name, None)
        rules.pop(name, None)
    return actions, rules


def as_displayed(text: str) -> str:
    """A literal of the grammar as TextWorld shows it: no space in front, cut at its own special characters."""
    plain = r'[^;|"<>\[\]#{}]'
    start = re.match(rf'(?:{plain}|"{plain}*")*', text.lstrip().replace("\\n", "\n"))
    assert start is not None  # of no length at least
    return start.group().replace('"', "")
