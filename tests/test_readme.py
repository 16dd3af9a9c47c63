"""What the README says of the code, where it can be counted."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "README.md").read_text().partition("## Reading order")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \| (\d+) \|", TABLE, re.MULTILINE)


@pytest.mark.parametrize("names, lines", ROWS)
def test_reading_order_has_the_lengths_of_the_files(names, lines):
    """To a twentieth, so that not every change has to touch the table."""
    paths = [ROOT / name for name in re.findall(r"`([\w./]+)`", names)]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    counted = sum(len(file.read_text().splitlines()) for file in files)
    assert abs(counted - int(lines)) <= 0.05 * counted


def test_reading_order_has_every_file_of_the_top_level():
    named = {name for names, _ in ROWS for name in re.findall(r"`([\w./]+)`", names)}
    assert {path.name for path in ROOT.glob("*.py")} <= named
