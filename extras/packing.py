"""packing.py: rl.PlainEngine's three methods, every distinct token of a batch computed once.

    pack          sequences -> prefix trees, each laid out in one row, and who sees whom in it
    attention     the model's own, told by the mask what a token sees
    TokenLogProb  log-probabilities and their gradient without the full logits
    Sampler       shared prompts prefilled once, and a batch that stays full
    PackedEngine  the three methods; it checks itself against the model before it is believed

Prompts share templates, samples share prompts, verdicts share instruction and answer: most of a
step's tokens. Values and gradients are the plain engine's (tests), only the time is not. Nothing
here knows of adapters or roles.
"""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from extras import cuda, kernels
from extras.cpu import keep_freed, trim
from extras.fused import CPU_MIB, SHARE, copy_bytes, dense, fused, watched
from extras.siblings import RunAttention, Siblings, common_prefix, grouped, remembering

# Logits held at once, in elements, whatever the vocabulary: 128 MiB of fp32, 64 on the CPU.
HEAD_CHUNK = {"cuda": 1 << 25, "cpu": 1 << 24}
# From so many tokens common to all prompts on, they are computed in a pass of their own, and a
# sampling step reads them in one place.
SHARED_FROM = 128
# Tokens of the vocabulary summed together when sampling: the first that divides it, so that it need
# not be copied to be filled up.
PICK_BLOCKS = (256, 128, 64)
# Finished samples are looked for every so many tokens: on CUDA a look waits for the device.
LOOK_EVERY = {"cuda": 8, "cpu": 1}
# Samples decoded side by side, at most: beyond, a step only gets longer.
SLOTS = {"cuda": 256, "cpu": 64}
# Without a GPU: MiB of keys and values, and of activations kept for the backward pass; of these no
# more than a share of what was free when the engine was made.
CPU_KV_MIB, CPU_ACTIVATION_MIB, CPU_SHARE = 1024, 1024, 0.25
# Of what is free on a GPU, for either: keys and values are gone when activations come.
GPU_SHARE = 0.8
# As rl.NOT_A_TOKEN: where logits are no numbers.
NOT_A_TOKEN = -1
# Samplings after which what an out-of-memory took is given back, half by half.
RECOVER_AFTER = 20
# Tokens a row; halving after an out-of-memory stops here.
MIN_BUDGET = 128
# How far our logits may be from the model's own, relative to the largest of them. A wrong mask
# is off by a tenth and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 2e-2}
MOST_NOISE = 0.09


# ------------------------------------------------------------------------------ prefix trees


@dataclass
class Row:
    """A prefix tree laid out in one row of L tokens; `prefix` tokens before it are cached."""

    # (L,) every distinct token once, and its position id.
    tokens: np.ndarray
    depth: np.ndarray
    prefix: int
    # The tree's edges: tokens start to end see each other causally, and all of `before`,
    # columns of prefix + row.
    runs: list[tuple[int, int, np.ndarray]]
    # Per sequence: where its tokens are in the row, and its index in the caller's list.
    paths: list[np.ndarray]
    members: list[int]

    def mask(self) -> np.ndarray:
        """(L, prefix + L), True where a token (row) sees another (column)."""
        mask = np.zeros((len(self.tokens), self.prefix + len(self.tokens)), bool)
        for start, end, before in self.runs:
            mask[start:end, before] = True
            mask[start:end, self.prefix + start : self.prefix + end] = np.tri(end - start)
        return mask


def pack(sequences: list[list[int]], budget: int, prefix: int = 0) -> Iterator[Row]:
    """Sequences -> rows of at most `budget` distinct tokens; a longer sequence has its own.

    Sorted, a sequence shares with the tree so far exactly what it shares with the one before it.
    So a row grows by one run of new tokens a sequence, with no work per token.
    """
    arrays = [np.asarray(s[prefix:], dtype=np.int64) for s in sequences]
    members, shared, size = [], [], 0
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        common = common_prefix(arrays[members[-1]], arrays[i]) if members else 0
        if members and size + len(arrays[i]) - common > budget:
            yield _lay_out(arrays, members, shared, size, prefix)
            members, shared, size, common = [], [], 0, 0
        members.append(i)
        shared.append(common)
        size += len(arrays[i]) - common
    if members:
        yield _lay_out(arrays, members, shared, size, prefix)


def _lay_out(arrays: list, members: list[int], shared: list[int], size: int, prefix: int) -> Row:
    tokens, depth = np.empty(size, np.int64), np.empty(size, np.int64)
    runs, paths, path, at = [], [], np.empty(0, np.int64), 0
    for ids, common in zip([arrays[i] for i in members], shared):
        end = at + len(ids) - common
        tokens[at:end] = ids[common:]
        depth[at:end] = prefix + np.arange(common, len(ids))
        if end > at:
            runs.append((at, end, np.concatenate([np.arange(prefix), prefix + path[:common]])))
        path = np.concatenate([path[:common], np.arange(at, end)])
        paths.append(path)
        at = end
    return Row(tokens, depth, prefix, runs, paths, members)


# ------------------------------------------------------------------------------ attention


class RowSight:
    """What the tokens of a packed row see; attention over it, in windows of any size.

    On a GPU one large kernel under one mask; on the CPU by runs (siblings.py): the whole row would
    be L * L scores, most of them masked.
    """

    def __init__(self, row: Row, device: torch.device, dtype: torch.dtype, by_runs: bool):
        self.row, self.device, self.dtype, self.by_runs = row, device, dtype, by_runs
        self.depth = np.concatenate([np.arange(row.prefix), row.depth])
        self.masks: dict[int | None, Tensor] = {}
        self.batches: dict[int | None, list[Siblings]] = {}

    def handle(self) -> Tensor:
        """The attention mask to give to the model: carries this object to every layer."""
        length = len(self.row.tokens)
        shape = (1, 1, length, self.row.prefix + length)
        mask = torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)
        mask.sight = self
        return mask

    def _mask(self, window: int | None) -> Tensor:
        """(1, 1, L, P + L), additive"""
        if window not in self.masks:
            seen = self.row.mask()
            if window:
                seen &= self.row.depth[:, None] - self.depth < window
            # In the model's type: given booleans, sdpa converts and keeps a copy in each layer.
            hidden = torch.from_numpy(~seen).to(self.device)
            zeros = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            self.masks[window] = zeros.masked_fill_(hidden, -torch.inf)[None, None]
        return self.masks[window]

    def _siblings(self, window: int | None) -> list[Siblings]:
        if window not in self.batches:
            groups = grouped(self.row.runs, self.row.prefix)
            self.batches[window] = [Siblings(group, window, self.dtype) for group in groups]
        return self.batches[window]

    def attend(self, module, query, key, value, scale, window, bend) -> Tensor:
        """query (1, H, L, D), key and value (1, h, P + L, D) -> (1, L, H, D)"""
        if not self.by_runs or bend:
            return masked(module, query, key, value, self._mask(window), scale, bend)
        scale = scale or query.shape[-1] ** -0.5
        return RunAttention.of(query, key, value, self._siblings(window), scale).transpose(1, 2)


class SlotSight:
    """What a sampling step's new tokens see: their own slot so far, and what all samples share."""

    def __init__(self, length: Tensor, width: int, dtype: torch.dtype, shared: "RowCache | None"):
        self.length, self.width, self.dtype, self.shared = length, width, dtype, shared
        self.masks: dict[int | None, Tensor] = {}
        # (n * kv heads, 1, W), the same in all layers
        self.by_head: Tensor | None = None

    def handle(self) -> Tensor:
        """The attention mask to give to the model: carries this object to every layer."""
        shape = (len(self.length), 1, 1, self.width)
        mask = torch.zeros((), dtype=self.dtype, device=self.length.device).expand(shape)
        mask.sight = self
        return mask

    def _mask(self, window: int | None) -> Tensor:
        """(n, 1, 1, W), additive"""
        if window not in self.masks:
            # (n, W): how far back a column is; below 0 it is not filled yet.
            device = self.length.device
            back = self.length[:, None] - torch.arange(self.width, device=device)
            hidden = back < 0
            if window:
                hidden |= back >= window
            zeros = torch.zeros(back.shape, dtype=self.dtype, device=device)
            self.masks[window] = zeros.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self.masks[window]

    def attend(self, module, query, key, value, scale, window, bend) -> Tensor:
        """query (n, H, 1, D), key and value (n, h, W, D) -> (n, 1, H, D)"""
        shared = None if self.shared is None else self.shared.kv[module.layer_idx]
        compiled = None
        if key.device.type == "cpu" and not bend and value.shape[3] == key.shape[3]:
            group = query.shape[1] // key.shape[1]
            compiled = kernels.attention(group, key.shape[3], key.dtype)
        if compiled:
            return compiled(query, key, value, self.length, shared, window, scale)
        if shared is None:
            return masked(module, query, key, value, self._mask(window), scale, bend)
        if self.by_head is None:
            mask = self._mask(None).expand(-1, key.shape[1], -1, -1)
            self.by_head = mask.flatten(0, 1)
        return attention_after(shared, query, key, value, self.by_head, scale)


def attention_after(shared, query, key, value, mask, scale) -> Tensor:
    """One new token for each of n samples, which see the same shared keys, then their own.

    The samples' queries are the rows of one matrix, so that shared keys are read once, not n times.
    shared key and value (1, h, P, D), query (n, H, 1, D), key and value (n, h, W, D), mask
    (n * h, 1, W) additive -> (n, 1, H, D)
    """
    n, heads, _, dim = query.shape
    kv_heads, scale = key.shape[1], scale or dim**-0.5
    shared_key, shared_value = (t[0] for t in shared)
    # Every kernel counts where a launch takes longer than its arithmetic: scale and mask go with
    # the products. (n, h, H / h, D): the queries of a key's head together.
    query = query.reshape(n, kv_heads, -1, dim)
    # (h, n * H / h, P) and (n * h, H / h, W)
    rows = query.transpose(0, 1).flatten(1, 2)
    far = torch.baddbmm(rows.new_empty(()), rows, shared_key.mT, beta=0, alpha=scale)
    near = torch.baddbmm(mask, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scale)
    near = near.unflatten(0, (n, kv_heads))
    scores = torch.cat([far.unflatten(1, (n, -1)).transpose(0, 1), near], -1)
    # Summed in fp32 inside the kernel.
    far, near = scores.softmax(-1).split([far.shape[-1], near.shape[-1]], -1)
    far = (far.transpose(0, 1).flatten(1, 2) @ shared_value).unflatten(1, (n, -1)).transpose(0, 1)
    return (far + near @ value).reshape(n, 1, heads, dim)


def masked(module, query, key, value, mask, scale, bend: dict) -> Tensor:
    """Attention under an additive mask; `bend`: Gemma 2's cap on scores, gpt-oss's sinks."""
    if not bend:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]
    n, heads, length, dim = query.shape
    query = query.reshape(n, key.shape[1], -1, length, dim) * (scale or dim**-0.5)
    scores = query @ key[:, :, None].mT
    if bend.get("softcap"):
        scores = (scores / bend["softcap"]).tanh() * bend["softcap"]
    scores = scores + mask[:, :, None]
    if bend.get("s_aux") is not None:
        # A sink is one more column, which takes weight and gives nothing.
        sinks = bend["s_aux"].reshape(1, key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return (weights @ value[:, :, None]).reshape(n, heads, length, dim).transpose(1, 2)


def fuse_norms(model) -> None:
    """RMSNorm in one kernel instead of eight, in each layer that it equals."""
    on_cpu = model.device.type == "cpu"
    norm = kernels.rms_norm(model.dtype) if on_cpu else kernels.rms_norm_of_torch
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        named = type(module).__name__.endswith("RMSNorm")
        if not named or eps is None or getattr(weight, "dtype", None) != model.dtype:
            continue
        fused = partial(norm, weight=weight, eps=eps)
        x = torch.linspace(-3, 3, 4 * len(weight)).view(4, -1).to(weight)
        one, other = fused(x).float(), module(x).float()
        if (one - other).abs().max() <= torch.finfo(x.dtype).eps * 4 * other.abs().max():
            module.forward = fused


# What the model's layers asked for, for PackedEngine's check of itself.
WINDOWS: set[int | None] = set()
BENDS: set[str] = set()


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Takes the place of the model's attention; a mask of ours says who sees whom."""
    sight = getattr(attention_mask, "sight", None)
    window = kwargs.get("sliding_window")
    bend = {k: kwargs[k] for k in ("softcap", "s_aux") if kwargs.get(k) is not None}
    if sight is None:
        # The model called by somebody else.
        return masked(module, query, key, value, attention_mask, scaling, bend), None
    WINDOWS.add(window)
    BENDS.update(bend)
    return sight.attend(module, query, key, value, scaling, window, bend), None


# Under a name of our own, with eager's additive masks for whatever is not packed.
AttentionInterface.register("packed", attention)
AttentionMaskInterface.register("packed", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


class RowCache(Cache):
    """Keys and values of a packed row, its prefix's first: per layer (1, kv heads, P + L, D)."""

    def __init__(self, prefix: "RowCache | None" = None):
        super().__init__(layers=[])
        self.prefix, self.kv = prefix, []

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Called by the model's attention; returns what this row attends to."""
        if self.prefix is not None:
            old_key, old_value = self.prefix.kv[layer_idx]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        # Not views: what they are cut from would live as long.
        self.kv.append((key.contiguous(), value.contiguous()))
        return self.kv[-1]


class SlotCache(Cache):
    """Keys and values of the samples being decoded, a slot each, in buffers that stay put."""

    def __init__(self, slots: int, columns: int, like: RowCache, device: torch.device):
        super().__init__(layers=[])
        # Zeros, not empty: a masked column still meets a weight of 0, and 0 * NaN is NaN.
        fresh = lambda t: t.new_zeros(slots, t.shape[1], columns, t.shape[3])
        self.kv = [(fresh(key), fresh(value)) for key, value in like.kv]
        self.slots, self.slot = slots, torch.arange(slots, device=device)
        # Tokens held, which is the next column; and the columns in use by the longest.
        self.length, self.width = torch.zeros(slots, dtype=torch.long, device=device), 0

    def update(self, key, value, layer_idx, *args, **kwargs):
        """(active, kv heads, 1, D): write each sample's new token in its own next column."""
        n = key.shape[0]
        keys, values = self.kv[layer_idx]
        keys[self.slot[:n], :, self.length[:n]] = key[:, :, 0]
        values[self.slot[:n], :, self.length[:n]] = value[:, :, 0]
        return keys[:n, :, : self.width], values[:n, :, : self.width]

    def fill(self, slot: int, row: RowCache, path: Tensor) -> None:
        """Start a sample in `slot` from the packed prompts' keys and values."""
        for (keys, values), (k, v) in zip(self.kv, row.kv):
            keys[slot, :, : len(path)] = k[0, :, path]
            values[slot, :, : len(path)] = v[0, :, path]
        self.length[slot] = len(path)

    def move(self, source: int, slot: int, held: int) -> None:
        """Copy a sample of `held` tokens into another slot, so that the active stay in front."""
        for keys, values in self.kv:
            keys[slot, :, :held] = keys[source, :, :held]
            values[slot, :, :held] = values[source, :, :held]
        self.length[slot] = self.length[source]


# ------------------------------------------------------------------------------ the head


class Head:
    """logits = cap tanh(scale W hidden / cap): Gemma's cap, Granite's and Cohere's scale."""

    def __init__(self, module, cap: float | None):
        self.module, self.cap, self.scale = module, cap, 1.0
        self.chunk = max(1, HEAD_CHUNK[module.weight.device.type] // len(module.weight))

    def fit(self, raw: Tensor, exact: Tensor) -> None:
        """The scale, from products W hidden and the model's own logits."""
        bent = self.cap * (exact / self.cap).atanh() if self.cap else exact
        scale = ((bent * raw).sum() / raw.square().sum()).item()
        self.scale = 1.0 if abs(scale - 1) < 1e-2 else scale

    def logits_and_slope(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., d) -> (..., V) in fp32, and d logits / d (W hidden), None where that is 1"""
        logits, slope = self.module(hidden).float(), None
        if self.scale != 1:
            slope = torch.full_like(logits, self.scale)
            logits.mul_(self.scale)
        if self.cap:
            bent = logits.div_(self.cap).tanh_()
            slope = (1 - bent.square()) * (1 if slope is None else slope)
            logits = bent * self.cap
        return logits, slope

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., V) in fp32"""
        return self.logits_and_slope(hidden)[0]


class TokenLogProb(torch.autograd.Function):
    """log p(target | hidden) without ever holding the full logits.

    The head W is frozen, so d log p(t) / d hidden = (W[t] - softmax(W hidden) W) / temperature is
    known as soon as the logits are: computed in the forward pass, chunk by chunk, and kept in
    place of them: (N, d) for (N, V).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: "Head", targets: Tensor, temperature: float):
        """hidden (N, d), targets (N,) -> (N,) in fp32"""
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight = head.module.weight
        for at in range(0, len(hidden), head.chunk):
            h, t = hidden[at : at + head.chunk], targets[at : at + head.chunk, None]
            logits, slope = head.logits_and_slope(h)
            logits.div_(temperature).sub_(logits.amax(-1, keepdim=True))
            target = logits.gather(1, t)
            # In place from here on: a fresh tensor of this size costs more than the arithmetic.
            odds = logits.exp_()
            total = odds.sum(-1, keepdim=True)
            out[at : at + head.chunk] = (target - total.log())[:, 0]
            if grad is None:
                continue
            odds.div_(total)
            own = weight[t[:, 0]]
            if slope is not None:
                odds.mul_(slope)
                own = own * slope.gather(1, t).to(own.dtype)
            grad[at : at + head.chunk] = (own - odds.to(weight.dtype) @ weight) / temperature
        ctx.save_for_backward(grad)
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        """(N,) -> (N, d)"""
        (grad,) = ctx.saved_tensors
        return upstream[:, None].to(grad.dtype) * grad, None, None, None


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """rl.pick, faster: logits (B, V), draws (B,) in (0, 1] -> ids (B,). Overwrites the logits."""
    if temperature == 0:
        largest, token = logits.max(-1)
        return token.masked_fill(largest.isnan(), NOT_A_TOKEN)
    weight = logits.div_(temperature).softmax(-1)
    # First which block of the vocabulary, then which token in it: a running sum over V is slow.
    size = next((size for size in PICK_BLOCKS if weight.shape[1] % size == 0), PICK_BLOCKS[0])
    if over := -weight.shape[1] % size:
        weight = F.pad(weight, (0, over))
    blocks = weight.unflatten(1, (-1, size))
    upto = blocks.sum(-1).cumsum(-1)
    target = uniform[:, None] * upto[:, -1:]
    broken = target[:, 0].isnan()
    block = torch.searchsorted(upto, target).clamp_max_(upto.shape[1] - 1)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1)
    before = F.pad(upto, (1, 0)).gather(1, block)
    # Rounding may leave the target a hair above the block's own total, or at nothing.
    target = torch.minimum(target - before, inside[:, -1:])
    target = target.clamp_min(torch.finfo(target.dtype).tiny)
    token = (block * size + torch.searchsorted(inside, target))[:, 0]
    return token.masked_fill(broken, NOT_A_TOKEN)


# ------------------------------------------------------------------------------ sampling


def aligned(columns: int) -> int:
    """Up to a multiple of 8: sdpa's kernels copy a mask whose rows begin elsewhere."""
    return -(-columns // 8) * 8


class Sampler:
    """The batch being decoded. Finished samples make room for waiting ones, then it shrinks.

    Sample i * n + k is the k-th of prompt i. `held` has an entry for each slot in use; these are
    always the first ones, so that a step computes on views of the cache.
    """

    def __init__(self, engine, prompts: list, uniform: Tensor, temperature: float, limits=None):
        self.engine, self.temperature = engine, temperature
        device, self.n, longest = engine.device, uniform.shape[1], uniform.shape[2]
        self.look = LOOK_EVERY[device.type]
        # Samples run on until somebody looks; what is past their end is cut off later. The last
        # row is where slots that nobody uses write.
        self.uniform = F.pad(uniform.flatten(0, 1), (0, self.look, 0, 1), value=0.5).to(device)
        self.nobody, steps = len(self.uniform) - 1, self.uniform.shape[1]
        self.out = torch.zeros(self.uniform.shape, dtype=torch.long, device=device)
        self.limit = torch.tensor([*(limits or [longest] * self.nobody), longest], device=device)
        self.eos = torch.tensor(sorted(engine.eos), dtype=torch.long, device=device)
        self.over = torch.zeros(len(self.out), dtype=torch.bool, device=device)
        self.longest = max(map(len, prompts)) + steps
        # Tokens that all prompts share and no slot holds, see attention_after.
        self.first = 0
        # Tokens held per slot, known without asking the device.
        self.held: list[int] = []
        self.cache: SlotCache | None = None
        self.replayed: cuda.Replayed | None = None
        self.starts = self._starts(prompts)
        while self.cache is None or len(self.held) < self.cache.slots:
            if not self._begin(len(self.held)):
                break

    def _starts(self, prompts: list) -> Iterator[tuple]:
        """(sample, its first token, the packed prompts' cache, the prompt's columns in it)"""
        for row, cache, hidden in self.engine.prefill(prompts):
            far = row.prefix >= SHARED_FROM and self.engine.window >= self.longest
            self.first = row.prefix if far else 0
            for i, path in zip(row.members, row.paths):
                logits = self.engine.head.logits(hidden[path[-1]]).repeat(self.n, 1)
                draws = self.uniform[i * self.n : (i + 1) * self.n, 0]
                tokens = pick(logits, draws, self.temperature)
                columns = np.concatenate([np.arange(self.first, row.prefix), row.prefix + path])
                columns = torch.from_numpy(columns).to(self.engine.device)
                for sample, token in enumerate(tokens, i * self.n):
                    yield sample, token, cache, columns

    def _begin(self, slot: int) -> bool:
        """Put the next waiting sample into a slot; False if none waits."""
        start = next(self.starts, None)
        if start is None:
            return False
        sample, token, prefilled, columns = start
        if self.cache is None:
            self._make_room(prefilled)
        self.cache.fill(slot, prefilled, columns)
        self.held[slot : slot + 1] = [len(columns)]
        self.sample[slot], self.count[slot], self.token[slot] = sample, 1, token.clamp_min(0)
        self.out[sample, 0] = token
        self.over[sample] = self._ends(token) | (self.limit[sample] <= 1)
        return True

    def _make_room(self, like: RowCache) -> None:
        room, device = aligned(self.longest - self.first), self.engine.device
        per_token = sum(k[0, :, 0].nbytes + v[0, :, 0].nbytes for k, v in like.kv)
        most = int(self.engine.kv_bytes() / (per_token * room))
        slots = max(1, min(most, self.engine.slots, self.nobody))
        self.cache = SlotCache(slots, room, like, device)
        self.shared = like.prefix if self.first else None
        zeros = torch.zeros(3, slots, dtype=torch.long, device=device)
        self.sample, self.count, self.token = zeros
        self.sample.fill_(self.nobody)
        state = [self.token, self.sample, self.count, self.out, self.over, self.cache.length]
        if self.engine.record:
            # Weakly: in a circle with its recordings a batch would outlive its rollout.
            step = weakref.WeakMethod(self._step)
            self.replayed = cuda.Replayed(lambda *size: step()(*size), state, self.engine.record)

    def next_logits(self, n: int, width: int) -> Tensor:
        """(n, V) of the next token of the first n slots; their last ones enter the cache."""
        cache = self.cache
        cache.width, length = width, cache.length[:n]
        sight = SlotSight(length, cache.width, self.engine.dtype, self.shared)
        out = self.engine.decoder(
            input_ids=self.token[:n, None],
            position_ids=self.first + length[:, None],
            attention_mask=sight.handle(),
            cache=cache,
            use_cache=True,
        )
        length += 1
        return self.engine.head.logits(out.last_hidden_state[:, 0])

    def sizes(self) -> tuple[int, int]:
        """Slots and columns that a step has to look at."""
        return len(self.held), aligned(max(self.held) + 1)

    def step(self) -> None:
        """One token for every active sample; no value is read back from the device."""
        n, width = self.sizes()
        self.held = [h + 1 for h in self.held]
        if not self.replayed:
            return self._step(n, width)
        n, width = self.replayed.sizes(n, width)
        slots, columns = self.cache.kv[0][0].shape[::2]
        return self.replayed(min(n, slots), min(width, columns))

    def _step(self, n: int, width: int) -> None:
        sample, count = self.sample[:n], self.count[:n]
        token = pick(self.next_logits(n, width), self.uniform[sample, count], self.temperature)
        self.out[sample, count] = token
        self.token[:n] = token.clamp_min(0)
        count += 1
        self.over[sample] |= self._ends(token) | (count >= self.limit[sample])

    def _ends(self, token: Tensor) -> Tensor:
        # Not torch.isin, which on a GPU waits for the device where there are many.
        return (token[..., None] == self.eos).any(-1)

    def retire(self) -> None:
        """Replace the finished samples by waiting ones, else by the last active ones."""
        over = self.over[self.sample[: len(self.held)]].tolist()
        # From the back: a sample that moves forward has been looked at.
        for slot in reversed(range(len(over))):
            if not over[slot] or self._begin(slot):
                continue
            last = len(self.held) - 1
            if slot != last:
                self.cache.move(last, slot, self.held[last])
                for state in (self.sample, self.count, self.token):
                    state[slot] = state[last]
                self.held[slot] = self.held[last]
            self.held.pop()
        if self.replayed:
            # A recording may serve more slots than are in use.
            idle = slice(len(self.held), None)
            self.sample[idle], self.count[idle], self.cache.length[idle] = self.nobody, 0, 0

    def run(self) -> list[list[list[int]]]:
        """Decode all; for each prompt a row a sample, which may run on past its end."""
        while self.held:
            for _ in range(self.look):
                self.step()
            self.retire()
        if self.replayed and self.replayed.off:
            self.engine.record = None
        return self.out[:-1, : -self.look].unflatten(0, (-1, self.n)).tolist()


# ------------------------------------------------------------------------------ the engine


def furthest(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two lists' tensors, nan if there is one."""
    return (torch.cat(one) - torch.cat(other)).abs().max().item()


class PackedEngine:
    """rl.PlainEngine's methods over packed rows of at most `token_budget` distinct tokens."""

    def __init__(self, model, layers, eos, token_budget=2048, slots=0, graphs=True):
        self.model, self.layers, self.eos, self.token_budget = model, layers, eos, token_budget
        self.device, self.dtype = model.device, model.dtype
        self.cuda = self.device.type == "cuda"
        self.slots = slots or SLOTS[self.device.type]
        self.cpu_free = psutil.virtual_memory().available
        if not self.cuda:
            keep_freed()
        # How a step of sampling is recorded, to be replayed; None: it is not.
        self.record = cuda.record if self.cuda and graphs and cuda.ABLE else None
        self.decoder, self.config = model.get_decoder(), model.config.get_text_config(decoder=True)
        cap = getattr(self.config, "final_logit_softcapping", None)
        self.head = Head(model.get_output_embeddings(), cap)
        # What an out-of-memory may take, and samplings since the last one.
        self.most, self.since_full = (self.token_budget, self.slots), 0
        # The smallest window of any layer, 0 where what all share cannot be attended to in one
        # place; and how many of the last layers are recomputed.
        self.window, self.recomputed, self.recompute_all = float("inf"), 0, False
        # Linear layers that are given the same tensor.
        self.together: list[list] = []
        for place, layer in enumerate(reversed(layers), 1):
            layer.forward = partial(self._recomputing, layer.forward, place)

    # -------------------------------------------- the three methods

    @torch.no_grad()
    def sample(self, prompts: list, uniform: Tensor, temperature: float, limits=None) -> list:
        """As rl.PlainEngine.sample, many at a time; rows may run on past their EOS.

        limits: the most tokens of each sample, if not the same for all.
        """
        if not self.since_full:
            # What an out-of-memory has left in circles.
            gc.collect()
        self._recover()
        with self.faster_layers():
            return Sampler(self, prompts, uniform, temperature, limits).run()

    def logprobs(self, pairs: list, temperature: float = 1.0) -> Iterator[tuple[list, list]]:
        """As rl.PlainEngine.logprobs, a packed row at a time."""
        trim()
        for row in pack([prompt + done[:-1] for prompt, done in pairs], self.token_budget):
            hidden = self._forward(row)
            # Each token predicts the next, and a completion's last one is not in its path.
            sizes = [len(pairs[i][1]) for i in row.members]
            nodes = np.concatenate([path[len(path) - n :] for path, n in zip(row.paths, sizes)])
            targets = torch.tensor([t for i in row.members for t in pairs[i][1]], dtype=torch.long)
            at, to = torch.from_numpy(nodes).to(self.device), targets.to(self.device)
            flat = TokenLogProb.apply(hidden[at], self.head, to, temperature)
            yield row.members, list(flat.split(sizes))

    @torch.no_grad()
    def next_probabilities(self, prompts: list, tokens: list[int]) -> Tensor:
        """As rl.PlainEngine.next_probabilities, shared prefixes once."""
        out = torch.empty(len(prompts), len(tokens))
        for row, _, hidden in self.prefill(prompts):
            last = torch.tensor([int(path[-1]) for path in row.paths], device=self.device)
            parts = hidden[last].split(self.head.chunk)
            chunks = [self.head.logits(h).softmax(-1)[:, tokens] for h in parts]
            out[row.members] = torch.cat(chunks).cpu()
        return out

    def use_less_memory(self) -> bool:
        """Recompute all activations first, then halve the rows and the slots."""
        self.since_full = 0
        if not self.recompute_all:
            self.recompute_all = True
        elif self.token_budget > MIN_BUDGET or self.slots > 1:
            half = max(MIN_BUDGET, self.token_budget // 2)
            self.token_budget = min(half, self.token_budget)
            self.slots = max(1, self.slots // 2)
        else:
            return False
        return True

    def _recover(self) -> None:
        """An out-of-memory is not for good: what it took comes back some samplings later."""
        self.since_full += 1
        if self.since_full == RECOVER_AFTER and self.recompute_all:
            self.since_full, most = 0, self.most
            self.recompute_all = (self.token_budget, self.slots) != most
            self.token_budget = min(most[0], 2 * self.token_budget)
            self.slots = min(most[1], 2 * self.slots)

    # -------------------------------------------- forward passes

    def _forward(self, row: Row, cache: RowCache | None = None) -> Tensor:
        """A packed row -> hidden states (L, d)"""
        self.recomputed = self._layers_to_recompute(len(row.tokens))
        ids, depth = (torch.from_numpy(x).to(self.device)[None] for x in (row.tokens, row.depth))
        sight = RowSight(row, self.device, self.dtype, by_runs=not self.cuda)
        cached = dict(cache=cache, use_cache=cache is not None)
        mask = sight.handle()
        out = self.decoder(input_ids=ids, position_ids=depth, attention_mask=mask, **cached)
        return out.last_hidden_state[0]

    def prefill(self, prompts: list) -> Iterator[tuple[Row, RowCache, Tensor]]:
        """What all prompts share once, if it is much, then row by row: (row, cache, hidden (L, d)).

        Under its callers' no_grad: a decorated generator runs code when it is dropped, where a
        Ctrl-C would be lost.
        """
        shared, cache = 0, None
        if len(prompts) > 1:
            first, last = np.asarray(min(prompts)), np.asarray(max(prompts))
            shared = min(common_prefix(first, last), min(map(len, prompts)) - 1)
        # A few, a 16th of a row at most, are cheaper in each row than in a pass of their own.
        if shared >= max(1, min(SHARED_FROM, self.token_budget // 16)):
            cache = RowCache()
            self._forward(next(pack([prompts[0][:shared]], self.token_budget)), cache)
        else:
            shared = 0
        for row in pack(prompts, self.token_budget, shared):
            own = RowCache(cache)
            yield row, own, self._forward(row, own)

    def faster_layers(self):
        """A context without gradients: linear layers by fewer, larger and faster products."""
        if self.cuda:
            return fused(self.together, self.dtype, SHARE * self.free_bytes())
        trim()
        product = kernels.product(self.dtype)
        # By torch in fp32 one large product of few tokens is slower than UnpackedLinear's several.
        most = CPU_MIB * 2**20 if product or self.dtype != torch.float32 else 0
        groups, head = self.together, self.head.module
        # The head by itself, for the order of its weights, where there is room.
        if dense(head, self.dtype) and copy_bytes([*groups, [head]], self.dtype) <= most:
            groups = [*groups, [head]]
        return fused(groups, self.dtype, most, product or kernels.product_of_torch)

    # -------------------------------------------- memory

    def free_bytes(self) -> int:
        """Of the GPU's memory: what the driver has, and what torch holds without using it."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held

    def kv_bytes(self) -> float:
        """What the keys and values of the samples being decoded may take."""
        return GPU_SHARE * self.free_bytes() if self.cuda else CPU_KV_MIB * 2**20

    def _recomputing(self, forward, place: int, /, *args, **kwargs):
        """A layer's forward, which keeps no activations if its place from the end says so."""
        if place <= self.recomputed:
            # For its size the dearest of a layer's activations to compute.
            kept = []
            twice = lambda: (remembering(kept, False), remembering(kept, True))
            how = dict(use_reentrant=False, preserve_rng_state=False, context_fn=twice)
            return checkpoint(forward, *args, **how, **kwargs)
        return forward(*args, **kwargs)

    def _layers_to_recompute(self, tokens: int) -> int:
        """How many layers must drop their activations for a row of so many tokens to fit."""
        layers = len(self.layers)
        if not torch.is_grad_enabled():
            return 0
        if self.recompute_all:
            return layers
        most = min(CPU_ACTIVATION_MIB * 2**20, CPU_SHARE * self.cpu_free)
        limit = GPU_SHARE * self.free_bytes() if self.cuda else most
        # Kept per token and layer, in vectors of the hidden and of the inner size: counted on a
        # Llama by saved-tensor hooks; where layers differ in it, the largest.
        inner = np.max(getattr(self.config, "intermediate_size", 4 * self.config.hidden_size))
        hidden = tokens * self.config.hidden_size * self.dtype.itemsize
        kept = 9 * hidden + 4 * tokens * inner * self.dtype.itemsize
        # A recomputed layer keeps its input, and RunAttention its result, taken to be as large.
        least = hidden * (1 if self.cuda else 2)
        spared = (limit - layers * least) / (kept - least)
        return layers - min(layers, max(0, int(spared)))

    # -------------------------------------------- is it exact?

    @classmethod
    def of(cls, model, layers, eos: set[int], **limits) -> "PackedEngine | None":
        """The engine, if it gives this model's own logits; None if not, which it says aloud."""
        before = model.config._attn_implementation
        given = {m: m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__}
        try:
            engine = cls(model, layers, eos, **limits)
            reason = engine.fault()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if not reason:
            return engine
        print(f"  plain engine, slower: packing is not exact for this model ({reason})")
        model.set_attn_implementation(before)
        # The model as it was.
        for module in model.modules():
            module.__dict__.pop("forward", None)
            module.__dict__.update({"forward": given[module]} if module in given else {})
        return None

    @torch.no_grad()
    def fault(self) -> str:
        """What is wrong with our logits, against the model itself under eager attention; or ""."""
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if others := kinds - {"full_attention", "sliding_attention"}:
            return f"layers of {', '.join(sorted(others))}"
        draw = np.random.default_rng(0).integers(5, min(200, self.config.vocab_size), 140).tolist()
        # Two that share enough to be read in one place, and branches that must not see each other.
        sequences = [draw[:134], draw[:130] + draw[134:]]
        exact = [self._plain_logits(s) for s in sequences]
        # The other kernel that the model knows, to see how far rounding alone goes: in 16 bits it
        # grows with depth.
        other = "sdpa" if self.model._supports_sdpa else "eager"
        noise = furthest(exact, [self._plain_logits(s, other) for s in sequences])
        fuse_norms(self.model)
        ours = [torch.empty(0)] * 2
        WINDOWS.clear()
        BENDS.clear()
        with watched(self.layers, self.dtype) as self.together:
            for row in pack(sequences, self.token_budget):
                hidden = self._forward(row)
                for i, path in zip(row.members, row.paths):
                    ours[i] = hidden[torch.from_numpy(path).to(self.device)]
        self.head.fit(torch.cat([self.head.module(h).float() for h in ours]), torch.cat(exact))
        ours = [self.head.logits(h) for h in ours]
        windows = {w for w in WINDOWS if w}
        self.window = 0 if BENDS else min(windows, default=self.window)
        declared = getattr(self.config, "sliding_window", None)
        if "sliding_attention" in kinds and declared not in windows:
            return f"a window of {declared} that attention is not told of"
        off, largest = furthest(ours, exact), torch.cat(exact).abs().max().item()
        # Large, and copies of the weights are next.
        del exact, ours
        with self.faster_layers():
            sampler = Sampler(self, sequences, torch.full((2, 1, 4), 0.5), 0.0)
            begun = [*zip(sampler.sample.tolist(), sampler.token.tolist())]
            ours = list(sampler.next_logits(*sampler.sizes()).split(1))
        exact = [self._plain_logits(sequences[i] + [token])[-1:] for i, token in begun]
        # A nan is off, too.
        off = max(off, furthest(ours, exact), key=lambda x: (x != x, x)) / largest
        limit = TOLERANCE[self.dtype]
        if self.dtype != torch.float32:
            limit = max(limit, min(MOST_NOISE, 1.5 * noise / largest))
        return "" if off < limit else f"logits off by {off:.1%} of the largest"

    def _plain_logits(self, ids: list[int], attention: str = "eager") -> Tensor:
        """(T, V) in fp32, by the model under an attention of its own; ours is back afterwards."""
        self.model.set_attn_implementation(attention)
        ids = torch.tensor([ids], device=self.device)
        logits = self.model(ids, use_cache=False).logits[0].float()
        self.model.set_attn_implementation("packed")
        return logits
