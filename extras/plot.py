"""plot.py: `python seif.py plot RUN`, a run in one picture, drawn from its log and questions."""

import argparse
from collections import Counter
from pathlib import Path

from extras.report import constraint_type
from prompts import messages

COLOURS = {"instructor": "tab:orange", "follower": "tab:blue"}


def main(argv: list[str], *_) -> None:
    """`plot RUN`: rewards, KL, accuracy and constraint types in one PNG."""
    parser = argparse.ArgumentParser("seif.py plot", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", help="PNG to write; default: RUN/plot.png")
    args = parser.parse_args(argv)
    if args.out and Path(args.out).suffix != ".png":
        raise messages.InputError(f"--out {args.out}: must end in .png")
    draw(args.run, args.out or f"{args.run}/plot.png")


def draw(run: str, out: str) -> None:
    """Reward by step, KL by step, difficulty and accuracy by turn, constraint types by turn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise messages.InputError("plot needs matplotlib: pip install matplotlib") from error
    rows = [row for _, row in messages.read_jsonl(Path(run) / "log.jsonl")]
    ends = [row for row in rows if "heldout_follower" in row]
    if not ends:
        raise messages.InputError(f"{run}/log.jsonl: no finished turn to plot yet")
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), constrained_layout=True)
    (reward, kl), (turns, types) = axes
    _by_step(reward, rows, "reward", "mean reward")
    _by_step(kl, rows, "kl", "KL to the stage's start, per token")
    _by_turn(turns, ends)
    _types(types, Path(run), [row["turn"] for row in ends])
    figure.savefig(out, dpi=110)
    print(f"written: {out}")


def _by_step(axis, rows: list[dict], key: str, title: str) -> None:
    """A line per stage and turn: a turn's KL starts anew."""
    for stage, colour in COLOURS.items():
        for turn in sorted({row["turn"] for row in rows}):
            steps = [(x, row[key]) for x, row in enumerate(rows) if key in row]
            steps = [
                (x, y) for x, y in steps if (rows[x]["stage"], rows[x]["turn"]) == (stage, turn)
            ]
            label = stage if turn == 1 else None
            x, y = [x for x, _ in steps], [y for _, y in steps]
            axis.plot(x, y, "o-", color=colour, ms=3, label=label)
    for x, row in enumerate(rows):
        if row["stage"] == "evaluation":
            axis.axvline(x, color="grey", lw=0.5)
    axis.set(title=title, xlabel="unit of the run")
    axis.legend()


def _by_turn(axis, ends: list[dict]) -> None:
    x = [0, *(row["turn"] for row in ends)]
    rates = [ends[0]["heldout_base"], *(row["heldout_follower"] for row in ends)]
    label = "held-out, Follower (turn 0: base)"
    axis.plot(x, [rate["instruction_strict"] for rate in rates], "o-", label=label)
    known = [row for row in ends if row["base_r_on_questions"] is not None]
    r = [row["base_r_on_questions"] for row in known]
    label = "base model's r on q_T"
    axis.plot([row["turn"] for row in known], r, "s--", color="tab:red", label=label)
    about = [rate.get("about") for rate in rates]
    if None not in about:
        axis.plot(x, about, "^:", color="tab:green", label="answers about their question")
        other = axis.twinx()
        other.plot(x, [rate["fluency"] for rate in rates], "v:", color="grey")
        other.set_ylabel("base model's log p of the answers, a token (grey)")
    axis.set(title="accuracy, difficulty, sense", xlabel="turn", ylim=(0, 1), xticks=x)
    axis.legend()


def _types(axis, run: Path, turns: list[int]) -> None:
    """Shares of the ten commonest constraint types in each q_T."""
    counts = {}
    for turn in turns:
        questions = messages.read_questions(run / f"turn{turn}" / "questions.jsonl")
        counts[turn] = Counter(constraint_type(c) for q in questions for c in q.constraints)
    bottom = [0.0] * len(turns)
    for name, _ in sum(counts.values(), Counter()).most_common(10):
        share = [counts[t][name] / max(1, counts[t].total()) for t in turns]
        axis.bar(turns, share, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, share)]
    title = "constraint types in q_T, the ten commonest"
    axis.set(title=title, xlabel="turn", xticks=turns, xlim=(0.4, len(turns) + 2.2))
    axis.legend(fontsize=7, loc="right")
