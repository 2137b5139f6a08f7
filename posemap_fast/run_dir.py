"""A run's directory: its files, whose run it is, and whether it is finished.

A directory belongs to one scene, preset, configuration and seed; anything else is refused with the differences,
and nothing in it is written over.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from posemap_fast.config import diff, from_dict, to_dict
from posemap_fast.errors import ConfigError
from posemap_fast.experiment import ExperimentConfig
from posemap_fast.files import write_text

__all__ = ["RunDirectory", "RunIdentity"]

_REMOVED = tuple(("align", "image_pose", key) for key in ("blur_px", "step_t", "step_r_deg"))


@dataclass(frozen=True)
class RunIdentity:
    """What makes two runs the same."""

    scene: str  # `room` or the absolute path of a capture
    preset: str
    seed: int
    config: ExperimentConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in config.yaml."""
        return {"scene": self.scene, "preset": self.preset, "seed": self.seed, "config": to_dict(self.config)}


class RunDirectory:
    """Paths of one run's files, and the checks that keep runs apart."""

    def __init__(self, root: Path, identity: RunIdentity, is_checked: bool = True):
        """`is_checked`: the identity is what a caller wants, and is compared with what is there."""
        self.root = root
        self.identity = identity
        self.config_file = root / "config.yaml"
        self.summary_file = root / "summary.json"
        self.map_file = root / "scene.map"
        self.localizer_file = root / "localizer.pmnet"
        self.refined_file = root / "refined.json"
        self.report_file = root / "report.html"
        self.metrics_file = root / "metrics.jsonl"
        self.log_file = root / "log.txt"
        if is_checked:
            self._check_identity()

    @classmethod
    def open(cls, root: Path) -> RunDirectory:
        """The run that a directory holds, whatever version of the program began it; on the CPU where its GPU is not.

        Raises:
            ConfigError: it holds none, or one whose configuration this program does not know.
        """
        path = root / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"{root}: not the directory of a run (no config.yaml)")
        stored = _read(path, "the run is of no use without it; train again")
        values = dict(stored["config"])
        if str(values.get("device")).startswith("cuda") and not torch.cuda.is_available():
            values["device"] = "cpu"
        config = from_dict(ExperimentConfig, _without_removed(values), str(path))
        return cls(root, RunIdentity(stored["scene"], stored["preset"], stored["seed"], config), is_checked=False)

    def checkpoint(self, name: str) -> Path:
        """File in checkpoints/."""
        return self.root / "checkpoints" / name

    def is_finished(self) -> bool:
        """Whether the run has ended: its summary is the last file it writes."""
        return self.summary_file.exists()

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run."""
        return json.loads(self.summary_file.read_text(encoding="utf-8"))

    def _stored(self) -> dict[str, Any] | None:
        if not self.config_file.exists():
            return None
        return _read(self.config_file, "choose another --out")

    def _check_identity(self) -> None:
        stored = self._stored()
        if stored is None:
            self._check_foreign_files()
            return
        stored.pop("fingerprint", None)
        changes = diff(stored, self.identity.to_dict())
        if changes:
            path, (old, new) = next(iter(changes.items()))
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise ConfigError(
                f"{self.root}: this directory holds another run: {path} is {old} there and {new} now{more}; "
                "choose another --out, or remove the directory"
            )

    def _check_foreign_files(self) -> None:
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ConfigError(
                f"{self.root}: exists and is not the directory of a run (no config.yaml); choose another --out"
            )

    def fingerprint(self) -> str:
        """Of the scene that the run began with; empty where none is told."""
        return str((self._stored() or {}).get("fingerprint", ""))

    def claim(self, fingerprint: str) -> None:
        """Write config.yaml, or check that the scene's content is still the one the run began with.

        Raises:
            ConfigError: images, poses or split have changed since.
        """
        stored = self._stored()
        if stored is None:
            content = self.identity.to_dict() | {"fingerprint": fingerprint}
            write_text(self.config_file, yaml.safe_dump(content, sort_keys=False))
        elif stored.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{self.root}: the content of scene {self.identity.scene} has changed since this run began, or another "
                "version of this program began it "
                f"(fingerprint {str(stored.get('fingerprint'))[:12]} there, {fingerprint[:12]} now); "
                "choose another --out, or remove the directory"
            )

    def attach_log(self) -> logging.Handler:
        """Append the package's log records to log.txt."""
        handler = logging.FileHandler(self.log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("posemap_fast")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        return handler


def _without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that runs of earlier versions hold and that nothing asks for any more."""
    values = copy.deepcopy(values)
    for *path, key in _REMOVED:
        found: Any = values
        for part in path:
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, dict):
            found.pop(key, None)
    return values


def _read(path: Path, mend: str) -> dict[str, Any]:
    """The content of config.yaml.

    Raises:
        ConfigError: it is damaged, or not that of a run; `mend` says what to do.
    """
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML; {mend}") from error
    is_mapping = isinstance(stored, dict) and isinstance(stored.get("config"), dict)
    if not is_mapping or not {"scene", "preset", "seed"} <= stored.keys():
        raise ConfigError(f"{path}: not the config of a run; {mend}")
    return stored
