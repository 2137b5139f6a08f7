"""docs/CONVENTIONS.md names a test for every line, and each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
DOCUMENT = TESTS.parent / "docs" / "CONVENTIONS.md"
ROWS = [
    line
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| convention")
]


def test_document_covers_every_geometry_convention():
    named = DOCUMENT.read_text(encoding="utf-8")
    for folder in ("geometry", "data", "apr"):
        for path in (TESTS / folder).glob("test_*.py"):
            for name in re.findall(r"^def (test_convention_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
                assert name in named, f"{path.name}::{name} is not in {DOCUMENT.name}"


@pytest.mark.parametrize("row", ROWS, ids=[row[2:50] for row in ROWS])
def test_every_convention_names_an_existing_test(row):
    match = re.search(r"`(\w+/test_\w+\.py)::(test_\w+)`", row)
    assert match, f"no test named in: {row}"
    source = (TESTS / match[1]).read_text(encoding="utf-8")
    assert f"def {match[2]}(" in source, f"{match[1]} has no {match[2]}"
