"""What the package promises at import: every public name exists, nothing is compiled, and nothing heavy is loaded."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import posemap_fast

SCRIPTS = {"__main__"}  # modules that act when imported
MODULES = [
    info.name
    for info in pkgutil.walk_packages(posemap_fast.__path__, "posemap_fast.")
    if info.name.split(".")[-1] not in SCRIPTS
]


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter started outside the checkout, with the package on its path."""
    root = str(Path(posemap_fast.__file__).resolve().parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, **environment},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_resolves_and_is_listed_once(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert [n for n in public if not hasattr(module, n)] == []
    assert len(public) == len(set(public))


@pytest.mark.parametrize("name", [n for n in MODULES if not n.split(".")[-1].startswith("_")])
def test_every_public_module_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{module.__file__} needs a docstring"


def test_importing_the_package_stays_light() -> None:
    code = "import sys, posemap_fast; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = run_python(code)
    for heavy in ("torch", "numpy", "cv2", "matplotlib", "yaml", "rich"):
        assert f"'{heavy}'" not in loaded, heavy


def test_importing_everything_compiles_nothing_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """No compiler can be found, every start of a program but matplotlib's font list fails, the cache stays empty."""
    names = [name for name in MODULES if not name.endswith("_cli")]
    code = f"""
import importlib, os, subprocess, torch

def refuse(*args, **kwargs):
    if "fc-list" in args[-1]:
        raise FileNotFoundError("fc-list")
    raise AssertionError(f"import starts a program: {{args[-1]}}")

before = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item())
subprocess.Popen.__init__ = refuse
os.system = refuse
for name in {names!r}:
    importlib.import_module(name)
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item())
assert before == after, (before, after)
print("fine")
"""
    assert run_python(code, PMF_CACHE_DIR=str(tmp_path), PATH="/nonexistent").strip() == "fine"
    assert list(tmp_path.iterdir()) == []


def test_importing_everything_draws_no_display_and_picks_no_backend() -> None:
    code = "import sys, posemap_fast.eval; print('matplotlib.pyplot' in sys.modules)"
    assert run_python(code).strip() == "False"
