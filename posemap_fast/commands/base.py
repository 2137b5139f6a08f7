"""What a command of the `posemap` command line is, and their registry."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from posemap_fast.registry import Registry

__all__ = ["COMMANDS", "Command"]


@dataclass(frozen=True)
class Command:
    """One sub-command; `run` returns the exit code."""

    summary: str  # one line for the overview
    description: str  # what `--help` teaches
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: Registry[Command] = Registry("command")
