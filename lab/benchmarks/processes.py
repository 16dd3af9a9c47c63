"""One process, two, and two that share the weights: python lab/benchmarks/processes.py [--model smollm2]

Trains a few iterations each way on this machine's CPUs, a thread a process (every flag after `--` goes to all), leaves
the first out, and prints for each phase the median seconds and what a process sends, in MiB, where collectives run in
rings. Then, of the same model: one answer sampled from sharded weights, gathered once before, or layer by layer at
every token while all processes wait for the longest (`synced_gpus`), with the memory that each way adds.

    python lab/benchmarks/processes.py --model smollm2 -- --tasks 2 --rollouts 2 --max-steps 3 --max-new-tokens 24
    python lab/benchmarks/processes.py --model random        # a tiny random model, to try the benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from config import variant_of
from lab.benchmarks.iteration import PHASES, phases, random_model, run, settings
from lm.processes import gathered, parts_of, shard
from runlog.start import start
from tiny.loading import load_model
from train import train

WAYS = {"1 process": (1, []), "2 processes": (2, []), "2, sharded": (2, ["--shard"])}
ROOT, MIB = Path(__file__).parent.parent.parent, 2**20
RINGS = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1}  # collective -> how often a tensor goes round


# ---- in each process -------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes that this process sends, by phase: of n processes in a ring, (n - 1) / n of a gathered or scattered tensor,
    and twice that of a summed one."""

    def __init__(self, processes: int):
        super().__init__()
        self.share, self.phase, self.sent = (processes - 1) / processes, "", defaultdict(float)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in (name := str(function)):
            rounds = next((rounds for ring, rounds in RINGS.items() if ring in name.replace("_base", "")), 0)
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            # of a gathered or scattered tensor the whole and a part are among the arguments
            largest = max((t.numel() * t.element_size() for t in tensors), default=0)
            self.sent[self.phase] += rounds * self.share * largest
        return function(*args, **(kwargs or {}))


def traffic(config) -> dict[str, float]:
    """MiB by phase of one iteration."""
    begun = start(config)
    counted, note, sent = Traffic(begun.processes.count), begun.note, {}

    def noted(step: str, metrics: dict) -> None:  # at the end of each step
        sent[step] = counted.sent[counted.phase] / MIB
        counted.phase = f"after {step}"
        note(step, metrics)

    begun.note = noted
    with counted:
        train(begun, variant_of(config.algo))
    return {phase: sent.get(phase, 0.0) for phase in PHASES}


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Median, over repeats, of the time until the last process is done."""
    taken = []
    for _ in range(repeats):
        torch.distributed.barrier()
        started = time.perf_counter()
        work()
        torch.distributed.barrier()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def sampling(model, repeats: int, tokens: int = 16) -> dict[str, tuple[float, float]]:
    """(seconds, MiB that it adds to what is resident) by way: 8 answers to 128 tokens, twice as long in process 0."""
    rank = torch.distributed.get_rank()
    new = tokens * (2 - rank)
    options = GenerationConfig(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, do_sample=False)
    ids = torch.arange(8 * 128).reshape(8, 128) % 100 + 5

    def gathered_once() -> None:
        with gathered(model):
            model.generate(ids, generation_config=options, synced_gpus=False)

    def layer_by_layer() -> None:
        model.generate(ids, generation_config=options, synced_gpus=True)
        for part in parts_of(model):
            part.reshard()

    shard([model.eval()], ids.device)
    found = {}
    for name, way in (("synced", layer_by_layer), ("gathered", gathered_once)):
        way()  # warms up
        Path("/proc/self/clear_refs").write_text("5")  # what was resident at most is what is resident now
        before, taken = resident("VmRSS"), seconds(way, repeats)
        found[name] = taken, resident("VmHWM") - before
    return found


def resident(name: str) -> float:
    """MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**10


def work(what: str, out: Path, repeats: int, model: str, more: list[str]) -> None:
    """One process's part of a measurement; the first one writes it down."""
    torch.set_num_threads(1)
    if what == "train":
        run(settings(model, "alfworld", "opid", repeats, out, more))
        return
    if what == "traffic":
        found = traffic(settings(model, "alfworld", "opid", 0, out, more))
    else:
        torch.distributed.init_process_group("gloo")
        loaded, _ = load_model(model)
        found = sampling(loaded, repeats)
    if os.environ.get("RANK", "0") == "0":
        out.with_suffix(".json").write_text(json.dumps(found))


# ---- all of them -----------------------------------------------------------------------------------------------------


def launch(count: int, *argv: str) -> None:
    """This file in `count` processes. Raises RuntimeError with what it said where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    command += ["--master_port", str(port), __file__, "--work", *argv]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr[-2000:]}")


def table(found: dict[str, dict[str, dict[str, float]]], peaks: dict[str, float]) -> str:
    """A line a phase: seconds and MiB sent of each way; `found`: way -> "seconds" or "sent" -> phase -> number."""
    lines = [f"{'':<10}" + "".join(f"{way:>22}" for way in found)]
    lines += [f"{'phase':<10}" + f"{'seconds':>11}{'MiB sent':>11}" * len(found)]
    for phase in PHASES:
        cells = [f"{of['seconds'][phase]:>11.2f}{of['sent'][phase]:>11.1f}" for of in found.values()]
        lines.append(f"{phase:<10}" + "".join(cells))
    whole = [f"{sum(of['seconds'].values()):>11.2f}{sum(of['sent'].values()):>11.1f}" for of in found.values()]
    lines.append(f"{'all':<10}" + "".join(whole))
    lines.append(f"{'peak MiB':<10}" + "".join(f"{peaks[way]:>11.0f}{'':>11}" for way in found))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--work", nargs=2, metavar=("WHAT", "OUT"), help="what each process is started with")
    parser.add_argument("more", nargs="*", help="flags for train.py, after --")
    args = parser.parse_args()
    if args.work:
        work(args.work[0], Path(args.work[1]), args.repeats, args.model, args.more)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, model, more = Path(temporary), args.model, args.more
        if model == "random":
            model, more = random_model(folder / "model"), ["--prompt", "compact", *more]
        asked, found, peaks = ["--model", model, "--repeats", str(args.repeats), "--"], {}, {}
        for i, (way, (count, flags)) in enumerate(WAYS.items()):
            launch(count, "train", str(folder / f"train{i}"), *asked, *more, *flags)
            launch(count, "traffic", str(folder / f"traffic{i}"), *asked, *more, *flags)
            sent = json.loads((folder / f"traffic{i}.json").read_text())
            found[way] = {"seconds": phases(folder / f"train{i}"), "sent": sent}
            peaks[way] = json.loads((folder / f"train{i}/metrics.jsonl").open().readline())["memory/peak_mib"]
        print(f"{args.model}: medians of {args.repeats} iterations\n{table(found, peaks)}\n")
        launch(2, "sampling", str(folder / "sampling"), *asked)
        sampled = json.loads((folder / "sampling.json").read_text())
    for name, (taken, mib) in sampled.items():
        print(f"sampling from sharded weights, {name}: {taken:.2f} s, {mib:.0f} MiB more")


if __name__ == "__main__":
    main()
