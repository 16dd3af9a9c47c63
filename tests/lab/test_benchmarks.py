"""The benchmarks run, on a tiny random model, and compare what they say they compare."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from lab.benchmarks import budget, efficiency, generation, iteration, processes, scale, trl_update
from lab.benchmarks.distillation import WAYS as DISTILLED
from lab.benchmarks.distillation import loss_of, rows_of
from lab.benchmarks.memory import measure
from lab.benchmarks.noise import scores_of, summary
from lab.benchmarks.precision import losses, seconds, steps
from lab.benchmarks.rollout import WAYS, exponent, played
from lab.benchmarks.score import difference, load, play, rows, ways
from lm.encoder import Encoder
from lm.packing import Sequence
from tiny.warmstart import tiny_model

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
    command = [sys.executable, "benchmarks/score.py", "--model", "random", "--turns", "2", "4", "--skills", "1"]
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


def test_flops_by_hand():
    model = tiny_model(100, seed=0, width=12, layers=1)
    weights = 4 * 12 * 12 + 3 * 12 * 30  # q, k, v, o; gate, up, down
    # five tokens see 1 + 2 + 3 + 4 + 5 keys; two of them are scored over 100 words
    expected = 2 * 5 * weights + 2 * 2 * 12 * 100 + 4 * 12 * 15
    assert efficiency.forward_flops(model, 5, 2, efficiency.causal(0, 5)) == expected
    assert efficiency.causal(3, 2) == 4 + 5


def test_flops_and_bare_products_are_those_that_torch_counts():
    model = tiny_model(100, seed=0, width=12, layers=2)
    sequences = [Sequence(list(range(8)), [(0, 3, 2), (1, 6, 2)])] * 2  # 16 tokens, 8 of them scored
    scoring, update = efficiency.reading(model, sequences, torch.float32)
    attention = efficiency.forward_flops(model, 0, 0, 2 * 36)
    for phase, times in ((scoring, 1), (update, 3)):
        assert (phase.tokens, phase.scored) == (16, 8)
        for work in (phase.work, phase.products):
            with FlopCounterMode(display=False) as counted:
                work()
            products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "attention" not in str(op))
            assert products == phase.flops - times * attention


def test_bare_products_come_in_the_chunks_of_the_output_layer(monkeypatch):
    model = tiny_model(100, seed=0, width=12, layers=1)
    multiply, shapes = torch.matmul, []
    monkeypatch.setattr(efficiency, "CHUNK", 300)  # three tokens
    monkeypatch.setattr(torch, "matmul", lambda a, b: shapes.append((*a.shape, b.shape[1])) or multiply(a, b))
    efficiency.products(model, 5, 4, torch.bfloat16)()
    assert shapes == [(5, 12, 12)] * 4 + [(5, 12, 30)] * 2 + [(5, 30, 12), (3, 12, 100), (1, 12, 100)]


def test_what_is_computed_twice_is_said(episode, monkeypatch):
    model = episode[0]
    assert "nothing twice" in efficiency.recomputed(model, 3, 1.0)
    monkeypatch.setattr(efficiency, "CHUNK", 1)
    flops = 10 * 2 * 3 * model.get_output_embeddings().weight.numel()
    assert "10.0% more FLOPs" in efficiency.recomputed(model, 3, flops)


def test_kinds_of_operators():
    kinds = {
        "aten::mm": "matmul",
        "aten::addmm": "matmul",
        "aten::add_": "elementwise",
        "aten::silu_backward": "elementwise",
        "aten::exp": "elementwise",
        "aten::expand": "other",
        "aten::_log_softmax_backward_data": "softmax",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "aten::_to_copy": "copies",
        "MmBackward0": "other",
    }
    assert {operator: efficiency.kind_of(operator) for operator in kinds} == kinds


def test_account_table_by_hand():
    kinds = {"copies": {"a": 0.5}, "matmul": {"b": 1.0, "c": 0.25, "d": 0.125, "e": 0.125}}
    lines = [line.split() for line in efficiency.account_table(kinds, 4.0).splitlines()]
    assert lines[0] == ["matmul", "37.5%", "b", "25.0%,", "c", "6.2%,", "d", "3.1%"]
    assert lines[1][:2] == ["copies", "12.5%"]
    assert lines[2][:3] == ["no", "operator", "50.0%"]


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_the_efficiency_command_accounts_for_every_phase(precision, monkeypatch, capsys):
    flags = f"--model random --turns 2 --new-tokens 3 --repeats 1 --precision {precision}"
    monkeypatch.setattr(sys, "argv", ["efficiency.py", *flags.split()])
    efficiency.main()
    shown = capsys.readouterr().out
    table = re.findall(r"^(scoring|update|decoding) .* ([\d.]+)%$", shown, re.MULTILINE)
    assert [name for name, _ in table] == ["scoring", "update", "decoding"]
    assert all(float(share) > 0 for _, share in table)
    assert len(re.findall(r"^  matmul ", shown, re.MULTILINE)) == len(re.findall(r"^  no operator ", shown, re.M)) == 3


def test_ways_to_decode_write_as_much_and_the_same(episode):
    model, encoder, _ = episode
    contexts = generation.prompts(encoder, "compact", 2)
    assert len(contexts[0]) != len(contexts[1])
    ends = model.generation_config.eos_token_id
    named = generation.ways(model, encoder.tokenizer, contexts, 5)
    assert list(named) == ["eager", "static", "compiled", "continuous"]
    new = {}
    for name in ("eager", "static", "continuous"):
        torch.manual_seed(0)
        new[name] = named[name]()
        assert [len(row) for row in new[name]] == [5, 5]
    model.destroy_cached_continuous_batching_manager()
    model.generation_config.eos_token_id = ends
    assert new["eager"] == new["static"]


def test_a_way_to_decode_that_fails_hides_no_other(episode):
    def fails():
        raise NotImplementedError("not on this device\nand a long story")

    named = {"eager": lambda: [[1, 2]], "static": fails, "compiled": lambda: [[1, 3]]}
    lines = [line.split() for line in generation.report(episode[0], named, 2)]
    assert lines[0][-2:] == ["the", "same"]
    assert " ".join(lines[1]) == "static unavailable: NotImplementedError: not on this device"
    assert lines[2][0] == "compiled" and lines[2][-1] == "others"


SMALL = scale.Size(episodes=2, turns=3, tokens=4, vocabulary=50, message=5, width=16, layers=1)


def test_scale_plays_and_scores_episodes_of_the_very_size():
    assert [len(ids) for ids in scale.play(scale.model_of(SMALL), SMALL)] == [3 * (5 + 4)] * 2
    contexts, responses = scale.steps(SMALL)
    assert [len(context) for context in contexts] == [5, 14, 23] * 2
    assert [len(response) for response in responses] == [4] * 6
    assert contexts[1][:9] == contexts[0] + responses[0]


def test_scale_measures_a_case_in_a_process_of_its_own():
    large = replace(SMALL, episodes=8, tokens=64, vocabulary=20000)  # 1536 scored tokens: 117 MiB of logits
    logits = 8 * 3 * 64 * 20000 * 4 / 2**20
    found = scale.measure("scoring", large, 16384, 1)
    assert logits < found["mib"] < 6 * logits and found["seconds"] > 0
    with pytest.raises(KeyError):
        scale.measure("no phase", SMALL, 16384, 1)


def test_exponents_and_figure_by_hand(tmp_path):
    axes = {"episodes": [2, 4], "turns": [3, 6]}
    sizes = [SMALL, replace(SMALL, episodes=4), replace(SMALL, turns=6)]
    seconds = {SMALL: 1.0, sizes[1]: 2.0, sizes[2]: 4.0}  # in proportion to episodes, to turns squared
    mib = {SMALL: 8.0, sizes[1]: 8.0, sizes[2]: 0.0}  # the same; nothing at all, of which there is no logarithm
    results = {(phase, size): {"seconds": seconds[size], "mib": mib[size]} for phase in scale.PHASES for size in sizes}
    lines = [line.split() for line in scale.exponents(axes, SMALL, results).splitlines()]
    assert lines[1] == ["episodes", *["1.00", "0.00"] * 3]
    assert lines[2] == ["turns", *["2.00", "nan"] * 3]
    scale.draw(axes, SMALL, results, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_the_scale_command_varies_one_size_at_a_time(monkeypatch, capsys):
    monkeypatch.setattr(scale, "measure", lambda phase, size, *_: {"seconds": size.turns, "mib": size.vocabulary})
    flags = "--episodes 1 2 --turns 2 4 8 --tokens 3 --vocabulary 10 20"
    monkeypatch.setattr(sys, "argv", ["scale.py", *flags.split()])
    scale.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = [" ".join(line[:4]) for line in lines if line[4:5] == ["rollout"] and line[0].isdigit()]
    assert sizes == ["1 4 3 20", "2 4 3 20", "2 2 3 20", "2 8 3 20", "2 4 3 10"]
    assert lines[-3][0] == "turns" and [float(power) for power in lines[-3][1:]] == [1, 0] * 3
    assert lines[-2] == ["tokens", *["nan"] * 6]


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


def test_the_processes_command_measures_sums_and_sampling(tmp_path):
    """The parts that need no whole run."""
    model = iteration.random_model(tmp_path / "model")
    processes.launch(2, "parts", str(tmp_path / "parts"), "--model", model, "--repeats", "1")
    found = json.loads((tmp_path / "parts.json").read_text())
    assert min(found["sums"]["buckets"], found["sums"]["tensors"], found["sampling"]["gathered"][0]) > 0


def test_a_budget_samples_the_same_tokens_in_less(tmp_path):
    model = iteration.random_model(tmp_path)
    flags = "--prompt compact --tasks 8 --rollouts 8 --max-steps 3 --context-limit 512 --max-new-tokens 8"
    argv = ["--model", model, *flags.split()]
    whole, quarter = (budget.measured(rows * 512, 1, argv) for rows in (64, 8))
    assert budget.same_share(whole["said"], quarter["said"]) > 0.9
    assert quarter["mib"] < 0.7 * whole["mib"]


@pytest.mark.parametrize("way", DISTILLED)
def test_each_way_to_a_teacher_has_a_gradient_and_none_at_itself(way, llama, tokenizer):
    torch.manual_seed(0)
    rows = rows_of(32, 2, len(tokenizer))
    for seed, moved in ((5, True), (0, False)):
        llama.zero_grad()
        teacher = tiny_model(len(tokenizer), seed=seed, width=48) if moved else llama
        loss_of(way, llama, teacher, *rows).backward()
        size = sum(p.grad.abs().sum().item() for p in llama.parameters() if p.grad is not None)
        assert (size > 1e-2) is moved
