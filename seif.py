"""seif.py: self-evolving reinforcement learning for instruction following, on one GPU (SEIF, arXiv 2605.07465).

    python seif.py                      train; the same command again goes on where it stopped
    python seif.py eval RUN             strict and loose accuracy of the trained Follower (IFEval's JSONL format)
    python seif.py chat RUN             talk to it; --base for the model it started from
    python seif.py plot RUN             one picture of the run (matplotlib)
    python seif.py --help               every setting, with its default and its reason

One turn T: the Instructor is trained to write constraints that today's Follower fails (1 - r); it
then writes the questions q_T; the Follower is trained to satisfy them (r). The Filter and the Judger are the Follower
as it stood when the turn began, frozen. All four are LoRA adapters on one quantised base model, swapped by name.

Left out: vLLM servers, several GPUs, a teacher, labels, merged checkpoints. Read on in judge.py (verdicts, rewards) and
rl.py (the engine); config.py is the table of settings. A run is a list of units, each a training step, a set of
questions or an evaluation; every unit seeds its own random numbers, so that a resumed run repeats exactly what an
uninterrupted one would have done.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import judge
import report
import rl
from config import MAY_CHANGE, Config, flag, load_policy, print_config, read_config, steps_of
from data import UserError, read_ifeval, read_jsonl, read_seeds, refuse_pickles, replace_file, write_jsonl
from evaluate import command_chat, command_eval, evaluate
from judge import Question
from rl import Episode, Policy

# Their progress bars and notes drown ours; warnings that matter come back as exceptions.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# ---------------------------------------------------------------- the run


LOGS = ("log.jsonl", "samples.jsonl")


class Run:
    """A run folder and what is in memory of it: adapters, optimisers, and how many units are done."""

    def __init__(self, cfg: Config, policy: Policy, seeds: list[str]):
        self.cfg, self.policy, self.folder, self.done = cfg, policy, Path(cfg.out), 0
        self.seeds = [s for s in seeds if self._fits(s)]
        self.skipped = len(seeds) - len(self.seeds)
        if not self.seeds:
            raise UserError(f"{cfg.seeds}: all {len(seeds)} seeds exceed --max-prompt-tokens {cfg.max_prompt_tokens}")
        context = getattr(policy.model.config, "max_position_embeddings", math.inf)
        if cfg.max_prompt_tokens + cfg.max_new_tokens > context:
            raise UserError(
                f"--max-prompt-tokens {cfg.max_prompt_tokens} and --max-new-tokens {cfg.max_new_tokens} together exceed "
                f"the {context} tokens of context that {cfg.model} has"
            )
        self.optimizers = {}
        for role in ("instructor", "follower"):
            self._start(role, role)
            parameters = list(policy.tensors(role).values())
            self.optimizers[role] = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0)
        self.heldout = read_ifeval(cfg.heldout)
        self.heldout = self.heldout[: cfg.eval_rows or None]

    def _start(self, name: str, role: str) -> None:
        """An adapter as `role` is when the run begins."""
        if role == "follower" and self.cfg.init_follower:
            self.policy.load_adapter(name, self.cfg.init_follower)
        else:
            self.policy.add(name, seed=self.cfg.seed * 2 + (role == "follower"))

    def _fits(self, seed: str) -> bool:
        limit = self.cfg.max_prompt_tokens
        # The constraints come on top: a quarter of the limit is kept for them.
        return len(judge.follower_prompt(self.policy, seed, self.cfg.think)) <= limit * 3 // 4

    def draw(self, turn: int, stage: str, step: int) -> random.Random:
        """Seed every random number of one unit, torch's and the returned ones."""
        text = f"{self.cfg.seed}/{turn}/{stage}/{step}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        torch.manual_seed(number)
        return random.Random(number)

    def questions(self, turn: int) -> list[Question]:
        """q_T as written."""
        return judge.read_questions(self.folder / f"turn{turn}" / "questions.jsonl")

    def log(self, name: str, row: dict) -> None:
        """Append one JSON line to log.jsonl or samples.jsonl."""
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def begin_turn(self, turn: int) -> None:
        """The adapters that stay frozen all turn: the evaluator, and the Instructor's KL reference."""
        for role, frozen in (("follower", "evaluator"), ("instructor", "reference")):
            if turn > 1:
                self.policy.load_adapter(frozen, self.folder / f"turn{turn - 1}" / role)
            else:
                self._start(frozen, role)
            for parameter in self.policy.tensors(frozen).values():
                parameter.requires_grad_(False)

    def save(self, units: int) -> None:
        """Replace the state: trained adapters, optimiser moments, units done, and the sizes of the logs by then."""
        tensors = {}
        for role, optimizer in self.optimizers.items():
            for name, parameter in self.policy.tensors(role).items():
                tensors[f"{role}/{name}"] = parameter.detach().cpu().contiguous()
                for moment, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{role}/{name}/{moment}"] = value.detach().cpu().contiguous()
        sizes = {}
        for name in LOGS:
            with open(self.folder / name, "ab") as file:
                os.fsync(file.fileno())  # on the disk before the state that counts on it
                sizes[name] = file.tell()
        about = {"units": str(units), "sizes": json.dumps(sizes)}
        replace_file(self.folder / "state.safetensors", lambda path: save_file(tensors, path, about))

    def resume(self) -> None:
        """Take up the saved state if there is one, and cut off what the logs hold beyond it."""
        path, sizes = self.folder / "state.safetensors", dict.fromkeys(LOGS, 0)
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    self.done = int(file.metadata()["units"])
                    sizes |= json.loads(file.metadata()["sizes"])
                    saved = {name: file.get_tensor(name) for name in file.keys()}
                for role, optimizer in self.optimizers.items():
                    for name, parameter in self.policy.tensors(role).items():
                        parameter.data.copy_(saved[f"{role}/{name}"])
                        moments = {k: saved.get(f"{role}/{name}/{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
                        if moments["step"] is not None:
                            on_device = {k: v.to(parameter.device) for k, v in moments.items() if k != "step"}
                            optimizer.state[parameter] = {"step": moments["step"], **on_device}
            except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
                raise UserError(
                    f"{path}: not a state that this run can go on from ({error}); take it out to begin again"
                ) from error
        for name in LOGS:
            with open(self.folder / name, "ab") as file:
                if file.tell() < sizes[name]:
                    raise UserError(
                        f"{self.folder / name}: shorter than when the state was saved; put the whole file back, "
                        f"or take out {path.name} to begin again"
                    )
                file.truncate(sizes[name])


def open_folder(cfg: Config):
    """Create the run folder or check that it belongs to the same settings. Returns the lock that keeps others out."""
    folder = Path(cfg.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another run is writing here; give another --out, or stop that one") from error
        own = dataclasses.asdict(cfg)
        path = folder / "config.json"
        if path.exists():
            old = dict(json.loads(path.read_text(encoding="utf-8")))
            differ = [k for k in own if k not in MAY_CHANGE and old.get(k, own[k]) != own[k]]
            if differ:
                k = differ[0]
                raise UserError(
                    f"{path}: this run was made with {flag(k)} {old[k]}, not {own[k]}"
                    f"{' (and more)' * (len(differ) > 1)}; give another --out, or the same settings to go on"
                )
        replace_file(path, lambda part: part.write_text(json.dumps(own, indent=2)))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: cannot be used as run folder ({error})") from error
    refuse_pickles(folder)
    return lock


class Clock(Counter):
    """Seconds by phase of a step: `with clock("rollout"): ...`."""

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self[phase] += time.perf_counter() - start


def peak_mib() -> int:
    """Peak memory so far: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


# ---------------------------------------------------------------- stage 1: the Instructor


def propose(run: Run, seeds: list[str], kinds: list[str], n: int, draw: random.Random, temperature: float):
    """n proposals for each seed: prompts, completions, and per proposal (Question or None, reason).

    The worked examples are drawn for every cfg.batch seeds, so that the prompts of a step share all but the seed and
    yet the questions of q_T show many sorts: a small Instructor stays close to its examples.
    """
    policy, cfg, salt = run.policy, run.cfg, draw.getrandbits(32)
    prompts = [
        judge.instructor_prompt(policy, seed, kind, cfg.shots, random.Random(f"{salt}/{kind}/{i // cfg.batch}"))
        for i, (seed, kind) in enumerate(zip(seeds, kinds))
    ]
    with policy.using("instructor"):
        groups = policy.generate(prompts, n, cfg.instructor_tokens, temperature)
    proposals = []
    for seed, kind, group in zip(seeds, kinds, groups):
        for completion in group:
            text = judge.OPENING[kind] + policy.decode(completion)
            constraints, reason = judge.parse_constraints(text, judge.KINDS[kind])
            proposals.append((None if reason else Question(seed, kind, tuple(constraints)), reason))
    with policy.using("evaluator"):
        parsed = [i for i, (question, _) in enumerate(proposals) if question]
        for i, reason in zip(parsed, judge.filter_questions(policy, [proposals[i][0] for i in parsed], cfg)):
            proposals[i] = (proposals[i][0], reason)
    return prompts, groups, proposals


def difficulty(run: Run, role: str | None, questions: list[Question], n: int, temperature: float, clock: Clock):
    """`role` answers each question n times and judges the answers: per question (mean r or None, an answer, verdicts).

    Cut-off and empty answers are left out, not counted as failures: nothing can be said of them.
    """
    policy, cfg = run.policy, run.cfg
    with policy.using(role):
        with clock("rollout"):
            prompts = [judge.follower_prompt(policy, q.instruction, cfg.think) for q in questions]
            groups = policy.generate(prompts, n, cfg.max_new_tokens, temperature)
        with clock("judging"):
            pairs, owner = [], []
            for i, (question, group) in enumerate(zip(questions, groups)):
                for completion in group:
                    answer = judge.extract_answer(policy.decode(completion), cfg.think)
                    if answer and policy.ended(completion):
                        pairs.append((question, answer))
                        owner.append(i)
            verdicts = judge.judge(policy, pairs, cfg)
    out = []
    for i in range(len(questions)):
        mine = [k for k, o in enumerate(owner) if o == i]
        rs = [r for k in mine if (r := judge.satisfaction(verdicts[k])) is not None]
        first = mine[0] if mine else None
        answer, verdict = (pairs[first][1], verdicts[first]) if mine else ("", [])
        out.append((sum(rs) / len(rs) if rs else None, answer, verdict))
    return out


def instructor_step(run: Run, turn: int, step: int) -> dict:
    """GRPO on proposals; reward 0 for an invalid one, else 1 - r of the evaluator's own answer."""
    cfg, draw, clock = run.cfg, run.draw(turn, "instructor", step), Clock()
    order = random.Random(f"{cfg.seed}/{turn}").sample(run.seeds, len(run.seeds))
    seeds = [order[(step * cfg.batch + i) % len(order)] for i in range(cfg.batch)]
    kinds = ["hard" if draw.random() < cfg.hard_share else "soft" for _ in seeds]
    with clock("rollout"):
        prompts, groups, proposals = propose(run, seeds, kinds, cfg.group, draw, cfg.instructor_temperature)
    valid = [i for i, (_, reason) in enumerate(proposals) if not reason]
    results = difficulty(run, "evaluator", [proposals[i][0] for i in valid], cfg.answers, cfg.temperature, clock)
    common = judge.type_statistics([proposals[i][0] for i in valid])
    rewards: list[float | None] = [0.0] * len(proposals)
    for i, (r, _, verdicts) in zip(valid, results):
        if r is None and verdicts:  # answered, and every verdict missing: nothing is known of this proposal
            rewards[i] = None
            continue
        types = [judge.constraint_type(c) for c in proposals[i][0].constraints]
        share = types.count(common["top_type"]) / len(types)
        rewards[i] = (judge.instructor_reward(r, cfg.reward) or 0.0) - cfg.type_penalty * common["top_share"] * share
    completions = [c for group in groups for c in group]
    episodes = [Episode(prompts[i // cfg.group], c, i // cfg.group, rewards[i]) for i, c in enumerate(completions)]
    with clock("update"):
        own = dataclasses.replace(cfg, temperature=cfg.instructor_temperature)
        metrics = rl.grpo_step(run.policy, "instructor", "reference", episodes, run.optimizers["instructor"], own)
    for i, (_, answer, verdicts) in list(zip(valid, results))[:2]:
        run.log("samples.jsonl", sample_row(turn, "instructor", step, proposals[i][0], answer, verdicts, rewards[i]))
    known = [r for r, _, _ in results if r is not None]
    return step_metrics(run, episodes, clock, metrics) | {
        "valid": len(valid) / len(proposals),
        "parsed": sum(q is not None for q, _ in proposals) / len(proposals),
        "evaluator_r": sum(known) / len(known) if known else None,
        "rejected": dict(Counter(reason for _, reason in proposals if reason)),
        **common,
    }


# ---------------------------------------------------------------- the questions q_T


def write_questions(run: Run, turn: int, step: int = 0) -> dict:
    """The trained Instructor writes one question per seed; the Filter has its say; a few retries for the rejected."""
    cfg, draw, clock = run.cfg, run.draw(turn, "questions", 0), Clock()
    wanted = min(cfg.questions or len(run.seeds), len(run.seeds))
    waiting = [(s, "hard" if draw.random() < cfg.hard_share else "soft") for s in draw.sample(run.seeds, wanted)]
    accepted, reasons, tried = [], Counter(), 0
    with clock("rollout"):
        for _ in range(cfg.retries):
            if not waiting:
                break
            seeds, kinds = zip(*waiting)
            _, _, proposals = propose(run, list(seeds), list(kinds), 1, draw, cfg.question_temperature)
            accepted += [question for question, reason in proposals if not reason]
            reasons.update(reason for _, reason in proposals if reason)
            tried += len(waiting)
            waiting = [pair for pair, (_, reason) in zip(waiting, proposals) if reason]
    folder = run.folder / f"turn{turn}"
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "questions.jsonl", [dataclasses.asdict(q) for q in accepted])
    return {
        "questions": len(accepted),
        "acceptance": len(accepted) / tried,
        "rejected": dict(reasons),
        "seconds": dict(clock),
        **judge.type_statistics(accepted),
    }


# ---------------------------------------------------------------- stage 2: the Follower


def follower_step(run: Run, turn: int, step: int) -> dict:
    """GRPO on answers; the reward is the mean verdict over the constraints."""
    cfg, policy, clock = run.cfg, run.policy, Clock()
    run.draw(turn, "follower", step)
    questions = run.questions(turn)
    # Epoch after epoch, each in an order of its own; a step may straddle two.
    places = range(step * cfg.batch, (step + 1) * cfg.batch)
    epochs = {p // len(questions): None for p in places}
    orders = {e: random.Random(f"{cfg.seed}/{turn}/{e}").sample(questions, len(questions)) for e in epochs}
    batch = [orders[p // len(questions)][p % len(questions)] for p in places]
    prompts = [judge.follower_prompt(policy, q.instruction, cfg.think) for q in batch]
    with clock("rollout"), policy.using("follower"):
        groups = policy.generate(prompts, cfg.group, cfg.max_new_tokens, cfg.temperature)
    completions = [c for group in groups for c in group]
    pairs = [
        (batch[i // cfg.group], judge.extract_answer(policy.decode(c), cfg.think)) for i, c in enumerate(completions)
    ]
    with clock("judging"), policy.using("evaluator"):
        table = judge.judge(policy, pairs, cfg)
    rewards = [judge.follower_reward(q, a, policy.ended(c), v) for (q, a), c, v in zip(pairs, completions, table)]
    episodes = [Episode(prompts[i // cfg.group], c, i // cfg.group, rewards[i]) for i, c in enumerate(completions)]
    with clock("update"):
        metrics = rl.grpo_step(policy, "follower", "evaluator", episodes, run.optimizers["follower"], cfg)
    for i in range(0, min(len(pairs), 2 * cfg.group), cfg.group):
        run.log("samples.jsonl", sample_row(turn, "follower", step, *pairs[i], table[i], rewards[i]))
    return step_metrics(run, episodes, clock, metrics) | {"missing": sum(r is None for r in rewards) / len(rewards)}


def step_metrics(run: Run, episodes: list[Episode], clock: Clock, metrics: dict) -> dict:
    """What answers "is it training?", the same for both stages."""
    rewards = [e.reward for e in episodes if e.reward is not None]
    mean = sum(rewards) / len(rewards) if rewards else math.nan
    lengths = [len(e.completion) for e in episodes]
    return {
        "reward": mean,
        "reward_std": math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards)) if rewards else math.nan,
        "length": sum(lengths) / len(lengths),
        "truncated": sum(not run.policy.ended(e.completion) for e in episodes) / len(episodes),
        "tokens_per_second": sum(lengths) / clock["rollout"],
        "peak_mib": peak_mib(),
        "seconds": dict(clock),
        **metrics,
    }


def sample_row(turn, stage, step, question: Question, answer: str, verdicts: list, reward) -> dict:
    """One line of samples.jsonl, readable without the code."""
    verdicts = verdicts or [judge.Verdict(None, "nobody")] * len(question.constraints)
    judged = [{"constraint": c, "verdict": v.value, "by": v.by} for c, v in zip(question.constraints, verdicts)]
    row = {"turn": turn, "stage": stage, "step": step, "kind": question.kind, "seed": question.seed}
    return row | {"constraints": judged, "answer": answer, "reward": reward}


# ---------------------------------------------------------------- evaluation


def end_turn(run: Run, turn: int, step: int = 0) -> dict:
    """Save the turn's adapters; measure the Follower on held-out rows and the frozen base model on q_T."""
    cfg, clock = run.cfg, Clock()
    run.draw(turn, "evaluation", 0)
    for role in run.optimizers:
        run.policy.save(role, run.folder / f"turn{turn}" / role)
    base_file = run.folder / "base.json"
    with clock("evaluation"):
        if not base_file.exists():
            base, records = evaluate(run.policy, None, run.heldout, cfg)
            write_jsonl(run.folder / "heldout_base.jsonl", records)
            replace_file(base_file, lambda path: path.write_text(json.dumps(base)))
        follower, records = evaluate(run.policy, "follower", run.heldout, cfg)
        write_jsonl(run.folder / f"turn{turn}" / "heldout.jsonl", records)
        questions = run.questions(turn)[: cfg.eval_rows or None]
        rs = [r for r, _, _ in difficulty(run, None, questions, 1, 0.0, Clock()) if r is not None] if questions else []
    report.write_samples(run.folder)
    spent: Counter[str] = Counter()
    for _, row in read_jsonl(run.folder / "log.jsonl"):
        spent.update(row["seconds"] if row["turn"] == turn else {})
    return {
        "turn_seconds": dict(spent + clock),
        "heldout_base": json.loads(base_file.read_text()),
        "heldout_follower": follower,
        "base_r_on_questions": sum(rs) / len(rs) if rs else None,
        "seconds": dict(clock),
    }


# ---------------------------------------------------------------- the loop

MOST_VOIDED = 5  # steps in a row without a finite gradient: then the run is not coming back by itself
UNITS = {"instructor": instructor_step, "questions": write_questions, "follower": follower_step, "evaluation": end_turn}


def schedule(run: Run) -> Iterator[tuple[int, str, int, int]]:
    """Every unit of the run in order: (turn, stage, step, steps of the stage). Lazy: q_T decides the Follower's steps."""
    cfg = run.cfg
    for turn in range(1, cfg.turns + 1):
        steps = steps_of(cfg.instructor_steps, turn, math.ceil(len(run.seeds) / cfg.batch))
        for step in range(steps):
            yield turn, "instructor", step, steps
        yield turn, "questions", 0, 1
        epoch = math.ceil(len(run.questions(turn)) / cfg.batch)
        steps = steps_of(cfg.follower_steps, turn, epoch * (3 if turn == 1 else 1)) if epoch else 0
        for step in range(steps):
            yield turn, "follower", step, steps
        yield turn, "evaluation", 0, 1


def train(cfg: Config) -> None:
    """The self-evolution loop: do the units that are not done yet, log each, save, print a table row per turn."""
    seeds = read_seeds(cfg.seeds)
    read_ifeval(cfg.heldout)
    lock = open_folder(cfg)
    print_config(cfg)
    policy = load_policy(cfg)
    run = Run(cfg, policy, seeds)
    run.resume()
    print(
        f"{len(run.seeds)} seeds ({run.skipped} too long, skipped), {len(run.heldout)} held-out rows, run folder {cfg.out}"
    )
    if run.done:
        print(f"going on after unit {run.done}; finished turns:\n" + report.turn_table(run.folder))
    with ExitStack() as bars:
        run_units(run, bars)
    lock.close()
    print(f"done: {cfg.out}/turn{cfg.turns}/follower is the trained adapter; try: python seif.py chat {cfg.out}")


def run_units(run: Run, bars: ExitStack) -> None:
    """Every unit that is not done yet; `bars` holds the progress bar, to be closed whatever happens."""
    cfg, turn_now, bar, voided = run.cfg, 0, None, 0
    for unit, (turn, stage, step, steps) in enumerate(schedule(run)):
        if unit < run.done:
            continue
        if turn != turn_now:
            run.begin_turn(turn)
            turn_now = turn
        if step == 0 or bar is None:
            bars.close()
            bar = tqdm(total=steps, initial=step, desc=f"turn {turn} {stage}", dynamic_ncols=True)
            bars.enter_context(bar)
        start = time.perf_counter()
        row = UNITS[stage](run, turn, step)
        voided = voided + 1 if row.get("skipped") and not row["updates"] else 0
        if voided == MOST_VOIDED:
            raise UserError(
                f"{voided} steps in a row had no finite gradient; lower --lr, raise --kl, go on from {cfg.out}"
            )
        row = {"turn": turn, "stage": stage, "step": step, **row, "wall": time.perf_counter() - start}
        run.log("log.jsonl", row)
        bar.set_postfix_str(report.bar_text(row))
        bar.update()
        if step == steps - 1 or (unit + 1) % cfg.save_every == 0:
            run.save(unit + 1)
        if stage == "evaluation":
            bars.close()
            print(report.turn_table(run.folder), flush=True)


def main(argv: list[str]) -> int:
    """Run a command; errors that the user can mend end in one line and status 2."""
    commands = {"eval": command_eval, "chat": command_chat, "plot": report.command_plot}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    try:
        if argv and argv[0] in commands:
            commands[argv[0]](argv[1:])
        else:
            train(read_config(argv, __doc__))
        return 0
    except UserError as error:
        print(f"seif: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"seif: {error}; what was saved is whole, mend it and give the same command to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nseif: stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
