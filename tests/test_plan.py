"""The memory plan: exact parts by hand, activations against a real model, and a plan leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runlog.plan as planning
from config import Config
from runlog.plan import format_plan, peak, plan
from tiny.loading import load_config
from tiny.warmstart import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = len(tiny_tokenizer())
# width 192, two layers, MLP 480, tied words: q k v o, gate up down, two norms; and the last norm
TINY = WORDS * 192 + 2 * (4 * 192**2 + 3 * 192 * 480 + 2 * 192) + 192


def sizes(**changes) -> dict[str, float]:
    return {part.name: part.size for part in plan(Config(**changes))}


def test_the_exact_parts_by_hand():
    parts = sizes(scorer="ema", tasks=2, rollouts=3, context_limit=100, skill_context_limit=150)
    assert parts["weights"] == parts["reference copy"] == parts["EMA copy"] == parts["gradients"] == 4 * TINY
    assert parts["optimizer"] == 8 * TINY
    assert parts["KV cache"] == 2 * 3 * 150 * (2 * 2 * 192 * 4)  # tokens x (K and V, two layers, float32)
    assert parts["logits"] == 3 * 4 * 4096 * WORDS
    assert abs(parts["autocast copies"]) < 2**16


def test_settings_move_the_parts_that_they_should():
    base, half, bf16 = sizes(), sizes(token_budget=2048), sizes(mixed_precision="bf16")
    assert half["activations"] == pytest.approx(base["activations"] / 2)
    assert bf16["weights"] == base["weights"]
    assert bf16["KV cache"] == base["KV cache"] / 2
    assert bf16["activations"] < base["activations"]
    assert bf16["autocast copies"] == pytest.approx(2 * (TINY - WORDS * 192), rel=0.02)  # linear layers in bfloat16
    assert sizes(gradient_checkpointing=True)["activations"] < 0.6 * base["activations"]
    lora = sizes(lora_rank=4)
    assert lora["reference copy"] == 0
    assert lora["optimizer"] == 2 * 4 * 2 * 4 * (4 * (192 + 192) + 3 * (192 + 480))  # A and B of seven linear layers
    assert sizes(algo="opd", teacher="tiny")["teacher"] == 4 * TINY
    assert sizes(algo="grpo")["KV cache"] == 128 * 1024 * (2 * 2 * 192 * 4)


def test_activations_are_what_a_real_model_saves():
    model = tiny_model(WORDS, seed=0)
    mine = {p.data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in mine:
            saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(4, 128, dtype=torch.long), use_cache=False)
    total = sum(size for size, _ in saved.values())
    assert sizes(token_budget=512)["activations"] == pytest.approx(total, rel=0.1)


def test_the_peak_is_what_lasts_and_the_larger_phase():
    part = planning.Part
    parts = [part("a", 1, "always", ""), part("b", 5, "sampling", ""), part("c", 3, "update", "")]
    assert peak([*parts, part("d", 3, "update", "")]) == 7
    assert peak(parts) == 6
    assert "peak, estimated" in format_plan(parts)


def test_the_configuration_is_that_of_the_loaded_model():
    config = load_config("smollm2")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (load_config("tiny").hidden_size, load_config("tiny").vocab_size) == (192, WORDS)


def test_plan_prints_and_starts_nothing(tmp_path):
    command = [sys.executable, "train.py", "--plan", "--out", str(tmp_path / "run"), "--mixed-precision", "bf16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "KV cache" in done.stdout
    assert float(done.stdout.split("peak, estimated")[1].split()[0]) > 100
    assert not (tmp_path / "run").exists()
