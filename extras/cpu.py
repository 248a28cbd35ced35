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

# Options of glibc's mallopt: up to how many MiB freed memory is kept (M_TRIM_THRESHOLD), and a
# tensor is no mapping of its own (M_MMAP_THRESHOLD, 32 at the most).
KEPT_MIB = {-1: 2047, -3: 32}
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
    """Freed memory stays the process's own: fresh pages cost a sampling step a tenth and more."""
    for option, mib in KEPT_MIB.items():
        glibc("mallopt", option, mib << 20)


def trim() -> None:
    """Give freed memory back to the system.

    glibc keeps it in pieces of which tensors of other shapes use little: sampling's and training's
    peaks would add up.
    """
    glibc("malloc_trim", 0)


class RunAttention(torch.autograd.Function):
    """Attention over a packed row's runs by plain products, for 16 bits.

    With sdpa's kernel, whose backward is slow there, an update takes a sixth longer.
    """

    # The results of a layer that will be computed again, and whether this is that time.
    kept: list[Tensor] | None = None
    again = False

    @classmethod
    def of(cls, query, key, value, runs: list[tuple], scale: float) -> Tensor:
        """Its result; in a layer that is computed again, the one of the first time."""
        known = cls.kept.pop(0) if cls.again and cls.kept else None
        out = cls.apply(query, key, value, runs, scale, known)
        if cls.kept is not None and not cls.again:
            cls.kept.append(out.detach())
        return out

    @staticmethod
    def parts(run: tuple, query, key, value, scale) -> tuple:
        """A run's q, k, v, each (kv heads, ., D), and its weights; the queries of a key together"""
        start, end, columns, mask = run
        k, v = key[0][:, columns], value[0][:, columns]
        q = query[0, :, start:end].reshape(len(k), -1, query.shape[-1]) * scale
        return q, k, v, torch.baddbmm(mask, q, k.mT).softmax(-1)

    @staticmethod
    def forward(ctx, query, key, value, runs: list[tuple], scale: float, known=None):
        """query (1, H, L, D), key and value (1, h, P + L, D) -> (1, H, L, D)

        runs: (start, end, columns, additive mask (1, H / h * tokens, columns)); known: the result,
        where it has been computed before.
        """
        ctx.save_for_backward(query, key, value)
        ctx.runs, ctx.scale = runs, scale
        if known is not None:
            return known
        out = query.new_empty(*query.shape[:3], value.shape[3])
        for run in runs:
            start, end = run[:2]
            _, _, v, weights = RunAttention.parts(run, query, key, value, scale)
            out[0, :, start:end] = (weights @ v).reshape(query.shape[1], end - start, -1)
        return out

    @staticmethod
    def backward(ctx, upstream):
        """(1, H, L, D) -> the gradients of query, key and value; the weights are computed again"""
        query, key, value = ctx.saved_tensors
        of_query, of_key, of_value = (torch.zeros_like(t) for t in (query, key, value))
        for run in ctx.runs:
            q, k, v, weights = RunAttention.parts(run, query, key, value, ctx.scale)
            start, end, columns, _ = run
            up = upstream[0, :, start:end].reshape(len(k), -1, v.shape[-1])
            of_value[0][:, columns] += weights.mT @ up
            of_scores = up @ v.mT
            of_scores.sub_((of_scores * weights).sum(-1, keepdim=True)).mul_(weights)
            of_key[0][:, columns] += of_scores.mT @ q
            of_query[0, :, start:end] = (of_scores @ k).reshape(query.shape[1], end - start, -1)
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
    trim()
