"""What the experiments share about runs: folders called ARM-seedN, and result files of one line a field."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from config import Config, parse_args
from lm.loading import write_whole

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The code's version, for the result files."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def settings(config: Config) -> dict:
    """What makes two runs the same run: everything but where they lie."""
    return {k: v for k, v in config.to_dict().items() if k not in ("out", "resume", "model")}


def fingerprint(model: Path) -> str:
    """Of the weights in a folder: results of other starting weights are not to be compared."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write_result(path: Path, result: dict) -> None:
    """Complete or absent; lists stay on their field's line."""
    fields = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: temporary.write_text(f"{{\n{fields}\n}}\n"))


def arm_of(run: Path) -> str:
    """'runs/opid-k0-seed3' -> 'opid-k0'; a folder of another kind of name is an arm by itself."""
    return run.name.rpartition("-seed")[0] or run.name


def config_of(run: Path, flags: list[str]) -> Config:
    """The settings of a run folder, `flags` of train.py on top. Raises FileNotFoundError where it holds no run."""
    written = run / "config.json"
    if not written.is_file():
        raise FileNotFoundError(f"{run} is no run folder: it has no config.json")
    return parse_args(flags, base=json.loads(written.read_text()))
