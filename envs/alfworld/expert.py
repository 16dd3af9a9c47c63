"""Two players of ALFWorld: `shortest_plan` knows the whole state, `Explorer` only what it has read.

The first gives a game its walkthrough and says how far from optimal a policy is. The second is a demonstrator: it looks
in likely places first and remembers what it saw, so a model without hidden knowledge could have played its episodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from envs.alfworld.engine import FastEngine

TOOLS = {  # kind of task -> what to do to the thing, with which kind of receptacle
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
}
MOVE = "move {o} to {r}"  # the command's wording; "put {o} in/on {r}" in files of old versions of alfworld
TASKS = (  # the wording of the six kinds of task (alfworld's gen/goal_library.py)
    (r"(?:find|put) two (?P<thing>\w+) (?:and put them )?in (?P<parent>\w+)", "pick_two_obj_and_place"),
    (r"(?:look at|examine the) (?P<thing>\w+) (?:under|with) the (?P<lamp>\w+)", "look_at_obj_in_light"),
    (r"(?:put a clean|clean some) (?P<thing>\w+) (?:and put it )?in (?P<parent>\w+)", "pick_clean_then_place_in_recep"),
    (r"(?:put a hot|heat some) (?P<thing>\w+) (?:and put it )?in (?P<parent>\w+)", "pick_heat_then_place_in_recep"),
    (r"(?:put a cool|cool some) (?P<thing>\w+) (?:and put it )?in (?P<parent>\w+)", "pick_cool_then_place_in_recep"),
    (r"put (?:a|some) (?P<thing>\w+) (?:in|on) (?P<parent>\w+)", "pick_and_place_simple"),
)


def kind_of(name: str) -> str:
    """'apple 2' -> 'apple'."""
    return name.split()[0]


# ---- with full knowledge ----


@dataclass
class World:
    """A state as far as plans depend on it. Names are those of commands ("apple 2", "cabinet 1")."""

    task_type: str
    things: list[str]  # of the kind that the goal names
    parents: list[str]  # receptacles of the kind that the goal names
    tools: list[str]  # receptacles that clean, heat or cool, where the goal asks for it
    lamps: list[str]  # of the kind that the goal names
    ready: set[str]  # things that are as the goal wants them to be brought (clean, hot, cool or any); lamps that are on
    at: str  # where the agent is: a location, which several receptacles may share
    held: str  # "" where the hands are free
    inside: dict[str, str]  # thing -> receptacle
    location: dict[str, str]  # receptacle -> location
    closed: set[str]
    rests: list[str]  # receptacles that can take what is held
    move: str = MOVE


class Route:
    """Commands, and as much of what they change as later ones depend on."""

    def __init__(self, world: World):
        self.world, self.at, self.opened = world, world.at, set()
        self.commands: list[str] = []

    def go(self, place: str) -> None:
        if self.world.location[place] != self.at:
            self.at = self.world.location[place]
            self.commands.append(f"go to {place}")

    def reach(self, place: str) -> None:
        self.go(place)
        if place in self.world.closed and place not in self.opened:
            self.opened.add(place)
            self.commands.append(f"open {place}")

    def take(self, thing: str) -> None:
        self.reach(self.world.inside[thing])
        self.commands.append(f"take {thing} from {self.world.inside[thing]}")

    def move(self, thing: str, place: str) -> None:
        self.reach(place)
        self.commands.append(self.world.move.format(o=thing, r=place))


def shortest_plan(engine: FastEngine) -> list[str]:
    """A shortest sequence of commands from the engine's present state to the goal; ValueError where there is none."""
    return [] if engine.won else plan(world_of(engine))


def world_of(engine: FastEngine) -> World:
    game, goal = engine.game, engine.game.goal
    things = [thing for thing in game.things if game.kind.get(thing) == goal.object]
    tool = TOOLS.get(game.task_type, ("", ""))[1]
    lit = {lamp for lamp in game.things if "istoggled" in engine.properties(lamp)}
    return World(
        task_type=game.task_type,
        things=things,
        parents=[place for place in game.receptacles if game.kind.get(place) == goal.receptacle],
        tools=[place for place in game.receptacles if game.kind.get(place) == tool],
        lamps=[lamp for lamp in game.things if game.kind.get(lamp) == goal.lamp],
        ready={thing for thing in things if goal.needs <= engine.properties(thing)} | lit,
        at=engine.state.place,
        held=engine.holding or "",
        inside={thing: place for place in game.receptacles for thing in engine.contents(place)},
        location=game.place,
        closed={place for place in game.receptacles if not engine.is_open(place)},
        rests=[place for place in game.receptacles if engine.holding in game.accepts[place]],
        move=game.texts.put_command,
    )


def plan(world: World) -> list[str]:
    """A shortest sequence of commands that reaches the goal, which doesn't hold yet; ValueError where there is none.

    Only a few choices matter: which thing (or two, in which order), which receptacle or lamp in the end, which tool,
    and where to put down what is in the way. The rest follows, so these are tried out instead of all commands.
    """
    plans = list(routes(world))
    if not plans:
        raise ValueError(f"no plan reaches the goal: {world}")
    return min(plans, key=len)


def routes(world: World) -> Iterator[list[str]]:
    number = 2 if world.task_type == "pick_two_obj_and_place" else 1
    ends = world.lamps if world.task_type == "look_at_obj_in_light" else world.parents
    for things, end in product(permutations(world.things, number), ends):
        in_the_way = world.held and world.held not in things
        if world.held == things[-1] != things[0]:
            continue  # the other order brings what is held first
        tools = world.tools if set(things) - world.ready else [""]
        for rest, tool in product(world.rests if in_the_way else [""], tools):
            route = Route(world)
            if in_the_way:
                route.move(world.held, rest)
            for thing in things:
                finish(route, thing, end, tool)
            yield route.commands


def finish(route: Route, thing: str, end: str, tool: str) -> None:
    """One thing all the way: fetched, made clean, hot or cool, brought to its receptacle or shown under the lamp."""
    world = route.world
    if world.inside.get(thing) == end and not tool:
        return  # one of two that is there already
    if thing != world.held:
        route.take(thing)
    if world.task_type == "look_at_obj_in_light":
        route.go(world.inside[end])
        if end not in world.ready:
            route.commands.append(f"use {end}")
        return
    if tool:
        route.go(tool)
        route.commands.append(f"{TOOLS[world.task_type][0]} {thing} with {tool}")
    route.move(thing, end)


# ---- from observations alone ----


class Explorer:
    """Acts on the task and the observations alone.

    `places(kind of thing)` lists kinds of receptacle, likeliest first (envs.alfworld.games.likely_places); among those
    of one kind `rng` decides. The goal's own kind is searched last: what is there already is rarely wanted.
    `move` is the command's wording (`Game.texts.put_command`; the game's `help` tells it too).
    """

    def __init__(self, rng: Random, places: Callable[[str], list[str]], move: str = MOVE):
        self.rng, self.places, self.move = rng, places, move

    def reset(self, observation: str) -> None:
        """`observation` is an episode's first: the room and the task."""
        self.task_type, words = parse_task(observation)
        self.thing, self.parent, self.lamp = words["thing"], words.get("parent", ""), words.get("lamp", "")
        self.receptacles = names_after_you_see(observation)
        self.rng.shuffle(self.receptacles)
        self.unsearched = set(self.receptacles)
        self.seen: dict[str, str] = {}  # things of interest -> where they are
        self.closed: set[str] = set()
        self.at = self.held = self.target = ""
        self.ready = self.task_type not in TOOLS  # whether what is held has been cleaned, heated or cooled
        self.command = ""

    def act(self, observation: str, admissible: Sequence[str] = ()) -> str:
        """The next command, given what the last one led to (or, at first, given the first observation).

        Several receptacles can share a spot. From one of them, one can't go to another, only turn to it: `examine`.
        `admissible`, where it is shown to the policy, tells so before a step is lost on trying.
        """
        failed = observation.startswith("Nothing happens")
        if failed and self.command.startswith("go to"):
            self.command = self.command.replace("go to", "examine")
            return self.command
        if self.command and not failed:
            self._remember(observation)
        self.command = self._bring() if self.held else self._fetch()
        if admissible and self.command not in admissible:
            self.command = self.command.replace("go to", "examine")
        return self.command

    def _remember(self, observation: str) -> None:
        # "take pen 2 from bed 1" -> take, pen 2, bed 1
        verb, *names = re.split(r" (?:to |from |with |in/on )?(?=[a-z]+ \d)", self.command)
        if verb in ("go", "examine", "open") and names[0] in self.receptacles:
            self.at = names[0]
            self._look(observation)
        elif verb == "take":
            self.held = names[0]
            self.seen.pop(self.held, None)
        elif verb in ("move", "put"):
            self.held, self.seen[names[0]] = "", names[1]
        elif verb in ("clean", "heat", "cool"):
            self.ready = True

    def _look(self, observation: str) -> None:
        """Note what is in or on the receptacle here, or that it is closed."""
        if observation.endswith("is closed."):
            self.closed.add(self.at)
            return
        self.closed.discard(self.at)
        self.unsearched.discard(self.at)
        for name in names_after_you_see(observation):
            if kind_of(name) in (self.thing, self.lamp):
                self.seen[name] = self.at

    def _fetch(self) -> str:
        """Get a thing of the goal's kind: the one that was seen, or else search."""
        wanted = [name for name, place in self.seen.items() if kind_of(name) == self.thing and not self._done(place)]
        if not wanted:
            return self._search(self.thing)
        place = self.seen[wanted[0]]
        return self._reach(place) or f"take {wanted[0]} from {place}"

    def _done(self, place: str) -> bool:
        """Whether a thing counts as brought where it is. Both of two have to be in the same receptacle."""
        return self.task_type == "pick_two_obj_and_place" and place == self._destination()

    def _bring(self) -> str:
        """Do with what is held what the task says."""
        if self.task_type == "look_at_obj_in_light":
            lamps = [name for name in self.seen if kind_of(name) == self.lamp]
            if not lamps:
                return self._search(self.lamp)
            return self._go(self.seen[lamps[0]]) or f"use {lamps[0]}"
        if not self.ready:
            verb, kind = TOOLS[self.task_type]
            tool = self._first(kind)
            return self._go(tool) or f"{verb} {self.held} with {tool}"
        place = self._destination()
        return self._reach(place) or self.move.format(o=self.held, r=place)

    def _destination(self) -> str:
        """Where the thing or things go: where one is already, else the first of its kind."""
        there = [place for place in self.seen.values() if kind_of(place) == self.parent]
        self.target = self.target or (there[0] if there else self._first(self.parent))
        return self.target

    def _first(self, kind: str) -> str:
        return next(name for name in self.receptacles if kind_of(name) == kind)

    def _search(self, thing: str) -> str:
        """Go on to the likeliest receptacle that hasn't been searched."""
        if self.at in self.closed:
            return f"open {self.at}"
        places = [name for name in self.receptacles if name in self.unsearched]
        if not places:
            return "look"  # everything has been seen, and nothing of the kind
        ranks = {kind: rank for rank, kind in enumerate(self.places(thing))}
        ranks[self.parent] = len(self.receptacles)
        return f"go to {min(places, key=lambda name: ranks.get(kind_of(name), len(ranks)))}"

    def _go(self, place: str) -> str:
        return "" if self.at == place else f"go to {place}"

    def _reach(self, place: str) -> str:
        """What is left to do before things can be taken from or moved to a receptacle; "" if nothing."""
        return self._go(place) or (f"open {place}" if place in self.closed else "")


def parse_task(observation: str) -> tuple[str, dict[str, str]]:
    """The kind of task and its words: thing, and parent or lamp."""
    for pattern, task_type in TASKS:
        if match := re.search(r"Your task is to: " + pattern + r"\.", observation):
            return task_type, match.groupdict()
    raise ValueError(f"no known task in {observation!r}")


def names_after_you_see(observation: str) -> list[str]:
    """'On the desk 1, you see a pen 2, and a cd 1.' -> ['pen 2', 'cd 1']."""
    listed = re.search(r"you see (.*?)\.", observation)
    return re.findall(r"an? (\w+ \d+)", listed[1]) if listed else []
