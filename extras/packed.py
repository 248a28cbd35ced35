"""packed.py: the fast engine. Every distinct token of a batch is computed once.

Prompts share a template, samples a prompt, verdicts an instruction and an answer. So most tokens
of a GRPO step are repetitions, and padding adds more. This file removes both:

    pack            sequences -> rows, see prefix_tree.py
    Head            log-probabilities without the full-vocabulary logits
    Sampler         continuous batching: shared prompts prefilled once, slots that are refilled
    PackedEngine    the interface of rl.PlainEngine

The model's own decoder does the work. It receives a 4-D additive mask and a Cache. Values and
gradients equal rl.PlainEngine's up to rounding; self_check.py tests that when a model is loaded.
Left out: paged attention, custom kernels, hand-written backward passes.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer

from extras.prefix_tree import Row, common_prefix, pack

# Stands in a completion for a token that could not be sampled because a logit was NaN.
INVALID_TOKEN = -1
# Distinct tokens per row, and queries per block of attention on a CPU.
TOKEN_BUDGET, BLOCK = {"cuda": 2048, "cpu": 1024}, 256
# Samples decoded side by side. More only make a step longer.
MAX_SLOTS = {"cuda": 256, "cpu": 64}
# EOS is checked every so many tokens, since a check waits for the GPU. Overrun tokens are cut.
EOS_CHECK_INTERVAL = {"cuda": 8, "cpu": 1}
# A prefix common to all prompts is prefilled once and not copied into the slots from this length.
MIN_SHARED_PREFIX = 128
# fp32 logits held at once, in elements.
LOGITS_CHUNK = 1 << 25
# Memory for keys and values, and for activations: a share of what is free on a GPU, MiB on a CPU.
GPU_MEMORY_SHARE, CPU_MEMORY_MIB = 0.8, 2048
# use_less_memory() halves the rows down to this size.
MIN_TOKEN_BUDGET = 128
# CUDA graphs: batch sizes above 8 are rounded up to a multiple of 8, columns to a multiple of 64.
GRAPH_SLOTS, GRAPH_COLUMNS = 8, 64
# Gradient checkpointing of a function: recomputed(function, *tensors).
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def sample_token(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Inverse-CDF sampling, so that a completion depends on its own draws alone.

    logits (B, V) in fp32, uniform (B,) in (0, 1] -> ids (B,). Temperature 0 is greedy.
    INVALID_TOKEN where a logit is NaN.
    """
    if temperature == 0:
        largest, token = logits.max(-1)
        return token.masked_fill(largest.isnan(), INVALID_TOKEN)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    # subtle: rounding leaves the last entry a hair off 1, so the draw is scaled by it.
    target = uniform[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, target)[:, 0].clamp_max(logits.shape[-1] - 1)
    return token.masked_fill(target[:, 0].isnan(), INVALID_TOKEN)


# ------------------------------------------------------------ attention
def packed_attention(
    module, query, key, value, attention_mask, scaling=None, blocks=(), shared_prefix=None, **kwargs
):
    """Attention under an additive mask, registered with transformers as "packed".

    query (n, H, q, D), key and value (n, h, W, D), mask (n or 1, 1, q, W) -> (n, q, H, D), None.
    A GPU takes sdpa, but for a shared prefix. On a CPU plain products are faster, and a row is
    computed in blocks (start, end, columns): queries start:end attend to no other columns.
    """
    if query.is_cuda and shared_prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    query = query * (scaling or query.shape[-1] ** -0.5)
    prefix = shared_prefix.kv[module.layer_idx] if shared_prefix is not None else None
    if not blocks:
        out = attend(query, key, value, attention_mask, prefix)
    else:
        parts = [
            attend(query[:, :, i:j], key[:, :, c], value[:, :, c], attention_mask[:, :, i:j, c])
            for i, j, c in blocks
        ]
        out = torch.cat(parts, 2)
    return out.transpose(1, 2), None


def attend(query, key, value, mask, prefix=None) -> Tensor:
    """Scaled query (n, H, q, D), key and value (n, h, W, D), mask (n or 1, 1, q, W) -> as query.

    prefix: keys and values (1, h, P, D) before these, common to all n samples. q is 1 then, so the
    queries of all samples form one matrix and the prefix is read once.
    """
    n, heads, length, dim = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    # The query heads of one key head form one matrix: (n * h, H / h * q, D).
    query = query.reshape(n * kv_heads, groups * length, dim)
    mask = mask.expand(n, kv_heads, -1, -1).flatten(0, 1)
    if length > 1:
        mask = mask.repeat(1, groups, 1)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.baddbmm(mask, query, key.mT)
    if prefix is None:
        return (scores.softmax(-1) @ value).view(n, heads, length, dim)
    # (h, n * H / h, D) against (h, P, D).
    rows = query.unflatten(0, (n, kv_heads)).transpose(0, 1).flatten(1, 2)
    far = (rows @ prefix[0][0].mT).unflatten(1, (n, groups)).transpose(0, 1).flatten(0, 1)
    weights = torch.cat([far, scores], -1).softmax(-1)
    far, near = weights.split([far.shape[-1], scores.shape[-1]], -1)
    rows = far.unflatten(0, (n, kv_heads)).transpose(0, 1).flatten(1, 2) @ prefix[1][0]
    out = rows.unflatten(1, (n, groups)).transpose(0, 1).flatten(0, 1) + near @ value
    return out.view(n, heads, length, dim)


AttentionInterface.register("packed", packed_attention)
# Other callers of the model get eager's additive masks.
AttentionMaskInterface.register("packed", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


class RowCache(Cache):
    """Keys and values of a packed row after those of its prefix: per layer (1, h, P + L, D)."""

    def __init__(self, prefix: "RowCache | None" = None):
        super().__init__(layers=[])
        self.prefix = prefix
        self.kv: list[tuple[Tensor, Tensor]] = []

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Called by the model's attention. Returns the keys and values to attend to."""
        if self.prefix is not None:
            prefix_key, prefix_value = self.prefix.kv[layer_idx]
            key = torch.cat([prefix_key, key], 2)
            value = torch.cat([prefix_value, value], 2)
        # Not views, which would keep the fused projections they are cut from alive.
        self.kv.append((key.contiguous(), value.contiguous()))
        return self.kv[-1]


class SlotCache(Cache):
    """Keys and values of the samples being decoded: a slot each, in buffers that stay in place."""

    def __init__(self, slots: int, columns: int, like: RowCache):
        super().__init__(layers=[])
        # Zeros, not empty: a masked column has weight 0, and 0 * NaN is NaN.
        self.kv = [
            tuple(t.new_zeros(slots, t.shape[1], columns, t.shape[3]) for t in layer)
            for layer in like.kv
        ]
        device = like.kv[0][0].device
        self.slot = torch.arange(slots, device=device)
        # Tokens per slot, which is the next column; and the columns that a step reads.
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.width = 0

    def update(self, key, value, layer_idx, *args, **kwargs):
        """(n, h, 1, D): write each sample's new token into its next column."""
        n = len(key)
        keys, values = self.kv[layer_idx]
        keys[self.slot[:n], :, self.lengths[:n]] = key[:, :, 0]
        values[self.slot[:n], :, self.lengths[:n]] = value[:, :, 0]
        return keys[:n, :, : self.width], values[:n, :, : self.width]

    def admit(self, slot: int, row: RowCache, columns: Tensor) -> None:
        """Copy a prompt, `columns` of a prefilled row, into a slot."""
        for own, prefilled in zip(self.kv, row.kv):
            for t, source in zip(own, prefilled):
                t[slot, :, : len(columns)] = source[0, :, columns]
        self.lengths[slot] = len(columns)

    def move(self, source: int, slot: int) -> None:
        """Copy a sample into another slot, so that the slots in use are the first ones."""
        for layer in self.kv:
            for t in layer:
                t[slot] = t[source]
        self.lengths[slot] = self.lengths[source]


# ------------------------------------------------------------ the output head
class Head:
    """logits = cap * tanh(scale * W h / cap): Gemma's cap, Granite's and Cohere's scale."""

    def __init__(self, module: nn.Module, config):
        self.module = module
        self.cap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or 1.0
        self.scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
        self.chunk = max(1, LOGITS_CHUNK // len(module.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., V) in fp32"""
        logits = self.module(hidden).float()
        if self.scale != 1:
            logits = logits * self.scale
        return self.cap * (logits / self.cap).tanh() if self.cap else logits

    def token_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """hidden (N, d), targets (N,) -> log p(target) (N,) in fp32.

        Full-vocabulary logits are held for one chunk at a time. The backward pass computes them
        again, chunk by chunk.
        """

        def chunk_logprobs(h: Tensor, t: Tensor) -> Tensor:
            """h (n, d), t (n,) -> (n,)"""
            return -F.cross_entropy(self.logits(h).div_(temperature), t, reduction="none")

        if len(hidden) <= self.chunk:
            return chunk_logprobs(hidden, targets)
        chunks = zip(hidden.split(self.chunk), targets.split(self.chunk))
        return torch.cat([recomputed(chunk_logprobs, h, t) for h, t in chunks])


# ------------------------------------------------------------ sampling
def round_up(n: int, multiple: int) -> int:
    """The next multiple at or above n."""
    return (n + multiple - 1) // multiple * multiple


class Sampler:
    """Continuous batching. A finished sample's slot goes to a waiting one, then the batch shrinks.

    Sample i * n + k is the k-th of prompt i. `lengths` has an entry per slot in use. These are the
    first slots, so that a step computes on views of the cache.
    """

    def __init__(self, engine: "PackedEngine", prompts: list, uniform: Tensor, temperature: float):
        self.engine, self.temperature = engine, temperature
        device = engine.device
        self.n, self.limit = uniform.shape[1:]
        self.interval = EOS_CHECK_INTERVAL[device.type]
        # Samples overrun until the next EOS check. The last row is where idle slots write.
        self.uniform = F.pad(uniform.flatten(0, 1), (0, self.interval, 0, 1), value=0.5).to(device)
        self.idle = len(self.uniform) - 1
        self.out = torch.zeros(self.uniform.shape, dtype=torch.long, device=device)
        self.eos = torch.tensor(sorted(engine.eos), dtype=torch.long, device=device)
        self.finished = torch.zeros(len(self.out), dtype=torch.bool, device=device)
        self.longest = max(map(len, prompts)) + self.uniform.shape[1]
        # Length of the prefix that is shared by all samples and held by no slot.
        self.shared = 0
        self.lengths: list[int] = []
        self.cache: SlotCache | None = None
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.waiting = self._prefill(prompts)
        while self.cache is None or len(self.lengths) < len(self.cache.slot):
            if not self._admit(len(self.lengths)):
                break

    def _prefill(self, prompts: list) -> Iterator[tuple]:
        """Yields (sample, its first token, the prefilled row's cache, the prompt's columns)."""
        for row, cache, hidden in self.engine.prefill(prompts):
            share = row.prefix >= MIN_SHARED_PREFIX
            share = share and self.longest <= self.engine.max_sharing_length
            self.shared = row.prefix if share else 0
            for i, path in zip(row.members, row.paths):
                logits = self.engine.head.logits(hidden[path[-1]]).repeat(self.n, 1)
                draws = self.uniform[i * self.n : (i + 1) * self.n, 0]
                tokens = sample_token(logits, draws, self.temperature)
                columns = np.concatenate([np.arange(self.shared, row.prefix), row.prefix + path])
                columns = torch.from_numpy(columns).to(self.engine.device)
                for sample, token in enumerate(tokens, i * self.n):
                    yield sample, token, cache, columns

    def _admit(self, slot: int) -> bool:
        """Put the next waiting sample into a slot. False if none waits."""
        waiting = next(self.waiting, None)
        if waiting is None:
            return False
        sample, token, prefilled, columns = waiting
        if self.cache is None:
            self._allocate(prefilled)
        self.cache.admit(slot, prefilled, columns)
        self.lengths[slot : slot + 1] = [len(columns)]
        self.sample[slot] = sample
        self.count[slot] = 1
        self.token[slot] = token.clamp_min(0)
        self.out[sample, 0] = token
        self.finished[sample] = self._is_eos(token) | (self.limit <= 1)
        return True

    def _allocate(self, like: RowCache) -> None:
        columns = round_up(self.longest - self.shared, 8)
        bytes_per_token = sum(t[0, :, 0].nbytes for layer in like.kv for t in layer)
        affordable = int(self.engine.memory_limit() / (bytes_per_token * columns))
        slots = max(1, min(affordable, self.engine.slots, self.idle))
        self.cache = SlotCache(slots, columns, like)
        self.shared_prefix = like.prefix if self.shared else None
        # Per slot: which sample, how many of its tokens are sampled, the last of them.
        self.state = torch.zeros(3, slots, dtype=torch.long, device=self.engine.device)
        self.sample, self.count, self.token = self.state
        self.sample.fill_(self.idle)

    def _is_eos(self, token: Tensor) -> Tensor:
        # Not torch.isin, which waits for the GPU where there are many EOS ids.
        return (token[..., None] == self.eos).any(-1)

    def next_logits(self, n: int, width: int) -> Tensor:
        """(n, V) for the first n slots. Their last tokens enter the cache."""
        cache = self.cache
        cache.width = width
        lengths = cache.lengths[:n]
        hidden = self.engine.decoder(
            input_ids=self.token[:n, None],
            position_ids=self.shared + lengths[:, None],
            attention_mask=self.engine.decode_masks(lengths, width),
            cache=cache,
            use_cache=True,
            **({"shared_prefix": self.shared_prefix} if self.shared else {}),
        ).last_hidden_state
        lengths += 1
        return self.engine.head.logits(hidden[:, 0])

    def _decode(self, n: int, width: int) -> None:
        """One token for the first n slots. Reads nothing back from the device."""
        sample, count = self.sample[:n], self.count[:n]
        logits = self.next_logits(n, width)
        token = sample_token(logits, self.uniform[sample, count], self.temperature)
        self.out[sample, count] = token
        self.token[:n] = token.clamp_min(0)
        count += 1
        self.finished[sample] |= self._is_eos(token) | (count >= self.limit)

    def step(self) -> None:
        """One token for every slot in use, by a CUDA graph where the engine has them."""
        n, width = len(self.lengths), max(self.lengths) + 1
        self.lengths = [length + 1 for length in self.lengths]
        slots, columns = self.cache.kv[0][0].shape[::2]
        if not self.engine.cuda_graph:
            return self._decode(n, min(round_up(width, 8), columns))
        n = round_up(n, GRAPH_SLOTS) if n > GRAPH_SLOTS else 1 << (n - 1).bit_length()
        size = min(n, slots), min(round_up(width, GRAPH_COLUMNS), columns)
        if size in self.graphs:
            return self.graphs[size].replay()
        # The first step of a size runs eagerly. Capturing computes nothing.
        self._decode(*size)
        self.graphs[size] = capture(lambda: self._decode(*size), self.engine.graph_pool)

    def evict(self) -> None:
        """Replace finished samples by waiting ones, else by the last slot in use."""
        flags = self.finished[self.sample[: len(self.lengths)]].tolist()
        # A slot that is full has overrun: a broken CUDA graph sets no flags.
        full = self.cache.kv[0][0].shape[2]
        finished = [flag or n >= full for flag, n in zip(flags, self.lengths)]
        # From the back: a sample that moves forward has been checked.
        for slot in reversed(range(len(finished))):
            if not finished[slot] or self._admit(slot):
                continue
            last = len(self.lengths) - 1
            if slot != last:
                self.cache.move(last, slot)
                self.state[:, slot] = self.state[:, last]
                self.lengths[slot] = self.lengths[last]
            self.lengths.pop()
        # A graph may serve more slots than are in use.
        unused = slice(len(self.lengths), None)
        self.sample[unused] = self.idle
        self.count[unused] = 0
        self.cache.lengths[unused] = 0

    def run(self) -> list[list[list[int]]]:
        """Per prompt, n rows of ids. What follows an EOS is noise."""
        while self.lengths:
            for _ in range(self.interval):
                self.step()
            self.evict()
        return self.out[:-1, : -self.interval].unflatten(0, (-1, self.n)).tolist()


def capture(work, pool) -> "torch.cuda.CUDAGraph":
    """The kernels that work() launches, as one launch. All graphs share a memory pool."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    finally:
        # A failed capture leaves torch's capture stream current.
        torch.cuda.set_stream(stream)
    return graph


# ------------------------------------------------------------ the engine
class PackedEngine:
    """rl.PlainEngine's methods over packed rows of at most `token_budget` distinct tokens."""

    def __init__(self, decoder, lm_head, config, eos=frozenset(), token_budget=0, slots=0):
        self.decoder, self.config, self.eos = decoder, config, eos
        self.head = Head(lm_head, config)
        self.device, self.dtype = lm_head.weight.device, decoder.dtype
        self.cuda = self.device.type == "cuda"
        self.token_budget = token_budget or TOKEN_BUDGET[self.device.type]
        self.slots = slots or MAX_SLOTS[self.device.type]
        self.layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        # Attention kind -> its window in tokens, None for full attention.
        window = getattr(config, "sliding_window", None)
        kinds = layer_kinds(config)
        self.windows = {kind: None if kind == "full_attention" else window for kind in kinds}
        # Samples up to this length may share a prefix: no window ends within them.
        self.max_sharing_length = min((w for w in self.windows.values() if w), default=math.inf)
        self.packed = config._attn_implementation == "packed"
        if not self.packed:
            self.max_sharing_length = 0
        # Decode steps are captured as CUDA graphs. try_create() decides.
        self.cuda_graph = False
        self.graph_pool = None
        # After an out-of-memory all layers recompute their activations, and the limits shrink.
        self.recompute_all = False

    # -------------------------------------------- the three methods
    @torch.no_grad()
    def sample(self, prompts: list, uniform: Tensor, temperature: float) -> list:
        """As rl.PlainEngine.sample, many at a time."""
        return Sampler(self, prompts, uniform, temperature).run()

    def logprobs(self, pairs: list, temperature: float = 1.0) -> Iterator[tuple[list, list]]:
        """As rl.PlainEngine.logprobs, one packed row at a time."""
        # A completion's last token predicts nothing, so it is not in the row.
        for row in pack([prompt + done[:-1] for prompt, done in pairs], self.token_budget):
            hidden = self._forward(row)
            sizes = [len(pairs[i][1]) for i in row.members]
            nodes = np.concatenate([path[len(path) - n :] for path, n in zip(row.paths, sizes)])
            targets = torch.tensor([t for i in row.members for t in pairs[i][1]], dtype=torch.long)
            hidden = hidden[torch.from_numpy(nodes).to(self.device)]
            logp = self.head.token_logprobs(hidden, targets.to(self.device), temperature)
            yield row.members, list(logp.split(sizes))

    @torch.no_grad()
    def next_probabilities(self, prompts: list, tokens: list[int]) -> Tensor:
        """As rl.PlainEngine.next_probabilities, shared prefixes once."""
        out = torch.empty(len(prompts), len(tokens))
        for row, _, hidden in self.prefill(prompts):
            last = torch.tensor([int(path[-1]) for path in row.paths], device=self.device)
            members, chunk = torch.tensor(row.members), self.head.chunk
            for i, h in zip(members.split(chunk), hidden[last].split(chunk)):
                out[i] = self.head.logits(h).softmax(-1)[:, tokens].cpu()
        return out

    # -------------------------------------------- forward passes
    def prefill(self, prompts: list) -> Iterator[tuple[Row, RowCache, Tensor]]:
        """Yields rows, their caches and hidden states (L, d). A long common prefix comes first.

        Call it under no_grad. (A decorated generator would run code when it is dropped.)
        """
        shared, cache = 0, None
        if len(prompts) > 1:
            common = common_prefix(np.asarray(min(prompts)), np.asarray(max(prompts)))
            shared = min(common, min(map(len, prompts)) - 1)
        # A short prefix is cheaper in each row than in a pass of its own.
        if shared >= max(1, min(MIN_SHARED_PREFIX, self.token_budget // 16)):
            cache = RowCache()
            self._forward(next(pack([prompts[0][:shared]], self.token_budget)), cache)
        else:
            shared = 0
        for row in pack(prompts, self.token_budget, shared):
            own = RowCache(cache)
            yield row, own, self._forward(row, own)

    def _forward(self, row: Row, cache: RowCache | None = None) -> Tensor:
        """A packed row -> hidden states (L, d)."""
        recompute = self._layers_to_recompute(len(row.tokens)) if torch.is_grad_enabled() else 0
        for i, layer in enumerate(reversed(self.layers)):
            layer.training = layer.gradient_checkpointing = i < recompute
            layer._gradient_checkpointing_func = recomputed
        columns = np.concatenate([np.arange(row.prefix), row.position_ids])
        distance = row.position_ids[:, None] - columns
        mask = row.mask()
        visible, distance, tokens, position_ids = (
            torch.from_numpy(x).to(self.device)[None]
            for x in (mask, distance, row.tokens, row.position_ids)
        )
        blocks = []
        for i in range(0, len(mask), BLOCK if not self.cuda and self.packed else len(mask)):
            block = mask[i : i + BLOCK]
            blocks.append((i, i + len(block), torch.from_numpy(np.flatnonzero(block.any(0)))))
        out = self.decoder(
            input_ids=tokens,
            position_ids=position_ids,
            attention_mask=self._masks(visible, distance),
            cache=cache,
            use_cache=cache is not None,
            **({"blocks": blocks} if len(blocks) > 1 else {}),
        )
        return out.last_hidden_state[0]

    def decode_masks(self, lengths: Tensor, width: int):
        """Masks of a decode step: slot i attends to its own columns up to lengths[i]."""
        distance = lengths[:, None, None] - torch.arange(width, device=self.device)
        return self._masks(distance >= 0, distance)

    def _masks(self, visible: Tensor, distance: Tensor):
        """(B, Q, K) bool, (B, Q, K) positions apart -> additive (B, 1, Q, K), or one per kind."""
        masks = {}
        for kind, window in self.windows.items():
            seen = visible & (distance < window) if window else visible
            zeros = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            masks[kind] = zeros.masked_fill_(~seen, -torch.inf)[:, None]
        # Models of one kind take the mask itself, others a dict by kind.
        return masks if len(masks) > 1 else masks.popitem()[1]

    # -------------------------------------------- memory
    def memory_limit(self) -> float:
        """Bytes for keys and values while sampling, and for activations while training."""
        if not self.cuda:
            # Not what is free: the number of slots must not differ when a run is resumed.
            return CPU_MEMORY_MIB * 2**20
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return GPU_MEMORY_SHARE * (torch.cuda.mem_get_info(self.device)[0] + unused)

    def _layers_to_recompute(self, tokens: int) -> int:
        """How many layers must drop their activations for a row of so many tokens to fit."""
        layers = len(self.layers)
        if self.recompute_all:
            return layers
        # Kept per token and layer, counted on a Llama by saved-tensor hooks: 9 vectors of the
        # hidden size and 4 of the inner size. Lists give a size per layer.
        inner = getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size
        hidden = tokens * self.config.hidden_size * self.dtype.itemsize
        kept = 9 * hidden + 4 * tokens * int(np.max(inner)) * self.dtype.itemsize
        if not self.cuda:
            # The attention weights, taken to be of 4 blocks per token. (sdpa keeps none.)
            columns = min(tokens, 4 * BLOCK)
            kept += self.config.num_attention_heads * tokens * columns * self.dtype.itemsize
        # A recomputed layer keeps its input.
        affordable = (self.memory_limit() - layers * hidden) / (kept - hidden)
        return layers - min(layers, max(0, int(affordable)))

    def use_less_memory(self) -> bool:
        """After an out-of-memory: recompute all layers, then halve rows and slots."""
        if not self.recompute_all:
            self.recompute_all = True
        elif self.token_budget > MIN_TOKEN_BUDGET or self.slots > 1:
            half = max(MIN_TOKEN_BUDGET, self.token_budget // 2)
            self.token_budget = min(half, self.token_budget)
            self.slots = max(1, self.slots // 2)
        else:
            return False
        return True


def layer_kinds(config) -> list[str]:
    """The kinds of attention in a model."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return list(dict.fromkeys(kinds or ["sliding_attention" if window else "full_attention"]))
