"""Scene: what every dataset loader gives and every stage takes; the registry of datasets.

Convention: OpenCV camera-to-world poses, one pinhole camera shared by all views at their working size, images RGB.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch

from posemap_fast.data.image_stack import ImageStack
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, camera_rays
from posemap_fast.registry import Registry

__all__ = ["DATASETS", "SPLIT_NAMES", "DatasetKind", "Scene", "check_options", "load_scene", "pose_content"]

_OFF_ROUND = 0.618  # added before rounding down, so that values that people write lie far from the edges
SPLIT_NAMES = ("train", "val", "test", "unlabelled")


@dataclass(eq=False)
class Scene:
    """Posed images of one place with their split.

    `unlabelled` views have poses here, but nothing may read them: they stand for images without ground truth.
    """

    name: str
    images: ImageStack  # (n, H, W, 3) uint8 RGB
    names: list[str]  # n unique names, as results report them
    c2w: torch.Tensor  # (n, 4, 4) float64, world unit
    camera: Camera  # of the images as stored here
    splits: dict[str, list[int]]  # view indices under train, val, test, unlabelled; disjoint
    is_metric: bool  # the world unit is the metre
    split_rule: str  # one sentence: how the split came about
    points: torch.Tensor | None = None  # (p, 3) float32 sparse points, world unit
    depth: torch.Tensor | None = None  # (n, H, W) float32 z-depth of pixel centres; ground truth for tests
    ground_truth: str = ""  # where the poses come from, when the dataset has a choice
    notes: list[str] = field(default_factory=list)  # what the loader left out, and why
    image_digest: str = ""  # `images.digest()` where it is known already
    fingerprint: str = field(default="")  # SHA-256 of the content; computed when empty

    def __post_init__(self) -> None:
        n = len(self.names)
        assert self.images.shape == (n, self.camera.height, self.camera.width, 3) and self.images.dtype == torch.uint8
        assert self.c2w.shape == (n, 4, 4) and self.c2w.dtype == torch.float64
        assert set(self.splits) <= set(SPLIT_NAMES), f"unknown split in {sorted(self.splits)}"
        self.splits = {key: list(self.splits.get(key, [])) for key in SPLIT_NAMES}
        listed = [view for views in self.splits.values() for view in views]
        assert len(set(listed)) == len(listed), "splits overlap"
        self.fingerprint = self.fingerprint or self._digest()

    def _digest(self) -> str:
        """SHA-256 of images, poses, camera, names and split; a run refuses to resume on other content."""
        digest = hashlib.sha256()
        camera = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in self.camera.to_dict().items()}
        head = {"names": self.names, "camera": camera, "splits": self.splits, "metric": self.is_metric}
        digest.update(json.dumps(head, sort_keys=True).encode())
        digest.update((self.image_digest or self.images.digest()).encode())
        digest.update(pose_content(self.c2w))
        return digest.hexdigest()

    @property
    def n_views(self) -> int:
        """Number of images of all splits together."""
        return len(self.names)

    def views(self, split: str) -> list[int]:
        """Indices of the views of one split, in order.

        Raises:
            ConfigError: unknown split.
        """
        if split not in self.splits:
            raise ConfigError(f"scene {self.name}: unknown split '{split}' (known: {', '.join(SPLIT_NAMES)})")
        return self.splits[split]

    def counts(self) -> dict[str, int]:
        """Number of views per split."""
        return {key: len(views) for key, views in self.splits.items()}

    def ray_distances(self, view: int) -> torch.Tensor:
        """(H, W) float32 ground-truth distances along the rays of the pixel centres, from the z-depth.

        Raises:
            DatasetError: the scene has no depth.
        """
        if self.depth is None:
            raise DatasetError(f"scene {self.name}: no ground-truth depth; only procedural scenes have one")
        identity = torch.eye(4, dtype=torch.float64)
        cosine = camera_rays(self.camera, identity, self.camera.pixel_grid())[1][:, 2]
        return (self.depth[view] / cosine.reshape(self.camera.height, self.camera.width)).float()


def pose_content(c2w: torch.Tensor) -> bytes:
    """What a fingerprint takes of poses: whole multiples of a millionth of a rotation's unit and of the scene's size.

    The last bits of a pose are those of the processor that read it: linear algebra libraries take other ways on other
    processors, and a run is to go on wherever its files are taken. The scene's size is the cameras' median distance
    from their middle: neither a far origin nor a single absurd pose makes it coarse.

    Args:
        c2w: (n, 4, 4) float64.
    """
    unit = torch.full_like(c2w, 2.0**20)
    if len(c2w):
        centres = c2w[:, :3, 3]
        size = (centres - centres.median(dim=0).values).norm(dim=1).median()
        if size > 0:
            unit[:, :3, 3] /= 2.0 ** (size.log2() + _OFF_ROUND).floor()  # a power of two: no rounding of its own
    limit = 2.0**62  # of what a whole number holds
    return (c2w * unit + _OFF_ROUND).floor().clamp(-limit, limit).long().contiguous().numpy().tobytes()


@dataclass(frozen=True)
class DatasetKind:
    """One way to get a scene: `recognises(spec)` says whether it applies, `load(spec, **options)` does it."""

    recognises: Callable[[str], bool]
    load: Callable[..., Scene]
    expects: str  # what it looks for, in words, for the error message
    options: tuple[str, ...] | None = None  # what `load` takes beside the spec; None: see its signature


DATASETS: Registry[DatasetKind] = Registry("dataset")


def load_scene(spec: str | Path, dataset: str | None = None, **options: object) -> Scene:
    """Load the scene named by `spec`: `room`, or the path of a capture.

    Args:
        spec: name of a procedural scene or a path.
        dataset: name in `DATASETS`; None lets each kind look at `spec`.
        options: passed to the loader; see the loader's signature.
    Raises:
        DatasetError: nothing at `spec` is recognised, or the input is damaged.
        ConfigError: unknown dataset or option.
    """
    spec = str(spec)
    name = dataset or next((known for known in DATASETS if DATASETS.get(known).recognises(spec)), None)
    if name is None:
        kinds = "; ".join(f"{known}: {DATASETS.get(known).expects}" for known in DATASETS)
        state = "exists but holds none of these" if Path(spec).exists() else "does not exist"
        raise DatasetError(f"{spec}: no scene found, the path {state} ({kinds})")
    kind = DATASETS.get(name)
    known = kind.options if kind.options is not None else tuple(inspect.signature(kind.load).parameters)[1:]
    check_options(f"dataset {name}", options, known)
    return kind.load(spec, **options)


def check_options(where: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raise `ConfigError` for an option that is not among `known`, with the nearest that is."""
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{where}: unknown option '{option}'{hint} (known: {', '.join(known)})")
