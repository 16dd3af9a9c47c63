"""Messages -> the token ids of a context, through the tokenizer's chat template."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection
from functools import lru_cache

from jinja2 import TemplateError

# A conversation that is rendered to see what a template puts around the messages: words that no template knows.
USER, ANSWER, NEXT = "quxuser", "quxanswer", "quxnext"
# What a template may spell in plain text to say who speaks: [INST], <<SYS>>, <|user|>, ### Response:, USER:
MARKER = re.compile(r"<{1,2}[^<>\s]+>{1,2}|\[[^\[\]\s]+\]|#{2,} *[A-Za-z][\w ]*:?|(?<!\w)[A-Za-z][\w ]{0,40}:")
# What prompts ask for, and answers are read by: never taken for a marker or a control token, though some fine-tuned
# tokenizers register them as special.
TAG = re.compile(r"</?(think|thinking|action|search|answer|information)>")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>")  # gpt-oss: analysis, commentary, final
NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
FIXED = ("messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents")  # not the user's to set
OPENED = re.compile(r"<(\w+)>\s*$")


class Encoder:
    """User messages and sampled responses -> the token ids of a context, through the tokenizer's chat template.

    `style="window"`: each step is a single-turn prompt. `style="chat"`: one growing conversation, whose context is the
    previous context + the response ids exactly as sampled + the ids of the new message. Where the template rewrites
    earlier turns (some drop old thoughts) the conversation is rendered anew for each step, as the template wants it;
    then contexts do not extend one another, nothing is cached or packed, and `extends` is False.

    Messages hold text from outside (web pages, passages, skills) that may spell special tokens such as `<|im_end|>`, or
    what the template writes in plain text to say who speaks, such as `[INST]`. Those get a space inside, so that they
    stay text and no observation can forge a turn.

    `date` (ISO, such as "2025-01-31"; None: today's) is what templates that print one get, so that all prompts of a run
    have the same. `options`: further variables of the template, such as {"enable_thinking": "true"}. `began` is what
    the template itself begins an answer with (`<think>`), "" for most: a response is to be judged as `began + text`.

    `ends`: further tokens that a response may end with (sampler.py: end_of_turn_ids). Such a response has closed its
    turn: it stays as it was sampled, and the template's own end of turn is left out behind it.
    """

    def __init__(
        self,
        tokenizer,
        style: str,
        date: str | None = None,
        options: dict[str, str] | None = None,
        ends: Collection[int] = (),
    ):
        if style not in ("window", "chat"):
            raise ValueError(f"context style must be 'window' or 'chat', not {style!r}")
        self.tokenizer, self.style = tokenizer, style
        self.date = date or datetime.date.today().isoformat()
        self._template, self._options = dated(tokenizer.get_chat_template(), self.date), options or {}
        if unread := [name for name in self._options if name in FIXED or not re.search(rf"\b{name}\b", self._template)]:
            raise ValueError(
                f"--template-options: the chat template of this model has no variable {unread[0]!r} to set"
            )
        self._closing = closing_token(tokenizer)
        known = (*ends, tokenizer.eos_token_id, self._closing)
        self.ends: set[int] = {token for token in known if token is not None}
        self._control = {id for token, id in _ids_of_special(tokenizer).items() if not TAG.fullmatch(token.strip())}
        self._marker = re.compile("(?!)")  # while the template is looked at, nothing is broken up
        self.began = self._template_begins()
        spelled = {*special_tokens(tokenizer), *self._role_markers(), *self._other_tokens()} - {self.began.strip()}
        spelled = {token for token in spelled if not TAG.fullmatch(token.strip())}
        self._marker = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))) or "(?!)")
        self.extends = self._template_extends()
        self._opening = lru_cache(maxsize=4096)(self._encode_opening)
        self._turn = lru_cache(maxsize=16384)(self._encode_turn)

    def context(self, messages: list[str], responses: list[list[int]]) -> list[int]:
        """`messages`: the user's, t + 1 of them ("window": the last one counts); `responses`: ids of the t before."""
        if self.style == "window":
            return self._opening(messages[-1])
        if not self.extends:
            answers = [self.began + self.decode(response) for response in responses]
            return self._ids(self._render(_conversation(messages, answers)))
        ids = list(self._opening(messages[0]))
        for response, message in zip(responses, messages[1:], strict=True):
            turn, closed = self._turn(message)
            # The template closes the assistant's turn itself; a response that was cut off lacks that token.
            ids += response + (turn[closed:] if self._closes(response, turn[:closed]) else turn)
        return ids

    def _closes(self, response: list[int], closing: list[int]) -> bool:
        """Whether a response ends its turn itself, so that what the template closes it with would be a second end."""
        if response[-1:] == closing[-1:]:
            return True
        # A template without an end of turn (GLM) goes on with the next speaker's token, which has to stay.
        return self._closing is not None and not self.ends.isdisjoint(response[-1:])

    def decode(self, response: list[int]) -> str:
        """The text of an answer: without control tokens, with tags. Of a template with channels the final one alone."""
        if "<|channel|>" in self._template:
            written = self.tokenizer.decode(response)
            channels = list(CHANNEL.finditer(written))
            if channels:  # none: cut off before the first
                last = channels[-1]
                return written[last.end() :].partition("<|")[0] if last[1] == "final" else ""
        return self.tokenizer.decode([token for token in response if token not in self._control])

    def _render(self, conversation: list[dict]) -> str:
        conversation = [turn | {"content": self._as_text(turn["content"])} for turn in conversation]
        return render(self.tokenizer, conversation, self._template, options=self._options)

    def _as_text(self, content: str) -> str:
        content = content.encode(errors="replace").decode()  # half a surrogate pair is no text for a tokenizer
        return self._marker.sub(lambda token: f"{token[0][0]} {token[0][1:]}", content)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # ---- what the template does ----------------------------------------------------------------------------------

    def _template_begins(self) -> str:
        """The opened tag at the end of a prompt, with the white space after it; "" where there is none."""
        prompt = self._render(_conversation([USER], []))
        opened = OPENED.search(prompt)
        if opened is None or opened[1] in ("assistant", "model"):
            return ""
        tag = opened[0].strip()
        return "" if tag in special_tokens(self.tokenizer) and not TAG.fullmatch(tag) else opened[0]

    def _role_markers(self) -> set[str]:
        """What the template spells in plain text to say who speaks."""
        before_answer, after_answer = self._render(_conversation([USER, NEXT], [ANSWER])).split(ANSWER)
        opening, to_answer = before_answer.split(USER)
        markers = {marker for part in (to_answer, *after_answer.split(NEXT)) for marker in self._markers_in(part)}
        try:
            system = [{"role": "system", "content": NEXT}, *_conversation([USER], [])]
            before, after = self._render(system).split(NEXT)
            # Before the first message a template may say anything: what it says without a system message is no marker.
            around = {*self._markers_in(before), *self._markers_in(after.split(USER)[0])}
            markers |= around - set(self._markers_in(opening))
        except (TemplateError, ValueError):  # a template without such a role raises, or leaves the message out
            pass
        return {marker for marker in markers if not TAG.fullmatch(marker)} - {self.began.strip()}

    def _other_tokens(self) -> set[str]:
        """Tokens that the template itself writes though they count as text, such as Qwen's <tool_call>."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        written = {token for token in added if token in self._template and MARKER.fullmatch(token)}
        return {token for token in written if not TAG.fullmatch(token)}

    def _markers_in(self, text: str) -> list[str]:
        special = re.compile("|".join(map(re.escape, special_tokens(self.tokenizer))) or "(?!)")
        return [marker.strip() for marker in MARKER.findall(special.sub("\n", text))]

    def _template_extends(self) -> bool:
        """Whether a conversation as rendered is its turns one after another, whatever was answered in them."""
        for answer in ("b", "<think>\na\n</think>\n\nb"):
            first, second = self._turn_text("d"), self._turn_text("e")
            if first is None or second is None:
                return False
            text = self._render(_conversation(["c"], [])) + answer + first + answer + second
            if text != self._render(_conversation(["c", "d", "e"], [self.began + answer] * 2)):
                return False
        return True

    def _turn_text(self, message: str) -> str | None:
        """What the template puts between a response's last word and the next one: end of turn, user message. None where
        it changes what came before."""
        before = self._render(_conversation(["c"], [])) + "b"
        whole = self._render(_conversation(["c", message], [self.began + "b"]))
        return whole[len(before) :] if whole.startswith(before) else None

    def _encode_opening(self, message: str) -> list[int]:
        return self._ids(self._render(_conversation([message], [])))

    def _encode_turn(self, message: str) -> tuple[list[int], int]:
        """-> (ids of the turn's text, how many of them close the assistant's turn; 0 where no special token does)."""
        text = self._turn_text(message)
        if text is None:
            raise ValueError("the chat template rewrites earlier turns because of what a message says")
        ids, closing = self._ids(text), _leading_special(self.tokenizer, text)
        return ids, ids.index(closing) + 1 if closing in ids else 0


def dated(template: str, date: str) -> str:
    """A chat template whose calls of `strftime_now` are replaced by what they give on an ISO date."""
    day = datetime.date.fromisoformat(date)
    return NOW.sub(lambda call: repr(day.strftime(call[2])), template)


def render(
    tokenizer,
    conversation: list[dict],
    template: str | None = None,
    *,
    prompt: bool = True,
    options: dict[str, str] | None = None,
) -> str:
    """The text of a conversation; with `prompt` the header of the answer to come at its end. `options`: variables of
    the template; "true" and "false" are read as such."""
    # Off as in the authors' Qwen3 script, since the prompt itself asks for <think> tags; other templates ignore it.
    variables = {"enable_thinking": "false"} | (options or {})
    variables = {name: {"true": True, "false": False}.get(text, text) for name, text in variables.items()}
    return tokenizer.apply_chat_template(
        conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt, **variables
    )


def special_tokens(tokenizer) -> list[str]:
    """The special tokens' spellings, longest first."""
    return sorted(_ids_of_special(tokenizer), key=len, reverse=True)


def _ids_of_special(tokenizer) -> dict[str, int]:
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def closing_token(tokenizer) -> int | None:
    """Id of the special token that the chat template ends an assistant's turn with; None where it uses none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        finished = render(tokenizer, _conversation([USER], [ANSWER]), prompt=False)
    except TemplateError:  # a template that wants the user to speak last
        return None
    return _leading_special(tokenizer, finished.partition(ANSWER)[2])


def _leading_special(tokenizer, text: str) -> int | None:
    """Id of the special token that a text begins with, white space apart."""
    first = next((token for token in special_tokens(tokenizer) if text.lstrip().startswith(token)), None)
    return None if first is None else tokenizer.convert_tokens_to_ids(first)


def _conversation(messages: list[str], responses: list[str]) -> list[dict]:
    """The turns of a conversation, user first; with as many responses as messages the assistant speaks last."""
    turns = []
    for i, message in enumerate(messages):
        turns.append({"role": "user", "content": message})
        if i < len(responses):
            turns.append({"role": "assistant", "content": responses[i]})
    return turns
