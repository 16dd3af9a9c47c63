"""Generated ALFWorld games: reproducible, official in format, solvable, and split as they should be."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from envs.alfworld.engine import FastEngine, TextWorldEngine, load_game
from envs.alfworld.games import generate_games, mangle, world_of
from envs.alfworld.rooms import FACTS, SIZES, SPLITS, TASK_TYPES, kind_of, likely_places, sample_room

COUNT = 60


@pytest.fixture(scope="module", params=SIZES)
def games(request, tmp_path_factory):
    """Paths by split."""
    folder = tmp_path_factory.mktemp(request.param)
    return {split: generate_games(folder, split, COUNT, seed=0, size=request.param) for split in SPLITS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_arguments_give_the_same_bytes_and_a_game_does_not_depend_on_the_count(tmp_path):
    generate_games(tmp_path / "a", "train", 12, seed=3, size="small")
    generate_games(tmp_path / "b", "train", 5, seed=3, size="small")
    few, many = contents(tmp_path / "b"), contents(tmp_path / "a")
    assert len(few) == 10 and len(many) == 24
    assert few.items() <= many.items()
    generate_games(tmp_path / "b", "train", 12, seed=3, size="small")
    assert contents(tmp_path / "b") == many
    generate_games(tmp_path / "c", "train", 5, seed=4, size="small")
    assert not set(contents(tmp_path / "c").values()) & set(many.values())


def test_a_file_that_is_there_already_is_left_alone(tmp_path):
    (path,) = generate_games(tmp_path, "train", 1, seed=0, size="small")
    before = Path(path).stat().st_mtime_ns
    generate_games(tmp_path, "train", 1, seed=0, size="small")
    assert Path(path).stat().st_mtime_ns == before


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="train, valid_seen, valid_unseen"):
        generate_games(tmp_path, "test", 1, seed=0)
    with pytest.raises(ValueError, match="full, small"):
        generate_games(tmp_path, "train", 1, seed=0, size="tiny")


def test_layout_is_the_official_one(games):
    for split, paths in games.items():
        for path in map(Path, paths):
            trajectory = json.loads((path.parent / "traj_data.json").read_text())
            params, scene = trajectory["pddl_params"], trajectory["scene"]["scene_num"]
            end = params["parent_target"] or params["toggle_target"]
            task = f"{trajectory['task_type']}-{params['object_target']}-None-{end}-{scene}"
            assert path.parts[-5:-2] == ("json_2.1.1", split, task)
            assert path.parts[-2].startswith("trial_") and path.name == "game.tw-pddl"
            assert trajectory["turk_annotations"]["anns"][0]["task_desc"] in json.loads(path.read_text())["grammar"]


def test_rooms_of_valid_unseen_are_held_out_and_all_kinds_occur():
    rooms = {split: [sample_room(split, 0, "small", index) for index in range(300)] for split in SPLITS}
    for split, sampled in rooms.items():
        assert Counter(room.goal.task_type for room in sampled) == dict.fromkeys(TASK_TYPES, 50)
        kinds = {FACTS["rooms"][room.number]["kind"] for room in sampled}
        assert kinds == {"Kitchen", "LivingRoom", "Bedroom", "Bathroom"}
        assert {int(room.number) % 100 <= 6 for room in sampled} == {split == "valid_unseen"}


def test_train_and_valid_seen_share_no_game_whatever_the_seed():
    train = {sample_room("train", seed, "small", index).fingerprint() for seed in range(3) for index in range(200)}
    seen = {sample_room("valid_seen", seed, "small", index).fingerprint() for seed in range(3) for index in range(200)}
    assert len(train) > 590 and len(seen) > 590  # hardly any game comes twice
    assert not train & seen


@pytest.mark.parametrize("size", SIZES)
def test_things_are_where_they_can_be_and_the_goal_is_open(size):
    for index in range(300):
        room = sample_room("train", 1, size, index)
        facts, goal = FACTS["rooms"][room.number], room.goal
        kinds = Counter(map(kind_of, room.contents))
        assert room.receptacles.items() <= facts["receptacles"].items() and kinds.keys() <= set(facts["objects"])
        assert kinds[goal.target] >= (2 if goal.task_type == "pick_two_obj_and_place" else 1)
        assert not goal.lamp or kinds[goal.lamp] == 1
        for thing, place in room.contents.items():
            kind, where = kind_of(thing), kind_of(place)
            assert kind in FACTS["toggleable"] or kind in FACTS["holds"][where]
            assert (kind, where) != (goal.target, goal.parent)
        assert tuple(room.start) not in map(tuple, room.receptacles.values())
        if size == "small":
            assert len(room.receptacles) <= 8 and 8 <= len(room.contents) <= 12


def test_every_walkthrough_wins(games):
    for path in chain(*games.values()):
        engine, walkthrough = FastEngine(load_game(path)), json.loads(Path(path).read_text())["walkthrough"]
        engine.reset()
        assert not engine.won
        for command in walkthrough:
            assert not engine.won
            assert command in engine.admissible_commands()
            engine.step(command)
        assert engine.won


def test_names_are_the_engines(games):
    for index, path in enumerate(games["train"][:12]):
        size = Path(path).parts[-2].split("_")[1]
        room, game = sample_room("train", 0, size, index), load_game(path)
        assert set(world_of(room).inside.items()) == {
            (thing, place) for place, inside in zip(game.receptacles, game.start.inside) for thing in inside
        }
        assert {place: mangle(spot) for place, spot in world_of(room).location.items()} == game.place


def test_the_official_engine_plays_them_too(games):
    pytest.importorskip("textworld")
    pytest.importorskip("alfworld")
    path = games["valid_unseen"][2]
    official, fast = TextWorldEngine(load_game(path)), FastEngine(load_game(path))
    assert official.reset() == fast.reset()
    for command in json.loads(Path(path).read_text())["walkthrough"]:
        assert sorted(official.admissible_commands()) == fast.admissible_commands()
        assert official.step(command) == fast.step(command)
    assert official.won and fast.won


def test_alfworlds_own_collector_accepts_them(games, capsys):
    collector = pytest.importorskip("alfworld.agents.environment.alfred_tw_env").AlfredTWEnv
    folder = Path(games["train"][0]).parents[2]
    config = {
        "dataset": {"data_path": str(folder), "num_train_games": -1},
        "env": {"task_types": [1, 2, 3, 4, 5, 6], "goal_desc_human_anns_prob": 0},
    }
    assert sorted(collector(config, train_eval="train").game_files) == sorted(games["train"])


def test_likely_places_are_places_that_can_hold_the_thing():
    assert likely_places("mug")[-1] == "coffeemachine"  # it holds nothing else: an even draw of things rarely fills it
    assert "desk" in likely_places("desklamp") and likely_places("no such thing") == []
    holds = {kind.lower(): {thing.lower() for thing in things} for kind, things in FACTS["holds"].items()}
    for thing in ("apple", "pencil", "towel", "cd"):
        assert all(thing in holds[kind] for kind in likely_places(thing))


def test_the_shipped_facts_are_the_packages():
    pytest.importorskip("alfworld")
    from tools.extract_alfworld_data import distribution, extract

    assert json.loads(json.dumps(extract(Path(distribution("alfworld").locate_file("alfworld"))))) == FACTS
