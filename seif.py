"""seif.py: self-evolving reinforcement learning for instruction following (arXiv 2605.07465).

    python seif.py                 train; the same command resumes an interrupted run
    python seif.py eval RUN        accuracy of the trained Follower on held-out or IFEval rows
    python seif.py chat RUN        talk to it; --base for the base model
    python seif.py plot RUN        a picture of the run
    python seif.py merge RUN       base and Follower as one Hugging Face folder
    python seif.py --help          every setting

A turn is one round of self-evolution (section 3 of the paper). The Instructor learns to write
constraints that the current Follower fails (reward 1 - r) and writes the questions q_T. The
Follower learns to satisfy them (reward r). Filter and Judger are verifiers in code and, if wanted,
the Follower as it was at the start of the turn, or a server. The roles are LoRA adapters on one
quantised model. Read train() first, then judge.py (verdicts, rewards) and rl.py (sampling, GRPO).
"""

import functools
import inspect
import logging
import math
import random
import re
import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import asdict, dataclass, fields
from itertools import cycle
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from extras import chat, evaluate, merge, plot, smollm2
from extras.data import InputError
from extras.log import LOGGERS
from extras.peft_adapters import save_adapter
from extras.run import Run
from judge import admit_question, follower_rewards, instructor_rewards, uses_model
from prompts import (
    Question,
    example_proposals,
    few_shot_examples,
    follower_messages,
    instructor_prompts,
)
from rl import ADVANTAGES, DTYPES, Policy, Sample, load

# The libraries' progress bars and notes would drown ours. Their errors are exceptions.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# The roles that are trained. Each has an adapter, a frozen reference ref_<role> and an optimizer.
TRAINED_ROLES = ["instructor", "follower"]
# q_T: attempts per seed question, their temperature (the paper's), prompts per draw of examples.
MAX_ATTEMPTS, QUESTION_TEMPERATURE, QUESTIONS_PER_DRAW = 3, 0.7, 4
# Verdicts that calibrate the judge, at most.
CALIBRATION_CASES = 128


# ------------------------------------------------------------ settings
@dataclass
class Config:
    """Every field is a flag, max_new_tokens is --max-new-tokens, and its comment is the help."""

    out: str = "runs/seif"  # run folder
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # Hugging Face id or folder of a chat model
    bits: int = 4  # 4: nf4 with double quantisation; 16: none
    dtype: str = "auto"  # compute type: fp32, bf16, fp16; auto: the fastest here
    engine: str = "packed"  # packed, or plain: the slow reference in rl.py
    seed_questions: str = ""  # file: JSON lines, text, CSV, parquet; empty: prompts/seeds.jsonl
    heldout: str = ""  # file in IFEval's format, evaluated each turn; empty: prompts/heldout.jsonl
    seed: int = 0  # random seed
    init_follower: str = ""  # LoRA adapter folder that the Follower starts from
    turns: int = 3  # rounds of self-evolution
    prompts_per_step: int = 16  # prompts per training step
    group_size: int = 8  # samples per prompt
    instructor_steps: str = "4,2"  # steps in turn 1, 2, ...; the last repeats; empty: one epoch
    follower_steps: str = "30,12"  # the same; empty: 3 epochs in turn 1, then 1
    questions_per_turn: int = 128  # seed questions used for q_T, so its largest size; 0: all
    hard_fraction: float = 1.0  # share of verifiable questions; the rest needs the LLM judge
    think: bool = False  # require <think>..</think><answer>..</answer>
    filter: str = "rules"  # rules; llm: fewer rules, then the model; off; see Judge.accept
    min_words: int = 60  # the Filter rejects instructions that allow fewer words
    judge: str = "hybrid"  # verifiers, then a reliable model; trusted: any model; llm: model only
    judge_url: str = ""  # OpenAI-compatible judge, http://localhost:8080/v1; key: SEIF_JUDGE_KEY
    judge_model: str = ""  # name of the model on that server
    penalties: str = "length,repetition"  # on the Follower's reward, see judge.py; empty: none
    temperature: float = 0.8  # Follower sampling temperature
    instructor_temperature: float = 0.7  # Instructor sampling temperature
    advantage: str = "grpo"  # grpo, rloo, dr_grpo; equations in rl.py
    lr: float = 1e-4  # AdamW learning rate; LoRA needs more than the paper's 1e-6
    kl_coef: float = 0.1  # weight of the KL to the reference policy
    kl_reference: str = "base"  # the Follower's: base or --init-follower; or turn, its start
    num_minibatches: int = 1  # optimizer steps per rollout
    lora_rank: int = 16  # LoRA rank; alpha is twice as much
    max_new_tokens: int = 256  # token limit of an answer; cut-off answers get reward 0
    max_proposal_tokens: int = 160  # token limit of a proposal
    max_prompt_tokens: int = 1024  # of an instruction; seed questions over 3/4 of it are skipped
    eval_rows: int = 0  # held-out rows and questions evaluated per turn; 0: all
    logger: str = "none"  # none, wandb, trackio; beside log.jsonl


# Presets are command lines. Of a repeated flag the last one counts: CPU, --paper, --quick, yours.
# CPU: without a GPU and without --model, the embedded 135M model.
CPU = f"""
    --model {smollm2.NAME} --turns 1 --prompts-per-step 8 --instructor-steps 2,1
    --follower-steps 16,8 --questions-per-turn 48 --min-words 20 --temperature 0.7
    --instructor-temperature 0.5 --lr 1e-3 --kl-coef 0.05 --max-new-tokens 96
    --max-proposal-tokens 96"""
# --quick: the whole loop in minutes, with any model.
QUICK = """
    --turns 2 --prompts-per-step 4 --instructor-steps 2,1 --follower-steps 3,2
    --questions-per-turn 16 --eval-rows 40"""
# --paper: the paper's roles, rewards, GRPO settings and epochs. The learning rate is LoRA's.
PAPER = """
    --group-size 5 --instructor-steps= --follower-steps= --questions-per-turn 0
    --hard-fraction 0.5 --think --filter llm --min-words 0 --judge llm --penalties=
    --temperature 1 --instructor-temperature 1 --lr 2e-5 --kl-coef 0.01 --kl-reference turn
    --num-minibatches 4 --max-new-tokens 1024 --max-proposal-tokens 512"""
CHOICES = {"bits": (4, 16), "dtype": ("auto", *DTYPES), "engine": ("packed", "plain")}
CHOICES |= {"filter": ("rules", "llm", "off"), "judge": ("hybrid", "trusted", "llm")}
CHOICES |= {"penalties": ("length,repetition", "length", "repetition", "")}
CHOICES |= {"kl_reference": ("base", "turn"), "advantage": tuple(ADVANTAGES), "logger": LOGGERS}
# Smallest values of numbers where that is not 0.
POSITIVE = "turns prompts_per_step num_minibatches lora_rank max_new_tokens max_proposal_tokens"
MINIMUM = dict.fromkeys(POSITIVE.split(), 1) | {"group_size": 2, "max_prompt_tokens": 1}
MINIMUM |= {"temperature": 0.01, "instructor_temperature": 0.01}


def read_config(argv: list[str]) -> Config:
    """The settings that a command line asks for."""
    parser = ArgumentParser(
        "seif.py",
        usage="python seif.py [eval | chat | plot | merge] [--SETTING VALUE ...]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    help_texts = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        text = f"{help_texts[field.name]} [{field.default!r}]".replace("%", "%%")
        how = {"action": BooleanOptionalAction} if field.type is bool else {"type": field.type}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, help=text, **how)
    parser.add_argument("--paper", action="store_true", help=f"the paper's settings: {PAPER}")
    parser.add_argument("--quick", action="store_true", help=f"a schedule of minutes: {QUICK}")
    given = [word.partition("=")[0] for word in argv]
    presets = [] if torch.cuda.is_available() or "--model" in given else CPU.split()
    presets += PAPER.split() if "--paper" in given else []
    presets += QUICK.split() if "--quick" in given else []
    values = vars(parser.parse_args(presets + argv))
    return Config(**{field.name: values[field.name] for field in fields(Config)})


def validate(cfg: Config) -> None:
    """InputError for the first setting that is out of range."""
    for name, value in asdict(cfg).items():
        low, high = MINIMUM.get(name, 0), 1 if name == "hard_fraction" else math.inf
        if value not in CHOICES.get(name, (value,)):
            limit = f"one of {', '.join(str(choice) or repr(choice) for choice in CHOICES[name])}"
        elif isinstance(value, (int, float)) and not low <= value <= high:
            limit = f"between {low} and {high}"
        elif name.endswith("_steps") and value and not re.fullmatch(r"\d+(,\d+)*", value):
            limit = "whole numbers, such as 4,2"
        else:
            continue
        raise InputError(f"--{name.replace('_', '-')} {value}: must be {limit}")
    if (cfg.judge == "trusted" or cfg.judge_url) and not uses_model(cfg):
        raise InputError("--judge trusted, --judge-url: no model is used; add --hard-fraction 0.5")
    if bool(cfg.judge_url) != bool(cfg.judge_model):
        raise InputError("--judge-url and --judge-model: give both")


def load_policy(cfg: Config) -> Policy:
    """The base model without adapters."""
    path = smollm2.model_path(cfg.model)
    rank, alpha = cfg.lora_rank, 2 * cfg.lora_rank
    return load(path, cfg.bits, rank=rank, alpha=alpha, engine=cfg.engine, dtype=cfg.dtype)


def open_run(cfg: Config) -> Run:
    """A new run, or the one in the folder --out. InputError if a setting is out of range."""
    validate(cfg)
    return Run(cfg, TRAINED_ROLES, load_policy)


# ------------------------------------------------------------ the loop
def train(cfg: Config) -> None:
    """Self-evolution. Finished steps are skipped, so the same call resumes a run."""
    with open_run(cfg) as run:
        cfg, policy, judge = run.cfg, run.policy, run.judge
        for turn in range(run.turn, cfg.turns + 1):
            # ref_instructor, ref_follower: frozen copies, unless a turn is resumed.
            run.start_turn()
            if run.remaining("calibration", int(uses_model(cfg))):
                calibrate(run, run.seed_rngs())

            for step in run.remaining("instructor", run.num_steps("instructor", turn)):
                rng = run.seed_rngs()
                instructor_step(run, run.batch("instructor", run.seed_questions, step), rng)

            if run.remaining("questions", 1):
                questions, rejected, from_examples = write_questions(run, run.seed_rngs())
                run.save_questions(questions)
                run.finish_step("questions", run.log.questions(questions, rejected, from_examples))
            questions = run.read_questions()

            for step in run.remaining("follower", run.num_steps("follower", turn, len(questions))):
                run.seed_rngs()
                follower_step(run, run.batch("follower", questions, step))

            if run.remaining("evaluation", 1):
                run.seed_rngs()
                for role in TRAINED_ROLES:
                    save_adapter(policy, role, run.folder / f"turn{turn}" / role)
                asked = questions[: cfg.eval_rows or None]
                base_answers = answer(run, run.baseline, asked, 1, greedy=True)
                judge.score(base_answers)
                figures = evaluate.evaluate_turn(run)
                run.finish_step("evaluation", run.log.evaluation(figures, base_answers))
            run.finish_turn()
        print(f"done: {run.folder}/turn{cfg.turns}/follower; try: python seif.py chat {run.folder}")


def instructor_step(run: Run, seed_questions: list[str], rng: random.Random) -> None:
    """Stage 1. Reward 1 - r, r by the snapshot Follower's own answer; 0 for rejected proposals."""
    cfg, judge, temperature = run.cfg, run.judge, run.cfg.instructor_temperature
    proposals = propose(run, seed_questions, cfg.group_size, temperature, rng, len(seed_questions))
    accepted = judge.accept(proposals)
    answers = answer(run, "ref_follower", [s.question for s in accepted], 1)
    judge.score(answers)
    instructor_rewards(proposals, answers)
    metrics = run.update("instructor", proposals, temperature)
    run.finish_step("instructor", run.log.instructor(proposals, answers, metrics))


def follower_step(run: Run, batch: list[Question]) -> None:
    """Stage 2. Reward r, the share of satisfied constraints, less what the penalties take."""
    answers = answer(run, "follower", batch, run.cfg.group_size)
    run.judge.score(answers)
    follower_rewards(answers, run.cfg.penalties)
    metrics = run.update("follower", answers, run.cfg.temperature)
    run.finish_step("follower", run.log.follower(answers, metrics))


def calibrate(run: Run, rng: random.Random) -> None:
    """Test the snapshot Follower as Judger and Filter, on its answers to verifiable questions."""
    examples = few_shot_examples("hard")
    seeds = rng.choices(run.seed_questions, k=CALIBRATION_CASES // 2)
    asked = [Question(q, "hard", rng.choice(examples).constraints) for q in seeds]
    answers = answer(run, "ref_follower", asked, 1)
    run.judge.calibrate(answers, examples, CALIBRATION_CASES)
    run.finish_step("calibration", run.log.calibration(run.judge))


def propose(run: Run, seed_questions, n: int, temperature, rng, per_draw) -> list[Sample]:
    """n proposals of the Instructor per seed question. per_draw: how many share their examples."""
    cfg = run.cfg
    # Soft constraints need a judge that can tell.
    hard = cfg.hard_fraction if run.judge.trusts_model else 1.0
    kinds = ["hard" if rng.random() < hard else "soft" for _ in seed_questions]
    prompts = instructor_prompts(seed_questions, kinds, per_draw, rng)
    with run.policy.using("instructor"):
        groups = run.policy.sample(prompts, n, cfg.max_proposal_tokens, temperature)
    for seed_question, kind, group in zip(seed_questions, kinds, groups):
        for sample in group:
            sample.question = Question(seed_question, kind, ())
    return sum(groups, [])


def answer(run: Run, role: str | None, questions, n: int, greedy=False) -> list[Sample]:
    """n answers of `role` per question. None is the base model."""
    cfg = run.cfg
    prompts = [follower_messages(q.instruction, cfg.think) for q in questions]
    temperature = 0.0 if greedy else cfg.temperature
    with run.policy.using(role):
        groups = run.policy.sample(prompts, n, cfg.max_new_tokens, temperature)
    for question, group in zip(questions, groups):
        for sample in group:
            sample.question = question
    return sum(groups, [])


def write_questions(run: Run, rng: random.Random) -> tuple[list[Question], Counter, int]:
    """q_T: the Instructor writes one question per seed question, with a few attempts each.

    Where the Filter is rules, each seed question left takes the constraints of a few-shot example,
    if they are accepted. Returns (questions, the Instructor's rejections, how many from examples).
    """
    cfg, questions, rejected, categories = run.cfg, [], Counter(), Counter()
    rules = run.judge.filter_mode == "rules"
    count = min(cfg.questions_per_turn or len(run.seed_questions), len(run.seed_questions))
    pending = rng.sample(run.seed_questions, count)

    def keep_accepted(proposals: list[Sample]) -> list[str]:
        """Adds the accepted proposals to `questions`. Returns the seed questions of the others."""
        for s in run.judge.accept(proposals):
            size = max(len(questions) + 1, count // 2)
            s.rejected = admit_question(s.question, categories, size) if rules else ""
            if not s.rejected:
                questions.append(s.question)
        return [s.question.seed_question for s in proposals if s.rejected]

    temperature = min(QUESTION_TEMPERATURE, cfg.instructor_temperature)
    for _ in range(MAX_ATTEMPTS):
        proposals = propose(run, pending, 1, temperature, rng, QUESTIONS_PER_DRAW)
        pending = keep_accepted(proposals)
        rejected.update(s.rejected for s in proposals if s.rejected)
    written = len(questions)
    if rules:
        texts = cycle(example_proposals(rng))
        keep_accepted([Sample([], [], next(texts), True, Question(q, "hard", ())) for q in pending])
    # Shuffled, so that the first rows are not those accepted at the first attempt.
    rng.shuffle(questions)
    return questions, rejected, len(questions) - written


# ------------------------------------------------------------ command line
COMMANDS = {"eval": evaluate.main, "chat": chat.main, "plot": plot.main, "merge": merge.main}


def main(argv: list[str]) -> int:
    """Run a command. User errors end in one line and exit status 2."""
    command = COMMANDS.get(argv[0]) if argv else None
    resumes = "" if command else "; the same command resumes the run"
    try:
        if not command:
            train(read_config(argv))
        elif len(argv) > 1:
            command(argv[1:], functools.partial(evaluate.open_run, Config, load_policy))
        else:
            runs = [str(path.parent) for path in sorted(Path("runs").glob("*/config.json"))]
            raise InputError(f"{argv[0]} needs a run folder; runs: {', '.join(runs) or 'none'}")
        return 0
    except InputError as error:
        print(f"seif: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"seif: {error}{resumes}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nseif: stopped{resumes}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
