"""Half precision, on the CPU where there is no GPU. CUDA graphs where there is one."""

import functools
import types

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import randomise

import rl
from extras import self_check

# A build without CUDA may be told that it has a GPU.
HAS_GPU = bool(torch.version.cuda) and torch.cuda.is_available()
# type -> a card's compute capability, how far rounding may move log p, 1 - cosine, gradient norm.
CARDS = {"bf16": ((8, 9), 0.2, 0.01, 0.15), "fp16": ((7, 5), 0.04, 5e-4, 0.02)}


def random_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=CARDS)
def card(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: CARDS[request.param][0])
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


def step(policy: rl.Policy, num_minibatches: int, ref_role) -> tuple[torch.Tensor, list]:
    """The log-probabilities that a GRPO step scores first, and the gradient of each minibatch."""
    start, *ends = random_ids(30, *[12] * 8)
    prompts = [[*start, 1]] * 4 + [[*start, 2, 3]] * 4
    rewarded = zip(prompts, ends, (0, 1, 0, 1, 1, 0, 0, 0.5))
    samples = [rl.Sample(prompt, end, "", True, reward=r) for prompt, end, r in rewarded]
    parameters, gradients = list(policy.tensors("follower").values()), []
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten().cpu() for p in parameters]))
    )
    cfg = types.SimpleNamespace(advantage="grpo", kl_coef=0.05, num_minibatches=num_minibatches)
    groups = [samples[:4], samples[4:]]
    metrics = rl.grpo_step(policy, "follower", ref_role, groups, optimizer, cfg, 0.7)
    assert metrics["updates"] == len(gradients) == num_minibatches
    scored = [values for s in samples for values in (s.ref_logprobs, s.old_logprobs)]
    return torch.cat([values.cpu() for values in scored if values is not None]), gradients


@pytest.mark.parametrize("kind, bits", [("qwen2", 4), ("gemma3", 16)])
def test_half_precision_has_the_values_gradients_and_samples_of_fp32(
    both, card, kind, bits, monkeypatch
):
    policy, exact = both(kind, bits)
    assert rl.fast_dtype(cuda=True) == card and policy.model.dtype == rl.DTYPES[card]
    assert {p.dtype for p in policy.tensors("follower").values()} == {torch.float32}
    monkeypatch.setattr(rl, "MAX_GRAD_NORM", 1e9)
    _, value, direction, length = CARDS[card]
    for num_minibatches, ref_role, budget in ((2, "ref", 40), (1, None, 4096)):
        monkeypatch.setattr(policy.engine, "token_budget", budget)
        monkeypatch.setattr(policy.engine, "recompute_all", budget == 40)
        found, ours = step(policy, num_minibatches, ref_role)
        expected, theirs = step(exact, num_minibatches, ref_role)
        torch.testing.assert_close(found, expected, rtol=0, atol=value)
        for a, b in zip(ours, theirs, strict=True):
            assert 1 - torch.cosine_similarity(a, b, 0) < direction
            assert abs(a.norm() / b.norm() - 1) < length
    arguments = random_ids(9, 30), [*range(120)]
    with policy.using("follower"), exact.using("follower"):
        found, expected = (side.engine.next_probabilities(*arguments) for side in (policy, exact))
    torch.testing.assert_close(found.sum(1), expected.sum(1), rtol=0, atol=value)
    # Greedy samples of prompts that share their start are the most likely tokens, up to rounding.
    start, *ends = random_ids(140, 6, 11)
    prompts = [start + end for end in ends]
    monkeypatch.setattr(policy.engine, "eos", set())
    with policy.using("follower"), policy.inference(), exact.using("follower"), torch.no_grad():
        sampled = policy.engine.sample(prompts, torch.ones(2, 1, 16), 0.0)
        for prompt, (tokens,) in zip(prompts, sampled):
            logp = exact.model(torch.tensor([prompt + tokens])).logits[0, -17:-1].log_softmax(-1)
            assert (logp.amax(-1) - logp[range(16), tokens]).max() < 2 * value


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind, bits", [("llama", 4), ("qwen2", 16), ("gemma3", 16)])
def test_captured_steps_pick_the_same_tokens(folders, kind, bits, monkeypatch):
    policy = rl.load(folders(kind), bits, dtype="fp32")
    policy.add("follower")
    randomise(policy, "follower")
    assert policy.engine.cuda_graph == self_check.GRAPHS_ARE_SAFE
    monkeypatch.setattr(policy.engine, "eos", set())
    arguments = random_ids(3, 30, 7, 30, 150), 1 - torch.rand(5, 6, 40), 1.0
    with policy.using("follower"), policy.inference():
        captured = policy.engine.sample(*arguments)
        monkeypatch.setattr(policy.engine, "cuda_graph", False)
        assert policy.engine.sample(*arguments) == captured
