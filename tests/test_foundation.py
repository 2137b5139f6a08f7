"""Errors, registry, tensor checks, seeds, and files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from posemap_fast import errors
from posemap_fast.checks import expect_dtype, expect_shape
from posemap_fast.errors import ConfigError, FileFormatError, PosemapError, ShapeError
from posemap_fast.files import LOCALIZER_MAGIC, MAP_MAGIC, atomic_path, read_container, write_container, write_text
from posemap_fast.registry import Registry
from posemap_fast.seeding import step_generator, stream_seed

HEADER = {"config": {"n_levels": 2}, "name": "küche"}
TENSORS = {
    "table": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "bits": torch.tensor([3, 250], dtype=torch.uint8),
}


def container(tmp_path: Path) -> Path:
    path = tmp_path / "scene.map"
    write_container(path, MAP_MAGIC, HEADER, TENSORS)
    return path


def test_every_error_derives_from_the_one_that_a_caller_catches() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(kind, PosemapError) for kind in kinds)


def test_a_registry_returns_what_was_registered_and_lists_names_sorted() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("b")(2)
    registry.register("a")(1)
    assert (registry.get("a"), registry.names(), list(registry), "a" in registry) == (1, ["a", "b"], ["a", "b"], True)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    registry: Registry[int] = Registry("apr backbone")
    registry.register("vgg16")(1)
    with pytest.raises(ConfigError, match=r"unknown apr backbone 'vg16'; did you mean 'vgg16'\? \(known: vgg16\)"):
        registry.get("vg16")


def test_a_second_registration_of_a_name_is_our_bug() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("a")(1)
    with pytest.raises(AssertionError, match="registered twice"):
        registry.register("a")(2)


def test_shape_and_dtype_checks_pass_what_fits_and_name_what_does_not() -> None:
    expect_shape("march", "rays_d", torch.zeros(7, 3), (None, 3))
    with pytest.raises(ShapeError, match=r"march: rays_d must have shape \(n, 3\); got \(7, 4\)"):
        expect_shape("march", "rays_d", torch.zeros(7, 4), (None, 3))
    with pytest.raises(ShapeError, match=r"must have shape \(n, 3\); got \(3,\)"):
        expect_shape("march", "rays_d", torch.zeros(3), (None, 3))
    with pytest.raises(ShapeError, match=r"x must be torch.float32 or torch.float64; got torch.int64"):
        expect_dtype("op", "x", torch.zeros(1, dtype=torch.int64), [torch.float32, torch.float64])


def test_random_numbers_depend_on_seed_stream_and_step_only() -> None:
    def draw(*key: object) -> list[float]:
        return torch.rand(4, generator=step_generator(*key)).tolist()  # type: ignore[arg-type]

    assert draw(0, "rays", 5) == draw(0, "rays", 5)
    others = [draw(1, "rays", 5), draw(0, "poses", 5), draw(0, "rays", 6)]
    assert all(other != draw(0, "rays", 5) for other in others)
    assert 0 <= stream_seed(2**40, "x", 10**9) < 2**63


def test_a_container_gives_back_header_and_tensors(tmp_path: Path) -> None:
    header, tensors = read_container(container(tmp_path), MAP_MAGIC)
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_one_changed_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = container(tmp_path)
    good = path.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"not a scene map file|truncated or damaged"):
            read_container(path, MAP_MAGIC)


def test_a_file_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    path = container(tmp_path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(FileFormatError, match=str(path)):
            read_container(path, MAP_MAGIC)


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    path = container(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        read_container(path, MAP_MAGIC)


def test_a_file_of_the_other_kind_is_called_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not a localizer file: it is a scene map"):
        read_container(container(tmp_path), LOCALIZER_MAGIC)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"gone\.map: cannot read this scene map: No such file"):
        read_container(tmp_path / "gone.map", MAP_MAGIC)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = container(tmp_path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="power cut"), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == before
        raise RuntimeError("power cut")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_container(tmp_path / "x.map", MAP_MAGIC, {"bad": object()}, {})
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_in_a_folder_that_did_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "summary.json"
    write_text(path, json.dumps({"é": 1}))
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert list(path.parent.iterdir()) == [path]
