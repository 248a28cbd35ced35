"""fused.py: sampling with fewer and larger products. The numbers are the same, to rounding.

While a batch is decoded the weights and the role's adapter stand still. Layers that are given the
same tensor (q, k and v; gate and up) are multiplied as one, their LoRA with them:

    z = [A1; A2; ...] x
    [y1; y2; ...] = [W1; W2; ... | diag(s B1, s B2, ...)] [x; z]

It takes a copy of the weights: 4 bits are unpacked, which bitsandbytes would do at each call, and
on a CPU they, and the output head's, are put in the order in which kernels.c reads them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.cpu import UnpackedLinear, is_four_bit, values
from extras.kernels import product_of_torch

# What the copy may take: of a GPU's free memory, the rest is for keys and values; and on the CPU.
SHARE, CPU_MIB = 0.25, 2048
# Ranks are filled up to a multiple: kernels are slower where a row of numbers begins elsewhere,
# and kernels.c may want an even number.
ALIGNED = 8


def base_of(layer: nn.Module) -> nn.Module:
    """The layer without its LoRA."""
    return getattr(layer, "base", layer)


def lora_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A (r, in) and s B (out, r) of the role in use; r is 0 where there is none."""
    role = layer.use["role"] if hasattr(layer, "use") else None
    if role is not None:
        return layer.A[role], layer.scale[role] * layer.B[role]
    base = base_of(layer)
    empty = partial(torch.empty, device=base.weight.device)
    return empty(0, base.in_features), empty(base.out_features, 0)


def dense(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Does it compute W x + b, and do we know its W?"""
    base = base_of(layer)
    plain = type(base) in (nn.Linear, UnpackedLinear) and base.weight.dtype == dtype
    return plain or (isinstance(base, nn.Linear) and is_four_bit(base))


@contextmanager
def watched(layers: nn.Module, dtype: torch.dtype) -> Iterator[list[list[nn.Module]]]:
    """A list to be filled, as the model computes: linear layers that are given the same tensor."""
    groups, seen, last = [], set(), (None, 0)

    def note(layer: nn.Module, args: tuple) -> None:
        """Called before the layer."""
        nonlocal last
        if layer in seen or not args:
            return
        seen.add(layer)
        x = args[0]
        if last[0] is not x or last[1] != x._version:
            last = x, x._version
            groups.append([])
        groups[-1].append(layer)

    inner = {getattr(m, "base", None) for m in layers.modules()}
    linear = [m for m in layers.modules() if m not in inner and dense(m, dtype)]
    hooks = [layer.register_forward_pre_hook(note) for layer in linear]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()


class Fused:
    """Layers that are given the same tensor, as one product; the first one called computes all."""

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype, product: Callable):
        bases = [base_of(layer) for layer in layers]
        weights = [values(base, dtype) for base in bases]
        self.sizes = [len(w) for w in weights]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        down, up = zip(*map(lora_of, layers))
        down, up = torch.cat(down), torch.block_diag(*up)
        if len(down):
            pad = -len(down) % ALIGNED
            down = F.pad(down, (0, 0, 0, pad)).to(dtype)
            weight = torch.cat([weight, F.pad(up, (0, pad)).to(dtype)], 1)
        bias = None
        if any(base.bias is not None for base in bases):
            zeros = [w.new_zeros(len(w)) for w in weights]
            own = [zero if base.bias is None else base.bias for base, zero in zip(bases, zeros)]
            bias = torch.cat(own).to(dtype)
        self.product = product(down if len(down) else None, weight, bias)
        # The tensor they were given last, its version, and what it gives those not yet called.
        self.x, self.version, self.ready = None, 0, {}

    def forward(self, place: int, x: Tensor) -> Tensor:
        """(..., in) -> (..., out of this layer)"""
        if self.x is not x or self.version != x._version or place not in self.ready:
            self.ready = dict(enumerate(self.product(x).split(self.sizes, -1)))
            self.x, self.version = x, x._version
        mine = self.ready.pop(place)
        if not self.ready:
            self.x = None
        return mine


def copy_bytes(groups: list[list[nn.Module]], dtype: torch.dtype) -> int:
    """What a copy of their weights in that type takes."""
    bases = [base_of(layer) for group in groups for layer in group]
    return sum(b.in_features * b.out_features for b in bases) * dtype.itemsize


@contextmanager
def fused(
    groups: list, dtype: torch.dtype, most: float, product: Callable = product_of_torch
) -> Iterator[None]:
    """Without gradients, the groups' layers compute as one, if a copy takes at most `most` bytes.

    product: as product_of_torch
    """
    groups = groups if copy_bytes(groups, dtype) <= most else []
    try:
        for group in groups:
            one = Fused(group, dtype, product)
            for place, layer in enumerate(group):
                layer.forward = partial(one.forward, place)
        yield
    finally:
        for group in groups:
            for layer in group:
                layer.__dict__.pop("forward", None)
