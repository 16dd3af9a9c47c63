"""What is logged of an iteration, and what it is over many processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data import Batch

Metrics = dict[str, float]

TOKENS = ("tokens/sampled", "tokens/skills", "tokens/scored", "tokens/trained")  # docs/metrics.md says what counts
# Over many processes counts are added up, and means are weighted by how many of these a process has.
COUNTS = {
    *("episodes", "rollout/context_full", "rollout/failed", "rollout/skilled", "rollout/too_long"),
    *("skills/failed", "skills/retried", "skills/too_long", "skills/step_keys_dropped"),
    *("guided/episode_too_long", "guided/step_too_long"),
    *TOKENS,
}
MEANS_OVER = {
    "episodes": ("train/success", "rollout/steps", "skills/parse_rate", "skills/first_parse_rate"),
    "skills": ("skills/step_skills",),
    "groups": ("advantage/silent_groups",),
    "steps": (
        *("rollout/valid_actions", "rollout/response_tokens", "guided/episode", "guided/step"),
        *("rollout/cut_off", "rollout/unknown_tokens"),
        "advantage/noise_floor",
    ),
    "states": ("advantage/state_group_size",),
    "tokens": ("advantage/outcome_abs", "guided/tokens", "rollout/entropy"),
    "guided tokens": ("advantage/skill_abs", "advantage/skill_mean"),
}
LARGEST = {"rollout/logprob_gap"}  # of all processes
WEIGHED_BY = {name: over for over, names in MEANS_OVER.items() for name in names}


def read_lines(path: Path) -> list[dict]:
    """metrics.jsonl, evaluations.jsonl or samples.jsonl: see `each_line`."""
    return list(each_line(path))


def each_line(path: Path, every: int = 1) -> Iterator[dict]:
    """One record in `every`, but for a last line that is being written, or was when its run was killed. Raises
    FileNotFoundError where the file is not there, and ValueError for a line that is no record."""
    with open(path) as file:  # line by line: samples may be larger than memory
        for number, line in enumerate(file):
            if number % every or not line.endswith("\n"):
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number + 1} of {path} is damaged: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path} is no file of a run: it holds {record!r}")
            yield record


def sizes_of(batch: Batch, metrics: Metrics) -> dict[str, float]:
    """How many of each this process has, for means over all processes (MEANS_OVER)."""
    steps = len(batch.steps)
    return {
        "episodes": len(batch.trajectories),
        "skills": sum(s is not None for s in batch.skills),
        "groups": len({trajectory.group for trajectory in batch.trajectories}),
        "steps": steps,
        "states": steps / metrics.get("advantage/state_group_size", 1.0),
        "tokens": batch.mask.sum().item(),
        "guided tokens": (~batch.advantages.skill.isnan()).sum().item(),
    }


def over_processes(metrics: Metrics, sizes: dict[str, float], accelerator) -> Metrics:
    """Counts added up, of LARGEST the largest, means weighted by `sizes`; any other metric is the same everywhere, or a
    clock's."""
    names = sorted(name for name in metrics if not name.startswith("eval/") and name != "seconds/evaluate")
    shares = [1.0 if name in COUNTS else sizes.get(WEIGHED_BY.get(name), 1.0) for name in names]
    sums = [metrics[name] * share if share else 0.0 for name, share in zip(names, shares, strict=True)]  # no NaN * 0
    pairs = torch.tensor([[sums, shares]], dtype=torch.float64, device=accelerator.device)  # (1, 2, names)
    gathered, reduced = accelerator.gather(pairs), {}  # (processes, 2, names)
    for i, name in enumerate(names):
        values, counts = gathered[:, 0, i], gathered[:, 1, i]  # (processes,) each
        mean = values.sum() / counts.sum().clamp(min=1e-9)
        chosen = values.max() if name in LARGEST else values.sum() if name in COUNTS else mean
        reduced[name] = chosen.item()
    return reduced


def silent_groups(groups: list[int], rewards: list[float]) -> dict[int, bool]:
    """Group -> whether all its rollouts earned the same, so that the outcome says nothing about its steps. One entry of
    `groups` and `rewards` per trajectory."""
    seen: dict[int, set[float]] = {}
    for group, reward in zip(groups, rewards, strict=True):
        seen.setdefault(group, set()).add(reward)
    return {group: len(earned) == 1 for group, earned in seen.items()}


def advantage_metrics(outcome: Tensor, skill_advantages: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean |A_ep| over response tokens, and mean |A_skill| and A_skill over those that a skill was scored on."""
    guided = skill_advantages[~skill_advantages.isnan()]  # (guided tokens,)
    count = max(len(guided), 1)
    return {
        "advantage/outcome_abs": ((outcome.abs()[:, None] * mask).sum() / mask.sum()).item(),
        "advantage/skill_abs": guided.abs().sum().item() / count,
        "advantage/skill_mean": guided.sum().item() / count,
    }


def entropy(old_logprobs: Tensor, mask: Tensor) -> float:
    """Mean -log pi_old(y | h) over response tokens, in nats: an estimate of the policy's entropy a token, at the
    sampling temperature. (B, R) each."""
    return -old_logprobs[mask].mean().item()
