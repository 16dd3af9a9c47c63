"""Final policies in conditions that training never showed.

python lab/experiments/robustness.py --runs runs/compare/*-seed*

Each run folder's policy plays the held-out games at several temperatures, and at the run's own evaluation temperature
with the order of listed objects or the wording of observations changed (perturb.py says how), acting without skills.
One line a run in lab/results/robustness.jsonl, which is never made again; robustness.md estimates over the seeds of
each arm, of all lines that are there. Flags of train.py go to every run, such as --eval-games 500.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import lm  # noqa: F401  # isort: skip

import numpy as np
import torch

from config import Config
from evaluate import environment, evaluate
from lab.experiments.estimates import estimate
from lab.experiments.perturb import CHANGES, Change, Perturbed
from lab.experiments.runs import RESULTS, arm_of, commit, config_of, fingerprint, settings
from lab.experiments.stored import add, differing, find, read
from lab.experiments.tables import markdown, with_interval
from lm.encoder import Encoder
from lm.loading import about_policy
from lm.sampler import end_of_turn_ids
from tiny.loading import load_model

SEED = 0  # of the changes


def conditions(config: Config, temperatures: list[float]) -> dict[str, tuple[Config, Callable | None]]:
    """Condition -> (settings, what makes an environment; None: the run's own). Raises ValueError for an environment
    that is not ALFWorld."""
    if config.env != "alfworld":
        raise ValueError(f"only ALFWorld's observations can be changed, not those of --env {config.env}")
    make = environment(config)

    def changed(change: Change):
        return lambda: Perturbed(make(), change, SEED)

    hotter = {f"temperature {t:g}": (replace(config, eval_temperature=t), None) for t in temperatures}
    return hotter | {name: (config, changed(change)) for name, change in CHANGES.items()}


def measure(run: Path, config: Config, temperatures: list[float]) -> dict:
    """Success of a run's final policy, condition -> split -> share."""
    told = conditions(config, temperatures)
    model, tokenizer = load_model(str(run / "policy"), env=config.env, dtype=config.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    date, ends, success = about_policy(str(run / "policy")).get("date"), end_of_turn_ids(model, tokenizer), {}
    encoder = Encoder(tokenizer, config.context, date, config.template_options, ends)
    for condition, (hot, make_env) in told.items():
        results = evaluate(model, encoder, hot, make_env=make_env)
        success[condition] = {split: float(np.mean([t.success for t in played])) for split, played in results.items()}
    return success


def result_of(run: Path, flags: list[str], temperatures: list[float], results: Path) -> dict:
    """The result of one run: read, or else made. Raises ValueError where it was made with other settings."""
    config, told = config_of(run, flags), f"{results} holds {run.name}"
    weights = fingerprint(run / "policy")
    if result := find(results, run.name):
        if others := differing(result["config"], settings(config)):
            raise ValueError(f"{told} with other settings of {', '.join(others)}: use another --results")
        if (result["temperatures"], result["weights"]) != (temperatures, weights):
            raise ValueError(f"{told} at other temperatures or of other weights: use another --results")
        return result
    result = {"name": run.name, "commit": commit(), "config": settings(config), "weights": weights}
    result |= {"temperatures": temperatures, "success": measure(run, config, temperatures)}
    add(results, result)
    print(f"{run.name} done", flush=True)
    return result


def table(results: list[dict]) -> str:
    """One row an arm and a condition: mean over seeds and its 95% t interval, by split."""
    splits = list(next(iter(results[0]["success"].values())))
    head = ["method", "condition", "seeds", *(f"{split}, %" for split in splits)]
    rows = []
    arms = [arm_of(result["name"]) for result in results]
    for arm in dict.fromkeys(arms):
        runs = [result["success"] for result, own in zip(results, arms, strict=True) if own == arm]
        for condition in runs[0]:
            own = np.array([[run[condition][split] for split in splits] for run in runs])  # (runs, splits)
            rows.append([arm, condition, str(len(runs)), *(with_interval(estimate(100 * at)) for at in own.T)])
    return markdown(head, rows)


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--runs", nargs="+", type=Path, required=True, help="run folders that hold a final policy, called ARM-seedN"
    )
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.4, 0.7, 1.0], help="0: greedy")
    parser.add_argument("--results", type=Path, default=RESULTS / "robustness.jsonl", help="NAME.jsonl")
    args, flags = parser.parse_known_args(argv)
    for run in args.runs:
        result_of(run, flags, args.temperatures, args.results)
    text = table(read(args.results))
    args.results.with_suffix(".md").write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    main()
