"""calibration.py: is a model better than chance as a judge? Tested where the truth is known."""

import math
from dataclasses import dataclass, replace

from extras.constraint_parser import parse_constraint
from extras.verifiers import find_contradiction
from prompts import Question, extract_answer

# The model is reliable as a judge if the lower end of its AUC's 95 % interval is above this.
MIN_AUC = 0.6
# At least so many positive and so many negative cases.
MIN_CASES = 10


@dataclass(frozen=True)
class Calibration:
    """How well P(yes) separates positive from negative cases.

    auc: P(a positive case has the higher P(yes)), with its 95 % interval. threshold: the P(yes) of
    the best balanced accuracy, 0.5 if the model is not reliable. cases: those with a verdict.
    """

    auc: float
    low: float
    high: float
    threshold: float
    cases: int

    @property
    def reliable(self) -> bool:
        """Whether it is significantly better than chance."""
        return self.low > MIN_AUC


# Before a calibration the settings alone decide: low = 1 counts as reliable.
UNCALIBRATED = Calibration(auc=math.nan, low=1.0, high=1.0, threshold=0.5, cases=0)


def auc_calibration(ps: list[float], truth: list[bool]) -> Calibration:
    """AUC with Hanley and McNeil's interval (1982). With too few cases auc is NaN, not reliable."""
    known = [(p, t) for p, t in zip(ps, truth) if not math.isnan(p)]
    positive = [p for p, t in known if t]
    negative = [p for p, t in known if not t]
    n, m = len(positive), len(negative)
    if min(n, m) < MIN_CASES:
        return Calibration(math.nan, 0.0, 1.0, 0.5, len(known))
    auc = sum((p > q) + 0.5 * (p == q) for p in positive for q in negative) / (n * m)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (m - 1) * (q2 - auc**2)
    margin = 1.96 * math.sqrt(variance / (n * m))

    def balanced_accuracy(cut: float) -> float:
        """Twice the balanced accuracy of P(yes) >= cut."""
        return sum(p >= cut for p in positive) / n + sum(p < cut for p in negative) / m

    best = max(sorted({p for p, _ in known}), key=balanced_accuracy)
    result = Calibration(auc, max(0.0, auc - margin), min(1.0, auc + margin), best, n + m)
    return result if result.reliable else replace(result, threshold=0.5)


def judger_cases(samples: list, think: bool, verify, max_cases: int) -> list[tuple]:
    """(question, k, answer, truth) per constraint with a verifier, half satisfied, half not."""
    cases = []
    for s in samples:
        answer = extract_answer(s.text, think) or s.text
        for k in range(len(s.question.constraints) if answer else 0):
            cases.append((s.question, k, answer, verify(s.question, k, answer)))
    half = max_cases // 2
    return [c for c in cases if c[3]][:half] + [c for c in cases if c[3] is False][:half]


def contradictory(questions: list[Question]) -> list[Question]:
    """Those that can be given a contradiction from the constraints of the others."""
    pool = [c for q in questions for c in q.constraints]
    return [spoilt for q in questions if (spoilt := with_contradiction(q, pool))]


def with_contradiction(question: Question, pool: list[str]) -> Question | None:
    """The question with one constraint replaced by a contradiction from the pool, if it has one."""
    for i, constraint in enumerate(question.constraints):
        kept = parse_constraint(constraint)
        for other in pool:
            clash = parse_constraint(other)
            if kept and clash and find_contradiction([kept, clash]):
                constraints = list(question.constraints)
                constraints[(i + 1) % len(constraints)] = other
                return replace(question, constraints=tuple(constraints))
    return None
