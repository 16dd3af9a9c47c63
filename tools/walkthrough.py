"""One iteration of OPID from task to update, on real data, with every number: python tools/walkthrough.py

The laptop model plays a few games, writes skills, is re-scored under them and takes one gradient step, by the very
functions of train.py. docs/walkthrough.md explains what is printed. A minute on a CPU, once the laptop model is there
(`make train` makes it).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from config import Config, parse_args
from data import Batch, Skills, Trajectory
from lm.packing import pack
from rescore import guided_context
from router import guided_messages
from skills import analysis_prompt
from train import Routes, Run, outcome_of

SETTINGS = "--tasks 4 --rollouts 4 --max-steps 12 --train-games 40 --eval-games 1 --eval-every 0 --iterations 1"


def title(text: str) -> None:
    print(f"\n## {text}\n")


def row_of(trajectories: list[Trajectory], i: int, t: int) -> int:
    """The row of step t of trajectory i in a batch."""
    return sum(len(trajectory.steps) for trajectory in trajectories[:i]) + t


def pick(trajectories: list[Trajectory], routes: Routes, batch: Batch) -> tuple[int, int]:
    """(trajectory, step): the step-guided step that its skill moved most, of a group whose outcomes differ."""
    best, size = (0, 0), -1.0
    for i, (trajectory, route) in enumerate(zip(trajectories, routes, strict=True)):
        outcomes = {other.success for other in trajectories if other.group == trajectory.group}
        for t, guidances in enumerate(route):
            moved = batch.skill_advantages[row_of(trajectories, i, t)].nan_to_num().abs().max().item()
            if len(outcomes) > 1 and any(guidance.level == "step" for guidance in guidances) and moved > size:
                best, size = (i, t), moved
    return best


def show_rollout(trajectories: list[Trajectory], i: int) -> None:
    title("1. Rollout")
    for group in sorted({trajectory.group for trajectory in trajectories}):
        played = [trajectory for trajectory in trajectories if trajectory.group == group]
        outcomes = " ".join("won" if trajectory.success else "lost" for trajectory in played)
        print(f"task {group}: {played[0].task:<40} {outcomes}")
    print(f"\nrollout {i} of these, turn by turn (observation -> response):")
    for t, step in enumerate(trajectories[i].steps):
        print(f"  {t:>2}  {step.observation[:70]:<70} -> {step.text}{'' if step.valid else '   (not admissible)'}")


def show_skills(run: Run, trajectory: Trajectory, skills: Skills | None) -> None:
    title("2. Skills")
    prompt = analysis_prompt(trajectory, run.config.max_step_skills, run.make_env().analysis_prompt())
    print(f"asked:\n  {prompt}")
    print(f"\nread from the answer:\n  episode: {skills.episode if skills else '(none)'}")
    for t, text in (skills.steps if skills else {}).items():
        print(f"  step {t}: {text}")


def show_contexts(run: Run, trajectory: Trajectory, t: int, guidance) -> None:
    title("3. Routing")
    print(f"step {t} is guided by its {guidance.level} skill: {guidance.text}")
    prompts = [step.prompt for step in trajectory.steps[: t + 1]]
    plain = guided_messages(prompts, None, run.encoder.style)
    guided = guided_messages(prompts, guidance, run.encoder.style)
    print("\nthe messages of h and of h^ (only what differs is shown twice):")
    for turn, (one, other) in enumerate(zip(plain, guided, strict=True)):
        print(f"  user {turn}     {one}")
        if one != other:
            print(f"  user {turn} (h^) {other}")
    h, augmented = trajectory.steps[t].context, guided_context(run.encoder, trajectory, t, guidance)
    print(f"\n|h| = {len(h)} tokens, |h^| = {len(augmented)} tokens, the same {len(trajectory.steps[t].response)} of y")


def show_tokens(run: Run, step, batch: Batch, row: int, outcome: torch.Tensor, weight: float) -> None:
    title("4. Re-scoring and 5. advantage, token by token")
    old, shift = batch.old_logprobs[row], batch.skill_advantages[row]  # (R,) each
    print("A_skill = log pi(y|h^) - log pi_old(y|h),   A = A_ep + lambda A_skill")
    print(f"A_ep = {outcome[row].item():+.2f}, lambda = {weight}\n")
    print(f"{'token':<14}{'log pi_old(y|h)':>16}{'log pi(y|h^)':>14}{'A_skill':>9}{'A':>8}")
    for k, token in enumerate(step.response):
        scored = old[k] + shift[k]
        word = run.tokenizer.decode([token])
        print(f"{word:<14}{old[k]:>16.2f}{scored:>14.2f}{shift[k]:>9.2f}{batch.advantages[row, k]:>8.2f}")


def show_outcome(run: Run, trajectories: list[Trajectory], group: int) -> torch.Tensor:
    """Prints A_ep of one group, with its mean and standard deviation over steps -> A_ep of every step (B,)."""
    outcome, _ = outcome_of(run.method, trajectories)  # (B,)
    title("5a. The outcome advantage of this task")
    mine = [trajectory for trajectory in trajectories if trajectory.group == group]
    returns = torch.tensor([run.config.success_reward * t.success for t in mine for _ in t.steps])
    steps = " + ".join(f"{len(t.steps)} steps of {run.config.success_reward * t.success:.0f}" for t in mine)
    print(f"over step samples: {steps}")
    print(f"mean {returns.mean():.2f}, std {returns.std():.2f}")
    for number, trajectory in enumerate(trajectories):
        if trajectory.group == group:
            row = row_of(trajectories, number, 0)
            reward = run.config.success_reward * trajectory.success
            print(f"  rollout {number}: A_ep = ({reward:.0f} - mean) / std = {outcome[row].item():+.2f}")
    return outcome


def show_update(run: Run, batch: Batch, updated: dict[str, float]) -> None:
    title("6. Update")
    sequences = pack(batch.contexts, batch.responses)
    print(f"{len(batch.responses)} steps in {len(sequences)} packed sequences, one forward pass each")
    print(f"loss before the step: policy {updated['loss/policy']:+.4f}, KL {updated['loss/kl']:.4f}")
    print(f"(the policy still is pi_old: every ratio is 1, so the first is minus the mean advantage, "
          f"{-(batch.advantages.sum() / batch.mask.sum()).item():+.4f})")  # fmt: skip
    with torch.no_grad():
        losses, terms = run._losses(sequences, batch)  # (N,)
    print(f"and after it:         policy {terms['loss/policy'].mean():+.4f}, KL {terms['loss/kl'].mean():.4f}, "
          f"together {losses.mean():+.4f}")  # fmt: skip


def walk(config: Config) -> None:
    """Plays one iteration and prints it."""
    run = Run(config)
    rng = run.seed(0)
    trajectories, _ = run.rollout(0, rng)
    skills, _ = run.write_skills(trajectories, rng)
    routes = run.route(trajectories, skills)
    batch, _ = run.rescore(trajectories, routes, 0)
    i, t = pick(trajectories, routes, batch)
    trajectory, guidance = trajectories[i], routes[i][t][0]
    show_rollout(trajectories, i)
    show_skills(run, trajectory, skills[i])
    show_contexts(run, trajectory, t, guidance)
    outcome = show_outcome(run, trajectories, trajectory.group)
    weight = config.step_weight if guidance.level == "step" else config.episode_weight
    show_tokens(run, trajectory.steps[t], batch, row_of(trajectories, i, t), outcome, weight)
    show_update(run, batch, run.update(batch, 0, rng))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of train.py on top of the walkthrough's own")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        walk(parse_args([*SETTINGS.split(), "--mini-batch", "0", "--out", folder, *args.flags]))


if __name__ == "__main__":
    main()
