"""Final policies in conditions that training never showed.

python experiments/robustness.py --runs runs/compare-results/*-seed*

Each run folder's policy plays the held-out games at several temperatures, and at the run's own evaluation temperature
with the order of listed objects or the wording of observations changed (perturb.py says how), acting without skills.
One file a run, RESULTS/NAME.json, which is never made again; table.md estimates over the seeds of each arm.
Flags of train.py go to every run, such as --eval-games 500.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from config import Config
from evaluate import date_of_run, environment, evaluate
from experiments.perturb import CHANGES, Change, Perturbed
from experiments.runs import ROOT, arm_of, commit, config_of, fingerprint, settings, write_result
from experiments.tables import markdown, split_cells, split_titles
from lm.encoder import Encoder
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
    encoder, success = Encoder(tokenizer, config.context, date_of_run(str(run / "policy"))), {}
    for condition, (hot, make_env) in told.items():
        results = evaluate(model, encoder, hot, make_env=make_env)
        success[condition] = {split: float(np.mean([t.success for t in played])) for split, played in results.items()}
    return success


def result_of(run: Path, flags: list[str], temperatures: list[float], file: Path) -> dict:
    """The result file of one run: read, or else made. Raises ValueError where it was made with other settings."""
    config = config_of(run, flags)
    wanted = {"eval_games": config.eval_games, "temperatures": temperatures, "max_steps": config.max_steps}
    wanted |= {"config": settings(config), "weights": fingerprint(run / "policy")}
    if file.exists():
        result = json.loads(file.read_text())
        if changed := [name for name, value in wanted.items() if result.get(name) != value]:
            raise ValueError(f"{file} was made with other {', '.join(changed)}: use another --results")
        return result
    success = measure(run, config, temperatures)
    result = {"name": run.name, "arm": arm_of(run), "commit": commit(), **wanted, "success": success}
    write_result(file, result)
    print(f"{run.name} done", flush=True)
    return result


def table(results: list[dict]) -> str:
    """One row an arm and a condition: interquartile mean over seeds and its 95% interval, by split."""
    splits = list(next(iter(results[0]["success"].values())))
    head = ["method", "condition", "seeds", *split_titles(splits)]
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r["success"] for r in results if r["arm"] == arm]
        for condition in runs[0]:
            own = np.array([[run[condition][split] for split in splits] for run in runs])  # (runs, splits)
            rows.append([arm, condition, str(len(runs)), *split_cells(own)])
    return markdown(head, rows)


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--runs", nargs="+", type=Path, required=True, help="run folders that hold a final policy, called ARM-seedN"
    )
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.4, 0.7, 1.0], help="0: greedy")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results" / "robustness")
    args, flags = parser.parse_known_args(argv)
    results = [result_of(run, flags, args.temperatures, args.results / f"{run.name}.json") for run in args.runs]
    text = table(results)
    (args.results / "table.md").write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    main()
