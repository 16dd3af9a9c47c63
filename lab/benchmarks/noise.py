"""How far do two scorings of the same tokens lie apart? python lab/benchmarks/noise.py [--model smollm2] [--turns 10]

A skill advantage is a difference of two log-probs, so it means something only above the difference that comes of
nothing but another layout of the same batch. Scores one episode's responses packed, as a tree (with step skills hanging
off it), and every step alone, and prints the absolute differences a token, in nats, for float32, bfloat16 autocast and
bfloat16 weights; beside them the size of A_skill for one fixed skill.

Then what `--frozen-dtype` does to a frozen scorer under bfloat16 autocast: how far its log-probs, A_skill (scored by
it, against the policy) and KL (k3 of the policy against it, the same model) move from those of a float32 copy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from lab.benchmarks.score import LIMIT, load, play, rows
from lm.encoder import Encoder
from lm.loading import frozen_copy
from lm.scoring import response_logprobs, tree_logprobs
from train import k3

PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16 autocast": (torch.float32, True),
    "bfloat16 weights": (torch.bfloat16, False),
}


def scores_of(model, contexts, responses, guided) -> tuple[dict, torch.Tensor]:
    """(name -> log-probs (B, R) of the plain contexts, A_skill (B, R) of the guided ones, each step alone)."""
    layouts = {
        "per step": response_logprobs(model, contexts, responses, token_budget=1, packed=False),
        "packed": response_logprobs(model, contexts, responses, token_budget=LIMIT),
        "tree": tree_logprobs(model, contexts, responses, guided, token_budget=LIMIT)[0],
    }
    return layouts, response_logprobs(model, guided, responses, token_budget=1, packed=False) - layouts["per step"]


def frozen_effects(model, contexts, responses, guided) -> dict[str, dict]:
    """--frozen-dtype -> MiB of the copy, and |change| (B, R) of what is made of its log-probs, all under autocast."""
    found = {}
    with torch.autocast(model.device.type, torch.bfloat16):
        old = response_logprobs(model, contexts, responses, token_budget=LIMIT)
        for dtype in ("float32", "auto", "bfloat16"):
            copied = frozen_copy(model, dtype, mixed_precision="bf16")
            plain = response_logprobs(copied, contexts, responses, token_budget=LIMIT)
            shift = response_logprobs(copied, guided, responses, token_budget=LIMIT) - old
            found[dtype] = {"log p": plain, "A_skill": shift, "KL": k3(old, plain)}
            found[dtype]["MiB"] = sum(p.numel() * p.element_size() for p in copied.parameters()) / 2**20
    whole = dict(found["float32"])
    return {
        dtype: {name: value if name == "MiB" else value - whole[name] for name, value in values.items()}
        for dtype, values in found.items()
    }


def summary(differences: torch.Tensor) -> str:
    values = differences[~differences.isnan()].abs().double()
    return f"{values.mean():>10.1e}{values.median():>10.1e}{values.quantile(0.99):>10.1e}{values.max():>10.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--turns", type=int, default=10, help="turns of the episode")
    args = parser.parse_args()
    model, tokenizer, prompt = load(args.model)
    encoder = Encoder(tokenizer, "chat")
    trajectory = play(model, encoder, prompt, args.turns)
    batch = rows(encoder, trajectory, args.turns, skills=args.turns)
    effects = frozen_effects(model, *batch)  # before the weights are rounded below
    tokens = sum(len(response) for response in batch[1])
    print(f"{args.model} on {model.device.type}: {tokens} tokens of {len(batch[0])} turns, |difference| in nats")
    print(f"{'precision':<19}{'of':<19}{'mean':>10}{'median':>10}{'99%':>10}{'largest':>10}")
    for name, (dtype, autocast) in PRECISIONS.items():
        model.to(dtype)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            layouts, shift = scores_of(model, *batch)
        for layout in ("packed", "tree"):
            print(f"{name:<19}{layout + ' - per step':<19}{summary(layouts[layout] - layouts['per step'])}")
        print(f"{name:<19}{'A_skill':<19}{summary(shift)}", flush=True)
    print(f"\n{'--frozen-dtype':<15}{'MiB':>7} {'change of':<11}{'mean':>10}{'median':>10}{'99%':>10}{'largest':>10}")
    for dtype, values in effects.items():
        for name in ("log p", "A_skill", "KL"):
            print(f"{dtype:<15}{values['MiB']:>7.0f} {name:<11}{summary(values[name])}", flush=True)


if __name__ == "__main__":
    main()
