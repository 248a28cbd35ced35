"""log.py: what a run shows of itself: log.jsonl, a line per step, warnings, a table per turn.

Every step appends one JSON row to log.jsonl. The table and samples.md are made from these rows.
"""

import importlib
import json
import math
import statistics
from collections import Counter

import psutil
import torch
from tqdm import tqdm

from extras import data, evaluate, smollm2
from extras.verifiers import category, repeats_itself
from judge import Verdict, is_echo, parsed_constraints, satisfaction, uses_model

LOGGERS = ("none", "wandb", "trackio")
# samples.md keeps the last ones of each turn and stage.
MAX_SAMPLES = 6
# So many steps in a row without an update print the reason.
MAX_IDLE_STEPS = 3
# Thresholds of the warnings.
MAX_CUT, MAX_ZERO_STD, MAX_KL, MIN_LENGTH_RATIO, MAX_CATEGORY = 0.3, 0.8, 0.5, 0.5, 1 / 3
# Columns of the table: figure of evaluate.py, format.
HELDOUT = {
    "accuracy": ("instruction_strict", ".1%"),
    "reward": ("reward", ".1%"),
    "log_p": ("logp", ".2f"),
    "relevant": ("relevance", ".0%"),
    "words": ("words", ".0f"),
    "short": ("short", ".0%"),
    "repeated": ("repeated", ".0%"),
}
# Outcome of a sample -> the setting to change.
FIXES = {
    "answer cut off": "raise --max-new-tokens",
    "answer empty": "try --no-think or another --model",
    "answer repeats itself": "try --penalties length or another --model",
    "no verdict": "try --filter rules, --hard-fraction 1 or --judge trusted",
    "rewarded": "equal rewards; raise --group-size or the temperature",
}


def outcome(sample) -> str:
    """Why a sample has no reward of its own, "rewarded" if it has one."""
    if sample.rejected:
        return sample.rejected
    if not sample.ended:
        return "answer cut off"
    if not sample.answer:
        return "answer empty"
    if is_echo(sample.question, sample.answer):
        return "answer echoes the instruction"
    if sample.reward == 0 and repeats_itself(sample.answer):
        return "answer repeats itself"
    return "no verdict" if satisfaction(sample.verdicts) is None else "rewarded"


def mean_r(samples: list) -> float | None:
    """Mean r of the answers that have a verdict, None if none has."""
    known = [r for r in (satisfaction(s.verdicts) for s in samples) if r is not None]
    return statistics.fmean(known) if known else None


def categories(questions: list) -> dict:
    """Entropy in bits of the constraint categories, and the most frequent one."""
    parsed = [p for q in questions for p in parsed_constraints(q)]
    counts = Counter(category(p[0]) if p else "open" for p in parsed)
    shares = {name: n / counts.total() for name, n in counts.items()}
    top = max(shares, key=lambda name: (shares[name], name), default="")
    entropy = -sum(p * math.log2(p) for p in shares.values()) + 0.0
    return {"category_entropy": entropy, "top_category": top, "top_share": shares.get(top, 0.0)}


def example(sample, reward: float | None) -> dict:
    """An answer with its verdicts, for samples.md."""
    verdicts = sample.verdicts or [Verdict(None, "none")] * len(sample.question.constraints)
    rows = [(c, v.value, v.source) for c, v in zip(sample.question.constraints, verdicts)]
    seed_question = sample.question.seed_question
    answer = {"seed_question": seed_question, "answer": sample.answer, "reward": reward}
    return {**answer, "constraints": rows}


class Log:
    """Builds and writes the rows of a run. Owns the progress bar and the external logger."""

    def __init__(self, run):
        self.path = run.folder / "log.jsonl"
        self.rows = [row for _, row in data.read_jsonl(self.path)]
        self.folder, self.cfg = run.folder, run.cfg
        self.warned: set[str] = set()
        self.external_log, self.external_close = external_logger(run.cfg)
        total = 0
        for turn in range(run.turn, run.cfg.turns + 1):
            questions = run.num_questions if turn == run.turn else None
            steps = run.num_steps("instructor", turn), run.num_steps("follower", turn, questions)
            print("  turn {}: {} Instructor steps, q_T, {} Follower steps".format(turn, *steps))
            total += sum(steps) + 2 + uses_model(run.cfg)
        if run.cfg.model == smollm2.NAME:
            print("  the embedded 135M model is for a first look; README names larger ones")
        self.bar = tqdm(total=total, initial=run.done.total(), unit="step", dynamic_ncols=True)

    # -------------------------------------------- rows
    def instructor(self, proposals: list, answers: list, metrics: dict) -> dict:
        """Row of an Instructor step. answers: the snapshot's, to the accepted proposals."""
        rejected = [s for s in proposals if s.rejected]
        accepted = [s for s in proposals if not s.rejected]
        return {
            **step_row(proposals, metrics, Counter(map(outcome, answers + rejected))),
            "valid": len(accepted) / len(proposals),
            "snapshot_r": mean_r(answers),
            "rejected": dict(Counter(s.rejected for s in rejected)),
            **categories([s.question for s in accepted]),
            "samples": [example(a, p.reward) for a, p in zip(answers[:2], accepted)],
        }

    def follower(self, answers: list, metrics: dict) -> dict:
        """Row of a Follower step."""
        missing = sum(s.reward is None for s in answers) / len(answers)
        row = step_row(answers, metrics, Counter(map(outcome, answers)))
        examples = [example(s, s.reward) for s in answers[:: self.cfg.group_size][:2]]
        return {**row, "missing": missing, "samples": examples}

    def questions(self, questions: list, rejected: Counter, from_examples: int) -> dict:
        """Row of q_T."""
        accepted = len(questions) - from_examples
        return {
            "questions": len(questions),
            "from_examples": from_examples,
            "acceptance": accepted / max(1, accepted + rejected.total()),
            "rejected": dict(rejected),
            **categories(questions),
        }

    def calibration(self, judge) -> dict:
        """Row of the judge's calibration. Prints what follows from it."""
        for name, result in (("Judger", judge.judger), ("Filter", judge.filter)):
            auc = f"AUC {result.auc:.2f} ({result.low:.2f} to {result.high:.2f})"
            auc = "too few cases for an AUC" if math.isnan(result.auc) else auc
            verdict = "reliable" if result.reliable else "not reliable"
            self.bar.write(f"{name}: {auc} on {result.cases} cases with known truth; {verdict}")
        if not judge.trusts_model:
            self.bar.write("the model does not judge; --judge trusted uses it all the same")
        if judge.filter_mode != self.cfg.filter:
            self.bar.write(f"the filter is {judge.filter_mode}")
        return {"judger": vars(judge.judger), "filter": vars(judge.filter)}

    def evaluation(self, figures: dict, base_answers: list) -> dict:
        """Row of the end of a turn. base_answers: the baseline's, to this turn's questions."""
        return {**figures, "base_r_on_questions": mean_r(base_answers)}

    # -------------------------------------------- output
    def write(self, row: dict) -> None:
        """Append a row, print its line and warnings; after an evaluation the table."""
        line = data.to_jsonl([row])
        data.append_text(self.path, line)
        self.rows.append(json.loads(line))
        self.bar.update()
        self.bar.write(step_line(row))
        for name, text in warnings(self.rows).items():
            if name not in self.warned:
                self.warned.add(name)
                self.bar.write(f"warning: {text} (in a new --out)")
        self.external_log(numbers(row, row["stage"]), len(self.rows))
        if row["stage"] == "evaluation":
            self.bar.write(turn_table(self.rows))
            self.bar.write(evaluate.turn_comparison(self.folder, row["turn"]))
            self.bar.write(evaluate.best_turn(evaluations(self.rows)))
            write_samples(self.folder / "samples.md", self.rows)

    def close(self) -> None:
        """End the progress bar and the external logger."""
        self.bar.close()
        self.external_close()


def external_logger(cfg) -> tuple:
    """(log(numbers, step), close()) of --logger. InputError if it is not installed."""
    if cfg.logger == "none":
        return lambda row, step: None, lambda: None
    try:
        module = importlib.import_module(cfg.logger)
    except ImportError as error:
        fix = f"pip install {cfg.logger}"
        raise data.InputError(f"--logger {cfg.logger}: not installed ({error}); {fix}") from error
    run = module.init(project="seif", name=cfg.out, config=vars(cfg))
    return lambda row, step: run.log(row, step=step), run.finish


def numbers(row: dict, prefix: str) -> dict[str, float]:
    """The numbers of a row under flat names, such as evaluation/heldout_base/reward."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= numbers(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}/{key}"] = value
    return flat


def evaluations(rows: list[dict]) -> list[dict]:
    """The last row of each finished turn."""
    return [row for row in rows if row["stage"] == "evaluation"]


def step_row(samples: list, metrics: dict, outcomes: Counter) -> dict:
    """The fields of both training stages."""
    rewards = [s.reward for s in samples if s.reward is not None]
    if torch.cuda.is_available():
        # The GPU's peak, else what the process holds now.
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = psutil.Process().memory_info().rss
    return {
        "reward": statistics.fmean(rewards) if rewards else math.nan,
        "reward_std": statistics.pstdev(rewards) if rewards else math.nan,
        "length": sum(len(s.tokens) for s in samples) / len(samples),
        "cut": sum(not s.ended for s in samples) / len(samples),
        "outcomes": dict(outcomes),
        "memory_mib": memory >> 20,
        **metrics,
    }


def number(value: float | None, form: str) -> str:
    """A formatted figure, "-" for None."""
    return "-" if value is None or value != value else format(value, form)


def step_line(row: dict) -> str:
    """One line for a step, the important figures first."""
    text = f"turn {row['turn']} {row['stage']} {row['step'] + 1}"
    if "length" in row:
        text += f": reward {number(row['reward'], '.3f')}, kl {number(row.get('kl'), '.4f')}"
        text += f", grad {number(row.get('grad_norm'), '.2f')}, length {row['length']:.0f}"
        text += f", cut {row['cut']:.0%}, zero-variance {row['frac_reward_zero_std']:.0%}"
        if "valid" in row:
            text += f", valid {row['valid']:.0%}, snapshot r {number(row['snapshot_r'], '.2f')}"
    if "acceptance" in row:
        text += f": {row['questions']} questions, {row['from_examples']} of them from examples"
        text += f", {row['acceptance']:.0%} of attempts accepted"
        text += f", most in one category {row['top_share']:.0%}"
    if "heldout_follower" in row:
        text += f": held-out {number(row['heldout_follower']['instruction_strict'], '.1%')}"
    return f"{text}, {row['seconds']:.0f} s"


def warnings(rows: list[dict]) -> dict[str, str]:
    """What the last row and its stage show to be going wrong: name -> text, with the fix."""
    row = rows[-1]
    found = {}
    if row["stage"] == "questions" and row["top_share"] > MAX_CATEGORY:
        share = f"{row['top_share']:.0%} of q_T's constraints are {row['top_category']}"
        found["category"] = f"{share}; raise --instructor-temperature"
    # The stage that goes on, or has ended with this row.
    name = {"questions": "instructor", "evaluation": "follower"}.get(row["stage"], row["stage"])
    steps = [r for r in rows if (r["turn"], r["stage"]) == (row["turn"], name) and "length" in r]
    idle = 0
    while idle < len(steps) and not steps[-1 - idle]["updates"] + steps[-1 - idle]["skipped"]:
        idle += 1
    ended = row["stage"] != name
    if idle >= MAX_IDLE_STEPS or (ended and idle and idle == len(steps)):
        outcomes = steps[-1]["outcomes"]
        reason = max(outcomes, key=outcomes.get)
        share = f"{outcomes[reason] / sum(outcomes.values()):.0%} of the samples: {reason}"
        fix = FIXES.get(reason, "change --filter, or use a larger --model")
        found[f"idle {row['turn']}"] = f"{idle} steps without an update; {share}; {fix}"
    if "length" in row:
        found |= step_warnings(row, steps)
    return {f"{key} {name}": f"{name}: {text}" for key, text in found.items()}


def step_warnings(row: dict, steps: list[dict]) -> dict[str, str]:
    """warnings() of one step. steps: those of its stage and turn so far."""
    found = {}
    limit = "--max-new-tokens" if row["stage"] == "follower" else "--max-proposal-tokens"
    equal, kl = row["frac_reward_zero_std"], row.get("kl") or 0
    if row["cut"] > MAX_CUT:
        found["cut"] = f"{row['cut']:.0%} of the samples are cut off; raise {limit}"
    if kl > MAX_KL:
        found["kl"] = f"KL {kl:.2f} per token; lower --lr or raise --kl-coef"
    if row["length"] < MIN_LENGTH_RATIO * steps[0]["length"]:
        found["length"] = "samples are less than half as long as in the first step"
    if equal > MAX_ZERO_STD and len(steps) > 1:
        found["equal"] = f"{equal:.0%} of the groups have equal rewards; raise --group-size"
    return found


def turn_table(rows: list[dict]) -> str:
    """One line per turn, and one for the base model."""
    ends = evaluations(rows)
    head = "instructor valid q_T base_r follower kl".split()
    lines = [["turn", *head, *HELDOUT, "minutes"]]
    lines += [["base", *[""] * len(head), *heldout_cells(ends[0]["heldout_base"]), ""]]
    for end in ends:
        mine = [row for row in rows if row["turn"] == end["turn"]]
        instructor = [row for row in mine if row["stage"] == "instructor"]
        follower = [row for row in mine if row["stage"] == "follower"]
        valid = statistics.fmean(r["valid"] for r in instructor) if instructor else None
        kl = next((row["kl"] for row in reversed(follower) if "kl" in row), None)
        cells = [str(end["turn"]), first_and_last(instructor), number(valid, ".0%")]
        cells += [str(row["questions"]) for row in mine if row["stage"] == "questions"]
        cells += [number(end["base_r_on_questions"], ".2f"), first_and_last(follower)]
        cells += [number(kl, ".3f"), *heldout_cells(end["heldout_follower"])]
        lines.append([*cells, f"{sum(row['seconds'] for row in mine) / 60:.1f}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def first_and_last(rows: list[dict]) -> str:
    """The rewards of the first and the last step."""
    ends = [number(rows[i]["reward"], ".2f") for i in (0, -1) if rows]
    return " -> ".join(ends) or "-"


def heldout_cells(figures: dict) -> list[str]:
    """The columns of HELDOUT."""
    return [number(figures.get(name), form) for name, form in HELDOUT.values()]


def write_samples(path, rows: list[dict]) -> None:
    """samples.md: the latest samples of each turn and stage."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["turn"], row["stage"]), []).extend(row.get("samples", []))
    lines = ["# Samples", "", "Verdicts: + satisfied, - not, ? none; the source in brackets."]
    for (turn, stage), samples in groups.items():
        lines += ["", f"## Turn {turn}, {stage}"] if samples else []
        for sample in samples[-MAX_SAMPLES:]:
            reward = number(sample["reward"], ".2f")
            lines += ["", f"**{sample['seed_question']}** (reward {reward})", ""]
            for constraint, value, source in sample["constraints"]:
                mark = {None: "?", 0.0: "-", 1.0: "+"}[value]
                lines.append(f"- `{mark}` {constraint} ({source})")
            lines += ["", *(f"    {line}" for line in sample["answer"].split("\n"))]
    data.write_atomic(path, ("\n".join(lines) + "\n").encode())
