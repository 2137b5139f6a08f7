"""Every test of this folder has one thread: its networks are small."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Restores the number of threads after the module."""
