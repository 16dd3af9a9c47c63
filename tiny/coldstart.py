"""A cold start for any model: supervised training on scripted episodes, before OPID.

A small instruct model solves nothing of these environments, and from nothing GRPO learns nothing; nor does it write
skills that parse. Minutes to an hour of next-token training give it a weak ability to act, to follow a skill in its
context, and to write one from a transcript: what the tiny model gets from its warm start, by the same demonstrations.

SEED (arXiv 2607.14777), by OPID's authors, also trains on demonstrations before RL, so that the policy itself can
write hindsight skills. The same here: supervised, before RL, hindsight skills among what is learnt. Not the same: here
every demonstration comes from a script that knows the generated games, acting is taught together with writing, skills
are in a few set phrases, and no larger model is asked for anything.

Only the responses are learnt by default: the model has its language already, and should not come to expect
what an environment says.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import lm.loading
from envs import ENVIRONMENTS, digest
from lm.adapters import left_out
from lm.loading import add_lora, save_policy, taken, write_whole
from lm.precision import device_of, mixed_precision
from lm.processes import give_back, not_finite
from tiny.demonstrations import Demonstrator, Recorded, demonstrations, plays_alone, recorded
from tiny.supervised import demonstration_loss, shuffled_batches, teach

PREFIX = "cold:"  # in front of a model's name: that model after the cold start of the defaults below
RECORD, CHECKPOINT = "coldstart.json", "checkpoint.pt"


def setting(default, help: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class ColdStart:
    """What a cold start is a function of, bit for bit on one kind of CPU with as many threads; and of its day, which
    is in its record, where the chat template prints one. Raises ValueError for a value out of range."""

    model: str = setting("smollm2", "'smollm2', a folder or a hub id: an instruct model")
    env: str = setting("alfworld", "environment", ENVIRONMENTS)
    games: int = setting(150, "train games, each of which gives four episodes and one answer with skills")
    seed: int = setting(0, "seed of everything random")
    prompt: str = setting("compact", "prompt style; official: with short thoughts", ("compact", "official"))
    context: str = setting("chat", "each step a growing conversation, or a prompt of its own", ("chat", "window"))
    context_limit: int = setting(0, "most tokens of a demonstration; 0: 2048, with official prompts 8192")
    learning_rate: float = setting(0.0, "AdamW's peak learning rate; 0: 2e-4, with --lora-rank 1e-3")
    batch_tokens: int = setting(2048, "most padded tokens of a step; a longer demonstration goes alone")
    others: float = setting(0.0, "weight of tokens that are not responses")
    lora_rank: int = setting(0, "rank of LoRA adapters on all linear layers (needs peft); 0: all weights are trained")
    mixed_precision: str = setting(
        "auto", "autocast; auto: bf16 where the device multiplies in it", ("auto", "no", "bf16")
    )
    learns: str = setting(
        "skills", "playing, following skills and writing them; or playing alone", ("skills", "playing")
    )
    demonstrations: str = setting("", "a run's episodes (tools/export.py) in place of scripted ones: a parquet file")
    only: str = setting("successes", "which episodes of --demonstrations are learnt", ("successes", "all"))

    def __post_init__(self):
        self.context_limit = self.context_limit or (2048 if self.prompt == "compact" else 8192)
        self.mixed_precision = mixed_precision(self.mixed_precision)
        self.learning_rate = self.learning_rate or (1e-3 if self.lora_rank else 2e-4)
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}")
            if f.name in ("games", "context_limit", "learning_rate", "batch_tokens") and value <= 0:
                raise ValueError(f"{f.name} must be positive, not {value}")
            if f.name in ("others", "lora_rank") and value < 0:
                raise ValueError(f"{f.name} must not be negative")
        for idle in ("games", "learns") if self.demonstrations else ("only",):
            if getattr(self, idle) != getattr(ColdStart, idle):
                told = "with" if self.demonstrations else "without"
                raise ValueError(f"--{idle} does nothing {told} --demonstrations")


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP wait inside -> whether one came. It takes effect at the end of the block, however that
    ends; a second Ctrl-C does at once. Only the main thread hears signals."""
    came, before = [], {}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, frame) -> None:
        came.append(number)
        if number == signal.SIGINT and len(came) > 1:
            give_back()
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
        heard = [getattr(signal, name) for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
        before |= {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: bool(came)
    finally:
        give_back()
        if came:
            signal.raise_signal(came[0])


def folder_of(model: str, env: str, prompt: str = "compact", seed: int = 0) -> Path:
    """Where the cold-started weights of a model belong; those of compact prompts are what `cold:MODEL` loads."""
    further = ("" if prompt == "compact" else f"-{prompt}") + (f"-seed{seed}" if seed else "")
    return Path("runs") / f"cold-{Path(model).name}-{env}{further}"


def cold_started(name: str, env: str, seed: int = 0) -> str:
    """`cold:MODEL` -> its folder, made by the defaults of ColdStart where it is not there yet."""
    model = name.removeprefix(PREFIX)
    folder = folder_of(model, env, seed=seed)
    record = read_record(folder)
    made = {"model": model, "env": env, "prompt": "compact", "context": "chat", "seed": seed}
    if others := [name for name, value in made.items() if record and record["settings"][name] != value]:
        found = ", ".join(f"{name} {record['settings'][name]}" for name in others)
        raise ValueError(f"{folder} holds a cold start of {found}: move it away, or give a folder to --model")
    if "seconds" not in record:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"{folder} is not there yet: run tools/coldstart.py once, in one process, first")
        print(f"{name}: {folder} is not there yet, so the cold start comes first (once)", flush=True)
        settings = record.get("settings") or {"model": model, "env": env, "seed": seed}
        cold_start(ColdStart(**settings), folder)
    return str(folder)


def read_record(folder: Path) -> dict:
    """Settings, losses and, once it is finished, seconds of the cold start in a folder; {} where there is none."""
    return lm.loading.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


def cold_start(settings: ColdStart, folder: Path, save_every: int = 50) -> dict:
    """Train, and leave in `folder` what plain `from_pretrained` loads -> the record. A cold start that was stopped goes
    on from its checkpoint, made every `save_every` steps. Raises ValueError for a folder that holds another one, or in
    which another process is at work."""
    if save_every < 1:
        raise ValueError(f"save_every must be positive, not {save_every}")
    today = datetime.date.today().isoformat()
    learnt = digest(settings.demonstrations) if settings.demonstrations else None
    record = read_record(folder) or {"settings": asdict(settings), "losses": [], "date": today, "learnt": learnt}
    newer = {name: getattr(ColdStart, name) for name in ("learns", "demonstrations", "only")}  # than some records
    if newer | record["settings"] != asdict(settings):
        raise ValueError(f"{folder} holds a cold start with other settings (see its {RECORD}): take another folder")
    if record.get("learnt") != learnt:
        raise ValueError(f"{folder} holds a cold start on another {settings.demonstrations}: take another folder")
    if "seconds" in record:
        return record
    model, tokenizer = lm.loading.load_pretrained(settings.model)
    model, optimizer = prepared(model, settings)
    batches = batches_of(tokenizer, settings, record.get("date"))
    lock = taken(folder, "cold start")
    if "seconds" in (made := read_record(folder)):  # by another one in the meantime
        return made
    write_record(folder, record)
    losses, seconds = resumed(folder / CHECKPOINT, model, optimizer)
    started = time.perf_counter() - seconds

    def after() -> None:
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"step {len(losses)}: the loss is {losses[-1]}. Try a lower --learning-rate")
        give_back()  # batches of other sizes go on top of what was freed: 8.4 GiB after 60 steps of SmolLM2, without
        if len(losses) % save_every == 0 or stopped():
            save_checkpoint(folder / CHECKPOINT, model, optimizer, losses, time.perf_counter() - started)
        if stopped():
            raise KeyboardInterrupt

    bf16 = settings.mixed_precision == "bf16"
    with held_back() as stopped:
        teach(
            model,
            batches,
            [optimizer],
            lambda batch: demonstration_loss(model, batch, settings.others, autocast=bf16),
            learning_rate=settings.learning_rate,
            losses=losses,
            after=after,
        )
    check_finite(model)
    save_policy(model, tokenizer, folder, about(settings, record.get("date")))
    record |= {"losses": losses, "seconds": round(time.perf_counter() - started)}
    write_record(folder, record)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    lock.release()
    return record


def prepared(model, settings: ColdStart) -> tuple:
    """-> the model on its device, with adapters if asked for, and an optimizer of what is trained."""
    torch.manual_seed(settings.seed)  # adapters start at random
    model = add_lora(model, settings.lora_rank) if settings.lora_rank else model
    if settings.lora_rank and (warning := left_out(model)):
        print(warning, flush=True)
    model = model.to(device_of()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)


def batches_of(tokenizer, settings: ColdStart, date: str | None) -> list:
    """The demonstrations in batches, in the order in which they are learnt. `date`: see Encoder."""
    kind = Recorded if settings.demonstrations else Demonstrator
    demonstrator = kind(
        tokenizer,
        settings.seed,
        settings.env,
        prompt=settings.prompt,
        context=settings.context,
        context_limit=settings.context_limit,
        date=date,
    )
    if isinstance(demonstrator, Recorded):
        sequences = recorded(demonstrator, settings.demonstrations, settings.only)
    elif settings.learns == "playing":
        sequences = plays_alone(demonstrator, settings.games)
    else:
        sequences = demonstrations(demonstrator, games=settings.games, plays=1)
    if not sequences:
        raise ValueError(f"no demonstration fits in {settings.context_limit} tokens")
    scored = sum(size for sequence in sequences for _, _, size in sequence.responses)
    print(f"{len(sequences)} sequences, {sum(len(s.ids) for s in sequences)} tokens, {scored} of them responses")
    learnt = [token for s in sequences for _, start, size in s.responses for token in s.ids[start : start + size]]
    if (unknown := tokenizer.unk_token_id) is not None and unknown in learnt:
        share = learnt.count(unknown) / len(learnt)
        print(f"WARNING: {share:.0%} of the responses' tokens are unknown to --model {settings.model}, and stay so")
    return shuffled_batches(sequences, settings.batch_tokens, 1, settings.seed)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def about(settings: ColdStart, date: str | None) -> dict:
    """What the model says of itself to train.py and evaluate.py."""
    usual = (settings.prompt, settings.context) == ("compact", "chat")
    acts = {"env": settings.env, "prompt": settings.prompt, "context": settings.context}
    return {"base": PREFIX + settings.model if usual else settings.model, "date": date, "acts": acts}


def write_record(folder: Path, record: dict) -> None:
    write_whole(folder / RECORD, lambda path: path.write_text(json.dumps(record, indent=1)))


def check_finite(model) -> None:
    """Raises FloatingPointError where a weight is infinite or no number: nothing of it is to be kept."""
    if spoilt := not_finite(dict(model.named_parameters())):
        raise FloatingPointError(f"{spoilt} is not finite: nothing is written. Try a lower --learning-rate")


def save_checkpoint(path: Path, model, optimizer, losses: list[float], seconds: float) -> None:
    """Everything that the next step depends on, complete or absent."""
    check_finite(model)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"model": trained, "optimizer": optimizer.state_dict(), "losses": losses, "seconds": seconds}
    write_whole(path, lambda temporary: torch.save(state, temporary))


def resumed(path: Path, model, optimizer) -> tuple[list[float], float]:
    """-> the losses so far and the seconds that they took, with the state put into model and optimizer."""
    if not path.is_file():
        return [], 0.0
    state = torch.load(path, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"], state["seconds"]
