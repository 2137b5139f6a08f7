"""Finding, building and refusing the native library; what happens without one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posemap_fast.errors import BackendError
from posemap_fast.ops import MLPSpec, _build, _library, backend_name, fused_mlp, use_backend
from posemap_fast.ops.reference.fused_mlp import fused_mlp as reference_mlp
from posemap_fast.resources import resource_dir


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has not looked for a library yet, with an empty cache and nothing built beside the package."""
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path / "package")
    monkeypatch.setenv("PMF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PMF_BACKEND", raising=False)
    _library.cpu_library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    _library.cpu_library.cache_clear()


def mlp() -> tuple[torch.Tensor, torch.Tensor, MLPSpec]:
    spec = MLPSpec((4, 8, 2))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, generator=generator), torch.randn(spec.n_params, generator=generator), spec


def test_without_a_compiler_the_reference_runs_after_one_warning(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    x, params, spec = mlp()
    with caplog.at_level(logging.WARNING, "posemap_fast"):
        results = [fused_mlp(x, params, spec) for _ in range(3)]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "no C++ compiler found" in message and "python -m posemap_fast.ops._build_cli" in message
    assert backend_name() == "reference"
    torch.testing.assert_close(results[0], reference_mlp(x, params, spec.dims))


def test_asking_for_native_kernels_without_a_compiler_is_an_error(fresh, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match=r"native kernels were asked for .* no C\+\+ compiler found"):
        with use_backend("native"):
            fused_mlp(*mlp())


def test_compiler_error_is_quoted(fresh, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(_build.BuildError, match="failed"):
        _build.build_cpu_library(resource_dir("cuda_ext"), fresh / _build.CPU_LIBRARY)
    assert not list(fresh.glob("*.so"))


def test_first_use_builds_into_the_cache_once_and_says_so(fresh, monkeypatch, caplog) -> None:
    source = fresh / "tiny.cpp"
    source.write_text(f'extern "C" int pmf_abi_version() {{ return {_library.ABI_VERSION}; }}\n')
    calls = []

    def build(root: Path, target: Path) -> None:
        calls.append(target)
        compiler = _build.find_compiler()
        if compiler is None:
            pytest.skip("no C++ compiler on this machine")
        _build._run([compiler, "-shared", "-fPIC", str(source), "-o", str(target)])

    monkeypatch.setattr(_build, "build_cpu_library", build)
    with caplog.at_level(logging.WARNING, "posemap_fast"):
        for _ in range(2):
            _library.cpu_library.cache_clear()
            assert _library.cpu_library() is not None
    assert len(calls) == 1 and calls[0].is_file()
    assert [r.getMessage().startswith("built native CPU kernels in") for r in caplog.records] == [True]


def test_library_built_for_other_sources_or_another_processor_is_not_loaded(fresh) -> None:
    native = fresh / "package" / "_native"
    native.mkdir(parents=True)
    (native / _build.CPU_LIBRARY).write_bytes(b"not a library")
    (native / _build.CPU_LIBRARY).with_suffix(".key").write_text("another key")
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_build, "build_cpu_library", lambda root, target: compiled.append(target))
        _library._locate()
    assert compiled


def test_library_of_another_abi_version_is_refused(tmp_path: Path) -> None:
    compiler = _build.find_compiler()
    if compiler is None or shutil.which(compiler) is None:
        pytest.skip("no C++ compiler on this machine")
    source = tmp_path / "old.cpp"
    source.write_text('extern "C" int pmf_abi_version() { return 999; }\n')
    _build._run([compiler, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "old.so")])
    with pytest.raises(BackendError, match=f"ABI version 999, expected {_library.ABI_VERSION}"):
        _library._load(tmp_path / "old.so")


def test_unknown_backend_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("PMF_BACKEND", "cuda12")
    with pytest.raises(BackendError, match="unknown backend"):
        backend_name()


def test_a_chosen_backend_holds_for_gradients_too() -> None:
    """On a GPU autograd has threads of its own, which do not know this one's choice."""
    assert torch.autograd.is_multithreading_enabled()
    with _library.use_backend("reference"):
        assert not torch.autograd.is_multithreading_enabled()
    assert torch.autograd.is_multithreading_enabled()
