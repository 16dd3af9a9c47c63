"""One update towards a teacher, five ways: python benchmarks/distillation.py [--tokens 1024] [--layers 12]

    sampled      the teacher's log-probs of the sampled tokens (--algo opd)
    reverse      KL over the whole vocabulary (--divergence reverse): no more than CHUNK logits alive
    top-k        the same over the teacher's 16 likeliest words and the rest as one (--top-k 16)
    oprd all     hidden states of every layer (--algo oprd)
    oprd last    of the last one (--oprd-layers last)

A random Llama and a teacher of the same shape read S sequences of which three quarters are response tokens: the
teacher's pass, the policy's, and the backward pass. Each way in a process of its own: the median time of --repeats
updates, and the peak above what weights, gradients and an update on eight tokens had taken. Runs on the GPU where there
is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from baselines.divergences import divergence
from baselines.oprd import representation_loss
from lm.logprobs import sequence_logprobs
from lm.packing import pack
from lm.states import States, divergences, layer_states, sequence_states
from rescore import response_logprobs
from runlog.memory import peak_mib, reset_peak

WAYS = ("sampled", "reverse", "top-k", "oprd all", "oprd last")
MEASURES = {"reverse": partial(divergence, "reverse"), "top-k": partial(divergence, "reverse", top_k=16)}


def loss_of(way: str, policy, teacher, contexts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """The teacher's pass and the loss of one update, whose gradient is that of training."""
    sequences, budget = pack(contexts, responses), {"token_budget": sum(map(len, contexts)) + sum(map(len, responses))}
    if way == "sampled":
        theirs = response_logprobs(teacher, contexts, responses, **budget)
        new, rows, columns = sequence_logprobs(policy, sequences, 1.0)  # (N,) each
        shift = theirs[rows.cpu(), columns.cpu()].to(new.device) - new.detach()  # (N,)
        return -(shift * new).mean()
    if way in MEASURES:
        states = States(teacher, len(responses), max(map(len, responses)))
        response_logprobs(teacher, contexts, responses, **budget, states=states)
        own, _, rows, columns = sequence_states(policy, sequences)
        return divergences(policy, own, states, rows.cpu(), columns.cpu(), MEASURES[way], 1.0).mean()
    layers = way.partition(" ")[2]
    with torch.no_grad():
        theirs, _, _ = layer_states(teacher, sequences, layers)
    own, _, _ = layer_states(policy, sequences, layers)
    return representation_loss(own, theirs, normalize=False).mean()


def rows_of(tokens: int, sequences: int, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    length = max(4, tokens // sequences)
    ids = torch.randint(5, vocabulary, (sequences, length)).tolist()
    return [row[: length // 4] for row in ids], [row[length // 4 :] for row in ids]


def case(way: str, tokens: int, width: int, layers: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Run in a fresh process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=max(1, width // 64), **sizes)
    torch.manual_seed(0)
    policy, teacher = (LlamaForCausalLM(config).to(device) for _ in range(2))
    teacher.requires_grad_(False).eval()

    def update(rows: tuple) -> float:
        started = time.perf_counter()
        loss_of(way, policy, teacher, *rows).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    few = rows_of(8, 2, vocabulary)
    for _ in range(2):
        update(few)  # gradients of the weights exist after it, and the second use of them adds up
    reset_peak(device)
    before, rows = peak_mib(device), rows_of(tokens, 4, vocabulary)
    seconds = [update(rows) for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "mib": peak_mib(device) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 2048, "width": 576, "layers": 12, "vocabulary": 49152, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    if way := args.pop("case"):
        return print(json.dumps(case(way, **args)))
    print(", ".join(f"{name} {value}" for name, value in args.items()))
    print(f"{'':12}{'seconds':>10}{'MiB':>8}{'time of top-k':>16}{'memory of top-k':>18}")
    flags = [text for name, value in args.items() for text in (f"--{name}", str(value))]
    found = {}
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, *flags, "--case", way], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{way}: {done.stderr[-1000:]}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
    for way, got in found.items():
        shares = [100 * got[name] / found["top-k"][name] for name in ("seconds", "mib")]
        print(f"{way:12}{got['seconds']:10.2f}{got['mib']:8.0f}{shares[0]:15.0f}%{shares[1]:17.0f}%")


if __name__ == "__main__":
    main()
