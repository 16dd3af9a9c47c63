"""Whole runs: GRPO as the zero of OPID, exact resume. Many processes: test_processes.py."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import config as config_module
import lm.scoring
import rescore
import router
import runlog.start as start_module
import train as train_module
from config import Config, parse_args, settings_come_from, settings_to_save, variant_of
from data import Batch, Step, Trajectory
from envs.alfworld import AlfworldEnv
from lm.loading import save_policy
from lm.obstacles import Mendable
from rollout import play
from runlog import checkpoints
from runlog.start import Run, learning_rate, start
from skills import own_skills
from tests.test_offload import Poisoned
from train import outcomes
from variants import gigpo

SMALL = "--tasks 2 --rollouts 2 --max-steps 4 --max-new-tokens 6 --train-games 6 --eval-games 2 "
SMALL += "--mini-batch 8 --learning-rate 1e-3"
ROOT = Path(__file__).parent.parent


def config(tmp_path, name, algo="opid", **changes) -> Config:
    flags = f"{SMALL} --eval-every 0 --save-every 1 --invalid-penalty 1 --iterations 3 --algo {algo}"
    return replace(parse_args([*flags.split(), "--out", str(tmp_path / name)]), **{"scorer": "old"} | changes)


def train(config: Config, run: Run | None = None) -> Run:
    run = run or start(config)
    train_module.train(run, variant_of(config.algo))
    return run


def weights(out) -> dict:
    newest = sorted(Path(out, "checkpoints").glob("*.pt"))[-1]
    return torch.load(newest, weights_only=True)["model"]


def lines(out, name="metrics.jsonl"):
    """The records of a run, without what a clock says (and without evaluations, which a run's last iteration has)."""
    records = [json.loads(line) for line in Path(out, name).read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if not k.startswith(("seconds/", "eval/", "memory/"))} for record in records
    ]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_that_nobody_reads_is_not_kept(random_tiny, tmp_path):
    assert "reference" not in start(config(tmp_path, "grpo", "grpo", kl=0.0)).models
    assert "reference" not in start(config(tmp_path, "opid", kl=0.0)).models  # --scorer old, the policy
    assert "reference" in start(config(tmp_path, "pulled", algo="grpo")).models


def test_zero_weights_are_grpo_bit_for_bit(random_tiny, tmp_path):
    grpo, zero, opid = (
        config(tmp_path, "grpo", "grpo"),
        config(tmp_path, "zero", episode_weight=0.0, step_weight=0.0),
        config(tmp_path, "opid", episode_weight=0.5, step_weight=0.5),
    )
    for c in (grpo, zero, opid):
        train(c)
    assert same(weights(grpo.out), weights(zero.out))
    assert lines(grpo.out) == lines(zero.out)
    assert lines(grpo.out)[0]["advantage/outcome_abs"] > 0.1
    assert not same(weights(grpo.out), weights(opid.out))


def test_without_a_weight_for_steps_a_critical_step_is_guided_by_the_episode_skill(random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=1, step_weight=0.0))
    record = lines(c.out)[0]
    assert record["guided/episode"] == 1
    assert "guided/step" not in record


def test_a_rule_sees_the_outcome_and_the_log_probs_of_each_step(random_tiny, tmp_path, monkeypatch):
    seen = []

    def watch(trajectory, t, episode, step):
        seen.append((trajectory.success, trajectory.steps[t].logprobs))
        return step or episode

    monkeypatch.setitem(router.RULES, "critical-first", watch)
    train(c := config(tmp_path, "run", iterations=1, sample_every=1))
    samples = lines(c.out, "samples.jsonl")
    shown = [(sample["success"], step["old_logprobs"]) for sample in samples for step in sample["steps"]]
    assert len(seen) == len(shown) == 16
    for (won, logprobs), (success, expected) in zip(seen, shown, strict=True):
        assert won == success
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_a_run_leaves_what_it_promises(random_tiny, tmp_path, llama):
    c = config(tmp_path, "run", iterations=2, sample_every=1, keep_checkpoints=1, eval_every=1)
    train(c)
    record = lines(c.out)[-1]
    names = "iteration episodes train/success skills/parse_rate "
    names += "guided/episode guided/step advantage/outcome_abs advantage/skill_abs loss/policy loss/kl clip_fraction"
    assert set(names.split()) <= record.keys()
    assert record["guided/episode"] == pytest.approx(0.75)
    assert record["guided/step"] == pytest.approx(0.25)
    assert record["advantage/skill_abs"] > 0
    assert "advantage/noise_floor" not in record  # once a run, in its first iteration
    first = json.loads(Path(c.out, "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["advantage/noise_floor"] < 1e-4 < first["advantage/skill_abs"]
    assert first["memory/peak_mib"] > 50  # a process that has loaded PyTorch
    with_clock = json.loads(Path(c.out, "metrics.jsonl").read_text().splitlines()[-1])
    assert with_clock["eval/valid_seen/success"] == with_clock["eval/valid_unseen/success"] == 0
    assert {"seconds/rollout", "seconds/skills", "seconds/rescore", "seconds/update"} <= with_clock.keys()
    sample = lines(c.out, "samples.jsonl")[0]
    assert sample["skills"]["episode"] == "open every closed place"
    step = sample["steps"][1]
    assert step["route"] == [{"level": "step", "text": "look in bed"}]
    assert len(step["tokens"]) == len(step["advantages"]) == len(step["skill_advantages"]) == len(step["old_logprobs"])
    assert any(step["skill_advantages"])
    policy = AutoModelForCausalLM.from_pretrained(Path(c.out, "policy"))
    assert AutoTokenizer.from_pretrained(Path(c.out, "policy")).chat_template
    assert same(dict(policy.named_parameters()), weights(c.out))
    assert not same(dict(llama.named_parameters()), weights(c.out))  # it trained
    assert Path(c.out, "curve.png").stat().st_size > 1000
    assert [p.name for p in Path(c.out, "checkpoints").iterdir()] == ["000001.pt"]


@pytest.mark.parametrize(
    "changes", [{"scorer": "reference"}, {"context": "window"}, {"routing": "additive", "epochs": 2}, {"kl": 0.0}]
)
def test_every_setting_trains(changes, random_tiny, tmp_path, llama):
    c = config(tmp_path, "setting", iterations=1, **changes)
    train(c)
    assert not same(dict(llama.named_parameters()), weights(c.out))
    assert all(v == v for v in lines(c.out)[0].values())  # no NaN


@pytest.mark.parametrize("changes", [{"scorer": "old"}, {"scorer": "reference"}, {"scorer": "reference", "kl": 0.0}])
@pytest.mark.parametrize("routing", ["critical-first", "additive"])
def test_branches_give_the_advantages_of_the_plain_scheme(changes, routing, random_tiny, tmp_path, monkeypatch):
    """Whichever weights score the skills, and whichever pass their branches ride on."""
    passes = []
    original = rescore.tree_logprobs
    monkeypatch.setattr(rescore, "tree_logprobs", lambda *a, **k: (passes.append(any(a[3])), original(*a, **k))[1])
    # a learning rate at which the frozen copies and the policy differ in the second iteration
    settings = {"iterations": 2, "routing": routing, "learning_rate": 0.01, **changes}
    train(tree := config(tmp_path, "tree", **settings))
    assert passes == {"old": [True, False], "reference": [False, True]}[changes["scorer"]] * 2
    monkeypatch.setattr(lm.scoring, "tree_obstacle", lambda model: "told so")
    train(plain := config(tmp_path, "plain", **settings))
    for ours, theirs in zip(lines(tree.out), lines(plain.out), strict=True):
        for name in ("advantage/skill_abs", "advantage/skill_mean", "guided/step", "loss/policy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-3)
        assert abs(ours["advantage/skill_mean"]) > 1e-3


@pytest.mark.parametrize("changes", [{"scorer": "old"}, {"scorer": "reference"}, {"scorer": "reference", "kl": 0.0}])
def test_a_skill_that_changes_nothing_shifts_nothing(changes, random_tiny, tmp_path, monkeypatch):
    """With the plain contexts in the place of the augmented ones; OPID's own A_skill has the distance to the scorer in
    it, that of opid-shift has not."""

    def plain_contexts(encoder, trajectories, routes, level, context_limit):
        return [step.context for trajectory in trajectories for step in trajectory.steps], 0

    monkeypatch.setattr(rescore, "skill_contexts", plain_contexts)
    means = {}
    for algo in ("opid-shift", "opid"):
        train(c := config(tmp_path, algo, algo, iterations=2, learning_rate=0.01, **changes))
        means[algo] = [line["advantage/skill_abs"] for line in lines(c.out)]
    assert means["opid-shift"] == pytest.approx([0, 0], abs=1e-4)
    assert means["opid"][0] == pytest.approx(0, abs=1e-4)
    assert (means["opid"][1] > 1e-3) is (changes["scorer"] != "old")


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_the_writer_is_the_model_that_was_asked_for(name, random_tiny, tmp_path, monkeypatch):
    authors = []

    def writer(model, tokenizer, **answering):
        def write(prompts):
            authors.append(next(model.parameters()).detach().clone())
            return ['{"episode_skill": "open every closed place"}'] * len(prompts)

        return write

    monkeypatch.setattr(start_module, "model_writer", writer)
    run = start(config(tmp_path, name, skill_writer=name))
    before = next(run.models["reference"].parameters()).clone()
    with torch.no_grad():
        next(run.policy.parameters()).add_(1.0)  # the policy has moved away
    run.begin(0)
    own_skills(run, play(run, run.games[:2])[0])
    assert torch.equal(authors[0], before + {"policy": 1.0, "reference": 0.0}[name])


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_whoever_writes_and_scores_does_so_in_mixed_precision(
    llama, tokenizer, tmp_path, monkeypatch, own_precision, name
):
    """With the real writer, whose frozen model is kept in less."""
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: (copy.deepcopy(llama), tokenizer))
    scorer = "old" if name == "policy" else name
    changes = {"mixed_precision": "bf16", "skill_writer": name, "scorer": scorer, "kl": 0.1, "iterations": 1}
    train(config(tmp_path, name, **changes, skill_tokens=2))
    (record,) = lines(tmp_path / name)
    assert record["skills/first_parse_rate"] == 0  # two tokens hold no skill, whatever a random model says


def test_the_kl_term_pulls_towards_the_reference_by_its_weight(random_tiny, tmp_path, monkeypatch):
    """No outcome and no penalty, hence A = 0, and a policy that has moved away: only the KL term is left. Six gradient
    steps on the same tokens."""
    kls, norms = [], []
    for weight in (0.5, 1.0):
        changes = {"invalid_penalty": 0.0, "kl": weight, "mini_batch": 0, "epochs": 6, "learning_rate": 1e-5}
        run = start(config(tmp_path, str(weight), "grpo", iterations=1, **changes))
        sum_terms, clip_gradients = run.processes.sum_terms, run.processes.clip_gradients  # called once a gradient step
        run.processes.sum_terms = lambda sums, of=sum_terms: kls.append(sums["loss/kl"].item()) or of(sums)
        run.processes.clip_gradients = lambda *args, of=clip_gradients: norms.append(of(*args)) or norms[-1]
        with torch.no_grad():
            run.policy.lm_head.weight.mul_(1.5)
        train(run.config, run)
    assert len(kls) == len(norms) == 12
    assert norms[0] > 0.01 and norms[6].item() == pytest.approx(2 * norms[0].item(), rel=1e-4)
    assert kls[6:] == sorted(kls[6:], reverse=True) and kls[-1] < kls[6]


def test_each_iteration_draws_other_tasks_and_samples_by_other_numbers(random_tiny, tmp_path):
    run, drawn = start(config(tmp_path, "run")), []
    for iteration in (0, 1, 0):
        run.begin(iteration)
        drawn.append((run.rng.random(), torch.rand(()).item()))
    assert drawn[0] == drawn[2]
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


def test_the_learning_rate_warms_up_and_halves():
    rates = [learning_rate(Config(learning_rate=8.0, warmup=2, lr_halving=4), t) for t in (0, 1, 4, 8)]
    assert rates == pytest.approx([4.0, 8 / 2**0.25, 4.0, 2.0])
    assert learning_rate(Config(learning_rate=8.0, warmup=0, lr_halving=0), 9) == 8.0


def test_each_epoch_takes_every_sequence_once_in_another_order(random_tiny, tmp_path, monkeypatch):
    taken, original = [], train_module.micro_batches  # which a gradient step asks for once
    monkeypatch.setattr(
        train_module, "micro_batches", lambda part, budget: taken.append(part) or original(part, budget)
    )
    train(config(tmp_path, "run", tasks=3, epochs=2, iterations=1, mini_batch=12))
    first, second = taken[0] + taken[1], taken[2] + taken[3]
    assert len(taken) == 4 and len(first) == 6
    assert {id(sequence) for sequence in first} == {id(sequence) for sequence in second}
    assert [id(sequence) for sequence in first] != [id(sequence) for sequence in second]


def test_what_has_no_advantage_is_left_out_of_an_update_without_kl(random_tiny, tmp_path, monkeypatch):
    """A silent group of two episodes, and one of which every token counts. The weights are as if all were read, the
    gradient steps as many, a mini-batch of nothing but silence among them."""
    read, original = {}, train_module.micro_batches
    by_group = lambda config, trajectories: torch.tensor([float(t.group) for t in trajectories for _ in t.steps])
    monkeypatch.setattr(train_module, "outcomes", by_group)  # A_ep is 0 in group 0, 1 in group 1
    for name, kl in (("moved", 0.0), ("kl", 0.01), ("all", 0.0)):
        counts = read.setdefault(name, [])
        count = lambda part, budget, counts=counts: counts.append(len(part)) or original(part, budget)
        monkeypatch.setattr(train_module, "micro_batches", count)
        if name == "all":
            monkeypatch.setattr(train_module, "moved", lambda sequences, advantages: sequences)
        train(config(tmp_path, name, "grpo", kl=kl, mini_batch=8, iterations=4))
    assert read["kl"] == read["all"] and len(read["moved"]) == len(read["all"])
    assert set(read["all"]) == {2} and set(read["moved"]) == {1, 2}  # 2: the other mini-batch was all silent
    mine, plain = weights(tmp_path / "moved"), weights(tmp_path / "all")
    assert all(torch.allclose(mine[name], plain[name], atol=1e-6) for name in plain)
    for ours, theirs in zip(lines(tmp_path / "moved"), lines(tmp_path / "all"), strict=True):
        assert ours.pop("tokens/trained") <= theirs.pop("tokens/trained")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)


def test_a_gradient_is_clipped_to_its_norm_and_weights_decay_as_told(random_tiny, tmp_path):
    """One step of plain gradient descent at rate 1: the weights move by the clipped norm."""
    run = start(
        config(tmp_path, "run", iterations=1, mini_batch=0, max_grad_norm=0.01, weight_decay=0.25, lr_halving=0)
    )
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.25
    run.config.learning_rate, run.optimizer = 1.0, torch.optim.SGD(run.trained, lr=1.0)
    initial = [p.detach().clone() for p in run.trained]
    train(run.config, run)
    moved = torch.cat([(p - before).flatten() for p, before in zip(run.trained, initial, strict=True)])
    assert lines(run.config.out)[0]["grad_norm"] > 0.1
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("scorer", ["old", "reference"])
def test_resume_goes_on_exactly(scorer, random_tiny, tmp_path):
    whole, halves = (config(tmp_path, name, iterations=4, scorer=scorer) for name in ("whole", "halves"))
    train(whole)
    halves.iterations = 2
    train(halves)
    with open(Path(halves.out, "metrics.jsonl"), "a") as file:
        file.write('{"iteration": 2, "half-writ')  # what a kill may leave
    halves.iterations, halves.resume = 4, True
    train(halves)
    assert lines(whole.out) == lines(halves.out)
    assert same(weights(whole.out), weights(halves.out))
    states = [torch.load(Path(c.out, "checkpoints/000003.pt"))["variant"] for c in (whole, halves)]
    assert states[0] == states[1] and len(states[0]["signs"]["readable"]["recent"]) == 4  # of every iteration


def test_nothing_is_read_while_it_rests_in_host_memory(random_tiny, tmp_path, monkeypatch):
    """What rests is made no number until it is needed again: the run is the same."""
    train(config(tmp_path, "plain", kl=0.1, scorer="reference"))

    monkeypatch.setattr(start_module, "Offload", Poisoned)
    run = train(config(tmp_path, "rested", kl=0.1, scorer="reference"))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "rested"))
    assert run.offload.aside


def test_every_logged_metric_is_explained(random_tiny, tmp_path):
    logged = set()
    for algo in ("gigpo", "sdar", "skill-grpo"):
        train(c := config(tmp_path, algo, algo, iterations=1))
        logged |= lines(c.out)[0].keys()
    explained = (ROOT / "docs" / "metrics.md").read_text()
    for name in logged - {"iteration", "episodes"}:
        name = re.sub("^eval/.*/", "eval/<split>/", re.sub("^seconds/.*", "seconds/<phase>", name))
        assert f"`{name}`" in explained or ("`guided/*_too_long`" in explained and name.endswith("_too_long")), name


def test_a_folder_with_another_run_is_refused(random_tiny, tmp_path):
    c = config(tmp_path, "run", iterations=1)
    train(c)
    with pytest.raises(ValueError, match="already holds a run"):
        train(c)
    with pytest.raises(ValueError, match="--tasks"):
        train(config(tmp_path, "run", iterations=1, tasks=3, resume=True))


def test_checkpoints_of_an_unknown_run_are_gone_on_from_only_if_asked(random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=1))
    for name in ("config.json", "metrics.jsonl"):
        Path(c.out, name).unlink()
    assert start(replace(c, resume=True)).log.first_iteration == 1
    Path(c.out, "config.json").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        start(c)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints"])
def test_a_run_whose_settings_are_lost_is_not_overwritten(left, random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=1))
    for name in ("config.json", "metrics.jsonl", "checkpoints"):
        path = Path(c.out, name)
        if name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = {path: path.read_bytes() for path in Path(c.out).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        start(c)
    assert all(path.read_bytes() == before for path, before in kept.items())


def test_a_tracker_gets_plain_values(random_tiny, tmp_path, monkeypatch):
    """tensorboard refuses a dict and None."""
    told = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config, init_kwargs: told.append(config))
    start(config(tmp_path, "run", iterations=1))
    assert told[0]["env_options"] == "{}" and all(isinstance(v, int | float | str) for v in told[0].values())


def test_a_run_from_before_a_flag_had_its_default(random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=1))
    written = Path(c.out, "config.json")
    settings = json.loads(written.read_text())
    del settings["group_over"]
    written.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="other settings of --group-over"):
        train(config(tmp_path, "run", iterations=2, resume=True, group_over="trajectories"))
    train(config(tmp_path, "run", iterations=2, resume=True))
    assert len(lines(c.out)) == 2


def test_a_nan_loss_stops_with_advice(random_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "k3", lambda new, reference, bound: new * float("nan"))
    with pytest.raises(FloatingPointError, match="try a lower --learning-rate"):
        train(config(tmp_path, "nan"))


def test_unparsable_skills_are_counted_and_shift_nothing(random_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: lambda prompts: ["no idea"] * len(prompts))
    c, grpo = config(tmp_path, "run"), config(tmp_path, "grpo", "grpo")
    train(c)
    train(grpo)
    assert lines(c.out)[0]["skills/parse_rate"] == 0
    assert lines(c.out)[0]["skills/failed"] == 4
    assert lines(c.out)[0]["advantage/skill_abs"] == 0
    assert same(weights(c.out), weights(grpo.out))


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(random_tiny, tmp_path, capsys):
    train(whole := config(tmp_path, "whole", iterations=4))
    train(c := config(tmp_path, "run"))
    newest = tmp_path / "run/checkpoints/000002.pt"
    newest.write_bytes(newest.read_bytes()[:-300])
    train(replace(c, iterations=4, resume=True))
    told = f"{newest} is damaged or cut off, and renamed: going on from {newest.with_name('000001.pt')}"
    assert told in capsys.readouterr().out
    assert Path(f"{newest}.damaged").is_file()
    assert lines(c.out) == lines(whole.out)
    assert same(weights(c.out), weights(whole.out))
    for path in (tmp_path / "run/checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        train(replace(c, iterations=5, resume=True))


def test_no_whole_checkpoint_goes_for_a_damaged_newer_one(random_tiny, tmp_path):
    """With one checkpoint to keep: the damaged one would be the newest, and the only one that is kept."""
    train(c := config(tmp_path, "run", iterations=2, save_every=1, keep_checkpoints=3))
    newest = tmp_path / "run/checkpoints/000009.pt"
    newest.write_bytes(b"cut off")
    train(replace(c, iterations=3, keep_checkpoints=1, resume=True))
    assert [path.name for path in checkpoints.saved(tmp_path / "run")] == ["000002.pt"]


def test_whole_rewards_are_no_whole_advantages():
    """Settings made in Python may be ints: 1 and 0 have a mean between them."""
    ints = gigpo.Settings(algo="gigpo", success_reward=1, invalid_penalty=0)
    steps = [Step((), "", [1], [2], "", "", True)]
    trajectories = [Trajectory("", 0, steps, won) for won in (True, False)]
    batch = Batch(trajectories, [None] * 2, [[()]] * 2, {}, torch.zeros(2, 1), None, {})
    both = outcomes(ints, trajectories), gigpo.advantages(SimpleNamespace(config=ints, metrics={}), batch).outcome
    for outcome, size in zip(both, (0.70711, 1.41421), strict=True):  # a step in its state group is worth as much
        assert outcome.dtype == torch.float32
        assert torch.allclose(outcome, torch.tensor([size, -size]), atol=1e-4)


def test_a_gradient_that_is_no_number_is_a_step_not_taken(random_tiny, tmp_path, monkeypatch):
    """One token of the second mini-batch has a gradient of infinity at a finite loss."""
    original, calls = train_module.policy_loss, []

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def spoil(new, *more):
        calls.append(1)
        losses, clipped = original(new, *more)
        return (Spoilt.apply(losses) if len(calls) == 2 else losses), clipped

    monkeypatch.setattr(train_module, "policy_loss", spoil)
    train(c := config(tmp_path, "run", mini_batch=4, iterations=1))
    record = lines(c.out)[0]
    assert record["update/skipped"] == 1 < len(calls)
    assert math.isfinite(record["grad_norm"])
    assert all(p.isfinite().all() for p in weights(c.out).values())


def test_weights_that_are_not_finite_are_not_saved(random_tiny, tmp_path):
    run = start(c := config(tmp_path, "run"))
    with torch.no_grad():
        next(run.policy.parameters())[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"embed_tokens.weight is not finite after iteration 0"):
        run.log.save(0, run.policy, run.optimizer, {})
    assert not list(Path(c.out, "checkpoints").iterdir())


def test_resume_sees_that_the_starting_weights_changed(random_tiny, tmp_path, monkeypatch, llama, tokenizer):
    train(c := config(tmp_path, "run", iterations=1))
    changed = copy.deepcopy(llama)
    with torch.no_grad():
        changed.lm_head.weight[:2] = changed.lm_head.weight[[1, 0]]  # two rows exchanged
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: (copy.deepcopy(changed), tokenizer))
    with pytest.raises(ValueError, match=r"are not those that .* started from"):
        train(replace(c, iterations=2, resume=True))


def test_what_messages_recommend_is_possible_on_resume(random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=1))
    more = {"context_limit": 2048, "token_budget": 512, "gradient_checkpointing": True, "learning_rate": 1e-5}
    train(replace(c, iterations=2, resume=True, **more))
    assert len(lines(c.out)) == 2


def test_a_task_that_does_not_fit_is_left_out_and_counted(random_tiny, tmp_path, monkeypatch):
    original = AlfworldEnv.build_prompt

    def build(self, style, task, history, observation, admissible):
        prompt = original(self, style, task, history, observation, admissible)
        return (*prompt, " look" * 400) if self.engine.game.path == first else prompt

    first = start(c := config(tmp_path, "games", iterations=1)).games[0]
    monkeypatch.setattr(AlfworldEnv, "build_prompt", build)
    train(c := replace(c, out=str(tmp_path / "run"), context_limit=256, tasks=6))
    record = lines(c.out)[0]
    assert (record["rollout/too_long"], record["episodes"]) == (2, 10)
    monkeypatch.setattr(AlfworldEnv, "build_prompt", lambda *a: (*original(*a), " look" * 400))
    with pytest.raises(ValueError, match="not one first prompt fits: raise"):
        train(replace(c, out=str(tmp_path / "none")))


def test_a_game_that_fails_leaves_its_group_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    original = AlfworldEnv.step

    def step(self, action):
        if self.engine.game.path == bad:
            raise IndexError("out of the room")
        return original(self, action)

    bad = start(c := config(tmp_path, "games", iterations=1)).games[1]
    monkeypatch.setattr(AlfworldEnv, "step", step)
    train(c := replace(c, out=str(tmp_path / "run"), tasks=6, eval_every=0))
    record = lines(c.out)[0]
    assert (record["rollout/failed"], record["episodes"]) == (2, 10)
    assert f"game {bad} (step 1: IndexError: out of the room)" in caplog.text


def test_a_run_does_not_start_with_an_environment_that_breaks_the_protocol(tmp_path, monkeypatch):
    original = AlfworldEnv.step
    monkeypatch.setattr(AlfworldEnv, "step", lambda self, action: (*original(self, action)[:4], {}))
    with pytest.raises(ValueError, match="no 'won', which alone counts as success"):
        start(config(tmp_path, "run", iterations=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "--dtype bfloat16 rounds most updates"),
        ({"tracker": "wandb"}, "--tracker wandb needs its package"),
        ({"offload": True}, "here there is no GPU"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        start(config(tmp_path, "run", **changes))
    assert not (tmp_path / "run").exists()


def test_metrics_are_json(random_tiny, tmp_path):
    run = start(config(tmp_path, "run"))
    run.log._append("metrics.jsonl", {"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": -float("inf")}})
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_empty_mini_batches_do_not_count_as_zero(random_tiny, tmp_path):
    """More mini-batches than sequences: the means are over those that had tokens."""
    train(few := config(tmp_path, "few", iterations=1, mini_batch=4, learning_rate=1e-12))
    train(many := config(tmp_path, "many", iterations=1, mini_batch=1, learning_rate=1e-12))
    few, many = lines(few.out)[0], lines(many.out)[0]
    assert many["loss/policy"] == pytest.approx(few["loss/policy"], rel=0.3)
    assert many["grad_norm"] > few["grad_norm"] / 2


def test_a_checkpoint_of_an_older_version_is_refused_by_name(random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=1))
    path = Path(c.out, "checkpoints/000000.pt")
    state = torch.load(path, weights_only=True)
    del state["variant"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"000000.pt is of an older version"):
        train(replace(c, iterations=2, resume=True))


def test_held_out_data_that_are_missing_are_missed_before_training(random_tiny, tmp_path):
    folder = tmp_path / "official" / "json_2.1.1" / "train" / "look_at_obj_in_light-Mug-None-DeskLamp-1" / "trial_1"
    folder.mkdir(parents=True)
    (folder / "game.tw-pddl").write_text(json.dumps({"solvable": True}))
    with pytest.raises(FileNotFoundError, match=r"no game\.tw-pddl under .*valid_seen"):
        start(config(tmp_path, "run", model="smollm2", env_options={"data": str(folder.parents[3])}))


# ---- what a newcomer tries first -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "cut"), [("look", False), ("look " * 5, True)])
def test_a_run_that_learns_nothing_says_what_failed(tokens, cut, random_tiny, tmp_path, monkeypatch, capsys, tokenizer):
    """A model of one's own that knows neither the format nor the game."""
    said = tokenizer(tokens)["input_ids"] + ([] if cut else [tokenizer.eos_token_id])

    def scripted(sampler, keys, contexts):
        sampler.recorded = sampler.recorded or {key: [] for key in keys}
        for key in keys:
            sampler.recorded[key].append([math.nan] * len(said))
        return [list(said) for _ in keys]

    monkeypatch.setattr(start_module.Sampler, "__call__", scripted)
    monkeypatch.setattr(start_module, "check_gap", lambda *gaps: None)
    monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: lambda prompts: ["no idea"] * len(prompts))
    monkeypatch.setattr(AlfworldEnv, "parse_action", lambda self, text, admissible: (text, False))
    train(config(tmp_path, "run", max_new_tokens=5, iterations=2, kl=0.1))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING (since iteration 0)")]
    first, last = warnings[: len(warnings) // 2], warnings[len(warnings) // 2 :]  # after the first iteration, the last
    assert first == last
    assert any("100% of the responses are cut off at --max-new-tokens 5" in line for line in first) == cut
    assert any("no action was valid: does --prompt compact fit --model tiny?" in line for line in first)
    assert any("GRPO at OPID's cost: no answer could be read as skills" in line for line in first)
    with pytest.raises(Mendable, match=r"--strict, and nothing is learnt: .*actions, skills"):
        train(config(tmp_path, "strict", max_new_tokens=5, iterations=2, kl=0.1, strict=True))


def test_a_run_that_learns_something_hears_of_its_cut_answers_alone(random_tiny, tmp_path, capsys):
    train(config(tmp_path, "run", iterations=1))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "are cut off at --max-new-tokens 6" in warnings[0]  # a random model seldom ends


def test_a_saved_policy_goes_on_by_the_laptops_settings_and_its_own(random_tiny, tmp_path):
    train(config(tmp_path, "run", iterations=1, max_steps=3, skill_tokens=50, learning_rate=0.01))
    policy = str(tmp_path / "run/policy")
    about = json.loads(Path(policy, "opid.json").read_text())
    assert (about["base"], about["algo"], about["acts"]["max_steps"]) == ("tiny", "opid", 3)
    laptop, again = Config.from_recipe("laptop").to_dict(), parse_args(["--model", policy])
    own = {"model": policy, "max_steps": 3, "max_new_tokens": 6, "skill_tokens": 50}
    assert again.to_dict() == laptop | own
    assert settings_come_from(["--model", policy]).startswith("settings: recipes/laptop.toml, what")
    assert parse_args(["--model", policy, "--max-steps", "7"]).max_steps == 7  # flags above all
    assert settings_to_save(again, "2026-01-01")["base"] == "tiny"  # of what comes of it, too


def test_a_model_of_ones_own_is_trained_as_the_paper_does(llama, tokenizer, tmp_path):
    save_policy(llama, tokenizer, tmp_path / "own")
    own = parse_args(argv := ["--model", str(tmp_path / "own"), "--env", "alfworld"])
    released = {
        **{"episode_weight": 0.001, "step_weight": 0.001, "learning_rate": 1e-6, "lr_halving": 0, "scorer": "old"},
        **{"skill_writer": "policy", "context": "window", "history": 5, "prompt": "official", "max_new_tokens": 512},
        **{"tasks": 16, "rollouts": 8, "mini_batch": 256, "invalid_penalty": 0.1, "dual_clip": 3.0, "kl": 0.01},
    }
    assert {name: getattr(own, name) for name in released} == released
    recipe = Config.from_recipe("alfworld-qwen2.5-3b").to_dict()
    ours = {"model": own.model, "env_options": {}, "mixed_precision": own.mixed_precision}
    ours |= {"fit": True, "gradient_checkpointing": False}  # where memory asks for it
    assert own.to_dict() == recipe | ours
    assert (
        settings_come_from(argv)
        == "settings: the paper's (recipes/alfworld-qwen2.5-3b.toml) on generated data, and flags"
    )
    assert settings_come_from([]).startswith("no --model: the laptop recipe, recipes/laptop.toml")


def test_answers_too_short_for_their_prompt_are_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: pytest.fail("loaded"))
    flags = "--env alfworld --max-new-tokens 12 --prompt official"
    monkeypatch.setattr("sys.argv", ["train.py", "--model", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        train_module.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage")]
    assert line.startswith("train.py: error: --prompt official asks for <think>...</think><action>...</action>")
    assert "which 12 --max-new-tokens cannot hold: at least 24" in line
