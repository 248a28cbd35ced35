"""evaluate.py: accuracy on rows in IFEval's format, and what it was bought with.

Answers that say nothing can hack a reward that checks constraints alone. Three figures under the
base model show it, for rows that name their seed question (after IFDecorator, arXiv 2508.04632):
    logp       log p(answer | prompt), mean per token
    relevance  share of answers with a PMI above the lowest 5 % of the base model's free answers.
               PMI: log p(answer | seed question) - log p(answer | another one), mean per token
    hack_rate  share of the hacking probes (prompts/tripwires.jsonl) that irrelevant answers pass
"""

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rl
from extras import data
from extras.peft_adapters import load_adapter
from extras.verifiers import VERIFIERS, check, check_loose
from prompts import FOLDER, assistant, extract_answer, follower_messages, user

# Answers per move of the progress bar, free answers behind a quantile of the PMI, held-out rows
# with log p and PMI per turn, bootstrap draws.
CHUNK, MAX_FREE_ANSWERS, MAX_SCORED, DRAWS = 128, 64, 120, 10_000
DIFFERENCE = "{difference:+.3f} ({low:+.3f} to {high:+.3f}), p {p:.4f}"


def _mean(values) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else np.nan


def _counts(record: dict) -> tuple[int, int]:
    known = [verdict for verdict in record["strict"] if verdict is not None]
    return sum(known), len(known)


def compare(base: list[dict], other: list[dict], counts=_counts) -> dict[str, float]:
    """`other` minus `base` in strict accuracy by instruction, on the same rows.

    difference, its 95 % bootstrap interval (low, high), two-sided p of a paired permutation test.
    """
    table = np.array([(*counts(a), *counts(b)) for a, b in zip(base, other)], dtype=np.float64)
    rng, size = np.random.default_rng(0), len(table)
    # Rows are resampled, since the instructions of one prompt are not independent.
    weights = rng.multinomial(size, [1 / size] * size, DRAWS)
    a, n, b, m = np.vstack([table.sum(0), weights @ table]).T
    difference, *resampled = b / np.maximum(m, 1) - a / np.maximum(n, 1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    gain = table[:, 2] - table[:, 0]
    swapped = np.abs(rng.choice([-1.0, 1.0], (DRAWS, size)) @ gain)
    p = (1 + (swapped >= abs(gain.sum()) - 1e-9).sum()) / (1 + DRAWS)
    return {"difference": float(difference), "low": float(low), "high": float(high), "p": float(p)}


def interval(records: list[dict]) -> tuple[float, float]:
    """95 % bootstrap interval of the strict accuracy by instruction."""
    result = compare([{"strict": []}] * len(records), records)
    return result["low"], result["high"]


def compare_logp(base: list[dict], other: list[dict]) -> dict[str, float] | None:
    """compare() for the mean logp. None if it was not measured."""
    pairs = [(a, b) for a, b in zip(base, other) if None not in (a["logp"], b["logp"])]
    return compare(*zip(*pairs), lambda record: (record["logp"], 1)) if pairs else None


def verdict_line(folder: Path, turn: int) -> str:
    """Whether a turn's Follower is better than the base model on the held-out rows."""
    paths = folder / "heldout_base.jsonl", folder / f"turn{turn}" / "heldout.jsonl"
    result = compare(*([row for _, row in data.read_jsonl(path)] for path in paths))
    word = "better" if result["difference"] > 0 else "worse"
    word = word if result["p"] < 0.05 else "no significant difference"
    return f"turn {turn}: accuracy, Follower minus base: {DIFFERENCE.format(**result)}, {word}"


def greedy_answers(policy, role: str | None, prompts: list[str], cfg) -> list[rl.Sample]:
    """Greedy answers, .answer set to the judged part. InputError if they may exceed the context."""
    messages = [follower_messages(prompt, cfg.think) for prompt in prompts]
    tokens = max((len(policy.chat.encode(m)) for m in messages), default=0) + cfg.max_new_tokens
    if tokens > policy.context_length:
        fix = f"the context has {policy.context_length}; lower --max-new-tokens or shorten the rows"
        raise data.InputError(f"a row and its answer may need {tokens} tokens, {fix}")
    samples = []
    with policy.using(role):
        for start in tqdm(range(0, len(messages), CHUNK), desc="answers", leave=False):
            chunk = messages[start : start + CHUNK]
            samples += [group[0] for group in policy.sample(chunk, 1, cfg.max_new_tokens, 0.0)]
    for sample in samples:
        # Without <answer> tags the whole text is judged: base models do not write them.
        sample.answer = extract_answer(sample.text, cfg.think) or sample.text
    return samples


def mean_logprobs(policy, pairs: list[tuple[str, str]]) -> list[float | None]:
    """Mean log p per token of (prompt, answer) pairs under the base model, None if it is empty."""
    samples = []
    for prompt, text in pairs:
        start = policy.chat.encode([user(prompt)])
        whole = policy.chat.encode([user(prompt), assistant(text)])
        # The prompt's last token may have merged with the answer's first.
        split = next((i for i, (a, b) in enumerate(zip(start, whole)) if a != b), len(start))
        samples.append(rl.Sample(whole[:split], whole[split:], text, ended=True))
    rl.score(policy, None, [s for s in samples if s.text.strip()], "ref_logprobs", 1.0)
    return [s.ref_logprobs.mean().item() if s.text.strip() else None for s in samples]


def pmi(policy, pairs: list[tuple[str, str]], pool: list[str]) -> list[float | None]:
    """PMI of (seed question, answer) pairs. The other seed question is the next one in the pool."""
    others = []
    for i, (seed_question, answer) in enumerate(pairs):
        other = next((q for q in pool[i:] + pool[:i] if q != seed_question), "")
        others.append((other, answer))
    both = zip(mean_logprobs(policy, pairs), mean_logprobs(policy, others))
    return [None if a is None else a - b for a, b in both]


def pmi_quantile(policy, role, pairs: list, cfg, quantile: float = 0.05) -> float | None:
    """A quantile of the PMI of greedy answers to (prompt, seed question) pairs."""
    pairs = [pair for pair in dict.fromkeys(pairs) if pair[1]][:MAX_FREE_ANSWERS]
    samples = greedy_answers(policy, role, [prompt for prompt, _ in pairs], cfg)
    pool = [seed_question for _, seed_question in pairs]
    values = pmi(policy, [(q, s.answer) for q, s in zip(pool, samples)], pool)
    known = [value for value in values if value is not None]
    return float(np.quantile(known, quantile)) if known else None


def gate(run, questions: list, samples: list) -> None:
    """Reward 0 below a quantile of the PMI of the snapshot Follower's own answers to q_T."""
    if run.turn not in run.gate_threshold:
        pairs = [(q.instruction, q.seed_question) for q in questions]
        value = pmi_quantile(run.policy, "ref_follower", pairs, run.cfg, run.cfg.relevance_gate)
        run.gate_threshold = {run.turn: -np.inf if value is None else value}
    rewarded = [s for s in samples if s.reward]
    pairs = [(s.question.seed_question, s.answer) for s in rewarded]
    values = pmi(run.policy, pairs, [q.seed_question for q in questions])
    for sample, value in zip(rewarded, values):
        if value <= run.gate_threshold[run.turn]:
            sample.reward, sample.rejected = 0.0, "not relevant"


def make_record(row: dict, answer: str) -> dict:
    """An answer with a verdict per instruction, None for one without a verifier."""
    record = {"prompt": row["prompt"], "response": answer, "seed_question": row["seed_question"]}
    for level, verify in (("strict", check), ("loose", check_loose)):
        asked = zip(row["instruction_id_list"], row["kwargs"])
        record[level] = [verify(i, k, answer) if i in VERIFIERS else None for i, k in asked]
    return {**record, "logp": None, "pmi": None, "relevant": None}


def evaluate(policy, role, rows: list, cfg, threshold=None, max_scored=None) -> tuple[dict, list]:
    """(figures, a record per row) of greedy answers to IFEval rows. role None: the base model.

    threshold: the PMI of a relevant answer. max_scored: rows with log p and PMI.
    """
    probes = data.read_eval_rows(FOLDER / "tripwires.jsonl") if threshold is not None else []
    asked, size = rows + probes, len(rows)
    samples = greedy_answers(policy, role, [row["prompt"] for row in asked], cfg)
    everything = [make_record(row, sample.answer) for row, sample in zip(asked, samples)]
    records, probed = everything[:size], everything[size:]
    scored = [r for r in records[:max_scored] + probed if r["seed_question"]]
    logp = mean_logprobs(policy, [(r["prompt"], r["response"]) for r in scored])
    pairs = [(r["seed_question"], r["response"]) for r in scored]
    for record, a, b in zip(scored, logp, pmi(policy, pairs, [q for q, _ in pairs])):
        # An empty answer is irrelevant.
        relevant = None if threshold is None else b is not None and b > threshold
        record.update(logp=a, pmi=b, relevant=relevant)
    figures = {"cut": _mean(not sample.ended for sample in samples[:size])}
    figures["length"] = _mean(len(sample.tokens) for sample in samples[:size])
    figures["words"] = float(np.median([len(r["response"].split()) for r in records]))
    for level in ("strict", "loose"):
        # Undecided verdicts are left out, and so is a prompt that has no other.
        table = [[v for v in r[level] if v is not None] for r in records]
        figures[f"prompt_{level}"] = _mean(all(known) for known in table if known)
        figures[f"instruction_{level}"] = _mean(verdict for known in table for verdict in known)
    figures["undecided"] = sum(None in r["strict"] for r in records)
    figures["logp"] = _mean(r["logp"] for r in records)
    figures["relevance"] = _mean(r["relevant"] for r in records)
    figures["hack_rate"] = _mean(all(r["strict"]) and not r["relevant"] for r in probed)
    return figures, records


def read_base(folder: Path) -> dict:
    """The base model's figures. InputError if the file is damaged."""
    rows = [row for _, row in data.read_jsonl(folder / "base.json")]
    if len(rows) != 1 or "threshold" not in rows[0]:
        raise data.InputError(f"{folder / 'base.json'}: damaged; delete it to measure again")
    return rows[0]


def check_heldout(folder: Path, rows: list[dict]) -> None:
    """InputError if the base model was measured on other held-out rows."""
    path = folder / "heldout_base.jsonl"
    if (folder / "base.json").exists():
        read_base(folder)
        measured = [row.get("prompt") for _, row in data.read_jsonl(path)]
        if measured != [row["prompt"] for row in rows]:
            fix = "restore the file that --heldout names, or give another --out"
            raise data.InputError(f"{path}: has other rows than are held out now; {fix}")


def evaluate_turn(run) -> dict[str, dict]:
    """Figures on the held-out rows: the base model's, measured once, and this turn's Follower's."""
    policy, rows, cfg, folder = run.policy, run.heldout, run.cfg, run.folder
    path = folder / "base.json"
    if not path.exists():
        threshold = pmi_quantile(policy, None, [(row["seed_question"],) * 2 for row in rows], cfg)
        base, records = evaluate(policy, run.baseline, rows, cfg, threshold, MAX_SCORED)
        data.write_atomic(folder / "heldout_base.jsonl", data.to_jsonl(records).encode())
        data.write_atomic(path, data.to_jsonl([{**base, "threshold": threshold}]).encode())
    base = read_base(folder)
    follower, records = evaluate(policy, "follower", rows, cfg, base["threshold"], MAX_SCORED)
    data.write_atomic(folder / f"turn{run.turn}/heldout.jsonl", data.to_jsonl(records).encode())
    return {"heldout_base": base, "heldout_follower": follower}


def open_run(make_config, load_policy, folder: str, turn: int = 0) -> tuple:
    """(settings, policy with the adapter `follower`, turn) of a finished turn. 0: the last."""
    path, log = Path(folder, "config.json"), Path(folder, "log.jsonl")
    text = data.read_text(path)
    try:
        settings = json.loads(text)
        created = date.fromisoformat(settings.pop("created"))
        cfg = make_config(**settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise data.InputError(f"{path}: not the settings of a run of seif.py ({error})") from error
    rows = [row for _, row in data.read_jsonl(log)] if log.exists() else []
    finished = [row["turn"] for row in rows if row.get("stage") == "evaluation"]
    turn = turn or max(finished, default=1)
    adapter = Path(folder, f"turn{turn}", "follower")
    if turn not in finished or not (adapter / "adapter_model.safetensors").exists():
        fix = f"python seif.py --out {folder}, with the run's settings, finishes it"
        raise data.InputError(f"{folder}: turn {turn} is not finished; {fix}")
    policy = load_policy(cfg)
    policy.chat.date = created
    load_adapter(policy, "follower", adapter)
    return cfg, policy, turn


def main(argv: list[str], open_run) -> None:
    """Accuracy, relevance and hack rate of greedy answers to rows in IFEval's format."""
    parser = argparse.ArgumentParser("seif.py eval", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="rows in IFEval's format; default: the run's held-out rows")
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--paired", action="store_true", help="both, and test the difference")
    parser.add_argument("--turn", type=int, default=0, help="the Follower's turn; 0: the last")
    parser.add_argument("--rows", type=int, default=0, help="only the first so many; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="0: as in the run")
    parser.add_argument("--out", help='write {"prompt", "response"} lines for IFEval\'s script')
    args = parser.parse_args(argv)
    if min(args.rows, args.max_new_tokens, args.turn) < 0 or (args.base and args.paired):
        raise data.InputError("numbers must be at least 0, and --paired contains --base")
    if args.out and not Path(args.out).parent.is_dir():
        raise data.InputError(f"--out {args.out}: no such folder; create it")
    cfg, policy, turn = open_run(args.run, args.turn)
    cfg.max_new_tokens = args.max_new_tokens or cfg.max_new_tokens
    rows = data.read_eval_rows(args.data or cfg.heldout or FOLDER / "heldout.jsonl")
    rows = rows[: args.rows or None]
    base = "init_follower" if args.paired and cfg.init_follower else None
    if base:
        load_adapter(policy, base, cfg.init_follower)
    threshold = pmi_quantile(policy, None, [(row["seed_question"],) * 2 for row in rows], cfg)
    tables = []
    for role in (base, "follower") if args.paired else (None if args.base else "follower",):
        figures, records = evaluate(policy, role, rows, cfg, threshold)
        tables.append(records)
        name = f"Follower of turn {turn}" if role == "follower" else role or "base model"
        low, high = interval(records)
        print(f"{name}, {len(rows)} rows, accuracy {low:.3f} to {high:.3f} (95 %)")
        print("\n".join(f"  {key:18} {value:9.3f}" for key, value in figures.items()))
    for name, test in (("accuracy", compare), ("logp", compare_logp)) if args.paired else ():
        if result := test(*tables):
            print(f"{name}, Follower minus base: {DIFFERENCE.format(**result)}")
    if args.out:
        answers = [{key: r[key] for key in ("prompt", "response")} for r in tables[-1]]
        data.write_atomic(args.out, data.to_jsonl(answers).encode())
