"""load_model.py: a Hugging Face model as rl.load() needs it, or one clear error.

Which layers get LoRA, in which type to compute, what is wrong with a checkpoint.
"""

import math
import re
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from extras.data import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# peft maps these names in a mixture of experts to the experts' stacked weights.
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def fast_dtype(cuda: bool) -> str:
    """bf16 where the hardware multiplies in it, else fp16 on a GPU and fp32 on a CPU."""
    if cuda:
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if fast else "fp32"


def load_model(model: str, bits: int, device: torch.device, dtype: torch.dtype) -> tuple:
    """(base model, tokenizer). Never a pickle, nor code that a checkpoint brings."""
    if (Path(model) / "adapter_config.json").exists():
        fix = "give its base model, and this folder as --init-follower"
        raise InputError(f"--model {model}: this is a LoRA adapter; {fix}")
    quantization = None
    if bits == 4:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        auto = transformers.AutoModelForCausalLM
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            # A vision-language checkpoint. Its decoder is trained.
            auto = transformers.AutoModelForImageTextToText
        base, report = auto.from_pretrained(
            model,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (
        *(OSError, ValueError, KeyError, RuntimeError, SafetensorError),
        *(ImportError, AttributeError, TypeError),
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"--model {model}: cannot be loaded as a causal language model ({reason})"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(f"--model {model}: no chat template; use an instruction-tuned model")
    check_weights(base, report, model)
    return base, tokenizer


def check_weights(base, report: dict, model: str) -> None:
    """InputError where a checkpoint lacks weights or has others than config.json says."""
    modules = dict(base.named_modules())
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise InputError(f"--model {model}: its files lack {name}, which would stay random")
    for name in sorted(report["unexpected_keys"]):
        if isinstance(modules.get(name.rpartition(".")[0]), nn.Linear):
            raise InputError(f"--model {model}: {name} is not used by this architecture")
    for name, module in modules.items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            sizes = f"{tuple(state.shape)}, which is not what config.json says"
            raise InputError(f"--model {model}: {name} has the shape {sizes}")


def decoder_layers(model) -> nn.ModuleList:
    """The decoder's list of layers, whatever the architecture calls it. InputError without one."""
    for decoder in (model.get_decoder(), getattr(model, "model", nn.Module())):
        lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
        if lists:
            return max(lists, key=len)
    raise InputError(f"{type(model).__name__} has no list of layers: it is not supported")


def lora_targets(model, rank: int) -> list[str]:
    """Names of the layers that get LoRA. Prints the share of weights that are left out.

    LoRA goes on every linear layer of the decoder's layers, except in mixtures of experts.
    subtle: in a model with experts peft maps an adapter of any up_proj to the experts' stacked
    weights of that name. So the place of a mixture is left out in every layer.
    """
    layers = decoder_layers(model)
    start = next(n for n, m in model.named_modules() if m is layers)
    modules = [(f"{start}.{name}", module) for name, module in layers.named_modules()]
    # left_out, adapted: number of weights by name.
    mixtures, adapted, left_out = set(), {}, {}
    for name, module in modules:
        own = module.parameters(recurse=False)
        stacked = [p for p in own if p.dim() == 3 and min(p.shape) > 1]
        if stacked and not isinstance(module, nn.Conv1d):
            mixtures.add(re.sub(r"\d+", "*", name.rpartition(".")[0]) + ".")
            left_out[name] = sum(p.numel() for p in stacked)
    for name, module in modules:
        if not isinstance(module, nn.Linear):
            continue
        sizes = module.in_features, module.out_features
        place = re.sub(r"\d+", "*", name)
        is_expert = name.rpartition(".")[2] in EXPERT_NAMES or place.startswith(tuple(mixtures))
        if (mixtures and is_expert) or min(sizes) < rank:
            left_out[name] = math.prod(sizes)
        else:
            adapted[name] = math.prod(sizes)
    share = sum(left_out.values()) / max(1, sum((adapted | left_out).values()))
    if adapted and round(share, 2):
        print(f"  no LoRA on {share:.0%} of the layers' weights: {next(iter(left_out))} ...")
    return list(adapted)


def context_length(config) -> float:
    """Tokens that a model can tell apart by position."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    length = getattr(config, "max_position_embeddings", math.inf)
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond this length a token's rotation depends on the length of its row.
        length = rope.get("original_max_position_embeddings", length)
    return length
