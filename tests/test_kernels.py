"""The C functions are torch's own to rounding, and where they cannot be built torch's serve."""

import math
import os
import platform
import shutil

import pytest
import torch
from conftest import make_model

import rl
from extras import kernels

TYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(
    not shutil.which((os.environ.get("CC") or "cc").split()[0]), reason="no C compiler"
)


@pytest.fixture(autouse=True)
def forget():
    """Nothing built, and nothing said, in another test."""
    caches = kernels.attention, kernels.rms_norm, kernels.product, kernels.build, kernels.missing
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def exactly(query, key, value, seen, shared, scale):
    """(H, D) in fp64: one token's attention, written out."""
    out, group = [], len(query) // len(key)
    for head, q in enumerate(query.double()):
        k, v = (
            torch.cat([s[0, head // group], t[head // group, seen]]).double()
            for s, t in zip(shared, (key, value))
        )
        out.append((k @ q * scale).softmax(0) @ v)
    return torch.stack(out)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank, bias", [(0, True), (8, False), (40, True)])
@pytest.mark.parametrize("outs", [32, 100])
def test_product_is_the_formula(rank, bias, outs, dtype):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape).to(dtype)
    down, weight = draw(rank, 50), draw(outs, 50 + rank)
    added = draw(outs) if bias else None
    times = kernels.product(dtype)(down if rank else None, weight, added)
    for n in (1, 7, 8, 9, 30):
        # Rows that do not follow each other in memory.
        x = draw(2, n, 100)[..., ::2]
        whole = torch.cat([x, (x.double() @ down.double().T).to(dtype)], -1).double()
        exact = whole @ weight.double().T + (added.double() if bias else 0)
        y = times(x)
        assert y.shape == exact.shape and y.dtype == dtype
        assert (y - exact).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2) * exact.max()


@needs_compiler
def test_a_product_takes_no_other_numbers_than_its_own():
    times = kernels.product(torch.float32)(None, torch.ones(32, 4), None)
    for wrong in (torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 5)):
        with pytest.raises(TypeError, match=r"float32 \(..., 4\)"):
            times(wrong)
    x = torch.ones(2, 4)
    x[1, 2] = math.nan
    assert (times(x)[0] == 4).all() and times(x)[1].isnan().all()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_what_lies_otherwise_is_not_read(dtype):
    """C would read past the end, or another number."""
    attend, length = kernels.attention(2, 16, dtype), torch.tensor([3])
    query, keys = torch.ones(1, 2, 1, 16, dtype=dtype), torch.ones(1, 1, 8, 16, dtype=dtype)
    strange = keys.to(TYPES[dtype == torch.float32])
    for key, value in [(strange, keys), (keys, strange), (keys.mT.contiguous().mT, keys)]:
        with pytest.raises(TypeError, match="keys of"):
            attend(query, key, value, length)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_of_another_type_or_an_odd_size_torchs_serve(dtype):
    x, weight = torch.ones(3, 5, dtype=dtype), torch.ones(32, 5, dtype=dtype)
    assert (kernels.product(dtype)(None, weight, None)(x) == 5).all()
    wide = kernels.product(dtype)(None, weight.double(), None)
    assert wide(x.double()).dtype == torch.float64
    norm = kernels.rms_norm(dtype)(x.double()[:, :1].repeat(1, 16), torch.ones(16).double(), 1e-5)
    assert norm.dtype == torch.float64


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its options")
@pytest.mark.parametrize("lacks", ["avx512bf16", "avx512f"])
def test_a_machine_that_has_less_computes_the_same(lacks, tmp_path, monkeypatch, capsys):
    """Each is compared with torch's when it is made, or None."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC") or "cc"} "$@" -mno-{lacks}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    for dtype in TYPES:
        assert kernels.product(dtype) and kernels.attention(3, 64, dtype)
        assert kernels.rms_norm(dtype) is not kernels.rms_norm_of_torch
    assert not capsys.readouterr().out


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group, dim", [(1, 16), (3, 64), (7, 64), (6, 128), (2, 80), (4, 256)])
@pytest.mark.parametrize("window, common", [(None, 0), (None, 37), (5, 0)])
def test_attention_is_the_formula(group, dim, dtype, window, common):
    attend = kernels.attention(group, dim, dtype)
    torch.manual_seed(0)
    heads, columns, n = 2, 50, 3
    draw = lambda *shape: torch.randn(shape).to(dtype)
    query = draw(n, heads * group, 1, dim)
    # As a cache gives them: cut from longer ones. What nobody sees may be anything.
    whole = [draw(n + 2, heads, columns + 14, dim) for _ in range(2)]
    length = torch.tensor([0, 20, columns - 1])
    for t in whole:
        for i, held in enumerate(length):
            t[i, :, held + 1 :] = math.nan
    key, value = (t[:n, :, :columns] for t in whole)
    shared = draw(1, heads, common, dim), draw(1, heads, common, dim)
    given = shared if common else None
    ours = attend(query, key, value, length, given, window, 0.3)
    assert ours.shape == (n, 1, heads * group, dim) and ours.dtype == dtype
    for i, held in enumerate(length.tolist()):
        seen = slice(max(0, held + 1 - (window or columns)), held + 1)
        exact = exactly(query[i, :, 0], key[i], value[i], seen, shared, 0.3)
        off = (ours[i, 0].double() - exact).abs().max()
        assert off < (1e-5 if dtype == torch.float32 else 1e-2) * exact.abs().max()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_a_nan_that_is_seen_is_not_hidden(dtype):
    attend = kernels.attention(2, 16, dtype)
    query, key = torch.ones(2, 2, 1, 16, dtype=dtype), torch.ones(2, 1, 8, 16, dtype=dtype)
    key[1, 0, 3, 5] = math.nan
    out = attend(query, key, torch.ones_like(key), torch.tensor([7, 7]))
    assert (out[0] == 1).all() and out[1].isnan().all()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 48), (2, 3, 48), (1, 900, 48)])
def test_rms_norm_and_its_gradient_are_the_formula(dtype, shape):
    norm = kernels.rms_norm(dtype)
    torch.manual_seed(0)
    # Rows that do not follow each other in memory.
    x = torch.randn(*shape[:-1], 96).to(dtype)[..., ::2].requires_grad_()
    weight, upstream = torch.randn(48).to(dtype), torch.randn(shape).to(dtype)
    y = norm(x, weight, 1e-5)
    (grad,) = torch.autograd.grad(y, x, upstream)
    exact = x.detach().double().requires_grad_()
    formula = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    (slope,) = torch.autograd.grad(formula, exact, upstream.double())
    most = 1e-5 if dtype == torch.float32 else 1e-2
    assert (y - formula).abs().max() < most * formula.abs().max()
    assert (grad - slope).abs().max() < most * slope.abs().max()
    with torch.no_grad():
        assert torch.equal(norm(x, weight, 1e-5), y)


@needs_compiler
def test_a_weight_that_is_trained_has_its_gradient():
    weight = torch.ones(32, requires_grad=True)
    kernels.rms_norm(torch.float32)(torch.ones(2, 32) * 3, weight, 1e-5).sum().backward()
    assert torch.allclose(weight.grad, torch.full((32,), 2.0), atol=1e-4)


@needs_compiler
def test_the_process_computes_as_before():
    """Linked with fast mathematics, a library makes the smallest numbers 0, everywhere."""
    kernels.attention(3, 16, torch.float32)
    small = torch.tensor([1e-40]) * torch.tensor([0.5])
    assert small.item() > 0


@needs_compiler
@pytest.mark.parametrize("kind", ["llama", "mistral-window"])
def test_a_policy_samples_by_them(tmp_path, kind, monkeypatch):
    folder = make_model(tmp_path / "m", kind, head_dim=16)
    calls, real = [], kernels.attention_by
    spy = lambda *made: lambda *args: calls.append(1) or real(*made)(*args)
    monkeypatch.setattr(kernels, "attention_by", spy)
    texts = "Name a lake.", "Name a hill, any."
    drawn = []
    for engine in ("packed", "plain"):
        policy = rl.load(folder, 16, dtype="fp32", engine=engine)
        if policy.model.device.type != "cpu":
            pytest.skip("a GPU has its own")
        calls.clear()
        prompts = [policy.chat.encode([dict(role="user", content=t)]) for t in texts]
        uniform = 1 - torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(policy.engine, "eos", set())
        drawn.append(policy.engine.sample(prompts, uniform, 1.0))
        assert bool(calls) == (engine == "packed")
    assert [[row[:12] for row in group] for group in drawn[0]] == drawn[1]


def test_without_a_compiler_torch_serves_and_a_line_says_so_once(monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernels.attention(3, 64, torch.bfloat16) is None
    assert kernels.rms_norm(torch.bfloat16) is kernels.rms_norm_of_torch
    assert kernels.product(torch.bfloat16) is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "kernels.c is not used" in said[0]
    assert "no C compiler no-such-compiler; install gcc" in said[0]


@needs_compiler
@pytest.mark.skipif(not shutil.which("cc"), reason="no cc")
@pytest.mark.parametrize("name", ["", "env cc"])
def test_a_compiler_may_be_unnamed_or_several_words(name, monkeypatch, capsys):
    monkeypatch.setenv("CC", name)
    assert kernels.product(torch.float32) and not capsys.readouterr().out


@needs_compiler
def test_what_the_compiler_says_is_said(monkeypatch, capsys, tmp_path):
    broken = tmp_path / "kernels.c"
    broken.write_text("int attend(")
    monkeypatch.setattr(kernels, "SOURCE", broken)
    assert kernels.attention(3, 64, torch.float32) is None
    assert "error" in capsys.readouterr().out


@needs_compiler
def test_one_that_computes_something_else_is_not_used(monkeypatch, capsys):
    real = kernels.attention_by
    wrong = lambda *made: lambda *args: 1.2 * real(*made)(*args)
    monkeypatch.setattr(kernels, "attention_by", wrong)
    assert kernels.attention(3, 64, torch.float32) is None
    assert "something else" in capsys.readouterr().out
    real_norm = kernels.rms_norm_by
    # The right values; of their gradient the half.
    half = lambda y: y / 2 + y.detach() / 2
    slow = lambda *made: lambda *args: half(real_norm(*made)(*args))
    monkeypatch.setattr(kernels, "rms_norm_by", slow)
    assert kernels.rms_norm(torch.float32) is kernels.rms_norm_of_torch
    real_product = kernels.product_by
    without_lora = lambda *made: (
        lambda down, weight, bias: real_product(*made)(
            None, weight if down is None else weight[:, : -len(down)], bias
        )
    )
    monkeypatch.setattr(kernels, "product_by", without_lora)
    assert kernels.product(torch.float32) is None


def test_what_it_is_not_made_for_is_torchs():
    assert kernels.attention(3, 20, torch.float32) is None
    assert kernels.attention(3, 64, torch.float16) is None
    assert kernels.product(torch.float16) is None
    assert kernels.rms_norm(torch.float16) is kernels.rms_norm_of_torch
