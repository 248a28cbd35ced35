"""Adapters, sampling, verdicts and GRPO against versions of themselves written out by hand."""

import json
import math
import os
import shutil
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import KINDS, SIZES, make_model, make_tokenizer, randomise
from safetensors.torch import load_file, save_file

import rl
from extras import load_model, packed
from extras.data import InputError

REWARDS = [0, 1, 0, 1, 1, 0, 0, 0.5]
IM_START, IM_END = 257, 258


def ask(text: str, prefill: str = "") -> list[dict]:
    messages = [{"role": "user", "content": text}]
    return messages + [{"role": "assistant", "content": prefill}] * bool(prefill)


def load_cpu(folder: str, engine: str = "packed", bits: int = 16, **options) -> rl.Policy:
    """fp32 on the CPU, with both trained roles."""
    policy = rl.load(folder, bits, "cpu", engine=engine, dtype="fp32", **options)
    for seed, role in enumerate(("instructor", "follower")):
        policy.add(role, seed=seed)
    return policy


@torch.no_grad()
def logits(policy, ids) -> torch.Tensor:
    """(T, V) by a forward pass of the model, on the CPU."""
    return policy.model(torch.tensor([list(ids)], device=policy.model.device)).logits[0].cpu()


def logprobs_by_hand(policy, samples, temperature=1.0) -> torch.Tensor:
    values = []
    for s in samples:
        out = policy.model(torch.tensor([s.prompt + s.tokens])).logits[0]
        logp = (out.float() / temperature).log_softmax(-1)[len(s.prompt) - 1 : -1]
        values.append(logp[torch.arange(len(s.tokens)), s.tokens])
    return torch.cat(values)


def rewarded_groups(policy, rewards=REWARDS) -> list[list[rl.Sample]]:
    """Two groups of four samples by the Follower."""
    torch.manual_seed(2)
    with policy.using("follower"):
        groups = policy.sample([ask("Name a fruit."), ask("Sing!")], 4, 12)
    for sample, reward in zip((s for group in groups for s in group), rewards):
        sample.reward = reward
    return groups


def group_of(prompt: list[int], *completions: tuple[list[int], float | None]) -> list[rl.Sample]:
    return [rl.Sample(prompt, tokens, "", True, reward=reward) for tokens, reward in completions]


def step(policy, groups, optimizer=None, ref_role=None, lr=1e-2, **changes) -> dict:
    """A GRPO step of the Follower. ref_role None: the base model is the KL reference."""
    settings = {"num_minibatches": 1, "kl_coef": 0.05, "advantage": "grpo", "temperature": 1.0}
    cfg = types.SimpleNamespace(**settings | changes)
    optimizer = optimizer or torch.optim.AdamW(policy.tensors("follower").values(), lr=lr)
    return rl.grpo_step(policy, "follower", ref_role, groups, optimizer, cfg, cfg.temperature)


def copies(policy, role: str) -> list[torch.Tensor]:
    return [p.detach().cpu().clone() for p in policy.tensors(role).values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


class Recorder(torch.optim.SGD):
    """Plain gradient steps that keep each gradient."""

    def __init__(self, policy, lr=0.0):
        self.gradients, self.parameters = [], list(policy.tensors("follower").values())
        super().__init__(self.parameters, lr=lr)

    def step(self):
        self.gradients.append([p.grad.clone() for p in self.parameters])
        super().step()


# ------------------------------------------------------------ LoRA and roles


@pytest.mark.parametrize("bits", [16, 4])
def test_without_an_adapter_it_is_the_base_model_bit_for_bit_and_roles_nest(folders, bits):
    policy = load_cpu(folders("llama"), "plain", bits)
    base, _ = load_model.load_model(folders("llama"), bits, torch.device("cpu"), torch.float32)
    # In eval mode bitsandbytes may repack weights for a kernel that rounds more.
    base.train()
    ids = [i % 50 for i in range(130)]
    with torch.no_grad():
        expected = base(torch.tensor([ids])).logits[0]
    assert torch.equal(logits(policy, ids), expected)
    with pytest.raises(ZeroDivisionError), policy.using("follower"):
        # B is zero.
        assert torch.equal(logits(policy, ids), expected)
        randomise(policy, "follower")
        with policy.using(None):
            assert torch.equal(logits(policy, ids), expected)
        assert not torch.equal(logits(policy, ids), expected)
        raise ZeroDivisionError
    assert torch.equal(logits(policy, ids), expected)
    with pytest.raises(KeyError, match="nobody"), policy.using("nobody"):
        pass


@pytest.mark.parametrize("bits", [16, 4])
def test_a_layer_adds_the_scaled_low_rank_update(folders, bits):
    policy = load_cpu(folders("qwen2"), "plain", bits, rank=4, alpha=12)
    randomise(policy, "follower")
    for name, layer in policy.lora.items():
        fan_in, fan_out = layer.base.in_features, layer.base.out_features
        prefix, x = f"base_model.model.{name}.lora_", torch.randn(2, 3, fan_in)
        A, B = (policy.tensors("follower")[f"{prefix}{part}.weight"] for part in "AB")
        assert A.shape == (4, fan_in) and B.shape == (fan_out, 4)
        with policy.using("follower"):
            expected = layer.base(x) + 12 / 4 * x @ A.T @ B.T
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_adapted_or_counted_and_printed(folders, kind, capsys):
    policy = rl.load(folders(kind), 16, "cpu", engine="plain", dtype="fp32")
    base = transformers.AutoModelForCausalLM.from_pretrained(folders(kind))
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    experts = {n for n, p in base.named_parameters() if p.dim() == 3}
    assert set(policy.lora) | set(policy.left_out) >= linear >= set(policy.lora)
    assert not set(policy.lora) & set(policy.left_out) and bool(experts) == bool(policy.left_out)
    adapted = sum(layer.base.weight.numel() for layer in policy.lora.values())
    left_out = sum(policy.left_out.values())
    line = f"no LoRA on {left_out / (left_out + adapted):.0%} of the layers' weights"
    assert (line in capsys.readouterr().out) == bool(experts)


def test_inference_casts_the_active_role_and_no_other(policy):
    for seed, role in enumerate(("instructor", "follower")):
        randomise(policy, role, seed)
    ids, layer = range(9), next(iter(policy.lora.values()))
    with policy.using("instructor"):
        expected = logits(policy, ids)
    with policy.using("follower"), policy.inference():
        assert layer.inference_copy["follower"][0].dtype == policy.model.dtype
        with policy.using("instructor"):
            torch.testing.assert_close(logits(policy, ids), expected, rtol=0, atol=0)
    assert not layer.inference_copy and torch.is_grad_enabled()


def test_a_fresh_adapter_depends_on_its_seed_alone(policy):
    for role, seed in (("again", 1), ("other", 2)):
        policy.add(role, seed=seed)
    assert all(equal(copies(policy, "follower"), copies(policy, "again")))
    assert not all(equal(copies(policy, "follower"), copies(policy, "other")))
    for name, parameter in policy.tensors("other").items():
        # Kaiming uniform with a = sqrt 5.
        bound = 0 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
        assert 0.9 * bound <= parameter.abs().max().item() <= bound and parameter.requires_grad


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_a_step_changes_its_own_role_and_nothing_else(folders, bits, num_minibatches):
    policy = rl.load(folders("llama"), bits)
    for role in ("instructor", "follower"):
        policy.add(role)
        randomise(policy, role)
    policy.copy("follower", "ref_follower")
    roles = ("instructor", "ref_follower", "follower")
    adapters = {id(p) for role in roles for p in policy.tensors(role).values()}
    base = [p for p in policy.model.parameters() if id(p) not in adapters]
    weights, before = [p.detach().clone() for p in base], {r: copies(policy, r) for r in roles}
    groups = rewarded_groups(policy)
    metrics = step(policy, groups, ref_role="ref_follower", num_minibatches=num_minibatches)
    assert metrics["updates"] == num_minibatches and metrics["skipped"] == 0 < metrics["grad_norm"]
    assert all(equal(weights, base))
    assert all(all(equal(before[role], copies(policy, role))) for role in roles[:2])
    assert not any(equal(before["follower"], copies(policy, "follower")))
    assert all(p.grad is None for p in policy.model.parameters())
    assert policy.active_adapter is None


# Experts need a histogram of integers, which only a real GPU has beside the CPU.
@pytest.mark.parametrize("kind", [*KINDS, "moe-after-mlp", "mamba", "lfm2", "bloom"])
def test_every_kind_samples_scores_and_trains(folders, kind):
    policy = load_cpu(folders(kind), bits=16 if kind == "mamba" else 4)
    with policy.using("follower"):
        (group,) = policy.sample([ask("Name a fruit.")], 4, 8)
        (p,) = policy.yes_probability([ask("Is it?")])
    assert all(1 <= len(s.tokens) <= 8 for s in group) and (math.isnan(p) or 0 <= p <= 1)
    for k, sample in enumerate(group):
        sample.reward = float(k)
    assert step(policy, [group])["updates"] == 1
    scores = []
    for role in ("follower", None):
        rl.score(policy, role, group, "old_logprobs", 1.0)
        scores.append(torch.cat([s.old_logprobs for s in group]))
    assert scores[0].isfinite().all() and not torch.equal(*scores)


# ------------------------------------------------------------ sampling and verdicts


@pytest.mark.parametrize("engine", ["plain", "packed"])
def test_samples_end_with_an_eos_or_at_the_limit(folders, engine):
    policy = rl.load(folders("llama"), 16, engine=engine, dtype="fp32")
    policy.chat.eos.update(range(0, 250, 10))
    messages, outcomes = [ask("Hi"), ask("Hello", "Well, ")], []
    for _ in range(2):
        torch.manual_seed(0)
        outcomes.append(policy.sample(messages, 12, 9))
    assert outcomes[0] == outcomes[1] and policy.sample([], 3, 9) == []
    for group, message, prefill in zip(outcomes[0], messages, ("", "Well, "), strict=True):
        assert {s.ended for s in group} == {True, False} and len(group) == 12
        for s in group:
            assert s.prompt == policy.chat.encode(message)
            assert s.text == prefill + policy.chat.decode(s.tokens)
            assert not policy.chat.eos & set(s.tokens[:-1])
            assert s.ended == (s.tokens[-1] in policy.chat.eos) and (s.ended or len(s.tokens) == 9)


def test_the_plain_engine_is_what_transformers_computes(folders):
    policy = load_cpu(folders("gemma3"), "plain")
    randomise(policy, "follower")
    with policy.using("follower"):
        (group,) = policy.sample([ask("Name a fruit.")], 2, 20, 0.0)
        ids = torch.tensor([group[0].prompt])
        out = policy.model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=IM_END)
        assert group[0].tokens == group[1].tokens == out[0, ids.shape[1] :].tolist()
        expected = logprobs_by_hand(policy, group, 0.7)
        rl.score(policy, "follower", group, "old_logprobs", 0.7)
        torch.testing.assert_close(torch.cat([s.old_logprobs for s in group]), expected)
        # Some models ignore logits_to_keep.
        forward = policy.model.forward
        policy.model.forward = lambda *args, logits_to_keep=0, **kwargs: forward(*args, **kwargs)
        rl.score(policy, "follower", group, "ref_logprobs", 0.7)
        torch.testing.assert_close(torch.cat([s.ref_logprobs for s in group]), expected)


@pytest.mark.parametrize("engine", ["plain", "packed"])
def test_yes_probability_by_hand(folders, engine, monkeypatch):
    policy = load_cpu(folders("llama"), engine)
    randomise(policy, "follower")
    policy.chat.yes_tokens, policy.chat.no_tokens = [65, 66], [70]
    messages = [ask(text) for text in ("Is it?", "Is it so?", "Why", "Is it?")]
    with policy.using("follower"):
        expected = []
        for message in messages:
            p = logits(policy, policy.chat.encode(message))[-1].softmax(-1)
            expected.append((p[65] + p[66]).item() / (p[65] + p[66] + p[70]).item())
        monkeypatch.setattr(rl, "MIN_VERDICT_MASS", 0.0)
        assert policy.yes_probability(messages) == pytest.approx(expected, rel=1e-4)
        assert policy.yes_probability([]) == []
        # A model about to say neither, and a tokenizer without such a token, give no verdict.
        monkeypatch.setattr(rl, "MIN_VERDICT_MASS", 1.0)
        assert all(map(math.isnan, policy.yes_probability(messages)))
        policy.chat.yes_tokens = policy.chat.no_tokens = []
        assert all(map(math.isnan, policy.yes_probability(messages)))


@pytest.mark.parametrize("engine", ["plain", "packed"])
def test_logits_that_are_nan_are_named(folders, engine):
    policy = load_cpu(folders("llama"), engine)
    policy.model.get_output_embeddings().weight.data.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="logits are NaN"):
            policy.sample([ask("Hi")], 2, 4, temperature)


def test_out_of_memory_without_a_remedy_is_one_clear_line(folders, monkeypatch):
    policy = load_cpu(folders("llama"), "plain")
    groups, optimizer = rewarded_groups(policy), Recorder(policy)
    line = r"^out of GPU memory \(by the test\); use a smaller --model, .*$"
    for place in ((optimizer, "step"), (policy.model, "forward")):
        monkeypatch.setattr(*place, Mock(side_effect=torch.OutOfMemoryError("by the test")))
        with pytest.raises(InputError, match=line):
            step(policy, groups, optimizer)
    with pytest.raises(InputError, match=line):
        policy.sample([ask("Hi")], 1, 2)


# ------------------------------------------------------------ GRPO


def test_advantages_by_hand():
    rewards, std = torch.tensor([1.0, 0, 0, 0]), math.sqrt(3) / 4
    for kind, expected in (
        ("grpo", [0.75 / (std + 1e-6)] + [-0.25 / (std + 1e-6)] * 3),
        ("rloo", [1.0] + [-1 / 3] * 3),
        ("dr_grpo", [0.75] + [-0.25] * 3),
    ):
        assert rl.ADVANTAGES[kind](rewards).tolist() == pytest.approx(expected)
        (group,) = rl.with_advantages([group_of([1], *(([2], r) for r in rewards.tolist()))], kind)
        assert [s.advantage for s in group] == pytest.approx(expected)


def test_missing_rewards_leave_their_group_and_zero_variance_groups_are_dropped(policy):
    rewards = [1.0, None, 0.0], [0.5, 0.5, None], [None, None], [3.0], []
    groups = [group_of([1], *(([2], r) for r in group)) for group in rewards]
    (kept,) = rl.with_advantages(groups)
    assert kept[0] is groups[0][0] and kept[1] is groups[0][2] and len(kept) == 2
    assert [s.advantage for s in groups[0]] == pytest.approx([1, 0, -1], abs=1e-5)
    # There are no more minibatches than groups that are left.
    metrics = step(policy, groups, num_minibatches=4)
    assert metrics["updates"] == 1 and metrics["frac_reward_zero_std"] == 0.8
    # Without any, no forward pass is computed.
    policy.engine, before = None, copies(policy, "follower")
    for none in (groups[1:], []):
        metrics = step(policy, none)
        assert metrics == {"updates": 0, "skipped": 0, "frac_reward_zero_std": 1}
    assert all(equal(before, copies(policy, "follower")))


def test_k3_and_token_loss_by_hand():
    logp, zero = torch.tensor([-1.0, -2.0, -60.0]), torch.zeros(3)
    kl = rl.token_loss(logp, logp, torch.tensor([-1.5, -2.0, 0.0]), zero, 1)[1]
    # The estimate is clamped: one token must not give e^60.
    expected = [math.exp(-0.5) - 0.5, 0.0, math.exp(10) - 11]
    assert kl.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # log ratio, advantage -> the surrogate, and whether it was clipped.
    for log_ratio, advantage, surrogate, is_clipped in (
        (0.5, 2.0, 1.3 * 2, True),
        (-0.5, 2.0, math.exp(-0.5) * 2, False),
        (-0.5, -2.0, -0.8 * 2, True),
        (0.5, -2.0, -math.exp(0.5) * 2, False),
        (0.1, 2.0, math.exp(0.1) * 2, False),
    ):
        old, ref = logp - log_ratio, logp + 0.3
        loss, kl, clipped = rl.token_loss(logp, old, ref, zero + advantage, 0.1)
        assert loss.tolist() == pytest.approx([0.1 * k - surrogate for k in kl.tolist()], abs=1e-4)
        assert clipped.tolist() == [is_clipped] * 3


@pytest.mark.parametrize("engine", ["plain", "packed"])
@pytest.mark.parametrize("num_minibatches, lr, temperature", [(1, 0.0, 0.7), (2, 3.0, 1.0)])
def test_a_step_is_the_gradient_of_the_loss_written_out(
    folders, engine, num_minibatches, lr, temperature, monkeypatch
):
    policy = load_cpu(folders("llama"), engine)
    randomise(policy, "follower")
    policy.copy("follower", "ref")
    randomise(policy, "ref", seed=9)
    monkeypatch.setattr(rl, "MAX_GRAD_NORM", 1e9)
    groups, recorder = rewarded_groups(policy), Recorder(policy, lr)
    start = copies(policy, "follower")
    settings = {"num_minibatches": num_minibatches, "temperature": temperature}
    metrics = step(policy, groups, recorder, "ref", **settings)
    for parameter, value in zip(recorder.parameters, start):
        parameter.data.copy_(value)
    everyone, old, advantages = [s for group in groups for s in group], {}, {}
    for group in groups:
        rewards = torch.tensor([float(s.reward) for s in group])
        for s, advantage in zip(group, (rewards - rewards.mean()) / rewards.std(correction=0)):
            with policy.using("follower"), torch.no_grad():
                old[id(s)] = logprobs_by_hand(policy, [s], temperature)
            advantages[id(s)] = advantage.repeat(len(s.tokens))
    clipped, losses = 0, 0.0
    minibatches = [everyone] if num_minibatches == 1 else groups
    for samples, gradient in zip(minibatches, recorder.gradients, strict=True):
        advantage = torch.cat([advantages[id(s)] for s in samples])
        with policy.using("ref"), torch.no_grad():
            reference = logprobs_by_hand(policy, samples, temperature)
        with policy.using("follower"):
            logp = logprobs_by_hand(policy, samples, temperature)
            ratio = (logp - torch.cat([old[id(s)] for s in samples])).exp()
            held = torch.where(advantage > 0, ratio.clamp(max=1.3), ratio.clamp(min=0.8))
            d = (reference - logp).clamp(-10, 10)
            loss = 0.05 * (d.exp() - d - 1) - held * advantage
            expected = torch.autograd.grad(loss.mean(), recorder.parameters)
        clipped, losses = clipped + (held != ratio).sum().item(), losses + loss.sum().item()
        for parameter, ours, theirs in zip(recorder.parameters, gradient, expected):
            assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-3
            parameter.data -= lr * ours
    tokens = sum(len(s.tokens) for s in everyone)
    assert metrics["loss"] == pytest.approx(losses / tokens, rel=1e-3, abs=1e-5)
    assert metrics["clipped"] == pytest.approx(clipped / tokens)
    assert bool(clipped) == (num_minibatches > 1)


def test_a_large_gradient_is_scaled_down(folders):
    policy = load_cpu(folders("llama"))
    recorder = Recorder(policy)
    metrics = step(policy, rewarded_groups(policy), recorder, kl_coef=0)
    norm = torch.cat([g.flatten() for g in recorder.gradients[0]]).norm().item()
    assert norm == pytest.approx(min(1.0, metrics["grad_norm"]), rel=1e-3) and norm > 0
    assert "kl" not in metrics and metrics["entropy"] > 0 == metrics["frac_reward_zero_std"]


def test_kl_pulls_back_to_the_reference(policy):
    randomise(policy, "follower")
    groups = rewarded_groups(policy, [0, 1e-3] * 4)
    kl = [step(policy, groups, lr=5e-3, kl_coef=100.0)["kl"] for _ in range(6)]
    assert kl[-1] < 0.7 * kl[0]


def test_a_non_finite_gradient_is_skipped_and_counted(policy):
    groups, before = rewarded_groups(policy), copies(policy, "follower")
    optimizer = torch.optim.AdamW(policy.tensors("follower").values())
    hook = next(iter(policy.tensors("follower").values())).register_hook(lambda g: g * math.inf)
    metrics = step(policy, groups, optimizer)
    assert (metrics["skipped"], metrics["updates"]) == (1, 0) and math.isnan(metrics["grad_norm"])
    assert all(equal(before, copies(policy, "follower"))) and not optimizer.state
    hook.remove()
    metrics = step(policy, groups, optimizer)
    assert (metrics["skipped"], metrics["updates"]) == (0, 1)


def test_eos_gets_a_gradient_though_it_is_the_padding_token_too(policy):
    assert policy.chat.tokenizer.pad_token_id == IM_END and IM_END in policy.chat.eos
    optimizer = torch.optim.AdamW(policy.tensors("follower").values(), lr=5e-3)
    probabilities = []
    # The better one ends, and nothing else tells the two apart.
    for _ in range(6):
        group = group_of([10, 20, 30], ([65, IM_END], 1.0), ([65, 66], 0.0))
        rl.score(policy, "follower", group, "old_logprobs", 1.0)
        probabilities.append(group[0].old_logprobs[1].exp().item())
        step(policy, [group], optimizer)
    assert probabilities[-1] > 1.5 * probabilities[0]


def test_reward_rises_when_it_is_the_share_of_letters(policy):
    """The whole loop in small."""
    optimizer, rewards = torch.optim.AdamW(policy.tensors("follower").values(), lr=2e-2), []
    policy.chat.eos.clear()
    torch.manual_seed(0)
    for _ in range(12):
        with policy.using("follower"):
            (group,) = policy.sample([ask("Say it.")], 16, 8)
        for s in group:
            s.reward = sum(token < 100 for token in s.tokens) / len(s.tokens)
        rewards.append(sum(s.reward for s in group) / len(group))
        step(policy, [group], optimizer, kl_coef=0.0)
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2


# ------------------------------------------------------------ models


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
ONE, NAN = torch.ones(1), torch.full((64,), math.nan)
WEIGHTS, NOT_CAUSAL = "model.safetensors", "cannot be loaded as a causal language model"


def set_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def set_weights(folder: Path, **changes) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    tensors = {name: t for name, t in tensors.items() if t is not None}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    "damage, bits, message",
    [
        (shutil.rmtree, 16, NOT_CAUSAL),
        (pickle, 16, f"{NOT_CAUSAL} .*safetensors"),
        (lambda folder: os.truncate(folder / WEIGHTS, 9000), 16, NOT_CAUSAL),
        (lambda folder: set_config(folder, model_type="vit"), 16, NOT_CAUSAL),
        (lambda folder: set_config(folder, intermediate_size=96), 16, NOT_CAUSAL),
        (lambda folder: set_config(folder, intermediate_size=96), 4, "has the shape"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), 16, "no chat template; use an"),
        (lambda folder: (folder / "adapter_config.json").touch(), 16, "a LoRA adapter; give its"),
        (lambda folder: set_weights(folder, **{UP: None}), 16, f"its files lack {UP}"),
        (lambda folder: set_weights(folder, **{f"{UP}_scale": ONE}), 16, "is not used by"),
        (lambda folder: set_weights(folder, **{NORM: NAN}), 16, "logits are NaN"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(folders, tmp_path, damage, bits, message):
    folder = shutil.copytree(folders("llama"), tmp_path / "m")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        rl.load(str(folder), bits)
    assert "\n" not in str(caught.value)


def test_an_unsupported_model_is_refused_in_one_line(tmp_path):
    """Mamba reads dt_proj's weights itself, so LoRA would be bypassed."""
    mamba = make_model(tmp_path / "mamba", "mamba", state_size=16, time_step_rank=16)
    with pytest.raises(InputError, match=r"does not compute here \(AttributeError"):
        rl.load(mamba, 16)
    with pytest.raises(InputError, match="no Linear layer of at least --lora-rank 500"):
        rl.load(make_model(tmp_path / "llama"), 16, rank=500)
    with pytest.raises(InputError, match="no list of layers"):
        load_model.decoder_layers(types.SimpleNamespace(get_decoder=lambda: torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="^--model no/such-model: .*$"):
        rl.load("no/such-model")


VISION = {
    "Mistral3": {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2},
    "Qwen2_5_VL": {"depth": 1, "num_heads": 2, "out_hidden_size": 64},
}


@pytest.mark.parametrize("family", VISION)
def test_a_vision_language_checkpoint_trains_its_decoder(tmp_path, family):
    vision = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 14} | VISION[family]
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = SIZES | (
        {"model_type": "mistral"} if family == "Mistral3" else {"rope_parameters": rope}
    )
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    getattr(transformers, f"{family}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy = load_cpu(str(tmp_path))
    assert isinstance(policy.engine, packed.PackedEngine)
    assert policy.lora and all("vision" not in layer for layer in policy.lora)
    assert step(policy, rewarded_groups(policy))["updates"] == 1
