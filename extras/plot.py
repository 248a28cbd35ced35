"""plot.py: `python seif.py plot RUN`, a run in one picture: reward, KL, accuracy, categories."""

import argparse
from collections import Counter
from pathlib import Path

from extras import data, verifiers
from judge import parsed_constraints

COLOURS = {"instructor": "tab:orange", "follower": "tab:blue"}


def main(argv: list[str], open_run) -> None:
    """Draw the log and the questions of a run as a PNG."""
    parser = argparse.ArgumentParser("seif.py plot", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", help="PNG to write; default: RUN/plot.png")
    args = parser.parse_args(argv)
    out = args.out or f"{args.run}/plot.png"
    if not out.endswith(".png"):
        raise data.InputError(f"--out {out}: must end in .png")
    rows = [row for _, row in data.read_jsonl(f"{args.run}/log.jsonl")]
    ends = [row for row in rows if row["stage"] == "evaluation"]
    if not ends:
        raise data.InputError(f"{args.run}/log.jsonl: no finished turn to plot; let one finish")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise data.InputError("plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(12, 7), layout="constrained")
    (reward, kl), (turns, categories) = figure.subplots(2, 2)
    plot_steps(reward, rows, "reward", "mean reward")
    plot_steps(kl, rows, "kl", "KL to the reference policy, per token")
    plot_turns(turns, ends)
    plot_categories(categories, Path(args.run), [row["turn"] for row in ends])
    figure.savefig(out, dpi=110)
    print(f"written: {out}")


def plot_steps(axis, rows: list[dict], key: str, title: str) -> None:
    """A line per stage and turn."""
    for stage, turn in sorted({(r["stage"], r["turn"]) for r in rows if r["stage"] in COLOURS}):
        steps = [i for i, r in enumerate(rows) if (r["stage"], r["turn"]) == (stage, turn)]
        values, label = [rows[i].get(key) for i in steps], stage if turn == 1 else None
        axis.plot(steps, values, "o-", color=COLOURS[stage], ms=3, label=label)
    axis.set(title=title, xlabel="step of the run")
    axis.legend()


def plot_turns(axis, ends: list[dict]) -> None:
    """Held-out accuracy, relevance, difficulty of q_T. Log p has an axis of its own."""
    x = [0, *(row["turn"] for row in ends)]
    figures = [ends[0]["heldout_base"], *(row["heldout_follower"] for row in ends)]
    axis.plot(x, [f["instruction_strict"] for f in figures], "o-", label="held-out accuracy")
    axis.plot(x, [f["relevance"] for f in figures], "^:", label="relevant held-out answers")
    axis.plot(x[1:], [r["base_r_on_questions"] for r in ends], "s--", label="base model's r on q_T")
    axis.set(title="figures by turn; grey: log p per token", xlabel="turn (0: base model)")
    axis.set(ylim=(0, 1), xticks=x)
    axis.legend()
    axis.twinx().plot(x, [f["logp"] for f in figures], "v:", color="grey")


def plot_categories(axis, run: Path, turns: list[int]) -> None:
    """Shares of the ten most frequent constraint categories in each q_T."""
    counts, bottom = [], [0.0] * len(turns)
    for turn in turns:
        questions = data.read_questions(run / f"turn{turn}" / "questions.jsonl")
        parsed = [p for q in questions for p in parsed_constraints(q)]
        counts.append(Counter(verifiers.category(p[0]) if p else "open" for p in parsed))
    for name, _ in sum(counts, Counter()).most_common(10):
        shares = [count[name] / count.total() if count else 0.0 for count in counts]
        axis.bar(turns, shares, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, shares)]
    axis.set(title="constraint categories in q_T", xlabel="turn", xticks=turns)
    axis.legend(fontsize=7, bbox_to_anchor=(1, 1))
