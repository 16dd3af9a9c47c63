"""Success on held-out tasks, as the paper's table prints it. The policy acts from the plain context: no skills.

python evaluate.py --model runs/laptop/policy
python evaluate.py --model Jinyang23/OPID-ALFWorld-1.7B --recipe alfworld-qwen3-1.7b
"""

from __future__ import annotations

import lm  # isort: skip
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate.utils import gather_object

from config import Config, parse_args
from data import Step, Trajectory
from envs import GameFailure, TextEnv, make_env, read_options
from envs.guard import checked_tasks, one_line
from lm.encoder import Encoder
from lm.loading import about_policy
from lm.precision import device_of
from lm.sampler import Sampler, end_of_turn_ids
from rollout import rollout

Counts = dict[str, tuple[int, int]]  # column of the table -> (solved, played)

log = logging.getLogger(__name__)

HELD_OUT = ("valid_seen", "valid_unseen")
MOST = 0.5  # the share above which responses that are cut off, or unknown tokens, are no accident
FLAGS = (
    *("model", "env", "env_options", "template_options", "prompt", "history", "context", "context_limit"),
    *("max_new_tokens", "max_steps"),
    *("eval_games", "eval_temperature", "rollout_budget", "reuse_cache", "device", "dtype", "mixed_precision", "seed"),
)  # that evaluation reads; of a run's policy the run's own settings are the defaults


def environment(config: Config) -> Callable[[], TextEnv]:
    """What makes one environment of the run. Raises ValueError for options that it cannot have."""
    common = {"max_steps": config.max_steps, "prompt": config.prompt, "history": config.history}
    options = read_options(config.env, config.env_options)
    return lambda: make_env(config.env, **common, **options)


def games_of(config: Config, split: str) -> list:
    """The run's games of one split, at most --train-games or --eval-games of them; for training on data from outside
    all there are. Held-out games do not depend on the run's seed, so that every run is evaluated on the same ones.
    """
    env = environment(config)()
    if split == "train":
        return checked_tasks(env.tasks(split, config.train_games if getattr(env, "generated", True) else None))
    return checked_tasks(env.tasks(split, config.eval_games))


def eval_splits(config: Config) -> tuple[str, ...]:
    """The held-out splits."""
    return getattr(environment(config)(), "held_out", HELD_OUT)


def held_out_games(config: Config) -> dict[str, list]:
    """Held-out split -> its games. Raises what `games_of` raises for data that are missing, which is best asked before
    hours of work."""
    return {split: games_of(config, split) for split in eval_splits(config)}


def columns_of(config: Config) -> dict[str, str]:
    """Task type -> column of the table; empty: the types' own names."""
    return getattr(environment(config)(), "columns", {})


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, centre = successes / n, successes / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def play(
    model, encoder: Encoder, config: Config, games: list[str], make_env: Callable[[], TextEnv] | None = None
) -> list[Trajectory]:
    """Play each of `games` once, at --eval-temperature and in --mixed-precision, as many at a time as --rollout-budget
    holds. `make_env` None: the run's own environment."""
    sampler = Sampler(
        model,
        encoder.tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.eval_temperature,
        reuse_cache=config.reuse_cache,
        rollout_budget=config.rollout_budget,
        token_budget=config.token_budget,
    )
    make_env = make_env or environment(config)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        return rollout(sampler, encoder, make_env, games, 1, context_limit=config.context_limit)[0]


def named(trajectories: list[Trajectory], columns: dict[str, str]) -> dict[str, str]:
    """Task type -> its column: `columns` where they name every type here, else the types' own names, in order."""
    types = {t.task_type for t in trajectories}
    return columns if types <= columns.keys() else {name: name for name in sorted(types)}


def success_by_type(trajectories: list[Trajectory], columns: dict[str, str]) -> Counts:
    """Column -> (solved, played), for the columns that occur and All."""
    table = {}
    for task_type, column in named(trajectories, columns).items():
        played = [t.success for t in trajectories if t.task_type == task_type]
        if played:
            table[column] = (sum(played), len(played))
    table["All"] = (sum(t.success for t in trajectories), len(trajectories))
    return table


def percent(solved: int, played: int) -> str:
    return f"{100 * solved / played:.1f}" if played else "-"


def format_table(results: dict[str, list[Trajectory]], columns: dict[str, str]) -> str:
    """A line per split: success in % by task type, then over all games, its 95% interval, the number of games."""
    columns = named([t for trajectories in results.values() for t in trajectories], columns)
    names = [*columns.values(), "All"]
    shown = [one_line(name) for name in names]  # an environment's own words
    widths = [max(8, len(name) + 2) for name in shown]
    head = "".join(f"{name:>{width}}" for name, width in zip(shown, widths, strict=True))
    lines = [f"{'split':<13}{head}{'95% interval':>17}{'games':>7}"]
    for split, trajectories in results.items():
        table = success_by_type(trajectories, columns)
        shares = [percent(*table.get(name, (0, 0))) for name in names]
        cells = [f"{share:>{width}}" for share, width in zip(shares, widths, strict=True)]
        low, high = wilson(*table["All"])
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(f"{split:<13}" + "".join(cells) + f"{interval:>17}{len(trajectories):>7}")
    return "\n".join(lines)


def evaluate(
    model,
    encoder: Encoder,
    config: Config,
    splits: Sequence[str] | None = None,
    share: tuple[int, int] = (0, 1),  # which process of how many
    make_env: Callable[[], TextEnv] | None = None,
) -> dict[str, list[Trajectory]]:
    """Trajectories of one pass over the games of each of `splits` (None: the held-out ones), of which each process
    plays its share. Splits without games and games that fail are left out. Seeded by --seed and the process alone, and
    the training's random state is left as it was. Raises GameFailure where too many games fail."""
    results, (process, processes) = {}, share
    with torch.random.fork_rng():
        for split in splits or eval_splits(config):
            torch.manual_seed(config.seed + 1009 * process)
            games = games_of(config, split)
            if not games:
                log.warning("%s has no games in %s: left out of the evaluation", config.env, split)
                continue
            share_of = games[process::processes]
            results[split] = play(model, encoder, config, share_of, make_env)
            if share_of and not results[split]:  # else a table would say 0%
                raise GameFailure(f"no game of {split} could be played: {len(share_of)} failed, see above")
    return results


def evaluate_everywhere(
    model, encoder: Encoder, config: Config, processes
) -> tuple[dict[str, float], dict[str, Counts], str]:
    """-> (held-out success by split, the counts that it is made of, the table), each process playing its share, without
    skills."""
    mine = evaluate(model, encoder, config, share=(processes.rank, processes.count))
    # only outcomes travel: a table needs no steps
    played = [(split, replace(t, steps=[])) for split, trajectories in mine.items() for t in trajectories]
    results = {split: [] for split in mine}
    for split, trajectory in gather_object(played):
        results[split].append(trajectory)
    columns = columns_of(config)
    counts = {split: success_by_type(played, columns) for split, played in results.items()}
    success = {split: solved / max(1, total) for split, table in counts.items() for solved, total in [table["All"]]}
    return success, counts, format_table(results, columns)


def acted(steps: Sequence[Step], ends: set[int], unknown: int | None) -> dict[str, float]:
    """How a policy gets on with its prompts. `ends`: tokens that end a turn; `unknown`: the tokenizer's token for what
    it does not know, None where it has none."""
    strange = sum(step.context.count(unknown) for step in steps) if unknown is not None else 0
    return {
        "rollout/cut_off": sum(step.response[-1] not in ends for step in steps) / max(1, len(steps)),
        "rollout/unknown_tokens": strange / max(1, sum(len(step.context) for step in steps)),
        "rollout/valid_actions": sum(step.valid for step in steps) / max(1, len(steps)),
    }


def misfits(config: Config, metrics: dict[str, float]) -> dict[str, str]:
    """What does not fit between a policy and its prompts -> in words, with what helps. `metrics`: see `acted`."""
    found = {}
    if metrics["rollout/cut_off"] > MOST:
        found["cut off"] = (
            f"{metrics['rollout/cut_off']:.0%} of the responses are cut off at --max-new-tokens "
            f"{config.max_new_tokens}: raise it, or take a --prompt that asks for less"
        )
    if metrics["rollout/unknown_tokens"] > MOST:
        found["unknown"] = (
            f"{metrics['rollout/unknown_tokens']:.0%} of the prompts' tokens are unknown to --model {config.model}: "
            "--prompt compact, --env and its data must be those that it was trained on"
        )
    if not metrics["rollout/valid_actions"]:
        found["actions"] = (
            f"no action was valid: does --prompt {config.prompt} fit --model {config.model}? A model that knows "
            "neither format nor game needs a cold start (tools/coldstart.py)"
        )
    return found


def main(argv: list[str] | None = None) -> None:
    from tiny.loading import load_model

    config = parse_args(
        argv, program="evaluate.py", about=__doc__.splitlines()[0], shown=FLAGS, saved=("acts", "evaluated")
    )
    with lm.one_line("evaluate.py"):
        held_out_games(config)
        model, tokenizer = load_model(config.model, env=config.env, dtype=config.dtype)
        date = about_policy(config.model).get("date")
        encoder = Encoder(tokenizer, config.context, date, config.template_options, end_of_turn_ids(model, tokenizer))
    model.to(device_of(config.device))
    try:
        results = evaluate(model, encoder, config)
    except GameFailure as error:
        sys.exit(f"evaluate.py: {error}")
    print(format_table(results, columns_of(config)))
    steps = [step for played in results.values() for trajectory in played for step in trajectory.steps]
    for words in misfits(config, acted(steps, encoder.ends, tokenizer.unk_token_id)).values():
        print(f"WARNING: {words}")


if __name__ == "__main__":
    main()
