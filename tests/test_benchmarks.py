"""The scoring benchmarks run, on a tiny random model, and compare what they say they compare."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.memory import measure
from benchmarks.noise import scores_of, summary
from benchmarks.score import difference, load, play, rows, ways
from rollout import Encoder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def episode():
    model, tokenizer, prompt = load("random")
    encoder = Encoder(tokenizer, "chat")
    return model, encoder, play(model, encoder, prompt, 6)


def test_three_ways_score_the_same_and_the_tree_reads_least(episode):
    model, encoder, trajectory = episode
    contexts, responses, guided = rows(encoder, trajectory, 6, skills=3)
    assert [context is not None for context in guided] == [True, False, True, False, True, False]
    found = ways(model, contexts, responses, guided)
    scores = {name: score() for name, (score, _) in found.items()}
    assert difference(scores["per step"], scores["packed"]) < 1e-5
    assert difference(scores["per step"], scores["tree"]) < 1e-5
    tokens = [tokens for _, tokens in found.values()]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == 3
    assert tokens[0] == sum(len(c) + len(responses[i]) for cs in (contexts, guided) for i, c in enumerate(cs) if c)


def test_without_skills_the_tree_reads_what_the_packed_scheme_reads(episode):
    model, encoder, trajectory = episode
    found = ways(model, *rows(encoder, trajectory, 6, skills=0))
    assert found["tree"][1] == found["packed"][1] < found["per step"][1]


def test_noise_compares_layouts_of_the_same_tokens(episode):
    model, encoder, trajectory = episode
    layouts, shift = scores_of(model, *rows(encoder, trajectory, 6, skills=6))
    assert set(layouts) == {"per step", "packed", "tree"}
    noise = (layouts["tree"] - layouts["per step"]).abs().nan_to_num().max()
    assert noise < 1e-5 < shift.abs().nan_to_num().max()
    assert summary(torch.tensor([float("nan"), -1.0, 3.0])).split() == ["2.0e+00", "1.0e+00", "3.0e+00", "3.0e+00"]


def test_the_score_command_prints_a_row_a_way():
    command = [sys.executable, "benchmarks/score.py", "--model", "random", "--turns", "2", "4", "--skills", "1"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--per-step-turns", "2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = re.findall(r"^ +(\d) +(\d)  (per step|packed|tree) ", done.stdout, re.MULTILINE)
    rows_of = {"2": ("per step", "packed", "tree"), "4": ("packed", "tree")}
    assert table == [(turns, "1", way) for turns, named in rows_of.items() for way in named]


def test_memory_is_that_of_the_pass_alone():
    logits = 700 * 49152 * 4 / 2**20  # MiB; with their log-softmax and its gradient three times that
    assert 2 * logits < measure("at once", tokens=700, vocabulary=49152)["mib"] < 4 * logits
    with pytest.raises(RuntimeError, match="no way, 8 tokens"):
        measure("no way", tokens=8, vocabulary=-1)
