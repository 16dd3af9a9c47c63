"""Are the skills that the tiny model writes right? python tools/skill_quality.py [--model tiny] [--games 100]

Lets the model play held-out games and write skills of its own episodes, then checks each against the game:

    parsed        the answer holds an episode skill
    episode right names the thing, the place and the order of work of this very task (success), or a flaw that the
                  episode really shows, with the right thing, place and treatment (failure)
    step right    what a player who knows only what was seen so far would do at that step
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from config import Config
from data import Skills, Trajectory
from envs.alfworld import TASK_TYPES
from envs.prompts import COMPACT_ANALYSIS
from evaluate import format_table, games_of, play
from lm.encoder import Encoder
from lm.writers import model_writer
from skills import write_skills
from tiny.alfworld import avoidance, flaw_of, order_of_work, replay
from tiny.loading import load_model


def check(trajectory: Trajectory, skills: Skills) -> tuple[bool, int, int]:
    """-> (episode skill right?, step skills right, step skills in all)."""
    seen = replay(trajectory)
    if trajectory.success:
        right = f"find {seen.thing} " in skills.episode and skills.episode.endswith(order_of_work(seen))
    else:
        right = skills.episode in (avoidance(seen, "forget"), avoidance(seen, flaw_of(seen)))
    steps = sum(text == seen.advice_in_words[t] for t, text in skills.steps.items())
    return right, steps, len(skills.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="'tiny' or the policy folder of a tiny run")
    parser.add_argument("--games", type=int, default=200, help="games of valid_seen")
    parser.add_argument("--temperature", type=float, default=1.0, help="of play and of skill writing")
    args = parser.parse_args()
    config = Config(eval_games=args.games, prompt="compact")
    model, tokenizer = load_model(args.model)
    torch.manual_seed(0)
    encoder = Encoder(tokenizer, config.context)
    games = games_of(config, "valid_seen")
    trajectories = play(model, encoder, replace(config, eval_temperature=args.temperature), games)
    print(format_table({"valid_seen": trajectories}, TASK_TYPES))
    write = model_writer(
        model,
        tokenizer,
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
