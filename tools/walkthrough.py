"""One iteration of OPID from task to update, on real data, with every number: python tools/walkthrough.py

The laptop model plays a few games, writes skills, is re-scored under them and takes one gradient step, by the very
functions of train.py. docs/walkthrough.md explains what is printed. Half a minute on a CPU. Flags of train.py go on
top of the walkthrough's own, such as --seed 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # isort: skip

import torch

from config import Config, parse_args
from data import Batch, Guidance, Route, Skills, Trajectory
from lm.scoring import pack, response_logprobs
from lm.writers import Writer
from rescore import rescore, skill_context
from rollout import play
from router import guided_messages, route
from runlog.start import Run, start
from skills import own_skills
from train import opid_advantages, opid_loss, policy_loss, update

SETTINGS = "--recipe laptop --tasks 4 --rollouts 4 --max-steps 12 --train-games 40 --mini-batch 0"
SETTINGS += " --iterations 1 --eval-games 1 --eval-every 0"


def recorded(write: Writer, exchanges: list[tuple[str, str | None]]) -> Writer:
    """The same writer; `exchanges` gets what it is asked and what it answers: first of each rollout, then again."""

    def write_and_keep(prompts: list[str]) -> list[str | None]:
        answers = write(prompts)
        exchanges.extend(zip(prompts, answers, strict=True))
        return answers

    return write_and_keep


def title(text: str) -> None:
    print(f"\n## {text}\n")


def number(value, digits: int = 2, sign: str = "") -> str:
    """Rounded; no minus in front of a zero, whose sign is rounding's alone."""
    return f"{round(float(value), digits) + 0.0:{sign}.{digits}f}"


def row_of(trajectories: list[Trajectory], i: int, t: int) -> int:
    """The row of step t of trajectory i in a batch."""
    return sum(len(trajectory.steps) for trajectory in trajectories[:i]) + t


def pick(batch: Batch) -> tuple[int, int]:
    """(trajectory, step): of the guided steps the one that its skill moved most, rather one with a step skill, and of a
    group whose outcomes differ. Raises ValueError where no step is guided."""
    outcomes: dict[int, set[bool]] = {}
    for trajectory in batch.trajectories:
        outcomes.setdefault(trajectory.group, set()).add(trajectory.success)
    worth = {}
    for i, (trajectory, guided) in enumerate(zip(batch.trajectories, batch.routes, strict=True)):
        for t, guidances in enumerate(guided):
            if guidances:
                moved = batch.advantages.skill[row_of(batch.trajectories, i, t)].nan_to_num().abs().max().item()
                worth[i, t] = len(outcomes[trajectory.group]), guidances[0].level == "step", moved
    if not worth:
        raise ValueError("no step is guided: no answer could be read as skills, or the method has none")
    return max(worth, key=worth.get)


def show_rollout(trajectories: list[Trajectory], i: int) -> None:
    title("1. Rollout")
    for group in sorted({trajectory.group for trajectory in trajectories}):
        played = [trajectory for trajectory in trajectories if trajectory.group == group]
        outcomes = " ".join("won" if trajectory.success else "lost" for trajectory in played)
        print(f"task {group}: {played[0].task:<40} {outcomes}")
    print(f"\nrollout {i} (observation -> response):")
    for t, step in enumerate(trajectories[i].steps):
        print(f"{t:>4}  {step.observation[:65]:<65} -> {step.text}{'' if step.valid else '   (not admissible)'}")


def show_skills(run: Run, i: int, skills: Skills, exchanges: list[tuple[str, str | None]]) -> None:
    title("2. Skills")
    if exchanges:
        prompt, answer = exchanges[i]
        print(f"the writer ({run.config.skill_writer}) was asked about rollout {i}:\n\n{prompt}")
        print(f"\nand answered:\n\n{answer}\n")
        for again, second in exchanges if answer is not None else ():
            if again.startswith(f"{prompt}\n\nEarlier answer:\n{answer[:1000]}"):
                print(f"which could not be read; told why and asked again, it answered:\n\n{second}\n")
                break
    print("read from it:")
    print(f"  summary: {skills.summary}\n  episode skill: {skills.episode}")
    for t, text in skills.steps.items():
        print(f"  step skill {t}: {text}")


def show_routes(run: Run, trajectory: Trajectory, routes: Route, t: int) -> None:
    title("3. Routing")
    print("which skill guides which step:")
    print("  " + "  ".join(f"{k} {'+'.join(g.level for g in guidances) or '-'}" for k, guidances in enumerate(routes)))
    own = routes[t][0]
    print(f"\nh_{t} beside h^_{t}, which has the {own.level} skill of step {t} (> where they differ):\n")
    side_by_side(run, trajectory, own, t)
    for k, guidances in enumerate(routes):
        if guidances and guidances[0].level != own.level:
            print(f"\nh_{k} beside h^_{k}, which has the {guidances[0].level} skill; only what differs:\n")
            side_by_side(run, trajectory, guidances[0], k, whole=False)
            break


def side_by_side(run: Run, trajectory: Trajectory, guidance: Guidance, t: int, whole: bool = True) -> None:
    """The messages and responses of h and h^ of step t."""
    prompts = [step.prompt for step in trajectory.steps[: t + 1]]
    plain = guided_messages(prompts, None, run.encoder.style)
    guided = guided_messages(prompts, guidance, run.encoder.style)
    answers = [step.text for step in trajectory.steps[t + 1 - len(plain) : t]] + [""]  # the last one is y_t
    for one, other, answer in zip(plain, guided, answers, strict=True):
        if whole or one != other:
            print_columns(f"<user> {one}", f"<user> {other}")
        if whole:
            print_columns(f"<assistant> {answer}", f"<assistant> {answer}")


def print_columns(left: str, right: str, width: int = 58) -> None:
    columns = textwrap.wrap(left, width), textwrap.wrap(right, width)
    for one, other in zip_longest(*columns, fillvalue=""):
        print(f"{one:<{width}} {' ' if left == right else '>'} {other}".rstrip())


def show_scores(run: Run, trajectory: Trajectory, t: int, batch: Batch, row: int, guidance: Guidance) -> None:
    title("4. Re-scoring")
    step, augmented = trajectory.steps[t], skill_context(run.encoder, trajectory, t, guidance)
    lengths = len(step.context), len(augmented), len(step.response)
    print("h_{0}: {1} tokens, h^_{0}: {2} tokens, y_{0}: the same {3} tokens\n".format(t, *lengths))
    old, shift = batch.old_logprobs[row], batch.advantages.skill[row]  # (R,) each
    print(f"{'token of y':<16}{'log pi_old(y|h)':>17}{'log pi(y|h^)':>14}{'A_skill':>9}")
    for k, token in enumerate(step.response):
        scores = f"{number(old[k]):>17}{number(old[k] + shift[k]):>14}{number(shift[k], sign='+'):>9}"
        print(f"{run.tokenizer.decode([token]):<16}{scores}")


def show_outcomes(run: Run, batch: Batch, group: int) -> None:
    """A_ep of one group, with its mean and standard deviation over steps."""
    trajectories, outcome = batch.trajectories, batch.advantages.outcome  # (B,)
    title("5. Advantage")
    mine = [trajectory for trajectory in trajectories if trajectory.group == group]
    rewards = [run.config.success_reward * trajectory.success for trajectory in mine]  # R(tau)
    returns = torch.tensor([r for r, trajectory in zip(rewards, mine, strict=True) for _ in trajectory.steps])
    steps = " + ".join(f"{len(tau.steps)} steps of {r:.0f}" for r, tau in zip(rewards, mine, strict=True))
    print(f"task {group}: {steps}: mean {number(returns.mean())}, std {number(returns.std())}")
    for i, trajectory in enumerate(trajectories):
        if trajectory.group == group:
            reward, advantage = run.config.success_reward * trajectory.success, outcome[row_of(trajectories, i, 0)]
            print(f"  rollout {i}: R = {reward:.0f}, A_ep = (R - mean) / std = {number(advantage, sign='+')}")


def show_tokens(run: Run, step, batch: Batch, row: int, weight: float) -> None:
    found = batch.advantages
    print(f"\n{'token of y':<16}{'A_ep':>8} + {f'{weight} A_skill':>11} = {'A':>7}")
    for k, token in enumerate(step.response):
        parts = found.outcome[row], weight * found.skill[row, k], found.total[row, k]
        one, two, both = (number(part, 3, "+") for part in parts)
        print(f"{run.tokenizer.decode([token]):<16}{one:>8}{two:>14}{both:>10}")


def show_update(run: Run, batch: Batch, step, row: int, updated: dict[str, float]) -> None:
    """What one optimizer step did to the loss, and to the tokens of one step."""
    title("6. Update")
    config, steps = run.config, batch.steps
    sequences = pack([step.context for step in steps], [step.response for step in steps])
    print(f"{len(steps)} steps, {int(batch.mask.sum())} tokens, in {len(sequences)} packed sequences")
    print(f"minus the mean of A: {number(-batch.advantages.total.sum() / batch.mask.sum(), 3, '+')}\n")
    with torch.no_grad():
        losses, terms = opid_loss(run, sequences, batch)  # (n,)
    after = {name: term.mean().item() for name, term in terms.items()}
    print(f"{'':<22}{'PPO-clip':>9}{'KL':>8}{'loss':>9}{'clipped':>9}")
    for when, means in (("before the step", updated), ("after it", after)):
        loss = means["loss/policy"] + config.kl * means["loss/kl"]
        parts = f"{number(means['loss/policy'], 3, '+'):>9}{number(means['loss/kl'], 3):>8}{number(loss, 3, '+'):>9}"
        print(f"{when:<22}{parts}{number(100 * means['clip_fraction'], 0):>8}%")
    new = response_logprobs(
        run.policy, [step.context], [step.response], temperature=config.temperature, token_budget=config.token_budget
    )[0]  # (len(y),)
    old, advantages = (part[row, : len(new)] for part in (batch.old_logprobs, batch.advantages.total))
    losses, _ = policy_loss(new, old, advantages, config.clip, config.dual_clip)  # (len(y),)
    print(f"\n{'token of y':<16}{'A':>8}{'pi_old':>8}{'pi_theta':>10}{'r':>6}{'PPO-clip':>10}")
    for k, token in enumerate(step.response):
        chances = f"{number(old[k].exp()):>8}{number(new[k].exp()):>10}{number((new[k] - old[k]).exp()):>6}"
        ends = f"{number(advantages[k], 3, '+'):>8}", f"{number(losses[k], 3, '+'):>10}"
        print(f"{run.tokenizer.decode([token]):<16}{ends[0]}{chances}{ends[1]}")


def walk(config: Config) -> None:
    """Plays one iteration and prints it. Raises ValueError where no step is guided, or A_skill is another one."""
    if config.algo != "opid" or not config.levels:
        raise ValueError("it shows the shift of the paper: --algo opid, and a weight that is not 0")
    if (config.normalize, config.group_over, config.invalid_penalty) != ("mean_std", "steps", 0.0):
        raise ValueError("it shows one outcome advantage: no other --normalize, --group-over or --invalid-penalty")
    run, exchanges = start(config), []
    run.writer = recorded(run.writer, exchanges)
    weights = json.loads(Path(config.out, "start.json").read_text())["weights"]
    print(f"model {config.model}, weights {weights[:12]}, seed {config.seed}")
    run.begin(0)
    trajectories, _ = play(run, run.rng.sample(run.games, min(config.tasks, len(run.games))))
    skills, _ = own_skills(run, trajectories)
    routes = [route(tau, own, config.routing, run.levels) for tau, own in zip(trajectories, skills, strict=True)]
    batch, _ = rescore(run, trajectories, skills, routes)
    batch.advantages = opid_advantages(run, batch)
    i, t = pick(batch)
    trajectory, guidance, row = trajectories[i], routes[i][t][0], row_of(trajectories, i, t)
    show_rollout(trajectories, i)
    show_skills(run, i, skills[i], exchanges)
    show_routes(run, trajectory, routes[i], t)
    show_scores(run, trajectory, t, batch, row, guidance)
    show_outcomes(run, batch, trajectory.group)
    weight = config.step_weight if guidance.level == "step" else config.episode_weight
    show_tokens(run, trajectory.steps[t], batch, row, weight)
    show_update(run, batch, trajectory.steps[t], row, update(run, batch, opid_loss))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _, flags = parser.parse_known_args(argv)
    torch.set_num_threads(1)  # the order of sums, and so the last digits, are the same on every machine
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS.split(), "--out", folder, *flags]
        with lm.one_line("walkthrough.py"):
            walk(parse_args(settings))


if __name__ == "__main__":
    main()
