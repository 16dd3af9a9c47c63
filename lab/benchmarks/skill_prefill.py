"""How often can skills be parsed, with the answer started for the model and without? python benchmarks/skill_prefill.py

Plays episodes of random admissible actions (official observations), asks the model for skills of the same transcripts
both ways, prints the parse rates before and after the one retry, and an answer of each.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from data import Step, Trajectory
from envs.alfworld import AlfworldEnv, cached_games
from lm.encoder import Encoder
from lm.writers import model_writer
from skills import write_skills
from tiny.loading import load_model

ANSWERING = {"max_new_tokens": 160, "temperature": 1.0, "context_limit": 4096, "rollout_budget": 65536}
PREFILLS = ("", "{", '{"episode_summary": "')


def random_episode(game: str, seed: int, max_steps: int) -> Trajectory:
    rng, env = random.Random(seed), AlfworldEnv(max_steps=max_steps)
    observation, info = env.reset(options={"game": game})
    trajectory = Trajectory(info["task"], 0, [], False)
    for _ in range(max_steps):
        action = rng.choice(info["admissible_actions"])
        trajectory.steps.append(Step((), observation, [], [], action, action, True))
        observation, _, done, _, info = env.step(action)
        trajectory.success = info["won"]
        if done:
            break
    return trajectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py")
    parser.add_argument("--episodes", type=int, default=16, help="transcripts")
    parser.add_argument("--max-steps", type=int, default=5, help="steps an episode")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model.eval()
    encoder = Encoder(tokenizer, "window")
    games = cached_games("small", "train", args.episodes)
    trajectories = [random_episode(game, i, args.max_steps) for i, game in enumerate(games)]
    for prefill in PREFILLS:
        torch.manual_seed(0)
        write = model_writer(model, encoder, **ANSWERING, prefill=prefill)
        skills, metrics = write_skills(trajectories, write, max_step_skills=5, template=None)
        first, after = (100 * metrics[f"skills/{name}"] for name in ("first_parse_rate", "parse_rate"))
        print(f"prefill {prefill!r:<26} parsed at first {first:3.0f}%, after the retry {after:3.0f}%, ", end="")
        print(f"step skills a trajectory {metrics['skills/step_skills']:.1f}", flush=True)
        print(f"    for example {next((s for s in skills if s), None)}")


if __name__ == "__main__":
    main()
