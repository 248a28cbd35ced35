"""What holds for the project as a whole: its parts can be taken away, and it stays small."""

import ast
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

import judge
import seif

ROOT = Path(seif.__file__).parent
SCRIPTS = ["judge.py", "rl.py", "seif.py"]
SOURCES = [ROOT / name for name in SCRIPTS]
SOURCES += sorted(ROOT.glob("extras/*.py")) + sorted(ROOT.glob("prompts/*.py"))


# ------------------------------------------------------------ what may be missing


def test_without_extras_a_run_is_killed_resumed_and_ends(setup, tmp_path, monkeypatch):
    """The three scripts and their prompts alone, on the plain engine, as processes.

    They end where the plain engine ends with extras at hand.
    """
    project, run = tmp_path / "project", tmp_path / "alone"
    (project / "tests").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "prompts", project / "prompts")
    shutil.copy(tiny.__file__, project / "tests")
    command = [sys.executable, project / "tests" / "tiny.py", *setup("alone")]
    how = dict(capture_output=True, text=True, cwd=project, timeout=300)

    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = subprocess.Popen(command, cwd=project, **quiet)
    while not (run / "turn1" / "questions.jsonl").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL and not (run / "turn2" / "follower").exists()

    ended = subprocess.run(command, **how)
    assert ended.returncode == 0, ended.stderr
    assert "going on after unit" in ended.stdout and "done: " in ended.stdout
    assert "heldout" not in (run / "log.jsonl").read_text()
    # Without a report what is logged is said, so that a run that learns nothing does not hide it.
    assert '"stage": "follower"' in ended.stdout and '"tied": ' in ended.stdout

    monkeypatch.setattr(judge, "parse_constraints", tiny.parse)
    assert seif.main(setup("beside", engine="plain")) == 0
    assert (tmp_path / "beside" / "turn2" / "heldout.jsonl").exists()
    alone, beside = tiny.adapters(run), tiny.adapters(tmp_path / "beside")
    assert len(alone) > 10 and alone.keys() == beside.keys()
    # The processes compute on the CPU even where the tests do not.
    if not torch.cuda.is_available():
        assert all(torch.equal(alone[name], beside[name]) for name in alone)
    for command in ("eval", "chat", "plot"):
        monkeypatch.setattr(seif.rl, "extra", lambda name: None)
        assert seif.main([command, str(run)]) == 2


BARE = """
import sys, warnings
# On Linux it is one of those that need it.
import psutil
sys.modules["fcntl"] = sys.modules["resource"] = None
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import tiny, judge, seif
import extras.cpu, extras.packing, extras.report
# What asks for the platform from now on is told another.
sys.platform = "darwin"
judge.parse_constraints = tiny.parse
sys.exit(seif.main(sys.argv[1:]))
"""


def test_a_job_runs_where_the_system_has_less_to_offer(setup, tmp_path):
    """No fcntl, no resource, no malloc_trim: other systems, as far as that can be shown here."""
    code = BARE.format(tests=str(Path(tiny.__file__).parent))
    argv = setup("run", turns=1, instructor_steps="1", follower_steps="1")
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "turn1" / "follower" / "adapter_model.safetensors").exists()


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
sys.path.insert(0, {root!r})
import judge
from prompts import messages

question = messages.Question("Name a fruit.", "hard", ("Use no commas.", "Be kind."))
print(judge.verdicts([(question, "a, b")], lambda prompts: [0.9 for _ in prompts]))
assert "rl" not in sys.modules and "seif" not in sys.modules
"""


def test_judge_works_without_torch(tmp_path):
    command = [sys.executable, "-c", BLOCKED.format(root=str(ROOT))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "value=0.0, by='rule'" in done.stdout and "value=1.0, by='judger'" in done.stdout


@pytest.mark.parametrize("name", ["bench", "verdicts"])
def test_a_script_in_extras_takes_no_file_beside_it_for_a_package(name):
    """extras/cuda.py would be the `cuda` that torch imports."""
    command = [sys.executable, str(ROOT / "extras" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


# ------------------------------------------------------------ what it is made of


def imported(path: Path) -> set[str]:
    """The modules that a source imports when it is imported itself, by first name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").split(".")[0])
    return found


OURS = {"seif", "judge", "rl", "extras", "prompts", "."}


@pytest.mark.parametrize(
    "name, may",
    [("rl.py", set()), ("judge.py", {"prompts"}), ("seif.py", {"judge", "rl", "prompts"})],
)
def test_the_scripts_import_one_another_in_one_direction(name, may):
    assert imported(ROOT / name) & OURS <= may
    assert name != "judge.py" or "torch" not in imported(ROOT / name)


def test_the_top_level_is_three_scripts():
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS


def test_the_three_scripts_stay_small():
    sizes = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in SCRIPTS}
    assert sum(sizes.values()) <= 1500, sizes


def test_there_are_no_more_settings_than_one_can_read():
    assert len(dataclasses.fields(seif.Config)) <= 34
    assert all(field.metadata["reason"] for field in dataclasses.fields(seif.Config))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short_and_what_is_public_is_explained(path):
    text = path.read_text(encoding="utf-8")
    long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not long, f"lines over 100 columns: {long}"
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    large = [f.name for f in functions if f.end_lineno - f.lineno + 1 > 50]
    assert not large, f"functions over 50 lines: {large}"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    bare = [n.name for n in public if not ast.get_docstring(n)]
    assert not bare, f"without a docstring: {bare}"
    assert not text.strip() or ast.get_docstring(tree), "a source begins by saying what it is"
