"""What the skills praised and blamed: a run's samples as one HTML page.

Every sampled token is coloured by its skill advantage: green where the skill made it likelier (praise), red where it
made it less likely (blame), grey where no skill was scored. Hover for the numbers.
"""

from __future__ import annotations

import html
from pathlib import Path

from runlog.metrics import read_lines

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ddd; margin-top: 2rem }
h2 { font-size: 1.05rem } .won { color: #17692e } .lost { color: #a02020 }
.skill { background: #f2f4f8; border-radius: 4px; padding: .4rem .7rem; margin: .3rem 0 }
.step { margin: .5rem 0; display: grid; grid-template-columns: 2.5rem 1fr; gap: .4rem }
.seen { color: #555; white-space: pre-wrap } .route { font-size: .85rem; color: #555 }
.token { border-radius: 3px; padding: 1px 2px; margin-right: 2px; font-family: ui-monospace, monospace }
"""


def colour(value: float | None, scale: float) -> str:
    if value is None:
        return "#eee"
    strength = min(1.0, abs(value) / scale)
    red, green, blue = (46, 160, 67) if value > 0 else (218, 54, 51)
    return f"rgba({red}, {green}, {blue}, {0.08 + 0.72 * strength:.2f})"


def number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:+.3f}"  # null stands for it in a run's files


def tokens_html(step: dict, scale: float) -> str:
    spans = []
    for text, old, shift, total in zip(
        step["tokens"], step["old_logprobs"], step["skill_advantages"], step["advantages"], strict=True
    ):
        shown = number(shift) if shift is not None else "not scored"
        title = f"log pi_old {number(old)} | A_skill {shown} | A {number(total)}"
        spans.append(
            f'<span class="token" style="background:{colour(shift, scale)}" title="{title}">{html.escape(text)}</span>'
        )
    return "".join(spans)


def sample_html(sample: dict) -> str:
    shifts = [abs(v) for step in sample["steps"] for v in step["skill_advantages"] if v is not None]
    scale = max(sorted(shifts)[int(0.9 * len(shifts))] if shifts else 1.0, 1e-3)
    outcome = '<b class="won">success</b>' if sample["success"] else '<b class="lost">failure</b>'
    parts = [f"<section><h2>iteration {sample['iteration']}: {html.escape(sample['task'])}: {outcome}</h2>"]
    if sample["skills"]:
        parts.append(f'<div class="skill"><b>episode skill</b> {html.escape(sample["skills"]["episode"])}</div>')
    else:
        parts.append('<div class="skill">no skills (none used, or none could be parsed)</div>')
    for t, step in enumerate(sample["steps"]):
        routes = "; ".join(f"{g['level']}: {html.escape(g['text'])}" for g in step["route"]) or "no guidance"
        parts.append(
            f'<div class="step"><div>{t}</div><div><div class="seen">{html.escape(step["observation"])}</div>'
            f'<div>{tokens_html(step, scale)}</div><div class="route">{routes}</div></div></div>'
        )
    return "".join([*parts, "</section>"])


def write_report(folder: str | Path) -> Path:
    """samples.jsonl of a run -> report.html beside it. Raises FileNotFoundError where there is no samples file."""
    body = "".join(map(sample_html, reversed(read_lines(Path(folder) / "samples.jsonl"))))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Skills, praise and blame</title><style>{STYLE}'
        f"</style><h1>What the skills praised and blamed</h1><p>{__doc__.partition(chr(10) * 2)[2]}</p>{body}</html>"
    )
    path = Path(folder) / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair is no reason to show nothing
    return path
