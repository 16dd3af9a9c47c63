"""What a run needs of memory, phase by phase, whether that is there, and what to change first: python train.py --plan

Planned from the model's configuration, no weights loaded. Exact: weights, gradients, optimizer, copies, keys and
values. What a pass holds besides is counted on tensors without data, by the run's own code (passes.py). All rows are
taken to be as long as they may be. benchmarks/plan.py compares with what runs really take.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from config import LOCAL_WRITERS, Config, flag
from runlog import memory
from runlog.counting import bytes_of, shell
from runlog.passes import Pass, Passes
from tiny.loading import load_config

MIB, GIB = 2**20, 2**30
CARDS = (16, 24, 48, 80, 141)  # GiB, of one GPU
# of a card or of this machine: the rest is for the CUDA context, libraries' workspaces, and pieces that fit nothing
USABLE = 0.9


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
    model, which count on a CPU; None: planned for a GPU. Raises what loading a model's configuration raises (OSError
    where the hub cannot be reached)."""

    def __init__(self, config: Config, architecture=None, *, processes: int = 1, libraries: float | None = None):
        self.config, self.processes, self.libraries, self.gpu = config, processes, libraries, libraries is None
        self.architecture = architecture or load_config(config.model, config.env)
        self.model = shell(self.architecture, config.dtype, config.lora_rank)
        self.passes = Passes(config, self.architecture)
        self.phases = [phase for phase in self._phases() if phase]

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def peak(self) -> float:
        """Bytes of one process."""
        return self.largest.size

    def _phases(self) -> list[Phase | None]:
        config, share = self.config, self.processes
        limit = config.context_limit
        alive = min(max(1, config.rollout_budget // limit), -(-config.tasks // share) * config.rollouts)
        played = min(max(1, config.rollout_budget // limit), -(-config.eval_games // share))
        phases = [self._sampling("rollout", alive, limit, "policy"), self._skills()]
        scoring = self.passes.scoring()
        reads_reference = config.kl or config.scorer == "reference"
        phases.append(self._without_gradient("scoring", scoring, "reference" if reads_reference else "policy"))
        phases.append(self._update())
        return [*phases, self._sampling("evaluation", played, limit, "policy") if played > alive else None]

    def _sampling(self, name: str, rows: int, length: int, model: str) -> Phase:
        return self._without_gradient(name, self.passes.sampling(rows, length), model)

    def _skills(self) -> Phase | None:
        config = self.config
        if not config.writes_skills or config.skill_writer not in LOCAL_WRITERS:
            return None
        length = config.skill_context_limit or config.context_limit
        rows = min(max(1, config.rollout_budget // length), -(-config.tasks // self.processes) * config.rollouts)
        return self._sampling("skills", rows, length, config.skill_writer)

    # ---- what a phase holds --------------------------------------------------------------------------------------

    def _lasting(self, update: bool, reference: bool) -> dict[str, float]:
        """What is held in a phase whatever it does."""
        config, model = self.config, self.model
        offload = config.offload and self.gpu
        parts = {
            "process": self.libraries or 0,
            "weights": bytes_of(model),
            "reference": 0 if config.lora_rank or (offload and not reference) else self._frozen(config.model),
            "teacher": self._frozen(config.teacher) if config.teacher and (reference or not offload) else 0,
            "EMA": bytes_of(model) if config.keeps_ema else 0,
            "optimizer": 0 if offload and not update else 2 * bytes_of(model, trained=True),
        }
        if config.shard:
            parts = {name: size if name == "process" else size / self.processes for name, size in parts.items()}
        return parts

    def _without_gradient(self, name: str, work: Pass, model: str) -> Phase:
        """`model`: the one that reads most."""
        parts = self._lasting(update=False, reference=model == "reference")
        if self.config.shard:
            parts["gathered"] = bytes_of(self.model) * (1 - 1 / self.processes)
        parts |= {"autocast copies": work.copies, "keys, values": work.cache}
        return Phase(name, parts | {"pass": work.peak - work.copies - work.cache})

    def _update(self) -> Phase:
        work, trained = self.passes.update(), bytes_of(self.model, trained=True)
        parts, mine = (
            self._lasting(update=True, reference=False),
            trained / (self.processes if self.config.shard else 1),
        )
        if self.config.shard:
            parts["gathered"] = self._units()
        # AdamW's roots of the second moments, of all weights at a time on a GPU, when a pass's activations are gone
        step = mine if self.gpu else 0
        held = max(work.peak - trained, step)
        copies = work.copies if held > step else 0
        return Phase("update", parts | {"gradients": mine, "autocast copies": copies, "pass": held - copies})

    def _units(self) -> float:
        """What FSDP gathers at a time: what belongs to no layer, two layers, and the gradient of the larger of both."""
        layers = max((m for m in self.model.modules() if isinstance(m, nn.ModuleList)), key=len)
        layer = bytes_of(layers[0])
        rest = bytes_of(self.model) - sum(bytes_of(each) for each in layers)
        return (rest + 2 * layer + max(rest, layer)) * (1 - 1 / self.processes)

    def _frozen(self, name: str) -> int:
        """A frozen copy's bytes; see --frozen-dtype."""
        config, own = self.config, name == self.config.model
        model = shell(self.architecture if own else load_config(name), config.dtype, 0)
        if config.frozen_dtype == "float32" or (config.frozen_dtype == "auto" and config.mixed_precision == "no"):
            return bytes_of(model)
        if config.frozen_dtype == "bfloat16":
            return sum(2 * p.numel() for p in model.parameters())
        tied = model.get_input_embeddings().weight
        linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not tied]
        return bytes_of(model) - sum(w.numel() * (w.element_size() - 2) for w in linear)


# ---- is it there, and what to change -------------------------------------------------------------------------------


def advice(plan: Plan, there: float) -> str | None:
    """The change to make first where the plan does not fit into `there` bytes; None where it fits: the first that is
    enough by itself, else the one that takes most off. What makes no number differ is asked first."""
    if plan.peak <= USABLE * there:
        return None
    tried = []
    for words, changes in _changes(plan):
        same = {"processes": plan.processes, "libraries": plan.libraries}
        other = Plan(replace(plan.config, **changes), plan.architecture, **same)
        if other.peak <= USABLE * there:
            return f"{words} is enough ({other.peak / GIB:.1f} GiB)"
        tried.append((other.peak, words))
    least, words = min(tried, default=(plan.peak, ""))
    if least > 0.98 * plan.peak:
        return "no flag by itself takes much off: a smaller model, or a larger device"
    return f"first {words} ({least / GIB:.1f} GiB), then ask again"


def _changes(plan: Plan) -> list[tuple[str, dict]]:
    """Settings that could take something off the largest phase, as (words, changes)."""
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
    if plan.gpu and not config.offload:
        changes.append(("--offload", {"offload": True}))
    if plan.processes > 1 and not config.shard and not config.lora_rank:
        changes.append(("--shard", {"shard": True}))
    if not config.lora_rank:
        changes.append(("--lora-rank 32", {"lora_rank": 32}))
    return changes


def line(config: Config, model, processes: int) -> str:
    """One line for the start of a run, with a warning where it would run out."""
    try:
        plan = Plan(config, model.config, processes=processes, libraries=libraries_of(model))
    except Exception as error:  # an architecture that does not run without data; no reason to refuse it
        return f"memory: not planned, {type(error).__name__} in this architecture's code"
    there = memory.there()
    told = (
        f"memory: at most {plan.peak / GIB:.1f} GiB by plan (in the {plan.largest.name}), {there / GIB:.1f} GiB there"
    )
    change = advice(plan, there)
    return told if change is None else f"{told}\nWARNING: this run may run out of memory. Change {change}; see --plan"


def told(config: Config) -> str:
    """What --plan prints."""
    launched = "WORLD_SIZE" in os.environ
    plan = Plan(config, processes=int(os.environ.get("WORLD_SIZE", 1)), libraries=libraries_of())
    there = memory.there()
    change = advice(plan, there)
    lines = [format_phases(plan.phases)]
    lines += [f"peak, estimated: {plan.peak / MIB:.1f} MiB a process, in the {plan.largest.name}"]
    fits = "it fits" if change is None else f"does not fit: change {change}"
    lines += [
        f"{'the GPU has' if plan.gpu else 'this machine has'} {there / GIB:.1f} GiB, {USABLE:.0%} of which may be "
        f"planned with: {fits}"
    ]
    counts = (1, 2, 4, 8) if config.shard and not launched else (plan.processes,)
    for count in counts:
        peak = Plan(config, plan.architecture, processes=count).peak
        card = next((f"fits a GPU of {card} GB" for card in CARDS if peak <= USABLE * card * GIB), "fits no GPU")
        lines += [f"on {count} GPU{'s' * (count > 1)}: {peak / GIB:.1f} GiB each, {card}"]
    return "\n".join(lines)


def libraries_of(*models: nn.Module) -> float | None:
    """Bytes of this process without the models that it holds; None on a GPU, where it is not in the card's memory."""
    memory.give_back()
    return None if torch.cuda.is_available() else max(0, memory.resident() - sum(map(bytes_of, models)))


def format_phases(phases: list[Phase]) -> str:
    """A line a part, a column a phase, in MiB."""
    names = list(dict.fromkeys(name for phase in phases for name, size in phase.parts.items() if size >= MIB / 20))
    lines = [f"{'MiB':<16}" + "".join(f"{phase.name:>12}" for phase in phases)]
    for name in names:
        sizes = [phase.parts.get(name, 0) / MIB for phase in phases]
        lines.append(f"{name:<16}" + "".join(f"{size:>12.1f}" if size >= 0.05 else f"{'-':>12}" for size in sizes))
    return "\n".join([*lines, f"{'all':<16}" + "".join(f"{phase.size / MIB:>12.1f}" for phase in phases)])
