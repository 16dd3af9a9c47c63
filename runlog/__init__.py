"""The run folder: config, metrics, samples, checkpoints, the final policy. Written so that a killed run loses nothing
but the iterations since its last checkpoint, and resumes exactly there."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from config import FREE, Config, changed, flag, settings_to_save
from data import Batch
from evaluate import Counts
from lm.loading import read_json, remove, save_policy, taken, write_whole
from lm.precision import device_of
from lm.processes import whole
from lm.watch import watch
from runlog import card, checkpoints
from runlog.metrics import over_processes, read_lines

if TYPE_CHECKING:
    from runlog.live import Live


def accelerator_of(config: Config) -> Accelerator:
    """The processes, device, precision and tracker of a run."""
    # One process may play or evaluate for long after the others have done. One that died is noticed by lm/watch.py.
    patient = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))
    return Accelerator(
        cpu=device_of(config.device).type == "cpu",
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.out,
        kwargs_handlers=[patient],
    )


class RunLog:
    """Files under `config.out`. Only the main process writes, but for the shards of a checkpoint."""

    def __init__(self, config: Config, accelerator):
        self.config, self.accelerator, self.folder = config, accelerator, Path(config.out)
        if config.push and accelerator.is_main_process:
            card.check_writable(config.push, private=True)  # best noticed before hours of work
        self.lock = taken(self.folder, "run") if accelerator.is_main_process else None
        written, saved = self.folder / "config.json", checkpoints.saved(self.folder)
        if saved or (self.folder / "metrics.jsonl").exists():
            # with a checkpoint, the weights behind --model are compared in `start`
            free = FREE | ({"model"} if saved and (self.folder / "start.json").exists() else set())
            self._check(read_json(written) if written.exists() else None, free)
        self.checkpoint, damaged = checkpoints.newest_readable(saved if config.resume else [])
        if damaged and self.checkpoint is None:
            raise ValueError(f"no checkpoint in {self.folder} is whole ({damaged[0]} is not): nothing to resume from")
        for path in damaged:
            accelerator.print(f"{path} is damaged or cut off, and renamed: going on from {self.checkpoint}")
        self.first_iteration = int(self.checkpoint.stem) + 1 if self.checkpoint else 0
        accelerator.wait_for_everyone()  # or a slower process would take the file written below for another run's
        if accelerator.is_main_process:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for path in damaged:  # else it would count among the newest, and whole ones would go for its sake
                checkpoints.set_aside(path)
            settings = json.dumps(config.to_dict(), indent=2) + "\n"
            write_whole(written, lambda temporary: temporary.write_text(settings))
            for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
                self._drop_from(self.folder / name, self.first_iteration or -1)
        accelerator.wait_for_everyone()
        self.farewell = watch()
        self.tracked = 0  # the first step that the tracker does not know
        self.table: Live | None = None  # in a terminal, from the first iteration on

    def start(self, model, data: dict[str, str]) -> dict:
        """What the run started from, kept in `start.json`: the fingerprints of its weights and `data`, its name for
        trackers, and the day, which some chat templates print. Raises ValueError where a resumed run would start from
        other weights, since the reference would no longer be the start, or go on with other data."""
        path, own = self.folder / "start.json", checkpoints.fingerprint(model)
        if not (self.checkpoint and path.exists()) and self.accelerator.is_main_process:
            start = {"weights": own, "date": datetime.date.today().isoformat(), "tracked": uuid.uuid4().hex[:8]}
            start["folder"] = self.folder.resolve().name
            text = json.dumps(start | {"data": data}, indent=2) + "\n"
            write_whole(path, lambda temporary: temporary.write_text(text))
        self.accelerator.wait_for_everyone()
        start = read_json(path)
        if start.get("weights") != own:
            raise ValueError(f"the weights behind --model are not those that {self.folder} started from: cannot resume")
        before = start.get("data", data)  # a run from before fingerprints
        if others := [name for name in before | data if before.get(name) != data.get(name)]:
            raise ValueError(f"{self.folder} started with other data ({', '.join(others)}): cannot resume it")
        self._track(start.get("tracked"), start.get("folder", self.folder.resolve().name))
        return start

    def _track(self, number: str | None, folder: str) -> None:
        """Goes on in the tracked run of that number, named after the folder that it started in. There step 0 is the
        policy before training. A step that is made again after a resumption counts once: tensorboard forgets the old
        one, trackio and wandb drop the new one."""
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in self.config.to_dict().items()}
        name = f"{folder}-{number}"
        again = {
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"id": number, "name": name, "resume": "allow"},
            "tensorboard": {"purge_step": self.first_iteration + 1 if self.checkpoint else 0},
        }
        self.accelerator.init_trackers("opid", config=plain, init_kwargs=again)  # tensorboard takes nothing else
        if self.config.tracker == "trackio" and self.accelerator.is_main_process:
            self._catch_up(self.accelerator.get_tracker("trackio", unwrap=True))

    def _catch_up(self, tracked) -> None:
        """trackio takes a step twice, and a kill costs it the last ones, since it writes in a thread of its own."""
        self.tracked = tracked._next_step
        for name, of in (("evaluations.jsonl", tracked_evaluation), ("metrics.jsonl", tracked_metrics)):
            for record in read_lines(self.folder / name) if (self.folder / name).exists() else []:
                self._tell(*of(record))

    def _tell(self, values: dict[str, float], step: int) -> None:
        """Tells the tracker, but for what it knows."""
        if values and step >= self.tracked:
            self.accelerator.log(values, step=step)

    def _check(self, before: dict | None, free: set[str]) -> None:
        """Raises ValueError where the folder holds a run that this one would overwrite, or is not the one to resume.
        `before`: that run's settings, None where they are lost. `free`: the names of those that may differ."""
        if not self.config.resume:
            raise ValueError(f"{self.folder} already holds a run: pass --resume to go on with it, or another --out")
        if before is None:
            return
        others = [flag(name) for name in changed(before, self.config.to_dict()) if name not in free]
        if others:
            raise ValueError(f"{self.folder} holds a run with other settings of {', '.join(others)}: cannot resume it")

    def _drop_from(self, path: Path, iteration: int) -> None:
        """Cut off what was written after the checkpoint that the run resumes from (a half-written line included)."""
        if not path.exists():
            return

        def kept() -> Iterator[str]:
            with open(path) as file:  # line by line: samples may be larger than memory
                for line in file:
                    try:
                        if json.loads(line)["iteration"] < iteration:
                            yield line.removesuffix("\n") + "\n"
                    except (ValueError, KeyError, TypeError):  # no record: what follows may be one
                        continue

        def write(temporary: Path) -> None:
            with open(temporary, "w") as file:
                file.writelines(kept())

        write_whole(path, write)

    def _append(self, name: str, record: dict) -> None:
        if self.accelerator.is_main_process:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def metrics(self, iteration: int, metrics: dict[str, float], sizes: dict[str, float]) -> dict[str, float]:
        """One line per iteration -> its metrics over all processes.

        `sizes`: how many episodes, steps, ... this process has, for means over all processes (see metrics.py). What is
        not named there is the same on all of them, or a clock's, and gets the plain mean.
        """
        if self.accelerator.num_processes > 1:
            metrics = metrics | over_processes(metrics, sizes, self.accelerator)
        self._append("metrics.jsonl", {"iteration": iteration, **metrics})
        self._tell(metrics, iteration + 1)
        return metrics

    def show(self, iteration: int, metrics: dict[str, float], left: float) -> None:
        """The line of an iteration. `left`: seconds of the run after it."""
        shown = {
            "success": f"{100 * metrics['train/success']:.0f}%",
            "steps": f"{metrics['rollout/steps']:.1f}",
            "parsed": f"{100 * metrics['skills/parse_rate']:.0f}%" if "skills/parse_rate" in metrics else "-",
            "guided": f"{100 * metrics['guided/tokens']:.0f}%",
            "|A_ep|": f"{metrics['advantage/outcome_abs']:.2f}",
            "|A_skill|": f"{metrics['advantage/skill_abs']:.3f}",
            **({"noise": f"{metrics['advantage/noise_floor']:.0e}"} if "advantage/noise_floor" in metrics else {}),
            "kl": f"{metrics['loss/kl']:.4f}",
            "s": f"{sum(v for k, v in metrics.items() if k.startswith('seconds/')):.1f}",
            "left": str(datetime.timedelta(seconds=round(left))),
        }
        self.accelerator.print(f"iteration {iteration:>4}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def end_table(self) -> None:
        """From here on lines are printed as they are. May be called twice."""
        if self.table:
            self.table.close()

    def evaluation(self, iteration: int, success: dict[str, float], counts: dict[str, Counts], table: str) -> None:
        """The held-out table, printed and kept with the success of each split, and how many games of each type were
        solved and played."""
        self.accelerator.print(f"\nheld-out success (%), no skills, after iteration {iteration}\n{table}\n")
        record = {"iteration": iteration, "success": success, "counts": counts, "table": table}
        self._append("evaluations.jsonl", record)
        self._tell(*tracked_evaluation(record))

    def samples(self, iteration: int, tokenizer, batch: Batch, count: int = 4) -> None:
        """A few whole trajectories of an iteration, a line each (docs/metrics.md)."""
        for i in range(0, len(batch.trajectories), max(1, len(batch.trajectories) // count)):
            self._append("samples.jsonl", sample(iteration, tokenizer, batch, i))

    def save(self, iteration: int, model, optimizer, state: dict) -> None:
        """A checkpoint, and only the newest `--keep-checkpoints` of them. See checkpoints.save."""
        if self.accelerator.is_main_process or self.config.shard:
            checkpoints.save(self.folder / "checkpoints", iteration, model, optimizer, state)
        if self.accelerator.is_main_process:
            for old in checkpoints.saved(self.folder)[: -self.config.keep_checkpoints]:
                remove(old)

    def restore(self, model, optimizer) -> dict | None:
        """Load the newest whole checkpoint into both, where the run goes on from one -> the variant's own state."""
        return None if self.checkpoint is None else checkpoints.load(self.checkpoint, model, optimizer)

    def finish(self, model, tokenizer) -> None:
        """The final policy in Hugging Face format with its card, the curve, and the upload where it was asked for."""
        self.end_table()
        model = whole(model)
        if self.accelerator.is_main_process:
            from runlog.curve import plot_curve  # matplotlib is not needed for anything else

            about = settings_to_save(self.config, read_json(self.folder / "start.json")["date"])

            def write(temporary: Path) -> None:
                save_policy(model, tokenizer, temporary, about)
                card.write_card(temporary, self.config, self.folder)

            write_whole(self.folder / "policy", write)
            print(f"policy: {self.folder / 'policy'}\ncurve:  {plot_curve(self.folder)}")
        self.farewell()
        self.accelerator.end_training()
        if self.lock:
            self.lock.release(force=True)
        if self.config.push and self.accelerator.is_main_process:
            print(card.pushed(self.folder, self.config.push))


def sample(iteration: int, tokenizer, batch: Batch, i: int) -> dict:
    """Trajectory i as a line of samples.jsonl (docs/metrics.md)."""
    trajectory, own = batch.trajectories[i], batch.skills[i]
    row = sum(len(earlier.steps) for earlier in batch.trajectories[:i])
    return {
        "iteration": iteration,
        "task": trajectory.task,
        "task_type": trajectory.task_type,
        "game": trajectory.game,
        "group": trajectory.group,
        "success": trajectory.success,
        "skills": own and {"summary": own.summary, "episode": own.episode, "steps": own.steps},
        "steps": steps_of(batch, i, row, tokenizer, last_update(batch)),
    }


def last_update(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each token at its last gradient step: the ratio r, and 1 where clipping removed the gradient. (B, R) each, NaN
    where a token was in none."""
    ratios, clipped = torch.full_like(batch.old_logprobs, math.nan), torch.full_like(batch.old_logprobs, math.nan)
    for at, new, was_clipped in batch.updated:  # a later step overwrites an earlier one
        ratios[at] = (new.cpu() - batch.old_logprobs[at]).exp()
        clipped[at] = was_clipped.cpu()
    return ratios, clipped


def steps_of(batch: Batch, i: int, row: int, tokenizer, update: tuple[Tensor, Tensor]) -> list[dict]:
    """The steps of trajectory `i`, whose first row in the batch is `row`. `update`: see `last_update`."""
    steps, before = [], ""
    for step, route in zip(batch.trajectories[i].steps, batch.routes[i], strict=True):
        prompt, size = tokenizer.decode(step.context), len(step.response)
        kept = shared(before, prompt)
        guided = {level: contexts[row] for level, contexts in batch.skill_contexts.items()}
        row_of = partial(rounded, row=row, size=size)
        ratios, clipped = update
        steps.append(
            {
                "observation": step.observation,
                "kept": kept,
                "prompt": prompt[kept:],
                "skill_prompts": {k: edit(prompt, tokenizer.decode(h_hat)) for k, h_hat in guided.items() if h_hat},
                "response": step.text,
                "action": step.action,
                "valid": step.valid,
                "route": [{"level": guidance.level, "text": guidance.text} for guidance in route],
                "tokens": [tokenizer.decode([token]) for token in step.response],
                "old_logprobs": row_of(batch.old_logprobs),
                "skill_logprobs": {k: row_of(scores) for k, scores in batch.skill_logprobs.items() if guided.get(k)},
                "skill_advantages": row_of(batch.advantages.skill),
                "outcome_advantage": round(batch.advantages.outcome[row].item(), 5),
                "advantages": row_of(batch.advantages.total),
                "ratios": row_of(ratios),
                "clipped": row_of(clipped),
            }
        )
        before, row = prompt, row + 1
    return steps


def rounded(values: Tensor, row: int, size: int) -> list[float]:
    """The first `size` of a row (B, R), to five decimals, so that many episodes fit in a file."""
    return [round(value, 5) for value in values[row, :size].tolist()]


def shared(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def edit(before: str, after: str) -> tuple[int, int, str]:
    """What makes `after` of `before`: (where, how many characters leave there, what comes in their place)."""
    start = shared(before, after)
    end = shared(before[start:][::-1], after[start:][::-1])
    return start, len(before) - start - end, after[start : len(after) - end]


def tracked_metrics(record: dict) -> tuple[dict[str, float], int]:
    """-> what a tracker is told of a line of metrics.jsonl, and its step."""
    return {k: math.nan if v is None else v for k, v in record.items() if k != "iteration"}, record["iteration"] + 1


def tracked_evaluation(record: dict) -> tuple[dict[str, float], int]:
    """The same of a line of evaluations.jsonl. Nothing but for the one before training: later ones are among the
    metrics of their iteration."""
    success = record["success"] if record["iteration"] < 0 else {}
    return {f"eval/{split}/success": share for split, share in success.items()}, 0


def finite(value):
    """What is infinite or no number becomes null: JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
