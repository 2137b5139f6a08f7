"""Choosing frames of videos and photos: sharp ones, from different positions, as many as asked for."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from posemap_fast.data.video import FrameChoice, PhotoFolder, Video, choose_frames, open_frames, write_frames
from posemap_fast.errors import ConfigError, DatasetError

WIDTH, HEIGHT = 160, 120


def texture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture with corners of all sizes."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    layers = [cv2.normalize(cv2.GaussianBlur(noise, (0, 0), s), None, 0, 1, cv2.NORM_MINMAX) for s in (1.5, 4.0)]
    return (cv2.normalize(sum(layers), None, 0, 1, cv2.NORM_MINMAX) * 255).astype(np.uint8)


PANORAMA = texture(0, 2000)


def panned(offsets) -> list[np.ndarray]:
    """Views of the panorama, each `offsets[i]` px to the right of its start, with a little sensor noise."""
    noise = np.random.default_rng(1)
    views = (PANORAMA[:, int(x) : int(x) + WIDTH].astype(int) for x in offsets)
    return [np.clip(v + noise.integers(-4, 5, v.shape), 0, 255).astype(np.uint8) for v in views]


def write_video(path: Path, frames: list[np.ndarray], codec: str = "MJPG") -> Video:
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 20, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return Video(path)


def test_a_standing_camera_adds_no_frames(tmp_path):
    choice = FrameChoice(3)
    moving = np.arange(0, 240, 4)
    with_pause = np.concatenate([moving[:30], np.full(60, moving[29]), moving[30:]])
    plain = choose_frames(write_video(tmp_path / "a.avi", panned(moving)), choice)
    paused = choose_frames(write_video(tmp_path / "b.avi", panned(with_pause)), choice)
    assert len(plain) >= 20 and abs(len(paused) - len(plain)) <= 1
    assert sum(30 <= index < 90 for index in paused) <= 1
    finest = choose_frames(Video(tmp_path / "b.avi"), FrameChoice(150))  # not even where many more are wanted
    assert sum(30 <= index < 90 for index in finest) <= 1


def test_fast_motion_adds_more_frames_than_slow(tmp_path):
    offsets = np.concatenate([np.arange(0, 100, 2), np.arange(100, 600, 10)])
    chosen = choose_frames(write_video(tmp_path / "a.avi", panned(offsets)), FrameChoice(3))
    slow, fast = sum(index < 50 for index in chosen), sum(index >= 50 for index in chosen)
    assert 6 <= slow <= 16 and fast >= 45
    gaps = np.diff(offsets[chosen])
    assert gaps.min() >= 0.02 * WIDTH - 1  # half a step at least lies between two chosen ones


def test_blurred_frames_are_avoided(tmp_path):
    frames = panned(np.arange(0, 250))
    blurred = [cv2.blur(f, (7, 1)) if i % 3 else f for i, f in enumerate(frames)]
    chosen = choose_frames(write_video(tmp_path / "a.avi", blurred), FrameChoice(3, 30))
    assert len(chosen) == 30 and all(index % 3 == 0 for index in chosen)


def test_black_pictures_are_not_chosen(tmp_path):
    frames = panned(np.arange(0, 300, 6))
    black = np.zeros_like(frames[0])
    chosen = choose_frames(write_video(tmp_path / "a.avi", [black] * 10 + frames + [black] * 10), FrameChoice(3))
    assert len(chosen) >= 20 and 10 <= min(chosen) <= 12 and max(chosen) < 60


def test_at_most_max_frames_are_chosen_and_they_are_spread_over_the_motion(tmp_path):
    offsets = np.arange(0, 1600, 8)
    chosen = choose_frames(write_video(tmp_path / "a.avi", panned(offsets)), FrameChoice(5, 40))
    gaps = np.diff(offsets[chosen])
    assert len(chosen) == 40 and chosen == sorted(set(chosen))
    assert gaps.min() >= 0.5 * 40 - 8 and gaps.max() <= 1.5 * 40 + 8  # 1600 px in 40 runs


def test_little_motion_is_cut_finer_until_there_are_min_frames(tmp_path):
    video = write_video(tmp_path / "a.avi", panned(np.arange(0, 60, 1)))
    few, many = choose_frames(video, FrameChoice(3)), choose_frames(video, FrameChoice(20))
    assert len(few) < 12 and 18 <= len(many) <= 20


def test_distinct_views_that_last_three_frames_each_are_all_kept(tmp_path):
    frames = [texture(seed) for seed in range(20) for _ in range(3)]
    chosen = choose_frames(write_video(tmp_path / "a.mp4", frames, "mp4v"), FrameChoice(10))
    assert [index // 3 for index in chosen] == list(range(20))


def test_a_logo_that_stays_does_not_hide_that_the_view_changes(tmp_path):
    frames = [texture(seed) for seed in range(20) for _ in range(3)]
    for frame in frames:
        frame[5:35, 5:45] = texture(99)[:30, :40]
    chosen = choose_frames(write_video(tmp_path / "a.avi", frames), FrameChoice(10))
    assert [index // 3 for index in chosen] == list(range(20))


def test_a_camera_that_never_moves_is_an_error(tmp_path):
    video = write_video(tmp_path / "a.avi", panned(np.full(40, 100)))
    with pytest.raises(DatasetError, match=r"a\.avi: the camera hardly moves: 1 distinct view.* in 40 frames; walk"):
        choose_frames(video, FrameChoice(3))


def test_the_frames_written_are_those_chosen(tmp_path):
    frames = panned(np.arange(0, 300, 10))
    video = write_video(tmp_path / "a.avi", frames)
    sizes = write_frames(video, [3, 4, 20], tmp_path)
    assert sizes == {f"frame_{i:06d}.jpg": (WIDTH, HEIGHT) for i in (3, 4, 20)}
    for i in (3, 4, 20):
        written = cv2.imread(str(tmp_path / f"frame_{i:06d}.jpg")).astype(float)
        errors = [np.abs(written - frame).mean() for frame in frames]
        assert int(np.argmin(errors)) == i and errors[i] < 6
    assert write_frames(video, [3], tmp_path, max_side=80) == {"frame_000003.jpg": (80, 60)}


def test_the_rotation_tag_of_a_phone_is_followed(tmp_path):
    frames = panned(np.arange(0, 40, 4))
    upright = write_video(tmp_path / "a.mp4", frames, "mp4v")
    data = bytearray(upright.path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 16  # version 0: times, track, duration, layer, volume
    assert struct.unpack(">9i", data[matrix : matrix + 36])[::4] == (65536, 65536, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, HEIGHT << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    (_, plain), (_, turned) = next(upright.frames()), next(Video(tmp_path / "turned.mp4").frames())
    assert turned.shape == (WIDTH, HEIGHT, 3)
    assert np.abs(turned.astype(int) - np.rot90(plain, -1)).mean() < 1  # a quarter turn clockwise
    assert write_frames(Video(tmp_path / "turned.mp4"), [0], tmp_path)["frame_000000.jpg"] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"RIFF\xff\xff\xff\xffAVI LIST", bytes(range(256)) * 40])
def test_what_is_no_video_is_one_line_with_the_mend(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.mp4: no video that can be decoded here; convert it: ffmpeg -i"):
        open_frames(path)


def test_missing_files_and_single_images_are_errors(tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.mp4: no such file or folder; give a video"):
        open_frames(tmp_path / "nothing.mp4")
    cv2.imwrite(str(tmp_path / "view_01.jpg"), texture(0))
    with pytest.raises(DatasetError, match=r"view_01\.jpg: is a single image; give"):
        open_frames(tmp_path / "view_01.jpg")


def test_a_truncated_video_gives_the_frames_it_has(tmp_path):
    path = write_video(tmp_path / "a.avi", panned(np.arange(0, 600, 10))).path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    chosen = choose_frames(Video(path), FrameChoice(3))
    assert 20 <= len(chosen) <= 40


def test_frames_that_went_away_since_they_were_chosen_are_an_error(tmp_path):
    video = write_video(tmp_path / "a.avi", panned(np.arange(0, 60, 10)))
    with pytest.raises(DatasetError, match=r"1 chosen frame.* no longer decode"):
        write_frames(video, [2, 77], tmp_path)


def test_videos_are_told_apart_by_their_content(tmp_path):
    first = write_video(tmp_path / "a.avi", panned(range(0, 50, 10)))
    (tmp_path / "copy.avi").write_bytes(first.path.read_bytes())
    other = write_video(tmp_path / "b.avi", panned(range(10, 60, 10)))
    assert first.fingerprint() == Video(tmp_path / "copy.avi").fingerprint() != other.fingerprint()


def test_all_photos_are_kept_in_natural_order_and_get_names_without_spaces(tmp_path):
    for name in ("view 10.PNG", "view 9.jpg", "view 2 (a).jpeg", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            cv2.imwrite(str(tmp_path / name), texture(0))
    photos = open_frames(tmp_path)
    assert isinstance(photos, PhotoFolder) and choose_frames(photos, FrameChoice(3)) == [0, 1, 2]
    (tmp_path / "out").mkdir()
    assert list(write_frames(photos, [0, 1, 2], tmp_path / "out")) == ["view_2_a_.jpg", "view_9.jpg", "view_10.jpg"]


def test_more_photos_than_wanted_are_chosen_like_frames(tmp_path):
    for index, frame in enumerate(panned(np.arange(0, 400, 10))):
        cv2.imwrite(str(tmp_path / f"{index}.png"), frame)
    chosen = choose_frames(PhotoFolder(tmp_path), FrameChoice(3, 10))
    assert len(chosen) == 10 and np.diff(chosen).min() >= 2


def test_folders_without_usable_photos_are_errors(tmp_path):
    with pytest.raises(DatasetError, match="0 JPEG or PNG files here, 3 are the least; give a folder"):
        open_frames(tmp_path)
    for name in ("a.jpg", "b.jpg", "a.png"):
        cv2.imwrite(str(tmp_path / name), texture(0))
    with pytest.raises(DatasetError, match=r"would be written as a\.jpg, like a\.\w+; rename or remove one"):
        open_frames(tmp_path)
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(DatasetError, match=r"b\.jpg: JPEG of 9 bytes is truncated"):
        list(open_frames(tmp_path).frames())


@pytest.mark.parametrize(("least", "most"), [(2, 10), (20, 10)])
def test_impossible_numbers_of_frames_are_refused(least, most):
    with pytest.raises(ConfigError, match=f"got {least} and {most}"):
        FrameChoice(least, most)
