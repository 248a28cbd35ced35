"""rl.py: one quantised base model, a LoRA adapter per role, sampling, GRPO.

It sees token ids and rewards. Constraints and turns belong to judge.py and seif.py.

    LoRALinear    y = W x + (alpha / r) B A x, W frozen in 4 bits   (Hu et al. 2021, equation 3)
    PlainEngine   sampling, log-probabilities, next-token probabilities, one prompt at a time
    Policy        the model, its adapters, an engine
    grpo_step     group advantages, clipped ratio, k3 KL            (Shao et al. 2024, equation 3)

PlainEngine is the definition. extras/packed.py computes the same several times faster. Left out:
value network, learned reward model, padding, merged weights, entropy bonus, multi-GPU training.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from extras.chat_template import ChatTemplate
from extras.data import InputError
from extras.load_model import DTYPES, context_length, fast_dtype, load_model, lora_targets
from extras.packed import INVALID_TOKEN, sample_token
from extras.self_check import SAMPLE_PROMPTS, try_create

# PPO's clip range, wider above 1 (DAPO's clip-higher, as in SEIF), and the gradient norm's limit.
CLIP_LOW, CLIP_HIGH, MAX_GRAD_NORM = 0.2, 0.3, 1.0
# P(yes) + P(no) below this: the model is about to say something else, and there is no verdict.
MIN_VERDICT_MASS = 1e-3
# Limits of the unpacked copy of 4-bit weights: on a CPU for good, on a GPU while sampling.
UNPACK_CPU_MIB, UNPACK_GPU_SHARE = 4096, 0.25


# ------------------------------------------------------------ LoRA
class LoRALinear(nn.Module):
    """A frozen linear layer plus the low-rank update of the active adapter, if there is one.

    A (r, in) and B (out, r) are fp32 parameters, cast to the activations' type in forward().
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.active_adapter: str | None = None
        self.A, self.B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}
        # role -> (A, B) in the compute dtype, while nothing is trained.
        self.inference_copy: dict[str, tuple[Tensor, Tensor]] = {}
        # The base's 4-bit weight unpacked, see Policy.unpack_weights().
        self.unpacked: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        y = self.base(x) if self.unpacked is None else F.linear(x, self.unpacked, self.base.bias)
        role = self.active_adapter
        if role is None:
            return y
        A, B = self.inference_copy.get(role) or (self.A[role].to(x.dtype), self.B[role].to(x.dtype))
        down = F.linear(x, A).flatten(0, -2)
        # In place, or the sum would cost a copy of y.
        y.view(-1, y.shape[-1]).addmm_(down, B.T, alpha=self.scale[role])
        return y


# ------------------------------------------------------------ the plain engine
class PlainEngine:
    """Sampling and scoring in the obvious way, one prompt at a time. Works for every model."""

    def __init__(self, model, eos: set[int]):
        self.model, self.eos = model, eos

    @torch.no_grad()
    def sample(self, prompts: list, uniform: Tensor, temperature: float) -> list[list[list[int]]]:
        """n completions of each prompt as token ids. What follows an EOS is noise.

        uniform (prompts, n, T): a draw in (0, 1] per sample and position. T is the token limit.
        """
        return [self._complete(p, u, temperature) for p, u in zip(prompts, uniform)]

    def _complete(self, prompt: list[int], uniform: Tensor, temperature: float) -> list[list[int]]:
        n, limit = uniform.shape
        ids = torch.tensor([prompt] * n, device=self.model.device)
        draws = iter(uniform.T)
        sampled: list[Tensor] = []

        def force_token(_, scores: Tensor) -> Tensor:
            """scores (n, V) -> the same, all but the sampled token at -inf"""
            token = sample_token(scores.float(), next(draws).to(scores.device), temperature)
            sampled.append(token)
            chosen = token.clamp_min(0)[:, None]
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

        config = transformers.GenerationConfig(
            max_new_tokens=limit,
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=min(self.eos, default=0),
        )
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=[force_token],
        )
        return torch.stack(sampled, 1).tolist()

    def logprobs(self, pairs: list, temperature: float = 1.0) -> Iterator[tuple[list, list]]:
        """log p(completion token | all tokens before it) of (prompt ids, completion ids) pairs.

        Yields (indices of pairs, their (len(completion),) tensors). Each yield is one autograd
        graph: call backward() before advancing.
        """
        for i, (prompt, completion) in enumerate(pairs):
            ids = torch.tensor([prompt + completion], device=self.model.device)
            out = self.model(ids, logits_to_keep=len(completion) + 1, use_cache=False)
            # The logits at j predict token j + 1: (T, V), without those after the last token.
            logits = out.logits[0, -len(completion) - 1 : -1]
            logp = (logits.float() / temperature).log_softmax(-1)
            yield [i], [logp.gather(1, ids[0, len(prompt) :, None])[:, 0]]

    @torch.no_grad()
    def next_probabilities(self, prompts: list, tokens: list[int]) -> Tensor:
        """P(token | prompt) of the next token: (len(prompts), len(tokens)), fp32, on the CPU."""
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.model.device)
            logits = self.model(ids, logits_to_keep=1, use_cache=False).logits[0, -1]
            rows.append(logits.float().softmax(-1)[tokens].cpu())
        return torch.stack(rows) if rows else torch.empty(0, len(tokens))

    def use_less_memory(self) -> bool:
        """After an out-of-memory: reduce the limits. False if there is nothing to reduce."""
        return False


# ------------------------------------------------------------ the policy
@dataclass
class Sample:
    """One completion, from its prompt to its advantage."""

    prompt: list[int]
    tokens: list[int]
    # The assistant's text, the assistant prefill included.
    text: str
    # Whether it ended with an EOS. If not, it was cut at the token limit.
    ended: bool
    # Set by judge.py.
    question: Any = None
    rejected: str = ""
    answer: str = ""
    verdicts: list = field(default_factory=list)
    # None: no verdict is known, and the sample is left out of its group.
    reward: float | None = None
    advantage: float = 0.0
    # (T,) under the reference policy, and under the policy that sampled. None: as it is now.
    ref_logprobs: Tensor | None = field(default=None, repr=False)
    old_logprobs: Tensor | None = field(default=None, repr=False)


class Policy:
    """The base model and its adapters. using(role) selects the adapter that computes."""

    def __init__(self, model, tokenizer, name: str, rank: int, alpha: float):
        self.model, self.name, self.rank, self.alpha = model, name, rank, alpha
        model.eval().requires_grad_(False)
        eos = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
        eos = {i for ids in eos for i in (ids if isinstance(ids, list) else [ids])} - {None}
        try:
            self.chat = ChatTemplate(tokenizer, eos)
        except ValueError as error:
            raise InputError(f"--model {name}: {error}") from error
        # The checkpoint's own top_p, min_p and repetition_penalty must not reach our samples.
        model.generation_config = transformers.GenerationConfig()
        self.context_length = context_length(model.config)
        self.active_adapter: str | None = None
        self.lora: dict[str, LoRALinear] = {}
        self._wrap_layers()
        self.engine = PlainEngine(model, self.chat.eos)
        if model.device.type == "cpu":
            self.unpack_weights(UNPACK_CPU_MIB * 2**20)

    def _wrap_layers(self) -> None:
        for module in self.model.modules():
            # bitsandbytes would repack weights for an inference kernel without gradients.
            module.support_avx512bf16_for_cpu = False
        for name in lora_targets(self.model, self.rank):
            parent, _, leaf = name.rpartition(".")
            layer = self.lora[name] = LoRALinear(self.model.get_submodule(name))
            setattr(self.model.get_submodule(parent), leaf, layer)

    def smoke_test(self) -> None:
        """Sample and score by an adapter: unsupported models fail here with a clear message."""
        self.add("smoke_test")
        try:
            with self.using("smoke_test"), torch.no_grad():
                self.sample([[self.chat.USER]], 1, 2, 0.0)
                list(self.engine.logprobs([([1, 2], [3])]))
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise InputError(f"--model {self.name}: does not compute here ({reason})") from error
        for layer in self.lora.values():
            for parts in (layer.A, layer.B, layer.scale):
                parts.pop("smoke_test")

    @contextmanager
    def using(self, role: str | None):
        """`with policy.using(role):` activates an adapter. None is the base model itself."""
        before = self.active_adapter
        self._activate(role)
        try:
            yield self
        finally:
            self._activate(before)

    def _activate(self, role: str | None) -> None:
        if role is not None and role not in next(iter(self.lora.values())).A:
            raise KeyError(f"no adapter {role!r}")
        self.active_adapter = role
        for layer in self.lora.values():
            layer.active_adapter = role

    @contextmanager
    def inference(self):
        """No gradients. Casts the active adapter once, unpacks 4-bit weights if they fit."""
        role, dtype, cuda = self.active_adapter, self.model.dtype, self.model.device.type == "cuda"
        with torch.no_grad():
            try:
                if cuda:
                    self.unpack_weights(UNPACK_GPU_SHARE * torch.cuda.mem_get_info()[0])
                for layer in self.lora.values() if role else ():
                    layer.inference_copy[role] = layer.A[role].to(dtype), layer.B[role].to(dtype)
                yield
            finally:
                for layer in self.lora.values():
                    layer.inference_copy.clear()
                    if cuda:
                        layer.unpacked = None

    def unpack_weights(self, max_bytes: float) -> None:
        """Unpack the 4-bit weights to the compute dtype, all or none.

        bitsandbytes would unpack each weight at each call: 40 % of a decode step on a CPU.
        """
        layers = [m for m in self.lora.values() if hasattr(m.base.weight, "quant_state")]
        elements = sum(m.base.in_features * m.base.out_features for m in layers)
        if layers and elements * self.model.dtype.itemsize <= max_bytes:
            # Imported here: bitsandbytes prints when it is imported.
            from bitsandbytes.functional import dequantize_4bit

            for layer in layers:
                weight = layer.base.weight
                unpacked = dequantize_4bit(weight.data, weight.quant_state)
                layer.unpacked = unpacked.to(self.model.dtype)

    def add(self, role: str, seed: int = 0, rank: int = 0) -> None:
        """A fresh adapter as in peft: A Kaiming uniform (a = sqrt 5), B zero."""
        rank = rank or self.rank
        generator = torch.Generator().manual_seed(seed)
        for layer in self.lora.values():
            fan_in, fan_out = layer.base.in_features, layer.base.out_features
            a = (torch.rand(rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)
            layer.A[role] = nn.Parameter(a.to(self.model.device))
            layer.B[role] = nn.Parameter(torch.zeros(fan_out, rank, device=self.model.device))
            layer.scale[role] = self.alpha / rank

    def copy(self, source: str, role: str) -> None:
        """`role` becomes a frozen copy of the adapter `source`."""
        for layer in self.lora.values():
            for parameters in (layer.A, layer.B):
                value = parameters[source].detach().clone()
                parameters[role] = nn.Parameter(value, requires_grad=False)
            layer.scale[role] = layer.scale[source]

    def tensors(self, role: str) -> dict[str, nn.Parameter]:
        """The role's parameters under peft's names."""
        named = {}
        for name, layer in self.lora.items():
            named[f"base_model.model.{name}.lora_A.weight"] = layer.A[role]
            named[f"base_model.model.{name}.lora_B.weight"] = layer.B[role]
        return named

    def sample(self, messages: list, n: int, max_new_tokens: int, temperature=1.0) -> list[list]:
        """n Samples per list of chat messages, by the active adapter. Temperature 0 is greedy."""
        prompts = [self.chat.encode(m) for m in messages]
        # One draw per sample and position, so the batch size changes nothing but rounding.
        uniform = 1 - torch.rand(len(prompts), n, max_new_tokens)
        work = partial(self.engine.sample, prompts, uniform, temperature)
        groups = []
        sampled = self.retry_on_oom(work, inference=True) if prompts else []
        for asked, prompt, rows in zip(messages, prompts, sampled):
            prefill = asked[-1]["content"] if asked[-1]["role"] == "assistant" else ""
            # Decoded after the prompt: some tokenizers drop the space that a text starts with.
            start = len(self.chat.decode(prompt))
            groups.append([])
            for ids in rows:
                end = next((i for i, token in enumerate(ids) if token in self.chat.eos), len(ids))
                ids = ids[: end + 1]
                if INVALID_TOKEN in ids:
                    fix = "lower --lr, or use a card with bf16 if this is fp16"
                    raise InputError(f"the model's logits are NaN; {fix}")
                text = prefill + self.chat.decode(prompt + ids)[start:]
                groups[-1].append(Sample(prompt, ids, text, ended=ids[-1] in self.chat.eos))
        return groups

    def yes_probability(self, messages: list[list[dict]]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) as the answer's first token, by the active adapter.

        NaN where the model is about to say neither: a missing verdict, which is not a "no".
        """
        prompts = [self.chat.encode(m, skip_thought=True) for m in messages]
        yes, no = self.chat.yes_tokens, self.chat.no_tokens
        work = partial(self.engine.next_probabilities, prompts, yes + no)
        probabilities = self.retry_on_oom(work, inference=True)
        p_yes, p_no = (p.sum(1) for p in probabilities.split([len(yes), len(no)], 1))
        known = p_yes + p_no > MIN_VERDICT_MASS
        return torch.where(known, p_yes / (p_yes + p_no), math.nan).tolist()

    def retry_on_oom(self, work: Callable, inference: bool = False, retry: bool = True):
        """work(), again with lower limits each time that the GPU runs out of memory."""
        while True:
            try:
                with self.inference() if inference else nullcontext():
                    return work()
            except torch.OutOfMemoryError as error:
                if not retry or not self.engine.use_less_memory():
                    fix = "a smaller --model, lower --max-new-tokens or --prompts-per-step"
                    raise InputError(f"out of GPU memory ({error}); use {fix}") from error
            # Outside of the handler: the exception holds what the failed attempt allocated.
            # subtle: a Sampler and its generator are a reference cycle.
            gc.collect()
            torch.cuda.empty_cache()


def load(
    model: str, bits=4, device=None, rank=16, alpha=32.0, engine="packed", dtype="auto", **limits
) -> Policy:
    """Load a causal language model, a Hugging Face id or a folder. InputError if it cannot be used.

    bits: 4 is nf4 with double quantisation (Dettmers et al. 2023), 16 is none. device: None is the
    GPU if there is one. rank, alpha: LoRA's. limits: token_budget and slots of the packed engine.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[fast_dtype(device.type == "cuda") if dtype == "auto" else dtype]
    base, tokenizer = load_model(model, bits, device, dtype)
    policy = Policy(base, tokenizer, model, rank, alpha)
    policy.smoke_test()
    if engine == "packed":
        texts = [policy.chat.encode(messages) for messages in SAMPLE_PROMPTS]
        fast = try_create(base, policy.chat.eos, texts, **limits)
        policy.engine = fast or policy.engine
    return policy


# ------------------------------------------------------------ GRPO
def grpo(rewards: Tensor) -> Tensor:
    """A_i = (R_i - mean) / (std + 1e-6), population std (Shao et al. 2024, section 4.1.2)."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)


def rloo(rewards: Tensor) -> Tensor:
    """A_i = R_i - mean of the other rewards of the group (Ahmadian et al. 2024, equation 8)."""
    n = len(rewards)
    return (rewards - rewards.mean()) * n / max(1, n - 1)


def dr_grpo(rewards: Tensor) -> Tensor:
    """A_i = R_i - mean, since std overweights easy and hard prompts (Liu et al. 2025).

    Their other change holds for all three: the loss is a mean over the tokens of a minibatch.
    """
    return rewards - rewards.mean()


ADVANTAGES = {"grpo": grpo, "rloo": rloo, "dr_grpo": dr_grpo}


def with_advantages(groups: list[list[Sample]], kind: str = "grpo") -> list[list[Sample]]:
    """Sets each sample's advantage. Returns the groups that carry a gradient.

    Samples without a reward are left out, zero-variance groups dropped.
    """
    kept = []
    for group in groups:
        known = [s for s in group if s.reward is not None]
        rewards = torch.tensor([s.reward for s in known], dtype=torch.float64)
        if len(known) == 0 or (rewards.max() - rewards.min()) < 1e-9:
            continue
        for sample, value in zip(known, ADVANTAGES[kind](rewards).tolist()):
            sample.advantage = value
        kept.append(known)
    return kept


def token_loss(logp, old_logprobs, ref_logprobs, advantage, kl_coef) -> tuple[Tensor, ...]:
    """-min(ratio A, clip(ratio) A) + kl_coef * k3 per token: (loss, kl, clipped), each (T,).

    Shao et al. 2024, equations 3 and 4. All arguments but kl_coef are (T,). With one minibatch per
    rollout old_logprobs is logp detached: the ratio is 1, the loss is about 0, and its gradient is
    the policy gradient. Watch the gradient norm then.
    """
    ratio = (logp - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    surrogate = torch.minimum(ratio * advantage, clipped_ratio * advantage)
    # Schulman's k3 estimator of KL(policy || reference), clamped: one token must not give e^50.
    d = (ref_logprobs - logp).clamp(-10, 10)
    kl = d.exp() - d - 1
    clipped = clipped_ratio * advantage < ratio * advantage
    return kl_coef * kl - surrogate, kl.detach(), clipped.detach()


def grpo_step(policy: Policy, role, ref_role, groups, optimizer, cfg, temperature: float) -> dict:
    """Update `role` on one rollout: groups of rewarded samples. ref_role: the KL reference.

    cfg: num_minibatches, kl_coef, advantage. The loss is a mean over the tokens of a minibatch.
    Equation 3 averages over each sample first. In a run with that the answers became longer until
    half were cut off. With several minibatches old_logprobs are computed before the first update,
    by the same code as the new ones. Returns metrics. Non-finite gradients are skipped and counted.
    """
    kept = with_advantages(groups, cfg.advantage)
    zero_std = 1 - len(kept) / max(1, len(groups))
    metrics = {"frac_reward_zero_std": zero_std, "updates": 0, "skipped": 0}
    if not kept:
        return metrics
    num_minibatches = min(cfg.num_minibatches, len(kept))
    samples = [s for group in kept for s in group]
    if cfg.kl_coef:
        score(policy, ref_role, samples, "ref_logprobs", temperature)
    if num_minibatches > 1:
        score(policy, role, samples, "old_logprobs", temperature)
    parameters = list(policy.tensors(role).values())
    sums = dict.fromkeys(("loss", "kl", "clipped", "entropy"), 0.0)
    norms = []
    for k in range(num_minibatches):
        minibatch = [s for group in kept[k::num_minibatches] for s in group]
        work = partial(backward, policy, role, minibatch, parameters, cfg.kl_coef, temperature)
        parts = policy.retry_on_oom(work)
        step = partial(apply_gradient, parameters, minibatch, optimizer)
        norm = policy.retry_on_oom(step, retry=False)
        if math.isfinite(norm):
            norms.append(norm)
        for name, value in parts.items():
            sums[name] += value
    tokens = sum(len(s.tokens) for s in samples)
    if not cfg.kl_coef:
        del sums["kl"]
    metrics["updates"], metrics["skipped"] = len(norms), num_minibatches - len(norms)
    metrics["grad_norm"] = sum(norms) / len(norms) if norms else math.nan
    return metrics | {name: value / tokens for name, value in sums.items()}


def score(policy: Policy, role: str | None, samples, name: str, temperature: float) -> None:
    """Set samples' ref_logprobs or old_logprobs to their log-probabilities under `role`."""
    pairs = [(s.prompt, s.tokens) for s in samples]

    def work() -> None:
        """Again after an out-of-memory."""
        with policy.using(role), policy.inference():
            for members, values in policy.engine.logprobs(pairs, temperature):
                for i, logp in zip(members, values):
                    setattr(samples[i], name, logp)

    policy.retry_on_oom(work)


def backward(policy, role, samples, parameters, kl_coef, temperature) -> dict[str, float]:
    """The gradient of the summed token loss, one autograd graph at a time. Sums over tokens."""
    for parameter in parameters:
        parameter.grad = None
    pairs = [(s.prompt, s.tokens) for s in samples]
    sums = dict.fromkeys(("loss", "kl", "clipped", "entropy"), 0.0)
    # subtle: backward() may recompute layers, so the adapter stays active until it is done.
    with policy.using(role):
        for members, values in policy.engine.logprobs(pairs, temperature):
            batch = [samples[i] for i in members]
            logp = torch.cat(values)
            detached = logp.detach()
            old, ref = detached, detached
            if batch[0].old_logprobs is not None:
                old = torch.cat([s.old_logprobs for s in batch])
            if kl_coef:
                ref = torch.cat([s.ref_logprobs for s in batch])
            advantage = torch.cat([torch.full_like(v, s.advantage) for s, v in zip(batch, values)])
            loss, kl, clipped = token_loss(logp, old, ref, advantage, kl_coef)
            loss.sum().backward()
            for name, value in zip(sums, (loss, kl, clipped, -detached)):
                sums[name] += value.detach().float().sum().item()
    return sums


def apply_gradient(parameters, samples, optimizer) -> float:
    """Mean over tokens, clip, optimiser step unless non-finite. Returns the gradient norm."""
    # Divided here and not in the loss: a sum keeps fp16 gradients clear of underflow.
    tokens = sum(len(s.tokens) for s in samples)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= tokens
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
