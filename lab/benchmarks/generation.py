"""Ways to decode, all of them transformers' own: python benchmarks/generation.py [--model smollm2] [--rows 1 4 16]

    eager       generate with the cache that grows (sampler.py's loop, less its own cache and random numbers)
    static      generate with a cache of fixed size
    compiled    the same, with the decoding step compiled
    continuous  generate_batch: rows packed side by side over a paged cache

The same prompts (first turns of ALFWorld games), sampled at temperature 1, and no row ends early. Prints the seconds of
a first call (compiling and setting up included), the median of the next ones, new tokens a second, how much faster than
eager, and whether the tokens are eager's. A way that fails is reported as unavailable with its reason. Runs on the GPU
where there is one. `--model random`: a tiny random model, to try the benchmark.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from envs.alfworld import AlfworldEnv, cached_games
from lab.benchmarks.score import load
from lm.encoder import Encoder
from lm.sampler import temperature_sampling
from rollout import Episode

PAGE = 256  # tokens of a page of the paged cache


def endless(model, tokenizer, new_tokens: int) -> GenerationConfig:
    """Plain sampling of exactly that many tokens: nothing ends a response."""
    config = temperature_sampling(model, tokenizer, max_new_tokens=new_tokens, temperature=1.0)
    # `generate` fills what is unset from the model's own configuration
    config.eos_token_id = model.generation_config.eos_token_id = None
    return config


def prompts(encoder: Encoder, style: str, rows: int) -> list[list[int]]:
    """The contexts of the first turns of as many games."""
    games = cached_games("small", "valid_seen", rows)
    return [Episode.start(AlfworldEnv(prompt=style), game, 0).context(encoder) for game in games]


def padded_generate(model, contexts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """`generate` of left-padded rows -> their new tokens."""
    length = max(map(len, contexts))
    gaps = [length - len(context) for context in contexts]
    ids = [[config.pad_token_id] * gap + context for gap, context in zip(gaps, contexts, strict=True)]
    mask = [[0] * gap + [1] * (length - gap) for gap in gaps]
    given = [torch.tensor(rows, device=model.device) for rows in (ids, mask)]  # (rows, length) each
    out = model.generate(given[0], attention_mask=given[1], generation_config=config)
    return out.sequences[:, length:].tolist()


def continuous_generate(model, contexts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """`generate_batch`, its manager kept from call to call. Raises RuntimeError where it ends without all tokens: it
    logs what went wrong in its thread and returns what there is."""
    pages = sum(math.ceil((len(context) + config.max_new_tokens) / PAGE) for context in contexts)
    # By itself it would take nearly all memory that there is for the cache, on a CPU too.
    paging = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages + 1,
        max_batch_tokens=sum(map(len, contexts)),
        max_requests_per_batch=len(contexts),
        allow_block_sharing=False,  # else prompts would be read in the first call and found again in the next ones
        auto_switch_to_flash=False,  # the same attention as in the other ways
    )
    found = model.generate_batch(
        contexts, generation_config=config, continuous_batching_config=paging, persistent_manager=True
    )
    errors = [str(output.error) for output in found.values() if output.error is not None]
    new = [output.generated_tokens for output in found.values()]
    if errors or [len(row) for row in new] != [config.max_new_tokens] * len(contexts):
        raise RuntimeError(errors[0] if errors else f"tokens of only {len(new)} of {len(contexts)} rows came back")
    return new


def ways(model, tokenizer, contexts: list[list[int]], new_tokens: int) -> dict[str, Callable]:
    """name -> a function that returns the new tokens of each row."""
    whole = CompileConfig()
    whole._compile_all_devices = True  # without it `generate` compiles on accelerators only

    def with_generate(**options) -> Callable:
        config = endless(model, tokenizer, new_tokens)
        config.update(**options)
        return lambda: padded_generate(model, contexts, config)

    paged = endless(model, tokenizer, new_tokens)
    return {
        "eager": with_generate(),
        "static": with_generate(cache_implementation="static", disable_compile=True),
        "compiled": with_generate(cache_implementation="static", compile_config=whole),
        "continuous": lambda: continuous_generate(model, contexts, paged),
    }


def timed(model, write: Callable, repeats: int) -> tuple[float, float, list[list[int]]]:
    """(seconds of a first call, median seconds of the next ones, new tokens). Nothing compiled before is used."""
    torch.compiler.reset()
    times = []
    try:
        for _ in range(repeats + 1):
            torch.manual_seed(0)
            started = time.perf_counter()
            new = write()  # on the CPU by the time it returns
            times.append(time.perf_counter() - started)
    finally:
        model.destroy_cached_continuous_batching_manager()
    return times[0], statistics.median(times[1:]), new


def report(model, named: dict[str, Callable], repeats: int) -> Iterator[str]:
    """A line a way, as soon as it is measured. The first that works is what the others are compared with."""
    first = None
    for name, write in named.items():
        try:
            warm_up, seconds, new = timed(model, write, repeats)
        except Exception as error:  # whatever is wrong with one way, the others are still measured
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            yield f"{name:<11}unavailable: {type(error).__name__}: {reason[:90]}"
            continue
        first = first or (seconds, new)
        speed, same = sum(map(len, new)) / seconds, "the same" if new == first[1] else "others"
        yield f"{name:<11}{warm_up:>10.2f}{seconds:>9.3f}{speed:>10.1f}{first[0] / seconds:>9.2f}  {same}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="prompts at a time")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each response")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median is taken")
    args = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns of what is wanted here
    model, tokenizer, style = load(args.model)
    contexts = prompts(Encoder(tokenizer, "chat"), style, max(args.rows))
    print(f"{args.model} on {model.device.type}, {torch.get_num_threads()} CPU threads, {args.new_tokens} new tokens")
    print(f"{'rows':>5}  {'way':<11}{'first, s':>10}{'seconds':>9}{'tokens/s':>10}{'x eager':>9}  tokens")
    for rows in args.rows:
        for line in report(model, ways(model, tokenizer, contexts[:rows], args.new_tokens), args.repeats):
            print(f"{rows:>5}  {line}", flush=True)


if __name__ == "__main__":
    main()
