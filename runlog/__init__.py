"""The run folder: config, metrics, samples, checkpoints, the final policy. Written so that a killed run loses nothing
but the iterations since its last checkpoint, and resumes exactly there."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from config import Config, changed, flag
from data import Batch, Guidance, Skills, Trajectory
from lm.loading import save_policy, write_whole

# What may differ between a run and its resumption; everything else would make it another run.
FREE = {
    "out",
    "resume",
    "iterations",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "tracker",
    "plan",
}
FREE |= {"token_budget", "generate_budget", "learning_rate"}  # what one changes after running out of memory or a NaN


def read_lines(path: Path) -> list[dict]:
    """metrics.jsonl, evaluations.jsonl or samples.jsonl. Raises FileNotFoundError where it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class RunLog:
    """Files under `config.out`. Only the main process writes."""

    def __init__(self, config: Config, accelerator):
        self.config, self.accelerator, self.folder = config, accelerator, Path(config.out)
        self.checkpoints = sorted((self.folder / "checkpoints").glob("[0-9]*.pt"))
        self.first_iteration = int(self.checkpoints[-1].stem) + 1 if config.resume and self.checkpoints else 0
        written = self.folder / "config.json"
        if written.exists() and (self.checkpoints or (self.folder / "metrics.jsonl").exists()):
            self._check(json.loads(written.read_text()))
        accelerator.wait_for_everyone()  # or a slower process would take the file written below for another run's
        if accelerator.is_main_process:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            settings = json.dumps(config.to_dict(), indent=2) + "\n"
            write_whole(written, lambda temporary: temporary.write_text(settings))
            for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
                self._drop_from(self.folder / name, self.first_iteration or -1)
        accelerator.wait_for_everyone()
        accelerator.init_trackers("opid", config=config.to_dict())

    def _check(self, before: dict) -> None:
        """Raises ValueError where the folder holds a run that this one would overwrite, or is not the one to resume."""
        if not self.config.resume:
            raise ValueError(f"{self.folder} already holds a run: pass --resume to go on with it, or another --out")
        others = [flag(name) for name in changed(before, self.config.to_dict()) if name not in FREE]
        if others:
            raise ValueError(f"{self.folder} holds a run with other settings of {', '.join(others)}: cannot resume it")

    def _drop_from(self, path: Path, iteration: int) -> None:
        """Cut off what was written after the checkpoint that the run resumes from (a half-written line included)."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["iteration"] < iteration:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break
        write_whole(path, lambda temporary: temporary.write_text("".join(kept)))

    def _append(self, name: str, record: dict) -> None:
        if self.accelerator.is_main_process:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(record) + "\n")

    def metrics(self, iteration: int, metrics: dict[str, float]) -> None:
        """One line an iteration. Over many processes: sums of counts, means of everything else."""
        if self.accelerator.num_processes > 1:
            names = sorted(name for name in metrics if not name.startswith("eval/") and name != "seconds/evaluate")
            totals = self.accelerator.reduce(
                torch.tensor([metrics[name] for name in names], device=self.accelerator.device), "sum"
            ).tolist()
            counts = (
                "episodes",
                "rollout/context_full",
                "rollout/skilled",
                "skills/failed",
                "skills/retried",
                "skills/too_long",
            )
            world = self.accelerator.num_processes
            reduced = {
                name: total if name in counts or name.endswith("_too_long") else total / world
                for name, total in zip(names, totals, strict=True)
            }
            metrics = metrics | reduced
        self._append("metrics.jsonl", {"iteration": iteration, **metrics})
        self.accelerator.log(metrics, step=iteration)
        shown = {
            "success": f"{100 * metrics['train/success']:.0f}%",
            "steps": f"{metrics['rollout/steps']:.1f}",
            "parsed": f"{100 * metrics['skills/parse_rate']:.0f}%" if "skills/parse_rate" in metrics else "-",
            "|A_ep|": f"{metrics['advantage/outcome_abs']:.2f}",
            "|A_skill|": f"{metrics['advantage/skill_abs']:.3f}",
            **({"noise": f"{metrics['advantage/noise_floor']:.0e}"} if "advantage/noise_floor" in metrics else {}),
            "kl": f"{metrics['loss/kl']:.4f}",
            "s": f"{sum(v for k, v in metrics.items() if k.startswith('seconds/')):.1f}",
        }
        self.accelerator.print(f"iteration {iteration:>4}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def evaluation(self, iteration: int, success: dict[str, float], table: str) -> None:
        """The held-out table, printed and kept with the success of each split."""
        self.accelerator.print(f"\nheld-out success (%), no skills, after iteration {iteration}\n{table}\n")
        self._append("evaluations.jsonl", {"iteration": iteration, "success": success, "table": table})

    def samples(
        self,
        iteration: int,
        tokenizer,
        trajectories: list[Trajectory],
        skills: list[Skills | None],
        routes: list[list[tuple[Guidance, ...]]],
        batch: Batch,
        count: int = 4,
    ) -> None:
        """A few whole trajectories: prompt, skills, route, response and the advantage of each of its tokens."""
        row = 0
        for i, trajectory in enumerate(trajectories):
            steps = []
            for t, step in enumerate(trajectory.steps):
                size = len(step.response)
                steps.append(
                    {
                        "observation": step.observation,
                        "prompt": tokenizer.decode(step.context),
                        "response": step.text,
                        "action": step.action,
                        "valid": step.valid,
                        "route": [{"level": g.level, "text": g.text} for g in routes[i][t]],
                        "tokens": [tokenizer.decode([token]) for token in step.response],
                        "old_logprobs": batch.old_logprobs[row, :size].tolist(),
                        "skill_advantages": _known(batch.skill_advantages[row, :size]),
                        "advantages": batch.advantages[row, :size].tolist(),
                    }
                )
                row += 1
            if i % max(1, len(trajectories) // count) == 0:
                known = skills[i] and {
                    "summary": skills[i].summary,
                    "episode": skills[i].episode,
                    "steps": skills[i].steps,
                }
                self._append(
                    "samples.jsonl",
                    {
                        "iteration": iteration,
                        "task": trajectory.task,
                        "task_type": trajectory.task_type,
                        "game": trajectory.game,
                        "group": trajectory.group,
                        "success": trajectory.success,
                        "skills": known,
                        "steps": steps,
                    },
                )

    def save(self, iteration: int, model, optimizer, ema, method: dict) -> None:
        """Everything that the next iteration depends on. Complete or absent: written beside, then renamed."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "iteration": iteration,
            "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict() if ema is not None else None,
            "method": method,
        }
        path = self.folder / "checkpoints" / f"{iteration:06d}.pt"
        write_whole(path, lambda temporary: torch.save(state, temporary))
        for old in sorted((self.folder / "checkpoints").glob("[0-9]*.pt"))[: -self.config.keep_checkpoints]:
            old.unlink()

    def restore(self, model, optimizer, ema, method) -> None:
        """Load the newest checkpoint into all of them, where the run goes on from one."""
        if self.first_iteration == 0:
            return
        state = torch.load(self.checkpoints[-1], map_location=model.device, weights_only=True)
        unexpected = model.load_state_dict(state["model"], strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{self.checkpoints[-1]} is of another model: it holds {unexpected[0]}")
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        method.restore(state["method"])

    def finish(self, model, tokenizer) -> None:
        """The final policy in Hugging Face format, and the curve."""
        if self.accelerator.is_main_process:
            from tools.plot_run import plot_curve  # matplotlib is not needed for anything else

            write_whole(self.folder / "policy", lambda temporary: save_policy(model, tokenizer, temporary))
            print(f"policy: {self.folder / 'policy'}\ncurve:  {plot_curve(self.folder)}")
        self.accelerator.end_training()


def peak_mib(device: torch.device) -> float:
    """Most memory held so far, MiB: what PyTorch allocated on a GPU; on a CPU, all that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's own count; getrusage counts in what the parent process held at the start
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _known(values: torch.Tensor) -> list[float | None]:
    """NaN ("not computed") becomes null: JSON has no NaN."""
    return [None if value != value else value for value in values.tolist()]
