"""The report: what a run keeps for it, its data, and the page itself in a headless Chromium."""

import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

import runlog.report as report_module
import train as train_module
from config import variant_of
from data import Batch
from runlog import RunLog, edit, last_update
from runlog.report import write_report
from runlog.start import start
from tests.settings import laptop
from tools import report

NAN = float("nan")


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def a_step(*shifts: float | None, level="step", skill="take pen & go", **changes) -> dict:
    """Of which each token, a letter, was moved by that many nats."""
    step = {
        "observation": "on <desk 1> see pen 1",
        "kept": 0,
        "prompt": "task: pen. go!",
        "skill_prompts": {level: [10, 0, " hint take"]},
        "response": "take pen 1",
        "route": [{"level": level, "text": skill}],
        "tokens": list("abcdefgh"[: len(shifts)]),
        "old_logprobs": [-0.5] * len(shifts),
        "skill_logprobs": {level: [None if shift is None else shift - 0.5 for shift in shifts]},
        "skill_advantages": list(shifts),
        "outcome_advantage": 1.0,
        "advantages": [1 + 0.1 * (shift or 0) for shift in shifts],
        "ratios": [1.5] * len(shifts),
        "clipped": [1.0] * len(shifts),
    }
    return step | changes


def an_episode(*steps: dict, **changes) -> dict:
    skills = {"summary": "done", "episode": "in order", "steps": {}}
    known = {"iteration": 3, "task": "put pen", "task_type": "pick", "success": True, "skills": skills}
    return known | {"steps": list(steps)} | changes


CONFIG = {"algo": "opid", "model": "tiny", "env": "alfworld", "episode_weight": 0.1, "step_weight": 0.1, "seed": 0}
METRICS = {"iteration": 0, "train/success": 0.5, "seconds/rollout": 3.0, "tokens/sampled": 9, "loss/kl": 0.1}
HELD_OUT = {"iteration": 0, "success": {"valid_seen": 0.25}, "counts": {"valid_seen": {"Pick": [1, 4], "All": [1, 4]}}}


@pytest.fixture
def run(tmp_path):
    """-> what makes a run's folder of its episodes."""

    def make(*episodes: dict, name="run", **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | config))
        (folder / "metrics.jsonl").write_text(lines(METRICS))
        (folder / "evaluations.jsonl").write_text(lines(HELD_OUT))
        (folder / "samples.jsonl").write_text(lines(*episodes))
        return folder

    return make


# ---- what a run keeps for it -----------------------------------------------------------------------------------------


@pytest.fixture
def played(random_tiny, tmp_path, monkeypatch):
    """-> the settings of a run, its iteration's batch, and its samples."""
    seen, samples = [], RunLog.samples
    monkeypatch.setattr(RunLog, "samples", lambda *args, **kw: (seen.append(args), samples(*args, **kw)))
    sizes = {"tasks": 2, "rollouts": 2, "max_steps": 4, "max_new_tokens": 6, "train_games": 6, "eval_games": 2}
    update = {"mini_batch": 2, "learning_rate": 0.01, "clip": 0.01, "invalid_penalty": 1.0}
    config = laptop(**sizes, **update, iterations=1, eval_every=1, out=str(tmp_path / "run"))
    train_module.train(start(config), variant_of("opid"))
    (_, _, tokenizer, batch), *_ = seen
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    return config, tokenizer, batch, samples


def test_a_sample_holds_both_contexts_of_each_step(played):
    _, tokenizer, batch, samples = played
    row, levels = 0, set()
    for sample in samples:
        prompt = ""
        for step in sample["steps"]:
            prompt = prompt[: step["kept"]] + step["prompt"]
            assert prompt == tokenizer.decode(batch.steps[row].context)
            assert len(step["prompt"]) < len(prompt) or not step["kept"]
            for level, (at, removed, inserted) in step["skill_prompts"].items():
                h_hat = prompt[:at] + inserted + prompt[at + removed :]
                assert h_hat == tokenizer.decode(batch.skill_contexts[level][row]) != prompt
                levels.add(level)
            row += 1
    assert levels == {"episode", "step"} and row == len(batch.steps)


def test_the_numbers_of_a_sample_belong_together(played):
    config, _, batch, samples = played
    steps, clipped = [step for sample in samples for step in sample["steps"]], 0
    for step, outcome in zip(steps, batch.advantages.outcome.tolist(), strict=True):
        assert step["outcome_advantage"] == pytest.approx(outcome, abs=1e-5)
        (under,) = step["skill_logprobs"].values()
        names = ("old_logprobs", "skill_advantages", "advantages", "ratios", "clipped")
        for i, (old, shift, total, ratio, flag) in enumerate(zip(*(step[name] for name in names), strict=True)):
            assert shift == pytest.approx(under[i] - old, abs=3e-5)
            assert total == pytest.approx(outcome + 0.1 * shift, abs=3e-5)
            if min(abs(ratio - 1 - config.clip), abs(ratio - 1 + config.clip)) > 1e-4 and total:
                assert flag == (ratio > 1 + config.clip if total > 0 else ratio < 1 - config.clip)
            clipped += flag
    assert clipped > 0


def test_the_ratio_is_that_of_the_last_gradient_step():
    old = torch.tensor([[-1.0, -2.0], [-1.0, NAN]])  # (B, R)
    batch = Batch([], [], [], {}, old, None, {})
    first = (torch.tensor([0, 0]), torch.tensor([0, 1])), torch.tensor([-1.0, -2.0]), torch.zeros(2)
    second = (torch.tensor([0]), torch.tensor([1])), torch.tensor([-2.0 + math.log(3)]), torch.ones(1)
    batch.updated = [first, second]
    ratios, clipped = last_update(batch)
    assert ratios.tolist() == [[1, pytest.approx(3)], [pytest.approx(NAN, nan_ok=True)] * 2]
    assert clipped.tolist() == [[0, 1], [pytest.approx(NAN, nan_ok=True)] * 2]


def test_an_evaluation_keeps_its_counts(played):
    config, *_ = played
    text = Path(config.out, "evaluations.jsonl").read_text()
    for record in map(json.loads, text.splitlines()):
        assert record["success"].keys() == record["counts"].keys() == {"valid_seen", "valid_unseen"}
        for split, table in record["counts"].items():
            solved, games = table.pop("All")
            assert (solved, games) == tuple(map(sum, zip(*table.values(), strict=True))) and games == 2
            assert record["success"][split] == solved / games


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a b", "a hint b", (2, 0, "hint ")),
        ("a b", "a b", (3, 0, "")),
        ("a x b", "a y b", (2, 1, "y")),
        ("", "all", (0, 0, "all")),
        ("aa", "aaa", (2, 0, "a")),  # what is common counts once
    ],
)
def test_the_edit_between_two_prompts(before, after, expected):
    assert edit(before, after) == expected


# ---- the data of a page ----------------------------------------------------------------------------------------------


def data_of(page: Path) -> tuple[dict, list[dict]]:
    text = page.read_text(encoding="utf-8")
    data, episodes = re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', text, re.DOTALL)
    return json.loads(data), [json.loads(line) for line in episodes.splitlines()]


def test_a_page_holds_its_runs(run):
    won, lost = an_episode(a_step(0.4, -2.0, None)), an_episode(success=False, iteration=4, steps=[])
    folders = run(won, lost), run(won, name="other", seed=1)
    page = write_report(*folders)
    assert page == folders[0] / "report.html"
    data, episodes = data_of(page)
    assert [known["name"] for known in data["runs"]] == ["run", "other"]
    assert [known["config"]["seed"] for known in data["runs"]] == [0, 1]
    assert data["runs"][0]["metrics"] == [METRICS] and data["runs"][1]["evaluations"] == [HELD_OUT]
    assert episodes == [won, lost, won]
    first = {"iteration": 3, "type": "pick", "outcome": "won", "peak": 2.0, "sum": 2.4, "run": 0, "line": 0}
    second = first | {"iteration": 4, "outcome": "lost", "peak": 0, "sum": 0, "line": 1}
    assert data["index"] == [first, second, first | {"run": 1, "line": 2}]


def test_no_text_ends_the_script_that_holds_it(run):
    hostile = "</script><img onerror=alert(1)>\n<!--<script>"
    page = write_report(run(an_episode(a_step(1.0, observation=hostile), task=hostile), model=hostile))
    assert "<img" not in page.read_text()
    data, (episode,) = data_of(page)
    assert episode["task"] == episode["steps"][0]["observation"] == data["runs"][0]["config"]["model"] == hostile


def test_what_is_no_number_or_no_text_is_kept_all_the_same(run):
    page = write_report(run(an_episode(a_step(NAN, 1.0, tokens=["a \ud83d", "pen"]))))
    _, (episode,) = data_of(page)
    assert episode["steps"][0]["tokens"] == ["a \ud83d", "pen"]
    assert episode["steps"][0]["skill_advantages"] == [None, 1.0]


def test_a_page_of_more_than_fits_leaves_out_evenly(run, monkeypatch):
    folder = run(*[an_episode(iteration=i) for i in range(10)])
    monkeypatch.setattr(report_module, "MOST", (folder / "samples.jsonl").stat().st_size // 2)
    data, episodes = data_of(write_report(folder))
    assert data["every"] == 3
    assert [episode["iteration"] for episode in episodes] == [0, 3, 6, 9]


@pytest.fixture
def call(monkeypatch):
    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        report.main()

    return main


def test_the_command_line(run, call, capsys, tmp_path):
    folder = run(an_episode())
    call(folder)
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    (folder / "samples.jsonl").write_text(lines(an_episode()) + '{"iteration": 3, "tra')  # a run that is alive
    call(folder)
    for name in ("samples.jsonl", "metrics.jsonl", "evaluations.jsonl"):
        path, before = folder / name, (folder / name).read_text()
        path.write_text("{half a line\n")
        with pytest.raises(SystemExit, match=rf"report\.py: line 1 of {path} is damaged: Expecting property name"):
            call(folder)
        path.write_text("[1]\n")
        with pytest.raises(SystemExit, match=rf"report\.py: {path} is no file of a run: it holds \[1\]"):
            call(folder)
        path.write_text(before)
    for nowhere in (tmp_path, "nowhere"):
        with pytest.raises(SystemExit, match=rf"report\.py: {nowhere} is not the folder of a run: none of config"):
            call(folder, nowhere)


def test_a_watched_page_is_written_until_the_run_has_ended(run, call, monkeypatch):
    folder, pages = run(iterations=2), []

    def sleep(seconds):
        pages.append(data_of(folder / "report.html")[0]["reload"])
        if len(pages) == 2:
            (folder / "metrics.jsonl").write_text(lines(METRICS, METRICS | {"iteration": 1}))

    monkeypatch.setattr(time, "sleep", sleep)
    call(folder, "--watch")
    assert pages == [report.EVERY, report.EVERY]
    assert data_of(folder / "report.html")[0]["reload"] == 0  # the last page stays as it is


def test_a_page_whose_watch_is_stopped_does_not_load_itself_any_more(run, call, monkeypatch):
    def sleep(seconds):
        raise KeyboardInterrupt

    folder = run(iterations=2)
    monkeypatch.setattr(time, "sleep", sleep)
    call(folder, "--watch")
    assert data_of(folder / "report.html")[0]["reload"] == 0


# ---- the page in a browser -------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the page is tried with playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"the page is tried in one of {', '.join(BROWSERS)}: none is here")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def show(browser):
    """-> what opens the report of some runs. No script of it may fail, and nothing may be fetched."""
    pages, errors = [], []

    def opened(*folders, reload=0, **options):
        path = write_report(*folders, reload=reload)
        page = browser.new_page(**options)
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda asked: None if asked.url.startswith("file:") else errors.append(asked.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert errors == []


def shown(page) -> list[str]:
    return page.locator(".episode .task").all_inner_texts()


def test_episodes_are_filtered_and_sorted(run, show):
    fridge = a_step(0.2, -0.2, -0.2, skill="open the FRIDGE")
    episodes = (
        an_episode(a_step(0.5), task="pen", task_type="pick", iteration=0),
        an_episode(a_step(-4.0), task="egg", task_type="cool", iteration=1, success=False),
        an_episode(fridge, task="mug", task_type="cool", iteration=2),
    )
    page = show(run(*episodes))
    assert shown(page) == ["egg", "pen", "mug"]  # by the largest |A_skill|
    page.select_option("[name=sort]", "sum")
    assert shown(page) == ["egg", "mug", "pen"]
    page.select_option("[name=sort]", "newest")
    assert shown(page) == ["mug", "egg", "pen"]
    page.select_option("[name=type]", "cool")
    assert shown(page) == ["mug", "egg"]
    page.select_option("[name=outcome]", "won")
    assert shown(page) == ["mug"] and "1 of 3 episodes" in page.inner_text(".choices")
    page.select_option("[name=outcome]", "")
    page.select_option("[name=iteration]", "1")
    assert shown(page) == ["egg"]
    page.select_option("[name=iteration]", "")
    page.fill("[name=text]", "fridge")
    assert shown(page) == ["mug"]
    page.fill("[name=text]", "no such word")
    assert shown(page) == []


def test_the_address_keeps_what_the_reader_chose(run, show):
    page = show(run(an_episode(a_step(1.0), task="pen"), an_episode(a_step(2.0), task="egg", success=False)))
    page.select_option("[name=outcome]", "won")
    page.locator(".episode summary").first.click()
    page.locator(".inside").wait_for()
    page.reload()
    assert shown(page) == ["pen"] and page.input_value("[name=outcome]") == "won"
    assert page.locator(".episode[open]").count() == 1


def test_one_episode_says_which_step_was_at_fault_and_what_the_skill_changed(run, show):
    plain = a_step(0.01, -0.02, level="episode", skill="in order")
    blamed = a_step(0.0, -4.0, skill="open it first")
    page = show(run(an_episode(plain, blamed, plain, success=False)))
    (verdict,) = page.locator(".verdict").all_inner_texts()
    assert verdict == (
        "Blamed most: step 1. It answered take pen 1. The step skill “open it first” moved it 4.0 nats away from b: "
        "61% likely when sampled, 1.1% under the skill. There A is +0.60; the outcome alone gives +1.00."
    )
    body = page.locator(".inside")
    assert body.locator(".number .badge").all_inner_texts() == ["EP", "STEP", "EP"]
    assert body.get_by_text("in order").count() == 1  # the skill of all steps, once
    assert body.locator(".step").nth(0).locator(".words").inner_text().startswith("The episode skill hardly moved")
    assert "key-blame" in body.locator(".step").nth(1).get_attribute("class")


def test_one_scale_colours_the_whole_page(run, show):
    """A shift of a few hundredths of a nat has no colour, whatever else its episode holds."""
    page = show(run(an_episode(a_step(0.05, 0.1, 0.4, 1.0, 9.0)), an_episode(a_step(-0.05, -0.2, -0.5, -5.0, None))))
    page.locator(".episode:not([open]) summary").click()
    page.locator(".token").nth(9).wait_for()  # what opens is drawn after the click
    found = [token.get_attribute("class").split()[1:] for token in page.locator(".token").all()]
    levels = [[name for name in names if name != "spaced"] for names in found]
    assert levels[:5] == [[], ["praise-1"], ["praise-2"], ["praise-3"], ["praise-4"]]
    assert levels[5:] == [[], ["blame-1"], ["blame-2"], ["blame-4"], ["unscored"]]


def test_a_tokens_numbers_are_read_by_pointer_and_by_keyboard(run, show):
    page = show(run(an_episode(a_step(-1.5, None), a_step(0.7, ratios=[None], clipped=[None]))))
    numbers = page.locator("#numbers")
    assert numbers.is_hidden()
    page.locator(".token").first.hover()
    text = numbers.inner_text()
    for words in ("log π_old(y | h)\t−0.500\t61%", "step skill\t−2.000\t14%", "A_skill\t−1.500", "A_ep\t+1.000"):
        assert words in text
    assert "A\t+0.850" in text and "r at its last gradient step\t1.500\tclipped" in text
    page.mouse.move(0, 0)
    assert numbers.is_hidden()
    page.locator(".episode summary").first.focus()
    page.keyboard.press("Tab")
    assert "A_skill\t−1.500" in numbers.inner_text()
    page.keyboard.press("ArrowRight")
    assert "A_skill\tnot scored" in numbers.inner_text()
    page.keyboard.press("ArrowRight")  # into the next step
    assert "A_skill\t+0.700" in numbers.inner_text() and "in none" in numbers.inner_text()
    page.keyboard.press("Escape")
    assert numbers.is_hidden()


def test_h_and_h_hat_side_by_side(run, show):
    first = a_step(1.0, prompt="task: pen 😀 go!", skill_prompts={"episode": [11, 0, " hint take"]})
    second = a_step(1.0, kept=12, prompt="stay!", skill_prompts={"step": [12, 4, "leave"]})
    page = show(run(an_episode(first, second)))
    for at in (0, 1):
        page.locator(".contexts summary").nth(at).click()
    texts = page.locator(".sides pre").all_inner_texts()
    assert texts == ["task: pen 😀‸ go!", "task: pen 😀 hint take go!", "task: pen 😀 stay!", "task: pen 😀 leave!"]
    assert page.locator("ins").all_inner_texts() == [" hint take", "leave"]
    assert page.locator("del").all_inner_texts() == ["stay"]


def test_text_from_outside_is_shown_and_never_run(run, show):
    hostile = '</script><img src=x onerror="window.ran = 1"><script>window.ran = 1</script>\'"`${1}'
    step = a_step(2.0, observation=hostile, prompt=hostile, response=hostile, action=hostile, tokens=[hostile])
    step |= {"skill_prompts": {"step": [1, 0, hostile]}, "route": [{"level": hostile, "text": hostile}]}
    skills = {"summary": hostile, "episode": hostile, "steps": {"0": hostile}}
    folder = run(an_episode(step, task=hostile, task_type=hostile, skills=skills), model=hostile, env=hostile)
    counts = {"valid_seen": {hostile: [1, 2], "other": [1, 2], "All": [2, 4]}}
    (folder / "evaluations.jsonl").write_text(lines(HELD_OUT | {"counts": counts}))
    page = show(folder)
    page.locator(".contexts summary").click()
    page.locator(".token").hover()
    page.evaluate("new Promise(requestAnimationFrame)")
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0
    for place in (".seen", ".task", ".token", ".facts", ".sides ins", "#numbers code", ".skill >> nth=0"):
        assert hostile in page.locator(place).inner_text()


def test_five_thousand_episodes_are_drawn_as_they_are_scrolled_to(run, show):
    page = show(run(*[an_episode(*[a_step(0.1, 0.2)] * 8, iteration=i // 31) for i in range(5000)]))
    rows = page.locator(".episode")
    assert "5,000 of 5,000 episodes" in page.inner_text(".choices")
    first = rows.count()
    assert 10 < first < 100
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    page.locator(".end").scroll_into_view_if_needed()
    page.wait_for_function(f"document.querySelectorAll('.episode').length > {first}")
    page.fill("[name=text]", "pen")  # what the filter drops leaves the page
    assert rows.count() <= first + 30


def test_two_runs_lie_over_one_another(run, show):
    one = run(an_episode(a_step(1.0), task="of one"))
    other = run(an_episode(a_step(2.0), task="of the other"), name="other", seed=1, skill_prefill="{")
    page = show(one, other)
    assert page.inner_text("#differ") == "Settings that differ: --seed, --skill-prefill."
    table = page.locator(".beside tr").all_inner_texts()
    assert table[0].split() == ["--seed", "--skill-prefill"]
    assert [line.split() for line in table[1:]] == [["run", "0", "not", "there"], ["other", "1", "{"]]
    for hue in (0, 1):
        assert page.locator(f".chart.large circle.series-{hue}").count() == 1  # valid_seen of each
    assert shown(page) == ["of the other", "of one"]
    page.select_option("[name=run]", "0")
    assert shown(page) == ["of one"]


def test_a_curve_has_the_wilson_interval_that_evaluate_prints(run, show):
    page = show(run())
    chart = page.locator(".chart.large svg").first
    chart.focus()
    page.keyboard.press("ArrowRight")
    text = page.inner_text(".chart.large output")
    assert text == "after iteration 1: valid_seen 25% [4.6%, 70%] of 4, train 50%"  # evaluate.wilson(1, 4)


def test_an_old_run_without_counts_has_curves_without_intervals(run, show):
    folder, (step,) = run(), [a_step(-2.0)]
    for name in ("kept", "skill_prompts", "skill_logprobs", "outcome_advantage", "ratios", "clipped"):
        del step[name]
    (folder / "evaluations.jsonl").write_text(lines({"iteration": 0, "success": {"valid_seen": 0.25}}))
    (folder / "samples.jsonl").write_text(lines(an_episode(step)))
    page = show(folder)
    assert page.locator(".chart.large circle").count() == 1 and page.locator("path.band").count() == 0
    assert "No intervals: counts of games are not stored here." in page.inner_text("#curves")
    assert "61% likely when sampled, 8.2% under the skill" in page.inner_text(".verdict")
    page.locator(".contexts summary").click()
    assert page.locator(".sides pre").all_inner_texts() == ["task: pen. go!"]


def test_a_half_written_run_says_what_is_missing(run, show):
    folder = run(an_episode())
    (folder / "samples.jsonl").write_text('{"iteration": 0, "ta')
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (folder / name).unlink()
    page = show(folder)
    said = page.locator(".missing").all_inner_texts()
    assert said[:2] == ["run: no iteration has ended yet.", "run: no evaluation yet."]
    assert said[2].startswith("No episode has been sampled yet")
    (folder / "samples.jsonl").unlink()
    (folder / "metrics.jsonl").write_text(lines(METRICS))
    assert show(folder).locator(".missing").all_inner_texts() == said[1:]
    (folder / "samples.jsonl").write_text(lines(an_episode(skills=None)))
    (folder / "config.json").unlink()
    page = show(folder)
    assert "config.json is missing" in page.inner_text(".facts") and "No skills" in page.inner_text(".inside")


def test_a_page_of_a_run_that_is_alive_loads_itself_anew(run, show):
    folder = run(an_episode(a_step(1.0), task="pen"), an_episode(a_step(1.0), task="egg", success=False))
    page = show(folder, reload=1)
    page.select_option("[name=outcome]", "won")
    page.evaluate("window.old = true")
    page.wait_for_function("window.old === undefined && document.querySelector('.episode')")
    assert shown(page) == ["pen"]
    page.locator(".live button").click()
    page.evaluate("window.old = true")
    page.wait_for_timeout(1500)
    assert page.evaluate("window.old") is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_both_schemes(scheme, run, show):
    wide = a_step(*[0.5] * 8, observation="word" * 99, prompt="word" * 99, tokens=["token" * 9] * 8)
    folders = [run(an_episode(wide, task="task" * 40), name=name * 20, seed=i) for i, name in enumerate("ab")]
    page = show(*folders, color_scheme=scheme, viewport={"width": 390, "height": 844})
    page.locator(".contexts summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 600) == (scheme == "light")
