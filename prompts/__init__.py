"""Messages of the four roles, and the parsers of the Instructor's and the Follower's replies.

A role's prompt is a list of chat messages. A last message of the assistant is an assistant
prefill: the reply continues it. The wording is in the .txt files beside this one.
"""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
# Constraints per instruction, as in SEIF: verifiable ones (hard), open ones (soft).
NUM_CONSTRAINTS = {"hard": 3, "soft": 5}
# Examples in the Instructor's prompt.
FEW_SHOT = 4
# A small model would answer the question instead, so its proposal is started for it.
INSTRUCTOR_PREFILL = {"hard": '{"c1": "Your answer must', "soft": '{"c1": "'}
# Marks around a model's own thought: pattern of the start, end. \1 is the name in the start.
_NAME = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
THOUGHT_MARKS = [
    # Qwen, DeepSeek, Seed-OSS, and what their like may choose
    (rf"<({_NAME})>", r"</\1>"),
    (rf"<\|({_NAME})\|>", r"<|/\1|>"),
    # OpenThinker, Magistral, Kimi
    (rf"<\|begin_of_({_NAME})\|>", r"<|end_of_\1|>"),
    (r"\[THINK\]", "[/THINK]"),
    (r"◁think▷", "◁/think▷"),
    # Cohere, Apertus, Gemma 4
    (r"<\|START_THINKING\|>", "<|END_THINKING|>"),
    (r"<\|inner_prefix\|>", "<|inner_suffix|>"),
    (r"<\|channel>thought", "<channel|>"),
    # gpt-oss thinks in a channel "analysis" and answers in "final".
    (r"<\|channel\|>(?!final)", "<|channel|>final<|message|>"),
]
THOUGHT_START = re.compile("|".join(start for start, _ in THOUGHT_MARKS))
_ENDS = [re.escape(end).replace(r"\\1", _NAME) for _, end in THOUGHT_MARKS]
THOUGHT_END = re.compile("|".join(_ENDS))
# A proposal's JSON is searched for in so many characters.
MAX_PROPOSAL_CHARS = 20_000


@dataclass(frozen=True)
class Question:
    """A seed question and the constraints that an Instructor added to it: one row of q_T."""

    seed_question: str
    # "hard" or "soft"
    kind: str
    constraints: tuple[str, ...]
    # Optional, one per constraint: (verifier id, kwargs), or None to parse the sentence.
    verifiers: tuple[tuple[str, dict] | None, ...] = ()

    @property
    def instruction(self) -> str:
        """The Follower's user message: the seed question, then one constraint per line."""
        return self.seed_question + "\n" + "\n".join(self.constraints)


@cache
def prompt_text(name: str) -> str:
    """prompts/<name>.txt"""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip()


@cache
def few_shot_examples(kind: str) -> list[Question]:
    """The pool of examples for the Instructor's prompt."""
    lines = (FOLDER / "instructor_examples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        Question(row["seed_question"], kind, tuple(row["constraints"]))
        for row in rows
        if row["kind"] == kind
    ]


def user(text: str) -> dict:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    """An assistant message. As the last one it is a prefill."""
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    """A system message."""
    return {"role": "system", "content": text}


# ------------------------------------------------------------ the Instructor
def instructor_messages(seed_question: str, kind: str, examples: list[Question]) -> list[dict]:
    """System message, few-shot examples as chat turns, the seed question, the prefill."""
    ask = "Write {} constraints on how to answer this question, as JSON.\nQuestion: {}"
    count = NUM_CONSTRAINTS[kind]
    messages = [system(prompt_text(f"instructor_{kind}"))]
    for example in examples:
        messages.append(user(ask.format(count, example.seed_question)))
        messages.append(assistant(proposal_text(example)))
    return [*messages, user(ask.format(count, seed_question)), assistant(INSTRUCTOR_PREFILL[kind])]


def proposal_text(question: Question) -> str:
    """The JSON that an Instructor writes for a question's constraints."""
    proposal = {f"c{i}": c for i, c in enumerate(question.constraints, 1)}
    return json.dumps(proposal, ensure_ascii=False)


def example_proposals(rng: random.Random) -> list[str]:
    """The proposals of all hard few-shot examples, in random order."""
    pool = few_shot_examples("hard")
    return [proposal_text(example) for example in rng.sample(pool, len(pool))]


def instructor_prompts(seed_questions, kinds, per_draw: int, rng: random.Random):
    """Messages per seed question. So many in a row share their examples, and so their beginning.

    No example is drawn twice before the pool is used up. The pool shows every category equally
    often, and the categories of a proposal are mostly those of its examples.
    """
    pools = {kind: few_shot_examples(kind) for kind in NUM_CONSTRAINTS}
    pools = {kind: rng.sample(pool, len(pool)) for kind, pool in pools.items()}
    prompts = []
    for i, (seed_question, kind) in enumerate(zip(seed_questions, kinds)):
        start, pool = i // per_draw * FEW_SHOT, pools[kind]
        examples = [pool[j % len(pool)] for j in range(start, start + FEW_SHOT)]
        prompts.append(instructor_messages(seed_question, kind, examples))
    return prompts


def parse_proposal(text: str, count: int) -> tuple[list[str], str]:
    """The Instructor's reply -> (constraints, "") or ([], reason).

    'Sure! {"c1": "Use no commas.", "c2": "Be kind."}', 2 -> (["Use no commas.", "Be kind."], "")
    Reasons: "no json", "wrong keys" (they must be c1 to c<count>), "not text".
    """
    text = text[:MAX_PROPOSAL_CHARS]
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    for brace in list(re.finditer("{", text))[:20]:
        try:
            proposal, _ = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        if list(proposal) != [f"c{i}" for i in range(1, count + 1)]:
            return [], "wrong keys"
        values = list(proposal.values())
        if not all(isinstance(c, str) and c.strip() and _encodable(c) for c in values):
            return [], "not text"
        return [" ".join(c.split()) for c in values], ""
    values = _unescaped_values(text, count)
    return (values, "") if values else ([], "no json")


def _unique_keys(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _encodable(text: str) -> bool:
    """False for lone surrogates, which no tokenizer accepts."""
    return not re.search("[\ud800-\udfff]", text)


def _unescaped_values(text: str, count: int) -> list[str]:
    """Small models leave quotes inside a value unescaped. The keys delimit the values."""
    delimiters = [r'\{\s*"c1"\s*:\s*"']
    delimiters += [rf'"\s*,\s*"c{i}"\s*:\s*"' for i in range(2, count + 1)]
    delimiters += [r'"\s*\}']
    at, values = 0, []
    for delimiter in delimiters:
        mark = re.compile(delimiter).search(text, at)
        if not mark:
            return []
        values.append(" ".join(text[at : mark.start()].split()))
        at = mark.end()
    # The text before the first key is not a value.
    values = values[1:]
    clean = all(v and _encodable(v) and not re.search(r'"\s*[:,]\s*"|[{}]', v) for v in values)
    return values if clean else []


# ------------------------------------------------------------ the Follower
def follower_messages(instruction: str, think: bool) -> list[dict]:
    """The same in training, evaluation and chat. With `think` the reply starts with <think>."""
    if not think:
        return [user(instruction)]
    return [system(prompt_text("think")), user(instruction), assistant("<think>")]


def extract_answer(text: str, think: bool) -> str:
    """The part of a reply that is judged.

    With `think` the whole reply must have SEIF's format, else the answer is empty:
    "<think>a</think><answer> b</answer>" -> "b".
    """
    if not think:
        # A thought of the model's own. One that is not closed has no answer after it.
        text = THOUGHT_END.split(text)[-1].strip()
        return "" if THOUGHT_START.match(text) else text
    format = r"\s*<think>(.*?)</think>\s*<answer>(.*)</answer>\s*"
    match = re.fullmatch(format, text, re.DOTALL)
    if not match or re.search(r"</?(think|answer)>", match[1] + match[2]):
        return ""
    return match[2].strip()


# ------------------------------------------------------------ the Filter and the Judger
def filter_messages(question: Question) -> list[dict]:
    """Fixed text first, so that all instructions of a batch share it."""
    constraints = "\n".join(question.constraints)
    return [
        user(
            f"{prompt_text('filter')}\n\nQuestion:\n{question.seed_question}\n\n"
            f"Constraints:\n{constraints}\n\n"
            "Can all of them be met together? Answer yes or no."
        )
    ]


def judge_messages(question: Question, answer: str, constraint: str) -> list[dict]:
    """Template, instruction, answer, constraint: the parts that many verdicts share come first."""
    return [
        user(
            f"{prompt_text('judger')}\n\n"
            f"[INSTRUCTION]\n{question.instruction}\n[END OF INSTRUCTION]\n"
            f"\n[ANSWER]\n{answer}\n[END OF ANSWER]\n\nConstraint to check: {constraint}\n"
            "Does the answer satisfy this one constraint? Reply yes or no."
        )
    ]
