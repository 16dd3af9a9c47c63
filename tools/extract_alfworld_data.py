"""Extracts envs/alfworld/data/ from an installed alfworld package: `python tools/extract_alfworld_data.py`.

The files in envs/alfworld/data/ are what this script wrote with alfworld 0.4.2 (MIT licence, (c) 2020 Mohit Shridhar
and others); run it again to check them, not to use them. What comes from where, all inside the package:

    alfred.pddl, alfred.twl2    data/alfred.pddl, data/alfred.twl2, unchanged
    rooms.json  goals           gen/goal_library.py (PDDL and wording), gen/constants.py GOALS_VALID (kinds of room)
                holds, ...able  gen/constants.py VAL_RECEPTACLE_OBJECTS and VAL_ACTION_OBJECTS, sliced objects left out
                rooms           gen/layouts/FloorPlan<N>-objects.json, -openable.json and -layout.npy

The package knows coordinates only for receptacles that its authors' simulator could be vetted on. A room's other fixed
receptacles (stove burners, a toaster, a garbage can, towel holders, ...) are named in -objects.json alone: they get a
reachable point of -layout.npy to stand at, chosen by rule, so that no two kinds of them share one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "envs" / "alfworld" / "data"
TASK_TYPES = [  # in the order of alfworld's task numbers 1-6
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
]
STEP = 0.25  # metres between grid points: alfworld's AGENT_STEP_SIZE
STARTS = 4  # places in a room where an episode may start


def load_module(path: Path) -> ModuleType:
    """A module by its file, so that alfworld's own imports (textworld, a simulator) are not needed."""
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def receptacle_type(name: str) -> str:
    """'Cabinet|+00.68|+00.50|-02.20' -> 'Cabinet', 'Sink|-01.90|+00.97|-01.50|SinkBasin' -> 'SinkBasin'."""
    return name.split("|")[0] + ("Basin" if name.endswith("Basin") else "")


def place_name(kind: str, x: float, z: float, number: int) -> str:
    """An id in the simulator's form for a receptacle whose coordinates the package doesn't have."""
    coordinates = "|".join(f"{value:+06.2f}" for value in (x, 0.9 + 0.01 * number, z))
    return f"Sink|{coordinates}|SinkBasin" if kind == "SinkBasin" else f"{kind}|{coordinates}"


def room_receptacles(listed: set[str], poses: dict, points: list[list[float]], constants: ModuleType) -> dict:
    """Receptacle id -> [x, z, rotation, horizon] to use it from, in grid steps, quarter turns and degrees."""
    found = {}
    for name, (x, z, rotation, horizon) in sorted(poses.items()):
        if name.startswith("Bathtub") and name.endswith("|SinkBasin"):  # one id in the package contradicts itself
            name = name.replace("SinkBasin", "BathtubBasin")
        found[name] = [round(x / STEP), round(z / STEP), rotation // 90, horizon]
    fixed = (constants.RECEPTACLES & set(constants.VAL_RECEPTACLE_OBJECTS)) - constants.MOVABLE_RECEPTACLES_SET
    # One that opens is left out where no pose is known: the official games don't let the agent open it either.
    missing = sorted((listed & fixed) - {receptacle_type(name) for name in found} - constants.OPENABLE_CLASS_SET)
    taken = {(pose[0], pose[1]) for pose in found.values()}
    free = [point for point in points if (round(point[0] / STEP), round(point[1] / STEP)) not in taken]
    for index, kind in enumerate(missing):
        x, z = free[(index + 1) * len(free) // (len(missing) + 1)]
        for number in range(4 if kind == "StoveBurner" else 1):
            found[place_name(kind, x, z, number)] = [round(x / STEP), round(z / STEP), index % 4, 30]
    return found


def room_facts(number: int, kind: str, layouts: Path, constants: ModuleType, placeable: set[str]) -> dict:
    listed = set(json.loads((layouts / f"FloorPlan{number}-objects.json").read_text()))
    poses = json.loads((layouts / f"FloorPlan{number}-openable.json").read_text())
    points = sorted(np.load(layouts / f"FloorPlan{number}-layout.npy").tolist())
    receptacles = room_receptacles(listed, poses, points, constants)
    taken = {(pose[0], pose[1]) for pose in receptacles.values()}
    grid = [(round(x / STEP), round(z / STEP)) for x, z in points]
    # An episode starts where nothing stands within reach: "You are in the middle of a room".
    free = [point for point in grid if point not in taken]
    return {
        "kind": kind,
        "objects": sorted(listed & placeable),
        "receptacles": receptacles,
        "starts": [free[(2 * i + 1) * len(free) // (2 * STARTS)] for i in range(STARTS)],
    }


def extract(package: Path) -> dict:
    constants = load_module(package / "gen" / "constants.py")
    library = load_module(package / "gen" / "goal_library.py").gdict
    fixed = constants.RECEPTACLES - constants.MOVABLE_RECEPTACLES_SET
    holds = {
        kind: sorted(name for name in constants.VAL_RECEPTACLE_OBJECTS[kind] if not name.endswith("Sliced"))
        for kind in sorted(fixed & set(constants.VAL_RECEPTACLE_OBJECTS))
    }
    lamps = sorted(constants.VAL_ACTION_OBJECTS["Toggleable"])
    placeable = set(lamps).union(*holds.values())
    facts = {
        "source": "alfworld 0.4.2 (github.com/alfworld/alfworld), built on ALFRED and the floor plans of AI2-THOR",
        "licence": "MIT, Copyright (c) 2020 Mohit Shridhar and others; see LICENSE next to this file",
        "written by": "tools/extract_alfworld_data.py",
        "goals": {name: {**library[name], "rooms": sorted(constants.GOALS_VALID[name])} for name in TASK_TYPES},
        "object_types": sorted(constants.OBJECTS_SET - fixed),
        "receptacle_types": sorted(fixed),
        "holds": holds,
        "containers": sorted(constants.MOVABLE_RECEPTACLES_SET),
        "openable": sorted(constants.OPENABLE_CLASS_SET & fixed),
    }
    for name in ("Cleanable", "Heatable", "Coolable", "Toggleable", "Sliceable"):
        facts[name.lower()] = sorted(constants.VAL_ACTION_OBJECTS[name] & set(constants.OBJECTS))
    facts["heldout"] = sorted(constants.TEST_SCENE_NUMBERS)
    facts["rooms"] = {
        str(number): room_facts(number, kind, package / "gen" / "layouts", constants, placeable)
        for kind, numbers in constants.SCENE_TYPE.items()
        for number in numbers
    }
    return facts


def write_json(facts: dict, path: Path) -> None:
    """One line a fact and one line a room: small, and a change shows in a diff."""
    rooms = ",\n".join(
        f"{json.dumps(number)}:{json.dumps(room, separators=(',', ':'))}" for number, room in facts["rooms"].items()
    )
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items() if key != "rooms"]
    path.write_text("{\n" + ",\n".join(lines) + ',\n"rooms": {\n' + rooms + "\n}}\n")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # nothing to choose, but --help must not write
    try:
        alfworld = distribution("alfworld")
    except PackageNotFoundError:
        sys.exit("extract_alfworld_data.py: the alfworld package is not installed: pip install alfworld==0.4.2")
    package = Path(alfworld.locate_file("alfworld"))
    OUT.mkdir(exist_ok=True)
    for name in ("alfred.pddl", "alfred.twl2"):
        shutil.copyfile(package / "data" / name, OUT / name)
    (OUT / "LICENSE").write_text(alfworld.read_text("LICENSE"))
    write_json(extract(package), OUT / "rooms.json")


if __name__ == "__main__":
    main()
