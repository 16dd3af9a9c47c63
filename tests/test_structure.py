"""How the code is laid out: imports point one way, and what a reader meets stays small."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import torch

import train as train_module
from config import variant_of
from runlog.start import start
from tests.settings import laptop

ROOT = Path(__file__).parent.parent
LAYERS = ("data", "envs router advantage", "lm", "rollout skills rescore", "tiny", "config", "evaluate memory")
LAYERS += ("runlog", "train", "variants", "tools", "lab")
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts.split()}
SEVEN = [ROOT / f"{name}.py" for name in ("data", "advantage", "router", "rescore", "skills", "rollout", "train")]
LM = sorted((ROOT / "lm").glob("*.py"))


def imported(path: Path, *, types: bool = False) -> list[Path]:
    """The project's own files that a file imports, in functions too. `if TYPE_CHECKING` imports nothing at run time:
    names of types may point up, and are left out unless `types`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            node.body = []
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{a.name}" for a in node.names]
            names += [part if file_of(part) else node.module for part in parts]
    return [found for name in names if (found := file_of(name)) not in (None, path)]


def file_of(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def files_of(*parts: str) -> list[Path]:
    return [path for part in parts for path in [*ROOT.glob(f"{part}.py"), *ROOT.glob(f"{part}/**/*.py")]]


def test_imports_point_one_way():
    graph = {path: imported(path) for path in files_of(*LEVEL)}
    assert {part_of(path) for path in ROOT.glob("*.py")} <= LEVEL.keys()
    for path, others in graph.items():
        for other in others:
            a, b = part_of(path), part_of(other)
            assert a == b or LEVEL[b] < LEVEL[a], f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
    assert sum(map(len, graph.values())) > 100  # it did find imports
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the files of a circle


def test_the_core_knows_no_variant_and_its_arithmetic_neither_model_nor_config():
    for path in SEVEN:
        assert "variants" not in map(part_of, imported(path, types=True)), path.name
    assert imported(ROOT / "advantage.py", types=True) == []
    assert set(imported(ROOT / "router.py", types=True)) == {ROOT / "data.py"}
    assert "torch" not in (ROOT / "router.py").read_text()


def test_the_seven_files_can_be_read_in_one_sitting():
    lines = {path.name: len(path.read_text().splitlines()) for path in SEVEN}
    assert sum(lines.values()) <= 850, lines
    assert lines["train.py"] <= 260
    assert len(list(ROOT.glob("*.py"))) <= 9  # the seven, config.py and evaluate.py


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def test_functions_are_short_and_take_few_parameters():
    for path, most in [*dict.fromkeys(SEVEN, 7).items(), *dict.fromkeys(LM, 8).items()]:
        for function in functions(path):
            given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
            where = f"{path.relative_to(ROOT)}: {function.name}"
            assert len(names) <= most, where
            assert function.end_lineno - function.lineno < 60, where


def test_no_dictionary_is_splatted_into_a_call_of_the_projects_own():
    """A name that is handed on can be found with grep. What a library's model or client is given is the exception."""
    own = {node.name for path in files_of(*LEVEL) for node in ast.walk(ast.parse(path.read_text())) if named(node)}
    found = []
    for path in SEVEN + LM:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and any(keyword.arg is None for keyword in call.keywords):
                called = ast.unparse(call.func).split(".")
                found.append(called[-1])
                assert called[-1] not in own or {"model", "client"} & set(called), (
                    f"{path.relative_to(ROOT)}: {ast.unparse(call)}"
                )
    assert "model" in found  # it did find some


def named(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_lint_passes():
    """What `make lint` runs, of the environment that runs the tests."""
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    places = {"$(BIN)": str(Path(sys.executable).parent), "$(VENV)": sys.prefix}
    tools = []
    for line in recipe.splitlines():
        program, *given = (re.sub(r"\$\(\w+\)", lambda name: places[name[0]], word) for word in line.split())
        tools.append(Path(program).name)
        done = subprocess.run([program, *given], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{line.strip()}\n{done.stdout}{done.stderr}"
    assert tools == ["ruff", "ruff", "ty"]


# ---- what is installed -----------------------------------------------------------------------------------------------

PIN = re.compile(r"^([\w.-]+)(?:\[\w+\])?==([^\s;]+)", re.MULTILINE)
CUDA = ("torch", "triton", "nvidia-", "cuda-")


def pins(file: str) -> dict[str, str]:
    """-> versions that a file names, by package."""
    return {normal(name): version for name, version in PIN.findall((ROOT / file).read_text())}


def normal(name: str) -> str:
    """A package's name as PyPI and the locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("lock", "files"),
    [
        ("requirements.lock", ["requirements.txt"]),
        ("requirements-dev.lock", ["requirements.txt", "requirements-dev.txt", "requirements.lock"]),
    ],
)
def test_a_lock_holds_every_pin_at_its_version(lock, files):
    """Where this fails: `make lock`."""
    locked, wanted = pins(lock), {name: version for file in files for name, version in pins(file).items()}
    assert len(wanted) > 10 and wanted.pop("torch")
    assert {name: locked.get(name) for name in wanted} == wanted
    assert [name for name in locked if name.startswith(CUDA)] == []


def test_the_weights_that_make_names_are_locked():
    name, version = re.search(r"^SMOLLM2 := (\S+)==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).groups()
    assert pins("requirements-dev.lock")[name] == version


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_everything_in_a_lock_has_hashes(lock):
    text = (ROOT / lock).read_text()
    entries = re.findall(r"^\S+==.*(?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?$)+", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\S*==", text, re.MULTILINE)) > 50
    assert re.findall(r"^(?![\w#]|    # |    --hash=).+", text, re.MULTILINE) == []  # no index or folder of one machine


def test_the_core_imports_what_its_lock_installs_and_the_rest_what_the_tests_install():
    """Packages that a file imports when it is read, and those that a function imports once it needs them."""
    core, everything = {*pins("requirements.lock"), "torch"}, {*pins("requirements-dev.lock"), "torch"}
    providers, seen = packages_distributions(), set()
    for path in files_of(*LEVEL.keys() - {"lab"}):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            for name in packages(node) - sys.stdlib_module_names:
                if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists():
                    allowed = core if node in tree.body else everything
                    assert allowed & {normal(provider) for provider in providers.get(name, [])}, f"{path}: {name}"
                    seen.add(name)
    assert {"transformers", "Stemmer", "peft"} <= seen  # it did find imports


def packages(node: ast.AST) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) else []
    return {name.partition(".")[0] for name in names}


def test_the_lock_knows_what_torch_needs_beside_cuda():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["dependency-metadata"]
    needs = [need for need in requires("torch") if "extra ==" not in need and not need.startswith(CUDA)]
    assert {"name": "torch", "requires-dist": needs} in told


# ---- counted in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[dict[str, list[str]], set[str]]:
    """-> the longest way from `train` to `log_softmax`, by "update" and "rescore", and the files that run from routing
    to the first optimizer step. Of one small iteration, with skills of both levels."""
    folder = tmp_path_factory.mktemp("traced")
    settings = {"tasks": 4, "rollouts": 4, "max_steps": 8, "iterations": 1, "eval_every": 0, "eval_games": 1}
    run = start(laptop(**settings, out=str(folder), seed=3))
    ways, files, before = {}, set(), sys.gettrace()
    log_softmax, route, step = torch.log_softmax, train_module.route, torch.optim.AdamW.step

    def own(name: str) -> bool:
        return Path(name).is_relative_to(ROOT) and ".venv" not in name and not Path(name).is_relative_to(ROOT / "tests")

    def watched(*args, **options):
        frame, names = sys._getframe(1), []
        while frame is not None and frame.f_code is not train_module.train.__code__:
            names += [frame.f_code.co_name] if own(frame.f_code.co_filename) else []
            frame = frame.f_back
        for phase in {"update", "rescore"} & set(names):
            ways[phase] = max(ways.get(phase, []), names[::-1], key=len)
        return log_softmax(*args, **options)

    def tracer(frame, event, argument):
        if own(frame.f_code.co_filename):
            files.add(Path(frame.f_code.co_filename).relative_to(ROOT).as_posix())

    def from_here(*args):
        sys.settrace(tracer)
        return route(*args)

    def up_to_here(*args, **options):
        sys.settrace(before)
        return step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "log_softmax", watched)
        patch.setattr(train_module, "route", from_here)
        patch.setattr(torch.optim.AdamW, "step", up_to_here)
        try:
            train_module.train(run, variant_of("opid"))
        finally:
            sys.settrace(before)
    shutil.rmtree(folder)
    return ways, files


def test_few_frames_lie_between_train_and_log_softmax(traced):
    """Neither `train` itself is counted, nor the function that calls `log_softmax`."""
    ways, _ = traced
    between = {phase: names[:-1] for phase, names in ways.items()}
    assert len(between["update"]) <= 4, between
    assert len(between["rescore"]) <= 5, between
    assert {names[-1] for names in ways.values()} == {"chosen_logprobs"}


def test_few_files_run_from_routing_to_the_first_optimizer_step(traced):
    _, files = traced
    assert {"router.py", "rescore.py", "advantage.py", "train.py", "lm/scoring.py"} <= files
    assert len(files) <= 10, files
