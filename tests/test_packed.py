"""The packed engine equals the plain one, which is short enough to check by reading."""

import sys
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import KINDS, make_model, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rl
from extras import packed, self_check
from extras.data import InputError

PACKED = [*KINDS, "moe-after-mlp"]
# On a CPU 4-bit weights are unpacked into ordinary ones: a few kinds stand for all.
EXACT = [(kind, 16) for kind in PACKED] + [(kind, 4) for kind in ("llama", "qwen2", "phi3")]
TEXTS = ("Name a fruit.", "Name a tree please.", "Name a", "Sing!" * 12)
# Frequent EOS ids: samples end, and are replaced, at different times.
ENDS = set(range(0, 256, 16))
real_gpu = torch.cuda.is_available() and "pretend_cuda" not in sys.modules


def load(folder: str, engine: str, bits: int = 16, dtype: str = "fp32", **limits) -> rl.Policy:
    """On the CPU, with an adapter `follower` that changes the output."""
    policy = rl.load(folder, bits, "cpu", engine=engine, dtype=dtype, **limits)
    policy.add("follower")
    randomise(policy, "follower")
    return policy


@pytest.fixture(scope="session")
def both(folders):
    """(kind, bits) -> a model's packed and its plain policy. Change them by monkeypatch only."""
    made = {}

    def get(kind: str, bits: int = 16) -> tuple[rl.Policy, rl.Policy]:
        if (kind, bits) not in made:
            made[kind, bits] = [load(folders(kind), engine, bits) for engine in ("packed", "plain")]
        return made[kind, bits]

    return get


@pytest.fixture
def often_ended(both, monkeypatch):
    """As `both`, with the EOS ids ENDS."""

    def get(kind: str) -> tuple[rl.Policy, rl.Policy]:
        for policy in both(kind):
            monkeypatch.setattr(policy.chat, "eos", ENDS)
            monkeypatch.setattr(policy.engine, "eos", ENDS)
        return both(kind)

    return get


def ask(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


def sample(policy, texts=TEXTS, n=3, limit=9, temperature=1.0) -> list[list[list[int]]]:
    torch.manual_seed(0)
    with policy.using("follower"):
        groups = policy.sample(ask(*texts), n, limit, temperature)
    return [[s.tokens for s in group] for group in groups]


def make_pairs(n: int = 9) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) pairs. Prompts share a start. One pair comes twice, one is empty."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(0, 250, (length,), generator=generator).tolist()

    start = draw(30)
    prompts = [start + draw(5), start + draw(9), draw(4)]
    pairs = [(prompts[i % 3], draw(3 + i) + [258] * (i % 2)) for i in range(n)]
    return [*pairs, pairs[0], (prompts[0], [])]


def logprobs(policy, pairs, temperature: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """All log-probabilities, and the gradient of a sum of them with uneven weights."""
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


def assert_equal_logprobs(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert ((found[1] - expected[1]).norm() / expected[1].norm()).item() < 1e-4


# ------------------------------------------------------------ packed = plain


@pytest.mark.parametrize("min_prefix", [1, 128], ids=["shared-prefix", "own-prefix"])
@pytest.mark.parametrize("kind, bits", EXACT)
def test_samples_are_equal(both, kind, bits, min_prefix, monkeypatch):
    monkeypatch.setattr(packed, "MIN_SHARED_PREFIX", min_prefix)
    fast, plain = both(kind, bits)
    assert isinstance(fast.engine, packed.PackedEngine) and type(plain.engine) is rl.PlainEngine
    for temperature, texts in ((0.0, TEXTS[:2]), (0.9, TEXTS[1:])):
        found, expected = (sample(p, texts, 3, 9, temperature) for p in (fast, plain))
        assert found == expected and all(1 <= len(t) <= 9 for group in found for t in group)


@pytest.mark.parametrize("kind, bits", EXACT)
def test_logprobs_gradients_and_next_token_probabilities_are_equal(both, kind, bits, monkeypatch):
    fast, plain = both(kind, bits)
    pairs = make_pairs()
    prompts = [plain.chat.encode(m) for m in ask(*TEXTS)] + [[9]]
    expected = logprobs(plain, pairs)
    with plain.using("follower"):
        next_expected = plain.engine.next_probabilities(prompts, [65, 70, 258])
    # One row and many. The head in chunks and at once. Layers kept and recomputed.
    for budget, chunk, recompute in ((4096, 3, False), (60, 4096, True)):
        monkeypatch.setattr(fast.engine, "token_budget", budget)
        monkeypatch.setattr(fast.engine.head, "chunk", chunk)
        monkeypatch.setattr(fast.engine, "recompute_all", recompute)
        assert_equal_logprobs(logprobs(fast, pairs), expected)
        with fast.using("follower"):
            found = fast.engine.next_probabilities(prompts, [65, 70, 258])
        torch.testing.assert_close(found, next_expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("min_prefix", [1, 128])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_samples_do_not_depend_on_slots_rows_and_eos_checks(
    often_ended, kind, min_prefix, monkeypatch
):
    monkeypatch.setattr(packed, "MIN_SHARED_PREFIX", min_prefix)
    fast, plain = often_ended(kind)
    expected = sample(plain, n=4)
    for slots, interval, budget in ((1, 1, 512), (3, 1, 40), (5, 1, 8), (3, 7, 512), (64, 7, 40)):
        monkeypatch.setattr(fast.engine, "slots", slots)
        monkeypatch.setattr(fast.engine, "token_budget", budget)
        monkeypatch.setitem(packed.EOS_CHECK_INTERVAL, "cpu", interval)
        assert sample(fast, n=4) == expected
    completions = [tokens for group in expected for tokens in group]
    assert len({tuple(tokens) for tokens in completions}) > 10
    for tokens in completions:
        assert not ENDS & set(tokens[:-1]) and (tokens[-1] in ENDS or len(tokens) == 9)


def test_a_sample_may_move_to_another_slot_at_any_time(often_ended, monkeypatch):
    fast, plain = often_ended("llama")
    expected = sample(plain, limit=5)
    for slots in range(4, 12):
        monkeypatch.setattr(fast.engine, "slots", slots)
        assert sample(fast, limit=5) == expected, slots


def test_one_slot_is_enough_where_keys_and_values_hardly_fit(both, monkeypatch):
    fast, plain = both("llama")
    monkeypatch.setattr(fast.engine, "memory_limit", lambda: 1.0)
    assert sample(fast) == sample(plain)


def test_nothing_one_token_and_equal_prompts(both):
    fast, plain = both("llama")
    assert fast.sample([], 2, 5) == fast.yes_probability([]) == list(fast.engine.logprobs([])) == []
    assert sample(fast, ["Hi"], limit=1) == sample(plain, ["Hi"], limit=1)
    assert sample(fast, ["Hi"] * 3) == sample(plain, ["Hi"] * 3)


@pytest.mark.parametrize("window, shared", [(40, 0), (4000, 178)])
def test_a_long_prefix_is_held_once_unless_a_window_ends_within(
    tmp_path, window, shared, monkeypatch
):
    folder = make_model(tmp_path / "m", "mistral-window", sliding_window=window)
    fast, plain = load(folder, "packed"), load(folder, "plain")
    texts = ["Once upon a time. " * 10 + end for end in ("Go", "Stop it", "Go on")]
    expected = sample(plain, texts, 2, 12)
    lengths = []
    run = packed.Sampler.run
    monkeypatch.setattr(packed.Sampler, "run", lambda s: lengths.append(s.shared) or run(s))
    assert sample(fast, texts, 2, 12) == expected
    assert bool(lengths[0]) == bool(shared) and lengths[0] >= shared


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2", "gpt-oss"])
def test_the_packed_model_called_by_others_computes_as_before(both, kind):
    """generate(), evaluation tools, and their padded batches."""
    fast, plain = (policy.model for policy in both(kind))
    ids, visible = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)
    visible[0, :6] = 0
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=visible).logits for m in (fast, plain))
        if kind not in ("gemma2", "gpt-oss"):
            torch.testing.assert_close(found[0, 6:], expected[0, 6:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
        found, expected = (m.generate(ids[1:], **settings).tolist() for m in (fast, plain))
    assert found == expected


# ------------------------------------------------------------ pack and sample_token


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
    assert len(rows) <= 1 or budget < 4096
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


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_sample_token_follows_the_distribution(temperature):
    n, generator = 20_000, torch.Generator().manual_seed(0)
    logits = torch.randn(1, 40, generator=generator) * 2
    draws = (torch.arange(n) + 0.5) / n
    tokens = packed.sample_token(logits.expand(n, 40), draws, temperature)
    share = torch.bincount(tokens, minlength=40) / n
    torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=2 / n)


def test_sample_token_at_the_edges():
    logits = torch.full((3, 40), -1e9)
    logits[:, 30] = 0
    draws = torch.tensor([1.0, 1e-9, 0.5])
    for temperature in (0, 1.0):
        assert packed.sample_token(logits, draws, temperature).tolist() == [30] * 3
    logits[0, 3], logits[1] = torch.nan, torch.nan
    for temperature in (0, 1.0):
        found = packed.sample_token(logits, draws, temperature).tolist()
        assert found == [packed.INVALID_TOKEN] * 2 + [30]


# ------------------------------------------------------------ self-check


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "bloom"])
def test_a_model_that_cannot_be_packed_takes_the_plain_engine(folders, kind, capsys):
    policy = load(folders(kind), "packed")
    assert type(policy.engine) is rl.PlainEngine
    line = "plain engine, slower: packing is not exact for this model ("
    assert capsys.readouterr().out.count(line) == 1
    plain = load(folders(kind), "plain")
    assert sample(policy, TEXTS[:2]) == sample(plain, TEXTS[:2])
    assert_equal_logprobs(logprobs(policy, make_pairs(3)), logprobs(plain, make_pairs(3)))


def branches_attend_to_each_other(row) -> np.ndarray:
    return np.tri(len(row.tokens), row.prefix + len(row.tokens), row.prefix, dtype=bool)


def positions_run_on(row, *args, add=packed.Row.add) -> None:
    add(row, *args)
    row.position_ids = row.prefix + np.arange(len(row.tokens))


def prefix_of_other_keys(cache, key, value, layer, *args, update=packed.RowCache.update, **kwargs):
    if cache.prefix is not None and not cache.kv:
        cache.prefix.kv = [(k.roll(1, 2), v) for k, v in cache.prefix.kv]
    return update(cache, key, value, layer)


def first_token_is_lost(cache, slot, row, columns, admit=packed.SlotCache.admit) -> None:
    admit(cache, slot, row, columns[1:])


def all_tokens_in_one_column(cache, key, value, layer, *_, update=packed.SlotCache.update, **kwargs):
    cache.lengths, lengths = torch.zeros_like(cache.lengths), cache.lengths
    try:
        return update(cache, key, value, layer)
    finally:
        cache.lengths = lengths


def no_window(engine, *args, masks=packed.PackedEngine._masks):
    engine.windows = dict.fromkeys(engine.windows)
    return masks(engine, *args)


def scale_is_forgotten(head, hidden) -> torch.Tensor:
    return head.module(hidden).float()


def norms_are_dropped(decoder) -> None:
    for layer in decoder.layers:
        layer.input_layernorm = torch.nn.Identity()


FAULTS = {
    "mask": ("llama", packed.Row, "mask", branches_attend_to_each_other),
    "positions": ("llama", packed.Row, "add", positions_run_on),
    "prefix": ("llama", packed.RowCache, "update", prefix_of_other_keys),
    "admit": ("llama", packed.SlotCache, "admit", first_token_is_lost),
    "decode": ("llama", packed.SlotCache, "update", all_tokens_in_one_column),
    "window": ("mistral-window", packed.PackedEngine, "_masks", no_window),
    "head": ("granite", packed.Head, "logits", scale_is_forgotten),
    "norms": ("llama", self_check, "fuse_norms", norms_are_dropped),
    "error": ("llama", packed.PackedEngine, "_masks", lambda *_: torch.ones(2) @ torch.ones(3)),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_check_refuses(folders, fault, dtype, monkeypatch, capsys):
    kind, *place = FAULTS[fault]
    monkeypatch.setattr(*place)
    policy = load(folders(kind), "packed", dtype=dtype)
    assert type(policy.engine) is rl.PlainEngine
    assert capsys.readouterr().out.count("packing is not exact for this model (") == 1
    monkeypatch.undo()
    if fault != "norms":
        assert sample(policy, ["Hi"]) == sample(load(folders(kind), "plain", dtype=dtype), ["Hi"])


def test_eager_attention_stays_where_ours_is_wrong(folders, monkeypatch):
    def prefix_is_ignored(*args, shared_prefix=None, **kwargs):
        return packed.packed_attention(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "packed", prefix_is_ignored)
    policy = load(folders("llama"), "packed")
    assert isinstance(policy.engine, packed.PackedEngine)
    assert policy.model.config._attn_implementation == "eager"


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A model of which bf16 leaves little: its attention scores are in the hundreds."""
    folder = make_model(tmp_path_factory.mktemp("sharp"), head_dim=24, num_hidden_layers=6)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 20
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_self_check_tells_a_wrong_mask_from_rounding(sharp, dtype, monkeypatch):
    policy = load(sharp, "packed", dtype=dtype)
    assert isinstance(policy.engine, packed.PackedEngine)
    ids = policy.chat.encode(ask("Name a fruit." * 9)[0])
    eager, sdpa = (self_check.plain_logits(policy.model, ids, name) for name in ("eager", "sdpa"))
    assert (eager - sdpa).abs().mean() > 0.3 * eager.abs().mean()
    monkeypatch.setattr(packed.Row, "mask", branches_attend_to_each_other)
    assert type(load(sharp, "packed", dtype=dtype).engine) is rl.PlainEngine


# ------------------------------------------------------------ out of memory


def fail_forward(engine, calls, monkeypatch) -> list[tuple]:
    """These forward passes run out of memory. Returns the limits at each, a list that grows."""
    tried, forward = [], engine._forward

    def failing(*args):
        tried.append((engine.recompute_all, engine.token_budget, engine.slots))
        if len(tried) in calls:
            raise torch.OutOfMemoryError("raised by the test")
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", failing)
    return tried


def rewarded(policy) -> list[list[rl.Sample]]:
    torch.manual_seed(2)
    groups = policy.sample(ask("Name a fruit.", "Sing!"), 4, 12)
    for i, one in enumerate(s for group in groups for s in group):
        one.reward = float(i % 3)
    return groups


def gradient_of_a_step(policy, groups) -> torch.Tensor:
    parameters = list(policy.tensors("follower").values())
    seen = []
    optimizer = types.SimpleNamespace(
        step=lambda: seen.append(torch.cat([p.grad.flatten() for p in parameters])),
        zero_grad=lambda **_: None,
    )
    cfg = types.SimpleNamespace(num_minibatches=1, kl_coef=0.05, advantage="grpo")
    rl.grpo_step(policy, "follower", None, groups, optimizer, cfg, 1.0)
    return seen[0]


def test_a_step_is_the_same_with_less_memory(folders, monkeypatch):
    policy = load(folders("llama"), "packed", token_budget=80, slots=8)
    groups = rewarded(policy)
    expected = gradient_of_a_step(policy, groups)
    monkeypatch.setattr(packed, "MIN_TOKEN_BUDGET", 20)
    # Each of two attempts fails at its second row, a part of its gradient computed.
    tried = fail_forward(policy.engine, [2, 4], monkeypatch)
    found = gradient_of_a_step(policy, groups)
    assert list(dict.fromkeys(tried)) == [(False, 80, 8), (True, 80, 8), (True, 40, 4)]
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


def test_samples_and_verdicts_are_the_same_with_less_memory(folders, monkeypatch):
    policy = load(folders("llama"), "packed", token_budget=256, slots=8)
    policy.chat.yes_tokens, policy.chat.no_tokens = [65, 66], [70]
    expected, verdicts = sample(policy), policy.yes_probability(ask(*TEXTS))
    fail_forward(policy.engine, [1, 2, 4], monkeypatch)
    assert sample(policy) == expected
    assert policy.yes_probability(ask(*TEXTS)) == pytest.approx(verdicts, nan_ok=True, abs=1e-5)
    assert policy.engine.recompute_all and policy.engine.slots < 8


def test_the_last_out_of_memory_is_one_clear_line(folders, monkeypatch):
    policy = load(folders("llama"), "packed", slots=4)
    groups, tried = rewarded(policy), fail_forward(policy.engine, range(1, 100), monkeypatch)
    with pytest.raises(InputError, match="out of GPU memory .*--max-new-tokens") as caught:
        gradient_of_a_step(policy, groups)
    assert "\n" not in str(caught.value)
    # Every attempt had less than the one before.
    assert len(tried) == len(set(tried)) and tried[-1] == (True, packed.MIN_TOKEN_BUDGET, 1)


def test_layers_are_recomputed_as_far_as_activations_do_not_fit(folders, monkeypatch):
    policy = load(folders("llama"), "packed")
    pairs = [([5] * 30, list(range(170)))]
    expected = logprobs(policy, pairs)
    calls, checkpoint = [], packed.checkpoint
    monkeypatch.setattr(
        packed, "checkpoint", lambda *args, **kw: calls.append(1) or checkpoint(*args, **kw)
    )
    for mib, layers in ((64, 0), (1.5, 1), (0.1, 2)):
        monkeypatch.setattr(policy.engine, "memory_limit", lambda mib=mib: mib * 2**20)
        calls.clear()
        assert_equal_logprobs(logprobs(policy, pairs), expected)
        assert len(calls) == layers
    calls.clear()
    with torch.no_grad():
        list(policy.engine.logprobs(pairs))
    assert not calls


# ------------------------------------------------------------ CUDA graphs


class Recorder(TorchDispatchMode):
    """A CUDA graph's stand-in: the kernels of work(), on the memory that they used at first."""

    def __init__(self, work, pool):
        super().__init__()
        self.work, self.kernels, self.replays = work, None, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A capture fails where a value is read.
        assert func is not torch.ops.aten._local_scalar_dense.default
        out = func(*args, **(kwargs or {}))
        # A view of memory that stays is no kernel.
        if all(r.alias_info.is_write for r in func._schema.returns if r.alias_info):
            self.kernels.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        if self.kernels is None:
            # A capture computes nothing, so the first replay is the first computation.
            self.kernels = []
            with self:
                return self.work()
        for func, args, kwargs, out in self.kernels:
            again = func(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, again))):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


@pytest.mark.parametrize("min_prefix", [1, 128])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_captured_steps_pick_the_same_tokens(often_ended, kind, min_prefix, monkeypatch):
    monkeypatch.setattr(packed, "MIN_SHARED_PREFIX", min_prefix)
    monkeypatch.setattr(packed, "GRAPH_COLUMNS", 16)
    fast, plain = often_ended(kind)
    expected = sample(plain, n=4, limit=20)
    graphs = []
    monkeypatch.setattr(packed, "capture", lambda *a: graphs.append(Recorder(*a)) or graphs[-1])
    monkeypatch.setattr(fast.engine, "cuda_graph", True)
    for slots, interval in ((64, 7), (9, 3), (3, 1)):
        monkeypatch.setattr(fast.engine, "slots", slots)
        monkeypatch.setitem(packed.EOS_CHECK_INTERVAL, "cpu", interval)
        graphs.clear()
        assert sample(fast, n=4, limit=20) == expected
        assert sum(graph.replays for graph in graphs) > 2 * len(graphs) > 2


def cannot_capture(work, pool):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    "capture, reason",
    [
        (lambda *_: types.SimpleNamespace(replay=lambda: None), r"\d\d+% of its tokens differ"),
        (cannot_capture, "RuntimeError: operation not permitted"),
        (Recorder, ""),
    ],
    ids=["empty", "refused", "right"],
)
def test_graphs_are_used_if_they_pick_the_same_tokens(both, capture, reason, monkeypatch, capsys):
    fast, _ = both("llama")
    monkeypatch.setattr(packed, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(fast.engine, "cuda_graph", False)
    prompts = [fast.chat.encode(message) for message in ask(*TEXTS[:2])]
    assert self_check.graphs_work(fast.engine, prompts) == (not reason)
    assert ("no CUDA graphs, slower: " in capsys.readouterr().out) == bool(reason)


@pytest.mark.skipif(not real_gpu, reason="needs a GPU")
@pytest.mark.parametrize("kind, bits", [("llama", 4), ("qwen2", 16), ("gemma3", 16)])
def test_captured_steps_on_a_gpu_pick_the_same_tokens(folders, kind, bits, monkeypatch):
    policy = rl.load(folders(kind), bits, "cuda", dtype="fp32")
    policy.add("follower")
    randomise(policy, "follower")
    assert policy.engine.cuda_graph
    captured, capture = [], packed.capture
    monkeypatch.setattr(packed, "capture", lambda *a: captured.append(1) or capture(*a))
    found = sample(policy, n=6, limit=40)
    assert captured
    policy.engine.cuda_graph = False
    assert sample(policy, n=6, limit=40) == found
