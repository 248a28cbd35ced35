"""A whole run on a tiny random model.

A random model never writes JSON: its proposals are read as three constraints that its text picks
at random. All else, sampling, judging, rewards, updates, files, is the real thing.
"""

import functools
import os
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import judge
import prompts
import seif
from extras import data, run

# fmt: off
# For conftest.make_model: small enough for seconds; several EOS ids, so that random answers do end.
MODEL = {
    "eos": [258, *range(40)], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}
POOL = [
    "Your answer must not contain any commas.", "Your answer must have at most 5 words.",
    "Your answer must be in all lowercase letters.",
    "Your answer must use the letter 'a' at least 2 times.",
    "Your answer must use the letter 'e' at most 1 time.",
    "Your answer must be wrapped in double quotation marks.",
]
HELDOUT = [
    {"key": 1, "seed_question": "Say hi.", "prompt": "Say hi.\nUse no commas.",
     "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "seed_question": "Say ho.", "prompt": "Say ho.\nUse at least 2 words in JSON.",
     "instruction_id_list": ["length_constraints:number_words", "detectable_format:json_format"],
     "kwargs": [{"num_words": 2, "relation": "at least"}, {}]},
]
# fmt: on
FLAGS = """
    --bits 16 --turns 2 --prompts-per-step 2 --group-size 4 --instructor-steps 2,1
    --follower-steps 2 --hard-fraction 1.0 --filter rules --min-words 0 --temperature 1.0
    --kl-coef 0.01 --max-new-tokens 12 --max-proposal-tokens 8 --max-prompt-tokens 2000
    --lr 1e-2 --num-minibatches 2 --no-think
"""
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
ONE_STEP = {"turns": 1, "instructor_steps": "1", "follower_steps": "1"}


def parse(text: str, count: int) -> tuple[list[str], str]:
    draw = random.Random(text)
    return ([], "no json") if draw.random() < 0.2 else (draw.sample(POOL, count), "")


def simplify(patch) -> None:
    """patch: setattr. Proposals parse. No few-shot examples: they would be thousands of bytes."""
    patch(judge, "parse_proposal", parse)
    for module in (prompts, run):
        patch(module, "FEW_SHOT", 0)


def flags(folder: Path, out: str, **more) -> list[str]:
    settings = {"out": folder / out, "model": folder / "model"}
    settings |= {"seed_questions": folder / "seeds.txt", "heldout": folder / "heldout.jsonl"}
    words = FLAGS.split()
    for name, value in (settings | more).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def run_command(capsys, argv: list) -> str:
    """What a command prints, or the one line on stderr that it fails with."""
    capsys.readouterr()
    status = seif.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    if status == 0:
        return out
    lines = [line for line in err.splitlines() if line.startswith("seif: ")]
    assert status in (1, 2) and len(lines) == 1, err
    return lines[0]


def rows_of(path: Path, stage: str = "") -> list[dict]:
    """The rows of a file of JSON lines, or a log's rows of one stage."""
    return [row for _, row in data.read_jsonl(path) if stage in ("", row.get("stage"))]


def adapters(folder: Path) -> dict:
    """All that a run has trained: file and name -> tensor."""
    files = sorted(folder.glob("turn*/*/adapter_model.safetensors"))
    return {f"{f.relative_to(folder)}/{name}": t for f in files for name, t in load_file(f).items()}


def main(argv: list[str], stderr: str) -> None:
    """A run as a process's whole life. stderr: a file for what it says there."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    simplify(setattr)
    # Kills fall into stages that are saved by half, too.
    run.SAVE_SECONDS = 0.1
    sys.exit(seif.main(argv))
