"""packing.py: every token computed once. The results are those of the plain way; only the time is not.

    pack        sequences -> prefix trees, each laid out in one row: distinct tokens, positions by depth, who sees whom
    attention   sdpa that computes a packed row without the scores its mask would hide
    TokenLogProb  log-probabilities and their gradient without the full logits
    Sampler     sampling with what prompts share prefilled once and a batch that stays full

Prompts share templates, samples share prompts, verdicts share instruction and answer; that is most of a step's tokens.
To understand the method this file can be skipped: tests/test_rl.py holds the slow and obvious versions it must equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

HEAD_CHUNK = 1 << 23  # logits held at once, in elements: 32 MiB of fp32, whatever the vocabulary
SHARED_FROM = 128  # tokens common to all prompts from which on a sampling step reads them in one place, not per sample
PICK_BLOCK = 256  # tokens of the vocabulary summed together when sampling
LOOK_EVERY = {"cuda": 8, "cpu": 1}  # look for finished rows every so many tokens: on CUDA a look waits for the device
CPU_SLOTS, CUDA_SLOTS = 64, 256  # sequences sampled side by side, at most: beyond, a step only gets longer
CPU_KV_MIB = 1024  # their keys and values, at most (on CUDA: half of what is free)


# ---------------------------------------------------------------- prefix trees


@dataclass
class Row:
    """A prefix tree laid out in one row of L tokens. `prefix` tokens before it are shared by all and already cached."""

    tokens: np.ndarray  # (L,) every distinct token once
    depth: np.ndarray  # (L,) position ids
    mask: (
        np.ndarray | None
    )  # (L, prefix + L) True where a token (row) may see another (column): its ancestors and itself
    runs: list[tuple[int, int, np.ndarray]] | None  # the tree's edges: tokens start to end, and what they see before
    paths: list[np.ndarray]  # per sequence: the row positions of its tokens
    members: list[int]  # per sequence: its index in the caller's list


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def pack(sequences: list[list[int]], budget: int, prefix: int = 0) -> Iterator[Row]:
    """Sequences -> rows of at most `budget` distinct tokens (a longer sequence gets a row of its own).

    Sorted, a sequence shares with the tree so far exactly what it shares with the one before it. So a row grows by
    one run of new tokens per sequence, and building it costs a few array operations per sequence, none per token.
    """
    arrays = [np.asarray(s[prefix:], dtype=np.int64) for s in sequences]
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    start = 0
    while start < len(order):
        stop, size, last = start, 0, arrays[order[start]][:0]
        growth = []  # (shared, new) tokens per sequence of this row
        while stop < len(order):
            ids = arrays[order[stop]]
            shared = common_prefix(last, ids)
            if stop > start and size + len(ids) - shared > budget:
                break
            growth.append((shared, len(ids) - shared))
            size, last, stop = size + len(ids) - shared, ids, stop + 1
        yield _lay_out([arrays[i] for i in order[start:stop]], growth, size, prefix, order[start:stop])
        start = stop


def _lay_out(arrays: list, growth: list, size: int, prefix: int, members: list[int]) -> Row:
    tokens, depth = np.empty(size, np.int64), np.empty(size, np.int64)
    mask = np.zeros((size, prefix + size), bool)
    mask[:, :prefix] = True
    runs, paths, path, at = [], [], np.empty(0, np.int64), 0
    for ids, (shared, new) in zip(arrays, growth):
        end = at + new
        tokens[at:end] = ids[shared:]
        depth[at:end] = prefix + np.arange(shared, shared + new)
        if shared:
            mask[at:end] = mask[path[shared - 1]]  # all that the parent sees, the parent included
        mask[at:end, prefix + at : prefix + end] = np.tri(new, dtype=bool)
        if new:
            runs.append((at, end, np.concatenate([np.arange(prefix), prefix + path[:shared]])))
        path = np.concatenate([path[:shared], np.arange(at, end)])
        paths.append(path)
        at = end
    return Row(tokens, depth, mask, runs, paths, members)


def one_by_one(sequences: list[list[int]]) -> Iterator[Row]:
    """Each sequence in a row of its own, under the model's own mask: the plain way, for models that pack cannot serve."""
    for i, ids in enumerate(sequences):
        at = np.arange(len(ids))
        yield Row(np.asarray(ids), at, None, None, [at], [i])


def attention(module, query, key, value, attention_mask, runs=None, shared=None, scaling=None, **kwargs):
    """sdpa; given the runs of a packed row, run by run, each over the tokens that it sees and no others; given what all
    samples share, in a sampling step, attention_after.

    A row of L tokens holds n branches: one call over all of it computes L * L scores to mask most of them.
    query (1, H, L, D), key and value (1, h, P + L, D) -> (1, L, H, D).
    """
    if shared is not None:
        return attention_after(shared.kv[module.layer_idx], query, key, value, attention_mask, scaling), None
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = []
    for start, end, columns, mask in runs:
        q, k, v = query[:, :, start:end], key[:, :, columns], value[:, :, columns]
        out.append(
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        )
    return torch.cat(out, 2).transpose(1, 2), None


def attention_after(shared, query, key, value, mask, scaling) -> Tensor:
    """One new token for each of n samples, which see the same `shared` keys and values, (1, h, P, D), then their own.

    For the shared part the samples' queries are the rows of one matrix, so that its keys are read once, not n times.
    query (n, H, 1, D), key and value (n, h, W, D), mask (n, 1, 1, W) True where seen -> (n, 1, H, D).
    """
    n, heads, _, dim = query.shape
    shared_key, shared_value = (t[0] for t in shared)
    query = query.reshape(n, key.shape[1], -1, dim) * (
        scaling or dim**-0.5
    )  # (n, h, H / h, D): the queries of a key's head together
    far = query.transpose(0, 1).flatten(1, 2) @ shared_key.mT  # (h, n * H / h, P)
    near = (query @ key.mT).masked_fill_(~mask, -torch.inf)  # (n, h, H / h, W)
    scores = torch.cat([far.unflatten(1, (n, -1)).transpose(0, 1), near], -1)
    far, near = scores.softmax(-1, dtype=torch.float32).to(query.dtype).split([far.shape[-1], near.shape[-1]], -1)
    far = (far.transpose(0, 1).flatten(1, 2) @ shared_value).unflatten(1, (n, -1)).transpose(0, 1)
    return (far + near @ value).reshape(n, 1, heads, dim)


# Under a name of our own, with sdpa's masks for whatever is not packed.
AttentionInterface.register("packed_sdpa", attention)
AttentionMaskInterface.register("packed_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class RowCache(Cache):
    """Keys and values of one packed row, those of the shared prefix first: per layer (1, kv heads, prefix + L, dim)."""

    def __init__(self, prefix: "RowCache | None" = None):
        super().__init__(layers=[])
        self.prefix, self.kv = prefix, []

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Called by the model's attention; returns what this row attends to."""
        if self.prefix is not None:
            old_key, old_value = self.prefix.kv[layer_idx]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        self.kv.append((key, value))
        return key, value


class SlotCache(Cache):
    """Keys and values of the sequences being sampled: one slot each, filled from column 0, in buffers that stay put."""

    def __init__(self, slots: int, columns: int, like: RowCache, device: torch.device):
        super().__init__(layers=[])
        _, heads, _, dim = like.kv[0][0].shape
        shape = (slots, heads, columns, dim)
        # Zeros, not empty: a masked column still meets a weight of 0, and 0 * NaN is NaN.
        self.kv = [tuple(torch.zeros(shape, dtype=t.dtype, device=device) for t in pair) for pair in like.kv]
        self.slots = slots
        self.slot = torch.arange(slots, device=device)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)  # tokens held, which is the next column
        self.width = 0  # columns in use by the longest

    def update(self, key, value, layer_idx, *args, **kwargs):
        """(active, kv heads, 1, dim): write each sequence's new token in its own next column."""
        n = key.shape[0]
        keys, values = self.kv[layer_idx]
        keys[self.slot[:n], :, self.length[:n]] = key[:, :, 0]
        values[self.slot[:n], :, self.length[:n]] = value[:, :, 0]
        return keys[:n, :, : self.width], values[:n, :, : self.width]

    def fill(self, slot: int, row: RowCache, path: Tensor) -> None:
        """Start a sequence in `slot` from the packed prompts' keys and values."""
        for (keys, values), (k, v) in zip(self.kv, row.kv):
            keys[slot, :, : len(path)] = k[0, :, path]
            values[slot, :, : len(path)] = v[0, :, path]
        self.length[slot] = len(path)

    def move(self, source: int, slot: int) -> None:
        """Copy a sequence into another slot, so that the active ones stay in front."""
        for keys, values in self.kv:
            keys[slot, :, : self.width] = keys[source, :, : self.width]
            values[slot, :, : self.width] = values[source, :, : self.width]
        self.length[slot] = self.length[source]


class TokenLogProb(torch.autograd.Function):
    """log p(target | hidden) without ever holding the full logits.

    The head W is frozen, so d log p(t) / d hidden = (W[t] - softmax(W hidden) W) / temperature is known as soon as the
    logits are: it is computed in the forward pass, chunk by chunk, and kept in place of them: (N, d) for (N, V).
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        """hidden (N, d), weight (V, d), targets (N,) -> (N,) in fp32."""
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, HEAD_CHUNK // len(weight))
        for at in range(0, len(hidden), size):
            h, t = hidden[at : at + size], targets[at : at + size]
            logits = F.linear(h, weight, bias).float().div_(temperature)
            logits.sub_(logits.amax(-1, keepdim=True))
            target = logits.gather(1, t[:, None])
            odds = logits.exp_()  # in place from here on: a temporary of this size costs more than what is done to it
            total = odds.sum(-1, keepdim=True)
            out[at : at + size] = (target - total.log())[:, 0]
            if grad is not None:
                expected = odds.div_(total).to(weight.dtype) @ weight
                grad[at : at + size] = (weight[t] - expected) / temperature
        ctx.save_for_backward(grad)
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        """(N,) -> (N, d)."""
        (grad,) = ctx.saved_tensors
        return upstream[:, None].to(grad.dtype) * grad, None, None, None, None


# ---------------------------------------------------------------- sampling


def cut_at_eos(ids: list[int], eos: set[int]) -> list[int]:
    """Everything up to the first EOS, that one included."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return ids[: end + 1]


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Sample by inverting the cumulative distribution: logits (B, V) and draws (B,) in (0, 1] -> token ids (B,).

    The logits are overwritten.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weight = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    if rest := -weight.shape[1] % PICK_BLOCK:
        weight = F.pad(weight, (0, rest))
    # Two levels, first which block of the vocabulary, then which token in it: a running sum over all V is slow.
    blocks = weight.unflatten(1, (-1, PICK_BLOCK))  # (B, V / 256, 256)
    upto = blocks.sum(-1).cumsum(-1)
    target = uniform[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, target)  # (B, 1)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1)
    before = F.pad(upto, (1, 0)).gather(1, block)
    # Rounding may leave the target a hair above the block's own total: stay at its last token of weight.
    target = torch.minimum(target - before, inside[:, -1:])
    return (block * PICK_BLOCK + torch.searchsorted(inside, target.clamp_min(torch.finfo(target.dtype).tiny)))[:, 0]


class Sampler:
    """The batch being sampled. Finished samples make room for waiting ones; with none waiting the batch shrinks.

    Sample i * n + k is the k-th of prompt i. `active[s]` is the sample in slot s; the slots in use are always the
    first ones, so that a step computes on views of the cache.
    """

    def __init__(self, policy, prompts: list, n: int, limits: list[int], temperature: float):
        self.policy, self.n, self.temperature = policy, n, temperature
        device, total = policy.device, len(limits)
        self.look = LOOK_EVERY[device.type]
        steps = max(limits) + self.look  # rows run on until somebody looks; generate() cuts what is past their end
        self.uniform = F.pad(1 - torch.rand(total, max(limits)), (0, self.look), value=0.5).to(device)
        self.out = torch.zeros(total, steps, dtype=torch.long, device=device)
        self.limit = torch.tensor(limits, device=device)
        self.eos = torch.tensor(sorted(policy.eos), dtype=torch.long, device=device)
        self.over = torch.zeros(total, dtype=torch.bool, device=device)
        self.longest = max(map(len, prompts)) + steps
        self.first = 0  # tokens that all prompts share and no slot holds, see attention_after
        self.active: list[int] = []
        self.held: list[int] = []  # tokens held per slot, known without asking the device
        self.cache: SlotCache | None = None
        self.starts = self._starts(prompts)
        while (self.cache is None or len(self.active) < self.cache.slots) and self._begin(len(self.active)):
            pass

    def _starts(self, prompts: list) -> Iterator[tuple]:
        """(sample, its first token, the packed prompts' cache, the prompt's columns in it), a row at a time."""
        for row, cache, shared, hidden in self.policy._prefill(prompts):
            self.first = shared if shared >= SHARED_FROM else 0
            for i, path in zip(row.members, row.paths):
                samples = range(i * self.n, (i + 1) * self.n)
                logits = self.policy._head(hidden[path[-1]]).repeat(self.n, 1)
                tokens = pick(logits, self.uniform[samples.start : samples.stop, 0], self.temperature)
                columns = np.concatenate([np.arange(self.first, shared), shared + path])
                columns = torch.from_numpy(columns).to(self.policy.device)
                for sample, token in zip(samples, tokens):
                    yield sample, token, cache, columns

    def _begin(self, slot: int) -> bool:
        """Put the next waiting sample into a slot; False if none waits."""
        if (start := next(self.starts, None)) is None:
            return False
        sample, token, prefilled, columns = start
        if self.cache is None:
            room = self.longest - self.first
            self.cache = SlotCache(self._slot_count(prefilled, room), room, prefilled, self.policy.device)
            self.shared = {"shared": prefilled.prefix} if self.first else {}
            self.sample, self.count, self.token = torch.zeros(
                3, self.cache.slots, dtype=torch.long, device=token.device
            )
        self.cache.fill(slot, prefilled, columns)
        self.active[slot : slot + 1], self.held[slot : slot + 1] = [sample], [len(columns)]
        self.sample[slot], self.count[slot], self.token[slot] = sample, 1, token
        self.out[sample, 0] = token
        self.over[sample] = torch.isin(token, self.eos) | (self.limit[sample] <= 1)
        return True

    def _slot_count(self, like: RowCache, columns: int) -> int:
        policy = self.policy
        cuda = policy.device.type == "cuda"
        per_token = sum(k[0, :, 0].nbytes + v[0, :, 0].nbytes for k, v in like.kv)
        budget = 0.5 * torch.cuda.mem_get_info(policy.device)[0] if cuda else CPU_KV_MIB * 2**20
        most = policy.slots or min(CUDA_SLOTS if cuda else CPU_SLOTS, int(budget / (per_token * columns)))
        return max(1, min(most, len(self.limit)))

    def step(self) -> None:
        """One token for every active sample; no value is read back from the device."""
        n, policy, cache = len(self.active), self.policy, self.cache
        cache.width = max(self.held) + 1
        length, sample, count = cache.length[:n], self.sample[:n], self.count[:n]
        mask = torch.arange(cache.width, device=policy.device) <= length[:, None]  # (n, width)
        out = policy.model.base_model(
            input_ids=self.token[:n, None],
            position_ids=self.first + length[:, None],
            attention_mask=mask[:, None, None],
            use_cache=True,
            **{policy.cache_argument: cache},
            **self.shared,
        )
        token = pick(policy._head(out.last_hidden_state[:, 0]), self.uniform[sample, count], self.temperature)
        self.token[:n] = self.out[sample, count] = token
        length += 1
        count += 1
        self.over[sample] |= torch.isin(token, self.eos) | (count >= self.limit[sample])
        self.held = [h + 1 for h in self.held]

    def retire(self) -> int:
        """Replace the finished samples by waiting ones, else by the last active ones. Returns how many finished."""
        over = self.over[self.sample[: len(self.active)]].tolist()
        for slot in reversed(range(len(over))):  # from the back: a sample that moves forward has been looked at
            if over[slot] and not self._begin(slot):
                last = len(self.active) - 1
                if slot != last:
                    self.cache.move(last, slot)
                    for state in (self.sample, self.count, self.token):
                        state[slot] = state[last]
                    self.active[slot], self.held[slot] = self.active[last], self.held[last]
                self.active.pop()
                self.held.pop()
        return sum(over)
