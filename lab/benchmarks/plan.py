"""The memory plan against what runs take: python lab/benchmarks/plan.py

Two iterations of a few episodes in each of several settings, each in a process of its own: full and LoRA, all episodes
at a time and in waves, float32 and bfloat16 autocast, with gradient checkpointing and without, SmolLM2-135M and a
random model of 33 million weights. Contexts are full: no episode ends before its context does. The peak of a phase is
torch.cuda.max_memory_allocated on a GPU, else the most that the process had resident in it; the second iteration
counts, from which on the optimizer has its moments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from config import parse_args, variant_of
from lab.experiments.runs import on_the_laptop
from memory.machine import peak_mib, reset_peak
from memory.plan import Plan, libraries_of
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of settings; none: all of them")
    args = parser.parse_args()
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
