"""Whole runs on tiny models: the loop, forks of it, settings, loggers, warnings, the notebook."""

import dataclasses
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from conftest import randomise
from safetensors.torch import load_file
from tiny import ONE_STEP, assert_equal, rows_of, run_command

import extras.run
import judge
import rl
import seif
from extras import calibration, chat_template, data, log
from extras.peft_adapters import save_adapter
from extras.run import Run
from prompts import Question, prompt_text, user

SETTINGS = [
    ("--bits 8", "--bits 8: must be one of 4, 16"),
    ("--penalties brevity", "must be one of length,repetition, length, repetition, ''"),
    ("--lr nan", "--lr nan: must be between 0"),
    ("--hard-fraction 1.5", "between 0 and 1"),
    ("--group-size 1", "--group-size 1: must be between 2"),
    ("--follower-steps 3,x", "--follower-steps 3,x: must be whole numbers, such as 4,2"),
    ("--judge trusted", "no model is used; add --hard-fraction 0.5"),
    ("--judge-url http://a --judge-model b", "no model is used; add --hard-fraction"),
    ("--judge-model big", "--judge-url and --judge-model: give both"),
    ("--judge-url a.b/v1 --judge-model c --filter llm", "--judge-url: must be like http://local"),
    ("--seed-questions no/file", "no/file: cannot be read"),
    ("--max-prompt-tokens 12", "all seed questions are over 9 tokens; raise --max-prompt-tokens"),
    ("--max-prompt-tokens 4090", "the Follower may need 4102 tokens, the model's context has 4096"),
    ("--max-proposal-tokens 4000", "the Instructor may need"),
    ("--max-new-tokens 1500 --filter llm", "the Judger may need"),
    ("--lora-rank 99", "--lora-rank 99"),
    ("--model no/model", "no/model"),
    ("--init-follower no/folder", "no/folder: not a LoRA adapter"),
    ("--logger trackio", "pip install trackio"),
]


def test_a_run_of_two_turns_leaves_log_adapters_questions_and_samples(finished):
    rows = rows_of(finished / "log.jsonl")
    turn = ["instructor", "questions", "follower", "follower", "evaluation"]
    assert [row["stage"] for row in rows] == ["instructor", *turn, *turn]
    updated = [row for row in rows if row.get("updates")]
    assert all({"reward", "cut", "kl", "grad_norm", "seconds"} <= row.keys() for row in updated)
    trained = tiny.adapters(finished)
    first = {n: t for n, t in trained.items() if n.startswith("turn1") and "lora_B" in n}
    roles = {name.split("/")[1] for name in first}
    assert roles == {"instructor", "follower"} == {row["stage"] for row in updated}
    assert all(t.any() and not torch.equal(t, trained[f"turn2{n[5:]}"]) for n, t in first.items())
    for i in (1, 2):
        questions = data.read_questions(finished / f"turn{i}/questions.jsonl")
        assert questions and all(q.kind == "hard" and len(q.constraints) == 3 for q in questions)
    text = (finished / "samples.md").read_text()
    assert all(f"## Turn {i}, {role}\n" in text for i in (1, 2) for role in roles)
    assert re.search(r"^- `[+-]` Your answer must .* \(rule\)$", text, re.M)
    assert re.findall(r"^ *(\w+)", log.turn_table(rows), re.M) == ["turn", "base", "1", "2"]
    # The base model is measured once.
    [base] = rows_of(finished / "base.json")
    first, second = rows_of(finished / "log.jsonl", "evaluation")
    assert first["heldout_base"] == second["heldout_base"] == base and base["logp"] < 0
    records = rows_of(finished / "turn2/heldout.jsonl")
    relevant = [r["pmi"] is not None and r["pmi"] > base["threshold"] for r in records]
    assert second["heldout_follower"]["relevance"] == sum(relevant) / len(relevant)


def test_train_from_python_resumes_after_ctrl_c_and_logs(setup, tmp_path, monkeypatch, capsys):
    """A notebook keeps the traceback, and so the objects of the interrupted run."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Mock())
    cfg = seif.read_config(setup("run", **ONE_STEP, kl_coef=0, logger="wandb"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as interrupt:
        patch.setattr(Run, "finish_step", Mock(side_effect=KeyboardInterrupt))
        seif.train(cfg)
    assert interrupt and seif.train(cfg) is None
    text = capsys.readouterr().out
    assert "turn 1: 1 Instructor steps, q_T, 1 Follower steps" in text and "\ndone: " in text
    rows = rows_of(tmp_path / "run/log.jsonl")
    assert any(row.get("updates") for row in rows) and not any("kl" in row for row in rows)
    assert wandb.init.call_args.kwargs["config"]["lr"] == 0.01
    calls = wandb.init.return_value.log.call_args_list
    assert [call.kwargs["step"] for call in calls] == [1, 2, 3, 4]
    assert calls[2].args[0]["follower/reward"] == rows[2]["reward"]


def interleave(run: Run, steps: int = 9) -> set[int]:
    """A fork: a step of each role in turn, and a third role, the critic. The steps' seeds."""
    run.start_turn()
    questions = [Question(q, "hard", tuple(tiny.POOL[:3])) for q in run.seed_questions]
    seeds = set()
    for i in range(steps):
        role = seif.TRAINED_ROLES[i % 3]
        for step in run.remaining(role, 1):
            rng = run.seed_rngs()
            seeds.add(torch.initial_seed())
            if role == "instructor":
                seif.instructor_step(run, run.batch(role, run.seed_questions, step), rng)
            elif role == "follower":
                seif.follower_step(run, run.batch(role, questions, step))
            else:
                with run.policy.using(role):
                    [group] = run.policy.sample([[user("Hi")]], 4, 8)
                for k, sample in enumerate(group):
                    sample.reward = float(k % 2)
                run.finish_step(role, {"reward": 0.5, **run.update(role, group, 1.0)})
    run.close()
    return seeds


def test_a_fork_with_interleaved_stages_and_a_third_role(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(seif, "TRAINED_ROLES", ["instructor", "follower", "critic"])
    whole = seif.open_run(seif.read_config(setup("whole", **ONE_STEP)))
    weights = [next(iter(whole.policy.tensors(role).values())) for role in whole.optimizers]
    assert len({tensor.sum().item() for tensor in weights}) == 3
    for role in ("instructor", "follower"):
        first, second = (whole.batch(role, whole.seed_questions, step) for step in (0, 1))
        assert len({*first, *second}) == 4, "two steps of two prompts are an epoch"
    assert len(interleave(whole)) == 9
    cfg = seif.read_config(setup("killed", **ONE_STEP))
    for steps in (4, 9):
        interleave(seif.open_run(cfg), steps)
    assert len(rows_of(tmp_path / "killed/log.jsonl")) == 9
    states = [tmp_path / name / "state.pt" for name in ("killed", "whole")]
    trained, expected = (torch.load(file, weights_only=True)["adapters"] for file in states)
    if not torch.cuda.is_available():
        assert_equal(trained, expected)
    assert any(tensor.any() for name, tensor in trained["critic"].items() if "lora_B" in name)
    seif.train(cfg)
    [path] = tmp_path.glob("killed/turn1/critic/*.safetensors")
    assert_equal(load_file(path), trained["critic"])


def test_the_snapshot_follower_filters_and_judges_soft_questions(setup, tmp_path, monkeypatch):
    """A token is a byte here, so y stands for yes. Chance counts as reliable."""
    monkeypatch.setattr(chat_template, "YES", ("y", "Y"))
    monkeypatch.setattr(chat_template, "NO", ("n", "N"))
    monkeypatch.setattr(calibration, "MIN_AUC", -1.0)
    monkeypatch.setattr(seif, "CALIBRATION_CASES", 64)
    asked, real = [], rl.Policy.yes_probability

    def yes_probability(policy, messages):
        asked.extend((policy.active_adapter, m[-1]["content"]) for m in messages)
        return real(policy, messages)

    monkeypatch.setattr(rl.Policy, "yes_probability", yes_probability)
    more = {"hard_fraction": 0.0, "filter": "llm", "judge": "llm"}
    assert seif.main(setup("run", **ONE_STEP, **more, group_size=2)) == 0
    assert {role for role, _ in asked} == {"ref_follower"}
    [row] = rows_of(tmp_path / "run/log.jsonl", "calibration")
    for role in ("filter", "judger"):
        asked_for = [text for _, text in asked if text.startswith(prompt_text(role))]
        assert len(asked_for) > row[role]["cases"] >= 20
    assert "(judger)" in (text := (tmp_path / "run/samples.md").read_text()) and "(rule" not in text


def test_a_model_that_is_not_reliable_is_not_used(setup, tmp_path, monkeypatch, capsys):
    """It says 0.5 to everything, and is asked in the calibration alone."""
    monkeypatch.setattr(Run, "ask", ask := Mock(side_effect=lambda prompts: [0.5] * len(prompts)))
    cfg = seif.read_config(setup("run", **ONE_STEP, hard_fraction=0.5, filter="llm"))
    seif.train(cfg)
    text = "".join(capsys.readouterr())
    assert re.search("Judger: AUC 0.50 .*the model does not judge.*filter is rules", text, re.S)
    assert '"kind": "soft"' not in (tmp_path / "run/turn1/questions.jsonl").read_text()
    assert ask.call_count == 2 and not seif.open_run(cfg).judge.trusts_model


def test_missing_verdicts_train_nothing_and_print_why(setup, tmp_path, monkeypatch, capsys):
    """This tokenizer has no token for yes: every verdict is missing."""
    monkeypatch.setattr(seif, "CALIBRATION_CASES", 8)
    steps = {"turns": 1, "instructor_steps": "3", "follower_steps": "3", "prompts_per_step": 1}
    assert seif.main(setup("run", **steps, judge="llm")) == 0
    text = "".join(capsys.readouterr())
    for role in ("instructor", "follower"):
        rows = rows_of(tmp_path / "run/log.jsonl", role)
        assert [row["updates"] for row in rows] == [0, 0, 0]
        assert re.search(f"{role}.* 3 .*without an update; .*no verdict; try --filter rules", text)
    # Answers that are empty or cut off have reward 0, the others none.
    assert all(0 < row["missing"] < 1 and row["reward"] == 0 for row in rows)
    row = log.step_row([rl.Sample([1], [2], "a", True, answer="a")] * 3, {}, Counter())
    assert math.isnan(row["reward"]) and row["length"] == 1


def test_without_an_accepted_question_there_is_no_follower_step(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "parse_proposal", lambda text, count: ([], "no json"))
    assert seif.main(setup("run", **ONE_STEP)) == 0
    first, made, end = rows_of(tmp_path / "run/log.jsonl")
    assert (first["valid"], first["reward"], first["rejected"]) == (0, 0, {"no json": 8})
    assert made["acceptance"] == 0 and end["base_r_on_questions"] is None


def test_the_follower_starts_from_a_given_adapter(setup, tmp_path):
    """It has another rank than the run, so it can only come from the file."""
    policy = rl.load(str(tmp_path / "model"), bits=16, rank=3)
    policy.add("start")
    randomise(policy, "start")
    save_adapter(policy, "start", tmp_path / "start")
    more = {**ONE_STEP, "follower_steps": "0", "init_follower": tmp_path / "start"}
    assert seif.main(setup("run", **more)) == 0
    files = [tmp_path / "start", tmp_path / "run/turn1/follower"]
    assert_equal(*(load_file(file / "adapter_model.safetensors") for file in files))
    # It is also what the trained Follower is compared with.
    files = [tmp_path / "run" / name for name in ("heldout_base.jsonl", "turn1/heldout.jsonl")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert seif.main(setup("run", **{**more, "turns": 2})) == 0


def test_the_kl_reference_of_the_follower(setup, tmp_path, monkeypatch):
    """And five steps in a row without a finite gradient end the run."""
    void = {"updates": 0, "skipped": 1, "frac_reward_zero_std": 0.0}
    monkeypatch.setattr(extras.run, "grpo_step", step := Mock(return_value=void))
    for setting, reference in (("base", None), ("turn", "ref_follower")):
        with seif.open_run(seif.read_config(setup(setting, kl_reference=setting))) as run:
            for role in ["instructor", "follower"] * 2:
                run.update(role, [], 1.0)
            with pytest.raises(data.InputError, match="5 steps without a finite .*--lr"):
                run.update("follower", [], 1.0)
        references = [call.args[2] for call in step.call_args_list[-5:]]
        assert references == ["ref_instructor", reference] * 2 + [reference]


def test_without_a_number_of_steps_a_stage_takes_epochs(setup, tmp_path, capsys):
    """SEIF's front-loading: three epochs for the Follower in turn 1, one afterwards."""
    data.append_text(tmp_path / "seeds.txt", "word " * 3000)
    epochs = {"instructor_steps": "", "follower_steps": "", "prompts_per_step": 3}
    with seif.open_run(seif.read_config(setup("run", **epochs))) as run:
        assert "5 seed questions, 1 too long and skipped" in capsys.readouterr().out
        assert [run.num_steps("instructor", turn) for turn in (1, 2)] == [2, 2]
        # q_T has a question per seed question at the most, here 4 of 7.
        assert [run.num_steps("follower", turn) for turn in (1, 2)] == [4, 2]
        assert [run.num_steps("follower", turn, 7) for turn in (1, 2, 3)] == [7, 3, 3]
    fixed = seif.read_config(setup("fixed", instructor_steps="5,3", follower_steps="4"))
    with seif.open_run(fixed) as run:
        assert [run.num_steps("instructor", turn) for turn in (1, 2, 3)] == [5, 3, 3]
        assert [run.num_steps("follower", turn, n) for turn, n in ((1, 7), (2, 0))] == [4, 0]


def test_presets_are_overridden_from_left_to_right(monkeypatch):
    """The CPU preset, then --paper, then --quick, then the user's own flags."""
    read, defaults = lambda words: seif.read_config(words.split()), seif.Config()
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        paper = read("--kl-coef 0.5 --paper")
        assert (paper.judge, paper.think, paper.kl_coef) == ("llm", True, 0.5)
        assert (paper.follower_steps, paper.max_new_tokens) == ("", 1024)
        assert (read("") == defaults) == gpu and (gpu or read("").model == seif.smollm2.NAME)
        assert read("--model=x") == dataclasses.replace(defaults, model="x")
        quick = read("--quick --paper --turns 7 --no-think")
        assert (quick.turns, quick.follower_steps, quick.think) == (7, "3,2", False)
        seif.validate(paper), seif.validate(quick), seif.validate(read(""))


def test_help_names_every_setting_and_unknown_words_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        seif.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(seif.Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "cut-offanswersgetreward0" in text
    for words in ("--follower-step 3", "evaluate runs/seif"):
        with pytest.raises(SystemExit, match="2"):
            seif.main(words.split())
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("seif.py: error: ") and words.split()[0] in last
    # A command without a run lists the runs.
    monkeypatch.chdir(tmp_path)
    assert "eval needs a run folder; runs: none" in run_command(capsys, ["eval"])
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.json").write_text("{}")
    assert run_command(capsys, ["chat"]).endswith("runs: runs/a")


@pytest.mark.parametrize("words, message", SETTINGS)
def test_a_bad_setting_is_one_clear_line_and_can_be_corrected(setup, monkeypatch, words, message):
    """In the same folder, and in the same notebook, which keeps the error's traceback."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(data.InputError, match=f"^[^\n]*{re.escape(message)}[^\n]*$") as error:
        seif.train(seif.read_config(setup("run") + words.split()))
    assert error and seif.open_run(seif.read_config(setup("run")))


def step(stage: str = "follower", **fields) -> dict:
    row = {"turn": 1, "stage": stage, "reward": 0.5, "length": 20, "cut": 0.1, "outcomes": {}}
    return {**row, "frac_reward_zero_std": 0, "updates": 1, "skipped": 0, **fields}


IDLE = step(updates=0, outcomes={"no verdict": 3, "answer cut off": 1})
Q_T = {"turn": 1, "stage": "questions", "top_share": 0.4, "top_category": "no_comma"}
END = {"turn": 1, "stage": "evaluation"}
EQUAL = [step("instructor", updates=0, outcomes={"rewarded": 4}), Q_T | {"top_share": 0.1}]
WARNINGS = [
    ([step(cut=0.4)], "40% .*cut off; raise --max-new-tokens"),
    ([step("instructor", cut=0.4)], "raise --max-proposal-tokens"),
    ([step(kl=0.6)], "KL .*0.60.*; lower --lr or raise --kl-coef"),
    ([step(), step(length=9)], "half as long as in the first step"),
    ([step(), step(frac_reward_zero_std=0.9)], "90% of the .*groups have equal rewards"),
    ([IDLE] * 3, "3 .*steps without an update; 75% of the samples: no verdict; try --filter rules"),
    ([IDLE, END], "1 .*steps without an update; .*no verdict"),
    (EQUAL, "instructor: 1 .*100% of the samples: rewarded; equal rewards; raise --group-size"),
    ([Q_T], "40% of q_T's constraints are no_comma"),
]


@pytest.mark.parametrize("rows, message", WARNINGS)
def test_a_step_that_goes_wrong_prints_a_warning(rows, message):
    assert re.search(message, *log.warnings(rows).values())
    healthy = [step(), step(length=15, kl=0.1, frac_reward_zero_std=0.5), IDLE, IDLE]
    assert not any(log.warnings(healthy[:n]) for n in range(1, 5))


def test_the_code_cells_of_the_notebook_train_and_show_the_run(setup, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    notebook = json.loads((Path(seif.__file__).parent / "extras/seif.ipynb").read_text())
    (tmp_path / "seif.py").touch()
    monkeypatch.chdir(tmp_path)
    # matplotlib asks for the version of IPython.
    ipython, commands, printed = Mock(version_info=(9, 0)), [], []
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)

    def shell(line: str) -> None:
        """Flags of the tiny run come last, so they win over --quick."""
        commands.append(words := line.split())
        if words[:2] == ["python", "seif.py"]:
            more = tiny.flags(tmp_path, "runs/notebook", turns=1) if "--quick" in words else []
            assert seif.main(words[2:] + more) == 0

    names = {"shell": shell, "print": printed.append}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            exec(re.sub(r"^( *)!(.*)$", r"\1shell(r'''\2''')", code, flags=re.M), names)
    assert commands[0] == "pip install -q -r requirements.txt matplotlib".split()
    assert [line.split()[0] for line in printed[-1].splitlines()] == ["turn", "base", "1"]
    ipython.display.Image.assert_called_once_with("runs/notebook/plot.png")
    assert Path("runs/notebook/plot.png").read_bytes().startswith(b"\x89PNG")
