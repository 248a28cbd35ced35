"""cpu.py: what makes the engine faster where there is no GPU. The same numbers, to rounding.

Import it before torch allocates anything: most of the time that is not arithmetic goes there into
fresh pages of 4 KiB, and large ones have to be asked for.
"""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable
from functools import cache

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
# Up to here MKL multiplies, in fp32, a tall matrix by a narrow one faster than the other way round;
# and the rows that oneDNN is told to expect.
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
