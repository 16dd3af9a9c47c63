"""Result files: one a bench, lab/results/NAME.jsonl, a line a run. lab/README.md says what a line holds.

A file is read, changed and put in place as a whole, one process and one thread at a time: a run that is killed leaves
it as it was, and no run takes away another's line.

Settings are plain dicts. Stored are those that differ from the defaults at commit e24ebb7, which old_settings.json
keeps, so that neither a new default nor a flag that is gone changes what a stored run was made with.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from config import Config, variant_of
from lm.loading import write_whole

OLD = json.loads(Path(__file__).with_name("old_settings.json").read_text())  # "defaults"; "renamed": [was, is now] each


def read(path: Path) -> list[dict]:
    """The results in a file, none where it is not there; each `config` whole again."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return [
        result | {"config": OLD["defaults"] | result["config"]} if "config" in result else result for result in results
    ]


def find(path: Path, name: str) -> dict | None:
    return next((result for result in read(path) if result["name"] == name), None)


def add(path: Path, result: dict) -> None:
    """Put a result into a file: in place of the one of that name, else at the end."""
    if "config" in result:
        result = result | {"config": without_defaults(result["config"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        lines = path.read_text().splitlines() if path.exists() else []
        names = [json.loads(line)["name"] for line in lines]
        at = names.index(result["name"]) if result["name"] in names else len(lines)
        lines[at : at + 1] = [json.dumps(result)]
        write_whole(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other thread or process is in here for this folder. The lock goes with the process that holds it."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def without_defaults(config: dict) -> dict:
    defaults = OLD["defaults"]
    return {name: value for name, value in config.items() if name not in defaults or defaults[name] != value}


def as_now(config: dict) -> dict:
    """Old flags as what they are called now: opid with --shift-base other is --algo opid-contrast."""
    config = OLD["defaults"] | config
    for was, now in OLD["renamed"]:
        if all(config[name] == value for name, value in was.items()):
            config |= now
    return config


def differing(one: dict, other: dict) -> list[str]:
    """The settings in which two runs differ. One that a run does not hold had the default: that of e24ebb7, or of a
    flag that came later its own."""
    one, other = as_now(one), as_now(other)
    names = sorted((one.keys() | other.keys()) - {"sample_every"})  # that changes nothing but a run's samples
    return [name for name in names if value_of(name, one, other) != value_of(name, other, one)]


def value_of(name: str, config: dict, other: dict):
    if name in config:
        return config[name]
    try:
        settings = variant_of(other["algo"]).settings
    except ValueError:  # a method that is no more
        settings = Config
    return {f.name: f.default for f in fields(settings)}.get(name, other[name])
