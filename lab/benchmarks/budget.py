"""A rollout in bounded memory: python lab/benchmarks/budget.py [--model smollm2] [--shares 1 2 4 8] [-- flags]

Plays the same episodes (one seed) with all of them alive at a time, and with a half, a quarter and an eighth of them,
by `--rollout-budget`, each case in a process of its own. Prints the median seconds (on a CPU, processor time of one
thread, since a busy machine stretches the other), the peak memory above what the loaded model took (on a GPU what
PyTorch allocated, else what the process had resident), and the share of episodes with the very same tokens. In exact
arithmetic that is all; rows that are multiplied beside others round otherwise, and a draw may fall between.

    python lab/benchmarks/budget.py
    python lab/benchmarks/budget.py --model smollm2 --repeats 1 -- --tasks 8 --rollouts 4 --max-steps 6
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from config import parse_args
from evaluate import environment, games_of
from lab.experiments.runs import on_the_laptop
from lm.encoder import Encoder
from lm.precision import device_of
from lm.processes import give_back
from lm.sampler import Sampler
from memory.machine import peak_mib, reset_peak
from rollout import rollout
from tiny.loading import load_model


def case(budget: int, repeats: int, argv: list[str]) -> dict:
    """Run in a fresh process -> seconds of each repeat, peak MiB above the model's, the responses by episode."""
    config = parse_args(on_the_laptop(argv))
    device = device_of()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    torch.set_num_threads(1)
    model, tokenizer = load_model(config.model, env=config.env, dtype=config.dtype)
    encoder, games = Encoder(tokenizer, config.context), games_of(config, "train")[: config.tasks]
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")

    def play(count: int, size: int) -> list[list[list[int]]]:
        torch.manual_seed(0)
        sampler = Sampler(
            model,
            tokenizer,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            rollout_budget=budget,
            token_budget=config.token_budget,
        )
        with bfloat16:
            trajectories, _ = rollout(
                sampler, encoder, environment(config), games[:count], size, context_limit=config.context_limit
            )
        return [[step.response for step in trajectory.steps] for trajectory in trajectories]

    model.to(device)
    play(1, 1)  # what the first use of anything takes
    give_back()
    reset_peak(device)
    before, seconds = peak_mib(device), []
    for _ in range(repeats):
        started = clock()
        said = play(config.tasks, config.rollouts)
        seconds.append(clock() - started)  # responses are on the CPU by then
    return {"seconds": seconds, "mib": peak_mib(device) - before, "said": said}


def same_share(episodes: list, others: list) -> float:
    return sum(a == b for a, b in zip(episodes, others, strict=True)) / len(episodes)


def measured(budget: int, repeats: int, argv: list[str]) -> dict:
    command = [sys.executable, __file__, "--case", str(budget), "--repeats", str(repeats), "--", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"--rollout-budget {budget}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as for train.py")
    parser.add_argument("--shares", type=int, nargs="+", default=[1, 2, 4, 8], help="n: a share of 1/n is alive")
    parser.add_argument("--repeats", type=int, default=3, help="rollouts of which the median is taken")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="flags for train.py, after --")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(case(args.case, args.repeats, args.more)))
        return
    argv = ["--model", args.model, *args.more]
    config = parse_args(on_the_laptop(argv))
    episodes = config.tasks * config.rollouts
    print(f"{args.model}: {episodes} episodes of at most {config.context_limit} tokens")
    print(f"{'alive':>6}{'budget':>10}{'seconds':>9}{'x all':>7}{'MiB':>8}{'x all':>7}{'same episodes':>15}")
    whole = None
    for share in args.shares:
        rows = max(1, episodes // share)
        found = measured(rows * config.context_limit, args.repeats, argv)
        seconds, whole = statistics.median(found["seconds"]), whole or found
        times, size = seconds / statistics.median(whole["seconds"]), found["mib"] / max(1e-9, whole["mib"])
        same = f"{same_share(found['said'], whole['said']):.1%}"
        budget = rows * config.context_limit
        print(
            f"{rows:>6}{budget:>10}{seconds:>9.2f}{times:>7.2f}{found['mib']:>8.0f}{size:>7.2f}{same:>15}", flush=True
        )


if __name__ == "__main__":
    main()
