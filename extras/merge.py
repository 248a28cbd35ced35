"""merge.py: `python seif.py merge RUN`, base model and Follower as one Hugging Face folder.

The update is added to the unquantised weights: added to 4-bit ones it would drown in rounding.
"""

import argparse
import dataclasses
import shlex
from pathlib import Path

import torch

from extras import data, smollm2
from extras.load_model import DTYPES, load_model


def main(argv: list[str], open_run) -> None:
    """Write base model + scale * B A, the tokenizer and a model card."""
    parser = argparse.ArgumentParser("seif.py merge", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", help="new folder; default: RUN/turn<T>/merged")
    parser.add_argument("--turn", type=int, default=0, help="the Follower's turn; 0: the last")
    args = parser.parse_args(argv)
    cfg, policy, turn = open_run(args.run, args.turn)
    out = Path(args.out or f"{args.run}/turn{turn}/merged")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise data.InputError(f"--out {out}: exists; give a new folder")
    path = smollm2.model_path(cfg.model)
    base, tokenizer = load_model(path, 16, torch.device("cpu"), DTYPES[cfg.dtype])
    with torch.no_grad():
        for name, layer in policy.lora.items():
            weight = base.get_submodule(name).weight
            A, B = layer.A["follower"].cpu(), layer.B["follower"].cpu()
            # In fp32, so that a small update is rounded once.
            weight.copy_(weight.float() + layer.scale["follower"] * (B @ A))
    base.save_pretrained(out)
    tokenizer.save_pretrained(out)
    data.write_atomic(out / "README.md", model_card(cfg, args.run, turn).encode())
    print(f"written: {out}")


def model_card(cfg, run: str, turn: int) -> str:
    """README.md of a merged model: base, command, held-out figures, licence."""
    rows = [row for _, row in data.read_jsonl(f"{run}/log.jsonl")]
    end = next(row for row in rows if row["stage"] == "evaluation" and row["turn"] == turn)
    command = f"python seif.py --model={shlex.quote(cfg.model)}"
    for field in dataclasses.fields(cfg):
        name, value = field.name.replace("_", "-"), getattr(cfg, field.name)
        if value != field.default and field.name != "model":
            command += f" --{name}" if value is True else f" --{name}={shlex.quote(str(value))}"
    lines = [f"# {cfg.model} after {turn} turns of SEIF (arXiv 2605.07465)", ""]
    lines += [f"LoRA merged into {cfg.model}. The base model's licence applies. Trained by:", ""]
    lines += [f"    {command}", "", "| held-out rows | base model | this model |", "|---|---|---|"]
    for key, value in end["heldout_follower"].items():
        cells = (v if v is None else round(v, 3) for v in (end["heldout_base"][key], value))
        lines.append("| {} | {} | {} |".format(key, *cells))
    return "\n".join(lines) + "\n"
