"""What `auto` stands for on each machine, that only names are stored, and that every map is readable everywhere."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.backends import named_device, resolve_backend, runnable_backend, why_not
from posemap_fast.errors import BackendError, ConfigError
from posemap_fast.experiment import ExperimentConfig
from posemap_fast.fields import FIELD_BACKBONES, FieldConfig
from posemap_fast.localize import SceneMap
from posemap_fast.ops import _library
from posemap_fast.optional import OptionalLibrary
from posemap_fast.render import RENDER_BACKENDS, RenderConfig
from posemap_fast.results import environment

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with or without our kernels and the optional libraries."""

    def pretend(native: tuple[str, ...] = (), installed: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(_library, "native_available", lambda device="cpu": device in native)
        monkeypatch.setattr(
            OptionalLibrary, "problem", lambda self: None if self.module in installed else f"{self.module} is missing"
        )

    return pretend


@pytest.mark.parametrize(
    ("native", "installed", "expected"),
    [
        (("cpu", "cuda"), ("tinycudann", "nerfacc"), ("native", "native")),
        (("cpu",), ("tinycudann", "nerfacc"), ("tcnn", "nerfacc")),
        (("cpu",), ("nerfacc",), ("reference", "nerfacc")),
        (("cpu",), (), ("reference", "reference")),
    ],
)
def test_auto_on_a_gpu_prefers_our_kernels_then_the_library_then_the_reference(
    machine, native: tuple[str, ...], installed: tuple[str, ...], expected: tuple[str, str]
) -> None:
    machine(native, installed)
    assert resolve_backend("field.backbone", "auto", CUDA) == expected[0]
    assert resolve_backend("render.backend", "auto", CUDA) == expected[1]


@pytest.mark.parametrize("native", [("cpu",), ()])
def test_auto_on_the_cpu_is_native_even_where_it_falls_back(machine, native: tuple[str, ...], caplog) -> None:
    machine(native, ("tinycudann", "nerfacc"))
    with caplog.at_level(logging.INFO):
        assert resolve_backend("field.backbone", "auto", CPU) == "native"
    assert ("native library is missing" in caplog.text) == (native == ())


def test_the_log_says_which_and_why(machine, caplog) -> None:
    machine(("cpu",), ())
    with caplog.at_level(logging.INFO):
        resolve_backend("render.backend", "auto", CUDA)
    assert "render.backend: auto is reference on cuda" in caplog.text
    assert "native: no native kernels for cuda here; nerfacc: nerfacc is missing" in caplog.text


def test_other_names_stay_as_they_are(machine) -> None:
    machine()
    assert resolve_backend("field.backbone", "tcnn", CPU) == "tcnn"


@pytest.mark.parametrize("name", [*FIELD_BACKBONES.names(), *RENDER_BACKENDS.names()])
def test_every_registered_backend_runs_or_says_why_not(name: str) -> None:
    reason = why_not(name, CPU)
    assert (reason is None) == (name in ("native", "reference"))


def test_configuration_accepts_auto_and_resolves_it_to_registered_names(machine) -> None:
    machine(("cpu",), ())
    config = ExperimentConfig(field=FieldConfig(backbone="auto"), render=RenderConfig(backend="auto"), device="cpu")
    resolved = config.resolved()
    assert (resolved.field.backbone, resolved.render.backend) == ("native", "native")
    assert dataclasses.replace(resolved, field=config.field, render=config.render) == config
    with pytest.raises(ConfigError, match="did you mean"):
        ExperimentConfig(field=FieldConfig(backbone="nativ"))


@pytest.fixture
def gpu_map(tmp_path, frame, camera):
    """A map file whose header says that it was trained on tcnn and nerfacc."""
    config = FieldConfig(n_levels=2, log2_hashmap_size=10, base_resolution=4, finest_resolution=8, hidden=16)
    frame_of_poses = PoseFrame.from_poses(torch.eye(4).repeat(2, 1, 1), "auto")
    scene_map = SceneMap.untrained("there", config, RenderConfig(), frame, 0.02, frame_of_poses, camera)
    scene_map.nerfp.config = dataclasses.replace(config, backbone="tcnn")
    scene_map.renderer.config = dataclasses.replace(scene_map.renderer.config, backend="nerfacc")
    path = tmp_path / "scene.map"
    scene_map.save(path)
    return path


def test_a_map_trained_on_gpu_libraries_is_read_without_them(gpu_map, caplog) -> None:
    with caplog.at_level(logging.INFO):
        found = SceneMap.load(gpu_map)
    assert (found.nerfp.config.backbone, found.renderer.config.backend) == ("native", "native")
    assert "trained with tcnn, which cannot run here" in caplog.text
    assert SceneMap.load(gpu_map, "reference").nerfp.config.backbone == "reference"
    assert SceneMap.load(gpu_map, "auto").nerfp.config.backbone == "native"


def test_a_backbone_that_was_asked_for_by_name_is_not_replaced(gpu_map, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="tinycudann needs a CUDA device"):
        SceneMap.load(gpu_map, "tcnn")


def test_a_runnable_backend_is_kept(machine) -> None:
    machine(("cpu",), ("tinycudann",))
    assert runnable_backend("field.backbone", "tcnn", CUDA) == "tcnn"
    assert runnable_backend("field.backbone", "reference", CPU) == "reference"


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_a_named_device_is_one_that_is_here(name: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named_device(name) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert named_device(name) == torch.device("cpu" if name == "cpu" else "cuda")


@pytest.mark.parametrize(
    ("name", "said"), [("gpu", "'gpu' is no device"), ("meta", "'meta' is not supported"), ("cuda:7", "no such GPU")]
)
def test_a_device_that_is_not_here_is_refused(name: str, said: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=said):
        named_device(name)
    with pytest.raises(ConfigError, match=said):
        ExperimentConfig(device=name)


def test_a_run_on_the_cpu_asks_no_gpu(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("asked the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    found = environment(torch.device("cpu"))
    assert found["cuda"] is None and found["kernels"] in ("native", "reference")
