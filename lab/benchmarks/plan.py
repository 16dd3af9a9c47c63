"""The plan against what runs take: python lab/benchmarks/plan.py [--hours | --table]

Two iterations of a few episodes in each of several settings, each in a process of its own: full and LoRA, all episodes
at a time and in waves, float32 and bfloat16 autocast, with gradient checkpointing and without, SmolLM2-135M and a
random model of 33 million weights. Contexts are full: no episode ends before its context does. The peak of a phase is
torch.cuda.max_memory_allocated on a GPU, else the most that the process had resident in it; the second iteration
counts, from which on the optimizer has its moments.

--hours: the seconds of a phase instead, in six settings. Lengths are those of the iteration, so that what is compared
is the cost of the work, not the guess at how much there will be. Seconds are the process's own, on one thread, whatever
else the machine does, and its speed is measured before and after in the same process. --table: hours of every recipe on
four cards, by plan; those that share the weights on four of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from config import RECIPES, Config, parse_args, variant_of
from lab.experiments.runs import on_the_laptop
from lm.precision import device_of
from lm.sampler import Sampler
from memory import hours
from memory.machine import peak_mib, reset_peak
from memory.plan import GIB, USABLE, Plan, libraries_of
from runlog.start import start
from tiny.loading import load_model
from train import train

PLANNED = {"rescore": "scoring"}  # a step of training -> what the plan calls it, where it is another name
COMMON = "--prompt compact --tasks 2 --rollouts 4 --max-steps 8 --max-new-tokens 8 --skill-tokens 8 --iterations 2"
COMMON += " --context-limit 512 --skill-context-limit 1024 --token-budget 2048 --scorer reference --learning-rate 1e-6"
COMMON += " --eval-every 0 --eval-games 2 --save-every 100"
WAVES, AUTOCAST, CHECKPOINTING = "--rollout-budget 1024", "--mixed-precision bf16", "--gradient-checkpointing"
SETTINGS = [
    f"smollm2 {AUTOCAST}",
    f"smollm2 {AUTOCAST} {WAVES}",
    f"smollm2 {AUTOCAST} {WAVES} {CHECKPOINTING}",
    f"smollm2 {AUTOCAST} {WAVES} --lora-rank 8",
    "smollm2 --lora-rank 8",
    "random",
    f"random {WAVES}",
    f"random {CHECKPOINTING}",
    f"random {AUTOCAST}",
    f"random {AUTOCAST} {CHECKPOINTING} {WAVES} --context window",
    f"random {WAVES} --lora-rank 8",
]
SHORT = "--iterations 2 --eval-every 0 --eval-games 1 --save-every 100"
SMOLLM2 = f"--recipe alfworld-smollm2 {SHORT} --max-steps 3 --max-new-tokens 24 --skill-tokens 48"
TIMED = {
    "tiny": f"--recipe laptop {SHORT} --tasks 8 --rollouts 4",
    "smollm2": SMOLLM2,
    "lora": f"{SMOLLM2} --tasks 1 --lora-rank 8",
    "window": f"{SMOLLM2} --context window",
    "chat": f"{SMOLLM2} --tasks 1 --prompt compact --max-steps 6 --mixed-precision no",
    "webshop": f"{SMOLLM2} --tasks 1 --env webshop",
}
ON = ("RTX 3090", "RTX 4090", "A100 80", "H100")


def random_model(folder: Path) -> None:
    """A Llama of 33 million random weights that speaks SmolLM2's tokens."""
    torch.manual_seed(0)
    _, tokenizer = load_model("smollm2")
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def case(flags: list[str]) -> dict[str, list[float]]:
    """Run in a fresh process: phase -> (MiB by plan, MiB taken in the last iteration)."""
    config, taken = parse_args(on_the_laptop(flags)), {}
    device = device_of()
    run = start(config)
    note = run.note

    def measured(step: str, metrics: dict) -> None:  # at the end of each step
        taken[PLANNED.get(step, step)] = peak_mib(device)
        note(step, metrics)
        reset_peak(device)

    run.note = measured
    frozen = {id(model): model for name, model in run.models.items() if model is not run.policy}
    plan = Plan(config, run.policy.config, libraries=libraries_of(config, run.policy, *frozen.values()))
    train(run, variant_of(config.algo))
    return {phase.name: [phase.size / 2**20, taken[phase.name]] for phase in plan.phases if phase.name in taken}


def timed(flags: list[str]) -> dict[str, list[float]]:
    """Run in a fresh process: phase -> (seconds by plan, seconds taken in the last iteration)."""
    config, taken, sampled = parse_args(flags), {}, defaultdict(list)
    clock = time.perf_counter if torch.cuda.is_available() else hours.cpu_seconds
    run = start(config)
    plan = Plan(config, run.policy.config)
    before = hours.this_machine(plan)
    note, generate, calls, last = run.note, Sampler._generate, [], [clock()]

    def measured(step: str, metrics: dict) -> None:  # at the end of each step
        taken[step], sampled[step] = clock() - last[0], calls[:]
        note(step, metrics)
        calls.clear()
        last[0] = clock()

    def watched(sampler, keys, contexts):
        seen = sampler.held.seen if sampler.held else [[] for _ in contexts]
        new = max(len(context) - len(before) for context, before in zip(contexts, seen, strict=True))
        responses = generate(sampler, keys, contexts)
        calls.append((len(keys), new, max(map(len, responses))))
        return responses

    run.note, Sampler._generate = measured, watched
    train(run, variant_of(config.algo))
    lengths = lengths_of(run, sampled)
    machine = average(before, hours.this_machine(plan))
    planned = hours.Hours(plan, machine, lengths)
    seconds = planned.phases | {"evaluate": planned.evaluation}
    print(machine, lengths, sep="\n", file=sys.stderr)
    return {name: [seconds[name], taken[name]] for name in seconds}


def lengths_of(run, sampled: dict[str, list[tuple]]) -> hours.Lengths:
    """Of the last iteration. `sampled`: phase -> of each batch its rows, the columns that it read and sampled."""
    found = hours.measured(run.config, run.metrics)
    played, written = sampled["rollout"], sampled["skills"]
    waves = sum(1 for i, (rows, *_) in enumerate(played) if i == 0 or rows > played[i - 1][0])
    found = replace(found, most_turns=len(played) / waves)
    found = replace(found, most_read=mean(read for _, read, _ in played), most_answer=mean(n for *_, n in played))
    if not written:
        return found
    return replace(found, transcript=mean(n for _, n, _ in written), most_skill=mean(n for *_, n in written))


def average(one: hours.Machine, other: hours.Machine) -> hours.Machine:
    speeds = [field.name for field in fields(one) if field.name != "name"]
    return replace(one, **{name: (getattr(one, name) + getattr(other, name)) / 2 for name in speeds})


def measure_hours(only: list[str]) -> None:
    worst = 0.0
    print(f"{'':<10}{'plan, s':>10}{'taken':>8}{'taken / plan':>14}")
    for name in only or TIMED:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, __file__, "--timed", *TIMED[name].split(), "--out", out]
            one = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=one)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-1000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        found["all"] = [sum(seconds) for seconds in zip(*found.values(), strict=True)]
        print(f"{name}: {TIMED[name]}\n" + "\n".join(done.stderr.splitlines()[-2:]))
        for phase, (planned, taken) in found.items():
            print(f"{phase:<10}{planned:>10.2f}{taken:>8.2f}{taken / planned:>14.2f}", flush=True)
        worst = max(worst, abs(found["all"][1] / found["all"][0] - 1))
    print(f"\nthe sums are within {worst:.0%} of the plan")


def table() -> None:
    """Hours of every recipe on four cards, as --plan-for says them; in brackets where memory will not do."""
    print("| recipe | " + " | ".join(ON) + " |\n|---|" + "---|" * len(ON))
    for recipe in sorted(path.stem for path in RECIPES.glob("*.toml")):
        config = Config.from_recipe(recipe, mixed_precision="bf16")
        plan = Plan(config, processes=4 if config.shard else 1)
        cells = [f"{hours.Hours(plan, hours.by_sheet(card, config)).run / 3600:.1f}" for card in ON]
        fits = [plan.peak <= USABLE * hours.CARDS[card].memory * GIB for card in ON]
        shown = " | ".join(cell if fit else f"({cell})" for cell, fit in zip(cells, fits, strict=True))
        print(f"| `{recipe}` | {shown} |", flush=True)


def measure(setting: str, random: Path) -> dict[str, list[float]]:
    model, *flags = setting.split()
    with tempfile.TemporaryDirectory() as out:
        given = [*COMMON.split(), "--model", str(random) if model == "random" else model, *flags, "--out", out]
        done = subprocess.run([sys.executable, __file__, "--case", *given], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{setting}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if "--case" in sys.argv:  # what a process of its own is started with
        print(json.dumps(case(sys.argv[sys.argv.index("--case") + 1 :])))
        return
    if "--timed" in sys.argv:
        print(json.dumps(timed(sys.argv[sys.argv.index("--timed") + 1 :])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of settings; none: all of them")
    parser.add_argument("--hours", nargs="*", choices=TIMED, help="seconds instead of memory; none named: all of them")
    parser.add_argument("--table", action="store_true", help="hours of every recipe on four cards, by plan")
    args = parser.parse_args()
    if args.hours is not None:
        return measure_hours(args.hours)
    if args.table:
        return table()
    print(f"in all of them: {COMMON}\n\n{'':<10}{'plan, MiB':>10}{'taken':>8}{'taken / plan':>14}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder))
        for number in args.only or range(len(SETTINGS)):
            found = measure(SETTINGS[number], Path(folder))
            found["peak"] = [max(peaks) for peaks in zip(*found.values(), strict=True)]
            print(f"{number}: {SETTINGS[number]}")
            for name, (planned, taken) in found.items():
                print(f"{name:<10}{planned:>10.0f}{taken:>8.0f}{taken / planned:>14.2f}", flush=True)
            worst = max(worst, abs(found["peak"][1] / found["peak"][0] - 1))
    print(f"\nthe peaks are within {worst:.0%} of the plan")


if __name__ == "__main__":
    main()
