"""A step of decoding, plain `generate` and ours turn about: python lab/benchmarks/decoding.py [--model smollm2]

plain   transformers as it comes: norms in six kernels, a cache that is copied for every token
ours    lm/sampler.py as a run uses it: norms in one kernel (lm/obstacles.py), a cache that grows in place (lm/cache.py)

Both sample greedily from the same contexts, of random tokens. Prints the milliseconds of a step, median of the rounds,
and whether both chose the same tokens; on a GPU also the limit, bytes of weights, keys and values over --bandwidth.
`--model` also takes a name in recipes/models.json: random weights of that shape.

    python lab/benchmarks/decoding.py --model Qwen3-1.7B --rows 16 64 128 --context 1000 2500 --bandwidth 4800
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lab.benchmarks.score import load
from lm import obstacles
from lm.precision import device_of
from lm.sampler import Sampler
from memory.plan import architecture_of
from tiny.warmstart import tiny_tokenizer

END = 0  # a token that no context needs: made impossible, so that every row goes on to the last step


@contextlib.contextmanager
def as_transformers_has_them():
    """Norms unfused inside."""
    for kind, forward in obstacles.plain_norms.items():
        kind.forward = forward or kind.forward
    yield
    for kind, forward in obstacles.plain_norms.items():
        kind.forward = obstacles.fused_norm if forward else kind.forward


def plain(model, tokenizer, contexts: list[list[int]], steps: int) -> list[list[int]]:
    ids = torch.tensor(contexts, device=model.device)
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=END)
    with torch.no_grad(), as_transformers_has_them():
        return model.generate(ids, generation_config=config)[:, ids.shape[1] :].tolist()


def ours(model, tokenizer, contexts: list[list[int]], steps: int) -> list[list[int]]:
    sampler = Sampler(model, tokenizer, max_new_tokens=steps, temperature=0.0, record=True)
    sampler.config.eos_token_id = None
    sampler.ends = set()
    return sampler(list(range(len(contexts))), contexts)


def step(way, model, tokenizer, contexts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
    """Seconds of a step after the first, which reads the contexts; and what was sampled."""
    times = []
    for count in (1, steps + 1):
        started = time.perf_counter() if model.device.type == "cuda" else time.process_time()
        said = way(model, tokenizer, contexts, count)
        times.append((time.perf_counter() if model.device.type == "cuda" else time.process_time()) - started)
    return (times[1] - times[0]) / steps, said


def model_of(name: str):
    """-> (model, tokenizer): as train.py takes it, or random weights of a shape in recipes/models.json."""
    if name in ("random", "tiny", "smollm2"):
        return load(name)[:2]
    torch.manual_seed(0)
    with torch.device(device_of()):
        model = AutoModelForCausalLM.from_config(architecture_of(name), dtype=torch.float32).eval()
    return obstacles.fuse_norms(model), tiny_tokenizer()


def limit(model, rows: int, length: int, size: int, bandwidth: float) -> float:
    """Milliseconds in which weights, keys and values of a step can be read, `size` bytes a number."""
    config = model.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * head * length * rows
    return size * (sum(p.numel() for p in model.parameters()) + kept) / (bandwidth * 1e9) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, random, or a name in recipes/models.json")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="contexts at a time")
    parser.add_argument("--context", type=int, nargs="+", default=[300, 1000], help="their tokens")
    parser.add_argument("--steps", type=int, default=16, help="tokens that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways, turn about")
    parser.add_argument("--precision", nargs="+", default=["float32", "autocast"], help="float32, autocast, bfloat16")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, GB/s, for the limit")
    args = parser.parse_args()
    model, tokenizer = model_of(args.model)
    kind = model.device.type
    print(f"{args.model} on {kind}, {torch.get_num_threads()} CPU threads; ms of a step")
    print(f"{'precision':<10}{'rows':>5}{'context':>9}{'plain':>9}{'ours':>9}{'ratio':>7}{'limit':>8}  tokens")
    for precision in args.precision:
        if precision == "bfloat16":
            model.to(torch.bfloat16)
        context = torch.autocast(kind, torch.bfloat16, enabled=precision == "autocast")
        for length in args.context:
            for rows in args.rows:
                contexts = torch.randint(1, model.config.vocab_size, (rows, length)).tolist()
                times, said = {plain: [], ours: []}, {}
                for _ in range(args.rounds):
                    for way, found in times.items():
                        with context:
                            seconds, said[way] = step(way, model, tokenizer, contexts, args.steps)
                        found.append(1e3 * seconds)
                before, after = (statistics.median(found) for found in times.values())
                size = 4 if precision == "float32" else 2
                least = f"{limit(model, rows, length, size, args.bandwidth):.1f}" if args.bandwidth else "-"
                same = sum(map(list.__eq__, said[plain], said[ours])) / rows
                line = f"{precision:<10}{rows:>5}{length:>9}{before:>9.1f}{after:>9.1f}{before / after:>7.2f}{least:>8}"
                print(f"{line}  {same:.0%} the same", flush=True)


if __name__ == "__main__":
    main()
