"""What did each skill praise or blame? Turns a run's samples into one HTML page, report.html in the run's folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # noqa: F401  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/laptop")
    args = parser.parse_args()
    from runlog.report import write_report  # here: PyTorch comes with it, and --help need not wait

    try:
        print(write_report(args.run))
    except FileNotFoundError:
        sys.exit(f"report.py: no samples.jsonl in {args.run}: not the folder of a run, or no iteration was sampled")
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {args.run / 'samples.jsonl'}: {error}")


if __name__ == "__main__":
    main()
