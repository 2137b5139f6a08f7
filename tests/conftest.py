"""Fixtures shared by the whole suite: as many threads as the machine has room for, and tiny maps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posemap_fast.fields import FieldConfig, NeRFP
from posemap_fast.geometry import Camera, SceneFrame
from posemap_fast.render import OccupancyConfig, RenderConfig, Renderer

TINY_FIELD = FieldConfig(
    n_levels=4,
    log2_hashmap_size=10,
    base_resolution=4,
    finest_resolution=16,
    hidden=16,
    geo_features=7,
    sh_degree=2,
    appearance_dim=3,
    pose_hidden=8,
)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """Two; beside other workers one: threads without a core of their own spin while they wait, and all are slower."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small networks: on a busy machine more threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_scenes() -> Path:
    """Folder of real scenes named by POSEMAP_TEST_DATA; skips when it is not set."""
    folder = os.environ.get("POSEMAP_TEST_DATA")
    if not folder:
        pytest.skip("POSEMAP_TEST_DATA is not set; point it to a folder with real scenes (transforms.json)")
    return Path(folder)


@pytest.fixture
def camera() -> Camera:
    """A small landscape camera, 48 x 36."""
    return Camera(48, 36, 40.0, 40.0, 24.0, 18.0)


@pytest.fixture
def frame() -> SceneFrame:
    """A cube of 4 m side around the origin."""
    return SceneFrame(scale=0.25, offset=torch.full((3,), 0.5))


def make_map(frame: SceneFrame, backbone: str = "native", dtype: torch.dtype = torch.float32):
    """A field with random weights large enough to see, and its renderer."""
    import dataclasses

    nerfp = NeRFP(dataclasses.replace(TINY_FIELD, backbone=backbone), frame)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        nerfp.field.table.uniform_(-1, 1, generator=generator)
        for linear in [nerfp.projection, *nerfp.appearance.layers[::2]]:
            linear.weight.uniform_(-0.5, 0.5, generator=generator)
            linear.bias.uniform_(-0.5, 0.5, generator=generator)
    config = RenderConfig(
        backend="native" if dtype == torch.float32 else "reference",
        steps_per_unit=48,
        occupancy=OccupancyConfig(resolution=16),
    )
    return nerfp.to(dtype), Renderer(config, frame, near=0.02)


@pytest.fixture
def tiny_map(frame: SceneFrame):
    """(nerfp, renderer) on the native backbone, float32."""
    return make_map(frame)


@pytest.fixture
def exact_map(frame: SceneFrame):
    """(nerfp, renderer) on the reference backbone, float64."""
    return make_map(frame, "reference", torch.float64)


@pytest.fixture
def poses() -> torch.Tensor:
    """(3, 4, 4) float32 cameras inside the cube, looking along +z with some rotation."""
    from posemap_fast.geometry import perturb_poses

    base = torch.eye(4).repeat(3, 1, 1)
    base[:, 2, 3] = -1.0
    return perturb_poses(base, 0.4, 20.0, torch.Generator().manual_seed(3))
