"""Shortest plans, AUC and agreement by hand; one batch from end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from config import Config, flag, parse_args, variant_of
from data import Step, Trajectory
from envs.alfworld import AlfworldEnv, words
from envs.alfworld.engine import FastEngine, load_game
from envs.alfworld.expert import shortest_plan
from envs.search import SearchEnv
from envs.search.text import words as words_of
from lab.experiments import skill_signal
from lab.experiments.estimates import probability_of_superiority
from lab.experiments.runs import RESULTS, config_of, on_the_laptop
from lab.experiments.skill_signal import (
    Guided,
    as_advised,
    auc,
    auc_alike,
    batch_of,
    describe,
    differences,
    interval,
    on_shortest_plan,
    rows_of,
    table,
)
from lab.experiments.stored import read
from lm.loading import save_policy
from lm.scoring import response_logprobs
from runlog.start import start as start_run
from tiny.loading import load_model
from tiny.warmstart import tiny_model
from train import train

STEP = Guided("step", 0, 0, False, False, True, 0.0, 0.0, 1, 1.0)


def steps_of(good, bad, **changes):
    """One guided step for each A_skill of the good ones and the others."""
    return [replace(STEP, good=kind, skill=s, **changes) for kind, some in ((True, good), (False, bad)) for s in some]


def test_auc_by_hand():
    # pairs: 0.5 > 0.1, 0.5 = 0.5, 0.2 > 0.1, 0.2 < 0.5
    assert auc(steps_of([0.5, 0.2], [0.1, 0.5])) == (1 + 0.5 + 1 + 0) / 4
    assert math.isnan(auc(steps_of([0.5], [])))
    assert math.isnan(auc([replace(STEP, good=None)]))


def test_auc_of_the_same_turn_and_outcome_by_hand():
    """First turns are praised, and most of them are good: that alone is no order within a turn."""
    first = steps_of([2.0, 3.0], [2.5], turn=0)
    last = steps_of([], [0.0], turn=1)
    assert auc(first + last) == (2 + 1) / 4 and auc_alike(first + last) == 1 / 2
    both = first + steps_of([1.0], [0.0], turn=1)  # three pairs of one turn
    assert auc_alike(both) == pytest.approx(2 / 3)
    assert math.isnan(auc_alike(steps_of([1.0], [], turn=0) + last))
    won, lost = steps_of([2.0, 3.0], [2.5], won=True), steps_of([0.0], [0.5, 1.0])  # a success is praised as such
    assert auc(won + lost) == 5 / 9 and auc_alike(won + lost) == 1 / 4


def test_differences_are_of_the_same_groups():
    """Whatever groups are drawn: an order that is right in all of them is 1 above one that is wrong in all of them."""
    own, other = ([s for g in range(4) for s in steps_of([x], [0.5], group=g)] for x in (1.0, 0.0))
    assert set(differences(own, other).values()) == {1}
    # both are right where the other is: in any draw nothing is between them, though each has an interval
    mixed = own[:4] + other[4:]
    assert set(differences(mixed, mixed).values()) == {0} and interval(auc, mixed)[0] < auc(mixed)


def test_ranks_and_pairs_say_the_same():
    ours, theirs = np.random.default_rng(0).integers(0, 9, size=(2, 50)).astype(float)
    difference = ours[:, None] - theirs  # (ours, theirs)
    pairs = (difference > 0) + 0.5 * (difference == 0)
    assert probability_of_superiority(ours, theirs) == pytest.approx(pairs.mean())


def test_auc_interval_draws_whole_groups():
    """Each group alone is perfect, so every draw is."""
    apart = [step for group in range(5) for step in steps_of([1.0], [0.0], group=group)]
    assert interval(auc, apart, samples=20) == (1, 1)
    wrong = [step for group in range(5) for step in steps_of([0.0], [1.0], group=group + 5)]
    low, high = interval(auc, apart + wrong, samples=100)
    assert low < auc(apart + wrong) == 0.5 < high


def test_description_by_hand():
    steps = [
        Guided("step", 0, 0, False, False, True, 0.2, 0.3, 2, 1.0),
        Guided("step", 0, 1, False, False, False, -0.1, 0.1, 1, 2.0),
        Guided("episode", 1, 0, True, False, True, -0.4, 0.6, 1, 0.0),  # no outcome: no sign to agree with
        Guided("episode", 2, 0, False, False, None, -0.5, 0.5, 4, -1.0),
    ]
    rows = rows_of(steps)
    assert list(rows) == ["all", "episode", "step", "no outcome signal", "outcome signal"]
    everything = rows["all"]
    assert everything["good"] == pytest.approx(2 / 3)
    assert everything["auc"] == 0.5  # 0.2 > -0.1 > -0.4
    assert everything["auc_alike"] is None  # each turn has only good ones, or others
    assert everything["agreement"] == pytest.approx(2 / 3)  # the first and the last
    assert everything["skill_abs"] == pytest.approx((2 * 0.3 + 0.1 + 0.6 + 4 * 0.5) / 8)
    assert everything["outcome_abs"] == pytest.approx((2 * 1 + 2 + 0 + 4) / 8)
    assert (rows["step"]["auc"], rows["episode"]["auc"]) == (1.0, None)
    assert (rows["no outcome signal"]["steps"], rows["no outcome signal"]["agreement"]) == (1, None)
    assert describe([])["skill_abs"] is None


@pytest.mark.parametrize("prompt", ["compact", "official"])
def test_the_planners_own_steps_are_on_a_shortest_plan_and_detours_are_not(games, prompt):
    for game in games:
        engine = FastEngine(load_game(game))
        engine.reset()
        commands = shortest_plan(engine)
        detour = [commands[0], "look", "no such thing", *commands[1:]]
        for actions, marks in (
            (commands, [True] * len(commands)),
            (detour, [True, False, False, *[True] * (len(commands) - 1)]),
        ):
            said = [words(a) for a in actions] if prompt == "compact" else actions
            steps = [Step((), "", [], [], "", action, True) for action in said]
            trajectory = Trajectory("", 0, steps, True, game=game)
            assert on_shortest_plan(AlfworldEnv(prompt=prompt, max_steps=2), trajectory) == marks


def searched(task: str, *actions: str, official: bool = False) -> list[bool | None]:
    """What is said of a search episode of these actions."""
    env = SearchEnv(prompt="official" if official else "compact", max_steps=len(actions) + 1)
    game = next(g for g in env.tasks("train") if words_of(env.reset(options={"game": g})[0]) == task)
    observation, info = env.reset(options={"game": game})
    steps = []
    for action in actions:
        steps.append(Step((), observation, [], [], "", action, True))
        observation, *_ = env.step(action)
    return as_advised(Trajectory(info["task"], 0, steps, False, game=game))


@pytest.mark.parametrize("official", [False, True])
def test_good_steps_of_a_search_are_what_the_adviser_would_do(official):
    def said(kind, text):
        return f"<{kind}>{text}</{kind}>" if official else f"{kind} {text}"

    task = "what is continent of country whose capital is havana"
    first, second = said("search", "country with capital havana"), said("search", "continent of cuba")
    whole, found = said("search", task), said("answer", "north america")
    for actions, marks in (
        ([first, second, found], [True, True, True]),
        ([whole, second, found], [False, True, True]),  # it brought Cuba all the same
        ([whole, said("answer", "havana")], [False, False]),
        ([found], [False]),  # right, but nothing seen says so
        ([second, first, second], [False, False, True]),  # by luck it brought the first hop, too
        ([first, first, second], [True, False, True]),
        ([first, "nonsense", second], [True, False, True]),
        ([said("search", "The country with capital Havana")], [True]),
        ([said("answer", "country with capital havana")], [False]),
    ):
        assert searched(task, *actions, official=official) == marks, actions


def test_of_a_question_that_was_not_generated_nothing_is_known():
    steps = [Step((), "who wrote it", [], [], "", "search it", True)] * 2
    assert as_advised(Trajectory("who wrote it", 0, steps, True)) == [None, None]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("skill-signal", "| all | 2075 | 33.5 | 0.598 |"),
        ("skill-gate", "| all | 384 | 24.2 | 0.602 | [0.521, 0.689] | 0.631 |"),
    ],
)
def test_the_stored_table_is_made_of_the_stored_lines(name, row):
    stored = RESULTS / f"{name}.jsonl"
    assert "\n\n".join(map(table, read(stored))) + "\n" == stored.with_suffix(".md").read_text()
    assert row in table(read(stored)[0])


@pytest.fixture
def start(tmp_path, tokenizer):
    save_policy(tiny_model(len(tokenizer), seed=0, width=48), tokenizer, tmp_path / "start")
    return tmp_path / "start"


SMALL = {"prompt": "compact", "tasks": 2, "rollouts": 2, "max_steps": 3, "max_new_tokens": 4, "train_games": 4}
FLAGS = [text for name, value in SMALL.items() for text in (flag(name), str(value))]


def test_signal_from_end_to_end(start, tmp_path):
    """Skills by a script, as an untrained model writes none."""
    argv = [*FLAGS, "--model", str(start), "--algo", "opid-oracle", "--results", str(tmp_path / "signal.jsonl")]
    text = skill_signal.main(argv)
    result = json.loads((tmp_path / "signal.jsonl").read_text())
    assert (tmp_path / "signal.md").read_text() == text + "\n"
    assert (result["groups"], result["silent"], result["success"]) == (2, 1.0, 0.0)
    rows = result["rows"]
    assert rows["all"]["steps"] == rows["no outcome signal"]["steps"] == 2 * 2 * 3
    assert rows["all"]["skill_abs"] > 0 == rows["all"]["outcome_abs"]
    assert "against" not in result
    assert text.splitlines()[0] == "start: success 0.0%, groups without outcome signal 100.0% of 2"


def test_two_methods_score_the_same_episodes(start, tmp_path, monkeypatch):
    def judged(config):
        return lambda t: [(turn + t.group) % 2 == 0 for turn in range(len(t.steps))]

    monkeypatch.setattr(skill_signal, "judge", judged)  # an untrained model makes no good step
    argv = [*FLAGS, "--model", str(start), "--algo", "opid-oracle", "--results", str(tmp_path / "signal.jsonl")]
    text = skill_signal.main([*argv, "--against", "opid-oracle"])
    (result,) = read(tmp_path / "signal.jsonl")
    assert set(result["against"]["opid-oracle"].values()) == {0}
    assert text.endswith("Less that of opid-oracle: AUC +0.000 [0.000, 0.000], alike +0.000 [0.000, 0.000]")
    skill_signal.main([*argv, "--against", "opid-placebo"])
    (again,) = read(tmp_path / "signal.jsonl")
    assert again["rows"] == result["rows"] and again["config"]["algo"] == "opid-oracle"
    assert again["against"]["opid-placebo"]["auc"] != 0


@pytest.mark.parametrize(("name", "kinds"), [("FACTS", {"episode", "step"}), ("PULL", {"none"})])
def test_signal_of_a_control_in_search(name, kinds, start, tmp_path):
    argv = ["--env", "search", "--model", str(start), "--algo", f"lab.experiments.controls:{name}"]
    argv += ["--tasks", "2", "--rollouts", "2", "--max-steps", "3", "--max-new-tokens", "6"]
    skill_signal.main([*argv, "--results", str(tmp_path / "signal.jsonl"), "--name", name])
    (result,) = read(tmp_path / "signal.jsonl")
    assert result["config"]["max_step_skills"] == 3  # from the laptop's recipe for Search QA
    assert result["rows"]["all"]["steps"] == 12 and result["rows"]["all"]["good"] == 0
    assert result["rows"].keys() - {"all", "no outcome signal", "outcome signal"} == kinds


def scripted(start, **changes) -> Config:
    given = [text for name, value in changes.items() for text in (flag(name), str(value))]
    return parse_args(on_the_laptop(["--model", str(start), "--algo", "opid-oracle", *FLAGS, *given]))


def test_a_run_goes_on_from_its_checkpoint_and_is_left_alone(start, tmp_path):
    run = tmp_path / "run"
    config = scripted(start, out=str(run), iterations=1, eval_games=2, learning_rate=0.1, max_step_skills=1)
    train(start_run(config), variant_of(config.algo))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    skill_signal.main(["--run", str(run), "--results", str(tmp_path / "signal.jsonl")])
    assert json.loads((tmp_path / "signal.jsonl").read_text())["rows"]["all"]["steps"] == 12
    batch = batch_of(config_of(run, []), run)
    for folder, kept in ((run / "policy", batch.old_logprobs), (start, batch.reference_logprobs)):
        model, _ = load_model(str(folder))
        contexts, responses = [step.context for step in batch.steps], [step.response for step in batch.steps]
        scored = response_logprobs(model, contexts, responses, token_budget=4096)
        assert torch.allclose(scored, kept, atol=1e-4, equal_nan=True)
    assert not torch.allclose(batch.old_logprobs, batch.reference_logprobs, atol=1e-2, equal_nan=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_cannot_be_measured_is_said(start, tmp_path):
    with pytest.raises(ValueError, match="not --algo grpo"):
        skill_signal.main(
            [*FLAGS, "--model", str(start), "--algo", "grpo", "--results", str(tmp_path / "signal.jsonl")]
        )
    (tmp_path / "config.json").write_text(json.dumps(scripted(start).to_dict()))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        skill_signal.main(["--run", str(tmp_path), "--results", str(tmp_path / "signal.jsonl")])
