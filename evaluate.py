"""evaluate.py: how well a policy follows instructions, and whether one does better than another.

Rows are in IFEval's format (Zhou et al. 2023); verdicts are rules.py's. Answers are greedy.
"""

import math

import numpy as np

import judge
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
