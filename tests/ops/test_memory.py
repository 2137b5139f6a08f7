"""The pool of CPU memory: blocks come back when nobody holds them, and never before."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from posemap_fast.ops._memory import Pool, empty

MIB = 1 << 20


def test_a_block_is_used_again_when_its_last_view_is_gone() -> None:
    pool = Pool()
    first = pool.tensor((512, 1024), torch.float32)
    address, view = first.data_ptr(), first[100:].t()
    del first
    assert pool.tensor((512, 1024), torch.float32).data_ptr() != address  # the view still holds it
    del view
    assert pool.tensor((512, 1024), torch.float32).data_ptr() == address
    assert len(pool) == 2


def test_what_autograd_saved_keeps_its_block() -> None:
    pool = Pool()
    saved, weight = pool.tensor((MIB,), torch.float32).fill_(3.0), torch.ones(MIB, requires_grad=True)
    loss = (saved * weight).sum()
    del saved
    pool.tensor((MIB,), torch.float32).fill_(0.0)
    loss.backward()
    assert weight.grad is not None and bool((weight.grad == 3.0).all())


def test_blocks_differ_and_a_small_request_does_not_waste_a_large_block() -> None:
    pool = Pool()
    large = pool.tensor((16 * MIB,), torch.uint8)
    address = large.data_ptr()
    del large
    small = pool.tensor((4 * MIB,), torch.uint8)
    again = pool.tensor((12 * MIB,), torch.uint8)
    assert small.data_ptr() != address
    assert again.data_ptr() == address


def test_idle_memory_is_bounded_and_the_least_recently_used_block_goes_first() -> None:
    pool = Pool(unused=75 * MIB)
    for size in (10, 30, 70):  # none fits another's request
        pool.tensor((size * MIB,), torch.uint8)
    assert len(pool) == 3
    pool.tensor((150 * MIB,), torch.uint8)
    assert len(pool) == 2  # of 110 MiB idle, the 10 and the 30 had to go


def test_small_results_and_fake_tensors_do_not_come_from_the_pool() -> None:
    assert empty(torch.zeros(1), 8, 8).shape == (8, 8)
    with FakeTensorMode():
        fake = empty(torch.zeros(1), 4096, 1024)
    assert type(fake) is not torch.Tensor and fake.shape == (4096, 1024)
    large = empty(torch.zeros(1, dtype=torch.float64), 4096, 64)
    assert (large.dtype, large.shape, large.is_contiguous()) == (torch.float64, (4096, 64), True)
