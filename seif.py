"""seif.py: self-evolving reinforcement learning for instruction following (arXiv 2605.07465).

    python seif.py                 train; the same command again goes on where it stopped
    python seif.py eval RUN        strict and loose accuracy of the trained Follower
    python seif.py chat RUN        talk to it; --base for the bare base model
    python seif.py plot RUN        one picture of the run
    python seif.py --help          every setting, with its default and its reason

One turn: the Instructor is trained to write constraints that today's Follower fails (reward 1 - r);
it writes the questions q_T; the Follower is trained to satisfy them (reward r). The Filter and the
Judger are rules and, if a model is to be asked too, the Follower as it stood when the turn began.
All are LoRA adapters on one quantised base model. `train` is the loop; read on in judge.py
(verdicts, rewards) and rl.py (the engine).

A run is a row of units, each a training step, a set of questions or an evaluation; each seeds its
own random numbers, so that a resumed run repeats what an uninterrupted one would have done.
"""

import argparse
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import filelock
import torch
import transformers
from safetensors import SafetensorError
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import judge
import rl
from judge import FILTERS, JUDGES, REWARDS
from prompts import messages
from prompts.messages import InputError, Question, replace_file
from rl import Policy, Sample

# Their progress bars and notes drown ours; warnings that matter come back as exceptions.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

QWEN, EMBEDDED = "Qwen/Qwen2.5-1.5B-Instruct", "SmolLM2-135M-Instruct"
FILTER = "llm: code, then the model; code; rules: code, and no hard one that no rule knows; off"
JUDGE = "hybrid: rules where they decide, else the model; llm: the model alone, the paper's way"
REWARD = "the Instructor's; hardest: 1 - r, the paper's; frontier: most where half succeed"
INTENT = "answers less about their seed than this share of the frozen Follower's pay 0"
DTYPES = ("auto", *rl.DTYPES)
BANK = min(len(messages.instructor_examples(kind)) for kind in messages.KINDS)
# Attempts per seed at a question that the Filter accepts, and their temperature (the paper's).
ATTEMPTS, QUESTION_TEMPERATURE = 3, 0.7
# Verdicts whose truth rules know that the Judger is tried on at the start of a turn, at most.
QUALIFYING = 128
# A state is saved at the end of every stage, and when so many seconds have passed.
SAVE_SECONDS = 60
# Steps in a row without a finite gradient: then the run is not coming back by itself.
MOST_VOIDED = 5


# ------------------------------------------------------------ settings
def row(default, reason: str, **more):
    """A setting: its default and its reason, which is also its --help.

    small: without a GPU, on the embedded model; paper: under --paper; choices; least: the smallest
    allowed, if that is not 0; may_change: when a run is resumed.
    """
    return dataclasses.field(default=default, metadata={"reason": reason, **more})


@dataclass
class Config:
    """Every row is a flag of the same name."""

    out: str = row("runs/seif", "run folder", may_change=True)
    model: str = row(QWEN, "Hugging Face id or folder of a chat model", small=EMBEDDED)
    bits: int = row(4, "4: nf4, double quantisation; 16: none", choices=(4, 16))
    dtype: str = row("auto", "computes in; auto: what this machine is fast in", choices=DTYPES)
    engine: str = row("packed", "plain: rl.py's own, slow", choices=("packed", "plain"))
    seeds: str = row("", "seed questions: JSON lines, CSV, parquet, text; empty: ours")
    heldout: str = row("", "rows in IFEval's format, measured each turn; empty: ours")
    seed: int = row(0, "random seed")
    init_follower: str = row("", "LoRA adapter, ours or peft's, that the Follower starts from")
    # The schedule: 4,2 is 4 steps in turn 1, and 2 in all later ones. As everything that follows,
    # the paper's where it says so, else as in the run of results/headline.
    turns: int = row(3, "turns; the paper's number", small=1, least=1, may_change=True)
    batch: int = row(16, "prompts per training step", small=8, least=1)
    group: int = row(8, "samples per prompt", paper=5, least=2)
    instructor_steps: str = row("4,2", "per turn; empty: one epoch", small="2,1", paper="")
    follower_steps: str = row("30,12", "as above; empty: 3, 1, 1 epochs", small="8,3", paper="")
    questions: int = row(128, "questions in q_T; 0: one per seed", small=48, paper=0)
    # The roles.
    hard_share: float = row(1.0, "of machine-checkable questions", paper=0.5, most=1)
    shots: int = row(4, "worked examples for the Instructor", most=BANK)
    think: bool = row(False, "require <think>..</think><answer>..</answer>", paper=True)
    filter: str = row("rules", FILTER, paper="llm", choices=FILTERS)
    min_words: int = row(30, "the Filter rejects what allows fewer words", small=20, paper=0)
    trust_judger: bool = row(False, "believe the model as Judger even if it cannot tell")
    judge: str = row("hybrid", JUDGE, paper="llm", choices=JUDGES)
    reward: str = row("hardest", REWARD, paper="hardest", choices=REWARDS)
    intent_gate: float = row(0.0, INTENT, most=1)
    # GRPO.
    temperature: float = row(0.8, "of the Follower's", small=0.7, paper=1.0, least=0.01)
    instructor_temperature: float = row(1.0, "the other's", small=0.5, paper=1.0, least=0.01)
    lr: float = row(6e-5, "LoRA wants more than the paper's 1e-6", small=3e-4, paper=2e-5)
    kl: float = row(0.05, "weight of the k3 KL to the stage's start", paper=0.01)
    updates: int = row(1, "optimiser steps per rollout batch", paper=4, least=1)
    rank: int = row(16, "of LoRA; alpha is twice as much", least=1)
    # Limits.
    max_new_tokens: int = row(256, "an answer's; cut ones score 0", small=96, paper=1024, least=1)
    instructor_tokens: int = row(160, "a proposal's", small=96, paper=512, least=1)
    max_prompt_tokens: int = row(1024, "longer seeds are skipped and counted, never cut", least=1)
    eval_rows: int = row(0, "held-out rows and questions measured per turn; 0: all")

    @property
    def asks_a_model(self) -> bool:
        """Whether any verdict of a run is a model's."""
        return self.hard_share < 1 or self.judge == "llm" or self.filter != "rules"


QUICK = dict(turns=2, batch=4, instructor_steps="2,1", follower_steps="3,2", questions=16)
QUICK |= dict(eval_rows=40)
# What --paper leaves of the small preset: its epochs would take a CPU a day, and in a schedule as
# short as that its learning rate would teach nothing.
PACE = ("instructor_steps", "follower_steps", "questions", "lr")
ROWS = {field.name: field for field in dataclasses.fields(Config)}


def flag(name: str) -> str:
    """max_new_tokens -> --max-new-tokens"""
    return "--" + name.replace("_", "-")


def read_config(argv: list[str]) -> Config:
    """Flags over --quick over --paper over the small preset over the defaults."""
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser("seif.py", description=__doc__, **how)
    for name, field in ROWS.items():
        about = field.metadata
        small = f", small {about['small']!r}" if "small" in about else ""
        text = f"{about['reason']} [{field.default!r}{small}]".replace("%", "%%")
        kind = {"type": field.type, "choices": about.get("choices")}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--paper", action="store_true", help="the paper's roles, GRPO, schedule")
    parser.add_argument("--quick", action="store_true", help="a schedule of minutes, any model")
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word, [flag(n) for n in (*ROWS, "paper", "quick")], 1)
        raise InputError(f"{word}: no such setting; {f'{near[0]}?' if near else 'see --help'}")
    given = vars(given)
    preset = lambda name: {k: f.metadata[name] for k, f in ROWS.items() if name in f.metadata}
    small, values = preset("small"), preset("paper") if given.pop("paper") else {}
    if not torch.cuda.is_available() and "model" not in given:
        values = small | values | {name: small[name] for name in PACE}
    values |= QUICK if given.pop("quick") else {}
    cfg = Config(**values | given)
    for name, field in ROWS.items():
        value, least = getattr(cfg, name), field.metadata.get("least", 0)
        most = field.metadata.get("most", math.inf)
        if isinstance(value, (int, float)) and not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise InputError(f"{flag(name)} {value}: must be {limit}")
        if name.endswith("_steps") and value and not re.fullmatch(r"\d+(,\d+)*", value):
            raise InputError(f"{flag(name)} {value}: must be whole numbers, as 4,2")
    if cfg.trust_judger and not cfg.asks_a_model:
        raise InputError("--trust-judger: no model is asked; add --hard-share 0.5 or --filter llm")
    return cfg


def load_policy(cfg: Config) -> Policy:
    """The base model, without adapters."""
    path = cfg.model
    if path == EMBEDDED:
        if not (smollm2 := rl.extra("smollm2")):
            raise InputError("the embedded model comes with extras/: give --model FOLDER")
        path = str(smollm2.folder())
    how = dict(rank=cfg.rank, alpha=2 * cfg.rank, engine=cfg.engine, dtype=cfg.dtype)
    return rl.load(path, cfg.bits, **how)


# ------------------------------------------------------------ the loop
def train(cfg: Config) -> None:
    """Self-evolution. What is done already is skipped; every unit is logged, and saved when due."""
    with locked_folder(cfg) as begun:
        run = Run(cfg, begun)
        if report := rl.extra("report"):
            print(report.plan(run))
        for turn in range(1, cfg.turns + 1):
            freeze_roles(run, turn)
            for _ in run.left(turn, "qualification", int(run.cfg.asks_a_model)):
                run.log(qualify_roles(run))
            for step in run.left(turn, "instructor", run.steps(turn, "instructor")):
                run.log(instructor_step(run, turn, step))
            for _ in run.left(turn, "questions", 1):
                run.log(write_questions(run, turn))
            for step in run.left(turn, "follower", run.steps(turn, "follower")):
                run.log(follower_step(run, turn, step))
            for _ in run.left(turn, "evaluation", 1):
                run.log(evaluate_turn(run, turn))
    print(f"done: {cfg.out}/turn{cfg.turns}/follower; try: python seif.py chat {cfg.out}")


def freeze_roles(run: "Run", turn: int) -> None:
    """Both roles as the turn begins: the KL references; the Follower's also filters and judges."""
    for role in ("instructor", "follower"):
        if turn > 1:
            run.policy.load_adapter(f"frozen_{role}", run.folder / f"turn{turn - 1}" / role)
        else:
            run.start(f"frozen_{role}", role)
        for parameter in run.policy.tensors(f"frozen_{role}").values():
            parameter.requires_grad_(False)


def qualify_roles(run: "Run") -> dict:
    """Can the frozen Follower judge and filter? On cases whose truth rules know, no labels.

    A proxy for what it is asked later, which no rule knows: who cannot count cannot weigh.
    """
    cfg, policy, draw = run.cfg, run.policy, run.draw
    examples, clock = messages.instructor_examples("hard"), Clock()
    seeds = draw.choices(run.seeds, k=QUALIFYING // 2)
    asked = [Question(s, "hard", draw.choice(examples).constraints) for s in seeds]
    with policy.using("frozen_follower"), clock("rollout"):
        prompts = [messages.follower_prompt(q.instruction, cfg.think) for q in asked]
        texts = [s.text for (s,) in policy.sample(prompts, 1, cfg.max_new_tokens, cfg.temperature)]
    answers = [judge.extract_answer(text, cfg.think) or text for text in texts]
    cases = [(q, a, c) for q, a in zip(asked, answers) if a for c in q.constraints]
    truth = [judge.rule_verdict(q, c, a) for q, a, c in cases]
    cases, truth = judge.balance(cases, truth, QUALIFYING)
    bank = [c for q in examples for c in q.constraints]
    draw.shuffle(bank)
    clashing = [q for q in (judge.unsound(q, bank) for q in examples) if q]
    with policy.using("frozen_follower"), clock("judging"):
        ps = run.ask([messages.judger_prompt(*case) for case in cases])
        run.judger = judge.rank(ps, truth)
        sound = [True] * len(examples) + [False] * len(clashing)
        ps = run.ask([messages.filter_prompt(q) for q in examples + clashing])
        run.filter = judge.rank(ps, sound)
    return dict(judger=asdict(run.judger), filter=asdict(run.filter), seconds=clock)


# ------------------------------------------------------------ what the roles do
def propose(run: "Run", seeds: list, kinds: list, n: int, temperature) -> list[list[Sample]]:
    """The Instructor's n proposals a seed, each with its question, and why it is rejected if so."""
    cfg, policy = run.cfg, run.policy
    prompts = messages.instructor_prompts(seeds, kinds, cfg, run.draw.random())
    with policy.using("instructor"):
        groups = policy.sample(prompts, n, cfg.instructor_tokens, temperature)
    for seed, kind, group in zip(seeds, kinds, groups):
        for sample in group:
            found, sample.reason = judge.parse_constraints(sample.text, messages.KINDS[kind])
            if not sample.reason:
                sample.question = Question(seed, kind, tuple(found))
                asked = messages.follower_prompt(sample.question.instruction, cfg.think)
                long = len(policy.chat.encode(asked)) > cfg.max_prompt_tokens
                sample.reason = "over --max-prompt-tokens" if long else ""
    parsed = [s for group in groups for s in group if not s.reason]
    questions, limits = [s.question for s in parsed], (cfg.max_new_tokens, cfg.min_words)
    with policy.using("frozen_follower"):
        how = (run.ask, run.filter_mode, limits, run.filter.threshold)
        reasons = judge.filter_questions(questions, *how)
    for sample, reason in zip(parsed, reasons):
        sample.reason = reason
    return groups


def answer(run: "Run", role, questions, n: int, temperature, clock) -> list[list[Sample]]:
    """n answers of `role`, None being the base model, to each question, with verdicts."""
    cfg, policy = run.cfg, run.policy
    with clock("rollout"), policy.using(role):
        prompts = [messages.follower_prompt(q.instruction, cfg.think) for q in questions]
        groups = policy.sample(prompts, n, cfg.max_new_tokens, temperature)
    for question, group in zip(questions, groups):
        for sample in group:
            sample.question, sample.answer = question, judge.extract_answer(sample.text, cfg.think)
    # Cut-off and empty answers pay nothing, whatever the verdict.
    samples = [s for group in groups for s in group if s.answer and s.ended]
    with clock("judging"), policy.using("frozen_follower"):
        pairs = [(s.question, s.answer) for s in samples]
        ask = run.ask if run.trusts_judger else None
        table = judge.verdicts(pairs, ask, cfg.judge, run.judger.threshold)
    for sample, verdicts in zip(samples, table):
        sample.verdicts = verdicts
    return groups


# ------------------------------------------------------------ stage 1: the Instructor
def instructor_step(run: "Run", turn: int, step: int) -> dict:
    """GRPO on proposals: 0 for an invalid one, else 1 - r of the frozen Follower's own answer."""
    cfg, clock = run.cfg, Clock()
    order = random.Random(f"{cfg.seed}/{turn}").sample(run.seeds, len(run.seeds))
    seeds = [order[(step * cfg.batch + i) % len(order)] for i in range(cfg.batch)]
    with clock("rollout"):
        groups = propose(run, seeds, run.kinds(seeds), cfg.group, cfg.instructor_temperature)
    proposals = [s for group in groups for s in group]
    valid = [s for s in proposals if not s.reason]
    questions = [s.question for s in valid]
    answers = [a for (a,) in answer(run, "frozen_follower", questions, 1, cfg.temperature, clock)]
    for proposal in proposals:
        proposal.reward = 0.0
    for proposal, given in zip(valid, answers):
        # A cut-off answer says nothing of the difficulty, and pays 0: else the Instructor would
        # learn to ask for answers longer than the limit. Without any verdict nothing is known.
        if given.verdicts:
            r = judge.satisfaction(given.verdicts)
            proposal.reward = None if r is None else judge.instructor_reward(r, cfg.reward)
    with clock("update"):
        own = dataclasses.replace(cfg, temperature=cfg.instructor_temperature)
        metrics = run.update("instructor", groups, own)
    pairs = list(zip(answers, (p.reward for p in valid)))
    return dict(groups=groups, answers=pairs, seconds=clock, metrics=metrics)


# ------------------------------------------------------------ the questions q_T
def write_questions(run: "Run", turn: int) -> dict:
    """The trained Instructor writes one question per seed; a few retries for what is rejected."""
    cfg, clock, accepted, rejected = run.cfg, Clock(), [], Counter()
    seeds = run.draw.sample(run.seeds, min(cfg.questions or len(run.seeds), len(run.seeds)))
    kinds = run.kinds(seeds)
    temperature = min(QUESTION_TEMPERATURE, cfg.instructor_temperature)
    with clock("rollout"):
        for _ in range(ATTEMPTS):
            proposals = [s for (s,) in propose(run, seeds, kinds, 1, temperature)]
            accepted += [s.question for s in proposals if not s.reason]
            rejected.update(s.reason for s in proposals if s.reason)
            again = [i for i, s in enumerate(proposals) if s.reason]
            seeds, kinds = [seeds[i] for i in again], [kinds[i] for i in again]
    # Accepted at the first attempt or the last: whoever takes the first few takes of both.
    run.draw.shuffle(accepted)
    run.written[turn] = len(accepted)
    text = messages.json_lines([asdict(q) for q in accepted])
    replace_file(run.folder / f"turn{turn}" / "questions.jsonl", text.encode())
    return dict(questions=accepted, rejected=rejected, seconds=clock)


# ------------------------------------------------------------ stage 2: the Follower
def follower_step(run: "Run", turn: int, step: int) -> dict:
    """GRPO on answers: r, the mean verdict over the constraints."""
    cfg, clock, questions = run.cfg, Clock(), run.questions(turn)
    # Epoch after epoch, each in an order of its own; a step may straddle two.
    places = [divmod(step * cfg.batch + i, len(questions)) for i in range(cfg.batch)]
    shuffled = lambda e: random.Random(f"{cfg.seed}/{turn}/{e}").sample(questions, len(questions))
    orders = {epoch: shuffled(epoch) for epoch in {epoch for epoch, _ in places}}
    batch = [orders[epoch][at] for epoch, at in places]
    groups = answer(run, "follower", batch, cfg.group, cfg.temperature, clock)
    samples = [s for group in groups for s in group]
    for s in samples:
        s.reward = judge.follower_reward(s.question, s.answer, s.ended, s.verdicts)
    if cfg.intent_gate:
        with clock("gate"):
            rl.extra("sense").gate(run, turn, samples)
    with clock("update"):
        metrics = run.update("follower", groups, cfg)
    answers = [(group[0], group[0].reward) for group in groups]
    return dict(groups=groups, answers=answers, seconds=clock, metrics=metrics)


class Clock(Counter):
    """Seconds by phase of a step: `with clock("rollout"): ...`."""

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self[phase] += time.perf_counter() - start


def evaluate_turn(run: "Run", turn: int) -> dict:
    """Save the adapters; how hard q_T is for whom the run began with. report.py adds the rest."""
    for role in run.optimizers:
        run.policy.save(role, run.folder / f"turn{turn}" / role)
    questions, clock = run.questions(turn)[: run.cfg.eval_rows or None], Clock()
    answers = [a for (a,) in answer(run, run.base, questions, 1, 0.0, clock)]
    return dict(answers=answers, seconds=clock)


# ------------------------------------------------------------ the run folder
@contextmanager
def locked_folder(cfg: Config):
    """Create the run folder or check its settings, keep other runs out; "auto" becomes a dtype."""
    folder, path = Path(cfg.out), Path(cfg.out, "config.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / "lock").acquire(timeout=0)
        old = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        if cfg.dtype == "auto":
            # A run goes on in the type that it began in, on whatever machine.
            cfg.dtype = old.get("dtype", rl.fast_dtype(torch.cuda.is_available()))
        own = asdict(cfg) | {"begun": old.get("begun", date.today().isoformat())}
        begun = date.fromisoformat(own["begun"])
    except filelock.Timeout as error:
        mend = "give another --out, or stop that one"
        raise InputError(f"{folder}: another run is writing here; {mend}") from error
    except (OSError, ValueError, TypeError) as error:
        mend = f"mend or take out {path.name}, or give another --out"
        raise InputError(f"{folder}: cannot be used as run folder ({error}); {mend}") from error
    with held:
        differ = [
            f"{flag(name)} {old[name]!r}, not {own[name]!r}"
            for name, field in ROWS.items()
            if old.get(name, own[name]) != own[name] and not field.metadata.get("may_change")
        ]
        if differ:
            mend = "give another --out, or the same settings"
            raise InputError(f"{path}: this run was made with {', '.join(differ)}; {mend}")
        replace_file(path, json.dumps(own, indent=2).encode())
        yield begun


class Run:
    """A run folder and what is in memory of it: the policy, optimisers, and what is done."""

    def __init__(self, cfg: Config, begun: date):
        self.cfg, self.folder = cfg, Path(cfg.out)
        ours, evaluation = messages.PROMPTS, rl.extra("eval")
        seeds = messages.read_seeds(cfg.seeds or ours / "seeds.jsonl")
        if cfg.intent_gate and not evaluation:
            raise InputError("--intent-gate comes with extras/, which is not here")
        heldout = cfg.heldout or ours / "heldout.jsonl"
        self.heldout = evaluation.read_rows(heldout)[: cfg.eval_rows or None] if evaluation else []
        print("  ".join(f"{name}={value}" for name, value in asdict(cfg).items()))
        self.policy = load_policy(cfg)
        # Templates that tell the date keep telling it, after midnight and when resumed.
        self.policy.chat.today = begun
        encode = self.policy.chat.encode
        messages.check_limits(cfg, encode, cfg.asks_a_model, self.policy.model.config)
        self.seeds = messages.usable(seeds, cfg, encode)
        self.digest = messages.digest(self.seeds, cfg.init_follower)
        self.optimizers = {}
        for role in ("instructor", "follower"):
            self.start(role, role)
            parameters = list(self.policy.tensors(role).values())
            self.optimizers[role] = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0)
        # Whom the Follower is compared with: the base model, or the adapter that it starts from.
        self.base = "base" if cfg.init_follower else None
        if self.base:
            self.start(self.base, "follower")
        # Units done in all, and units that the loop has come past.
        self.done = self.passed = self.voided = 0
        # How far the frozen Follower is to be believed as Judger and as Filter.
        self.judger = self.filter = judge.UNTRIED
        # Questions of each q_T, which decide the Follower's steps; --intent-gate's threshold.
        self.written: dict[int, int] = {}
        self.least: dict[int, float] = {}
        self.saved = time.time()
        self._resume()
        skipped = f"{len(seeds) - len(self.seeds)} too long, skipped"
        print(f"{len(self.seeds)} seeds ({skipped}), {len(self.heldout)} held-out rows, {cfg.out}")
        if self.done:
            print(f"going on after unit {self.done}")

    def start(self, name: str, role: str) -> None:
        """An adapter as `role` is when the run begins; the same seed, so the same weights."""
        if role == "follower" and self.cfg.init_follower:
            self.policy.load_adapter(name, self.cfg.init_follower)
        else:
            self.policy.add(name, seed=self.cfg.seed * 2 + (role == "follower"))

    def left(self, turn: int, stage: str, steps: int) -> Iterator[int]:
        """The steps of a stage that are not done, each seeded, under a bar; saved when due."""
        first = min(steps, max(0, self.done - self.passed))
        self.passed += steps
        if first == steps:
            return
        (self.folder / f"turn{turn}").mkdir(exist_ok=True)
        how = dict(total=steps, initial=first, desc=f"turn {turn} {stage}", dynamic_ncols=True)
        with tqdm(**how) as self.bar:
            for step in range(first, steps):
                self.draw = seed_unit(self.cfg.seed, turn, stage, step)
                self.unit = dict(turn=turn, stage=stage, step=step)
                self.unit_start = time.time()
                yield step
                self.done += 1
                self.bar.update()
                if step == steps - 1 or time.time() - self.saved >= SAVE_SECONDS:
                    self.save()
                if Run.stopped:
                    raise KeyboardInterrupt

    def steps(self, turn: int, role: str) -> int:
        """As set; else epochs, 3 of the Follower's in turn 1, SEIF's front-loaded schedule, else 1.

        A q_T that is not written yet counts as a question for each of its seeds.
        """
        rows = len(self.seeds)
        if role == "follower":
            rows = self.written.get(turn, min(self.cfg.questions or rows, rows))
        given = getattr(self.cfg, f"{role}_steps").split(",")
        if given[0] and rows:
            return int(given[min(turn, len(given)) - 1])
        epochs = 3 if (role, turn) == ("follower", 1) else 1
        return math.ceil(epochs * rows / self.cfg.batch)

    def kinds(self, seeds: list[str]) -> list[str]:
        """hard or soft for each seed, drawn; hard where nobody could judge a soft one."""
        share = self.cfg.hard_share if self.trusts_judger else 1.0
        return ["hard" if self.draw.random() < share else "soft" for _ in seeds]

    @property
    def trusts_judger(self) -> bool:
        """Whether the model's verdicts count; under --judge llm they do, measured or not."""
        trusted = self.cfg.trust_judger or self.cfg.judge == "llm" or self.judger.believed
        return self.cfg.asks_a_model and trusted

    def ask(self, prompts: list[list[dict]]) -> list[float]:
        """The Judger's and the Filter's P(yes), nan for none: the frozen Follower's."""
        return self.policy.yes_probability(prompts)

    @property
    def filter_mode(self) -> str:
        """As set; code for a Filter that cannot tell, rules beside a Judger that cannot."""
        if not self.trusts_judger and self.cfg.filter != "off":
            return "rules"
        disbelieved = self.cfg.filter == "llm" and not self.filter.believed
        return "code" if disbelieved else self.cfg.filter

    def questions(self, turn: int) -> list[Question]:
        """q_T as written."""
        path = self.folder / f"turn{turn}" / "questions.jsonl"
        return messages.read_questions(path, self.written.get(turn))

    def update(self, role: str, groups: list[list[Sample]], cfg) -> dict:
        """A GRPO step; ends the run when step after step has no finite gradient."""
        how = (self.optimizers[role], cfg)
        metrics = rl.grpo_step(self.policy, role, f"frozen_{role}", groups, *how)
        void = metrics["skipped"] and not metrics["updates"]
        self.voided = self.voided + 1 if void else 0
        if self.voided == MOST_VOIDED:
            mend = f"lower --lr, raise --kl, go on from {self.folder}"
            raise InputError(f"{self.voided} steps in a row had no finite gradient; {mend}")
        return metrics

    def log(self, done: dict) -> None:
        """A unit's line of log.jsonl: what extras/report.py, which shows it too, makes of it."""
        report = rl.extra("report")
        told = {role: done[role] for role in ("judger", "filter") if role in done}
        row = report.show(self, done) if report else self.unit | done.get("metrics", told)
        row["wall"] = time.time() - self.unit_start
        messages.append_text(self.folder / "log.jsonl", messages.json_lines([row]))
        if not report:
            tqdm.write(messages.json_lines([row])[:-1])

    def save(self) -> None:
        """Replace the state: adapters, optimisers, and how many units are done."""
        adapters = {role: self.policy.tensors(role) for role in self.optimizers}
        optimizers = {role: o.state_dict() for role, o in self.optimizers.items()}
        state = dict(done=self.done, written=self.written, seeds=self.digest)
        state |= dict(judger=asdict(self.judger), filter=asdict(self.filter))
        state |= dict(adapters=adapters, optimizers=optimizers)
        # By way of memory: on a full disk torch's own writer raises what is no OSError.
        buffer = io.BytesIO()
        torch.save(tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), state), buffer)
        replace_file(self.folder / "state.pt", buffer.getvalue())
        self.saved = time.time()

    def _resume(self) -> None:
        """Take up the saved state, if there is one; the log keeps a line for each unit done."""
        path, log = self.folder / "state.pt", self.folder / "log.jsonl"
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                for role, optimizer in self.optimizers.items():
                    for name, parameter in self.policy.tensors(role).items():
                        parameter.data.copy_(state["adapters"][role][name])
                    optimizer.load_state_dict(state["optimizers"][role])
                self.done, self.written = int(state["done"]), dict(state["written"])
                self.judger = judge.Ranking(**state["judger"])
                self.filter = judge.Ranking(**state["filter"])
                if state["seeds"] != self.digest:
                    raise ValueError("it began with other seeds, or another adapter")
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
                mend = "take it out to begin again"
                raise InputError(f"{path}: not this run's state ({reason}); {mend}") from error
        elif any(self.folder.glob("turn*/follower/*.safetensors")):
            print(f"no {path}: begins again, and replaces turn after turn of what is there")
        for turn in self.written:
            self.questions(turn)
        replace_file(log, messages.first_units(log, self.done))


def seed_unit(seed: int, turn: int, stage: str, step: int) -> random.Random:
    """Seed every random number of one unit, torch's and the returned ones."""
    digest = hashlib.sha256(f"{seed}/{turn}/{stage}/{step}".encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    torch.manual_seed(number)
    return random.Random(number)


# ------------------------------------------------------------ commands
def main(argv: list[str]) -> int:
    """Run a command; errors that the user can mend end in one line and status 2."""
    Run.stopped = False

    def stop(*_) -> None:
        """A polite kill is a Ctrl-C; a step's end looks again, in case something swallows it."""
        Run.stopped = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        if argv and argv[0] in ("eval", "chat", "plot"):
            if not (command := rl.extra(argv[0])):
                raise InputError(f"{argv[0]} comes with extras/, which is not here")
            if not argv[1:]:
                runs = ", ".join(str(p.parent) for p in sorted(Path("runs").glob("*/config.json")))
                raise InputError(f"{argv[0]} needs a run folder; under runs/: {runs or 'none yet'}")
            command.main(argv[1:], sys.modules[__name__])
        else:
            train(read_config(argv))
        return 0
    except (InputError, rl.ModelError, torch.OutOfMemoryError) as error:
        print(f"seif: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"seif: {error}; what was saved is whole: the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nseif: stopped; the same command goes on from the last state", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
