"""A run as a table that stays at the bottom of the terminal, with an episode whose tokens show praise and blame.

It needs the package rich, a terminal of its own, and a run of one process: what another process prints would be drawn
over. Elsewhere, and with TERM=dumb, each iteration is a line (RunLog.show). Printed lines and warnings stand above the
table; a progress bar is its last row. `frame` is all that is drawn, made from the records of metrics.jsonl and
samples.jsonl alone.
"""

from __future__ import annotations

import io
import logging
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from config import Config, variant_of
from lm.loading import read_json
from memory.hours import left, seconds_of
from runlog.metrics import Metrics, read_lines

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from runlog.start import Run

Records = list[Metrics]  # lines of metrics.jsonl, in order

RECENT = 5  # iterations whose mean seconds say what is left
WIDTH, SPARKS = 30, "▁▂▃▄▅▆▇█"  # of a sparkline
# A_skill in nats, on one scale for all runs: a token beyond so many of these is as strong. Blue is praise, orange is
# blame: the two that people with any colour blindness tell apart. Numbers are xterm's of 256 colours.
EDGES = (0.01, 0.1, 0.5, 2.0)
PRAISE = ("color(16) on color(195)", "color(16) on color(153)", "color(16) on color(75)", "color(231) on color(25)")
BLAME = ("color(16) on color(230)", "color(16) on color(223)", "color(16) on color(214)", "color(231) on color(130)")
STEPS, OTHER_LINES = 5, 14  # of an episode that are shown, three lines each, and what else a frame may have


# ---- a frame ---------------------------------------------------------------------------------------------------------


def frame(
    config: Config, records: Records, episode: dict | None, evaluation: float | None = None, steps: int = STEPS
) -> RenderableType:
    """What is drawn after an iteration. `episode`: a record of samples.jsonl; None: none. `evaluation`: seconds of the
    one before training, where it is known. `steps`: how many of the episode are shown."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
    table.add_column(style="bold", width=10)
    table.add_column(ratio=1, no_wrap=True)
    for name, words in rows(config, records, evaluation):
        table.add_row(name, Text(words))
    return Group(table, *(episode_lines(episode, steps) if episode else []))


def rows(config: Config, records: Records, evaluation: float | None) -> Iterator[tuple[str, str]]:
    """Name and words of each row of the table."""
    now, success = records[-1], [record["train/success"] for record in records]
    yield "iteration", f"{len(records)} of {config.iterations}   {config.out}"
    yield "success", f"{100 * success[-1]:3.0f}%  {sparkline(success)}"
    held_out = next((r for r in reversed(records) if any(name.startswith("eval/") for name in r)), {})
    if held_out:
        shares = {name.split("/")[1]: share for name, share in held_out.items() if name.startswith("eval/")}
        shown = "  ".join(f"{split} {100 * share:.1f}%" for split, share in shares.items())
        yield "held out", f"{shown}   after iteration {held_out['iteration']:.0f}"
    if "skills/parse_rate" in now:
        parsed = [record.get("skills/parse_rate", 0.0) for record in records]
        yield "parsed", f"{100 * parsed[-1]:3.0f}%  {sparkline(parsed)}"
    yield "routes", "  ".join(f"{name} {100 * share:.0f}%" for name, share in routes(config, now).items())
    outcome, skill = f"{now['advantage/outcome_abs']:.3f}", f"λ |A_skill| {weighed(config, now):.2g}"
    yield "|A_ep|", f"{outcome}   {skill}   KL {now['loss/kl']:.2g}"
    yield "seconds", "  ".join(f"{n[8:]} {s:.1f}" for n, s in now.items() if n.startswith("seconds/"))
    yield "left", clock(config, records, evaluation)


def sparkline(values: list[float]) -> str:
    """Shares between 0 and 1, the means of neighbours where there are more than WIDTH."""
    count = min(WIDTH, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    return "".join(SPARKS[round(mean * (len(SPARKS) - 1))] for mean in means)


def routes(config: Config, metrics: Metrics) -> dict[str, float]:
    """Share of steps by what guides them. With --routing additive a step may count twice."""
    episode, step = metrics.get("guided/episode", 0.0), metrics.get("guided/step", 0.0)
    some = max(episode, step) if config.routing == "additive" else episode + step
    return {"episode": episode, "step": step, "none": max(0.0, 1 - some)}


def weighed(config: Config, metrics: Metrics) -> float:
    """Mean |A_skill| times lambda: of both levels, by how many steps each guided."""
    guided = {"episode": metrics.get("guided/episode", 0.0), "step": metrics.get("guided/step", 0.0)}
    total = guided["episode"] * config.episode_weight + guided["step"] * config.step_weight
    return metrics["advantage/skill_abs"] * total / (sum(guided.values()) or 1.0)


def clock(config: Config, records: Records, evaluation: float | None) -> str:
    """What is left of the run, by its last iterations, and how long all of it takes, now and as its first one said."""
    taken = [record["seconds/evaluate"] for record in records if "seconds/evaluate" in record]
    recent = records[-RECENT:]
    mean = {name: sum(r.get(name, 0.0) for r in recent) / len(recent) for name in records[-1]}
    more = left(config, mean, len(records) - 1, taken[-1] if taken else evaluation)
    first = taken[0] if evaluation is None and taken else evaluation
    predicted = sum(seconds_of(records[0]).values()) + left(config, records[0], 0, first)
    spent = sum(sum(v for name, v in r.items() if name.startswith("seconds/")) for r in records)
    times = [str(timedelta(seconds=round(seconds))) for seconds in (more, spent + more, predicted)]
    return "{}   of {} in all; predicted at first: {}".format(*times)


# ---- an episode ------------------------------------------------------------------------------------------------------


def episode_lines(episode: dict, count: int) -> list[Text]:
    """Its first `count` steps: what was seen, the sampled tokens in colours, and the skill that guides them."""
    from rich.text import Text

    won = "success" if episode["success"] else "failure"
    title = f" an episode of iteration {episode['iteration']}, a {won}: {plain(episode['task'])}"
    lines = [Text(), Text(title, "bold", no_wrap=True, overflow="ellipsis")]
    for t, step in enumerate(episode["steps"][:count]):
        lines.append(Text(f" {t:>2}  {plain(step['observation'])}", "dim", no_wrap=True, overflow="ellipsis"))
        pairs = zip(step["tokens"], step["skill_advantages"], strict=True)
        tokens = [(plain(token), style(shift)) for token, shift in pairs]
        gap = Text(" " if not any(" " in token for token in step["tokens"]) else "")  # of a vocabulary of words
        line = Text("     ", no_wrap=True, overflow="ellipsis")
        lines.append(line + gap.join(Text(*token) for token in tokens))
        for guide in step["route"]:
            words = f"     {guide['level']} skill: {plain(guide['text'])}"
            lines.append(Text(words, "italic", no_wrap=True, overflow="ellipsis"))
    if (more := len(episode["steps"]) - count) > 0:
        lines.append(Text(f"     and {more} more", "dim"))
    return [*lines, Text.assemble(" A_skill of a token, nats: ", *legend())]


def legend() -> list[tuple[str, str]]:
    blame = [(f" -{edge:g} ", style) for edge, style in zip(reversed(EDGES), reversed(BLAME), strict=True)]
    return blame + [(f" +{edge:g} ", style) for edge, style in zip(EDGES, PRAISE, strict=True)]


def style(shift: float | None) -> str:
    """Of a token, by its A_skill in nats. Below the first edge, or not scored (null or NaN): no colour."""
    if shift is None or not abs(shift) >= EDGES[0]:
        return ""
    return (PRAISE if shift > 0 else BLAME)[sum(abs(shift) >= edge for edge in EDGES) - 1]


def plain(text: str) -> str:
    """Text from outside, on one line: no character that a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def read_records(path: Path) -> Records:
    """metrics.jsonl, where null stands for what is no number."""
    return [{name: math.nan if v is None else v for name, v in line.items()} for line in read_lines(path)]


def draw(folder: str | Path, path: str | Path, width: int = 110) -> None:
    """The newest frame of a run's folder, with an episode of its samples, as an SVG file or, by the name's ending, as
    text. Raises FileNotFoundError where the folder holds no run, or no iteration of one."""
    from rich.console import Console

    settings = read_json(Path(folder) / "config.json")
    config = variant_of(settings["algo"]).settings(**settings)
    records, episodes = read_records(Path(folder) / "metrics.jsonl"), read_lines(Path(folder) / "samples.jsonl")
    console = Console(file=io.StringIO(), record=True, width=width, color_system="256", force_terminal=True)
    console.print(frame(config, records, episodes[-1] if episodes else None))
    svg = Path(path).suffix == ".svg"
    Path(path).write_text(console.export_svg(title="OPID") if svg else console.export_text(), encoding="utf-8")


# ---- in the terminal -------------------------------------------------------------------------------------------------


def table_of(run: Run) -> Live | None:
    """None where there is to be none."""
    if run.processes.count > 1 or not (sys.stdout.isatty() and sys.stderr.isatty()) or find_spec("rich") is None:
        return None
    from rich.console import Console

    console = Console(file=sys.stdout)  # the terminal's own, whatever takes its place later
    obeys = console.is_interactive and not console.legacy_windows  # not so with TERM=dumb
    return Live(run, console) if obeys and console.encoding.startswith("utf") else None


class Live:
    """The table of a run, from its making to `close`."""

    def __init__(self, run: Run, console: Console):
        from rich.live import Live as Display

        path = Path(run.config.out) / "metrics.jsonl"
        self.run, self.console, self.bar = run, console, ""
        self.records = read_records(path) if path.exists() else []
        self.episode: dict | None = None
        self.before = run.evaluation  # seconds of the evaluation before training
        self.streams = sys.stdout, sys.stderr
        self.handlers = [handler for handler in handlers() if handler.stream in self.streams]
        self.display: Display | None = Display(
            console=console,
            get_renderable=self.drawn,
            refresh_per_second=1,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.above = [Above(self, stream) for stream in self.streams]
        sys.stdout, sys.stderr = (cast("TextIO", stream) for stream in self.above)
        for handler in self.handlers:
            handler.setStream(sys.stderr)
        self.display.start()
        console.show_cursor(True)  # so that a run that is killed leaves one

    def show(self, metrics: Metrics, episode: dict) -> None:
        """An iteration has ended."""
        self.records, self.episode = [*self.records, metrics], episode
        if self.display:
            self.display.refresh()

    def choose(self, count: int) -> int:
        """The number of an episode of the iteration. By no random numbers of the run's."""
        return random.Random(self.run.iteration).randrange(count)

    def drawn(self) -> RenderableType:
        """Of this moment. It is called at any time, by another thread, too, and must not end a run."""
        from rich.console import Group
        from rich.text import Text

        run, steps = self.run, max(1, min(STEPS, (self.console.height - OTHER_LINES) // 3))
        parts = [f"{n[8:]} {s:.1f}" for n, s in list(run.metrics.items()) if n.startswith("seconds/")]
        parts += [f"{time.perf_counter() - run.lap:.0f} s since", plain(self.bar)]
        now = Text(f" now        iteration {run.iteration}: {'  '.join(parts)}", no_wrap=True, overflow="ellipsis")
        try:
            if not self.records:
                return now
            return Group(frame(run.config, self.records, self.episode, self.before, steps), now)
        except Exception as error:
            return Text(f" the table cannot be drawn: {error!r}")

    def close(self) -> None:
        """Leaves the last frame where it is, and the terminal as it was. May be called twice, and by a signal."""
        if self.display is None:
            return
        with suppress(OSError, RuntimeError):  # nobody reads any more; or the signal came in the middle of a write
            for stream in self.above:
                stream.end()
        display, self.display, self.bar = self.display, None, ""
        sys.stdout, sys.stderr = self.streams
        for handler in self.handlers:
            handler.setStream(sys.stderr)
        with suppress(OSError, RuntimeError):
            display.stop()


class Above:
    """A stream whose lines stand above the table. What begins with a carriage return is a progress bar."""

    def __init__(self, live: Live, stream):
        self.live, self.rich_proxied_file, self.begun = live, stream, ""

    def __getattr__(self, name: str):
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        if self.live.display is None:  # somebody kept this stream
            return self.rich_proxied_file.write(text)
        if text.startswith("\r") and "\n" not in text:
            self.live.bar = text.strip()
            return len(text)
        from rich.text import Text

        lines, _, self.begun = (self.begun + text).rpartition("\n")
        if "\n" in text:
            self.live.console.print(Text.from_ansi(lines), soft_wrap=True)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """A line that has begun waits for its end."""

    def end(self) -> None:
        if self.begun:
            self.write("\n")


def handlers() -> list[logging.StreamHandler]:
    """Of all loggers: those that were made earlier hold the streams of that time."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = [handler for logger in loggers for handler in getattr(logger, "handlers", [])]
    return [handler for handler in found if isinstance(handler, logging.StreamHandler)]
