"""siblings.py: attention over a packed row where there is no GPU. The same numbers, to rounding.

A row is a tree. What a token sees is few of its columns, so that one product under one mask would
mostly be masked; and sdpa, given a run of tokens at a time, would read a prompt once for each of
its completions, and is slow backwards in 16 bits. Here completions of one prompt are computed
together, padded to one another, and the prompt is gathered once:

    Group          pieces of runs that follow the same columns, or these and a few more
    Siblings       such a group as indices and a mask
    RunAttention   scores, weights and gradients of all groups of a row
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Tokens of a piece, at most.
PIECE = 128
# In a group the lengths of pieces, and of what their runs follow, differ by no more.
ALIKE = 32
# Scores of a head in a group of several, at most.
SCORES = 1 << 19


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


@dataclass
class Group:
    """Pieces of a row's runs: (the columns that the last token sees, how many tokens, their end)"""

    pieces: list[tuple[np.ndarray, int, int]]
    # How many columns the runs of all follow, the same ones; and the most that one follows.
    far: int
    deepest: int

    def takes(self, piece: tuple, behind: int) -> bool:
        """Add a piece of a run that follows `behind` columns, if it fits; whether it did."""
        columns, count, _ = piece
        far = min(self.far, common_prefix(self.pieces[0][0], columns[:behind]))
        deepest = max(self.deepest, behind)
        scores = (len(self.pieces) + 1) * (count + ALIKE) * (len(columns) + ALIKE)
        if deepest - far > ALIKE or scores > SCORES:
            return False
        self.pieces.append(piece)
        self.far, self.deepest = far, deepest
        return True


def grouped(runs: list[tuple[int, int, np.ndarray]], prefix: int) -> list[Group]:
    """The runs of a packed row (packing.Row) in pieces, those of one length and prompt together."""
    groups, opened = [], {}
    for start, end, before in runs:
        path = np.concatenate([before, prefix + np.arange(start, end)])
        for at in range(start, end, PIECE):
            upto = min(at + PIECE, end)
            piece = path[: len(before) + upto - start], upto - at, upto
            kind = at - start, (upto - at) // ALIKE
            if kind not in opened or not opened[kind].takes(piece, len(before)):
                opened[kind] = Group([piece], len(before), len(before))
                groups.append(opened[kind])
    return groups


class Ragged:
    """Lists of positions in a row as a matrix (m, T); a short one repeats its last."""

    def __init__(self, lists: list[np.ndarray]):
        sizes = np.array([len(positions) for positions in lists])
        steps = np.arange(sizes.max())
        # (m, T): which of its list an entry is.
        self.which = np.minimum(steps, sizes[:, None] - 1)
        at = np.concatenate([x[i] for x, i in zip(lists, self.which)])
        self.shape = self.which.shape
        # (m T, 1): 0 where an entry is a repeat; None: none is.
        self.first = None
        if sizes.min() < len(steps):
            self.first = torch.from_numpy(steps < sizes[:, None]).flatten()[:, None]
        straight = len(at) > 0 and bool((np.diff(at) == 1).all())
        # A slice where one serves: no copy.
        self.at = slice(int(at[0]), int(at[-1]) + 1) if straight else torch.from_numpy(at)

    def of(self, t: Tensor, heads: int, blank: bool = False) -> Tensor:
        """(H, L, D) -> (heads, m, H / heads * T, D), where repeats are zeros if `blank`"""
        t = t[:, self.at]
        if blank and self.first is not None:
            t = t * self.first
        t = t.unflatten(1, self.shape).unflatten(0, (heads, -1))
        return t.transpose(1, 2).flatten(2, 3)

    def back(self, t: Tensor) -> Tensor:
        """(heads, m, H / heads * T, D) -> (H, m T, D)"""
        t = t.unflatten(2, (-1, self.shape[1])).transpose(1, 2).flatten(0, 1)
        return t.flatten(1, 2)


def add(t: Tensor, at, values: Tensor) -> None:
    """t[:, at] += values, where a position may come several times."""
    if isinstance(at, slice):
        t[:, at].add_(values)
    else:
        t.index_add_(1, at, values.contiguous())


class Siblings:
    """A group of m pieces of at most T tokens, as indices and a mask."""

    def __init__(self, group: Group, window: int | None, dtype: torch.dtype):
        far, pieces = group.far, group.pieces
        self.far = Ragged([pieces[0][0][:far]]).at
        self.near = Ragged([columns[far:] for columns, _, _ in pieces])
        self.tokens = Ragged([np.arange(end - count, end) for _, count, end in pieces])
        # Columns are one path, and its last are the tokens: to be no deeper is to be seen.
        ahead = np.array([[len(columns) - count] for columns, count, _ in pieces])
        query, columns = ahead + self.tokens.which, np.arange(far + self.near.shape[1])
        distance = torch.from_numpy(query[..., None] - columns)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        # From this column on there is something to hide.
        self.masked = 0 if window else far
        zeros = torch.zeros(hidden.shape, dtype=dtype)
        # (m, 1, T, columns), additive: the same for all heads
        self.mask = zeros.masked_fill_(hidden, -torch.inf)[:, None, :, self.masked :]


class RunAttention(torch.autograd.Function):
    """Attention over a packed row by plain products, what siblings share read in one place."""

    # The results of a layer that will be computed again, and whether this is that time.
    kept: list[Tensor] | None = None
    again = False

    @classmethod
    def of(cls, query, key, value, batches: list[Siblings], scale: float) -> Tensor:
        """Its result; in a layer that is computed again, the one of the first time."""
        known = cls.kept.pop(0) if cls.again and cls.kept else None
        out = cls.apply(query, key, value, batches, scale, known)
        if cls.kept is not None and not cls.again:
            cls.kept.append(out.detach())
        return out

    @staticmethod
    def outer(x: Tensor, far: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """x (h, m, n, D), far (h, F, D), near (h, m, C, D) -> x far^T, x near^T: (h, m, n, .)"""
        return (x.flatten(1, 2) @ far.mT).unflatten(1, x.shape[1:3]), x @ near.mT

    @staticmethod
    def inner(two, far: Tensor, near: Tensor) -> Tensor:
        """Two (h, m, n, .), far (h, F, D), near (h, m, C, D) -> x far + y near: (h, m, n, D)"""
        x, y = two
        return (x.flatten(1, 2) @ far).unflatten(1, x.shape[1:3]) + y @ near

    @classmethod
    def parts(cls, batch: Siblings, query, key, value, scale) -> tuple:
        """q (h, m, n, D); k, v and the weights (h, m, n, .), each of these far and near"""
        heads = key.shape[1]
        q = batch.tokens.of(query[0], heads) * scale
        k, v = ((t[0][:, batch.far], batch.near.of(t[0], heads)) for t in (key, value))
        scores = torch.cat(cls.outer(q, *k), -1)
        by_head = scores.unflatten(2, (-1, batch.mask.shape[2]))
        by_head[..., batch.masked :].add_(batch.mask)
        return q, k, v, scores.softmax(-1).split([t.shape[-2] for t in k], -1)

    @staticmethod
    def forward(ctx, query, key, value, batches: list[Siblings], scale: float, known=None):
        """query (1, H, L, D), key and value (1, h, P + L, D) -> (1, H, L, D)

        known: the result, where it has been computed before.
        """
        out = query.new_empty(*query.shape[:3], value.shape[3]) if known is None else known
        for batch in batches if known is None else ():
            _, _, v, weights = RunAttention.parts(batch, query, key, value, scale)
            out[0][:, batch.tokens.at] = batch.tokens.back(RunAttention.inner(weights, *v))
        ctx.save_for_backward(query, key, value, out)
        ctx.batches, ctx.scale = batches, scale
        return out

    @staticmethod
    def backward(ctx, upstream):
        """(1, H, L, D) -> the gradients of query, key and value; the weights are computed again"""
        query, key, value, out = ctx.saved_tensors
        of_query, of_key, of_value = (torch.zeros_like(t) for t in (query, key, value))
        # The sum over columns of a weight times its gradient.
        shared = (upstream * out).sum(-1, keepdim=True)
        for batch in ctx.batches:
            tokens = batch.tokens
            q, k, v, weights = RunAttention.parts(batch, query, key, value, ctx.scale)
            up, less = (tokens.of(t[0], len(key[0]), blank=True) for t in (upstream, shared))
            of_scores = RunAttention.outer(up, *v)
            for x, weight in zip(of_scores, weights):
                x.sub_(less).mul_(weight)
            for grad, (far, near), y in ((of_value, weights, up), (of_key, of_scores, q)):
                # y^T far, whose wide factor is not copied, for far^T y.
                add(grad[0], batch.far, (y.flatten(1, 2).mT @ far.flatten(1, 2)).mT)
                add(grad[0], batch.near.at, batch.near.back(near.mT @ y))
            add(of_query[0], tokens.at, tokens.back(RunAttention.inner(of_scores, *k)))
        return of_query.mul_(ctx.scale), of_key, of_value, None, None, None


@contextmanager
def remembering(kept: list[Tensor], again: bool) -> Iterator[None]:
    """Attention's results are put into `kept` and, `again`, taken from there in their order."""
    RunAttention.kept, RunAttention.again = kept, again
    try:
        yield
    finally:
        RunAttention.kept, RunAttention.again = None, False
