"""bench.py: seconds, tokens/s and peak memory of one Instructor and one Follower step of GRPO.

    python -m extras.bench                      the packed engine
    python -m extras.bench --engine plain       rl.PlainEngine, what the packed engine replaces
    python -m extras.bench --model FOLDER --dtype bf16 --prompts 8 --new 256

A step samples a group per prompt, scores it under the reference, and updates. Prompts are random
token ids. An Instructor's prompts share their few-shot examples, a Follower's the chat template.
EOS is off, so that every completion has --new tokens. One JSON line per step: the median of
--repeat steps after a warm-up. Peak memory is the process's, or the GPU's.
"""

import argparse
import json
import random
import resource
import statistics
import time
import types

import torch

import rl
from extras import smollm2
from extras.load_model import DTYPES

# role -> (tokens per prompt, tokens of it that all prompts share)
PROMPTS = {"follower": (118, 8), "instructor": (740, 630)}
CFG = types.SimpleNamespace(num_minibatches=1, kl_coef=0.01, advantage="grpo")


def step(policy, role: str, optimizer, args) -> dict[str, float]:
    """One GRPO step: seconds of its phases."""
    length, shared = PROMPTS[role]
    rng, vocabulary = random.Random(0), range(policy.model.get_input_embeddings().num_embeddings)
    prefix = rng.choices(vocabulary, k=shared)
    prompts = [prefix + rng.choices(vocabulary, k=length - shared) for _ in range(args.prompts)]
    uniform = 1 - torch.rand(args.prompts, args.group, args.new)
    start = time.perf_counter()
    with policy.using(role), policy.inference():
        completions = policy.engine.sample(prompts, uniform, 1.0)
    sampled = time.perf_counter()
    groups = [
        [rl.Sample(p, ids, "", False, reward=float(i % 3)) for i, ids in enumerate(group)]
        for p, group in zip(prompts, completions)
    ]
    rl.grpo_step(policy, role, f"ref_{role}", groups, optimizer, CFG, 1.0)
    end = time.perf_counter()
    return {"seconds": end - start, "sampling": sampled - start, "update": end - sampled}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("role", nargs="?", choices=list(PROMPTS), help="default: both")
    parser.add_argument("--model", default=smollm2.NAME, help="folder or id")
    parser.add_argument("--engine", default="packed", choices=("packed", "plain"))
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16))
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens per completion")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    path = smollm2.model_path(args.model)
    policy = rl.load(path, args.bits, engine=args.engine, dtype=args.dtype)
    policy.engine.eos = set()
    for role in [args.role] if args.role else PROMPTS:
        policy.add(role)
        policy.copy(role, f"ref_{role}")
        optimizer = torch.optim.AdamW(list(policy.tensors(role).values()), lr=1e-5)
        steps = [step(policy, role, optimizer, args) for _ in range(args.repeat + 1)][1:]
        medians = {k: round(statistics.median(s[k] for s in steps), 2) for k in steps[0]}
        tokens = args.prompts * args.group * args.new
        row = {"step": role, "engine": args.engine, "dtype": str(policy.model.dtype)[6:], **medians}
        row["all"] = [round(s["seconds"], 2) for s in steps]
        row["tokens_per_second"] = round(tokens / medians["seconds"], 1)
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if torch.cuda.is_available():
            row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
