"""The commands of `posemap`, one file each."""

from posemap_fast.commands import (  # registration
    ablate,
    basin,
    capture,
    evaluate,
    import_dataset,
    inspect,
    localize,
    refine,
    render,
    train,
)
from posemap_fast.commands.base import COMMANDS, Command

__all__ = [
    "COMMANDS",
    "Command",
    "ablate",
    "basin",
    "capture",
    "evaluate",
    "import_dataset",
    "inspect",
    "localize",
    "refine",
    "render",
    "train",
]
