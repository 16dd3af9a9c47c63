"""What flows between the files. Read this first.

    rollout -> [Trajectory] -> skills -> [Skills | None] -> router -> [[Guidance]] -> rescore, advantage -> Batch

Token ids are the truth: what was sampled is what is scored and trained on, never re-tokenised text. A skill changes a
prompt, never a response, so original and skill-augmented scores line up position by position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Level = Literal["episode", "step"]


@dataclass(frozen=True)
class Slot:
    """A named place in a prompt where a skill of one level may be put. `template` shows it: it contains `{text}` once,
    and other braces stand for themselves."""

    level: Level
    template: str

    def __post_init__(self):
        if self.template.count("{text}") != 1:
            raise ValueError(f"a slot's template holds {{text}} once, where the skill goes; not so {self.template!r}")


# A prompt with its slots still open: the pieces joined in order are one user message. A slot that no skill fills is
# the empty string, so the plain prompt and the augmented one differ by the skill and by nothing else.
Prompt = tuple[str | Slot, ...]


@dataclass
class Step:
    """One turn: what the policy saw, what it sampled, what came of it."""

    prompt: Prompt  # the user message of this turn, slots open
    observation: str  # the environment's text that this turn answers
    context: list[int]  # h_t: ids of everything the policy saw, slots empty
    response: list[int]  # y_t: ids exactly as sampled, end-of-turn token included where one was sampled
    text: str  # the response decoded, after what the template began it with; for the parser, people and skill prompts
    action: str  # the action parsed from it, as sent to the environment
    valid: bool  # False: no admissible action could be parsed
    logprobs: list[float] | None = None  # log p of each token when it was sampled; None: not recorded


@dataclass
class Trajectory:
    """One finished (or cut off) episode. `group` is shared by the N rollouts of one task."""

    task: str
    group: int
    steps: list[Step]
    success: bool  # the outcome
    task_type: str = ""
    game: str = ""  # where the task came from (a game file, a question id), for people


@dataclass
class Skills:
    """Hindsight skills of one trajectory: `episode` guides any step, `steps[t]` guides step t (0-based)."""

    summary: str
    episode: str
    steps: dict[int, str] = field(default_factory=dict)
    dropped: int = field(default=0, compare=False)  # step skills in the answer that could not be read


@dataclass(frozen=True)
class Guidance:
    """One skill routed to one step."""

    level: Level
    text: str


Route = list[tuple[Guidance, ...]]  # of each step of a trajectory, the skills that guide it
Contexts = list[list[int] | None]  # B rows of token ids; None: there is no such context


@dataclass
class Batch:
    """One iteration's steps, scored. B rows are steps pooled over trajectories, R is the longest response.

    All per-token tensors are response-only and right-padded. NaN means "not computed" (off the mask, or a row that was
    not scored); 0.0 never does, since as a log-prob it would mean certainty.
    """

    trajectories: list[Trajectory]
    skills: list[Skills | None]  # of each trajectory
    routes: list[Route]  # of each trajectory
    skill_contexts: dict[Level, Contexts]  # h^, with the skill of that level in it; None where none guides the step
    old_logprobs: Tensor  # (B, R) log pi_old(y | h), NaN beyond a response's end
    reference_logprobs: Tensor | None  # (B, R) log pi_ref(y | h); None where the KL term is off
    skill_logprobs: dict[str, Tensor]  # by level, (B, R) log pi(y | h^)
    advantages: Advantages = field(init=False, repr=False)  # from step 5 on
    updated: list[tuple] = field(default_factory=list, repr=False)  # of each micro-batch: where, log pi_theta, clipped

    @property
    def steps(self) -> list[Step]:
        """The B rows: h is a step's `context`, y its `response`."""
        return [step for trajectory in self.trajectories for step in trajectory.steps]

    @property
    def mask(self) -> Tensor:
        """(B, R) True on response tokens."""
        return ~self.old_logprobs.isnan()


@dataclass
class Advantages:
    """What the update uses, and what it is made of."""

    total: Tensor  # (B, R) A, 0 off the mask
    outcome: Tensor  # (B,) A_ep
    skill: Tensor  # (B, R) A_skill before its weight, NaN where no skill was scored
