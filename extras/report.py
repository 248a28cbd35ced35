"""report.py: what a run shows of itself while it goes: its log, figures beside the bar, held-out
accuracy, a table with a line a turn, and samples.md.
"""

import json
import math
import statistics
import time
from collections import Counter
from itertools import takewhile
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

import judge
from extras import eval as evaluation
from extras import smollm2
from prompts import messages

# Samples of each turn and stage in samples.md: the last ones.
SAMPLES = 6
# Held-out answers whose sense is measured each turn: three passes over each of them.
SENSE_ROWS = 120


def show(run, done: dict) -> dict:
    """A finished unit -> its line of log.jsonl; the figures that matter go beside the bar."""
    stage = run.unit["stage"]
    kinds = {"instructor": proposals, "follower": answers, "questions": questions}
    kinds |= {"qualification": qualified, "evaluation": turn_end}
    # A stage that a fork adds.
    other = lambda run, done: done.get("metrics", {})
    row = run.unit | kinds.get(stage, other)(run, done) | {"seconds": dict(done["seconds"])}
    path, now = run.folder / "log.jsonl", {"wall": time.time() - run.unit_start}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    log = [json.loads(line) for line in lines if line]
    run.bar.set_postfix_str(f"{minutes_left(run, [*log, row | now])}, {bar_text(row)}")
    if stage in ("instructor", "follower"):
        tell_if_idle(run, done, [*log, row])
    if stage == "evaluation":
        run.bar.write(turn_table([*log, json.loads(messages.json_lines([row | now]))]))
        if run.heldout:
            run.bar.write(learned(run.folder, run.unit["turn"]))
        write_samples(run.folder, log)
    return row


def schedule(run) -> dict[tuple[int, str], int]:
    """(turn, stage) -> steps, of the whole run"""
    turns = range(1, run.cfg.turns + 1)
    steps = {(t, role): run.steps(t, role) for t in turns for role in ("instructor", "follower")}
    ones = ["questions", "evaluation", *["qualification"] * run.cfg.asks_a_model]
    return steps | {(t, stage): 1 for t in turns for stage in ones}


def plan(run) -> str:
    """What the run is about to do, for who waits for it; InputError if it could not compare."""
    same_rows(run)
    cfg, steps = run.cfg, schedule(run)
    lines, begun = [], max((t for t, count in run.written.items() if count), default=1)
    for turn in range(begun, cfg.turns + 1):
        teach, learn = (steps[turn, role] for role in ("instructor", "follower"))
        lines.append(f"  turn {turn}: {teach} Instructor steps, q_T, {learn} Follower steps")
    if run.base:
        rank = min(t.shape[0] for t in run.policy.tensors(run.base).values())
        lines.append(
            f"  base: the adapter {cfg.init_follower}, of rank {rank}, where the Follower starts"
        )
    if cfg.model == smollm2.NAME:
        lines.append("  a small model, to show the loop: short runs mostly end as they began;")
        lines.append("  README names one that learns")
    size = f"{cfg.batch} prompts x {cfg.group} samples a step"
    limits = f"proposals of {cfg.instructor_tokens} tokens, answers of {cfg.max_new_tokens} at most"
    safe = "Ctrl-C is safe: the same command goes on; after the first step the bar says how long"
    return "\n".join([*lines, f"  {size}; {limits}", f"  {safe}"])


def same_rows(run) -> None:
    """The held-out rows are still those that the base model was measured on."""
    path = run.folder / "heldout_base.jsonl"
    if path.exists() and run.heldout:
        measured = [row.get("prompt") for _, row in messages.read_jsonl(path)]
        if measured != [row["prompt"] for row in run.heldout]:
            mend = "put the file that --heldout names back, or give another --out"
            raise messages.InputError(f"{path} measures other rows than those held out now; {mend}")


def minutes_left(run, rows: list[dict]) -> str:
    """Of the whole run, from what its units took so far; a stage not seen yet takes the mean."""
    walls: dict[str, list[float]] = {}
    for row in rows:
        walls.setdefault(row["stage"], []).append(row["wall"])
    usual = statistics.fmean(row["wall"] for row in rows)
    done = Counter((row["turn"], row["stage"]) for row in rows)
    left = {place: max(0, steps - done[place]) for place, steps in schedule(run).items()}
    took = lambda stage: statistics.fmean(walls[stage]) if stage in walls else usual
    seconds = sum(steps * took(stage) for (_, stage), steps in left.items())
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


def proposals(run, done: dict) -> dict:
    """An Instructor's step."""
    samples = [s for group in done["groups"] for s in group]
    valid = [s.question for s in samples if not s.reason]
    return step(run, done) | {
        "valid": len(valid) / len(samples),
        "parsed": sum(s.question is not None for s in samples) / len(samples),
        "frozen_follower_r": mean_r([a for a, _ in done["answers"]]),
        "rejected": dict(Counter(s.reason for s in samples if s.reason)),
        **types(valid),
    }


def answers(run, done: dict) -> dict:
    """A Follower's step."""
    samples = [s for group in done["groups"] for s in group]
    row = step(run, done) | {"missing": sum(s.reward is None for s in samples) / len(samples)}
    return row | {"gated": sum(bool(s.reason) for s in samples) / len(samples)}


def step(run, done: dict) -> dict:
    """What answers "is it training?", the same for both stages."""
    samples = [s for group in done["groups"] for s in group]
    rewards = [s.reward for s in samples if s.reward is not None] or [math.nan]
    others = [a for a, _ in done["answers"]] if run.unit["stage"] == "instructor" else []
    tokens, cuda = sum(len(s.tokens) for s in samples), torch.cuda.is_available()
    held = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "length": tokens / len(samples),
        "truncated": sum(not s.ended for s in samples) / len(samples),
        "tokens_per_second": (tokens + sum(len(a.tokens) for a in others))
        / done["seconds"]["rollout"],
        # The GPU's peak, else what the process holds.
        "memory_mib": held >> 20,
        "samples": [sample(answer, reward) for answer, reward in done["answers"][:2]],
        **done["metrics"],
    }


# Steps in a row without an update that are said aloud; so is a whole stage of fewer.
MOST_IDLE = 3


def tell_if_idle(run, done: dict, rows: list[dict]) -> None:
    """Steps in a row with nothing to learn from: the commonest reason. rows: the log's so far."""
    turn, stage, number = run.unit.values()
    mine = [row for row in rows if (row["turn"], row["stage"]) == (turn, stage)]
    idle = len([*takewhile(lambda row: not row["updates"] + row["skipped"], reversed(mine))])
    whole = idle == run.steps(turn, stage) < MOST_IDLE
    if idle == MOST_IDLE or whole:
        samples = [s for group in done["groups"] for s in group]
        # A valid proposal is paid for the frozen Follower's answer to it.
        paid = [(s, s.reward) for s in samples if stage == "follower" or s.reason]
        paid += done["answers"] if stage == "instructor" else []
        reasons = Counter(why_nothing(run.cfg, stage, *one) for one in paid)
        reason, count = reasons.most_common(1)[0]
        share = f"{count / len(samples):.0%} of the samples: {reason}"
        tqdm.write(f"{stage}: {idle} steps in a row with nothing to learn from; {share}")


def why_nothing(cfg, stage: str, sample, reward: float | None) -> str:
    """What a reward is due to, and what to change; `sample` is an answer or a bad proposal."""
    if sample.reason and stage == "follower":
        return f"{sample.reason}; lower --intent-gate"
    if sample.reason:
        mend = "try more --shots, another --filter, or a larger --model"
        return f"{sample.reason}; {'raise it' if '--' in sample.reason else mend}"
    whose = "the frozen Follower's answer is " if stage == "instructor" else ""
    if not sample.ended:
        return f"{whose}cut at the limit; raise --max-new-tokens"
    if not sample.answer:
        mend = "not in the form; try --no-think" if cfg.think else "empty; try another --model"
        return whose + mend
    if reward is None:
        mend = "try --filter rules, --hard-share 1 or --trust-judger"
        return f"no verdict, no rule decides and the Judger cannot; {mend}"
    return f"a reward of {reward:.2f} like the others; raise --group or the temperature"


def qualified(run, done: dict) -> dict:
    """What the Judger's and the Filter's verdicts are worth, and what follows."""
    follows = (
        "believed",
        "soft constraints would be noise and are not drawn; --trust-judger draws",
    )
    if run.trusts_judger:
        follows = ("believed", "believed all the same, as was asked")
    say("Judger", run.judger, *follows)
    if run.cfg.filter == "llm":
        say("Filter", run.filter, "believed", "not believed")
    if run.filter_mode != run.cfg.filter:
        tqdm.write(f"proposals are filtered by {run.filter_mode} alone")
    return {"judger": done["judger"], "filter": done["filter"]}


def say(name: str, ranking: judge.Ranking, yes: str, no: str) -> None:
    """One line on a role that gives verdicts."""
    figures = f"AUC {ranking.auc:.2f} ({ranking.low:.2f} to {ranking.high:.2f})"
    if math.isnan(ranking.auc):
        figures = "too few right ones, or wrong ones, to tell,"
    then = f"{yes} from P(yes) {ranking.threshold:.2f} on" if ranking.believed else no
    tqdm.write(f"{name}: {figures} on {ranking.cases} verdicts that rules know; {then}")


def questions(run, done: dict) -> dict:
    """q_T: how many were accepted, why the others were not."""
    accepted, rejected = done["questions"], done["rejected"]
    share = len(accepted) / (len(accepted) + rejected.total())
    row = {"questions": len(accepted), "acceptance": share, "rejected": dict(rejected)}
    return row | types(accepted)


def turn_end(run, done: dict) -> dict:
    """The difficulty of q_T, and the accuracy on held-out rows."""
    place, base_file = run.folder / f"turn{run.unit['turn']}", run.folder / "base.json"
    if not base_file.exists():
        least = evaluation.on_topic_from(run.policy, run.heldout, run.cfg)
        base = measure(run, run.base, run.folder / "heldout_base.jsonl", least) | {"least": least}
        messages.replace_file(base_file, messages.json_lines([base]).encode())
    base = json.loads(base_file.read_text())
    follower = measure(run, "follower", place / "heldout.jsonl", base.get("least"))
    row = {"heldout_base": base, "heldout_follower": follower}
    return row | {"base_r_on_questions": mean_r(done["answers"])}


def measure(run, role: str | None, path: Path, least: float | None) -> dict:
    """A policy's figures on the held-out rows, its answers in `path`, and on the trip wires."""
    given = run.policy, role, run.heldout, run.cfg, least
    result, records = evaluation.evaluate(*given, most=SENSE_ROWS)
    evaluation.write_rows(path, records)
    if least is None:
        return result
    # Constraints that are easily had by whoever ignores the question.
    traps = evaluation.read_rows(messages.PROMPTS / "tripwires.jsonl")
    _, records = evaluation.evaluate(run.policy, role, traps, run.cfg, least)
    return result | {"tripped": evaluation.tripped(records, least)}


def mean_r(samples: list) -> float | None:
    """The mean r of the answers that ended and have a verdict; None if there are none."""
    done = [judge.satisfaction(s.verdicts) for s in samples if s.answer and s.ended]
    known = [r for r in done if r is not None]
    return statistics.fmean(known) if known else None


def constraint_type(constraint: str) -> str:
    """The rule's id without its group, or "open": "Use no commas." -> "no_comma"."""
    rule = judge.recognise(constraint)
    return rule[0].split(":")[1] if rule else "open"


def types(questions: list) -> dict[str, float | str]:
    """Entropy in bits of the constraint types, and the commonest: how a collapse shows."""
    kinds = [constraint_type(c) for q in questions for c in q.constraints]
    shares = {t: kinds.count(t) / len(kinds) for t in set(kinds)}
    top = max(shares, key=lambda t: (shares[t], t), default="")
    entropy = -sum(p * math.log2(p) for p in shares.values()) + 0.0
    return {"type_entropy": entropy, "top_type": top, "top_share": shares.get(top, 0.0)}


def sample(answer, reward: float | None) -> dict:
    """An answer for people: each constraint with its verdict and who gave it."""
    constraints = answer.question.constraints
    verdicts = answer.verdicts or [judge.Verdict(None, "nobody")] * len(constraints)
    judged = [(c, v.value, v.by) for c, v in zip(constraints, verdicts)]
    about = {"seed": answer.question.seed, "answer": answer.answer, "reward": reward}
    return about | {"constraints": judged}


def bar_text(row: dict) -> str:
    """The figures that matter."""
    if "reward" in row:
        text = f"reward {row['reward']:.3f}, len {row['length']:.0f}, cut {row['truncated']:.0%}"
        text += f", tied {row['tied']:.0%}, {row['tokens_per_second']:.0f} tok/s"
        if "grad_norm" not in row:
            return f"{text}, no update"
        return f"{text}, kl {figure(row.get('kl'), '.4f')}, grad {row['grad_norm']:.2f}"
    if "judger" in row:
        judger, filter = (row[role]["auc"] for role in ("judger", "filter"))
        return f"AUC of the Judger {judger:.2f}, of the Filter {filter:.2f}"
    if "acceptance" in row:
        return f"{row['questions']} accepted, {row['acceptance']:.0%} of attempts"
    if "heldout_follower" in row:
        return f"held-out {row['heldout_follower']['instruction_strict']:.1%}"
    return row["stage"]


def learned(folder: Path, turn: int) -> str:
    """Whether the Follower beats the base model on the held-out rows, said either way."""
    base, mine = (folder / name for name in ("heldout_base.jsonl", f"turn{turn}/heldout.jsonl"))
    tables = [[row for _, row in messages.read_jsonl(path)] for path in (base, mine)]
    seen = evaluation.compare(*tables)
    sure = seen["p"] < 0.05
    says = "better" if seen["low"] > 0 and sure else "cannot be told apart"
    says = "worse" if seen["high"] < 0 and sure else says
    points = "{:+.1f} points ({:+.1f} to {:+.1f})".format(
        *(100 * seen[key] for key in ("difference", "low", "high"))
    )
    decided = sum(any(v is not None for v in row["strict"]) for row in tables[0])
    told = f"{points}, p {seen['p']:.4f}, on {decided} held-out rows that can be decided"
    return f"turn {turn}: Follower against base {told}: {says}"


def sense_of(figures: dict) -> str:
    """log p a token, the share about their question, the share of trip wires stepped on."""
    forms = {"fluency": ".2f", "about": ".0%", "tripped": ".0%"}
    return " ".join(f"{figure(figures.get(key), form):>5}" for key, form in forms.items())


def figure(value: float | None, form: str) -> str:
    """A cell of the table; the log has null for what is no number."""
    return "-" if value is None else format(value, form)


def turn_table(rows: list[dict]) -> str:
    """One line a turn, and one for the base model, from the lines of log.jsonl."""
    head = "turn  instr. reward  valid  accepted  q_T  base r  AUC  follower reward     kl"
    lines = [head + "  held-out  log p about  trap  minutes"]
    # Without those logged while extras/ was not there.
    ends = [row for row in rows if "heldout_follower" in row]
    for last in ends[:1]:
        base = last["heldout_base"]
        held_out = figure(base["instruction_strict"], ".1%")
        lines.append(f"{'base':<78}  {held_out:>8}  {sense_of(base)}")
    for last in ends:
        mine = [row for row in rows if row["turn"] == last["turn"]]
        made = next(row for row in mine if row["stage"] == "questions")
        teach, learn = ([r for r in mine if r["stage"] == s] for s in ("instructor", "follower"))
        paid = lambda steps, i: figure(steps[i]["reward"], ".2f")
        span = lambda steps, paid=paid: " -> ".join(paid(steps, i) for i in (0, -1) if steps)
        valid = f"{sum(r['valid'] for r in teach) / len(teach):.0%}" if teach else "-"
        auc = figure(next((r["judger"]["auc"] for r in mine if "judger" in r), None), ".2f")
        kl = figure([None, *(r["kl"] for r in learn if "kl" in r)][-1], ".3f")
        after, r = last["heldout_follower"], figure(last["base_r_on_questions"], ".2f")
        minutes = sum(r["wall"] for r in mine) / 60
        line = f"{last['turn']:4}  {span(teach) or '-':>13}  {valid:>5}  {made['acceptance']:>8.0%}"
        line += f"  {made['questions']:>3}  {r:>6} {auc:>4}  {span(learn) or '-':>15}  {kl:>5}"
        line += f"  {figure(after['instruction_strict'], '.1%'):>8}  {sense_of(after)}"
        lines.append(f"{line}  {minutes:>7.1f}")
    return "\n".join(lines)


def write_samples(folder: Path, rows: list[dict]) -> None:
    """samples.md: the latest samples of each turn and stage, to be read by people."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["turn"], row["stage"]), []).extend(row.get("samples", []))
    lines = ["# Samples", "", "Verdicts: + satisfied, - not, ? missing; who gave them in brackets."]
    for (turn, stage), samples in groups.items():
        lines += ["", f"## Turn {turn}, {stage}"] if samples else []
        for sample in samples[-SAMPLES:]:
            reward = "none" if sample["reward"] is None else f"{sample['reward']:.2f}"
            lines += ["", f"**{sample['seed']}** (reward {reward})", ""]
            for constraint, value, by in sample["constraints"]:
                lines.append(f"- `{ {None: '?', 0.0: '-', 1.0: '+'}[value] }` {constraint} ({by})")
            lines += ["", *(f"    {line}" for line in sample["answer"].split("\n"))]
    (folder / "samples.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
