"""Two engines that play an ALFWorld game file: a fast one in plain Python, and the official one on TextWorld.

    game = load_game("json_2.1.1/train/.../game.tw-pddl")
    engine = FastEngine(game)          # or TextWorldEngine(game)
    print(engine.reset(), engine.admissible_commands())
    print(engine.step("go to fridge 1"), engine.won)

The fast engine says what the official one says, character for character, oddities included; tools/compare_engines.py
plays both side by side. The oddities are ALFRED's domain (alfred.pddl) and grammar (alfred.twl2) taken at their word:

- "a apple", and a comma before "and" also in lists of two;
- things have numbers in the reverse of their ids' order, and lists are in the order of the ids;
- only what is held can be examined: elsewhere a stray comma in the domain makes the condition unsatisfiable;
- going to where one is does nothing, and so does going to another receptacle reached from the same spot;
- `look` before the first move sees "nothing", though the first observation, the same text, sees the whole room;
- `look` says "Next to it, you see" of things put down here that were once taken from another receptacle here;
- a lamp that was turned on is turned on again by each further `use`, and never off;
- heating, cooling, slicing and using a lamp work through closed doors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from envs.alfworld.files import Game, GameFileError, State, load_game
from envs.alfworld.pddl import MARKS

__all__ = ["FastEngine", "Game", "GameFileError", "State", "TextWorldEngine", "load_game"]

NOTHING = "Nothing happens."
INTRO = "-= Welcome to TextWorld, ALFRED! =-"

Action = tuple[str | None, ...]  # a method of FastEngine, less its "_", and what it is called with


def listing(names: list[str] | tuple[str, ...]) -> str:
    """As the grammar joins lists: "nothing", "a pen 1", "a pen 1, and a cd 2"."""
    if len(names) < 2:
        return names[0] if names else "nothing"
    return ", ".join(names[:-1]) + ", and " + names[-1]


def with_article(names: Iterable[str]) -> list[str]:
    return [f"a {name}" for name in names]


class FastEngine:
    """The official engine's game, simulated. Playing changes `state` alone, which is immutable."""

    def __init__(self, game: Game):
        self.game = game
        self._enter(game.start)

    def reset(self) -> str:
        self._enter(self.game.start)
        here = self.game.at[self.state.place]
        view = self._look() if here else self._room(self.game.place)
        return f"{INTRO}\n\n{view}\n\n{self.game.texts.task}"

    def step(self, command: str) -> str:
        """Play a command -> what it says. One that isn't admissible changes nothing."""
        action = self.actions().get(command.strip())
        if action is None:
            return NOTHING
        verb, *names = action
        return getattr(self, f"_{verb}")(*names)

    def admissible_commands(self) -> list[str]:
        return sorted(self.actions())

    @property
    def won(self) -> bool:
        """Whether the goal holds now. It may cease to: the game goes on after it is won."""
        if self._won is None:
            self._won = self.game.solved(self.state)
        return self._won

    def snapshot(self) -> State:
        return self.state

    def restore(self, snapshot: State) -> None:
        self._enter(snapshot)

    # What a planner asks beyond `game` and `state`.

    @property
    def here(self) -> tuple[str, ...]:
        """The receptacles at the agent's place; none where it starts, in the middle of the room."""
        return self.game.at[self.state.place]

    @property
    def holding(self) -> str | None:
        return self.state.holding

    def contents(self, receptacle: str) -> tuple[str, ...]:
        """What is in or on a receptacle, seen or not."""
        return self.state.inside[self.game.slot[receptacle]]

    def is_open(self, receptacle: str) -> bool:
        """Whether things can be taken from and put there: it is open, or has no door."""
        return receptacle in self.state.opened or receptacle not in self.game.abilities["openable"]

    def properties(self, thing: str) -> frozenset[str]:
        """Of "isclean", "ishot", "iscool", "issliced", "istoggled", "ison"."""
        return frozenset(mark for mark in MARKS if (mark, thing) in self.state.marks)

    def actions(self) -> dict[str, Action]:
        """What can be done now, by command. Not to be changed by the caller."""
        if self._actions is None:
            self._actions = self._find_actions()
        return self._actions

    def _find_actions(self) -> dict[str, Action]:
        game, state = self.game, self.state
        held = state.holding
        found: dict[str, Action] = dict(game.ways_from(state.place))
        found["look"], found["inventory"] = ("look",), ("inventory",)
        if game.texts.help is not None:
            found["help"] = ("help",)
        for receptacle in game.at[state.place]:
            found[f"examine {receptacle}"] = ("examine_receptacle", receptacle)
            if receptacle in game.abilities["openable"]:
                verb = "close" if receptacle in state.opened else "open"
                found[f"{verb} {receptacle}"] = (verb, receptacle)
            self._find_handling(found, receptacle)
            for verb, ability, gained, lost in game.tools[receptacle]:
                if held in game.abilities[ability]:
                    found[f"{verb} {held} with {receptacle}"] = ("change", verb, held, receptacle, gained, lost)
        if held is not None:
            found[f"examine {held}"] = ("examine_thing", held)
        if held in game.knives:
            for thing, place in state.lying:
                if place == state.place and thing in game.abilities["sliceable"]:
                    found[f"slice {thing} with {held}"] = ("slice", thing, held)
        return found

    def _find_handling(self, found: dict[str, Action], receptacle: str) -> None:
        """Add what can be done with the things in one receptacle and with what is held."""
        game, held, content = self.game, self.state.holding, self.contents(receptacle)
        for thing in content:
            if thing in game.abilities["toggleable"]:
                found[f"use {thing}"] = ("use", thing)
        if not self.is_open(receptacle):
            return
        if held is None:
            for thing in content:
                if thing in game.abilities["pickupable"]:
                    found[f"take {thing} from {receptacle}"] = ("take", thing, receptacle)
        elif held in game.accepts[receptacle]:
            found[game.texts.put_command.format(o=held, r=receptacle)] = ("put", held, receptacle)

    def _enter(self, state: State) -> None:
        self.state = state
        self._actions: dict[str, Action] | None = None  # worked out when asked for
        self._won: bool | None = None

    def _with_inside(self, receptacle: str, content: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        slot = self.game.slot[receptacle]
        return (*self.state.inside[:slot], content, *self.state.inside[slot + 1 :])

    # The actions. Each is admissible when called, plays itself and returns what it says.

    def _go(self, receptacle: str) -> str:
        self._enter(self.state._replace(place=self.game.place[receptacle]))
        arrival = self.game.texts.arrival.format(r=receptacle, place=self.game.place_names[self.state.place])
        return f"{arrival} {self._examine_receptacle(receptacle)}"

    def _open(self, receptacle: str) -> str:
        self._enter(self.state._replace(opened=self.state.opened | {receptacle}))
        return f"You open the {receptacle}. {self._examine_receptacle(receptacle)}"

    def _close(self, receptacle: str) -> str:
        self._enter(self.state._replace(opened=self.state.opened - {receptacle}))
        return f"You close the {receptacle}."

    def _take(self, thing: str, receptacle: str) -> str:
        content = tuple(name for name in self.contents(receptacle) if name != thing)
        self._enter(
            self.state._replace(
                holding=thing,
                inside=self._with_inside(receptacle, content),
                lying=self.state.lying - {(thing, self.state.place)},
                taken=self.state.taken | {(thing, receptacle)},
            )
        )
        return f"You pick up the {thing} from the {receptacle}."

    def _put(self, thing: str, receptacle: str) -> str:
        content = tuple(sorted({*self.contents(receptacle), thing}, key=self.game.order.__getitem__))
        self._enter(
            self.state._replace(
                holding=None,
                inside=self._with_inside(receptacle, content),
                lying=self.state.lying | {(thing, self.state.place)},
                taken=self.state.taken - {(thing, receptacle)},
            )
        )
        return self.game.texts.put_feedback.format(o=thing, r=receptacle)

    def _change(self, verb: str, thing: str, receptacle: str, gained: str, lost: str | None) -> str:
        self._enter(self.state._replace(marks=self.state.marks - {(lost, thing)} | {(gained, thing)}))
        return f"You {verb} the {thing} using the {receptacle}."

    def _slice(self, thing: str, knife: str) -> str:
        self._enter(self.state._replace(marks=self.state.marks | {("issliced", thing)}))
        return f"You sliced the {thing} with the {knife}."

    def _use(self, thing: str) -> str:
        marks = self.state.marks ^ {("ison", thing)} | {("istoggled", thing)}
        self._enter(self.state._replace(marks=marks))
        return f"You turn on the {thing}."  # the text goes by istoggled, which stays

    def _look(self) -> str:
        if not self.here:
            return self._room(())
        state, game = self.state, self.game
        nearby = [
            thing
            for thing, receptacle in sorted(state.taken, key=lambda pair: (game.order[pair[0]], game.order[pair[1]]))
            if game.place[receptacle] == state.place and (thing, state.place) in state.lying
        ]
        return f"You are facing the {listing(self.here)}. Next to it, you see {listing(with_article(nearby))}."

    def _room(self, receptacles: Iterable[str]) -> str:
        appliances = listing(with_article(receptacles))
        return f"You are in the middle of a room. Looking quickly around you, you see {appliances}."

    def _inventory(self) -> str:
        held = self.state.holding
        return "You are not carrying anything." if held is None else f"You are carrying: a {held}."

    def _help(self) -> str:
        assert self.game.texts.help is not None  # else `help` is no action
        return self.game.texts.help

    def _examine_receptacle(self, receptacle: str) -> str:
        content = listing(with_article(self.contents(receptacle)))
        if receptacle not in self.game.abilities["openable"]:
            return f"On the {receptacle}, you see {content}."
        if receptacle not in self.state.opened:
            return f"The {receptacle} is closed."
        return f"The {receptacle} is open. In it, you see {content}."

    def _examine_thing(self, thing: str) -> str:
        if thing in self.game.abilities["isreceptacleobject"]:
            return f"This is a normal {thing}. In it, you see {listing(with_article(self.game.on_top.get(thing, ())))}."
        has = self.properties(thing)
        sliced = "issliced" in has
        heat = "hot" if "ishot" in has else "cool" if "iscool" in has else ""
        if heat or "isclean" in has:
            if heat == "cool" and not sliced and "isclean" not in has:
                heat = "cold"  # the one place where the grammar says so
            words = [" and ".join(filter(None, (heat, "clean" if "isclean" in has else "")))] + ["sliced"] * sliced
            return f"This is a {' '.join(words)} {thing}."
        if "istoggled" in has and thing in self.game.abilities["toggleable"]:
            return f"This {thing} is on."
        if sliced and thing in self.game.abilities["sliceable"]:
            return f"This is a sliced {thing}."
        return f"There's nothing special about {thing}."


class TextWorldEngine:
    """The official engine behind the same interface, less what only a planner needs. A reset takes about a second.

    Each engine that is alive has a planner of its own. `close` leaves it to the next one,
    and so does the engine's end, which may come late: the parsers that TextWorld uses hold on to their callers.
    """

    def __init__(self, game: Game):
        try:
            import fast_downward
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld.envs import PddlEnv
        except ImportError as error:
            raise ImportError(
                "the official ALFWorld engine needs `pip install alfworld 'textworld[pddl]'` (or use engine='fast')"
            ) from error
        self.game = game
        self._state: Any = None
        planner = IDLE.pop() if IDLE else fast_downward.load_lib()
        self._free = weakref.finalize(self, give_back, planner)
        self._free.atexit = False  # the process is about to end anyway
        env = PddlEnv.__new__(PddlEnv)
        textworld.Environment.__init__(env, textworld.EnvInfos(won=True, admissible_commands=True))
        env.downward_lib = planner  # all that PddlEnv's own constructor does is to load another one
        self._env: Any = AlfredDemangler(env, shuffle=False)
        with kept_arguments():
            self._env.load(game.path)

    def reset(self) -> str:
        with kept_arguments():
            self._state = self._env.reset()
        return self._state.feedback

    def close(self) -> None:
        """Leave the planner to the next engine. This one cannot be played any more."""
        self._env = self._state = None  # whatever would call the planner
        self._free()

    def step(self, command: str) -> str:
        self._state, _, _ = self._env.step(command)
        return self._state.feedback

    def admissible_commands(self) -> list[str]:
        return list(self._state["admissible_commands"])

    @property
    def won(self) -> bool:
        return bool(self._state["won"])


# Planners without an engine. Each is a copy of libdownward.so: 32 MiB of disk, which `du` does not show, and five maps.
# None is ever unloaded (fast_downward.close_lib). All copies share one registry, which points into each of them: the
# next copy that is loaded, at another place in memory, would crash the process.
IDLE: list = []


def give_back(planner) -> None:
    planner.cleanup()
    IDLE.append(planner)


@contextmanager
def kept_arguments() -> Generator[None]:
    """The official translator overwrites the command line of whoever calls it."""
    arguments = sys.argv
    try:
        yield
    finally:
        sys.argv = arguments
