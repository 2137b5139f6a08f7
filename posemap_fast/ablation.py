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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from posemap_fast.ablation_results import PictureResult, RowResult
from posemap_fast.apr import APRNet
from posemap_fast.config import load_config, to_dict
from posemap_fast.data import Scene
from posemap_fast.errors import ConfigError, DatasetError, FileFormatError
from posemap_fast.eval import nearest_views, outlier_order, pose_errors
from posemap_fast.experiment import DataConfig, ExperimentConfig, load_experiment
from posemap_fast.files import write_text
from posemap_fast.geometry import mean_pose
from posemap_fast.localize import REFINEMENT, MapRefiner, SceneMap
from posemap_fast.progress import ProgressMeter
from posemap_fast.refinement import REFINEMENT_VERSION, PosedImages, calibrate_refined, score_refined
from posemap_fast.results import (
    JudgedFrames,
    environment,
    git_commit,
    model_errors,
    reliability_of,
    render_test_views,
)
from posemap_fast.stages import SceneStages, read_scene
from posemap_fast.train import MetricsLog, OnlineMap, predict_poses

__all__ = ["Ablation", "AblationRow", "load_ablation", "run_ablation"]

logger = logging.getLogger(__name__)
_SCHEMA = 1
_BASELINES = ("mean training pose", "nearest training view")


@dataclass(frozen=True)
class AblationRow:
    """One line of the table: what is different."""

    set: tuple[str, ...] = ()  # overrides, as given to --set
    align: Literal["", "inductive", "transductive"] = ""  # also align the network, and score that
    refine: bool = False  # also correct the answers (those of the aligned network, if any) by the map, and score that
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
    measure: Literal["poses", "pictures"] = "poses"  # pictures: only the field is trained, and its renders are judged
    intervals: bool = False  # also judge the error intervals that a localizer of the row would give
    outliers: float = 0.0  # also score the views farthest from the training cameras' clusters (paper, table 4): so
    # many, or a share of the test views if below 1

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("ablation: rows must name at least one row")
        if self.reference and self.reference not in self.rows:
            raise ConfigError(f"ablation: reference '{self.reference}' is no row (rows: {', '.join(self.rows)})")
        files: dict[str, str] = {}
        for name in self.rows:
            other = files.setdefault(_file_name(name), name)
            if other != name:
                raise ConfigError(f"ablation: rows '{other}' and '{name}' would share a file; rename one")
        if not self.outliers >= 0 or (self.outliers >= 1 and self.outliers % 1):
            raise ConfigError(
                f"ablation: outliers must be a share below 1 or a whole number of views; got {self.outliers}"
            )

    @property
    def reference_row(self) -> str:
        """Name of the row that the others are compared with."""
        return self.reference or next(iter(self.rows))


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
) -> list[RowResult] | list[PictureResult]:
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
    results: list[Any] = []
    for scene, seed in jobs:
        runner = _SceneRunner(scenes[scene], scene, seed, out, meter, ablation.intervals)
        for name in wanted:
            row = ablation.rows[name]
            config = load_experiment(ablation.preset, (), [*ablation.set, *row.set, *overrides]).resolved()
            meter.note(f"{scene}, seed {seed}: {name}")
            results += runner.run(name, row, config) if ablation.measure == "poses" else runner.judge(name, config)
    return results


class _SceneRunner:
    """The rows of one scene and seed; keeps the last map in memory."""

    def __init__(self, identity: str, name: str, seed: int, out: Path, meter: ProgressMeter, intervals: bool = False):
        self.identity, self.name, self.seed, self.meter, self.intervals = identity, name, seed, meter, intervals
        self.folder = out / name / f"seed{seed}"
        self._fingerprints: dict[str, str | None] = {}
        self._loaded: tuple[str, Path, SceneStages, SceneMap, OnlineMap] | None = None
        self._nearest_refined: tuple[SceneMap, dict[str, Any]] | None = None  # map, and what it makes of a baseline

    def run(self, name: str, row: AblationRow, config: ExperimentConfig) -> list[RowResult]:
        """Results of a row: of the network, and of the aligned and the refined answers where the row asks for them."""
        further: dict[str, Any] = {"align": row.align}
        further |= {"intervals": True} if self.intervals else {}
        further |= {"refine": to_dict(REFINEMENT) | {"version": REFINEMENT_VERSION}} if row.refine else {}
        stored = self._stored(name, config, further, lambda: self._train_row(name, row, config))
        return [RowResult(**entry) for entry in stored["results"]]

    def judge(self, name: str, config: ExperimentConfig) -> list[PictureResult]:
        """The result of a row's field."""
        stored = self._stored(name, config, {"measure": "pictures"}, lambda: self._train_field(name, config))
        return [PictureResult(**entry) for entry in stored["results"]]

    def _stored(
        self, name: str, config: ExperimentConfig, further: dict[str, Any], train: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The file of a row, made by `train` when it is not there."""
        if config.threads:
            torch.set_num_threads(config.threads)
        path = self.folder / "rows" / f"{_file_name(name)}.json"
        identity = {"config": to_dict(config), **further}
        stored = _read_row(path, identity)
        if stored is None:
            scene = {"identity": self.identity, "fingerprint": self._fingerprint(config.data)}
            stored = train() | {"schema": _SCHEMA, "row": name, **identity, **scene}
            write_text(path, json.dumps(stored, indent=1) + "\n")
        else:
            self._check_scene(path, stored, config.data)
        return stored

    def _check_scene(self, path: Path, stored: Mapping[str, Any], data: DataConfig) -> None:
        """A row belongs to what a scene holds, wherever it lies; to its place where one of the two is not known.

        Raises:
            ConfigError: it belongs to another scene.
        """
        is_same = stored.get("identity") == self.identity
        if is_same and self.identity == "room":  # holds what the code says
            return
        there, here = stored.get("fingerprint"), self._fingerprint(data)
        if there and here:
            is_same = there == here
        if not is_same:
            raise ConfigError(
                f"{path}: was made of another scene, or of {stored.get('identity')} before it changed; choose another "
                "--out, or remove it"
            )

    def _fingerprint(self, data: DataConfig) -> str | None:
        """Of the scene's content; None where it cannot be read."""
        key = _digest(to_dict(data))
        if key not in self._fingerprints:
            try:
                self._scene(data)
            except DatasetError:
                self._fingerprints[key] = None
        return self._fingerprints[key]

    def _scene(self, data: DataConfig) -> Scene:
        scene = read_scene(self.identity, data)
        self._fingerprints[_digest(to_dict(data))] = scene.fingerprint
        return scene

    def _train_field(self, name: str, config: ExperimentConfig) -> dict[str, Any]:
        scene = self._scene(config.data)
        folder = self._field_folder(scene, config)
        stages = SceneStages(scene, config, self.seed, folder, MetricsLog(folder / "metrics.jsonl"), self.meter)
        scene_map, stage = stages.field(stages.frame())
        pictures = render_test_views(scene_map, stages.views["test"], self.meter)
        entry = {
            "row": name,
            "scene": self.name,
            "seed": self.seed,
            "psnr_db": [round(v, 4) for v in pictures.psnr_db],
            "ssim": [round(v, 5) for v in pictures.ssim],
            "seconds": round(stages.seconds["field"], 1),
            "samples_per_ray": round(stage.totals["samples"] / max(1.0, stage.totals["rays"]), 2),
        }
        return {"results": [entry]} | _origin(stages.device)

    def _field_folder(self, scene: Scene, config: ExperimentConfig) -> Path:
        return self.folder / "fields" / _digest([scene.fingerprint, field_part(config)])

    def _train_row(self, name: str, row: AblationRow, config: ExperimentConfig) -> dict[str, Any]:
        key, field_folder, stages, scene_map, online = self._map(config)
        stages.config = config
        apr = config.apr
        views = _digest([to_dict(config.rvs), apr.rvs_batch, apr.render_scale, apr.steps, config.data.network_side])
        online.bank = field_folder / "views" / views
        network = _digest([key, to_dict(config.apr), to_dict(config.network)])
        stages.folder = self.folder / "networks" / network  # rows that differ in their alignment only share it
        net = stages.network("apr", config.apr, online, scene_map.pose_frame)
        before = self._score(name, net, stages, stages.seconds["apr"])
        protocol = row.align or "inductive"
        stages.config = dataclasses.replace(config, protocol=protocol)
        stages.folder = stages.folder / _digest([to_dict(config.align), protocol])
        judged = stages.cross_align(net, online) if self.intervals else None
        known = judged and JudgedFrames(judged.before, judged.c2w, judged.is_known)
        entries = [before | self._trust(net, stages, online, known)]
        has_unlabelled = len(stages.views["unlabelled"]) > 0
        if row.align and has_unlabelled:
            entries.append(self._score(f"{name}, on the unlabelled frames", net, stages, 0.0, "unlabelled"))
        if row.align:
            stages.seconds.pop("align", None)
            aligned = stages.align(net, online)
            entry = self._score(f"{name}, aligned", aligned, stages, stages.seconds.get("align", 0.0))
            known = judged and JudgedFrames(judged.aligned, judged.c2w, judged.is_known)
            entries.append(entry | self._trust(aligned, stages, online, known))
            if has_unlabelled:
                label = f"{name}, aligned, on the unlabelled frames"
                entries.append(self._score(label, aligned, stages, 0.0, "unlabelled"))
        if row.refine:
            label = f"{name}, aligned, refined" if row.align else f"{name}, refined"
            entries += self._refined(label, aligned if row.align else net, stages, scene_map)
        extra = {"map": key, "map_seconds": {k: round(v, 1) for k, v in stages.seconds.items() if k in _MAP_PARTS}}
        return extra | {"results": [*self._baselines(stages), *entries]} | _origin(stages.device)

    def _map(self, config: ExperimentConfig) -> tuple[str, Path, SceneStages, SceneMap, OnlineMap]:
        """The map that this configuration asks for: kept, read, or trained; its key, and the folder of its field."""
        scene = self._scene(config.data)
        key = _digest([scene.fingerprint, map_part(config)])
        if self._loaded is not None and self._loaded[0] == key:
            return self._loaded
        field_folder = self._field_folder(scene, config)
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

    def _trust(
        self, net: APRNet, stages: SceneStages, online: OnlineMap, unlabelled: JudgedFrames | None
    ) -> dict[str, Any]:
        """How the intervals of a network do on the test views, where that is asked for; `model_errors` has the rest."""
        if not self.intervals:
            return {}
        random = stages.unseen_views(online, net.config.input_size)
        model, calibration = model_errors(net, stages.views, random, unlabelled)
        trust = reliability_of(net, model, calibration, stages.views["test"])
        return {"trust": {key: found.to_dict() for key, found in trust.items()}}

    def _refined(self, name: str, net: APRNet, stages: SceneStages, scene_map: SceneMap) -> list[dict[str, Any]]:
        """The answers of a network, corrected by the map, and those of the nearest training view."""
        refiner, scene = MapRefiner(scene_map, REFINEMENT), stages.scene
        validation, test = (PosedImages.of(scene, split, stages.views[split].images) for split in ("val", "test"))
        errors = None
        try:
            if self.intervals:
                errors = calibrate_refined(refiner, net, validation, self.seed, self.meter, stages.checkpointer)
        except DatasetError as error:
            self.meter.note(f"no intervals of refined answers: {error}")
        start = predict_poses(net, test.images)
        score = score_refined(refiner, start, test, errors, self.meter, stages.checkpointer)
        if self._nearest_refined is None or self._nearest_refined[0] is not scene_map:
            found = score_refined(refiner, _nearest(stages), test, None, self.meter)
            self._nearest_refined = (scene_map, self._entry(f"{_BASELINES[1]}, refined", found.c2w, scene, seconds=0.0))
        trust = {"trust": {key: found.to_dict() for key, found in score.reliability.items()}}
        entry = self._entry(name, score.c2w, scene, seconds=0.0) | (trust if errors else {})
        return [self._nearest_refined[1], entry]

    def _baselines(self, stages: SceneStages) -> list[dict[str, Any]]:
        scene = stages.scene
        average = mean_pose(scene.c2w[scene.views("train")]).expand(len(scene.views("test")), 4, 4)
        answers = zip(_BASELINES, (average, _nearest(stages)), strict=True)
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


def _nearest(stages: SceneStages) -> torch.Tensor:
    """(n_test, 4, 4) pose of the training view that looks most like each test view."""
    scene, views = stages.scene, stages.views
    train = scene.c2w[scene.views("train")]
    return train[nearest_views(views["train"].images, views["test"].images).cpu()]


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


def _origin(device: torch.device) -> dict[str, Any]:
    return {"commit": git_commit(), "environment": environment(device)}


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
    is_aligned = bool(identity.get("align") or identity.get("intervals"))
    for key, value in identity.items():
        wanted, found = json.loads(json.dumps(value)), stored.get(key)
        if key == "config" and not is_aligned and isinstance(found, dict):  # how others are aligned does not count
            wanted, found = ({name: part for name, part in c.items() if name != "align"} for c in (wanted, found))
        if found != wanted:
            raise ConfigError(f"{path}: was made with another {key}; choose another --out, or remove it")
    return stored
