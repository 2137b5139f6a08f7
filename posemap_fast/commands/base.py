"""What a command of the `posemap` command line is, and their registry."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from posemap_fast.backends import AUTO
from posemap_fast.registry import Registry

__all__ = ["COMMANDS", "Command", "add_device_argument"]


@dataclass(frozen=True)
class Command:
    """One sub-command; `run` returns the exit code."""

    summary: str  # one line for the overview
    description: str  # what `--help` teaches
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: Registry[Command] = Registry("command")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """`--device`, for `backends.named_device`."""
    parser.add_argument(
        "--device", default=AUTO, help="cpu, cuda, cuda:1, ... (default: auto, the first GPU where there is one)"
    )
