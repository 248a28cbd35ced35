"""Proposals, Filter, verdicts, rewards, prompts and files, without any model.

The constraints that code can check have tests of their own, test_constraints.py.
"""

import json
import math
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import judge
from extras import eval as evaluation
from judge import Verdict
from prompts import constraints, messages
from prompts.messages import InputError, Question

# ------------------------------------------------------------ the Instructor's JSON

GOOD = '{"c1": "a", "c2": "b", "c3": "c"}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! Here you go: {GOOD} I hope it helps {{}}.",
        f"{{not json}} {GOOD}",
        '{"c1": " a\\n", "c2": "b", "c3": "c"}',
    ],
)
def test_proposals_that_parse(text):
    assert judge.parse_constraints(text, 3) == (["a", "b", "c"], "")


def test_unescaped_quotes_inside_a_value_are_forgiven():
    text = '{"c1": "Use the word "sun" twice.", "c2": "End with "bye".", "c3": "c"} and more'
    wanted = ['Use the word "sun" twice.', 'End with "bye".', "c"]
    assert judge.parse_constraints(text, 3) == (wanted, "")


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"c1": "a "x" b", "c2": "b", "d1": "y "z"", "c3": "c"}', "no json"),
        ('{"c1": "a "x" b", "c2": "b", "c3": "c", "c4": "d"}', "no json"),
        ("no braces", "no json"),
        ('{"c1": "a", "c1": "b", "c2": "b", "c3": "c"}', "no json"),
        ('{"c1": "a", "c2": "b", "c3": "c"', "no json"),
        ('{"a":' * 5000, "no json"),
        ('{"c1": "a", "c2": "b"}', "wrong keys"),
        ('{"c1": "a", "c2": "b", "c3": "c", "c4": "d"}', "wrong keys"),
        ('{"c1": "a", "c3": "b", "c2": "c"}', "wrong keys"),
        ('{"c1": "a", "c2": "b", "c3": 3}', "not text"),
        ('{"c1": "a", "c2": " ", "c3": "c"}', "not text"),
        ('{"c1": "a", "c2": "\\ud83d", "c3": "c"}', "not text"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_proposals_that_do_not(text, reason):
    assert judge.parse_constraints(text, 3) == ([], reason)


# ------------------------------------------------------------ the Filter

SEED = "Why is the sky blue in summer?"


def hard(*constraints: str) -> Question:
    return Question(SEED, "hard", constraints)


@pytest.mark.parametrize(
    "constraints, reason",
    [
        (
            ["Answer with at most 20 words.", "Do not use any commas.", "Include the word 'sun'."],
            "",
        ),
        (["Answer with at most 20 words.", "answer with at most 20 words", "x"], "duplicate"),
        (
            ["Answer with at least 90 words.", "Do not use more than 50 words.", "x"],
            "contradiction",
        ),
        (
            ["Your entire response should be in JSON format.", "Use 3 bullet points."],
            "contradiction",
        ),
        (["Write in all capital letters.", "Write in all lowercase letters."], "contradiction"),
        (["Include the word 'sun'.", "Do not use the words 'sun' and 'moon'."], "contradiction"),
        (["Do not use the forbidden words.", "Use no commas.", "x"], "words not named"),
        ([SEED, "Use no commas.", "x"], "restates the seed"),
        (["Answer with at least 500 words.", "Use no commas.", "x"], "over the token limit"),
        (["y" * 400, "Use no commas.", "x"], "too long"),
        (["Include the word 'sun'.", "Include the word 'sea'.", "x"], "one sort twice"),
    ],
)
def test_what_code_sees_wrong_with_an_instruction(constraints, reason):
    assert judge.code_filter(hard(*constraints), max_new_tokens=128) == reason


def test_soft_constraints_may_be_of_one_sort():
    same = ("Include the word 'sun'.", "Include the word 'sea'.")
    assert judge.code_filter(Question(SEED, "soft", same), 128) == ""


def test_an_instruction_that_leaves_no_room_is_rejected_on_demand():
    question = hard("Your answer must have at most 4 words.", "Use no commas.")
    assert judge.code_filter(question, 128) == ""
    assert judge.code_filter(question, 128, min_words=20) == "no room for an answer"


def test_on_demand_hard_constraints_must_be_ones_that_a_rule_recognises():
    question = hard("Use a formal tone.", "Use no commas.")
    assert judge.code_filter(question, 128) == ""
    assert judge.code_filter(question, 128, checkable=True) == "not checkable"
    soft = Question(SEED, "soft", question.constraints)
    assert judge.code_filter(soft, 128, checkable=True) == ""


class Oracle:
    """An `ask` that gives the next values of a list, and remembers what it was asked."""

    def __init__(self, *values: float):
        self.values, self.asked = list(values), []

    def __call__(self, prompts: list[list[dict]]) -> list[float]:
        self.asked += prompts
        return [self.values.pop(0) for _ in prompts]


@pytest.mark.parametrize(
    "mode, values, reasons",
    [
        ("llm", [0.9, 0.1, math.nan], ["", "duplicate", "rejected by the model", ""]),
        ("code", [], ["", "duplicate", "", ""]),
        ("rules", [], ["not checkable", "duplicate", "not checkable", "not checkable"]),
        ("off", [], ["", "", "", ""]),
    ],
)
def test_the_filter_asks_the_model_only_what_code_lets_through(mode, values, reasons):
    good = hard("Use no commas.", "Include the word 'ripe'.", "Be kind.")
    bad = hard("Use no commas.", "Use no commas.", "x")
    ask = Oracle(*values)
    assert judge.filter_questions([good, bad, good, good], ask, mode, (64, 0)) == reasons
    assert len(ask.asked) == len(values) and not ask.values
    for (message,) in ask.asked:
        assert SEED in message["content"] and "Be kind." in message["content"]


def test_the_filter_of_nothing_is_nothing():
    for mode in judge.FILTERS:
        assert judge.filter_questions([], Oracle(), mode, (64, 0)) == []


def test_the_filters_limits_and_threshold_are_given():
    question = hard("Your answer must have at most 4 words.", "Use no commas.", "Be kind.")
    rejected = judge.filter_questions([question], Oracle(), "code", (64, 20))
    assert rejected == ["no room for an answer"]
    assert judge.filter_questions([question], Oracle(0.3), "llm", (64, 0), 0.2) == [""]
    rejected = judge.filter_questions([question], Oracle(0.3), "llm", (64, 0), 0.4)
    assert rejected == ["rejected by the model"]


# ------------------------------------------------------------ verdicts


def test_hybrid_asks_the_model_only_what_no_rule_decides():
    question = Question(
        "Name a fruit.", "soft", ("Use no commas.", "Use a formal tone.", "Be kind.")
    )
    ask = Oracle(0.9, math.nan)
    (found,) = judge.verdicts([(question, "apple, pear")], ask)
    assert found == [Verdict(0.0, "rule"), Verdict(1.0, "judger"), Verdict(None, "judger")]
    # Nobody is asked where there is nobody to ask.
    (alone,) = judge.verdicts([(question, "apple, pear")], None)
    assert alone == [Verdict(0.0, "rule"), Verdict(None, "nobody"), Verdict(None, "nobody")]
    # The missing verdict is left out, not counted as a "no".
    assert judge.satisfaction(found) == 0.5
    text = ask.asked[0][-1]["content"]
    assert question.instruction in text and "Constraint to check: Use a formal tone." in text
    assert "[ANSWER]\napple, pear\n[END OF ANSWER]" in text


def test_the_model_decides_all_in_the_papers_way():
    question = Question(
        "Name a fruit.", "soft", ("Use no commas.", "Use a formal tone.", "Be kind.")
    )
    pairs = [(question, "apple, pear"), (question, "fig")]
    table = judge.verdicts(pairs, Oracle(0.9, 0.2, 0.5, 0.1, 0.8, 0.4), "llm")
    assert [[v.value for v in row] for row in table] == [[1, 0, 1], [0, 1, 0]]
    assert {v.by for row in table for v in row} == {"judger"}


def test_the_threshold_of_a_yes_is_given():
    pairs = [(hard("Be kind."), "a")] * 3
    table = judge.verdicts(pairs, Oracle(0.29, 0.3, 0.6), threshold=0.3)
    assert [v.value for (v,) in table] == [0, 1, 1]


def test_all_open_constraints_are_asked_at_once():
    calls = []

    def ask(prompts):
        calls.append(len(prompts))
        return [1.0] * len(prompts)

    open_one, closed = hard("Be kind.", "Use no commas."), hard("Use no commas.")
    judge.verdicts([(open_one, "a"), (closed, "b"), (open_one, "c")], ask)
    judge.verdicts([(closed, "b")], ask)
    judge.verdicts([], ask)
    assert calls == [2]


def test_a_repeated_prompt_is_the_seed():
    question = Question("Name a fruit.", "hard", ())
    sentence = "First repeat the request word for word without change, then give your answer."
    if judge.recognise(sentence):
        assert judge.rule_verdict(question, sentence, "Name a fruit. An apple.") is True
        assert judge.rule_verdict(question, sentence, "An apple.") is False


# ------------------------------------------------------------ accuracy on held-out rows

ROWS = [
    {
        "prompt": "one",
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
        "kwargs": [{}, {"end_phrase": "bye"}],
    },
    {"prompt": "two", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "prompt": "three",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "fr"}],
    },
]


def test_accuracy_by_prompt_and_by_instruction(monkeypatch):
    records = [evaluation.judged(row, text) for row, text in zip(ROWS, ("so *bye*", "a, b", "oui"))]
    assert [r["prompt"] for r in records] == ["one", "two", "three"]
    # Nothing can be decided on the third prompt: it is left out, and is not a success.
    records[2]["strict"] = records[2]["loose"] = [None]
    assert records[0]["strict"] == [True, False] and records[0]["loose"] == [True, True]
    assert evaluation.accuracy(records) == {
        "prompt_strict": 0.0,
        "instruction_strict": 1 / 3,
        "prompt_loose": 1 / 2,
        "instruction_loose": 2 / 3,
    }
    assert all(math.isnan(value) for value in evaluation.accuracy(records[2:]).values())


# ------------------------------------------------------------ rewards


def test_rewards():
    question = Question("Name a fruit.", "hard", ("Use no commas.", "Be kind."))
    yes, no, missing = Verdict(1.0, "rule"), Verdict(0.0, "rule"), Verdict(None, "judger")
    assert judge.follower_reward(question, "apple", True, [yes, no]) == 0.5
    assert judge.follower_reward(question, "apple", True, [missing, missing]) is None
    for answer, ended in (
        ("", True),
        ("apple", False),
        (question.instruction, True),
        ("name a fruit", True),
        ("Be kind.\nName a fruit!", True),
        (question.instruction + " Sure.", True),
    ):
        assert judge.follower_reward(question, answer, ended, [yes, yes]) == 0.0
    given_back = question.instruction + "\nApple is my answer here."
    assert judge.follower_reward(question, given_back, True, [yes]) == 1.0
    assert [judge.instructor_reward(r, "hardest") for r in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [judge.instructor_reward(r, "frontier") for r in (0.0, 0.5, 1.0)] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>hm</think><answer>ok</answer>", "ok"),
        (" <think>a\nb</think>\n<answer> ok </answer>\n", "ok"),
        ("<answer>ok</answer>", ""),
        ("<think>hm</think><answer>ok", ""),
        ("<think>hm</think> so <answer>ok</answer>", ""),
        ("<think><answer>no</answer></think><answer>ok</answer>", ""),
        ("<think>hm</think><answer>a</answer><answer>b</answer>", ""),
    ],
)
def test_think_format(text, answer):
    assert judge.extract_answer(text, think=True) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (" ok\n", "ok"),
        ("a thought</think>\n\nok", "ok"),
        ("<answer>ok</answer>", "<answer>ok</answer>"),
    ],
)
def test_without_the_think_form_all_is_the_answer_but_a_thought_of_its_own(text, answer):
    assert judge.extract_answer(text, think=False) == answer


# ------------------------------------------------------------ is a model to be believed?


def test_a_ranking_counts_pairs_and_finds_the_threshold(monkeypatch):
    monkeypatch.setattr(judge, "FEWEST_CASES", 1)
    ranking = judge.rank([0.9, 0.6, 0.4, 0.2, math.nan], [True, True, False, True, True])
    # The wrong case lies above one of three right ones; no threshold is fitted to that.
    assert ranking.auc == pytest.approx(2 / 3) and ranking.cases == 4
    assert not ranking.believed and ranking.threshold == 0.5
    telling = judge.rank([0.3, 0.2, 0.1] * 9, [True, True, False] * 9)
    assert telling.believed and telling.threshold == 0.2
    assert judge.rank([0.5] * 4, [True, False] * 2).auc == 0.5
    assert 0 <= ranking.low < ranking.auc < ranking.high <= 1


def test_only_what_is_better_than_chance_beyond_doubt_is_believed():
    draw, truth = random.Random(0), [True, False] * 64
    telling = [t * 0.5 + draw.random() for t in truth]
    assert judge.rank(telling, truth).believed
    assert not judge.rank([draw.random() for _ in truth], truth).believed
    assert not judge.rank([1 - p for p in telling], truth).believed
    # All of one sort, no verdict at all.
    for ps, of in (([0.9, 0.8], [True, True]), ([math.nan] * 2, [True, False]), ([], [])):
        ranking = judge.rank(ps, of)
        assert math.isnan(ranking.auc) and not ranking.believed and ranking.threshold == 0.5


def test_the_interval_is_hanleys_and_mcneils(monkeypatch):
    """By hand, for an AUC of 3/4 of 2 x 2 cases: Q1 = 0.6, Q2 = 0.642857."""
    monkeypatch.setattr(judge, "FEWEST_CASES", 1)
    ranking = judge.rank([0.9, 0.3, 0.5, 0.1], [True, True, False, False])
    spread = 0.75 * 0.25 + (0.6 - 0.75**2) + (2 * 0.75**2 / 1.75 - 0.75**2)
    assert ranking.auc == 0.75 and ranking.high == 1.0
    assert ranking.low == pytest.approx(0.75 - 1.96 * math.sqrt(spread / 4))


def test_cases_are_balanced():
    cases, truth = judge.balance(list("abcdef"), [True] * 5 + [False], 4)
    assert (cases, truth) == (["a", "b", "f"], [True, True, False])
    assert judge.balance([], [], 4) == ([], [])
    # What no rule knows is neither.
    assert judge.balance(["a", "b"], [None, False], 4) == (["b"], [False])


def test_unsound_questions_clash_and_sound_ones_do_not():
    examples = messages.instructor_examples("hard")
    bank = [c for question in examples for c in question.constraints]
    spoilt = [q for q in (judge.unsound(question, bank) for question in examples) if q]
    assert len(spoilt) >= len(examples) // 2
    assert {judge.code_filter(question, 1024) for question in spoilt} == {"contradiction"}
    assert judge.unsound(hard("Be kind."), bank) is None


# ------------------------------------------------------------ prompts


def test_prompts_put_what_is_shared_first():
    question = Question("Name a fruit.", "hard", ("Use no commas.", "Be kind."))
    one, two = (messages.judger_prompt(question, "apple", c)[-1] for c in question.constraints)
    at = one["content"].rindex("Use no commas.")
    assert one["content"][:at] == two["content"][:at]
    assert "apple" in one["content"][:at] and question.instruction in one["content"][:at]
    examples = messages.instructor_examples("hard")[:3]
    first, second = (messages.instructor_prompt(s, "hard", examples) for s in ("One?", "Two?"))
    assert first[:-2] == second[:-2] and len(first) == 1 + 2 * 3 + 2
    assert [m["role"] for m in first] == ["system", *["user", "assistant"] * 4]
    assert "One?" in first[-2]["content"] and first[-1]["content"] == messages.OPENING["hard"]


def test_the_think_form_is_asked_for_only_where_it_is_required():
    (user,) = messages.follower_prompt("Hi", think=False)
    assert user == {"role": "user", "content": "Hi"}
    system, user, opening = messages.follower_prompt("Hi", think=True)
    assert system["content"].count("<answer>") == 1 and user["content"] == "Hi"
    assert opening == {"role": "assistant", "content": "<think>"}


def test_worked_examples_are_sound():
    examples = {kind: messages.instructor_examples(kind) for kind in messages.KINDS}
    assert len(examples["hard"]) + len(examples["soft"]) >= 40
    for kind, questions in examples.items():
        for question in questions:
            assert len(question.constraints) == messages.KINDS[kind]
            assert judge.code_filter(question, 128, checkable=True) == "", question
            proposal = {f"c{i}": c for i, c in enumerate(question.constraints, 1)}
            parsed = judge.parse_constraints(json.dumps(proposal), messages.KINDS[kind])
            assert parsed == (list(question.constraints), "")
        opening = messages.OPENING[kind]
        shown = json.dumps({"c1": questions[0].constraints[0]}, ensure_ascii=False)
        assert shown.startswith(opening)


def test_heldout_rows_are_sound_and_apart_from_the_seeds():
    rows = evaluation.read_rows(messages.PROMPTS / "heldout.jsonl")
    seeds = set(messages.read_seeds(messages.PROMPTS / "seeds.jsonl"))
    assert len(rows) >= 100 and len(seeds) >= 300
    examples = {q.seed for kind in messages.KINDS for q in messages.instructor_examples(kind)}
    traps = evaluation.read_rows(messages.PROMPTS / "tripwires.jsonl")
    assert len(traps) == 20 and not {r["seed"] for r in traps} & {r["seed"] for r in rows}
    for row in traps:
        asked = row["prompt"].removeprefix(row["seed"] + "\n").split("\n")
        known = list(zip(row["instruction_id_list"], row["kwargs"]))
        assert [judge.recognise(line) for line in asked] == known
    for row in rows + traps:
        assert row["prompt"].startswith(row["seed"] + "\n")
        assert row["seed"] not in seeds | examples
        asked = list(zip(row["instruction_id_list"], row["kwargs"]))
        assert constraints.contradiction(asked) == "", row
        assert all(judge.check(name, kwargs, "x") in (True, False, None) for name, kwargs in asked)
    # IFEval's 25; two more are our own, and no row in its form has them.
    assert len({name for row in rows for name in row["instruction_id_list"]}) == 25


def test_the_readmes_reward_pays_what_a_trainer_calls_it_for():
    """As TRL calls it: chat completions, and the columns of q_T."""
    text = (Path(judge.__file__).parent / "README.md").read_text()
    code = re.search(r"^    import judge\n(?:    .*\n)+", text, re.M)[0]
    space = {}
    exec(re.sub("^    ", "", code, flags=re.M), space)
    says = lambda text: [{"role": "assistant", "content": text}]
    columns = dict(seed=["Hi"] * 3, kind=["hard"] * 3)
    columns["constraints"] = [["Use no commas.", "Answer with less than 3 words."]] * 2
    columns["constraints"].append(["Be kind."])
    paid = space["reward"](list(map(says, ("a b", "a, b c", "x"))), prompts=[""] * 3, **columns)
    # Nobody can say of kindness: TRL leaves out a None.
    assert paid == [1.0, 0.0, None]


# ------------------------------------------------------------ files


@pytest.mark.parametrize(
    "content, seeds",
    [
        ('{"prompt": "x"}\n\n{"seed_question": "y"}\n{"prompt": "x"}\n', ["x", "y"]),
        ("x\n\ny\n x \n", ["x", "y"]),
        ("x\r\ny\r\n", ["x", "y"]),
        ('\n  {"prompt": "x"}', ["x"]),
        ("\ufeffx\n", ["x"]),
        ('\ufeff{"prompt": "x"}\n', ["x"]),
        ('{"prompt": null, "seed_question": "x"}\n', ["x"]),
        ('{"prompt": "x", "seed_question": null}\n', ["x"]),
        ('{"prompt": "a\u2028b\u0085c"}\n', ["a\u2028b\u0085c"]),
        ("a\u2028b\u0085c\n", ["a\u2028b\u0085c"]),
        ('{"prompt": "a\\ud83d"}\n', ["a\ufffd"]),
        ('{"prompt": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
        ("[1] is a line of text\n", ["[1] is a line of text"]),
        ('id,prompt\n1,"x, so"\n\n2,y\n', ["x, so", "y"]),
        ('Question,kind\r\n"x\ny",a\r\n', ["x\ny"]),
        ("Why, oh why?\nx\n", ["Why, oh why?", "x"]),
        ('prompt\nWhy, oh why?\n"x\ny, z"\n', ["Why, oh why?", "x\ny, z"]),
        ('id;Question\n1;"x; so"\n2;y, z\n', ["x; so", "y, z"]),
        ("seed_question\tkind\nx, so\ta\n", ["x, so"]),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_seed_files_are_told_apart_by_content(tmp_path, content, seeds, ending):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content.encode())
    assert messages.read_seeds(str(path)) == seeds


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.csv", "id,prompt\n1,x\n2,y, z\n", "a.csv, line 3: 3 cells under 2 columns; quote"),
        ("a.txt", "prompt;id\nx;1;2\n", "a.txt, line 2: 3 cells under 2 columns; quote"),
        ("a.csv", "id,text\n1,x\n", 'a.csv, line 1: needs a column "prompt"'),
        ("a.txt", 'prompt\n"Hello, he said\nWhat is up?\n', "a.txt, line 3: not CSV"),
        ("a.csv", 'prompt\n"To be" or not?\nx\n', "a.csv, line 2: not CSV"),
        ("a.json", '[{"prompt": "a"}, {"prompt": "b"}]', "a.json, line 1: a JSON array; give"),
        ("a.json", '[\n  {"prompt": "a"}\n]', "a.json, line 1: a JSON array; give"),
        ("a.TSV", "1\tx\n", 'a.TSV, line 1: needs a column "prompt"'),
    ],
)
def test_a_table_that_would_lose_text_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        messages.read_seeds(tmp_path / name)


QUESTION = '{"seed": "a", "kind": "hard", "constraints": ["b"]}'


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "a.jsonl: cannot be read"),
        (b"\xff\xfe", "UTF-8"),
        (f'{QUESTION}\n{{"seed": \n'.encode(), "a.jsonl, line 2: not JSON"),
        (b"[1]\n", "a.jsonl, line 1: a JSON object"),
        (b'\n{"seed": "a"}\n', "a.jsonl, line 2: needs seed, kind"),
        (QUESTION.replace("hard", "easy").encode(), "line 1: needs seed, kind"),
        (QUESTION.replace('"hard"', "[]").encode(), "line 1: needs seed, kind"),
        (QUESTION.replace('"b"', "1").encode(), "line 1: needs seed, kind"),
    ],
)
def test_files_that_cannot_be_read_name_the_line(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        messages.read_questions(path)


def test_parquet_is_read_or_says_what_it_needs(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match="a.bin: .*parquet"):
        messages.read_seeds(path)
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"seed_question": ["x", "y"]}).to_parquet(path)
    assert messages.read_seeds(path) == ["x", "y"]


READERS = (messages.read_seeds, messages.read_questions, evaluation.read_rows)


def read_all(path) -> None:
    """Each reader takes the file, or says what is wrong with it."""
    for read in READERS:
        try:
            read(str(path))
        except InputError as error:
            assert path.name in str(error)


@settings(max_examples=60, deadline=None)
@example("a" * 200_000, "a.txt")
@example("prompt,kind\n" + "a" * 200_000 + ",b\n", "a.csv")
@example('prompt,kind\n"a', "a.csv")
@example("prompt,kind\na\0b,c\n", "a.csv")
@example("PAR1", "a.parquet")
@given(st.text(max_size=200), st.sampled_from(["a.jsonl", "a.txt", "a.json"]))
def test_any_text_as_seeds_questions_or_rows(tmp_path_factory, text, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    read_all(path)


KEYS = ("prompt", "seed_question", "seed", "kind", "constraints", "instruction_id_list", "kwargs")
IDS = ["keywords:existence", "length_constraints:number_words", "detectable_format:json_format"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(IDS)
ANYTHING = st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@settings(max_examples=30, deadline=None)
@given(ANYTHING, st.lists(ANYTHING), st.lists(st.sampled_from(IDS) | ANYTHING))
def test_any_json_as_seeds_questions_or_rows(tmp_path_factory, value, values, ids):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    rows = [value, dict.fromkeys(KEYS, value)]
    kwargs = (values + [{}] * len(ids))[: len(ids)]
    rows += [{"prompt": "x", "instruction_id_list": ids, "kwargs": kwargs}]
    rows += [{"seed": "x", "kind": "hard", "constraints": values}]
    for row in rows:
        path.write_text(json.dumps(row) + "\n")
        read_all(path)


@pytest.mark.parametrize("depth", [100, 900, 980, 1100, 100_000])
def test_json_of_any_depth_is_read_or_refused(tmp_path, depth):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ' + "[" * depth + "]" * depth + "}\n")
    read_all(path)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_survived(text):
    judge.parse_constraints(text, 3)
    judge.extract_answer(text, True)
    question = Question(text, "hard", (text, text + "?"))
    judge.code_filter(question, 128)
    judge.echoes(question, text)


LONG = [
    "{" * 20_000,
    '{"c1": "' * 2_500,
    '{"c1": "a", "c2": "b", "c3": "' + '"' * 19_000,
    '{"c1": "' + '", "c2": "' * 2_000,
    "<think>" * 2_800,
    "<think></think><answer>" * 800,
    "a" * 20_000,
    "Say hi.\n" * 2_500,
    "forbidden words " * 1_250,
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:12]))
def test_twenty_thousand_characters_take_no_time(text):
    question = Question("Say hi.", "soft", (text, "Use no commas."))
    for work in (
        lambda: judge.parse_constraints(text, 3),
        lambda: judge.extract_answer(text, True),
        lambda: judge.echoes(question, text),
        lambda: judge.code_filter(question, 128),
    ):
        start = time.process_time()
        work()
        assert time.process_time() - start < 0.5


@pytest.mark.parametrize("right, wrong", [(1, 1), (100, 9), (9, 100)])
def test_a_perfect_ranking_of_too_few_cases_is_not_believed(right, wrong):
    ps, truth = [0.9] * right + [0.1] * wrong, [True] * right + [False] * wrong
    assert not judge.rank(ps, truth).believed
    enough = judge.rank(ps * 10, truth * 10)
    assert enough.believed and enough.auc == 1


def test_a_language_is_not_checkable_where_nothing_detects_it(monkeypatch):
    question = Question(SEED, "hard", ("Answer in French.", "Use no commas.", "Use 9 words."))
    monkeypatch.setattr(constraints, "langdetect", None)
    assert judge.code_filter(question, 128, checkable=True) == "not checkable"
    assert judge.code_filter(question, 128) == ""
