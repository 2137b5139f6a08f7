"""The medians of DFNet's published predictions, recomputed: an evaluator that does not give these is wrong.

Needs a folder with `poses/published_outputs_DFNet/{7Scenes,Cambridge}/<scene>_{predict,test_gt}.txt.gz`, named by
the environment variable POSEMAP_TEST_DATA.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from posemap_fast.eval import evaluate_files

DATA = os.environ.get("POSEMAP_TEST_DATA", "")

pytestmark = [
    pytest.mark.dataset,
    pytest.mark.skipif(
        not DATA, reason="POSEMAP_TEST_DATA is not set; it names a folder with poses/published_outputs_DFNet"
    ),
]

MEDIANS = {  # scene -> (m, deg) as published with the files, to the last digit
    "Cambridge/KingsCollege": ("0.732", "2.37"),
    "Cambridge/OldHospital": ("1.995", "2.98"),
    "Cambridge/ShopFacade": ("0.674", "2.20"),
    "Cambridge/StMarysChurch": ("1.371", "4.03"),
    "7Scenes/chess": ("0.033", "1.12"),
    "7Scenes/fire": ("0.058", "2.30"),
    "7Scenes/heads": ("0.042", "2.24"),
    "7Scenes/office": ("0.059", "1.54"),
    "7Scenes/pumpkin": ("0.067", "1.88"),
    "7Scenes/redkitchen": ("0.066", "1.72"),
    "7Scenes/stairs": ("0.120", "2.63"),
}


@pytest.mark.parametrize("scene", MEDIANS)
def test_the_published_medians_come_out_to_the_last_digit(scene: str) -> None:
    stem = Path(DATA) / "poses" / "published_outputs_DFNet" / scene
    result = evaluate_files(f"{stem}_predict.txt.gz", f"{stem}_test_gt.txt.gz")
    assert (f"{result['median_t_m']:.3f}", f"{result['median_r_deg']:.2f}") == MEDIANS[scene]
    assert result["n_missing"] == result["n_unmatched"] == 0
