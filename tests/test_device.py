"""Half precision, and what a GPU alone shows: waits, kernel launches, CUDA graphs.

Without a GPU half precision is tested on the CPU. Waits and launches are counted where a stand-in
for a GPU is loaded, the pytest plugin `pretend_cuda`.
"""

import functools
import sys
import types

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import make_model, randomise

import rl
from extras import packed, self_check

GPU = getattr(sys.modules.get("pretend_cuda"), "GPU", None)
counted = pytest.mark.skipif(not GPU, reason="counted by a stand-in for a GPU")
real_gpu = pytest.mark.skipif(bool(GPU) or not torch.cuda.is_available(), reason="needs a GPU")
# type -> compute capability of a card that has it, and how far rounding may move a log-probability,
# a cumulated probability, a gradient's direction (1 - cosine) and its length.
CARDS = {"bf16": ((8, 9), 0.2, 0.03, 0.01, 0.15), "fp16": ((7, 5), 0.04, 0.005, 5e-4, 0.02)}
MODELS = [("qwen2", 4), ("gemma3", 16)]


def random_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths]


def draws(*shape: int) -> torch.Tensor:
    return 1 - torch.rand(shape, generator=torch.Generator().manual_seed(1))


def rewarded_groups() -> list[list[rl.Sample]]:
    """Four completions of each of two prompts with a common start."""
    start, *ends = random_ids(30, *[12] * 8)
    prompts = [[*start, 1]] * 4 + [[*start, 2, 3]] * 4
    rewarded = zip(prompts, ends, (0, 1, 0, 1, 1, 0, 0, 0.5))
    samples = [rl.Sample(prompt, end, "", True, reward=r) for prompt, end, r in rewarded]
    return [samples[:4], samples[4:]]


@pytest.fixture(scope="module", params=CARDS)
def card(request):
    """A card that computes in bf16, and an older one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: CARDS[request.param][0])
        if GPU:
            patch.setattr(GPU, "capability", CARDS[request.param][0])
        yield request.param


@pytest.fixture(scope="module")
def both(card, folders):
    """(kind, bits) -> a policy in half precision, and a plain one in fp32 of the same weights."""

    @functools.cache
    def get(kind: str, bits: int) -> tuple[rl.Policy, rl.Policy]:
        policy = rl.load(folders(kind), bits, dtype=card)
        exact = rl.load(folders(kind), 16, "cpu", engine="plain", dtype="fp32")
        weights = dict(exact.model.named_parameters())
        for name, weight in policy.model.named_parameters():
            if hasattr(weight, "quant_state"):
                weight = dequantize_4bit(weight.data, weight.quant_state)
            weights[name].data.copy_(weight.detach().float().cpu())
        for side in (policy, exact):
            for role, seed in (("follower", 3), ("ref", 9)):
                side.add(role)
                randomise(side, role, seed)
        return policy, exact

    return get


@pytest.mark.parametrize("kind, bits", MODELS)
def test_half_precision_scores_as_fp32_does(both, card, kind, bits, monkeypatch):
    policy, exact = both(kind, bits)
    assert rl.fast_dtype(cuda=True) == card and policy.model.dtype == rl.DTYPES[card]
    assert {p.dtype for p in policy.tensors("follower").values()} == {torch.float32}
    for role, budget in ((None, 4096), ("follower", 60)):
        monkeypatch.setattr(policy.engine, "token_budget", budget)
        found = []
        for side in (policy, exact):
            samples = sum(rewarded_groups(), [])
            rl.score(side, role, samples, "old_logprobs", 0.7)
            with side.using(role):
                p = side.engine.next_probabilities([s.prompt for s in samples], [*range(120)])
            found.append(torch.cat([s.old_logprobs.cpu() for s in samples] + [p.sum(1)]))
        torch.testing.assert_close(*found, rtol=0, atol=CARDS[card][1])


def gradients(policy: rl.Policy, **cfg) -> list[torch.Tensor]:
    parameters, found = list(policy.tensors("follower").values()), []
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.append([p.grad.cpu() for p in parameters]))
    cfg = types.SimpleNamespace(advantage="grpo", **cfg)
    metrics = rl.grpo_step(policy, "follower", "ref", rewarded_groups(), optimizer, cfg, 0.7)
    assert metrics["updates"] == len(found) == cfg.num_minibatches
    return [torch.cat([gradient.flatten() for gradient in step]) for step in found]


@pytest.mark.parametrize("kind, bits", MODELS)
def test_half_precision_has_the_gradient_of_fp32(both, card, kind, bits, monkeypatch):
    policy, exact = both(kind, bits)
    monkeypatch.setattr(rl, "MAX_GRAD_NORM", 1e9)
    monkeypatch.setattr(policy.engine, "token_budget", 40)
    for n, kl_coef, recompute in ((1, 0.0, False), (2, 0.05, True)):
        monkeypatch.setattr(policy.engine, "recompute_all", recompute)
        cfg = {"num_minibatches": n, "kl_coef": kl_coef}
        for ours, theirs in zip(gradients(policy, **cfg), gradients(exact, **cfg), strict=True):
            assert 1 - torch.cosine_similarity(ours, theirs, 0) < CARDS[card][3]
            assert abs(ours.norm() / theirs.norm() - 1) < CARDS[card][4]


@pytest.mark.parametrize("shared", [0, 140])
@pytest.mark.parametrize("kind, bits", MODELS)
def test_half_precision_samples_what_the_draws_pick(both, card, kind, bits, shared, monkeypatch):
    policy, exact = both(kind, bits)
    start, *ends = random_ids(shared, 6, 11, 3)
    monkeypatch.setattr(policy.engine, "eos", set())
    monkeypatch.setattr(policy.engine, "slots", 5)
    with policy.using("follower"), policy.inference():
        groups = policy.engine.sample([start + end for end in ends], draws(3, 4, 16), 0.8)
    for end, group, rows in zip(ends, groups, draws(3, 4, 16)):
        for tokens, u in zip(group, rows):
            with torch.no_grad(), exact.using("follower"):
                logits = exact.model(torch.tensor([start + end + tokens])).logits[0, -17:-1]
            p = (logits / 0.8).softmax(-1)
            upper, own = p.cumsum(-1)[range(16), tokens], p[range(16), tokens]
            # The draw lies in the token's interval, or near it.
            assert torch.maximum(u - upper, upper - own - u).max() < CARDS[card][2]


@counted
def test_a_decode_step_waits_for_nothing_and_launches_few_kernels(tmp_path):
    """At SmolLM2's depth, with an adapter, before the step is captured as a CUDA graph."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    make_model(tmp_path, "smollm2", num_hidden_layers=30, hidden_size=72, **heads)
    policy = rl.load(str(tmp_path))
    policy.add("follower")
    # Prompts that share nothing, and prompts whose common start is held once.
    for shared, launches in ((0, 1250), (140, 1610)):
        start, *ends = random_ids(shared, *[20] * 6)
        with policy.using("follower"), policy.inference():
            sampler = packed.Sampler(policy.engine, [start + e for e in ends], draws(6, 2, 30), 1.0)
            GPU.reset()
            for _ in range(sampler.interval):
                sampler.step()
            assert not GPU.syncs and not GPU.uploads
            assert 0 < sum(GPU.launches.values()) / sampler.interval <= launches
            sampler.evict()
            assert sum(GPU.syncs.values()) == 1 and not GPU.uploads


@real_gpu
@pytest.mark.parametrize("kind, bits", [("llama", 4), ("qwen2", 16), ("gemma3", 16)])
def test_captured_steps_pick_the_same_tokens(folders, kind, bits, monkeypatch):
    policy = rl.load(folders(kind), bits, dtype="fp32")
    policy.add("follower")
    randomise(policy, "follower")
    assert policy.engine.cuda_graph == self_check.GRAPHS_ARE_SAFE
    monkeypatch.setattr(policy.engine, "eos", set())
    arguments = random_ids(3, 30, 7, 30, 150), draws(5, 6, 40), 1.0
    with policy.using("follower"), policy.inference():
        captured = policy.engine.sample(*arguments)
        monkeypatch.setattr(policy.engine, "cuda_graph", False)
        assert policy.engine.sample(*arguments) == captured
