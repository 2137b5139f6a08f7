"""Imports go down the ranks only; read from the source with `ast`, so no module needs to be importable.

Rank 0 is the foundation, `errors` below it; a module may import lower ranks and its own package. Packages of equal
rank do not know each other. An import inside a function counts like any other; one under `if TYPE_CHECKING` keeps to
the ranks too, but makes no circle, because it never runs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "posemap_fast"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

RANKS = {  # first part of the module's name below the package -> rank
    "errors": -1,
    **dict.fromkeys(["registry", "checks", "seeding", "files", "resources", "progress", "optional"], 0),
    **dict.fromkeys(["geometry", "config"], 1),
    "ops": 2,
    **dict.fromkeys(["fields", "render", "apr", "losses", "data", "backends"], 3),
    **dict.fromkeys(["train", "localize", "eval"], 4),
    **dict.fromkeys(
        [
            "environment",
            "experiment",
            "run_dir",
            "results",
            "refinement",
            "pipeline",
            "stages",
            "ablation",
            "ablation_results",
            "suite",
        ],
        5,
    ),
    "commands": 6,
    **dict.fromkeys(["cli", "bench"], 7),
}
SINGLE_MODULE_RANKS = {0, 5}  # their modules may know each other; the test for circles watches them
LOWEST_THIRD_PARTY = {"torch", "rich", "safetensors"}  # what ranks below 1 may need besides the standard library


def module_name(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


class RunningCode(ast.NodeTransformer):
    """Drops the bodies of `if TYPE_CHECKING`."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else node


def imported_names(source: str, module: str, is_package: bool, running: bool = False) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that `module` imports; `from a import b` is a.b if that is a module, else a."""
    tree: ast.AST = ast.parse(source)
    for node in ast.walk(RunningCode().visit(tree) if running else tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".") if is_package else module.split(".")[:-1]
            parts = parent[: len(parent) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base


def imports_of(module: str, running: bool = False) -> list[tuple[int, str]]:
    path = MODULES[module]
    return list(imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", running))


def part_of(module: str) -> str:
    """`posemap_fast.ops.march` -> `ops`; the package itself -> ``."""
    return module.split(".")[1] if "." in module else ""


def violation(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`, or None."""
    own, other = part_of(importer), part_of(imported)
    if own == other or other == "":  # its own package; the bare package holds nothing but its version
        return None
    if RANKS[other] < RANKS[own]:
        return None
    if RANKS[own] == RANKS[other] and RANKS[own] in SINGLE_MODULE_RANKS:
        return None
    return f"{own} (rank {RANKS[own]}) imports {other} (rank {RANKS[other]})"


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_every_module_has_a_rank() -> None:
    unknown = {part_of(module) for module in MODULES} - set(RANKS) - {""}
    assert not unknown, f"give these a rank in {Path(__file__).name}: {sorted(unknown)}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_ranks_only(module: str) -> None:
    found = [
        f"{MODULES[module]}:{line}: {reason}"
        for line, name in imports_of(module)
        if name.split(".")[0] == PACKAGE and (reason := violation(module, name))
    ]
    assert not found, "\n".join(found)


def test_the_package_itself_imports_nothing() -> None:
    assert [name for _, name in imports_of(PACKAGE) if name != "__future__"] == []


@pytest.mark.parametrize("module", [module for module in MODULES if RANKS.get(part_of(module), 9) <= 0])
def test_the_foundation_needs_little(module: str) -> None:
    foreign = {name.split(".")[0] for _, name in imports_of(module)} - {PACKAGE} - set(sys.stdlib_module_names)
    assert foreign <= LOWEST_THIRD_PARTY


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = {m: {name for _, name in imports_of(m, running=True) if name in MODULES} - {m} for m in MODULES}
    assert cycles(edges) == []


def test_every_module_postpones_its_annotations() -> None:
    with_code = [module for module, path in MODULES.items() if path.name != "__init__.py"]
    late = [module for module in with_code if "__future__" not in {name for _, name in imports_of(module)}]
    assert late == []


@pytest.mark.parametrize(
    ("importer", "imported", "is_allowed"),
    [
        ("posemap_fast.ops.march", "posemap_fast.errors", True),
        ("posemap_fast.registry", "posemap_fast.errors", True),
        ("posemap_fast.errors", "posemap_fast.registry", False),
        ("posemap_fast.ops.march", "posemap_fast.ops.reference.march", True),
        ("posemap_fast.ops.march", "posemap_fast.fields", False),
        ("posemap_fast.render.renderer", "posemap_fast.fields.protocol", False),
        ("posemap_fast.eval.report", "posemap_fast.train", False),
        ("posemap_fast.config.load", "posemap_fast.geometry", False),
        ("posemap_fast.cli", "posemap_fast.pipeline", True),
        ("posemap_fast.pipeline", "posemap_fast.cli", False),
        ("posemap_fast.pipeline", "posemap_fast.run_dir", True),
        ("posemap_fast.commands.train", "posemap_fast.pipeline", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, is_allowed: bool) -> None:
    assert (violation(importer, imported) is None) == is_allowed


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import posemap_fast.files\nfrom . import load\nfrom ..errors import X\ndef f():\n    from torch import nn\n"
    )
    names = [name for _, name in imported_names(source, "posemap_fast.config.coerce", is_package=False)]
    assert names == ["posemap_fast.files", "posemap_fast.config.load", "posemap_fast.errors", "torch"]
    names = [name for _, name in imported_names("from .load import diff", "posemap_fast.config", is_package=True)]
    assert names == ["posemap_fast.config.load"]


def test_an_import_for_types_only_is_no_running_code() -> None:
    source = "if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy\n"
    assert [name for _, name in imported_names(source, "posemap_fast.x", False)] == ["torch", "numpy"]
    assert [name for _, name in imported_names(source, "posemap_fast.x", False, running=True)] == ["numpy"]


def test_the_finder_of_circles_finds_one() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
