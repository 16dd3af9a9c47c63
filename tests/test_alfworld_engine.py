"""The ALFWorld engines: what each action says and does, what is refused, and that the fast one equals the official one.

The transcripts below are played on both engines, so their literals are the official engine's words.
"""

import json
import os
import pickle
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.alfworld.engine import FastEngine, GameFileError, TextWorldEngine, load_game
from envs.alfworld.env import list_games
from envs.alfworld.files import TASK_TYPES, Goal
from envs.alfworld.games import generate_games, mangle
from tools.compare_engines import compare, describe

DATA = Path(__file__).parents[1] / "envs" / "alfworld" / "data"
DOMAIN = (DATA / "alfred.pddl").read_text()
GRAMMAR = (DATA / "alfred.twl2").read_text()
FULL = os.environ.get("COMPARE_ENGINES") == "full"  # 120 games of 50 steps, some minutes

# A small kitchen: id -> (kind, location); the last part of an id is where it is, nearer ids have higher numbers.
RECEPTACLES = {
    "Cabinet|-01.00|+00.50|+01.00": ("Cabinet", 1),
    "Cabinet|-01.50|+00.50|+01.00": ("Cabinet", 1),
    "CounterTop|-00.50|+00.50|+01.00": ("CounterTop", 1),
    "Cabinet|+01.50|+00.50|+01.00": ("Cabinet", 2),
    "Fridge|-02.50|+00.50|+01.00": ("Fridge", 3),
    "Microwave|-02.50|+00.50|+02.00": ("Microwave", 4),
    "Sink|-02.50|+00.50|+03.00|SinkBasin": ("SinkBasin", 5),
    "SideTable|-02.50|+00.50|+04.00": ("SideTable", 6),
}
CABINET_3, CABINET_2, COUNTER, CABINET_1, FRIDGE, MICROWAVE, SINK, TABLE = RECEPTACLES
THINGS = {  # id -> (kind, receptacle)
    "Apple|-00.50|+00.90|+01.00": ("Apple", COUNTER),
    "Apple|-00.60|+00.90|+01.00": ("Apple", FRIDGE),
    "Knife|-00.60|+00.90|+01.10": ("Knife", COUNTER),
    "Mug|-00.60|+00.90|+01.20": ("Mug", CABINET_3),
    "Plate|-00.60|+00.90|+01.30": ("Plate", COUNTER),
    "DeskLamp|-00.60|+00.90|+01.40": ("DeskLamp", TABLE),
}
ABILITIES = {
    "Apple": "pickupable heatable coolable cleanable sliceable",
    "Knife": "pickupable cleanable",
    "Mug": "pickupable heatable coolable cleanable",
    "Plate": "pickupable cleanable isReceptacleObject",
    "DeskLamp": "toggleable",
}
PLACED = "(inReceptacle ?o ?r) (objectType ?o {thing}Type) (receptacleType ?r {place}Type)"
TWO = """(exists (?r # receptacle) (exists (?o1 # object) (and (inReceptacle ?o1 ?r) (objectType ?o1 AppleType)
    (receptacleType ?r SideTableType) (exists (?o2 # object) (and (not (= ?o1 ?o2)) (objectType ?o2 AppleType)
    (inReceptacle ?o2 ?r))))))"""
LIGHT = """(exists (?ot # object ?r # receptacle ?a # agent ?l # location) (and (objectType ?ot DeskLampType)
    (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))
    (exists (?o # object ?a # agent) (and (objectType ?o MugType) (holds ?a ?o)))"""


def placed(thing: str, place: str, more: str = "") -> str:
    conditions = PLACED.format(thing=thing, place=place)
    return f"(exists (?r # receptacle) (exists (?o # object) (and {conditions} {more})))"


APPLE_ON_TABLE = placed("Apple", "SideTable")


def problem(goal: str, facts: list[str]) -> str:
    """The kitchen as a PDDL problem. Cabinet 2 is open, all else that has a door is closed."""
    place = [f"loc|-{number}|{number + 2}|1|60" for number in range(7)]
    kinds = {kind for kind, _ in RECEPTACLES.values()}
    declared = ["agent1 # agent", "Apple # object", *(f"{kind}Type # otype" for kind in [*ABILITIES, "ButterKnife"])]
    declared += [f"{kind}Type # rtype" for kind in sorted(kinds)]
    declared += [f"{name} # object" for name in THINGS] + [f"{name} # receptacle" for name in RECEPTACLES]
    declared += [f"{name} # location" for name in place]
    known = [f"(atLocation agent1 {place[0]})", f"(opened {CABINET_2})", *facts]
    for name, (kind, at) in RECEPTACLES.items():
        known += [f"(receptacleType {name} {kind}Type)", f"(receptacleAtLocation {name} {place[at]})"]
        known += [f"(openable {name})"] if kind in ("Cabinet", "Fridge", "Microwave") else []
    for name, (kind, where) in THINGS.items():
        known += [f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {where})"]
        known += [f"(objectAtLocation {name} {place[RECEPTACLES[where][1]]})"]
        known += [f"({ability} {name})" for ability in ABILITIES[kind].split()]
    holdable = [(place_kind, thing) for place_kind in kinds for thing in ABILITIES if thing != "DeskLamp"]
    known += [f"(canContain {a}Type {b}Type)" for a, b in holdable if (a, b) != ("Microwave", "Knife")]
    head = f"(define (problem kitchen)\n(:domain alfred)\n(:objects\n{' '.join(declared)})\n(:init\n"
    return mangle(head + "\n".join(known) + f")\n(:goal (and {goal})))")


@pytest.fixture
def write(tmp_path):
    """write(...) -> the path of a game file of the kitchen."""

    def write_game(goal=APPLE_ON_TABLE, facts=(), folder=".", **changes) -> str:
        game = {
            "pddl_domain": DOMAIN,
            "grammar": GRAMMAR.replace("UNKNOWN GOAL", "put a apple in sidetable"),
            "pddl_problem": problem(goal, list(facts)),
            "solvable": True,
            "walkthrough": [],
        } | changes
        path = tmp_path / folder / "game.tw-pddl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(game))
        return str(path)

    return write_game


@pytest.fixture(params=[FastEngine, TextWorldEngine])
def make(request):
    """make(path) -> an engine, once the fast one and once the official one."""
    if request.param is TextWorldEngine:
        pytest.importorskip("textworld")
        pytest.importorskip("alfworld")
    return lambda path: request.param(load_game(path))


def play(engine, transcript: str) -> None:
    """`transcript`: lines of "> command" with what is said below; "(won)" and "(not won)" check the goal."""
    lines = iter(filter(None, map(str.strip, transcript.splitlines())))
    for line in lines:
        if line in ("(won)", "(not won)"):
            assert engine.won == (line == "(won)")
        else:
            assert line.startswith("> ")
            assert engine.step(line[2:]) == next(lines), line


# ---- what is said ----


def test_first_observation_lists_receptacles_in_the_order_of_their_ids(write, make):
    engine = make(write())
    assert engine.reset() == (
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, you see "
        "a cabinet 3, a cabinet 2, a cabinet 1, a countertop 1, a fridge 1, a microwave 1, a sidetable 1, and a "
        "sinkbasin 1.\n\nYour task is to: put a apple in sidetable."
    )
    assert engine.admissible_commands() == [
        *(f"go to {name}" for name in ("cabinet 1", "cabinet 2", "cabinet 3", "countertop 1", "fridge 1")),
        *("go to microwave 1", "go to sidetable 1", "go to sinkbasin 1", "help", "inventory", "look"),
    ]
    assert engine.game.task == "put a apple in sidetable."
    assert not engine.won


TRANSCRIPTS = {
    "moving about": """
        > look
        You are in the middle of a room. Looking quickly around you, you see nothing.
        > go to countertop 1
        You arrive at countertop 1. On the countertop 1, you see a apple 2, a knife 1, and a plate 1.
        > look
        You are facing the cabinet 3, cabinet 2, and countertop 1. Next to it, you see nothing.
        > go to countertop 1
        Nothing happens.
        > go to cabinet 3
        Nothing happens.
        > go to cabinet 1
        You arrive at cabinet 1. The cabinet 1 is closed.
        > look
        You are facing the cabinet 1. Next to it, you see nothing.
        > go to sinkbasin 1
        You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
        > go to bed 1
        Nothing happens.
    """,
    "doors": """
        > go to cabinet 3
        You arrive at cabinet 3. The cabinet 3 is closed.
        > take mug 1 from cabinet 3
        Nothing happens.
        > open cabinet 3
        You open the cabinet 3. The cabinet 3 is open. In it, you see a mug 1.
        > open cabinet 3
        Nothing happens.
        > examine cabinet 3
        The cabinet 3 is open. In it, you see a mug 1.
        > examine cabinet 2
        The cabinet 2 is open. In it, you see nothing.
        > close cabinet 3
        You close the cabinet 3.
        > examine cabinet 3
        The cabinet 3 is closed.
        > open countertop 1
        Nothing happens.
        > open fridge 1
        Nothing happens.
    """,
    "carrying, and things once taken from another receptacle here": """
        > go to countertop 1
        You arrive at countertop 1. On the countertop 1, you see a apple 2, a knife 1, and a plate 1.
        > inventory
        You are not carrying anything.
        > examine apple 2
        Nothing happens.
        > take apple 2 from countertop 1
        You pick up the apple 2 from the countertop 1.
        > inventory
        You are carrying: a apple 2.
        > examine apple 2
        There's nothing special about apple 2.
        > take knife 1 from countertop 1
        Nothing happens.
        > move apple 2 to cabinet 3
        Nothing happens.
        > move apple 2 to cabinet 2
        You move the apple 2 to the cabinet 2.
        > look
        You are facing the cabinet 3, cabinet 2, and countertop 1. Next to it, you see a apple 2.
        > take plate 1 from countertop 1
        You pick up the plate 1 from the countertop 1.
        > examine plate 1
        This is a normal plate 1. In it, you see nothing.
        > move plate 1 to cabinet 2
        You move the plate 1 to the cabinet 2.
        > look
        You are facing the cabinet 3, cabinet 2, and countertop 1. Next to it, you see a apple 2, and a plate 1.
        > examine cabinet 2
        The cabinet 2 is open. In it, you see a apple 2, and a plate 1.
        > take plate 1 from cabinet 2
        You pick up the plate 1 from the cabinet 2.
        > move plate 1 to countertop 1
        You move the plate 1 to the countertop 1.
        > look
        You are facing the cabinet 3, cabinet 2, and countertop 1. Next to it, you see a apple 2, and a plate 1.
        > go to sidetable 1
        You arrive at sidetable 1. On the sidetable 1, you see a desklamp 1.
        > move apple 2 to sidetable 1
        Nothing happens.
    """,
    "cleaning, heating, cooling, also behind closed doors": """
        > go to countertop 1
        You arrive at countertop 1. On the countertop 1, you see a apple 2, a knife 1, and a plate 1.
        > take apple 2 from countertop 1
        You pick up the apple 2 from the countertop 1.
        > heat apple 2 with microwave 1
        Nothing happens.
        > go to microwave 1
        You arrive at microwave 1. The microwave 1 is closed.
        > heat apple 2 with microwave 1
        You heat the apple 2 using the microwave 1.
        > examine apple 2
        This is a hot apple 2.
        > go to sinkbasin 1
        You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
        > clean apple 2 with sinkbasin 1
        You clean the apple 2 using the sinkbasin 1.
        > examine apple 2
        This is a hot and clean apple 2.
        > go to fridge 1
        You arrive at fridge 1. The fridge 1 is closed.
        > cool apple 2 with fridge 1
        You cool the apple 2 using the fridge 1.
        > examine apple 2
        This is a cool and clean apple 2.
        > open fridge 1
        You open the fridge 1. The fridge 1 is open. In it, you see a apple 1.
        > move apple 2 to fridge 1
        You move the apple 2 to the fridge 1.
        > take apple 1 from fridge 1
        You pick up the apple 1 from the fridge 1.
        > cool apple 1 with fridge 1
        You cool the apple 1 using the fridge 1.
        > examine apple 1
        This is a cold apple 1.
    """,
    "slicing": """
        > go to countertop 1
        You arrive at countertop 1. On the countertop 1, you see a apple 2, a knife 1, and a plate 1.
        > slice apple 2 with knife 1
        Nothing happens.
        > take knife 1 from countertop 1
        You pick up the knife 1 from the countertop 1.
        > slice apple 2 with knife 1
        You sliced the apple 2 with the knife 1.
        > slice plate 1 with knife 1
        Nothing happens.
        > go to fridge 1
        You arrive at fridge 1. The fridge 1 is closed.
        > slice apple 1 with knife 1
        You sliced the apple 1 with the knife 1.
        > go to countertop 1
        You arrive at countertop 1. On the countertop 1, you see a apple 2, and a plate 1.
        > move knife 1 to countertop 1
        You move the knife 1 to the countertop 1.
        > take apple 2 from countertop 1
        You pick up the apple 2 from the countertop 1.
        > examine apple 2
        This is a sliced apple 2.
        > go to fridge 1
        You arrive at fridge 1. The fridge 1 is closed.
        > cool apple 2 with fridge 1
        You cool the apple 2 using the fridge 1.
        > examine apple 2
        This is a cool sliced apple 2.
        > go to sinkbasin 1
        You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
        > clean apple 2 with sinkbasin 1
        You clean the apple 2 using the sinkbasin 1.
        > examine apple 2
        This is a cool and clean sliced apple 2.
    """,
    "a lamp is turned on, and on": """
        > go to sidetable 1
        You arrive at sidetable 1. On the sidetable 1, you see a desklamp 1.
        > examine desklamp 1
        Nothing happens.
        > take desklamp 1 from sidetable 1
        Nothing happens.
        > use desklamp 1
        You turn on the desklamp 1.
        > use desklamp 1
        You turn on the desklamp 1.
    """,
    "the goal, and on after it": """
        > go to countertop 1
        You arrive at countertop 1. On the countertop 1, you see a apple 2, a knife 1, and a plate 1.
        > take apple 2 from countertop 1
        You pick up the apple 2 from the countertop 1.
        > go to sidetable 1
        You arrive at sidetable 1. On the sidetable 1, you see a desklamp 1.
        (not won)
        > move apple 2 to sidetable 1
        You move the apple 2 to the sidetable 1.
        (won)
        > dance
        Nothing happens.
        (won)
        > take apple 2 from sidetable 1
        You pick up the apple 2 from the sidetable 1.
        (not won)
        > move apple 2 to sidetable 1
        You move the apple 2 to the sidetable 1.
        (won)
    """,
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcript(name, write, make):
    engine = make(write())
    engine.reset()
    play(engine, TRANSCRIPTS[name])


def test_a_new_episode_starts_afresh(write, make):
    engine = make(write())
    first = engine.reset()
    play(engine, TRANSCRIPTS["the goal, and on after it"])
    assert engine.reset() == first
    play(engine, TRANSCRIPTS["the goal, and on after it"])


def test_commands_are_taken_literally_but_for_space_around_them(write, make):
    engine = make(write())
    engine.reset()
    for command in ("", "  ", "Look", "look.", "go  to fridge 1", "go to fridge", "go to", "take apple 1"):
        assert engine.step(command) == "Nothing happens."
    assert engine.step("  go to fridge 1\n") == "You arrive at fridge 1. The fridge 1 is closed."


def test_help_has_no_empty_line_in_front(write, make):
    engine = make(write())
    engine.reset()
    said = engine.step("help")
    assert said.startswith("Available commands:\n  look:   ")
    assert said.endswith("slice an object using a sharp object\n")


def test_unusual_facts(write, make):
    """A receptacle on another, a thing in two receptacles, things on a plate, and a place to start at a receptacle."""
    apple, _, knife, _, plate, _ = THINGS
    facts = [f"(inReceptacle {MICROWAVE} {COUNTER})", f"(inReceptacle {apple} {CABINET_2})"]
    facts += [f"(inReceptacleObject {knife} {plate})", f"(isCool {apple})"]
    path = write(facts=facts)
    data = json.loads(Path(path).read_text())
    start, counter = "agent1 loc_bar__minus_0_bar_2", "agent1 loc_bar__minus_1_bar_3"
    data["pddl_problem"] = data["pddl_problem"].replace(start, counter)
    Path(path).write_text(json.dumps(data))
    engine = make(path)
    assert engine.reset() == (
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are facing the cabinet 3, cabinet 2, and countertop 1. Next to it, "
        "you see nothing.\n\nYour task is to: put a apple in sidetable."
    )
    play(
        engine,
        """
        > examine countertop 1
        On the countertop 1, you see a apple 2, a knife 1, a plate 1, and a microwave 1.
        > take plate 1 from countertop 1
        You pick up the plate 1 from the countertop 1.
        > examine plate 1
        This is a normal plate 1. In it, you see a knife 1.
        > move plate 1 to countertop 1
        You move the plate 1 to the countertop 1.
        > take apple 2 from cabinet 2
        You pick up the apple 2 from the cabinet 2.
        > examine apple 2
        This is a cold apple 2.
        > examine countertop 1
        On the countertop 1, you see a apple 2, a knife 1, a plate 1, and a microwave 1.
        """,
    )


# ---- wordings of other versions ----


def old_logic() -> dict[str, str]:
    """Domain and grammar as alfworld 0.3 had them."""
    grammar = GRAMMAR.replace("UNKNOWN GOAL", "put a apple in sidetable").replace(
        "{r.name}. #exam", "{lend.name}. #exam", 1
    )
    grammar = grammar.replace("move {o} to {r}", "put {o} in/on {r}")
    grammar = grammar.replace("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}.")
    start = DOMAIN.index("(:action help")
    return {"grammar": grammar[: grammar.index("action help {")], "pddl_domain": DOMAIN[:start] + ")"}


def test_old_wordings(write, make):
    engine = make(write(**old_logic()))
    engine.reset()
    assert "help" not in engine.admissible_commands()
    play(
        engine,
        """
        > help
        Nothing happens.
        > go to countertop 1
        You arrive at loc 6. On the countertop 1, you see a apple 2, a knife 1, and a plate 1.
        > take apple 2 from countertop 1
        You pick up the apple 2 from the countertop 1.
        > move apple 2 to countertop 1
        Nothing happens.
        > put apple 2 in/on countertop 1
        You put the apple 2 in/on the countertop 1.
        """,
    )


def test_old_file_brought_up_to_date_by_alfworlds_script(write, make):
    """scripts/patch_tw-pddl.py writes the help text, line breaks and all, where the name of a rule belongs."""
    grammar = GRAMMAR.replace("UNKNOWN GOAL", "put a apple in sidetable")
    text = re.search(r'"help.feedback": \[\s*{\s*"rhs": "(.*)"', grammar).group(1).replace("\\n", "\n")
    grammar = grammar[: grammar.index("action help {")]
    grammar += f'\naction help {{\n    template :: "help";\n    feedback :: "{text}";\n}}\n'
    engine = make(write(grammar=grammar))
    engine.reset()
    assert engine.step("help") == text.lstrip()


def test_task_with_special_characters(write, make):
    grammar = GRAMMAR.replace("UNKNOWN GOAL", "it's 50%: take the (red) apple, or #2; or not")
    engine = make(write(grammar=grammar))
    assert engine.reset().endswith("\n\nYour task is to: it's 50%: take the (red) apple, or ")


# ---- goals ----


@pytest.mark.parametrize(
    "goal, kind, parsed",
    [
        (placed("Apple", "Fridge"), TASK_TYPES[0], Goal("apple", "fridge")),
        (LIGHT, TASK_TYPES[1], Goal("mug", lamp="desklamp")),
        (placed("Mug", "Cabinet", "(isClean ?o)"), TASK_TYPES[2], Goal("mug", "cabinet", needs=frozenset({"isclean"}))),
        (placed("Mug", "Cabinet", "(isHot ?o)"), TASK_TYPES[3], Goal("mug", "cabinet", needs=frozenset({"ishot"}))),
        (placed("Mug", "Cabinet", "(isCool ?o)"), TASK_TYPES[4], Goal("mug", "cabinet", needs=frozenset({"iscool"}))),
        (TWO, TASK_TYPES[5], Goal("apple", "sidetable", count=2)),
    ],
)
def test_task_type_and_parsed_goal(goal, kind, parsed, write):
    game = load_game(write(goal))
    assert (game.task_type, game.goal) == (kind, parsed)


def test_task_type_is_taken_from_the_trajectory_then_from_the_folder(write):
    path = write(folder="pick_two_obj_and_place-Apple-None-Fridge-1/trial_1")
    assert load_game(path).task_type == "pick_two_obj_and_place"
    path = write(folder="pick_two_obj_and_place-Apple-None-Fridge-1/trial_2")
    (Path(path).parent / "traj_data.json").write_text('{"task_type": "look_at_obj_in_light"}')
    assert load_game(path).task_type == "look_at_obj_in_light"


TAKE = ["go to countertop 1", "take apple 2 from countertop 1", "go to sidetable 1"]
GOALS = {  # goal -> commands that reach it, and not before the last one
    APPLE_ON_TABLE: [*TAKE, "move apple 2 to sidetable 1"],
    LIGHT: ["go to cabinet 3", "open cabinet 3", "take mug 1 from cabinet 3", "go to sidetable 1", "use desklamp 1"],
    placed("Apple", "CounterTop", "(isSliced ?o)"): [
        *("go to countertop 1", "take knife 1 from countertop 1", "slice apple 2 with knife 1")
    ],
    "(forall (?o # object) (or (not (objectType ?o AppleType)) (isCool ?o)))": [
        *("go to countertop 1", "take apple 2 from countertop 1", "go to fridge 1", "cool apple 2 with fridge 1"),
        *("open fridge 1", "move apple 2 to fridge 1", "take apple 1 from fridge 1", "cool apple 1 with fridge 1"),
    ],
    f"(opened {FRIDGE}) (not (opened {CABINET_2}))": [
        *("go to cabinet 2", "close cabinet 2", "go to fridge 1", "open fridge 1")
    ],
    TWO: [
        *(*TAKE, "move apple 2 to sidetable 1", "go to fridge 1", "open fridge 1", "take apple 1 from fridge 1"),
        *("go to sidetable 1", "move apple 1 to sidetable 1"),
    ],
    "(imply (holdsAny agent1) (exists (?o # object) (and (isOn ?o) (holdsAny agent1))))"
    "(exists (?o # object) (isOn ?o))": ["go to sidetable 1", "use desklamp 1"],
    "(exists (?a # agent) (holds ?a Apple|-00.50|+00.90|+01.00)) (atLocation agent1 loc|-6|8|1|60)": TAKE,
}


@pytest.mark.parametrize("goal", GOALS, ids=range(len(GOALS)))
def test_goal(goal, write, make):
    engine = make(write(goal))
    engine.reset()
    for command in GOALS[goal]:
        assert not engine.won
        assert engine.step(command) != "Nothing happens.", command
    assert engine.won


# ---- what a planner asks ----


def test_state_for_planners(write):
    engine = FastEngine(load_game(write()))
    assert (engine.here, engine.holding) == ((), None)
    assert engine.contents("fridge 1") == ("apple 1",)
    assert not engine.is_open("fridge 1") and engine.is_open("cabinet 2") and engine.is_open("countertop 1")
    assert engine.game.kind["apple 1"] == "apple" and engine.game.kind["sinkbasin 1"] == "sinkbasin"
    assert engine.game.accepts["microwave 1"] == {"apple 1", "apple 2", "mug 1", "plate 1"}
    before = engine.snapshot()
    for command in ("go to fridge 1", "open fridge 1", "take apple 1 from fridge 1", "cool apple 1 with fridge 1"):
        engine.step(command)
    assert (engine.here, engine.holding) == (("fridge 1",), "apple 1")
    assert engine.properties("apple 1") == {"iscool"}
    after = engine.snapshot()
    assert {before: "before", after: "after"}[after] == "after"  # hashable
    engine.restore(before)
    assert engine.contents("fridge 1") == ("apple 1",) and engine.properties("apple 1") == frozenset()
    assert engine.actions()["go to fridge 1"] == ("go", "fridge 1")
    engine.restore(after)
    assert engine.step("inventory") == "You are carrying: a apple 1."


def test_a_file_is_parsed_once_until_it_changes(write):
    path = write()
    assert load_game(path) is load_game(path)
    assert pickle.loads(pickle.dumps(load_game(path))) is load_game(path)
    before = load_game(path)
    write(TWO)
    os.utime(path, ns=(1, 1))
    assert load_game(path) is not before and load_game(path).task_type == "pick_two_obj_and_place"


# ---- files that can't be played ----

LOGIC = "pddl_domain", "grammar"
BAD = {
    "not solvable": ({"solvable": False}, "goal can't be reached"),
    "other domain": ({"pddl_domain": DOMAIN.replace("(not (holdsAny ?a))", "")}, "pddl_domain is not one of"),
    "other text": ({"grammar": GRAMMAR.replace("You pick up", "You grab")}, "grammar is not one of"),
    "other command": ({"grammar": GRAMMAR.replace("move {o} to {r}", "move {r}")}, "grammar is not one of"),
    "no task": ({"grammar": GRAMMAR.replace('"task"', '"goal"')}, 'no "task"'),
    "no grammar": ({"grammar": "  "}, 'no "task"'),
    "null": ({"pddl_problem": None}, "not a game file"),
    "help in the domain only": ({"grammar": old_logic()["grammar"]}, "only one of"),
    "no problem": ({"pddl_problem": ""}, "has no goal, init, objects"),
    "cut off": ({"pddl_problem": problem("", [])[:-4]}, "cut off"),
    "unknown fact": ({"pddl_problem": problem("", ["(isBlue agent1)"])}, "(isblue agent1)"),
    "unknown name": ({"pddl_problem": problem("", [f"(opened {CABINET_1}9)"])}, "fits no predicate"),
    "wrong type": ({"pddl_problem": problem("", ["(openable agent1)"])}, "fits no predicate"),
    "two agents' places": ({"pddl_problem": problem("", ["(atLocation agent1 loc|-1|3|1|60)"])}, "at one location"),
    "two places": ({"pddl_problem": problem("", [f"(receptacleAtLocation {SINK} loc|-1|3|1|60)"])}, "two locations"),
    "unknown goal": ({"pddl_problem": problem("(checked agent1)", [])}, "(checked agent1)"),
    "goal of too few names": ({"pddl_problem": problem("(atLocation agent1)", [])}, "fits no predicate"),
    "stray brace": ({"grammar": GRAMMAR.replace("move {o} to {r}", "move {o} to {r}}")}, "grammar is not one of"),
    "broken goal": ({"pddl_problem": problem("(exists)", [])}, "not a game file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name, write):
    changes, expected = BAD[name]
    path = write(**changes)
    with pytest.raises(GameFileError) as error:
        load_game(path)
    assert expected in str(error.value) and str(error.value).startswith(path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b'{"grammar": ""}', b"null", b"[" * 100_000])
def test_missing_or_corrupt_file(content, tmp_path):
    path = tmp_path / "game.tw-pddl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GameFileError, match=r"generate|download"):
        load_game(path)


COMBINED = " ".join(f"?v{i} # object" for i in range(9))
HUGE = {  # what would take minutes and gigabytes
    "a million facts": ({"pddl_problem": problem("", ["(openable x)"] * 1_000_000)}, "more than 100000 facts"),
    "a million names": ({"pddl_problem": "(:objects " + "a " * 3_000_000 + ") (:init) (:goal (and))"}, "4000000 char"),
    "a deep goal": ({"pddl_problem": problem("(and " * 40_000 + ")" * 40_000, [])}, "not a game file"),
    "a goal of all combinations": (
        {"pddl_problem": problem(f"(exists ({COMBINED}) (and {' '.join(f'(isClean ?v{i})' for i in range(9))}))", [])},
        "comparisons",
    ),
    "nested combinations": (
        {"pddl_problem": problem("(forall (?a # object) " * 9 + "(isClean ?a)" + ")" * 9, [])},
        "comparisons",
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_game_is_refused_in_seconds_and_little_memory(name, write):
    changes, expected = HUGE[name]
    path, began = write(**changes), time.monotonic()
    tracemalloc.start()  # which makes it ten times as slow
    with pytest.raises(GameFileError) as error:
        load_game(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected in str(error.value) and str(error.value).startswith(path)
    assert peak < 500e6 and time.monotonic() - began < 300


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "train" / "a" / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(4 * 2**30)  # a hole: no space is taken
    with pytest.raises(GameFileError, match="4096 MiB, and no game has more than 64"):
        load_game(path)
    with pytest.raises(FileNotFoundError, match=r"no playable game.*left out 1 that cannot be read"):
        list_games(tmp_path, "train")


def test_things_that_lie_in_one_another_are_no_endless_game(write):
    """The fast engine looks one level deep, as the official one does."""
    apple, mug = list(THINGS)[:2]
    facts = [
        f"(isReceptacleObject {apple})",
        f"(inReceptacleObject {apple} {mug})",
        f"(inReceptacleObject {mug} {apple})",
    ]
    engine = FastEngine(load_game(write(facts=facts)))
    engine.reset()
    for command in engine.admissible_commands():
        engine.step(command)


def test_a_folder_that_holds_itself_is_listed_once(write, tmp_path):
    write(folder="train/a")
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train", target_is_directory=True)
    assert list_games(tmp_path, "train") == [str(tmp_path / "train" / "a" / "game.tw-pddl")]


def test_a_folder_is_no_game(tmp_path):
    with pytest.raises(GameFileError, match="can't be read"):
        load_game(tmp_path)


def test_official_engine_missing(write, monkeypatch):
    game = load_game(write())
    monkeypatch.setitem(__import__("sys").modules, "textworld", None)
    with pytest.raises(ImportError, match=r"pip install alfworld 'textworld\[pddl\]'"):
        TextWorldEngine(game)


# ---- any command, and any game ----


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    (path,) = generate_games(tmp_path_factory.mktemp("games"), "train", 1, 5, size="small")
    return FastEngine(load_game(path))


VERBS = ["go to", "open", "close", "take", "move", "clean", "heat", "cool", "use", "slice", "examine", "look"]
WORDS = [*VERBS, "inventory", "help", "from", "to", "with", "in/on"]


@settings(max_examples=300)
@given(data=st.data())
def test_any_command_is_answered_and_an_inadmissible_one_changes_nothing(engine, data):
    engine.reset()
    names = [*engine.game.things, *engine.game.receptacles]
    sentence = st.lists(st.sampled_from(WORDS + names) | st.text(max_size=5), max_size=6).map(" ".join)
    for _ in range(data.draw(st.integers(1, 12))):
        before, admissible = engine.snapshot(), engine.admissible_commands()
        command = data.draw(st.sampled_from(admissible) | sentence | st.text())
        said = engine.step(command)
        assert said
        if command.strip() not in admissible:
            assert said == "Nothing happens."
            assert engine.snapshot() == before and engine.admissible_commands() == admissible


@settings(max_examples=50)
@given(choices=st.lists(st.integers(0, 10**6), max_size=40))
def test_nothing_gets_lost_and_a_restored_state_plays_on_alike(engine, choices):
    engine.reset()
    start = engine.snapshot()
    said = []
    for choice in choices:
        commands = engine.admissible_commands()
        assert commands == sorted(set(commands))
        said.append(engine.step(commands[choice % len(commands)]))
        where = [thing for content in engine.state.inside for thing in content] + [engine.holding] * bool(
            engine.holding
        )
        assert sorted(where) == sorted(engine.game.things)
    end = engine.snapshot()
    engine.restore(start)
    for choice, expected in zip(choices, said, strict=True):
        commands = engine.admissible_commands()
        assert engine.step(commands[choice % len(commands)]) == expected
    assert engine.snapshot() == end


def test_fast_engine_equals_the_official_one(tmp_path):
    """72 games, all six kinds of task in all kinds of room. COMPARE_ENGINES=full: 120 in full-size rooms, 50 steps."""
    pytest.importorskip("textworld")
    pytest.importorskip("alfworld")
    full = generate_games(tmp_path, "train", 60 if FULL else 6, 0)
    full += generate_games(tmp_path, "valid_unseen", 60 if FULL else 6, 0)
    small = generate_games(tmp_path, "train", 30, 0, size="small")
    small += generate_games(tmp_path, "valid_unseen", 30, 0, size="small")
    paths, steps = (full, [50] * 120) if FULL else (full + small, [50] * 12 + [10] * 60)
    result = compare(paths, steps)
    assert not result.differences, describe(result, 0)
    assert result.games == len(paths) and result.steps == sum(steps) and set(result.kinds) == set(TASK_TYPES)
    assert result.won > 5
