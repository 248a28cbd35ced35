"""evaluate.py: how well a policy follows instructions, whether one does better than another; and talking to one.

Rows are in IFEval's format (Zhou et al. 2023); verdicts are rules.py's. Answers are greedy.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

import judge
from config import Config, load_policy
from data import UserError, read_ifeval, read_text, refuse_pickles, write_jsonl
from rl import Policy
from rules import check, check_loose


def evaluate(policy: Policy, role: str | None, rows: list[dict], cfg, on_done=None) -> tuple[dict, list[dict]]:
    """Greedy answers to IFEval rows: strict and loose accuracy by prompt and by instruction, and a record per row."""
    prompts = [judge.follower_prompt(policy, row["prompt"], cfg.think) for row in rows]
    with policy.using(role):
        groups = policy.generate(prompts, 1, cfg.max_new_tokens, 0.0, on_done)
    texts = [policy.decode(group[0]) for group in groups]
    # An answer out of format is judged as it stands, so that a base model is not failed for its wrapping.
    answers = [judge.extract_answer(text, cfg.think) or text for text in texts]
    lengths = [len(group[0]) for group in groups]
    records = [{"prompt": r["prompt"], "response": a, "tokens": n} for r, a, n in zip(rows, answers, lengths)]
    result = {
        "rows": len(rows),
        "truncated": sum(not policy.ended(g[0]) for g in groups) / len(rows),
        "length": sum(lengths) / len(rows),
    }
    for name, rule in (("strict", check), ("loose", check_loose)):
        for row, record in zip(rows, records):
            asked = zip(row["instruction_id_list"], row["kwargs"])
            record[name] = [rule(i, k, record["response"]) for i, k in asked]  # None: cannot be told
        table = [[v for v in record[name] if v is not None] for record in records]
        flat = [v for verdicts in table for v in verdicts]
        result[f"prompt_{name}"] = sum(map(all, table)) / len(table)
        result[f"instruction_{name}"] = sum(flat) / len(flat) if flat else math.nan
    return result, records


def _counts(records: list[dict], level: str) -> np.ndarray:
    """(rows, 2): instructions followed and instructions decided, per row."""
    known = [[v for v in record[level] if v is not None] for record in records]
    return np.array([(sum(v), len(v)) for v in known], dtype=np.float64).reshape(-1, 2)


def _resample(table: np.ndarray, draws: int) -> np.ndarray:
    """(draws, columns): column sums over rows drawn with replacement. Rows, for a prompt's instructions are not independent."""
    weights = np.random.default_rng(0).multinomial(len(table), [1 / len(table)] * len(table), draws)
    return weights @ table


def interval(records: list[dict], level: str = "strict", draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy by instruction, prompts resampled."""
    followed, decided = _resample(_counts(records, level), draws).T
    low, high = np.quantile(followed / np.maximum(decided, 1), (0.025, 0.975))
    return float(low), float(high)


def compare(base: list[dict], other: list[dict], level: str = "strict", draws: int = 10_000) -> dict[str, float]:
    """`other` against `base` on the same rows: difference in accuracy by instruction, its 95 % bootstrap interval, and
    the two-sided p of a paired permutation test that swaps the two sides of a prompt."""
    a, b = _counts(base, level), _counts(other, level)
    rates = np.concatenate([a, b], 1)
    sums = _resample(rates, draws)
    low, high = np.quantile(
        sums[:, 2] / np.maximum(sums[:, 3], 1) - sums[:, 0] / np.maximum(sums[:, 1], 1), (0.025, 0.975)
    )
    gain = b[:, 0] - a[:, 0]
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (draws, len(gain)))
    p = (1 + (np.abs(signs @ gain) >= abs(gain.sum()) - 1e-9).sum()) / (1 + draws)
    difference = b[:, 0].sum() / max(1, b[:, 1].sum()) - a[:, 0].sum() / max(1, a[:, 1].sum())
    return {"difference": float(difference), "low": float(low), "high": float(high), "p": float(p)}


# ---------------------------------------------------------------- commands


def open_run(folder: str, turn: int = 0) -> tuple[Config, Policy, int]:
    """A finished or unfinished run for eval and chat: its settings, the policy with `follower`, and which turn."""
    path = Path(folder) / "config.json"
    refuse_pickles(folder)
    try:
        cfg = Config(**json.loads(read_text(path)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a run's settings ({error}); give a folder that python seif.py has written"
        ) from error
    done = sorted(int(p.parent.name[4:]) for p in Path(folder).glob("turn*/follower") if p.parent.name[4:].isdigit())
    if not done or turn and turn not in done:
        raise UserError(
            f"{folder}: no adapter of turn {turn or 1} in it yet; let python seif.py --out {folder} finish it"
        )
    policy = load_policy(cfg)
    turn = turn or done[-1]
    policy.load_adapter("follower", Path(folder) / f"turn{turn}" / "follower")
    return cfg, policy, turn


def command_eval(argv: list[str]) -> None:
    """`eval RUN`: greedy answers to IFEval rows and their accuracy."""
    parser = argparse.ArgumentParser(
        "seif.py eval", description="Evaluate a run's Follower on data in IFEval's format."
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--data", help="JSONL with prompt, instruction_id_list, kwargs; default: the run's held-out rows"
    )
    parser.add_argument("--base", action="store_true", help="evaluate the base model instead")
    parser.add_argument("--paired", action="store_true", help="evaluate both, and test the difference")
    parser.add_argument("--turn", type=int, default=0, help="the Follower of this turn; default: the last")
    parser.add_argument("--rows", type=int, default=0, help="only the first so many rows")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="an answer's limit; default: the run's")
    parser.add_argument("--out", help='write {"prompt", "response"} lines, as the official IFEval script takes them')
    args = parser.parse_args(argv)
    cfg, policy, turn = open_run(args.run, args.turn)
    cfg.max_new_tokens = args.max_new_tokens or cfg.max_new_tokens
    rows = read_ifeval(args.data or cfg.heldout)[: args.rows or None]
    roles = (None, "follower") if args.paired else (None,) if args.base else ("follower",)
    tables = []
    for role in roles:
        with tqdm(total=len(rows), desc="answers") as bar:
            result, records = evaluate(policy, role, rows, cfg, bar.update)
        tables.append(records)
        name = f"Follower of turn {turn}" if role else "base model"
        print(
            f"{name}, {result['rows']} prompts, {result['truncated']:.0%} cut at {cfg.max_new_tokens} tokens, "
            f"{result['length']:.0f} tokens long"
        )
        for level in ("prompt", "instruction"):
            print(f"  {level:11}  strict {result[f'{level}_strict']:6.1%}   loose {result[f'{level}_loose']:6.1%}")
        print("  {:11}  strict {:.1%} to {:.1%} (95 %)".format("interval", *interval(records)))
    if args.paired:
        print(
            "  difference   strict {difference:+.1%}, {low:+.1%} to {high:+.1%} (95 %), p = {p:.4f}".format(
                **compare(*tables)
            )
        )
    if args.out:
        write_jsonl(args.out, [{"prompt": r["prompt"], "response": r["response"]} for r in tables[-1]])


def command_chat(argv: list[str]) -> None:
    """`chat RUN`: a conversation with the Follower; an empty line or Ctrl-D ends it."""
    parser = argparse.ArgumentParser("seif.py chat", description="Talk to a run's Follower. An empty line ends it.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--base", action="store_true", help="talk to the base model instead")
    parser.add_argument("--turn", type=int, default=0, help="the Follower of this turn; default: the last")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    args = parser.parse_args(argv)
    cfg, policy, turn = open_run(args.run, args.turn)
    policy.use(None if args.base else "follower")
    print(f"{'base model' if args.base else f'Follower of turn {turn}'}; an empty line ends the conversation")
    messages = [{"role": "system", "content": judge.prompt_text("think")}] if cfg.think else []
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        completion = policy.generate([policy.encode(messages)], 1, args.max_new_tokens, args.temperature)[0][0]
        text = policy.decode(completion).strip()
        messages.append({"role": "assistant", "content": text})
        print(judge.extract_answer(text, cfg.think) or text)
