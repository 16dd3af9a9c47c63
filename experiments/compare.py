"""Methods against one another on the laptop default: python experiments/compare.py --methods grpo opid sdar --seeds 10

Every run starts from the same warm-started weights; runs of one seed meet the same tasks in the same iteration, and all
play the same number of episodes. Two runs at a time, one thread each. A finished run is one file,
experiments/results/NAME.json (config, commit, curve, seconds), and is never made again; a stopped comparison goes on
from its runs' checkpoints. Seeds are 0 to N - 1, all of them reported: table.md and comparison.png beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from config import Config, parse_args
from evaluate import games_of
from experiments.estimates import bootstrap_interval, interquartile_mean, probability_of_improvement
from methods import METHODS
from models import load_model, save_policy
from runlog import replace

ROOT = Path(__file__).parent.parent
METHODS_COMPARED = tuple(name for name, method in METHODS.items() if not method.teacher)  # no larger model at hand
QUICK = "--iterations 2 --tasks 2 --rollouts 2 --max-steps 3 --max-new-tokens 4 --train-games 4 --eval-games 2"
QUICK += " --mini-batch 8 --eval-every 1 --skill-tokens 8"
AT_ONCE = 2


@dataclass(frozen=True)
class Job:
    """One run: a method and a seed, its settings, and where its result and its run folder lie."""

    algo: str
    seed: int
    config: Config
    result: Path

    @property
    def name(self) -> str:
        return f"{self.algo}-seed{self.seed}"


def jobs_of(methods: list[str], seeds: int, flags: list[str], start: Path, results: Path, runs: Path) -> list[Job]:
    """Seed by seed, so that a comparison stopped early holds all methods on the same seeds."""
    jobs = []
    for seed in range(seeds):
        for algo in methods:
            own = ["--algo", algo, "--seed", str(seed), "--model", str(start), "--prompt", "compact"]
            config = parse_args([*flags, *own, "--out", str(runs / f"{algo}-seed{seed}"), "--resume"])
            jobs.append(Job(algo, seed, config, results / f"{algo}-seed{seed}.json"))
    return jobs


def settings(config: Config) -> dict:
    """What makes two runs the same run: everything but where they lie."""
    return {k: v for k, v in config.to_dict().items() if k not in ("out", "resume", "model")}


def is_there(job: Job) -> bool:
    """Whether the run was made before. Raises ValueError where its file holds a run of other settings."""
    if not job.result.exists():
        return False
    stored, wanted = json.loads(job.result.read_text())["config"], settings(job.config)
    if changed := [k for k in wanted if k in stored and stored[k] != wanted[k]]:  # a flag that came later is no change
        raise ValueError(f"{job.result} holds a run with other settings of {', '.join(changed)}: use another --results")
    return True


def launch(job: Job) -> None:
    """Train in a process of its own. Raises RuntimeError with the end of its output where that fails."""
    flags = [f"--{k.replace('_', '-')}" for k in job.config.to_dict()]
    values = job.config.to_dict().values()
    command = [sys.executable, "train.py"]
    for flag, value in zip(flags, values, strict=True):
        named = flag if value is not False else f"--no-{flag[2:]}"
        command += [named] if isinstance(value, bool) else [flag, "none" if value is None else str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job.name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def store(job: Job, commit: str) -> None:
    """The result file, complete or absent."""
    metrics = read_lines(Path(job.config.out, "metrics.jsonl"))
    evaluations = read_lines(Path(job.config.out, "evaluations.jsonl"))
    result = {
        "name": job.name,
        "config": settings(job.config),
        "commit": commit,
        "curve": [{"iteration": e["iteration"] + 1, **e["success"]} for e in evaluations],
        "train": [m["train/success"] for m in metrics],
        "episodes": sum(m["episodes"] for m in metrics),
        "seconds": sum(v for m in metrics for k, v in m.items() if k.startswith("seconds/")),
    }
    replace(job.result, lambda temporary: temporary.write_text(json.dumps(result, indent=1) + "\n"))


def run_all(jobs: list[Job], launch=launch) -> None:
    """Make every run that is not there. Where one fails the others go on, and the first error is raised at the end."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"
    missing = [job for job in jobs if not is_there(job)]

    def make(job: Job) -> None:
        launch(job)
        store(job, commit)
        print(f"{job.name} done", flush=True)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(make, job) for job in missing]
    for future in futures:
        future.result()


def read_results(jobs: list[Job]) -> dict[str, list[dict]]:
    """Method -> the results of its seeds, of those runs that are there."""
    results: dict[str, list[dict]] = {}
    for job in jobs:
        if is_there(job):
            results.setdefault(job.algo, []).append(json.loads(job.result.read_text()))
    return results


def scores(results: list[dict], point: int = -1) -> np.ndarray:
    """Held-out success of each run at one point of its curve, acting without skills. -> (runs, splits)"""
    splits = [k for k in results[0]["curve"][point] if k != "iteration" and not k.endswith("+skill")]
    return np.array([[r["curve"][point][split] for split in splits] for r in results])


def table(results: dict[str, list[dict]], baseline: str) -> str:
    """One row a method: final held-out success and how likely a run of it beats one of the baseline, 95% intervals."""
    lines = [
        f"| method | seeds | success, IQM, % | 95% | P(better than {baseline}) | 95% | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for algo, runs in results.items():
        own = scores(runs)  # (runs, splits)
        low, high = bootstrap_interval(interquartile_mean, own)
        row = [algo, str(len(runs)), f"{100 * interquartile_mean(own):.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"]
        if baseline in results and algo != baseline:
            pair = own, scores(results[baseline])
            low, high = bootstrap_interval(probability_of_improvement, *pair)
            row += [f"{probability_of_improvement(*pair):.2f}", f"[{low:.2f}, {high:.2f}]"]
        else:
            row += ["-", "-"]
        lines.append(f"| {' | '.join(row)} | {np.mean([r['seconds'] for r in runs]):.0f} |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Interquartile mean of held-out success by iteration, with its 95% interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for algo, runs in results.items():
        points = range(len(runs[0]["curve"]))
        at = [runs[0]["curve"][p]["iteration"] for p in points]
        bounds = [bootstrap_interval(interquartile_mean, scores(runs, p), samples=500) for p in points]
        axis.plot(at, [100 * interquartile_mean(scores(runs, p)) for p in points], label=f"{algo} ({len(runs)})")
        axis.fill_between(at, *(100 * np.array(bounds)).T, alpha=0.15)
    axis.set(xlabel="iteration", ylabel="held-out success, interquartile mean (%)", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def prepare(runs: Path, quick: bool, flags: list[str]) -> Path:
    """The folder of the weights that every run starts from; and games, so that no two runs generate them at once."""
    config = parse_args(flags)
    for split in ("train", "valid_seen", "valid_unseen"):
        games_of(config, split)
    start = runs / "start"
    if not start.is_dir():
        if quick:
            from tiny.warmstart import tiny_model, tiny_tokenizer

            tokenizer = tiny_tokenizer()
            model = tiny_model(len(tokenizer), seed=0, width=48)
        else:
            model, tokenizer = load_model("tiny", seed=0)
        start.parent.mkdir(parents=True, exist_ok=True)
        replace(start, lambda temporary: save_policy(model, tokenizer, temporary))
    return start


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS_COMPARED), choices=METHODS_COMPARED)
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 10, with --quick 2)")
    parser.add_argument("--baseline", default="grpo", help="the method that others are compared with")
    parser.add_argument("--results", type=Path, help="folder of the result files, the table and the figure")
    parser.add_argument("--runs", type=Path, help="folder of the run folders and the starting weights")
    parser.add_argument("--quick", action="store_true", help="an untrained model and two iterations: does it all work?")
    args, flags = parser.parse_known_args(argv)  # what is left goes to every run, such as --iterations 100
    place = "quick" if args.quick else "results"
    results = (args.results or ROOT / "experiments" / place).absolute()
    runs = (args.runs or ROOT / "runs" / f"compare-{place}").absolute()
    flags = [*(QUICK.split() if args.quick else []), *flags]
    results.mkdir(parents=True, exist_ok=True)
    start = prepare(runs, args.quick, flags)
    jobs = jobs_of(args.methods, args.seeds or (2 if args.quick else 10), flags, start, results, runs)
    run_all(jobs)
    found = read_results(jobs)
    text = table(found, args.baseline)
    (results / "table.md").write_text(text + "\n")
    draw(found, results / "comparison.png")
    print(text)
    return text


if __name__ == "__main__":
    main()
