"""Splits of an image sequence into contiguous blocks with gaps.

Neighbouring video frames are near-copies: every n-th frame as test set measures interpolation, not localization. So
test and validation views come in blocks, and the frames next to a block are left out of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from posemap_fast.errors import DatasetError

__all__ = ["BlockRule", "block_split", "sequence_split"]


@dataclass(frozen=True)
class BlockRule:
    """How many views are held out, and how."""

    test_share: float = 0.125  # of all views
    val_share: float = 0.06  # of all views, cut from what would be training
    n_test_blocks: int = 6  # at most; fewer when a block would be shorter than `min_block`
    n_val_blocks: int = 4
    min_block: int = 4  # views
    gap: int = 2  # views left out on each side of a block; 1 below 100 views

    def gap_for(self, n_views: int) -> int:
        """Views left out beside a block in a sequence of `n_views`."""
        return self.gap if n_views >= 100 else min(self.gap, 1)

    def describe(self, n_views: int) -> str:
        """One sentence for the log and the summary."""
        return (
            f"contiguous blocks in file order: {self.test_share:.0%} test, {self.val_share:.0%} validation, "
            f"{self.gap_for(n_views)} view(s) on each side of a block kept out of training"
        )


def _blocks(n_views: int, share: float, n_blocks: int, min_block: int) -> list[int]:
    """Lengths of the blocks that together hold about `share` of the views, at least one view."""
    if share <= 0:
        return []
    total = max(1, round(n_views * share))
    count = max(1, min(n_blocks, total // min_block))
    return [total // count + (index < total % count) for index in range(count)]


def _alternate(test: list[int], val: list[int]) -> list[tuple[str, int]]:
    """Blocks of both kinds in an order that spreads each over the sequence."""
    order = [((i + 0.5) / len(test), "test", n) for i, n in enumerate(test)]
    order += [((i + 0.5) / len(val), "val", n) for i, n in enumerate(val)]
    return [(kind, n) for _, kind, n in sorted(order)]


_LEAST_TEST, _MOST_TEST = 0.1, 0.5  # shares of the views between which whole sequences make a test set


def sequence_split(sequences: Sequence[str], share: float = 0.2) -> tuple[list[int], list[int], str] | None:
    """Hold out whole sequences: the last ones, as many as come nearest to `share` of the views.

    Args:
        sequences: name of the sequence of each view (its folder).
        share: wanted share of test views.
    Returns:
        training views, test views and the rule in words; None when no choice of last sequences leaves between 10 and
        50 % of the views for testing (one sequence, or a single very long one at the end).
    """
    names = list(dict.fromkeys(sequences))
    counts = Counter(sequences)
    best: tuple[float, int] | None = None
    total = 0
    for n_held in range(1, len(names)):
        total += counts[names[-n_held]]
        found = total / len(sequences)
        if _LEAST_TEST <= found <= _MOST_TEST and (best is None or abs(found - share) < best[0]):
            best = abs(found - share), n_held
    if best is None:
        return None
    held = set(names[-best[1] :])
    test = [i for i, name in enumerate(sequences) if name in held]
    train = [i for i, name in enumerate(sequences) if name not in held]
    return train, test, f"by sequence: {', '.join(names[-best[1] :])} held out for testing"


def block_split(n_views: int, rule: BlockRule | None = None) -> dict[str, list[int]]:
    """Cut a sequence into train, val and test blocks; the views of the gaps become `unlabelled`.

    Args:
        n_views: length of the sequence, in its natural order.
        rule: shares, block counts and gap.
    Returns:
        indices under train, val, test, unlabelled: disjoint, sorted, together all views.
    Raises:
        DatasetError: too few views to leave any for training.
    """
    rule = rule or BlockRule()
    test = _blocks(n_views, rule.test_share, rule.n_test_blocks, rule.min_block)
    val = _blocks(n_views, rule.val_share, rule.n_val_blocks, rule.min_block)
    blocks, gap = _alternate(test, val), rule.gap_for(n_views)
    spare = n_views - sum(length for _, length in blocks) - 2 * gap * len(blocks)
    if spare <= len(blocks):
        raise DatasetError(
            f"split: {n_views} views are too few for {len(blocks)} held-out blocks with gaps of {gap}; "
            "give a split.json with train, val and test lists"
        )
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": [], "unlabelled": []}
    cursor = 0
    for index, (kind, length) in enumerate(blocks):
        run = spare * (index + 1) // (len(blocks) + 1) - spare * index // (len(blocks) + 1)
        for name, count in (("train", run), ("unlabelled", gap), (kind, length), ("unlabelled", gap)):
            splits[name].extend(range(cursor, cursor + count))
            cursor += count
    splits["train"].extend(range(cursor, n_views))
    return splits
