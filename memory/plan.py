"""What a run needs of memory, phase by phase, whether that is there, and what to change first: python train.py --plan

It also says how long the run will take (hours.py) and what it writes to disk (disk.py).

Planned from the model's configuration, no weights loaded. Exact: weights, gradients, optimizer, copies, keys and
values. What a pass holds besides is counted on tensors without data, by the run's own code (passes.py). All rows are
taken to be as long as they may be. lab/benchmarks/plan.py compares with what runs really take.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import AutoConfig

from config import FREE, LOCAL_WRITERS, RECIPES, Config, flag
from lm.loading import frozen
from lm.precision import device_of, mixed_precision
from lm.processes import give_back
from memory import disk, hours, machine
from memory.counting import bytes_of, shell
from memory.passes import Pass, Passes
from tiny.loading import load_config

MIB, GIB = 2**20, 2**30
FROZEN = ("reference", "teacher")  # models that only read
CARDS = (16, 24, 48, 80, 141)  # GiB, of one GPU
# of a card or of this machine: the rest is for the CUDA context, libraries' workspaces, and pieces that fit nothing
USABLE = 0.9
DAY = 24 * 3600  # seconds


@dataclass
class Phase:
    """`parts`: what is held at its peak, name -> bytes."""

    name: str
    parts: dict[str, float]

    @property
    def size(self) -> float:
        return sum(self.parts.values())


class Plan:
    """The phases of a run on one of `processes`, each with its peak. `libraries`: bytes of the process before it has a
    model, which count on a CPU; None: planned for a GPU. Raises ValueError where there is no such model."""

    def __init__(self, config: Config, architecture=None, *, processes: int = 1, libraries: float | None = None):
        self.config, self.processes, self.libraries, self.gpu = config, processes, libraries, libraries is None
        self.architecture = architecture or architecture_of(config.model, config.env)
        self.model = shell(self.architecture, config.dtype, config.lora_rank)
        self.passes = Passes(config, self.architecture)
        self.phases = [phase for phase in self._phases() if phase]

    def changed(self, changes: dict) -> Plan:
        """That of the same run with other settings. Raises ValueError where it cannot have them."""
        config = replace(self.config, **changes)
        return Plan(config, self.architecture, processes=self.processes, libraries=self.libraries)

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def peak(self) -> float:
        """Bytes of one process."""
        return self.largest.size

    def _phases(self) -> list[Phase | None]:
        config, limit = self.config, self.config.context_limit
        alive, played = self.rows(limit, self.episodes), self.rows(limit, self.share(config.eval_games))
        return [
            self._without_gradient("rollout", self.passes.sampling(alive, limit)),
            self._skills(),
            self._without_gradient("scoring", self.passes.scoring(), *FROZEN),
            self._update(),
            self._without_gradient("evaluation", self.passes.sampling(played, limit)) if played > alive else None,
        ]

    def share(self, count: int) -> int:
        """The most of so many that one process gets."""
        return -(-count // self.processes)

    @property
    def episodes(self) -> int:
        """Of one process, in an iteration."""
        return self.share(self.config.tasks) * self.config.rollouts

    def rows(self, length: int, count: int) -> int:
        """How many rows are sampled at a time, of `count` in all."""
        return min(max(1, self.config.rollout_budget // length), count)

    def _skills(self) -> Phase | None:
        config, writer = self.config, self.config.skill_writer
        if not config.writes_skills or writer not in LOCAL_WRITERS:
            return None
        length = config.skill_context_limit or config.context_limit
        work = self.passes.sampling(self.rows(length, self.episodes), length)
        return self._without_gradient("skills", work, writer)

    # ---- what a phase holds --------------------------------------------------------------------------------------

    def _lasting(self, used: tuple[str, ...]) -> dict[str, float]:
        """What is held whatever a phase does. With --offload on a GPU only what is `used` of the models that only read,
        and of the optimizer."""
        config, weights = self.config, bytes_of(self.model)
        teacher = getattr(config, "teacher", None)  # of some variants
        parts = {
            "weights": weights,
            "reference": self._frozen(config.model) if config.reads("reference") and not config.lora_rank else 0,
            "teacher": self._frozen(teacher) if teacher else 0,
            "optimizer": 2 * bytes_of(self.model, trained=True),
            "state": 0 if self.gpu else 2 * config.kept_models * weights,  # this iteration's, and the last whole one's
        }
        if config.offload and self.gpu:
            parts = {name: size for name, size in parts.items() if name in ("weights", *used)}
        if config.shard:
            parts = {name: size / self.processes for name, size in parts.items()}
        return {"process": self.libraries or 0} | parts

    def _without_gradient(self, name: str, work: Pass, *used: str) -> Phase:
        parts = self._lasting(used)
        if self.config.shard:  # the model in use, whole
            parts["gathered"] = bytes_of(self.model) * (1 - 1 / self.processes)
        parts |= {"autocast copies": work.copies, "keys, values": work.cache}
        return Phase(name, parts | {"pass": work.peak - work.copies - work.cache})

    def _update(self) -> Phase:
        work, trained = self.passes.update(), bytes_of(self.model, trained=True)
        parts = self._lasting(("optimizer", *self.config.read_in_loss))
        mine = trained / (self.processes if self.config.shard else 1)
        if self.config.shard:
            parts["gathered"] = self._units()
        # A pass, or, when its activations are gone, AdamW's roots of all second moments, which a GPU takes at a time.
        held, step = work.peak - trained, mine if self.gpu else 0
        copies = work.copies if held > step else 0
        return Phase("update", parts | {"gradients": mine, "autocast copies": copies, "pass": max(held, step) - copies})

    def _units(self) -> float:
        """What FSDP gathers at a time: what belongs to no layer, two layers, and the gradient of the larger of both."""
        layers = max((m for m in self.model.modules() if isinstance(m, nn.ModuleList)), key=len)
        layer = bytes_of(layers[0])
        rest = bytes_of(self.model) - sum(bytes_of(each) for each in layers)
        return (rest + 2 * layer + max(rest, layer)) * (1 - 1 / self.processes)

    def _frozen(self, name: str) -> int:
        """The bytes of a copy that only reads."""
        config, own = self.config, name == self.config.model
        model = shell(self.architecture if own else architecture_of(name, config.env), config.dtype, 0)
        return bytes_of(frozen(model, config.frozen_dtype, mixed_precision=config.mixed_precision))


def architecture_of(name: str, env: str = "alfworld"):
    """A model's configuration, of the recipes' models without asking the hub."""
    recipes_own = json.loads((RECIPES / "models.json").read_text())
    if published := next((about for hub, about in recipes_own.items() if Path(hub).name == Path(name).name), None):
        return AutoConfig.for_model(**published)
    return load_config(name, env)


# ---- is it there, and what to change -------------------------------------------------------------------------------


def advice(plan: Plan, there: float) -> str | None:
    """The change to make first where the plan does not fit into `there` bytes; None where it fits: the first that is
    enough by itself, else the one that takes most off. What makes no number differ is asked first."""
    if plan.peak <= USABLE * there:
        return None
    tried = []
    for words, changes in _changes(plan):
        try:
            other = plan.changed(changes)
        except ValueError:  # this run cannot have that, such as --shard with a method that needs whole models
            continue
        if other.peak <= USABLE * there:
            return f"{words} is enough ({other.peak / GIB:.1f} GiB)"
        tried.append((other.peak, words))
    least, words = min(tried, default=(plan.peak, ""))
    if least > 0.98 * plan.peak:
        return "no flag by itself takes much off: a smaller model, or a larger device"
    return f"first {words} ({least / GIB:.1f} GiB), then ask again"


def _changes(plan: Plan) -> list[tuple[str, dict]]:
    """Settings that could take something off the largest phase, as (words, changes); of a run that is resumed only
    those that may change."""
    config, phase, changes = plan.config, plan.largest.name, []

    def halved(name: str, least: int) -> None:
        value = getattr(config, name)
        while value // 2 >= least:
            value //= 2
            changes.append((f"{flag(name)} {value}", {name: value}))

    if phase in ("rollout", "skills", "evaluation"):
        length = (config.skill_context_limit or config.context_limit) if phase == "skills" else config.context_limit
        halved("rollout_budget", length)
    if phase == "update" and not config.gradient_checkpointing:
        changes.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    halved("token_budget", min(config.context_limit, 1024))
    if config.frozen_dtype == "float32":
        changes.append(("--frozen-dtype auto", {"frozen_dtype": "auto"}))
    if not (config.offload or config.shard):
        changes.append(("--offload", {"offload": True}))
    if plan.processes > 1 and not (config.shard or config.offload or config.lora_rank):
        changes.append(("--shard", {"shard": True}))
    if not (config.lora_rank or config.shard):
        changes.append(("--lora-rank 32", {"lora_rank": 32}))
    return [(words, change) for words, change in changes if not config.resume or change.keys() <= FREE]


def fit(plan: Plan, there: float) -> tuple[Plan, str]:
    """--fit: the plan with what has to change for `there` bytes, and the flags of that. No sample changes by it, but
    for rounding. What does not fit even so is left for `advice` to say."""
    changed: dict = {}
    while plan.peak > USABLE * there and (change := next(_exact(plan), None)):
        plan, changed = plan.changed(change), changed | change
    flags = [flag(name) if value is True else f"{flag(name)} {value}" for name, value in changed.items()]
    return plan, f"fitted to {there / GIB:.1f} GiB: {' '.join(flags) or 'nothing has to change'}"


def fitted(config: Config, processes: int = 1) -> tuple[Config, str]:
    """The settings of a run as `fit` changes them for this machine, and three lines: how, in which precision, and how
    long it will take. Raises ValueError where there is no such model."""
    device = device_of(config.device)
    plan = Plan(config, processes=processes, libraries=libraries_of(config))
    plan, line = fit(plan, machine.there(device))
    products = "bfloat16" if hours.in_bfloat16(config) else "float32"
    estimate = hours.Hours(plan, hours.this_machine(plan))
    lines = [line, f"on {device.type}: {config.dtype} weights, products in {products}"]
    lines += [f"{estimate.run / 3600:.1f} hours by plan, with answers of {estimate.lengths.answer:.0f} tokens"]
    if estimate.run > DAY and (found := sorted(RECIPES.glob(f"one-card-{config.env}-*.toml"))):
        lines[-1] += f". For one day on one card: --recipe {' or '.join(path.stem for path in found)}"
    return plan.config, "\n".join(lines)


def _exact(plan: Plan) -> Iterator[dict]:
    """What takes memory off the largest phase without a change of any sample, the cheapest first."""
    config, phase = plan.config, plan.largest.name
    length = (config.skill_context_limit or config.context_limit) if phase == "skills" else config.context_limit
    if phase in ("rollout", "skills", "evaluation") and config.rollout_budget >= 2 * length:
        yield {"rollout_budget": config.rollout_budget // 2}
    if config.token_budget >= 2 * min(config.context_limit, 1024):
        yield {"token_budget": config.token_budget // 2}
    if phase == "update" and not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if plan.gpu and not (config.offload or config.shard):
        yield {"offload": True}


def planned(config: Config, model, processes: int) -> str:
    """For the start of a run: one line each for memory and disk, with a warning where it would run out."""
    return f"{_memory(config, model, processes)}\n{disk.describe(config, model)}"


def _memory(config: Config, model, processes: int) -> str:
    try:
        plan = Plan(config, model.config, processes=processes, libraries=libraries_of(config, model))
    except Exception as error:  # an architecture that does not run without data; no reason to refuse it
        return f"memory: not planned, {type(error).__name__} in this architecture's code"
    there = machine.there(device_of(config.device))
    line = (
        f"memory: at most {plan.peak / GIB:.1f} GiB by plan (in the {plan.largest.name}), {there / GIB:.1f} GiB there"
    )
    change = advice(plan, there)
    return line if change is None else f"{line}\nWARNING: this run may run out of memory. Change {change}; see --plan"


def describe(config: Config) -> str:
    """What --plan and --plan-for print. Raises ValueError for a card that is not known."""
    launched, name, card = "WORLD_SIZE" in os.environ, config.plan_for, None
    there, libraries = machine.there(device_of(config.device)), libraries_of(config)
    if name is not None:
        config, card = for_card(config, name)
        there, libraries = GIB * (card.memory if card else float(name)), None
    plan, lines = Plan(config, processes=int(os.environ.get("WORLD_SIZE", 1)), libraries=libraries), []
    if config.fit:
        plan, line = fit(plan, there)
        config, lines = plan.config, [line]
    change = advice(plan, there)
    lines += [format_phases(plan.phases)]
    lines += [f"peak, estimated: {plan.peak / MIB:.1f} MiB a process, in the {plan.largest.name}"]
    fits = "it fits" if change is None else f"does not fit: change {change}"
    whose = f"{name if card else 'such a card'} has" if name else "the GPU has" if plan.gpu else "this machine has"
    lines += [f"{whose} {there / GIB:.1f} GiB, {USABLE:.0%} of which may be planned with: {fits}"]
    counts = (1, 2, 4, 8) if config.shard and not launched else (plan.processes,)
    for count in counts:
        peak = Plan(config, plan.architecture, processes=count).peak
        fitting = next((f"fits a GPU of {size} GB" for size in CARDS if peak <= USABLE * size * GIB), "fits no GPU")
        lines += [f"on {count} GPU{'s' * (count > 1)}: {peak / GIB:.1f} GiB each, {fitting}"]
    if card or name is None:
        lines += [hours.describe(plan, hours.by_sheet(name, config) if name and card else hours.this_machine(plan))]
    else:
        lines += ["hours: name a card (--plan-for 'RTX 4090')"]
    return "\n".join([*lines, disk.describe(config, plan.model)])


def for_card(config: Config, name: str) -> tuple[Config, hours.Card | None]:
    """The settings as they hold on the card of --plan-for, and that card; None where only its memory is known."""
    card = hours.card_of(name)
    precision = config.mixed_precision
    if precision == "auto":
        precision = mixed_precision(precision) if card is None else "bf16" if card.bfloat16 else "no"
    return replace(config, plan_for=None, mixed_precision=precision), card


def libraries_of(config: Config, *models: nn.Module) -> float | None:
    """Bytes of this process without the models that it holds; None on a GPU, where it is not in the card's memory."""
    give_back()
    return None if device_of(config.device).type == "cuda" else max(0, machine.resident() - sum(map(bytes_of, models)))


def format_phases(phases: list[Phase]) -> str:
    """A line a part, a column a phase, in MiB."""
    names = list(dict.fromkeys(name for phase in phases for name, size in phase.parts.items() if size >= MIB / 20))
    lines = [f"{'MiB':<16}" + "".join(f"{phase.name:>12}" for phase in phases)]
    for name in names:
        sizes = [phase.parts.get(name, 0) / MIB for phase in phases]
        lines.append(f"{name:<16}" + "".join(f"{size:>12.1f}" if size >= 0.05 else f"{'-':>12}" for size in sizes))
    return "\n".join([*lines, f"{'all':<16}" + "".join(f"{phase.size / MIB:>12.1f}" for phase in phases)])
