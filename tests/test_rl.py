"""Adapters, sampling, verdicts and GRPO against versions of themselves written out by hand."""

import json
import math
import shutil
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import KINDS, OTHERS, SIZES, load_cpu, load_trained, make_tokenizer, randomise
from safetensors.torch import load_file, save_file

import rl
from extras import load_model, packed
from extras.data import InputError
from prompts import assistant, user

IM_END = 258
WEIGHTS, UP, NORM = "model.safetensors", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
ONE, NAN = torch.ones(1), torch.full((64,), math.nan)
NOT_CAUSAL = "cannot be loaded as a causal language model"
# Share of the layers' weights without LoRA, counted by hand. 0 for all other kinds.
LEFT_OUT = {"qwen3-moe": "67%", "moe-after-mlp": "67%", "gpt-oss": "89%", "mamba": "29%"}
QKVO, MOE = "q_proj k_proj v_proj o_proj", {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Config, its sizes; leaf names of layers with LoRA; the reasons printed for those without.
PLACES = [
    # Experts directly in the decoder layer, beside a dense MLP of the same names.
    ("Gemma4TextConfig", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, **MOE},
     f"{QKVO} per_layer_input_gate per_layer_projection proj", "experts;"),
    # Experts in the place that holds attention or a Mamba block in other layers.
    ("NemotronHConfig",
     {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "n_routed_experts": 4, **MOE},
     f"{QKVO} in_proj", "experts, 1 out_proj of a Mamba model"),
    # Gates with three dimensions are no experts.
    ("RecurrentGemmaConfig", {"num_hidden_layers": 3, "lru_width": 64},
     f"{QKVO} gate_proj up_proj down_proj linear_x linear_y linear_out", ""),
    # A subclass of Linear that computes block by block.
    ("DeepseekV4Config",
     {"n_routed_experts": 4, "o_groups": 2, "q_lora_rank": 16, "o_lora_rank": 16, **MOE},
     "q_a_proj q_b_proj kv_proj o_b_proj", "2 DeepseekV4GroupedLinear with a forward of its own;"),
]  # fmt: skip


@torch.no_grad()
def logits(policy, ids) -> torch.Tensor:
    return policy.model(torch.tensor([list(ids)], device=policy.model.device)).logits[0].cpu()


def logprobs_by_hand(policy, samples, temperature=1.0) -> torch.Tensor:
    values = []
    for s in samples:
        out = policy.model(torch.tensor([s.prompt + s.tokens])).logits[0, len(s.prompt) - 1 : -1]
        values.append((out / temperature).log_softmax(-1)[range(len(s.tokens)), s.tokens])
    return torch.cat(values)


def rewarded_groups(policy) -> list[list[rl.Sample]]:
    """Samples of two prompts, four each, with rewards of some variance."""
    torch.manual_seed(2)
    with policy.using("follower"):
        groups = policy.sample([[user("Name a fruit.")], [user("Sing!")]], 4, 12)
    for sample, reward in zip(sum(groups, []), (0, 1, 0, 1, 1, 0, 0, 0.5)):
        sample.reward = reward
    return groups


def adapter(policy, role="follower") -> list[torch.nn.Parameter]:
    return list(policy.tensors(role).values())


def step(policy, groups, optimizer=None, ref_role=None, **changes) -> dict:
    """A GRPO step of the Follower. ref_role None: the base model is the KL reference."""
    settings = {"num_minibatches": 1, "kl_coef": 0.05, "advantage": "grpo", "temperature": 1.0}
    cfg = types.SimpleNamespace(**settings | changes)
    optimizer = optimizer or torch.optim.AdamW(adapter(policy), lr=1e-2)
    return rl.grpo_step(policy, "follower", ref_role, groups, optimizer, cfg, cfg.temperature)


def copies(tensors) -> list[torch.Tensor]:
    return [t.detach().clone() for t in tensors]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("bits", [16, 4])
def test_a_role_adds_its_scaled_low_rank_update_to_the_base_model(folders, bits):
    """Without a role, or while its B is zero, it is the base model bit for bit. Roles nest."""
    policy = load_cpu(folders("qwen2"), "plain", bits, rank=4, alpha=12)
    base, _ = load_model.load_model(folders("qwen2"), bits, torch.device("cpu"), torch.float32)
    # In eval mode bitsandbytes may repack weights for a kernel that rounds more.
    base.train()
    ids = [i % 50 for i in range(130)]
    with torch.no_grad():
        expected = base(torch.tensor([ids])).logits[0]
    with pytest.raises(ZeroDivisionError), policy.using("follower"):
        assert torch.equal(logits(policy, ids), expected)
        randomise(policy, "follower")
        for name, layer in policy.lora.items():
            fan_in, fan_out = layer.base.in_features, layer.base.out_features
            prefix, x = f"base_model.model.{name}.lora_", torch.randn(2, 3, fan_in)
            A, B = (policy.tensors("follower")[f"{prefix}{part}.weight"] for part in "AB")
            assert A.shape == (4, fan_in) and B.shape == (fan_out, 4)
            # Kaiming uniform with a = sqrt 5.
            assert 0.9 < A.abs().max().item() * math.sqrt(fan_in) <= 1
            updated = layer.base(x) + 12 / 4 * x @ A.T @ B.T
            torch.testing.assert_close(layer(x), updated, rtol=1e-4, atol=1e-4)
        with policy.using(None):
            assert torch.equal(logits(policy, ids), expected)
        assert not torch.equal(logits(policy, ids), expected)
        raise ZeroDivisionError
    assert torch.equal(logits(policy, ids), expected)
    with pytest.raises(KeyError, match="nobody"), policy.using("nobody"):
        pass


@pytest.mark.parametrize("bits, num_minibatches", [(16, 1), (16, 2), (4, 1), (4, 2)])
def test_a_step_changes_its_own_role_and_nothing_else(folders, bits, num_minibatches):
    policy = rl.load(folders("llama"), bits)
    policy.add("follower")
    randomise(policy, "follower")
    policy.copy("follower", "ref")
    policy.add("instructor")
    own = adapter(policy)
    others = [p for p in policy.model.parameters() if all(p is not q for q in own)]
    before, others_before = copies(own), copies(others)
    groups = rewarded_groups(policy)
    metrics = step(policy, groups, ref_role="ref", num_minibatches=num_minibatches)
    assert metrics["updates"] == num_minibatches and metrics["skipped"] == 0 < metrics["grad_norm"]
    assert all(equal(others_before, others)) and not any(equal(before, own))
    assert all(p.grad is None for p in policy.model.parameters())


# Weights that 4-bit kernels have no gradient for would train nothing below them.
@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_every_kind_is_adapted_samples_scores_and_trains(folders, kind, capsys):
    policy = load_cpu(folders(kind), bits=16 if kind == "mamba" else 4)
    printed = capsys.readouterr().out
    if kind in LEFT_OUT:
        assert f"no LoRA on {LEFT_OUT[kind]} of the layers" in printed
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(folders(kind))
        linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
        assert "no LoRA" not in printed and set(policy.lora) == linear - {"lm_head"}
    with policy.using("follower"):
        (group,) = policy.sample([[user("Name a fruit.")]], 4, 8)
    assert all(1 <= len(s.tokens) <= 8 for s in group)
    for k, sample in enumerate(group):
        sample.reward = float(k)
    assert step(policy, [group])["updates"] == 1
    rl.score(policy, "follower", group, "old_logprobs", 1.0)
    rl.score(policy, None, group, "ref_logprobs", 1.0)
    moved = group[0].old_logprobs - group[0].ref_logprobs
    assert moved.isfinite().all() and moved.any()


@pytest.mark.parametrize("engine", ["plain", "packed"])
def test_samples_end_with_an_eos_or_at_the_limit(folders, engine):
    policy = rl.load(folders("llama"), 16, engine=engine, dtype="fp32")
    policy.chat.eos.update(range(0, 250, 10))
    torch.manual_seed(0)
    for prefill in ("", "Well, "):
        messages = [user("Hello"), assistant(prefill)] if prefill else [user("Hello")]
        (group,) = policy.sample([messages], 12, 9)
        assert {s.ended for s in group} == {True, False} and len(group) == 12
        for s in group:
            assert s.prompt == policy.chat.encode(messages)
            assert s.text == prefill + policy.chat.decode(s.tokens)
            assert not policy.chat.eos & set(s.tokens[:-1])
            assert s.ended == (s.tokens[-1] in policy.chat.eos) and (s.ended or len(s.tokens) == 9)


def test_the_plain_engine_is_what_transformers_computes(folders):
    policy = load_trained(folders("gemma3"))
    with policy.using("follower"):
        (group,) = policy.sample([[user("Name a fruit.")]], 2, 20, 0.0)
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
    policy = load_trained(folders("llama"), engine)
    policy.chat.yes_tokens, policy.chat.no_tokens = [65, 66], [70]
    messages, expected = [[user(text)] for text in ("Is it?", "Is it so?", "Why", "Is it?")], []
    with policy.using("follower"):
        for message in messages:
            p = logits(policy, policy.chat.encode(message))[-1].softmax(-1)
            expected.append((p[65] + p[66]).item() / (p[65] + p[66] + p[70]).item())
        monkeypatch.setattr(rl, "MIN_VERDICT_MASS", 0.0)
        assert policy.yes_probability(messages) == pytest.approx(expected, rel=1e-4)
        # A model about to say neither, and a tokenizer without such a token, give no verdict.
        monkeypatch.setattr(rl, "MIN_VERDICT_MASS", 1.0)
        assert all(map(math.isnan, policy.yes_probability(messages)))
        policy.chat.yes_tokens = policy.chat.no_tokens = []
        assert all(map(math.isnan, policy.yes_probability(messages)))


def test_an_optimizer_step_that_is_out_of_memory_is_not_repeated(folders, monkeypatch):
    """Its gradient has been divided by the tokens."""
    policy = load_cpu(folders("llama"))
    groups, optimizer = rewarded_groups(policy), torch.optim.SGD(adapter(policy))
    once = Mock(side_effect=[torch.OutOfMemoryError("by the test"), None])
    monkeypatch.setattr(optimizer, "step", once)
    with pytest.raises(InputError, match=r"^out of GPU memory \(by the test\); use a smaller .*$"):
        step(policy, groups, optimizer)


def test_advantages_by_hand(policy):
    group_of = lambda *rewards: [rl.Sample([1], [2], "", True, reward=r) for r in rewards]
    std = math.sqrt(3) / 4 + 1e-6
    expected = {"grpo": (0.75 / std, -0.25 / std), "rloo": (1, -1 / 3), "dr_grpo": (0.75, -0.25)}
    for kind, (best, others) in expected.items():
        (group,) = rl.with_advantages([group_of(1, 0, 0, 0)], kind)
        assert [s.advantage for s in group] == pytest.approx([best, others, others, others])
    # Missing rewards leave their group. Zero-variance groups are dropped.
    rewards = [1.0, None, 0.0], [0.5, 0.5, None], [None, None], [3.0], []
    groups = [group_of(*group) for group in rewards]
    (kept,) = rl.with_advantages(groups)
    assert kept[0] is groups[0][0] and kept[1] is groups[0][2] and len(kept) == 2
    assert [s.advantage for s in groups[0]] == pytest.approx([1, 0, -1], abs=1e-5)
    # There are no more minibatches than groups that are left.
    metrics = step(policy, groups, num_minibatches=4)
    assert metrics["updates"] == 1 and metrics["frac_reward_zero_std"] == 0.8
    # Without any, no forward pass is computed.
    policy.engine, before = None, copies(adapter(policy))
    for none in (groups[1:], []):
        assert step(policy, none) == {"updates": 0, "skipped": 0, "frac_reward_zero_std": 1}
    assert all(equal(before, adapter(policy)))


def test_k3_and_token_loss_by_hand():
    logp, zero = torch.tensor([-1.0, -2.0, -60.0]), torch.zeros(3)
    kl = rl.token_loss(logp, logp, torch.tensor([-1.5, -2.0, 0.0]), zero, 1)[1]
    # The estimate is clamped: one token must not give e^60.
    assert kl.tolist() == pytest.approx([math.exp(-0.5) - 0.5, 0, math.exp(10) - 11], rel=1e-5)
    # log ratio, advantage -> the surrogate, and whether it was clipped.
    for log_ratio, advantage, surrogate, is_clipped in (
        (0.5, 2.0, 1.3 * 2, True),
        (-0.5, 2.0, math.exp(-0.5) * 2, False),
        (-0.5, -2.0, -0.8 * 2, True),
        (0.5, -2.0, -math.exp(0.5) * 2, False),
    ):
        old, ref = logp - log_ratio, logp + 0.3
        loss, kl, clipped = rl.token_loss(logp, old, ref, zero + advantage, 0.1)
        torch.testing.assert_close(loss, 0.1 * kl - surrogate, rtol=1e-4, atol=1e-4)
        assert clipped.tolist() == [is_clipped] * 3


@pytest.mark.parametrize("engine", ["plain", "packed"])
@pytest.mark.parametrize("num_minibatches, lr, temperature", [(1, 0.0, 0.7), (2, 3.0, 1.0)])
def test_the_gradient_by_hand(folders, engine, num_minibatches, lr, temperature, monkeypatch):
    policy = load_trained(folders("llama"), engine)
    policy.copy("follower", "ref")
    randomise(policy, "ref", seed=9)
    monkeypatch.setattr(rl, "MAX_GRAD_NORM", 1e9)
    groups, parameters, gradients = rewarded_groups(policy), adapter(policy), []
    # The last token is an EOS. It counts, though it is the padding token, too.
    assert policy.chat.tokenizer.pad_token_id == IM_END in policy.chat.eos
    for i, s in enumerate(sum(groups, [])):
        s.tokens = [*s.tokens[: i + 2], IM_END]
    start, optimizer = copies(parameters), torch.optim.SGD(parameters, lr)
    optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad for p in parameters]))
    settings = {"num_minibatches": num_minibatches, "temperature": temperature}
    metrics = step(policy, groups, optimizer, "ref", **settings)
    for parameter, value in zip(parameters, start):
        parameter.data.copy_(value)
    minibatches = [sum(groups, [])] if num_minibatches == 1 else groups
    with policy.using("follower"), torch.no_grad():
        old = [logprobs_by_hand(policy, samples, temperature) for samples in minibatches]
    losses, clipped = [], []
    for samples, old_logprobs, gradient in zip(minibatches, old, gradients, strict=True):
        advantage = torch.cat([torch.full((len(s.tokens),), s.advantage) for s in samples])
        with policy.using("ref"), torch.no_grad():
            reference = logprobs_by_hand(policy, samples, temperature)
        with policy.using("follower"):
            logp = logprobs_by_hand(policy, samples, temperature)
            ratio = (logp - old_logprobs).exp()
            held = torch.where(advantage > 0, ratio.clamp(max=1.3), ratio.clamp(min=0.8))
            d = (reference - logp).clamp(-10, 10)
            loss = 0.05 * (d.exp() - d - 1) - held * advantage
            expected = torch.autograd.grad(loss.mean(), parameters)
        losses.append(loss.detach())
        clipped.append((held != ratio).float())
        for parameter, ours, theirs in zip(parameters, gradient, expected):
            assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-3
            parameter.data -= lr * ours
    assert metrics["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-3, abs=1e-5)
    assert metrics["clipped"] == pytest.approx(torch.cat(clipped).mean().item())
    assert (metrics["clipped"] > 0) == (num_minibatches > 1)


def test_a_large_gradient_is_scaled_down_and_a_non_finite_one_skipped(policy):
    before, groups = copies(adapter(policy)), rewarded_groups(policy)
    metrics = step(policy, groups, torch.optim.SGD(adapter(policy), lr=1.0), kl_coef=0)
    moved = sum((a - b).square().sum().item() for a, b in zip(before, adapter(policy)))
    assert math.sqrt(moved) == pytest.approx(1.0, rel=1e-2) and metrics["grad_norm"] > 1
    assert "kl" not in metrics and metrics["entropy"] > 0 == metrics["frac_reward_zero_std"]
    optimizer, before = torch.optim.AdamW(adapter(policy)), copies(adapter(policy))
    hook = adapter(policy)[0].register_hook(lambda g: g * math.inf)
    metrics = step(policy, groups, optimizer)
    assert (metrics["skipped"], metrics["updates"]) == (1, 0) and math.isnan(metrics["grad_norm"])
    assert all(equal(before, adapter(policy))) and not optimizer.state
    hook.remove()
    assert step(policy, groups, optimizer)["updates"] == 1


def set_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def set_weights(folder: Path, **changes) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    tensors = {name: t for name, t in tensors.items() if t is not None}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    "damage, bits, message",
    [
        (lambda folder: (folder / WEIGHTS).rename(folder / "model.bin"), 16, "safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes(bytes(9)), 16, NOT_CAUSAL),
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
    with pytest.raises(InputError, match=rf"^.*{message}.*\Z"):
        rl.load(str(folder), bits)


def test_an_unsupported_model_is_refused_in_one_line(folders, monkeypatch):
    with pytest.raises(InputError, match=r"LoRA can adapt \(14 smaller than --lora-rank 500"):
        rl.load(folders("llama"), 16, rank=500)
    with pytest.raises(InputError, match="no list of layers"):
        load_model.decoder_layers(types.SimpleNamespace(get_decoder=lambda: torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="^--model no/such-model: .*$"):
        rl.load("no/such-model")
    # One that fails with an adapter only. The adapter that tests it is removed.
    assert not next(iter(rl.load(folders("llama"), 16).lora.values())).A
    forward = rl.LoRALinear.forward
    wrong = lambda layer, x: forward(layer, x[..., :-1] if layer.active_adapter else x)
    monkeypatch.setattr(rl.LoRALinear, "forward", wrong)
    with pytest.raises(InputError, match=r"does not compute here \(RuntimeError"):
        rl.load(folders("llama"), 16)


@pytest.mark.parametrize("name, sizes, leaves, printed", PLACES, ids=[row[0] for row in PLACES])
def test_lora_goes_on_what_computes_as_a_linear_layer(name, sizes, leaves, printed, capsys):
    config = getattr(transformers, name)(**SIZES | sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = load_model.lora_targets(model, rank=4)
    assert {name.rpartition(".")[2] for name in found} == set(leaves.split())
    assert printed in (out := capsys.readouterr().out) and bool(out) == bool(printed)


def test_a_vision_language_checkpoint_trains_its_decoder(tmp_path):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(
        text_config=SIZES | {"rope_parameters": rope}, vision_config=vision | {"patch_size": 14}
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy = load_cpu(str(tmp_path))
    assert isinstance(policy.engine, packed.PackedEngine)
    assert policy.lora and all("vision" not in layer for layer in policy.lora)
    assert step(policy, rewarded_groups(policy))["updates"] == 1
