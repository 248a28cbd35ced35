"""cpu.py: what makes the engine faster where there is no GPU. The same numbers, to rounding.

Import it before torch allocates anything: most of the time that is not arithmetic goes there into
fresh pages of 4 KiB, and large ones have to be asked for.
"""

import ctypes
import gc
import os
import platform
import sys

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
