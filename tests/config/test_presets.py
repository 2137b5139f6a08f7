"""Every file in configs/presets is a valid experiment, and the promises of the README about them hold."""

from __future__ import annotations

import dataclasses

import pytest

from posemap_fast.config import diff
from posemap_fast.errors import ConfigError
from posemap_fast.experiment import ExperimentConfig, load_experiment, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_changes_something(name: str) -> None:
    assert diff(ExperimentConfig(), load_experiment(name))


def test_the_four_presets_of_the_readme_exist() -> None:
    assert {"smoke", "cpu", "gpu", "paper"} <= set(preset_names())


def test_paper_preset_holds_the_constants_of_the_paper() -> None:
    paper = load_experiment("paper")
    assert (paper.network.backbone, paper.network.head, paper.network.feature_dim) == ("vgg16", "gap_linear", 128)
    assert (paper.rvs.max_translation, paper.rvs.max_rotation_deg) == (0.2, 10.0)
    assert (paper.apr.lr, paper.apr.subset, paper.align.lr, paper.align.batch) == (1e-4, 0.2, 1e-5, 1)
    weights = paper.apr.weights
    assert (weights.pose, weights.image, weights.posemap, weights.rvs) == (1.0, 1.0, 1.0, 1.0)
    assert paper.pose_scale == "metric" and paper.protocol == "transductive"
    assert paper.field.pose_features == 256


def test_gpu_preset_is_the_recipe_of_the_cpu_preset_at_another_size() -> None:
    """What ablations on the CPU chose is not lost on a GPU, where they would take another machine."""
    cpu, gpu = load_experiment("cpu"), load_experiment("gpu")
    assert gpu.apr.weights == cpu.apr.weights and gpu.apr.translation_weight == cpu.apr.translation_weight
    assert gpu.network.pose_from == cpu.network.pose_from == "posemap"
    assert gpu.rvs == dataclasses.replace(cpu.rvs, coarseness=gpu.rvs.coarseness)
    assert (gpu.nerf.distortion, gpu.field.appearance_dim) == (cpu.nerf.distortion, cpu.field.appearance_dim)
    assert gpu.posemap.range_scale == cpu.posemap.range_scale
    assert gpu.align.posemap_weight == cpu.align.posemap_weight and gpu.pose_scale == cpu.pose_scale


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'relative_translation'"):
        load_experiment("cpu", [], ["rvs.relative_translatoin=1"])


@pytest.mark.parametrize("left", [["apr.weights.rvs=0"], ["apr.rvs_batch=0"]])
def test_a_run_without_a_loss_is_refused(left: list[str]) -> None:
    others = [f"apr.weights.{name}=0" for name in ("pose", "image", "posemap")]
    load_experiment("cpu", [], others)
    with pytest.raises(ConfigError, match="nothing to learn from"):
        load_experiment("cpu", [], [*others, *left])
