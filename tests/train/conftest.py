"""Every test of this folder has one thread: its networks are small. Some run on a pretended device, and on a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch

from posemap_fast import ops

from .pretend_device import pretended_device


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Restores the number of threads after the module."""


@pytest.fixture(params=["pretended", pytest.param("gpu", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield torch.device("cuda")
        return
    # The fused optimizers and mixed precision know real devices only.
    monkeypatch.setattr(torch.optim, "Adam", _without_fused(torch.optim.Adam))
    monkeypatch.setattr(torch, "autocast", _no_autocast)
    with ops.use_backend("reference"), pretended_device() as found:
        yield found


def _without_fused(adam: type) -> object:
    @functools.wraps(adam, updated=())
    def make(*arguments: object, **options: object) -> object:
        return adam(*arguments, **(options | {"fused": False, "foreach": False}))

    return make


@contextlib.contextmanager
def _no_autocast(device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
    assert not enabled
    yield
