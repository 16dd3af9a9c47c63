"""How near a policy is to searching twice: python lab/experiments/two_searches.py [--runs runs/search-replicated]

Three of five generated questions need two searches, and success says nothing until both are made. This tells what a
policy learns before: it reads the held-out questions of that kind as somebody sees them who searches right, and at each
of the two places where a novice goes wrong, how probable is the right word?

    part first    at the first search, to ask for what the question names, and not for the whole question
    search again  after it, to search once more, and not to answer with what is there
    both likely   share of the questions where both are more probable than not: what a cold temperature makes of it

Means over the questions, at temperature 1, from the plain context, in %. RUNS holds the folders of compare.py: `start`
and ARM-seedN/policy, or with --trainings `startK` and ARM-startK-seedN/policy. One line an arm: the mean of its runs
and, in brackets, each run's. Then what episode skills do to the two words in the starting weights (mean over these),
the script's right ones and opid-placebo's words that say nothing:
log p(word | skill) - log p(word), which is A_skill where that word was sampled. The numbers are the line of the
folder's name in lab/results/two-searches.jsonl, and all lines' tables are in two-searches.md.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import lm  # noqa: F401  # isort: skip

import numpy as np
import torch

from config import parse_args
from data import Guidance
from envs.search.expert import SearchExpert
from evaluate import eval_splits, games_of
from lab.experiments.runs import RESULTS, ROOT, arm_of, commit, fingerprint
from lab.experiments.stored import add, read
from lab.experiments.tables import markdown
from router import guided_messages
from tiny.demonstrations import Demonstrator
from tiny.loading import load_model
from tiny.plays import Play
from tiny.search import FLAWS, avoidance
from variants.opid_placebo import EPISODE as NOTHING

SHOWN = ("part first", "search again", "both likely")
Place = tuple[list[int], int, int]  # the ids of what stands before, the id of the right word and of the careless one
SkillFor = Callable[[Play], str]  # a question -> the episode skill shown with it
SKILLS: dict[str, SkillFor] = {f"avoid: {flaw}": partial(avoidance, flaw=flaw) for flaw in FLAWS}
SKILLS["says nothing"] = lambda play: NOTHING


def places(games: list[str], demonstrator: Demonstrator, skill_for: SkillFor | None = None) -> list[list[Place]]:
    """The two places of each question that needs two searches, plain, or under an episode skill."""
    env, encoder, ids_of = demonstrator.env, demonstrator.encoder, demonstrator.answer
    expert, found = SearchExpert(random.Random(0)), []
    for game in games:
        observation, info = env.reset(options={"game": game})
        task = info["task"]
        expert.reset(task)
        if len(expert.hops) < 2:
            continue
        skill = Guidance("episode", skill_for(Play(task))) if skill_for else None
        prompts, searches, history, mine = [], [], [], []
        for careless in (f"search {expert.question}", "answer"):
            prompts.append(env.build_prompt("chat", task, history, observation, []))
            context = encoder.context(guided_messages(prompts, skill, "chat"), searches)
            right = expert.act(observation)
            searches.append(ids_of(right))
            mine.append(parting(context, searches[-1], ids_of(careless)))
            history = [*history, (observation, right)]
            observation = env.step(right)[0]
        found.append(mine)
    return found


def parting(context: list[int], right: list[int], careless: list[int]) -> Place:
    at = next(i for i, (a, b) in enumerate(zip(right, careless, strict=False)) if a != b)
    return context + right[:at], right[at], careless[at]


@torch.no_grad()
def logprobs_at(model, questions: list[list[Place]]) -> np.ndarray:
    """-> (questions, 2 places, 2) log-probs of the right and of the careless word."""

    def logprobs(ids: list[int], *words: int) -> list[float]:
        return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[list(words)].tolist()

    return np.array([[logprobs(*place) for place in question] for question in questions])


def summary(logprobs: np.ndarray) -> list[float]:
    """(questions, 2, 2) -> what is shown of a policy, each from 0 to 1."""
    right = np.exp(logprobs[..., 0])  # (questions, 2)
    return np.round([*right.mean(axis=0), (right > 0.5).all(axis=1).mean()], 4).tolist()


def shifted(model, games: list[str], demonstrator: Demonstrator, plain: np.ndarray) -> dict[str, list[list[float]]]:
    """Skill -> what it does to the right and to the careless word at each of the two places, nats, means over the
    questions. `plain`: what `logprobs_at` finds without a skill."""
    shifts = {name: logprobs_at(model, places(games, demonstrator, skill)) - plain for name, skill in SKILLS.items()}
    return {name: np.round(shift.mean(axis=0), 4).tolist() for name, shift in shifts.items()}  # (2 places, 2 words)


def starts_of(runs: Path) -> list[Path]:
    """The starting weights, by training. Raises FileNotFoundError where RUNS holds none."""
    starts = sorted(path for path in runs.glob("start*") if re.fullmatch(r"start\d*", path.name) and path.is_dir())
    if not starts:
        raise FileNotFoundError(f"{runs} holds no folder `start`: it is not where compare.py left its runs")
    return starts


def measure(runs: Path, most: int | None = None) -> tuple[dict[str, list[list[float]]], dict[str, list[list[float]]]]:
    """-> (arm -> the summary of each of its policies, the starting weights first; `shifted`, the mean over these).
    `most`: questions of each split, None: all."""
    config = parse_args(["--recipe", "laptop-search"])
    games = [game for split in eval_splits(config) for game in games_of(config, split)[:most]]
    found, shifts = {"start": []}, []
    for start in starts_of(runs):
        model, tokenizer = load_model(str(start))
        demonstrator = Demonstrator(tokenizer, seed=0, env="search", context=config.context)
        questions = places(games, demonstrator)
        plain = logprobs_at(model, questions)
        found["start"].append(summary(plain))
        shifts.append(shifted(model, games, demonstrator, plain))
    for run in sorted(runs.glob("*-seed*")):
        if (run / "policy").is_dir():
            model, _ = load_model(str(run / "policy"))
            found.setdefault(arm_of(run.name), []).append(summary(logprobs_at(model, questions)))
            print(f"{run} done", flush=True)
    return found, {skill: np.mean([each[skill] for each in shifts], axis=0).round(4).tolist() for skill in SKILLS}


def table(found: dict[str, list[list[float]]], shifts: dict[str, list[list[float]]]) -> str:
    rows = []
    for arm, policies in found.items():
        columns = 100 * np.array(policies).T  # (shown, policies)
        rows.append([arm, *(f"{c.mean():.0f} ({', '.join(f'{value:.0f}' for value in c)})" for c in columns)])
    policies = markdown(["policy", *(f"{name}, %" for name in SHOWN)], rows)
    nats = [[skill, *(nats_of(word) for place in by_place for word in place)] for skill, by_place in shifts.items()]
    head = [f"{place}: {word} word" for place in SHOWN[:2] for word in ("right", "careless")]
    return f"{policies}\n\n{markdown(['start under a skill, nats', *head], nats)}"


def nats_of(shift: float | None) -> str:
    """None: it was not read, in the results of an older version."""
    return "" if shift is None else f"{shift:+.2f}"


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/search-replicated", help="where compare.py left them")
    parser.add_argument("--games", type=int, help="questions of each split (default: those of an evaluation)")
    parser.add_argument("--results", type=Path, default=RESULTS / "two-searches.jsonl", help="NAME.jsonl")
    args = parser.parse_args(argv)
    found, shifts = measure(args.runs, args.games)
    text = table(found, shifts)
    starts = [fingerprint(start) for start in starts_of(args.runs)]
    result = {"name": args.runs.name, "commit": commit(), "start": starts, "shown": SHOWN}
    add(args.results, result | {"policies": found, "shifted": shifts})
    tables = [f"## {r['name']}\n\n{table(r['policies'], r['shifted'])}\n" for r in read(args.results)]
    args.results.with_suffix(".md").write_text("\n".join(tables))
    print(text)
    return text


if __name__ == "__main__":
    main()
