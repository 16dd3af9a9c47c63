"""Skill-GRPO: the policy acts under an earlier episode's skill, and nothing is re-scored. SDAR release, with fixed
skill files there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from accelerate.utils import gather_object

from data import Guidance, Prompt, Skills, Trajectory
from envs import TextEnv
from rollout import play
from router import fill
from runlog.start import Run
from skills import own_skills
from train import OPID
from variants.grpo import Settings as GrpoSettings


@dataclass
class Settings(GrpoSettings):
    @property
    def writes_skills(self) -> bool:
        return True


class UnderSkill:
    """An environment whose opening prompt holds the skill that is known for its game's type."""

    def __init__(self, env: TextEnv, known: dict[str, str]):
        self.env, self.known, self.skill = env, known, None

    def __getattr__(self, name: str):
        return getattr(self.env, name)

    def reset(self, options: dict) -> tuple[str, dict]:
        observation, info = self.env.reset(options=options)
        self.skill = self.known.get(info.get("task_type", ""))
        return observation, info

    def build_prompt(self, style: str, task: str, history: list, observation: str, admissible: list[str]) -> Prompt:
        prompt = self.env.build_prompt(style, task, history, observation, admissible)
        opens = style == "window" or not history
        return (fill(prompt, Guidance("episode", self.skill)),) if self.skill and opens else prompt


def play_under_skills(run: Run, games: list) -> tuple[list[Trajectory], dict[str, float]]:
    known, envs = run.state.setdefault("episode_skills", {}), []

    def make_env() -> TextEnv:
        envs.append(UnderSkill(run.make_env(), known))
        return cast(TextEnv, envs[-1])  # its __getattr__ hands on what it does not define

    trajectories, metrics = play(run, games, make_env)
    skills, written = own_skills(run, trajectories)
    run.state["episode_skills"] = remember(known, gather_object(lessons(trajectories, skills)))
    return trajectories, metrics | written | {"rollout/skilled": sum(env.skill is not None for env in envs)}


def lessons(trajectories: list[Trajectory], skills: list[Skills | None]) -> list[tuple[bool, str, str]]:
    """What is worth remembering for other tasks of a kind: (success, task type, episode skill)."""
    pairs = zip(trajectories, skills, strict=True)
    return [(t.success, t.task_type, s.episode) for t, s in pairs if s is not None]


def remember(known: dict[str, str], new: list[tuple[bool, str, str]]) -> dict[str, str]:
    """Task type -> its newest episode skill; of one iteration's `lessons`, the last success before any failure."""
    return known | {task_type: text for _, task_type, text in sorted(new, key=lambda lesson: lesson[0])}


VARIANT = replace(OPID, play=play_under_skills, settings=Settings)
