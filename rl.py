"""rl.py: the engine. One quantised base model, LoRA adapters swapped by role, sampling, log-probabilities, GRPO.

It knows token ids and rewards and nothing of instructions, constraints or turns (see judge.py and seif.py).

What is written by hand here, because it is the point of the project:
  LoRALinear      y = W x + (alpha / r) B A x, W frozen in 4 bits           (Hu et al. 2021, equation 3)
  Policy          roles, prompts, sampling, log-probabilities, one-pass verdicts
  grpo_step       one GRPO step: group advantages, clipped ratio, k3 KL     (Shao et al. 2024, equation 3)

That a batch's shared tokens are computed once, and no full logits are held, is packing.py's work.

What is left out: value network, reward model, padding, full-vocabulary logits, merged weights, distributed training.
"""

import ctypes
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from data import UserError, replace_file
from packing import HEAD_CHUNK, Row, RowCache, Sampler, TokenLogProb, common_prefix, cut_at_eos, one_by_one, pack

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIN_BUDGET = 128  # tokens a row; halving stops here
YES, NO = ("yes", "Yes", " yes", " Yes", "YES"), ("no", "No", " no", " No", "NO")
CPU_ACTIVATION_MIB = 64  # kept for the backward pass without a GPU, where fresh memory costs almost what it saves
FEW_TOKENS = 64  # up to here MKL multiplies a tall matrix by a narrow one faster than the other way round
CPU_UNPACK_MIB = 1024  # 4-bit weights whose fp32 values take no more are held unpacked on the CPU
MIN_VERDICT_MASS = 1e-3  # P(yes) + P(no) below this: the model is not answering the question, no verdict

# Large pages for tensors on the CPU, where most of the time that is not arithmetic goes into fresh 4 KiB pages. Read by
# torch at its first allocation, ignored where the system has none.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def trim() -> None:
    """Give freed memory back to the system, between sampling and updating, where glibc is the C library.

    It keeps what was freed in pieces, of which tensors of other shapes use little: both phases' peaks would add up.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


# ---------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """A frozen linear layer plus one low-rank update per role; `role` says which one is added, None for none.

    A is (r, in) and B is (out, r), both fp32 masters, cast to the activations' type (never the other way round).
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.role = base, None
        self.A, self.B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}
        self.unpacked: Tensor | None = None  # the 4-bit weight's values, see Policy._unpack

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). With no role the output is the base layer's, bit for bit; to rounding where `_few` is it."""
        if self.unpacked is not None and x.shape[:-1].numel() <= FEW_TOKENS:
            return self._few(x)
        y = self.base(x) if self.unpacked is None else F.linear(x, self.unpacked, self.base.bias)
        if self.role is None:
            return y
        a, b = self.A[self.role].to(x.dtype), self.B[self.role].to(x.dtype)
        # One kernel: the sum and B's share of it would each be another tensor of y's size.
        down = F.linear(x, a).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), down, b.T, alpha=self.scale[self.role]).view_as(y)

    def _few(self, x: Tensor) -> Tensor:
        """The same as (W x^T + B A x^T)^T: for a sampling step's few tokens MKL is a third faster this way round."""
        columns = x.flatten(0, -2).T
        y = self.unpacked @ columns
        if self.base.bias is not None:
            y += self.base.bias[:, None]
        if self.role is not None:
            y = torch.addmm(y, self.B[self.role], self.A[self.role] @ columns, alpha=self.scale[self.role])
        return y.T.contiguous().unflatten(0, x.shape[:-1])  # flash attention wants a contiguous last dimension


# ---------------------------------------------------------------- the policy: base model + adapters


def load(model: str, bits: int = 4, device: str | None = None, **options) -> "Policy":
    """Load a causal language model (Hugging Face id or local folder) with a chat template.

    bits 4 is nf4 with double quantisation (Dettmers et al. 2023), bits 16 is the compute type: bf16 where the GPU has
    it, fp16 where not, fp32 on the CPU. `options` go to Policy. Raises UserError with the mend.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32
    if device.type == "cuda":
        # Compute capability 8 has bf16 units; on older cards bf16 "works", by slow emulation.
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    quantisation = None
    if bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    elif bits != 16:
        raise UserError(f"--bits {bits}: only 4 (nf4) and 16 (no quantisation) exist")
    try:
        AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            quantization_config=quantisation,
            device_map={"": device},
            attn_implementation="packed_sdpa",
            use_safetensors=True,  # never a pickle
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--model {model}: cannot be loaded as a causal language model ({reason})") from error
    if not tokenizer.chat_template:
        raise UserError(f"--model {model}: its tokenizer has no chat template; take an instruction-tuned model")
    return Policy(base, tokenizer, name=model, **options)


class Policy:
    """The base model with its adapters. `use(role)` picks the adapter that every later call computes with."""

    def __init__(self, model, tokenizer, name="", rank=16, alpha=32, token_budget=2048, slots=0, activation_mib=0):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.device, self.dtype = model.device, model.dtype
        self.rank, self.alpha, self.token_budget, self.slots = rank, alpha, token_budget, slots
        self.activation_mib = activation_mib
        self.by_runs = (
            self.device.type == "cpu"
        )  # attention run by run; on a GPU one large kernel beats many small ones
        self.role: str | None = None
        self.lora: dict[str, LoRALinear] = {}
        self.model.config.use_cache = False
        eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos]) - {None}
        self._wrap()
        if self.device.type == "cpu":
            self._unpack()
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._special = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._no_system = not self._template_takes_system()
        self._verdict_ids = [self._single_tokens(words) for words in (YES, NO)]
        names = inspect.signature(model.base_model.forward).parameters
        self.cache_argument = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24
        self._recomputed = 0  # how many of the last layers drop their activations, see _forward
        for i, layer in enumerate(model.base_model.layers):
            layer.forward = self._recomputing(layer.forward, len(model.base_model.layers) - i)
        self.packs = self._can_pack()

    def _wrap(self) -> None:
        for name, module in list(self.model.named_modules()):
            if name.rsplit(".", 1)[-1] in PROJECTIONS and hasattr(module, "in_features"):
                # bitsandbytes would repack weights for a bf16-only CPU kernel at the first call without gradients:
                # sampling and training would then disagree.
                module.support_avx512bf16_for_cpu = False
                parent, _, leaf = name.rpartition(".")
                self.lora[name] = LoRALinear(module)
                setattr(self.model.get_submodule(parent), leaf, self.lora[name])
        if not self.lora:
            raise UserError(f"--model {self.name}: has none of the layers {', '.join(PROJECTIONS)}")

    def _unpack(self) -> None:
        """On the CPU bitsandbytes unpacks each weight at each call, 40 % of a sampling step: do it once, if it fits.

        The values are the same to the bit.
        """
        packed = [layer for layer in self.lora.values() if getattr(layer.base.weight, "quant_state", None) is not None]
        if packed and sum(m.base.in_features * m.base.out_features for m in packed) * 4 <= CPU_UNPACK_MIB * 2**20:
            from bitsandbytes.functional import dequantize_4bit  # here, for it talks when imported

            for layer in packed:
                weight = layer.base.weight
                layer.unpacked = dequantize_4bit(weight.data, weight.quant_state).to(self.dtype)

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Packing is exact for plain causal attention only; anything else (windows, recurrence) goes row by row."""
        config, sequences = (
            self.model.config,
            [[5, 6, 7, 8], [5, 6, 9, 8]],
        )  # two branches, which must not see each other
        exact = [self.model(torch.tensor([s], device=self.device)).logits[0].float() for s in sequences]
        tolerance = 1e-2 if self.dtype == torch.float32 else 1.0

        def agrees(rows) -> bool:
            """Whether our forward over these rows gives the model's own logits."""
            logits = ((row, self._head(self._forward(row))) for row in rows)
            pairs = [(out[path], exact[i]) for row, out in logits for path, i in zip(row.paths, row.members)]
            return all((ours - theirs).abs().max().item() < tolerance for ours, theirs in pairs)

        if not agrees(one_by_one(sequences)):
            raise UserError(
                f"--model {self.name}: its logits are not its head's output alone; this architecture cannot be used"
            )
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        return not window and layers == {"full_attention"} and agrees(pack(sequences, MIN_BUDGET))

    # ------------------------------------------------ adapters

    @property
    def roles(self) -> list[str]:
        """Names of the adapters held."""
        return list(next(iter(self.lora.values())).A)

    def use(self, role: str | None) -> None:
        """Compute with this role's adapter from now on; None is the base model itself."""
        if role is not None and role not in self.roles:
            raise KeyError(f"no adapter {role!r}; there are {self.roles}")
        self.role = role
        for layer in self.lora.values():
            layer.role = role

    @contextmanager
    def using(self, role: str | None):
        """`with policy.using(role):` restores the role before it."""
        before = self.role
        self.use(role)
        try:
            yield self
        finally:
            self.use(before)

    def add(self, role: str, seed: int = 0, rank: int | None = None, alpha: float | None = None) -> None:
        """A fresh adapter: A uniform as in PEFT (Kaiming, a = sqrt 5), B zero, so that it starts as the base model."""
        rank, alpha = rank or self.rank, alpha or self.alpha
        generator = torch.Generator().manual_seed(seed)
        for layer in self.lora.values():
            fan_in, fan_out = layer.base.in_features, layer.base.out_features
            a = (torch.rand(rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)
            layer.A[role] = nn.Parameter(a.to(self.device))
            layer.B[role] = nn.Parameter(torch.zeros(fan_out, rank, device=self.device))
            layer.scale[role] = alpha / rank

    def tensors(self, role: str) -> dict[str, nn.Parameter]:
        """The role's parameters under PEFT's names."""
        named = {}
        for name, layer in self.lora.items():
            named[f"base_model.model.{name}.lora_A.weight"] = layer.A[role]
            named[f"base_model.model.{name}.lora_B.weight"] = layer.B[role]
        return named

    def save(self, role: str, folder: str | Path) -> None:
        """Write the adapter as PEFT does, so that peft, vLLM and lm-eval load it as it is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layer = next(iter(self.lora.values()))
        rank = len(layer.A[role])
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.name,
            "r": rank,
            "lora_alpha": layer.scale[role] * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in self.lora}),
        }
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors(role).items()}
        replace_file(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
        replace_file(folder / "adapter_config.json", lambda path: path.write_text(json.dumps(config, indent=2)))

    def load_adapter(self, role: str, folder: str | Path) -> None:
        """Read an adapter that `save` or peft wrote. Raises UserError if it does not fit this model."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            self.add(role, rank=config["r"], alpha=config["lora_alpha"])
            own = self.tensors(role)
            if own.keys() != tensors.keys():
                name = sorted(own.keys() ^ tensors.keys())[0]
                raise ValueError(f"{name} is on one side only; all seven projections are needed, and nothing else")
            for name, parameter in own.items():
                parameter.data.copy_(tensors[name])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: not a LoRA adapter of {self.name} ({error})") from error

    # ------------------------------------------------ text and ids

    def _template_takes_system(self) -> bool:
        try:
            self._render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
            return True
        except Exception:  # jinja2 raises its own type, which we would import for this line alone
            return False

    def _render(self, messages: list[dict]) -> str:
        # enable_thinking: Qwen3's switch; templates without it ignore it. Our own think format is in the prompt.
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def _single_tokens(self, words: tuple[str, ...]) -> list[int]:
        ids = (self.tokenizer.encode(word, add_special_tokens=False) for word in words)
        return sorted({i[0] for i in ids if len(i) == 1})

    def encode(self, messages: list[dict], opening: str = "") -> list[int]:
        """Chat messages -> prompt ids, the assistant's turn begun with `opening`.

        Special tokens inside a message's content reach the model as plain text, never as control tokens.
        """
        if self._no_system and messages[0]["role"] == "system":
            first = messages[0]["content"] + "\n\n" + messages[1]["content"]
            messages = [{"role": messages[1]["role"], "content": first}, *messages[2:]]
        if not any(self._special.search(m["content"]) for m in messages):
            ids = self.tokenizer.encode(self._render(messages), add_special_tokens=False)
        else:
            marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # private-use characters: in no real text
            text = self._render([m | {"content": mark} for m, mark in zip(messages, marks)])
            ids = []
            for part in re.split("(\ue000\\d+\ue001)", text):
                plain = part in marks
                content = messages[marks.index(part)]["content"] if plain else part
                ids += self.tokenizer.encode(content, add_special_tokens=False, split_special_tokens=plain)
        return ids + self.encode_text(opening)

    def encode_text(self, text: str) -> list[int]:
        """Text to be appended to a prompt -> ids."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, completion: list[int]) -> str:
        """Completion ids -> text, without special tokens."""
        return self.tokenizer.decode(completion, skip_special_tokens=True)

    def ended(self, completion: list[int]) -> bool:
        """Whether the model ended it by itself; if not, it was cut at the token limit."""
        return bool(completion) and completion[-1] in self.eos

    # ------------------------------------------------ forward passes

    def _forward(self, row: Row, cache: RowCache | None = None) -> Tensor:
        """A packed row -> hidden states (L, d)."""
        self._recomputed = self._layers_to_recompute(len(row.tokens)) if torch.is_grad_enabled() else 0
        ids, depth = (torch.from_numpy(x).to(self.device)[None] for x in (row.tokens, row.depth))
        cached = {self.cache_argument: cache, "use_cache": cache is not None}
        out = self.model.base_model(input_ids=ids, position_ids=depth, **cached, **self._masks(row))
        return out.last_hidden_state[0]

    def _masks(self, row: Row) -> dict:
        """What tells the model's attention who sees whom: one mask, and on the CPU the runs, each with its own."""
        if row.mask is None:
            return {}
        # Additive, in the model's type: given booleans, sdpa would convert and keep a copy of its own in each layer.
        mask = torch.zeros(row.mask.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(~torch.from_numpy(row.mask).to(self.device), -torch.inf)[None, None]
        if not self.by_runs:
            return {"attention_mask": mask}
        runs, prefix = [], row.mask.shape[1] - row.mask.shape[0]
        for start, end, before in row.runs:
            columns = torch.from_numpy(np.concatenate([before, prefix + np.arange(start, end)]))
            if int(columns[-1]) == len(columns) - 1:
                columns = slice(0, len(columns))  # no copy needed
            # Nothing before it: plain causal attention, which skips what a mask would hide.
            runs.append((start, end, columns, mask[:, :, start:end, columns].contiguous() if len(before) else None))
        return {"attention_mask": mask, "runs": runs}

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden).float()

    def rows(self, sequences: list[list[int]], prefix: int = 0) -> Iterator[Row]:
        """Sequences -> packed rows within the token budget, or one sequence a row where packing is not exact."""
        return pack(sequences, self.token_budget, prefix) if self.packs else one_by_one(sequences)

    @torch.no_grad()
    def _prefill(self, prompts: list[list[int]]) -> Iterator[tuple[Row, RowCache, int, Tensor]]:
        """What all prompts share is computed once, then row by row the rest: (row, cache, prefix length, hidden)."""
        shared, cache = 0, None
        if self.packs and len(prompts) > 1:
            first, last = (np.asarray(f(prompts)) for f in (min, max))
            shared = min(common_prefix(first, last), min(map(len, prompts)) - 1)
        if shared:
            cache = RowCache()
            self._forward(next(pack([prompts[0][:shared]], self.token_budget)), cache)
        for row in self.rows(prompts, shared):
            own = RowCache(cache) if self.packs else None
            yield row, own, shared, self._forward(row, own)

    def row_logprobs(self, row: Row, pairs: list[tuple], temperature: float = 1.0) -> list[Tensor]:
        """Log-probabilities of a packed row's completions, in the order of row.members."""
        hidden = self._forward(row)
        # The token at path position j predicts the one at j + 1: completions start at the prompt's last token.
        spans = [slice(len(pairs[i][0]) - 1, len(pairs[i][0]) - 1 + len(pairs[i][1])) for i in row.members]
        nodes = np.concatenate([path[span] for path, span in zip(row.paths, spans)])
        targets = [t for i in row.members for t in pairs[i][1]]
        head = self.model.get_output_embeddings()
        flat = TokenLogProb.apply(
            hidden[torch.from_numpy(nodes).to(self.device)],
            head.weight,
            getattr(head, "bias", None),
            torch.tensor(targets, dtype=torch.long, device=self.device),
            temperature,
        )
        return list(flat.split([len(pairs[i][1]) for i in row.members]))

    def logprobs(self, pairs: list[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """(prompt ids, completion ids) pairs -> per pair (len(completion),) log-probabilities, differentiable.

        Memory grows with all rows when gradients are on; grpo_step therefore goes row by row.
        """
        out: list[Tensor] = [torch.empty(0)] * len(pairs)
        for row in self.rows([p + c[:-1] for p, c in pairs]):
            for i, values in zip(row.members, self.row_logprobs(row, pairs, temperature)):
                out[i] = values
        return out

    @torch.no_grad()
    def yes_probability(self, prompts: list[list[int]]) -> list[float]:
        """One prefill a prompt, shared prefixes once: P(yes) / (P(yes) + P(no)) as next token.

        nan where the model is about to say neither: a missing verdict, which is not a "no".
        """
        out = [math.nan] * len(prompts)
        for row, _, _, hidden in self._prefill(prompts):
            last = torch.tensor([int(path[-1]) for path in row.paths], device=self.device)
            chunk = max(1, HEAD_CHUNK // self.model.config.vocab_size)
            probs = [self._head(h).softmax(-1) for h in hidden[last].split(chunk)]
            yes, no = (torch.cat([p[:, ids].sum(-1) for p in probs]).tolist() for ids in self._verdict_ids)
            for i, y, n in zip(row.members, yes, no):
                out[i] = y / (y + n) if y + n > MIN_VERDICT_MASS else math.nan
        return out

    def _recomputing(self, forward, place: int):
        """A layer's forward that keeps no activations when `place`, counted from the last layer, says so."""

        def run(*args, **kwargs):
            """Takes the layer's place."""
            if place <= self._recomputed:
                return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return forward(*args, **kwargs)

        return run

    def _layers_to_recompute(self, tokens: int) -> int:
        """How many layers must drop their activations so that a row of so many tokens stays within the limit."""
        config = self.model.config
        limit = self.activation_mib or CPU_ACTIVATION_MIB
        if self.device.type == "cuda" and not self.activation_mib:
            limit = 0.5 * torch.cuda.mem_get_info(self.device)[0] / 2**20
        # Kept per token and layer, in vectors of the hidden and of the inner size (counted on a Llama by saved-tensor hooks).
        mib = tokens * (9 * config.hidden_size + 4 * config.intermediate_size) * self.dtype.itemsize / 2**20
        layers = config.num_hidden_layers
        return layers - min(layers, int(limit / mib))

    # ------------------------------------------------ sampling

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n: int, max_new_tokens: int | list[int], temperature: float = 1.0, on_done=None
    ) -> list[list[list[int]]]:
        """n samples per prompt, as token ids; an EOS that was sampled is kept. Temperature 0 is greedy.

        max_new_tokens may be a list, a limit for each of the len(prompts) * n samples. Draws come from torch's global
        generator, one per sample and position, so that only rounding depends on how many samples run side by side.
        on_done() is called as each sample finishes.
        """
        total = len(prompts) * n
        limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * total
        if not total:
            return []
        trim()
        if self.packs:
            sampler = Sampler(self, prompts, n, limits, temperature)
            while sampler.active:
                for _ in range(sampler.look):
                    sampler.step()
                for _ in range(sampler.retire()):
                    if on_done:
                        on_done()
            raw = sampler.out.tolist()
        else:
            raw = [ids for p in prompts for ids in self._generate_plain(p, n, max(limits), temperature, on_done)]
        samples = [cut_at_eos(ids[:limit], self.eos) for ids, limit in zip(raw, limits)]
        return [samples[i : i + n] for i in range(0, total, n)]

    def _generate_plain(self, prompt, n, max_new_tokens, temperature, on_done) -> list[list[int]]:
        """For models that cannot be packed: transformers' own sampler, one prompt at a time."""
        ids = torch.tensor([prompt] * n, device=self.device)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=min(self.eos, default=0),
            **(how or {"do_sample": False}),
        )
        for _ in range(n if on_done else 0):
            on_done()
        return [row[len(prompt) :] for row in out.tolist()]


# ---------------------------------------------------------------- GRPO


@dataclass
class Episode:
    """One sampled completion and what became of it."""

    prompt: list[int]
    completion: list[int]
    group: int  # episodes of one prompt share it
    reward: float | None  # None: no verdict could be had, the episode is left out of its group
    advantage: float = 0.0
    old: Tensor | None = field(default=None, repr=False)  # log-probs at sampling time; None: this is the only update


def advantages(rewards: list[float]) -> list[float]:
    """Group-relative advantages (R - mean) / (std + 1e-6), population std; all zero where the rewards tie."""
    r = np.asarray(rewards, dtype=np.float64)
    if len(r) == 0 or np.ptp(r) < 1e-9:
        return [0.0] * len(r)
    return ((r - r.mean()) / (r.std() + 1e-6)).tolist()


def set_advantages(episodes: list[Episode]) -> list[Episode]:
    """Fill in the advantages group by group; returns the episodes that carry a gradient (groups that do not tie)."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        if episode.reward is not None:
            groups.setdefault(episode.group, []).append(episode)
    kept = []
    for group in groups.values():
        values = advantages([e.reward for e in group])
        for episode, value in zip(group, values):
            episode.advantage = value
        kept += group if any(values) else []
    return kept


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token (Shao et al. 2024, equation 4):
    exp(d) - d - 1 with d = log reference - log policy."""
    d = (reference - logp).clamp(-10, 10)  # one token's accident must not become e^50
    return d.exp() - d - 1


def token_loss(logp, old, reference, advantage, clip_low, clip_high, kl_coef) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's loss per token (Shao et al. 2024, equation 3, with separate clips): (loss, kl, clipped), each (T,).

    With one update per rollout `old` is `logp` itself, detached: the ratio is 1 and its gradient the policy gradient,
    so the loss prints as about 0 while the model learns; watch the gradient norm instead.
    """
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    kl = k3(logp, reference)
    return kl_coef * kl - gain, kl.detach(), (clipped * advantage < ratio * advantage).detach()


def _backward(policy: Policy, role: str, reference: str | None, episodes: list[Episode], cfg) -> dict[str, float]:
    """Accumulate the gradient of the summed token loss, one packed row at a time. Returns sums over tokens."""
    pairs = [(e.prompt, e.completion) for e in episodes]
    sums = {"loss": 0.0, "kl": 0.0, "clipped": 0.0, "entropy": 0.0}
    for row in policy.rows([p + c[:-1] for p, c in pairs]):
        members = [episodes[i] for i in row.members]
        with torch.no_grad(), policy.using(reference):
            ref = torch.cat(policy.row_logprobs(row, pairs, cfg.temperature)) if cfg.kl else None
        # The backward pass may recompute layers: the role must stay in use until it is done.
        with policy.using(role):
            logp = torch.cat(policy.row_logprobs(row, pairs, cfg.temperature))
            old = logp.detach() if members[0].old is None else torch.cat([e.old for e in members])
            advantage = torch.cat([torch.full((len(e.completion),), e.advantage) for e in members]).to(logp.device)
            ref = logp.detach() if ref is None else ref
            loss, kl, clipped = token_loss(logp, old, ref, advantage, cfg.clip_low, cfg.clip_high, cfg.kl)
            loss.sum().backward()
        for name, values in (("loss", loss), ("kl", kl), ("clipped", clipped), ("entropy", -logp)):
            sums[name] += values.detach().float().sum().item()
    return sums


def _gradient(policy, role, reference, episodes, cfg, parameters) -> dict[str, float]:
    """_backward, again with half the token budget whenever the GPU runs out of memory."""
    while True:
        for parameter in parameters:
            parameter.grad = None
        try:
            return _backward(policy, role, reference, episodes, cfg)
        except torch.OutOfMemoryError as error:
            longest = max(len(e.prompt) + len(e.completion) for e in episodes)
            if policy.token_budget <= MIN_BUDGET:
                raise UserError(
                    f"out of GPU memory on one sequence of {longest} tokens: take a smaller --model, "
                    "a lower --max-new-tokens, or shorter seeds"
                ) from error
            policy.token_budget = max(MIN_BUDGET, min(policy.token_budget, 2 * longest) // 2)
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()


def grpo_step(policy: Policy, role: str, reference: str | None, episodes: list[Episode], optimizer, cfg) -> dict:
    """Update `role` on the episodes of one rollout; `reference` is the adapter that the KL term holds it to.

    cfg has temperature, updates, clip_low, clip_high, kl, grad_clip. Episodes without a reward and groups whose
    rewards tie are dropped before any forward pass. The loss is the mean over all completion tokens of the update.
    With cfg.updates > 1 the groups are split into that many minibatches, one optimiser step each, and the old
    log-probabilities are computed first, by the code that computes the new ones: the sampler's do not match to the
    last digit, since bitsandbytes picks its kernel by the number of rows.
    Returns the step's metrics; "skipped" counts updates that a non-finite gradient voided.
    """
    trim()
    kept = set_advantages(episodes)
    groups = sorted({e.group for e in kept})
    total = len({e.group for e in episodes})
    metrics = {"tied": 1 - len(groups) / total if total else 0.0, "updates": 0, "skipped": 0}
    if not kept:
        return metrics
    updates = min(cfg.updates, len(groups))
    if updates > 1:
        with torch.no_grad(), policy.using(role):
            olds = policy.logprobs([(e.prompt, e.completion) for e in kept], cfg.temperature)
        for episode, old in zip(kept, olds):
            episode.old = old
    parameters = list(policy.tensors(role).values())
    sums, tokens, norms = {}, 0, []
    for k in range(updates):
        batch = [e for e in kept if e.group in groups[k::updates]]
        size = sum(len(e.completion) for e in batch)
        parts = _gradient(policy, role, reference, batch, cfg, parameters)
        # Divided here and not in the loss: a sum keeps fp16 gradients clear of underflow.
        for parameter in parameters:
            parameter.grad /= size
        norm = nn.utils.clip_grad_norm_(parameters, cfg.grad_clip).item()
        if math.isfinite(norm):
            optimizer.step()
            metrics["updates"] += 1
            norms.append(norm)
        else:
            metrics["skipped"] += 1
        tokens += size
        sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
        optimizer.zero_grad(set_to_none=True)
    metrics |= {name: value / tokens for name, value in sums.items()}
    return metrics | {"tokens_trained": tokens, "grad_norm": sum(norms) / len(norms) if norms else math.nan}
