"""kernels.py: three functions in C (kernels.c), for where there is no GPU.

    product     of tokens with a layer's weights and its LoRA, made for a sampling step's few:
                oneDNN's best takes 1.2 to 2 times as long
    attention   of one new token a sample: torch's own computes a block of queries, of which there
                is one here, and reads memory at an eighth of its speed
    rms_norm    and its gradient, which torch computes operation by operation

The same numbers, to rounding. They are compiled when a model is loaded, in a second, and tried
against torch's own, which serve where there is no compiler.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
# Not by one command: linked with fast mathematics, a library would change how the whole process
# computes; with OpenMP, a second one beside torch's would keep its own threads.
COMPILE = "-O3 -march=native -ffast-math -fopenmp -fPIC -Wno-psabi -c".split()
LINK = "-shared -nostdlib".split()
# Vectors of a multiple of so many numbers are what the C code is made for.
LANES = 16
NO_WINDOW = 1 << 60
# How far a result may be from torch's.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
POINTER, LONG, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


@cache
def build(**constants: int) -> ctypes.CDLL:
    """The library, compiled for these constants.

    Raises OSError (no compiler, no library), subprocess.SubprocessError (it fails).
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not shutil.which(compiler[0]):
        raise OSError(f"no C compiler {compiler[0]}; install gcc, or name one in CC")
    run = lambda *words: subprocess.run(words, check=True, capture_output=True, timeout=60)
    with tempfile.TemporaryDirectory() as folder:
        code, library = f"{folder}/kernels.o", f"{folder}/kernels.so"
        named = [f"-D{name}={value}" for name, value in constants.items()]
        run(*compiler, *COMPILE, *named, str(SOURCE), "-o", code)
        run(*compiler, *LINK, code, "-o", library, "-lm")
        try:
            # Loaded, it needs no file.
            return ctypes.CDLL(library)
        except OSError as error:
            # The folder has another name each time, and the reason is said once.
            raise OSError(str(error).replace(folder, "")) from None


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where their numbers are. The tensors have to live as long as these are used."""
    return [None if t is None else t.data_ptr() for t in tensors]


@cache
def missing(reason: str) -> None:
    """Say, once, why torch's own serves."""
    print(f"  kernels.c is not used, which is slower: {reason[:200]}")


def tried(make: Callable, same: Callable, dtype: torch.dtype, **constants: int) -> Callable | None:
    """make(library, dtype), if it is the `same` as torch's own; None, which it says, if not."""
    try:
        if sys.platform != "linux":
            raise OSError("Linux only")
        function = make(build(**constants, BF16=int(dtype == torch.bfloat16)), dtype)
        if same(function, dtype):
            return function
        missing("it computes something else here")
    except (OSError, subprocess.SubprocessError) as error:
        # What the compiler says, not how it was called.
        told = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        missing(told or str(error))
    return None


def close(ours: list[Tensor], exact: list[Tensor]) -> bool:
    """Are they the same, to rounding? A nan is not."""
    most = TOLERANCE[exact[0].dtype]
    both = zip(ours, exact, strict=True)
    return all(torch.allclose(x, y, atol=most, rtol=most) for x, y in both)


# ------------------------------------------------------------------------------ attention


@cache
def attention(group: int, dim: int, dtype: torch.dtype) -> Callable | None:
    """A function for heads of that size, `group` queries a key; None: torch's own serves."""
    if dtype not in TOLERANCE or dim % LANES:
        return None
    same = partial(same_attention, group, dim)
    return tried(attention_by, same, dtype, GROUP=group, DIM=dim)


def attention_by(library: ctypes.CDLL, dtype: torch.dtype) -> Callable:
    """The library's function, for tensors of that type."""
    library.attend.argtypes = [POINTER] * 8 + [LONG] * 6 + [FLOAT]
    library.attend.restype = None

    def attend(query, key, value, length, shared=None, window=None, scale=None) -> Tensor:
        """query (n, H, 1, D), key and value (n, h, W, D), length (n,) -> (n, 1, H, D)

        A sample sees the last `window` of its first length + 1 columns, and all of the shared
        keys and values (1, h, P, D). Key and value may be the first samples and columns of
        longer ones. TypeError: they are of another type, or lie otherwise.
        """
        n, heads, _, dim = query.shape
        per_head = key.stride(1)
        alike = query.dtype == key.dtype == value.dtype == dtype and key.stride() == value.stride()
        if not alike or key.stride() != (key.shape[1] * per_head, per_head, dim, 1):
            raise TypeError(f"keys of {key.dtype} {key.stride()}, values {value.stride()}")
        query, (far_key, far_value) = query.contiguous(), shared or (key[:1, :, :0],) * 2
        columns = per_head // dim
        out = query.new_empty(n, 1, heads, dim)
        seen = heads // key.shape[1] * (far_key.shape[2] + columns)
        threads = torch.get_num_threads()
        scores = torch.empty(threads, seen, dtype=torch.float32)
        read = addresses(query, far_key, far_value, key, value, length)
        sizes = threads, n, key.shape[1], far_key.shape[2], columns, window or NO_WINDOW
        library.attend(*read, *addresses(out, scores), *sizes, scale or dim**-0.5)
        return out

    return attend


def same_attention(group: int, dim: int, attend: Callable, dtype: torch.dtype) -> bool:
    """Is it torch's attention, on two samples that share some columns?"""
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=draw).to(dtype)
    query, key, value = make(2, 2 * group, 1, dim), make(2, 2, 40, dim), make(2, 2, 40, dim)
    shared, length = (make(1, 2, 9, dim), make(1, 2, 9, dim)), torch.tensor([39, 20])
    exact = []
    for i, seen in enumerate(length + 1):
        k, v = (torch.cat([s, t[i : i + 1, :, :seen]], 2) for s, t in zip(shared, (key, value)))
        one = F.scaled_dot_product_attention(query[i : i + 1], k, v, enable_gqa=True)
        exact.append(one[0].transpose(0, 1))
    return close([*attend(query, key, value, length, shared)], exact)


# ------------------------------------------------------------------------------ RMSNorm


def rms_norm_of_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d), weight (d,) -> (..., d)"""
    return F.rms_norm(x, weight.shape, weight, eps)


@cache
def rms_norm(dtype: torch.dtype) -> Callable:
    """A function of (x, weight, eps): C's where it serves, else torch's."""
    compiled = tried(rms_norm_by, same_rms_norm, dtype) if dtype in TOLERANCE else None
    return compiled or rms_norm_of_torch


def rms_norm_by(library: ctypes.CDLL, dtype: torch.dtype) -> Callable:
    """The library's function, for tensors of that type, else torch's."""
    library.rms_norm.argtypes = [POINTER] * 4 + [LONG] * 2 + [FLOAT]
    library.rms_norm.restype = None

    def call(x: Tensor, weight: Tensor, eps: float, upstream: Tensor | None = None) -> Tensor:
        """x (..., d), weight (d,) -> (..., d): its norm, or upstream's gradient"""
        x, dim = x.contiguous(), len(weight)
        grad = None if upstream is None else upstream.contiguous()
        out = torch.empty_like(x)
        library.rms_norm(*addresses(x, weight, grad, out), x.numel() // dim, dim, eps)
        return out

    class RMSNorm(torch.autograd.Function):
        """x / rms(x) * weight; only x is kept."""

        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor, eps: float):
            """x (..., d), weight (d,) -> (..., d)"""
            ctx.save_for_backward(x, weight)
            ctx.eps = eps
            return call(x, weight, eps)

        @staticmethod
        def backward(ctx, upstream: Tensor):
            """(..., d) -> the gradient of x; the weight is not trained"""
            return call(*ctx.saved_tensors, ctx.eps, upstream), None, None

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., d) -> (..., d)"""
        ours = x.dtype == weight.dtype == dtype and len(weight) % LANES == 0
        if not ours or weight.requires_grad:
            return rms_norm_of_torch(x, weight, eps)
        # Without gradients not by autograd, whose call takes as long as a few rows.
        return (RMSNorm.apply if torch.is_grad_enabled() else call)(x, weight, eps)

    return rms_norm


def same_rms_norm(function: Callable, dtype: torch.dtype) -> bool:
    """Is it torch's, and so its gradient?"""
    x, weight = torch.linspace(-2, 3, 96).to(dtype).view(3, 32), torch.linspace(-1, 2, 32).to(dtype)
    results = []
    for norm in (function, rms_norm_of_torch):
        with torch.enable_grad():
            one = x.clone().requires_grad_()
            out = norm(one, weight, 1e-5)
            results.append([out, *torch.autograd.grad(out.square().sum(), one)])
    return close(*results)


# ------------------------------------------------------------------------------ products


def product_of_torch(down: Tensor | None, weight: Tensor, bias: Tensor | None) -> Callable:
    """down (r, in), weight (out, in + r), bias (out,) -> x -> [x; down x] weight^T + bias"""
    if down is None:
        return partial(F.linear, weight=weight, bias=bias)
    return lambda x: F.linear(torch.cat([x, F.linear(x, down)], -1), weight, bias)


@cache
def product(dtype: torch.dtype) -> Callable | None:
    """As product_of_torch, but faster for few tokens; None: there is none here."""
    return tried(product_by, same_product, dtype) if dtype in TOLERANCE else None


def product_by(library: ctypes.CDLL, dtype: torch.dtype) -> Callable:
    """The library's function, for tensors of that type, else torch's."""
    library.product.argtypes = [POINTER] * 6 + [LONG] * 4
    library.product.restype = None
    read = lambda name: ctypes.c_int.in_dll(library, name).value
    rows, wide, step = map(read, ("rows_of_tile", "width_of_tile", "step_of_tile"))

    def panels(weight: Tensor) -> Tensor:
        """(out, in) -> (out / wide, in / step, wide, step), filled up"""
        over = -len(weight) % wide
        filled = (F.pad(weight, (0, 0, 0, over)) if over else weight).contiguous()
        # Two numbers of 16 bits are moved as one of 32: faster by ten times.
        whole = filled.view(torch.int32) if step == 2 else filled
        return whole.unflatten(0, (-1, wide)).transpose(1, 2).contiguous()

    def product(down: Tensor | None, weight: Tensor, bias: Tensor | None) -> Callable:
        """As product_of_torch; the function raises TypeError for an x of another type or size."""
        outs, rank = len(weight), 0 if down is None else len(down)
        size, padded = weight.shape[1] - rank, -(-outs // wide) * wide
        if weight.dtype != dtype or size % step or rank % step:
            return product_of_torch(down, weight, bias)
        held = [
            None if down is None else panels(down),
            panels(weight),
            None if bias is None else F.pad(bias, (0, padded - outs)),
        ]

        def call(x: Tensor) -> Tensor:
            """(..., in) -> (..., out)"""
            if x.dtype != dtype or x.shape[-1] != size:
                raise TypeError(f"{x.dtype} {tuple(x.shape)} for {dtype} (..., {size})")
            x, n = x.contiguous(), x.numel() // size
            out = torch.empty(*x.shape[:-1], padded, dtype=dtype)
            # Of 32 bits each, whatever the type.
            scratch = torch.empty(-(-n // rows) * rows * (size + rank), dtype=torch.float32)
            library.product(*addresses(x, *held, out, scratch), n, size, rank, padded)
            return out[..., :outs]

        return call

    return product


def same_product(make: Callable, dtype: torch.dtype) -> bool:
    """Is it torch's, with and without LoRA and bias?"""
    draw = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=draw).to(dtype)
    x, down, weight, bias = random(2, 9, 48), random(8, 48), random(40, 56), random(40)
    ours = [make(down, weight, bias)(x), make(None, weight[:, :48], None)(x[0, :1])]
    exact = F.linear(torch.cat([x, F.linear(x, down)], -1), weight, bias)
    return close(ours, [exact, F.linear(x[0, :1], weight[:, :48])])
