"""What the experiments share about runs: folders called ARM-seedN, or ARM-startK-seedN, their settings and weights."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

from config import Config, flag, parse_args

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "lab" / "results"


def commit() -> str:
    """The code's version, for the result files; -dirty where anything but these was changed since."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!lab/results")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def on_the_laptop(flags: list[str], recipe: str = "laptop") -> list[str]:
    """Flags of train.py, from a recipe of the laptop's unless they name another: without one a run is the paper's."""
    named = any(flag.partition("=")[0] == "--recipe" for flag in flags)
    return flags if named else ["--recipe", recipe, *flags]


def settings(config: Config) -> dict:
    """What makes two runs the same run: everything but where they lie."""
    return {k: v for k, v in config.to_dict().items() if k not in ("out", "resume", "model", "plan_for")}


def fingerprint(model: Path) -> str:
    """Of the weights in a folder: results of other starting weights are not to be compared."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def arm_of(name: str) -> str:
    """'opid-k0-seed3' and 'opid-k0-start1-seed3' -> 'opid-k0'; another kind of name is an arm by itself."""
    return re.sub(r"(-start\d+)?-seed\d+$", "", name)


def flags_of(settings: dict) -> list[str]:
    """The command line that says all of these settings."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags += [flag(name) if value else f"--no-{flag(name)[2:]}"]
        elif isinstance(value, dict):
            flags += [flag(name), *(f"{key}={text}" for key, text in value.items())]
        else:
            flags += [flag(name), "none" if value is None else str(value)]
    return flags


def config_of(run: Path, flags: list[str]) -> Config:
    """The settings of a run folder, `flags` of train.py on top. Raises FileNotFoundError where it holds no run."""
    written = run / "config.json"
    if not written.is_file():
        raise FileNotFoundError(f"{run} is no run folder: it has no config.json")
    return parse_args([*flags_of(json.loads(written.read_text())), *flags])
