"""Who writes the skills: a local model, an OpenAI-compatible endpoint, or a function of the user's.

A writer takes prompts and returns as many answers in their order; None: it could not read the prompt, or refused it.
The authors' release asks an external LLM (opid/analysis.py); here the policy itself writes unless told otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

from lm.encoder import Encoder
from lm.sampler import generate

Writer = Callable[[list[str]], list[str | None]]


def model_writer(
    model,
    tokenizer,
    *,
    max_new_tokens: int,
    temperature: float,
    context_limit: int,  # tokens of prompt, prefill and `max_new_tokens` together; a longer prompt is answered None
    prefill: str,  # starts the answer, such as '{"episode_summary": "': more answers of small models parse
    batch_tokens: int,  # rows x length of one batch in `generate`
) -> Writer:
    """Skills from a local model, such as the policy itself."""
    encoder = Encoder(tokenizer, "window")
    start = tokenizer.encode(prefill, add_special_tokens=False)
    room = context_limit - len(start) - max_new_tokens  # for a prompt

    def write(prompts: list[str]) -> list[str | None]:
        contexts = [encoder.context([prompt], []) for prompt in prompts]
        fits = [i for i, context in enumerate(contexts) if len(context) <= room]
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "token_budget": batch_tokens}
        training = model.training
        model.eval()
        responses = generate(model, tokenizer, [contexts[i] + start for i in fits], **sampling)
        model.train(training)
        answers: list[str | None] = [None] * len(contexts)
        for i, response in zip(fits, responses, strict=True):
            answers[i] = prefill + tokenizer.decode(response, skip_special_tokens=True)
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
            raise ValueError(f"--skill-writer {name} must return a list of {len(prompts)} answers, one for each prompt")
        if wrong := [answer for answer in answers if not isinstance(answer, str | None)]:
            raise ValueError(f"--skill-writer {name} must return texts or None, not {type(wrong[0]).__name__}")
        return answers

    return checked


def openai_writer(
    model: str,
    *,
    base_url: str,
    max_new_tokens: int,
    temperature: float,
    timeout: float = 60.0,  # seconds for one request
    retries: int = 3,  # of one request: no connection, time-out, overload, server error
    concurrency: int = 8,  # requests under way at a time
) -> Writer:
    """Skills from an OpenAI-compatible endpoint, as in the authors' set-up; the key comes from OPENAI_API_KEY.

    Raises ValueError without a key. The writer raises RuntimeError, naming `base_url`, where no usable answer comes.
    """
    import openai  # an optional dependency: pip install openai

    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("set OPENAI_API_KEY for the openai skill writer (any value does for a server without keys)")
    client = openai.OpenAI(base_url=base_url, timeout=timeout, max_retries=retries)
    options = {"model": model, "max_tokens": max_new_tokens, "temperature": temperature}

    def ask(prompt: str) -> str | None:
        try:
            completion = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)
            return completion.choices[0].message.content or ""
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, openai.BadRequestError) and re.search("context.(length|size|window)", str(error)):
                return None
            raise RuntimeError(f"no usable answer from {base_url}: {type(error).__name__}: {error}") from error

    def write(prompts: list[str]) -> list[str | None]:
        with ThreadPoolExecutor(concurrency) as pool:  # the first error cancels the requests that have not started
            return list(pool.map(ask, prompts))

    return write
