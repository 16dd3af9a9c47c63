"""The table of a run in a terminal, here a pseudo-terminal whose screen is read; and the tracker trackio."""

import fcntl
import json
import logging
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from dataclasses import replace
from threading import Thread

import pytest

import config as config_module
import train as train_module
from config import variant_of
from lm.scoring import progress
from runlog import RunLog, live
from runlog.ending import one_line
from runlog.start import start
from tests.settings import laptop

pytest.importorskip("rich", reason="no table without rich: pip install rich")

SMALL = {"tasks": 2, "rollouts": 2, "max_steps": 2, "eval_games": 1, "eval_every": 0, "save_every": 1, "scorer": "old"}
FIRST = {
    **{"iteration": 0, "train/success": 0.0, "guided/episode": 0.5, "guided/step": 0.3, "skills/parse_rate": 1.0},
    **{"advantage/outcome_abs": 0.5, "advantage/skill_abs": 0.4, "loss/kl": 0.001},
    **{"seconds/rollout": 60.0, "seconds/skills": 30.0, "seconds/rescore": 10.0, "seconds/update": 20.0},
}
SECOND = FIRST | {"iteration": 1, "train/success": 0.5, "seconds/rollout": 120.0, "eval/valid_seen/success": 0.25}
EPISODE = {
    **{"iteration": 1, "task": "find \x1b[2Jthe\nkey", "success": True},
    "steps": [
        {
            "observation": "a room\x1b]0;owned\x07",
            "tokens": [" go", " to", " the\n", " desk"],
            "skill_advantages": [-3.0, 0.2, 0.001, None],
            "route": [{"level": "step", "text": "look on the [bold]desk"}],
        }
    ],
}


def config(folder, **changes):
    return laptop(**SMALL | {"iterations": 3, "out": str(folder)} | changes)


# ---- a frame ---------------------------------------------------------------------------------------------------------


def test_a_frame_says_what_the_records_say(tmp_path):
    c = config("runs/a", iterations=4, eval_every=2, episode_weight=0.1, step_weight=0.2)
    said = dict(live.rows(c, [FIRST, SECOND], evaluation=None))
    assert said["iteration"] == "2 of 4   runs/a"
    assert said["success"] == " 50%  ▁▅"
    assert said["held out"] == "valid_seen 25.0%   after iteration 1"
    assert said["routes"] == "episode 50%  step 30%  none 20%"
    assert said["|A_ep|"] == "0.500   λ |A_skill| 0.055   KL 0.001"  # 0.4 (0.5 x 0.1 + 0.3 x 0.2) / 0.8
    # an evaluation as long as a mean rollout times 2 x max(1, 1 game of 4): left 2 x 150 s and one of 180 s; the first
    # iteration said 4 x 120 s and two of 120 s
    assert said["left"] == "0:08:00   of 0:13:00 in all; predicted at first: 0:12:00"


def test_a_step_that_both_levels_guide_counts_for_both():
    shares = FIRST | {"guided/episode": 0.9, "guided/step": 0.3}
    additive = live.routes(config("a", routing="additive"), shares)
    assert additive == pytest.approx({"episode": 0.9, "step": 0.3, "none": 0.1})


def test_a_long_run_has_a_sparkline_of_means():
    assert live.sparkline([0.0, 1.0] * live.WIDTH) == "▅" * live.WIDTH  # 0.5 x 7 is rounded to an even 4
    assert live.sparkline([0.0, 1.0]) == "▁█"


def test_the_colours_are_on_one_scale():
    assert [live.style(shift) for shift in (0.0, 0.009, None, float("nan"))] == [""] * 4
    assert [live.style(shift) for shift in (0.01, 0.1, 0.5, 2.0, 50.0)] == [*live.PRAISE, live.PRAISE[-1]]
    assert [live.style(-shift) for shift in (0.01, 0.1, 0.5, 2.0, 50.0)] == [*live.BLAME, live.BLAME[-1]]


@pytest.mark.parametrize("name", ["frame.svg", "frame.txt"])
def test_a_folder_is_drawn(tmp_path, name):
    c = config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(c.to_dict()))
    records = [FIRST | {"loss/kl": None}, SECOND]  # null: a NaN
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "samples.jsonl").write_text(json.dumps(EPISODE) + "\n")
    live.draw(tmp_path, tmp_path / name)
    drawn = (tmp_path / name).read_text().replace("&#160;", " ")
    assert "an episode of iteration 1, a success: find �[2Jthe key" in drawn
    assert "a room�]0;owned�" in drawn and "\x1b" not in drawn
    assert "step skill: look on the [bold]desk" in drawn
    if name == "frame.svg":
        blame, praise = "#af5f00", "#afd7ff"  # 130 and 153 of the 256 colours
        assert blame in drawn and praise in drawn and drawn.startswith("<svg")
    else:
        assert " go to the  desk" in drawn


# ---- in a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self):
        self.raw, (own, other) = bytearray(), pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
        self.stream = os.fdopen(other, "w", encoding="utf-8", buffering=1)
        self.reader = Thread(target=self._read, args=(own,), daemon=True)
        self.reader.start()

    def _read(self, own: int) -> None:
        while True:
            try:
                self.raw += os.read(own, 65536)
            except OSError:  # the other end is closed
                return os.close(own)

    def screen(self) -> list[str]:
        """Closes it -> every line that was on it, in order, those that have scrolled away included."""
        self.stream.close()
        self.reader.join()
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.raw.decode()):
            if part == "\n":
                row, lines = row + 1, [*lines, ""] if row + 1 == len(lines) else lines
            elif part == "\r":
                column = 0
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part.startswith("\x1b[") and part.endswith("A"):
                row -= int(part[2:-1] or 1)
            elif not part.startswith("\x1b"):
                lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in lines]


def in_terminal(monkeypatch) -> Terminal:
    """Called by the test itself: pytest changes sys.stdout after its fixtures."""
    made = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", made.stream)
    monkeypatch.setattr(sys, "stderr", made.stream)
    return made


def train(c, ending=None):
    run = start(c)
    if ending:
        ending.run = run
    train_module.train(run, variant_of(c.algo))
    return run


def at_iteration(monkeypatch, number: int, call):
    """What `call` does happens in the middle of that iteration."""
    original = train_module.rescore

    def rescore(run, *args):
        if run.iteration == number:
            call(run)
        return original(run, *args)

    monkeypatch.setattr(train_module, "rescore", rescore)


def test_the_table_stays_below_what_is_printed(random_tiny, tmp_path, monkeypatch):
    terminal = in_terminal(monkeypatch)
    handler = logging.StreamHandler()  # made before the table, as a library's is
    monkeypatch.setattr(logging.getLogger("library"), "handlers", [handler])
    bars = []

    def chatter(run):
        logging.getLogger("library").warning("a library's warning")
        print("an episode is left out: [bold]", file=sys.stderr)
        print("begun", end="", flush=True)
        print(" and ended")
        sys.stderr.write("\rhalf of a download")
        sys.stderr.write("\ra download is done\n")
        for _ in progress([1, 2, 3], "bar of the update"):
            bars.append(run.log.table.bar)
        assert sys.stdout.encoding == "utf-8" and sys.stderr.isatty()
        sys.stdout.writelines(["a" * 250, "\n"])

    at_iteration(monkeypatch, 1, chatter)
    run = train(config(tmp_path / "run"))
    assert (sys.stdout, sys.stderr, handler.stream) == (terminal.stream,) * 3
    screen = terminal.screen()
    table = screen.index(next(line for line in screen if line.startswith(" iteration")))
    assert screen[table].startswith(" iteration   3 of 3")
    assert sum(line.startswith(" iteration") for line in screen) == 1  # no old frame is left
    printed = ("a library's warning", "a download is done", "an episode is left out: [bold]", "begun and ended")
    for words in (*printed, "a" * 250):
        assert any(line == words for line in screen[:table]), words
    assert "bar of the update:   0%" in bars[0] and not any("bar of the update" in line for line in screen)
    assert screen[-3].startswith("policy:") and screen[-2].startswith("curve:")  # below the table
    assert not any(line.startswith("iteration ") for line in screen)  # no lines beside the table
    assert terminal.raw.rstrip().rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l")  # the cursor is there
    assert len(run.log.table.records) == 3


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, "full disk", "bug"])
def test_a_run_that_ends_early_leaves_the_terminal_as_it_was(how, random_tiny, tmp_path, monkeypatch):
    terminal = in_terminal(monkeypatch)

    def end(run):
        if how == "bug":
            raise IndexError("a bug")
        if how == "full disk":
            raise OSError("No space left on device")
        os.kill(os.getpid(), how)

    at_iteration(monkeypatch, 1, end)
    c = config(tmp_path / "run")
    with pytest.raises((SystemExit, IndexError)) as ended, one_line(c) as ending:
        train(c, ending)
    if how == "full disk":  # Python prints what SystemExit says
        print(ended.value, file=sys.stderr)
    assert (sys.stdout, sys.stderr) == (terminal.stream, terminal.stream)
    screen = terminal.screen()
    assert sum(line.startswith(" iteration") for line in screen) == 1
    if how != "bug":
        said = next(i for i, line in enumerate(screen) if line.startswith("train.py: "))
        assert "Last checkpoint: " in "".join(screen[said:]) and screen[said - 1].startswith(" now ")
    assert terminal.raw.rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l")


def test_a_resumed_run_shows_all_of_it(random_tiny, tmp_path, monkeypatch):
    train(config(tmp_path / "run", iterations=2))
    terminal = in_terminal(monkeypatch)
    train(config(tmp_path / "run", iterations=3, resume=True))
    screen = "\n".join(terminal.screen())
    assert " iteration   3 of 3" in screen and re.search(r"^ success +\d+%  .{3}$", screen, re.MULTILINE)


def test_a_table_that_cannot_be_drawn_ends_no_run(random_tiny, tmp_path, monkeypatch):
    terminal = in_terminal(monkeypatch)
    monkeypatch.setattr(live, "frame", lambda *a: 1 / 0)
    train(config(tmp_path / "run", iterations=1))
    assert any("the table cannot be drawn: ZeroDivisionError" in line for line in terminal.screen())


@pytest.mark.parametrize("why", ["no terminal", "dumb", "no rich", "two processes"])
def test_elsewhere_each_iteration_is_a_line_with_the_time_left(why, random_tiny, tmp_path, monkeypatch, capsys):
    terminal = None if why == "no terminal" else in_terminal(monkeypatch)
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if why == "no rich":
        monkeypatch.setattr(live, "find_spec", lambda name: None)
    run = start(config(tmp_path / "run", iterations=2))
    if why == "two processes":
        monkeypatch.setattr(run.processes, "count", 2)
        assert live.table_of(run) is None
        return
    train_module.train(run, variant_of("opid"))
    assert run.log.table is None
    lines = terminal.screen() if terminal else capsys.readouterr().out.splitlines()
    assert any(re.match(r"iteration    0  success .* left \d:\d\d:\d\d$", line) for line in lines)


def test_the_evaluation_before_training_is_timed_from_its_own_start(random_tiny, tmp_path):
    began = time.perf_counter()
    run = start(config(tmp_path / "run", eval_every=1))
    assert 0 < run.evaluation <= time.perf_counter() - began


# ---- trackio ---------------------------------------------------------------------------------------------------------


def test_trackio_has_each_step_once(random_tiny, tmp_path, monkeypatch):
    """Of a run that was tracked from its second iteration on, and died between telling of one and saving it."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))  # read when trackio is imported
    pytest.importorskip("trackio", reason="pip install trackio")
    from trackio import Api, utils
    from trackio.sqlite_storage import SQLiteStorage

    assert tmp_path / "tracked" == utils.TRACKIO_DIR, "another test has imported trackio before"
    monkeypatch.setattr("trackio.run._get_default_namespace", lambda: None)  # the account's name: no network
    train(config(tmp_path / "run", iterations=1, eval_every=1))
    second = config(tmp_path / "run", iterations=2, eval_every=1, resume=True, tracker="trackio")
    save = RunLog.save
    with monkeypatch.context() as full:
        full.setattr(RunLog, "save", lambda *a: pytest.fail("full disk"))
        with pytest.raises(pytest.fail.Exception):
            train(second)
    assert RunLog.save is save
    train(replace(second, iterations=3))
    train(config(tmp_path / "other", iterations=1, tracker="trackio"))
    names = [
        f"{name}-{json.loads((tmp_path / name / 'start.json').read_text())['tracked']}" for name in ("run", "other")
    ]
    assert sorted(run.name for run in Api().runs("opid")) == sorted(names)
    told = SQLiteStorage.get_logs("opid", names[0])
    assert [line["step"] for line in told] == [0, 1, 2, 3]
    assert "eval/valid_seen/success" in told[0] and "train/success" not in told[0]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss/kl"] for line in told[1:]] == [line["loss/kl"] for line in metrics]
    assert not any("iteration" in line for line in told)


def test_a_tracker_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tracker trackio needs its package: pip install trackio"):
        start(config(tmp_path / "run", tracker="trackio"))
