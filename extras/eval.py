"""eval.py: `python seif.py eval RUN`, accuracy on rows in IFEval's format, and whether one policy
does better than another on the same rows.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

import judge
from prompts import messages

# Rows answered between two moves of the progress bar.
CHUNK = 64


def _counts(records: list[dict], level: str) -> np.ndarray:
    """(rows, 2): instructions followed and instructions decided, per row"""
    known = [[v for v in record[level] if v is not None] for record in records]
    return np.array([(sum(v), len(v)) for v in known], dtype=np.float64).reshape(-1, 2)


def _resample(table: np.ndarray, draws: int) -> np.ndarray:
    """(draws, columns): sums over rows drawn with replacement.

    Rows, since the instructions of one prompt are not independent.
    """
    even = [1 / len(table)] * len(table)
    return np.random.default_rng(0).multinomial(len(table), even, draws) @ table


def _rate(followed, decided):
    return followed / np.maximum(decided, 1)


def interval(records: list[dict], level: str = "strict", draws: int = 10_000) -> tuple:
    """95 % bootstrap interval of the accuracy by instruction."""
    low, high = np.quantile(_rate(*_resample(_counts(records, level), draws).T), (0.025, 0.975))
    return float(low), float(high)


def compare(base: list[dict], other: list[dict], level="strict", draws: int = 10_000) -> dict:
    """`other` against `base` on the same rows.

    Difference of the accuracies by instruction, its 95 % bootstrap interval, and the two-sided p
    of a paired permutation test that swaps the two sides of a prompt.
    """
    a, b = _counts(base, level), _counts(other, level)
    sums = _resample(np.concatenate([a, b], 1), draws).T
    low, high = np.quantile(_rate(*sums[2:]) - _rate(*sums[:2]), (0.025, 0.975))
    gain = b[:, 0] - a[:, 0]
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (draws, len(gain)))
    p = (1 + (np.abs(signs @ gain) >= abs(gain.sum()) - 1e-9).sum()) / (1 + draws)
    difference = _rate(*b.sum(0)) - _rate(*a.sum(0))
    return dict(difference=float(difference), low=float(low), high=float(high), p=float(p))


def read_rows(path: str) -> list[dict]:
    """Rows {"prompt", "instruction_id_list", "kwargs"}, in IFEval's form; errors name the line."""
    rows = []
    for number, row in messages.read_jsonl(path):
        place = f"{path}, line {number}"
        ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(row.get("prompt"), str) or not isinstance(ids, list):
            raise messages.InputError(f"{place}: needs prompt, instruction_id_list and kwargs")
        if not isinstance(kwargs, list) or len(ids) != len(kwargs):
            raise messages.InputError(f"{place}: kwargs must list an object for each id")
        row["kwargs"] = [{} if given is None else given for given in kwargs]
        for name, given in zip(ids, row["kwargs"]):
            sound = isinstance(name, str) and isinstance(given, dict)
            wrong = judge.problem(name, given) if sound else "an id is a text, kwargs an object"
            if wrong:
                raise messages.InputError(f"{place}: {name}: {wrong}")
        rows.append(row)
    if not rows:
        raise messages.InputError(f"{path}: no rows in it")
    return rows


def write_rows(path, rows: list[dict]) -> None:
    """One JSON object a line."""
    messages.replace_file(Path(path), messages.json_lines(rows).encode())


def evaluate(policy, role: str | None, rows: list[dict], cfg) -> tuple[dict, list[dict]]:
    """Greedy answers to IFEval rows, under a bar: accuracies, and a record per row."""
    samples = []
    with policy.using(role), tqdm(total=len(rows), desc="answers", leave=False) as bar:
        for at in range(0, len(rows), CHUNK):
            part = rows[at : at + CHUNK]
            prompts = [messages.follower_prompt(row["prompt"], cfg.think) for row in part]
            samples += [s for (s,) in policy.sample(prompts, 1, cfg.max_new_tokens, 0.0)]
            bar.update(len(part))
    # An answer out of form is judged as it stands: a base model is not failed for its wrapping.
    texts = [judge.extract_answer(s.text, cfg.think) or s.text for s in samples]
    records = [judged(row, text) for row, text in zip(rows, texts)]
    for record, sample in zip(records, samples):
        record["tokens"] = len(sample.tokens)
    about = {"rows": len(rows), "truncated": sum(not s.ended for s in samples) / len(rows)}
    about["length"] = sum(r["tokens"] for r in records) / len(records)
    return about | accuracy(records), records


def judged(row: dict, response: str) -> dict:
    """A record: strict and loose verdicts on each of a row's instructions."""
    asked = list(zip(row["instruction_id_list"], row["kwargs"]))
    record = {"prompt": row["prompt"], "response": response}
    for level, verdict in (("strict", judge.check), ("loose", judge.check_loose)):
        record[level] = [verdict(name, kwargs, response) for name, kwargs in asked]
    return record


def accuracy(records: list[dict]) -> dict[str, float]:
    """IFEval's four: by prompt and by instruction, strict and loose.

    What cannot be decided is left out, and so is a prompt on which nothing can.
    """
    result = {}
    for level in ("strict", "loose"):
        table = [[v for v in record[level] if v is not None] for record in records]
        whole = [all(known) for known in table if known]
        flat = [v for known in table for v in known]
        result[f"prompt_{level}"] = sum(whole) / len(whole) if whole else math.nan
        result[f"instruction_{level}"] = sum(flat) / len(flat) if flat else math.nan
    return result


def report(name: str, result: dict, records: list[dict], limit: int) -> None:
    """Print one policy's figures."""
    cut, length = result["truncated"], result["length"]
    print(f"{name}, {result['rows']} prompts, {cut:.0%} cut at {limit} tokens, {length:.0f} long")
    for level in ("prompt", "instruction"):
        strict, loose = (result[f"{level}_{kind}"] for kind in ("strict", "loose"))
        print(f"  {level:11}  strict {strict:6.1%}   loose {loose:6.1%}")
    print("  {:11}  strict {:.1%} to {:.1%} (95 %)".format("interval", *interval(records)))


def main(argv: list[str], open_run) -> None:
    """`eval RUN`: greedy answers to IFEval rows and their accuracy."""
    parser = argparse.ArgumentParser("seif.py eval", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="rows in IFEval's format; default: the run's held-out ones")
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--paired", action="store_true", help="both, and test the difference")
    parser.add_argument("--turn", type=int, default=0, help="the Follower of; default: the last")
    parser.add_argument("--rows", type=int, default=0, help="only the first so many")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="default: the run's")
    parser.add_argument("--out", help='write {"prompt", "response"} lines for IFEval\'s script')
    args = parser.parse_args(argv)
    cfg, policy, turn = open_run(args.run, args.turn)
    cfg.max_new_tokens = args.max_new_tokens or cfg.max_new_tokens
    rows = read_rows(args.data or cfg.heldout or messages.PROMPTS / "heldout.jsonl")[
        : args.rows or None
    ]
    roles = (None, "follower") if args.paired else (None,) if args.base else ("follower",)
    tables = []
    for role in roles:
        result, records = evaluate(policy, role, rows, cfg)
        tables.append(records)
        name = f"Follower of turn {turn}" if role else "base model"
        report(name, result, records, cfg.max_new_tokens)
    if args.paired:
        line = "strict {difference:+.1%}, {low:+.1%} to {high:+.1%} (95 %), p = {p:.4f}"
        print(f"  difference   {line.format(**compare(*tables))}")
    if args.out:
        keep = ("prompt", "response")
        write_rows(args.out, [{key: record[key] for key in keep} for record in tables[-1]])
