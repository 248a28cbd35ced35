"""self_check.py: does the packed engine reproduce this model's logits? Asked once, at load.

Two checks. Masks, positions and caches in fp32, on a twin with few layers and random weights,
tight. Then the model itself in its own type on real text: within the rounding noise between its
eager and its sdpa kernels, which grows with depth and with large activations.
"""

import copy
import math

import torch
from torch import Tensor, nn

from extras.data import InputError
from extras.packed import PackedEngine, Sampler, layer_kinds
from extras.prefix_tree import pack

# Real text: two prompts with a long common prefix.
SAMPLE_TEXT = (
    "Rivers carry rain from the hills to the sea. On the way they cut valleys, feed lakes and "
    "move sand and stones. A dam holds the water back, so that a town can use it in a dry summer. "
    "Below the dam fish that swim upstream to lay their eggs need a ladder of small pools. "
)
SAMPLE_PROMPTS = [
    [{"role": "user", "content": SAMPLE_TEXT * 2 + question}]
    for question in ("What is a dam?", "Why do fish need a ladder?")
]
# torch before 2.11 leaves its allocator broken when a capture fails.
GRAPHS_ARE_SAFE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def try_create(model, eos: set[int], texts: list[list[int]], **limits) -> "PackedEngine | None":
    """The engine if it reproduces this model's logits, else None and one printed line.

    texts: token ids of two real prompts with a common prefix. limits: token_budget, slots.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config(decoder=True)
    before, exact, reason = config._attn_implementation, [], ""
    # eager serves what the packed attention cannot compute: softcaps and sinks.
    for attention in ("packed", "eager"):
        try:
            if not exact:
                # Once, before norms are fused.
                eager = [plain_logits(model, ids, "eager") for ids in texts]
                limit = rounding_noise(model, eager, texts)
                exact = eager
            reason = twin_error(decoder, config, attention)
            if reason:
                continue
            model.set_attn_implementation(attention)
            fuse_norms(decoder)
            engine = PackedEngine(decoder, model.get_output_embeddings(), config, eos, **limits)
            off = mean_difference(exact, row_logits(engine, texts))
            reason = f"logits off by {off:.3g} in the mean, rounding explains {limit:.3g}"
            # A NaN is not <= limit.
            if off <= limit:
                can_capture = engine.cuda and GRAPHS_ARE_SAFE
                engine.cuda_graph = can_capture and graphs_work(engine, texts)
                return engine
        except torch.OutOfMemoryError as error:
            raise InputError(f"out of GPU memory ({error}); use a smaller --model") from error
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    print(f"  plain engine, slower: packing is not exact for this model ({reason})")
    model.set_attn_implementation(before)
    return None


def rounding_noise(model, exact: list[Tensor], texts: list[list[int]]) -> float:
    """The mean difference of logits that rounding explains: 1.5 times that of eager and sdpa."""
    noise = 0.0
    if model._supports_sdpa:
        noise = mean_difference(exact, [plain_logits(model, ids, "sdpa") for ids in texts])
    size = torch.cat(exact).abs().mean().item()
    return max(1.5 * noise, 0.25 * math.sqrt(torch.finfo(model.dtype).eps) * size)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Replace each RMSNorm of eight kernels by torch's of one, where both give the same values."""
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        is_norm = type(module).__name__.endswith("RMSNorm") and eps is not None
        if not is_norm or getattr(weight, "dtype", None) != model.dtype:
            continue
        fused = nn.RMSNorm(weight.shape, eps)
        fused.weight = weight
        x = torch.linspace(-3, 3, 4 * len(weight)).view(4, -1).to(weight)
        ours, exact = fused(x).float(), module(x).float()
        if (ours - exact).abs().max() <= torch.finfo(x.dtype).eps * 4 * exact.abs().max():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fused)


@torch.no_grad()
def twin_error(decoder, config, attention: str) -> str:
    """What the engine gets wrong on a small random fp32 model of the same architecture, or ""."""
    kinds = layer_kinds(config)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        return f"layers of {', '.join(sorted(unknown))}"
    twin, head, ids = random_twin(decoder, config, kinds)
    # A prefix long enough to be shared, then branches that must not attend to each other.
    texts = [ids[:150], ids[:132] + ids[150:]]

    def exact_logits(ids: list[int]) -> Tensor:
        """(T, V) of the twin under its own attention."""
        batch = torch.tensor([ids], device=decoder.device)
        return head(twin(input_ids=batch, use_cache=False).last_hidden_state[0])

    exact = [exact_logits(ids) for ids in texts]
    twin.set_attn_implementation(attention)
    engine = PackedEngine(twin, head, twin.config)
    # The head's scale and cap are checked on the model itself.
    engine.head.scale, engine.head.cap = 1.0, None
    ours = row_logits(engine, texts)
    sampler = Sampler(engine, texts, torch.full((2, 1, 4), 0.5), 0.0)
    started = list(zip(sampler.sample.tolist(), sampler.token.tolist()))
    width = max(sampler.lengths) + 1
    ours += sampler.next_logits(len(started), width).split(1)
    twin.set_attn_implementation("eager")
    exact += [exact_logits(texts[i] + [token])[-1:] for i, token in started]
    error = max((a - b).abs().max().item() for a, b in zip(exact, ours))
    largest = max(t.abs().max().item() for t in exact)
    return "" if error < 1e-3 * largest else f"off by {error / largest:.2%} in fp32"


def random_twin(decoder, config, kinds: list[str]) -> tuple:
    """(decoder with one layer of each attention kind, output head, token ids), all random."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = len(kinds), 256, None
    small._attn_implementation = "eager"
    if getattr(config, "layer_types", None):
        small.layer_types = kinds
    if getattr(config, "sliding_window", None):
        # Short enough for the check to reach beyond it.
        small.sliding_window = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = type(decoder)(small).float().eval()
        for parameter in twin.parameters():
            if parameter.dim() > 1:
                # Wide enough that attention is far from uniform.
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        head = nn.Linear(small.hidden_size, 256, bias=False)
        ids = torch.randint(0, 256, (180,)).tolist()
    return twin.to(decoder.device), head.to(decoder.device), ids


@torch.no_grad()
def plain_logits(model, ids: list[int], attention: str) -> Tensor:
    """(T, V) in fp32 by the model itself under one of its own attention kernels."""
    model.set_attn_implementation(attention)
    batch = torch.tensor([ids], device=model.device)
    return model(batch, use_cache=False).logits[0].float()


@torch.no_grad()
def row_logits(engine: PackedEngine, texts: list[list[int]]) -> list[Tensor]:
    """(T, V) per text, from packed rows."""
    logits = {}
    for row in pack(texts, engine.token_budget):
        hidden = engine._forward(row)
        for i, path in zip(row.members, row.paths):
            logits[i] = engine.head.logits(hidden[torch.from_numpy(path).to(engine.device)])
    return [logits[i] for i in range(len(texts))]


def mean_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Mean absolute difference of two lists of tensors."""
    return (torch.cat(a) - torch.cat(b)).abs().mean().item()


def graphs_work(engine: PackedEngine, texts: list[list[int]]) -> bool:
    """Whether greedy decoding by CUDA graphs gives the eager steps' tokens. Prints if not."""
    uniform = torch.full((len(texts), 4, 24), 0.5)
    expected = torch.tensor(engine.sample(texts, uniform, 0.0))
    try:
        engine.cuda_graph, engine.graph_pool = True, torch.cuda.graph_pool_handle()
        found = torch.tensor(engine.sample(texts, uniform, 0.0))
        # Rounding may change a token now and then. A wrong graph changes most.
        differ = (found != expected).float().mean().item()
        reason = f"{differ:.0%} of its tokens differ" if differ > 0.1 else ""
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    if reason:
        print(f"  no CUDA graphs, slower: {reason}")
    return not reason
