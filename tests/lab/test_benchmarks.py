"""The benchmarks run, on a tiny random model, and compare what they say they compare."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from lab.benchmarks import budget, iteration, processes, trl_update
from lab.benchmarks.memory import measure
from lab.benchmarks.noise import scores_of, summary
from lab.benchmarks.precision import losses, seconds, steps
from lab.benchmarks.rollout import WAYS, exponent, played
from lab.benchmarks.score import difference, load, play, rows, ways
from lm.encoder import Encoder

ROOT = Path(__file__).parent.parent.parent


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
    command = [sys.executable, "lab/benchmarks/score.py", "--model", "random", "--turns", "2", "4", "--skills", "1"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--per-step-turns", "2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = re.findall(r"^ +(\d) +(\d)  (per step|packed|tree) ", done.stdout, re.MULTILINE)
    rows_of = {"2": ("per step", "packed", "tree"), "4": ("packed", "tree")}
    assert table == [(turns, "1", way) for turns, named in rows_of.items() for way in named]


def test_both_precisions_take_their_turns_and_leave_no_gradient(llama):
    gone = []
    taken = seconds({name: lambda name=name: gone.append(name) for name in ("a", "b")}, 2)
    assert gone == ["a", "b"] * 3 and taken.keys() == {"a", "b"}  # the first pair does not count
    for go in (*losses(llama, 8).values(), *steps(words=50).values()):
        go()
    assert all(p.grad is None for p in llama.parameters())


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


def test_traffic_by_hand():
    """Of four processes, of which none is there: what one of them sends."""
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        counted, whole, part = processes.Traffic(4), torch.zeros(100), torch.zeros(25)
        with counted:
            for counted.phase, work in (
                ("sum", lambda: torch.distributed.all_reduce(whole)),
                ("gather", lambda: torch.distributed.all_gather_into_tensor(whole, part)),
                ("scatter", lambda: torch.distributed.reduce_scatter_tensor(part, whole)),
                ("nothing", lambda: whole + whole),
            ):
                work()
    finally:
        torch.distributed.destroy_process_group()
    assert dict(counted.sent) == {"sum": 2 * 3 * 100, "gather": 3 * 100, "scatter": 3 * 100}


def test_table_of_processes_by_hand():
    seconds, sent = dict.fromkeys(processes.PHASES, 1.5), dict.fromkeys(processes.PHASES, 0.25)
    lines = processes.table({"a": {"seconds": seconds, "sent": sent}}, {"a": 7.0}).splitlines()
    assert lines[-2].split() == ["all", "6.00", "1.0"] and lines[-1].split() == ["peak", "MiB", "7"]


def test_the_processes_command_measures_sampling(tmp_path):
    """The part that needs no whole run."""
    model = iteration.random_model(tmp_path / "model")
    processes.launch(2, "sampling", str(tmp_path / "sampling"), "--model", model, "--repeats", "1")
    found = json.loads((tmp_path / "sampling.json").read_text())
    assert found["gathered"][0] > 0 and found["synced"][0] > 0


def test_traffic_is_told_by_phase(tmp_path):
    model = iteration.random_model(tmp_path / "model")
    small = "--prompt compact --tasks 2 --rollouts 1 --max-steps 2 --max-new-tokens 4 --train-games 2 --skill-tokens 4"
    processes.launch(2, "traffic", str(tmp_path / "traffic"), "--model", model, "--", *small.split())
    sent = json.loads((tmp_path / "traffic.json").read_text())
    weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 2**20  # in float32
    assert list(sent) == list(iteration.PHASES)
    assert sent["update"] == pytest.approx(weights, rel=0.05)  # a ring of two sends the gradients' size once
    assert max(sent[phase] for phase in ("rollout", "skills", "rescore")) < 0.01 * weights


def test_a_budget_samples_the_same_tokens_in_less(tmp_path):
    model = iteration.random_model(tmp_path)
    flags = "--prompt compact --tasks 8 --rollouts 8 --max-steps 3 --context-limit 512 --max-new-tokens 8"
    argv = ["--model", model, *flags.split()]
    whole, quarter = (budget.measured(rows * 512, 1, argv) for rows in (64, 8))
    assert budget.same_share(whole["said"], quarter["said"]) > 0.9
    assert quarter["mib"] < 0.7 * whole["mib"]
