"""A run of many hours in short: does anything grow? 90 minutes of one setting, killed every 20 and gone on with.

    python lab/benchmarks/soak.py laptop official smollm2      # one after the other; --folder X says where
    python lab/benchmarks/soak.py laptop --report              # the table once more, from what lies in the folder

Every 10 seconds: memory of the run and its children (PSS: shared pages count once), open files, maps, threads, and what
lies in its folder but for the logs, which grow by a line an iteration. Temporary files go to the folder, and so count.
Of each iteration the most that it held is taken, since phases differ. Each life between two kills has a slope of its
own, its first minutes left out; the table has their mean and its 95% interval. Where that holds 0 there is
no growth that these minutes can show. CPU seconds are divided by the steps of episodes, which get shorter as the policy
learns. At each kill metrics.jsonl is read: every iteration is in it once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {
    "laptop": "--recipe laptop",
    "official": "--recipe laptop --env-options engine=textworld --tasks 4 --eval-games 20",
    "smollm2": "--recipe alfworld-smollm2 --save-every 1",
}
HELD = ("memory MiB", "open files", "maps", "threads")
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}  # by degrees of freedom
EVERY = 10.0  # seconds


def family(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def held(pid: int) -> dict[str, float]:
    """What a run holds now. A process that goes away while it is read raises OSError."""
    sums = dict.fromkeys(("memory MiB", "open files", "maps", "threads", "cpu s"), 0.0)
    for each in family(pid):
        place = Path(f"/proc/{each}")
        pss = next(line for line in (place / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        stat = (place / "stat").read_text().rpartition(")")[2].split()
        sums["memory MiB"] += int(pss.split()[1]) / 1024
        sums["open files"] += len(os.listdir(place / "fd"))
        sums["maps"] += len((place / "maps").read_text().splitlines())
        sums["threads"] += len(os.listdir(place / "task"))
        sums["cpu s"] += sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")  # children that ended, too
    return sums


def disk(folder: Path) -> float:
    """MiB in the run's folder, without the logs."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it was being replaced
            total += path.stat().st_size if path.is_file() and path.suffix != ".jsonl" else 0
    return total / 2**20


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def live(flags: list[str], folder: Path, life: int, seconds: float) -> None:
    """One life of the run: started or gone on with, watched, killed."""
    out, began = folder / "run", time.monotonic()
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *flags, "--iterations", "1000000", "--out", str(out), "--resume"]
    with open(folder / "output.txt", "a") as output:
        run = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(folder / "tmp")}
        )
    with open(folder / "watched.jsonl", "a") as log:
        while (passed := time.monotonic() - began) < seconds:
            if run.poll() is not None:
                raise SystemExit(f"the run ended by itself: see {folder}/output.txt")
            try:
                now = held(run.pid) | {"disk MiB": disk(folder), "iterations": len(lines(out / "metrics.jsonl"))}
            except (OSError, StopIteration, json.JSONDecodeError):  # a child that went; a line half written
                continue
            log.write(json.dumps({"life": life, "seconds": round(passed, 1), **now}) + "\n")
            log.flush()
            time.sleep(EVERY)
    run.send_signal(signal.SIGKILL)
    run.wait()
    numbers = [line["iteration"] for line in lines(out / "metrics.jsonl")]
    if numbers != list(range(len(numbers))):
        raise SystemExit(f"metrics.jsonl has other iterations than each once: {numbers}")


def peaks(life: list[dict], kind: str) -> np.ndarray:
    """Of each iteration the second at which it held the most, and how much. -> (iterations, 2)"""
    rows = [max(rows, key=lambda row: row[kind]) for _, rows in groupby(life, key=lambda row: row["iterations"])]
    return np.array([(row["seconds"], row[kind]) for row in rows]).reshape(-1, 2)


def slope(points: np.ndarray) -> float:
    """By hour, of (seconds, value)."""
    return np.polyfit(points[:, 0] / 3600, points[:, 1], 1)[0] if len(points) > 2 else np.nan


def cost(life: list[dict], steps: np.ndarray) -> float:
    """CPU milliseconds a step of an episode, over the whole iterations of a life."""
    changed = [now for before, now in pairwise(life) if now["iterations"] > before["iterations"]]
    if len(changed) < 2:
        return np.nan
    first, last = changed[0], changed[-1]
    return 1000 * (last["cpu s"] - first["cpu s"]) / steps[first["iterations"] : last["iterations"]].sum()


def interval(slopes: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval."""
    known = np.array([each for each in slopes if np.isfinite(each)])
    if len(known) < 2:
        return (known.mean() if len(known) else np.nan), np.nan
    return known.mean(), T_95.get(len(known) - 1, 2.0) * known.std(ddof=1) / len(known) ** 0.5


def report(name: str, folder: Path, warm: float) -> None:
    """The table, from what lies in the folder."""
    watched, metrics = lines(folder / "watched.jsonl"), lines(folder / "run/metrics.jsonl")
    steps = np.array([line["episodes"] * line["rollout/steps"] for line in metrics])
    lives = [[row for row in watched if row["life"] == life] for life in sorted({row["life"] for row in watched})]
    late = [[row for row in life if row["seconds"] >= warm] for life in lives]
    minutes = sum(life[-1]["seconds"] for life in lives) / 60
    print(f"{name}: train.py {SETTINGS[name]}")
    print(f"{minutes:.0f} minutes, {len(metrics)} iterations, {len(lives)} lives, each ended by SIGKILL; each once in")
    print(f"metrics.jsonl. Slopes are of a life's minutes after the first {warm / 60:.0f}.")
    print(f"{'':18}{'mean':>10}{'most':>10}{'slope an hour':>16}{'95% interval':>22}")
    for kind in HELD:
        found = [peaks(life, kind) for life in late]
        (mean, half), values = interval([slope(each) for each in found]), np.concatenate(found)[:, 1]
        grows = "  grows" if mean - half > 1e-6 else ""
        bounds = f"[{mean - half:.2f}, {mean + half:.2f}]"
        print(f"{kind:18}{values.mean():10.1f}{values.max():10.1f}{mean:+16.2f}{bounds:>22}{grows}")
    ends = [life[-1] for life in lives]
    memory, on_disk = (", ".join(f"{end[kind]:.0f}" for end in ends) for kind in ("memory MiB", "disk MiB"))
    costs = ", ".join(f"{cost(life, steps):.1f}" for life in lives)
    print(f"at the end of each life: {memory} MiB of memory; {on_disk} MiB on disk")
    print(f"CPU ms a step of an episode, life by life: {costs}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SETTINGS)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/soak")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--kill-every", type=float, default=20, help="minutes")
    parser.add_argument("--warm", type=float, default=4, help="minutes of a life that are left out of its slope")
    parser.add_argument("--report", action="store_true", help="only the table")
    args = parser.parse_args()
    for name in args.names:
        folder, left = args.folder / name, 60 * args.minutes
        for life in range(0 if args.report else 1000):
            if left <= 0:
                break
            seconds = min(left, 60 * args.kill_every)
            live(SETTINGS[name].split(), folder, life, seconds)
            left -= seconds
        report(name, folder, 60 * args.warm)


if __name__ == "__main__":
    main()
