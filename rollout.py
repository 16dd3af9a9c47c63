"""Grouped multi-turn rollouts, batched over all live episodes. How a response is sampled: lm/sampler.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from data import Guidance, Prompt, Step, Trajectory
from envs import TextEnv
from lm.encoder import Encoder
from lm.sampler import Sampler
from router import guided_messages


@dataclass
class Episode:
    """An episode under way: an environment, and what the policy has seen and done in it."""

    env: TextEnv
    trajectory: Trajectory
    observation: str
    admissible: list[str]
    prompts: list[Prompt] = field(default_factory=list)
    done: bool = False
    cut: bool = False  # ended because the context was full
    skill: Guidance | None = None  # an episode skill that the policy acts under

    @classmethod
    def start(cls, env: TextEnv, game, group: int, episode_skills: dict[str, str] | None = None) -> Episode:
        """`episode_skills`: game, or task type, -> the skill to act under; what is not there is played without."""
        observation, info = env.reset(options={"game": game})
        trajectory = Trajectory(
            info["task"], group, [], False, task_type=info.get("task_type", ""), game=info.get("game", "")
        )
        skills = episode_skills or {}
        text = skills.get(trajectory.game) or skills.get(trajectory.task_type)
        skill = Guidance("episode", text) if text else None
        return cls(env, trajectory, observation, info.get("admissible_actions", []), skill=skill)

    def context(self, encoder: Encoder) -> list[int]:
        """Open the coming turn -> its context ids: the plain context, unless the episode is played under a skill."""
        steps = self.trajectory.steps
        history = [(step.observation, step.action) for step in steps]
        task = self.trajectory.task
        prompt = self.env.build_prompt(encoder.style, task, history, self.observation, self.admissible)
        self.prompts.append(prompt)
        messages = guided_messages(self.prompts, self.skill, encoder.style)
        return encoder.context(messages, [step.response for step in steps])

    def drop_skill(self, encoder: Encoder) -> list[int]:
        """The first turn's context without the skill, which leaves no room there."""
        self.skill = None
        self.prompts.clear()
        return self.context(encoder)

    def act(self, context: list[int], response: list[int], text: str) -> None:
        """Parse the response, step the environment, record the turn."""
        action, valid = self.env.parse_action(text, self.admissible)
        before = self.observation
        self.observation, _, terminated, truncated, info = self.env.step(action)
        self.trajectory.steps.append(Step(self.prompts[-1], before, context, response, text, action, valid))
        self.trajectory.success = bool(info.get("won"))
        self.admissible = info.get("admissible_actions", [])
        self.done = terminated or truncated


def rollout(
    sampler: Sampler,
    encoder: Encoder,
    make_env: Callable[[], TextEnv],
    games: list,
    group_size: int,
    *,
    context_limit: int,
    episode_skills: dict[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda waiting, live: None,
) -> tuple[list[Trajectory], dict[str, float]]:
    """Play every game `group_size` times -> (trajectories grouped in order, metrics).

    All live episodes take their turn in one batch; a finished one leaves it. As many are alive at a time as the
    sampler's budget holds whole; the others wait until all of these have ended. An episode whose coming context could
    not hold a whole response within `context_limit` tokens ends there, unsuccessful, and is counted
    (rollout/context_full). One whose first context does not fit stays without steps (rollout/too_long). With
    `episode_skills` (game or task type -> text) the policy acts under a game's skill; one that leaves no room is
    left out (rollout/skilled counts the others).
    """
    room = context_limit - sampler.config.max_new_tokens  # for a context
    waiting = [(game, group) for group, game in enumerate(games) for _ in range(group_size)]
    episodes: list[Episode] = []
    live: list[int] = []  # of `episodes`
    training = sampler.model.training
    sampler.model.eval()
    while live or waiting:
        if not live:
            wave, waiting = waiting[: sampler.rows(context_limit)], waiting[sampler.rows(context_limit) :]
            live = list(range(len(episodes), len(episodes) + len(wave)))
            episodes += [Episode.start(make_env(), game, group, episode_skills) for game, group in wave]
        progress(len(waiting), len(live))
        contexts = {i: episodes[i].context(encoder) for i in live}
        for i in live:
            if episodes[i].skill and not episodes[i].trajectory.steps and len(contexts[i]) > room:
                contexts[i] = episodes[i].drop_skill(encoder)
            episodes[i].cut = len(contexts[i]) > room
        live = [i for i in live if not episodes[i].cut]
        responses = sampler(live, [contexts[i] for i in live]) if live else []
        # judged together with what the template itself began the answer with, such as <think>
        texts = [encoder.began + encoder.tokenizer.decode(r, skip_special_tokens=True) for r in responses]
        if live and (prefetch := getattr(episodes[live[0]].env, "prefetch", None)):
            prefetch(texts)
        for i, response, text in zip(live, responses, texts, strict=True):
            episodes[i].act(contexts[i], response, text)
            if sampler.recorded is not None:
                episodes[i].trajectory.steps[-1].logprobs = sampler.recorded[i][-1]
        live = [i for i in live if not episodes[i].done]
    sampler.model.train(training)
    skilled = {} if episode_skills is None else {"rollout/skilled": sum(e.skill is not None for e in episodes)}
    return [episode.trajectory for episode in episodes], _metrics(episodes) | skilled


def _metrics(episodes: list[Episode]) -> dict[str, float]:
    steps = [step for episode in episodes for step in episode.trajectory.steps]
    played = sum(bool(episode.trajectory.steps) for episode in episodes)
    return {
        "episodes": played,
        "train/success": sum(episode.trajectory.success for episode in episodes) / max(1, played),
        "rollout/steps": len(steps) / max(1, played),
        "rollout/valid_actions": sum(step.valid for step in steps) / max(1, len(steps)),
        "rollout/response_tokens": sum(len(step.response) for step in steps) / max(1, len(steps)),
        "rollout/context_full": sum(episode.cut for episode in episodes if episode.trajectory.steps),
        "rollout/too_long": len(episodes) - played,
    }
