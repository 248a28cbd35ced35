"""rl.py: the engine. One quantised base model, LoRA adapters swapped by role, sampling, GRPO.

It sees token ids and rewards, and nothing of constraints or turns (judge.py, seif.py). Messages
become ids in prompts/chat.py.

    LoRALinear    y = W x + (alpha / r) B A x, W frozen in 4 bits   (Hu et al. 2021, equation 3)
    PlainEngine   sample, log-probabilities, next-token probabilities, one prompt at a time
    Policy        the model, an adapter for each role, and an engine
    grpo_step     group advantages, clipped ratio, k3 KL            (Shao et al. 2024, equation 3)

The plain engine is the definition; extras/packing.py does the same three things several times
faster. Left out: value network, reward model, padding, merged weights, distributed training.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

# The ratio's clip, wider above 1 (DAPO's clip-higher, as in SEIF), and the largest gradient norm.
CLIP_LOW, CLIP_HIGH, MAX_GRAD_NORM = 0.2, 0.3, 1.0
# P(yes) + P(no) below this: the model is about to say something else, and there is no verdict.
MIN_VERDICT_MASS = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Stands in a completion for a token that could not be chosen.
NOT_A_TOKEN = -1
# What peft takes for a mixture's own, by its list of conversions.
EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# What reading a model's or an adapter's files may raise.
FAULTS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


class ModelError(ValueError):
    """A model, an adapter or a memory limit that the user can mend; the text says how."""


# ------------------------------------------------------------ LoRA
class LoRALinear(nn.Module):
    """A frozen linear layer plus the low-rank update of the role in use; None: the layer alone.

    A is (r, in) and B (out, r), fp32 masters cast to the activations' type, never the other way.
    All layers of a model share `use`, {"role": the role in use}.
    """

    def __init__(self, base: nn.Module, use: dict):
        super().__init__()
        self.base, self.use = base, use
        self.A, self.B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}
        # role -> both as the model's type, while nothing is trained (Policy.inference).
        self.cast: dict[str, tuple] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        y, role = self.base(x), self.use["role"]
        if role is None:
            return y
        A, B = self.cast.get(role) or (m[role].to(x.dtype) for m in (self.A, self.B))
        # The sum and B's product in one kernel, in y's place where nothing is trained: each would
        # else be another tensor of y's size.
        flat, down = y.flatten(0, -2), F.linear(x, A).flatten(0, -2)
        out = None if torch.is_grad_enabled() else flat
        return torch.addmm(flat, down, B.T, alpha=self.scale[role], out=out).view_as(y)


# ------------------------------------------------------------ the plain engine
def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Sample by inverting the cumulative distribution; temperature 0 takes the likeliest.

    NOT_A_TOKEN where the logits are no numbers.

    logits (B, V), uniform draws (B,) in (0, 1] -> token ids (B,)
    """
    if temperature == 0:
        largest, token = logits.max(-1)
        return token.masked_fill(largest.isnan(), NOT_A_TOKEN)
    upto = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # subtle: scaled by the last sum, which rounding leaves a hair off 1.
    target = uniform[:, None].double() * upto[:, -1:]
    token = torch.searchsorted(upto, target)[:, 0]
    return token.masked_fill(target[:, 0].isnan(), NOT_A_TOKEN)


class PlainEngine:
    """Sampling and scoring as anybody would write them: one prompt at a time."""

    def __init__(self, model, eos: set[int]):
        self.model, self.eos = model, eos

    @torch.no_grad()
    def sample(self, prompts: list, uniform: Tensor, temperature: float) -> list[list[list[int]]]:
        """n completions of each prompt, as token ids; what is past an EOS is noise.

        uniform (prompts, n, T): a draw in (0, 1] for each sample and position; T is the limit.
        """
        return [self._complete(p, u, temperature) for p, u in zip(prompts, uniform)]

    def _complete(self, prompt: list[int], uniform: Tensor, temperature: float) -> list[list[int]]:
        n, limit = uniform.shape
        ids, draws = torch.tensor([prompt] * n, device=self.model.device), iter(uniform.T)
        picked: list[Tensor] = []

        def choose(_, scores: Tensor) -> Tensor:
            """scores (n, V) -> the same, all but the picked token at -inf"""
            token = pick(scores.float(), next(draws).to(scores.device), temperature)
            chosen = token.clamp_min(0)[:, None]
            picked.append(token)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

        end = dict(eos_token_id=sorted(self.eos) or None, pad_token_id=min(self.eos, default=0))
        how = transformers.GenerationConfig(max_new_tokens=limit, **end)
        seen = torch.ones_like(ids)
        given = dict(attention_mask=seen, generation_config=how, logits_processor=[choose])
        self.model.generate(ids, **given)
        return torch.stack(picked, 1).tolist()

    def logprobs(self, pairs: list, temperature: float = 1.0) -> Iterator[tuple[list, list]]:
        """log p(completion token | all before it) of (prompt ids, completion ids) pairs.

        Yields (indices of pairs, their (len(completion),) tensors), a graph of its own each time:
        call backward before you ask for the next, and no two of them are held at once.
        """
        for i, (prompt, completion) in enumerate(pairs):
            ids = torch.tensor([prompt + completion], device=self.model.device)
            how = dict(logits_to_keep=len(completion) + 1, use_cache=False)
            # The logits at j are those of token j + 1: (T, V), without the last one's.
            logits = self.model(ids, **how).logits[0, -len(completion) - 1 : -1]
            logp = (logits.float() / temperature).log_softmax(-1)
            yield [i], [logp.gather(1, ids[0, len(prompt) :, None])[:, 0]]

    @torch.no_grad()
    def next_probabilities(self, prompts: list, tokens: list[int]) -> Tensor:
        """P(token | prompt) for the next token: (len(prompts), len(tokens)), fp32, on the CPU"""
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.model.device)
            logits = self.model(ids, logits_to_keep=1, use_cache=False).logits[0, -1]
            rows.append(logits.float().softmax(-1)[tokens].cpu())
        return torch.stack(rows) if rows else torch.empty(0, len(tokens))

    def use_less_memory(self) -> bool:
        """After an out-of-memory: give something up; False if there is nothing left to give."""
        return False


def decoder_layers(model) -> nn.ModuleList:
    """The list of the decoder's layers, whatever the architecture calls it."""
    for decoder in (model.get_decoder(), getattr(model, "model", nn.Module())):
        lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
        if lists:
            return max(lists, key=len)
    raise ModelError(f"{type(model).__name__} has no list of layers; this one is not supported")


def cut_at_eos(ids: list[int], eos: set[int]) -> list[int]:
    """Everything up to the first EOS, that one included."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return ids[: end + 1]


# ------------------------------------------------------------ the policy
@dataclass
class Sample:
    """One completion, from its prompt to its advantage."""

    prompt: list[int]
    tokens: list[int]
    # What the assistant's turn says, its given beginning included.
    text: str
    # By itself, with an EOS; if not, it was cut at the limit.
    ended: bool
    # What the roles make of the text (seif.py); the engine never looks.
    question: Any = None
    reason: str = ""
    answer: str = ""
    verdicts: list = field(default_factory=list)
    # None: nothing is known of it, it is left out of its group.
    reward: float | None = None
    advantage: float = 0.0
    # (T,) log-probabilities under the stage's start, and when sampled (None: as they are now).
    reference: Tensor | None = field(default=None, repr=False)
    old: Tensor | None = field(default=None, repr=False)


class Policy:
    """The base model with an adapter for each role; `using` picks the one that computes."""

    def __init__(self, model, tokenizer, name: str, rank: int, alpha: float):
        from prompts.chat import Chat

        self.model, self.name, self.rank, self.alpha = model, name, rank, alpha
        model.eval().requires_grad_(False)
        ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
        ends = {i for end in ends for i in (end if isinstance(end, list) else [end])} - {None}
        try:
            self.chat = Chat(tokenizer, ends)
        except ValueError as error:
            raise ModelError(f"--model {name}: {error}") from error
        # The checkpoint's own top_p, min_p, repetition_penalty must not reach our samples.
        model.generation_config = transformers.GenerationConfig()
        self.use: dict[str, str | None] = {"role": None}
        self.lora: dict[str, LoRALinear] = {}
        # Weights of the decoder's layers that LoRA leaves alone: name -> how many.
        self.left_out: dict[str, int] = {}
        self._wrap()
        self.engine = PlainEngine(model, self.chat.eos)

    def _wrap(self) -> None:
        """LoRA on every linear layer of the decoder's layers, but in mixtures of experts.

        subtle: where a model has any, peft takes an adapter of up_proj, wherever it is, for the
        experts' 3-D weights of that name. A mixture's place is left out in every layer.
        """
        layers = decoder_layers(self.model)
        start = next(n for n, m in self.model.named_modules() if m is layers)
        modules = list(layers.named_modules())
        mixtures = set()
        for name, module in modules:
            own = module.parameters(recurse=False)
            stacked = [p for p in own if p.dim() == 3 and min(p.shape) > 1]
            if stacked and not isinstance(module, nn.Conv1d):
                mixtures.add(re.sub(r"\d+", "*", name.rpartition(".")[0]) + ".")
                self.left_out[f"{start}.{name}"] = sum(p.numel() for p in stacked)
        for name, module in modules:
            if not isinstance(module, nn.Linear):
                continue
            # bitsandbytes would repack weights for a bf16 kernel of its own at the first call
            # without gradients: sampling and training would then disagree.
            module.support_avx512bf16_for_cpu = False
            sizes = module.in_features, module.out_features
            parent, _, leaf = name.rpartition(".")
            place = re.sub(r"\d+", "*", name)
            expert = leaf in EXPERT_LEAVES or place.startswith(tuple(mixtures))
            if (mixtures and expert) or min(sizes) < self.rank:
                self.left_out[f"{start}.{name}"] = math.prod(sizes)
                continue
            layer = self.lora[f"{start}.{name}"] = LoRALinear(module, self.use)
            setattr(layers.get_submodule(parent), leaf, layer)
        if not self.lora:
            kind = f"no Linear layer of at least --rank {self.rank} (GPT-2's are Conv1D)"
            raise ModelError(f"--model {self.name}: {kind}")

    def try_out(self) -> None:
        """A token sampled, one scored: what cannot is refused in a line. Says what LoRA leaves."""
        try:
            self.sample([[self.chat.USER]], 1, 2, 0.0)
            with torch.no_grad():
                list(self.engine.logprobs([([1, 2], [3])]))
        except ModelError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise ModelError(f"--model {self.name}: does not compute here ({reason})") from error
        adapted = sum(m.base.in_features * m.base.out_features for m in self.lora.values())
        share = 1 - adapted / (adapted + sum(self.left_out.values()))
        if round(share, 2):
            first = next(iter(self.left_out))
            print(f"  no LoRA on {share:.0%} of the layers' weights: {first} ...")

    @contextmanager
    def using(self, role: str | None):
        """`with policy.using(role):` computes with its adapter; None is the base model itself."""
        if role is not None and role not in next(iter(self.lora.values())).A:
            raise KeyError(f"no adapter {role!r}")
        before, self.use["role"] = self.use["role"], role
        try:
            yield self
        finally:
            self.use["role"] = before

    @contextmanager
    def inference(self):
        """No gradients: the adapter in use is cast once, not at each call of each layer."""
        role, dtype = self.use["role"], self.model.dtype
        try:
            with torch.no_grad():
                for layer in self.lora.values() if role else ():
                    layer.cast[role] = layer.A[role].to(dtype), layer.B[role].to(dtype)
                yield
        finally:
            for layer in self.lora.values():
                layer.cast.clear()

    def add(self, role: str, seed: int = 0, rank: int = 0) -> None:
        """A fresh adapter as peft makes it: A uniform (Kaiming, a = sqrt 5), B zero."""
        rank = rank or self.rank
        generator = torch.Generator().manual_seed(seed)
        for layer in self.lora.values():
            fan_in, fan_out = layer.base.in_features, layer.base.out_features
            a = (torch.rand(rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)
            layer.A[role] = nn.Parameter(a.to(self.model.device))
            layer.B[role] = nn.Parameter(torch.zeros(fan_out, rank, device=self.model.device))
            layer.scale[role] = self.alpha / rank

    def tensors(self, role: str) -> dict[str, nn.Parameter]:
        """The role's parameters under peft's names."""
        named = {}
        for name, layer in self.lora.items():
            named[f"base_model.model.{name}.lora_A.weight"] = layer.A[role]
            named[f"base_model.model.{name}.lora_B.weight"] = layer.B[role]
        return named

    def save(self, role: str, folder: str | Path) -> None:
        """Write the adapter; with extras/adapters.py as peft does, for peft, vLLM and lm-eval."""
        from prompts.messages import replace_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors(role).items()}
        if adapters := extra("adapters"):
            adapters.write_config(self, role, Path(folder))
        # Last, and renamed when whole: a folder with this file in it is an adapter.
        replace_file(Path(folder) / "adapter_model.safetensors", save(tensors, {"format": "pt"}))

    def load_adapter(self, role: str, folder: str | Path) -> None:
        """Read an adapter, ours or peft's; ModelError if it computes something else than LoRA.

        Layers that it leaves out begin with B = 0.
        """
        adapters, config = extra("adapters"), Path(folder) / "adapter_config.json"
        if config.exists() and not adapters:
            raise ModelError(f"{config}: peft's settings are read by extras/adapters.py alone")
        try:
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
            ranks = [len(t) for name, t in tensors.items() if name.endswith("lora_A.weight")]
            self.add(role, rank=max(ranks, default=0))
            own = self.tensors(role)
            if tensors.keys() - own.keys():
                raise ValueError(f"no layer for {min(tensors.keys() - own.keys())}")
            for name, tensor in tensors.items():
                own[name].data.copy_(tensor)
            scales = adapters.read_scales(self, config) if adapters else {}
            for name, scale in scales.items():
                self.lora[name].scale[role] = scale
        except FAULTS as error:
            raise ModelError(f"{folder}: not a LoRA adapter of {self.name} ({error})") from error

    def sample(self, messages: list, n: int, max_new_tokens: int, temperature=1.0) -> list[list]:
        """n Samples of each list of chat messages, by the role in use; temperature 0 is greedy."""
        prompts = [self.chat.encode(m) for m in messages]
        # A draw for each sample and position: how many run side by side changes rounding alone.
        uniform = 1 - torch.rand(len(prompts), n, max_new_tokens)
        work = lambda: self.engine.sample(prompts, uniform, temperature) if prompts else []
        done, groups = self.with_memory(work, inference=True), []
        for asked, prompt, completions in zip(messages, prompts, done):
            opening = asked[-1]["content"] if asked[-1]["role"] == "assistant" else ""
            completions = [cut_at_eos(ids, self.chat.eos) for ids in completions]
            if any(NOT_A_TOKEN in ids for ids in completions):
                mend = "lower --lr, or take a card with bf16, if this is fp16"
                raise ModelError(f"the model's logits are no numbers any more; {mend}")
            # Decoded after their prompt: some tokenizers drop the space that a text begins with.
            begun = len(self.chat.decode(prompt))
            texts = [opening + self.chat.decode(prompt + ids)[begun:] for ids in completions]
            ended = [ids[-1] in self.chat.eos for ids in completions]
            groups.append([Sample(prompt, *one) for one in zip(completions, texts, ended)])
        return groups

    def yes_probability(self, messages: list[list[dict]]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) as the answer's first token, by the role in use, one prefill.

        nan where the model is about to say neither: a missing verdict, which is not a "no".
        """
        prompts = [self.chat.encode(m) for m in messages]
        yes, no = self.chat.verdict_tokens
        work = lambda: self.engine.next_probabilities(prompts, yes + no)
        probabilities = self.with_memory(work, inference=True)
        p_yes, p_no = (p.sum(1) for p in probabilities.split([len(yes), len(no)], 1))
        known = p_yes + p_no > MIN_VERDICT_MASS
        return torch.where(known, p_yes / (p_yes + p_no), math.nan).tolist()

    def with_memory(self, work: Callable, inference: bool = False, again: bool = True):
        """work(), again with less memory each time that the GPU runs out of it."""
        while True:
            try:
                with self.inference() if inference else nullcontext():
                    return work()
            except torch.OutOfMemoryError as error:
                if not again or not self.engine.use_less_memory():
                    mend = "a smaller --model, a lower --max-new-tokens or --batch, shorter seeds"
                    raise ModelError(f"out of GPU memory ({error}); take {mend}") from error
            # Here, since the exception held what the failed attempt had allocated.
            torch.cuda.empty_cache()


def fast_dtype(cuda: bool) -> str:
    """bf16 where it multiplies in it (a CPU: AVX512 or AMX), else fp16 on a GPU, fp32 on a CPU."""
    if cuda:
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def load(
    model: str, bits=4, device=None, rank=16, alpha=32.0, engine="packed", dtype="auto", **limits
) -> Policy:
    """Load a causal language model, a Hugging Face id or a folder; ModelError if it won't do.

    bits 4: nf4, double quantisation (Dettmers et al. 2023), 16: none; device: None is the GPU, if
    any; LoRA's masters (rank, alpha) are fp32 in any dtype; limits: the packed engine's.
    """
    cpu, packing = (extra(name) for name in ("cpu", "packing"))
    if (Path(model) / "adapter_config.json").exists():
        mend = "give its base model, and this folder as --init-follower"
        raise ModelError(f"--model {model}: a LoRA adapter; {mend}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[fast_dtype(device.type == "cuda") if dtype == "auto" else dtype]
    # Never a pickle, nor a model's own code.
    how = dict(dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False)
    if bits == 4:
        nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        nf4 |= dict(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
        how["quantization_config"] = transformers.BitsAndBytesConfig(**nf4)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        kind = type(transformers.AutoConfig.from_pretrained(model, trust_remote_code=False))
        auto = transformers.AutoModelForCausalLM
        if kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            auto = transformers.AutoModelForImageTextToText
        base, about = auto.from_pretrained(model, output_loading_info=True, **how)
    except (*FAULTS, ImportError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        text = f"--model {model}: cannot be loaded as a causal language model ({reason})"
        raise ModelError(text) from error
    if not tokenizer.chat_template:
        raise ModelError(f"--model {model}: no chat template; take an instruction-tuned model")
    check_weights(base, about, model)
    if cpu and device.type == "cpu":
        cpu.unpack(base)
    policy = Policy(base, tokenizer, model, rank, alpha)
    policy.try_out()
    if engine == "packed" and not packing:
        print("  plain engine, slower: extras/packing.py is not here")
    elif engine == "packed":
        layers, eos = decoder_layers(base), policy.chat.eos
        policy.engine = packing.PackedEngine.of(base, layers, eos, **limits) or policy.engine
    return policy


def check_weights(base, about: dict, model: str) -> None:
    """ModelError where the files of a model, `about` their loading, are not its weights."""
    modules = dict(base.named_modules())
    if about["missing_keys"]:
        name = min(about["missing_keys"])
        raise ModelError(f"--model {model}: its files lack {name}, which would stay random")
    for name in sorted(about["unexpected_keys"]):
        if isinstance(modules.get(name.rpartition(".")[0]), nn.Linear):
            raise ModelError(f"--model {model}: {name} beside the layer's weight is read by nobody")
    for name, module in modules.items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            sizes = f"{tuple(state.shape)}, not as config.json says"
            raise ModelError(f"--model {model}: {name} has the shape {sizes}")


def extra(name: str):
    """extras/<name>.py, or None where extras/ has been deleted."""
    try:
        return __import__(f"extras.{name}", fromlist=[name])
    except ModuleNotFoundError as error:
        if error.name not in ("extras", f"extras.{name}"):
            raise
        return None


# ------------------------------------------------------------ GRPO
def advantages(rewards: list[float]) -> list[float]:
    """(R - mean) / (std + 1e-6) within a group, population std; all zero where rewards tie."""
    r = np.asarray(rewards, dtype=np.float64)
    if len(r) == 0 or np.ptp(r) < 1e-9:
        return [0.0] * len(r)
    return ((r - r.mean()) / (r.std() + 1e-6)).tolist()


def with_advantages(groups: list[list[Sample]]) -> list[list[Sample]]:
    """The groups that carry a gradient: samples without a reward left out, tied groups dropped."""
    kept = []
    for group in groups:
        known = [s for s in group if s.reward is not None]
        values = advantages([s.reward for s in known])
        for sample, value in zip(known, values):
            sample.advantage = value
        if any(values):
            kept.append(known)
    return kept


def token_loss(logp, old, reference, advantage, kl_weight) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's loss per token (Shao et al. 2024, equation 3): (loss, kl, clipped), each (T,).

    With one update per rollout `old` is `logp` itself, detached: the ratio is 1, its gradient the
    policy gradient, and the loss prints as about 0 while the model learns. Watch the gradient norm.
    """
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    # Schulman's k3 estimate of the KL (equation 4), clamped: no one token's accident makes e^50.
    d = (reference - logp).clamp(-10, 10)
    kl = d.exp() - d - 1
    return kl_weight * kl - gain, kl.detach(), (clipped * advantage < ratio * advantage).detach()


def grpo_step(policy: Policy, role: str, reference: str | None, groups, optimizer, cfg) -> dict:
    """Update `role` on one rollout, groups of rewarded samples; `reference` is what KL holds it to.

    cfg has temperature, updates and kl. The loss is the mean over all tokens of an update. With
    cfg.updates > 1 the groups are split into that many minibatches, an optimiser step each, and
    the old log-probabilities are computed first, by the code that computes the new ones: the
    sampler's differ in the last digits. Returns metrics; "skipped" counts updates that a
    non-finite gradient voided.
    """
    kept = with_advantages(groups)
    metrics = {"tied": 1 - len(kept) / max(1, len(groups)), "updates": 0, "skipped": 0}
    if not kept:
        return metrics
    updates = min(cfg.updates, len(kept))
    everyone = [s for group in kept for s in group]
    if cfg.kl:
        policy.with_memory(lambda: score(policy, reference, everyone, "reference", cfg.temperature))
    if updates > 1:
        policy.with_memory(lambda: score(policy, role, everyone, "old", cfg.temperature))
    parameters = list(policy.tensors(role).values())
    sums, norms = dict.fromkeys(("loss", "kl", "clipped", "entropy"), 0.0), []
    for k in range(updates):
        samples = [s for group in kept[k::updates] for s in group]
        parts = policy.with_memory(lambda s=samples: backward(policy, role, s, parameters, cfg))
        size = sum(len(s.tokens) for s in samples)
        # Divided here and not in the loss: a sum keeps fp16 gradients clear of underflow.
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= size
        clip = lambda: nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
        norm = policy.with_memory(clip, again=False)
        if math.isfinite(norm):
            policy.with_memory(optimizer.step, again=False)
            norms.append(norm)
        optimizer.zero_grad(set_to_none=True)
        sums = {name: value + parts[name] for name, value in sums.items()}
    tokens = sum(len(s.tokens) for s in everyone)
    metrics |= {"updates": len(norms), "skipped": updates - len(norms), "tokens_trained": tokens}
    metrics |= {name: value / tokens for name, value in sums.items() if name != "kl" or cfg.kl}
    return metrics | {"grad_norm": sum(norms) / len(norms) if norms else math.nan}


def score(policy: Policy, role: str | None, samples, field: str, temperature: float) -> None:
    """Fill a field of the samples with their log-probabilities under `role`."""
    pairs = [(s.prompt, s.tokens) for s in samples]
    with policy.using(role), policy.inference():
        for members, values in policy.engine.logprobs(pairs, temperature):
            for i, logp in zip(members, values):
                setattr(samples[i], field, logp)


def backward(policy: Policy, role: str, samples, parameters, cfg) -> dict[str, float]:
    """The gradient of the summed token loss, a graph at a time. Returns sums over tokens."""
    for parameter in parameters:
        parameter.grad = None
    pairs = [(s.prompt, s.tokens) for s in samples]
    sums = dict.fromkeys(("loss", "kl", "clipped", "entropy"), 0.0)
    # subtle: the backward pass may recompute layers, so the role stays in use until it is done.
    with policy.using(role):
        for members, values in policy.engine.logprobs(pairs, cfg.temperature):
            batch, logp = [samples[i] for i in members], torch.cat(values)
            now = logp.detach()
            old = now if batch[0].old is None else torch.cat([s.old for s in batch])
            reference = torch.cat([s.reference for s in batch]) if cfg.kl else now
            spread = [torch.full_like(v, s.advantage) for s, v in zip(batch, values)]
            loss, kl, clipped = token_loss(logp, old, reference, torch.cat(spread), cfg.kl)
            loss.sum().backward()
            for name, value in zip(sums, (loss, kl, clipped, -now)):
                sums[name] += value.detach().float().sum().item()
    return sums
