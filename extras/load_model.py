"""load_model.py: a Hugging Face model as rl.load() needs it, or one clear error.

Which layers get LoRA, in which type to compute, what is wrong with a checkpoint.
"""

import math
from collections import Counter
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from extras.data import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# peft maps these names in a mixture of experts to the experts' stacked weights.
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
# Models in which peft refuses out_proj, since their kernels bypass it.
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
# Errors of damaged checkpoints, and of those that the installed packages are too old for.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
LOAD_ERRORS += (ImportError, AttributeError, TypeError)


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
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"cannot be loaded as a causal language model ({reason})"
        raise InputError(f"--model {model}: {reason}") from error
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
    """Names of the decoder's linear layers that get LoRA. Prints which do not, and why.

    InputError if there is none.
    """
    layers = decoder_layers(model)
    start = next(name for name, module in model.named_modules() if module is layers)
    modules = dict(layers.named_modules(prefix=start))
    mixtures, sizes, reasons = set(), {}, {}
    for name, module in modules.items():
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        block, _, leaf = name.rpartition(".")
        if stacked and "expert" in f"{leaf} {type(module).__name__}".lower():
            # The block around them, with its router, unless that is the decoder layer itself.
            mixtures.add((name if modules[block] in list(layers) else block) + ".")
            sizes[name], reasons[name] = sum(p.numel() for p in stacked), "experts"
    mamba = getattr(model.config, "model_type", None) in MAMBA_TYPES
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        sizes[name] = module.in_features * module.out_features
        leaf = name.rpartition(".")[2]
        own_forward = type(module).forward is not nn.Linear.forward
        if min(module.in_features, module.out_features) < rank:
            reasons[name] = f"smaller than --lora-rank {rank}"
        # subtle: with experts peft maps any up_proj's adapter to their stacked weights.
        elif mixtures and (leaf in EXPERT_NAMES or name.startswith(tuple(mixtures))):
            reasons[name] = "experts"
        elif mamba and leaf == "out_proj":
            reasons[name] = "out_proj of a Mamba model"
        elif own_forward and not hasattr(module.weight, "quant_state"):
            reasons[name] = f"{type(module).__name__} with a forward of its own"
    found = ", ".join(f"{n} {reason}" for reason, n in Counter(reasons.values()).items())
    if len(reasons) == len(sizes):
        found = found or "GPT-2's are Conv1D"
        raise InputError(f"no Linear layer in the decoder's layers that LoRA can adapt ({found})")
    if reasons:
        share = sum(sizes[name] for name in reasons) / sum(sizes.values())
        example = next(iter(reasons))
        print(f"  no LoRA on {share:.0%} of the layers' weights: {found}; {example} ...")
    return [name for name in sizes if name not in reasons]


def context_length(config) -> float:
    """Tokens that a model can tell apart by position."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    length = getattr(config, "max_position_embeddings", math.inf)
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond this length a token's rotation depends on the length of its row.
        length = rope.get("original_max_position_embeddings", length)
    return length
