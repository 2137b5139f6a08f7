"""Scenes as the configuration wants them: test views that are given away for alignment are not scored."""

from __future__ import annotations

import pytest

from posemap_fast import stages
from posemap_fast.data import Scene
from posemap_fast.experiment import DataConfig
from posemap_fast.stages import read_scene

SMALL = {"room_train": 12, "room_test": 10, "room_width": 32}


@pytest.fixture(scope="module")
def room() -> Scene:
    return read_scene("room", DataConfig(**SMALL))


def test_room_has_the_asked_sizes(room: Scene) -> None:
    assert (room.camera.width, room.camera.height) == (32, 24)
    assert len(room.views("train")) == 12 and len(room.views("test")) == 10


@pytest.mark.parametrize("every", [2, 3, 10])
def test_every_nth_test_view_becomes_unlabelled(room: Scene, every: int) -> None:
    found = read_scene("room", DataConfig(**SMALL, unlabelled_every=every))
    test = room.views("test")
    taken = test[every // 2 :: every]
    before = room.views("unlabelled")
    assert found.views("unlabelled") == sorted([*before, *taken])
    assert found.views("test") == [i for i in test if i not in taken]
    assert len(taken) == (10 + every - 1 - every // 2) // every > 0
    for split in ("train", "val"):
        assert found.views(split) == room.views(split)
    assert any(f"{len(taken)} are aligned on and not scored" in note for note in found.notes)
    assert not any("aligned" in note for note in room.notes)


def test_only_what_is_configured_reaches_the_parser_of_a_capture(monkeypatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(stages, "load_scene", lambda *a, **options: asked.append((*a, options)))
    read_scene("a/capture", DataConfig())
    read_scene("a/capture", DataConfig(dataset="seven_scenes", gt="sfm", stride=5, max_side=320, room_width=99))
    assert asked == [
        ("a/capture", None, {}),
        ("a/capture", "seven_scenes", {"max_side": 320, "gt": "sfm", "stride": 5}),
    ]
