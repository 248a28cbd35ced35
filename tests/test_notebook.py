"""extras/seif.ipynb: its code cells on a tiny model, with commands of the shell as calls."""

import json
import re
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny

import seif

ROOT = Path(seif.__file__).parent
CELLS = [
    "".join(cell["source"])
    for cell in json.loads((ROOT / "extras/seif.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]


def test_the_code_cells_of_the_notebook_train_and_show_the_run(setup, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    # The folder takes the place of a clone.
    (tmp_path / "seif.py").touch()
    monkeypatch.chdir(tmp_path)
    display = types.SimpleNamespace(Image=Mock())
    # matplotlib asks for the version.
    package = types.SimpleNamespace(display=display, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    commands, printed = [], []

    def shell(line: str) -> None:
        """Flags of the tiny run come last, so they win over --quick."""
        commands.append(words := line.split())
        if words[:2] == ["python", "seif.py"]:
            more = tiny.flags(tmp_path, "runs/notebook", turns=1) if "--quick" in words else []
            assert seif.main(words[2:] + more) == 0

    names = {"shell": shell, "print": printed.append}
    for cell in CELLS:
        exec(re.sub(r"^( *)!(.*)$", r"\1shell(r'''\2''')", cell, flags=re.M), names)
    assert commands[0] == "pip install -q -r requirements.txt matplotlib".split()
    assert [line.split()[0] for line in printed[-1].splitlines()] == ["turn", "base", "1"]
    display.Image.assert_called_once_with("runs/notebook/plot.png")
    assert Path("runs/notebook/plot.png").read_bytes().startswith(b"\x89PNG")
