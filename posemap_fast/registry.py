"""Named plug-ins: one file and one registration each; asking for an unknown name lists the near ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from posemap_fast.errors import ConfigError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Map from a name in a config file to the factory that builds the component.

    Example:
        BACKBONES: Registry[Callable[..., nn.Module]] = Registry("apr backbone")

        @BACKBONES.register("vgg16")
        class VGG16(nn.Module): ...
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores its argument under `name`; a second use of a name is our own bug."""

        def decorate(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} '{name}' is registered twice"
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            ConfigError: unknown name; the message lists the known ones and the nearest.
        """
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"unknown {self.kind} '{name}'{hint} (known: {', '.join(sorted(self._entries))})")

    def names(self) -> list[str]:
        """All registered names, sorted; contract tests iterate over this."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries
