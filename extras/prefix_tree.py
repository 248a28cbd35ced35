"""prefix_tree.py: sequences with common prefixes -> rows in which each distinct token stands once.

[1, 2, 3], [1, 2, 4] -> one row with the tokens 1 2 3 4 and a mask: 4 attends to 1, 2, 4
"""

from collections.abc import Iterator

import numpy as np


class Row:
    """A prefix tree laid out in one row of L tokens, after `prefix` cached tokens."""

    def __init__(self, prefix: int):
        self.prefix = prefix
        # (L,) every distinct token once, and its position id.
        self.tokens = np.empty(0, np.int64)
        self.position_ids = np.empty(0, np.int64)
        # (start, end, before): start:end attend causally to each other, and to columns `before`.
        self.segments: list[tuple[int, int, np.ndarray]] = []
        # Per sequence: its index in the caller's list, and the indices of its tokens in the row.
        self.members: list[int] = []
        self.paths: list[np.ndarray] = []

    def add(self, member: int, ids: np.ndarray, common: int) -> None:
        """Append a sequence that shares its first `common` tokens with the last one."""
        start, end = len(self.tokens), len(self.tokens) + len(ids) - common
        shared = self.paths[-1][:common] if self.paths else np.empty(0, np.int64)
        self.tokens = np.append(self.tokens, ids[common:])
        depths = self.prefix + np.arange(common, len(ids))
        self.position_ids = np.append(self.position_ids, depths)
        if end > start:
            before = np.append(np.arange(self.prefix), self.prefix + shared)
            self.segments.append((start, end, before))
        self.paths.append(np.append(shared, np.arange(start, end)))
        self.members.append(member)

    def mask(self) -> np.ndarray:
        """(L, prefix + L) bool: True where a row's token attends to a column."""
        mask = np.zeros((len(self.tokens), self.prefix + len(self.tokens)), bool)
        for start, end, before in self.segments:
            mask[start:end, before] = True
            mask[start:end, self.prefix + start : self.prefix + end] = np.tri(end - start)
        return mask


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def pack(sequences: list[list[int]], budget: int, prefix: int = 0) -> Iterator[Row]:
    """Sequences -> rows of at most `budget` distinct tokens. A longer sequence gets its own row.

    The first `prefix` tokens are common to all and left out. In sorted order a sequence shares with
    the tree so far what it shares with its predecessor, so each sequence adds one segment.
    """
    row = Row(prefix)
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        ids = np.asarray(sequences[i][prefix:], np.int64)
        common = common_prefix(row.tokens[row.paths[-1]], ids) if row.members else 0
        if row.members and len(row.tokens) + len(ids) - common > budget:
            yield row
            row, common = Row(prefix), 0
        row.add(i, ids, common)
    if row.members:
        yield row
