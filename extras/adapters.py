"""adapters.py: peft's adapter_config.json, so that peft, vLLM and lm-eval read what we write, and
what they wrote computes the same here.
"""

import json
import math
import re
from pathlib import Path

# What an adapter of peft's may have that y = W x + s B A x has not.
OTHERS = ("use_dora", "rank_pattern", "alora_invocation_tokens", "target_parameters")
OTHERS += ("modules_to_save", "trainable_token_indices")


def write_config(policy, role: str, folder: Path) -> None:
    """adapter_config.json of a role that `policy` has just saved there."""
    rank = len(next(iter(policy.lora.values())).A[role])
    alphas = {name: layer.scale[role] * rank for name, layer in policy.lora.items()}
    alpha = next(iter(alphas.values()))
    leaf = lambda name: name.rsplit(".", 1)[-1]
    leaves = {leaf(name) for name in policy.lora}
    # A leaf's name stands for all modules of that name: only where each of them is adapted.
    others = {n for n, _ in policy.model.named_modules()} - policy.lora.keys()
    alone = not leaves & {leaf(name) for name in others}
    config = {
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
        "target_modules": sorted(leaves if alone else policy.lora),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def read_scales(policy, path: Path) -> dict[str, float]:
    """Each layer's scale by adapter_config.json; ValueError if the adapter is no plain LoRA."""
    config = json.loads(path.read_text())
    found = [name for name in OTHERS if config.get(name)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        found.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']}")
    if found:
        raise ValueError(f"{found[0]} is not supported")
    rank, patterns = config["r"], config.get("alpha_pattern") or {}
    scales = {}
    for name in policy.lora:
        fits = [a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)]
        alpha = (fits + [config["lora_alpha"]])[0]
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales
