"""Optional libraries: what their absence says, and how it is mended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from posemap_fast.errors import BackendError
from posemap_fast.fields import FIELD_BACKBONES, FieldConfig
from posemap_fast.optional import NERFACC, TINYCUDANN, OptionalLibrary


def test_without_a_gpu_or_the_library_the_error_says_both_and_how_to_install(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: None)
    with pytest.raises(BackendError) as error:
        FIELD_BACKBONES.get("tcnn")(FieldConfig(finest_resolution=64))
    message = str(error.value)
    assert "needs a CUDA device" in message and "not installed" in message
    assert "git clone --recursive https://github.com/NVlabs/tiny-cuda-nn" in message
    assert "TCNN_CUDA_ARCHITECTURES=" in message and "setuptools<81" in message


def test_a_library_that_fails_to_load_says_so_with_the_cause(monkeypatch) -> None:
    def fail(name: str) -> None:
        raise OSError("Could not find compatible tinycudann extension for compute capability 90.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: "2.0")
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(BackendError, match=r"capability 90.*TCNN_CUDA_ARCHITECTURES=90"):
        TINYCUDANN.load()


def test_a_missing_library_is_an_error_with_the_install_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: None)
    with pytest.raises(BackendError, match="nerfacc is not installed; install it with: pip install nerfacc"):
        NERFACC.load()


def test_kernels_that_were_not_compiled_are_an_error(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: "0.5.3")
    monkeypatch.setattr("importlib.import_module", lambda name: SimpleNamespace(_C=None))
    with pytest.raises(BackendError, match="nvcc is not on PATH"):
        NERFACC.load()


def test_install_lines_are_those_of_this_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert "sed" not in TINYCUDANN.install_line() and "sed" not in NERFACC.install_line()
    assert NERFACC.install_line().startswith("pip install nerfacc==0.5.3  (")
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    assert "sed" not in TINYCUDANN.install_line() and "lerp_of(" in NERFACC.install_line()
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert "-std=c++20" in TINYCUDANN.install_line() and "lerp_of(" in NERFACC.install_line()
