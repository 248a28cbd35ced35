"""run.py: a run, its folder, and the state that it resumes from.

Files are written beside their place and renamed, so a run may be killed at any moment.
"""

import hashlib
import io
import json
import math
import random
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import filelock
import torch
from torch.utils._pytree import tree_map_only

from extras.calibration import Calibration
from extras.constraint_parser import MAX_CONSTRAINT_CHARS
from extras.data import (
    InputError,
    read_eval_rows,
    read_questions,
    read_seed_questions,
    to_jsonl,
    write_atomic,
)
from extras.evaluate import check_heldout
from extras.judge_server import JudgeServer
from extras.load_model import fast_dtype
from extras.log import Log
from extras.peft_adapters import load_adapter
from judge import Judge, uses_model
from prompts import (
    FEW_SHOT,
    FOLDER,
    NUM_CONSTRAINTS,
    Question,
    few_shot_examples,
    follower_messages,
    instructor_messages,
    judge_messages,
    user,
)
from rl import Sample, grpo_step

# The state is saved at the end of each stage, and during a stage after so many seconds.
SAVE_SECONDS = 60
# So many steps in a row without a finite gradient end the run.
MAX_SKIPPED_STEPS = 5
# Settings that may differ when a run is resumed.
MAY_CHANGE = ("out", "turns", "logger", "judge_url")


class Run:
    """A run folder and its objects: policy, optimizers, judge, log, and the steps that are done."""

    def __init__(self, cfg, roles: list[str], load_policy):
        seed_questions = read_seed_questions(cfg.seed_questions or FOLDER / "seeds.jsonl")
        heldout = read_eval_rows(cfg.heldout or FOLDER / "heldout.jsonl")
        self.heldout = heldout[: cfg.eval_rows or None]
        server = JudgeServer(cfg.judge_url, cfg.judge_model) if cfg.judge_url else None
        if server:
            # A wrong URL, model or key ends here, before any training.
            server.ask([[user("Is water wet? Reply yes or no.")]])
        self.cfg, self.lock, created = open_folder(cfg)
        self.folder = Path(cfg.out)
        try:
            check_heldout(self.folder, self.heldout)
            print("  ".join(f"{name}={value}" for name, value in asdict(self.cfg).items()))
            self.policy = load_policy(self.cfg)
            # Chat templates that contain the date keep it when the run is resumed another day.
            self.policy.chat.date = created
            check_context(self.cfg, self.policy, uses_model(self.cfg) and not server)
            self.seed_questions = self._short_enough(seed_questions)
            self.optimizers = {role: self._add_role(role, i) for i, role in enumerate(roles)}
            # Role that the Follower is compared with: None is the base model.
            self.baseline = "init_follower" if cfg.init_follower else None
            if self.baseline:
                self.policy.copy("follower", self.baseline)
            self.judge = Judge(self.cfg, server.ask if server else self.ask, self.fits)
            self.turn, self.global_step, self.skipped_steps = 1, 0, 0
            # Steps per stage of this turn: finished ones, and those that train() came past.
            self.done, self.scheduled = Counter(), Counter()
            # Size of this turn's q_T, once it is written.
            self.num_questions: int | None = None
            self.saved = self.step_start = time.time()
            resume(self)
            self.log = Log(self)
            # Last, so that a setting that failed above can be corrected in the same folder.
            settings = asdict(self.cfg) | {"created": created.isoformat()}
            write_atomic(self.folder / "config.json", json.dumps(settings, indent=2).encode())
        except BaseException:
            self.lock.release()
            raise

    def _short_enough(self, seed_questions: list[str]) -> list[str]:
        """Seed questions that leave a quarter of --max-prompt-tokens for the constraints."""
        limit = self.cfg.max_prompt_tokens * 3 // 4
        kept = [q for q in seed_questions if self.prompt_tokens(q) <= limit]
        skipped = len(seed_questions) - len(kept)
        print(f"{len(seed_questions)} seed questions, {skipped} too long and skipped")
        if not kept:
            raise InputError(
                f"all seed questions are over {limit} tokens; raise --max-prompt-tokens"
            )
        return kept

    def _add_role(self, role: str, index: int) -> torch.optim.Optimizer:
        """An adapter with initial weights of its own, its reference, its optimizer."""
        if role == "follower" and self.cfg.init_follower:
            load_adapter(self.policy, role, self.cfg.init_follower)
        else:
            self.policy.add(role, seed=1000 * self.cfg.seed + index)
        self.policy.copy(role, f"ref_{role}")
        parameters = list(self.policy.tensors(role).values())
        return torch.optim.AdamW(parameters, lr=self.cfg.lr, weight_decay=0.0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the progress bar and release the folder."""
        self.log.close()
        self.lock.release()

    # -------------------------------------------- steps
    def remaining(self, stage: str, count: int) -> range:
        """The next `count` steps of a stage in this turn, without those that are finished."""
        first = self.scheduled[stage]
        self.scheduled[stage] += count
        return range(max(first, self.done[stage]), first + count)

    def num_steps(self, role: str, turn: int, num_questions: int | None = None) -> int:
        """As set, else epochs: 3 for the Follower in turn 1, SEIF's front-loading, 1 otherwise."""
        steps = getattr(self.cfg, f"{role}_steps").split(",")
        rows = num_questions
        if rows is None:
            rows = len(self.seed_questions)
            if role == "follower":
                rows = min(self.cfg.questions_per_turn or rows, rows)
        if steps[0] and rows:
            return int(steps[min(turn, len(steps)) - 1])
        epochs = 3 if (role, turn) == ("follower", 1) else 1
        return math.ceil(epochs * rows / self.cfg.prompts_per_step)

    def batch(self, stage: str, items: list, step: int) -> list:
        """The prompts of a step: epochs over `items`, each in its own order."""
        size, batch = self.cfg.prompts_per_step, []
        for i in range(step * size, (step + 1) * size):
            epoch, place = divmod(i, len(items))
            order = random.Random(f"{self.cfg.seed}/{self.turn}/{stage}/{epoch}")
            batch.append(order.sample(items, len(items))[place])
        return batch

    def seed_rngs(self) -> random.Random:
        """Reseed from (seed, global_step), so that a resumed CPU run is bit-identical."""
        self.step_start = time.time()
        rng = random.Random(f"{self.cfg.seed}/{self.global_step}")
        torch.manual_seed(rng.getrandbits(63))
        return rng

    def update(self, role: str, samples: list[Sample], temperature: float) -> dict:
        """One GRPO step. InputError after several steps in a row without a finite gradient.

        samples: cfg.group_size of one prompt, those of the next, and so on.
        """
        size = self.cfg.group_size
        groups = [samples[i : i + size] for i in range(0, len(samples), size)]
        reference, optimizer = f"ref_{role}", self.optimizers[role]
        if role == "follower" and self.cfg.kl_reference == "base":
            reference = self.baseline
        args = self.policy, role, reference, groups, optimizer, self.cfg, temperature
        metrics = grpo_step(*args)
        void = metrics["skipped"] and not metrics["updates"]
        self.skipped_steps = self.skipped_steps + 1 if void else 0
        if self.skipped_steps == MAX_SKIPPED_STEPS:
            fix = "start again with another --out and a lower --lr or a higher --kl-coef"
            raise InputError(f"{self.skipped_steps} steps without a finite gradient; {fix}")
        return metrics

    def finish_step(self, stage: str, row: dict) -> None:
        """Log a step, and save the state if it is due."""
        row = {"turn": self.turn, "stage": stage, "step": self.done[stage], **row}
        self.log.write(row | {"seconds": time.time() - self.step_start})
        self.done[stage] += 1
        self.global_step += 1
        end_of_stage = self.done[stage] == self.scheduled[stage]
        if end_of_stage or time.time() - self.saved >= SAVE_SECONDS:
            save(self)

    def start_turn(self) -> None:
        """Snapshot the trained roles: KL references. The Follower's also filters and judges."""
        (self.folder / f"turn{self.turn}").mkdir(exist_ok=True)
        self.scheduled.clear()
        if not self.done:
            for role in self.optimizers:
                self.policy.copy(role, f"ref_{role}")

    def finish_turn(self) -> None:
        """Go on to the next turn."""
        self.turn += 1
        self.done.clear()
        self.num_questions = None
        save(self)

    # -------------------------------------------- roles
    def ask(self, prompts: list[list[dict]]) -> list[float]:
        """P(yes) of the snapshot Follower, NaN for no verdict."""
        with self.policy.using("ref_follower"):
            return self.policy.yes_probability(prompts)

    def prompt_tokens(self, instruction: str) -> int:
        """Length of the Follower's prompt."""
        return len(self.policy.chat.encode(follower_messages(instruction, self.cfg.think)))

    def fits(self, question: Question) -> bool:
        """Whether an instruction is within --max-prompt-tokens."""
        return self.prompt_tokens(question.instruction) <= self.cfg.max_prompt_tokens

    # -------------------------------------------- files
    def save_questions(self, questions: list[Question]) -> None:
        """Write q_T of the current turn."""
        path = self.folder / f"turn{self.turn}" / "questions.jsonl"
        write_atomic(path, to_jsonl([asdict(q) for q in questions]).encode())
        self.num_questions = len(questions)

    def read_questions(self) -> list[Question]:
        """q_T of the current turn. InputError if lines are missing or malformed."""
        path = self.folder / f"turn{self.turn}" / "questions.jsonl"
        return read_questions(path, self.num_questions)


def open_folder(cfg) -> tuple:
    """Create or check a run folder: (settings with dtype resolved, its lock, creation date)."""
    folder, path = Path(cfg.out), Path(cfg.out, "config.json")
    lock = filelock.FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        old = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        created = date.fromisoformat(old.pop("created", date.today().isoformat()))
    except filelock.Timeout as error:
        fix = "give another --out, or stop that run"
        raise InputError(f"{folder}: another run is writing here; {fix}") from error
    except (OSError, ValueError, TypeError) as error:
        lock.release()
        fix = f"repair or delete {path.name}, or give another --out"
        raise InputError(f"{folder}: cannot be used as a run folder ({error}); {fix}") from error
    if cfg.dtype == "auto":
        # A run keeps the type that it started with.
        cfg = replace(cfg, dtype=old.get("dtype", fast_dtype(torch.cuda.is_available())))
    changed = [
        f"--{name.replace('_', '-')} {old[name]!r}, not {value!r}"
        for name, value in asdict(cfg).items()
        if name not in MAY_CHANGE and old.get(name, value) != value
    ]
    if changed:
        lock.release()
        fix = "give another --out, or the same settings"
        raise InputError(f"{path}: this run was started with {', '.join(changed)}; {fix}")
    return cfg, lock, created


def digest(run) -> str:
    """Identifies the seed questions and the initial adapter."""
    weights = Path(run.cfg.init_follower, "adapter_model.safetensors")
    adapter = weights.read_bytes() if run.cfg.init_follower else b""
    return hashlib.sha256("\n".join(run.seed_questions).encode() + adapter).hexdigest()


def save(run) -> None:
    """Replace state.pt: trained adapters, their references, optimizers, counters."""
    roles = [*run.optimizers, *(f"ref_{role}" for role in run.optimizers)]
    state = {
        "adapters": {role: run.policy.tensors(role) for role in roles},
        "optimizers": {role: o.state_dict() for role, o in run.optimizers.items()},
        "counters": [run.turn, run.global_step, dict(run.done), run.num_questions],
        "calibration": [asdict(run.judge.judger), asdict(run.judge.filter)],
        "digest": digest(run),
    }
    # Through memory: on a full disk torch.save raises something else than OSError.
    buffer = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), state), buffer)
    write_atomic(run.folder / "state.pt", buffer.getvalue())
    run.saved = time.time()


def resume(run) -> None:
    """Load state.pt if there is one, and cut the log to the steps that it contains."""
    path, log = run.folder / "state.pt", run.folder / "log.jsonl"
    if path.exists():
        try:
            _load(run, torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            fix = "delete it to start over, or give another --out"
            raise InputError(f"{path}: not a state of this run ({reason}); {fix}") from error
        print(f"resuming after step {run.global_step}, in turn {run.turn}")
    elif any(run.folder.glob("turn*/follower/*.safetensors")):
        print(f"no {path}: starting over, the turns in this folder will be replaced")
    if run.num_questions is not None:
        run.read_questions()
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    lines = lines[: run.global_step]
    try:
        whole = all("stage" in json.loads(line) for line in lines)
    except (ValueError, TypeError):
        whole = False
    if len(lines) < run.global_step or not whole:
        fix = "restore the file, or delete state.pt to start over"
        raise InputError(f"{log}: damaged, or shorter than when the state was saved; {fix}")
    write_atomic(log, b"".join(lines))


def _load(run, state: dict) -> None:
    if state["digest"] != digest(run):
        raise ValueError("it started with other seed questions or another adapter")
    for role, tensors in state["adapters"].items():
        own = run.policy.tensors(role)
        for name, tensor in tensors.items():
            own[name].data.copy_(tensor)
    for role, optimizer in run.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][role])
    run.turn, run.global_step, done, run.num_questions = state["counters"]
    run.done.update(done)
    run.judge.judger, run.judge.filter = (Calibration(**saved) for saved in state["calibration"])


def check_context(cfg, policy, uses_model: bool) -> None:
    """InputError where a role may need more tokens than the model has positions."""
    encode = policy.chat.encode
    needs = {"Follower": cfg.max_prompt_tokens + cfg.max_new_tokens}
    for kind in NUM_CONSTRAINTS:
        examples = sorted(few_shot_examples(kind), key=lambda q: -len(q.instruction))
        tokens = len(encode(instructor_messages("", kind, examples[:FEW_SHOT])))
        tokens += cfg.max_prompt_tokens * 3 // 4 + cfg.max_proposal_tokens
        needs["Instructor"] = max(tokens, needs.get("Instructor", 0))
    if uses_model:
        template = judge_messages(Question("", "hard", ()), "", "")
        # A character is hardly ever more than a token.
        needs["Judger"] = needs["Follower"] + len(encode(template)) + MAX_CONSTRAINT_CHARS
    for role, tokens in needs.items():
        if tokens > policy.context_length:
            limit = f"{tokens} tokens, the model's context has {policy.context_length}"
            fix = "lower --max-prompt-tokens, --max-new-tokens or --max-proposal-tokens"
            raise InputError(f"the {role} may need {limit}; {fix}")
