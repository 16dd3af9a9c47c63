"""Who writes the skills: a local model, an OpenAI-compatible endpoint, or a function of the user's.

A writer takes prompts and returns as many answers in their order; None: it could not read the prompt, or refused it.
The authors' release asks an external LLM (opid/analysis.py); here the policy itself writes unless told otherwise.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

from lm.encoder import Encoder
from lm.obstacles import Mendable
from lm.sampler import Sampler, generate

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
    retries: int = 3,  # of one request: no connection, time-out, overload, server error
    concurrency: int = 8,  # requests under way at a time
) -> Writer:
    """Skills from an OpenAI-compatible endpoint, as in the authors' set-up; the key comes from OPENAI_API_KEY.

    A prompt that the endpoint refuses is answered None, and the log says why. Raises ValueError without a key. The
    writer raises Mendable, naming the endpoint, where there is no usable answer for another reason (no server, a
    wrong key, an unknown model), and where every prompt is refused for what has nothing to do with it.
    """
    import openai  # an optional dependency: pip install openai

    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("set OPENAI_API_KEY for the openai skill writer (any value does for a server without keys)")
    client = openai.OpenAI(base_url=base_url, timeout=timeout, max_retries=retries)
    limit, answered = "max_tokens", False  # the name of the limit that this model knows; has any prompt been answered?

    def create(prompt: str):
        nonlocal limit
        name, messages = limit, [{"role": "user", "content": prompt}]
        try:
            # the limit's name differs from model to model
            return client.chat.completions.create(
                model=model, messages=messages, temperature=temperature, **{name: max_new_tokens}
            )
        except openai.BadRequestError as error:
            if name != "max_tokens" or not re.search("max_completion_tokens.? instead", str(error)):
                raise
        limit = "max_completion_tokens"
        return create(prompt)

    def ask(prompt: str) -> str | openai.APIStatusError:
        try:
            return create(prompt).choices[0].message.content or ""
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, openai.APIStatusError) and _refuses(error):
                return error
            raise Mendable(f"no usable answer from {client.base_url}: {_line(error)}") from error

    def write(prompts: list[str]) -> list[str | None]:
        nonlocal answered
        with ThreadPoolExecutor(concurrency) as pool:  # the first error cancels the requests that have not started
            answers = list(pool.map(ask, prompts))
        refusals = [answer for answer in answers if not isinstance(answer, str)]
        answered = answered or len(refusals) < len(answers)
        if not answered and (others := [error for error in refusals if not _THIS_PROMPT.search(_words(error))]):
            raise Mendable(f"{client.base_url} refuses every prompt: {_line(others[0])}") from others[0]
        if refusals:
            warning = f"{client.base_url} refused {len(refusals)} of {len(prompts)} prompts: {_line(refusals[0])}"
            logging.getLogger(__name__).warning(warning)
        return [answer if isinstance(answer, str) else None for answer in answers]

    return write


def _refuses(error) -> bool:
    return error.status_code in _ANY_REFUSAL or _THIS_PROMPT.search(_words(error)) is not None


def _words(error: Exception) -> str:
    code = getattr(error, "code", None)  # some servers give no message beside it
    return f"{error} ({code})" if code else str(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(_words(error).split())}"[:500]  # some servers answer with a web page
