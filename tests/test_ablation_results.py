"""The tables of ablations: medians and spreads over seeds, ratios to the reference row, worked by hand."""

from __future__ import annotations

import pytest

from posemap_fast.ablation_results import PictureResult, RowResult, summarize_pictures, summarize_rows


def result(row: str, seed: int, t: list[float], r: list[float], seconds: float = 0.0, scene: str = "a") -> RowResult:
    return RowResult(row, scene, seed, t, r, [2, 0, 1], seconds, True)


def test_summary_by_hand() -> None:
    results = [
        result("mean", 0, [9, 9, 9], [90, 90, 90]),
        result("base", 0, [1, 2, 30], [1, 1, 7], 10),
        result("mean", 0, [9, 9, 9], [90, 90, 90]),  # a baseline comes with every row
        result("new", 0, [1, 1, 9], [4, 2, 2], 20),
        result("base", 1, [4, 4, 4], [3, 3, 3], 14),
        result("new", 1, [2, 2, 2], [2, 2, 2], 22),
        result("base", 2, [3, 3, 3], [2, 2, 2], 12),
        result("base", 0, [8, 8, 8], [8, 8, 8], scene="b"),
    ]
    rows = {(row["scene"], row["row"]): row for row in summarize_rows(results, "base", outliers=2)}
    assert list(rows) == [("a", "mean"), ("a", "base"), ("a", "new"), ("b", "base")]
    base, new = rows["a", "base"], rows["a", "new"]
    assert (base["n_seeds"], base["median_t"], base["spread_t"], base["seconds"]) == (3, 3, 1, 12)  # of 2, 4, 3
    assert (base["median_r_deg"], base["spread_r_deg"]) == (2, 1)  # of 1, 3, 2
    assert (new["n_seeds"], new["median_t"], new["ratio_t"]) == (2, 1.5, 0.5)
    assert (base["p90_t"], new["p90_t"]) == pytest.approx((4, 4.7))  # of 24.4, 4, 3 and of 7.4, 2
    assert new["ratio_r"] == 1 and rows["a", "mean"]["ratio_t"] == 3 and rows["b", "base"]["ratio_t"] == 1
    assert (base["outlier_t"], base["outlier_r_deg"]) == (4, 3)  # means of views 2 and 0: 15.5, 4, 3 and 4, 3, 2
    assert (new["outlier_t"], new["outlier_r_deg"]) == (3.5, 2.5)  # 5, 2 and 3, 2
    assert (new["mean_t"], new["mean_r_deg"]) == pytest.approx((17 / 6, 7 / 3))  # 11 / 3, 2 and 8 / 3, 2
    share = next(row for row in summarize_rows(results, "base", outliers=0.4) if row["row"] == "new")
    assert (share["outlier_t"], share["outlier_r_deg"]) == (5.5, 2)  # view 2 alone: 9, 2 and 2, 2
    assert "outlier_t" not in next(iter(summarize_rows(results, "base")))


def test_without_the_reference_among_the_results_ratios_are_one() -> None:
    (row,) = summarize_rows([result("new", 0, [2], [4])], "base")
    assert (row["ratio_t"], row["ratio_r"]) == (1, 1)


def test_summary_of_pictures_by_hand() -> None:
    def of(row: str, seed: int, psnr: list[float], seconds: float) -> PictureResult:
        return PictureResult(row, "a", seed, psnr, [0.5, 0.7], seconds, 20.0)

    results = [of("x", 0, [20.0, 22.0], 5.0), of("x", 1, [24.0, 26.0], 9.0), of("x", 2, [21.0, 23.0], 7.0)]
    x, y = summarize_pictures([*results, of("y", 0, [25.0, 25.0], 1.0)], "x")
    assert x == {
        "scene": "a",
        "row": "x",
        "n_seeds": 3,
        "psnr_db": 22.0,
        "spread_db": 2.0,
        "ssim": pytest.approx(0.6),
        "seconds": 7.0,
        "samples_per_ray": 20.0,
        "gain_db": 0.0,
    }
    assert (y["row"], y["gain_db"]) == ("y", 3.0)
