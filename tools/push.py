"""Uploads a finished run to the Hugging Face Hub, in one commit: the policy with its card, and the run's metrics.

The policy lies at the repository's root, so that plain `from_pretrained` loads it by name. `run/` holds the curve, the
report where there is one, metrics, evaluations and settings. Folders are named there without their paths.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # isort: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run, such as runs/laptop")
    parser.add_argument("--repo", required=True, help="USER/NAME on the Hub; made where it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and ask nobody")
    args = parser.parse_args(argv)
    from runlog.card import push, to_upload  # here: PyTorch comes with it, and --help need not wait

    with lm.one_line("push.py"):
        if args.dry_run:
            files = to_upload(args.run)
            for place, path in files.items():
                print(f"{path.stat().st_size / 2**20:9.2f} MiB  {place}")
            print(f"{len(files)} files would go to {args.repo}; nothing was uploaded")
        else:
            print(push(args.run, args.repo, private=args.private))


if __name__ == "__main__":
    main()
