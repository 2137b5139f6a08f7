"""The configuration of a whole run: the stages' own configs side by side, and the presets that fill them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posemap_fast.apr import BACKBONES, HEADS, APRConfig
from posemap_fast.backends import AUTO, named_device, resolve_backend
from posemap_fast.config import load_config
from posemap_fast.errors import ConfigError
from posemap_fast.fields import FIELD_BACKBONES, FieldConfig
from posemap_fast.render import RENDER_BACKENDS, RenderConfig
from posemap_fast.resources import resource_dir
from posemap_fast.train import AlignConfig, APRTrainConfig, FieldTrainConfig, PoseBranchConfig, RVSConfig

__all__ = ["DataConfig", "ExperimentConfig", "load_experiment", "preset_names"]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and what is done to the images before training."""

    dataset: str = ""  # format of the scene's folder, a name in PARSERS; empty = recognised by its files
    gt: Literal["", "sfm", "dslam"] = ""  # ground truth where a dataset has two; empty = its default
    stride: int = 1  # every n-th frame of each sequence, for datasets that are videos
    unlabelled_every: int = 0  # every n-th test image becomes an unlabelled one for alignment and is not scored
    max_side: int = 0  # px; longer side of the images the map is trained on, 0 = as stored
    network_side: int = 0  # px; longer side of the network's input at the camera's aspect ratio, 0 = apr.input_size
    room_train: int = 200  # training views of the scene `room`
    room_test: int = 40  # test views of the scene `room`
    room_width: int = 160  # px; the height is three quarters of it

    def __post_init__(self) -> None:
        if self.unlabelled_every == 1 or self.unlabelled_every < 0:
            raise ConfigError(
                f"data: unlabelled_every must be 0 (off) or at least 2, or nothing would be scored; "
                f"got {self.unlabelled_every}"
            )


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides a run besides the scene and the seed."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    render: RenderConfig = dataclasses.field(default_factory=RenderConfig)
    nerf: FieldTrainConfig = dataclasses.field(default_factory=FieldTrainConfig)
    rvs: RVSConfig = dataclasses.field(default_factory=RVSConfig)
    posemap: PoseBranchConfig = dataclasses.field(default_factory=PoseBranchConfig)
    network: APRConfig = dataclasses.field(default_factory=APRConfig)
    apr: APRTrainConfig = dataclasses.field(default_factory=APRTrainConfig)
    align: AlignConfig = dataclasses.field(default_factory=AlignConfig)
    pose_scale: Literal["metric", "auto"] = "auto"  # unit of regressed translation: world unit, or cameras' spread
    protocol: Literal["inductive", "transductive"] = "inductive"  # transductive aligns on the test images
    checkpoint_every_s: float = 30.0  # seconds between two checkpoints of a stage; an interruption loses less
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: the first GPU where there is one
    threads: int = 0  # CPU threads, 0 = torch's own; results repeat bit by bit for a fixed number

    def __post_init__(self) -> None:
        """Names of plug-ins are checked at the door, before anything is loaded or written."""
        if self.field.backbone != AUTO:
            FIELD_BACKBONES.get(self.field.backbone)
        if self.render.backend != AUTO:
            RENDER_BACKENDS.get(self.render.backend)
        named_device(self.device)
        BACKBONES.get(self.network.backbone)
        HEADS.get(self.network.head)
        if not self.apr.teaches_poses:
            raise ConfigError(
                "apr: nothing to learn from: weights.pose, image, posemap and rvs are all 0 (rvs counts as 0 when "
                "rvs_batch is); set one of them"
            )
        if self.align.method == "paper" and self.network.pose_from == "posemap":
            raise ConfigError(
                "align.method=paper teaches by the gradient of the pose, which does not reach a predicted PoseMap; "
                "use align.method=distil, or network.pose_from=head"
            )

    def resolved(self) -> ExperimentConfig:
        """The same with the device and the backends that `auto` stands for here: a stored run says what it used."""
        device = named_device(self.device)
        field = resolve_backend("field.backbone", self.field.backbone, device)
        render = resolve_backend("render.backend", self.render.backend, device)
        return dataclasses.replace(
            self,
            device=str(device),
            field=dataclasses.replace(self.field, backbone=field),
            render=dataclasses.replace(self.render, backend=render),
        )


def preset_names() -> list[str]:
    """Names of the files in configs/presets."""
    return sorted(path.stem for path in (resource_dir("configs") / "presets").glob("*.yaml"))


def load_experiment(preset: str, files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Defaults < preset < further files < `--set` overrides.

    Raises:
        ConfigError: unknown preset or key, wrong type or range.
    """
    names = preset_names()
    if preset not in names:
        raise ConfigError(f"--preset {preset}: unknown preset (known: {', '.join(names)})")
    path = resource_dir("configs") / "presets" / f"{preset}.yaml"
    return load_config(ExperimentConfig, [path, *files], overrides)
