"""What acting under a skill is worth, by what the skill says: python lab/experiments/skill_effect.py [--model tiny]

A model plays the held-out games under an episode skill in its prompt, all games under one kind of skill at a time. The
environment's script, which knows the games, writes them:

    none                  no skill
    workflow              the right order of work for this very game's task
    avoid: FLAW           what to avoid, for each flaw of the script's novice, about this very task
    says nothing          the fixed words of opid-placebo
    other type: ...       the same of a task of another type
    other thing: ...      the workflow of another task of the same type, where it reads differently

A bench on which the content of skills can be told from their presence has the right skills far above none, and those
that say nothing, or speak of something else, at none. One line a kind: success in % at each temperature, and how far it
is from none, with a 95% interval over games (the same games throughout, hence paired). The outcomes are a line of
lab/results/skill-effect.jsonl, and all lines' tables are in skill-effect.md. Flags of train.py are taken, too, such as
--recipe laptop-webshop (without one: laptop), --model runs/cold or --eval-games 40.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import lm  # isort: skip

import numpy as np
import torch

from config import Config, parse_args
from evaluate import environment, held_out_games, play
from lab.experiments.estimates import bootstrap_interval
from lab.experiments.runs import RESULTS, commit, on_the_laptop, settings
from lab.experiments.stored import add, read
from lab.experiments.tables import markdown
from lm.encoder import Encoder
from lm.loading import about_policy
from lm.sampler import end_of_turn_ids
from tiny.loading import load_model
from tiny.plays import Play, Script, script
from variants.opid_placebo import EPISODE as NOTHING
from variants.skill_grpo import UnderSkill

Kinds = dict[str, dict[str, str]]  # kind of skill -> game -> its text
Won = dict[str, dict[str, str]]  # kind of skill -> temperature -> of each game 1, 0, or - where it has no such skill


def kinds_of(games: list[str], types: dict[str, str], plays: dict[str, Play], told: Script) -> Kinds:
    """The skills of every kind. A game without a skill of a kind (no other type is there) is left out of it."""
    others = {game: [g for g in games if types[g] != types[game]] for game in games}
    alike = {game: [g for g in games if types[g] == types[game] and g != game] for game in games}
    writers: dict[str, Callable[[Play], str]] = {"workflow": told.workflow}
    writers |= {f"avoid: {flaw}": lambda seen, flaw=flaw: told.avoidance(seen, flaw) for flaw in told.FLAWS}
    kinds: Kinds = {"none": {}}
    kinds |= {name: {game: write(plays[game]) for game in games} for name, write in writers.items()}
    kinds["says nothing"] = dict.fromkeys(games, NOTHING)
    for name, write in writers.items():
        kinds[f"other type: {name}"] = drawn(others, plays, write)
    kinds["other thing: workflow"] = drawn(alike, plays, told.workflow)
    return {name: texts for name, texts in kinds.items() if texts or name == "none"}


def drawn(sources: dict[str, list[str]], plays: dict[str, Play], write: Callable[[Play], str]) -> dict[str, str]:
    """Each game's skill is written about one of its `sources`, so that it reads unlike its own."""
    rng, texts = random.Random(0), {}
    for game, possible in sources.items():
        different = [text for text in (write(plays[source]) for source in possible) if text != write(plays[game])]
        if different:
            texts[game] = rng.choice(different)
    return texts


def told_by(config: Config, games: list[str]) -> Kinds:
    """The kinds of skills for held-out games of the run's environment."""
    env, told, types, plays = environment(config)(), script(config.env), {}, {}
    for game in games:
        types[game] = env.reset(options={"game": game})[1].get("task_type", "")
        plays[game] = told.played(game, random.Random(0), set(), prompt=config.prompt)
    return kinds_of(games, types, plays, told)


class Shown(UnderSkill):
    """An environment whose opening prompt holds the skill of the very game."""

    def reset(self, options: dict) -> tuple[str, dict]:
        self.skill = self.known.get(options["game"])
        return self.env.reset(options=options)


def measure(config: Config, temperatures: list[float]) -> tuple[list[str], Won]:
    """-> the games, and who won which of those that have a skill of a kind."""
    with lm.one_line("skill_effect.py"):
        games = [game for split in held_out_games(config).values() for game in split]
        model, tokenizer = load_model(config.model, env=config.env, dtype=config.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    date, ends, won = about_policy(config.model).get("date"), end_of_turn_ids(model, tokenizer), {}
    encoder = Encoder(tokenizer, config.context, date, config.template_options, ends)
    make_env = environment(config)
    for kind, texts in told_by(config, games).items():
        mine = [game for game in games if game in texts or kind == "none"]
        for temperature in temperatures:
            torch.manual_seed(config.seed)
            hot = replace(config, eval_temperature=temperature)
            played = play(model, encoder, hot, mine, lambda texts=texts: Shown(make_env(), texts))
            outcomes = {game: str(int(t.success)) for game, t in zip(mine, played, strict=True)}
            won.setdefault(kind, {})[f"{temperature:g}"] = "".join(outcomes.get(game, "-") for game in games)
        print(f"{kind} done", flush=True)
    return games, won


def table(won: Won) -> str:
    temperatures = list(won["none"])
    head = ["episode skill shown", "games"]
    head += [cell for t in temperatures for cell in (f"T {t}, %", "less none, points", "95%")]
    rows = []
    for kind, by_temperature in won.items():
        cells = [kind, str(sum(one != "-" for one in by_temperature[temperatures[0]]))]
        for t in temperatures:
            pairs = [(int(own), int(none)) for own, none in zip(by_temperature[t], won["none"][t]) if own != "-"]
            gains = np.array([100 * (own - none) for own, none in pairs])  # (games,)
            low, high = bootstrap_interval(lambda g: float(g.mean()), gains, samples=1000)
            away = ["-", "-"] if kind == "none" else [f"{gains.mean():+.1f}", f"[{low:+.1f}, {high:+.1f}]"]
            cells += [f"{100 * np.mean([own for own, _ in pairs]):.1f}", *away]
        rows.append(cells)
    return markdown(head, rows)


def name_of(model: str) -> str:
    """runs/opid-seed0/policy -> opid-seed0; else the last part."""
    path = Path(model)
    return (path.parent if path.name == "policy" else path).name.replace(":", "-")


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.4, 1.0], help="default: 0.4 and 1")
    parser.add_argument("--results", type=Path, default=RESULTS / "skill-effect.jsonl", help="NAME.jsonl")
    parser.add_argument("--name", help="of the line (default: MODEL-ENV)")
    args, flags = parser.parse_known_args(argv)
    config = parse_args(on_the_laptop(flags))
    games, won = measure(config, args.temperatures)
    name = args.name or f"{name_of(config.model)}-{config.env}"
    result = {"name": name, "commit": commit(), "model": config.model, "config": settings(config)}
    add(args.results, result | {"games": [str(game) for game in games], "won": won})
    tables = [f"## {result['name']}\n\n{table(result['won'])}\n" for result in read(args.results)]
    args.results.with_suffix(".md").write_text("\n".join(tables))
    print(text := table(won))
    return text


if __name__ == "__main__":
    main()
