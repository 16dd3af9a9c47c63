"""What test_processes.py checks in groups of processes: run as a script, since a process that has imported PyTorch once
can be forked in no time, and pytest's own has threads that a fork does not survive.

python tests/sharded.py FOLDER        # FOLDER/results.json: name of a check -> "" or what went wrong, by process
"""

import copy
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed
from transformers import Qwen2Config, Qwen2ForCausalLM

import lm.processes
import lm.scoring
from data import Guidance
from envs.alfworld import AlfworldEnv, generate_games
from lm.encoder import Encoder
from lm.loading import AdapterOff, add_lora, frozen_copy, save_policy
from lm.obstacles import unwrapped
from lm.processes import clip_gradients, even, gathered, is_sharded, shard, sum_gradients, whole
from lm.sampler import Sampler
from lm.scoring import Sequence, micro_batches
from rescore import rescore
from runlog import checkpoints
from tests.playing import play
from tests.settings import laptop
from tiny.warmstart import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def forked(count: int, work: Callable[[], None], folder: Path) -> list[str]:
    """Runs `work` in a new group of `count` processes -> what went wrong in each, "" where nothing did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            told = folder / f"told{rank}"
            told.unlink(missing_ok=True)
            try:
                places = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": count}
                distributed.init_process_group("gloo", **places, timeout=timedelta(seconds=40))
                work()
                told.write_text("")
            except BaseException:
                told.write_text(traceback.format_exc())
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [(folder / f"told{rank}").read_text() for rank in range(count)]


def qwen(seed: int = 0, **changes):
    """Random, with tied embeddings; its log-probs are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 4, "vocab_size": 211, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **tokens, **({"tie_word_embeddings": True} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def close(a, b, bound: float = 1e-6) -> None:
    a, b = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() <= bound, (a - b).abs().max()


# ---- the update ------------------------------------------------------------------------------------------------------


def sequences_of(rank: int) -> list[Sequence]:
    """Of unequal number and length: three micro-batches of 10 tokens in process 0, two in 1, none in 2."""
    draw = torch.Generator().manual_seed(rank)
    sizes = ((7, 5, 9), (11, 6), ())[rank]
    rows = [torch.randint(5, 200, (size,), generator=draw).tolist() for size in sizes]
    return [Sequence(row, [(i, 2, len(row) - 2)]) for i, row in enumerate(rows)]


def backward(model, ranks: range, bf16: bool) -> None:
    tokens = sum(size for r in range(3) for s in sequences_of(r) for _, _, size in s.responses)
    model.train()
    batches = [batch for rank in ranks for batch in micro_batches(sequences_of(rank), 10)]
    for batch in even(batches, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logprobs, at = lm.scoring.sequence_logprobs(model, batch, 1.0)
        assert torch.zeros(3, 20)[at].shape == logprobs.shape  # of none, too
        (-logprobs.sum() / tokens).backward()


def update(make: Callable, **how) -> Callable[[Path], None]:
    return lambda folder: updates(make, **how)


def updates(make: Callable, *, chunk: int, checkpointing: bool, bf16: bool) -> None:
    """The gradients, their norm, and three steps of AdamW, by a sharded model and by one that is not."""
    lm.scoring.CHUNK = chunk  # logits that are alive at a time
    own, one, mine = make(), make(), range(distributed.get_rank(), distributed.get_rank() + 1)
    shard([own], CPU)
    for model in (own, one):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (own, one)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3) for parameters in trained]
    for _ in range(3):
        backward(own, mine, bf16)
        backward(one, range(3), bf16)
        assert is_sharded(own.parameters()) and all(p.grad is not None for p in trained[0])
        norms = [clip_gradients(parameters, 0.1) for parameters in trained]
        assert norms[1] > 0.2
        close(*norms, 1e-4 * norms[1])
        for a, b in zip(*trained, strict=True):
            close(a.grad, b.grad, 1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(own.parameters(), one.parameters(), strict=True):
        close(a, b, 1e-5)


def untied():
    return qwen(tie_word_embeddings=False)


def lora():
    torch.manual_seed(0)
    model = add_lora(qwen(), 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which are 0 at first
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def spoilt_gradient(folder: Path) -> None:
    model = qwen()
    shard([model], CPU)
    backward(model, range(distributed.get_rank(), distributed.get_rank() + 1), False)
    assert clip_gradients(list(model.parameters()), 1.0).isfinite()
    if distributed.get_rank() == 1:
        next(model.parameters()).grad.to_local().view(-1)[0] = float("nan")
    assert not clip_gradients(list(model.parameters()), 1.0).isfinite()


def bucket_sums(folder: Path) -> None:
    rank, count = distributed.get_rank(), distributed.get_world_size()
    shapes = [(3, 5), (7,), (), (2, 2, 2), (40,), (4,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.insert(3, torch.nn.Parameter(torch.zeros(6, dtype=torch.bfloat16)))
    lm.processes.BUCKET = 100  # bytes
    parts = list(lm.processes.buckets(parameters, 100))
    assert [[p.numel() for p in part] for part in parts] == [[15, 7, 1], [6], [8], [40], [4]]
    for i, parameter in enumerate(parameters):
        if (i + rank) % 3:  # of some no process, of some not every one has a gradient
            parameter.grad = torch.full_like(parameter, 10.0**rank)
    sum_gradients(parameters)
    for i, parameter in enumerate(parameters):
        expected = sum(10.0**r for r in range(count) if (i + r) % 3)
        assert parameter.grad.shape == parameter.shape and (parameter.grad == expected).all()


# ---- what has no gradient --------------------------------------------------------------------------------------------


def scores_and_samples(folder: Path) -> None:
    """Policy, reference (its adapters off) and a frozen copy score plain contexts, episode skills and step-skill
    branches; each process has tokens of its own, and samples more or fewer of them than the others."""
    tokenizer, rank = tiny_tokenizer(), distributed.get_rank()
    encoder = Encoder(tokenizer, "chat")
    torch.manual_seed(0)
    plain = {"old": tiny_model(len(tokenizer), seed=0, width=48), "copy": tiny_model(len(tokenizer), seed=1, width=48)}
    plain["policy"] = add_lora(tiny_model(len(tokenizer), seed=2, width=48), 4)
    own = {name: copy.deepcopy(model).requires_grad_(name == "policy") for name, model in plain.items()}
    for models in (plain, own):
        models["reference"] = AdapterOff(models["policy"])
    shard(own.values(), CPU)
    with gathered(own["copy"]):  # by a process that has nothing to do
        assert not is_sharded(own["copy"].parameters())
    assert is_sharded(own["copy"].parameters())
    assert sum(p.to_local().numel() for p in own["old"].parameters()) < 0.6 * plain["old"].num_parameters()
    games = generate_games(folder / f"games{rank}", "train", 2, 0, size="small")
    limits = {"max_new_tokens": 6, "context_limit": 4096}
    env = lambda: AlfworldEnv(prompt="compact", max_steps=3 + 2 * rank)
    trajectories, _ = play(plain["old"].eval(), encoder, env, games, 1, **limits)
    routes = [
        [(Guidance("step" if i % 2 else "episode", "look in bed"),) for i in range(len(t.steps))] for t in trajectories
    ]
    none = [None] * len(trajectories)
    for scorer, reference in (("old", "reference"), ("reference", "reference"), ("reference", "copy")):
        batches = []
        for models in (own, plain):
            config = laptop(scorer=scorer, context_limit=4096, kl=0.1)
            known = models | {"reference": models[reference]}
            reading = lambda *models: all_gathered(models)
            stub = SimpleNamespace(config=config, models=known, encoder=encoder, levels=config.levels, reading=reading)
            batches.append(rescore(stub, trajectories, none, routes)[0])
            assert is_sharded(own[reference].parameters())
        ours, theirs = (
            [
                batch.old_logprobs,
                batch.reference_logprobs,
                *(batch.skill_logprobs[level] for level in ("episode", "step")),
            ]
            for batch in batches
        )
        for a, b in zip(ours, theirs, strict=True):
            assert b.isfinite().any() and torch.equal(a.isnan(), b.isnan())
            close(a.nan_to_num(), b.nan_to_num())
    contexts = [step.context for trajectory in trajectories for step in trajectory.steps]
    for name in plain:
        said = []
        for models in (own, plain):
            torch.manual_seed(rank)
            sampler = Sampler(models[name], tokenizer, max_new_tokens=4 + 3 * rank, temperature=1.0)
            with gathered(models[name]):
                said.append([sampler([0, 1], contexts[:2]) for _ in range(1 + rank)])  # nobody waits for the other
        assert said[0] == said[1]
        assert is_sharded(own[name].parameters())
        assert not unwrapped(own[name])._get_fsdp_state()._comm_ctx.post_forward_order


@contextmanager
def all_gathered(models):
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(gathered(model))
        yield


def frozen_in_less(folder: Path) -> None:
    """Weights of two types in one model: its linear layers in bfloat16, the rest in float32."""
    whole_one = qwen().eval()
    less = frozen_copy(whole_one, "auto", mixed_precision="bf16")
    assert {p.dtype for p in less.parameters()} == {torch.float32, torch.bfloat16}
    sequences = sequences_of(distributed.get_rank())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        shard([less], CPU)
        with gathered(less):
            scores = [lm.scoring.sequence_logprobs(model, sequences, 1.0)[0] for model in (less, whole_one)]
    assert torch.equal(*scores)


def final_policies(folder: Path) -> None:
    for name, make in (("full", qwen), ("lora", lora)):
        model, one = make(), make()
        shard([model], CPU)
        gathered_one = whole(model)
        assert (gathered_one is None) == (distributed.get_rank() > 0)
        if gathered_one is not None:
            save_policy(gathered_one, tiny_tokenizer(), folder / name)
            save_policy(one, tiny_tokenizer(), folder / f"{name}-plain")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def trainee(seed: int, sharded: bool):
    """(model, optimizer that has taken a step with seed 0 and none with others)"""
    model = qwen(seed)
    if sharded:
        shard([model], CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if seed == 0:
        ranks = range(distributed.get_rank(), distributed.get_rank() + 1) if sharded else range(3)
        backward(model, ranks, False)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_both(folder: Path) -> None:
    """What is the same up to rounding, as shards of this many processes and as one file."""
    sharded, plain = trainee(0, True), trainee(0, False)
    count = distributed.get_world_size()
    (folder / f"by{count}").mkdir(exist_ok=True)
    checkpoints.save(folder / f"by{count}", 7, *sharded, {"seen": {3: "x"}})
    if distributed.get_rank() == 0:
        checkpoints.save(folder / f"by{count}", 8, *plain, {"seen": {3: "x"}})


def loads(path: Path, sharded: bool) -> None:
    """A checkpoint of any kind, into models that are sharded or not: the numbers of `trainee(0)`."""
    expected, (model, optimizer) = trainee(0, False), trainee(5, sharded)
    assert checkpoints.load(path, model, optimizer) == {"seen": {3: "x"}}
    for a, b in zip(model.parameters(), expected[0].parameters(), strict=True):
        assert hasattr(a, "full_tensor") == sharded
        close(a, b)
    states = [each.state_dict() for each in (optimizer, expected[1])]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for i, moments in states[1]["state"].items():
        for name, value in moments.items():
            close(states[0]["state"][i][name], value)
            assert hasattr(states[0]["state"][i][name], "full_tensor") == (sharded and name != "step")
    if sharded:
        backward(model, range(0), False)  # it goes on
        optimizer.step()


def loader(path: str, sharded: bool) -> Callable[[Path], None]:
    return lambda folder: loads(folder / path, sharded)


# name -> (processes, what each of them does), in this order
CHECKS: dict[str, tuple[int, Callable[[Path], None]]] = {
    "update": (3, update(qwen, chunk=2**25, checkpointing=False, bf16=False)),
    "update with a chunked tied head": (3, update(qwen, chunk=500, checkpointing=True, bf16=False)),
    "update with a chunked head in bfloat16": (3, update(untied, chunk=500, checkpointing=True, bf16=True)),
    "update of LoRA": (3, update(lora, chunk=2**25, checkpointing=True, bf16=False)),
    "a gradient that is no number is seen by all": (2, spoilt_gradient),
    "buckets sum as tensors do": (3, bucket_sums),
    "gathered models score and sample alike": (2, scores_and_samples),
    "a frozen model in less is gathered as it was": (2, frozen_in_less),
    "the final policy is whole": (2, final_policies),
    "save by 2": (2, save_both),
    "save by 3": (3, save_both),
    "shards of 2 read by 3": (3, loader("by2/000007.shards", True)),
    "shards of 3 read by 2": (2, loader("by3/000007.shards", True)),
    "shards of 3 read by 1": (1, loader("by3/000007.shards", False)),
    "one file read by 2": (2, loader("by2/000008.pt", True)),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for name, (count, check) in CHECKS.items():
        results[name] = forked(count, partial(check, folder), folder)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
