"""The plan: parts by hand, passes against real tensors, advice that is enough, nothing left behind; and its hours."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config

import memory
import train
from config import every_setting, flag, parse_args, variant_of
from lm.cache import CachedConversations
from lm.sampler import Sampler
from lm.scoring import Sequence, counted, sequence_logprobs
from memory import hours, machine
from memory.counting import Count, Shells, Work
from memory.hours import Hours, Machine
from memory.passes import Passes, Shape
from memory.plan import GIB, Plan, _changes, advice, describe, fit, fitted, for_card, planned
from runlog.start import TOKENS, Run, start
from tests.settings import laptop
from tiny.loading import load_config
from tiny.warmstart import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = len(tiny_tokenizer())
LAYERS = 3  # of the laptop's model
# width 192, MLP 480, tied words: q k v o, gate up down, two norms; and the last norm
LINEAR = LAYERS * (4 * 192**2 + 3 * 192 * 480)
TINY = WORDS * 192 + LINEAR + LAYERS * 2 * 192 + 192
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
DEEP = LlamaConfig(vocab_size=WORDS, num_hidden_layers=6, tie_word_embeddings=True, eos_token_id=None, **SIZES)
SHALLOW = LlamaConfig(vocab_size=WORDS, num_hidden_layers=1, **SIZES)


def parts(phase: str, processes: int = 1, **changes) -> dict[str, float]:
    """Of a run on a GPU."""
    return next(p.parts for p in Plan(laptop(**changes), processes=processes).phases if p.name == phase)


# ---- what lasts ----


def test_the_exact_parts_by_hand():
    rollout, update = parts("rollout"), parts("update")
    assert rollout["weights"] == rollout["reference"] == update["gradients"] == 4 * TINY
    assert rollout["optimizer"] == 8 * TINY
    token = 2 * LAYERS * 192 * 4  # K and V, float32
    assert rollout["keys, values"] == 32 * 1024 * token  # 32768 tokens of --rollout-budget
    assert parts("rollout", tasks=2, rollouts=3)["keys, values"] == 6 * 1024 * token  # no more than there are
    assert parts("rollout", tasks=2, rollouts=3, processes=2)["keys, values"] == 3 * 1024 * token
    assert parts("rollout", rollout_budget=1000)["keys, values"] == 1024 * token  # one row at least
    assert parts("skills", skill_context_limit=8192)["keys, values"] == 4 * 8192 * token


def test_frozen_models_hold_what_their_flag_says():
    autocast = {"mixed_precision": "bf16"}
    # the output layer is tied to the embeddings, and gets a weight of its own
    assert parts("scoring", **autocast)["reference"] == 4 * TINY - 2 * LINEAR + 2 * WORDS * 192
    assert parts("scoring", **autocast, frozen_dtype="float32")["reference"] == 4 * TINY
    assert parts("scoring", frozen_dtype="bfloat16")["reference"] == 2 * TINY
    assert parts("scoring", algo="grpo", kl=0.0)["reference"] == 0  # read by nobody
    lora = parts("update", lora_rank=4)
    assert "reference" not in lora or lora["reference"] == 0
    assert lora["optimizer"] == 2 * 4 * LAYERS * 4 * (4 * (192 + 192) + 3 * (192 + 480))  # A and B, seven times
    assert parts("scoring", algo="opd", teacher="tiny")["teacher"] == 4 * TINY


def test_a_moving_teacher_is_kept_twice_in_host_memory():
    def kept(libraries: float | None, rate: float) -> set[float]:
        plan = Plan(laptop(algo="sdpo", teacher_rate=rate), libraries=libraries)
        return {phase.parts["state"] for phase in plan.phases}

    assert (kept(0.0, 0.05), kept(0.0, 0.0), kept(None, 0.05)) == ({2 * 4 * TINY}, {0}, {0})  # None: a GPU


def test_offloaded_is_what_a_phase_does_not_use():
    offloaded = {name: parts(name, offload=True) for name in ("rollout", "skills", "scoring", "update")}
    assert [name for name, held in offloaded.items() if held.get("optimizer")] == ["update"]
    assert [name for name, held in offloaded.items() if held.get("reference")] == ["scoring"]
    assert parts("skills", offload=True, skill_writer="reference")["reference"] == 4 * TINY


def test_sharded_is_split_and_gathered():
    one, four = parts("rollout", shard=True), parts("rollout", processes=4, shard=True)
    assert [four[name] for name in ("weights", "reference", "optimizer")] == [TINY, TINY, 2 * TINY]
    assert four["weights"] + four["gathered"] == 4 * TINY
    assert one["gathered"] == 0
    assert parts("update", processes=4, shard=True)["gradients"] == TINY


# ---- what a pass holds ----


def test_counted_by_hand():
    x = torch.ones(100)  # 400 bytes, there before
    with Count([x]) as count:
        y = x + 1
        assert count.held == 400
        z = y.view(10, 10) * 2  # a view counts as nothing
        del y
        assert count.held == 400
        count.mark()
        x.add_(1)
        del z
    assert (count.held, count.peaks) == (0, [800, 400])


@pytest.mark.parametrize("settings", [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_update_and_scoring_are_those_of_real_tensors(settings):
    config = laptop(context_limit=200, token_budget=400, max_steps=2, max_new_tokens=20, **settings)
    torch.manual_seed(0)
    model = LlamaForCausalLM(DEEP)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rows = [Sequence([5] * (200 - row), [(row, 100, 20), (row, 160, 20)]) for row in range(2)]
    gradients, peaks = sum(p.grad.nbytes for p in model.parameters()), []
    for grad in (True, False):
        with Count([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]) as count:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=config.mixed_precision == "bf16"):
                logprobs = sequence_logprobs(model, rows, 1.0)[0]
            if grad:
                logprobs.sum().backward()
        peaks.append(max(count.peaks))
    passes = Passes(config, DEEP)  # two and three layers, extended to six
    assert passes.update().peak == pytest.approx(peaks[0] + gradients, rel=0.05)
    assert passes.scoring().peak == pytest.approx(peaks[1], rel=0.15)


def test_sampling_is_that_of_real_tensors(tokenizer):
    model = LlamaForCausalLM(DEEP).eval()
    sampler = Sampler(model, tokenizer, max_new_tokens=20, temperature=1.0, token_budget=200)
    with Count([*model.parameters(), *model.buffers()]) as count:
        sampler(list(range(8)), [[5] * (180 - row) for row in range(8)])
    counted = Passes(laptop(token_budget=200), DEEP).sampling(8, 200)
    assert counted.cache == 8 * 200 * (2 * 6 * 32 * 4)  # K and V, six layers of two heads of 16
    assert max(count.peaks) <= counted.peak < 1.2 * max(count.peaks)  # the last piece read here is a short one


def test_compacting_holds_no_second_cache():
    ids, mask = torch.ones(4, 100, dtype=torch.long), torch.ones(4, 100, dtype=torch.long)
    mask[:, 10:40] = 0
    with Count([]) as count:
        cache = DynamicCache([(torch.randn(4, 2, 99, 16), torch.randn(4, 2, 99, 16)) for _ in range(10)])
        held, size = CachedConversations(list(range(4)), [[1] * 70] * 4, ids, mask, cache), count.held
        count.mark()
        held = held.compacted()
        del cache
    assert held.ids.shape[1] == held.cache.layers[0].keys.shape[2] + 1 == 70
    assert count.peaks[-1] < 1.2 * size
    assert count.held < 0.8 * size


def test_keys_and_values_are_kept_as_autocast_uses_them():
    counted = Passes(laptop(mixed_precision="bf16"), DEEP).sampling(8, 200)
    assert counted.cache == 8 * 200 * 6 * 32 * (2 + 2)


def test_settings_move_what_they_should():
    base = parts("update")
    assert parts("update", token_budget=2048)["pass"] == pytest.approx(base["pass"] / 2, rel=0.1)
    assert parts("update", gradient_checkpointing=True)["pass"] < 0.7 * base["pass"]
    assert parts("update", mixed_precision="bf16")["pass"] < base["pass"]
    # linear layers and, tied, the output layer in bfloat16
    copies = parts("rollout", mixed_precision="bf16")["autocast copies"]
    assert copies == pytest.approx(2 * (LINEAR + WORDS * 192), rel=0.02)
    assert parts("rollout", token_budget=32)["pass"] < 0.9 * parts("rollout")["pass"]


# ---- does it fit ----


def test_advice_is_enough_or_the_best_there_is():
    plan = Plan(laptop(rollout_budget=131072))
    assert plan.largest.name == "rollout" and advice(plan, 2 * plan.peak) is None
    half = Plan(replace(plan.config, rollout_budget=65536)).peak
    assert advice(plan, half / 0.89).startswith("--rollout-budget 65536 is enough")
    assert advice(plan, half / 0.91).startswith("--rollout-budget 32768 is enough")  # nine tenths are planned with
    plan = Plan(laptop())
    assert plan.largest.name == "update"
    assert advice(plan, plan.peak).startswith("--gradient-checkpointing is enough")
    assert advice(plan, plan.peak / 100).startswith("first --")
    least = dict.fromkeys(("token_budget", "rollout_budget", "context_limit", "skill_context_limit"), 64)
    least["skill_tokens"] = 32
    sparse = Plan(laptop(**least, lora_rank=1, gradient_checkpointing=True), libraries=GIB)
    assert "smaller model" in advice(sparse, 1)


def test_fit_lowers_budgets_before_anything_slower_and_no_more_than_it_must():
    plan = Plan(laptop(rollout_budget=131072))
    assert fit(plan, 2 * plan.peak) == (plan, f"fitted to {2 * plan.peak / GIB:.1f} GiB: nothing has to change")
    half = Plan(replace(plan.config, rollout_budget=65536)).peak
    fitting, words = fit(plan, half / 0.89)
    assert words.endswith(": --rollout-budget 65536") and fitting.peak == half
    least, words = fit(plan, 1)  # one byte: all that it can do, and no endless loop
    assert "--token-budget 1024" in words and words.endswith("--gradient-checkpointing --offload")
    assert (least.config.learning_rate, least.config.lora_rank) == (plan.config.learning_rate, 0)
    assert "--offload" not in fit(Plan(plan.config, libraries=0.0), 1)[1]  # there is no other memory than a CPU's


def test_a_plan_that_counts_on_is_the_plan_made_anew(monkeypatch):
    """Whatever differs: what was counted before is that of another pass, of other weights, or of other types."""
    settings = [{}, {"token_budget": 1024}, {"gradient_checkpointing": True}, {"lora_rank": 2}]
    settings += [{"dtype": "bfloat16"}, {"mixed_precision": "bf16"}]
    runs = [(laptop(**each), SHALLOW) for each in settings]
    runs += [(laptop(), LlamaConfig(vocab_size=WORDS, num_hidden_layers=2, **SIZES))]
    counting_on = [Plan(*run).phases for run in runs]
    for run, phases in zip(runs, counting_on, strict=True):
        monkeypatch.setattr(memory.passes, "_COUNTED", {})
        assert Plan(*run).phases == phases


@pytest.mark.parametrize(
    ("argv", "fits"),
    [
        ([], False),
        (["--model", "Qwen/Qwen3-0.6B"], True),
        (["--model", "Qwen/Qwen3-0.6B", "--no-fit"], False),
        (["--recipe", "alfworld-qwen3-1.7b"], False),
        (["--model", "smollm2", "--recipe", "laptop"], False),
    ],
)
def test_any_model_without_a_recipe_is_fitted(argv, fits):
    config = parse_args(argv)
    assert config.fit == fits
    assert not fits or not config.gradient_checkpointing  # where there is room it is not needed


def test_a_run_that_is_fitted_says_so_in_three_lines(monkeypatch):
    monkeypatch.setattr(machine, "there", lambda device: 1)  # byte
    monkeypatch.setattr(hours, "this_machine", lambda plan: Machine("slow", 1e9, 1e9, 1e9, 1e9, 1e-3))
    config, said = fitted(laptop(env="search", iterations=10**6))
    first, second, third = said.splitlines()
    assert first.startswith("fitted to 0.0 GiB: --") and first.endswith(" --gradient-checkpointing")
    assert config.gradient_checkpointing and config.token_budget < laptop().token_budget
    assert second == "on cpu: float32 weights, products in float32"
    assert "hours by plan, with answers of 6 tokens. For one day on one card: --recipe one-card-search-" in third


def test_offload_is_no_advice_on_a_cpu():
    settings = {"context_limit": 64, "skill_context_limit": 64, "rollout_budget": 64, "token_budget": 64}
    settings["skill_tokens"] = 32
    config = laptop(**settings, gradient_checkpointing=True, algo="grpo")
    assert "--offload" in advice(Plan(config), 0.99 * Plan(config).peak)
    assert "--offload" not in advice(Plan(config, libraries=0.0), 0.99 * Plan(config).peak)


def test_a_run_starts_with_a_line_and_warns_where_it_would_run_out(monkeypatch):
    model = tiny_model(WORDS, seed=0)
    assert [text.split(":")[0] for text in planned(laptop(), model, 1).splitlines()] == ["memory", "disk"]
    assert "GiB by plan (in the update)" in planned(laptop(), model, 1)
    monkeypatch.setattr(machine, "there", lambda device: 0.3 * GIB)
    assert "WARNING: this run may run out of memory. Change " in planned(laptop(), model, 1)
    model.config.num_attention_heads = 0  # such code cannot be run
    line = planned(laptop(), model, 1).splitlines()[0]
    assert line == "memory: not planned, ZeroDivisionError in this architecture's code"


def test_limits_of_control_groups_count(monkeypatch, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    (tmp_path / "memory" / "c").mkdir(parents=True)
    (tmp_path / "memory" / "c" / "memory.limit_in_bytes").write_text("2000\n")
    (tmp_path / "groups").write_text("4:memory:/c\n5:cpu:/other\n0::/a/b\n")
    monkeypatch.setattr(machine, "LIMITS", tmp_path)
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    assert sorted(machine.group_limits()) == [1000, 2000]


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="glibc's heap")
def test_what_a_phase_freed_goes_back_to_the_system():
    before = machine.resident()
    pieces = [torch.ones(25_000) for _ in range(3000)]  # 100 kB each, on the heap
    kept = pieces[::50]  # between what is freed

    pieces.clear()
    Run.note(SimpleNamespace(metrics={}, lap=0.0), "phase", {})
    assert machine.resident() < before + 50 * 2**20
    assert len(kept) == 60


# ---- on the command line ----


def test_the_configuration_is_that_of_the_loaded_model():
    config = load_config("smollm2")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (load_config("tiny").hidden_size, load_config("tiny").vocab_size) == (192, WORDS)


def test_plan_prints_and_starts_nothing(tmp_path):
    command = [sys.executable, "train.py", "--plan", "--out", str(tmp_path / "run"), "--mixed-precision", "bf16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "keys, values" in done.stdout
    assert float(done.stdout.split("peak, estimated:")[1].split()[0]) > 100
    assert "it fits" in done.stdout and "on 1 GPU: " in done.stdout
    assert not (tmp_path / "run").exists()


def test_sharded_is_planned_for_several_numbers_of_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(hours, "this_machine", lambda plan: Machine("slow", 1e9, 1e9, 1e9, 1e9, 1e-3))
    cards = lambda: [line.split(":")[0] for line in describe(laptop(shard=True)).splitlines() if line.startswith("on ")]
    assert cards() == ["on 1 GPU", "on 2 GPUs", "on 4 GPUs", "on 8 GPUs"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cards() == ["on 2 GPUs"]


def test_a_model_of_two_layers_of_named_kinds_is_counted_whole():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    architecture = Qwen3Config(vocab_size=97, num_hidden_layers=2, head_dim=8, **sizes)
    assert len(architecture.layer_types) == 2
    (whole,) = Shells(architecture, "float32", 0).counted
    assert whole is architecture


@pytest.mark.parametrize("settings", [{"algo": "opid-full"}, {"algo": "oprd"}, {"algo": "sdpo"}])
def test_advice_leaves_out_what_the_run_refuses(settings, monkeypatch):
    monkeypatch.setattr(machine, "there", lambda device: 0.2 * GIB)
    line = planned(laptop(**settings), tiny_model(WORDS, seed=0), 2)
    assert "WARNING" in line and "--shard" not in line


def test_a_resumed_run_is_told_of_what_it_may_change(monkeypatch):
    monkeypatch.setattr(machine, "there", lambda device: 0.2 * GIB)
    run = laptop(frozen_dtype="float32", offload=True, gradient_checkpointing=True)
    first, resumed = (
        {flag for _, change in _changes(Plan(c)) for flag in change} for c in (run, replace(run, resume=True))
    )
    assert first - resumed == {"lora_rank", "frozen_dtype"}
    assert "token_budget" in resumed


def test_a_model_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", "--model", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"^train\.py: no model '.*nothing': there is no such folder"):
        train.main()


def test_a_teacher_is_planned_for_the_environment_of_the_run(monkeypatch):
    asked = []
    architecture = tiny_model(WORDS, seed=0).config
    monkeypatch.setattr("memory.plan.load_config", lambda name, env: asked.append((name, env)) or architecture)
    Plan(laptop(env="search", algo="opd", teacher="cold:bigger"))
    assert ("cold:bigger", "search") in asked


# ---- hours ----

STEPS = Machine("a launch is a second", *[float("inf")] * 4, 1.0)


def test_operations_by_hand():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Count([]) as count:
        c = a @ b
        assert count.work == Work(1, weights=4 * 20, moved=4 * (12 + 15), products=2 * 3 * 4 * 5)
        c.t()  # a view
        assert count.work.launches == 2
        torch.nn.functional.embedding(torch.tensor([1, 1]), b)  # two rows of five are read and written, by two longs
        assert count.work.moved == 4 * (12 + 15) + 2 * 4 * 10 + 2 * 8
        a.expand(7, 3, 4) + 1  # twelve numbers are read, however often
    assert count.work.moved == 4 * (12 + 15) + 2 * 4 * 10 + 2 * 8 + 4 * 12 + 4 * 7 * 12


def test_a_step_and_an_update_by_hand():
    rows, length = 4, 50
    passes = Passes(laptop(), load_config("tiny"))
    step = passes.reading(rows, length, 1, room=1).work
    weights, attention = LINEAR + WORDS * 192, LAYERS * 2 * 192 * length  # of a row: q k and p v
    assert step.products == pytest.approx(rows * 2 * weights, rel=1e-3)  # and rotary embeddings
    assert step.attention == rows * 2 * attention
    assert step.weights == pytest.approx(4 * weights + rows * 4 * attention, rel=1e-3)  # keys and values are read
    shape = Shape(2, length, 10)
    update, scoring = passes.update(shape).work, passes.scoring(shape).work
    layers, head, last = 2 * 2 * length * LINEAR, 2 * 2 * 10 * WORDS * 192, 2 * 2 * WORDS * 192  # one logit a row
    seen = 2 * length * 2 * attention
    assert scoring.products == pytest.approx(layers + head + last, rel=1e-3)
    assert scoring.attention == seen
    # twice as much backwards, attention 5 products for 2; logits are all in one chunk, which is made again
    assert update.products == pytest.approx(3 * layers + 4 * head + last, rel=1e-3)
    assert update.attention == 3.5 * seen


def test_work_grows_with_the_layers():
    counted, whole = Shells(DEEP, "float32", 0), Shells(DEEP, "float32", 0)
    whole.counted = [DEEP]

    def work(model, count):
        model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)

    assert counted.count(work)[3] == whole.count(work)[3]


def test_seconds_of_work_by_hand():
    machine = Machine("slow", weights=2e9, bandwidth=1e9, products=1e12, attention=5e11, launch=1e-3)
    work = Work(100, weights=8e9, moved=4e9, products=2e12, attention=3e12)
    assert machine.seconds(work) == pytest.approx(0.1 + 4 + 4 + 2 + 6)


def test_half_of_the_limits_by_hand():
    config = laptop()  # 16 x 8 episodes of 20 steps of 12 tokens, 5 step skills, KL
    lengths = hours.expected(config)
    assert (lengths.turns, lengths.read, lengths.answer, lengths.skill) == (10, 64, 6, 48)
    # five branches of an observation, a skill and an answer; the conversation again with a skill in it
    assert lengths.guided == 5 * (64 + 32 + 6) + 10 * (64 + 6) + 32
    counts = {"sampled": 128 * 60, "skills": 128 * 48, "scored": 128 * (2 * 700 + 1242), "trained": 128 * 700}
    assert hours.tokens(config, lengths, 128) == counts
    grpo = laptop(algo="grpo", kl=0.0)
    assert hours.tokens(grpo, hours.expected(grpo), 128) == counts | {"skills": 0, "scored": 128 * 700}
    window = hours.expected(laptop(context="window"))
    assert (window.turns, window.read, window.guided) == (10, 506, 10 * (506 + 32 + 6))


def test_phases_by_hand(monkeypatch):
    config = laptop(tasks=2, rollouts=3, rollout_budget=2048, mini_batch=0, eval_games=4)
    plan = Plan(config, processes=1)
    plan.passes = SimpleNamespace(
        reading=lambda rows, length, columns, room=0: SimpleNamespace(work=Work(1)),
        scoring=lambda shape: SimpleNamespace(work=Work(10)),
        update=lambda shape: SimpleNamespace(work=Work(100)),
    )
    monkeypatch.setattr(hours, "STEP_LAUNCHES", 0)
    longest = {"most_turns": 20.0, "most_read": 64.0}
    planned = Hours(plan, STEPS, replace(hours.expected(config), **longest))
    # three waves of two; a turn is read at once and samples 12 tokens, the first of which reading gives
    assert planned.phases["rollout"] == 3 * 20 * 12
    assert planned.evaluation == 2 * (2 * 20 * 12)
    # transcripts of 464 + 96 tokens, three at a time: two batches
    assert planned.phases["skills"] == 2 * 96
    # 700 tokens an episode: five in the 4096 of a micro-batch
    assert planned.phases["rescore"] == pytest.approx(10 * 6 * (2 * 700 + 1242) / (5 * 700))
    assert planned.phases["update"] == pytest.approx(100 * 6 * 700 / (5 * 700))
    assert planned.run == pytest.approx(30 * planned.iteration + 7 * planned.evaluation)


def test_evaluations_by_hand():
    config = laptop(iterations=25, eval_every=10)  # before the first, after 10 and 20, after the last
    assert [hours.evaluations(replace(config, eval_every=every)) for every in (0, 10, 25)] == [1, 4, 2]
    assert [hours.evaluations_left(config, i) for i in (0, 9, 10, 19, 23, 24)] == [3, 2, 2, 1, 1, 0]
    assert hours.evaluations_left(replace(config, eval_every=0), 0) == 1


def test_what_a_run_logs_is_what_the_plan_counts(random_tiny, tmp_path, monkeypatch):
    """Of given turns and lengths. Tokens are counted here from the batch itself."""
    config = laptop(
        algo="grpo", out=str(tmp_path), tasks=2, rollouts=2, max_steps=3, iterations=2, eval_every=1, eval_games=1
    )
    batches, finish = [], Run.finish
    monkeypatch.setattr(Run, "finish", lambda run, batch: (batches.append(batch), finish(run, batch)))
    train.train(run := start(config), variant_of("grpo"))
    steps = [step for trajectory in batches[-1].trajectories for step in trajectory.steps]
    last = [trajectory.steps[-1] for trajectory in batches[-1].trajectories]
    episodes = sum(len(step.context) + len(step.response) for step in last)  # a conversation is packed into its last
    metrics = {name.removeprefix("tokens/"): value for name, value in run.metrics.items() if "tokens/" in name}
    assert metrics == {
        "sampled": sum(len(step.response) for step in steps),
        "skills": 0,
        "scored": 2 * episodes,  # by the policy and the reference
        "trained": episodes,
    }
    line = run.metrics
    lengths = hours.measured(config, line)
    assert hours.tokens(config, lengths, len(last)) == pytest.approx(metrics)
    assert lengths.turns * len(last) == pytest.approx(len(steps))
    assert lengths.read == pytest.approx((episodes - metrics["sampled"]) / len(steps))


def test_tokens_of_a_phase_are_told_apart():
    run = SimpleNamespace(metrics=dict.fromkeys(TOKENS, 0), lap=0.0)
    for step in ("rollout", "skills", "evaluate", "update"):
        counted.clear()
        counted.update({"sampled": 5, "scored": 7})
        Run.note(run, step, {})
    assert [run.metrics[name] for name in TOKENS] == [10, 5, 21, 0]  # an update may sample and score, too
    assert not counted


def test_known_cards_by_name_or_memory():
    config = laptop(plan_for="RTX 4090", mixed_precision="auto")
    assert config.plan and config.mixed_precision == "auto"  # the other card decides
    shown = describe(config)
    assert "RTX 4090 has 24.0 GiB" in shown and "hours, estimated on RTX 4090: " in shown
    assert for_card(config, "RTX 4090")[0].mixed_precision == "bf16"
    turing, _ = for_card(config, "T4")
    assert turing.mixed_precision == "no" and hours.by_sheet("T4", turing).products == 0.5 * 8.1e12
    assert hours.by_sheet("RTX 4090", for_card(config, "RTX 4090")[0]).weights == pytest.approx(0.8 * 1008e9)
    assert "such a card has 24.0 GiB" in describe(laptop(plan_for="24"))
    with pytest.raises(ValueError, match=r"--plan-for '4091x': not among T4, L4, .* nor a number of GiB"):
        describe(laptop(plan_for="4091x"))


def test_after_the_first_iteration_a_run_says_what_is_left(monkeypatch):
    config = laptop(iterations=11, eval_every=5)  # three more evaluations
    line = {"seconds/rollout": 60.0, "seconds/rescore": 30.0, "seconds/update": 18.0}
    line |= {"rollout/steps": 19.6, "rollout/response_tokens": 11.0}
    said = hours.after_an_iteration(config, line, 0, 840.0, None)  # no plan is made for a short one
    left = "hours left: 1.0, evaluations included"  # 10 x 108 + 3 x 840 s
    assert said == f"seconds: rollout 60.0, rescore 30.0, update 18.0, an evaluation 840.0; {left}"
    assert "an evaluation 187.5;" in hours.after_an_iteration(config, line, 0, None, None)  # 2 x 200 games for 128
    line["seconds/rollout"] = 600.0
    planned = {"rollout": 100.0, "rescore": 20.0, "update": 30.0}
    monkeypatch.setattr(hours, "this_machine", lambda plan: STEPS)
    monkeypatch.setattr(hours, "Hours", lambda plan, machine: SimpleNamespace(phases=planned))
    said = hours.after_an_iteration(config, line, 0, 840.0, lambda: None).splitlines()
    assert len(said) == 2
    assert said[1].startswith("WARNING: the rollout took 600 s, 100 by plan (20 turns of 11 tokens): --max-new-tokens")
    planned["rollout"] = 400.0  # less than twice in all
    assert len(hours.after_an_iteration(config, line, 0, 840.0, lambda: None).splitlines()) == 1
    named = re.findall(r"--[\w-]+", " ".join(hours.CHANGE.values()))
    assert named and set(named) <= set(map(flag, every_setting()))


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(hours, "_seconds", lambda work, least=0.8: (work(), 1e-3)[1])
    found = hours.measured_machine(laptop(), 48)
    assert found.products == 3 * 2 * 1024 * 48 * 144 / 1e-3
    assert 0 < found.launch < 1e-3 / 100 and found.bandwidth == 32 * 3 * 4 * 2**21 / 1e-3
    assert found.attention == (2 + 5) * 2 * 64 * 1024 * 1024 / 1e-3  # one head of 64 numbers, 1024 tokens
