"""judge.py: the Filter, the Judger and the two rewards. Text only, no torch.

    Judge.accept      proposals -> questions, or the reason why one is rejected
    Judge.score       answers -> one verdict per constraint
    Judge.calibrate   is the model better than chance as Judger and as Filter?
    instructor_rewards, follower_rewards

A constraint with a verifier is decided by code (extras/verifiers.py). The rest goes to `ask`, a
function from lists of chat messages to P(yes), by default the snapshot Follower. A verdict is 1.0,
0.0 or None. None is missing and never counts as no.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from extras.calibration import UNCALIBRATED, auc_calibration, contradictory, judger_cases
from extras.constraint_parser import MAX_CONSTRAINT_CHARS, parse_constraint
from extras.verifiers import (
    VERIFIERS,
    allowed_count,
    category,
    check,
    estimate_words,
    find_contradiction,
    is_decidable,
    normalize,
    repeats_itself,
)
from prompts import (
    NUM_CONSTRAINTS,
    Question,
    extract_answer,
    filter_messages,
    judge_messages,
    parse_proposal,
)

# With the penalty "length" the reward of shorter answers is lower in proportion.
MIN_ANSWER_WORDS = 20
# Largest share of q_T's questions with an upper bound of length, which teach brief answers.
MAX_BOUNDED = 1 / 8
# A line of a seed question that looks like an option: a mark before it, or no full stop after it.
OPTION = r"(?:[-*•]|\(?\w{1,2}[.):])\s.*|.*[^.?!:]"
# A yes-or-no question: "My answer is yes." is a whole answer to it.
YES_NO = r"(?:^|[.!]\s+)(?:is|are|was|were|do|does|did|ha[sd]|have|can|[cws]h?ould|will)\b.*\?"
# English words per token, to reject "at least 500 words" under a limit of 128 tokens.
WORDS_PER_TOKEN = 0.75
Ask = Callable[[list[list[dict]]], list[float]]


# ------------------------------------------------------------ the Filter
def parsed_constraints(question: Question) -> list[tuple[str, dict] | None]:
    """(verifier id, kwargs) per constraint, None where only a model can decide."""
    given = question.verifiers or [None] * len(question.constraints)
    return [v or parse_constraint(c) for v, c in zip(given, question.constraints)]


def rule_filter(question: Question, max_new_tokens: int, checkable=False, min_words=0) -> str:
    """The reason to reject an instruction that code can see, or "".

    checkable: reject hard constraints without a verifier. min_words: reject an instruction that
    allows fewer words. "At most 4 words" leaves no room for an answer.
    """
    seed = normalize(question.seed_question)
    plain = [normalize(c) for c in question.constraints]
    if len(set(plain)) < len(plain):
        return "duplicate"
    if any(len(c) > MAX_CONSTRAINT_CHARS for c in question.constraints):
        return "too long"
    if any(len(c) > 15 and (c in seed or (len(seed) > 15 and seed in c)) for c in plain):
        return "restates the seed question"
    # "Do not use the forbidden words": without a list nobody can satisfy or break it.
    adjectives = "forbidden|key|following|specific|certain"
    unnamed = rf"(?:{adjectives}) (?:key)?(?:words?|phrases?)(?!.*['\"`:\[‘’“”])"
    if any(re.search(unnamed, c.lower()) for c in question.constraints):
        return "words not named"
    parsed = parsed_constraints(question)
    if checkable and question.kind == "hard" and not all(map(is_decidable, parsed)):
        return "no verifier"
    known = [p for p in parsed if p]
    if find_contradiction(known):
        return "contradiction"
    # As in SEIF, the hard constraints of an instruction are of different categories.
    if question.kind == "hard" and len({name for name, _ in known}) < len(known):
        return "same category twice"
    fewest, most = allowed_count(known, "words")
    if fewest > max_new_tokens * WORDS_PER_TOKEN:
        return "over the token limit"
    return "no room for an answer" if most < min_words else ""


def admit_question(question: Question, counts: Counter, size: int) -> str:
    """The reason to leave a question out of q_T. If it is "", its categories are counted.

    The Follower does not learn categories that it never meets, so none may exceed twice its fair
    share of `size` questions. Two of each are always allowed: one would leave a small q_T short.
    """
    parsed = [p for p in parsed_constraints(question) if p]
    twice_fair = 2 * size * len(question.constraints) / len(VERIFIERS)
    limits = {category(id): max(2, twice_fair) for id, _ in parsed}
    if any(allowed_count(parsed, unit)[1] < math.inf for unit in ("words", "sentences")):
        limits["upper bound"] = max(1, MAX_BOUNDED * size)
    if any(counts[name] + 1 > limit for name, limit in limits.items()):
        return "too many of one category"
    counts.update(limits.keys())
    return ""


# ------------------------------------------------------------ verdicts
@dataclass(frozen=True)
class Verdict:
    """Whether an answer satisfies a constraint, and the source: "rule", "judger" or "none"."""

    value: float | None
    source: str


def rule_verdict(question: Question, k: int, answer: str) -> bool | None:
    """A verifier's verdict on constraint k. None without a verifier, or if it cannot decide."""
    parsed = parsed_constraints(question)[k]
    if not parsed:
        return None
    name, kwargs = parsed
    if name == "combination:repeat_prompt":
        kwargs = kwargs | {"prompt_to_repeat": question.seed_question}
    return check(name, kwargs, answer)


def verdicts(pairs: list, ask: Ask | None, mode="hybrid", threshold=0.5) -> list[list[Verdict]]:
    """Verdicts on every constraint of (question, answer) pairs. One call to `ask` for all.

    mode "llm": `ask` alone, as in SEIF. Else verifiers where they decide, and `ask` if given.
    """
    cases = [(q, k, a) for q, a in pairs for k in range(len(q.constraints))]
    values = [rule_verdict(q, k, a) if mode != "llm" else None for q, k, a in cases]
    found = [Verdict(None, "none") if v is None else Verdict(float(v), "rule") for v in values]
    undecided = [i for i, value in enumerate(values) if value is None] if ask else []
    if undecided:
        asked = [cases[i] for i in undecided]
        probabilities = ask([judge_messages(q, a, q.constraints[k]) for q, k, a in asked])
        for i, p in zip(undecided, probabilities):
            found[i] = Verdict(None if math.isnan(p) else float(p >= threshold), "judger")
    remaining = iter(found)
    return [[next(remaining) for _ in q.constraints] for q, _ in pairs]


def satisfaction(verdicts: list[Verdict]) -> float | None:
    """r: the mean of the known verdicts, None if there is none."""
    values = [v.value for v in verdicts if v.value is not None]
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------ the two roles together
def uses_model(cfg) -> bool:
    """Whether the settings leave any verdict to a model."""
    return cfg.hard_fraction < 1 or cfg.judge == "llm" or cfg.filter != "rules"


class Judge:
    """Filter and Judger of a run.

    cfg: filter, judge, hard_fraction, think, max_new_tokens, min_words. ask: P(yes) per list of
    messages. fits: whether a question's prompt is within the token limit.
    """

    def __init__(self, cfg, ask: Ask, fits: Callable[[Question], bool] = lambda question: True):
        self.cfg, self.ask, self.fits = cfg, ask, fits
        self.judger = self.filter = UNCALIBRATED

    @property
    def trusts_model(self) -> bool:
        """Whether the model's verdicts count: it is reliable, or the settings say so."""
        return uses_model(self.cfg) and (self.cfg.judge != "hybrid" or self.judger.reliable)

    @property
    def filter_mode(self) -> str:
        """As set, with rules in place of a model that is not reliable."""
        reliable = self.trusts_model and (self.cfg.judge != "hybrid" or self.filter.reliable)
        return self.cfg.filter if reliable or self.cfg.filter == "off" else "rules"

    def calibrate(self, samples: list, examples: list[Question], max_cases: int) -> None:
        """Test the model where a verifier knows the truth, without labels.

        samples: the model's own answers to questions with hard constraints. examples: sound
        questions. A proxy: open constraints, which have no verifier, can only be harder.
        """
        cases = judger_cases(samples, self.cfg.think, rule_verdict, max_cases)
        ps = self.ask([judge_messages(q, a, q.constraints[k]) for q, k, a, _ in cases])
        self.judger = auc_calibration(ps, [truth for *_, truth in cases])
        clashing = contradictory(examples)
        ps = self.ask([filter_messages(q) for q in examples + clashing])
        self.filter = auc_calibration(ps, [True] * len(examples) + [False] * len(clashing))

    def accept(self, proposals: list) -> list:
        """Sets .question or .rejected of the Instructor's samples. Returns the accepted ones.

        Each sample comes with a question without constraints, which tells seed and kind. Filters:
        "rules" is rule_filter() and rejects hard constraints without a verifier. "llm" is
        rule_filter(), then the model; a missing verdict accepts. "off" accepts all that parse.
        """
        mode, cfg, parsed = self.filter_mode, self.cfg, []
        for s in proposals:
            constraints, s.rejected = parse_proposal(s.text, NUM_CONSTRAINTS[s.question.kind])
            if s.rejected:
                continue
            s.question = replace(s.question, constraints=tuple(constraints))
            if not self.fits(s.question):
                s.rejected = "over --max-prompt-tokens"
            elif mode != "off":
                checkable = mode == "rules"
                s.rejected = rule_filter(s.question, cfg.max_new_tokens, checkable, cfg.min_words)
            if not s.rejected:
                parsed.append(s)
        if mode == "llm" and parsed:
            for s, p in zip(parsed, self.ask([filter_messages(s.question) for s in parsed])):
                if p < self.filter.threshold:
                    s.rejected = "rejected by the model"
        return [s for s in parsed if not s.rejected]

    def score(self, samples: list) -> None:
        """Sets .answer and .verdicts. Empty and cut-off answers get no verdict, and reward 0."""
        for s in samples:
            s.answer = extract_answer(s.text, self.cfg.think)
        complete = [s for s in samples if s.answer and s.ended]
        ask = self.ask if self.trusts_model else None
        pairs = [(s.question, s.answer) for s in complete]
        table = verdicts(pairs, ask, self.cfg.judge, self.judger.threshold)
        for s, row in zip(complete, table):
            s.verdicts = row


# ------------------------------------------------------------ rewards
def is_echo(question: Question, answer: str) -> bool:
    """Whether an answer only repeats lines of the instruction, with next to nothing new.

    Options that the seed question offers, such as "A) apple" or "apple", may be the answer.
    """
    whole, plain, answer = normalize(question.instruction), normalize(answer), answer.strip()
    options = [line.strip() for line in question.seed_question.strip().split("\n")]
    if len(options) > 1 and answer in options and re.fullmatch(OPTION, answer):
        return False
    lines = {"", whole, *map(normalize, question.instruction.split("\n"))}
    if all(normalize(line) in lines for line in answer.split("\n")):
        return True
    return whole in plain and len(plain.replace(whole, "").split()) < 3


def length_factor(question: Question, answer: str) -> float:
    """min(1, words / 20), where 20 is less if the constraints allow fewer words.

    1 where a constraint limits the sentences, or fixes the answer to a yes-or-no question.
    """
    parsed = [p for p in parsed_constraints(question) if p]
    yes_no = re.search(YES_NO, question.seed_question.lower())
    fixed = yes_no and any(category(id) == "constrained_response" for id, _ in parsed)
    if fixed or allowed_count(parsed, "sentences")[1] < math.inf:
        return 1.0
    floor = max(1, min(MIN_ANSWER_WORDS, allowed_count(parsed, "words")[1]))
    return min(1.0, estimate_words(answer) / floor)


def follower_rewards(samples: list, penalties: str) -> None:
    """Sets .reward of scored answers to r. 0 for one that is empty, cut off, or an echo.

    penalties: "length", "repetition", or both. The paper has none.
    """
    for s in samples:
        s.reward = satisfaction(s.verdicts)
        repeats = "repetition" in penalties and repeats_itself(s.answer)
        if not s.answer or not s.ended or is_echo(s.question, s.answer) or repeats:
            s.reward = 0.0
        elif "length" in penalties and s.reward is not None:
            s.reward *= length_factor(s.question, s.answer)


def instructor_rewards(proposals: list, answers: list) -> None:
    """Sets .reward to 1 - r. answers: the snapshot's, scored, to the accepted proposals in order.

    Rejected proposals get reward 0. So do those whose answer is empty or cut off: it tells nothing
    of the difficulty, and the Instructor would learn to ask for answers above the token limit.
    """
    for s in proposals:
        s.reward = 0.0
    accepted = [s for s in proposals if not s.rejected]
    for proposal, answer in zip(accepted, answers):
        if answer.verdicts:
            r = satisfaction(answer.verdicts)
            proposal.reward = None if r is None else 1 - r
