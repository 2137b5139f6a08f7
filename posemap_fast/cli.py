"""`posemap`: the command line. Each command parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from posemap_fast.commands import COMMANDS
from posemap_fast.errors import PosemapError

__all__ = ["main"]

_EXIT_BAD_INPUT = 2
_EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of `posemap` with one sub-command per entry of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="posemap",
        description="Where is this camera? Learn a place from posed images, then answer from one image.",
        epilog="Start with: posemap train --scene room   (or tools/train_all.sh, which sets everything up first)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = COMMANDS.get(name)
        child = commands.add_parser(
            name,
            help=command.summary,
            description=command.description,
            epilog=command.example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(child)
        child.set_defaults(handler=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one line on stderr and exit code 2."""
    options = build_parser().parse_args(arguments)
    try:
        return options.handler(options)
    except PosemapError as error:
        print(f"posemap {options.command}: error: {error}", file=sys.stderr)
        return _EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on from here", file=sys.stderr)
        return _EXIT_INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
