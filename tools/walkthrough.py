"""Makes docs/walkthrough.ipynb from its text, docs/walkthrough.md, and runs its cells: python tools/walkthrough.py

Half a minute on a CPU. The cells follow one iteration of OPID by the functions of train.py. What they need beside these
stands below: how the run begins, which step is followed, and how numbers are shown.
"""

from __future__ import annotations

import argparse
import atexit
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # isort: skip

import torch
from torch import Tensor

from config import parse_args
from data import Batch, Step, Trajectory
from lm.writers import Writer
from runlog.start import Run, start

SETTINGS = "--recipe laptop --tasks 4 --rollouts 4 --max-steps 12 --train-games 40 --mini-batch 0"
SETTINGS += " --iterations 1 --eval-games 1 --eval-every 0"
DOCS = Path(__file__).parent.parent / "docs"
TEXT, NOTEBOOK = DOCS / "walkthrough.md", DOCS / "walkthrough.ipynb"
QUIET = ["--log-level=ERROR"]  # of the kernel


# ---- what the cells use ----------------------------------------------------------------------------------------------


def begin(flags: str = "") -> Run:
    """The run of the walkthrough at its first iteration. `flags` of train.py go on top of SETTINGS. What a start prints
    is left out, since it speaks of this machine."""
    torch.set_num_threads(1)  # the order of sums, and so the last digits, are the same on every machine
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    with redirect_stdout(StringIO()):
        run = start(parse_args([*SETTINGS.split(), "--out", folder.name, *flags.split()]))
    run.begin(0)
    return run


def recorded(write: Writer, exchanges: list[tuple[str, str | None]]) -> Writer:
    """The same writer; `exchanges` gets what it is asked and what it answers: first of each rollout, then again."""

    def write_and_keep(prompts: list[str]) -> list[str | None]:
        answers = write(prompts)
        exchanges.extend(zip(prompts, answers, strict=True))
        return answers

    return write_and_keep


def row_of(trajectories: list[Trajectory], i: int, t: int) -> int:
    """The row of step t of trajectory i in a batch."""
    return sum(len(trajectory.steps) for trajectory in trajectories[:i]) + t


def pick(batch: Batch) -> tuple[int, int]:
    """(trajectory, step): of the guided steps the one that its skill moved most, rather one with a step skill, and of a
    group whose outcomes differ. Raises ValueError where no step is guided."""
    outcomes: dict[int, set[bool]] = {}
    for trajectory in batch.trajectories:
        outcomes.setdefault(trajectory.group, set()).add(trajectory.success)
    worth = {}
    for i, (trajectory, guided) in enumerate(zip(batch.trajectories, batch.routes, strict=True)):
        for t, guidances in enumerate(guided):
            if guidances:
                moved = batch.advantages.skill[row_of(batch.trajectories, i, t)].nan_to_num().abs().max().item()
                worth[i, t] = len(outcomes[trajectory.group]), guidances[0].level == "step", moved
    if not worth:
        raise ValueError("no step is guided: no answer could be read as skills, or the method has none")
    return max(worth, key=worth.get)


def number(value, digits: int = 2, sign: str = "") -> str:
    """Rounded; no minus in front of a zero, whose sign is rounding's alone."""
    return f"{round(float(value), digits) + 0.0:{sign}.{digits}f}"


def by_token(run: Run, step: Step, columns: dict[str, Tensor], digits: int = 2) -> None:
    """A line for each token of a response, with its number in each of `columns`: (R,) or more."""
    print(f"{'token of y':<12}" + "".join(f"{name:>18}" for name in columns))
    for k, token in enumerate(step.response):
        numbers = "".join(f"{number(column[k], digits):>18}" for column in columns.values())
        print(f"{run.tokenizer.decode([token]):<12}{numbers}")


def heat(rows: dict[str, list[float]], columns: list[str], title: str):
    """A picture of A_skill: blue for praise, orange for blame, deepest at 3 nats. -> matplotlib's figure"""
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("A_skill", ["#e8710a", "white", "#1a5fd0"])
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.4 * len(rows)), layout="constrained", dpi=80)
    axes.imshow(list(rows.values()), cmap=colours, vmin=-3, vmax=3, aspect="auto")
    axes.set(title=title, xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
    for y, values in enumerate(rows.values()):
        for x, value in enumerate(values):
            ink = "white" if abs(value) > 2 else "black"
            axes.text(x, y, number(value, 1, "+"), ha="center", va="center", color=ink)
    pyplot.close(figure)  # or a notebook shows it twice
    return figure


# ---- the notebook ----------------------------------------------------------------------------------------------------


def executed(text: str):
    """The text of a notebook -> the notebook, its cells run from docs/. Without what differs from machine to machine.
    Raises nbclient's CellExecutionError where a cell fails."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.reads(text, fmt="md")
    for number_of, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number_of}"
    place = {"metadata": {"path": DOCS}}
    NotebookClient(notebook, record_timing=False, extra_arguments=QUIET, resources=place).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what packages warn of holds paths
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import jupytext
        import nbclient  # noqa: F401
    except ImportError as error:
        sys.exit(f"walkthrough.py: {error}: pip install jupytext nbclient ipykernel")
    with lm.one_line("walkthrough.py"):
        jupytext.write(executed(TEXT.read_text()), NOTEBOOK)


if __name__ == "__main__":
    main()
