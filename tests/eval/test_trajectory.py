"""Pose files: both formats there and back, matching, and damaged lines named by file and line."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch

from posemap_fast.errors import DatasetError
from posemap_fast.eval import evaluate_files, pose_errors, read_trajectory, write_named, write_tum
from posemap_fast.geometry import make_c2w, so3_exp

IDENTITY_TUM = "0 1 2 3 0 0 0 1"


def poses(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rotation = so3_exp(torch.randn(n, 3, generator=g, dtype=torch.float64))
    return make_c2w(rotation, torch.randn(n, 3, generator=g, dtype=torch.float64))


def text_file(tmp_path: Path, text: str, name: str = "poses.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("layout", ["tum", "named"])
def test_a_trajectory_survives_the_file(tmp_path: Path, layout: str) -> None:
    c2w, names = poses(7), [f"seq-01/frame-{i}.png" for i in range(7)]
    path = tmp_path / "poses.txt"
    write_tum(path, c2w) if layout == "tum" else write_named(path, names, c2w)
    back = read_trajectory(path)
    assert back.layout == layout
    assert list(back.keys) == (names if layout == "named" else [f"{i}.000000" for i in range(7)])
    torch.testing.assert_close(back.c2w, c2w, atol=1e-8, rtol=0)


def test_convention_tum_has_the_scalar_last_and_named_first(tmp_path: Path) -> None:
    half = math.sqrt(0.5)  # a quarter turn about z takes x to y
    tum = read_trajectory(text_file(tmp_path, f"0.5 1 2 3 0 0 {half} {half}\n"))
    named = read_trajectory(text_file(tmp_path, f"a.png 1 2 3 {half} 0 0 {half}\n"))
    for trajectory in (tum, named):
        turned = trajectory.c2w[0, :3, :3] @ torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
        assert trajectory.c2w[0, :3, 3].tolist() == [1, 2, 3]
    assert tum.keys == ("0.500000",)


def test_quaternions_are_normalised_and_their_sign_is_free(tmp_path: Path) -> None:
    long = read_trajectory(text_file(tmp_path, "a 0 0 0 1.04 0 0 0\nb 0 0 0 -1 0 0 0\n")).c2w
    torch.testing.assert_close(long[:, :3, :3], torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_comments_blank_lines_and_gzip_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.txt.gz"
    path.write_bytes(gzip.compress(f"# a comment\n\n{IDENTITY_TUM}\n".encode()))
    assert read_trajectory(path).lines == (3,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": holds no pose"),
        ("# only this\n", ": holds no pose"),
        (f"{IDENTITY_TUM}\n1 2 3\n", ":2: must have 8 columns"),
        ("0 1 2 x 0 0 0 1\n", ":1: 'x' is not a number"),
        ("0 1 2 3 0 0 0 0\n", ":1: quaternion has norm 0, expected 1"),
        ("a.png 1 2 3 40 50 60 70\n", ":1: quaternion has norm 112.2, expected 1; check the order of the columns"),
        (f"{IDENTITY_TUM}\n1 0 0 0 0 0 0 1\n0.0000001 0 0 0 0 0 0 1\n", ":3: '0.000000' was given before, in line 1"),
        ("a 1 2 3 1 0 0 0\na 1 2 3 1 0 0 0\n", ":2: 'a' was given before, in line 1"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = text_file(tmp_path, text)
    with pytest.raises(DatasetError) as caught:
        read_trajectory(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_files_that_are_missing_binary_or_cut_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read this pose file: No such file"):
        read_trajectory(tmp_path / "gone.txt")
    binary = tmp_path / "image.png"
    binary.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DatasetError, match="not a text file"):
        read_trajectory(binary)
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(gzip.compress(IDENTITY_TUM.encode() * 50)[:-12])
    with pytest.raises(DatasetError, match="gzip file is damaged"):
        read_trajectory(cut)


def test_files_are_matched_by_name_whatever_their_order(tmp_path: Path) -> None:
    gt, pred, names = poses(6, 1), poses(6, 2), list("abcdef")
    write_named(tmp_path / "gt.txt", names, gt)
    write_named(tmp_path / "pred.txt", names[::-1], pred.flip(0))
    result = evaluate_files(tmp_path / "pred.txt", tmp_path / "gt.txt")
    t_err, _ = pose_errors(pred, gt)
    assert result["mean_t_m"] == pytest.approx(float(t_err.mean()), abs=1e-7)
    assert (result["n_test"], result["n_missing"], result["n_unmatched"]) == (6, 0, 0)


def test_a_view_without_answer_counts_as_infinite_whether_absent_or_nan(tmp_path: Path) -> None:
    gt = poses(5)
    pred = gt[:4].clone()
    pred[1] = math.nan
    write_tum(tmp_path / "gt.txt", gt)
    write_tum(tmp_path / "pred.txt", pred)
    result = evaluate_files(tmp_path / "pred.txt", tmp_path / "gt.txt")
    assert (result["n_test"], result["n_missing"]) == (5, 2)
    assert result["mean_t_m"] == math.inf
    assert result["median_t_m"] == pytest.approx(0, abs=1e-7)
    assert result["recall"]["0.05m_5deg"] == pytest.approx(0.6)


def test_answers_without_truth_are_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_named(tmp_path / "gt.txt", ["a"], poses(1))
    write_named(tmp_path / "pred.txt", ["a", "b"], poses(2))
    assert evaluate_files(tmp_path / "pred.txt", tmp_path / "gt.txt")["n_unmatched"] == 1
    assert "pred.txt:2: 'b' is not in" in caplog.text


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (IDENTITY_TUM, "it has timestamps, the other names; write both files in one format"),
        ("frame-1.jpg 0 0 0 1 0 0 0", "did you mean 'frame-1.png'"),
    ],
)
def test_files_without_a_common_view_are_refused(tmp_path: Path, pred: str, message: str) -> None:
    gt = text_file(tmp_path, "frame-1.png 0 0 0 1 0 0 0\n", "gt.txt")
    with pytest.raises(DatasetError, match=r"pred\.txt:1: no pose of this file has its truth in") as caught:
        evaluate_files(text_file(tmp_path, pred, "pred.txt"), gt)
    assert message in str(caught.value)


def test_a_truth_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    gt = text_file(tmp_path, f"{IDENTITY_TUM}\n1 nan 0 0 0 0 0 1\n")
    with pytest.raises(DatasetError, match=r"poses\.txt:2: the true pose has NaN"):
        evaluate_files(gt, gt)


def test_a_name_with_a_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has spaces"):
        write_named(tmp_path / "x.txt", ["a b"], poses(1))
    assert list(tmp_path.iterdir()) == []
