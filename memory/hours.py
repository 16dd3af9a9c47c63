"""How long a run will take, phase by phase, before it has begun: python train.py --plan

    lengths (how many turns, how long answers) -> tokens and passes of each phase -> work -> seconds on a machine

The work of a pass is counted by the run's own code on tensors without data (passes.py). Seconds of work are launches x
what one costs + bytes / bandwidth + products / the products of a second. Lengths are a guess before the first
iteration. What environments, tokenizers, networks between cards and other methods' own passes take is left out.
lab/benchmarks/plan.py compares with what runs really take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from config import LOCAL_WRITERS, Config
from lm.precision import device_of
from memory.counting import Count, Work
from memory.passes import Shape

if TYPE_CHECKING:
    from memory.plan import Plan

# ---- machines --------------------------------------------------------------------------------------------------------

SHEET_BANDWIDTH, SHEET_PRODUCTS = 0.8, 0.5  # the shares of a maker's figures that are planned with
# Seconds of an operation in plain PyTorch on a GPU: a step of Qwen3-1.7B dispatches 2,846 and takes some 25 ms.
LAUNCH = 9e-6


@dataclass(frozen=True)
class Machine:
    """`weights`, `bandwidth`: bytes a second, of matrices that few rows are multiplied with and of anything else.
    `products`, `attention`: additions and multiplications a second in the run's precision. `launch`: seconds of an
    operation."""

    name: str
    weights: float
    bandwidth: float
    products: float
    attention: float
    launch: float

    def seconds(self, work: Work) -> float:
        reading = work.weights / self.weights + work.moved / self.bandwidth
        computing = work.products / self.products + work.attention / self.attention
        return work.launches * self.launch + reading + computing


@dataclass(frozen=True)
class Card:
    """By its maker's sheet: memory in GB, bandwidth in GB/s, dense products in TFLOP/s: of bfloat16 added up in float32
    (0: it has none), and of float32."""

    memory: int
    bandwidth: float
    bfloat16: float
    float32: float


# NVIDIA's data sheets and architecture white papers; A10G: that of AWS's G5 instances. Without sparsity.
CARDS = {
    "T4": Card(16, 320, 0, 8.1),
    "L4": Card(24, 300, 121, 30.3),
    "A10G": Card(24, 600, 70, 31.2),
    "RTX 3090": Card(24, 936, 71, 35.6),
    "RTX 4090": Card(24, 1008, 165, 82.6),
    "RTX 5090": Card(32, 1792, 209.5, 104.8),
    "A100 40": Card(40, 1555, 312, 19.5),
    "RTX A6000": Card(48, 768, 154.8, 38.7),
    "L40S": Card(48, 864, 362, 91.6),
    "A100 80": Card(80, 2039, 312, 19.5),
    "H100": Card(80, 3350, 989, 67),
    "H200": Card(141, 4800, 989, 67),
}


def card_of(name: str) -> Card | None:
    """The card of that name, None where it is a number of GiB. Raises ValueError for anything else."""
    if name in CARDS:
        return CARDS[name]
    try:
        float(name)
    except ValueError:
        raise ValueError(f"--plan-for {name!r}: not among {', '.join(CARDS)}, nor a number of GiB") from None
    return None


def in_bfloat16(config: Config) -> bool:
    """Whether a run multiplies in it."""
    return config.mixed_precision == "bf16" or config.dtype == "bfloat16"


def by_sheet(name: str, config: Config) -> Machine:
    """A known card, in the run's precision."""
    card = CARDS[name]
    products = card.bfloat16 if in_bfloat16(config) else 0
    bandwidth, products = SHEET_BANDWIDTH * card.bandwidth * 1e9, SHEET_PRODUCTS * (products or card.float32) * 1e12
    return Machine(name, bandwidth, bandwidth, products, products, LAUNCH)


def this_machine(plan: Plan) -> Machine:
    """As `measured_machine` says, for a plan's model."""
    return measured_machine(plan.config, plan.architecture.get_text_config(decoder=True).hidden_size)


def measured_machine(config: Config, width: int) -> Machine:
    """This machine, in some five seconds: products of `width` x 3 `width` matrices, with 1024 rows and with 16;
    attention of 1024 tokens, there and back; numbers multiplied in pairs, whose results are all kept for a while, as a
    backward pass keeps them; operations of a model so small that they do next to nothing. A CPU's seconds are those of
    its threads, so that what other programs take of it does not count."""
    device, dtype = device_of(config.device), torch.bfloat16 if in_bfloat16(config) else torch.float32
    one = torch.randn(3 * width, width, device=device, dtype=dtype)
    matrices = [one.clone() for _ in range(max(1, 2**27 // one.nbytes))]  # more than a cache holds
    few, many = (torch.randn(rows, width, device=device, dtype=dtype) for rows in (16, 1024))
    numbers = torch.randn(2**21, device=device)  # 8 MiB
    heads = torch.randn(1, max(1, width // 64), 1024, 64, device=device, dtype=dtype, requires_grad=True)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=1)
    ).to(device)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        with Count([]) as count:
            model(ids, use_cache=False)
        launch = _seconds(lambda: model(ids, use_cache=False)) / count.work.launches
        out = many @ one.T
        passes = _seconds(lambda: (many @ one.T, out @ one, out.T @ many))  # forwards, and both of a backward pass
        products = 3 * 2 * many.numel() * 3 * width / passes
        each = _seconds(lambda: [few @ matrix.T for matrix in matrices]) / len(matrices)
        reading = max(each / 10, each - 2 * few.numel() * 3 * width / products - 2 * launch)
        bandwidth = 32 * 3 * numbers.nbytes / _seconds(lambda: [numbers * numbers for _ in range(32)])
    there_and_back = _seconds(
        lambda: scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    )
    attention = (2 + 5) * 2 * heads.numel() * heads.shape[2] / there_and_back  # as counting.py counts them
    return Machine("this machine, measured", one.nbytes / reading, bandwidth, products, attention, launch)


def _seconds(work: Callable[[], object], least: float = 0.8) -> float:
    """Of one call of `work`, from as many as take `least` seconds; the first one does not count."""
    gpu, count = torch.cuda.is_available(), 0
    work()
    clock = time.perf_counter if gpu else cpu_seconds
    start = clock()
    while count == 0 or clock() - start < least:
        work()
        if gpu:
            torch.cuda.synchronize()
        count += 1
    return (clock() - start) / count


def cpu_seconds() -> float:
    """Of this process, a thread: what a clock would say of threads that never wait."""
    return time.process_time() / torch.get_num_threads()


# ---- lengths and tokens ----------------------------------------------------------------------------------------------

SHARE = 0.5  # of the limits: what turns, answers and contexts are taken to be before a run has shown it
OBSERVATION = {"compact": 64, "official": 256}  # tokens that a turn adds to a "chat" context, by --prompt
HINT = 32  # tokens of a skill in a context


@dataclass(frozen=True)
class Lengths:
    """Means of an iteration. Tokens: `read` is what a turn adds to a "chat" context, or a whole "window" context.
    `guided`: what is scored under skills, of one episode. `asked`: skill prompts of one episode, with those that are
    asked again. `most_...`: what the longest of the rows that are sampled together have: the others wait for it."""

    turns: float
    answer: float
    read: float
    transcript: float
    skill: float
    guided: float
    asked: float
    most_turns: float
    most_read: float
    most_answer: float
    most_skill: float

    @property
    def episode(self) -> float:
        """Tokens that one pass over an episode reads."""
        return self.turns * (self.read + self.answer)


def expected(config: Config) -> Lengths:
    """Before the first iteration: SHARE of the limits, and as the longest the limits themselves."""
    answer, turns, most = SHARE * config.max_new_tokens, SHARE * config.max_steps, float(config.max_steps)
    read = SHARE * (config.context_limit - config.max_new_tokens)
    if config.context == "chat":
        read = min(OBSERVATION[config.prompt], read)
        turns, most = (min(each, config.context_limit / (read + answer)) for each in (turns, most))
    transcript = SHARE * ((config.skill_context_limit or config.context_limit) - config.skill_tokens)
    skill = SHARE * config.skill_tokens
    longest = {"most_answer": float(config.max_new_tokens), "most_skill": float(config.skill_tokens)}
    longest |= {"most_turns": most, "most_read": read}
    lengths = Lengths(turns, answer, read, transcript, skill, guided=0.0, asked=1.0, **longest)
    return replace(lengths, guided=guided(config, lengths))


def guided(config: Config, lengths: Lengths) -> float:
    """Tokens scored under skills, of an episode that has all that it may have."""
    steps = min(config.max_step_skills, lengths.turns) if "step" in config.levels else 0
    each = lengths.read + HINT + lengths.answer
    others = lengths.turns - steps if "episode" in config.levels else 0
    if config.context == "window":  # every step is a sequence of its own
        return (steps + others) * each
    return steps * each + (lengths.episode + HINT if others else 0)


def measured(config: Config, line: dict[str, float]) -> Lengths:
    """What an iteration had, by its line of metrics.jsonl. It does not say how long transcripts and the longest are."""
    episodes, turns, answer = line["episodes"], line["rollout/steps"], line["rollout/response_tokens"]
    whole = line["tokens/trained"] / config.epochs / episodes
    asked = 1 + line.get("skills/retried", 0) / episodes
    return replace(
        expected(config),
        turns=turns,
        answer=answer,
        read=whole / turns - answer,
        most_read=whole / turns - answer,
        skill=line.get("tokens/skills", 0) / episodes / asked,
        guided=line["tokens/scored"] / episodes - plain_passes(config) * whole,
        asked=asked,
    )


def plain_passes(config: Config) -> int:
    """How often a step is scored under its plain context: by pi_old, and by the reference for the KL term."""
    return 1 + (config.kl > 0)


def tokens(config: Config, lengths: Lengths, episodes: int) -> dict[str, float]:
    """Of one iteration, by what they are called in metrics.jsonl (docs/metrics.md)."""
    writes = config.writes_skills and config.skill_writer in LOCAL_WRITERS
    return {
        "sampled": episodes * lengths.turns * lengths.answer,
        "skills": episodes * lengths.asked * lengths.skill if writes else 0.0,
        "scored": episodes * (plain_passes(config) * lengths.episode + lengths.guided),
        "trained": episodes * config.epochs * lengths.episode,
    }


# ---- seconds ---------------------------------------------------------------------------------------------------------

SPLITS = 2  # that an evaluation plays
# Of an optimizer's step, for each tensor and each number that is trained: clipping and AdamW
STEP_LAUNCHES, STEP_MOVED = 15, 23 * 4


class Hours:
    """Seconds of each phase of a plan's run on a machine. One process's, where there are several."""

    def __init__(self, plan: Plan, machine: Machine, lengths: Lengths | None = None):
        self.plan, self.machine, self.config = plan, machine, plan.config
        self.lengths = lengths or expected(plan.config)
        self.tokens = tokens(self.config, self.lengths, plan.episodes)
        self.phases = {"rollout": self._rollout(plan.episodes), "skills": self._skills(), "rescore": self._rescore()}
        self.phases = {name: seconds for name, seconds in self.phases.items() if seconds} | {"update": self._update()}
        self.evaluation = SPLITS * self._rollout(plan.share(self.config.eval_games))

    @property
    def iteration(self) -> float:
        return sum(self.phases.values())

    @property
    def run(self) -> float:
        """With its evaluations."""
        return self.config.iterations * self.iteration + evaluations(self.config) * self.evaluation

    def _rollout(self, episodes: int) -> float:
        """Waves of as many episodes as --rollout-budget holds. A wave has as many turns as its longest episode, with
        ever fewer rows alive: on average `turns` / `most_turns` of them."""
        lengths, alive = self.lengths, self.plan.rows(self.config.context_limit, episodes)
        waves = -(-episodes // alive)
        length = lengths.read + lengths.answer
        if self.config.context == "chat":
            length *= (lengths.turns + 1) / 2
        kept = self.config.context == "window" or self.config.reuse_cache
        read = lengths.most_read if kept else length - lengths.answer
        rows = episodes / waves * lengths.turns / lengths.most_turns
        return waves * lengths.most_turns * self._turn(rows, length, read, lengths.most_answer)

    def _skills(self) -> float:
        if not self.tokens["skills"]:
            return 0.0
        lengths, config = self.lengths, self.config
        prompts = round(self.plan.episodes * lengths.asked)
        rows = self.plan.rows(round(lengths.transcript + config.skill_tokens), prompts)
        batches = -(-prompts // rows)
        length = lengths.transcript + lengths.skill
        return batches * self._turn(prompts / batches, length, lengths.transcript, lengths.most_skill)

    def _turn(self, rows: float, length: float, read: float, steps: float) -> float:
        """`rows` contexts of `length` tokens, of which `read` are read in pieces, and `steps` tokens sampled."""
        rows, passes = max(1, round(rows)), self.plan.passes
        columns = max(1, min(round(read), self.config.token_budget // rows))
        first = self.machine.seconds(passes.reading(rows, round(length), columns).work)
        step = self.machine.seconds(passes.reading(rows, round(length), 1, room=1).work)
        return first * max(1.0, read / columns) + (steps - 1) * step

    def _micro_batch(self) -> Shape:
        """As many sequences as --token-budget holds."""
        lengths = self.lengths
        turns = lengths.turns if self.config.context == "chat" else 1
        length = max(2, round(turns * (lengths.read + lengths.answer)))
        return Shape(max(1, self.config.token_budget // length), length, max(1, round(turns * lengths.answer)))

    def _rescore(self) -> float:
        shape = self._micro_batch()
        return self._times(self.tokens["scored"], shape) * self.machine.seconds(self.plan.passes.scoring(shape).work)

    def _update(self) -> float:
        config, shape = self.config, self._micro_batch()
        passes = self._times(self.tokens["trained"], shape) * self.machine.seconds(self.plan.passes.update(shape).work)
        steps = self.plan.episodes * self.plan.processes * self.lengths.turns
        steps = config.epochs * (max(1, round(steps / config.mini_batch)) if config.mini_batch else 1)
        trained = [p.numel() for p in self.plan.model.parameters() if p.requires_grad]
        step = Work(launches=STEP_LAUNCHES * len(trained), moved=STEP_MOVED * sum(trained))
        return passes + steps * self.machine.seconds(step)

    def _times(self, tokens: float, shape: Shape) -> float:
        return tokens / (shape.rows * shape.length)


def evaluations(config: Config) -> int:
    """Of a whole run: before the first iteration, every so many, and after the last."""
    return (1 if config.eval_every else 0) + evaluations_left(config, -1)


def evaluations_left(config: Config, iteration: int) -> int:
    """After this iteration, and its own evaluation."""
    if iteration + 1 >= config.iterations:
        return 0
    return -(-config.iterations // config.eval_every) - (iteration + 1) // config.eval_every if config.eval_every else 1


# ---- what is printed -------------------------------------------------------------------------------------------------


def describe(plan: Plan, machine: Machine) -> str:
    """A column a phase; hours of the run; what is assumed."""
    hours, config = Hours(plan, machine), plan.config
    counts = {"rollout": "sampled", "skills": "skills", "rescore": "scored", "update": "trained"}
    sizes = [f"{hours.tokens[counts[name]]:>12,.0f}" for name in hours.phases]
    seconds = [f"{seconds:>12.1f}" for seconds in hours.phases.values()]
    lengths, times = hours.lengths, evaluations(config)
    answers = f"answers of {lengths.answer:.0f} tokens, {lengths.turns:.0f} turns that read {lengths.read:.0f} each"
    if hours.tokens["skills"]:
        answers += f", skills of {lengths.skill:.0f}"
    return "\n".join(
        [
            f"{'an iteration':<16}" + "".join(f"{name:>12}" for name in hours.phases),
            f"{'tokens':<16}" + "".join(sizes),
            f"{'seconds':<16}" + "".join(seconds),
            f"hours, estimated on {machine.name}: {hours.run / 3600:.1f} for {config.iterations} iterations of "
            f"{hours.iteration:.0f} s and {times} evaluation{'s' * (times > 1)} of {hours.evaluation:.0f} s",
            f"assumed, half of the limits: {answers}; of each batch one has {lengths.most_answer:.0f} tokens",
        ]
    )


LONG, TIMES = 120, 2  # seconds of an iteration from which on it is compared with its plan, and how far it may be over
CHANGE = {
    "rollout": "--max-new-tokens bounds answers; a larger --rollout-budget plays more episodes at a time",
    "skills": "--skill-tokens bounds skills; a larger --rollout-budget writes more at a time",
    "rescore": "a larger --token-budget makes passes fewer",
    "update": "a larger --token-budget makes passes fewer",
}


def seconds_of(metrics: dict[str, float]) -> dict[str, float]:
    """Of an iteration by phase, without its evaluation."""
    return {name: metrics[f"seconds/{name}"] for name in CHANGE if f"seconds/{name}" in metrics}


def evaluation_like(config: Config, metrics: dict[str, float], evaluation: float | None) -> float:
    """Seconds of an evaluation. None, since there was none yet: a guess from the rollout of an iteration."""
    games = SPLITS * max(1.0, config.eval_games / config.tasks / config.rollouts)
    return games * metrics["seconds/rollout"] if evaluation is None else evaluation


def left(config: Config, metrics: dict[str, float], iteration: int, evaluation: float | None) -> float:
    """Seconds of the run after this iteration, should the others be like it."""
    more, evaluations_more = config.iterations - iteration - 1, evaluations_left(config, iteration)
    return more * sum(seconds_of(metrics).values()) + evaluations_more * evaluation_like(config, metrics, evaluation)


def after_an_iteration(
    config: Config, metrics: dict[str, float], iteration: int, evaluation: float | None, plan: Callable[[], Plan]
) -> str:
    """The seconds of the run's first iteration by phase, and what is left of the run. A second line where a long
    iteration took more than twice what --plan says of this machine. `evaluation`: its seconds; None: a guess."""
    taken, evaluation = seconds_of(metrics), evaluation_like(config, metrics, evaluation)
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in taken.items())
    hours_left = left(config, metrics, iteration, evaluation) / 3600
    line = f"seconds: {phases}, an evaluation {evaluation:.1f}; hours left: {hours_left:.1f}, evaluations included"
    if sum(taken.values()) < LONG:
        return line
    try:
        made = plan()
        planned = Hours(made, this_machine(made)).phases
    except Exception:  # an architecture that does not run without data, or no memory left: no reason to end a run
        return line
    return "\n".join([line, *over(taken, planned, metrics)])


def over(taken: dict[str, float], planned: dict[str, float], metrics: dict[str, float]) -> list[str]:
    """A line for the phase that is furthest beyond its plan; none where the iteration is not."""
    if sum(taken.values()) <= TIMES * sum(planned.values()):
        return []
    name = max(planned, key=lambda name: taken.get(name, 0) - planned[name])
    lengths = f"{metrics['rollout/steps']:.0f} turns of {metrics['rollout/response_tokens']:.0f} tokens"
    return [
        f"WARNING: the {name} took {taken[name]:.0f} s, {planned[name]:.0f} by plan ({lengths}): {CHANGE[name]}. "
        "A machine that does other work is slower, too"
    ]
