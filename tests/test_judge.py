"""Proposals, Filter, verdicts, rewards, calibration and prompts, without any model."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import judge
import prompts
import rl
import seif
from extras import calibration, data, verifiers
from extras.calibration import Calibration, auc_calibration
from judge import Question, Verdict, parse_constraint, rule_filter
from prompts import NUM_CONSTRAINTS, extract_answer, few_shot_examples, parse_proposal

SEED = "Why is the sky blue in summer?"
FRUIT = Question("Name a fruit.", "soft", ("Use no commas.", "Use a formal tone.", "Be kind."))
YES, NO, NONE = Verdict(1.0, "rule"), Verdict(0.0, "rule"), Verdict(None, "judger")
RELIABLE = Calibration(auc=0.9, low=0.8, high=1.0, threshold=0.3, cases=64)
CHANCE = Calibration(auc=0.5, low=0.4, high=0.6, threshold=0.5, cases=64)
# fmt: off
GOOD = '{"c1": "a", "c2": "b", "c3": "c"}'
PROPOSALS = [
    (GOOD, "a b c"), (f"{{not json}} {GOOD} ok {{}}", "a b c"),
    ('{"c1": " a\\n", "c2": "b", "c3": "c"}', "a b c"), ('{"a":' * 5000, "no json"),
    # Quotes inside a value that are not escaped.
    ('{"c1": "x "sun" y", "c2": "end "bye".", "c3": "c"} more', 'x "sun" y end "bye". c'),
    ('{"c1": "a "x" b", "c2": "b", "d1": "y "z"", "c3": "c"}', "no json"),
    ('{"c1": "a", "c1": "b", "c2": "b", "c3": "c"}', "no json"), (GOOD[:-1], "no json"),
    ('{"c1": "a", "c3": "b", "c2": "c"}', "wrong keys"),
    (GOOD.replace('"c"', "3"), "not text"), (GOOD.replace('"c"', '" "'), "not text"),
    (GOOD.replace('"c"', '"\\ud83d"'), "not text"),
]
# Reason, constraints, arguments of rule_filter().
FILTER = [
    ("", ["Answer with at most 20 words.", "Do not use any commas.", "Include 'sun'."], {}),
    ("duplicate", ["Answer with at most 20 words.", "answer with at most 20 words"], {}),
    ("contradiction", ["Answer with at least 40 words.", "Do not use more than 30 words."], {}),
    ("words not named", ["Do not use the forbidden words.", "Use no commas."], {}),
    ("restates the seed question", [SEED, "Use no commas."], {}), ("too long", ["y" * 400], {}),
    ("over the token limit", ["Answer with at least 500 words."], {}),
    ("same category twice", ["Include the word 'sun'.", "Include the word 'sea'."], {}),
    ("", ["Answer with at most 4 words."], {"min_words": 4}),
    ("no room for an answer", ["Answer with at most 4 words."], {"min_words": 5}),
    ("", ["Be kind."], {}), ("no verifier", ["Be kind.", "Use no commas."], {"checkable": True}),
]
# Reasons to reject: sound, P(yes) below the threshold, no verdict, duplicate, no JSON.
ACCEPT = {
    "llm": ["", "rejected by the model", "", "duplicate", "no json"],
    "off": ["", "", "", "", "no json"],
    "rules": ["no verifier", "no verifier", "no verifier", "duplicate", "no json"],
}
ANSWERS = [
    ("<think>hm</think><answer>ok</answer>", True, "ok"), ("<answer>ok</answer>", True, ""),
    (" <think>a\nb</think>\n<answer> ok </answer>\n", True, "ok"),
    ("<think>hm</think><answer>ok", True, ""), ("<think>a</think> so <answer>b</answer>", True, ""),
    ("<think><answer>no</answer></think><answer>ok</answer>", True, ""),
    ("<think>hm</think><answer>a</answer><answer>b</answer>", True, ""), (" ok\n", False, "ok"),
    ("a thought</think>\n\nok", False, "ok"), ("<answer>ok</answer>", False, "<answer>ok</answer>"),
    # A thought that is not closed has no answer. A mark inside of a text starts no thought.
    ("[THINK]Hm. Yes.", False, ""), ("I [THINK] so", False, "I [THINK] so"),
]
# Seed question, answer, whether it only repeats lines of the instruction.
ECHOES = [
    ("Hi", "Use no commas.\nhi!", True), ("Hi", "Hi\nUse no commas. Ok.", True),
    ("Hi", "Hi\nUse no commas.\nThis is my answer.", False),
    # An option of the seed question may be the answer.
    ("A fruit?\nA) apple\nB) car", "A) apple\nB) car", True),
    ("Which is a fruit?\n- an apple.\n- a car.", "- an apple.", False),
    ("apple\ncar\nWhich of them is a fruit?", "apple", False),
    ("Translate to French:\nThe cat is black.", "The cat is black.", True),
]
PROSE = "Glass has no grain that could scatter light, so most of it passes straight through panes."
OPTIONS = "Answer with one of the following options: ('yes', 'no')"
# Constraint, answer, factor of its reward.
LENGTHS = [
    ("Use no commas.", "one two three four five", 5 / 20),
    ("Use no commas.", PROSE + " Or so we hope.", 1),
    ("Answer with at most 4 words.", "one two three", 3 / 4),
    ("Answer with at most 40 words.", "one two three", 3 / 20),
    # What caps sentences may be short, or answers a question of yes or no.
    ("Answer with at most 2 sentences.", "Yes.", 1),
    ("Answer with at least 2 sentences.", "Yes. No.", 2 / 20),
    # Two characters count as a word in scripts that do not separate words.
    ("Use no commas.", "ガラスは透明です。 Clear?", 5 / 20),
    (OPTIONS, "yes", 1 / 20),
]
# fmt: on


def hard(*constraints: str) -> Question:
    return Question(SEED, "hard", constraints)


def sample(text: str, question: Question = FRUIT, ended: bool = True, **fields) -> rl.Sample:
    return rl.Sample([], [], text, ended, question, answer=text, **fields)


def make_judge(ask=None, judger=RELIABLE, filter_=RELIABLE, **settings) -> judge.Judge:
    ours = judge.Judge(seif.Config(**{"hard_fraction": 0.5, **settings}), ask)
    ours.judger, ours.filter = judger, filter_
    return ours


@pytest.mark.parametrize("text, result", PROPOSALS, ids=[repr(t[:40]) for t, _ in PROPOSALS])
def test_a_proposal_parses_or_has_a_reason(text, result):
    constraints, reason = parse_proposal(text, 3)
    assert (reason or " ".join(constraints)) == result and len(constraints) in (0, 3)


@settings(max_examples=20, deadline=5_000)
@given(st.text(max_size=300), st.sampled_from(["{", '", "c2": "', "<think>", "Say hi.\n"]))
def test_no_text_raises_and_a_long_one_takes_no_time(short, piece):
    for text in (short, piece * 3_000, '{"c1": "' + piece * 3_000):
        parse_proposal(text, 3), extract_answer(text, think=True), judge.is_echo(FRUIT, text)
        rule_filter(Question("Say hi.", "soft", (text, text + "?")), 128)


@pytest.mark.parametrize("reason, constraints, settings", FILTER)
def test_rule_filter_gives_the_reason(reason, constraints, settings):
    assert rule_filter(hard(*constraints), 128, **settings) == reason
    if reason in ("no verifier", "same category twice"):
        assert rule_filter(Question(SEED, "soft", tuple(constraints)), 128, **settings) == ""


@pytest.mark.parametrize("mode, reasons", ACCEPT.items())
def test_accept_asks_the_model_only_after_the_code(mode, reasons):
    rows = [["Use no commas.", "Include the word 'ripe'.", "Be kind."]] * 3 + [["Hm.", "hm", "x"]]
    texts = [json.dumps({f"c{i}": c for i, c in enumerate(row, 1)}) for row in rows]
    proposals = [sample(text, hard()) for text in [*texts, "no JSON"]]
    ask = Mock(return_value=[0.3, 0.29, math.nan])
    ours = make_judge(ask, filter=mode)
    accepted = ours.accept(proposals)
    assert [s.rejected for s in proposals] == reasons
    assert accepted == [s for s in proposals if not s.rejected]
    assert all(s.question == hard(*rows[0]) for s in accepted[:3])
    assert [len(call.args[0]) for call in ask.call_args_list] == ([3] if mode == "llm" else [])
    ours.fits = lambda question: len(question.instruction) < 20
    assert ours.accept([]) == ours.accept([last := sample(texts[0], hard())]) == []
    assert last.rejected == "over --max-prompt-tokens"


def test_score_asks_the_model_once_and_only_where_no_verifier_decides():
    """Answers: empty, cut off, one with open constraints, one without."""
    ask = Mock(side_effect=[[0.3, math.nan], [0.9, 0.9, 0.29, 0.1]])
    samples = [sample(""), sample("fig", ended=False), sample("</think> fig, pear")]
    samples.append(sample("a", hard("Use no commas.")))

    def verdicts(*args, **settings) -> list:
        make_judge(*args, **settings).score(samples)
        return [s.verdicts for s in samples]

    good, bad = Verdict(1.0, "judger"), Verdict(0.0, "judger")
    assert verdicts(ask) == [[], [], [NO, good, NONE], [YES]]
    assert samples[2].answer == "fig, pear"
    text = ask.call_args.args[0][0][-1]["content"]
    assert "\nfig, pear\n" in text and "check: Use a formal tone." in text
    # As in the paper, the model decides everything.
    assert verdicts(ask, judge="llm") == [[], [], [good, good, bad], [bad]]
    # A model that is not reliable is not asked. Nor is any, without an open constraint.
    assert verdicts(ask, CHANCE) == [[], [], [NO, *[Verdict(None, "none")] * 2], [YES]]
    make_judge(ask).score(samples[3:])
    assert judge.verdicts([], ask) == [] and ask.call_count == 2


def test_a_question_may_bring_its_own_verifiers(monkeypatch):
    """A fork adds a check in Python, without a pattern for its sentence."""
    vowels = verifiers.Verifier("fork:vowels", {}, lambda text, kwargs: set("aeiou") <= set(text))
    monkeypatch.setitem(verifiers.VERIFIERS, "fork:vowels", vowels)
    plain = hard("Use every vowel.", "Use no commas.")
    assert rule_filter(plain, 64, checkable=True) == "no verifier"
    ours = Question(SEED, "hard", plain.constraints, (("fork:vowels", {}), None))
    assert rule_filter(ours, 64, checkable=True) == ""
    assert judge.verdicts([(ours, "education"), (ours, "a, b")], None) == [[YES] * 2, [NO] * 2]
    # Of IFEval's, one depends on the seed question.
    repeat = hard("First repeat the request word for word without change, then give your answer.")
    assert judge.verdicts([(repeat, f"{SEED} Hm"), (repeat, "Hm")], None) == [[YES], [NO]]


@pytest.mark.parametrize("text, think, answer", ANSWERS)
def test_extract_answer(text, think, answer):
    assert extract_answer(text, think) == answer


def reward(answer: str, question=FRUIT, penalties="", verdicts=(YES,), ended=True) -> float | None:
    scored = sample(answer, question, ended, verdicts=list(verdicts))
    judge.follower_rewards([scored], penalties)
    return scored.reward


def test_follower_reward_is_the_share_of_satisfied_constraints():
    """Missing verdicts do not count. Empty and cut-off answers have none at all."""
    assert reward("fig", verdicts=[YES, NO]) == 0.5 and reward("fig", verdicts=[YES, NONE]) == 1
    assert reward("fig", verdicts=[NONE], penalties="length") is None
    assert reward("", verdicts=[]) == reward("fig", verdicts=[], ended=False) == 0


@pytest.mark.parametrize("seed_question, answer, is_echo", ECHOES)
def test_an_echo_of_the_instruction_has_no_reward(seed_question, answer, is_echo):
    assert reward(answer, Question(seed_question, "hard", ("Use no commas.",))) == 1 - is_echo


@pytest.mark.parametrize("constraint, answer, factor", LENGTHS)
def test_the_length_penalty_lowers_the_reward_of_short_answers(constraint, answer, factor):
    expected = pytest.approx(factor / 2)
    assert reward(answer, hard(constraint), "length,repetition", [YES, NO]) == expected
    for seed_question in ("Is glass a liquid?", "I wonder. Should cars be banned?"):
        assert reward("yes", Question(seed_question, "hard", (OPTIONS,)), "length") == 1


def test_the_repetition_penalty_takes_the_reward_of_a_loop():
    loops = ["The sea is blue. " * 6, f"{PROSE} {PROSE}", "हिन्दी" * 200]
    for answer in (PROSE, "apple, apple, pear", *loops):
        assert reward(answer, penalties="repetition") == (answer not in loops)
        assert reward(answer) == 1


def test_no_category_and_no_upper_bound_takes_more_than_its_share_of_q_t():
    """27 categories, three per question: in 54 questions each may occur 12 times."""
    take = lambda counts, *constraints: judge.admit_question(hard(*constraints), counts, 54)
    counts = Counter()
    commas = [take(counts, "Use no commas.", f"Include the word 'w{i}'.", "x") for i in range(13)]
    assert commas == [""] * 12 + ["too many of one category"] and counts["no_comma"] == 12
    assert take(counts, "Use no commas.", "Be kind.", "x") and not take(counts, "Be kind.", "x")
    counts, bound = Counter(), "Answer with at most {} {}."
    mixed = [take(counts, bound.format(50 + i, "words"), "x", "y") for i in range(3)]
    mixed += [take(counts, bound.format(3 + i, "sentences"), "x", "y") for i in range(4)]
    assert mixed == [""] * 6 + ["too many of one category"]
    # A small q_T takes two of each.
    counts, question = Counter(), hard("Use no commas.")
    small = [judge.admit_question(question, counts, 3) for _ in range(3)]
    assert small == ["", "", "too many of one category"]


def test_instructor_reward_of_what_the_snapshot_fails():
    """Answers with r = 0, 0.5 and 1, one that was cut off, one without a verdict."""
    rows = [[NO, NO], [YES, NO], [YES, YES], [], [NONE]]
    proposals = [sample("", rejected=reason) for reason in ["duplicate", *[""] * 5]]
    judge.instructor_rewards(proposals, [sample("", verdicts=row) for row in rows])
    assert [s.reward for s in proposals] == [0, 1, 0.5, 0, 0, None]


def test_reliable_means_significantly_better_than_chance(monkeypatch):
    rng, truth = random.Random(0), [True, False] * 64
    useful = [t * 0.5 + rng.random() for t in truth]
    assert auc_calibration(useful, truth).reliable
    assert not auc_calibration([1 - p for p in useful], truth).reliable
    assert not auc_calibration([rng.random() for _ in truth], truth).reliable
    assert auc_calibration([0.3, 0.2, 0.1] * 10, [True, True, False] * 10).threshold == 0.2
    # Too few cases of one kind, however well they are separated.
    for truth in ([], [True] * 100 + [False] * 9, [True] * 9 + [False] * 100):
        result = auc_calibration([float(t) for t in truth], truth)
        assert not result.reliable and math.isnan(result.auc)
    # Hanley and McNeil's interval by hand: AUC = 3/4 of 2 x 2 cases, Q1 = 0.6, Q2 = 0.642857.
    monkeypatch.setattr(calibration, "MIN_CASES", 1)
    result = auc_calibration([0.9, 0.3, math.nan, 0.5, 0.1], [True, True, True, False, False])
    variance = 0.75 * 0.25 + (0.6 - 0.75**2) + (0.642857 - 0.75**2)
    assert (result.auc, result.high, result.cases, result.threshold) == (0.75, 1.0, 4, 0.5)
    assert result.low == pytest.approx(0.75 - 1.96 * math.sqrt(variance / 4), rel=1e-4)


def test_the_judge_is_calibrated_on_balanced_cases_with_known_truth():
    """16 answers satisfy, 32 do not. "Be kind." has no verifier and is no case."""
    examples, question = few_shot_examples("hard"), hard("Use no commas.", "Be kind.")
    ask = Mock(side_effect=lambda ps: [0.1 if "\na, b\n" in p[0]["content"] else 0.9 for p in ps])
    ours = make_judge(ask, filter="llm")
    ours.calibrate([sample(text, question) for text in ["a", "a, b", "a, b"] * 16], examples, 24)
    judged = [messages[0]["content"] for messages in ask.call_args_list[0].args[0]]
    assert ours.judger.auc == 1 and ours.judger.cases == 24 == len(judged)
    assert sum("\na, b\n" in text for text in judged) == 12
    assert not any("check: Be kind." in text for text in judged)
    # A model that says yes to every instruction is useless as a Filter: code replaces it.
    assert (ours.filter.auc, ours.filter_mode, ours.trusts_model) == (0.5, "rules", True)
    spoilt = calibration.contradictory(examples)
    assert ours.filter.cases == len(examples) + len(spoilt) and len(spoilt) >= 10
    assert {rule_filter(question, 1024) for question in spoilt} == {"contradiction"}
    assert calibration.contradictory([hard("Be kind."), hard("Use no commas.")]) == []
    ours.judger, ours.filter = CHANCE, RELIABLE
    assert (ours.filter_mode, ours.trusts_model) == ("rules", False)
    ours.cfg.judge = "trusted"
    assert (ours.filter_mode, ours.trusts_model) == ("llm", True)


def test_prompts_that_share_text_put_it_first():
    one, two = (prompts.judge_messages(FRUIT, "fig", c)[0]["content"] for c in ("Hm.", "Be kind."))
    shared = one[: one.rindex("Hm.")]
    assert two.startswith(shared) and "\nfig\n" in shared and FRUIT.instruction in shared
    examples = few_shot_examples("hard")[:3]
    first, second = (prompts.instructor_messages(q, "hard", examples) for q in ("A?", "B?"))
    assert first[:-2] == second[:-2] and "A?" in first[-2]["content"]
    # Few-shot examples change between batches, else q_T would be of few categories.
    questions, kinds = ["A?"] * 8, ["hard"] * 8
    draw = lambda seed: prompts.instructor_prompts(questions, kinds, 4, random.Random(seed))
    batches = draw(0)
    assert batches[:4] == [batches[0]] * 4 and batches[4:] == [batches[4]] * 4
    assert batches[0] != batches[4] and batches == draw(0) != draw(1)
    batches = prompts.instructor_prompts(["A?"] * 9, ["hard"] * 9, 1, random.Random(0))
    assert len({str(m) for batch in batches for m in batch[1:-2:2]}) == 36


def test_few_shot_examples_are_sound_and_show_every_category_equally_often():
    for kind, count in NUM_CONSTRAINTS.items():
        for question in few_shot_examples(kind):
            assert rule_filter(question, 128, checkable=True) == "", question
            shown = prompts.instructor_messages("A?", kind, [question])[2]["content"]
            assert parse_proposal(shown, count) == (list(question.constraints), "")
            assert shown.startswith(prompts.INSTRUCTOR_PREFILL[kind])
    parsed = [parse_constraint(c) for q in few_shot_examples("hard") for c in q.constraints]
    assert Counter(id for id, _ in parsed) == dict.fromkeys(verifiers.VERIFIERS, 4)


def test_heldout_rows_are_sound_and_disjoint_from_training():
    heldout = data.read_eval_rows(prompts.FOLDER / "heldout.jsonl")
    seen = set(data.read_seed_questions(prompts.FOLDER / "seeds.jsonl"))
    assert len(heldout) >= 100 and len(seen) >= 300
    seen |= {q.seed_question for kind in NUM_CONSTRAINTS for q in few_shot_examples(kind)}
    for row in heldout:
        seed_question = row["prompt"].split("\n")[0]
        assert row["seed_question"] == seed_question and seed_question not in seen
        known = list(zip(row["instruction_id_list"], row["kwargs"]))
        assert verifiers.find_contradiction(known) == "", row
    # IFEval's 25 categories. Two more are our own.
    assert len({id for row in heldout for id in row["instruction_id_list"]}) == 25


def test_judge_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import judge"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=prompts.FOLDER.parent)
