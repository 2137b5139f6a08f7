"""The GPU check's steps, limits and arguments, as far as they show without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from posemap_fast.errors import BackendError
from posemap_fast.optional import SourceMend

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_check(monkeypatch) -> ModuleType:
    """benchmarks/gpu_check.py, which is a script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_check")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POSEMAP_PYTHON": sys.executable}
    command = [str(ROOT / "tools" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=120)


def test_steps_fit_the_time_and_have_names_of_their_own(gpu_check, tmp_path) -> None:
    plain, whole = gpu_check.steps_of(tmp_path, "room", None), gpu_check.steps_of(tmp_path, "room", tmp_path)
    assert sum(step.limit_s for step in plain) <= 25 * 60
    assert sum(step.limit_s for step in whole) <= 32 * 60
    assert len({step.name for step in whole}) == len(whole) == len(plain) + 2
    assert [step.name for step in plain if not step.needs_gpu] == ["environment", "build_cpu", "build_cuda"]


def test_a_step_leaves_its_output_and_its_exit_code(gpu_check, tmp_path) -> None:
    step = gpu_check.Step("hello", 30, (sys.executable, "-c", "print('here'); raise SystemExit(5)"))
    row = gpu_check.run_step(step, tmp_path)
    assert row == {"step": "hello", "status": 5, "seconds": row["seconds"], "limit": 30}
    assert (tmp_path / "hello.log").read_text() == "here\n"
    row = gpu_check.run_step(gpu_check.Step("absent", 30, ("no-such-sanitizer",)), tmp_path)
    assert row["status"] == 127 and "no-such-sanitizer" in (tmp_path / "absent.log").read_text()


def test_at_its_limit_a_step_ends_with_all_that_it_started(gpu_check, tmp_path) -> None:
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    begin = time.monotonic()
    row = gpu_check.run_step(gpu_check.Step("endless", 2, (sys.executable, "-c", script)), tmp_path)
    assert row["status"] == 124 and time.monotonic() - begin < 9
    child = int((tmp_path / "endless.log").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}/stat").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the step's child is still running")


def test_a_check_may_be_made_in_several_calls(tmp_path) -> None:
    out = tmp_path / "out"
    first = call(str(out), "--steps", "build_cpu")
    assert first.returncode == 0, first.stderr
    has_gpu = torch.cuda.is_available()  # then the parity tests are a step of whoever runs this
    second = call(str(out), "--steps", "environment" if has_gpu else "environment,parity")
    report = json.loads((out / "gpu_check.json").read_text())
    steps = {row["step"]: row["status"] for row in report["steps"]}
    assert {"environment": 0, "build_cpu": 0}.items() <= steps.items()
    assert report["environment"]["torch"] == torch.__version__
    if not has_gpu:
        assert second.returncode == 3 and "sees no GPU" in second.stderr and "parity" not in steps


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "OUT"),
        (["out", "--steps", "paritty"], "no step 'paritty', there are environment"),
        (["out", "--steps", "tcnn"], "need --libraries FOLDER"),
        (["out", "no/such/scene"], "SCENE no/such/scene: no such folder"),
        (["out", "--libraries", "nowhere"], "--libraries nowhere: no such folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    gpu_check, tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_mend_and_its_command_do_the_same(tmp_path) -> None:
    mend = SourceMend(
        (2, 4), str(tmp_path), "a/setup.py", 'flags = [f"-std=c++{x}"]  # /', 'flags = ["-std=c++20"]  # /'
    )
    source = tmp_path / "a" / "setup.py"
    source.parent.mkdir()
    text = 'keep = [f"-std"]\n\tflags = [f"-std=c++{x}"]  # /\n'
    source.write_text(text)
    subprocess.run(mend.command(), shell=True, check=True)
    by_shell = source.read_text()
    source.write_text(text)
    mend.apply(tmp_path)
    assert source.read_text() == by_shell == 'keep = [f"-std"]\n\tflags = ["-std=c++20"]  # /\n'
    mend.apply(tmp_path)  # made before: nothing to do
    assert source.read_text() == by_shell
    source.write_text("another version\n")
    with pytest.raises(BackendError, match="another version"):
        mend.apply(tmp_path)
