"""The commands of `posemap`, one file each."""

from posemap_fast.commands import capture, evaluate, import_dataset, inspect, localize, render, train  # registration
from posemap_fast.commands.base import COMMANDS, Command

__all__ = ["COMMANDS", "Command", "capture", "evaluate", "import_dataset", "inspect", "localize", "render", "train"]
