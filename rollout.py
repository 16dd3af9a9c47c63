"""Grouped multi-turn rollouts with Hugging Face `generate`, batched over all live episodes.

Sampling is plain: temperature, and nothing else (top_p 1, top_k off, no repetition penalty). What is sampled must be
what is scored, so a model's own generation_config may not leak in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers import GenerationConfig

from data import Prompt, Step, Trajectory
from envs import TextEnv
from router import fill


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


def end_of_turn_ids(model, tokenizer) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those that the model's own configuration names."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def plain_sampling(model, tokenizer, *, max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Temperature sampling and nothing else; temperature 0 is greedy.

    `generate` fills every option that is unset from `model.generation_config`, so that one is replaced, too, by one
    that holds token ids only (Qwen ships top_p 0.8, top_k 20, repetition_penalty 1.05).
    """
    ends, pad = end_of_turn_ids(model, tokenizer), tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        eos_token_id=ends,
        pad_token_id=pad,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
        **sampling,
    )


class Sampler:
    """`generate` over a batch of contexts, one call a turn. Keeps the KV cache from turn to turn where contexts grow.

    `ids` and `mask` (both (rows, length)) hold all that the cache has seen. A new turn's tokens are left-padded within
    their own chunk, and what `generate` wrote after a row's end-of-turn token is masked; position ids follow the mask,
    so padding inside a row changes nothing. Where any context does not extend what its row holds, all are read anew.
    """

    def __init__(self, model, tokenizer, *, max_new_tokens: int, temperature: float, reuse_cache: bool = True):
        self.model, self.reuse_cache = model, reuse_cache
        self.config = plain_sampling(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
        self.ends, self.pad = set(self.config.eos_token_id), self.config.pad_token_id
        self._forget()

    def _forget(self) -> None:
        self.keys: list[int] = []  # which episode each row of the cache belongs to
        self.seen: list[list[int]] = []  # the ids behind each row, padding left out
        self.ids = self.mask = self.cache = None

    def __call__(self, keys: list[int], contexts: list[list[int]]) -> list[list[int]]:
        """Sample one response for each of `contexts`; `keys` name the episodes, so that finished ones leave."""
        if not self._grows(keys, contexts):
            self._forget()
            self.keys, self.seen = list(keys), [[] for _ in keys]
        elif keys != self.keys:
            self._select([self.keys.index(key) for key in keys])
        self._append([context[len(seen) :] for context, seen in zip(contexts, self.seen, strict=True)])
        return self._generate(contexts)

    def _grows(self, keys: list[int], contexts: list[list[int]]) -> bool:
        held = dict(zip(self.keys, self.seen, strict=True))
        return self.cache is not None and all(
            key in held and len(context) > len(held[key]) and context[: len(held[key])] == held[key]
            for key, context in zip(keys, contexts, strict=True)
        )

    def _select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.ids.device)
        self.keys, self.seen = [self.keys[row] for row in rows], [self.seen[row] for row in rows]
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.cache.batch_select_indices(index)

    def _append(self, chunks: list[list[int]]) -> None:
        width = max(map(len, chunks))
        ids = torch.tensor([[self.pad] * (width - len(chunk)) + chunk for chunk in chunks], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(chunk)) + [1] * len(chunk) for chunk in chunks], device=ids.device)
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)  # (rows, length)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)  # (rows, length)

    @torch.no_grad()
    def _generate(self, contexts: list[list[int]]) -> list[list[int]]:
        out = self.model.generate(
            self.ids,
            attention_mask=self.mask,
            generation_config=self.config,
            **({"cache": self.cache} if self.cache is not None else {}),
        )
        new = out.sequences[:, self.ids.shape[1] :].tolist()  # (rows, new tokens)
        responses = [self._cut(row) for row in new]
        if self.reuse_cache:
            mask = [[1] * len(response) + [0] * (len(row) - len(response)) for row, response in zip(new, responses)]
            self.ids, self.cache = out.sequences, out.cache
            self.mask = torch.cat([self.mask, torch.tensor(mask, device=self.mask.device)], 1)
            self.seen = [context + response for context, response in zip(contexts, responses)]
        return responses

    def _cut(self, tokens: list[int]) -> list[int]:
        """Up to the first end-of-turn token, which belongs to the response (the policy chose to stop)."""
        for i, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: i + 1]
        return tokens


def generate(model, tokenizer, contexts, *, max_new_tokens: int, temperature: float, token_budget: int = 65536):
    """Independent responses to independent contexts -> their ids. Rows x length stays within `token_budget` a call."""
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    responses: list[list[int]] = [[] for _ in contexts]
    while order:
        rows = max(1, token_budget // (len(contexts[order[0]]) + max_new_tokens))
        batch, order = order[:rows], order[rows:]
        sampler = Sampler(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, reuse_cache=False)
        for i, response in zip(batch, sampler(batch, [contexts[i] for i in batch]), strict=True):
            responses[i] = response
    return responses


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

    @classmethod
    def start(cls, env: TextEnv, game, group: int) -> Episode:
        observation, info = env.reset(options={"game": game})
        trajectory = Trajectory(
            info["task"], group, [], False, task_type=info.get("task_type", ""), game=info.get("game", "")
        )
        return cls(env, trajectory, observation, info.get("admissible_actions", []))

    def context(self, encoder: Encoder) -> list[int]:
        """Open the coming turn -> its context ids, with no skill in it: the policy acts from the plain context."""
        steps = self.trajectory.steps
        history = [(step.observation, step.action) for step in steps]
        task = self.trajectory.task
        prompt = self.env.build_prompt(encoder.style, task, history, self.observation, self.admissible)
        self.prompts.append(prompt)
        return encoder.context([fill(p) for p in self.prompts], [step.response for step in steps])

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
    progress: Callable[[int, int], None] = lambda live, turn: None,
) -> tuple[list[Trajectory], dict[str, float]]:
    """Play every game `group_size` times -> (trajectories grouped in order, metrics).

    All live episodes take their turn in one batch; a finished one leaves it. An episode whose coming context could not
    hold a whole response within `context_limit` tokens ends there, unsuccessful, and is counted (rollout/context_full).
    Raises ValueError where even a first turn does not fit.
    """
    episodes = [
        Episode.start(make_env(), game, first_group + g) for g, game in enumerate(games) for _ in range(group_size)
    ]
    sampler = Sampler(
        model, encoder.tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, reuse_cache=reuse_cache
    )
    turn, live = 0, list(range(len(episodes)))
    training = model.training
    model.eval()
    while live:
        progress(len(live), turn)
        contexts = {i: episodes[i].context(encoder) for i in live}
        for i in live:
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
    return [episode.trajectory for episode in episodes], _metrics(episodes)


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
