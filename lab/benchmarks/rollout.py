"""What a conversation of T turns costs to play: python lab/benchmarks/rollout.py [--model smollm2] [--turns 5 10 20 40]

Plays the same ALFWorld episodes (same seed, so the same tokens) in three ways:

    re-read    every turn reads the whole conversation anew
    cached     the KV cache is carried from turn to turn; padding inside rows stays in it
    compacted  and rows are moved together where padding takes up a quarter of it (the default of rollout.py)

Prints the median time of each, how much faster than re-reading, columns of the cache at the end, and the exponent p of
a fit of time ~ T^p. Runs on the GPU where there is one. `--model random`: a tiny random model, to try the benchmark.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch

from envs.alfworld import AlfworldEnv, cached_games
from lab.benchmarks.score import load
from lm.encoder import Encoder
from lm.sampler import COMPACT_AT, Sampler
from rollout import rollout

WAYS = {"re-read": (False, COMPACT_AT), "cached": (True, 1.0), "compacted": (True, COMPACT_AT)}  # reused, compacted at


def played(model, encoder: Encoder, prompt: str, turns: int, episodes: int, new_tokens: int, way: str):
    """(seconds, responses by episode, columns of the cache at the end or 0). One seed, whatever the way."""
    torch.manual_seed(0)
    reused, compact_at = WAYS[way]
    sampler = Sampler(model, encoder.tokenizer, max_new_tokens=new_tokens, temperature=1.0, reuse_cache=reused)
    sampler.compact_at = compact_at
    make_env = lambda: AlfworldEnv(max_steps=turns, prompt=prompt)
    games = cached_games("small", "valid_seen", episodes)
    started = time.perf_counter()
    trajectories, _ = rollout(sampler, encoder, make_env, games, 1, context_limit=10**6)
    seconds = time.perf_counter() - started  # responses are on the CPU by then
    columns = sampler.held.ids.shape[1] if sampler.held else 0
    return seconds, [[step.response for step in t.steps] for t in trajectories], columns


def exponent(turns: list[int], seconds: list[float]) -> float:
    """p of the least-squares fit seconds ~ turns^p; NaN for fewer than two points."""
    if len(turns) < 2:
        return math.nan
    return float(np.polyfit(np.log(turns), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 20, 40], help="T: turns an episode")
    parser.add_argument("--episodes", type=int, default=4, help="episodes played at a time")
    parser.add_argument("--new-tokens", type=int, default=24, help="most tokens of a response")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median is taken")
    args = parser.parse_args()
    model, tokenizer, prompt = load(args.model)
    if args.model == "random":  # it would hardly ever end a turn by itself, and leave no padding
        model.generation_config.eos_token_id = list(range(tokenizer.eos_token_id, len(tokenizer), 9))
    encoder = Encoder(tokenizer, "chat")
    print(f"{args.model} on {model.device.type}, {torch.get_num_threads()} CPU threads, {args.episodes} episodes")
    print(f"{'T':>3}  {'way':<10}{'seconds':>9}{'x re-read':>11}{'columns':>9}  tokens")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:  # not counted: the first call sets things up
        played(model, encoder, prompt, 1, args.episodes, args.new_tokens, way)
    for turns in args.turns:
        said = {}
        for way in WAYS:
            runs = [
                played(model, encoder, prompt, turns, args.episodes, args.new_tokens, way) for _ in range(args.repeats)
            ]
            seconds, said[way], columns = statistics.median(run[0] for run in runs), *runs[0][1:]
            times[way].append(seconds)
            ratio = f"{times['re-read'][-1] / seconds:.1f}"
            same = "the same" if said[way] == said["re-read"] else "others"
            print(f"{turns:>3}  {way:<10}{seconds:>9.3f}{ratio:>11}{columns:>9}  {same}", flush=True)
    for way, seconds in times.items():
        print(f"{way:<10} time ~ T^{exponent(args.turns, seconds):.2f}")


if __name__ == "__main__":
    main()
