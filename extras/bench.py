"""bench.py: how fast, how large, how far from this machine's own limit.

    python extras/bench.py                       all workloads, ours beside the plain way
    python extras/bench.py update-follower       one of them
    python extras/bench.py --against trl --against trl-fast      TRL + peft on the GRPO steps too
    python extras/bench.py --model FOLDER --bits 16 --repeat 5 --dtype bf16
    python extras/bench.py --prompts 8 --new 256                 steps as large as a GPU wants them

One JSON line per workload, type and side, and a table of all at the end. The plain way is
model.generate, and padded rows. Each side runs in a process of its own, so that its peak memory is
its own; seconds are the median of --repeat runs after a warm-up. `limit` is the time that the
products with the model's weights alone, without attention's, would take at the speed of torch's own
product of 1,024 rows (sampling: 64) right before and after; `tree` the seconds of laying out the
packed rows. Every sample has a forced length: both sides do the same.
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

# In place of this folder, whose cuda.py would hide the package that torch imports.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psutil
import torch
import torch.nn.functional as F
import transformers
from torch.utils.benchmark import Timer

import rl
import seif  # noqa: F401 (it quiets the libraries)
from extras import packing, smollm2

CFG = types.SimpleNamespace(temperature=1.0, updates=1, kl=0.01)
NEW, GROUP = 64, 8
# name -> (prompts, tokens per prompt, tokens of it shared by all)
STEPS = {"instructor": (2, 740, 630), "follower": (2, 118, 8)}


def ids(n: int, seed: int) -> list[int]:
    """So many token ids."""
    return random.Random(seed).choices(range(1000, 40000), k=n)


def make_prompts(kind: str, times: int = 1) -> list[list[int]]:
    """The prompts of a step, `times` as many."""
    count, length, shared = STEPS[kind]
    return [ids(shared, 0) + ids(length - shared, i + 1) for i in range(count * times)]


def rewarded(prompts, groups) -> list[list[rl.Sample]]:
    """Groups of samples whose rewards do not tie."""
    one = lambda p, c, k: rl.Sample(p, c, "", False, reward=float(k % 3))
    return [[one(p, c, k) for k, c in enumerate(g)] for p, g in zip(prompts, groups)]


def peak_mib() -> int:
    """Peak memory so far: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    try:
        import resource
    except ImportError:
        return psutil.Process().memory_info().peak_wset >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def resize(prompts: int, new: int) -> None:
    """Steps of so many prompts, completions of so many tokens; 0: as they are."""
    global NEW
    NEW = new or NEW
    STEPS.update({kind: (prompts or step[0], *step[1:]) for kind, step in STEPS.items()})


def draws(prompts: int, group: int, new: int) -> torch.Tensor:
    """A draw for each sample and position."""
    return 1 - torch.rand(prompts, group, new)


def fake_groups(prompts, group: int) -> list:
    """Groups of completions of NEW tokens."""
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
    """GFLOP/s of torch's product at two of the model's shapes, by the median of a second each."""
    model, config = policy.model, policy.model.config
    make = lambda *shape: torch.randn(shape, device=model.device, dtype=model.dtype)
    flops = seconds = 0.0
    for a, b in [(config.hidden_size, n) for n in (config.intermediate_size, config.hidden_size)]:
        given = {"linear": F.linear, "x": make(rows, a), "w": make(b, a)}
        timer = Timer("linear(x, w)", globals=given, num_threads=torch.get_num_threads())
        seconds += timer.blocked_autorange(min_run_time=1).median
        flops += 2 * rows * a * b
    return flops / seconds / 1e9


def distinct(sequences) -> int:
    """Tokens of the prefix tree of all sequences."""
    return sum(len(row.tokens) for row in packing.pack(sequences, 1 << 20))


def gflop(policy, tokens: int, heads: int) -> float:
    """Forward GFLOP: `tokens` through the layers, `heads` of them through the output head."""
    trunk = sum(layer.base.in_features * layer.base.out_features for layer in policy.lora.values())
    config = policy.model.config
    return 2e-9 * (tokens * trunk + heads * config.vocab_size * config.hidden_size)


class Bench:
    """The loaded policy and one method per workload and side; each returns its JSON fields."""

    def __init__(self, args):
        path = args.model or str(smollm2.folder())
        self.repeat, self.warmup = args.repeat, args.warmup
        limits = dict(token_budget=args.token_budget, graphs=args.graphs)
        self.policy = rl.load(path, args.bits, dtype=args.dtype, **limits)
        self.policy.add("follower")
        self.optimizer = torch.optim.AdamW(self.policy.tensors("follower").values(), lr=1e-4)
        self.engine, self.device = self.policy.engine, self.policy.model.device
        # Forced lengths.
        self.engine.eos = set()

    def result(self, work, useful: int = 0, gflops: float = 0.0, rows: int = 1024) -> dict:
        """A workload's JSON fields, measured."""
        speed = [matmul_gflops(self.policy, rows)] if gflops else []
        seconds, every = timed(work, self.repeat, self.warmup)
        row = {
            "seconds": round(seconds, 3),
            "all": [round(s, 2) for s in every],
            "peak_mib": peak_mib(),
        }
        if useful:
            row["tokens_per_second"] = round(useful / seconds, 1)
        if gflops:
            speed.append(matmul_gflops(self.policy, rows))
            row["limit"] = round(gflops / statistics.mean(speed), 3)
            row["of_limit"] = round(row["limit"] / seconds, 2)
        return row

    def grpo_flops(self, prompts, group: int) -> float:
        """GFLOP of a GRPO update on such groups."""
        groups = fake_groups(prompts, group)
        tokens = distinct([p + c[:-1] for p, g in zip(prompts, groups) for c in g])
        heads = len(prompts) * group * NEW
        # Forward for the reference and the policy, backward for the activations; the head: twice
        # forward, once for its gradient.
        return 3 * gflop(self.policy, tokens, heads)

    def step(self, kind: str, group: int = GROUP, times: int = 1) -> dict:
        """A whole GRPO step: sampling, reference, update."""
        prompts = make_prompts(kind, times)

        def work():
            """What is timed."""
            with self.policy.using("follower"), self.policy.inference():
                groups = self.engine.sample(prompts, draws(len(prompts), group, NEW), 1.0)
            groups = rewarded(prompts, groups)
            rl.grpo_step(self.policy, "follower", None, groups, self.optimizer, CFG)

        useful = len(prompts) * group * NEW
        sampling = gflop(self.policy, useful + distinct(prompts), useful)
        return self.result(work, useful, self.grpo_flops(prompts, group) + sampling)

    def update(self, kind: str) -> dict:
        """The update alone, and the building of its rows."""
        prompts = make_prompts(kind)
        groups = fake_groups(prompts, GROUP)
        cfg = types.SimpleNamespace(**(vars(CFG) | {"kl": 0.0}))
        step = lambda groups: rl.grpo_step(
            self.policy, "follower", None, groups, self.optimizer, cfg
        )
        work = lambda: step(rewarded(prompts, groups))
        row = self.result(work, len(prompts) * GROUP * NEW, self.grpo_flops(prompts, GROUP) * 2 / 3)
        sequences = [p + c[:-1] for p, g in zip(prompts, groups) for c in g]
        tree, _ = timed(lambda: list(packing.pack(sequences, self.engine.token_budget)), 3, 1)
        return row | {"tree": round(tree, 4), "tree_share": round(tree / row["seconds"], 4)}

    def update_plain(self, kind: str) -> dict:
        """The usual way: a padded batch per group, full logits, autograd through all."""
        prompts = make_prompts(kind)
        groups = fake_groups(prompts, GROUP)

        def work():
            """What is timed."""
            for prompt, group in zip(prompts, groups):
                batch = torch.tensor([prompt + c for c in group], device=self.policy.model.device)
                with self.policy.using("follower"):
                    logits = self.policy.model(batch, logits_to_keep=NEW + 1).logits[:, :-1].float()
                    logp = logits.log_softmax(-1).gather(2, batch[:, -NEW:, None])[..., 0]
                    advantage = torch.tensor(
                        rl.advantages([float(k % 3) for k in range(GROUP)]), device=logp.device
                    )
                    (-(logp - logp.detach()).exp() * advantage[:, None]).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return self.result(work, len(prompts) * GROUP * NEW)

    def sampling(self, plain: bool) -> dict:
        """32 prompts x 8 samples of lognormal lengths."""
        prompts = [ids(60, i) for i in range(32)]
        draw = random.Random(0)
        limits = [max(1, min(128, round(draw.lognormvariate(3.7, 0.7)))) for _ in range(32 * GROUP)]
        uniform = draws(len(prompts), GROUP, max(limits))
        work = lambda: self.engine.sample(prompts, uniform, 1.0, limits)
        if plain:
            flat = [p for p in prompts for _ in range(GROUP)]
            # As many side by side as ours.
            slots = packing.SLOTS[self.device.type]
            work = lambda: [
                self.generate_plain(flat[i : i + slots], limits[i : i + slots])
                for i in range(0, len(flat), slots)
            ]
        useful = sum(limits)
        return self.result(
            work, useful, gflop(self.policy, useful + distinct(prompts), useful), rows=64
        )

    def generate_plain(self, prompts, limits) -> None:
        """model.generate; each row is stopped at its length, the batch at the longest."""
        batch = torch.tensor(prompts, device=self.policy.model.device)
        ends = torch.tensor(limits, device=self.policy.model.device) + batch.shape[1]
        stop = lambda seen, scores, **kwargs: seen.shape[1] >= ends
        settings = dict(
            do_sample=True, top_k=0, top_p=1.0, use_cache=True, eos_token_id=None, pad_token_id=0
        )
        mask = torch.ones_like(batch)
        self.policy.model.generate(
            batch,
            attention_mask=mask,
            max_new_tokens=max(limits),
            stopping_criteria=[stop],
            **settings,
        )

    def verdicts(self, plain: bool) -> dict:
        """32 answers x 4 constraints under a 600-token template."""
        template, tail = ids(600, 1), ids(8, 2)
        prompts = [
            template + ids(200, 10 + i) + ids(20, 100 * i + j) + tail
            for i in range(32)
            for j in range(4)
        ]
        work = lambda: self.engine.next_probabilities(prompts, [1, 2])
        if plain:

            @torch.no_grad()
            def work():
                """What is timed."""
                for at in range(0, len(prompts), 8):
                    self.policy.model(
                        torch.tensor(prompts[at : at + 8], device=self.policy.model.device),
                        logits_to_keep=1,
                    )

        return self.result(work, 0, gflop(self.policy, distinct(prompts), len(prompts)))


WORKLOADS = {
    "update-instructor": {
        "ours": lambda b: b.update("instructor"),
        "plain": lambda b: b.update_plain("instructor"),
    },
    "update-follower": {
        "ours": lambda b: b.update("follower"),
        "plain": lambda b: b.update_plain("follower"),
    },
    "sampling": {"ours": lambda b: b.sampling(False), "plain": lambda b: b.sampling(True)},
    "verdicts": {"ours": lambda b: b.verdicts(False), "plain": lambda b: b.verdicts(True)},
    "step-instructor": {"ours": lambda b: b.step("instructor")},
    "step-follower": {"ours": lambda b: b.step("follower")},
    "memory": {f"group {g}": lambda b, g=g: b.step("follower", group=g) for g in (4, 16)},
    "scaling": {f"{t}x prompts": lambda b, t=t: b.step("follower", times=t) for t in (1, 4)},
}


def trl_model(args):
    """The model and tokenizer as TRL's users load them, and their type."""
    path, auto = args.model or str(smollm2.folder()), transformers.AutoModelForCausalLM
    dtype = rl.DTYPES[args.dtype]
    how = {"dtype": dtype}
    if args.bits == 4:
        nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        nf4 |= dict(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
        how["quantization_config"] = transformers.BitsAndBytesConfig(**nf4)
    return auto.from_pretrained(path, **how), transformers.AutoTokenizer.from_pretrained(path)


def trl_rows(kind: str, steps: int) -> list[dict]:
    """Prompts of the workload's lengths, in words that are one token each."""
    count, length, shared = STEPS[kind]
    words = "lake hill rain sun tree road wind bird".split()
    text = lambda n, seed: " ".join(random.Random(seed).choices(words, k=n))
    contents = [
        f"{text(shared, 0)} {text(length - shared - 30, i + 1)}" for i in range(count * steps)
    ]
    return [{"prompt": [{"role": "user", "content": content}]} for content in contents]


def make_clock():
    """A callback whose stamps say when each of the trainer's steps begins, and when all end."""

    # Here: our own sides, whose memory is measured, import no trainer.
    class Clock(transformers.TrainerCallback):
        """Called by the trainer."""

        stamps = []

        def on_step_begin(self, *args, **kwargs):
            """A step begins."""
            self.stamps.append(time.perf_counter())

        on_train_end = on_step_begin

    return Clock()


def run_trl(kind: str, args) -> dict:
    """The same step through TRL's GRPOTrainer, peft and transformers' generate."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    (model, tokenizer), cuda, clock = trl_model(args), torch.cuda.is_available(), make_clock()
    steps = args.repeat + args.warmup
    quiet = dict(report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no")
    # As lean as ours by default; "fast": all activations of all rows at once.
    count, fast = STEPS[kind][0], args.side == "trl-fast"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=GROUP * count if fast else GROUP,
        gradient_accumulation_steps=1 if fast else count,
        num_generations=GROUP,
        max_completion_length=NEW,
        beta=CFG.kl,
        learning_rate=1e-4,
        max_steps=steps,
        use_cpu=not cuda,
        bf16=args.dtype == "bf16",
        fp16=args.dtype == "fp16",
        gradient_checkpointing=not fast,
        generation_kwargs={"min_new_tokens": NEW},
        use_transformers_continuous_batching=args.side == "trl-cb",
        **quiet,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [len(c[0]["content"]) % 7.0 for c in completions],
        args=config,
        train_dataset=Dataset.from_list(trl_rows(kind, steps)),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    ).train()
    seconds = [b - a for a, b in zip(clock.stamps, clock.stamps[1:])][args.warmup :]
    every = [round(s, 2) for s in seconds]
    return {"seconds": round(statistics.median(seconds), 3), "all": every, "peak_mib": peak_mib()}


def read_arguments():
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("workload", nargs="?", choices=list(WORKLOADS))
    parser.add_argument("--side", help="one side only, in this process")
    parser.add_argument("--model", help="model folder or id; default: the embedded model")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--token-budget", type=int, default=2048)
    how = dict(action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--graphs", help="on a GPU: replay the steps of sampling", **how)
    text = "default: what this machine is fast in, and without a GPU fp32 as well"
    parser.add_argument("--dtype", choices=tuple(rl.DTYPES), help=text)
    text = "TRL on the GRPO steps; cb: its continuous batching; fast: no gradient checkpointing"
    peers = dict(action="append", default=[], choices=("trl", "trl-cb", "trl-fast"))
    parser.add_argument("--against", help=text, **peers)
    parser.add_argument("--prompts", type=int, default=0, help="of a GRPO step")
    parser.add_argument("--new", type=int, default=0, help="tokens of each completion of a step")
    args = parser.parse_args()
    if args.side and not args.workload:
        parser.error("--side needs a workload")
    return args


def in_a_process(name: str, dtype: str, side: str, args) -> dict:
    """A side's row, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], *([] if args.workload else [name])]
    command += ["--dtype", dtype, "--side", side]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    error = done.stderr.strip()[-300:] or f"exit status {done.returncode}"
    return {"workload": name, "side": side, "dtype": dtype, "error": error}


def compare(name: str, dtype: str, args) -> list[dict]:
    """A workload's rows, one a side, each against the first; printed as they come."""
    rows = []
    for side in [*WORKLOADS[name], *(args.against if name.startswith("step-") else [])]:
        rows.append(in_a_process(name, dtype, side, args))
        first, row = rows[0], rows[-1]
        if row is not first and "error" not in first | row:
            row["seconds_ratio"] = round(row["seconds"] / first["seconds"], 2)
            row["memory_ratio"] = round(row["peak_mib"] / first["peak_mib"], 2)
        print(json.dumps(row), flush=True)
    return rows


def cell(row: dict) -> str:
    """A side's seconds and memory, and how many times the first side's they are."""
    if "error" in row:
        return f"{row['side']}: failed"
    text = f"{row['side']}: {row['seconds']} s, {row['peak_mib']:,} MiB"
    if "seconds_ratio" not in row:
        return text
    return f"{text} ({row['seconds_ratio']} and {row['memory_ratio']} times)"


def table(groups: list[list[dict]]) -> str:
    """Markdown: a line per workload and type, of whose rows, one a side, each group is made."""
    lines = ["| workload | type | of the limit | first | others |", "|---|---|---|---|---|"]
    for rows in groups:
        about = [str(rows[0].get(key, "")) for key in ("workload", "dtype", "of_limit")]
        first, *others = map(cell, rows)
        lines.append(f"| {' | '.join([*about, first, '; '.join(others)])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for."""
    args, cuda = read_arguments(), torch.cuda.is_available()
    resize(args.prompts, args.new)
    fast = rl.fast_dtype(cuda)
    if not args.side:
        dtypes = [args.dtype] if args.dtype else dict.fromkeys([fast] if cuda else [fast, "fp32"])
        names = [args.workload] if args.workload else WORKLOADS
        print(table([compare(name, dtype, args) for name in names for dtype in dtypes]))
        return
    args.dtype = args.dtype or fast
    if args.side.startswith("trl"):
        row = run_trl(args.workload.removeprefix("step-"), args)
    else:
        row = WORKLOADS[args.workload][args.side](Bench(args))
    about = {"workload": args.workload, "side": args.side, "bits": args.bits}
    print(json.dumps(about | {"dtype": args.dtype} | row), flush=True)


if __name__ == "__main__":
    main()
