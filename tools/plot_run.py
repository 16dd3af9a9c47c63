"""Draws the learning curve of a run, or of several in one figure: curve.png in the first folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # noqa: F401  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, such as runs/laptop")
    args = parser.parse_args()
    from runlog.curve import plot_curve  # here: PyTorch comes with it, and --help need not wait

    for run in args.runs:
        if not (run / "metrics.jsonl").exists():
            sys.exit(f"plot_run.py: no metrics.jsonl in {run}: not the folder of a run, or no iteration has ended")
    try:
        print(plot_curve(*args.runs))
    except (OSError, ValueError) as error:
        sys.exit(f"plot_run.py: {error}")


if __name__ == "__main__":
    main()
