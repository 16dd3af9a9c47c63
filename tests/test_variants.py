"""Each variant in a whole iteration of a tiny run: what it guides by, learns from, acts under, and what it refuses."""

import copy
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import runlog.start as start_module
import train as train_module
from config import VARIANTS, Config, parse_args, variant_of
from data import Advantages, Batch, Skills, Step, Trajectory
from envs.alfworld import AlfworldEnv, words
from envs.alfworld.engine import FastEngine, load_game
from envs.alfworld.expert import shortest_plan
from lm.encoder import Encoder
from lm.scoring import pack
from rescore import rescore
from runlog.metrics import advantage_metrics, over_processes, read_lines, sizes_of
from runlog.start import TOKENS, Run, start
from tests.conftest import SMALL
from tests.playing import play
from tests.settings import laptop
from tests.test_metrics import Process
from tests.test_offload import Poisoned
from tiny.warmstart import tiny_model
from train import Variant, update
from variants import opd, sdpo
from variants.opid_oracle import scripted_skills
from variants.skill_grpo import UnderSkill, lessons, remember

FLAGS = "--tasks 2 --rollouts 2 --max-steps 3 --max-new-tokens 4 --train-games 4 --eval-games 1 --iterations 1 "
FLAGS += "--mini-batch 8 --learning-rate 1e-3 --eval-every 0 --save-every 1 --invalid-penalty 1"
FROZEN = ("oprd", "opid-full", "sdpo")  # whose scorer is not the policy
NAMES = sorted(path.stem.replace("_", "-") for path in VARIANTS.glob("[a-z]*.py"))
ALGOS = [name.replace("grpo-opsd", "grpo+opsd") for name in NAMES]
SKILL = '{"episode_summary": "s", "episode_skill": "open every closed place", "step_skills": {"1": "look in bed"}}'


def train(config: Config) -> Run:
    run = start(config)
    train_module.train(run, variant_of(config.algo))
    return run


@pytest.fixture
def small(monkeypatch, llama, tokenizer):
    """A random tiny model. Its skills are scripted, since a random model writes none; a part of its responses are taken
    for valid."""
    monkeypatch.setattr(AlfworldEnv, "parse_action", lambda self, text, admissible: (text, len(text) % 2 == 0))
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: (copy.deepcopy(llama), tokenizer))
    monkeypatch.setattr(opd, "load_model", lambda *a, **k: (tiny_model(len(tokenizer), seed=5, width=48), tokenizer))
    monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: lambda prompts: [SKILL] * len(prompts))
    monkeypatch.setattr(sdpo, "peer_of", lambda trajectories, at: trajectories[at ^ 1])  # it solves nothing


@pytest.fixture
def made(small, tmp_path):
    """-> a function that makes the settings of a variant, some of them changed."""

    def settings(algo, **changes) -> Config:
        scorer = "reference" if algo in FROZEN else "old"
        more = ["--teacher", "larger"] if algo == "opd" else []
        out = str(tmp_path / (algo + str(changes)))
        return replace(parse_args([*FLAGS.split(), "--algo", algo, "--scorer", scorer, *more, "--out", out]), **changes)

    return settings


@pytest.fixture
def run(made):
    """-> a function that trains a random tiny model and returns (config, metrics of each iteration)."""

    def trained(algo, **changes) -> tuple[Config, list[dict]]:
        train(config := made(algo, **changes))
        return config, read_lines(Path(config.out, "metrics.jsonl"))

    return trained


def trained(config: Config) -> dict:
    newest = sorted(Path(config.out, "checkpoints").glob("*.pt"))[-1]
    return torch.load(newest, weights_only=True)["model"]


def differ(a: dict, b: dict) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


# ---- the command line ------------------------------------------------------------------------------------------------


def own_flags(algo: str) -> set[str]:
    return {f.name for f in fields(variant_of(algo).settings)} - {f.name for f in fields(Config)}


@pytest.mark.parametrize("algo", ALGOS)
def test_help_shows_the_flags_of_one_algo_and_nobody_elses(algo, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--algo", algo, "--help"])
    shown = set(re.findall(r"^  --(?:\[no-\])?([\w-]+)", capsys.readouterr().out, re.M))
    expected = {f.name.replace("_", "-") for f in fields(variant_of(algo).settings)}
    assert shown - {"recipe"} == expected


def test_some_have_flags_of_their_own():
    having = {algo for algo in ALGOS if own_flags(algo)}
    assert having == {"gigpo", "rlsd", "sdar", "grpo+opsd", "opsd", "skill-sd", "opd", "oprd", "opid-full", "sdpo"}
    assert not own_flags("opid") and own_flags("gigpo") == {"state_weight", "gamma"}


@pytest.mark.parametrize("algo", ALGOS)
def test_a_flag_of_another_is_refused(algo, capsys):
    others = {name: 1 for other in ALGOS for name in own_flags(other)}.keys() - own_flags(algo)
    assert others
    for name in others:
        with pytest.raises(SystemExit, match="2"):
            parse_args(["--algo", algo, "--" + name.replace("_", "-"), "1"])
        assert f"unrecognized arguments: --{name.replace('_', '-')} 1" in capsys.readouterr().err


def test_a_recipe_with_another_algos_setting_is_refused(tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "laptop"\ngamma = 0.5\n')
    assert parse_args(["--recipe", str(recipe), "--algo", "gigpo"]).gamma == 0.5
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--recipe", str(recipe), "--algo", "opid"])
    assert "--algo opid has no --gamma" in capsys.readouterr().err


def test_an_unknown_algo_is_refused(capsys):
    for name in ("ppo", "__init__", "../train", "OPID", ""):
        with pytest.raises(ValueError, match=re.escape("--algo must be one of gigpo, grpo, grpo-opsd, opd, opid,")):
            variant_of(name)
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--algo", "ppo"])
    assert "--algo must be one of" in capsys.readouterr().err.splitlines()[-1]


# ---- an iteration ----------------------------------------------------------------------------------------------------


def test_the_four_functions_are_called_in_order(made, monkeypatch):
    """Of a variant that replaces none of them but looks at each."""
    opid, seen = variant_of("opid"), []

    def watched(name):
        def hook(run, *more):
            seen.append((name, run.iteration))
            return getattr(opid, name)(run, *more)

        return hook

    names = ("play", "skills", "advantages", "loss")
    own = Variant(*(watched(name) for name in names))
    config = made("opid", iterations=2, mini_batch=0)
    train_module.train(run := start(config), own)
    assert seen == [(name, iteration) for iteration in (0, 1) for name in names]
    config = made("grpo", iterations=1, mini_batch=0)
    seen.clear()
    train_module.train(start(config), own)
    assert [name for name, _ in seen] == ["play", "advantages", "loss"]  # lambda is 0: no skills
    assert [name for name in run.metrics if name.startswith("seconds/")][:4] == [
        *("seconds/rollout", "seconds/skills", "seconds/rescore", "seconds/update"),
    ]


@pytest.mark.parametrize("algo", [algo for algo in ALGOS if algo not in ("opid", "grpo")])
def test_every_variant_trains_and_logs_what_it_adds(algo, run, llama):
    config, (record,) = run(algo)
    assert differ(trained(config), dict(llama.named_parameters()))
    assert all(value == value for value in record.values())  # no NaN
    distills = ("sdar", "opsd", "grpo+opsd", "skill-sd", "oprd", "opid-full", "sdpo")
    assert ("loss/distill" in record) == (algo in distills)
    assert (record["loss/policy"] == 0) == (algo in ("opsd", "oprd", "sdpo"))  # no outcome
    assert (record["advantage/skill_abs"] > 0) == bool((config.levels and algo != "opid-contrast") or algo == "opd")
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
        ("rlsd", {"rlsd_mix": 0.0}),
    ):
        assert not differ(trained(run(algo, routing="episode", **off)[0]), grpo), algo
    for algo in ("opid", "opid-shuffled", "opid-placebo", "opid-oracle", "opid-shift", "opid-contrast"):
        assert not differ(trained(run(algo, episode_weight=0.0, step_weight=0.0)[0]), grpo), algo
    assert not differ(trained(run("gigpo", state_weight=0.0)[0]), grpo)
    assert differ(trained(run("gigpo")[0]), grpo)


def test_exact_divergences_train_and_weight_zero_is_grpo(run):
    grpo = trained(run("grpo")[0])
    for algo, changes in (
        ("opid-full", {"divergence": "reverse"}),
        ("opid-full", {"divergence": "jsd", "routing": "additive"}),
        ("opid-full", {"divergence": "forward", "kl": 0.0}),
        ("opd", {"divergence": "reverse"}),
    ):
        config, (record,) = run(algo, **changes)
        assert differ(trained(config), grpo)
        assert record["advantage/skill_abs"] > 0 and record["loss/distill"] != 0
        assert (record["loss/policy"] == 0) == (algo == "opd")  # no outcome
    config, (record,) = run("opid-full", routing="episode", episode_weight=1e-30, step_weight=0.0)
    ours = trained(config)
    assert all(torch.allclose(ours[name], grpo[name], atol=1e-6) for name in grpo)  # summed in another order


@pytest.mark.parametrize("algo", ["opid", "opid-full", "opid-contrast", "oprd"])
def test_a_level_that_guides_no_step_adds_nothing(algo, run, monkeypatch):
    """With --routing step no step has an episode skill; and it may be that no answer parses at all."""
    config, (record,) = run(algo, routing="step")
    assert record["guided/episode"] == 0 < record["guided/step"]
    assert (record["advantage/skill_abs"] > 0) == (algo != "opid-contrast")  # whose skills read alike here
    monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: lambda prompts: ["no JSON"] * len(prompts))
    config, (record,) = run(algo, routing="critical-first")
    assert record["skills/parse_rate"] == record["guided/episode"] == record["guided/step"] == 0
    if algo == "oprd":
        assert record["loss/distill"] == record["grad_norm"] == 0
        return
    ours, grpo = trained(config), trained(run("grpo")[0])
    if algo == "opid-full":  # whose log-probs are summed in another order
        assert all(torch.allclose(ours[name], grpo[name], atol=1e-6) for name in grpo)
    else:
        assert not differ(ours, grpo)


EVERY = [(algo, {}) for algo in ALGOS] + [("opid-full", {"divergence": "jsd"}), ("opid-shift", {"scorer": "reference"})]
EVERY += [("opid-shift", {"scorer": "reference", "kl": 0.0}), ("opid", {"kl": 0.1}), ("opd", {"divergence": "forward"})]
EVERY += [("oprd", {"teacher": "larger"})]


@pytest.mark.parametrize(("algo", "how"), EVERY)
def test_a_process_without_an_episode_goes_on(algo, how, run, monkeypatch):
    """Of several processes one may have tasks of which none fits: it tells what the others tell, for nothing."""

    def finish(self, batch):
        metrics = self.metrics | advantage_metrics(batch.advantages.outcome, batch.advantages.skill, batch.mask)
        mine = sizes_of(batch, metrics)
        self.metrics, variant, weights = {}, variant_of(algo), [p.detach().clone() for p in self.trained]
        skills, written = variant.skills(self, []) if self.levels else ([], {})
        empty, scored = rescore(self, [], skills, [])
        empty.advantages = variant.advantages(self, empty)
        none = self.metrics | written | scored
        none |= advantage_metrics(empty.advantages.outcome, empty.advantages.skill, empty.mask)
        assert empty.mask.numel() == 0 and none.keys() < metrics.keys()
        with pytest.raises(FloatingPointError):  # alone it has nothing to learn from
            update(self, empty, variant.loss)
        assert all(torch.equal(a, b) for a, b in zip(weights, self.trained, strict=True))
        theirs, other = metrics | none | dict.fromkeys(("episodes", *TOKENS), 0), Process()
        over_processes(theirs, sizes_of(empty, theirs), other)
        told.append((over_processes(metrics, mine, Process()), over_processes(metrics, mine, Process(other))))
        self.metrics = metrics
        finished(self, batch)

    finished, told = Run.finish, []
    monkeypatch.setattr(Run, "finish", finish)
    run(algo, **how)
    ((alone, both),) = told
    same = [name for name in alone if not name.startswith("seconds/")]
    assert [both[name] for name in same] == pytest.approx([alone[name] for name in same], nan_ok=True)


def test_the_exact_loss_is_minus_the_mean_of_the_shift(run):
    """Over many sampled tokens A_skill is on average -KL(pi_old || scorer), and the exact loss is that KL at first."""
    many = {"tasks": 4, "rollouts": 8, "max_steps": 8, "mini_batch": 0, "train_games": 8, "routing": "episode"}
    _, (exact,) = run("opid-full", episode_weight=1.0, **many)
    mean, size = exact["advantage/skill_mean"], exact["advantage/skill_abs"]
    assert exact["loss/distill"] == pytest.approx(-mean, abs=0.1 * size)
    assert exact["loss/distill"] > 0.1 * size


@pytest.mark.parametrize(("temperature", "level"), [(1.0, "episode"), (0.7, "step")])
def test_the_exact_loss_has_the_gradient_of_the_sampled_shift_on_average(temperature, level, made, llama, qwen):
    """A response of one token, any of the vocabulary, weighed by its probability: the gradient of OPID's loss, summed
    over all of them, is that of opid-full's term for one of them."""
    context, guided, words = [5, 6, 7], [5, 20, 6, 7], llama.config.vocab_size
    with torch.no_grad():
        old, teacher = (
            (model(torch.tensor([ids])).logits[0, -1] / temperature).log_softmax(-1)[:, None]  # (V, 1)
            for model, ids in ((llama, context), (qwen, guided))
        )
    steps = [Step((), "", context, [word], "", "", True) for word in range(words)]
    batch = Batch([Trajectory("", 0, steps, True)], [None], [[()] * words], {level: [guided] * words}, old, None, {})
    weights = {"episode_weight": 0.25, "step_weight": 0.25} | {f"{level}_weight": 0.5}
    shift = 0.5 * (teacher - old)  # lambda A_skill
    batch.advantages = Advantages(shift, torch.zeros(words), shift)
    config = made("opid-full", **weights, temperature=temperature, kl=0.0)
    stub = SimpleNamespace(config=config, policy=llama, models={"reference": qwen}, reading=None)

    def gradient(loss) -> torch.Tensor:
        llama.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in llama.parameters()])

    one_by_one = pack([context] * words, [[word] for word in range(words)], packed=False)
    losses, _ = variant_of("opid").loss(stub, one_by_one, batch)
    sampled = gradient((old[:, 0].exp() * losses).sum())
    _, terms = variant_of("opid-full").loss(stub, one_by_one[:1], batch)  # any holds the whole distribution
    exact = gradient(terms["loss/distill"].sum())
    assert exact.norm() > 0.01
    assert (sampled - exact).norm() < 1e-3 * exact.norm()


def test_what_rests_in_host_memory_is_brought_back_for_the_loss(made, monkeypatch):
    """Scorer and teacher are no numbers until they are needed: the run is the same."""
    reading = (("opid-full", {}), ("oprd", {}), ("sdpo", {}), ("opd", {"divergence": "reverse"}), ("opid-shift", {}))
    for algo, changes in reading:
        changes |= {"scorer": "reference"} if algo != "opd" else {}
        plain = made(algo, iterations=2, kl=0.1, **changes)
        train(plain)
        with monkeypatch.context() as patch:
            patch.setattr(start_module, "Offload", Poisoned)
            rested = train(replace(plain, out=f"{plain.out}-rested"))
        assert rested.offload.aside and not differ(trained(plain), trained(rested.config)), algo


@pytest.mark.parametrize("algo", ["opid-full", "opid-contrast", "skill-grpo", "sdpo"])
def test_variants_resume_exactly(algo, made):
    train(whole := made(algo, iterations=3, train_games=2))
    train(halves := replace(whole, iterations=2, out=f"{whole.out}-halves"))
    assert differ(trained(whole), trained(halves))
    train(halves := replace(halves, iterations=3, resume=True))
    assert not differ(trained(whole), trained(halves))


def test_the_teacher_of_sdpo_follows_the_policy(made, monkeypatch):
    """Rate 0: the frozen start. 1: the policy before the update. 1/4 after one update: a quarter of the way there."""

    def weights(model) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    def scored(rate) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        teachers, policies = [], []

        def watched(run, *more):
            teachers.append(weights(run.models["reference"]))
            policies.append(weights(run.policy))
            return rescore(run, *more)

        monkeypatch.setattr(train_module, "rescore", watched)
        train(config := made("sdpo", iterations=3, teacher_rate=rate))
        records = read_lines(Path(config.out, "metrics.jsonl"))
        assert all(record["loss/distill"] > 0 for record in records)
        return teachers, policies

    teachers, policies = scored(0.0)
    assert all(torch.equal(teacher, policies[0]) for teacher in teachers) and not torch.equal(*policies[:2])
    teachers, policies = scored(1.0)
    assert all(map(torch.equal, teachers, policies))
    teachers, (start, once, twice) = scored(0.25)
    assert torch.equal(teachers[0], start)
    assert torch.allclose(teachers[1], 0.75 * start + 0.25 * once, atol=1e-6)
    assert torch.allclose(teachers[2], 0.75 * (0.75 * start + 0.25 * once) + 0.25 * twice, atol=1e-6)


# ---- whose skills, which teacher -------------------------------------------------------------------------------------


def test_the_shift_to_another_tasks_skill(run, monkeypatch):
    """Where all skills read alike nothing is left of the contrast; where they differ, something is, and what the plain
    context has to do with it cancels."""
    _, (alike,) = run("opid-contrast")
    assert alike["advantage/skill_abs"] == pytest.approx(0, abs=1e-5) and alike["guided/step"] > 0
    texts = iter(["open bed", "look in safe", "never go", "first take"] * 2)
    answers = lambda prompts: [json.dumps({"episode_skill": next(texts)}) for _ in prompts]
    monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: answers)
    _, (differing,) = run("opid-contrast", tasks=4, rollouts=1)
    assert differing["advantage/skill_abs"] > 0.01


def test_whose_skills_guide(run, monkeypatch):
    def samples(algo):
        answer = {"episode_skill": "skill {}", "step_skills": {"1": "hint"}}
        numbered = lambda prompts: [json.dumps(answer).replace("{}", str(i)) for i in range(len(prompts))]
        monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: numbered)
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
    config = laptop(algo="opd", teacher="big")
    opd.frozen_teacher(config.teacher, config, tokenizer, "cpu")  # the log-probs of sampled tokens are right
    with pytest.raises(
        ValueError, match="--teacher big: --divergence reverse needs whole distributions of both models: its logits are"
    ):
        opd.frozen_teacher(config.teacher, replace(config, divergence="reverse"), tokenizer, "cpu")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    stretched = LlamaConfig(vocab_size=len(tokenizer), **SMALL, rope_parameters=rope, max_position_embeddings=64)
    monkeypatch.setattr(opd, "load_model", lambda *a, **k: (LlamaForCausalLM(stretched), tokenizer))
    with pytest.raises(ValueError, match="--teacher big: its dynamic position embedding"):
        opd.frozen_teacher(config.teacher, config, tokenizer, "cpu")


def test_the_teacher_is_one_of_the_runs_environment(monkeypatch, tokenizer, llama):
    asked = []
    monkeypatch.setattr(opd, "load_model", lambda name, **how: asked.append((name, how)) or (llama, tokenizer))
    config = laptop(algo="opd", env="search", teacher="cold:smollm2")
    opd.frozen_teacher(config.teacher, config, tokenizer, "cpu")
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

    def act(known):
        torch.manual_seed(0)
        envs = []

        def make():
            envs.append(UnderSkill(AlfworldEnv(prompt="compact", max_steps=2), known))
            return envs[-1]

        (trajectory,), _ = play(llama, encoder, make, games[:1], 1, max_new_tokens=4, context_limit=1024)
        return trajectory, envs[0].skill

    torch.manual_seed(0)
    plainly = lambda: AlfworldEnv(prompt="compact", max_steps=2)
    (plain,), _ = play(llama, encoder, plainly, games[:1], 1, max_new_tokens=4, context_limit=1024)
    skilled, skill = act({task_type: "open every closed place"})
    assert skill == "open every closed place"
    for t, step in enumerate(skilled.steps):
        shown = tokenizer.decode(step.context).count("skill open every closed place")
        assert shown == 1, (t, step)
    other, skill = act({"another type": "open every closed place"})
    assert skill is None
    assert [step.context for step in other.steps] == [step.context for step in plain.steps]


def test_skill_grpo_acts_from_the_second_iteration_on(run):
    config, records = run("skill-grpo", iterations=3, train_games=2)
    assert [record["rollout/skilled"] for record in records] == [0, 4, 4]
    assert "eval/valid_seen/success" in records[-1]
    state = torch.load(Path(config.out, "checkpoints/000002.pt"), weights_only=True)
    assert set(state["variant"]["episode_skills"].values()) == {"open every closed place"}


@pytest.mark.parametrize("algo", ["opid-shuffled", "opid-contrast"])
def test_skills_of_other_tasks_need_another_task(algo, run):
    with pytest.raises(ValueError, match="2 --tasks of 1 games: fewer than two for each process"):
        run(algo, train_games=1)
    with pytest.raises(ValueError, match=f"--algo {algo} takes skills from other tasks: --tasks must be at least 2"):
        run(algo, tasks=1)


@pytest.mark.parametrize(
    ("algo", "changes", "message"),
    [
        ("opd", {}, "--algo opd needs --teacher"),
        ("opd", {"teacher": "larger", "divergence": "jsd", "shard": True}, "output layer whole: no --shard"),
        ("opid-full", {"scorer": "reference", "shard": True}, "a frozen scorer: no --shard"),
        ("opid-full", {"scorer": "old"}, "--scorer must be one of reference, not 'old'"),
        ("sdpo", {"lora_rank": 4}, "has no teacher that moves: --teacher-rate 0"),
        ("sdpo", {"is_clip": 0.0}, "--is-clip must be positive"),
        ("sdpo", {"rollouts": 1}, "--rollouts must be at least 2"),
        ("sdpo", {"routing": "step"}, "--routing step guides no step"),
        ("sdpo", {"teacher_rate": 1.5}, "--teacher-rate must be between 0 and 1"),
        ("opid-oracle", {"env": "search"}, "there is none for --env search"),
        ("sdar", {"routing": "additive"}, "at most one teacher per token: --routing additive gives a step two"),
        ("rlsd", {"rlsd_mix": 1.5}, "--rlsd-mix must be between 0 and 1"),
        ("gigpo", {"state_weight": -1.0}, "--state-weight must be at least 0"),
    ],
)
def test_what_a_variant_cannot_do_is_refused(algo, changes, message):
    with pytest.raises(ValueError, match=message):
        laptop(algo=algo, **changes)
