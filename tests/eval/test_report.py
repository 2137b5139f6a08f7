"""The report page: complete with everything, whole with nothing, and never reaching outside itself."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from posemap_fast.eval import ReportData, ViewPicture, WorstCase, write_report
from posemap_fast.eval.plots import top_down_axes, training_curves
from posemap_fast.geometry import look_at, make_c2w, perturb_poses, so3_exp

VOID = {"meta", "img", "br"}


class Balance(HTMLParser):
    """Fails on a tag that is closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def ring_of_poses(n: int, wobble: float = 0.0) -> torch.Tensor:
    """Cameras on half an ellipse that look at its centre; `wobble` varies their height."""
    angle = torch.linspace(0, math.pi, n).double()
    centre = torch.stack([2 * angle.cos(), angle.sin(), 1.5 + wobble * torch.sin(9 * angle)], dim=-1)
    return look_at(centre, torch.tensor([0.0, 0.0, 1.5]).double().expand(n, 3), torch.tensor([0.0, 0.0, 1.0]).double())


def full_data(**changes: Any) -> ReportData:
    g = torch.Generator().manual_seed(0)
    gt = ring_of_poses(12)
    pred = perturb_poses(gt, 0.1, 3.0, g)
    pred[2] = math.nan
    image = (torch.rand(48, 64, 3, generator=g) * 255).byte()
    apr = {"n_test": 12, "median_t_m": 0.1234, "median_r_deg": 1.5, "mean_t_m": math.inf, "mean_r_deg": math.inf}
    apr["recall"] = {"0.05m_5deg": 0.25}
    values = {
        "summary": {
            "scene": "room <1>",
            "preset": "cpu",
            "seed": 0,
            "protocol": "inductive",
            "commit": "abc1234",
            "nerf": {"psnr_db": 33.31, "ssim": 0.95},
            "posemap": {"decoder_median_t_m": 0.0456, "decoder_median_r_deg": 0.7},
            "apr": apr,
            "aligned": {"median_t_m": 0.0789, "median_r_deg": 1.1},
            "baselines": {"mean_pose": {"median_t_m": 2.0, "median_r_deg": 80.0}, "nearest_view": {}},
            "time_s": {"field": 61.0, "apr": 200.0, "total": 261.0},
            "environment": {"torch": "2.13.0"},
        },
        "metrics": [
            {"stage": "field", "step": k, "name": "loss", "value": 1 / (k + 1), "seconds": k * 0.1} for k in range(30)
        ],
        "n_views": {"train": 20, "test": 12},
        "train_c2w": ring_of_poses(20),
        "gt_c2w": gt,
        "predictions": {"APRNet": pred, "aligned": gt},
        "views": [ViewPicture("view-1.png", image, image, torch.randn(8, 3, 4, generator=g)), ViewPicture("v2", image)],
        "worst": [WorstCase("worst.png", 1.25, 9.5, image, image, image), WorstCase("lost", math.inf, math.inf)],
        "notes": ["random <weights>"],
    }
    return ReportData(**(values | changes))


def page_of(tmp_path: Path, data: ReportData) -> str:
    write_report(tmp_path / "report.html", data)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    return text


def test_the_page_shows_what_the_run_found(tmp_path: Path) -> None:
    text = page_of(tmp_path, full_data())
    for shown in ("0.123", "33.3", "0.0456", "0.0789", "80.0", "25.0", "abc1234", "view-1.png", "2.13.0", "4:21 min"):
        assert shown in text, shown
    for title in (
        "Results",
        "Where the answers are",
        "Held-out views",
        "Worst cases",
        "Training",
        "Time",
        "Environment",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "1.25 m, 9.50 deg" in text
    assert "room &lt;1&gt;" in text
    assert "random &lt;weights&gt;" in text


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    text = page_of(tmp_path, full_data())
    assert not re.search(r"https?:|//cdn|<script|<link|@import|url\(", text)
    assert set(re.findall(r"src='([a-z]+:[a-z+/]+)", text)) == {
        "data:image/svg+xml",
        "data:image/jpeg",
        "data:image/png",
    }


def test_a_run_with_nothing_in_it_gives_a_whole_page(tmp_path: Path) -> None:
    assert "<h2>" not in page_of(tmp_path, ReportData({}))


@pytest.mark.parametrize(
    "changes",
    [
        {"gt_c2w": torch.zeros(0, 4, 4), "predictions": {"APRNet": torch.zeros(0, 4, 4)}},
        {"train_c2w": torch.zeros(0, 4, 4)},
        {"predictions": {"APRNet": torch.full((12, 4, 4), math.nan)}},
        {"predictions": {}},
        {"metrics": [{"stage": "x", "step": 0, "name": "loss", "value": math.nan, "seconds": 0.0}]},
        {"metrics": [{"stage": "x", "step": 0, "name": "loss", "value": 1.0, "seconds": 0.0}]},
        {"views": [], "worst": []},
        {
            "summary": {
                "apr": None,
                "nerf": None,
                "time_s": None,
                "baselines": None,
                "environment": None,
                "commit": None,
            }
        },
        {"summary": {"apr": {"n_test": 0, "median_t_m": math.nan, "recall": {"0.05m_5deg": math.nan}}}},
    ],
    ids=[
        "no test view",
        "no train view",
        "no answer",
        "no stage 3",
        "nan loss",
        "one step",
        "no picture",
        "nulls",
        "nan",
    ],
)
def test_a_run_that_lacks_a_part_still_gets_its_page(tmp_path: Path, changes: dict[str, Any]) -> None:
    page_of(tmp_path, full_data(**changes))


def test_views_whose_posemaps_differ_in_size_are_drawn(tmp_path: Path) -> None:
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    views = [ViewPicture(f"v{s}", image, posemap=torch.randn(4, s, s)) for s in (2, 3)]
    assert page_of(tmp_path, full_data(views=views)).count("<figcaption>PoseMap") == 2


def test_a_scene_without_scale_shows_units_and_no_metric_recall(tmp_path: Path) -> None:
    text = page_of(tmp_path, full_data(is_metric=False))
    assert "median t (units)" in text
    assert "in 0.05 m" not in text


def test_a_transductive_run_says_so(tmp_path: Path) -> None:
    assert "saw the test images" not in page_of(tmp_path, ReportData({"protocol": "inductive"}))
    assert "saw the test images" in page_of(tmp_path, ReportData({"protocol": "transductive"}))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page_of(tmp_path, full_data()) == page_of(tmp_path, full_data())


def test_curves_are_grouped_by_stage_in_order_and_are_svg() -> None:
    rows = [
        {"stage": s, "step": k, "name": n, "value": 0.5, "seconds": 0} for s in "ba" for n in "xy" for k in range(9)
    ]
    figures = training_curves(rows)
    assert list(figures) == ["b", "a"]
    root = ElementTree.fromstring(b64decode(figures["a"].split(",")[1]))
    assert root.tag.endswith("svg")


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_seen_from_above_whatever_the_world_frame(seed: int) -> None:
    turn = so3_exp(torch.randn(3, generator=torch.Generator().manual_seed(seed)).double())
    world = make_c2w(turn, torch.tensor([5.0, -3.0, 2.0]).double())
    axes = top_down_axes(world @ ring_of_poses(41, wobble=1.0))
    up = turn @ torch.tensor([0.0, 0.0, 1.0]).double()
    torch.testing.assert_close(axes @ up, torch.zeros(2).double(), atol=0.15, rtol=0)  # mean "up" tilts a little
    torch.testing.assert_close(axes @ axes.T, torch.eye(2).double())
    wide = turn @ torch.tensor([1.0, 0.0, 0.0]).double()
    assert abs(float(axes[0] @ wide)) > 0.9
