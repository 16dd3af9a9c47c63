"""How fast the two ALFWorld engines are, on the same games and actions, in one run on one core; and WebShop and Search.

    python lab/benchmarks/env_speed.py

A step is a command, its observation, the list of admissible commands and whether the goal holds. A cold reset of the
fast engine reads and parses the game file, a cached one finds it parsed; the official engine translates the problem at
every reset. Ratios are of totals over all games. The numbers of the others are absolute: WebShop's official engine
needs Java and Flask, that of Search is a retrieval server on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from envs import make_env
from envs.alfworld import files as alfworld_files
from envs.alfworld.engine import FastEngine, TextWorldEngine, load_game
from envs.alfworld.games import generate_games

REPEATS = 50  # of the fast engine's measurements, which are over too soon otherwise


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def walk(path: str, steps: int, rng: Random) -> list[str]:
    """Random admissible commands from the start of a game."""
    engine = FastEngine(load_game(path))
    commands = []
    for _ in range(steps):
        commands.append(rng.choice(engine.admissible_commands()))
        engine.step(commands[-1])
    return commands


def play(engine: FastEngine | TextWorldEngine, commands: list[str]) -> list[tuple[str, list[str], bool]]:
    return [(engine.step(command), engine.admissible_commands(), engine.won) for command in commands]


def cached_reset(path: str) -> str:
    return FastEngine(load_game(path)).reset()


def cold_reset(path: str) -> str:
    alfworld_files._load_game.cache_clear()
    return cached_reset(path)


def measure(paths: list[str], steps: int) -> dict[str, float]:
    """Seconds for one pass over all games, by what is measured."""
    total = dict.fromkeys(
        ("official step", "official reset", "fast step", "fast reset, cold", "fast reset, cached"), 0.0
    )
    for number, path in enumerate(paths):
        commands = walk(path, steps, Random(number))
        official, fast = TextWorldEngine(load_game(path)), FastEngine(load_game(path))
        total["official reset"] += seconds(official.reset)
        said = []
        total["official step"] += seconds(lambda: said.extend(play(official, commands)))  # noqa: B023
        fast.reset()
        assert play(fast, commands) == said, f"the engines differ on {path}; see tools/compare_engines.py"
        for _ in range(REPEATS):
            total["fast reset, cold"] += seconds(lambda: cold_reset(path)) / REPEATS  # noqa: B023
            total["fast reset, cached"] += seconds(lambda: cached_reset(path)) / REPEATS  # noqa: B023
            fast.reset()
            total["fast step"] += seconds(lambda: play(fast, commands)) / REPEATS  # noqa: B023
    return total


def webshop_rates(steps: int) -> dict[str, float]:
    """Steps a second on the generated catalogue: searches, and random admissible actions (resets included)."""
    rng, env = Random(0), make_env("webshop")
    tasks = env.tasks("train")
    searches = [env.goal(rng.choice(tasks))["instruction_text"] for _ in range(steps // 10)]

    def search() -> None:
        for number, text in enumerate(searches):
            if number % (env.max_steps - 1) == 0:
                env.reset(options={"game": tasks[0]})
            env.step(f"search[{text}]")

    def click() -> None:
        ended = True
        for number in range(steps):
            if ended:
                env.reset(options={"game": tasks[number % len(tasks)]})
                *_, info = env.step("search[hat]")
            _, _, terminated, truncated, info = env.step(rng.choice(info["admissible_actions"]))
            ended = terminated or truncated

    search()  # the first search and purchase load what stays loaded
    click()
    return {"searches": len(searches) / seconds(search), "random actions": steps / seconds(click)}


def search_rate(steps: int) -> float:
    """Steps a second on the generated corpus, BM25 in process: each step searches for another training question."""
    env = make_env("search")
    tasks = env.tasks("train")[: steps + 1]
    questions = [env.reset(options={"game": task})[1]["task"] for task in tasks]
    env.step(f"<search>{questions.pop()}</search>")  # the first search loads what stays loaded

    def search() -> None:
        for number, question in enumerate(questions):
            if number % (env.max_steps - 1) == 0:
                env.reset(options={"game": tasks[0]})
            env.step(f"<search>{question}</search>")

    return len(questions) / seconds(search)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=6, help="how many games, one kind of task after the other")
    parser.add_argument("--steps", type=int, default=50, help="steps in each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = generate_games(folder, "train", args.games, 0)
        total = measure(paths, args.steps)
    steps = args.games * args.steps
    rates = {name: (steps if "step" in name else args.games) / spent for name, spent in total.items()}
    print(
        f"{args.games} games of full-size rooms, {args.steps} steps each; Python {platform.python_version()}, one core"
    )
    print(f"{'':22}{'official':>12}{'fast':>12}{'ratio':>9}")
    for label, ours, theirs in (
        ("steps/s", "fast step", "official step"),
        ("resets/s, file cold", "fast reset, cold", "official reset"),
        ("resets/s, file cached", "fast reset, cached", "official reset"),
    ):
        print(f"{label:22}{rates[theirs]:12.2f}{rates[ours]:12.0f}{rates[ours] / rates[theirs]:8.0f}x")
    for name, rate in webshop_rates(20_000).items():
        print(f"WebShop, 1000 products: {rate:.0f} {name}/s")
    print(f"Search, 1107 passages: {search_rate(2000):.0f} searches/s")


if __name__ == "__main__":
    main()
