"""Kills, full disks, damaged files: a run resumes to the bit, or one line says why it does not."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest
import tiny
import torch
from tiny import run_command

import seif
from extras import data

# Sums on a GPU are not in the same order twice.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bit-identical on a CPU")
# SEIF_KILLS=20 python -m pytest tests/test_resume.py -k killed
KILLS = int(os.environ.get("SEIF_KILLS", "3"))


def assert_same_run(a: Path, b: Path) -> None:
    """The same adapters, and the same files where no times are in them."""
    assert len(tiny.adapters(a)) > 10
    tiny.assert_equal(tiny.adapters(a), tiny.adapters(b))
    for pattern in ("samples.md", "heldout_base.jsonl", "turn*/*.jsonl"):
        files = [sorted(run.glob(pattern)) for run in (a, b)]
        assert files[0] and [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert not list(b.rglob("*.part"))


@pytest.fixture(scope="module")
def processes():
    """Starts runs as processes. A server imports torch once, and forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tiny"])

        def start(*args):
            process = context.Process(target=tiny.main, args=args)
            process.start()
            return process

        yield start


def test_killed_at_random_moments_ends_as_if_never_killed(setup, finished, tmp_path, processes):
    log, errors, rng = tmp_path / "run/log.jsonl", tmp_path / "errors", random.Random(4)
    steps = lambda: log.read_bytes().count(b"\n") if log.exists() else 0
    for kill in [True] * KILLS + [False]:
        goal = steps() + rng.randrange(4)
        process = processes(setup("run"), str(errors))
        while kill and process.is_alive() and steps() < goal:
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.3) if kill else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), errors.read_text()
    assert process.exitcode == 0
    assert_same_run(finished, tmp_path / "run")


def test_a_finished_run_trains_no_more_and_more_turns_go_on(setup, finished, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run/lock"):
        assert "another run is writing here" in run_command(capsys, setup("run", turns=1))
    assert seif.main(setup("run", turns=1)) == 0
    log = (tmp_path / "run/log.jsonl").read_text()
    assert seif.main(setup("run", turns=1)) == 0
    assert (tmp_path / "run/log.jsonl").read_text() == log
    assert seif.main(setup("run", turns=2)) == 0
    assert "resuming after step 6, in turn 2" in capsys.readouterr().out
    text = run_command(capsys, setup("run", follower_steps="", lr=0.02))
    assert "this run was started with --follower-steps '2', not '', --lr 0.01, not 0.02;" in text
    assert_same_run(finished, tmp_path / "run")
    (tmp_path / "seeds.txt").write_text("Say hi.\nName a fruit.\nCount to ten.\nSing.\n")
    assert "started with other seed questions" in run_command(capsys, setup("run", turns=3))
    (tmp_path / "heldout.jsonl").write_text(data.to_jsonl(tiny.HELDOUT[::-1]))
    assert "has other rows than are held out now" in run_command(capsys, setup("run", turns=3))


def test_a_full_disk_is_one_line_and_no_loss(setup, finished, tmp_path, monkeypatch, capsys):
    """One file after the other can only be written by half."""
    real = data._write
    for name in ("state.pt", "questions.jsonl", "model.safetensors", "samples.md", "log.jsonl"):

        def full(path, mode, content, name=name):
            real(path, mode, content[: len(content) // 2] if name in str(path) else content)
            if name in str(path):
                raise OSError(28, "No space left on device", str(path))

        with monkeypatch.context() as patch:
            patch.setattr(data, "_write", full)
            text = run_command(capsys, setup("run"))
        assert "No space left" in text and name in text and "the same command resumes" in text
    assert seif.main(setup("run")) == 0
    assert_same_run(finished, tmp_path / "run")


class Malice:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self):
        return Path.write_text, (Path("harm"), "")


def test_a_damaged_file_is_one_line_and_no_loss(setup, finished, tmp_path, monkeypatch, capsys):
    """In a run that was stopped in its second turn, with q_T written."""
    monkeypatch.chdir(tmp_path)
    argv, run = setup("run"), tmp_path / "run"
    assert seif.main(setup("run", turns=1)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(seif, "follower_step", Mock(side_effect=KeyboardInterrupt))
        assert seif.main(argv) == 130
    torch.save(Malice(), "malice.pt")
    other = b'{"a": 1}\n'
    for name in ("state.pt", "log.jsonl", "turn2/questions.jsonl", "base.json", "config.json"):
        path, whole = run / name, (run / name).read_bytes()
        for damage in (whole[: len(whole) // 2], other, Path("malice.pt").read_bytes()):
            # As config.json these are settings like any others, all by default.
            if (name, damage) != ("config.json", other):
                path.write_bytes(damage)
                assert path.name in run_command(capsys, argv) and path.read_bytes() == damage
        path.write_bytes(whole)
    assert not Path("harm").exists()
    # Rows after the last state, as a power cut leaves them, are cut off.
    data.append_text(run / "log.jsonl", '{"turn": 2, "sta')
    assert seif.main(argv) == 0
    assert_same_run(finished, run)
    (run / "state.pt").unlink()
    seif.open_run(seif.read_config(argv))
    assert "state.pt: starting over" in capsys.readouterr().out
