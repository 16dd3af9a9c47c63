"""The environment around the engines: prompts byte for byte, slots, parser, splits, errors."""

import json
from pathlib import Path

import pytest

from data import Guidance, Slot
from envs import make_env
from envs.alfworld import AlfworldEnv, list_games, words
from envs.alfworld.engine import GameFileError
from envs.alfworld.env import TAIL, warn_once
from router import fill

# The authors' templates (agent_system/environments/prompts/alfworld.py), with their fields filled for two cases.
FIRST = """
You are an expert agent operating in the ALFRED Embodied Environment.
Your current observation is: {observation}
Your admissible actions of the current situation are: ['go to bed 1'
 'look'].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within <think> </think> tags. 
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""  # noqa: E501
LATER = """
You are an expert agent operating in the ALFRED Embodied Environment. Your task is to: look at bowl.
Prior to this step, you have already taken 3 step(s). Below are the most recent 2 observations and the corresponding actions you took: [Observation 2: 'o2', Action 2: 'a2']
[Observation 3: 'o3', Action 3: 'a3']
You are now at step 4 and your current observation is: o4
Your admissible actions of the current situation are: ['go to bed 1'
 'look'].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within <think> </think> tags.
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""  # noqa: E501
ACTIONS = ["go to bed 1", "help", "look"]
HISTORY = [("o1", "a1"), ("o2", "a2"), ("o3", "a3")]


def test_first_window_prompt_is_the_authors():
    prompt = AlfworldEnv().build_prompt("window", "look at bowl.", [], "Your task is to: look at bowl.", ACTIONS)
    assert fill(prompt) == FIRST.format(observation="Your task is to: look at bowl.")
    later = AlfworldEnv(history=0).build_prompt("window", "look at bowl.", HISTORY, "o4", ACTIONS)
    assert fill(later) == FIRST.format(observation="o4")


def test_later_window_prompt_is_the_authors_and_shows_the_last_steps():
    prompt = AlfworldEnv(history=2).build_prompt("window", "look at bowl.", HISTORY, "o4", ACTIONS)
    assert fill(prompt) == LATER


def test_skills_go_where_the_authors_put_them():
    prompt = AlfworldEnv(history=2).build_prompt("window", "look at bowl.", HISTORY, "o4", ACTIONS)
    episode, step = fill(prompt, Guidance("episode", "E")), fill(prompt, Guidance("step", "S"))
    assert "look at bowl.\n\n**Episode-Level Skill**\nRefer to this episode-level skill" in episode
    assert "episode:\n[E]\n\nPrior to this step" in episode
    assert (
        "'look'].\n\n**Critical-Step Skill**\nUse this current-step skill for this decision only:\n[S]\n\nNow it"
        in step
    )


@pytest.mark.parametrize("style", ["official", "compact"])
def test_chat_has_the_episode_slot_in_its_opening_only_and_a_step_slot_in_every_turn(style):
    env = AlfworldEnv(prompt=style)
    levels = [
        [piece.level for piece in env.build_prompt("chat", "task", history, "seen", ACTIONS) if isinstance(piece, Slot)]
        for history in ([], HISTORY)
    ]
    assert levels == [["episode", "step"], ["step"]]


@pytest.mark.parametrize(
    ("response", "action", "valid"),
    [
        ("<think>hm</think><action> Go to bed 1 </action>", "go to bed 1", True),
        ("<action>look</action>", "look", False),  # no thought
        ("<think>hm</think> go to bed 1 and then look around", "go to bed 1 and then look around"[-30:], False),
        ("<think>看</think><action>look</action>", "look", False),
        ("<think>a</think><action>x</action><action>y</action>", "x", True),
        ("no </action> yet <think>a</think><action>look</action>", "", True),  # the first of each tag, as the authors
    ],
)
def test_official_parser(response, action, valid):
    assert AlfworldEnv().parse_action(response, ACTIONS) == (action, valid)


def test_compact_parser_takes_admissible_commands():
    env = AlfworldEnv(prompt="compact")
    assert env.parse_action(" look ", ACTIONS) == ("look", True)
    assert env.parse_action("go to moon 1", ACTIONS) == ("go to moon 1", False)


@pytest.mark.parametrize("style", ["compact", "the engine's own"])
def test_what_the_engine_carries_out_is_valid(style, games):
    """A first thing needs no number in compact words, and may have it all the same."""
    env = AlfworldEnv(prompt="compact")
    for _ in range(2):
        _, info = env.reset(options={"game": games[0]})
        compact, own = next((c, o) for c, o in env.commands.items() if c.startswith("go to") and c != o)
        action, valid = env.parse_action(compact if style == "compact" else own, info["admissible_actions"])
        assert valid and env.step(action)[0] != "nothing happens"


@pytest.mark.parametrize(
    ("official", "compact"),
    [
        ("You arrive at desk 1. On the desk 1, you see a pen 2, and a cd 1.", "on desk see pen 2 cd"),
        ("You arrive at safe 1. The safe 1 is closed.", "safe is closed"),
        ("You open the safe 1. The safe 1 is open. In it, you see nothing.", "open safe see nothing"),
        (
            "You are in the middle of a room. Looking quickly around you, you see a bed 1, and a safe 1.",
            "see bed safe",
        ),
        ("Nothing happens.", "nothing happens"),
        ("find two pen and put them in drawer.", "find two pen put them drawer"),
    ],
)
def test_compact_words(official, compact):
    assert words(official) == compact


def test_every_word_of_many_games_is_in_the_tiny_vocabulary(tokenizer, games):
    for game in games:
        env = AlfworldEnv(prompt="compact")
        observation, info = env.reset(options={"game": game})
        for command in json.loads(Path(game).read_text())["walkthrough"]:
            for text in (observation, info.get("task", ""), *info["admissible_actions"]):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
            observation, _, _, _, info = env.step(command)
        assert info["won"]


def test_gymnasium_protocol(games):
    env = make_env("alfworld", games=games, max_steps=2, engine="fast")
    first, info = env.reset(seed=1)
    assert info["game"] == games[1]
    assert first.endswith(f"Your task is to: {info['task']}")
    _, reward, terminated, truncated, info = env.step("look")
    assert (reward, terminated, truncated, info["won"]) == (0.0, False, False, False)
    assert env.step("look")[2:4] == (False, True)
    assert env.reset(seed=1)[0] == first
    assert env.tasks("train") == games


def test_mistakes_are_named(tmp_path, games):
    with pytest.raises(ValueError, match="alfworld"):
        make_env("alfwrld")
    with pytest.raises(ValueError, match="engine"):
        AlfworldEnv(engine="slow")
    with pytest.raises(ValueError, match="no game to play"):
        AlfworldEnv().reset()
    with pytest.raises(RuntimeError, match="reset"):
        AlfworldEnv().step("look")
    with pytest.raises(ValueError, match="valid_seen"):
        list_games(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="alfworld-download"):
        list_games(tmp_path, "train")
    with pytest.raises(GameFileError, match=r"game\.tw-pddl"):
        AlfworldEnv().reset(options={"game": str(tmp_path / "game.tw-pddl")})
    assert list_games(Path(games[0]).parents[4], "train") == sorted(games)


@pytest.fixture
def lay_out(tmp_path):
    """lay_out({task: a game file's text or content}) -> the split's folder, below one called "removable"."""
    warn_once.cache_clear()

    def write(games):
        for task, content in games.items():
            path = tmp_path / "removable" / "json_2.1.1" / "train" / task / "trial_1" / "game.tw-pddl"
            path.parent.mkdir(parents=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "removable"

    return write


def test_games_not_marked_as_solvable_are_left_out_counted_and_named(lay_out, caplog):
    padding = "x" * 2 * TAIL
    folder = lay_out(
        {
            "good": {"pddl_problem": padding, "solvable": True, "walkthrough": []},
            "early": {"solvable": True, "pddl_problem": padding},  # not where alfworld writes it
            "quoting": {"solvable": True, "pddl_problem": padding, "note": '"solvable": false'},
            "no": {"pddl_problem": padding, "solvable": False, "walkthrough": ["look"]},
            "early-no": {"solvable": False, "pddl_problem": padding},
            "null": {"solvable": None},
            "unmarked": {"pddl_problem": padding, "walkthrough": ['"solvable": true']},
            "cut": json.dumps({"pddl_problem": padding, "solvable": True})[:TAIL],
            "cut-late": json.dumps({"solvable": True, "walkthrough": ["look"]})[:-5],
            "movable-a": {"solvable": True},
            "ButterKnifeSliced-b": {"solvable": True},
        }
    )
    kept = [Path(path).parts[-3] for path in list_games(folder, "train")]
    assert kept == ["early", "good", "quoting"]
    assert AlfworldEnv(data=str(folder)).tasks("train", 2) == list_games(folder, "train")[:2]
    (message,) = {record.message for record in caplog.records}
    assert message == (
        f"{folder}/json_2.1.1/train: left out 1 with 'Sliced' in their name (ButterKnifeSliced-b/trial_1); "
        "2 that cannot be read as JSON (cut-late/trial_1, cut/trial_1); "
        "4 not marked as solvable (early-no/trial_1, no/trial_1, null/trial_1, unmarked/trial_1); "
        "1 with 'movable' in their name (movable-a/trial_1)"
    )
    assert len(caplog.records) == 1  # though it was listed three times


def test_the_first_held_out_official_games_are_of_all_types(lay_out):
    kinds = ["look_at_obj_in_light", "pick_and_place_simple", "pick_two_obj_and_place"]
    folder = lay_out({f"{kind}-Mug-None-Desk-{i}": {"solvable": True} for kind in kinds for i in range(3)})
    (folder / "json_2.1.1" / "train").rename(folder / "json_2.1.1" / "valid_seen")
    games = AlfworldEnv(data=str(folder)).tasks("valid_seen", 4)
    assert [Path(game).parts[-3] for game in games] == [
        *(f"{kind}-Mug-None-Desk-0" for kind in kinds),
        f"{kinds[0]}-Mug-None-Desk-1",
    ]


def test_a_split_with_nothing_to_play_says_what_was_left_out(lay_out):
    folder = lay_out({f"task{i}": {"solvable": None} for i in range(7)})
    names = ", ".join(f"task{i}/trial_1" for i in range(5))
    with pytest.raises(
        FileNotFoundError, match=rf"no playable .*\(left out 7 not marked as solvable \({names} and 2 more"
    ):
        list_games(folder, "train")


def test_a_given_game_is_of_the_split_whose_folder_it_lies_in(tmp_path):
    path = str(tmp_path / "train" / "json_2.1.1" / "valid_seen" / "task" / "trial" / "game.tw-pddl")
    env = AlfworldEnv(games=[path])
    assert (env.tasks("train"), env.tasks("valid_seen")) == ([], [path])
