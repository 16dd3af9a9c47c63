"""Grouped multi-turn rollouts, batched over all live episodes. How a response is sampled: lm/sampler.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import Prompt, Step, Trajectory
from envs import Guard, Guarded, TextEnv
from lm.encoder import Encoder
from lm.obstacles import Mendable
from lm.sampler import Sampler
from lm.scoring import progress
from router import guided_messages

if TYPE_CHECKING:
    from runlog.start import Run


def play(run: Run, games: list, make_env: Callable[[], TextEnv] | None = None) -> tuple[list[Trajectory], dict]:
    """N episodes of each game, sampled from pi_old without any skill -> those that have a step, and metrics."""
    config, make_env = run.config, make_env or run.make_env
    with run.reading(run.policy):
        played, metrics = rollout(
            run.sampler(), run.encoder, make_env, games, config.rollouts, context_limit=config.context_limit
        )
    trajectories = [trajectory for trajectory in played if trajectory.steps]
    if not run.processes.sum(len(trajectories)):
        raise Mendable("not one first prompt fits: raise --context-limit or lower --max-new-tokens, or all failed")
    return trajectories, metrics


def rollout(
    sampler: Sampler,
    encoder: Encoder,
    make_env: Callable[[], TextEnv],
    games: list,
    group_size: int,
    *,
    context_limit: int,
) -> tuple[list[Trajectory], dict[str, float]]:
    """Play every game `group_size` times -> (trajectories grouped in order, metrics).

    All live episodes take their turn in one batch; a finished one leaves it. As many are alive at a time as the
    sampler's budget holds whole; the others wait until all of these have ended. An episode whose coming context could
    not hold a whole response within `context_limit` tokens ends there, unsuccessful, and is counted
    (rollout/context_full). One whose first context does not fit stays without steps (rollout/too_long). One whose
    environment fails is left out (rollout/failed); where more than a few do, GameFailure names their games.
    """
    room = context_limit - sampler.config.max_new_tokens  # for a context
    waiting = [(game, group) for group, game in enumerate(games) for _ in range(group_size)]
    episodes: list[Episode] = []
    live: list[int] = []  # of `episodes`
    bar = progress(waiting, "episodes")
    training = sampler.model.training
    sampler.model.eval()
    with Guard(make_env, len(waiting), group_size) as guard:
        while live or waiting:
            if not live:
                wave, waiting = waiting[: sampler.rows(context_limit)], waiting[sampler.rows(context_limit) :]
                live = list(range(len(episodes), len(episodes) + len(wave)))
                episodes += [Episode.start(guard.env(), game, group) for game, group in wave]
            contexts = {i: episodes[i].context(encoder) for i in live}
            for i in live:
                episodes[i].cut = episodes[i].env.failed or len(contexts[i]) > room
            live = [i for i in live if not episodes[i].cut]
            responses = sampler(live, [contexts[i] for i in live]) if live else []
            # judged together with what the template itself began the answer with, such as <think>
            texts = [encoder.began + encoder.decode(response) for response in responses]
            guard.prefetch([episodes[i].env for i in live], texts)
            for i, response, text in zip(live, responses, texts, strict=True):
                logprobs = sampler.recorded[i][-1] if sampler.recorded is not None else None  # of this turn
                episodes[i].act(contexts[i], response, text, logprobs)
            live = [i for i in live if not episodes[i].done]
            guard.close(episodes[i].env for i in contexts if i not in live)
            bar.update(len(contexts) - len(live))
    bar.close()
    sampler.model.train(training)
    episodes = [episode for episode in episodes if not episode.env.failed]
    return [episode.trajectory for episode in episodes], metrics_of(episodes) | guard.metrics


@dataclass
class Episode:
    """An episode under way: an environment, and what the policy has seen and done in it."""

    env: Guarded
    trajectory: Trajectory
    observation: str
    admissible: list[str]
    prompts: list[Prompt] = field(default_factory=list)
    done: bool = False
    cut: bool = False  # ended because the context was full

    @classmethod
    def start(cls, env: Guarded, game, group: int) -> Episode:
        observation, info = env.reset(options={"game": game})
        kind, name = info.get("task_type", ""), info.get("game", "")
        trajectory = Trajectory(info["task"], group, [], False, task_type=kind, game=name)
        return cls(env, trajectory, observation, info.get("admissible_actions", []))

    def context(self, encoder: Encoder) -> list[int]:
        """Open the coming turn -> its context ids."""
        task, steps = self.trajectory.task, self.trajectory.steps
        history = [(step.observation, step.action) for step in steps]
        self.prompts.append(self.env.build_prompt(encoder.style, task, history, self.observation, self.admissible))
        messages = guided_messages(self.prompts, None, encoder.style)  # no skill: its slots stay empty
        return encoder.context(messages, [step.response for step in steps])

    def act(self, context: list[int], response: list[int], text: str, logprobs: list[float] | None) -> None:
        """Parse the response, step the environment, record the turn."""
        action, valid = self.env.parse_action(text, self.admissible)
        before = self.observation
        self.observation, _, terminated, truncated, info = self.env.step(action)
        self.trajectory.steps.append(Step(self.prompts[-1], before, context, response, text, action, valid, logprobs))
        self.trajectory.success = bool(info.get("won"))
        self.admissible = info.get("admissible_actions", [])
        self.done = terminated or truncated


def metrics_of(episodes: list[Episode]) -> dict[str, float]:
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
