"""The learning curve of one or more runs."""

from __future__ import annotations

from pathlib import Path

from runlog.metrics import read_lines


def records(path: Path) -> list[dict]:
    return read_lines(path) if path.exists() else []


def plot_curve(folder: str | Path, *more: str | Path) -> Path:
    """Success in training and on held-out tasks by iteration -> the path of curve.png in the first folder. What a run
    has not written yet is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for run in map(Path, (folder, *more)):
        label = f"{run.name}: " if more else ""
        metrics, evaluations = records(run / "metrics.jsonl"), records(run / "evaluations.jsonl")
        axis.plot(
            [m["iteration"] + 1 for m in metrics],
            [100 * m["train/success"] for m in metrics],
            alpha=0.35,
            label=f"{label}train",
        )
        for split in evaluations[0]["success"] if evaluations else []:
            axis.plot(
                [e["iteration"] + 1 for e in evaluations],
                [100 * e["success"][split] for e in evaluations],
                marker="o",
                label=f"{label}{split}",
            )
    axis.set(xlabel="iteration", ylabel="success (%)", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path = Path(folder) / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
