"""Block splits: disjoint, complete, with gaps, never interleaved; the split of a capture without lists."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posemap_fast.data import BlockRule, block_split
from posemap_fast.data.split_file import resolve_split
from posemap_fast.errors import DatasetError


@given(st.integers(24, 3000))
@settings(max_examples=80, deadline=None)
def test_block_split_is_a_partition_with_every_part_filled(n_views):
    splits = block_split(n_views)
    listed = sorted(view for views in splits.values() for view in views)
    assert listed == list(range(n_views))
    assert all(splits[key] for key in ("train", "val", "test"))
    assert all(views == sorted(views) for views in splits.values())
    assert len(splits["train"]) >= 0.5 * n_views


@given(st.integers(24, 2000), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_training_view_is_within_the_gap_of_a_held_out_view(n_views, gap):
    rule = BlockRule(gap=gap)
    try:
        splits = block_split(n_views, rule)
    except DatasetError:
        return  # too few views for gaps that wide: refused, not bent
    train = set(splits["train"])
    for view in splits["test"] + splits["val"]:
        around = range(view - rule.gap_for(n_views), view + rule.gap_for(n_views) + 1)
        assert not train & set(around)


def test_held_out_views_come_in_blocks_not_every_nth():
    splits = block_split(400)
    test = splits["test"]
    runs = 1 + sum(b - a > 1 for a, b in pairwise(test))
    assert len(test) == 50 and runs == 6  # interleaving would make 50 runs


def test_too_few_views_are_refused_with_the_mend():
    with pytest.raises(DatasetError, match=r"split: 4 views are too few .* give a split.json"):
        block_split(4)


def test_capture_without_lists_gets_blocks_and_says_so(tmp_path):
    names = [f"images/{i}.jpg" for i in range(50)]
    splits, rule = resolve_split(tmp_path / "transforms.json", names, None)
    assert splits == block_split(50) and "contiguous blocks" in rule
    with pytest.raises(DatasetError, match=r"transforms.json: split: 3 views"):
        resolve_split(tmp_path / "transforms.json", names[:3], None)


def test_validation_is_cut_from_training_when_the_lists_have_none(tmp_path):
    names = [f"{i}.jpg" for i in range(60)]
    splits, rule = resolve_split(tmp_path / "split.json", names, {"train": names[:50], "test": names[55:]})
    assert splits["val"] and set(splits["val"]) < set(range(50)) and splits["test"] == list(range(55, 60))
    assert set(splits["unlabelled"]) >= set(range(50, 55))  # frames in no list
    assert "validation cut from train" in rule
    everything = sorted(view for views in splits.values() for view in views)
    assert everything == list(range(60))
