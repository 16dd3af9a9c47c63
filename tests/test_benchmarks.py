"""The benchmarks run, on a tiny random model, and compare what they say they compare."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import iteration, skill_writing, trl_update
from benchmarks.memory import measure
from benchmarks.noise import scores_of, summary
from benchmarks.rollout import WAYS, exponent, played
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


def test_three_ways_to_play_sample_the_same_and_compacting_takes_less_room(episode):
    model, encoder, _ = episode
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(4, len(encoder.tokenizer), 5))
    runs = {way: played(model, encoder, "compact", 12, 6, 24, way) for way in WAYS}
    model.generation_config.eos_token_id = ends
    said = [run[1] for run in runs.values()]
    assert said[0] == said[1] == said[2]
    assert [len(episode) for episode in said[0]] == [12] * 6
    assert 0 == runs["re-read"][2] < runs["compacted"][2] < runs["cached"][2]


def test_exponent_by_hand():
    assert exponent([5, 10, 20], [3 * t**1.5 for t in (5, 10, 20)]) == pytest.approx(1.5)
    assert math.isnan(exponent([5], [1.0]))


def test_three_ways_to_write_skills_and_the_cached_one_reads_least(episode):
    model, encoder, _ = episode
    trajectories, sampler, _ = skill_writing.play(model, encoder, "compact", 6, 3, keep=True)
    assert [len(t.steps) for t in trajectories] == [6, 5, 4]
    answers, first = {}, {}
    for name, write in skill_writing.ways(model, encoder, trajectories, sampler, "{task} {steps} write", 5).items():
        torch.manual_seed(0)
        with skill_writing.counting(model) as shapes:
            answers[name] = write()
        first[name] = shapes[0]
    assert answers["conversation"] == answers["cached"] != answers["prompt"]
    assert first["conversation"][1] > max(len(t.steps[-1].context) for t in trajectories)
    assert first["cached"][1] < first["conversation"][1] / 3
    assert {rows for rows, _ in first.values()} == {3}


def test_iteration_table_by_hand():
    opid = {"rollout": 2.0, "skills": 1.0, "rescore": 1.5, "update": 2.0}
    grpo = {"rollout": 2.0, "skills": 0.0, "rescore": 0.5, "update": 1.5}
    lines = [line.split() for line in iteration.table(opid, grpo).splitlines()]
    assert lines[2] == ["skills", "1.000", "0.000", "25.0%"]
    assert lines[-1] == ["all", "6.500", "4.000", "62.5%"]


def test_the_iteration_command_times_every_phase(monkeypatch, capsys):
    small = "--tasks 1 --rollouts 2 --max-steps 2 --max-new-tokens 4 --train-games 2 --skill-tokens 4"
    monkeypatch.setattr(sys, "argv", f"iteration.py --model random --repeats 1 -- {small}".split())
    iteration.main()
    shown = capsys.readouterr().out
    found = {line.split()[0]: line.split()[1:] for line in shown[shown.index("phase ") :].splitlines()[1:]}
    assert all(float(found[phase][0]) > 0 for phase in iteration.PHASES)
    assert float(found["skills"][1]) == 0 < float(found["update"][1])


def test_both_updates_get_the_same_tokens(tmp_path):
    work = {"prompts": [[5, 6], [5, 6, 7, 8], [9]], "completions": [[1, 2], [3], [4, 4, 4]], "token_budget": 14}
    first, second = trl_update.padded(work, pad=0)  # the longest row has 4 + 3 cells, so two rows a micro-batch
    assert first["prompt_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 5, 6]]
    assert first["completion_mask"].tolist() == [[1, 0], [1, 1]]
    assert second["prompt_ids"].tolist() == [[9]] and second["completion_ids"].tolist() == [[4, 4, 4]]
    assert {first["num_items_in_batch"].item(), second["num_items_in_batch"].item()} == {6.0}
    work |= {"model": iteration.random_model(tmp_path / "model"), "learning_rate": 1e-3, "repeats": 1}
    assert trl_update.ours(json.loads(json.dumps(work))) > 0
