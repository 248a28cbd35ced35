"""judge.py: what an instruction asks for, and whether an answer gives it. Text only, no torch.

In this order: the Filter, the Judger, whether it is to be believed, the two rewards. What code can
check is a table, prompts/constraints.py; what the roles are told, and how the Instructor's JSON is
read, is prompts/messages.py.

Where code can decide a constraint, code decides it. The rest goes to `ask`, a function from chat
messages to P(yes): normally the frozen Follower, but an API model or a dictionary will do. A
verdict is 1.0, 0.0 or None: None is missing, and never counts as a "no".

Sources: SEIF (arXiv 2605.07465); the verifiable instructions are IFEval's (arXiv 2311.07911).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from prompts.constraints import (
    MAX_CONSTRAINT_CHARS,
    RULES,
    check,
    check_loose,
    contradiction,
    decidable,
    intervals,
    problem,
    recognise,
)
from prompts.messages import Question, filter_prompt, judger_prompt, parse_constraints

# For those who ask judge what code can check, or what a proposal says.
__all__ = ["RULES", "check", "check_loose", "parse_constraints", "problem", "recognise"]

FILTERS, JUDGES = ("llm", "code", "rules", "off"), ("hybrid", "llm")
REWARDS = ("hardest", "frontier")
# English, so that "at least 500 words" is not asked of a 128-token answer.
WORDS_PER_TOKEN = 0.75
# The lower end of an AUC's interval from which on a model's verdicts are believed.
TRUSTED_AUC = 0.6
# Fewer right ones, or fewer wrong ones, tell nothing.
FEWEST_CASES = 10

Ask = Callable[[list[list[dict]]], list[float]]


# ------------------------------------------------------------ the Filter
def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def code_filter(
    question: Question, max_new_tokens: int, checkable: bool = False, min_words: int = 0
) -> str:
    """What code can see wrong with an instruction: a reason to reject it, or "".

    `checkable`: a hard constraint that no rule recognises is rejected, so that no model is asked.
    `min_words`: so is an instruction that allows fewer: "at most 4 words" leaves no answer.
    """
    seed, plain = _plain(question.seed), [_plain(c) for c in question.constraints]
    if len(set(plain)) < len(plain):
        return "duplicate"
    if any(len(c) > MAX_CONSTRAINT_CHARS for c in question.constraints):
        return "too long"
    if any(len(c) > 15 and (c in seed or (len(seed) > 15 and seed in c)) for c in plain):
        return "restates the seed"
    # "Do not use the forbidden words", which nobody can satisfy or break.
    sorts = "forbidden|key|following|specific|certain"
    nameless = rf"(?:{sorts}) (?:key)?(?:words?|phrases?)(?!.*['\"`:\[‘’“”])"
    if any(re.search(nameless, c.lower()) for c in question.constraints):
        return "words not named"
    rules = [recognise(c) for c in question.constraints]
    if checkable and question.kind == "hard" and not all(map(decidable, rules)):
        return "not checkable"
    known = [rule for rule in rules if rule]
    if contradiction(known):
        return "contradiction"
    # Hard constraints are of different categories, as in SEIF.
    if question.kind == "hard" and len({name for name, _ in known}) < len(known):
        return "one sort twice"
    words = intervals(known).get(("length_constraints:number_words", None), (0, math.inf))
    if words[0] > max_new_tokens * WORDS_PER_TOKEN:
        return "over the token limit"
    return "no room for an answer" if words[1] < min_words else ""


def filter_questions(
    questions: list[Question], ask: Ask, mode: str, limits: tuple[int, int], threshold: float = 0.5
) -> list[str]:
    """For each instruction a reason to reject it, or "": code first, then `ask`.

    mode "llm" is both, "code" leaves `ask` out, "rules" is code that also rejects hard constraints
    no rule recognises, "off" is the paper's ablation. A missing verdict lets a question pass.
    limits: an answer's tokens at most, and the words that an instruction must allow.
    """
    if mode == "off":
        return [""] * len(questions)
    tokens, words = limits
    reasons = [code_filter(q, tokens, mode == "rules", words) for q in questions]
    left = [i for i, reason in enumerate(reasons) if not reason and mode == "llm"]
    for i, p in zip(left, ask([filter_prompt(questions[i]) for i in left]) if left else []):
        reasons[i] = "rejected by the model" if p < threshold else ""
    return reasons


# ------------------------------------------------------------ the Judger
@dataclass(frozen=True)
class Verdict:
    """Whether an answer satisfies one constraint; who says so: "rule", "judger", "nobody"."""

    value: float | None
    by: str


def rule_verdict(question: Question, constraint: str, answer: str) -> bool | None:
    """A rule's verdict on one constraint; None if no rule recognises it or can decide it.

    Question("Hi", "hard", ()), "Use no commas.", "a, b" -> False
    """
    rule = recognise(constraint)
    if not rule:
        return None
    name, kwargs = rule
    if name == "combination:repeat_prompt":
        kwargs = kwargs | {"prompt_to_repeat": question.seed}
    return check(name, kwargs, answer)


def verdicts(
    pairs: list[tuple[Question, str]], ask: Ask | None, mode="hybrid", threshold: float = 0.5
) -> list[list[Verdict]]:
    """Verdicts on every constraint of every (question, answer), all open ones asked at once.

    mode "hybrid": rules where they decide, else `ask`, if given; "llm": `ask` alone, the paper's.
    """
    cases = [(q, a, c) for q, a in pairs for c in q.constraints]
    values = [rule_verdict(q, c, a) if mode == "hybrid" else None for q, a, c in cases]
    found = [Verdict(None, "nobody") if v is None else Verdict(float(v), "rule") for v in values]
    left = [i for i, value in enumerate(values) if value is None] if ask else []
    for i, p in zip(left, ask([judger_prompt(*cases[i]) for i in left]) if left else []):
        found[i] = Verdict(None if math.isnan(p) else float(p >= threshold), "judger")
    rest = iter(found)
    return [[next(rest) for _ in q.constraints] for q, _ in pairs]


# ------------------------------------------------------------ is `ask` to be believed?
@dataclass(frozen=True)
class Ranking:
    """How well P(yes) tells right from wrong, on cases whose truth rules know.

    auc: the chance that a right case has the higher P(yes), with its 95 % interval; threshold: the
    P(yes) of the best balanced accuracy, 0.5 if that is noise; cases: those with a verdict.
    """

    auc: float
    low: float
    high: float
    threshold: float
    cases: int

    @property
    def believed(self) -> bool:
        """Whether it is better than chance beyond doubt."""
        return self.low > TRUSTED_AUC


# Until it is tried, a role is believed.
UNTRIED = Ranking(auc=math.nan, low=1.0, high=1.0, threshold=0.5, cases=0)


def rank(ps: list[float], truth: list[bool]) -> Ranking:
    """With Hanley and McNeil's interval (1982). Too few of a sort: auc nan, and not believed."""
    known = [(p, t) for p, t in zip(ps, truth) if not math.isnan(p)]
    right, wrong = [p for p, t in known if t], [p for p, t in known if not t]
    if min(len(right), len(wrong)) < FEWEST_CASES:
        return Ranking(math.nan, 0.0, 1.0, 0.5, len(known))
    n, m = len(right), len(wrong)
    auc = sum((p > q) + 0.5 * (p == q) for p in right for q in wrong) / (n * m)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (m - 1) * (q2 - auc**2)
    margin = 1.96 * math.sqrt(spread / (n * m))
    balanced = lambda cut: sum(p >= cut for p in right) / n + sum(p < cut for p in wrong) / m
    best = max(sorted({p for p, _ in known}), key=balanced)
    ranking = Ranking(auc, max(0.0, auc - margin), min(1.0, auc + margin), best, n + m)
    return ranking if ranking.believed else replace(ranking, threshold=0.5)


def balance(cases: list, truth: list[bool | None], most: int) -> tuple[list, list[bool]]:
    """At most so many cases of known truth, half of them right if they suffice: (cases, truth)"""
    right = [c for c, t in zip(cases, truth) if t][: most // 2]
    wrong = [c for c, t in zip(cases, truth) if t is not None and not t][: most // 2]
    return right + wrong, [True] * len(right) + [False] * len(wrong)


def unsound(question: Question, bank: list[str]) -> Question | None:
    """The same question with a constraint of the bank put in that clashes with another of its own.

    None if nothing in the bank clashes.
    """
    for i, kept in enumerate(question.constraints):
        rule = recognise(kept)
        bad = [c for c in bank if rule and recognise(c) and contradiction([rule, recognise(c)])]
        if bad:
            mine, j = list(question.constraints), (i + 1) % len(question.constraints)
            mine[j] = bad[0]
            return Question(question.seed, question.kind, tuple(mine))
    return None


# ------------------------------------------------------------ rewards
def extract_answer(text: str, think: bool) -> str:
    """The part of a completion that is judged.

    With `think` it must be SEIF's format, whole: "<think>a</think><answer> b</answer>" -> "b".
    An answer in any other form counts as empty.
    """
    if not think:
        # Some templates open a thought of the model's own.
        return text.rpartition("</think>")[2].strip()
    form = r"\s*<think>(.*?)</think>\s*<answer>(.*)</answer>\s*"
    match = re.fullmatch(form, text, re.DOTALL)
    if not match or re.search(r"</?(think|answer)>", match[1] + match[2]):
        return ""
    return match[2].strip()


def echoes(question: Question, answer: str) -> bool:
    """Whether an answer only gives the instruction back, or its lines, with next to nothing new."""
    whole, plain = _plain(question.instruction), _plain(answer)
    given = {"", whole, *map(_plain, question.instruction.split("\n"))}
    if all(_plain(line) in given for line in answer.split("\n")):
        return True
    return whole in plain and len(plain.replace(whole, "").split()) < 3


def satisfaction(verdicts: list[Verdict]) -> float | None:
    """r: the mean of the verdicts there are; None if all are missing."""
    values = [v.value for v in verdicts if v.value is not None]
    return sum(values) / len(values) if values else None


def follower_reward(question: Question, answer: str, ended: bool, verdicts: list) -> float | None:
    """r; 0 for an answer that is empty, cut off at the limit, or an echo of the instruction."""
    if not answer or not ended or echoes(question, answer):
        return 0.0
    return satisfaction(verdicts)


def instructor_reward(r: float, shape: str) -> float:
    """From the share r of its constraints that the frozen Follower's own answer satisfies.

    "hardest" is the paper's 1 - r; "frontier" is 4 r (1 - r), most where half of them succeed.
    """
    return 1 - r if shape == "hardest" else 4 * r * (1 - r)
