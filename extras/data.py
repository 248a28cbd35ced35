"""data.py: files in, files out. JSON lines, seed questions, the questions of q_T, evaluation rows.

Every reader raises InputError for a file that it cannot use. Parquet needs pandas.
"""

import csv
import io
import json
import os
import re
from pathlib import Path

from extras.verifiers import VERIFIERS, validate_kwargs
from prompts import NUM_CONSTRAINTS, Question

# Columns, or JSON keys, of a seed question. The first that holds a text counts.
SEED_COLUMNS = ("seed_question", "prompt", "question")
SEED_HINT = 'needs a text under "seed_question", "prompt" or "question"'
# A CSV header with one of these columns, and the delimiter before or after it.
_NAME = rf'[" ]*(?:{"|".join(SEED_COLUMNS)})[" ]*'
CSV_HEADER = re.compile(rf"(?:^|([,;\t|])){_NAME}(?:$|([,;\t|]))", re.IGNORECASE)


class InputError(ValueError):
    """A user error. The message names the file, the line and the fix."""


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file without its byte order mark. InputError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); give a UTF-8 file") from error


def read_jsonl(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, object) of every non-empty line. InputError for a line that is no object."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            # Lone surrogates, which no tokenizer accepts, become U+FFFD.
            text = json.dumps(json.loads(line), ensure_ascii=False)
            row = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: must be a JSON object, not {line[:40]!r}")
        rows.append((number, row))
    return rows


def to_jsonl(rows: list[dict]) -> str:
    """One JSON object per line. NaN and infinity, which JSON does not have, become null."""
    finite = [json.loads(json.dumps(row), parse_constant=lambda _: None) for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finite)


def append_text(path: str | Path, text: str) -> None:
    """Append to a file. The text is on the disk when this returns."""
    _write(path, "ab", text.encode())


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write to path + ".part", then rename: no crash leaves half a file under `path`."""
    _write(f"{path}.part", "wb", data)
    os.replace(f"{path}.part", path)


def _write(path: str | Path, mode: str, data: bytes) -> None:
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_seed_questions(path: str | Path) -> list[str]:
    """The distinct seed questions of a file, in order. InputError if there is none.

    .csv, .tsv (delimiter , ; | or tab) and .parquet are tables. Other files are JSON lines, or text
    with one question per line.
    """
    seed_questions = []
    for place, row in _seed_rows(Path(path)):
        texts = [row.get(column) for column in SEED_COLUMNS]
        text = next((t for t in texts if isinstance(t, str) and t.strip()), None)
        if text is None:
            raise InputError(f"{path}, {place}: {SEED_HINT}")
        seed_questions.append(text.strip())
    if not seed_questions:
        raise InputError(f"{path}: no seed questions in it; give at least one")
    return list(dict.fromkeys(seed_questions))


def _seed_rows(path: Path) -> list[tuple[str, dict]]:
    """("line 3", row) per row of any format."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    text = read_text(path)
    lines = text.split("\n")
    header = CSV_HEADER.search(lines[0])
    if suffix in (".csv", ".tsv"):
        if not header:
            raise InputError(f"{path}, line 1: no header; {SEED_HINT}, or the ending .txt")
        # A table of one column has no delimiter. Its texts may contain any.
        return _csv_rows(path, text, header[1] or header[2] or "\x1f")
    if header:
        raise InputError(f"{path}, line 1: a CSV header; name the file .csv, or delete line 1")
    if re.match(r"\s*\[\s*\{", text):
        raise InputError(f"{path}, line 1: a JSON array; give JSON lines, one object per line")
    if any(line.lstrip().startswith("{") for line in lines):
        return [(f"line {number}", row) for number, row in read_jsonl(path)]
    return [(f"line {i}", {"prompt": line}) for i, line in enumerate(lines, 1) if line.strip()]


def _parquet_rows(path: Path) -> list[tuple[str, dict]]:
    try:
        import pandas

        rows = pandas.read_parquet(path).to_dict("records")
    except ImportError as error:
        raise InputError(f"{path}: needs pip install pandas pyarrow ({error})") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a .parquet file ({error})") from error
    rows = [{str(name).strip().lower(): value for name, value in row.items()} for row in rows]
    return [(f"row {i}", row) for i, row in enumerate(rows, 1)]


def _csv_rows(path: Path, text: str, delimiter: str) -> list[tuple[str, dict]]:
    csv.field_size_limit(len(text) + 1)
    # Strict: an unclosed quote would otherwise join all that follows to one text.
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows = []
    try:
        columns = [name.strip().lower() for name in next(reader)]
        for cells in reader:
            place = f"line {reader.line_num}"
            if len(cells) > len(columns):
                reason = f"{len(cells)} cells under {len(columns)} columns"
                raise InputError(f"{path}, {place}: {reason}; quote texts with {delimiter!r}")
            if "".join(cells).strip():
                rows.append((place, dict(zip(columns, cells))))
    except csv.Error as error:
        place = f"{path}, line {reader.line_num}"
        raise InputError(f"{place}: not CSV ({error}); close quotes, double inner ones") from error
    return rows


def read_questions(path: str | Path, count: int | None = None) -> list[Question]:
    """Lines {"seed_question", "kind", "constraints", optional "verifiers"} -> Questions.

    verifiers: per constraint [id, kwargs] or null. count: the number of lines there must be.
    InputError for any other line or number of lines.
    """
    questions = []
    for number, row in read_jsonl(path):
        place = f"{path}, line {number}"
        seed_question, kind = row.get("seed_question"), row.get("kind")
        constraints, verifiers = row.get("constraints"), row.get("verifiers") or []
        texts = [seed_question, *constraints] if isinstance(constraints, list) else [None]
        if kind not in list(NUM_CONSTRAINTS) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{place}: needs seed_question, kind (hard, soft) and constraints")
        if not isinstance(verifiers, list) or len(verifiers) not in (0, len(constraints)):
            raise InputError(f"{place}: verifiers must list [id, kwargs] or null per constraint")
        for verifier in verifiers:
            if verifier is not None:
                _check_verifier(place, verifier)
        pairs = tuple(verifier and tuple(verifier) for verifier in verifiers)
        questions.append(Question(seed_question, kind, tuple(constraints), pairs))
    if count not in (None, len(questions)):
        raise InputError(f"{path}: {len(questions)} lines, not {count}; restore the whole file")
    return questions


def _check_verifier(place: str, verifier) -> None:
    if not isinstance(verifier, list) or [type(part) for part in verifier] != [str, dict]:
        raise InputError(f"{place}: {verifier!r:.40} is not a verifier's id with an object, kwargs")
    if error := validate_kwargs(*verifier):
        raise InputError(f"{place}: {verifier[0]}: {error}")


def read_eval_rows(path: str | Path, known=()) -> list[dict]:
    """Rows {"prompt", "instruction_id_list", "kwargs", optional "seed_question"}, as in IFEval.

    InputError names the line. Ids without a verifier are no error: one printed line counts them,
    but for those in `known`.
    """
    rows, unknown = [], {}
    for number, row in read_jsonl(path):
        place = f"{path}, line {number}"
        # "seed" is an older name of this key.
        row["seed_question"] = row.get("seed_question", row.pop("seed", None))
        ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(row.get("prompt"), str) or not isinstance(ids, list):
            raise InputError(f"{place}: needs prompt, instruction_id_list and kwargs")
        if not isinstance(row["seed_question"], (str, type(None))):
            raise InputError(f"{place}: seed_question must be a text, or left out")
        if not isinstance(kwargs, list) or len(ids) != len(kwargs):
            raise InputError(f"{place}: kwargs must list one object per id")
        row["kwargs"] = [{} if given is None else given for given in kwargs]
        for id, given in zip(ids, row["kwargs"]):
            if isinstance(id, str) and id in known:
                continue
            if isinstance(id, str) and id not in VERIFIERS:
                unknown.setdefault(id, set()).add(number)
            else:
                _check_verifier(place, [id, given])
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows in it; give at least one")
    if unknown:
        count = len(set.union(*unknown.values()))
        first = ", ".join(list(unknown)[:3])
        print(f"{path}: {count} rows have ids without a verifier, undecided: {first}")
    return rows
