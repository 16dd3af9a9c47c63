"""A run folder, or several over one another, as one page that needs no network: curves, and the episodes with what a
skill did to each token. Here are its data; report.html beside this file is its markup, style and script."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lm.loading import read_json, write_whole
from runlog import finite
from runlog.metrics import each_line, read_lines

TEMPLATE = Path(__file__).with_suffix(".html")
MOST = 80 * 2**20  # characters of samples.jsonl that a page holds, all runs together: a browser reads them in a second
FILES = ("config.json", "metrics.jsonl", "samples.jsonl")


def write_report(folder: str | Path, *more: str | Path, reload: int = 0) -> Path:
    """-> report.html in the first folder. `reload`: after how many seconds the page loads itself anew; 0: never.

    Raises FileNotFoundError for a folder that holds no run, ValueError for a damaged file."""
    folders = [Path(each) for each in (folder, *more)]
    lines, about = episodes_of(folders)
    data = {"runs": [run_of(each) for each in folders], "reload": reload, **about}
    before, between, after = re.split("@data|@episodes", TEMPLATE.read_text(encoding="utf-8"))
    page = "".join([before, as_script(data), between, "\n".join(lines), after])
    path = folders[0] / "report.html"
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def run_of(folder: Path) -> dict:
    """What a page knows of a run but for its episodes. A file that is not there yet is empty."""
    if not any((folder / name).exists() for name in FILES):
        raise FileNotFoundError(f"{folder} is not the folder of a run: none of {', '.join(FILES)} is in it")
    config, metrics, evaluations = (folder / name for name in ("config.json", "metrics.jsonl", "evaluations.jsonl"))
    return {
        "name": folder.resolve().name,
        "config": read_json(config) if config.exists() else {},
        "metrics": read_lines(metrics) if metrics.exists() else [],
        "evaluations": read_lines(evaluations) if evaluations.exists() else [],
    }


def episodes_of(folders: list[Path]) -> tuple[list[str], dict]:
    """The episodes of all runs, oldest first, a line each, and what the list of them is filtered and sorted by. Of more
    than fit every second, third, ... is left out, and `every` says so."""
    paths = [folder / "samples.jsonl" for folder in folders]
    size = sum(path.stat().st_size for path in paths if path.exists())
    every, lines, index = 1 + size // MOST, [], []
    for run, path in enumerate(paths):
        for episode in each_line(path, every) if path.exists() else ():
            index.append(entry(episode) | {"run": run, "line": len(lines)})
            lines.append(as_script(episode))
    return lines, {"index": index, "every": every, "mebibytes": round(size / 2**20, 1), "most": MOST // 2**20}


def entry(episode: dict) -> dict:
    rows = [step.get("skill_advantages", []) for step in episode.get("steps", [])]
    sizes = [abs(shift) for row in rows for shift in row if shift is not None]  # |A_skill| of each scored token
    return {
        "iteration": episode.get("iteration"),
        "type": episode.get("task_type", ""),
        "outcome": "won" if episode.get("success") else "lost",
        "peak": max(sizes, default=0),
        "sum": sum(sizes),
    }


def as_script(data: dict) -> str:
    """JSON that no text can end the script element with, and without NaN, which JSON does not know."""
    return json.dumps(finite(data), separators=(",", ":")).replace("<", "\\u003c")


def ended(folder: Path) -> bool:
    """Whether the run has come to its last iteration. Raises what `run_of` raises."""
    run = run_of(folder)
    return bool(run["metrics"]) and run["metrics"][-1]["iteration"] + 1 >= run["config"].get("iterations", 0)
