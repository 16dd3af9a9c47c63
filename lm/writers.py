"""Who writes the skills: a local model, an OpenAI-compatible endpoint, or a function of the user's.

A writer takes prompts and returns as many answers in their order; None: it could not read the prompt, or refused it.
The authors' release asks an external LLM (opid/analysis.py); here the policy itself writes unless told otherwise.
"""

from __future__ import annotations

import email.utils
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

from envs import on_this_machine
from lm.encoder import Encoder
from lm.obstacles import Mendable
from lm.sampler import Sampler, generate

log = logging.getLogger(__name__)

Writer = Callable[[list[str]], list[str | None]]


def model_writer(
    model,
    encoder: Encoder,
    *,
    max_new_tokens: int,
    temperature: float,
    context_limit: int,  # tokens of prompt, prefill and `max_new_tokens` together; a longer prompt is answered None
    prefill: str,  # starts the answer, such as '{"episode_summary": "': more answers of small models parse
    rollout_budget: int,  # rows x length of one batch
    token_budget: int | None = None,  # rows x columns of a prompt that are read at a time; None: the whole batch's
) -> Writer:
    """Skills from a local model, such as the policy itself."""
    tokenizer = encoder.tokenizer
    start = tokenizer.encode(prefill, add_special_tokens=False)
    room = context_limit - len(start) - max_new_tokens  # for a prompt

    def write(prompts: list[str]) -> list[str | None]:
        contexts = [encoder.context([prompt], []) for prompt in prompts]
        fits = [i for i, context in enumerate(contexts) if len(context) <= room]
        sampler = Sampler(
            model,
            tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            reuse_cache=False,
            rollout_budget=rollout_budget,
            token_budget=token_budget,
        )
        training = model.training
        model.eval()
        responses = generate(sampler, [contexts[i] + start for i in fits])
        model.train(training)
        answers: list[str | None] = [None] * len(contexts)
        for i, response in zip(fits, responses, strict=True):
            answers[i] = prefill + encoder.decode(response)
        return answers

    return write


def import_writer(name: str) -> Writer:
    """The function `package.module:function`, checked at each use. Raises ValueError where there is none, and, when it
    is used, where it does not return one text or None for each prompt."""
    module, _, function = name.partition(":")
    try:
        write = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--skill-writer {name}: {error}") from error
    if not callable(write):
        raise ValueError(f"--skill-writer {name} is no function")

    def checked(prompts: list[str]) -> list[str | None]:
        answers = write(prompts)
        if not isinstance(answers, list) or len(answers) != len(prompts):
            raise Mendable(f"--skill-writer {name} must return a list of {len(prompts)} answers, one for each prompt")
        if wrong := [answer for answer in answers if not isinstance(answer, str | None)]:
            raise Mendable(f"--skill-writer {name} must return texts or None, not {type(wrong[0]).__name__}")
        return answers

    return checked


def that_may_fail(write: Writer) -> Writer:
    """A writer whose failure costs its batch the skills, and not the run: all answers are None; the log says why."""

    def attempt(prompts: list[str]) -> list[str | None]:
        try:
            return write(prompts)
        except (Mendable, OSError) as error:
            log.warning("no skills for %d episodes: %s", len(prompts), " ".join(str(error).split()))
            return [None] * len(prompts)

    return attempt


# How servers say that it is this prompt which they do not take: too long, or against their rules.
_THIS_PROMPT = re.compile(
    r"context.(?:length|size|window)|max_tokens must be at least|content.?(?:filter|policy|management)|invalid_prompt"
    r"|flagged|moderation|(?:prompt|input|request)\b[^.]{0,40}\btoo (?:long|large)",
    re.IGNORECASE,
)
_ANY_REFUSAL = (400, 413, 422)  # bad request, too large, cannot be processed: the prompt, or how everything is asked


def openai_writer(
    model: str,
    *,
    base_url: str | None,  # None: the library's own
    max_new_tokens: int,
    temperature: float,
    timeout: float = 60.0,  # seconds for one request
    retries: int = 3,  # of one request: no connection, time-out, server error
    concurrency: int = 8,  # requests under way at a time
    patience: float = 600.0,  # seconds that one request waits in all, where the server answers 429
) -> Writer:
    """Skills from an OpenAI-compatible endpoint, as in the authors' set-up; the key comes from OPENAI_API_KEY.

    A prompt that the endpoint refuses is answered None, and the log says why. A server that answers 429 is asked again
    when it says so. Raises ValueError without a key. The writer raises Mendable, naming the endpoint, where there
    is no usable answer for another reason (no server, a wrong key, an unknown model), and where every prompt is refused
    for what has nothing to do with it.
    """
    import openai  # an optional dependency: pip install openai

    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("set OPENAI_API_KEY for the openai skill writer (any value does for a server without keys)")
    client = openai.OpenAI(base_url=base_url, timeout=timeout, max_retries=0)
    if on_this_machine(str(client.base_url)):  # http_proxy and its like are not for it
        client = client.with_options(http_client=openai.DefaultHttpxClient(trust_env=False, timeout=timeout))
    endpoint = _Endpoint(client, model, max_new_tokens, temperature, retries, patience)
    answered = False  # has any prompt been?

    def write(prompts: list[str]) -> list[str | None]:
        nonlocal answered
        answers = endpoint.ask_all(prompts, concurrency)
        refusals = [answer for answer in answers if not isinstance(answer, str)]
        answered = answered or len(refusals) < len(answers)
        if not answered and (others := [error for error in refusals if not _THIS_PROMPT.search(_words(error))]):
            raise Mendable(f"{client.base_url} refuses every prompt: {_line(others[0])}") from others[0]
        if refusals:
            log.warning(f"{client.base_url} refused {len(refusals)} of {len(prompts)} prompts: {_line(refusals[0])}")
        return [answer if isinstance(answer, str) else None for answer in answers]

    return write


class _Endpoint:
    """A server, and how it wants to be asked."""

    def __init__(self, client, model: str, max_new_tokens: int, temperature: float, retries: int, patience: float):
        self.client, self.model, self.temperature = client, model, temperature
        self.limit, self.max_new_tokens = "max_tokens", max_new_tokens  # the limit by the name that this model knows
        self.retries, self.patience = retries, patience
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.fatal: Mendable | None = None  # why this batch has stopped
        self.busy, self.waited = 0, 0.0  # answers of 429 to this batch, and seconds that its requests waited for them

    def ask_all(self, prompts: list[str], concurrency: int) -> list:
        """Of each prompt the answer, or the error that refuses it."""
        self.busy, self.waited, self.fatal = 0, 0.0, None
        self.stopped.clear()
        pool = ThreadPoolExecutor(concurrency)
        try:  # the first error ends all of it
            return list(pool.map(self.ask, prompts))
        except BaseException:
            self.stopped.set()
            raise
        finally:
            # Ctrl-C does not wait for requests under way, each a minute at most, before the run is saved
            pool.shutdown(wait=not self.stopped.is_set(), cancel_futures=True)
            if self.busy:
                waited = f"{self.waited:.0f} s of waiting"
                log.warning(f"{self.client.base_url} answered 429 (too many requests) {self.busy} times: {waited}")

    def ask(self, prompt: str):
        """An answer, or the error that refuses this prompt. Raises Mendable for anything else."""
        import openai

        if self.stopped.is_set():
            raise self.fatal or Mendable("stopped")
        try:
            answer = self._patiently(prompt)
            if not getattr(answer, "choices", None):  # a web page, a stream, an error that calls itself a success
                raise ValueError(f"it answers with no chat completion: {answer!r:.300}")
            return _text(answer.choices[0].message.content)
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, openai.APIStatusError) and _refuses(error):
                return error
            self.fatal = Mendable(f"no usable answer from {self.client.base_url}: {_line(error)}")
            self.stopped.set()  # requests that wait do not wait on
            raise self.fatal from error

    def _patiently(self, prompt: str):
        """Ask until there is an answer, or an error that waiting does not mend."""
        import openai

        waited, failures, refusals = 0.0, 0, 0
        while True:
            try:
                return self._create(prompt)
            except openai.RateLimitError as error:
                refusals += 1
                pause = _asked_pause(error) or min(60.0, 2.0**refusals)
                if _refuses(error) or _NO_MORE.search(_words(error)) or waited + pause > self.patience:
                    raise
                waited += pause
                self._note(pause)
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                failures += 1
                brief = getattr(error, "status_code", 500) in (408, 409) or getattr(error, "status_code", 500) >= 500
                if not brief or failures > self.retries:
                    raise
                pause = min(8.0, 0.25 * 2.0**failures)
            if self.stopped.wait(pause):
                raise self.fatal or Mendable("stopped")

    def _note(self, pause: float) -> None:
        with self.lock:
            if not self.busy:  # at once: a night's run that waits is not to look like one that hangs
                log.warning(f"{self.client.base_url} answers 429 (too many requests): waiting {pause:g} s")
            self.busy, self.waited = self.busy + 1, self.waited + pause

    def _create(self, prompt: str):
        import openai

        name, messages = self.limit, [{"role": "user", "content": prompt}]
        try:
            # the limit's name differs from model to model
            return self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=self.temperature, **{name: self.max_new_tokens}
            )
        except openai.BadRequestError as error:
            if name != "max_tokens" or not re.search("max_completion_tokens.? instead", str(error)):
                raise
        self.limit = "max_completion_tokens"
        return self._create(prompt)


_NO_MORE = re.compile(r"insufficient_quota|exceeded your current quota|billing", re.IGNORECASE)  # 429 for good


def _text(content) -> str:
    """The text of an answer's content: a string, nothing, or parts of which some are text. Raises ValueError."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else getattr(part, "__dict__", {"text": part}) for part in content]
        texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) == len(texts):
            return "".join(strings)
    raise ValueError(f"its content is no text: {content!r:.200}")


def _asked_pause(error) -> float | None:
    """Seconds that a server asks for in Retry-After: a number or a date. None where it names none that can be read."""
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            pause = float(headers["retry-after-ms"]) / 1000
        else:
            pause = float(headers.get("retry-after", "nan"))
    except ValueError:
        try:
            pause = email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
    return pause if pause > 0 and math.isfinite(pause) else None


def _refuses(error) -> bool:
    return error.status_code in _ANY_REFUSAL or _THIS_PROMPT.search(_words(error)) is not None


def _words(error: Exception) -> str:
    code = getattr(error, "code", None)  # some servers give no message beside it
    return f"{error} ({code})" if code else str(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(_words(error).split())}"[:500]  # some servers answer with a web page
