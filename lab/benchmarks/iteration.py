"""One OPID iteration beside one GRPO iteration of the same code: python lab/benchmarks/iteration.py [--model smollm2]

Trains a few iterations each way with the laptop's settings (every flag after `--` goes to both), leaves the first
out (it warms up, and measures the noise floor), and prints the median seconds of each phase and what OPID costs more.

    python lab/benchmarks/iteration.py --model smollm2 -- --tasks 2 --rollouts 2 --max-steps 5 --max-new-tokens 48
    python lab/benchmarks/iteration.py --model random        # a tiny random model, to try the benchmark

`--trl` also times the update alone beside that of TRL's GRPOTrainer (trl==1.16.0, put into lab/benchmarks/.trl-venv):
the same model and the same prompt and completion ids, one optimizer step, with peak memory. See trl_update.py.
`--trl-only` leaves the iterations out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from config import Config, parse_args, variant_of
from lab.benchmarks.trl_update import compare
from lab.experiments.runs import on_the_laptop
from lm.loading import save_policy
from runlog.metrics import read_lines
from runlog.start import start
from tiny.warmstart import tiny_model, tiny_tokenizer
from train import train

PHASES = ("rollout", "skills", "rescore", "update")


def random_model(folder: Path) -> str:
    """A tiny random model, saved so that --model can name it."""
    tokenizer = tiny_tokenizer()
    save_policy(tiny_model(len(tokenizer), seed=0), tokenizer, folder)
    return str(folder)


def settings(model: str, env: str, algo: str, repeats: int, out: Path, more: list[str]) -> Config:
    """Flags of the command line first, so that those after `--` win, then what the benchmark needs."""
    needed = f"--algo {algo} --iterations {repeats + 1} --eval-every 0 --eval-games 1 --save-every {repeats + 1}"
    return parse_args(["--model", model, "--env", env, *on_the_laptop(more), *needed.split(), "--out", str(out)])


def run(config: Config) -> None:
    train(start(config), variant_of(config.algo))


def phases(out: Path) -> dict[str, float]:
    """Median seconds of each phase over the iterations of a run, the first left out; 0 where a phase is not there."""
    records = read_lines(out / "metrics.jsonl")[1:]
    return {phase: statistics.median(r.get(f"seconds/{phase}", 0.0) for r in records) for phase in PHASES}


def table(opid: dict[str, float], grpo: dict[str, float]) -> str:
    """A line a phase: seconds of OPID and of GRPO, and the difference in % of a whole GRPO iteration."""
    whole = sum(grpo.values())
    rows = [(phase, opid[phase], grpo[phase]) for phase in PHASES] + [("all", sum(opid.values()), whole)]
    lines = [f"{'phase':<9}{'OPID, s':>10}{'GRPO, s':>10}{'overhead':>10}"]
    return "\n".join(lines + [f"{name:<9}{a:>10.3f}{b:>10.3f}{100 * (a - b) / whole:>9.1f}%" for name, a, b in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--env", default="alfworld", help="as for train.py")
    parser.add_argument("--repeats", type=int, default=3, help="iterations of which the median is taken")
    parser.add_argument("--trl", action="store_true", help="time the update beside TRL's as well")
    parser.add_argument("--trl-only", action="store_true", help="that, and nothing else")
    parser.add_argument("more", nargs="*", help="flags for train.py, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, more = args.model, args.more
        if args.model == "random":
            model, more = random_model(folder / "model"), ["--prompt", "compact", *args.more]
        if not args.trl_only:
            found = {}
            for algo in ("opid", "grpo"):
                run(settings(model, args.env, algo, args.repeats, folder / algo, more))
                found[algo] = phases(folder / algo)
            medians = table(found["opid"], found["grpo"])
            print(f"{args.model}, {args.env}: medians of {args.repeats} iterations\n{medians}")
        if args.trl or args.trl_only:
            compare(settings(model, args.env, "grpo", args.repeats, folder / "trl", more), args.repeats, folder)


if __name__ == "__main__":
    main()
