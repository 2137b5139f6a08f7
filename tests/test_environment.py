"""What is gathered about the machine: plain data, complete, and with a mend for what is missing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from posemap_fast import environment
from posemap_fast.cli import main
from posemap_fast.commands.inspect import print_environment
from posemap_fast.environment import GPU, Component, gather_environment
from posemap_fast.ops import _library
from posemap_fast.optional import OptionalLibrary


@pytest.fixture(scope="module")
def here() -> environment.Environment:
    return gather_environment()


def test_everything_is_plain_data(here) -> None:
    values = json.loads(json.dumps(here.to_dict()))
    assert values["torch"] == torch.__version__ and values["cores"] >= 1
    assert set(values["native_cpu"]) == {"found", "problem", "mend"}


@pytest.mark.parametrize(
    ("told", "name", "extensions"),
    [
        (
            "model name\t: A 9\nvmx flags\t: x\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512dq\n",
            "A 9",
            "amx_bf16 avx2 avx512f",
        ),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16\n", None, "asimd bf16 sve"),
        (None, None, ""),
    ],
)
def test_processors_of_one_name_differ_in_their_vector_extensions(told, name, extensions, monkeypatch) -> None:
    def read_text(path: Path, encoding: str) -> str:
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(environment, "_native_cpu", Component)
    monkeypatch.setattr(environment, "_native_cuda", Component)
    found = gather_environment()
    assert found.vector_extensions == tuple(extensions.split())
    assert found.processor == name or (name is None and found.processor)


def test_every_part_is_there_or_says_why_not(here) -> None:
    parts = [value for value in vars(here).values() if isinstance(value, Component)]
    assert len(parts) == 8
    assert all(part.found or part.problem for part in parts)


def test_optional_libraries_come_with_a_version_or_the_install_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: None)
    found = gather_environment()
    assert found.nerfacc.mend is not None and "pip install nerfacc==" in found.nerfacc.mend
    assert found.tinycudann.mend is not None and "NVlabs/tiny-cuda-nn" in found.tinycudann.mend
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: "1.2.3")
    found = gather_environment()
    assert (found.nerfacc.found, found.nerfacc.mend) == ("1.2.3", None)
    assert "needs a CUDA device" in str(found.nerfacc.problem)


def test_missing_tools_and_libraries_have_reason_and_mend(monkeypatch) -> None:
    monkeypatch.setattr(environment, "find_compiler", lambda: None)
    monkeypatch.setattr(environment, "find_nvcc", lambda: None)
    monkeypatch.setattr(environment, "_output_of", lambda *command: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_library, "cpu_library", lambda: None)
    monkeypatch.setattr(_library, "failure", lambda device: "no C++ compiler found\nsecond line")
    found = gather_environment()
    assert found.native_cpu.problem == "no C++ compiler found" and "_build_cli" in str(found.native_cpu.mend)
    assert found.compiler.mend and found.nvcc.mend and found.cuda_driver.problem
    assert found.gpus == () and "sees no CUDA device" in str(found.native_cuda.problem)


def test_a_gpu_is_described_with_the_state_of_our_library(monkeypatch) -> None:
    device = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(_library, "cuda_library", lambda: None)
    monkeypatch.setattr(_library, "failure", lambda device: "nvcc is too old")
    found = gather_environment()
    assert found.gpus == (GPU("A GPU", "9.0", 80.0),)
    assert found.native_cuda.problem == "nvcc is too old" and "--cuda" in str(found.native_cuda.mend)
    monkeypatch.setattr(_library, "cuda_library", lambda: SimpleNamespace(_name="/there/libpmf_cuda.so"))
    assert gather_environment().native_cuda == Component("/there/libpmf_cuda.so")


def test_a_driver_that_torch_cannot_use_is_said(monkeypatch) -> None:
    monkeypatch.setattr(environment, "_output_of", lambda *command: "570.1\n570.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    driver = environment._cuda_driver()
    assert driver.found == "570.1" and "CPU build" in str(driver.problem)


@pytest.mark.parametrize("failure", [OSError, subprocess.TimeoutExpired("x", 1)])
def test_a_tool_that_cannot_run_or_hangs_is_silent(monkeypatch, failure) -> None:
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    assert environment._output_of("nvcc", "--version") is None


def test_command_prints_a_table_without_a_dataset(capsys) -> None:
    assert main(["inspect", "--environment"]) == 0
    text = capsys.readouterr().out
    for part in ("Python", "torch", "C++ compiler", "native CPU", "native CUDA", "tinycudann", "nerfacc", "pycolmap"):
        assert part in text


def test_command_prints_json(capsys) -> None:
    assert main(["inspect", "--environment", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_install_lines_are_printed_unbroken(here, capsys) -> None:
    import dataclasses

    line = "pip install " + "x" * 200
    shown = dataclasses.replace(here, nerfacc=Component(None, "not installed [here]", line))
    print_environment(shown, Console(width=80))
    text = capsys.readouterr().out
    assert f"nerfacc: {line}" in text.splitlines() and "[here]" in text
