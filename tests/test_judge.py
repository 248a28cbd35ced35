"""Rules, parser, Filter, verdicts and rewards."""

import json
import math
import random
import types

import numpy as np
import pytest
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import judge
import packing
import rl
import rules
from judge import Question, Verdict

# id, kwargs, an answer that follows it, one that does not
CASES = [
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "GO NOW please",
        "GO now",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "GO on",
        "DON'T go",
    ),
    ("change_case:english_capital", {}, "THE SUN IS A STAR AND IT SHINES.", "The sun is a star."),
    ("change_case:english_lowercase", {}, "the sun is a star and it shines.", "The sun is a star."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hello there!", "Hello. Say hi."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:two_responses", {}, "******\none******two******", "one ****** two ****** three"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], at [place].", "Dear [name]."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Call me.", "Bye. PS call me"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S. Call me.", "Bye.\nP.S. Call me."),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Perhaps."),
    ("detectable_format:constrained_response", {"options": ["red", "blue"]}, "blue", "green"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', "{a: 1}"),
    ("detectable_format:json_format", {}, '{"a": 1}', 'Here it is: {"a": 1}'),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
        "PART 1 x PART 2 y",
        "PART 1 x",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "- a\n**bold** start", "nothing"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one* and ** **"),
    ("detectable_format:title", {}, "<<My day>>\nIt rained.", "<< >>\nIt rained."),
    ("keywords:existence", {"keywords": ["sun", "sea"]}, "The Sun over the seaside.", "The sun."),
    ("keywords:forbidden_words", {"forbidden_words": ["can", "c++"]}, "A candle.", "Yes you CAN."),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "at least"}, "Ha ha, haha", "ha ha"),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, "relation": "exactly"}, "ha. ha", "ha ha ha"),
    ("keywords:frequency", {"keyword": ["a1", "b1"], "frequency": 1, "relation": "exactly"}, "a1 b1", "a1 b1 b1"),
    ("keywords:letter_frequency", {"letter": "Z", "let_frequency": 2, "let_relation": "less than"}, "Zoo", "zigzag"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        "a b\n\n'so, x",
        "a\n\nb so",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"nth_paragraph": 2, "first_word": "so", "divider": "***"},
        "a *** so b",
        "so",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "*** a *** b ***", "a *** *** b"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "One. Two! Three?",
        "Mr. A. Smith came. He left.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "not-two words"),
    ("length_constraints:number_words", {"num_words": 2, "max_words": 3, "relation": "between"}, "a b c", "a b c d"),
    ("punctuation:no_comma", {}, "No; none.", "Well, yes."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So it was. the END."', "The end. Or not"),
    ("startend:quotation", {}, '  "Hello."  ', '"Hello.'),
    ("startend:start_checker", {"start_phrase": "Dear sun"}, '"**dear Sun**, hello', "dear sunflower"),
    ("startend:start_checker", {"start_phrase": "News:"}, "News:today", "The news: none"),
    ("detectable_format:highlighted_words", {"phrases": ["web"], "bold": True}, "The **big web** of", "The *web*, **a"),
    ("detectable_format:highlighted_words", {"phrases": ["a", "b"], "bold": False}, "*a* _b_", "*a* b"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2, "divider": "\n\n"}, "a\n\n\nb\nc", "a\nb"),
]


@pytest.mark.parametrize("name, kwargs, good, bad", CASES)
def test_rules_pass_and_fail(name, kwargs, good, bad):
    assert judge.check(name, kwargs, good) is True
    assert judge.check(name, kwargs, bad) is False
    assert judge.check(name, kwargs, " \n") is False  # nothing follows no instruction


def test_every_rule_is_tested_but_language():
    assert {name for name, *_ in CASES} | {"language:response_language"} == set(judge.RULES)
    assert len(judge.RULES) == 25 + 2  # IFEval's and two of our own


def test_language(monkeypatch):
    text = "Der Hund schläft den ganzen Tag im warmen Garten und träumt von Katzen."
    if rules.langdetect:
        assert judge.check("language:response_language", {"language": "de"}, text) is True
        assert judge.check("language:response_language", {"language": "fr"}, text) is False
    monkeypatch.setattr(rules, "langdetect", None)
    assert judge.check("language:response_language", {"language": "de"}, text) is None


def test_loose_forgives_asterisks_and_a_first_or_last_line():
    end = {"end_phrase": "bye"}
    assert judge.check("startend:end_checker", end, "Text. *bye*") is False
    assert judge.check_loose("startend:end_checker", end, "Text. *bye*") is True
    assert (
        judge.check_loose("change_case:english_lowercase", {}, "Sure! Here it is:\nthe sun is a star and it shines.")
        is True
    )
    assert judge.check_loose("startend:end_checker", end, "Text.\nGood night") is False


RECOGNISED = [
    ("Answer with at least 600 words.", "number_words", {"num_words": 600, "relation": "at least"}),
    ("The response must not exceed 50 words in length.", "number_words", {"num_words": 50, "relation": "at most"}),
    (
        "Your answer should be between 20 and 30 words.",
        "number_words",
        {"num_words": 20, "max_words": 30, "relation": "between"},
    ),
    (
        "Your response should contain fewer than four sentences.",
        "number_sentences",
        {"num_sentences": 4, "relation": "less than"},
    ),
    ("There should be 3 paragraphs, separated by ***.", "number_paragraphs", {"num_paragraphs": 3}),
    ("Your answer must contain exactly 2 bullet points in markdown.", "number_bullet_lists", {"num_bullets": 2}),
    ("Use at least three bullet points.", "number_bullet_lists", {"num_bullets": 3, "relation": "at least"}),
    ("Include the words 'save' and \"spend\" in your response.", "existence", {"keywords": ["save", "spend"]}),
    ("Do not include the word 'rain'.", "forbidden_words", {"forbidden_words": ["rain"]}),
    (
        "The word 'pot' should appear at least twice in your response.",
        "frequency",
        {"keyword": "pot", "frequency": 2, "relation": "at least"},
    ),
    (
        "The letter 'b' must appear at least 5 times.",
        "letter_frequency",
        {"letter": "b", "let_frequency": 5, "let_relation": "at least"},
    ),
    ("Please avoid using any commas.", "no_comma", {}),
    ("The entire response should be in all lowercase letters.", "english_lowercase", {}),
    ("Write your entire response in English, in all capital letters.", "english_capital", {}),
    ("Finish your response with the phrase 'Good night.'", "end_checker", {"end_phrase": "Good night."}),
    ("Wrap your entire response with double quotation marks.", "quotation", {}),
    ("Your entire response should be in JSON format.", "json_format", {}),
    ("Write your entire response in Dutch, no other language is allowed.", "response_language", {"language": "nl"}),
    ("At the end of your response, add a postscript starting with 'P.S.'", "postscript", {"postscript_marker": "P.S."}),
    (
        "The second paragraph must start with the word 'But'.",
        "nth_paragraph_first_word",
        {"nth_paragraph": 2, "first_word": "but"},
    ),
    ("Your answer must be 50 words or less.", "number_words", {"num_words": 50, "relation": "at most"}),
    ("Answer with a number of words less than 15.", "number_words", {"num_words": 15, "relation": "less than"}),
    ("Limit your response to 50 words.", "number_words", {"num_words": 50, "relation": "at most"}),
    ("Limit the answer to three sentences.", "number_sentences", {"num_sentences": 3, "relation": "at most"}),
    ("Your answer must be limited to exactly 90 words.", "number_words", {"num_words": 90, "relation": "exactly"}),
    (
        "Your answer must have a word count of at least 20 words and less than 50 words.",
        "number_words",
        {"num_words": 20, "max_words": 49, "relation": "between"},
    ),
    (
        "Write exactly 3 paragraphs.",
        "number_paragraphs",
        {"num_paragraphs": 3, "relation": "exactly", "divider": "\n\n"},
    ),
    (
        "Your answer must not have more than 3 paragraphs.",
        "number_paragraphs",
        {"num_paragraphs": 3, "relation": "at most", "divider": "\n\n"},
    ),
    ("Highlight the word 'web' in bold.", "highlighted_words", {"phrases": ["web"], "bold": True}),
    (
        "Highlight the words 'net' and 'web' in your answer using markdown emphasis.",
        "highlighted_words",
        {"phrases": ["net", "web"], "bold": False},
    ),
    ("Start your answer with the phrase 'Once upon'.", "start_checker", {"start_phrase": "Once upon"}),
    ("Your answer must be written without using any commas.", "no_comma", {}),
    ("There must not be any commas whatsoever.", "no_comma", {}),
    (
        "Your answer must not include any of the following words: red, green, or blue.",
        "forbidden_words",
        {"forbidden_words": ["red", "green", "blue"]},
    ),
    ("Your answer must contain the exact text 'to be'.", "existence", {"keywords": ["to be"]}),
    (
        "Your answer must have 2 sections, each marked with PART X, such as PART 1.",
        "multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
    ),
]


@pytest.mark.parametrize("sentence, name, kwargs", RECOGNISED)
def test_recognise(sentence, name, kwargs):
    found, found_kwargs = judge.recognise(sentence)
    assert (found.split(":")[1], found_kwargs) == (name, kwargs)


@pytest.mark.parametrize(
    "sentence",
    [
        "Use exactly 3 bullet points, each under 10 words.",
        "Do not use the forbidden words.",
        "Include at least one keyword related to music, such as 'song' or 'melody'.",
        "The first word of each sentence must be 'But'.",
        "Answer with exactly 100 words, including the title.",
        "Write exactly 3 paragraphs, each about one animal.",
        "Highlight the most important word in bold.",
        "Start with a title in double angular brackets.",
        "Do not use any words related to travel, such as 'road'.",
        "Do not use commas to separate the items.",
        "Include the word 'a' in the first sentence.",
        "Answer in French verse.",
        "Use a formal tone.",
        "Include the words 'red' or 'blue'.",
        "",
    ],
)
def test_half_understood_is_not_recognised(sentence):
    assert judge.recognise(sentence) is None


def test_worked_examples_are_sound():
    hard, soft = judge.instructor_examples("hard"), judge.instructor_examples("soft")
    assert len(hard) + len(soft) >= 40
    for question in hard:
        assert judge.code_filter(question, 128, checkable=True) == ""
    for question in soft:
        assert judge.code_filter(question, 128) == ""


def test_heldout_is_sound_and_apart_from_the_seeds():
    rows = [row for _, row in data.read_jsonl(judge.PROMPTS / "heldout.jsonl")]
    seeds = {row["prompt"] for _, row in data.read_jsonl(judge.PROMPTS / "seeds.jsonl")}
    assert len(rows) >= 100 and len(seeds) >= 300
    own = {"startend:start_checker", "detectable_format:highlighted_words"}  # not IFEval's, so not in its format
    assert {i for row in rows for i in row["instruction_id_list"]} == set(judge.RULES) - own
    examples = {q.seed for kind in judge.KINDS for q in judge.instructor_examples(kind)}
    for row in rows:
        assert row["prompt"].split("\n")[0] not in seeds | examples
        assert judge.contradiction(list(zip(row["instruction_id_list"], row["kwargs"]))) == ""
        for name, kwargs in zip(row["instruction_id_list"], row["kwargs"]):
            assert judge.check(name, kwargs, "x") in (True, False, None)


GOOD = '{"c1": "a", "c2": "b", "c3": "c"}'


@pytest.mark.parametrize(
    "text", [GOOD, f"```json\n{GOOD}\n```", f"Sure! Here you go: {GOOD} I hope it helps {{}}.", "{not json} " + GOOD]
)
def test_proposals_that_parse(text):
    assert judge.parse_constraints(text, 3) == (["a", "b", "c"], "")


def test_unescaped_quotes_inside_a_value_are_forgiven():
    text = '{"c1": "Use the word "sun" twice.", "c2": "End with "bye".", "c3": "c"} and more'
    assert judge.parse_constraints(text, 3) == (['Use the word "sun" twice.', 'End with "bye".', "c"], "")


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"c1": "a "x" b", "c2": "b", "d1": "y "z"", "c3": "c"}', "no json"),
        ('{"c1": "a "x" b", "c2": "b", "c3": "c", "c4": "d"}', "no json"),
        ("no braces", "no json"),
        ('{"c1": "a", "c2": "b"}', "wrong keys"),
        ('{"c1": "a", "c2": "b", "c3": "c", "c4": "d"}', "wrong keys"),
        ('{"c1": "a", "c3": "b", "c2": "c"}', "wrong keys"),
        ('{"c1": "a", "c2": "b", "c3": 3}', "not text"),
        ('{"c1": "a", "c2": " ", "c3": "c"}', "not text"),
        ('{"c1": "a", "c1": "b", "c2": "b", "c3": "c"}', "no json"),
        ('{"c1": "a", "c2": "b", "c3": "c"', "no json"),
        ('{"a":' * 5000, "no json"),
    ],
)
def test_proposals_that_do_not(text, reason):
    assert judge.parse_constraints(text, 3) == ([], reason)


@pytest.mark.parametrize(
    "constraints, reason",
    [
        (["Answer with at most 20 words.", "Do not use any commas.", "Include the word 'sun'."], ""),
        (["Answer with at most 20 words.", "answer with at most 20 words", "Use no commas."], "duplicate"),
        (["Answer with at least 200 words.", "Answer with less than 100 words.", "Use no commas."], "contradiction"),
        (["Your entire response should be in JSON format.", "Use exactly 3 bullet points.", "x"], "contradiction"),
        (["Write in all capital letters.", "Your response should be in all lowercase letters.", "x"], "contradiction"),
        (["Include the word 'sun'.", "Do not use the words 'sun' and 'moon'.", "x"], "contradiction"),
        (["Do not use the forbidden words.", "Use no commas.", "x"], "words not named"),
        (["Why is the sky blue in summer?", "Use no commas.", "x"], "restates the seed"),
        (["Answer with at least 500 words.", "Use no commas.", "x"], "over the token limit"),
        (["y" * 400, "Use no commas.", "x"], "too long"),
    ],
)
def test_code_filter(constraints, reason):
    question = Question("Why is the sky blue in summer?", "hard", tuple(constraints))
    assert judge.code_filter(question, max_new_tokens=128) == reason


def test_an_instruction_that_leaves_no_room_is_rejected_on_demand():
    question = Question("Name a fruit.", "hard", ("Your answer must have at most 4 words.", "Use no commas."))
    assert judge.code_filter(question, 128) == ""
    assert judge.code_filter(question, 128, min_words=20) == "no room for an answer"


def test_checkable_rejects_what_no_rule_recognises():
    question = Question("Why?", "hard", ("Use a formal tone.", "Use no commas."))
    assert judge.code_filter(question, 128) == ""
    assert judge.code_filter(question, 128, checkable=True) == "not checkable"


CFG = types.SimpleNamespace(
    judge="hybrid", judge_think=0, soft_verdicts=False, filter="llm", max_new_tokens=64, checkable=False, min_words=0
)


class Oracle:
    """Stands in for a policy: answers each verdict prompt from a list, and remembers the prompts."""

    def __init__(self, values):
        self.values, self.prompts = list(values), []

    def encode(self, messages, opening=""):
        return messages[-1]["content"]

    def yes_probability(self, prompts):
        self.prompts += prompts
        return [self.values.pop(0) for _ in prompts]


def test_hybrid_asks_the_model_only_what_no_rule_decides():
    question = Question("Name a fruit.", "soft", ("Use no commas.", "Use a formal tone.", "Be kind."))
    oracle = Oracle([0.9, math.nan])
    (verdicts,) = judge.judge(oracle, [(question, "apple, pear")], CFG)
    assert verdicts == [Verdict(0.0, "rule"), Verdict(1.0, "judger"), Verdict(None, "judger")]
    assert judge.satisfaction(verdicts) == 0.5  # the missing verdict is left out, not counted as a "no"
    prompt = oracle.prompts[0]
    assert question.instruction in prompt and "apple, pear" in prompt and "Use a formal tone." in prompt
    assert "[ANSWER]\napple, pear\n[END OF ANSWER]" in prompt
    llm = types.SimpleNamespace(**(vars(CFG) | {"judge": "llm", "soft_verdicts": True}))
    (verdicts,) = judge.judge(Oracle([0.9, 0.2, 0.4]), [(question, "apple, pear")], llm)
    assert [v.value for v in verdicts] == [0.9, 0.2, 0.4] and {v.by for v in verdicts} == {"judger"}


def test_the_filter_asks_the_model_what_code_lets_through():
    good = Question(
        "Name a fruit.", "hard", ("Use no commas.", "Include the word 'ripe'.", "Answer with at most 9 words.")
    )
    bad = Question("Name a fruit.", "hard", ("Use no commas.", "Use no commas.", "x"))
    questions = [good, bad, good, good]
    assert judge.filter_questions(Oracle([0.9, 0.1, math.nan]), questions, CFG) == [
        "",
        "duplicate",
        "rejected by the model",
        "",
    ]
    code = types.SimpleNamespace(**(vars(CFG) | {"filter": "code"}))
    assert judge.filter_questions(Oracle([]), questions, code) == ["", "duplicate", "", ""]
    off = types.SimpleNamespace(**(vars(CFG) | {"filter": "off"}))
    assert judge.filter_questions(Oracle([]), questions, off) == [""] * 4


def test_rewards():
    question = Question("Name a fruit.", "hard", ("Use no commas.", "Be kind."))
    yes, no, missing = Verdict(1.0, "rule"), Verdict(0.0, "rule"), Verdict(None, "judger")
    assert judge.follower_reward(question, "apple", True, [yes, no]) == 0.5
    assert judge.follower_reward(question, "apple", True, [missing, missing]) is None
    for answer, ended in (("", True), ("apple", False), (question.instruction, True), ("name a fruit", True)):
        assert judge.follower_reward(question, answer, ended, [yes, yes]) == 0.0
    assert judge.follower_reward(question, question.instruction + "\nApple is my answer here.", True, [yes]) == 1.0
    assert [judge.instructor_reward(r, "hardest") for r in (0.0, 0.25, None)] == [1.0, 0.75, None]
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
    ],
)
def test_think_format(text, answer):
    assert judge.extract_answer(text, think=True) == answer
    assert judge.extract_answer(text, think=False) == text.strip()


def test_type_statistics():
    questions = [
        Question("q", "hard", ("Use no commas.", "Use no commas!", "Be kind.", "Answer with at most 9 words."))
    ]
    stats = judge.type_statistics(questions)
    assert stats == {"type_entropy": 1.5, "top_type": "no_comma", "top_share": 0.5}
    assert judge.type_statistics([])["type_entropy"] == 0


def test_prompts_put_what_is_shared_first(tmp_path):
    policy = rl.load(make_model(tmp_path / "m"), bits=16)
    question = Question("Name a fruit.", "hard", ("Use no commas.", "Be kind."))
    first, second = (judge.judger_prompt(policy, question, "apple", c) for c in question.constraints)
    shared = policy.decode(first[: packing.common_prefix(np.asarray(first), np.asarray(second))])
    assert "apple" in shared and question.instruction in shared
    same = [judge.instructor_prompt(policy, s, "hard", 3, random.Random(1)) for s in ("One?", "Two?")]
    assert policy.decode(same[0]).endswith("assistant\n" + judge.OPENING["hard"]) and "One?" in policy.decode(same[0])
    assert same[0][:600] == same[1][:600]
    assert policy.decode(judge.follower_prompt(policy, "Hi", think=True)).count("<answer>") == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(data.UserError, match="nowhere.jsonl: cannot be read"):
        data.read_jsonl(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    with pytest.raises(data.UserError, match="a.jsonl, line 2: not JSON"):
        data.read_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(data.UserError, match="b.jsonl, line 1: a JSON object"):
        data.read_jsonl(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(data.UserError, match="UTF-8"):
        data.read_jsonl(tmp_path / "c.jsonl")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_survived(text):
    judge.parse_constraints(text, 3)
    judge.recognise(text)
    judge.extract_answer(text, True)
    for name, kwargs, *_ in CASES:
        assert judge.check(name, kwargs, text) in (True, False)
        assert judge.check_loose(name, kwargs, text) in (True, False)
    json.dumps(judge.type_statistics([Question(text, "hard", (text,))]))
