"""`posemap import`: any dataset that can be read becomes transforms.json with its images, or a COLMAP model."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from rich.console import Console

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.config.coerce import coerce
from posemap_fast.config.yaml_reader import parse_yaml
from posemap_fast.data import PARSERS, Capture, parse_capture, write_colmap_text, write_transforms_json
from posemap_fast.data.capture import inside
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.progress import ProgressMeter, make_progress

__all__ = ["convert_capture", "import_dataset"]

_DESCRIPTION = """\
Convert a dataset: read any format that training reads, write transforms.json (with split.json and points.npz where
the source has a split and sparse points), or a COLMAP text model in sparse/0; the images go to OUT/images and keep
their folders. Poses, intrinsics and lens coefficients keep their full precision; images are copied byte by byte.

OUT must not exist or be empty. It appears when everything is in it; after an interruption give the same command again.
A COLMAP model cannot say which views are held out for testing, nor that the unit is the metre.
"""
_EXAMPLE = """\
examples:
  posemap import my_colmap_project my_capture                      then: posemap train --scene my_capture
  posemap import my_colmap_project my_capture --set images=photos  the images are in my_colmap_project/photos
  posemap import my_capture my_model --format colmap               open my_model/sparse/0 in COLMAP
  posemap import 7scenes/chess chess --dataset seven_scenes --set gt=sfm --link"""
_UNFINISHED = ".posemap_import"  # in the folder while it is not complete: what it is, so that it may be removed
_IMAGES = "images"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the dataset's folder or file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--format", choices=["transforms", "colmap"], default="transforms", help="(default: transforms)"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help=f"what SOURCE is, if not seen by itself: {', '.join(PARSERS)}"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--link", action="store_true", help="hard links to the images where the disk allows it")
    how.add_argument("--copy", action="store_true", help="copies of the images (default)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help=f"option of the format ({_known()})"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _known() -> str:
    """The options that each format knows."""
    options = {name: list(inspect.signature(PARSERS.get(name).parse).parameters)[1:] for name in PARSERS}
    return "; ".join(f"{name}: {', '.join(names)}" for name, names in options.items() if names)


def _option(hints: Mapping[str, Any], text: str) -> tuple[str, Any]:
    """Name and value of one `--set`, the value as the parser's type hint wants it."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: must look like key=value")
    try:
        return key, coerce(hints.get(key, Any), parse_yaml(value, "value"))
    except ConfigError as error:
        raise ConfigError(f"--set {text}: {error}") from error


def _read(source: Path, dataset: str | None, settings: Sequence[str]) -> Capture:
    name = dataset or next((known for known in PARSERS if PARSERS.get(known).recognises(source)), None)
    hints = get_type_hints(PARSERS.get(name).parse) if name else {}
    return parse_capture(source, name, **dict(_option(hints, text) for text in settings))


def _image_names(capture: Capture) -> dict[str, str]:
    """Frame name -> name of its image in the new folder of images: without an `images` that all of them start with."""
    names = [frame.name for frame in capture.frames]
    prefix = f"{_IMAGES}/"
    if all(name.startswith(prefix) for name in names):
        return {name: name.removeprefix(prefix) for name in names}
    return {name: name for name in names}


def _with_full_lists(capture: Capture) -> Capture:
    """The capture with lists of whole frame names: lists may leave suffixes out and hold remarks."""
    if capture.lists is None:
        return capture
    names = [frame.name for frame in capture.frames]
    known = {PurePosixPath(name).with_suffix("").as_posix(): name for name in names} | {name: name for name in names}
    lists: dict[str, Any] = {key: capture.lists[key] for key in ("rule",) if key in capture.lists}
    for key in ("train", "val", "test"):
        listed = capture.lists.get(key, [])
        whole = (
            [known.get(PurePosixPath(str(name)).as_posix()) for name in listed] if isinstance(listed, list) else [None]
        )
        if None in whole:
            raise DatasetError(
                f"{capture.lists_source or capture.source}: {key}: {str(listed)[:60]} is no list of frames that are "
                "there; correct it"
            )
        lists[key] = whole
    return dataclasses.replace(capture, lists=lists)


def _place(source: Path, target: Path, link: bool) -> None:
    """Put one image at `target`, as a hard link if it is wanted and possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or a file system without links
            pass
    shutil.copyfile(source, target)


def _fill(folder: Path, capture: Capture, form: str, link: bool, meter: ProgressMeter) -> None:
    """Write the model and place the images."""
    names = _image_names(capture)
    (folder / _IMAGES).mkdir()
    if form == "colmap":
        (folder / "sparse" / "0").mkdir(parents=True)
        write_colmap_text(folder / "sparse" / "0", capture, names)
    else:
        files = {name: f"{_IMAGES}/{image}" for name, image in names.items()}
        write_transforms_json(folder, _with_full_lists(capture), files)
    with meter.task("images", total=len(capture.frames)) as task:
        for number, frame in enumerate(capture.frames, start=1):
            target = inside(folder / _IMAGES, names[frame.name], f"{capture.source}: image name")
            _place(frame.path, target, link)
            task.update(number)


def _fresh_folder(out: Path) -> Path:
    """An empty, marked folder beside `out`, which must be empty; what an interrupted import left there is removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: exists and is not empty; give a new folder or remove it first")
    partial = out.with_name(f"{out.name}.partial")
    if (partial / _UNFINISHED).is_file():
        shutil.rmtree(partial)
    if partial.exists() and (not partial.is_dir() or any(partial.iterdir())):
        raise DatasetError(f"{partial}: is in the way and not left by an import; move it or give another folder")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / _UNFINISHED).touch()
    return partial


def convert_capture(
    capture: Capture, out: Path, form: str = "transforms", link: bool = False, meter: ProgressMeter | None = None
) -> None:
    """Write a capture and its images into a new folder, which appears when it is complete.

    Args:
        capture: what to write; images are taken from its frames' paths.
        out: folder that does not exist or is empty.
        form: `transforms` or `colmap`.
        link: hard links instead of copies, where possible.
        meter: shows the images; None = a bar of its own.
    Raises:
        DatasetError: `out` holds something, a lens or name that the format cannot express, or the disk fails.
    """
    if not capture.frames:
        raise DatasetError(f"{capture.source}: no usable frame ({'; '.join(capture.notes()) or 'none is listed'})")
    out = out.resolve()
    try:
        partial = _fresh_folder(out)
        try:
            _fill(partial, capture, form, link, meter or make_progress())
            partial.replace(out)
            (out / _UNFINISHED).unlink()
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DatasetError(
            f"{error.filename or out}: {error.strerror or error}; make room, check the permissions, or give another OUT"
        ) from error


def import_dataset(options: argparse.Namespace) -> int:
    """Convert and say what came out."""
    capture = _read(options.source, options.dataset, options.set)
    convert_capture(capture, options.out, options.format, options.link, make_progress(options.quiet))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for note in capture.notes():
        console.print(note)
    if options.format == "colmap" and capture.lists is not None:
        console.print("the split is left out: a COLMAP model has no place for it")
    console.print(f"{options.out}: {len(capture.frames)} images, format {options.format}")
    return 0


COMMANDS.register("import")(
    Command("any dataset to transforms.json or a COLMAP model", _DESCRIPTION, _EXAMPLE, _add_arguments, import_dataset)
)
