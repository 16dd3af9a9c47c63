"""Controls that a sceptic asks for: python train.py --algo lab.experiments.controls:NAME. Their questions:

    FACTS         does a model have to write? Plain facts of the same episode in place of skills
    OTHERS_FACTS  do such facts have to be of this episode? Those of another task's
    PEER          is a success of the same task better than a lesson? Its transcript (SDPO, arXiv 2601.20802)
    BLIND         what does hindsight add? The writer reads the task, and not what happened
    SAME_TYPE     is a skill about the task, or about its type? One of another task of the type
    RANDOM_STEPS  does it matter which step a step skill stands at? At random ones, none at its own
    PULL          how much is the pull towards the frozen scorer? No skill at all (0 in the first iteration)
    PERMUTED      does it matter which token is praised? A_skill in random order within each response
    AVERAGED      or is it enough to praise a response? Its mean A_skill at all its tokens
    SKILL_ONLY    what do skills teach alone? No outcome
    CENTRED       is it the mean of A_skill that ruins? A_skill less its mean over the batch, level by level
    CLIPPED       or is it a few large shifts? A_skill of a token between -0.5 and 0.5 nats

FACTS, OTHERS_FACTS and PEER are for pretrained models: the tiny one knows few of their words. Notation as in
variants/__init__.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advantage import combine, skill_advantage, sum_of_scored
from config import OWN, Config
from data import Advantages, Batch, Level, Skills, Trajectory
from runlog.start import Run
from skills import GENERAL_TEMPLATE, own_skills, write_skills
from train import OPID, Variant, outcomes
from variants.opid_shift import reference_logprobs
from variants.opid_shuffled import Settings as ShuffledSettings
from variants.opid_shuffled import exchanged, other_tasks
from variants.sdpo import turn_ends

Written = tuple[list[Skills | None], dict[str, float]]  # of each trajectory, and metrics

# ---- what they share -------------------------------------------------------------------------------------------------


def shifts_of(batch: Batch) -> dict[str, Tensor]:
    """A_skill by level, as OPID has it. -> (B, R) each"""
    return {level: skill_advantage(s, batch.old_logprobs, batch.mask) for level, s in batch.skill_logprobs.items()}


def summed(run: Run, batch: Batch, outcome: Tensor, shifts: dict[str, Tensor]) -> Advantages:
    """A = `outcome` + lambda A_skill."""
    weights = {"episode": run.config.episode_weight, "step": run.config.step_weight}
    shown = sum_of_scored(shifts, batch.skill_logprobs, batch.mask)  # (B, R)
    return Advantages(combine(outcome, shifts, weights, batch.mask), outcome, shown)


def words_alone(run: Run, batch: Batch) -> Advantages:
    """OPID's without A_skill at the ends of turns, where it is NaN. A policy that was never taught what such contexts
    are for reads their lists of commands on, where it should stop, whatever they say: without this up to 88% of all
    |A_skill| of FACTS lies there. As in variants/sdpo.py."""
    ends = turn_ends(batch)  # (B, R)
    shifts = {level: shift.masked_fill(ends, 0.0) for level, shift in shifts_of(batch).items()}
    advantages = summed(run, batch, outcomes(run.config, batch.trajectories), shifts)
    return replace(advantages, skill=advantages.skill.masked_fill(ends, float("nan")))


# ---- facts in place of skills ----------------------------------------------------------------------------------------

MOST = 10  # commands that a fact lists
SMALL_WORDS = {"a", "and", "at", "for", "from", "in", "into", "of", "on", "the", "to", "with"}
NOTHING = {"", "nothing happens", "no results", "information result no search results found information"}


@dataclass
class Unwritten(Config):
    @property
    def writes_skills(self) -> bool:
        return False


@dataclass
class OthersUnwritten(Unwritten, ShuffledSettings):
    pass


def own_facts(run: Run, trajectories: list[Trajectory]) -> Written:
    return [facts(trajectory, run.config.max_step_skills) for trajectory in trajectories], {}


def others_facts(run: Run, trajectories: list[Trajectory]) -> Written:
    every, metrics = own_facts(run, trajectories)
    return exchanged(run, trajectories, every, other_tasks), metrics


def facts(trajectory: Trajectory, most_steps: int) -> Skills:
    """What happened, in plain words. Of an episode the outcome, what was done and what of it changed nothing; in words
    that its first step could see, and in no order, so that neither the answer nor where something lay is said. Of a
    step what had changed nothing by then, where the command before it did not.
    """
    steps = trajectory.steps
    idle = [t for t in range(len(steps) - 1) if changed_nothing(steps[t].observation, steps[t + 1].observation)]
    known = set(words_of(f"{trajectory.task} {steps[0].observation}")) | SMALL_WORDS
    done = listed(hidden(step.action, known) for step in steps)
    text = f"This attempt {'succeeded' if trajectory.success else 'failed'}. It did, in no order: {done}."
    if idle:
        text += f" Of that changed nothing: {listed(hidden(steps[t].action, known) for t in idle)}."
    tried = {t + 1: listed(steps[i].action for i in idle if i <= t) for t in idle[:most_steps]}
    return Skills("", text, {t: f"Tried before, and changed nothing: {commands}." for t, commands in tried.items()})


def changed_nothing(before: str, after: str) -> bool:
    return after == before or " ".join(words_of(after)) in NOTHING


def hidden(command: str, known: set[str]) -> str:
    """A command with "..." for words that are not among the `known`, and for the place that something was taken from.
    Its first word, what kind it is, stays."""
    command = re.sub(r"(?<=\bfrom\b ).*", "...", command)
    first = re.search(r"\w+", command)
    known = known | {first[0].lower()} if first else known
    shown = re.sub(r"\w+", lambda word: word[0] if word[0].lower() in known else "...", command)
    return re.sub(r"\.\.\.(\s+\.\.\.)+", "...", shown)


def listed(commands: Iterable[str]) -> str:
    """The first `MOST` different ones, by the alphabet."""
    return "; ".join(sorted(list(dict.fromkeys(commands))[:MOST]))


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


FACTS = replace(OPID, skills=own_facts, advantages=words_alone, settings=Unwritten)
OTHERS_FACTS = replace(OPID, skills=others_facts, advantages=words_alone, settings=OthersUnwritten)


# ---- other skills ----------------------------------------------------------------------------------------------------


@dataclass
class PeerSettings(Unwritten):
    @property
    def least_rollouts(self) -> int:
        return 2


def peers(run: Run, trajectories: list[Trajectory]) -> Written:
    """The episode skill is the transcript of another rollout of the group that succeeded; None where none did. It says
    the answer, as in SDPO."""
    sources = [
        [peer for peer in trajectories if peer.success and peer.group == own.group and peer is not own]
        for own in trajectories
    ]
    return [Skills("", transcript(run.rng.choice(source))) if source else None for source in sources], {}


def transcript(trajectory: Trajectory) -> str:
    lines = [" ".join(f"{step.observation} -> {step.action}".split()) for step in trajectory.steps]
    return "\n".join(["A successful attempt:", *lines])


def blind_skills(run: Run, trajectories: list[Trajectory]) -> Written:
    """Asked for as usual, without the steps and the outcome; kept at steps that the episode has."""
    most = run.config.max_step_skills
    template = blind(run.make_env().analysis_prompt() or GENERAL_TEMPLATE, most)
    with run.reading(run.models.get(run.config.skill_writer)):
        return write_skills(trajectories, run.writer, max_step_skills=most, template=template)


def blind(template: str, most: int) -> str:
    """A template that shows nothing of the episode: nor its length, by the number of skills."""
    template = template.replace(" outcome {outcome} {steps}", "")  # the compact one, which has few words
    focus = "in which order to work, what to check and what to avoid."
    for field, text in {"outcome": "not shown", "steps": "not shown", "focus": focus, "max_step_skills": most}.items():
        template = template.replace(f"{{{field}}}", str(text))
    return template


def same_type_skills(run: Run, trajectories: list[Trajectory]) -> Written:
    written, metrics = own_skills(run, trajectories)
    return exchanged(run, trajectories, written, same_type), metrics


def same_type(trajectories: list[Trajectory], at: int, having: list[bool]) -> list[int]:
    """The trajectories, of those that have skills (`having`), whose task is of the type of `at`'s and another one: of
    these the tasks with the fewest words in common, so that they are about other things."""
    own = trajectories[at]
    common = {
        i: len(set(words_of(other.task)) & set(words_of(own.task)))
        for i, other in enumerate(trajectories)
        if having[i] and other.task_type == own.task_type and other.task != own.task
    }
    return [i for i, number in common.items() if number == min(common.values())]


def at_random_steps(run: Run, trajectories: list[Trajectory]) -> Written:
    written, metrics = own_skills(run, trajectories)
    pairs = zip(trajectories, written, strict=True)
    return [own and replace(own, steps=moved(own.steps, len(t.steps), run.rng)) for t, own in pairs], metrics


def moved(skills: dict[int, str], steps: int, rng: random.Random) -> dict[int, str]:
    """The same texts at as many of `steps` steps, drawn at random; where there are two or more, none at its own."""
    while True:
        drawn = rng.sample(range(steps), len(skills))
        if steps < 2 or all(new != old for new, old in zip(drawn, skills, strict=True)):
            return dict(zip(drawn, skills.values(), strict=True))


PEER = replace(OPID, skills=peers, advantages=words_alone, settings=PeerSettings)
BLIND = replace(OPID, skills=blind_skills)
SAME_TYPE = replace(OPID, skills=same_type_skills, settings=ShuffledSettings)
RANDOM_STEPS = replace(OPID, skills=at_random_steps)


# ---- other advantages ------------------------------------------------------------------------------------------------

CLIP = 0.5  # nats: five times less than a skill blames the word "answer" where the tiny model answers too early


@dataclass
class PullSettings(Unwritten):
    scorer: str = OWN("reference", "must be frozen: the policy has no pull towards itself", ("reference",))

    def __post_init__(self):
        self.step_weight = 0.0  # every step is pulled alike, with lambda_ep
        super().__post_init__()


def no_skills(run: Run, trajectories: list[Trajectory]) -> Written:
    return [None] * len(trajectories), {}


def pull(run: Run, batch: Batch) -> Advantages:
    # A_skill = log pi_ref(y | h) - log pi_old(y | h), at every step
    outcome, mask = outcomes(run.config, batch.trajectories), batch.mask  # (B,), (B, R)
    shift = skill_advantage(reference_logprobs(run, batch), batch.old_logprobs, mask)  # (B, R)
    total = combine(outcome, {"episode": shift}, {"episode": run.config.episode_weight}, mask)  # (B, R)
    return Advantages(total, outcome, shift.masked_fill(~mask, float("nan")))


def permuted(shift: Tensor, mask: Tensor, rng: random.Random) -> Tensor:
    """The values of each response in random order, the responses as they were. (B, R), (B, R) -> (B, R)"""
    mixed = shift.clone()
    for row, length in enumerate(mask.sum(1).tolist()):
        mixed[row, :length] = shift[row, rng.sample(range(length), length)]
    return mixed


def averaged(shift: Tensor, mask: Tensor) -> Tensor:
    """The mean of each response at all its tokens. (B, R), (B, R) -> (B, R)"""
    mean = (shift * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (B,)
    return torch.where(mask, mean[:, None], 0.0)


def skill_alone(run: Run, batch: Batch) -> Advantages:
    """The outcome is only logged."""
    outcome = outcomes(run.config, batch.trajectories)  # (B,)
    return replace(summed(run, batch, torch.zeros_like(outcome), shifts_of(batch)), outcome=outcome)


PULL = replace(OPID, skills=no_skills, advantages=pull, settings=PullSettings)
SKILL_ONLY = replace(OPID, advantages=skill_alone)


def centred(shift: Tensor, skill_logprobs: Tensor) -> Tensor:
    """A_skill of a level less its mean over the tokens that it was scored on. For a skill that does not depend on y,
    under the policy's own scores, that mean is -KL(pi(. | h) || pi(. | h^)): every sampled token is blamed on average.
    (B, R), (B, R) -> (B, R)"""
    scored = ~skill_logprobs.isnan()  # (B, R)
    return torch.where(scored, shift - shift[scored].mean(), 0.0) if scored.any() else shift


def with_shifts(change: Callable[[Run, Batch, Level, Tensor], Tensor]) -> Variant:
    """OPID with another A_skill of each level: `change` of its own. (B, R) -> (B, R)"""

    def advantages(run: Run, batch: Batch) -> Advantages:
        shifts = {level: change(run, batch, level, shift) for level, shift in shifts_of(batch).items()}
        return summed(run, batch, outcomes(run.config, batch.trajectories), shifts)

    return replace(OPID, advantages=advantages)


PERMUTED = with_shifts(lambda run, batch, level, shift: permuted(shift, batch.mask, run.rng))
AVERAGED = with_shifts(lambda run, batch, level, shift: averaged(shift, batch.mask))
CENTRED = with_shifts(lambda run, batch, level, shift: centred(shift, batch.skill_logprobs[level]))
CLIPPED = with_shifts(lambda run, batch, level, shift: shift.clamp(-CLIP, CLIP))
