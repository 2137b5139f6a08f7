"""Ablations: rows of configuration changes x scenes x seeds, run resumably and summed up in one table.

    config file -> rows;  row, scene, seed -> map (shared by all rows with the same map) -> network -> errors on test

Everything that does not differ between two rows is done once: a field (stage 1) and a map (with its pose branch) belong
to the parts of the configuration that decide them, and the random views that networks train on are kept beside the
field (`train.random_views`). What a row adds is one network, so the rows of one seed differ in nothing but what they
say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch

from posemap_fast.apr import APRNet
from posemap_fast.config import load_config, to_dict
from posemap_fast.data import Scene
from posemap_fast.errors import ConfigError, FileFormatError
from posemap_fast.eval import nearest_views, outlier_order, pose_errors
from posemap_fast.experiment import ExperimentConfig, load_experiment
from posemap_fast.files import write_text
from posemap_fast.geometry import mean_pose
from posemap_fast.localize import SceneMap
from posemap_fast.progress import ProgressMeter
from posemap_fast.results import environment, git_commit
from posemap_fast.stages import SceneStages, read_scene
from posemap_fast.train import MetricsLog, OnlineMap, predict_poses

__all__ = ["Ablation", "AblationRow", "RowResult", "load_ablation", "run_ablation", "summarize_rows"]

logger = logging.getLogger(__name__)
_SCHEMA = 1
_BASELINES = ("mean training pose", "nearest training view")


@dataclass(frozen=True)
class AblationRow:
    """One line of the table: what is different."""

    set: tuple[str, ...] = ()  # overrides, as given to --set
    align: Literal["", "inductive", "transductive"] = ""  # also align the network, and score that
    note: str = ""  # printed beside the row


@dataclass(frozen=True)
class Ablation:
    """An ablation, as its YAML file describes it."""

    title: str = ""
    preset: str = "cpu"
    scenes: tuple[str, ...] = ("room",)  # `room`, or folders relative to the file; --scene replaces them
    set: tuple[str, ...] = ()  # overrides common to all rows
    rows: dict[str, AblationRow] = field(default_factory=dict)
    reference: str = ""  # row that the others are compared with; empty = the first
    outliers: int = 0  # also score this many views farthest from the training cameras' clusters (paper, table 4)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("ablation: rows must name at least one row")
        if self.reference and self.reference not in self.rows:
            raise ConfigError(f"ablation: reference '{self.reference}' is no row (rows: {', '.join(self.rows)})")

    @property
    def reference_row(self) -> str:
        """Name of the row that the others are compared with."""
        return self.reference or next(iter(self.rows))


@dataclass(frozen=True)
class RowResult:
    """One row on one scene with one seed; errors per test view in the order of the scene's test split."""

    row: str
    scene: str
    seed: int
    t_err: list[float]  # scene units
    r_err_deg: list[float]
    far_order: list[int]  # test views, farthest from the training cameras first (`eval.outlier_order`)
    seconds: float  # of training the network
    metric: bool

    @property
    def medians(self) -> tuple[float, float]:
        """Median translation and rotation error."""
        return median(self.t_err), median(self.r_err_deg)


def load_ablation(path: Path) -> Ablation:
    """Read and check an ablation file, the configuration of every row included.

    Raises:
        ConfigError: missing file, unknown key, wrong type, a row whose overrides are refused.
    """
    found = load_config(Ablation, path)
    for name, row in found.rows.items():
        try:
            load_experiment(found.preset, (), [*found.set, *row.set])
        except ConfigError as error:
            raise ConfigError(f"{path}: row '{name}': {error}") from error
    return found


def run_ablation(
    ablation: Ablation,
    scenes: Mapping[str, str],
    seeds: Sequence[int],
    out: Path,
    meter: ProgressMeter,
    *,
    rows: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[RowResult]:
    """Train what is missing and return all results, those of earlier calls included.

    Args:
        scenes: short name -> `room` or the path of a capture.
        out: folder of maps, checkpoints and results; a finished row is a file there and is not run again.
        rows: only these; default all.
        overrides: further overrides for all rows.
    Raises:
        ConfigError: unknown row, or `out` holds a row made with another configuration.
    """
    wanted = list(rows) or list(ablation.rows)
    for name in wanted:
        if name not in ablation.rows:
            raise ConfigError(f"--rows: no row '{name}' (rows: {', '.join(ablation.rows)})")
    jobs = [(scene, seed) for scene in scenes for seed in seeds]
    results: list[RowResult] = []
    for scene, seed in jobs:
        runner = _SceneRunner(scenes[scene], scene, seed, out, meter)
        for name in wanted:
            row = ablation.rows[name]
            config = load_experiment(ablation.preset, (), [*ablation.set, *row.set, *overrides]).resolved()
            meter.note(f"{scene}, seed {seed}: {name}")
            results += runner.run(name, row, config)
    return results


class _SceneRunner:
    """The rows of one scene and seed; keeps the last map in memory."""

    def __init__(self, identity: str, name: str, seed: int, out: Path, meter: ProgressMeter):
        self.identity, self.name, self.seed, self.meter = identity, name, seed, meter
        self.folder = out / name / f"seed{seed}"
        self._loaded: tuple[str, Path, SceneStages, SceneMap, OnlineMap] | None = None

    def run(self, name: str, row: AblationRow, config: ExperimentConfig) -> list[RowResult]:
        """Results of a row: of the network, and of the aligned one where the row asks for it."""
        if config.threads:
            torch.set_num_threads(config.threads)
        path = self.folder / "rows" / f"{_file_name(name)}.json"
        identity = {"config": to_dict(config), "align": row.align, "identity": self.identity}
        stored = _read_row(path, identity)
        if stored is None:
            stored = self._train_row(name, row, config) | {"schema": _SCHEMA, "row": name, **identity}
            write_text(path, json.dumps(stored, indent=1) + "\n")
        return [RowResult(**entry) for entry in stored["results"]]

    def _train_row(self, name: str, row: AblationRow, config: ExperimentConfig) -> dict[str, Any]:
        key, field_folder, stages, scene_map, online = self._map(config)
        stages.config = config
        apr = config.apr
        views = _digest([to_dict(config.rvs), apr.rvs_batch, apr.render_scale, apr.steps, config.data.network_side])
        online.bank = field_folder / "views" / views
        network = _digest([key, to_dict(config.apr), to_dict(config.network)])
        stages.folder = self.folder / "networks" / network  # rows that differ in their alignment only share it
        net = stages.network("apr", config.apr, online, scene_map.pose_frame)
        entries = [self._score(name, net, stages, stages.seconds["apr"])]
        has_unlabelled = len(stages.views["unlabelled"]) > 0
        if row.align and has_unlabelled:
            entries.append(self._score(f"{name}, on the unlabelled frames", net, stages, 0.0, "unlabelled"))
        if row.align:
            stages.config = dataclasses.replace(config, protocol=row.align)
            stages.folder = stages.folder / _digest([to_dict(config.align), row.align])
            stages.seconds.pop("align", None)
            aligned = stages.align(net, online)
            entries.append(self._score(f"{name}, aligned", aligned, stages, stages.seconds.get("align", 0.0)))
            if has_unlabelled:
                label = f"{name}, aligned, on the unlabelled frames"
                entries.append(self._score(label, aligned, stages, 0.0, "unlabelled"))
        extra = {"map": key, "map_seconds": {k: round(v, 1) for k, v in stages.seconds.items() if k in _MAP_PARTS}}
        return extra | {"results": [*self._baselines(stages), *entries]} | _origin()

    def _map(self, config: ExperimentConfig) -> tuple[str, Path, SceneStages, SceneMap, OnlineMap]:
        """The map that this configuration asks for: kept, read, or trained; its key, and the folder of its field."""
        scene = read_scene(self.identity, config.data)
        key = _digest([scene.fingerprint, map_part(config)])
        if self._loaded is not None and self._loaded[0] == key:
            return self._loaded
        field_folder = self.folder / "fields" / _digest([scene.fingerprint, field_part(config)])
        folder = self.folder / "maps" / key
        log = MetricsLog(folder / "metrics.jsonl")
        stages = SceneStages(scene, config, self.seed, field_folder, log, self.meter)
        scene_map, _ = stages.field(stages.frame())
        stages.folder = folder
        sampler = stages.sampler(scene_map)
        stages.pose_branch(scene_map, sampler)
        online = stages.online_map(scene_map, sampler)
        self._loaded = (key, field_folder, stages, scene_map, online)
        return self._loaded

    def _score(
        self, name: str, net: APRNet, stages: SceneStages, seconds: float, split: str = "test"
    ) -> dict[str, Any]:
        answer = predict_poses(net, stages.views[split].images).cpu()
        return self._entry(name, answer, stages.scene, seconds, split)

    def _baselines(self, stages: SceneStages) -> list[dict[str, Any]]:
        scene, views = stages.scene, stages.views
        train = scene.c2w[scene.views("train")]
        n_test = len(scene.views("test"))
        nearest = train[nearest_views(views["train"].images, views["test"].images).cpu()]
        answers = zip(_BASELINES, (mean_pose(train).expand(n_test, 4, 4), nearest), strict=True)
        return [self._entry(name, answer, scene, 0.0) for name, answer in answers]

    def _entry(
        self, name: str, answer: torch.Tensor, scene: Scene, seconds: float, split: str = "test"
    ) -> dict[str, Any]:
        truth, train = scene.c2w[scene.views(split)], scene.c2w[scene.views("train")]
        t_err, r_err = pose_errors(answer.double(), truth)
        return {
            "row": name,
            "scene": self.name,
            "seed": self.seed,
            "metric": scene.is_metric,
            "seconds": round(seconds, 1),
            "t_err": [round(v, 6) for v in t_err.tolist()],
            "r_err_deg": [round(v, 4) for v in r_err.tolist()],
            "far_order": outlier_order(train, truth),
        }


_MAP_PARTS = ("frame", "field", "prune", "pose_branch", "view_cache", "readout")


def map_part(config: ExperimentConfig) -> dict[str, Any]:
    """What decides a map and its cached views: rows that agree in it share one."""
    parts = {key: to_dict(getattr(config, key)) for key in ("data", "field", "render", "nerf", "rvs", "posemap")}
    sizes = {"render_scale": config.apr.render_scale, "input_size": config.network.input_size}
    return parts | sizes | {"pose_scale": config.pose_scale, "device": config.device}


def field_part(config: ExperimentConfig) -> dict[str, Any]:
    """What decides stage 1: maps that agree in it share a field and its pictures."""
    parts = {key: to_dict(getattr(config, key)) for key in ("data", "field", "render", "nerf")}
    parts["field"] = {key: value for key, value in parts["field"].items() if not key.startswith("pose_")}
    return parts | {"pose_scale": config.pose_scale, "device": config.device}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _file_name(row: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in row)


def _origin() -> dict[str, Any]:
    return {"commit": git_commit(), "environment": environment()}


def _read_row(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished row, or None.

    Raises:
        ConfigError: the file is of another configuration.
        FileFormatError: not JSON.
    """
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path}: not JSON; remove it to run this row again") from error
    for key, value in identity.items():
        if stored.get(key) != json.loads(json.dumps(value)):
            raise ConfigError(f"{path}: was made with another {key}; choose another --out, or remove it")
    return stored


def summarize_rows(results: Sequence[RowResult], reference: str, outliers: int = 0) -> Iterator[dict[str, Any]]:
    """One summary per scene and row: medians over the seeds of the medians over the views, their spread, the ratio.

    Yields:
        scene, row, n_seeds, median_t, spread_t (half the range over seeds), median_r_deg, spread_r_deg, seconds,
        ratio_t, ratio_r (this row's median over the reference's), metric; with `outliers` also outlier_t and
        outlier_r_deg, mean errors on that many views farthest from the training cameras (paper, table 4).
    """
    groups: dict[tuple[str, str], dict[int, RowResult]] = {}
    for result in results:  # a baseline comes with every row; one per seed is enough
        groups.setdefault((result.scene, result.row), {})[result.seed] = result
    middle = {key: _over_seeds(list(group.values()), outliers) for key, group in groups.items()}
    for (scene, row), values in middle.items():
        base = middle.get((scene, reference), values)
        ratios = {
            "ratio_t": values["median_t"] / max(base["median_t"], 1e-12),
            "ratio_r": values["median_r_deg"] / max(base["median_r_deg"], 1e-12),
        }
        yield {"scene": scene, "row": row, **values, **ratios}


def _over_seeds(results: Sequence[RowResult], outliers: int) -> dict[str, Any]:
    t, r = zip(*(result.medians for result in results), strict=True)
    far = {}
    if outliers:
        views = [(result, result.far_order[:outliers]) for result in results]
        far["outlier_t"] = median(mean(r.t_err[i] for i in index) for r, index in views)
        far["outlier_r_deg"] = median(mean(r.r_err_deg[i] for i in index) for r, index in views)
    return {
        "n_seeds": len(results),
        "median_t": median(t),
        "spread_t": (max(t) - min(t)) / 2,
        "median_r_deg": median(r),
        "spread_r_deg": (max(r) - min(r)) / 2,
        "seconds": median(result.seconds for result in results),
        "metric": results[0].metric,
        **far,
    }
