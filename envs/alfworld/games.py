"""Makes ALFWorld games without a download: `generate_games(folder, split, count, seed)`.

rooms.py says what is where and what is to be done; here it becomes files in the official layout and format
(json_2.1.1/<split>/<task>/<trial>/game.tw-pddl), which the official engine plays as well. Their rules (alfred.pddl) and
texts (alfred.twl2) are alfworld's, unchanged.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from envs.alfworld.expert import World, plan
from envs.alfworld.rooms import DATA, FACTS, SIZES, SPLITS, TOOLS, Room, kind_of, likely_places, sample_room

__all__ = ["generate_games", "likely_places"]

DOMAIN = (DATA / "alfred.pddl").read_text()
GRAMMAR = (DATA / "alfred.twl2").read_text()


def generate_games(folder: str | Path, split: str, count: int, seed: int, *, size: str = "full") -> list[str]:
    """Write `count` solvable games under `folder`/json_2.1.1/`split` and return the paths of their game.tw-pddl files.

    train and valid_seen share rooms but never a game, whatever their seeds; valid_unseen has the held-out rooms. The
    six kinds of task take turns. "small" keeps 5-8 of a room's receptacles and 8-12 things, what the goal needs among
    them. Game i depends on (split, seed, size, i) alone, and a file that is there with the same content is left alone.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    paths = []
    for index in range(count):
        room = sample_room(split, seed, size, index)
        goal = room.goal
        task = f"{goal.task_type}-{goal.target}-None-{goal.parent or goal.lamp}-{room.number}"
        trial = f"trial_{size}_{seed}_{index:05d}"
        paths.append(write_game(Path(folder) / "json_2.1.1" / split / task / trial, room, trial))
    return paths


def write_game(folder: Path, room: Room, trial: str) -> str:
    """The two files of a game: what the engine reads, and what alfworld's own collector of games looks at."""
    goal = room.goal
    game = {
        "pddl_domain": DOMAIN,
        "grammar": GRAMMAR.replace("UNKNOWN GOAL", room.wording),
        "pddl_problem": problem_text(room, trial),
        "solvable": True,
        "walkthrough": plan(world_of(room)),
    }
    trajectory = {
        "task_id": trial,
        "task_type": goal.task_type,
        "pddl_params": {
            "object_target": goal.target,
            "parent_target": goal.parent,
            "toggle_target": goal.lamp,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{room.number}", "scene_num": int(room.number)},
        "turk_annotations": {"anns": [{"task_desc": room.wording, "high_descs": []}]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "game.tw-pddl"
    write_if_new(folder / "traj_data.json", json.dumps(trajectory))
    write_if_new(path, json.dumps(game))
    return str(path)


def write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def mangle(text: str) -> str:
    """Names as PDDL allows them, in alfworld's way; '#' stands for PDDL's own minus sign until here."""
    for old, new in (("-", "_minus_"), ("#", "-"), ("|", "_bar_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_")):
        text = text.replace(old, new)
    return text


def world_of(room: Room) -> World:
    """What a plan depends on, with everything closed and the hands free."""
    names = display_names([*room.receptacles, *room.contents])
    goal, tool = room.goal, TOOLS.get(room.goal.task_type, ("", ""))[0]
    wanted = (goal.target, goal.parent, tool, goal.lamp)
    things, parents, tools, lamps = ([names[n] for n in names if kind_of(n) == kind] for kind in wanted)
    return World(
        task_type=goal.task_type,
        things=things,
        parents=parents,
        tools=tools,
        lamps=lamps,
        ready=set() if tool else set(things),
        at=location(room.start),
        held="",
        inside={names[thing]: names[place] for thing, place in room.contents.items()},
        location={names[place]: location(pose) for place, pose in room.receptacles.items()},
        closed={names[place] for place in room.receptacles if kind_of(place) in FACTS["openable"]},
        rests=[],
    )


def display_names(ids: list[str]) -> dict[str, str]:
    """'Apple|-00.48|...' -> 'apple 2': numbered by kind, downwards by mangled id, as alfworld's Demangler does."""
    shown, left = {}, Counter(map(kind_of, ids))
    for name in sorted(ids, key=lambda name: mangle(name).lower()):
        kind = kind_of(name)
        shown[name] = f"{kind.lower()} {left[kind]}"
        left[kind] -= 1
    return shown


def problem_text(room: Room, trial: str) -> str:
    """The PDDL problem, section by section as alfworld's scripts/augment_pddl_states.py writes it."""
    goal = FACTS["goals"][room.goal.task_type]["pddl"].format(
        obj=room.goal.target, recep=room.goal.parent, toggle=room.goal.lamp
    )
    objects, facts = ("\n        ".join(lines) for lines in (declarations(room), initial_facts(room)))
    return mangle(
        f"\n(define (problem plan_{trial})\n(:domain alfred)\n(:objects\nagent1 # agent\n        {objects}\n        )\n"
        f"\n(:init\n        {facts}\n        )\n    {goal}"
    )


def location(pose: list[int]) -> str:
    return "loc|" + "|".join(map(str, pose))


def declarations(room: Room) -> list[str]:
    """Every name with its type. The bare kinds of things are declared as things too: a quirk of the official files."""
    locations = {location(pose) for pose in [*room.receptacles.values(), room.start]}
    return [
        *(f"{kind} # object" for kind in FACTS["object_types"]),
        *(f"{kind}Type # otype" for kind in FACTS["object_types"]),
        *(f"{kind}Type # rtype" for kind in FACTS["receptacle_types"]),
        *(f"{name} # object" for name in sorted(room.contents)),
        *(f"{name} # receptacle" for name in sorted(room.receptacles)),
        *(f"{name} # location" for name in sorted(locations)),
    ]


def initial_facts(room: Room) -> list[str]:
    things = {name: kind_of(name) for name in sorted(room.contents)}
    places = {name: kind_of(name) for name in sorted(room.receptacles)}
    present = set(things.values())
    cold = [n for n, kind in things.items() if kind == room.goal.target and kind_of(room.contents[n]) == "Fridge"]

    def having(predicate: str, kinds: list[str], names: dict[str, str] = things) -> list[str]:
        return [f"({predicate} {name})" for name, kind in names.items() if kind in kinds]

    return [
        *(f"(receptacleType {name} {kind}Type)" for name, kind in places.items()),
        *(f"(objectType {name} {kind}Type)" for name, kind in things.items()),
        *(
            f"(canContain {kind}Type {thing}Type)"
            for kind in sorted(set(places.values()))
            for thing in FACTS["holds"][kind]
            if thing in present
        ),
        *having("pickupable", sorted(present - set(FACTS["toggleable"]))),
        *having("isReceptacleObject", FACTS["containers"]),
        *having("openable", FACTS["openable"], places),
        f"(atLocation agent1 {location(room.start)})",
        *having("cleanable", FACTS["cleanable"]),
        *having("heatable", FACTS["heatable"]),
        *having("coolable", FACTS["coolable"]),
        # As in the official files, the goal's things count as cool where they start in the fridge.
        *(f"(isCool {name})" for name in cold),
        *having("toggleable", FACTS["toggleable"]),
        *having("sliceable", FACTS["sliceable"]),
        *(f"(inReceptacle {name} {room.contents[name]})" for name in things),
        *(f"(receptacleAtLocation {name} {location(room.receptacles[name])})" for name in places),
        *(f"(objectAtLocation {name} {location(room.receptacles[room.contents[name]])})" for name in things),
    ]
