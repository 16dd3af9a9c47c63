"""What has to hold on the device: on a GPU where there is one (`make gpu-check`), else on the CPU."""

import copy
import json
from pathlib import Path

import pytest
import torch

import runlog.start as start_module
from config import parse_args, variant_of
from envs.alfworld import AlfworldEnv
from lm.encoder import Encoder
from lm.loading import frozen_copy
from lm.obstacles import check_gap, logprob_gap
from lm.processes import Offload
from lm.sampler import Sampler
from lm.scoring import pack, sequence_logprobs
from rescore import response_logprobs, tree_logprobs
from rollout import rollout
from runlog.start import start
from train import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BFLOAT16 = (False, True)


def autocast(enabled: bool):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled)


@pytest.fixture
def model(llama, tokenizer):
    llama.generation_config.eos_token_id = list(range(4, len(tokenizer), 5))  # rows end early: padding inside them
    return llama.to(DEVICE)


@pytest.fixture
def played(model, tokenizer, compact_env, games):
    """-> a function that plays six episodes: (trajectories, contexts, responses, log-probs when sampled)."""

    def play(bfloat16=False, **options):
        torch.manual_seed(0)
        sampler = Sampler(model, tokenizer, max_new_tokens=8, temperature=1.0, record=True, **options)
        with autocast(bfloat16):
            trajectories, _ = rollout(sampler, Encoder(tokenizer, "chat"), compact_env, games[:3], 2, context_limit=512)
        steps = [step for trajectory in trajectories for step in trajectory.steps]
        return trajectories, [s.context for s in steps], [s.response for s in steps], [s.logprobs for s in steps]

    return play


@pytest.mark.parametrize("bfloat16", BFLOAT16)
def test_what_is_sampled_is_what_is_scored(bfloat16, model, played):
    _, contexts, responses, sampled = played(bfloat16)
    with autocast(bfloat16):
        scored = response_logprobs(model, contexts, responses, token_budget=2048)
    check_gap(*logprob_gap(sampled, scored), torch.bfloat16 if bfloat16 else torch.float32)


def test_neither_the_cache_nor_a_budget_nor_pieces_change_a_token(played):
    plain = played(reuse_cache=False)[0]
    ways = ({}, {"rollout_budget": 2 * 512}, {"token_budget": 40}, {"rollout_budget": 1, "token_budget": 7})
    for options in ways:
        others = played(**options)[0]
        same = [a.response == b.response for x, y in zip(plain, others, strict=True) for a, b in zip(x.steps, y.steps)]
        assert sum(same) >= 0.98 * len(same), options  # another layout rounds otherwise, and a draw may fall between


def test_packed_per_step_and_branches_are_one(model, played):
    _, contexts, responses, _ = played()
    branches = [[*c[:-3], 50, 51, *c[-3:]] if i % 3 == 0 else None for i, c in enumerate(contexts)]
    packed = response_logprobs(model, contexts, responses, token_budget=2048)
    apart = response_logprobs(model, contexts, responses, token_budget=1, packed=False)
    trunk, branch = tree_logprobs(model, contexts, responses, branches, token_budget=2048)
    alone = response_logprobs(model, branches, responses, token_budget=1, packed=False)
    for a, b in ((packed, apart), (trunk, apart), (branch, alone)):
        assert torch.equal(a.isnan(), b.isnan())
        assert (a - b).abs().nan_to_num().max() < 1e-3


def test_chunks_of_logits_give_the_same_numbers_and_gradients(model, played, monkeypatch):
    _, contexts, responses, _ = played()
    sequences = pack(contexts, responses)[:3]
    found = []
    for chunk in (2**25, 3000):
        monkeypatch.setattr("lm.scoring.CHUNK", chunk)
        model.zero_grad()
        logprobs = sequence_logprobs(model, sequences, 1.0)[0]
        logprobs.sum().backward()
        found.append((logprobs.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (whole, gradients), (chunked, others) = found
    assert (whole - chunked).abs().max() < 1e-4
    assert all((a - b).abs().max() <= 1e-3 * max(1, a.abs().max()) for a, b in zip(gradients, others, strict=True))


def test_frozen_weights_in_less_give_the_same_numbers(model, played):
    _, contexts, responses, _ = played()
    with autocast(True):
        copies = [frozen_copy(model, dtype, mixed_precision="bf16") for dtype in ("float32", "auto")]
        whole, less = (response_logprobs(copied, contexts, responses, token_budget=2048) for copied in copies)
    assert torch.equal(whole.nan_to_num(), less.nan_to_num())


FLAGS = "--tasks 2 --rollouts 2 --max-steps 4 --max-new-tokens 6 --train-games 6 --eval-games 2 --eval-every 0 "
FLAGS += "--mini-batch 8 --learning-rate 1e-3 --save-every 1 --invalid-penalty 1 --iterations 2"


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--mixed-precision bf16 --gradient-checkpointing",
        "--scorer reference --offload",
        "--algo opid-full --offload",
    ],
)
def test_a_run_trains_and_goes_on(more, tmp_path, monkeypatch, llama, tokenizer, own_precision):
    if DEVICE.type == "cpu":
        more = more.replace("--offload", "")
    monkeypatch.setattr(AlfworldEnv, "parse_action", lambda self, text, admissible: (text, len(text) % 2 == 0))
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: (copy.deepcopy(llama), tokenizer))
    answer = '{"episode_summary": "s", "episode_skill": "open every closed place", "step_skills": {"1": "look in bed"}}'
    monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: lambda prompts: [answer] * len(prompts))
    argv = [*FLAGS.split(), *more.split(), "--out", str(tmp_path / "run")]
    before = [p.detach().clone() for p in llama.parameters()]
    for further in ([], ["--resume", "--iterations", "3"]):
        config = parse_args([*argv, *further])
        train(start(config), variant_of(config.algo))
    records = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert all(record["grad_norm"] > 0 and record["advantage/skill_abs"] > 0 for record in records)
    trained = torch.load(tmp_path / "run/checkpoints/000002.pt", weights_only=True)["model"].values()
    assert any(not torch.equal(a, b.cpu()) for a, b in zip(before, trained, strict=True))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU's memory is counted for the whole process")
def test_offloaded_weights_leave_the_gpu():
    model = torch.nn.Linear(2048, 2048).to(DEVICE)  # 16 MiB
    offload = Offload(DEVICE, wanted=True)
    before = torch.cuda.memory_allocated()
    offload.rest(model)
    assert before - torch.cuda.memory_allocated() >= 2**24
    with offload.needed(model):
        assert before - torch.cuda.memory_allocated() < 2**20
