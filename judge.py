"""judge.py: what an instruction asks for and whether an answer gives it.

In this order: reading the Instructor's JSON, the Filter, the Judger, the two rewards, the prompts of the four roles.

Where code can decide a constraint, code decides it (rules.py); the rest goes to the model in the evaluator's role,
whose verdict is read from P(yes) against P(no) of the next token. A verdict is 1.0, 0.0 or None: None is missing, and
never counts as a "no". Nothing here knows of turns or training. Source: SEIF (arXiv 2605.07465).
"""

import json
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data import UserError, read_jsonl, read_text
from rl import Policy
from rules import MAX_CONSTRAINT_CHARS, RULES, check, check_loose, contradiction, intervals, recognise  # noqa: F401

PROMPTS = Path(__file__).parent / "prompts"
KINDS = {"hard": 3, "soft": 5}  # constraints asked for, as in SEIF: machine-checkable ones, open ones
WORDS_PER_TOKEN = 0.75  # English, so that "at least 500 words" is not asked of a 128-token answer


@dataclass(frozen=True)
class Question:
    """A row of q_T: a seed question and the constraints an Instructor added to it."""

    seed: str
    kind: str
    constraints: tuple[str, ...]

    @property
    def instruction(self) -> str:
        """What the Follower is asked: the seed, then one constraint a line."""
        return self.seed + "\n" + "\n".join(self.constraints)


@dataclass(frozen=True)
class Verdict:
    """Whether an answer satisfies one constraint, and who says so."""

    value: float | None
    by: str  # "rule" or "judger"


# ---------------------------------------------------------------- the Instructor's JSON


def _unique(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def parse_constraints(text: str, count: int) -> tuple[list[str], str]:
    """The proposal {"c1": ..., "c<count>": ...}, bare, fenced or amid chatter -> (constraints, "") or ([], reason).

    Reasons: "no json", "wrong keys" (the keys must be c1 to c<count>, which also fixes the number), "not text".
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    for brace in list(re.finditer("{", text[:20_000]))[:20]:
        try:
            proposal, _ = decoder.raw_decode(text[:20_000], brace.start())
        except (ValueError, RecursionError):
            continue
        if list(proposal) != [f"c{i}" for i in range(1, count + 1)]:
            return [], "wrong keys"
        if not all(isinstance(c, str) and c.strip() for c in proposal.values()):
            return [], "not text"
        return [" ".join(c.split()) for c in proposal.values()], ""
    values = _unescaped(text[:20_000], count)
    return (values, "") if values else ([], "no json")


def _unescaped(text: str, count: int) -> list[str]:
    """Small models write "quotes" inside a value unescaped. With the keys known it is still clear what they mean."""
    at, values = 0, []
    for i in range(1, count + 2):
        opening = rf'"\s*,\s*"c{i}"\s*:\s*"' if 1 < i <= count else r'\{\s*"c1"\s*:\s*"' if i == 1 else r'"\s*\}'
        if not (mark := re.compile(opening).search(text, at)):
            return []
        values.append(" ".join(text[at : mark.start()].split()))
        at = mark.end()
    values = values[1:]
    clean = all(v and not re.search(r'"\s*[:,]\s*"|[{}]', v) for v in values)  # no other key or value inside
    return values if clean else []


# ---------------------------------------------------------------- the Filter


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def code_filter(question: Question, max_new_tokens: int, checkable: bool = False, min_words: int = 0) -> str:
    """What code can see wrong with an instruction: a reason to reject it, or "".

    `checkable`: hard constraints that no rule recognises are rejected too, so that no model's verdict is needed.
    `min_words`: an instruction that allows fewer words is too: "at most 4 words" is hard, and leaves no answer.
    """
    seed, plain = _plain(question.seed), [_plain(c) for c in question.constraints]
    if len(set(plain)) < len(plain):
        return "duplicate"
    if any(len(c) > MAX_CONSTRAINT_CHARS for c in question.constraints):
        return "too long"
    if any(len(c) > 15 and (c in seed or (len(seed) > 15 and seed in c)) for c in plain):
        return "restates the seed"
    nameless = r"(?:forbidden|key|following|specific|certain) (?:key)?(?:words?|phrases?)(?!.*['\"`:\[])"
    if any(re.search(nameless, c.lower()) for c in question.constraints):
        return "words not named"  # "do not use the forbidden words", which nobody can satisfy or break
    rules = [recognise(c) for c in question.constraints]
    if checkable and question.kind == "hard" and None in rules:
        return "not checkable"
    known = [rule for rule in rules if rule]
    if contradiction(known):
        return "contradiction"
    if question.kind == "hard" and len({name for name, _ in known}) < len(known):
        return "one sort twice"  # hard constraints are of different categories, as in SEIF
    words = intervals(known).get(("length_constraints:number_words", None), (0, math.inf))
    if words[0] > max_new_tokens * WORDS_PER_TOKEN:
        return "over the token limit"
    if words[1] < min_words:
        return "no room for an answer"
    return ""


def filter_questions(policy: Policy, questions: list[Question], cfg) -> list[str]:
    """For each instruction a reason to reject it, or "": code first, then the model in use, one prefill each.

    cfg.filter is "llm" (both), "code", or "off" (the paper's ablation). A missing verdict lets an instruction pass.
    """
    if cfg.filter == "off":
        return [""] * len(questions)
    reasons = [code_filter(q, cfg.max_new_tokens, cfg.checkable, cfg.min_words) for q in questions]
    left = [i for i, reason in enumerate(reasons) if not reason] if cfg.filter == "llm" else []
    for i, p in zip(left, policy.yes_probability([filter_prompt(policy, questions[i]) for i in left])):
        reasons[i] = "rejected by the model" if p < 0.5 else ""
    return reasons


# ---------------------------------------------------------------- the Judger


def rule_verdict(question: Question, constraint: str, answer: str) -> bool | None:
    """A rule's verdict on one constraint; None if no rule recognises it or can decide it."""
    if not (rule := recognise(constraint)):
        return None
    name, kwargs = rule
    if name == "combination:repeat_prompt":
        kwargs = kwargs | {"prompt_to_repeat": question.seed}
    return check(name, kwargs, answer)


def judge(policy: Policy, pairs: list[tuple[Question, str]], cfg) -> list[list[Verdict]]:
    """Verdicts on every constraint of every (question, answer) pair, all open ones in one batch of prefills.

    cfg.judge "hybrid": rules where they decide, else the model in use; "llm": the model decides all (the paper's way).
    cfg.soft_verdicts keeps P(yes) instead of rounding it. cfg.judge_think lets the model write that many tokens first.
    """
    table: list[list[Verdict | None]] = []
    open_ones, prompts = [], []
    for i, (question, answer) in enumerate(pairs):
        table.append([])
        for j, constraint in enumerate(question.constraints):
            value = rule_verdict(question, constraint, answer) if cfg.judge == "hybrid" else None
            table[i].append(None if value is None else Verdict(float(value), "rule"))
            if value is None:
                open_ones.append((i, j))
                prompts.append(judger_prompt(policy, question, answer, constraint))
    if cfg.judge_think and prompts:
        thoughts = policy.generate(prompts, 1, cfg.judge_think, 0.0)
        ending = policy.encode_text("\nVerdict (yes or no):")
        prompts = [p + [t for t in c[0] if t not in policy.eos] + ending for p, c in zip(prompts, thoughts)]
    for (i, j), p in zip(open_ones, policy.yes_probability(prompts)):
        value = None if math.isnan(p) else p if cfg.soft_verdicts else float(p >= 0.5)
        table[i][j] = Verdict(value, "judger")
    return table


# ---------------------------------------------------------------- rewards


def extract_answer(text: str, think: bool) -> str:
    """The part of a completion that is judged. With `think` the whole must be <think>..</think><answer>..</answer>
    (SEIF's format); an answer in any other format counts as empty."""
    if not think:
        return text.strip()
    match = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    return match[2].strip() if match and not re.search(r"</?(think|answer)>", match[1] + match[2]) else ""


def echoes(question: Question, answer: str) -> bool:
    """Whether the answer only gives the instruction back: all of its lines are the instruction's, or little is added."""
    whole, plain = _plain(question.instruction), _plain(answer)
    given = {_plain(line) for line in question.instruction.split("\n")} | {whole}
    lines = [_plain(line) for line in answer.split("\n")]
    return all(line in given for line in lines if line) or (
        whole in plain and len(plain.replace(whole, "").split()) < 3
    )


def satisfaction(verdicts: list[Verdict]) -> float | None:
    """r: the mean of the verdicts there are (SEIF's reward of the Follower); None if all are missing."""
    values = [v.value for v in verdicts if v.value is not None]
    return sum(values) / len(values) if values else None


def follower_reward(question: Question, answer: str, ended: bool, verdicts: list[Verdict]) -> float | None:
    """r; 0 for an answer that is empty, cut off at the token limit, or an echo of the instruction."""
    if not answer or not ended or echoes(question, answer):
        return 0.0
    return satisfaction(verdicts)


def instructor_reward(r: float | None, shape: str) -> float | None:
    """From the share r of constraints that the evaluator's own answer satisfies.

    "hardest" is the paper's 1 - r; "frontier" is 4 r (1 - r), which peaks where the Follower succeeds half the time.
    """
    if r is None:
        return None
    return 1 - r if shape == "hardest" else 4 * r * (1 - r)


def constraint_type(constraint: str) -> str:
    """The rule's id without its group, or "open"."""
    rule = recognise(constraint)
    return rule[0].split(":")[1] if rule else "open"


def type_statistics(questions: list[Question]) -> dict[str, float | str]:
    """Entropy in bits of the constraint types and the commonest one: an Instructor that collapses shows here."""
    types = [constraint_type(c) for q in questions for c in q.constraints]
    if not types:
        return {"type_entropy": 0.0, "top_type": "", "top_share": 0.0}
    shares = {t: types.count(t) / len(types) for t in set(types)}
    top = max(shares, key=lambda t: (shares[t], t))
    entropy = -sum(p * math.log2(p) for p in shares.values())
    return {"type_entropy": entropy, "top_type": top, "top_share": shares[top]}


# ---------------------------------------------------------------- prompts


@cache
def prompt_text(name: str) -> str:
    """prompts/<name>.txt."""
    return read_text(PROMPTS / f"{name}.txt").strip()


def read_questions(path: str | Path) -> list[Question]:
    """Lines {"seed", "kind", "constraints"} -> questions; UserError names the line that is not so."""
    questions = []
    for number, row in read_jsonl(path):
        seed, kind, constraints = (row.get(key) for key in ("seed", "kind", "constraints"))
        listed = isinstance(constraints, list) and all(isinstance(c, str) for c in constraints)
        if not isinstance(seed, str) or kind not in KINDS or not listed:
            raise UserError(f"{path}, line {number}: needs seed, kind (hard or soft) and constraints, a list of texts")
        questions.append(Question(seed, kind, tuple(constraints)))
    return questions


@cache
def instructor_examples(kind: str) -> list[Question]:
    """The worked examples that show a small Instructor what is wanted (prompts/instructor_examples.jsonl)."""
    return [q for q in read_questions(PROMPTS / "instructor_examples.jsonl") if q.kind == kind]


# The Instructor's answer is begun for it: a small model would else answer the question.
OPENING = {"hard": '{"c1": "Your answer must', "soft": '{"c1": "'}
_ASK = "Write {} constraints on how to answer this question, as JSON.\nQuestion: {}"


def instructor_prompt(policy: Policy, seed: str, kind: str, shots: int, draw: random.Random) -> list[int]:
    """A system line, worked examples as chat turns, the seed last, and the answer's opening given."""
    messages = [{"role": "system", "content": prompt_text(f"instructor_{kind}")}]
    for example in draw.sample(instructor_examples(kind), shots):
        proposal = {f"c{i}": c for i, c in enumerate(example.constraints, 1)}
        messages.append({"role": "user", "content": _ASK.format(KINDS[kind], example.seed)})
        messages.append({"role": "assistant", "content": json.dumps(proposal, ensure_ascii=False)})
    return policy.encode([*messages, {"role": "user", "content": _ASK.format(KINDS[kind], seed)}], OPENING[kind])


def follower_prompt(policy: Policy, instruction: str, think: bool) -> list[int]:
    """The same prompt in training, evaluation and chat."""
    system = [{"role": "system", "content": prompt_text("think")}] if think else []
    return policy.encode([*system, {"role": "user", "content": instruction}])


def filter_prompt(policy: Policy, question: Question) -> list[int]:
    """Fixed text first, so that all instructions of a batch share its prefill."""
    asked = f"{prompt_text('filter')}\n\nQuestion:\n{question.seed}\n\nConstraints:\n" + "\n".join(question.constraints)
    return policy.encode(
        [{"role": "user", "content": asked + "\n\nCan all of them be met together? Answer yes or no."}]
    )


def judger_prompt(policy: Policy, question: Question, answer: str, constraint: str) -> list[int]:
    """Template, instruction, answer, constraint: what many verdicts share comes first."""
    asked = (
        f"{prompt_text('judger')}\n\n[INSTRUCTION]\n{question.instruction}\n[END OF INSTRUCTION]\n\n"
        f"[ANSWER]\n{answer}\n[END OF ANSWER]\n\nConstraint to check: {constraint}\n"
        "Does the answer satisfy this one constraint? Reply yes or no."
    )
    return policy.encode([{"role": "user", "content": asked}])
