"""Imports point one way. The only test about how the code is laid out."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("data", "envs router advantage", "lm", "rollout skills rescore", "tiny", "baselines", "config")
LAYERS += ("evaluate runlog", "train", "tools", "lab")
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts.split()}


def imported(path: Path) -> list[Path]:
    """The project's own files that a file imports, in functions too. `if TYPE_CHECKING` imports nothing at run time:
    names of types may point up."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
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


def test_imports_point_one_way():
    files = [path for part in LEVEL for path in [*ROOT.glob(f"{part}.py"), *ROOT.glob(f"{part}/**/*.py")]]
    graph = {path: imported(path) for path in files}
    assert {part_of(path) for path in ROOT.glob("*.py")} <= LEVEL.keys()
    for path, others in graph.items():
        for other in others:
            a, b = part_of(path), part_of(other)
            assert a == b or LEVEL[b] < LEVEL[a], f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
    assert sum(map(len, graph.values())) > 100  # it did find imports
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the files of a circle
