"""YAML files and `--set` overrides into frozen dataclasses, strictly; and back, and compared.

Precedence: defaults < base < file < later files < `--set`. Mappings (nested dataclasses and `dict` fields) merge key
by key; every other value, tuples included, replaces what was there. An unknown key or a wrong type is an error that
names the file, the dotted path and the mend; a range error raised by a `__post_init__` gets the same place in front.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from posemap_fast.config.coerce import coerce, did_you_mean, members_of_union
from posemap_fast.config.yaml_reader import parse_yaml, read_yaml
from posemap_fast.errors import ConfigError

__all__ = ["diff", "dump_yaml", "from_dict", "load_config", "to_dict"]

T = TypeVar("T")
PathLike = str | os.PathLike[str]
Sources = dict[tuple[str, ...], str]  # place of a given value -> the file or `--set` that gave it last

_BASE = "base"
_ABSENT = object()


def load_config(cls: type[T], paths: PathLike | Sequence[PathLike] = (), overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls` from YAML files and overrides.

    Args:
        cls: frozen dataclass, nested at will.
        paths: one file or several, later ones win. A file may name one other by `base: relative/path.yaml`
            (relative to itself), which is read before it and may not have a `base` of its own.
        overrides: texts `a.b=value` as given to `--set`; the value is read as YAML.
    Returns:
        The configuration; what no layer names keeps its default.
    Raises:
        ConfigError: missing file, not YAML, unknown key, wrong type, value out of range.
    Example: load_config(RunConfig, ["configs/presets/cpu.yaml", "configs/room.yaml"], ["nerf.steps=2000"])
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    layers = [layer for path in files for layer in _layers_of_file(Path(path))]
    layers += [_layer_of_override(text) for text in overrides]
    return _assemble(cls, layers)


def from_dict(cls: type[T], values: Mapping[str, Any], source: str = "configuration") -> T:
    """An instance of `cls` from plain values (a file's header), checked like a YAML file; `source` names it in errors.

    Raises:
        ConfigError: unknown key, wrong type, value out of range.
    """
    return _assemble(cls, [(source, dict(values))])


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars of a dataclass, for JSON and YAML; `from_dict` reads them back."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type), "to_dict needs a dataclass instance"
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def dump_yaml(config: Any) -> str:
    """The resolved configuration as YAML text that `load_config` reads back to an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations (dataclasses or their `to_dict`), as dotted path -> (old, new).

    A key that only one of them has appears with None on the other side. Empty: they are equal.
    """
    return _diff(_as_plain(old), _as_plain(new), "")


def _diff(old: Any, new: Any, path: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*old, *new]):
            found |= _diff(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new and type(old) is type(new) else {path: (old, new)}


def _as_plain(config: Any) -> Any:
    return _plain(dict(config)) if isinstance(config, Mapping) else to_dict(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _layers_of_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The file's base, if it names one, then the file itself."""
    values = read_yaml(path)
    base = values.pop(_BASE, None)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the path of another YAML file; got {base!r}")
    base_path = path.parent / base
    if not base_path.is_file():
        raise ConfigError(f"{path}: base: no such file '{base_path}'; the path is relative to {path.parent}")
    base_values = read_yaml(base_path)
    if _BASE in base_values:
        raise ConfigError(f"{path}: base: '{base_path}' has a base of its own; only one level is allowed")
    return [(str(base_path), base_values), (str(path), values)]


def _layer_of_override(text: str) -> tuple[str, dict[str, Any]]:
    source = f"--set {text}"
    path, equals, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"{source}: must look like section.key=value")
    nested: Any = parse_yaml(value, source)
    for key in reversed(keys):
        nested = {key: nested}
    return source, nested


def _assemble(cls: type[T], layers: Sequence[tuple[str, dict[str, Any]]]) -> T:
    merged: dict[str, Any] = {}
    sources: Sources = {}
    for source, values in layers:
        checked = _check(cls, values, source, ())
        _merge(merged, checked, source, sources, ())
    return _build(cls, merged, sources, (), _ABSENT)


def _check(cls: type, values: Any, source: str, path: tuple[str, ...]) -> dict[str, Any]:
    """`values` with every key known to `cls` and every value of its field's type; only what was given is returned."""
    if not isinstance(values, dict):
        raise ConfigError(f"{_place(source, path)}: must be a section of `key: value`; got {values!r}")
    hints = _hints(cls)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{_place(source, path)}: unknown key {key!r}{did_you_mean(str(key), hints)}")
        checked[key] = _check_field(hints[key], value, source, (*path, key))
    return checked


def _check_field(hint: Any, value: Any, source: str, path: tuple[str, ...]) -> Any:
    nested = _nested_class(hint)
    if nested is not None and not (value is None and members_of_union(hint)):
        return _check(nested, value, source, path)
    entry = _entry_class(hint)
    if entry is not None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{_place(source, path)}: must be a section of `name: ...`; got {value!r}")
        return {key: _check(entry, item, source, (*path, key)) for key, item in value.items()}
    try:
        return coerce(hint, value)
    except ConfigError as error:
        raise ConfigError(f"{_place(source, path)}: {error}") from None


def _merge(into: dict[str, Any], values: dict[str, Any], source: str, sources: Sources, path: tuple[str, ...]) -> None:
    for key, value in values.items():
        place = (*path, key)
        sources.pop(place, None)  # so that the newest source comes last in the order of the dict
        sources[place] = source
        if isinstance(value, dict):
            mine = into.get(key)
            into[key] = mine if isinstance(mine, dict) else {}
            _merge(into[key], value, source, sources, place)
        else:
            into[key] = value


def _build(cls: type[T], values: dict[str, Any], sources: Sources, path: tuple[str, ...], default: Any) -> T:
    """An instance of `cls` from checked values; what is not given comes from `default` or the field's own default."""
    hints = _hints(cls)
    arguments: dict[str, Any] = {}
    for field in _init_fields(cls):
        known = _default_of(field, default)
        if field.name not in values:
            if known is _ABSENT:
                raise ConfigError(f"{_place(_last_source(sources, path), path)}: missing key '{field.name}'; add it")
            arguments[field.name] = known
            continue
        value, nested = values[field.name], _nested_class(hints[field.name])
        if nested is not None and value is not None:
            value = _build(nested, value, sources, (*path, field.name), _ABSENT if known is None else known)
        elif isinstance(value, dict):
            others: dict[str, Any] = known if isinstance(known, dict) else {}
            entry = _entry_class(hints[field.name])
            if entry is not None:
                value = {
                    key: _build(entry, item, sources, (*path, field.name, key), others.get(key, _ABSENT))
                    for key, item in value.items()
                }
            value = {**others, **value}
        arguments[field.name] = value
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{_place(_blamed_source(str(error), sources, path), path)}: {error}") from error


def _default_of(field: dataclasses.Field[Any], default: Any) -> Any:
    if default is not _ABSENT:
        return getattr(default, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else _ABSENT


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in _init_fields(cls)}


def _init_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _nested_class(hint: Any) -> type | None:
    """The dataclass that `hint` names, alone or as `X | None`; None for every other hint."""
    candidates = [member for member in members_of_union(hint) or (hint,) if dataclasses.is_dataclass(member)]
    assert len(candidates) <= 1, f"a config field may name one dataclass, not {hint}"
    return candidates[0] if candidates and get_origin(hint) is not dict else None  # type: ignore[return-value]


def _entry_class(hint: Any) -> type | None:
    """The dataclass of the entries of a `dict[str, X]`; None for every other hint."""
    arguments = get_args(hint)
    is_found = get_origin(hint) is dict and arguments[0] is str and dataclasses.is_dataclass(arguments[1])
    return arguments[1] if is_found else None


def _place(source: str, path: tuple[str, ...]) -> str:
    return f"{source}: {'.'.join(path)}" if path else source


def _last_source(sources: Sources, path: tuple[str, ...]) -> str:
    """What gave a value at or below `path` last; `defaults` when nothing did."""
    below = [source for place, source in sources.items() if place[: len(path)] == path]
    return below[-1] if below else "defaults"


def _blamed_source(message: str, sources: Sources, path: tuple[str, ...]) -> str:
    """The file that gave the first field which a range error of the section at `path` speaks of."""
    for word in re.findall(r"\w+", message):
        if (*path, word) in sources:
            return sources[(*path, word)]
    return _last_source(sources, path)
