"""How time and memory grow: python benchmarks/scale.py [--out scale.png]

Random small Llama models on random tokens. Each of four sizes is varied while the others stay at their middle value:

    episodes     played at a time
    turns        of an episode, each one a message of --message tokens and a response
    tokens       of a response: no episode and no response ends early
    vocabulary   words

and the three phases are measured, each case in a process of its own: rollout (KV cache carried from turn to turn),
scoring of the packed conversations, and update (forward and backward pass, no optimizer). Prints the median seconds and
the peak memory above what the model and a first pass on a few tokens had taken (CUDA's count on a GPU, else what the
process had resident), then the exponents p of least-squares fits ~ size^p, and with --out draws all of it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lab.benchmarks.efficiency import clock
from lab.benchmarks.rollout import exponent
from lm.logprobs import sequence_logprobs
from lm.packing import micro_batches, pack
from lm.sampler import Sampler
from rescore import response_logprobs
from runlog.memory import peak_mib

PHASES = ("rollout", "scoring", "update")
AXES = ("episodes", "turns", "tokens", "vocabulary")
MEASURES = {"seconds": "seconds", "mib": "peak memory, MiB"}


@dataclass(frozen=True)
class Size:
    """`message`: tokens that the environment says before each response. `width` and `layers` are the model's."""

    episodes: int
    turns: int
    tokens: int
    vocabulary: int
    message: int
    width: int
    layers: int


def model_of(size: Size):
    """A random Llama on the device that there is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 5 // 2,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=size.turns * (size.message + size.tokens),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


def words(size: Size, count: int) -> list[int]:
    """Random token ids."""
    return torch.randint(0, size.vocabulary, (count,)).tolist()


def play(model, size: Size) -> list[list[int]]:
    """Every episode, a turn at a time -> all that was read and sampled in each."""
    # no such word: nothing that can be sampled ends a response
    ends = SimpleNamespace(eos_token_id=size.vocabulary, pad_token_id=0)
    sampler = Sampler(model, ends, max_new_tokens=size.tokens, temperature=1.0)
    keys, seen = list(range(size.episodes)), [[] for _ in range(size.episodes)]
    for _ in range(size.turns):
        contexts = [ids + words(size, size.message) for ids in seen]
        seen = [ids + response for ids, response in zip(contexts, sampler(keys, contexts), strict=True)]
    return seen


def steps(size: Size) -> tuple[list[list[int]], list[list[int]]]:
    """(contexts, responses) of the same episodes with random words in them: a row a step."""
    turn, contexts, responses = size.message + size.tokens, [], []
    for _ in range(size.episodes):
        episode = words(size, size.turns * turn)
        for start in range(0, len(episode), turn):
            contexts.append(episode[: start + size.message])
            responses.append(episode[start + size.message : start + turn])
    return contexts, responses


def work_of(phase: str, model, size: Size, token_budget: int) -> Callable[[], object]:
    """What is timed. Raises KeyError for an unknown phase."""
    contexts, responses = steps(size)

    def update() -> None:
        for micro in micro_batches(pack(contexts, responses), token_budget):
            sequence_logprobs(model, micro, 1.0)[0].mean().neg().backward()

    scoring = lambda: response_logprobs(model, contexts, responses, token_budget=token_budget)
    return {"rollout": lambda: play(model, size), "scoring": scoring, "update": update}[phase]


def case(phase: str, size: Size, token_budget: int, repeats: int) -> dict[str, float]:
    """Run in a fresh process: median seconds, and MiB above the baseline."""
    model = model_of(size)
    # Gradients of the weights exist after it, and the second use of them adds up: both are part of any training.
    few = work_of(phase, model, replace(size, episodes=1, turns=1, tokens=2, message=2), token_budget)
    few()
    few()
    work = work_of(phase, model, size, token_budget)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib(model.device)
    times = [clock(work, model.device)]
    taken = peak_mib(model.device) - before  # now: what freed memory leaves in pieces adds up over repeats
    times += [clock(work, model.device) for _ in range(repeats - 1)]
    return {"seconds": statistics.median(times), "mib": taken}


def measure(phase: str, size: Size, token_budget: int, repeats: int) -> dict[str, float]:
    """`case` in a process of its own. It is forked off one that has imported everything, since importing takes longer
    than most cases; on a GPU it starts from nothing, since CUDA may not be used on both sides of a fork."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "benchmarks.scale"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(case, phase, size, token_budget, repeats).result()


def fit(axis: str, values: list[int], base: Size, results: dict, of: tuple[str, str]) -> tuple[list[float], float]:
    """(What was found along an axis `of` a phase in a measure, p of its fit ~ value^p: NaN where nothing was taken)."""
    found = [results[of[0], replace(base, **{axis: value})][of[1]] for value in values]
    return found, exponent(values, found) if min(found) > 0 else math.nan


def exponents(axes: dict[str, list[int]], base: Size, results: dict) -> str:
    """A line an axis, time and memory of each phase in a column."""
    titles = [f"{phase} {short}" for phase in PHASES for short in ("time", "memory")]
    lines = [f"{'~ size^p, p of':<15}" + "".join(f"{title:>16}" for title in titles)]
    for axis, values in axes.items():
        powers = [fit(axis, values, base, results, (phase, measured))[1] for phase in PHASES for measured in MEASURES]
        lines.append(f"{axis:<15}" + "".join(f"{power:>16.2f}" for power in powers))
    return "\n".join(lines)


def draw(axes: dict[str, list[int]], base: Size, results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(axes), figsize=(3 * len(axes), 6), sharey="row", layout="constrained")
    for row, (measured, label) in zip(grid, MEASURES.items(), strict=True):
        for plot, (axis, values) in zip(row, axes.items(), strict=True):
            for phase in PHASES:
                found, power = fit(axis, values, base, results, (phase, measured))
                plot.loglog(values, found, marker="o", label=f"{phase}, p = {power:.2f}")
            plot.set(xlabel=axis, ylabel=label if plot is row[0] else None)
            plot.set_xticks(values, map(str, values))
            plot.minorticks_off()
            plot.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="+", default=[4, 8, 16], help="episodes at a time")
    parser.add_argument("--turns", type=int, nargs="+", default=[4, 8, 16], help="turns an episode")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32], help="tokens a response")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[2048, 8192, 32768], help="words")
    parser.add_argument("--message", type=int, default=16, help="tokens that the environment says before each response")
    parser.add_argument("--width", type=int, default=128, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model")
    parser.add_argument("--token-budget", type=int, default=16384, help="of a forward pass, as for train.py")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median is taken")
    parser.add_argument("--out", type=Path, help="the figure")
    args = parser.parse_args()
    axes = {axis: sorted(getattr(args, axis)) for axis in AXES}
    middle = {axis: values[len(values) // 2] for axis, values in axes.items()}
    base = Size(**middle, message=args.message, width=args.width, layers=args.layers)
    sizes = dict.fromkeys(replace(base, **{axis: value}) for axis, values in axes.items() for value in values)
    print("".join(f"{axis:>11}" for axis in AXES) + f"  {'phase':<9}{'seconds':>9}{'MiB':>9}")
    results = {}
    for size in sizes:
        for phase in PHASES:
            results[phase, size] = found = measure(phase, size, args.token_budget, args.repeats)
            print("".join(f"{asdict(size)[axis]:>11}" for axis in AXES), end="")
            print(f"  {phase:<9}{found['seconds']:>9.3f}{found['mib']:>9.1f}", flush=True)
    print(exponents(axes, base, results))
    if args.out:
        draw(axes, base, results, args.out)
        print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
