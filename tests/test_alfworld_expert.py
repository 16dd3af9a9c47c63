"""The planner finds shortest plans, and the explorer solves games from what it reads."""

from collections import deque
from pathlib import Path
from random import Random

import pytest

from envs.alfworld.engine import FastEngine, load_game
from envs.alfworld.expert import Explorer, names_after_you_see, parse_task, plan, shortest_plan
from envs.alfworld.games import generate_games, likely_places, world_of, write_game
from envs.alfworld.rooms import FACTS, TASK_TYPES, TOOLS, kind_of, sample_room


def tiny_game(folder, index: int) -> FastEngine:
    """A small game cut down so far that every state of it can be visited: up to 4 receptacles and 3 things."""
    room = sample_room("train", 7, "small", index)
    goal = room.goal
    wanted = [name for name in room.contents if kind_of(name) in (goal.target, goal.lamp)]
    needed = {room.contents[name] for name in wanted}
    needed |= {name for name in room.receptacles if kind_of(name) in (goal.parent, TOOLS.get(goal.task_type, ("",))[0])}
    spare = [name for name in room.receptacles if name not in needed]
    kept = needed | set(spare[: max(0, 4 - len(needed))])
    others = [name for name, place in room.contents.items() if name not in wanted and place in kept]
    room.receptacles = {name: pose for name, pose in room.receptacles.items() if name in kept}
    room.contents = {name: room.contents[name] for name in wanted + others[: 3 - len(wanted)]}
    engine = FastEngine(load_game(write_game(folder / str(index), room, f"trial_tiny_{index}")))
    engine.reset()
    return engine


def breadth_first(engine: FastEngine) -> int:
    """The length of a shortest plan, by trying all commands."""
    start = engine.snapshot()
    queue, known = deque([(start, 0)]), set()
    while queue:
        state, depth = queue.popleft()
        engine.restore(state)
        if engine.won:
            engine.restore(start)
            return depth
        for command in engine.admissible_commands():
            engine.restore(state)
            engine.step(command)
            after = engine.snapshot()
            key = (after.place, after.holding, after.opened, after.inside, after.marks)  # all that commands depend on
            if key not in known and not command.startswith(("slice", "examine", "look", "inventory", "help")):
                known.add(key)
                queue.append((after, depth + 1))
    raise AssertionError("no plan")


@pytest.mark.parametrize("index", range(12))
def test_plans_are_as_short_as_breadth_first_search_finds(tmp_path, index):
    """From the start, and from where random play leads: hands full, doors open, things moved, the wrong one heated."""
    engine, rng = tiny_game(tmp_path, index), Random(index)
    for steps in (0, 4, 4, 6):
        for _ in range(steps):
            engine.step(rng.choice(engine.admissible_commands()))
        before = engine.snapshot()
        plan = shortest_plan(engine)
        assert engine.snapshot() == before
        assert len(plan) == breadth_first(engine)
        for command in plan:
            assert command in engine.admissible_commands()
            engine.step(command)
        assert engine.won and shortest_plan(engine) == []
        engine.restore(before)


def test_an_impossible_goal_is_reported():
    room = sample_room("train", 0, "small", TASK_TYPES.index("pick_and_place_simple"))
    room.contents = {name: place for name, place in room.contents.items() if kind_of(name) != room.goal.target}
    with pytest.raises(ValueError, match="no plan"):
        plan(world_of(room))


def test_every_wording_of_a_task_is_understood():
    for task_type, goal in FACTS["goals"].items():
        for template in goal["templates"]:
            task = template.format(obj="cd", recep="sinkbasin", toggle="desklamp", mrecep="")
            end = {"lamp": "desklamp"} if task_type == "look_at_obj_in_light" else {"parent": "sinkbasin"}
            assert parse_task(f"Your task is to: {task}.") == (task_type, {"thing": "cd", **end})
    with pytest.raises(ValueError, match="no known task"):
        parse_task("Your task is to: dance.")


def test_lists_are_read():
    assert names_after_you_see("On the desk 1, you see a pen 2, and a cd 10.") == ["pen 2", "cd 10"]
    assert names_after_you_see("On the desk 1, you see nothing.") == []
    assert names_after_you_see("The drawer 1 is closed.") == []


def explore(engine, seed: int, limit: int) -> tuple[bool, list[str]]:
    explorer, observation = Explorer(Random(seed), likely_places, engine.game.texts.put_command), engine.reset()
    explorer.reset(observation)
    commands = []
    while not engine.won and len(commands) < limit:
        commands.append(explorer.act(observation, engine.admissible_commands()))
        assert commands[-1] in engine.admissible_commands()
        observation = engine.step(commands[-1])
    return engine.won, commands


@pytest.mark.parametrize("size, limit, least", [("small", 30, 1.0), ("full", 50, 0.97)])
def test_the_explorer_solves_games(tmp_path, size, limit, least):
    won = [
        explore(FastEngine(load_game(path)), 0, limit)[0]
        for split in ("train", "valid_unseen")
        for path in generate_games(tmp_path, split, 90, seed=5, size=size)
    ]
    assert sum(won) / len(won) >= least


def test_the_explorer_is_deterministic_and_needs_no_list_of_commands(tmp_path):
    for path in generate_games(tmp_path, "train", 12, seed=5):
        engine = FastEngine(load_game(path))
        assert explore(engine, 1, 50) == explore(engine, 1, 50)
        explorer, observation = Explorer(Random(1), likely_places), engine.reset()
        explorer.reset(observation)
        for _ in range(50):
            observation = engine.step(explorer.act(observation))
            if engine.won:
                break
        assert engine.won


def test_the_wording_of_old_files_is_spoken(tmp_path):
    """alfworld before 0.4: put ... in/on, not move ... to."""
    for path in generate_games(tmp_path, "train", 6, seed=5, size="small"):
        text = Path(path).read_text().replace("move {o} to {r}", "put {o} in/on {r}")
        Path(path).write_text(text.replace("You move the {o.name}", "You put the {o.name}"))
        engine = FastEngine(load_game(path))
        won, commands = explore(engine, 0, 30)
        engine.reset()
        for played in (commands, shortest_plan(engine)):
            assert any(command.startswith("put") for command in played) != bool(engine.game.goal.lamp)
        assert won
