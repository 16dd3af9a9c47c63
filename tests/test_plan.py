"""The memory plan: parts by hand, passes against real tensors, advice that is enough, and nothing left behind."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config

import train
from lm.cache import CachedConversations
from lm.sampler import Sampler
from lm.scoring import Sequence, sequence_logprobs
from memory import machine
from memory.counting import Count, Shells
from memory.passes import Passes
from memory.plan import GIB, Plan, _changes, advice, describe, planned
from runlog.start import Run
from tests.settings import laptop
from tiny.loading import load_config
from tiny.warmstart import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = len(tiny_tokenizer())
# width 192, two layers, MLP 480, tied words: q k v o, gate up down, two norms; and the last norm
LINEAR = 2 * (4 * 192**2 + 3 * 192 * 480)
TINY = WORDS * 192 + LINEAR + 2 * 2 * 192 + 192
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
DEEP = LlamaConfig(vocab_size=WORDS, num_hidden_layers=6, tie_word_embeddings=True, eos_token_id=None, **SIZES)


def parts(phase: str, processes: int = 1, **changes) -> dict[str, float]:
    """Of a run on a GPU."""
    return next(p.parts for p in Plan(laptop(**changes), processes=processes).phases if p.name == phase)


# ---- what lasts ----


def test_the_exact_parts_by_hand():
    rollout, update = parts("rollout"), parts("update")
    assert rollout["weights"] == rollout["reference"] == update["gradients"] == 4 * TINY
    assert rollout["optimizer"] == 8 * TINY
    token = 2 * 2 * 192 * 4  # K and V, two layers, float32
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
    assert lora["optimizer"] == 2 * 4 * 2 * 4 * (4 * (192 + 192) + 3 * (192 + 480))  # A and B of seven linear layers
    assert parts("scoring", algo="opd", teacher="tiny")["teacher"] == 4 * TINY


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
    monkeypatch.setattr(machine, "there", lambda: 0.3 * GIB)
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
    shown = describe(laptop(shard=True)).splitlines()
    assert [text.split(":")[0] for text in shown[-5:]] == ["on 1 GPU", "on 2 GPUs", "on 4 GPUs", "on 8 GPUs", "disk"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert describe(laptop(shard=True)).splitlines()[-2].startswith("on 2 GPUs")


def test_a_model_of_two_layers_of_named_kinds_is_counted_whole():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    architecture = Qwen3Config(vocab_size=97, num_hidden_layers=2, head_dim=8, **sizes)
    assert len(architecture.layer_types) == 2
    (whole,) = Shells(architecture, "float32", 0).counted
    assert whole is architecture


@pytest.mark.parametrize("settings", [{"algo": "opid-full"}, {"algo": "oprd"}])
def test_advice_leaves_out_what_the_run_refuses(settings, monkeypatch):
    monkeypatch.setattr(machine, "there", lambda: 0.2 * GIB)
    line = planned(laptop(**settings), tiny_model(WORDS, seed=0), 2)
    assert "WARNING" in line and "--shard" not in line


def test_a_resumed_run_is_told_of_what_it_may_change(monkeypatch):
    monkeypatch.setattr(machine, "there", lambda: 0.2 * GIB)
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
