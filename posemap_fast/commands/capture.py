"""`posemap capture`: a scene from a video or a folder of photos."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.data import write_transforms_json
from posemap_fast.data.structure_from_motion import MATCHING, SFM_LENSES, KnownDistance, SfmConfig, StructureFromMotion
from posemap_fast.data.video import FrameChoice, PhotoFolder, Video, choose_frames, open_frames, write_frames
from posemap_fast.errors import ConfigError
from posemap_fast.files import write_text
from posemap_fast.optional import PYCOLMAP
from posemap_fast.progress import ProgressMeter, make_progress

__all__ = ["Stages", "capture"]

_MARKS = "capture.json"
_DESCRIPTION = """\
Make a scene out of a video or a folder of photos: choose sharp frames that see the place from different positions,
find the camera's poses, its lens and sparse points with COLMAP (pycolmap), and write what `posemap train` reads:
  OUT/images  OUT/transforms.json  OUT/points.npz  OUT/sparse/0 (the COLMAP model)  OUT/capture.json
Interrupt it whenever you like: the same command goes on where it stopped, and with another option redoes only what
depends on it (for that OUT/work is kept; remove it when you are content). Up is +z; the unit of length is arbitrary
unless --known-distance gives one.

Film slowly and sideways, in good light, with one zoom; standing on the spot and turning gives no depth.
"""
_EXAMPLE = """\
examples:
  posemap capture room.mp4 scenes/room
  posemap capture photos/ scenes/desk --max-side 1200
  posemap capture walk.mov scenes/street --max-frames 400 --matching sequential
  posemap capture room.mp4 scenes/room --known-distance frame_000000.jpg frame_000210.jpg 1.85
  posemap train --scene scenes/room"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="video file, or folder of JPEG or PNG photos of one camera")
    parser.add_argument("out", type=Path, help="folder of the new scene")
    parser.add_argument("--max-frames", type=int, metavar="N", help="frames at most (default: 150; all of a folder)")
    parser.add_argument("--min-frames", type=int, metavar="N", help="frames to aim at if the camera moves little (60)")
    parser.add_argument("--max-side", type=int, default=1600, metavar="PX", help="reduce larger frames (default: 1600)")
    parser.add_argument(
        "--matching", choices=MATCHING, default="auto", help="pairs (auto: exhaustive up to 200 images)"
    )
    parser.add_argument("--lens", choices=list(SFM_LENSES), default="radial", help="lens model (default: radial)")
    parser.add_argument(
        "--known-distance",
        nargs=3,
        metavar=("A", "B", "METRES"),
        help="measured distance between the camera's places in two images of OUT/images: makes the scene metric",
    )
    parser.add_argument("--threads", type=int, default=-1, metavar="N", help="for COLMAP (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


class Stages:
    """The stages of one folder, each done once for its options: capture.json says which are, and what they gave.

    Args:
        folder: OUT; made if there is none.
        source: the input in words.
        fingerprint: of the input's content.
        meter: is told of stages that need not run again.
    Raises:
        ConfigError: the folder holds another input's scene, or something else.
    """

    def __init__(self, folder: Path, source: str, fingerprint: str, meter: ProgressMeter):
        self.folder, self._meter, self._key = folder, meter, fingerprint
        self._file = folder / _MARKS
        self._content = self._stored() or {"input": source, "fingerprint": fingerprint, "stages": {}}
        if self._content["fingerprint"] != fingerprint:
            raise ConfigError(f"{folder}: holds the scene of {self._content['input']}; choose another OUT for {source}")
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def _stored(self) -> dict[str, Any] | None:
        if not self._file.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ConfigError(f"{self.folder}: exists and is not made by this command; choose another OUT")
            return None
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            if {"input", "fingerprint"} <= set(content) and isinstance(content["stages"], dict):
                return content
        except (OSError, ValueError, TypeError, KeyError):
            pass
        raise ConfigError(f"{self._file}: is damaged; choose another OUT, or remove {self.folder}")

    def _write(self) -> None:
        write_text(self._file, json.dumps(self._content, indent=1) + "\n")

    def run(
        self, name: str, options: Sequence[object], output: Path, work: Callable[[bool], dict[str, Any]]
    ) -> dict[str, Any]:
        """Do a stage unless it is done; its result.

        Args:
            name: of the stage.
            options: what its result depends on beside the stages before it.
            output: file or folder that a finished stage has left.
            work: does it, given whether the same work was interrupted; returns values for JSON.
        """
        stages = self._content["stages"]
        self._key = hashlib.sha256(repr((self._key, name, *options)).encode()).hexdigest()
        mark = stages.get(name, {})
        is_same = mark.get("key") == self._key and output.exists()
        if is_same and "result" in mark:
            self._meter.note(f"{name}: already done")
            return mark["result"]
        for later in list(stages)[list(stages).index(name) :] if name in stages else []:
            del stages[later]
        stages[name] = {"key": self._key}
        self._write()
        stages[name]["result"] = work(is_same)
        self._write()
        return stages[name]["result"]


def _choice(options: argparse.Namespace, source: Video | PhotoFolder) -> FrameChoice:
    """All photos of a folder, unless a number is given."""
    default = source.n_expected if isinstance(source, PhotoFolder) else FrameChoice.max_frames
    most = default if options.max_frames is None else options.max_frames
    return FrameChoice(min(FrameChoice.min_frames, most) if options.min_frames is None else options.min_frames, most)


def _known_distance(values: Sequence[str] | None) -> KnownDistance | None:
    if values is None:
        return None
    try:
        metres = float(values[2])
    except ValueError:
        metres = math.nan
    if not 0 < metres < math.inf:
        raise ConfigError(f"--known-distance: the third value is a distance in metres above 0; got '{values[2]}'")
    return KnownDistance(values[0], values[1], metres)


def _frames(
    source: Video | PhotoFolder, choice: FrameChoice, images: Path, max_side: int, meter: ProgressMeter
) -> dict[str, Any]:
    """Stage 1: images/ holds the chosen frames and nothing else; what was made of others is no scene any more."""
    images.with_name("transforms.json").unlink(missing_ok=True)
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    sizes = write_frames(source, choose_frames(source, choice, meter), images, max_side, meter)
    return {"names": list(sizes), "has_one_camera": len(set(sizes.values())) == 1}


def _write_scene(folder: Path, sfm: StructureFromMotion, known: KnownDistance | None) -> dict[str, Any]:
    """Last stage: the model in our layout; transforms.json is written last."""
    shutil.rmtree(folder / "sparse", ignore_errors=True)
    found = sfm.result(folder / "sparse" / "0", known)
    write_transforms_json(folder, found.capture, {f.name: f"images/{f.name}" for f in found.capture.frames})
    return {
        "n_registered": len(found.capture.frames),
        "unregistered": found.unregistered,
        "reprojection_error_px": found.reprojection_error_px,
        "n_points": found.n_points,
        "n_models": found.n_models,
        "is_metric": found.capture.is_metric,
    }


def _print(console: Console, folder: Path, n_chosen: int, result: dict[str, Any]) -> None:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    say(f"images registered: {result['n_registered']} of {n_chosen} chosen")
    if result["unregistered"]:
        listed = ", ".join(result["unregistered"][:8])
        say(f"without a pose: {listed}{', ... (all in capture.json)' if len(result['unregistered']) > 8 else ''}")
        if result["n_models"] > 1:
            say(f"of {result['n_models']} models that do not join the largest is kept; film the way between them, too")
    say(f"mean reprojection error: {result['reprojection_error_px']:.2f} px")
    say(f"points: {result['n_points']}")
    say("unit of length: " + ("metre" if result["is_metric"] else "arbitrary (--known-distance A B METRES sets it)"))
    say(f"next: posemap train --scene {folder}")


def capture(options: argparse.Namespace) -> int:
    """Run the stages that are not done and print what came out."""
    PYCOLMAP.load()
    if options.max_side < 64:
        raise ConfigError(f"--max-side: must be at least 64 pixels; got {options.max_side}")
    source, known, meter = (
        open_frames(options.input),
        _known_distance(options.known_distance),
        make_progress(options.quiet),
    )
    choice = _choice(options, source)
    config = SfmConfig(lens=options.lens, matching=options.matching, n_threads=options.threads)
    stages = Stages(options.out, str(options.input), source.fingerprint(), meter)
    folder, images = options.out, options.out / "images"
    frames = stages.run(
        "frames",
        (choice, options.max_side),
        images,
        lambda _: _frames(source, choice, images, options.max_side, meter),
    )
    sfm = StructureFromMotion(images, frames["names"], folder / "work", config, frames["has_one_camera"], meter)
    stages.run(
        "features",
        (config.lens, config.max_features),
        sfm.database,
        lambda is_resumed: {"n_features": sfm.extract(is_resumed)},
    )
    stages.run("matches", (config.matching,), sfm.database, lambda is_resumed: {"n_pairs": sfm.match(is_resumed)})
    stages.run("poses", (config.seed,), sfm.models, lambda _: {"n_models": sfm.map()})
    result = stages.run("scene", (known,), folder / "transforms.json", lambda _: _write_scene(folder, sfm, known))
    _print(Console(), folder, len(frames["names"]), result)
    return 0


COMMANDS.register("capture")(
    Command("a scene from a video or photos (needs pycolmap)", _DESCRIPTION, _EXAMPLE, _add_arguments, capture)
)
