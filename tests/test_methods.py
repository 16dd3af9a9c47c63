"""Each method in a whole iteration of a tiny run: what it guides by, learns from, acts under, and what it refuses."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import train as train_module
from baselines import METHODS, opd
from baselines.acting import lessons, remember
from baselines.controls import scripted_skills
from baselines.distillation import Distilled
from baselines.oprd import Oprd
from config import Config, parse_args
from data import Skills, Step, Trajectory
from envs.alfworld import AlfworldEnv, words
from envs.alfworld.engine import FastEngine, load_game
from envs.alfworld.expert import shortest_plan
from lm.encoder import Encoder
from runlog.metrics import over_processes, sizes_of
from tests.conftest import SMALL
from tests.playing import play
from tests.test_metrics import Process
from tiny.warmstart import tiny_model
from train import train

FLAGS = "--tasks 2 --rollouts 2 --max-steps 3 --max-new-tokens 4 --train-games 4 --eval-games 1 --iterations 1 "
FLAGS += "--mini-batch 8 --learning-rate 1e-3 --eval-every 0 --save-every 1 --invalid-penalty 1 --scorer old"


@pytest.fixture
def run(monkeypatch, llama, tokenizer, tmp_path):
    """-> a function that trains a random tiny model and returns (config, metrics of each iteration). Its skills are
    scripted, since a random model writes none; a fourth of its responses are taken for valid."""
    monkeypatch.setattr(AlfworldEnv, "parse_action", lambda self, text, admissible: (text, len(text) % 2 == 0))
    monkeypatch.setattr(train_module, "load_model", lambda *a, **k: (copy.deepcopy(llama), tokenizer))
    other = tiny_model(len(tokenizer), seed=5, width=48)
    monkeypatch.setattr(opd, "load_model", lambda *a, **k: (other, tokenizer))
    answer = '{"episode_summary": "s", "episode_skill": "open every closed place", "step_skills": {"1": "look in bed"}}'
    monkeypatch.setattr(train_module, "model_writer", lambda *a, **k: lambda prompts: [answer] * len(prompts))

    def start(algo, **changes) -> tuple[Config, list[dict]]:
        more = {"opd": ["--teacher", "larger"], "oprd": ["--scorer", "reference"]}.get(algo, [])
        config = parse_args([*FLAGS.split(), "--algo", algo, *more, "--out", str(tmp_path / (algo + str(changes)))])
        config = replace(config, **changes)
        train(config)
        return config, [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]

    return start


def trained(config: Config) -> dict:
    newest = sorted(Path(config.out, "checkpoints").glob("*.pt"))[-1]
    return torch.load(newest, weights_only=True)["model"]


def differ(a: dict, b: dict) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("algo", [algo for algo in METHODS if algo not in ("opid", "grpo")])
def test_every_method_trains_and_logs_what_it_adds(algo, run, llama):
    config, (record,) = run(algo)
    method = METHODS[algo]
    assert differ(trained(config), dict(llama.named_parameters()))
    assert all(value == value for value in record.values())  # no NaN
    assert ("loss/distill" in record) == issubclass(method, Distilled | Oprd)
    assert (record["loss/policy"] == 0) == (algo in ("opsd", "oprd"))  # no outcome
    assert (record["advantage/skill_abs"] > 0) == bool(config.levels or algo == "opd")
    assert ("advantage/state_group_size" in record) == (algo == "gigpo")
    if algo == "skill-sd":
        assert record["loss/distill"] > 0  # k3 is never negative


def test_terms_of_weight_zero_leave_grpo_bit_for_bit(run):
    """With episode skills, which are scored in a pass of their own: step skills ride on that of the plain contexts,
    and change how its sums are rounded."""
    grpo = trained(run("grpo")[0])
    for algo, off in (
        ("sdar", {"distill_weight": 0.0}),
        ("skill-sd", {"distill_weight": 0.0}),
        ("gigpo", {"state_weight": 0.0}),
        ("rlsd", {"rlsd_mix": 0.0}),
        ("opid-shuffled", {"episode_weight": 0.0, "step_weight": 0.0}),
    ):
        assert not differ(trained(run(algo, routing="episode", **off)[0]), grpo), algo
    assert differ(trained(run("gigpo")[0]), grpo)


def test_exact_divergences_train_and_weight_zero_is_grpo(run):
    grpo = trained(run("grpo")[0])
    for algo, changes in (
        ("opid", {"divergence": "reverse"}),
        ("opid", {"divergence": "jsd", "top_k": 3, "routing": "additive"}),
        ("opid-placebo", {"divergence": "forward", "top_k": 2, "top_k_of": "student", "top_k_rest": "drop"}),
        ("opd", {"divergence": "reverse", "top_k": 4, "top_k_rest": "hold"}),
    ):
        config, (record,) = run(algo, **changes)
        assert differ(trained(config), grpo)
        assert record["advantage/skill_abs"] > 0 and record["loss/distill"] != 0
        assert (record["loss/policy"] == 0) == (algo == "opd")  # no outcome
    config, (record,) = run("opid", divergence="reverse", routing="episode", episode_weight=1e-30, step_weight=0.0)
    ours = trained(config)
    assert all(torch.allclose(ours[name], grpo[name], atol=1e-6) for name in grpo)  # summed in another order


@pytest.mark.parametrize("how", [{"divergence": "reverse"}, {"centred": True}])
def test_a_level_that_guides_no_step_adds_nothing(how, run, monkeypatch):
    """With --routing step no step has an episode skill; and it may be that no answer parses at all."""
    _, (record,) = run("opid", routing="step", **how)
    assert record["guided/episode"] == 0 < record["guided/step"]
    assert record["advantage/skill_abs"] > 0
    monkeypatch.setattr(train_module, "model_writer", lambda *a, **k: lambda prompts: ["no JSON"] * len(prompts))
    config, (record,) = run("opid", routing="critical-first", **how)
    assert record["skills/parse_rate"] == record["guided/episode"] == record["guided/step"] == 0
    assert not differ(trained(config), trained(run("grpo")[0]))


EVERY = [(algo, {}) for algo in METHODS] + [("opid", {"divergence": "reverse"}), ("opid", {"centred": True})]
EVERY += [("opid", {"shift_base": "other"}), ("opid", {"kl": 0.1}), ("opd", {"divergence": "forward"})]


@pytest.mark.parametrize(("algo", "how"), EVERY)
def test_a_process_without_an_episode_goes_on(algo, how, run, monkeypatch):
    """Of several processes one may have tasks of which none fits: it tells what the others tell, for nothing."""

    def finish(self, iteration, trajectories, skills, routes, batch, metrics):
        finished(self, iteration, trajectories, skills, routes, batch, metrics)
        rng = random.Random(0)
        none, written = self.write_skills([], rng)
        ways = self.route([], none)
        empty, scored = self.rescore([], ways, iteration, self.others([], none, ways, rng))
        assert empty.mask.numel() == 0 and (written | scored).keys() < metrics.keys()
        assert not self._step([], empty)
        theirs, mine = metrics | written | scored | {"episodes": 0}, sizes_of(trajectories, skills, batch, metrics)
        other = Process()
        over_processes(theirs, sizes_of([], none, empty, theirs), other)
        told.append((over_processes(metrics, mine, Process()), over_processes(metrics, mine, Process(other))))

    finished, told = train_module.Run.finish, []
    monkeypatch.setattr(train_module.Run, "finish", finish)
    run(algo, **how)
    ((alone, both),) = told
    same = [name for name in alone if not name.startswith("seconds/")]
    assert [both[name] for name in same] == pytest.approx([alone[name] for name in same])


def test_the_exact_loss_is_minus_the_mean_of_the_shift(run):
    """Over many sampled tokens A_skill is on average -KL(pi_old || scorer), which the exact loss is at the first step;
    and what is left of A_skill without its expectation has mean 0."""
    many = {"tasks": 4, "rollouts": 8, "max_steps": 8, "mini_batch": 0, "train_games": 8, "routing": "episode"}
    _, (exact,) = run("opid", divergence="reverse", episode_weight=1.0, **many)
    _, (centred,) = run("opid", centred=True, **many)
    mean, size = exact["advantage/skill_mean"], exact["advantage/skill_abs"]
    assert exact["loss/distill"] == pytest.approx(-mean, abs=0.1 * size)
    assert exact["loss/distill"] > 0.1 * size
    assert abs(centred["advantage/skill_mean"]) < 0.1 * size


def test_the_shift_to_another_tasks_skill(run, monkeypatch):
    """Where all skills read alike nothing is left of the contrast; where they differ, something is, and what the plain
    context has to do with it cancels."""
    _, (alike,) = run("opid", shift_base="other")
    assert alike["advantage/skill_abs"] == pytest.approx(0, abs=1e-5) and alike["guided/step"] > 0
    texts = iter(["open bed", "look in safe", "never go", "first take"] * 2)
    answers = lambda prompts: [json.dumps({"episode_skill": next(texts)}) for _ in prompts]
    monkeypatch.setattr(train_module, "model_writer", lambda *a, **k: answers)
    _, (differing,) = run("opid", shift_base="other", tasks=4, rollouts=1)
    assert differing["advantage/skill_abs"] > 0.01


def test_whose_skills_guide(run, monkeypatch):
    def samples(algo):
        answer = {"episode_skill": "skill {}", "step_skills": {"1": "hint"}}
        numbered = lambda prompts: [json.dumps(answer).replace("{}", str(i)) for i in range(len(prompts))]
        monkeypatch.setattr(train_module, "model_writer", lambda *a, **k: numbered)
        config, _ = run(algo, sample_every=1)
        records = [json.loads(line) for line in Path(config.out, "samples.jsonl").read_text().splitlines()]
        hints.append([record["skills"]["steps"] for record in records])
        return [(record["group"], record["skills"]["episode"]) for record in records]

    hints: list[list[dict]] = []
    assert samples("opid") == [(0, "skill 0"), (0, "skill 1"), (1, "skill 2"), (1, "skill 3")]
    shuffled = samples("opid-shuffled")
    assert {text for group, text in shuffled if group == 0} <= {"skill 2", "skill 3"}
    assert {text for group, text in shuffled if group == 1} <= {"skill 0", "skill 1"}
    assert samples("opid-placebo") == [(group, "first one and then one") for group in (0, 0, 1, 1)]
    assert hints[0][0] == {"1": "hint"}
    assert hints[-1] == [dict.fromkeys(own, "now one") for own in hints[0]]  # at the same steps
    assert all(text.startswith("for ") for _, text in samples("opid-oracle"))


def test_a_teacher_of_another_vocabulary_is_refused(monkeypatch, tokenizer, llama):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["entirely-new"])
    monkeypatch.setattr(opd, "load_model", lambda *a, **k: (llama, other))
    with pytest.raises(ValueError, match="--teacher big has another tokenizer"):
        opd.load_teacher("big", tokenizer, env="alfworld", dtype="float32")


def test_a_teacher_whose_numbers_would_be_wrong_is_refused(monkeypatch, tokenizer, llama):
    sizes = {"vocab_size": len(tokenizer), "head_dim": 12, **SMALL}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=5.0))
    monkeypatch.setattr(opd, "load_model", lambda *a, **k: (capped, tokenizer))
    config = Config(algo="opd", teacher="big")
    opd.frozen_teacher(config, tokenizer, "cpu")  # the log-probs of sampled tokens are right
    with pytest.raises(ValueError, match="whole distributions of --teacher: its logits are not simply"):
        opd.frozen_teacher(replace(config, divergence="reverse"), tokenizer, "cpu")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    stretched = LlamaConfig(vocab_size=len(tokenizer), **SMALL, rope_parameters=rope, max_position_embeddings=64)
    monkeypatch.setattr(opd, "load_model", lambda *a, **k: (LlamaForCausalLM(stretched), tokenizer))
    with pytest.raises(ValueError, match="--teacher big: its dynamic position embedding"):
        opd.frozen_teacher(config, tokenizer, "cpu")


def test_the_teacher_is_one_of_the_runs_environment(monkeypatch, tokenizer, llama):
    asked = []
    monkeypatch.setattr(opd, "load_model", lambda name, **how: asked.append((name, how)) or (llama, tokenizer))
    opd.frozen_teacher(Config(algo="opd", env="search", teacher="cold:smollm2"), tokenizer, "cpu")
    assert asked == [("cold:smollm2", {"env": "search", "dtype": "float32"})]


# ---- skills by a script ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [True, False])
def test_scripted_skills_know_the_order_of_work(games, compact):
    for path in games[:3]:
        game = load_game(path)
        engine = FastEngine(game)
        engine.reset()
        plan = shortest_plan(engine)
        actions = [words(command) if compact else command for command in plan]
        steps = [Step((), "", [1], [2], "", action, True) for action in actions]
        won = scripted_skills(Trajectory("", 0, steps, True, game=path), max_step_skills=2)
        assert won.summary == "done"
        assert " first look in " in won.episode
        assert len(won.steps) <= 2
        lost = scripted_skills(Trajectory("", 0, [Step((), "", [1], [2], "", "", False)] * 3, False, game=path), 2)
        assert " never " in lost.episode


# ---- acting under a skill ----------------------------------------------------------------------------------------


def test_the_newest_success_of_a_type_is_remembered():
    def finished(task_type, success):
        return Trajectory("t", 0, [], success, task_type=task_type)

    trajectories = [finished("heat", True), finished("heat", False), finished("cool", False), finished("look", True)]
    written = [Skills("", "a", {}), Skills("", "b", {}), Skills("", "c", {}), None]
    new = lessons(trajectories, written)
    assert new == [(True, "heat", "a"), (False, "heat", "b"), (False, "cool", "c")]
    assert remember({"heat": "old", "look": "d"}, new) == {"heat": "a", "cool": "c", "look": "d"}


@pytest.mark.parametrize("style", ["chat", "window"])
def test_the_policy_acts_under_the_skill_of_its_games_type(style, llama, tokenizer, games):
    encoder, task_type = Encoder(tokenizer, style), load_game(games[0]).task_type

    def act(episode_skills, context_limit=1024):
        torch.manual_seed(0)
        make = lambda: AlfworldEnv(prompt="compact", max_steps=2)
        sizes = {"max_new_tokens": 4, "context_limit": context_limit}
        return play(llama, encoder, make, games[:1], 1, **sizes, episode_skills=episode_skills)

    (plain,), metrics = act(None)
    assert "rollout/skilled" not in metrics
    (skilled,), metrics = act({task_type: "open every closed place"})
    assert metrics["rollout/skilled"] == 1
    for t, step in enumerate(skilled.steps):
        shown = tokenizer.decode(step.context).count("skill open every closed place")
        assert shown == 1, (t, step)
    (other,), metrics = act({"another type": "open every closed place"})
    assert metrics["rollout/skilled"] == 0
    assert [step.context for step in other.steps] == [step.context for step in plain.steps]
    (short,), metrics = act({task_type: "open every closed place " * 50}, len(plain.steps[0].context) + 40)
    assert metrics["rollout/skilled"] == 0
    assert short.steps[0].context == plain.steps[0].context


def test_skill_grpo_acts_from_the_second_iteration_on_evaluates_both_ways_and_resumes(run):
    config, records = run("skill-grpo", iterations=3, train_games=2)
    assert [record["rollout/skilled"] for record in records] == [0, 4, 4]
    assert {"eval/valid_seen/success", "eval/seen+skill/success"} <= records[-1].keys()
    state = torch.load(Path(config.out, "checkpoints/000002.pt"), weights_only=True)
    assert set(state["method"]["episode_skills"].values()) == {"open every closed place"}
    Path(config.out, "checkpoints/000002.pt").unlink()
    train(replace(config, resume=True))
    again = torch.load(Path(config.out, "checkpoints/000002.pt"), weights_only=True)
    assert not differ(state["model"], again["model"])


@pytest.mark.parametrize(("algo", "changes"), [("opid-shuffled", {}), ("opid", {"shift_base": "other"})])
def test_skills_of_other_tasks_need_another_task(algo, changes, run):
    with pytest.raises(ValueError, match="2 --tasks of 1 games: fewer than two for each process"):
        run(algo, train_games=1, **changes)
