"""config.py: every setting of a run, with its default and its reason. A table to look things up in.

Each field of Config is a flag of the same name; `python seif.py --help` prints this table.
"""

import argparse
import dataclasses
from dataclasses import dataclass

import torch

import judge
from data import EMBEDDED, UserError, embedded_model
from rl import Policy, load


def setting(default, reason: str):
    """A Config field; `reason` is also its --help text."""
    return dataclasses.field(default=default, metadata={"help": reason})


@dataclass
class Config:
    """Every field is a flag of the same name. Defaults are for a GPU; SMALL is laid over them without one."""

    out: str = setting("runs/seif", "run folder")
    model: str = setting("", "Hugging Face id or folder; empty: Qwen2.5-1.5B-Instruct, without CUDA the embedded one")
    bits: int = setting(4, "4: nf4, double quantisation; 16: none")
    seeds: str = setting(str(judge.PROMPTS / "seeds.jsonl"), "seed questions: .jsonl, .txt (one a line) or .parquet")
    heldout: str = setting(str(judge.PROMPTS / "heldout.jsonl"), "evaluation data in IFEval's format")
    seed: int = setting(0, "random seed")
    init_follower: str = setting("", "folder of a LoRA adapter (ours or peft's) that the Follower starts from")
    # the schedule
    turns: int = setting(3, "turns; the paper's number")
    batch: int = setting(16, "prompts per training step; the paper's batches are larger, its GPUs eight")
    group: int = setting(5, "samples per prompt (the paper's group size)")
    instructor_steps: str = setting("", "Instructor steps per turn, e.g. 4,2 (the last repeats); empty: one epoch")
    follower_steps: str = setting("", "Follower steps per turn; empty: 3, 1, 1 epochs of q_T, the paper's finding")
    questions: int = setting(0, "questions in q_T; 0: one per seed")
    retries: int = setting(3, "attempts per seed at a question the Filter accepts")
    # roles
    hard_share: float = setting(0.5, "share of hard (machine-checkable) instructions; the rest are soft")
    shots: int = setting(2, "worked examples in the Instructor's prompt; small models need about 4, larger ones fewer")
    think: bool = setting(True, "require <think>..</think><answer>..</answer> of the Follower, as the paper does")
    filter: str = setting("llm", "llm: code, then the model; code: code alone; off: the paper's ablation")
    checkable: bool = setting(False, "let the Filter reject hard constraints that no rule recognises")
    min_words: int = setting(0, "let the Filter reject instructions that allow fewer words than this")
    judge: str = setting("hybrid", "hybrid: rules where they decide, else the model; llm: the paper's way")
    judge_think: int = setting(0, "tokens of analysis the Judger writes before its verdict")
    soft_verdicts: bool = setting(False, "keep P(yes) as the verdict instead of rounding it")
    reward: str = setting("hardest", "the Instructor's: hardest is the paper's 1 - r, frontier peaks at r = 0.5")
    type_penalty: float = setting(0.0, "taken from proposals by their share of the batch's commonest constraint type")
    answers: int = setting(1, "evaluator's answers per proposal, averaged; more is less noisy and slower")
    # GRPO
    temperature: float = setting(1.0, "of the Follower's rollouts; log-probabilities use it too")
    instructor_temperature: float = setting(1.0, "of the Instructor's rollouts")
    question_temperature: float = setting(0.7, "of the Instructor when it writes q_T (the paper's)")
    lr: float = setting(2e-5, "of both adapters; LoRA wants more than the 1e-6 of the paper's full fine-tuning")
    kl: float = setting(0.01, "weight of the k3 KL to the stage's start")
    clip_low: float = setting(0.2, "ratio clip below 1")
    clip_high: float = setting(0.3, "ratio clip above 1 (wider: DAPO's clip-higher)")
    updates: int = setting(4, "optimiser steps per rollout batch")
    grad_clip: float = setting(1.0, "largest gradient norm")
    rank: int = setting(16, "LoRA rank")
    alpha: float = setting(32.0, "LoRA alpha; the update is scaled by alpha / rank")
    # limits
    max_new_tokens: int = setting(1024, "an answer's limit; one that reaches it scores 0")
    instructor_tokens: int = setting(512, "a proposal's limit")
    max_prompt_tokens: int = setting(1024, "seeds whose prompts are longer are skipped and counted, never cut")
    eval_rows: int = setting(0, "held-out rows (and questions of q_T) evaluated per turn; 0: all")
    token_budget: int = setting(2048, "distinct tokens per packed row: sets the memory of a training step")
    slots: int = setting(0, "samples decoded side by side; 0: from free memory")
    activation_mib: int = setting(
        0, "kept for the backward pass, the rest recomputed; 0: half of what is free, on the CPU 64"
    )
    save_every: int = setting(10, "training steps between saved states")


QWEN = "Qwen/Qwen2.5-1.5B-Instruct"
# A 135M model is near chance as a judge and wanders at temperature 1: hard constraints only, all checkable by rule.
SMALL = dict(turns=2, batch=4, group=8, instructor_steps="3,2", follower_steps="7,5", questions=24, hard_share=1.0)
SMALL |= dict(
    shots=4, think=False, filter="code", checkable=True, min_words=20, temperature=0.7, lr=5e-4, kl=0.02, updates=1
)
SMALL |= dict(
    instructor_temperature=0.5,
    question_temperature=0.5,
    max_new_tokens=96,
    instructor_tokens=96,
    eval_rows=40,
    save_every=1,
)
# What the paper does wherever this project does otherwise by default, except for what its hardware allows.
PAPER = dict(hard_share=0.5, think=True, filter="llm", checkable=False, min_words=0, judge="llm", judge_think=0)
PAPER |= dict(soft_verdicts=False, reward="hardest", type_penalty=0.0, answers=1, temperature=1.0, kl=0.01, updates=4)
PAPER |= dict(instructor_temperature=1.0, question_temperature=0.7, clip_low=0.2, clip_high=0.3, group=5, turns=3)
CHOICES = dict(filter=("llm", "code", "off"), judge=("hybrid", "llm"), reward=("hardest", "frontier"), bits=(4, 16))
MAY_CHANGE = {"out", "turns", "save_every", "slots", "token_budget", "activation_mib"}  # when a run is resumed
POSITIVE = (
    "turns",
    "retries",
    "batch",
    "group",
    "rank",
    "max_new_tokens",
    "instructor_tokens",
    "save_every",
    "updates",
    "answers",
)


def flag(name: str) -> str:
    """max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")


def read_config(argv: list[str], about: str = "") -> Config:
    """Flags over --paper over the small preset over the defaults."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("seif.py", description=about, formatter_class=form)
    for field in dataclasses.fields(Config):
        kind = {"type": field.type} if field.type is not bool else {"action": argparse.BooleanOptionalAction}
        small = f", small preset {SMALL[field.name]!r}" if field.name in SMALL else ""
        text = f"{field.metadata['help']} [{field.default!r}{small}]".replace("%", "%%")
        kind |= {"choices": CHOICES[field.name]} if field.name in CHOICES else {}
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--paper", action="store_true", help="the paper's own roles, rewards and GRPO settings")
    given = vars(parser.parse_args(argv))
    paper = PAPER if given.pop("paper") else {}
    small = not given.get("model") and not torch.cuda.is_available()
    config = Config(**((SMALL if small else {}) | paper | given))
    config.model = config.model or (EMBEDDED if small else QWEN)
    for name in POSITIVE:
        if getattr(config, name) < 1:
            raise UserError(f"{flag(name)} {getattr(config, name)}: must be at least 1")
    bank = min(len(judge.instructor_examples(kind)) for kind in judge.KINDS)
    if not 0 <= config.shots <= bank:
        raise UserError(
            f"--shots {config.shots}: prompts/instructor_examples.jsonl has 0 to {bank} to show of each kind"
        )
    for name in ("instructor_steps", "follower_steps"):
        steps_of(getattr(config, name), 1, 0, flag(name))
    return config


def steps_of(text: str, turn: int, default: int, name: str = "") -> int:
    """The text 4,2 means 4 in turn 1 and 2 in all later ones; an empty one means the default."""
    if not text:
        return default
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{name} {text}: must be whole numbers with commas, such as 4,2") from error
    return steps[min(turn, len(steps)) - 1]


def load_policy(cfg: Config) -> Policy:
    """The base model, without adapters."""
    path = str(embedded_model()) if cfg.model == EMBEDDED else cfg.model
    limits = dict(token_budget=cfg.token_budget, slots=cfg.slots, activation_mib=cfg.activation_mib)
    return load(path, cfg.bits, rank=cfg.rank, alpha=cfg.alpha, **limits)


def print_config(cfg: Config) -> None:
    """The resolved settings, and what the small preset means."""
    pairs = [f"{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v != ""]
    line = ""
    for pair in pairs:
        if len(line) + len(pair) > 116:
            print("  " + line)
            line = ""
        line += pair + "  "
    print("  " + line)
    if cfg.model == EMBEDDED:
        print(
            "  Embedded 135M model: its own verdicts are near chance, so only hard constraints are drawn and the Filter\n"
            "  keeps those that code can check. A demonstration of the whole loop, not of the method's strength."
        )
