"""cpu.py: what makes the engine faster where there is no GPU. The numbers are the same.

Import it before torch allocates anything: most of the time that is not arithmetic goes there into
fresh pages of 4 KiB, and large ones have to be asked for.
"""

import ctypes
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Read by torch at its first allocation, ignored where the system has none.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Up to here MKL multiplies a tall matrix by a narrow one faster than the other way round.
FEW_TOKENS = 64
# 4-bit weights whose values take no more are held unpacked.
UNPACK_MIB = 4096


def trim() -> None:
    """Give freed memory back to the system, where glibc is the C library.

    It keeps what was freed in pieces of which tensors of other shapes use little: sampling's and
    training's peaks would add up.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


class UnpackedLinear(nn.Linear):
    """A 4-bit layer whose values are held unpacked: the same to the bit, to rounding for few."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if x.shape[:-1].numel() > FEW_TOKENS:
            return F.linear(x, self.weight, self.bias)
        # A sampling step's few tokens, as (W x^T)^T.
        y = self.weight @ x.flatten(0, -2).T
        if self.bias is not None:
            y += self.bias[:, None]
        # Flash attention wants a contiguous last dimension.
        return y.T.contiguous().unflatten(0, x.shape[:-1])


def four_bit(model: nn.Module, most: float) -> dict[str, nn.Module]:
    """name -> 4-bit layer; none if their values in the model's type take more than `most` bytes."""
    quantised = lambda m: hasattr(getattr(m, "weight", None), "quant_state")
    layers = {name: m for name, m in model.named_modules() if quantised(m)}
    size = sum(m.in_features * m.out_features for m in layers.values()) * model.dtype.itemsize
    return layers if size <= most else {}


def values(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A 4-bit layer's weights, unpacked: (out, in)"""
    # Here, for it talks when imported.
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)


def unpack(model: nn.Module) -> None:
    """Replace 4-bit layers by unpacked ones, if they fit.

    bitsandbytes unpacks each weight at each call on the CPU: 40 % of a sampling step.
    """
    for name, layer in four_bit(model, UNPACK_MIB * 2**20).items():
        parent, _, leaf = name.rpartition(".")
        unpacked = UnpackedLinear(values(layer, model.dtype), layer.bias)
        setattr(model.get_submodule(parent), leaf, unpacked)
