"""Messages -> the token ids of a context, through the tokenizer's chat template."""

from __future__ import annotations

import re
from functools import lru_cache


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
