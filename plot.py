"""plot.py: one picture of a run, from its log.jsonl and questions.jsonl. Called as `python seif.py plot RUN`."""

import argparse
from collections import Counter
from pathlib import Path

import judge
from rl import UserError

COLOURS = {"instructor": "tab:orange", "follower": "tab:blue"}


def draw(run: str, out: str) -> None:
    """Four panels: reward by step, KL by step, difficulty and accuracy by turn, constraint types by turn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UserError("plot needs matplotlib: pip install matplotlib") from error
    rows = [row for _, row in judge.read_jsonl(Path(run) / "log.jsonl")]
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
    return Counter(judge.constraint_type(c) for _, row in judge.read_jsonl(path) for c in row["constraints"])


def command(argv: list[str]) -> None:
    """`plot RUN`."""
    parser = argparse.ArgumentParser(
        "seif.py plot", description="Draw a run's rewards, KL, accuracy and constraint types."
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", help="PNG to write; default: RUN/plot.png")
    args = parser.parse_args(argv)
    draw(args.run, args.out or f"{args.run}/plot.png")
