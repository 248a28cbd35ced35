"""peft_adapters.py: adapters on disk in peft's format, which peft, vLLM and lm-eval load.

Plain LoRA that peft or TRL trained loads here and computes the same. DoRA, trained biases and
everything else that is not y = W x + s B A x is refused.
"""

import json
import math
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from extras.data import InputError, write_atomic

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of peft that make an adapter more than LoRA.
UNSUPPORTED = ("use_dora", "rank_pattern", "alora_invocation_tokens", "target_parameters")
UNSUPPORTED += ("modules_to_save", "trainable_token_indices")
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


def save_adapter(policy, role: str, folder: str | Path) -> None:
    """Write a role's adapter. The weights come last: a folder with weights is complete."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = json.dumps(peft_config(policy, role), indent=2)
    tensors = {n: t.detach().cpu().contiguous() for n, t in policy.tensors(role).items()}
    write_atomic(Path(folder) / CONFIG, config.encode())
    write_atomic(Path(folder) / WEIGHTS, save(tensors, {"format": "pt"}))


def load_adapter(policy, role: str, folder: str | Path) -> None:
    """Load an adapter, ours or peft's, as `role`. InputError if it is no plain LoRA of this model.

    Layers that the adapter leaves out get B = 0.
    """
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / WEIGHTS)
        scales = layer_scales(policy, config)
        policy.add(role, rank=config["r"])
        own = policy.tensors(role)
        if not tensors or tensors.keys() - own.keys():
            raise ValueError(f"no layer for {min(tensors.keys() - own.keys(), default='LoRA')}")
        for name, tensor in tensors.items():
            # subtle: copy_() alone would broadcast a smaller tensor.
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}")
            own[name].data.copy_(tensor)
        for name, scale in scales.items():
            policy.lora[name].scale[role] = scale
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"not a LoRA adapter of {policy.name} ({error})"
        raise InputError(f"{folder}: {reason}; give a folder that peft saved") from error


def peft_config(policy, role: str) -> dict:
    """The contents of adapter_config.json."""
    rank = len(next(iter(policy.lora.values())).A[role])
    alphas = {name: layer.scale[role] * rank for name, layer in policy.lora.items()}
    alpha = next(iter(alphas.values()))
    others = {name for name, _ in policy.model.named_modules()} - policy.lora.keys()
    leaves, other_leaves = ({n.rpartition(".")[2] for n in names} for names in (alphas, others))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": policy.name,
        "r": rank,
        "lora_alpha": alpha,
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # "q_proj" stands for every module of that name: full names where some are not adapted.
        "target_modules": sorted(policy.lora if leaves & other_leaves else leaves),
    }


def layer_scales(policy, config: dict) -> dict[str, float]:
    """Each layer's alpha / r. ValueError if the adapter is not plain LoRA."""
    found = [name for name in UNSUPPORTED if config.get(name)]
    found += [name for name, plain in PLAIN.items() if config.get(name, plain[0]) not in plain]
    if found:
        raise ValueError(f"{found[0]}={config[found[0]]} is not supported")
    rank, patterns = config["r"], config.get("alpha_pattern") or {}
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    scales = {}
    for name in policy.lora:
        fits = [a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)]
        scales[name] = (fits or [config["lora_alpha"]])[0] / divisor
    return scales
