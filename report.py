"""report.py: what a run shows of itself: the progress bar's figures, the table, samples.md, and one picture.

All of it is read from log.jsonl, samples.jsonl and questions.jsonl, so a finished run can be drawn again.
"""

import argparse
from collections import Counter
from pathlib import Path

import judge
from data import UserError, read_jsonl, replace_file

COLOURS = {"instructor": "tab:orange", "follower": "tab:blue"}


# ---------------------------------------------------------------- in text


def bar_text(row: dict) -> str:
    """The figures that matter, for the progress bar."""
    if "reward" in row:
        text = (
            f"reward {row['reward']:.3f}, len {row['length']:.0f}, cut {row['truncated']:.0%}, tied {row['tied']:.0%}"
        )
        text += f", {row['tokens_per_second']:.0f} tok/s"
        return text + (f", kl {row['kl']:.4f}, grad {row['grad_norm']:.2f}" if "kl" in row else ", no update")
    if "acceptance" in row:
        return f"{row['questions']} accepted, {row['acceptance']:.0%} of attempts"
    return f"held-out {row['heldout_follower']['instruction_strict']:.1%}"


def turn_table(folder: Path) -> str:
    """One line a turn, from log.jsonl."""
    rows = [row for _, row in read_jsonl(folder / "log.jsonl")]
    head = (
        "turn  instr. reward  valid  accepted  q_T  base r  follower reward    kl  held-out base -> follower  minutes"
    )
    lines = [head]
    for last in (row for row in rows if row["stage"] == "evaluation"):
        mine = [row for row in rows if row["turn"] == last["turn"]]
        made = next(row for row in mine if row["stage"] == "questions")
        teach, learn = ([r for r in mine if r["stage"] == stage] for stage in ("instructor", "follower"))
        span = [f"{s[0]['reward']:.2f} -> {s[-1]['reward']:.2f}" if s else "-" for s in (teach, learn)]
        valid = f"{sum(r['valid'] for r in teach) / len(teach):.0%}" if teach else "-"
        base_r, kl = last["base_r_on_questions"], [r["kl"] for r in learn if "kl" in r]
        before, after = (last[k]["instruction_strict"] for k in ("heldout_base", "heldout_follower"))
        lines.append(
            f"{last['turn']:4}  {span[0]:>13}  {valid:>5}  {made['acceptance']:>8.0%}  {made['questions']:>3}  "
            f"{'-' if base_r is None else format(base_r, '.2f'):>6}  {span[1]:>15}  {kl[-1] if kl else 0:.3f}  "
            f"{before:>13.1%} -> {after:<10.1%}  {sum(r['wall'] for r in mine) / 60:>6.1f}"
        )
    return "\n".join(lines)


def write_samples(folder: Path, per_stage: int = 6) -> None:
    """samples.md: the latest samples of each turn and stage, to be read by people."""
    groups: dict[tuple, list] = {}
    for _, row in read_jsonl(folder / "samples.jsonl"):
        groups.setdefault((row["turn"], row["stage"]), []).append(row)
    lines = ["# Samples", "", "Verdicts: + satisfied, - not, ? missing; who gave them in brackets."]
    for (turn, stage), rows in groups.items():
        lines += ["", f"## Turn {turn}, {stage}"]
        for row in rows[-per_stage:]:
            reward = "none" if row["reward"] is None else f"{row['reward']:.2f}"
            lines += ["", f"**{row['seed']}** (step {row['step']}, {row['kind']}, reward {reward})", ""]
            for judged in row["constraints"]:
                mark = "?" if judged["verdict"] is None else "+" if judged["verdict"] >= 0.5 else "-"
                lines.append(f"- `{mark}` {judged['constraint']} ({judged['by']})")
            lines += [""] + [f"    {line}" for line in (row["answer"] or "(no answer)").split("\n")]
    replace_file(folder / "samples.md", lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))


# ---------------------------------------------------------------- the picture


def draw(run: str, out: str) -> None:
    """Four panels: reward by step, KL by step, difficulty and accuracy by turn, constraint types by turn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UserError("plot needs matplotlib: pip install matplotlib") from error
    rows = [row for _, row in read_jsonl(Path(run) / "log.jsonl")]
    ends = [row for row in rows if row["stage"] == "evaluation"]
    if not ends:
        raise UserError(f"{run}/log.jsonl: no finished turn to plot yet")
    figure, ((reward, kl), (turns, types)) = plt.subplots(2, 2, figsize=(12, 7), constrained_layout=True)
    for stage, colour in COLOURS.items():
        for turn in {row["turn"] for row in rows}:  # a line per turn: its adapter's KL starts anew
            steps = [(x, row) for x, row in enumerate(rows) if row["stage"] == stage and row["turn"] == turn]
            style = {"color": colour, "ms": 3, "label": stage if turn == 1 else None}
            reward.plot([x for x, _ in steps], [row["reward"] for _, row in steps], "o-", **style)
            moved = [(x, row["kl"]) for x, row in steps if "kl" in row]
            kl.plot([x for x, _ in moved], [value for _, value in moved], "o-", **style)
    for axis, title in ((reward, "mean reward"), (kl, "KL to the stage's start, per token")):
        for x, row in enumerate(rows):
            if row["stage"] == "evaluation":
                axis.axvline(x, color="grey", lw=0.5)  # the end of a turn
        axis.set(title=title, xlabel="unit of the run")
        axis.legend()
    x = [row["turn"] for row in ends]
    after = [row["heldout_follower"]["instruction_strict"] for row in ends]
    turns.plot(
        [0, *x],
        [ends[0]["heldout_base"]["instruction_strict"], *after],
        "o-",
        label="held-out, Follower (turn 0: base)",
    )
    known = [(row["turn"], row["base_r_on_questions"]) for row in ends if row["base_r_on_questions"] is not None]
    turns.plot([t for t, _ in known], [r for _, r in known], "s--", color="tab:red", label="base model's r on q_T")
    turns.set(title="accuracy and difficulty", xlabel="turn", ylim=(0, 1), xticks=[0, *x])
    turns.legend()
    counts = {t: type_counts(Path(run) / f"turn{t}" / "questions.jsonl") for t in x}
    bottom = [0.0] * len(x)
    for name, _ in sum(counts.values(), Counter()).most_common(10):
        share = [counts[t][name] / max(1, counts[t].total()) for t in x]
        types.bar(x, share, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, share)]
    types.set(title="constraint types in q_T, the ten commonest", xlabel="turn", xticks=x, xlim=(0.4, len(x) + 2.2))
    types.legend(fontsize=7, loc="right")
    figure.savefig(out, dpi=110)
    print(f"written: {out}")


def type_counts(path: Path) -> Counter:
    """Constraint type -> how often in one q_T."""
    return Counter(judge.constraint_type(c) for _, row in read_jsonl(path) for c in row["constraints"])


def command_plot(argv: list[str]) -> None:
    """`plot RUN`."""
    parser = argparse.ArgumentParser(
        "seif.py plot", description="Draw a run's rewards, KL, accuracy and constraint types."
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", help="PNG to write; default: RUN/plot.png")
    args = parser.parse_args(argv)
    draw(args.run, args.out or f"{args.run}/plot.png")
