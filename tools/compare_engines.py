"""Plays the two ALFWorld engines side by side and prints every difference in what they say.

    python tools/compare_engines.py --games generate --count 120 --steps 50 --seed 0

A third of the games is played as the walkthrough says and then at random, the others at random throughout, with some
commands that aren't admissible. Observation, admissible commands (an ordered list) and `won` are compared at each step.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lm  # noqa: E402, F401  # isort: skip

from envs.alfworld.engine import FastEngine, TextWorldEngine, load_game  # noqa: E402
from envs.alfworld.expert import shortest_plan  # noqa: E402
from envs.alfworld.games import generate_games  # noqa: E402

JUNK = 0.1  # share of the random steps that send something inadmissible
DULL = ("go to ", "examine ", "look", "inventory", "help")  # chosen less often, or little else would happen
SHOWN = 10  # differences printed in full


@dataclass
class Comparison:
    """What was compared. `differences` are texts; none is what one hopes for."""

    games: int = 0
    steps: int = 0  # first observations not counted
    won: int = 0  # games in which the goal held at some step
    kinds: Counter[str] = field(default_factory=Counter)  # by task type
    verbs: Counter[str] = field(default_factory=Counter)  # first words of the commands that did something
    differences: list[str] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        self.games += other.games
        self.steps += other.steps
        self.won += other.won
        self.kinds += other.kinds
        self.verbs += other.verbs
        self.differences += other.differences


def compare(paths: list[str], steps: list[int], seed: int = 0, processes: int = 2, plain: bool = False) -> Comparison:
    """Compare the engines on each game for its number of steps, in several processes."""
    total = Comparison()
    jobs = [
        (path, count, f"{seed} {index}", (index + index // 6) % 3 == 0)  # each kind of task gets its turn
        for index, (path, count) in enumerate(zip(paths, steps, strict=True))
    ]
    prepare = None if plain else spare_repeated_work
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=prepare) as pool:
        for result in pool.map(compare_game, jobs):
            total.add(result)
    return total


def compare_game(job: tuple[str, int, str, bool]) -> Comparison:
    """Play one game on both engines. `job` is (path, steps, seed of the walk, whether to follow the walkthrough)."""
    path, steps, seed, expert = job
    game, rng = load_game(path), Random(seed)
    result = Comparison(games=1, steps=steps, kinds=Counter([game.task_type]))
    fast, official = FastEngine(game), TextWorldEngine(game)
    note_differences("(reset)", (fast.reset(), official.reset()), (fast, official), result)
    plan = shortest_plan(fast)[::-1] if expert else []
    won = False
    for number in range(1, steps + 1):
        command = plan.pop() if plan else draw_command(fast, rng)
        said = fast.step(command)
        note_differences(f"step {number} {command!r}", (said, official.step(command)), (fast, official), result)
        won |= fast.won
        result.verbs["(nothing happens)" if said == "Nothing happens." else command.split()[0]] += 1
    result.won += won
    official.close()
    return result


def draw_command(engine: FastEngine, rng: Random) -> str:
    """A random command, mostly an admissible one, and more often one that moves something than not."""
    if rng.random() < JUNK:
        return junk(engine, rng)
    commands = engine.admissible_commands()
    lively = [command for command in commands if not command.startswith(DULL)]
    return rng.choice(lively if lively and rng.random() < 0.6 else commands)


def junk(engine: FastEngine, rng: Random) -> str:
    """Something that most likely isn't admissible: of another state, mistyped, or no command at all."""
    game = engine.game
    thing, receptacle = rng.choice(game.things), rng.choice(game.receptacles)
    known = rng.choice(engine.admissible_commands())
    return rng.choice([
        "", " ", "look around", "go to", "take", f"go to {thing}", f"take {thing} from {receptacle}",
        f"move {thing} to {receptacle}", f"put {thing} in/on {receptacle}", f"open {receptacle}", f"examine {thing}",
        f"heat {thing} with {receptacle}", f"slice {thing} with {thing}", known.upper(), f"  {known}\t", known + ".",
        known.replace(" ", "  "), f"{known}; {known}",
    ])  # fmt: skip


def note_differences(
    when: str, said: tuple[str, str], engines: tuple[FastEngine, TextWorldEngine], result: Comparison
) -> None:
    fast, official = engines
    for what, ours, theirs in (
        ("observation", *said),
        ("admissible commands", fast.admissible_commands(), official.admissible_commands()),
        ("won", fast.won, official.won),
    ):
        if ours != theirs:
            text = f"{fast.game.path}, {when}: {what}\n  fast:     {ours!r}\n  official: {theirs!r}"
            result.differences.append(text)


def spare_repeated_work() -> None:
    """Make the official engine of this process quicker for good. What it says stays the same; `--plain` does without.

    It parses the same few templates and conditions with a grammar compiler at every step, copies the names of things
    deeply though it only reads them, translates each problem at loading and again at each reset, and translates it once
    more for a planner that only `policy_commands` would use.
    """
    import fast_downward
    from textworld.envs.pddl import textgen

    translate = lru_cache(maxsize=1)(fast_downward.pddl2sas)
    fast_downward.pddl2sas = lambda domain, problem, **_: translate(domain, problem)
    parse = lru_cache(maxsize=1000)(textgen._parse_and_convert)
    # The symbols of a derivation are written to, so each derivation gets its own
    textgen._parse_and_convert = lambda text, rule_name, **_: deepcopy(parse(text, rule_name=rule_name))
    textgen.Rule.parse_conjunctive_query = lru_cache(maxsize=1000)(textgen.Rule.parse_conjunctive_query)
    textgen.copy_context = lambda c: c | {"variables": dict(c["variables"]), "mapping": dict(c["mapping"])}


def describe(result: Comparison, seconds: float) -> str:
    """The result as text: counts first, then the differences."""
    kinds, verbs = (", ".join(f"{n} {name}" for name, n in c.most_common()) for c in (result.kinds, result.verbs))
    lines = [
        f"games                {result.games}  ({kinds})",
        f"games won on the way {result.won}",
        f"steps compared       {result.steps}  ({verbs})",
        f"seconds              {seconds:.0f}",
        f"differences          {len(result.differences)}",
    ]
    return "\n".join(lines + result.differences[:SHOWN])


def find_or_generate(games: str, count: int, seed: int, folder: str) -> list[str]:
    """`count` game files: found under the folder `games`, evenly spread, or generated in `folder` for two splits."""
    if games == "generate":
        halves = (("train", count - count // 2), ("valid_unseen", count // 2))
        return [path for split, n in halves for path in generate_games(folder, split, n, seed)]
    found = sorted(map(str, Path(games).glob("**/game.tw-pddl")))
    return found[:: max(1, len(found) // count)][:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", default="generate", help="a folder with game files, or 'generate'")
    parser.add_argument("--count", type=int, default=120, help="how many games")
    parser.add_argument("--steps", type=int, default=50, help="steps in each")
    parser.add_argument("--seed", type=int, default=0, help="of the games and the walks")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--plain", action="store_true", help="run the official engine without remembered parses")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = find_or_generate(args.games, args.count, args.seed, folder)
        start = time.perf_counter()
        result = compare(paths, [args.steps] * len(paths), args.seed, args.processes, args.plain)
    print(describe(result, time.perf_counter() - start))
    return 1 if result.differences or not result.games else 0


if __name__ == "__main__":
    sys.exit(main())
