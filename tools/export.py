"""A run's sampled episodes and skills as a parquet file, a row an episode, for `datasets` and for a cold start.

python tools/export.py runs/laptop     # episodes.parquet and README.md, its schema, in runs/laptop/export
python tools/coldstart.py --demonstrations runs/laptop/export/episodes.parquet --model smollm2 --out runs/cold

What a run samples is in its samples.jsonl: whole episodes, a few an iteration, every `--sample-every` iterations.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # isort: skip

if TYPE_CHECKING:
    from datasets import Features

FILE, CARD = "episodes.parquet", "README.md"
NUMBERS = ("old_logprobs", "skill_advantages", "advantages", "ratios")  # of a step, one a token

README = """\
---
configs:
- config_name: default
  data_files: {file}
tags: [opid, reinforcement-learning]
---

# Episodes of an OPID run

{count} episodes that a policy sampled in training, a row each, with the skills that were written of them
([arXiv 2606.26790](https://arxiv.org/abs/2606.26790)). `datasets.load_dataset("parquet", data_files="{file}")` loads
them. Of each step: what the policy saw and answered, and of each token of the answer log π_old(y given h), A_skill, A,
and the ratio of its last update. A null was not computed or not kept by the run. `game` is where the run had it from.

```text
{schema}
```
"""


def features() -> Features:
    """The schema: what a column holds stands in docs/metrics.md."""
    from datasets import Features, List, Value

    text, number = Value("string"), Value("float32")
    numbers = {name: List(number) for name in NUMBERS}
    guided = List({"level": text, "prompt": text, "logprobs": List(number)})
    step = {
        **dict.fromkeys(("observation", "prompt", "response", "action"), text),
        "valid": Value("bool"),
        "route": List({"level": text, "text": text}),
        "guided": guided,
        "tokens": List(text),
        "outcome_advantage": number,
        **numbers,
    }
    skills = {"summary": text, "episode": text, "steps": List({"step": Value("int32"), "text": text})}
    episode = {"iteration": Value("int32"), "group": Value("int32"), "success": Value("bool")}
    names = dict.fromkeys(("task", "task_type", "game"), text)
    return Features({**episode, **names, "skills": skills, "steps": List(step)})


def row_of(sample: dict) -> dict:
    """A record of samples.jsonl, of this version of the code or an older one, as a row. Raises KeyError, TypeError or
    ValueError for what is no such record."""
    own, seen, steps = sample["skills"], "", []
    for step in sample["steps"]:
        seen = seen[: step.get("kept", 0)] + step["prompt"]  # a run may keep what a prompt adds to the one before
        steps.append(row_of_step(step, seen))
    skills = own and {
        "summary": plain(own["summary"]),
        "episode": plain(own["episode"]),
        "steps": [{"step": int(t), "text": plain(text)} for t, text in own["steps"].items()],
    }
    names = {name: plain(sample.get(name) or "") for name in ("task", "task_type", "game")}
    numbers = {"iteration": int(sample["iteration"]), "group": int(sample["group"]), "success": bool(sample["success"])}
    return {**numbers, **names, "skills": skills or None, "steps": steps}


def row_of_step(step: dict, prompt: str) -> dict:
    scored, edits = step.get("skill_logprobs") or {}, step.get("skill_prompts") or {}
    guided = [
        {"level": level, "prompt": plain(edited(prompt, edits.get(level))), "logprobs": finite(scored.get(level))}
        for level in sorted(scored.keys() | edits.keys())
    ]
    return {
        **{name: plain(step[name]) for name in ("observation", "response", "action")},
        "prompt": plain(prompt),
        "valid": bool(step["valid"]),
        "route": [{"level": plain(skill["level"]), "text": plain(skill["text"])} for skill in step["route"]],
        "guided": guided,
        "tokens": [plain(token) for token in step["tokens"]],
        "outcome_advantage": (finite([step.get("outcome_advantage")]) or [None])[0],
        **{name: finite(step.get(name)) for name in NUMBERS},
    }


def edited(prompt: str, edit: list | None) -> str | None:
    """The prompt under a skill, of (where, how many characters leave there, what comes in their place)."""
    return None if edit is None else prompt[: edit[0]] + edit[2] + prompt[edit[0] + edit[1] :]


def plain(text: str | None) -> str | None:
    """Text that UTF-8 can hold: half a surrogate pair becomes a question mark."""
    return None if text is None else text.encode(errors="replace").decode()


def finite(values: list[Any] | None) -> list[float | None] | None:
    if values is None:
        return None
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]


def export(run: Path, out: Path) -> tuple[Path, int]:
    """samples.jsonl of a run -> the parquet file in `out`, and how many episodes it has. Raises ValueError where there
    are none, where a record is damaged, and for a folder that holds something else."""
    import pyarrow
    from pyarrow import parquet

    from lm.loading import write_whole
    from runlog.metrics import read_lines

    if not (source := run / "samples.jsonl").is_file():
        raise ValueError(f"no samples.jsonl in {run}: not the folder of a run, or no iteration was sampled")
    if out.exists() and not (out / FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else: take another --out")
    rows = []
    for number, sample in enumerate(read_lines(source), 1):
        try:
            rows.append(row_of(sample))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"record {number} of {source} is no episode: {type(error).__name__} {error}") from None
    if not rows:
        raise ValueError(f"{source} has no whole episode yet")
    schema = features()
    table = pyarrow.Table.from_pylist(rows, schema=schema.arrow_schema)  # `datasets` finds its own types in it
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / FILE, lambda temporary: parquet.write_table(table, temporary))
    listed = "\n".join(f"{name}: {kind}" for name, kind in schema.items())
    card = README.format(file=FILE, count=len(rows), schema=listed)
    write_whole(out / CARD, lambda temporary: temporary.write_text(card, encoding="utf-8"))
    return out / FILE, len(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/laptop")
    parser.add_argument("--out", type=Path, help="folder of the export (default: export in the run's folder)")
    args = parser.parse_args(argv)
    with lm.one_line("export.py"):
        path, count = export(args.run, args.out or args.run / "export")
    print(f"{path}: {count} episodes")


if __name__ == "__main__":
    main()
