"""bench.py: how fast, how large, and how far from this machine's own limit. One JSON line per workload and side.

    python tests/bench.py                       all workloads, ours beside the plain way
    python tests/bench.py update-follower       one of them
    python tests/bench.py --against trl         TRL's GRPOTrainer + peft on the two GRPO steps too, if installed
    python tests/bench.py --model FOLDER --bits 16 --repeat 5

Each measurement runs in a process of its own, so that its peak memory is its own; seconds are the median of --repeat
runs after one warm-up. `limit` is the time that the step's matrix multiplications alone would take at the speed
measured here for its shapes, `tree` the seconds of building the packed rows and their masks. Every sample has a forced
length, so that both sides do the same work.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F

import data
import packing
import rl
import seif

CFG = types.SimpleNamespace(temperature=1.0, updates=1, clip_low=0.2, clip_high=0.3, kl=0.01, grad_clip=1.0)
NEW, GROUP = 64, 8
# name -> (prompts, tokens per prompt, tokens of it shared by all)
STEPS = {"instructor": (2, 740, 630), "follower": (2, 118, 8)}


def ids(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40000), k=n)


def make_prompts(kind: str, times: int = 1) -> list[list[int]]:
    count, length, shared = STEPS[kind]
    return [ids(shared, 0) + ids(length - shared, i + 1) for i in range(count * times)]


def episodes_of(prompts, groups) -> list[rl.Episode]:
    return [rl.Episode(p, c, i, float(k % 3)) for i, (p, g) in enumerate(zip(prompts, groups)) for k, c in enumerate(g)]


def fake_groups(prompts, group: int) -> list:
    return [[ids(NEW, 1000 * i + k) for k in range(group)] for i in range(len(prompts))]


def timed(work, repeat: int, warmup: int) -> tuple[float, list[float]]:
    """Median seconds of `repeat` runs after `warmup` others, and all of them."""
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), seconds


def matmul_gflops(policy, rows: int) -> float:
    """GFLOP/s of this machine at the model's own shapes."""
    config = policy.model.config
    pairs = [(config.hidden_size, config.intermediate_size), (config.hidden_size, config.hidden_size)]
    flops = total = 0.0
    for a, b in pairs:
        x, w = (torch.randn(n, a, device=policy.device, dtype=policy.dtype) for n in (rows, b))
        F.linear(x, w)
        start = time.perf_counter()
        for _ in range(20):
            F.linear(x, w)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        total, flops = total + time.perf_counter() - start, flops + 20 * 2 * rows * a * b
    return flops / total / 1e9


def gflop(policy, tokens: int, heads: int) -> float:
    """Forward multiply-adds in GFLOP: `tokens` through the layers, `heads` of them through the output head."""
    trunk = sum(layer.base.in_features * layer.base.out_features for layer in policy.lora.values())
    config = policy.model.config
    return 2e-9 * (tokens * trunk + heads * config.vocab_size * config.hidden_size)


class Bench:
    """The loaded policy and one method per workload and side; each returns its JSON fields."""

    def __init__(self, args):
        path = args.model or str(data.embedded_model())
        self.repeat, self.warmup = args.repeat, args.warmup
        self.policy = rl.load(path, args.bits, token_budget=args.token_budget, activation_mib=args.activation_mib)
        self.policy.add("follower")
        self.optimizer = torch.optim.AdamW(self.policy.tensors("follower").values(), lr=1e-4)
        self.policy.eos = set()  # forced lengths

    def result(self, work, useful: int = 0, gflops: float = 0.0, rows: int = 1024) -> dict:
        seconds, every = timed(work, self.repeat, self.warmup)
        row = {"seconds": round(seconds, 3), "all": [round(s, 2) for s in every], "peak_mib": seif.peak_mib()}
        if useful:
            row["tokens_per_second"] = round(useful / seconds, 1)
        if gflops:
            row["limit"] = round(gflops / matmul_gflops(self.policy, rows), 3)
            row["of_limit"] = round(row["limit"] / seconds, 2)
        return row

    def grpo_flops(self, prompts, group: int) -> float:
        rows = list(packing.pack([p + c for p, g in zip(prompts, fake_groups(prompts, group)) for c in g], 1 << 20))
        tokens, heads = sum(len(r.tokens) for r in rows), len(prompts) * group * NEW
        # Forward for the reference and the policy, backward for the activations; the head: twice forward, once for J.
        return 3 * gflop(self.policy, tokens, heads)

    def step(self, kind: str, group: int = GROUP, times: int = 1) -> dict:
        prompts = make_prompts(kind, times)

        def work():
            with self.policy.using("follower"):
                groups = self.policy.generate(prompts, group, NEW)
            rl.grpo_step(self.policy, "follower", None, episodes_of(prompts, groups), self.optimizer, CFG)

        useful = len(prompts) * group * NEW
        sampling = gflop(self.policy, useful + sum(map(len, prompts)), useful)
        return self.result(work, useful, self.grpo_flops(prompts, group) + sampling)

    def update(self, kind: str) -> dict:
        prompts = make_prompts(kind)
        groups = fake_groups(prompts, GROUP)
        cfg = types.SimpleNamespace(**(vars(CFG) | {"kl": 0.0}))
        work = lambda: rl.grpo_step(self.policy, "follower", None, episodes_of(prompts, groups), self.optimizer, cfg)
        row = self.result(work, len(prompts) * GROUP * NEW, self.grpo_flops(prompts, GROUP) * 2 / 3)
        sequences = [p + c[:-1] for p, g in zip(prompts, groups) for c in g]
        tree, _ = timed(lambda: [self.policy._masks(r) for r in self.policy.rows(sequences)], 3, 1)
        return row | {"tree": round(tree, 4), "tree_share": round(tree / row["seconds"], 4)}

    def update_plain(self, kind: str) -> dict:
        """One padded batch per group, full logits of the completion, autograd through all: the usual way."""
        prompts = make_prompts(kind)
        groups = fake_groups(prompts, GROUP)

        def work():
            for prompt, group in zip(prompts, groups):
                batch = torch.tensor([prompt + c for c in group], device=self.policy.device)
                with self.policy.using("follower"):
                    logits = self.policy.model(batch, logits_to_keep=NEW + 1).logits[:, :-1].float()
                    logp = logits.log_softmax(-1).gather(2, batch[:, -NEW:, None])[..., 0]
                    advantage = torch.tensor(rl.advantages([float(k % 3) for k in range(GROUP)]), device=logp.device)
                    (-(logp - logp.detach()).exp() * advantage[:, None]).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return self.result(work, len(prompts) * GROUP * NEW)

    def sampling(self, plain: bool) -> dict:
        prompts = [ids(60, i) for i in range(32)]
        draw = random.Random(0)
        limits = [max(1, min(128, round(draw.lognormvariate(3.7, 0.7)))) for _ in range(32 * GROUP)]
        work = lambda: self.policy.generate(prompts, GROUP, limits)
        if plain:
            flat = [p for p in prompts for _ in range(GROUP)]
            work = lambda: [self.generate_plain(flat[i : i + 64], limits[i : i + 64]) for i in range(0, len(flat), 64)]
        useful = sum(limits)
        return self.result(work, useful, gflop(self.policy, useful + sum(map(len, prompts)), useful), rows=64)

    def generate_plain(self, prompts, limits) -> None:
        """model.generate; each row is stopped at its length, the batch at the longest."""
        batch = torch.tensor(prompts, device=self.policy.device)
        ends = torch.tensor(limits, device=self.policy.device) + batch.shape[1]
        stop = lambda seen, scores, **kwargs: seen.shape[1] >= ends
        settings = dict(do_sample=True, top_k=0, top_p=1.0, use_cache=True, eos_token_id=None, pad_token_id=0)
        mask = torch.ones_like(batch)
        self.policy.model.generate(
            batch, attention_mask=mask, max_new_tokens=max(limits), stopping_criteria=[stop], **settings
        )

    def verdicts(self, plain: bool) -> dict:
        template, tail = ids(600, 1), ids(8, 2)
        prompts = [template + ids(200, 10 + i) + ids(20, 100 * i + j) + tail for i in range(32) for j in range(4)]
        work = lambda: self.policy.yes_probability(prompts)
        if plain:

            @torch.no_grad()
            def work():
                for at in range(0, len(prompts), 8):
                    self.policy.model(torch.tensor(prompts[at : at + 8], device=self.policy.device), logits_to_keep=1)

        tokens = sum(len(r.tokens) for r in packing.pack(prompts, 1 << 20))
        return self.result(work, 0, gflop(self.policy, tokens, len(prompts)))


WORKLOADS = {
    "update-instructor": {"ours": lambda b: b.update("instructor"), "plain": lambda b: b.update_plain("instructor")},
    "update-follower": {"ours": lambda b: b.update("follower"), "plain": lambda b: b.update_plain("follower")},
    "sampling": {"ours": lambda b: b.sampling(False), "plain": lambda b: b.sampling(True)},
    "verdicts": {"ours": lambda b: b.verdicts(False), "plain": lambda b: b.verdicts(True)},
    "step-instructor": {"ours": lambda b: b.step("instructor")},
    "step-follower": {"ours": lambda b: b.step("follower")},
    "memory": {f"group {g}": lambda b, g=g: b.step("follower", group=g) for g in (4, 16)},
    "scaling": {f"{t}x prompts": lambda b, t=t: b.step("follower", times=t) for t in (1, 4)},
}


def run_trl(kind: str, args) -> dict:
    """The same step through TRL's GRPOTrainer, peft and transformers' generate."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    path, cuda = args.model or str(data.embedded_model()), torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=nf4 if args.bits == 4 else None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    count, length, shared = STEPS[kind]
    steps, words = args.repeat + args.warmup, "lake hill rain sun tree road wind bird".split()
    text = lambda n, seed: " ".join(random.Random(seed).choices(words, k=n))  # one token a word
    rows = [
        {"prompt": [{"role": "user", "content": text(shared, 0) + " " + text(length - shared - 30, i + 1)}]}
        for i in range(count * steps)
    ]
    stamps = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            stamps.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=count,
        num_generations=GROUP,
        max_completion_length=NEW,
        beta=CFG.kl,
        learning_rate=1e-4,
        max_steps=steps,
        report_to=[],
        save_strategy="no",
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=True,
        generation_kwargs={"min_new_tokens": NEW},
        disable_tqdm=True,
        logging_strategy="no",
        use_transformers_continuous_batching=args.against == "trl-cb",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(c[0]["content"]) % 7) for c in completions],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [b - a for a, b in zip(stamps, stamps[1:])][args.warmup :]
    return {
        "seconds": round(statistics.median(seconds), 3),
        "all": [round(s, 2) for s in seconds],
        "peak_mib": seif.peak_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", choices=list(WORKLOADS))
    parser.add_argument("--side", help="one side only, in this process")
    parser.add_argument("--model", help="model folder or id; default: the embedded model")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--activation-mib", type=int, default=0)
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument(
        "--against", choices=("trl", "trl-cb"), help="measure TRL on the two GRPO steps; cb: its continuous batching"
    )
    args = parser.parse_args()
    if args.side:
        if args.side.startswith("trl"):
            row = run_trl(args.workload.removeprefix("step-"), args)
        else:
            row = WORKLOADS[args.workload][args.side](Bench(args))
        print(json.dumps({"workload": args.workload, "side": args.side, "bits": args.bits, **row}), flush=True)
        return
    for name in [args.workload] if args.workload else WORKLOADS:
        first = None
        for side in [*WORKLOADS[name], *([args.against] if args.against and name.startswith("step-") else [])]:
            command = [sys.executable, __file__, *sys.argv[1:], *([] if args.workload else [name]), "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if not lines:
                print(json.dumps({"workload": name, "side": side, "error": done.stderr.strip()[-300:]}), flush=True)
                continue
            row = json.loads(lines[-1])
            first = first or row
            if row is not first:
                row["seconds_ratio"] = round(row["seconds"] / first["seconds"], 2)
                row["memory_ratio"] = round(row["peak_mib"] / first["peak_mib"], 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
