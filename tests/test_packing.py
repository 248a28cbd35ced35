"""The packed engine equals the plain one, whose few lines anybody can check."""

import dataclasses
import sys
import types
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import KINDS, OTHERS, make_model, randomise
from torch.utils._python_dispatch import TorchDispatchMode

import rl
from extras import cpu, cuda, fused, kernels, packing, siblings

CFG = types.SimpleNamespace(temperature=1.0, updates=1, kl=0.05)
ENDS = set(range(0, 256, 16))  # frequent: samples finish, and are replaced, at different times
compiled = kernels.product(torch.float32)
needs_compiler = pytest.mark.skipif(not compiled, reason="no C compiler")
TEXTS = ("Name a fruit.", "Name a tree please.", "Name a", "Sing!" * 12)


def asks(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


def make_pairs(n: int = 9) -> list[tuple[list[int], list[int]]]:
    """Prompts that share a template, completions of each, one of them twice, one empty."""
    torch.manual_seed(1)
    draw = lambda k: torch.randint(0, 250, (k,)).tolist()
    template = draw(30)
    prompts = [template + draw(5), template + draw(9), draw(4)]
    pairs = [(prompts[i % 3], draw(3 + i) + ([258] if i % 2 else [])) for i in range(n)]
    return [*pairs, pairs[0], (prompts[0], [])]


def load(folder: str, engine: str, bits: int = 16, **limits) -> rl.Policy:
    """fp32 on the CPU, where engines agree to many digits; its adapter is no longer zero."""
    policy = rl.load(folder, bits=bits, engine=engine, device="cpu", dtype="fp32", **limits)
    policy.add("follower")
    randomise(policy, "follower")
    return policy


@pytest.fixture(scope="session")
def twins(folders):
    """(kind, bits) -> the packed and the plain policy of one model; monkeypatch what you change."""
    made = {}

    def get(kind: str, bits: int = 16) -> tuple[rl.Policy, rl.Policy]:
        if (kind, bits) not in made:
            made[kind, bits] = [load(folders(kind), engine, bits) for engine in ("packed", "plain")]
        return made[kind, bits]

    return get


def tokens(policy: rl.Policy, messages, n: int, limit: int, temperature: float, seed: int = 0):
    torch.manual_seed(seed)
    with policy.using("follower"):
        return [[s.tokens for s in g] for g in policy.sample(messages, n, limit, temperature)]


def next_probabilities(policy: rl.Policy, prompts) -> torch.Tensor:
    with policy.using("follower"):
        return policy.engine.next_probabilities(prompts, [65, 70, 258])


def logprobs(policy: rl.Policy, pairs, temperature: float = 0.7):
    """Every pair's log-probabilities, and the gradient of a sum of them with uneven weights."""
    parameters = list(policy.tensors("follower").values())
    values = {}
    for parameter in parameters:
        parameter.grad = None
    with policy.using("follower"):
        for members, several in policy.engine.logprobs(pairs, temperature):
            total = 0
            for i, value in zip(members, several):
                assert i not in values and value.dtype == torch.float32
                values[i] = value.detach()
                total = total + (value * (torch.arange(len(value)) % 5 - 1.5 + i % 2)).sum()
            total.backward()
    assert [len(values[i]) for i in range(len(pairs))] == [len(done) for _, done in pairs]
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return torch.cat([values[i] for i in range(len(pairs))]), gradient


def assert_equal_logprobs(policy, exact, pairs):
    values, gradient = logprobs(policy, pairs)
    torch.testing.assert_close(values, exact[0], rtol=1e-4, atol=1e-4)
    assert ((gradient - exact[1]).norm() / exact[1].norm()).item() < 1e-4


def attend(monkeypatch, how: str) -> None:
    """Attention "dense", under one mask as on a GPU, or by "runs", as on a CPU."""
    start = packing.RowSight.__init__

    def forced(self, row, device, dtype, by_runs):
        start(self, row, device, dtype, by_runs=how == "runs")

    monkeypatch.setattr(packing.RowSight, "__init__", forced)
    # Runs of a few tokens come in pieces, too.
    monkeypatch.setattr(siblings, "PIECE", 3)


# ------------------------------------------------------------ packed = plain


# On the CPU 4-bit layers are unpacked into ordinary ones: a few kinds stand for all.
@pytest.mark.parametrize(
    "kind, bits",
    [
        *((kind, 16) for kind in KINDS),
        *((kind, 4) for kind in ("llama", "qwen2", "phi3", "gemma3")),
    ],
)
def test_packed_equals_plain(twins, kind, bits, monkeypatch):
    packed, plain = twins(kind, bits)
    assert isinstance(packed.engine, packing.PackedEngine)
    assert isinstance(plain.engine, rl.PlainEngine)
    for temperature, texts in ((0.0, TEXTS[:2]), (0.9, TEXTS[1:])):
        first, second = (tokens(p, asks(*texts), 3, 9, temperature) for p in (packed, plain))
        assert first == second and all(1 <= len(t) <= 9 for g in first for t in g)
    prompts = [packed.chat.encode(m) for m in asks(*TEXTS)] + [[9]]
    ours, theirs = (next_probabilities(p, prompts) for p in (packed, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    pairs = make_pairs()
    exact = logprobs(plain, pairs)
    layers, chunk = len(packed.model.get_decoder().layers), packed.engine.head.chunk
    for how in ("runs", "dense"):
        attend(monkeypatch, how)
        for budget, recompute, size in ((4096, False, 3), (60, True, chunk)):
            monkeypatch.setattr(packed.engine, "token_budget", budget)
            monkeypatch.setattr(packed.engine, "recompute_all", recompute)
            monkeypatch.setattr(packed.engine.head, "chunk", size)
            assert_equal_logprobs(packed, exact, pairs)
            assert packed.engine.recomputed == layers * recompute
        ours = next_probabilities(packed, prompts)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_packing_would_change_takes_the_plain_engine_and_says_so(
    folders, kind, capsys
):
    policy = load(folders(kind), "packed")
    said = capsys.readouterr().out
    fell_back = type(policy.engine) is rl.PlainEngine
    assert said.count("plain engine, slower: packing is not exact for this model") == fell_back
    plain = load(folders(kind), "plain")
    assert tokens(policy, asks(*TEXTS), 2, 8, 0.9) == tokens(plain, asks(*TEXTS), 2, 8, 0.9)
    assert_equal_logprobs(policy, logprobs(plain, make_pairs(3)), make_pairs(3))


def no_norms(model) -> None:
    """Takes the place of packing.fuse_norms: layers that do not normalise at all."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x: x


@pytest.mark.parametrize("fault", ["window", "mask", "cache", "norm", "error"])
def test_the_check_at_loading_notices_what_packing_gets_wrong(folders, fault, monkeypatch, capsys):
    kind = "mistral-window" if fault == "window" else "llama"
    real, fill = packing.Siblings, packing.SlotCache.fill

    def shifted(group: siblings.Group) -> siblings.Group:
        pieces = [(columns - (columns > 3), *rest) for columns, *rest in group.pieces]
        return dataclasses.replace(group, pieces=pieces)

    target, name, wrong = {
        "window": (packing, "Siblings", lambda group, _, *how: real(group, None, *how)),
        "mask": (packing, "Siblings", lambda group, *how: real(shifted(group), *how)),
        "cache": (packing.SlotCache, "fill", lambda *args: fill(*args[:3], args[3][1:])),
        "norm": (packing, "fuse_norms", no_norms),
        "error": (packing.RowSight, "attend", lambda *args: torch.zeros(2) @ torch.zeros(3)),
    }[fault]
    right = getattr(target, name)
    monkeypatch.setattr(target, name, wrong)
    policy = load(folders(kind), "packed")
    assert type(policy.engine) is rl.PlainEngine
    assert "plain engine, slower: packing is not exact for this model (" in capsys.readouterr().out
    monkeypatch.setattr(target, name, right)
    assert tokens(policy, asks("Hi"), 1, 8, 0) == tokens(
        load(folders(kind), "plain"), asks("Hi"), 1, 8, 0
    )


def test_on_the_device_itself_the_engines_agree_within_its_rounding(folders):
    policies = []
    for engine in ("packed", "plain"):
        policies.append(rl.load(folders("qwen3"), bits=16, engine=engine))
        policies[-1].add("follower")
        randomise(policies[-1], "follower")
    assert isinstance(policies[0].engine, packing.PackedEngine)
    prompts = [policies[0].chat.encode(m) for m in asks(*TEXTS)]
    tolerance = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
    found = []
    for policy in policies:
        with policy.using("follower"), torch.no_grad():
            pairs, values = make_pairs(), {}
            for members, several in policy.engine.logprobs(pairs):
                values |= {i: v.float().cpu() for i, v in zip(members, several)}
            values = torch.cat([values[i] for i in range(len(pairs))])
            found.append([values, policy.engine.next_probabilities(prompts, [65, 70])])
    atol = tolerance[policies[0].model.dtype]
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# ------------------------------------------------------------ sampling


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral-window", "gemma3", "phi"])
def test_greedy_equals_transformers_generate(twins, kind, monkeypatch):
    monkeypatch.setattr(packing, "SHARED_FROM", 1)  # what prompts share is read in one place
    packed, plain = twins(kind)
    for (completion,), message in zip(tokens(packed, asks(*TEXTS), 1, 16, 0.0), asks(*TEXTS)):
        ids = torch.tensor([plain.chat.encode(message)])
        how = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=258)
        with plain.using("follower"):
            full = plain.model.generate(ids, max_new_tokens=16, **how)
        assert completion == full[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("shared_from", [1, 128])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_samples_depend_neither_on_slots_nor_on_late_looks(twins, kind, shared_from, monkeypatch):
    monkeypatch.setattr(packing, "SHARED_FROM", shared_from)
    packed, plain = twins(kind)
    for policy in (packed, plain):
        monkeypatch.setattr(policy.chat, "eos", ENDS)
        monkeypatch.setattr(policy.engine, "eos", ENDS)
    expected = tokens(plain, asks(*TEXTS), 4, 10, 1.0)
    for slots, look, budget in ((1, 1, 2048), (3, 1, 40), (64, 1, 2048), (3, 7, 2048), (64, 7, 40)):
        monkeypatch.setattr(packed.engine, "slots", slots)
        monkeypatch.setattr(packed.engine, "token_budget", budget)
        monkeypatch.setitem(packing.LOOK_EVERY, "cpu", look)  # 7: as on a GPU, where a look waits
        assert tokens(packed, asks(*TEXTS), 4, 10, 1.0) == expected
    flat = [t for group in expected for t in group]
    assert len({tuple(t) for t in flat}) > 10
    for completion in flat:
        assert not ENDS & set(completion[:-1])
        assert completion[-1] in ENDS or len(completion) == 10


def test_a_sample_may_begin_in_one_slot_and_move_to_another_at_once(twins, monkeypatch):
    packed, plain = twins("llama")
    # The longest prompt begins last, when the columns in use are still those of shorter ones.
    expected = tokens(plain, asks(*TEXTS), 3, 5, 1.0)
    for slots in range(4, 12):
        monkeypatch.setattr(packed.engine, "slots", slots)
        assert tokens(packed, asks(*TEXTS), 3, 5, 1.0) == expected, slots


def test_few_keys_and_values_fit_and_the_samples_are_the_same(twins, monkeypatch):
    packed, plain = twins("llama")
    monkeypatch.setattr(packed.engine, "kv_bytes", lambda: 1.0)
    assert tokens(packed, asks(*TEXTS), 2, 9, 1.0) == tokens(plain, asks(*TEXTS), 2, 9, 1.0)


@pytest.mark.parametrize("window", [40, 4000])
def test_a_shared_prefix_is_read_in_one_place_only_where_the_window_reaches(
    tmp_path, window, monkeypatch
):
    folder = make_model(tmp_path / "m", "mistral-window", sliding_window=window)
    packed, plain = (load(folder, engine) for engine in ("packed", "plain"))
    assert isinstance(packed.engine, packing.PackedEngine)
    shared, real = [], packing.attention_after
    spy = lambda *args: shared.append(1) or real(*args)
    monkeypatch.setattr(packing, "attention_after", spy)
    monkeypatch.setattr(packing.kernels, "attention", lambda *args: None)
    messages = asks(*("Once upon a time. " * 10 + end for end in ("Go", "Stop it", "Go on")))
    assert len(packed.chat.encode(messages[0])) > packing.SHARED_FROM
    assert tokens(packed, messages, 2, 12, 0.9) == tokens(plain, messages, 2, 12, 0.9)
    assert bool(shared) == (window == 4000)


class Recorder(TorchDispatchMode):
    """A CUDA graph's stand-in: kernels, with the very memory that they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read while recording")
        out = func(*args, **(kwargs or {}))
        written = [r.alias_info.is_write for r in func._schema.returns if r.alias_info]
        # A view of memory that stays is no kernel.
        if all(written):
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, again))):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


def by_torch_alone(model, monkeypatch):
    """As on a GPU: what is not torch's a recorder would not see."""
    for function in ("attention", "product"):
        monkeypatch.setattr(packing.kernels, function, lambda *args: None)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" in vars(module):
            how = dict(weight=module.weight, eps=module.variance_epsilon)
            by_torch = partial(packing.kernels.rms_norm_of_torch, **how)
            monkeypatch.setattr(module, "forward", by_torch)


def recorded(work, pool):
    with Recorder() as recorder:
        work()
    return recorder.replay


def nothing(work, pool):
    """A recording that does nothing: most of its tokens are wrong."""
    return lambda: None


def refused(work, pool):
    work()
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("shared_from", [1, 128])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_recorded_step_replayed_picks_the_same_tokens(twins, kind, shared_from, monkeypatch):
    monkeypatch.setattr(packing, "SHARED_FROM", shared_from)
    monkeypatch.setattr(cuda, "COLUMNS", 16)
    packed, plain = twins(kind)
    by_torch_alone(packed.model, monkeypatch)
    for policy in (packed, plain):
        monkeypatch.setattr(policy.chat, "eos", ENDS)
        monkeypatch.setattr(policy.engine, "eos", ENDS)
    expected = tokens(plain, asks(*TEXTS), 4, 30, 1.0)
    made, replays, real = [], [], cuda.Replayed

    def record(work, pool):
        replay = recorded(work, pool)
        return lambda: replays.append(1) or replay()

    monkeypatch.setattr(packed.engine, "record", record)
    monkeypatch.setattr(cuda, "Replayed", lambda *args: made.append(real(*args)) or made[-1])
    for slots, look in ((64, 7), (9, 3), (3, 1)):
        monkeypatch.setattr(packed.engine, "slots", slots)
        monkeypatch.setitem(packing.LOOK_EVERY, "cpu", look)
        assert tokens(packed, asks(*TEXTS), 4, 30, 1.0) == expected
        assert len(replays) > 2 * len(made[-1].recorded) > 2 and not made[-1].off
        assert {n for n, _ in made[-1].recorded} <= {1, 2, 3, 4, 8, 9, 16, 24}
        replays.clear()


@pytest.mark.parametrize(
    "record, says",
    [(nothing, "100% of its tokens differ"), (refused, "RuntimeError: operation not")],
)
def test_a_recording_that_is_wrong_or_impossible_is_not_used(
    twins, record, says, monkeypatch, capsys
):
    packed, plain = twins("llama")
    monkeypatch.setattr(packed.engine, "record", record)
    assert tokens(packed, asks(*TEXTS), 4, 12, 1.0) == tokens(plain, asks(*TEXTS), 4, 12, 1.0)
    assert f"no CUDA graph, slower: {says}" in capsys.readouterr().out


def test_sizes_of_recordings_are_few_and_large_enough():
    sizes = {cuda.Replayed.sizes(n, 8 * w) for n in range(1, 81) for w in range(1, 33)}
    assert len(sizes) == 13 * 4
    for n in range(1, 81):
        samples, columns = cuda.Replayed.sizes(n, n)
        assert n <= samples < max(2 * n, n + 8) and n <= columns < n + 64


@pytest.mark.parametrize("role", [None, "follower"])
@pytest.mark.parametrize(
    "product", [kernels.product_of_torch, pytest.param(compiled, marks=needs_compiler)]
)
@pytest.mark.parametrize(
    "kind, bits, together",
    [("llama", 4, "qkv o gu d"), ("qwen2", 16, "qkv o gu d"), ("phi3", 4, "q o g d")],
)
def test_layers_of_one_input_are_one_product(
    folders, kind, bits, together, product, role, monkeypatch
):
    monkeypatch.setattr(cpu, "UNPACK_MIB", 0)
    policy = load(folders(kind), "packed", bits)
    randomise(policy, "follower")
    groups, dtype = policy.engine.together, policy.model.dtype
    name = {layer: name.split(".")[-1] for name, layer in policy.lora.items()}
    layers = len(policy.model.get_decoder().layers)
    assert ["".join(name[m][0] for m in group) for group in groups] == together.split() * layers
    inputs = [torch.randn(2, 5, group[0].base.in_features) for group in groups]
    size = sum(m.base.in_features * m.base.out_features for m in policy.lora.values()) * 4
    with policy.using(role), policy.inference():
        expected = [[m(x) for m in group] for group, x in zip(groups, inputs)]
        for most, fits in ((size, True), (size - 1, False)):
            with fused.fused(groups, dtype, most, product):
                assert all(("forward" in vars(m)) == fits for m in policy.lora.values())
                for group, x, values in zip(groups, inputs, expected):
                    first = [m(x) for m in group]
                    # In another order, for another tensor, for the same tensor with other values.
                    assert not torch.equal(group[-1](x + 1), values[-1])
                    again = [m(x) for m in reversed(group)][::-1]
                    torch.testing.assert_close([first, again], [values] * 2, rtol=1e-4, atol=1e-5)
                    group[0](x.mul_(2))
                    torch.testing.assert_close(group[0](x.div_(2)), values[0], rtol=1e-4, atol=1e-5)
            assert not any("forward" in vars(m) for m in policy.lora.values())


def test_without_c_layers_are_multiplied_as_one_where_that_pays(twins, monkeypatch):
    packed, _ = twins("llama")
    made = []
    monkeypatch.setattr(packing, "fused", lambda *args: made.append(args) or fused.fused(*args))
    monkeypatch.setattr(kernels, "product", lambda dtype: None)
    for dtype, room in ((torch.float32, 0), (torch.bfloat16, packing.CPU_MIB << 20)):
        monkeypatch.setattr(packed.engine, "dtype", dtype)
        packed.engine.faster_layers()
        assert made.pop()[2:] == (room, kernels.product_of_torch)


@needs_compiler
@pytest.mark.parametrize("kind, bits", [("llama", 4), ("qwen2", 16), ("gemma3", 16)])
def test_sampling_by_fewer_products_picks_the_same_tokens(twins, kind, bits, monkeypatch):
    packed, plain = twins(kind, bits)
    made, real = [], fused.Fused
    monkeypatch.setattr(fused, "Fused", lambda *args: made.append(real(*args)) or made[-1])
    for texts in (TEXTS, TEXTS[:1]):
        assert tokens(packed, asks(*texts), 3, 12, 1.0) == tokens(plain, asks(*texts), 3, 12, 1.0)
    # The layers', and the head's.
    assert len(made) == 2 * (len(packed.engine.together) + 1) > 4
    # Where there is no room for the head, the layers' are made all the same.
    made.clear()
    most = fused.copy_bytes(packed.engine.together, torch.float32) / 2**20
    monkeypatch.setattr(packing, "CPU_MIB", most)
    tokens(packed, asks(*TEXTS), 1, 2, 1.0)
    assert len(made) == len(packed.engine.together)


def test_attention_of_a_recomputed_layer_is_computed_once(twins, monkeypatch):
    packed, _ = twins("llama")
    attend(monkeypatch, "runs")
    calls, real = [], siblings.RunAttention.parts
    counted = lambda *args: calls.append(1) or real(*args)
    monkeypatch.setattr(siblings.RunAttention, "parts", counted)
    counts = []
    for recompute in (False, True):
        monkeypatch.setattr(packed.engine, "recompute_all", recompute)
        calls.clear()
        logprobs(packed, make_pairs())
        counts.append(len(calls))
    assert counts[0] == counts[1] > 10
    assert siblings.RunAttention.kept is None and not siblings.RunAttention.again


def test_one_token_one_prompt_and_nothing_at_all(twins):
    packed, plain = twins("llama")
    for policy in (packed, plain):
        assert policy.sample([], 2, 5) == [] and policy.yes_probability([]) == []
        assert list(policy.engine.logprobs([])) == []
    assert tokens(packed, asks("Hi"), 2, 1, 1.0) == tokens(plain, asks("Hi"), 2, 1, 1.0)
    same = asks("Hi", "Hi", "Hi")  # prompts that share all but nothing
    assert tokens(packed, same, 2, 7, 1.0) == tokens(plain, same, 2, 7, 1.0)


@pytest.mark.parametrize("vocabulary", [700, 512, 640, 704])
def test_the_fast_pick_is_the_plain_pick(vocabulary):
    torch.manual_seed(0)
    logits, uniform = torch.randn(4000, vocabulary) * 2, 1 - torch.rand(4000)
    for temperature in (0, 0.3, 1.0, 1.5):
        fast = packing.pick(logits.clone(), uniform, temperature)
        # Sums in another order: a draw on the border of two tokens may fall to either.
        assert (fast != rl.pick(logits, uniform, temperature)).float().mean() < 1e-3
    certain = torch.full((3, vocabulary), -1e9)
    certain[:, 500] = 0
    draws = torch.tensor([1.0, 1e-9, 0.5])
    assert packing.pick(certain, draws, 1.0).tolist() == [500] * 3
    certain[0, 3], certain[1, 3] = torch.nan, torch.inf
    for pick in (rl.pick, packing.pick):
        assert pick(certain.clone(), draws, 1.0).tolist() == [rl.NOT_A_TOKEN] * 2 + [500]


# ------------------------------------------------------------ pack


def prefixes(sequences, members, prefix: int) -> set[tuple]:
    return {tuple(sequences[i][: k + 1]) for i in members for k in range(prefix, len(sequences[i]))}


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("budget", [1, 12, 80, 4096])
def test_pack_holds_every_distinct_token_once_and_a_token_sees_its_own_path(budget, prefix):
    draw = np.random.default_rng(budget)
    lengths = [*draw.integers(1, 25, 30), 60, 60]
    sequences = [[7] * prefix + draw.integers(0, 3, n).tolist() for n in lengths]
    sequences += [sequences[0], sequences[1][: prefix + 1], sequences[1] + [2]]
    rows = list(packing.pack(sequences, budget, prefix))
    assert sorted(i for row in rows for i in row.members) == list(range(len(sequences)))
    for row in rows:
        size, mask = len(row.tokens), row.mask()
        # A sequence longer than the budget is alone with its own prefixes.
        longest = max(len(sequences[i]) for i in row.members) - prefix
        assert size == len(prefixes(sequences, row.members, prefix)) <= max(budget, longest)
        assert mask.shape == (size, prefix + size) and mask[:, :prefix].all()
        covered = [at for start, end, _ in row.runs for at in range(start, end)]
        assert covered == list(range(size))
        for i, path in zip(row.members, row.paths):
            assert row.tokens[path].tolist() == sequences[i][prefix:]
            assert row.depth[path].tolist() == list(range(prefix, len(sequences[i])))
            for k, at in enumerate(path):
                seen = np.flatnonzero(mask[at, prefix:])
                assert sorted(seen) == sorted(path[: k + 1])
    if budget == 4096:
        assert len(rows) == 1
    assert list(packing.pack([], budget, prefix)) == []


def ragged(prefix: int) -> packing.Row:
    """A tree of two prompts, nine completions each of 1 to 9 tokens, some with a common start."""
    draw = np.random.default_rng(prefix)
    prompts = [[9] * prefix + [5, 6], [9] * prefix + [5, 7, 8, 8, 7]]
    ends = lambda: [draw.integers(3, 7, n).tolist() for n in range(1, 10)]
    return next(packing.pack([p + end for p in prompts for end in ends()], 4096, prefix))


@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("piece, alike, scores", [(3, 32, 1), (3, 2, 1 << 22), (128, 32, 1 << 22)])
def test_a_row_by_runs_has_the_values_and_gradients_of_one_under_a_mask(
    window, prefix, piece, alike, scores, monkeypatch
):
    row = ragged(prefix)
    torch.manual_seed(0)
    length, seen = len(row.tokens), prefix + len(row.tokens)
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, length), (2, seen), (2, seen)))
    upstream = torch.randn(1, length, 4, 16)
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    for name, value in (("PIECE", piece), ("ALIKE", alike), ("SCORES", scores)):
        monkeypatch.setattr(siblings, name, value)
    results, sights = [], []
    for by_runs in (True, False):
        sights.append(packing.RowSight(row, q.device, q.dtype, by_runs))
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        how = dict(scaling=0.3, sliding_window=window)
        out = packing.attention(module, *given, sights[-1].handle(), **how)[0]
        results.append([out, *torch.autograd.grad(out, given, upstream)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    batches = sights[0].batches[window]
    tokens = np.concatenate([np.unique(np.arange(length)[b.tokens.at]) for b in batches])
    assert sorted(tokens) == list(range(length))
    largest = max(batch.tokens.shape[0] for batch in batches)
    assert largest > 3 if scores > 1 else largest == 1


# ------------------------------------------------------------ memory


def groups_of(policy: rl.Policy) -> list[list[rl.Sample]]:
    torch.manual_seed(2)
    groups = policy.sample(asks("Name a fruit.", "Sing!"), 4, 12)
    for i, sample in enumerate(s for group in groups for s in group):
        sample.reward = float(i % 3)
    return groups


def one_step(policy: rl.Policy, groups) -> torch.Tensor:
    """The gradient that a step would give to the optimiser; parameters stay as they are."""
    seen, parameters = [], list(policy.tensors("follower").values())
    step = lambda: seen.append(torch.cat([p.grad.flatten() for p in parameters]))
    optimizer = types.SimpleNamespace(step=step, zero_grad=lambda **_: None)
    rl.grpo_step(policy, "follower", None, groups, optimizer, CFG)
    return seen[0]


def failing(engine, times: list[int], monkeypatch) -> list:
    """The engine's forward pass runs out of memory at these calls; returns what was tried."""
    tried, real = [], engine._forward

    def forward(*args):
        tried.append((engine.recompute_all, engine.token_budget, engine.slots))
        if len(tried) in times:
            raise torch.OutOfMemoryError("raised by the test")
        return real(*args)

    monkeypatch.setattr(engine, "_forward", forward)
    return tried


def test_out_of_memory_recomputes_then_halves_and_the_step_is_the_same(folders, monkeypatch):
    policy = load(folders("llama"), "packed", token_budget=80, slots=8)
    groups = groups_of(policy)
    exact = one_step(policy, groups)
    monkeypatch.setattr(packing, "MIN_BUDGET", 20)
    # Each attempt but the last fails at its second row, part of its gradient computed.
    tried = failing(policy.engine, [2, 4], monkeypatch)
    gradient = one_step(policy, groups)
    assert list(dict.fromkeys(tried)) == [(False, 80, 8), (True, 80, 8), (True, 40, 4)]
    assert ((gradient - exact).norm() / exact.norm()).item() < 1e-4


def test_out_of_memory_when_sampling_or_judging_changes_no_value(folders, monkeypatch):
    policy = load(folders("llama"), "packed", token_budget=256, slots=8)
    messages = asks(*TEXTS)
    policy.chat.verdict_tokens = [[65, 66], [70]]
    expected = tokens(policy, messages, 3, 12, 1.0), policy.yes_probability(messages)
    failing(policy.engine, [2, 3, 7], monkeypatch)
    again = tokens(policy, messages, 3, 12, 1.0), policy.yes_probability(messages)
    assert again[0] == expected[0] and again[1] == pytest.approx(expected[1], nan_ok=True, abs=1e-5)
    assert policy.engine.recompute_all and policy.engine.slots < 8


def test_when_nothing_is_left_to_give_up_the_error_says_what_to_change(folders, monkeypatch):
    policy = load(folders("llama"), "packed", slots=4)
    groups, tried = groups_of(policy), failing(policy.engine, range(1, 100), monkeypatch)
    with pytest.raises(rl.ModelError, match="out of GPU memory.*--max-new-tokens") as caught:
        one_step(policy, groups)
    assert "\n" not in str(caught.value)
    engine = policy.engine
    assert (engine.recompute_all, engine.token_budget, engine.slots) == (True, 128, 1)
    assert len(tried) == len(set(tried))  # each attempt had less than the one before


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_rows_of_a_few_tokens_change_no_value(folders, twins, texts):
    small, plain = load(folders("llama"), "packed", token_budget=8), twins("llama")[1]
    assert isinstance(small.engine, packing.PackedEngine)
    assert tokens(small, asks(*texts), 2, 7, 1.0) == tokens(plain, asks(*texts), 2, 7, 1.0)


def test_what_an_out_of_memory_took_comes_back_by_halves(folders, monkeypatch):
    monkeypatch.setattr(packing, "RECOVER_AFTER", 2)
    policy = load(folders("llama"), "packed", token_budget=512, slots=8)
    engine, states = policy.engine, []
    fail = lambda times: [engine.use_less_memory() for _ in range(times)]
    begin = lambda: tokens(policy, asks("Hi"), 1, 2, 1.0)
    fail(3)
    for again in (0, 0, 0, 1, 0, 0, 0, 0, 0, 0):
        fail(again)  # what is taken in between starts the count anew
        begin()
        states.append((engine.recompute_all, engine.token_budget, engine.slots))
    least, half, most = ((True, 128, 2), (True, 256, 4), (True, 512, 8))
    back = [least, half, half, least, half, half, most, most, (False, 512, 8), (False, 512, 8)]
    assert states == back


def test_layers_are_recomputed_as_far_as_activations_do_not_fit(folders, monkeypatch):
    policy = load(folders("llama"), "packed")
    pair = ([5] * 30, list(range(170)))
    exact, counts, real = logprobs(policy, [pair]), [], packing.checkpoint
    monkeypatch.setattr(packing, "checkpoint", lambda *a, **k: counts.append(1) or real(*a, **k))
    for mib, free, layers in ((64, 1e9, 0), (64, 1 << 22, 1), (1, 1e9, 1), (0.1, 1e9, 2)):
        monkeypatch.setattr(packing, "CPU_ACTIVATION_MIB", mib)
        monkeypatch.setattr(policy.engine, "cpu_free", free)
        counts.clear()
        assert_equal_logprobs(policy, exact, [pair])
        assert len(counts) == layers
    with torch.no_grad(), policy.using("follower"):  # nothing is kept where no gradient is wanted
        list(policy.engine.logprobs([pair]))
    assert len(counts) == 2


# ------------------------------------------------------------ the CPU


@pytest.mark.parametrize("role", [None, "follower"])
def test_few_tokens_on_the_cpu_take_another_way_to_the_same_output(twins, role):
    policy = twins("qwen2", 4)[0]  # with biases
    with policy.using(role):
        for name, layer in policy.lora.items():
            assert isinstance(layer.base, cpu.UnpackedLinear), name
            x = torch.randn(3, 2, layer.base.in_features)
            few = layer(x)
            assert few.shape == (3, 2, layer.base.out_features) and few.is_contiguous()
            many = layer(x.repeat(cpu.FEW_TOKENS, 1, 1))[:3]
            torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5, msg=name)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), few.detach(), rtol=0, atol=0, msg=name)


def test_4_bit_layers_too_large_to_unpack_give_the_same_numbers(twins, folders, monkeypatch):
    monkeypatch.setattr(cpu, "UNPACK_MIB", 0)
    held = load(folders("qwen2"), "packed", 4)
    kinds = Counter(type(layer.base).__name__ for layer in held.lora.values())
    assert set(kinds) == {"Linear4bit"} and isinstance(held.engine, packing.PackedEngine)
    assert_equal_logprobs(held, logprobs(twins("qwen2", 4)[1], make_pairs()), make_pairs())


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_memory_is_given_back_where_it_is_short_and_by_glibc_alone(platform, able, monkeypatch):
    calls, left = [], types.SimpleNamespace(total=100, available=24)

    def library(name):
        assert platform == "linux", "asked a C library that is not glibc"
        return types.SimpleNamespace(**{"malloc_trim": calls.append} if able else {})

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(cpu.ctypes, "CDLL", library)
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: left)
    cpu.trim()
    left.available = 26
    cpu.trim()
    assert len(calls) == (able and platform == "linux")
    cpu.trim(short=1)
    assert calls == [0, 0] * (able and platform == "linux")
    cpu.keep_freed()
