"""What did each skill praise or blame? One page of a run, or of several over one another: report.html in the first
folder. It needs no network, and opens in any browser."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # noqa: F401  # isort: skip

EVERY = 30  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, such as runs/laptop")
    parser.add_argument(
        "--watch", action="store_true", help=f"write the page anew every {EVERY} seconds until the runs have ended"
    )
    args = parser.parse_args()
    from runlog.report import ended, write_report  # here: PyTorch comes with it, and --help need not wait

    try:
        with suppress(KeyboardInterrupt):  # the last page stays as it is
            while args.watch and not all(map(ended, args.runs)):
                print(write_report(*args.runs, reload=EVERY), flush=True)
                time.sleep(EVERY)
        print(write_report(*args.runs))
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
