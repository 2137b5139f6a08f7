"""One value from a file checked against one type hint.

Known hints: `int`, `float`, `bool`, `str`, tuples of fixed or any length, `dict`, `Literal`, unions, `Optional`.
A whole number is a valid float; nothing else is converted. Errors are `ConfigError` without a place: the caller
knows file and dotted path and puts them in front.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from posemap_fast.errors import ConfigError

__all__ = ["coerce", "did_you_mean", "members_of_union"]


def coerce(hint: Any, value: Any) -> Any:
    """`value` as an instance of `hint`, lists turned into tuples.

    Raises:
        ConfigError: another type; the message says expected, got and, where it is known, the mend.
    """
    if hint is Any:
        return value
    if members := members_of_union(hint):
        return _coerce_union(members, value)
    origin = get_origin(hint)
    if origin is Literal:
        return _coerce_literal(get_args(hint), value)
    if origin is tuple:
        return _coerce_tuple(get_args(hint), value)
    if origin is dict:
        return _coerce_dict(get_args(hint), value)
    scalar = _SCALARS.get(hint)
    assert scalar is not None, f"config fields of type {hint} are not supported"
    return scalar(value)


def members_of_union(hint: Any) -> tuple[Any, ...]:
    """The members of `A | B` or `Optional[A]`; empty if `hint` is no union."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the list of them when none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f" (known: {', '.join(known)})"


def _shown(value: Any) -> str:
    """The value as the user may recognise it, with its type."""
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    mend = f"; write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
    raise ConfigError(f"must be a whole number; got {_shown(value)}{mend}")


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ConfigError(f"must be a number; got {_shown(value)}")
    return float(value)


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"must be true or false; got {_shown(value)}")
    return value


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"must be text; got {_shown(value)}; put it in quotes if text is meant")
    return value


def _to_none(value: Any) -> None:
    if value is not None:
        raise ConfigError(f"must be null; got {_shown(value)}")


_SCALARS: dict[Any, Any] = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str, types.NoneType: _to_none}


def _coerce_union(members: tuple[Any, ...], value: Any) -> Any:
    if value is None and types.NoneType in members:
        return None
    messages = []
    for member in members:
        if member is types.NoneType:
            continue
        try:
            return coerce(member, value)
        except ConfigError as error:
            messages.append(str(error))
    message = "; or ".join(messages)
    raise ConfigError(message.replace("; got", " or null; got", 1) if types.NoneType in members else message)


def _coerce_literal(choices: tuple[Any, ...], value: Any) -> Any:
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return value
    listing = ", ".join(repr(choice) for choice in choices)
    hint = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    hint = hint if hint.startswith(";") else ""
    raise ConfigError(f"must be one of {listing}; got {_shown(value)}{hint}")


def _coerce_tuple(hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"must be a list like [a, b]; got {_shown(value)}")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise ConfigError(f"must be a list of {len(hints)} values; got {len(value)}: {list(value)!r}")
    return tuple(_at(f"[{i}]", hint, item) for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _coerce_dict(hints: tuple[Any, ...], value: Any) -> dict[Any, Any]:
    key_hint, value_hint = hints
    if not isinstance(value, dict):
        raise ConfigError(f"must be a mapping of `name: value`; got {_shown(value)}")
    return {coerce(key_hint, key): _at(f"['{key}']", value_hint, item) for key, item in value.items()}


def _at(place: str, hint: Any, value: Any) -> Any:
    try:
        return coerce(hint, value)
    except ConfigError as error:
        raise ConfigError(f"{place} {error}") from None
