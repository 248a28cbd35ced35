"""messages.py: questions and files that are read, what the four roles are told, and the JSON that
the Instructor says.

A role's prompt is a list of chat messages; a last one of the assistant's is the beginning of its
answer. The wording is in the .txt files beside this one.
"""

import csv
import hashlib
import io
import json
import math
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from prompts.constraints import MAX_CONSTRAINT_CHARS

PROMPTS = Path(__file__).parent
# Constraints asked for, as in SEIF: machine-checkable ones, open ones.
KINDS = {"hard": 3, "soft": 5}
# A proposal is looked for in so many characters of a text.
MAX_PROPOSAL_CHARS = 20_000
# Where a row's seed stands, the first that it has; what may part a CSV file's columns, the first
# for a file of one.
SEED_COLUMNS, DELIMITERS = ("seed_question", "prompt", "question"), ("\x1f", ",", ";", "\t")


class InputError(ValueError):
    """Something the user can mend; the text names the file, the line and the mend."""


# ------------------------------------------------------------ questions, files
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


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text, without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({why}); give a UTF-8 file") from error


def read_jsonl(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, object) of every non-empty line; the first line that is none is an error."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object is needed, not {line[:40]!r}")
        rows.append((number, whole_text(row)))
    return rows


def first_units(path: Path, count: int) -> bytes:
    """The first `count` lines of a run's log; InputError where there are fewer, or damaged ones."""
    lines = path.read_bytes().splitlines(keepends=True)[:count] if path.exists() else []
    try:
        sound = all({"turn", "stage", "step"} <= json.loads(line).keys() for line in lines)
    except (ValueError, AttributeError):
        sound = False
    if len(lines) < count or not sound:
        mend = "put the whole file back, or take out state.pt to begin again"
        raise InputError(f"{path}: shorter than when the state was saved, or damaged; {mend}")
    return b"".join(lines)


def digest(seeds: list[str], adapter: str) -> str:
    """Of what a run begins with: its seeds, and the folder of the adapter that it starts from."""
    weights = Path(adapter, "adapter_model.safetensors")
    start = weights.read_bytes() if adapter and weights.exists() else b""
    return hashlib.sha256("\n".join(seeds).encode() + start).hexdigest()


def whole_text(value):
    """JSON with lone surrogates, which no tokenizer takes, replaced: "\\ud83d" -> "\\ufffd"."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def json_lines(rows: list[dict]) -> str:
    """One JSON object a line. What is no number is null: NaN is not JSON."""
    return "".join(json.dumps(_numbers(row), ensure_ascii=False) + "\n" for row in rows)


def _numbers(value):
    if isinstance(value, dict):
        return {key: _numbers(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_text(path: Path, text: str) -> None:
    """Add to a file, on the disk before whatever counts on it is written."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write beside it, then rename: a reader, or a power cut, never sees half a file."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_questions(path: str | Path, count: int | None = None) -> list[Question]:
    """Lines {"seed", "kind", "constraints"} -> questions; the line that is not so is an error.

    So are fewer lines, or more, than the `count` that were written.
    """
    questions = []
    for number, row in read_jsonl(path):
        seed, kind, constraints = (row.get(key) for key in ("seed", "kind", "constraints"))
        listed = isinstance(constraints, list) and all(isinstance(c, str) for c in constraints)
        if not isinstance(seed, str) or kind not in list(KINDS) or not listed:
            needs = "seed, kind (hard or soft) and constraints, a list of texts"
            raise InputError(f"{path}, line {number}: needs {needs}")
        questions.append(Question(seed, kind, tuple(constraints)))
    if count not in (None, len(questions)):
        found = f"{len(questions)} questions where {count} were written"
        raise InputError(f"{path}: {found}; put the whole file back")
    return questions


def read_seeds(path: str | Path) -> list[str]:
    """Seed questions, by content: JSON lines, CSV with a header, parquet, or text, one a line.

    CSV's columns may be parted by commas, semicolons or tabs.
    A row's seed is its "seed_question", else its "prompt" or "question".
    """
    seeds = []
    for number, row in _seed_rows(Path(path)):
        texts = [row.get(key) for key in SEED_COLUMNS]
        text = next((t for t in texts if isinstance(t, str) and t.strip()), None)
        if text is None:
            needs = 'a text under "prompt", "question" or "seed_question"'
            raise InputError(f"{path}, line {number}: needs {needs}")
        seeds.append(text.strip())
    if not seeds:
        raise InputError(f"{path}: no seed questions in it; give at least one")
    return list(dict.fromkeys(seeds))


def _seed_rows(path: Path) -> list[tuple[int, dict]]:
    if path.is_file() and path.open("rb").read(4) == b"PAR1":
        return _parquet_rows(path)
    text = read_text(path)
    lines = text.split("\n")
    if re.match(r"\s*\[\s*\{", text):
        raise InputError(f"{path}, line 1: a JSON array; give JSON lines, an object a line")
    if any(line.lstrip().startswith("{") for line in lines):
        return read_jsonl(path)
    csv.field_size_limit(len(text) + 1)
    for comma in DELIMITERS:
        if rows := _csv_rows(path, text, comma):
            return rows
    if path.suffix.lower() in (".csv", ".tsv"):
        needs = 'a column "prompt", "question" or "seed_question", or another ending for plain text'
        raise InputError(f"{path}, line 1: needs {needs}")
    return [(i, {"prompt": line}) for i, line in enumerate(lines, 1) if line.strip()]


def _csv_rows(path: Path, text: str, comma: str) -> list[tuple[int, dict]]:
    """(line number, row) of every row; none where no column of this delimiter holds a seed."""
    header = next(csv.reader(io.StringIO(text), delimiter=comma), [])
    columns, table = [name.strip().lower() for name in header], []
    if not set(SEED_COLUMNS) & set(columns):
        return []
    # Strict: a quote that is opened and not closed would else join what follows to one text.
    rows = csv.reader(io.StringIO(text), delimiter=comma, strict=True)
    try:
        next(rows)
        for row in rows:
            if len(row) > len(columns):
                extra = f"{len(row)} cells under {len(columns)} columns"
                raise InputError(
                    f"{path}, line {rows.line_num}: {extra}; quote texts with {comma!r}"
                )
            if row:
                table.append((rows.line_num, dict(zip(columns, row))))
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not CSV ({error})") from error
    return table


def _parquet_rows(path: Path) -> list[tuple[int, dict]]:
    try:
        import pandas

        rows = pandas.read_parquet(path).to_dict("records")
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pip install pandas pyarrow ({error})") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({error})") from error
    return list(enumerate(rows, 1))


# ------------------------------------------------------------ what the roles are told
@cache
def prompt_text(name: str) -> str:
    """prompts/<name>.txt."""
    return read_text(PROMPTS / f"{name}.txt").strip()


@cache
def instructor_examples(kind: str) -> list[Question]:
    """The worked examples that show an Instructor what is wanted."""
    return [q for q in read_questions(PROMPTS / "instructor_examples.jsonl") if q.kind == kind]


def _say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# The Instructor's answer is begun for it: a small model would else answer the question.
OPENING = {"hard": '{"c1": "Your answer must', "soft": '{"c1": "'}


def instructor_prompt(seed: str, kind: str, examples: list[Question]) -> list[dict]:
    """A system line, worked examples as chat turns, the seed, and the answer's beginning."""
    ask = "Write {} constraints on how to answer this question, as JSON.\nQuestion: {}"
    messages = [_say("system", prompt_text(f"instructor_{kind}"))]
    for example in examples:
        proposal = {f"c{i}": c for i, c in enumerate(example.constraints, 1)}
        messages.append(_say("user", ask.format(KINDS[kind], example.seed)))
        messages.append(_say("assistant", json.dumps(proposal, ensure_ascii=False)))
    seed_turn = _say("user", ask.format(KINDS[kind], seed))
    return [*messages, seed_turn, _say("assistant", OPENING[kind])]


def instructor_prompts(seeds: list[str], kinds: list[str], cfg, salt: float) -> list[list[dict]]:
    """One for each seed, with examples drawn anew for every batch.

    So a batch's prompts share their beginning, and q_T shows many sorts.
    """
    prompts = []
    for i, (seed, kind) in enumerate(zip(seeds, kinds)):
        draw, bank = random.Random(f"{salt}/{i // cfg.batch}"), instructor_examples(kind)
        prompts.append(instructor_prompt(seed, kind, draw.sample(bank, cfg.shots)))
    return prompts


def follower_prompt(instruction: str, think: bool) -> list[dict]:
    """The same in training, evaluation and chat. With `think` its opening is given."""
    user = _say("user", instruction)
    if not think:
        return [user]
    return [_say("system", prompt_text("think")), user, _say("assistant", "<think>")]


def filter_prompt(question: Question) -> list[dict]:
    """Fixed text first, so that all instructions of a batch share it."""
    constraints = "\n".join(question.constraints)
    asked = f"{prompt_text('filter')}\n\nQuestion:\n{question.seed}\n\nConstraints:\n{constraints}"
    return [_say("user", f"{asked}\n\nCan all of them be met together? Answer yes or no.")]


def judger_prompt(question: Question, answer: str, constraint: str) -> list[dict]:
    """Template, instruction, answer, constraint: what many verdicts share comes first."""
    asked = (
        f"{prompt_text('judger')}\n\n[INSTRUCTION]\n{question.instruction}\n[END OF INSTRUCTION]\n"
        f"\n[ANSWER]\n{answer}\n[END OF ANSWER]\n\nConstraint to check: {constraint}\n"
        "Does the answer satisfy this one constraint? Reply yes or no."
    )
    return [_say("user", asked)]


def longest(cfg, encode: Callable, asked: bool) -> dict[str, int]:
    """Tokens that each role may come to read and write, the Judger if it is `asked` at all.

    encode: messages -> ids
    """
    follower = cfg.max_prompt_tokens + cfg.max_new_tokens
    most = {"Follower": follower, "Instructor": 0}
    for kind in KINDS:
        by_size = sorted(instructor_examples(kind), key=lambda q: len(q.instruction))
        shown = by_size[len(by_size) - cfg.shots :]
        given = len(encode(instructor_prompt("", kind, shown))) + cfg.max_prompt_tokens * 3 // 4
        most["Instructor"] = max(most["Instructor"], given + cfg.instructor_tokens)
    if asked:
        # A character is a token at the most, or nearly.
        blank = judger_prompt(Question("", "hard", ()), "", "")
        most["Judger"] = follower + len(encode(blank)) + MAX_CONSTRAINT_CHARS
    return most


def context_of(config) -> float:
    """The tokens that a model of this `config` can tell apart by their places."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    context = getattr(config, "max_position_embeddings", math.inf)
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond it a token's place depends on how long its row will be.
        context = rope.get("original_max_position_embeddings", context)
    return context


def usable(seeds: list[str], cfg, encode: Callable) -> list[str]:
    """The seeds that leave a quarter of their limit; InputError if none does."""
    prompts = [encode(follower_prompt(seed, cfg.think)) for seed in seeds]
    kept = [s for s, p in zip(seeds, prompts) if len(p) <= cfg.max_prompt_tokens * 3 // 4]
    if not kept:
        raise InputError(f"{cfg.seeds}: all {len(seeds)} too long; raise --max-prompt-tokens")
    return kept


def check_limits(cfg, encode: Callable, asked: bool, config) -> None:
    """InputError where a role may need more tokens than the model of this `config` has places."""
    context = context_of(config)
    for role, most in longest(cfg, encode, asked).items():
        if most > context:
            mend = "lower --max-prompt-tokens, --max-new-tokens or --shots"
            needs = f"{role} may need {most} tokens of context, {cfg.model} has {context}"
            raise InputError(f"the {needs}; {mend}")


# ------------------------------------------------------------ what the Instructor says
def parse_constraints(text: str, count: int) -> tuple[list[str], str]:
    """A proposal, bare, fenced or amid chatter -> (constraints, "") or ([], reason).

    'Sure! {"c1": "Use no commas.", "c2": "Be kind."}', 2 -> (["Use no commas.", "Be kind."], "")
    Reasons: "no json", "wrong keys" (they must be c1 to c<count>), "not text".
    """
    text, decoder = text[:MAX_PROPOSAL_CHARS], json.JSONDecoder(object_pairs_hook=_unique)
    for brace in list(re.finditer("{", text))[:20]:
        try:
            proposal, _ = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        if list(proposal) != [f"c{i}" for i in range(1, count + 1)]:
            return [], "wrong keys"
        values = list(proposal.values())
        if not all(isinstance(c, str) and c.strip() and c == whole_text(c) for c in values):
            return [], "not text"
        return [" ".join(c.split()) for c in values], ""
    values = _unescaped(text, count)
    return (values, "") if values else ([], "no json")


def _unique(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _unescaped(text: str, count: int) -> list[str]:
    """Small models write "quotes" inside a value unescaped; the keys tell what they mean."""
    openings = [r'\{\s*"c1"\s*:\s*"']
    openings += [rf'"\s*,\s*"c{i}"\s*:\s*"' for i in range(2, count + 1)] + [r'"\s*\}']
    at, values = 0, []
    for opening in openings:
        mark = re.compile(opening).search(text, at)
        if not mark:
            return []
        values.append(" ".join(text[at : mark.start()].split()))
        at = mark.end()
    # What stands before the first key is no value, and no value holds another key or value.
    values = values[1:]
    clean = all(v and not re.search(r'"\s*[:,]\s*"|[{}]', v) for v in values)
    return values if clean else []
