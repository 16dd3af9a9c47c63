"""Success on held-out tasks, as the paper's table prints it. The policy acts from the plain context: no skills.

python evaluate.py --model runs/laptop/policy
python evaluate.py --model Jinyang23/OPID-ALFWorld-1.7B --recipe alfworld-qwen3-1.7b
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config, parse_args
from data import Trajectory
from envs import TextEnv, make_env
from envs.alfworld import SPLITS, TASK_TYPES, cached_games, list_games
from rollout import Encoder, rollout

EVAL_SPLITS = ("valid_seen", "valid_unseen")


def environment(config: Config) -> Callable[[], TextEnv]:
    """What makes one environment of the run."""
    options = {"prompt": config.prompt, "history": config.history}
    if config.env == "alfworld":
        options |= {"engine": config.engine}
    elif config.env == "webshop":
        options |= {"data": config.games, "goals": config.webshop_goals}
    return lambda: make_env(config.env, max_steps=config.max_steps, **options)


def games_of(config: Config, split: str) -> list[str]:
    """The run's games of one split: official ones, or generated ones (written to cache/ on first use).

    Held-out games do not depend on the run's seed, so that every run is evaluated on the same ones.
    """
    if config.env == "webshop":
        tasks = environment(config)().tasks(split)
        return tasks if split == "train" else tasks[: config.eval_games]
    if config.games != "generate":
        games = list_games(config.games, split)
        return games if split == "train" else games[: config.eval_games]
    count = config.train_games if split == "train" else config.eval_games
    return cached_games(config.game_size, split, count)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, centre = successes / n, successes / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def play(
    model, encoder: Encoder, config: Config, games: list[str], *, temperature: float, note: str = ""
) -> list[Trajectory]:
    """Play each of `games` once, as many at a time as a training iteration has episodes."""
    at_once = max(config.tasks * config.rollouts, 1)
    trajectories: list[Trajectory] = []
    bar = tqdm(range(0, len(games), at_once), desc=f"evaluate {note}", leave=False, disable=None)
    for start in bar:
        trajectories += rollout(
            model,
            encoder,
            environment(config),
            games[start : start + at_once],
            1,
            max_new_tokens=config.max_new_tokens,
            context_limit=config.context_limit,
            temperature=temperature,
            progress=lambda live, turn: bar.set_postfix(live=live, turn=turn),
        )[0]
    return trajectories


def columns_of(trajectories: list[Trajectory]) -> dict[str, str]:
    """Kind of task -> its column: ALFWorld's as in the paper, those of another environment by their own names."""
    kinds = {t.task_type for t in trajectories}
    return TASK_TYPES if kinds <= TASK_TYPES.keys() else {kind: kind for kind in sorted(kinds)}


def success_by_type(trajectories: list[Trajectory]) -> dict[str, tuple[int, int]]:
    """Column -> (solved, played), for the columns that occur and All."""
    table = {}
    for task_type, column in columns_of(trajectories).items():
        played = [t.success for t in trajectories if t.task_type == task_type]
        if played:
            table[column] = (sum(played), len(played))
    table["All"] = (sum(t.success for t in trajectories), len(trajectories))
    return table


def format_table(results: dict[str, list[Trajectory]]) -> str:
    """A line a split: success in % by task type, then over all games, its 95% interval, the number of games."""
    columns = [*columns_of([t for played in results.values() for t in played]).values(), "All"]
    width = max(8, *(len(column) + 2 for column in columns))
    header = "".join(f"{column:>{width}}" for column in columns)
    lines = [f"{'split':<13}{header}{'95% interval':>17}{'games':>7}"]
    for split, trajectories in results.items():
        table = success_by_type(trajectories)
        cells = [f"{100 * table[c][0] / table[c][1]:{width}.1f}" if c in table else f"{'-':>{width}}" for c in columns]
        low, high = wilson(*table["All"])
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(f"{split:<13}" + "".join(cells) + f"{interval:>17}{len(trajectories):>7}")
    return "\n".join(lines)


def evaluate(model, encoder: Encoder, config: Config, splits=EVAL_SPLITS) -> dict[str, list[Trajectory]]:
    """Trajectories of one pass over each split's games. Seeded apart from training, and the training's random state
    is left as it was."""
    results = {}
    with torch.random.fork_rng():
        for split in splits:
            torch.manual_seed(config.seed)
            games = games_of(config, split)
            results[split] = play(model, encoder, config, games, temperature=config.eval_temperature, note=split)
    return results


def main(argv: list[str] | None = None) -> None:
    from models import load_model

    config = parse_args(argv)
    run = Path(config.model).parent / "config.json"
    if run.is_file():  # the policy of a run: the run's own settings are the defaults
        config = parse_args(argv, base=json.loads(run.read_text()))
    model, tokenizer = load_model(config.model, dtype=config.dtype, seed=config.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(format_table(evaluate(model, Encoder(tokenizer, config.context), config)))


if __name__ == "__main__":
    main()


__all__ = ["EVAL_SPLITS", "SPLITS", "environment", "evaluate", "format_table", "games_of", "play", "wilson"]
