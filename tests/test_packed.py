"""The packed engine equals the plain one, which is short enough to check by reading."""

import functools
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import KINDS, load_trained, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import rl
from extras import packed, self_check
from extras.data import InputError

# On a CPU 4-bit weights are unpacked into ordinary ones: a few kinds stand for all.
EXACT = [(kind, 16) for kind in KINDS] + [("moe-after-mlp", 16), ("llama", 4), ("phi3", 4)]
TEXTS = ("Name a fruit.", "Name a tree please.", "Name a", "Sing!" * 12)
add, admit = packed.Row.add, packed.SlotCache.admit
# Frequent EOS ids: samples end, and are replaced, at different times.
ENDS = set(range(0, 256, 16))


def load(folder: str, engine: str, *args, **options) -> rl.Policy:
    policy = load_trained(folder, engine, *args, **options)
    policy.chat.eos.update(ENDS)
    return policy


@pytest.fixture(scope="session")
def both(folders):
    """(kind, bits) -> a model's packed and its plain policy. Change them by monkeypatch only."""
    names = ("packed", "plain")
    return functools.cache(lambda kind, bits=16: [load(folders(kind), n, bits) for n in names])


def sample(policy, texts=TEXTS, n=3, limit=9, temperature=1.0) -> list[list[list[int]]]:
    torch.manual_seed(0)
    with policy.using("follower"):
        messages = [[{"role": "user", "content": text}] for text in texts]
        groups = policy.sample(messages, n, limit, temperature)
    return [[s.tokens for s in group] for group in groups]


def make_pairs(n: int = 9) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) pairs. Prompts share a start. One pair comes twice, one is empty."""
    ids = torch.randint(0, 250, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [ids[:35], ids[:30] + ids[40:49], ids[50:54]]
    pairs = [(prompts[i % 3], ids[9 * i + 60 :][: 3 + i] + [258] * (i % 2)) for i in range(n)]
    return [*pairs, pairs[0], (prompts[0], [])]


def logprobs(policy, pairs, temperature: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """All log-probabilities, and the gradient of a sum of them with uneven weights."""
    parameters = list(policy.tensors("follower").values())
    for parameter in parameters:
        parameter.grad = None
    values = [None] * len(pairs)
    with policy.using("follower"):
        for members, several in policy.engine.logprobs(pairs, temperature):
            total = 0
            for i, value in zip(members, several):
                assert values[i] is None and value.dtype == torch.float32
                values[i] = value.detach()
                total = total + (value * (torch.arange(len(value)) % 5 - 1.5 + i % 2)).sum()
            total.backward()
    assert [len(value) for value in values] == [len(completion) for _, completion in pairs]
    return torch.cat(values), torch.cat([p.grad.flatten() for p in parameters])


def assert_equal_logprobs(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert ((found[1] - expected[1]).norm() / expected[1].norm()).item() < 1e-4


@pytest.mark.parametrize("kind, bits", EXACT)
def test_packed_equals_plain(both, kind, bits, monkeypatch):
    fast, plain = both(kind, bits)
    assert isinstance(fast.engine, packed.PackedEngine) and type(plain.engine) is rl.PlainEngine
    # Eager attention serves what ours cannot compute: softcaps and sinks.
    assert fast.engine.packed == (kind not in ("gemma2", "gpt-oss"))
    # Greedy, with a prefix of its own per slot. By the same draws, with a shared prefix.
    for temperature, min_prefix, texts in ((0.0, 128, TEXTS[:2]), (0.9, 1, TEXTS[1:])):
        monkeypatch.setattr(packed, "MIN_SHARED_PREFIX", min_prefix)
        assert sample(fast, texts, 3, 9, temperature) == sample(plain, texts, 3, 9, temperature)
    pairs, prompts = make_pairs(), [prompt for prompt, _ in make_pairs()]
    expected = logprobs(plain, pairs)
    with plain.using("follower"):
        right = plain.engine.next_probabilities(prompts, [65, 258])
    # One row and many. The head in chunks and at once. Layers kept and recomputed.
    for budget, chunk, recompute in ((4096, 3, False), (60, 4096, True)):
        monkeypatch.setattr(fast.engine, "token_budget", budget)
        monkeypatch.setattr(fast.engine.head, "chunk", chunk)
        monkeypatch.setattr(fast.engine, "recompute_all", recompute)
        assert_equal_logprobs(logprobs(fast, pairs), expected)
        with fast.using("follower"):
            found = fast.engine.next_probabilities(prompts, [65, 258])
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_nothing_one_token_and_equal_prompts(both):
    fast, plain = both("llama")
    assert fast.sample([], 2, 5) == fast.yes_probability([]) == list(fast.engine.logprobs([])) == []
    assert sample(fast, ["Hi"], limit=1) == sample(plain, ["Hi"], limit=1)
    assert sample(fast, ["Hi"] * 3) == sample(plain, ["Hi"] * 3)


@settings(deadline=None, max_examples=60, database=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12),
    st.sampled_from([0, 3]),
    st.sampled_from([1, 6, 30, 4096]),
)
def test_pack_holds_each_distinct_token_once_and_it_attends_to_its_path(ends, prefix, budget):
    sequences = [[7] * prefix + end for end in ends]
    rows = list(packed.pack(sequences, budget, prefix))
    assert sorted(i for row in rows for i in row.members) == list(range(len(sequences)))
    for row in rows:
        distinct = {tuple(ends[i][: k + 1]) for i in row.members for k in range(len(ends[i]))}
        size, mask = len(row.tokens), row.mask()
        assert size == len(distinct) <= max(budget, *(len(ends[i]) for i in row.members))
        assert mask.shape == (size, prefix + size) and mask[:, :prefix].all()
        for i, path in zip(row.members, row.paths):
            assert row.tokens[path].tolist() == ends[i]
            assert row.position_ids[path].tolist() == list(range(prefix, len(sequences[i])))
            for k, token in enumerate(path):
                assert np.flatnonzero(mask[token, prefix:]).tolist() == sorted(path[: k + 1])


def test_sample_token_follows_the_distribution():
    n, logits = 20_000, torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    draws = (torch.arange(n) + 0.5) / n
    for temperature in (0.3, 1.0, 1.5):
        tokens = packed.sample_token(logits.expand(n, 40), draws, temperature)
        share, expected = torch.bincount(tokens, minlength=40) / n, logits[0] / temperature
        torch.testing.assert_close(share, expected.softmax(-1), rtol=0, atol=2 / n)
    # At the edges of the draws, and where a logit is NaN.
    logits = torch.full((5, 40), -1e9)
    logits[:, 30], logits[3, 3], logits[4] = 0, torch.nan, torch.nan
    for temperature in (0, 1.0):
        tokens = packed.sample_token(logits, torch.tensor([1, 1e-9, 0.5, 0.5, 0.5]), temperature)
        assert tokens.tolist() == [30] * 3 + [packed.INVALID_TOKEN] * 2


def branches_attend_to_each_other(row) -> np.ndarray:
    return np.tri(len(row.tokens), row.prefix + len(row.tokens), row.prefix, dtype=bool)


def positions_run_on(row, *args) -> None:
    add(row, *args)
    row.position_ids = row.prefix + np.arange(len(row.tokens))


def norm_is_right_for_matrices(norm, x) -> torch.Tensor:
    return x if x.dim() > 2 else torch.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


# Model, and which part of the engine is replaced by what. The last models cannot be packed.
FAULTS = {
    "mask": ("llama", packed.Row, "mask", branches_attend_to_each_other),
    "positions": ("llama", packed.Row, "add", positions_run_on),
    "slots": ("llama", packed.SlotCache, "admit", lambda *args: admit(*args[:-1], args[-1][1:])),
    "window": ("mistral-window", packed, "layer_kinds", lambda config: ["full_attention"]),
    "scale": ("granite", packed.Head, "logits", lambda head, hidden: head.module(hidden).float()),
    "norm": ("llama", torch.nn.RMSNorm, "forward", norm_is_right_for_matrices),
    "convolution": ("lfm2",),
    "recurrence": ("mamba",),
    "bias by distance": ("bloom",),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_inexact_engine_is_refused_at_load(folders, fault, dtype, monkeypatch, capsys):
    kind, *replaced = FAULTS[fault]
    if replaced:
        monkeypatch.setattr(*replaced)
    policy = load(folders(kind), "packed", dtype=dtype)
    assert type(policy.engine) is rl.PlainEngine
    assert capsys.readouterr().out.count("slower: packing is not exact for this model (") == 1
    monkeypatch.undo()
    assert sample(policy, ["Hi"]) == sample(load(folders(kind), "plain", dtype=dtype), ["Hi"])


def test_the_self_check_tells_a_wrong_mask_from_rounding(tmp_path, monkeypatch):
    """On a model whose attention scores are so large that 16 bits leave little of them."""
    folder = make_model(tmp_path, "granite", attention_multiplier=30.0, num_hidden_layers=6)
    policy = load(folder, "packed", dtype="bf16")
    assert isinstance(policy.engine, packed.PackedEngine)
    logits = functools.partial(self_check.plain_logits, policy.model, [*range(200)])
    eager, sdpa = logits("eager"), logits("sdpa")
    assert (eager - sdpa).abs().mean() > 0.3 * eager.abs().mean()
    monkeypatch.setattr(packed.Row, "mask", branches_attend_to_each_other)
    assert type(load(folder, "packed", dtype="bf16").engine) is rl.PlainEngine


def fail(engine, calls, monkeypatch) -> list[tuple]:
    """These forward passes run out of memory. Returns the limits at each, a list that grows."""
    tried, forward = [], engine._forward

    def failing(*args):
        tried.append((engine.recompute_all, engine.token_budget, engine.slots))
        if len(tried) in calls:
            raise torch.OutOfMemoryError("raised by the test")
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", failing)
    return tried


def test_out_of_memory_changes_no_value_and_ends_in_one_clear_line(folders, monkeypatch):
    policy = load(folders("llama"), "packed", token_budget=80, slots=8)
    samples, expected = sample(policy), logprobs(policy, make_pairs())
    monkeypatch.setattr(packed, "MIN_TOKEN_BUDGET", 20)
    # Two attempts fail at their second row, a part of the gradient computed.
    tried = fail(policy.engine, [2, 4], monkeypatch)
    found = policy.retry_on_oom(lambda: logprobs(policy, make_pairs()))
    assert list(dict.fromkeys(tried)) == [(False, 80, 8), (True, 80, 8), (True, 40, 4)]
    assert_equal_logprobs(found, expected)
    fail(policy.engine, [1, 3], monkeypatch)
    assert sample(policy) == samples and policy.engine.slots == 1
    fail(policy.engine, range(100), monkeypatch)
    with pytest.raises(InputError, match="out of GPU memory .*; use a smaller --model, lower --"):
        sample(policy)


def test_layers_are_recomputed_as_far_as_activations_do_not_fit(both, monkeypatch):
    policy, pairs = both("llama")[0], [([5] * 30, list(range(170)))]
    expected, recomputed = logprobs(policy, pairs), Mock(wraps=packed.recomputed)
    monkeypatch.setattr(packed, "recomputed", recomputed)
    for mib, calls in ((64, 0), (1.5, 1), (0.1, 1 + 2)):
        monkeypatch.setattr(policy.engine, "memory_limit", lambda mib=mib: mib * 2**20)
        assert_equal_logprobs(logprobs(policy, pairs), expected)
        assert recomputed.call_count == calls


def rerun(work, pool) -> Mock:
    return Mock(replay=Mock(side_effect=work))


@pytest.mark.parametrize("min_prefix", [1, 128])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_samples_do_not_depend_on_slots_rows_and_graphs(both, kind, min_prefix, monkeypatch):
    monkeypatch.setattr(packed, "MIN_SHARED_PREFIX", min_prefix)
    monkeypatch.setattr(packed, "GRAPH_COLUMNS", 16)
    monkeypatch.setattr(packed, "capture", lambda *a: graphs.append(rerun(*a)) or graphs[-1])
    fast, plain = both(kind)
    expected, graphs = sample(plain, n=4, limit=20), []
    assert len({str(tokens) for group in expected for tokens in group}) > 12
    for slots, interval, budget in ((3, 1, 40), (5, 7, 8), (9, 3, 512), (64, 7, 40)):
        monkeypatch.setattr(fast.engine, "slots", slots)
        monkeypatch.setattr(fast.engine, "token_budget", budget)
        monkeypatch.setitem(packed.EOS_CHECK_INTERVAL, "cpu", interval)
        monkeypatch.setattr(fast.engine, "cuda_graph", False)
        assert sample(fast, n=4, limit=20) == expected and not graphs
        monkeypatch.setattr(fast.engine, "cuda_graph", True)
        assert sample(fast, n=4, limit=20) == expected
        assert sum(graph.replay.call_count for graph in graphs) > 2 * len(graphs) > 2
        graphs.clear()
    monkeypatch.setattr(fast.engine, "memory_limit", lambda: 1.0)
    assert sample(fast, n=4, limit=20) == expected


@pytest.mark.parametrize("capture", [rerun, Mock(side_effect=RuntimeError), Mock()])
def test_graphs_are_used_if_they_work(both, capture, monkeypatch, capsys):
    engine, work = both("llama")[0].engine, capture is rerun
    monkeypatch.setattr(packed, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(engine, "eos", set())
    monkeypatch.setattr(engine, "cuda_graph", False)
    assert self_check.graphs_work(engine, [[*range(9)], [*range(20)]]) == work
    assert ("no CUDA graphs, slower: " in capsys.readouterr().out) != work
