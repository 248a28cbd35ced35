"""What may go wrong around a run: kills, full and read-only disks, foreign files, many steps."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch

import seif

# SEIF_KILLS=20 python -m pytest tests/test_faults.py -k killed
KILLS = int(os.environ.get("SEIF_KILLS", "4"))
ONE_STEP = dict(turns=1, instructor_steps="1", follower_steps="1")


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same adapters, and have any."""
    a, b = tiny.adapters(one), tiny.adapters(other)
    return len(a) > 10 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def last_line(capsys) -> str:
    """The line in which a command that failed ends; there is no other, and no traceback."""
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("seif: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have all imported already: a server imports once, and forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tiny"])

        def start(*args):
            process = context.Process(target=tiny.main, args=args)
            process.start()
            return process

        yield start


def test_killed_at_random_moments_ends_as_if_never_killed(setup, tmp_path, processes):
    steps = dict(instructor_steps="6", follower_steps="6", turns=2)
    whole, argv = (
        processes(setup("whole", **steps), str(tmp_path / "log")),
        setup("killed", **steps),
    )
    log = tmp_path / "whole" / "log.jsonl"
    while not log.exists() and whole.is_alive():
        time.sleep(0.01)
    begin = time.time()
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "log").read_text()
    # The kills fall all over the run, whatever the machine's speed; a stage takes a quarter of it.
    longest, draw, kills = (time.time() - begin) / 2, random.Random(4), 0
    while True:
        process = processes(argv, str(tmp_path / "log"))
        if kills < KILLS:
            process.join(draw.uniform(0, longest))
            process.kill()
        process.join()
        if kills == KILLS or process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills += 1
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert same(tmp_path / "whole", tmp_path / "killed")
    for name in ("samples.md", "turn2/questions.jsonl", "turn2/heldout.jsonl"):
        one, other = (tmp_path / run / name for run in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_polite_kill_leave_a_clear_line(setup, tmp_path, processes, number):
    process = processes(setup("run", instructor_steps="500"), str(tmp_path / "log"))
    while not (tmp_path / "run" / "log.jsonl").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 130, text
    assert text.splitlines()[-1].startswith("seif: stopped; the same command goes on")
    assert "Traceback" not in text


LOADS = """
import signal, sys
# A shell's background jobs begin with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [{root!r}]
from prompts import constraints
import langdetect.detector_factory as factory
real = factory.DetectorFactory.add_profile
def add_profile(*args):
    print("loading", flush=True)
    return real(*args)
factory.DetectorFactory.add_profile = add_profile
try:
    constraints.check("language:response_language", {{"language": "de"}}, "Der Hund schläft heute.")
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_is_not_lost_while_languages_are_loaded():
    """langdetect would take it for a damaged file, and know half of its languages from then on."""
    pytest.importorskip("langdetect")
    code = LOADS.format(root=str(Path(seif.__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(60) == 130


def test_steps_without_a_finite_gradient_end_the_run(setup, tmp_path, monkeypatch, capsys):
    nan = lambda *_, **__: torch.tensor(float("nan"))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", nan)
    argv = setup("run", turns=1, instructor_steps="0", follower_steps="9")
    assert seif.main(argv) == 2
    assert "5 steps in a row had no finite gradient" in last_line(capsys)
    rows = [json.loads(r) for r in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    voided = [r for r in rows if r.get("skipped") and not r["updates"]]
    assert len(voided) == 4


# ------------------------------------------------------------ disks


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, as a function that mounts it with the given options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        return place

    yield mount
    if os.path.ismount(place):
        # Lazily: a writer that failed may still hold its file.
        subprocess.run(["umount", "-l", place], capture_output=True)


@pytest.mark.parametrize("kilobytes", [60, 400])
def test_a_full_disk_ends_in_a_clear_line_and_room_lets_it_go_on(
    setup, tmp_path, disk, capsys, kilobytes
):
    """Full before the first state is written, and when the second is."""
    place = disk(f"size={kilobytes}k")
    argv = setup("disk/run", turns=1)
    assert seif.main(argv) == 1
    text = last_line(capsys)
    assert "No space left" in text and "goes on" in text
    subprocess.run(["mount", "-o", "remount,size=8m", place], check=True)
    assert seif.main(argv) == 0
    assert seif.main(setup("whole", turns=1)) == 0
    assert same(tmp_path / "whole", place / "run")


def test_a_file_that_cannot_be_written_whole_keeps_the_last_state(setup, tmp_path, capsys):
    """As on a full disk, for those who may not mount: no file may be longer than so."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = tmp_path / "run"
    assert seif.main(setup("run", **ONE_STEP)) == 0
    state = (run / "state.pt").read_bytes()
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(state) // 2, before[1]))
        assert seif.main(setup("run", **ONE_STEP | {"turns": 2})) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "goes on" in last_line(capsys)
    assert (run / "state.pt").read_bytes() == state
    assert seif.main(setup("run", **ONE_STEP | {"turns": 2})) == 0
    assert seif.main(setup("whole", **ONE_STEP | {"turns": 2})) == 0
    assert same(tmp_path / "whole", run)


def test_a_read_only_folder(setup, disk, capsys):
    place = disk("size=8m")
    assert seif.main(setup("disk/run", **ONE_STEP)) == 0
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    capsys.readouterr()
    assert seif.main(setup("disk/run", **ONE_STEP | {"turns": 2})) == 2
    assert "cannot be used as run folder" in last_line(capsys)
    assert before == {p: p.read_bytes() for p in before}
    # Reading it is still possible.
    assert seif.main(["eval", str(place / "run")]) == 0


# ------------------------------------------------------------ foreign and damaged files


class Malice:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "taken over")


def test_a_malicious_state_is_refused_and_not_run(setup, tmp_path, capsys):
    assert seif.main(setup("run", **ONE_STEP)) == 0
    capsys.readouterr()
    torch.save({"done": Malice(tmp_path / "harm")}, tmp_path / "run" / "state.pt")
    assert seif.main(setup("run", **ONE_STEP)) == 2
    assert "state.pt: not" in last_line(capsys)
    assert not (tmp_path / "harm").exists()


def test_pickled_weights_are_refused(setup, tmp_path, capsys):
    assert seif.main(setup("run", **ONE_STEP)) == 0
    capsys.readouterr()
    harm = {"x": Malice(tmp_path / "harm")}
    adapter = tmp_path / "run" / "turn1" / "follower"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(harm, adapter / "adapter_model.bin")
    assert seif.main(["eval", str(tmp_path / "run")]) == 2
    assert "no adapter of turn 1" in last_line(capsys)
    torch.save(harm, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert seif.main(setup("other")) == 2
    assert "cannot be loaded" in last_line(capsys)
    assert not (tmp_path / "harm").exists()


READ = ["state.pt", "config.json", "log.jsonl", "turn1/questions.jsonl"]
READ += [f"turn1/follower/adapter_{name}" for name in ("config.json", "model.safetensors")]


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_in_the_run_folder_is_one_clear_line(setup, tmp_path, capsys, name):
    assert seif.main(setup("run", **ONE_STEP)) == 0
    path = tmp_path / "run" / name
    whole = path.read_bytes()
    damages = [b"", b"\xff\xfe\x00", b"[1]\n" * 4, b'{"a": 1}\n' * 4, whole[: len(whole) // 2]]
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    for damage in damages:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        path.write_bytes(damage)
        capsys.readouterr()
        status = seif.main(setup("run", **ONE_STEP | {"turns": 2}))
        # {} are settings like any others, all as they are by default.
        assert status == 2 or (name == "config.json" and damage.startswith(b"{")), damage
        if status:
            text = last_line(capsys)
            assert name.split("/")[-1] in text or "/turn1/follower" in text, text
            assert path.read_bytes() == damage


@pytest.mark.parametrize("begun", [1, "once", None])
def test_a_config_of_another_date_is_one_clear_line(setup, tmp_path, capsys, begun):
    assert seif.main(setup("run", **ONE_STEP)) == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"begun": begun}))
    for argv in (setup("run", **ONE_STEP), ["eval", str(tmp_path / "run")]):
        capsys.readouterr()
        assert seif.main(argv) == 2
        last_line(capsys)


@pytest.mark.parametrize("rest", [b'{"turn": 2, "sta', b"\xff\xfe", b"[1]\n{}\n", b"\0" * 512])
def test_what_the_log_holds_beyond_the_state_is_cut_off(setup, tmp_path, rest):
    """As a full disk or a power cut leaves it."""
    assert seif.main(setup("run", **ONE_STEP)) == 0
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + rest)
    assert seif.main(setup("run", **ONE_STEP | {"turns": 2})) == 0
    assert log.read_bytes().startswith(whole)
    assert all("turn" in json.loads(line) for line in log.read_text().splitlines())


@pytest.mark.parametrize(
    "state",
    [
        {"done": 2},
        {"x": torch.zeros(1)},
        torch.zeros(1),
        {"done": 2, "adapters": {}, "optimizers": {}, "written": {}},
        None,
    ],
    ids=lambda state: str(state)[:20],
)
def test_a_state_of_another_shape_is_refused(setup, tmp_path, capsys, state):
    assert seif.main(setup("run", **ONE_STEP)) == 0
    capsys.readouterr()
    torch.save(state, tmp_path / "run" / "state.pt")
    assert seif.main(setup("run", **ONE_STEP)) == 2
    assert "state.pt: not" in last_line(capsys)


def test_a_lost_file_is_one_clear_line(setup, tmp_path, capsys):
    assert seif.main(setup("run", **ONE_STEP)) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    for name in ("log.jsonl", "turn1/questions.jsonl", "turn1/follower/adapter_config.json"):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        (tmp_path / "run" / name).unlink()
        capsys.readouterr()
        assert seif.main(setup("run", **ONE_STEP | {"turns": 2})) == 2, name
        last_line(capsys)
    # Without its state a run begins again, and ends as it did.
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "kept", tmp_path / "run")
    (tmp_path / "run" / "state.pt").unlink()
    capsys.readouterr()
    assert seif.main(setup("run", **ONE_STEP)) == 0
    assert "begins again, and replaces turn after turn" in capsys.readouterr().out
    assert same(tmp_path / "run", tmp_path / "kept")


# ------------------------------------------------------------ many steps


def test_four_hundred_steps_take_no_more_memory_than_the_first_250(setup, monkeypatch):
    """Nor does a step leave anything on the disk but its line of the log."""
    real, held, sizes = seif.Run.log, [], []

    def watch(run, *args):
        real(run, *args)
        held.append(psutil.Process().memory_info().rss)
        files = [p for p in run.folder.rglob("*") if p.is_file() and p.name != "log.jsonl"]
        sizes.append(sum(p.stat().st_size for p in files))

    monkeypatch.setattr(seif.Run, "log", watch)
    few = dict(batch=1, group=2, max_new_tokens=4, instructor_tokens=4, updates=1)
    both = dict(instructor_steps="100", follower_steps="300")
    assert seif.main(setup("run", turns=1, **few, **both)) == 0
    assert len(held) == 402
    # By then oneDNN has as many compiled kernels as it keeps.
    assert held[-2] < 1.05 * held[250], [h >> 20 for h in held[::20]]
    # Adapters and the state have their sizes from the second stage's first saved step on.
    assert sizes[-2] < 1.05 * sizes[101]
