"""The split of a capture: the lists of a split.json, or blocks with gaps when there is none."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from posemap_fast.data.splits import BlockRule, block_split, sequence_split
from posemap_fast.errors import DatasetError

__all__ = ["resolve_split"]

_LISTED = ("train", "val", "test")


def _indices(path: Path, key: str, entries: object, known: dict[str, int]) -> list[int]:
    """View indices of one list of names, with or without suffix, in the order of the views."""
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise DatasetError(f"{path}: {key}: must be a list of file_path names; got {str(entries)[:40]}; correct it")
    found = []
    for entry in entries:
        name = PurePosixPath(entry).as_posix()
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise DatasetError(f"{path}: {key}: '{entry}' is no frame of transforms.json{hint}; remove or correct it")
        found.append(known[name])
    if len(set(found)) != len(found):
        twice = next(entry for entry in entries if entries.count(entry) > 1)
        raise DatasetError(f"{path}: {key}: '{twice}' is listed twice; remove one of them")
    return sorted(found)


def _check(path: Path, names: list[str], splits: dict[str, list[int]]) -> None:
    """Raise `DatasetError` for overlapping lists and for an empty train or test list."""
    owner: dict[int, str] = {}
    for key, views in splits.items():
        for view in views:
            if view in owner:
                raise DatasetError(f"{path}: {key}: '{names[view]}' is also in {owner[view]}; a view has one role")
            owner[view] = key
    for key in ("train", "test"):
        if not splits[key]:
            raise DatasetError(f"{path}: {key}: is empty; list at least one view there")


def _cut_validation(train: list[int]) -> tuple[dict[str, list[int]], str]:
    """Validation blocks out of a given training list; their gaps become unlabelled."""
    if len(train) < 12:
        return {"train": train}, "no validation views (too few to cut any)"
    rule = BlockRule(test_share=0.0, n_test_blocks=0)
    parts = block_split(len(train), rule)
    cut = {key: [train[i] for i in parts[key]] for key in ("train", "val", "unlabelled")}
    return cut, f"validation cut from train in blocks with gaps of {rule.gap_for(len(train))}"


def resolve_split(path: Path, names: list[str], lists: dict[str, Any] | None) -> tuple[dict[str, list[int]], str]:
    """Splits of the views called `names` and the sentence that says how they came about.

    Args:
        path: file to name in errors: split.json, or transforms.json without one.
        names: file names of all views in natural order.
        lists: content of split.json (train, val, test: lists of file_path; rule: text), or None.
    Returns:
        indices under train, val, test, unlabelled (the frames in no list), and the rule.
    Raises:
        DatasetError: empty train or test, a name that does not exist, a name in two lists.
    """
    if lists is None:
        held_out = sequence_split([PurePosixPath(name).parent.as_posix() for name in names])
        if held_out is not None:
            train, test, text = held_out
            cut, note = _cut_validation(train)
            return {"test": test, **cut}, f"{text}; {note}"
        rule = BlockRule()
        try:
            splits = block_split(len(names), rule)
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}") from error
        return splits, rule.describe(len(names))
    known = {PurePosixPath(name).with_suffix("").as_posix(): i for i, name in enumerate(names)}
    known |= {name: i for i, name in enumerate(names)}
    splits = {key: _indices(path, key, lists.get(key, []), known) for key in _LISTED}
    _check(path, names, splits)
    text = str(lists.get("rule", "lists of split.json"))
    if not splits["val"]:
        cut, note = _cut_validation(splits["train"])
        splits |= cut
        text = f"{text}; {note}"
    used = {view for views in splits.values() for view in views}
    splits["unlabelled"] = sorted({*splits.get("unlabelled", []), *(set(range(len(names))) - used)})
    return splits, text
