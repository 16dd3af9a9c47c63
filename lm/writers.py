"""Who writes the skills: a local model, an OpenAI-compatible endpoint, or a script.

The writer reads a transcript in the prompt (`model_writer`, `openai_writer`), or the request comes as one more user
message at the end of the finished conversation (`conversation_writer`), whose KV cache can then be gone on from. The
authors' release asks an external LLM (opid/analysis.py); here the policy itself writes unless told otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lm.encoder import Encoder
from lm.sampler import generate

Writer = Callable[[list[str]], list[str | None]]


def import_writer(name):
    raise ValueError(name)


def model_writer(model, tokenizer, **answering) -> Writer:
    """Skills from a local model, the policy itself or its frozen starting weights. `answering`: see `_answers`."""
    encoder = Encoder(tokenizer, "window")
    return lambda prompts: _answers(model, tokenizer, [encoder.context([p], []) for p in prompts], **answering)


def _answers(
    model,
    tokenizer,
    contexts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    context_limit: int,  # tokens of prompt, prefill and `max_new_tokens` together; a longer prompt is answered None
    prefill: str = "",  # starts the answer, such as '{"episode_summary": "': more answers of small models parse
    batch_tokens: int = 65536,  # rows x length of one batch in `generate`
    keys: list[int] | None = None,
    **cached,
) -> list[str | None]:
    start = tokenizer.encode(prefill, add_special_tokens=False)
    fits = [i for i, c in enumerate(contexts) if len(c) + len(start) + max_new_tokens <= context_limit]
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "token_budget": batch_tokens} | cached
    if keys is not None:
        sampling["keys"] = [keys[i] for i in fits]
    training = model.training
    model.eval()
    responses = generate(model, tokenizer, [contexts[i] + start for i in fits], **sampling)
    model.train(training)
    answers: list[str | None] = [None] * len(contexts)
    for i, response in zip(fits, responses, strict=True):
        answers[i] = prefill + tokenizer.decode(response, skip_special_tokens=True)
    return answers


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
