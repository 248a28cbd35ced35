"""cpu.py: what makes the engine faster where there is no GPU. The same numbers, to rounding.

Import it before torch allocates anything: most of the time that is not arithmetic goes there into
fresh pages of 4 KiB, and large ones have to be asked for.
"""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# How many compiled kernels are kept.
KERNELS = "512"

# Read by torch at its first allocation, ignored where the system has none.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# For 16 bits oneDNN compiles a kernel of half a MiB for each shape that it meets. By itself it
# keeps the last 1,024, and torch as many descriptions; one layer's serve all, and are fewer.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", KERNELS)

# Options of glibc's mallopt: up to how many bytes freed memory is kept (M_TRIM_THRESHOLD, at the
# most), and no tensor is a mapping of its own (M_MMAP_MAX).
KEEP = {-1: 2047 << 20, -4: 0}
# Of the machine's memory: with less than this left, freed memory goes back to the system.
SHORT = 0.25
# Up to here MKL multiplies, in fp32, a tall matrix by a narrow one faster than the other way round.
FEW_TOKENS = 64
# 4-bit weights whose values take no more are held unpacked.
UNPACK_MIB = 4096


def glibc(name: str, *numbers: int) -> None:
    """Call a function of the C library, where that is glibc and has it."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function:
        function(*numbers)


def keep_freed() -> None:
    """Freed memory stays the process's own: fresh pages cost a step a tenth and more."""
    for option, value in KEEP.items():
        glibc("mallopt", option, value)


def trim(short: float = SHORT) -> None:
    """Give freed memory back to the system, where less than that share of it is left.

    glibc keeps it in pieces, of which tensors of other shapes do not use all: sampling's and
    training's peaks add up to an eighth more.
    """
    memory = psutil.virtual_memory()
    if memory.available < short * memory.total:
        glibc("malloc_trim", 0)


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
        straight = bool((np.diff(at) == 1).all())
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
        t[:, at] += values
    else:
        t.index_add_(1, at, values.contiguous())


class Siblings:
    """Tokens of a packed row whose attention is computed at once: the first `far` columns that
    they see are the same.

    pieces: (the columns that the last token sees, how many tokens, their end in the row).
    """

    def __init__(self, far: int, pieces: list[tuple], window: int | None, times: int, dtype):
        self.far = Ragged([pieces[0][0][:far]]).at if far else slice(0, 0)
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
        # (m, times * T, columns), additive
        mask = zeros.masked_fill_(hidden, -torch.inf)[..., self.masked :]
        self.mask = mask.repeat(1, times, 1)


class RunAttention(torch.autograd.Function):
    """Attention over a packed row by plain products, what siblings share read in one place.

    sdpa would be given it once for each of them, and its backward pass is slow in 16 bits.
    """

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
        scores[..., batch.masked :] += batch.mask
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


class UnpackedLinear(nn.Linear):
    """A 4-bit layer whose values are held unpacked: the same to the bit, to rounding for few."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if x.dtype != torch.float32 or x.shape[:-1].numel() > FEW_TOKENS:
            return F.linear(x, self.weight, self.bias)
        # A sampling step's few tokens, as (W x^T)^T.
        y = self.weight @ x.flatten(0, -2).T
        if self.bias is not None:
            y += self.bias[:, None]
        # Flash attention wants a contiguous last dimension.
        return y.T.contiguous().unflatten(0, x.shape[:-1])


@cache
def packs(dtype: torch.dtype) -> bool:
    """Does `packed` pay here, and does it compute W x + b?"""
    # In fp32 a step of 64 samples takes 8 % longer with it where AVX2 is all there is.
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if dtype != torch.bfloat16 and not (wide and dtype == torch.float32):
        return False
    x, weight = torch.linspace(-1, 2, 96), torch.linspace(-2, 1, 1536)
    x, weight, bias = (t.to(dtype) for t in (x.view(3, 32), weight.view(48, 32), torch.ones(48)))
    try:
        y = packed(weight, bias)(x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(y, F.linear(x, weight, bias), rtol=0.02, atol=0.1)


def packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> W x + b by a copy of W in the order in which oneDNN multiplies few rows fastest.

    With W as it is a step of 16 samples takes up to twice as long in its products. The two calls
    are ones that torch.compile makes, and not public.
    """
    operations = torch.ops.mkldnn
    weight = operations._reorder_linear_weight(weight, FEW_TOKENS)
    return lambda x: operations._linear_pointwise(x, weight, bias, "none", [], "")


def is_four_bit(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds its weight in 4 bits."""
    return hasattr(getattr(layer, "weight", None), "quant_state")


def values(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weights, unpacked if they are 4-bit: (out, in)"""
    if not is_four_bit(layer):
        return layer.weight
    # Here, for it talks when imported.
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)


def unpack(model: nn.Module) -> None:
    """Replace 4-bit layers by unpacked ones, if they fit.

    bitsandbytes unpacks each weight at each call on the CPU: 40 % of a sampling step.
    """
    layers = {name: m for name, m in model.named_modules() if is_four_bit(m)}
    size = sum(m.in_features * m.out_features for m in layers.values()) * model.dtype.itemsize
    if size > UNPACK_MIB * 2**20:
        return
    # One after the other, so that no layer is held twice.
    while layers:
        name, layer = layers.popitem()
        parent, _, leaf = name.rpartition(".")
        unpacked = UnpackedLinear(values(layer, model.dtype), layer.bias)
        setattr(model.get_submodule(parent), leaf, unpacked)
        del layer
    gc.collect()
    trim(short=1)
