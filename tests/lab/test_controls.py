"""Each control's invariant by hand, and each in a whole iteration of a tiny run."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train as train_module
from config import Config, parse_args, variant_of
from data import Batch, Skills, Step, Trajectory
from envs.prompts import COMPACT_ANALYSIS
from envs.search.facts import generated_questions
from envs.search.text import words
from lab.experiments import controls, kinds
from lab.experiments.controls import blind, facts, hidden, moved, peers, permuted, same_type
from rescore import rescore
from runlog.card import command_of
from runlog.start import Run, start
from skills import GENERAL_TEMPLATE, analysis_prompt
from tests.settings import laptop

NAMES = ("FACTS", "OTHERS_FACTS", "PEER", "BLIND", "SAME_TYPE", "RANDOM_STEPS", "PULL", "PERMUTED", "SKILL_ONLY")
NAMES += ("AVERAGED", "CENTRED", "CLIPPED")
SOME = ("FACTS", "OTHERS_FACTS", "PEER", "SAME_TYPE")  # guide not every token
SMALL = {"tasks": 2, "rollouts": 2, "max_steps": 3, "max_new_tokens": 4, "train_games": 4, "eval_games": 1}
SMALL |= {"iterations": 1, "mini_batch": 8, "learning_rate": 1e-3, "eval_every": 0, "save_every": 1}
SMALL |= {"scorer": "reference", "invalid_penalty": 1.0}
NAN = float("nan")


def settings(name: str, **changes) -> Config:
    return laptop(algo=f"lab.experiments.controls:{name}", **SMALL | changes)


def train(config: Config) -> Run:
    run = start(config)
    train_module.train(run, variant_of(config.algo))
    return run


def metrics_of(config: Config) -> list[dict]:
    return [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]


def played(*turns: tuple[str, str], task: str = "find it", success: bool = False, group: int = 0, kind: str = ""):
    """A trajectory of (observation, action)."""
    steps = [Step((), seen, [1], [2], action, action, True) for seen, action in turns]
    return Trajectory(task, group, steps, success, task_type=kind)


def stub(**changes) -> SimpleNamespace:
    config = {"episode_weight": 0.5, "step_weight": 0.25, "success_reward": 1.0, "invalid_penalty": 0.0}
    config |= {"normalize": "mean", "group_over": "steps", "max_step_skills": 3} | changes
    return SimpleNamespace(config=SimpleNamespace(**config), rng=random.Random(0))


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_control_trains_and_goes_on_without_an_episode(name, random_tiny, tmp_path):
    many = {"tasks": 8, "rollouts": 1, "train_games": 8} if name == "SAME_TYPE" else {}
    config = settings(name, out=str(tmp_path / "run"), iterations=2 if name == "PULL" else 1, **many)
    variant = variant_of(config.algo)

    def play(run: Run, games: list):
        trajectories, metrics = variant.play(run, games)
        for trajectory in trajectories[::2]:
            trajectory.success = True
        return trajectories, metrics

    train_module.train(run := start(config), replace(variant, play=play))
    first, *_, last = 2 * metrics_of(config)
    assert all(value == value for value in (first | last).values())  # no NaN
    assert last["grad_norm"] > 0 and (first["guided/tokens"] < 1) == (name in SOME)
    assert first["guided/tokens"] > 0 < last["advantage/skill_abs"]
    assert ("skills/parse_rate" in first) == (name not in ("FACTS", "OTHERS_FACTS", "PEER", "PULL"))
    if name == "PULL":  # the policy starts where its reference stays
        assert first["advantage/skill_abs"] < 1e-5 < last["advantage/skill_abs"]
    skills, _ = variant.skills(run, [])
    empty, _ = rescore(run, [], skills, [])
    assert variant.advantages(run, empty).total.numel() == 0


def test_a_variant_of_a_module_resumes_and_is_named_in_the_card(random_tiny, tmp_path):
    whole, halves = (settings("PERMUTED", out=str(tmp_path / name), iterations=2) for name in ("whole", "halves"))
    train(whole)
    train(replace(halves, iterations=1))
    train(replace(halves, resume=True))
    ours, theirs = (torch.load(tmp_path / name / "checkpoints/000001.pt")["model"] for name in ("whole", "halves"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    again = parse_args(command_of(whole)[2:])
    assert replace(again, out=whole.out, fit=whole.fit, save_every=1) == whole


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_facts_by_hand():
    task, room = "put mug on desk", "see desk drawer 2 drawer"
    lost = played(
        (room, "go to drawer"),
        ("drawer is closed", "go to drawer"),
        ("nothing happens", "open drawer"),
        ("in drawer see mug", "take mug from drawer"),
        ("pick up mug from drawer", "use lamp"),
        ("nothing happens", "go to drawer"),
        ("nothing happens", "move mug to safe"),
        task=task,
    )
    found = facts(lost, most_steps=2)
    assert found.episode == (
        "This attempt failed. It did, in no order: go to drawer; move mug to ...; open drawer; take mug from ...; "
        "use .... Of that changed nothing: go to drawer; use ...."
    )
    assert found.steps == {
        2: "Tried before, and changed nothing: go to drawer.",
        5: "Tried before, and changed nothing: go to drawer; use lamp.",
    }
    won = facts(replace(lost, steps=lost.steps[:1], success=True), most_steps=2)
    assert (won.episode, won.steps) == ("This attempt succeeded. It did, in no order: go to drawer.", {})


def test_what_changes_nothing():
    nothing = ("nothing happens", "Nothing happens.", "no results", "", "a b")
    nothing += ('<information>{"result": "No search results found."}</information>',)
    assert all(controls.changed_nothing("a b", after) for after in nothing)
    assert not any(controls.changed_nothing("a b", after) for after in ("a", "doc 1 no results", "a b c"))


def test_a_command_shows_no_word_that_is_not_known():
    assert hidden("search currency of peru", {"currency", "of"}) == "search currency of ..."
    assert hidden("<search>Currency of Peru now</search>", {"currency", "of"}) == "<search>Currency of ...</search>"
    assert hidden("take mug from desk 1", {"mug", "from", "desk"}) == "take mug from ..."
    assert hidden("", set()) == ""


def test_facts_of_a_lost_search_never_say_the_answer():
    """Whatever was searched for, seen or answered."""
    asked = [q for split in generated_questions().values() for q in split][::7]
    asked = [q for q in asked if words(q.answer) not in words(q.question)]  # the state where Idaho Falls lies
    assert len(asked) > 100
    for question in asked:
        task, answer = words(question.question), words(question.answer)
        seen = f"doc 1 {answer} and more doc 2 lima"
        turns = [(task, f"search {task} {answer}"), (seen, f"search {answer}"), (seen, f"answer not {answer}")]
        found = facts(played(*turns, task=task), most_steps=3)
        assert f" {answer} " not in f" {' '.join(controls.words_of(found.episode))} "
        assert f"search {task} " in found.episode
        assert list(found.steps) == [2]  # the same results again; what was searched for is known by then


def test_others_facts_are_of_another_task():
    every = [played(("x", "x"), group=g, success=g == 1, kind="k") for g in (0, 0, 1, 1)]
    found, _ = controls.others_facts(stub(), every)
    assert ["succeeded" in own.episode for own in found] == [True, True, False, False]
    assert controls.others_facts(stub(), every[:2])[0] == [None, None]
    with pytest.raises(ValueError, match="--tasks must be at least 2"):
        settings("OTHERS_FACTS", tasks=1)


# ---- other skills ----------------------------------------------------------------------------------------------------


def test_peers_are_other_successes_of_the_group():
    won, also, lost, alone, other = (
        played((f"room {i}", f"go {i}"), ("there", "take it"), group=group, success=success)
        for i, (group, success) in enumerate([(0, True), (0, True), (0, False), (1, True), (2, False)])
    )
    found, _ = peers(stub(), [won, also, lost, alone, other])
    told = [f"A successful attempt:\nroom {i} -> go {i}\nthere -> take it" for i in (0, 1)]
    assert (found[0].episode, found[1].episode) == (told[1], told[0])
    assert found[2].episode in told and not found[2].steps
    assert found[3:] == [None, None]  # its only success is its own; nobody succeeded
    with pytest.raises(ValueError, match="--rollouts must be at least 2"):
        settings("PEER", rollouts=1)


@pytest.mark.parametrize("template", [COMPACT_ANALYSIS, GENERAL_TEMPLATE])
def test_a_blind_prompt_is_the_same_whatever_happened(template):
    one = played(("a room", "go"), task="find {it}")
    other = replace(played(*[("a hall", "stay")] * 9, task="find {it}"), success=True)
    asked = [analysis_prompt(t, 3, blind(template, 3)) for t in (one, other)]
    assert asked[0] == asked[1] and "find {it}" in asked[0] and "{outcome}" not in asked[0]
    assert blind(COMPACT_ANALYSIS, 3) == "task {task} write skills"
    plain = [analysis_prompt(t, 3, template) for t in (one, other)]
    assert plain[0] != plain[1]


def test_blind_skills_stand_at_steps_that_there_are(random_tiny, tmp_path):
    run = start(settings("BLIND", out=str(tmp_path / "run")))
    asked = []
    answer = json.dumps({"episode_skill": "look", "step_skills": {"0": "go", "7": "stay"}})
    run.writer = lambda prompts: asked.extend(prompts) or [answer] * len(prompts)
    found, metrics = controls.blind_skills(run, [played(("a room", "go"), task="put mug on desk")])
    assert asked == ["task put mug on desk write skills"]
    assert found == [Skills("", "look", {0: "go"})] and metrics["skills/step_keys_dropped"] == 1


def test_the_same_type_and_another_thing():
    tasks = ["put mug on desk", "put mug on bed", "put pen on bed", "put mug on desk", "heat mug on desk"]
    every = [played(("x", "x"), task=task, kind=task.split()[0]) for task in [*tasks, "put key on bed"]]
    having = [True] * len(every)
    assert same_type(every, 0, having) == [2, 5]  # both share "put on" alone; 1 shares the mug, 4 is of another type
    assert same_type(every, 0, [True, True, False, True, True, False]) == [1]
    assert same_type(every, 4, having) == []


def test_step_skills_move_to_random_steps():
    skills, places = {1: "a", 3: "b"}, set()
    for seed in range(200):
        found = moved(skills, 4, random.Random(seed))
        assert sorted(found.values()) == ["a", "b"]
        places.add(tuple(found))
    assert places == {(i, j) for i in range(4) for j in range(4) if i != j and i != 1 and j != 3}
    assert moved({0: "a", 1: "b"}, 2, random.Random(0)) == {1: "a", 0: "b"}
    assert moved({0: "a"}, 1, random.Random(0)) == {0: "a"} and moved({}, 1, random.Random(0)) == {}


# ---- other advantages ------------------------------------------------------------------------------------------------


def batch_of(*, reference=None, won: bool = True) -> Batch:
    """Two rollouts of one task, of one step each: 3 and 2 tokens, the first under an episode skill, the other under a
    step skill."""
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, NAN]])
    under = {"episode": torch.tensor([[-1.0, -4.0, -2.0], [NAN] * 3])}
    under["step"] = torch.tensor([[NAN] * 3, [-3.0, -0.5, NAN]])
    rollouts = [played(("x", "x"), success=won), played(("x", "x"))]
    return Batch(rollouts, [None, None], [[()], [()]], {}, old, reference, under)


SHIFT = torch.tensor([[0.0, -2.0, 1.0], [-2.0, 0.5, NAN]])


def test_the_outcome_is_left_out():
    """lambda is 0.5 under the episode skill and 0.25 under the step skill."""
    found = controls.skill_alone(stub(), batch_of())
    assert found.total.tolist() == [[0.0, -1.0, 0.5], [-0.5, 0.125, 0.0]]
    assert found.outcome.tolist() == [0.5, -0.5]
    assert torch.equal(found.total, controls.skill_alone(stub(), batch_of(won=False)).total)
    assert torch.allclose(found.skill, SHIFT, equal_nan=True)


def test_the_skill_advantage_in_another_order():
    orders = set()
    for seed in range(100):
        run = stub()
        run.rng = random.Random(seed)
        found = controls.PERMUTED.advantages(run, batch_of())
        assert torch.allclose(found.skill.nansum(1), SHIFT.nansum(1))
        assert torch.equal(found.skill.isnan(), SHIFT.isnan())
        weights = torch.tensor([[0.5], [0.25]])
        expected = torch.tensor([[0.5], [-0.5]]) + weights * found.skill  # A_ep + lambda A_skill
        assert torch.allclose(found.total, expected.nan_to_num(0.0))
        orders.add(tuple(found.skill[~SHIFT.isnan()].tolist()))
    assert len(orders) == 6 * 2  # every order of three tokens, and of two


def test_permuting_leaves_what_it_was_given():
    shift, mask = torch.arange(8.0).view(2, 4), torch.tensor([[True] * 3 + [False], [False] * 4])
    mixed = permuted(shift, mask, random.Random(3))
    assert shift.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(mixed[0, :3].tolist()) == [0, 1, 2] and mixed[0, 3] == 3 and torch.equal(mixed[1], shift[1])


def test_ends_of_turns_count_for_nothing_but_the_last():
    rollout = played(("x", "x"), ("y", "y"))  # its turns have three tokens and two
    batch = replace(batch_of(), trajectories=[rollout])
    found = controls.words_alone(stub(), batch)
    assert torch.allclose(found.skill, torch.tensor([[0.0, -2.0, NAN], [-2.0, 0.5, NAN]]), equal_nan=True)
    assert found.total.tolist() == [[0.0, -1.0, 0.0], [-0.5, 0.125, 0.0]]  # A_ep is 0 in a group of one


def test_the_mean_of_a_response_at_all_its_tokens():
    found = controls.AVERAGED.advantages(stub(), batch_of())
    means = torch.tensor([[-1 / 3] * 3, [-0.75, -0.75, NAN]])  # of SHIFT
    assert torch.allclose(found.skill, means, equal_nan=True)
    assert torch.allclose(found.total, torch.tensor([[1 / 3] * 3, [-0.6875, -0.6875, 0.0]]))


def test_centring_takes_the_mean_of_what_was_scored():
    shift = torch.tensor([[-3.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    scores = torch.tensor([[-4.0, 0.0, NAN], [NAN, -2.0, NAN]])  # three tokens, whose shifts have the mean -1
    assert controls.centred(shift, scores).tolist() == [[-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert torch.equal(controls.centred(shift, torch.full((2, 3), NAN)), shift)


def test_clipping_bounds_each_token():
    """A_ep is 0.5 and -0.5, lambda is 0.5 under the episode skill and 0.25 under the step skill."""
    found = controls.CLIPPED.advantages(stub(), batch_of())
    assert found.total.tolist() == [[0.5, 0.5 - 0.25, 0.5 + 0.25], [-0.5 - 0.125, -0.5 + 0.125, 0.0]]


def test_the_pull_is_reference_less_old():
    reference = torch.tensor([[-2.0, -2.0, -1.0], [-0.5, -3.0, NAN]])
    found = controls.pull(stub(), batch_of(reference=reference))
    assert torch.equal(found.skill.nan_to_num(9.0), torch.tensor([[-1.0, 0.0, 2.0], [0.5, -2.0, 9.0]]))
    assert found.total.tolist() == [[0.5 - 0.5, 0.5, 0.5 + 1.0], [-0.5 + 0.25, -0.5 - 1.0, 0.0]]
    for flags in (["--scorer", "old"], ["--step-weight", "0.1"]):
        with pytest.raises(SystemExit):
            parse_args(["--algo", "lab.experiments.controls:PULL", *flags])


def test_the_pull_reads_the_reference_where_no_kl_needs_it(random_tiny, tmp_path):
    run = start(settings("PULL", out=str(tmp_path / "run"), kl=0.0))
    run.begin(0)
    trajectories, _ = variant_of("opid").play(run, run.games[:1])
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(0.5)
    routes = [[()] * len(trajectory.steps) for trajectory in trajectories]
    batch, _ = rescore(run, trajectories, [None] * len(trajectories), routes)
    assert batch.reference_logprobs is None
    sampled = torch.tensor([p for step in batch.steps for p in step.logprobs])  # by what is now the reference
    expected = sampled - batch.old_logprobs[batch.mask]
    assert torch.allclose(controls.pull(run, batch).skill[batch.mask], expected, atol=1e-4)
    assert expected.abs().max() > 0.1


# ---- what they say to each kind of token -----------------------------------------------------------------------------


def test_kinds_of_tokens_by_hand():
    """Two responses answer, blamed by 2 and 4, and one goes, unscored. A word has 1, the other 0.5."""
    step = {
        "tokens": ["answer", "oslo", "<end>"],
        "skill_advantages": [-2.0, 1.0, -9.0],
        "old_logprobs": [-0.5, -1, -9],
    }
    other = {
        "tokens": ["answer", "rome", "<end>"],
        "skill_advantages": [-4.0, 0.5, None],
        "old_logprobs": [-1.5, -2, 0],
    }
    went = {"tokens": ["go", "<end>"], "skill_advantages": [None, None], "old_logprobs": [-1.5, -0.75]}
    episodes = [{"iteration": 0, "steps": [step]}, {"iteration": 3, "steps": [other, went]}]
    head, _, row, empty, *_ = kinds.table(list(kinds.tokens(episodes))).splitlines()
    assert head == "| iterations | answer, % | A_skill | go, % | A_skill | words: A_skill | -log pi |"
    assert row == "| 0 to 3 | 67 | -3.00 | 33 | - | 0.75 | 1.50 |"
    assert empty == "| 4 to 7 | 0 | - | 0 | - | - | - |"
