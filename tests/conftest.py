"""Tiny random models with a byte-level tokenizer, built on the spot: no download, no GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
# Tiny models have nothing to share among threads; the suite runs in two processes instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import rl
import seif
from extras import data


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite takes two processes, where pytest-xdist is there to run them."""
    # One of those processes comes by here, too.
    starts = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    whole = all(Path(name).is_dir() for name in config.args) and not config.option.keyword
    if starts and whole and config.option.numprocesses is None:
        config.option.numprocesses = 0 if config.option.usepdb else 2


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# fmt: off
SIZES = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 2048, "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 258,
}
LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Architectures by what sets them apart: biases, fused projections, query norms, windows, logits
# that are scaled or capped, sinks, experts. Those of OTHERS convolve or add a bias by distance.
KINDS = {
    "llama": ("LlamaConfig", {}), "smollm2": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}), "qwen3": ("Qwen3Config", {}), "cohere": ("CohereConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}), "phi": ("PhiConfig", {}),
    "mistral-window": ("MistralConfig", {"sliding_window": 8}), "phi3": ("Phi3Config", {}),
    "gemma3": ("Gemma3TextConfig", LOCAL), "olmo3": ("Olmo3Config", LOCAL),
    "gemma2": ("Gemma2Config", LOCAL | {"query_pre_attn_scalar": 16}),
    "granite": ("GraniteConfig", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS),
    "gpt-oss": ("GptOssConfig", LOCAL | {"num_local_experts": 4}),
}
OTHERS = {
    "moe-after-mlp": ("Qwen3MoeConfig", EXPERTS | {"mlp_only_layers": [0]}),
    "mamba": ("MambaConfig", {}), "bloom": ("BloomConfig", {}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
}
# fmt: on


def make_tokenizer(template: str = CHATML):
    """One token per byte, plus the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[2]
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder, kind: str = "llama", template: str = CHATML, eos=258, **sizes):
    name, extra = (KINDS | OTHERS)[kind]
    torch.manual_seed(7)
    config = getattr(transformers, name)(**(SIZES | extra | sizes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # wide enough that predictions differ visibly
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return functools.cache(lambda kind: make_model(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture
def policy(folders):
    """A fresh tiny Llama with the two trained roles, on the GPU if there is one."""
    policy = rl.load(folders("llama"), bits=16)
    for seed, role in enumerate(("instructor", "follower")):
        policy.add(role, seed=seed)
    return policy


def load_cpu(folder: str, engine="packed", bits=16, dtype="fp32", **options) -> rl.Policy:
    """A policy on the CPU, exact by default, with a fresh adapter `follower`."""
    policy = rl.load(folder, bits, "cpu", engine=engine, dtype=dtype, **options)
    policy.add("follower")
    return policy


def randomise(policy, role: str, seed: int = 3) -> None:
    """Give a role's B (zero at the start) values, so that it computes something of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.tensors(role).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def load_trained(folder: str, engine="plain", *args, **options) -> rl.Policy:
    """load_cpu() with an adapter `follower` that changes the output."""
    policy = load_cpu(folder, engine, *args, **options)
    randomise(policy, "follower")
    return policy


def prepare(folder, patch) -> None:
    """A tiny model, seed questions and held-out rows for a run (tests/tiny.py)."""
    tiny.simplify(patch.setattr)
    make_model(folder / "model", **tiny.MODEL)
    (folder / "seeds.txt").write_text("Say hi.\nName a fruit.\n\nCount to three.\nSing.\n")
    (folder / "heldout.jsonl").write_text(data.to_jsonl(tiny.HELDOUT))


@pytest.fixture
def setup(tmp_path, monkeypatch):
    prepare(tmp_path, monkeypatch)
    return lambda out, **more: tiny.flags(tmp_path, out, **more)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of two turns. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        prepare(folder, patch)
        assert seif.main(tiny.flags(folder, "run")) == 0
    return folder / "run"
