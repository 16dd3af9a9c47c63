"""Are the skills that the tiny model writes right? python tools/skill_quality.py [--model tiny] [--games 100]

Lets the model play held-out games and write skills of its own episodes, then checks each against the game:

    parsed        the answer holds an episode skill
    episode right names the thing, the place and the order of work of this very task (success), or a flaw that the
                  episode really shows, with the right thing, place and treatment (failure)
    step right    what a player who knows only what was seen so far would do at that step
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # isort: skip

import torch

from config import Config
from data import Skills, Trajectory
from envs.alfworld import TASK_TYPES
from envs.prompts import COMPACT_ANALYSIS
from evaluate import format_table, games_of, play
from lm.encoder import Encoder
from lm.loading import about_policy
from lm.writers import model_writer
from skills import write_skills
from tiny.alfworld import avoidance, flaw_of, order_of_work, replay
from tiny.loading import load_model
from tiny.plays import Script


def check(trajectory: Trajectory, skills: Skills) -> tuple[bool, int, int]:
    """-> (episode skill right?, step skills right, step skills in all)."""
    seen = replay(trajectory)
    if trajectory.success:
        right = skills.episode.startswith(f"for {seen.thing} ") and skills.episode.endswith(order_of_work(seen))
    else:
        right = skills.episode == avoidance(seen, flaw_of(seen))
    steps = sum(text == seen.advice_in_words[t] for t, text in skills.steps.items())
    return right, steps, len(skills.steps)


def share_right(trajectories: list[Trajectory], skills: list[Skills | None], script: Script, prompt: str) -> str:
    """How many of the episode skills have what a script would have written for the task: the words that name objects
    and places, and the others in their order; where to look for a thing is a guess and does not count."""
    counts: Counter[str] = Counter()
    for trajectory, own in zip(trajectories, skills, strict=True):
        if own is not None:
            play = script.played(trajectory.game, random.Random(0), set(), prompt=prompt)  # it knows what the task is
            avoidances = [script.avoidance(play, flaw) for flaw in script.FLAWS]
            scripted = [script.workflow(play)] if trajectory.success else avoidances
            counts.update(name for name, right in agreement(own.episode, scripted, script.names()).items() if right)
    written = max(1, sum(own is not None for own in skills))
    return ", ".join(f"{name} {100 * counts[name] / written:.0f}%" for name in (*script.names(), "order", "all"))


def agreement(text: str, scripted: list[str], names: dict[str, set[str]]) -> dict[str, bool]:
    """Which kinds of names, and which order of all other words, a skill shares with the most similar of `scripted`."""
    closest = max(scripted, key=lambda other: SequenceMatcher(None, text.split(), other.split()).ratio())
    right = {}
    for kind, known in names.items():
        own, wanted = ([w for w in after_find(words).split() if w in known] for words in (text, closest))
        right[kind] = own == wanted
    every = set().union(*names.values())
    own, wanted = ([w for w in words.split() if w not in every and w != "or"] for words in (text, closest))
    return right | {"order": own == wanted, "all": own == wanted and all(right.values())}


def after_find(text: str) -> str:
    """A skill from where the thing is taken on."""
    return text.partition(" take ")[2] or text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="'tiny' or the policy folder of a tiny run")
    parser.add_argument("--games", type=int, default=200, help="games of valid_seen")
    parser.add_argument("--temperature", type=float, default=1.0, help="of play and of skill writing")
    args = parser.parse_args()
    config = Config.from_recipe("laptop", eval_games=args.games)
    with lm.one_line("skill_quality.py"):
        if (env := about_policy(args.model).get("acts", {}).get("env", "alfworld")) != "alfworld":
            raise ValueError(f"{args.model} was trained for {env}, and the scripts here know ALFWorld's skills alone")
        model, tokenizer = load_model(args.model)
    torch.manual_seed(0)
    encoder = Encoder(tokenizer, config.context)
    games = games_of(config, "valid_seen")
    trajectories = play(model, encoder, replace(config, eval_temperature=args.temperature), games)
    print(format_table({"valid_seen": trajectories}, TASK_TYPES))
    write = model_writer(
        model,
        encoder,
        max_new_tokens=config.skill_tokens,
        temperature=args.temperature,
        context_limit=config.context_limit,
        prefill=config.skill_prefill,
        rollout_budget=config.rollout_budget,
    )
    skills, metrics = write_skills(
        trajectories, write, max_step_skills=config.max_step_skills, template=COMPACT_ANALYSIS
    )
    rows = [(t.success, *check(t, s)) for t, s in zip(trajectories, skills, strict=True) if s]
    print(f"parsed at first {100 * metrics['skills/first_parse_rate']:.0f}%, after a retry ", end="")
    print(f"{100 * metrics['skills/parse_rate']:.0f}%")
    for name, chosen in (("success", True), ("failure", False)):
        group = [row for row in rows if row[0] == chosen]
        print(f"{name}: {len(group)} episode skills, {100 * sum(r[1] for r in group) / max(1, len(group)):.0f}% right")
    steps, right = sum(row[3] for row in rows), sum(row[2] for row in rows)
    print(f"{steps} step skills, {100 * right / max(1, steps):.0f}% right")
    for trajectory, s in list(zip(trajectories, skills, strict=True))[:4]:
        print(f"\ntask {trajectory.task}, {'success' if trajectory.success else 'failure'}: {s}")


if __name__ == "__main__":
    main()
