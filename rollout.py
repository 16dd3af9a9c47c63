"""Grouped multi-turn rollouts, batched over all live episodes. How a response is sampled: sampler.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from data import Guidance, Prompt, Step, Trajectory
from envs import TextEnv
from router import guided_messages
from sampler import Sampler, generate, plain_sampling

__all__ = ["Encoder", "Episode", "Sampler", "generate", "plain_sampling", "rollout"]


class Encoder:
    """User messages and sampled responses -> the token ids of a context, through the tokenizer's chat template.

    `style="window"`: each step is a single-turn prompt. `style="chat"`: one growing conversation, whose context is the
    previous context + the response ids exactly as sampled + the ids of the new message. Where the template rewrites
    earlier turns (some drop old thoughts) the conversation is rendered anew for each step, as the template wants it;
    then contexts do not extend one another, nothing is cached or packed, and `extends` is False.

    Messages hold text from outside (web pages, passages, skills) that may spell special tokens such as `<|im_end|>`.
    Those get a space inside, so that they stay text and no observation can forge a turn.
    """

    def __init__(self, tokenizer, style: str):
        if style not in ("window", "chat"):
            raise ValueError(f"context style must be 'window' or 'chat', not {style!r}")
        self.tokenizer, self.style = tokenizer, style
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.extends = self._template_extends()
        self._opening = lru_cache(maxsize=4096)(self._encode_opening)
        self._turn = lru_cache(maxsize=16384)(self._encode_turn)

    def context(self, messages: list[str], responses: list[list[int]]) -> list[int]:
        """`messages`: the user's, t + 1 of them ("window": the last one counts); `responses`: ids of the t before."""
        if self.style == "window":
            return self._opening(messages[-1])
        if not self.extends:
            texts = [self.tokenizer.decode(response, skip_special_tokens=True) for response in responses]
            return self._ids(self._render(_conversation(messages, texts)))
        ids = list(self._opening(messages[0]))
        for response, message in zip(responses, messages[1:], strict=True):
            turn = self._turn(message)
            # The template closes the assistant's turn itself; a response that was cut off lacks that token.
            ids += response + (turn[1:] if response[-1:] == turn[:1] else turn)
        return ids

    def _render(self, conversation: list[dict]) -> str:
        conversation = [turn | {"content": self._as_text(turn["content"])} for turn in conversation]
        # Off as in the authors' Qwen3 script, since the prompt itself asks for <think> tags; other templates ignore it.
        switches = {"enable_thinking": False}
        return self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, **switches)

    def _as_text(self, content: str) -> str:
        return self._special.sub(lambda token: f"{token[0][0]} {token[0][1:]}", content)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _template_extends(self) -> bool:
        thought = "<think>\na\n</think>\n\nb"
        opening = self._render([{"role": "user", "content": "c"}]) + thought
        return self._render(_conversation(["c", "d"], [thought])).startswith(opening)

    def _encode_opening(self, message: str) -> list[int]:
        return self._ids(self._render([{"role": "user", "content": message}]))

    def _encode_turn(self, message: str) -> list[int]:
        """Ids of what the template puts between a response's last word and the next one: end of turn, user message."""
        opening = self._render([{"role": "user", "content": "c"}]) + "b"
        return self._ids(self._render(_conversation(["c", message], ["b"]))[len(opening) :])


def _conversation(messages: list[str], responses: list[str]) -> list[dict]:
    turns = [{"role": "user", "content": messages[0]}]
    for response, message in zip(responses, messages[1:], strict=True):
        turns += [{"role": "assistant", "content": response}, {"role": "user", "content": message}]
    return turns


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
        """`episode_skills`: task type -> the skill to act under; a type that is not there is played without."""
        observation, info = env.reset(options={"game": game})
        trajectory = Trajectory(
            info["task"], group, [], False, task_type=info.get("task_type", ""), game=info.get("game", "")
        )
        text = (episode_skills or {}).get(trajectory.task_type)
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

    def act(self, context: list[int], response: list[int], text: str, success_reward: float, penalty: float) -> None:
        """Parse the response, step the environment, record the turn."""
        action, valid = self.env.parse_action(text, self.admissible)
        before = self.observation
        self.observation, _, terminated, truncated, info = self.env.step(action)
        won = bool(info.get("won"))
        step = Step(self.prompts[-1], before, context, response, text, action, valid, penalty * (not valid))
        self.trajectory.steps.append(step)
        self.trajectory.success, self.trajectory.reward = won, success_reward * won
        self.admissible = info.get("admissible_actions", [])
        self.done = terminated or truncated


def rollout(
    model,
    encoder: Encoder,
    make_env: Callable[[], TextEnv],
    games: list,
    group_size: int,
    *,
    max_new_tokens: int,
    context_limit: int,
    temperature: float = 1.0,
    success_reward: float = 10.0,
    invalid_penalty: float = 0.1,
    first_group: int = 0,
    reuse_cache: bool = True,
    episode_skills: dict[str, str] | None = None,
    sampler: Sampler | None = None,
    progress: Callable[[int, int], None] = lambda live, turn: None,
) -> tuple[list[Trajectory], dict[str, float]]:
    """Play every game `group_size` times -> (trajectories grouped in order, metrics).

    All live episodes take their turn in one batch; a finished one leaves it. An episode whose coming context could not
    hold a whole response within `context_limit` tokens ends there, unsuccessful, and is counted (rollout/context_full).
    Raises ValueError where even a first turn does not fit. With `episode_skills` (task type -> text) the policy acts
    under the skill of a game's type; one that leaves no room is left out (rollout/skilled counts the others).
    `sampler` (default: a plain one) knows trajectory i by the key i; one that keeps finished rows can go on from them.
    """
    episodes = [
        Episode.start(make_env(), game, first_group + g, episode_skills)
        for g, game in enumerate(games)
        for _ in range(group_size)
    ]
    if sampler is None:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "reuse_cache": reuse_cache}
        sampler = Sampler(model, encoder.tokenizer, **sampling)
    turn, live = 0, list(range(len(episodes)))
    training = model.training
    model.eval()
    while live:
        progress(len(live), turn)
        contexts = {i: episodes[i].context(encoder) for i in live}
        for i in live:
            if turn == 0 and episodes[i].skill and len(contexts[i]) + max_new_tokens > context_limit:
                contexts[i] = episodes[i].drop_skill(encoder)
            episodes[i].cut = len(contexts[i]) + max_new_tokens > context_limit
            if episodes[i].cut and turn == 0:
                raise ValueError(
                    f"the first prompt has {len(contexts[i])} tokens and leaves no room for {max_new_tokens} more in a "
                    f"context of {context_limit}: raise --context-limit or lower --max-new-tokens"
                )
        live = [i for i in live if not episodes[i].cut]
        responses = sampler(live, [contexts[i] for i in live]) if live else []
        texts = [encoder.tokenizer.decode(response, skip_special_tokens=True) for response in responses]
        if live and (prefetch := getattr(episodes[live[0]].env, "prefetch", None)):
            prefetch(texts)
        for i, response, text in zip(live, responses, texts, strict=True):
            episodes[i].act(contexts[i], response, text, success_reward, invalid_penalty)
        live = [i for i in live if not episodes[i].done]
        turn += 1
    model.train(training)
    skilled = {} if episode_skills is None else {"rollout/skilled": sum(e.skill is not None for e in episodes)}
    return [episode.trajectory for episode in episodes], _metrics(episodes) | skilled


def _metrics(episodes: list[Episode]) -> dict[str, float]:
    steps = [step for episode in episodes for step in episode.trajectory.steps]
    return {
        "episodes": len(episodes),
        "train/success": sum(episode.trajectory.success for episode in episodes) / len(episodes),
        "rollout/steps": len(steps) / len(episodes),
        "rollout/valid_actions": sum(step.valid for step in steps) / len(steps),
        "rollout/response_tokens": sum(len(step.response) for step in steps) / len(steps),
        "rollout/context_full": sum(episode.cut for episode in episodes),
    }
