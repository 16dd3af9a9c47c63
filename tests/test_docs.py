"""README.md and docs/ name only what there is: links, files, functions, flags, commands; and the walkthrough runs, with
the numbers that its text quotes."""

import importlib
import importlib.util
import json
import re
import shlex
import tempfile
from pathlib import Path

import pytest

import data
from config import every_setting, flag, parse_args
from tiny.coldstart import ColdStart
from tools import walkthrough

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
DOCS += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "lab").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)|!\[([^\]]*)\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w./-]+\.(?:py|md|toml)")
DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+)(?:\(.*\))?")
SUFFIXES = {
    "py",
    "md",
    "toml",
    "json",
    "jsonl",
    "png",
    "html",
    "txt",
    "sh",
    "pt",
    "tw",
    "yaml",
    "xlsx",
    "gz",
    "safetensors",
    "lock",
    "cff",
}
CONFIG_FLAGS = {flag(name) for name in every_setting()} | {"--recipe", "--help"}
CONFIG_FLAGS |= {"--no-" + name[2:] for name in CONFIG_FLAGS}


OTHERS = ("agent_system/", "opid/", "verl/", "gigpo/", "examples/")  # folders of the authors' release

# What stored runs were made with.
OLD_SETTINGS = json.loads((ROOT / "lab" / "experiments" / "old_settings.json").read_text())["defaults"]
OLD_FLAGS = {
    page: {flag(name) for name in OLD_SETTINGS}
    for page in ("CHANGELOG.md", "lab/README.md", "docs/results.md", "docs/methods.md")
}


def prose(text: str) -> str:
    return FENCE.sub("", text)


def added(text: str) -> str:
    """The lines that the diffs of a page add: what they bring need not be in the code."""
    return "\n".join(re.findall(r"^\+(.*)$", text, re.MULTILINE))


def inline(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """The words of every command that runs a Python script of the project, in shell blocks and inline code."""
    blocks = [body for language, body in FENCE.findall(text) if language in ("bash", "sh")]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()] + inline(text)
    found, values = [], {}
    for line in lines:
        line = re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), line)
        if assignment := re.fullmatch(r"(\w+)=\"(.*)\"", line):
            values[assignment[1]] = assignment[2]
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # not a command: an apostrophe
            continue
        if words[:1] == ["make"]:
            given = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
            words = ["train.py", *" ".join(given).split()] if words[1:2] == ["train"] else []
        start = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if start is not None and (ROOT / words[start]).is_file() and len(words) > start:
            found.append(words[start:])
    return found


def flags_of(script: Path) -> set[str]:
    source = script.read_text()
    own = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source)) | {"--help", "--"}
    own |= {flag(name) for name in ColdStart.__dataclass_fields__} if "fields(ColdStart)" in source else set()
    own |= {"--no-" + name[2:] for name in own}
    passes_on = re.search(r"from config import .*\b(parse_args|parser_of)\b", source) or "train.py" in source
    return own | CONFIG_FLAGS if passes_on else own


def every_flag() -> set[str]:
    scripts = list(ROOT.glob("*.py"))
    scripts += [path for folder in ("tools", "lab", "envs") for path in (ROOT / folder).rglob("*.py")]
    return CONFIG_FLAGS.union(*map(flags_of, scripts))


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for _, link, _, image in LINK.findall(prose(TEXTS[name])):
        target, _, anchor = (link or image).partition("#")
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(path), f"{name}: {target}#{anchor}"


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_functions_exist(name):
    made = added(TEXTS[name])
    missing = []
    for code in inline(TEXTS[name]):
        if code.startswith(OTHERS) or "NAME" in code:
            continue
        elif FILE.fullmatch(code):
            known = (ROOT / code).exists() or ((ROOT / name).parent / code).exists() or f"b/{code}" in made
            known = known or ("/" not in code and any((ROOT / "lab").rglob(code)))
        elif (dotted := DOTTED.fullmatch(code)) and dotted[1].rpartition(".")[2] not in SUFFIXES:
            known = resolves(dotted[1]) or dotted[1] in made
        else:
            continue
        missing += [] if known else [code]
    assert not missing


def resolves(dotted: str) -> bool:
    """Whether a name such as `lm.sampler.Sampler`, `Step.context` or `torch.matmul` stands for something."""
    first, *rest = dotted.split(".")
    if hasattr(data, first):
        thing = getattr(data, first)
    elif importlib.util.find_spec(first):
        thing = importlib.import_module(first)
    else:
        return False
    for part in rest:
        if part in getattr(thing, "__dataclass_fields__", {}):
            return part == rest[-1]
        if not hasattr(thing, part):
            if isinstance(thing, type) or not importlib.util.find_spec(f"{thing.__name__}.{part}"):
                return False
            importlib.import_module(f"{thing.__name__}.{part}")
        thing = getattr(thing, part)
    return True


@pytest.mark.parametrize("name", TEXTS)
def test_a_function_is_in_the_file_that_its_link_opens(name):
    for text, target, _, _ in LINK.findall(prose(TEXTS[name])):
        if target.endswith(".py") and (dotted := DOTTED.fullmatch(text.strip("`"))) and not FILE.fullmatch(dotted[0]):
            module = ".".join(((ROOT / name).parent / target).resolve().relative_to(ROOT).with_suffix("").parts)
            function = dotted[1].removeprefix(f"{module}.")
            assert function != dotted[1], f"{name}: {text} is not in {target}"
            last = function.rpartition(".")[2]
            source = (ROOT / name).parent.joinpath(target).read_text()
            assert re.search(rf"^\s*(def|class) {last}\b", source, re.MULTILINE), f"{name}: {text} is not in {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_flags_exist(name):
    known, missing, made = every_flag() | OLD_FLAGS.get(name, set()), [], added(TEXTS[name])
    for script, *words in commands(TEXTS[name]):
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        unknown = flags - flags_of(ROOT / script)
        missing += [f"{script} {word}" for word in unknown if word[2:].replace("-", "_") not in made]
    for code in inline(TEXTS[name]):
        word = code.split()[0].partition("=")[0]
        if word.startswith("--") and word not in known and word[2:].replace("-", "_") not in made:
            missing.append(code)
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_commands_of_a_run_are_accepted(name):
    """But for those that only hold after a diff on the page, which test_forking.py runs."""
    for script, *words in commands(TEXTS[name]):
        stands_for = any(word.isupper() or word == "..." for word in words)
        if script == "train.py" and "--help" not in words and not (stands_for or added(TEXTS[name])):
            parse_args(words)


def test_readme_counts_lines_right():
    """Of the seven files, give or take a few, and their sum; and it is short itself."""
    readme = TEXTS["README.md"]
    counts = {name: int(count) for name, count in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.MULTILINE)}
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in counts}
    assert len(counts) == 7 and all(abs(counts[name] - lines[name]) <= 10 for name in counts), lines
    assert f"{sum(counts.values())} lines of plain PyTorch" in readme
    assert len(readme.splitlines()) <= 150


def test_docs_holds_the_pages_of_those_who_use_it():
    pages = {"coldstart", "differences", "environments", "flags", "forking", "gpu", "methods", "metrics", "results"}
    names = {f"{page}.md" for page in pages | {"walkthrough"}} | {"walkthrough.ipynb"}
    assert {path.name for path in (ROOT / "docs").iterdir()} == names


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_every_pinned_package_has_its_licence_in_the_table(file):
    table = TEXTS["docs/environments.md"].partition("\n## Licences\n")[2]
    named = {name for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for name in row.split(", ")}
    pinned = re.findall(r"^([\w.-]+)(?:\[\w+\])?==", (ROOT / file).read_text(), re.MULTILINE)
    assert len(pinned) > 8 and set(pinned) <= named


@pytest.mark.parametrize("name", TEXTS)
def test_lines_are_short(name):
    """But for tables, and what is printed or shown as code."""
    assert [line for line in prose(TEXTS[name]).splitlines() if len(line) > 120 and not line.startswith("|")] == []


# ---- the walkthrough -------------------------------------------------------------------------------------------------

PAGE = TEXTS["docs/walkthrough.md"]
NOTEBOOK = walkthrough.NOTEBOOK.read_text()
VERSION = re.compile(r" +jupytext_version: .*\n")


def cells(notebook: dict) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def outputs(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def printed(notebook: dict) -> str:
    return "".join("".join(output["text"]) for output in outputs(notebook) if output["output_type"] == "stream")


def test_the_notebook_has_the_text_of_its_page_and_nothing_of_the_machine_that_ran_it():
    """Where this fails: python tools/walkthrough.py."""
    jupytext = pytest.importorskip("jupytext", reason="the notebook is made by jupytext")
    assert cells(json.loads(NOTEBOOK)) == cells(jupytext.reads(PAGE, fmt="md"))
    back = jupytext.writes(jupytext.reads(NOTEBOOK, fmt="ipynb"), fmt="md")
    assert VERSION.sub("", back) == VERSION.sub("", PAGE)
    for word in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "stderr", "iopub", "Traceback"):
        assert word not in NOTEBOOK


def test_the_notebook_runs_and_prints_what_it_shows():
    """Where this fails: python tools/walkthrough.py."""
    for package in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"a notebook is run by {package}")
    fresh, kept = walkthrough.executed(PAGE), json.loads(NOTEBOOK)
    assert printed(fresh) == printed(kept)
    assert [sorted(output) for output in outputs(fresh)] == [sorted(output) for output in outputs(kept)]
    assert sum("image/png" in output.get("data", {}) for output in outputs(fresh)) == 2


def test_the_numbers_of_the_text_are_those_of_the_notebook():
    shown = printed(json.loads(NOTEBOOK))
    numbers = [abs(float(number)) for number in re.findall(r"\d+\.\d+", shown)]
    by_hand = "".join(body for language, body in FENCE.findall(PAGE) if language == "text")
    said = prose(re.sub(r"<!--.*?-->", "", PAGE, flags=re.DOTALL)) + by_hand
    said += TEXTS["README.md"].partition("## One step, in numbers")[2].partition("\n## ")[0]
    quoted = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", said)) - {"0.9"}  # million weights
    assert len(quoted) > 8
    for number in quoted:
        rounding = 0.501 * 10 ** -len(number.partition(".")[2])
        assert any(abs(float(number) - other) <= rounding for other in numbers), number


def test_the_notebook_adds_both_advantages_up():
    table = printed(json.loads(NOTEBOOK)).partition("λ A_skill")[2].partition("steps,")[0]
    rows = [line.split() for line in table.splitlines() if len(line.split()) == 4]
    assert len(rows) == 5 and all(abs(float(a) + float(b) - float(c)) < 2e-3 for _, a, b, c in rows)


def test_every_estimate_of_the_results_is_one_of_a_report():
    """Each "mean [low, high]" of the page stands in a table that compare.py or skill_signal.py wrote."""
    estimate = re.compile(r"-?\d[\d.]*(?: points)? \[-?[\d.]+, -?[\d.]+\]")
    page = re.sub(r"\s+", " ", TEXTS["docs/results.md"].replace("−", "-"))
    reports = " ".join(path.read_text() for path in (ROOT / "lab/results").glob("*.md")).replace(" | [", " [")
    told = [found.replace(" points", "") for found in estimate.findall(page)]
    assert len(told) > 40
    assert [found for found in told if found not in reports] == []


def test_how_many_runs_search_twice_is_counted_in_the_report():
    """Of the first table's arms: runs that solve a tenth or more of the questions with two searches."""
    report = (ROOT / "lab/results/search-replicated.md").read_text().partition("| 2-hop of each run, % |")[2]
    runs = {cells[0]: cells[1:] for cells in cells_of(report.partition("\n\n")[0])}
    page = TEXTS["docs/results.md"].partition("| twice |")[2].partition("\n\n")[0]
    told = {cells[0].strip("`"): cells[3] for cells in cells_of(page) if cells[0].startswith("`")}
    assert len(told) == 7
    for arm, count in told.items():
        shares = [float(share) for cell in runs[arm] if cell != "-" for share in cell.split(" / ")]
        assert count == f"{sum(share >= 10 for share in shares)} of {len(shares)}", arm


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
