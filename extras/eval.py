"""eval.py: `python seif.py eval RUN`, accuracy on rows in IFEval's format, and whether one policy
does better than another on the same rows, and at what price.

The price is sense: a reward that checks constraints alone can be had by answers that say nothing.
So two figures under the base model stand beside the accuracy, for rows that name their "seed", the
question without its constraints:

    fluency   log p(answer | prompt), the mean over its tokens, in nats
    about     log p(answer | its seed) - log p(answer | another row's seed), the mean over its
              tokens: pointwise mutual information. Given the seed alone, or copying a constraint
              would count as sense. An answer is about its question where this is above the least
              that 95 % of the base model's own free answers, to bare seeds, exceed.
"""

import argparse
import json
import math
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

import judge
from extras.sense import information, mean_logprobs
from prompts import messages

# Rows answered between two moves of the progress bar.
CHUNK = 128
# The share of the base model's own free answers that count as being about their question.
ON_TOPIC = 0.95
# Free answers that the threshold is taken from, at most.
FREE_ANSWERS = 64
# What decides language constraints is not among the requirements.
NO_LANGUAGES = "" if find_spec("langdetect") else "; those on languages need pip install langdetect"


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


def compare_fluency(base: list[dict], other: list[dict], draws: int = 10_000) -> dict:
    """The paired difference of the mean fluency, in nats a token, and its 95 % interval."""
    both = [(a["fluency"], b["fluency"]) for a, b in zip(base, other)]
    gain = np.array([[b - a] for a, b in both if a is not None and b is not None])
    if not len(gain):
        return dict(difference=math.nan, low=math.nan, high=math.nan)
    low, high = np.quantile(_resample(gain, draws) / len(gain), (0.025, 0.975))
    return dict(difference=float(gain.mean()), low=float(low), high=float(high))


def read_rows(path: str) -> list[dict]:
    """Rows {"prompt", "instruction_id_list", "kwargs"}, in IFEval's form; errors name the line."""
    rows = []
    for number, row in messages.read_jsonl(path):
        place = f"{path}, line {number}"
        ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(row.get("prompt"), str) or not isinstance(ids, list):
            raise messages.InputError(f"{place}: needs prompt, instruction_id_list and kwargs")
        if not isinstance(row.get("seed", ""), (str, type(None))):
            raise messages.InputError(f"{place}: seed must be the question as a text, or left out")
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


def answers(policy, role: str | None, prompts: list[str], cfg) -> tuple[list, list[str]]:
    """Greedy answers, under a bar: (samples, what is judged of them)"""
    asked = [messages.follower_prompt(prompt, cfg.think) for prompt in prompts]
    context = messages.context_of(policy.model.config)
    longest = max((len(policy.chat.encode(a)) for a in asked), default=0) + cfg.max_new_tokens
    if longest > context:
        mend = "lower --max-new-tokens, or take out the longest"
        needs = f"a row and its answer may need {longest} tokens of context, there are {context}"
        raise messages.InputError(f"{needs}; {mend}")
    samples = []
    with policy.using(role), tqdm(total=len(prompts), desc="answers", leave=False) as bar:
        for at in range(0, len(prompts), CHUNK):
            part = asked[at : at + CHUNK]
            samples += [s for (s,) in policy.sample(part, 1, cfg.max_new_tokens, 0.0)]
            bar.update(len(part))
    # An answer out of form is judged as it stands: a base model is not failed for its wrapping.
    return samples, [judge.extract_answer(s.text, cfg.think) or s.text for s in samples]


def evaluate(policy, role, rows: list[dict], cfg, least=None, most: int | None = None) -> tuple:
    """Greedy answers to IFEval rows: (accuracies and sense, a record per row).

    role: whose answers, None: the base model's; least: the mutual information of an answer that is
    about its question, on_topic_from(); most: rows whose sense is measured.
    """
    samples, texts = answers(policy, role, [row["prompt"] for row in rows], cfg)
    records = [judged(row, text) for row, text in zip(rows, texts)]
    for record, sample in zip(records, samples):
        record["tokens"] = len(sample.tokens)
    add_sense(policy, rows, records, most)
    figures = {"rows": len(rows), "truncated": sum(not s.ended for s in samples) / len(rows)}
    figures["length"] = sum(r["tokens"] for r in records) / len(records)
    return figures | accuracy(records) | sense(records[:most], least), records


def add_sense(policy, rows: list[dict], records: list[dict], most: int | None = None) -> None:
    """The first records' "fluency" and "about"; None where there is no seed, or no answer."""
    seeds = [row.get("seed") for row in rows[:most]]
    known = [i for i, seed in enumerate(seeds) if seed and records[i]["response"].strip()]
    texts = [records[i]["response"] for i in known]
    fluency = mean_logprobs(policy, [rows[i]["prompt"] for i in known], texts)
    about = information(policy, [seeds[i] for i in known], texts)
    for record in records:
        record["fluency"] = record["about"] = None
    for record, row in zip(records, rows):
        record["seeded"] = bool(row.get("seed"))
    for i, one, other in zip(known, fluency, about):
        records[i]["fluency"], records[i]["about"] = one, other


def on_topic_from(policy, rows: list[dict], cfg) -> float | None:
    """What 95 % of the base model's free answers to the rows' seeds exceed; None without seeds."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows if row.get("seed")))[:FREE_ANSWERS]
    if len(seeds) < 2:
        return None
    _, texts = answers(policy, None, seeds, cfg)
    given = [(seed, text) for seed, text in zip(seeds, texts) if text.strip()]
    if not given:
        return None
    return float(np.quantile(information(policy, *map(list, zip(*given))), 1 - ON_TOPIC))


def on_topic(record: dict, least: float | None) -> bool | None:
    """Whether an answer is about its question; an empty one is not."""
    empty = not record["response"].strip() and record.get("seeded", True)
    if least is None or (record["about"] is None and not empty):
        return None
    return record["about"] is not None and record["about"] > least


def sense(records: list[dict], least: float | None) -> dict[str, float]:
    """The mean fluency, and the share of answers that are about their question; nan: not known."""
    fluency = [r["fluency"] for r in records if r["fluency"] is not None]
    about = [a for a in (on_topic(r, least) for r in records) if a is not None]
    mean = lambda values: sum(values) / len(values) if values else math.nan
    return {"fluency": mean(fluency), "about": mean(about)}


def tripped(records: list[dict], least: float | None) -> float:
    """The share of answers that meet every constraint and are not about the question."""
    traps = [all(r["strict"]) and on_topic(r, least) is False for r in records]
    return sum(traps) / len(traps)


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
    if left := sum(v is None for record in records for v in record["strict"]):
        print(f"  {left} instructions cannot be decided and are left out{NO_LANGUAGES}")
    if not math.isnan(result["fluency"] + result["about"]):
        told = f"log p {result['fluency']:.2f} a token, {result['about']:.0%} about their question"
        print(f"  {'sense':11}  {told}")


def open_run(seif, folder: str, turn: int = 0) -> tuple:
    """A finished turn of a run: (its settings, the policy with `follower`, which turn).

    seif: that module, which may be running as the main program.
    """
    path = Path(folder) / "config.json"
    try:
        settings = json.loads(messages.read_text(path))
        begun = date.fromisoformat(settings.pop("begun", date.today().isoformat()))
        cfg = seif.Config(**settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise messages.InputError(
            f"{path}: not the settings of a run of seif.py ({error})"
        ) from error
    adapters = Path(folder).glob("turn[0-9]*/follower/adapter_model.safetensors")
    names = [path.parent.parent.name[4:] for path in adapters]
    done = [int(name) for name in names if name.isdecimal()]
    if (log := Path(folder) / "log.jsonl").exists():
        # A run that begins again has turns of before in its folder, until it comes to them.
        ends = {row["turn"] for _, row in messages.read_jsonl(log) if row["stage"] == "evaluation"}
        done = [turn for turn in done if turn in ends]
    turn = turn or max(done, default=1)
    if turn not in done:
        mend = f"let python seif.py --out {folder} finish it"
        raise messages.InputError(f"{folder}: no adapter of turn {turn} in it yet; {mend}")
    policy = seif.load_policy(cfg)
    policy.chat.today = begun
    policy.load_adapter("follower", Path(folder) / f"turn{turn}" / "follower")
    return cfg, policy, turn


def main(argv: list[str], seif) -> None:
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
    if min(args.rows, args.max_new_tokens, args.turn) < 0 or (args.base and args.paired):
        raise messages.InputError("numbers are not below 0; --base is a side of --paired")
    if args.out and not Path(args.out).parent.is_dir():
        raise messages.InputError(f"--out {args.out}: there is no such folder")
    given = read_rows(args.data) if args.data else []
    cfg, policy, turn = open_run(seif, args.run, args.turn)
    cfg.max_new_tokens = args.max_new_tokens or cfg.max_new_tokens
    rows = given or read_rows(cfg.heldout or messages.PROMPTS / "heldout.jsonl")
    rows = rows[: args.rows or None]
    # What a run began with, as in seif.Run.
    base = "base" if cfg.init_follower else None
    if args.paired and base:
        policy.load_adapter(base, cfg.init_follower)
    roles = (base, "follower") if args.paired else (None,) if args.base else ("follower",)
    names = {None: "base model", "base": cfg.init_follower, "follower": f"Follower of turn {turn}"}
    tables, least = [], on_topic_from(policy, rows, cfg)
    for role in roles:
        result, records = evaluate(policy, role, rows, cfg, least)
        tables.append(records)
        report(names[role], result, records, cfg.max_new_tokens)
    if args.paired:
        line = "strict {difference:+.1%}, {low:+.1%} to {high:+.1%} (95 %), p = {p:.4f}"
        print(f"  difference   {line.format(**compare(*tables))}")
        fluency = compare_fluency(*tables)
        if not math.isnan(fluency["difference"]):
            line = "log p  {difference:+.2f}, {low:+.2f} to {high:+.2f} (95 %)"
            print(f"  {'':11}  {line.format(**fluency)}")
    if args.out:
        keep = ("prompt", "response")
        write_rows(args.out, [{key: record[key] for key in keep} for record in tables[-1]])
