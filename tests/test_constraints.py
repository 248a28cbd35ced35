"""Every entry of the registry, and what must and must not be understood."""

import math
import time
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import judge
from prompts import constraints

WORDS = "length_constraints:number_words"
ASKED = "Say hi."
IDS = {id.split(":")[1]: id for id in judge.RULES}


def kwargs_of(rule) -> dict:
    """The kwargs of an entry's own sentence, with the request that a caller fills in."""
    asked = {"prompt_to_repeat": ASKED} if "prompt_to_repeat" in rule.kwargs else {}
    return judge.recognise(rule.sentence)[1] | asked


@pytest.mark.parametrize("rule", judge.RULES.values(), ids=lambda rule: rule.id)
def test_every_entry_recognises_its_sentence_and_tells_good_from_bad(rule):
    assert judge.recognise(rule.sentence)[0] == rule.id
    kwargs = kwargs_of(rule)
    assert judge.problem(rule.id, kwargs) == "" and judge.contradiction([(rule.id, kwargs)]) == ""
    assert judge.check(rule.id, kwargs, " \n") is False
    assert judge.check_loose(rule.id, kwargs, "") is False
    if constraints.langdetect or rule.id != "language:response_language":
        assert judge.check(rule.id, kwargs, rule.good) is True
        assert judge.check_loose(rule.id, kwargs, rule.good) is True
        assert judge.check(rule.id, kwargs, rule.bad) is False
    assert set(rule.clashes.split()) <= set(IDS)
    for name in rule.kwargs:
        wrong = kwargs | {name: {}}
        assert judge.problem(rule.id, wrong).startswith(f"{name}: {{}} is not ")
    assert len(judge.RULES) == 25 + 2


CHECKS = [
    ("capital_word_frequency", (2, "less than"), "GO on", "DON'T go, I say"),
    ("capital_word_frequency", (2, "exactly"), "I'm with IBM", "I'm HERE, at IBM"),
    ("capital_word_frequency", (2, "exactly"), "CANNOT", "CAN'T DO"),
    ("two_responses", (), "******\none******two******", "one ****** two ****** three"),
    ("postscript", ("P.P.S",), "Bye.\nP.P.S. Call me.", "Bye.\nP.S. Call me."),
    ("json_format", (), '{"a": 1}', 'Here it is: {"a": 1}'),
    ("constrained_response", (), "My answer is maybe.", "Perhaps."),
    ("number_bullet_lists", (1,), "- a\n**bold** start", "nothing"),
    ("number_bullet_lists", (2,), "* a\n- b", "* a\n* b\n* c"),
    ("keyword_list", (["a1", "b1"], 1, "exactly"), "a1 b1", "a1 b1 b1"),
    ("forbidden_words", (["can", "c++"],), "A candle.", "We like C++."),
    ("nth_paragraph_first_word", (2, "so", 2, "***"), "a *** so b", "so"),
    ("number_paragraphs", (2,), "*** a *** b ***", "a *** *** b"),
    ("number_paragraphs", (3, "at most"), "a *** b", "a *** *** b"),
    ("number_paragraphs", (2, "exactly", "\n\n"), "a\n\n\nb\nc", "a\nb"),
    ("number_words", (2, "between", 3), "a b c", "a b c d"),
    ("number_words", (3, "less than"), "two words", "not-two words"),
    ("start_checker", ("News:",), "News:today", "The news: none"),
    ("highlighted_words", (["a", "b"], False), "*a* _b_", "*a* b"),
    ("response_language", ("zh-cn",), "學習一門新的語言需要時間和耐心。", "We walk in the park."),
    ("response_language", ("zh",), "今天天气很好，我们去公园散步吧。", "We walk in the park."),
    # A text where a list is meant is one keyword.
    ("existence", ("sun",), "The sunny side.", "nus"),
]


@pytest.mark.parametrize("name, values, good, bad", CHECKS)
def test_checks(name, values, good, bad):
    id = IDS["frequency" if name == "keyword_list" else name]
    if not constraints.langdetect and name == "response_language":
        pytest.skip("without langdetect it is undecided")
    kwargs = dict(zip(judge.RULES[id].kwargs, values))
    assert (judge.check(id, kwargs, good), judge.check(id, kwargs, bad)) == (True, False)


@pytest.mark.parametrize(
    "text, count",
    [
        ("One. Two! Three?", 3),
        ("Mr. A. Smith came. He left.", 2),
        ("1. **Boil** the water.\n2. Add tea.", 4),
        ("It costs 3.50 today. Then more.", 2),
        ("In the year 5. it rained.", 1),
        ("Well... maybe. He left... The end.", 3),
        ('"Stop!" she said. "Why?" he asked.', 4),
        ("**Note.** Read this.", 2),
        ("The U.S. Senate met at 5 p.m. on Monday.", 1),
    ],
)
def test_sentences_are_counted_as_punkt_counts_them(text, count):
    assert constraints.count_sentences(text) == count


def test_language_is_undecided_without_langdetect(monkeypatch):
    monkeypatch.setattr(constraints, "langdetect", None)
    assert judge.check("language:response_language", {"language": "de"}, "Der Hund") is None
    assert judge.check_loose("language:response_language", {"language": "de"}, "Der Hund") is None


@pytest.mark.parametrize(
    "sentence, good, bad",
    [
        ("Your answer must not include '!' or '?'.", "Fine.", "Great! Really."),
        ("Your answer must not include 'c++'.", "C is old.", "I like C++, too."),
        (
            "Answer with one of the following options: 'yes', 'no'.",
            "It is no.",
            "It is not cheese.",
        ),
        (
            "Highlight the word 'sea' in your answer using markdown emphasis.",
            "* The *sea*.",
            "* A sea *.",
        ),
        ("Your answer must have 10-20 words.", "a " * 12, "a " * 9),
        ("Your answer may not include the word 'sun'.", "Sunday.", "The sun."),
    ],
)
def test_sentences_to_verdicts(sentence, good, bad):
    id, kwargs = judge.recognise(sentence)
    assert judge.check(id, kwargs, good) and not judge.check(id, kwargs, bad)


def test_a_loose_verdict_is_missing_only_where_the_strict_one_is(monkeypatch):
    verdicts = {"one\ntwo": False, "two": None, "one": False}
    monkeypatch.setattr(constraints, "check", lambda id, kwargs, text: verdicts[text])
    assert constraints.check_loose("", {}, "one\ntwo") is False
    verdicts["one\ntwo"] = None
    assert constraints.check_loose("", {}, "one\ntwo") is None
    verdicts["one"] = True
    assert constraints.check_loose("", {}, "one\ntwo") is True


def test_loose_forgives_asterisks_and_a_first_or_last_line():
    end, lower = ("startend:end_checker", {"end_phrase": "bye"}), "change_case:english_lowercase"
    assert judge.check(*end, "Text. *bye*") is False
    assert judge.check_loose(*end, "Text. *bye*") is True
    assert judge.check_loose(lower, {}, "Sure! Here:\nthe sun is a star and it shines.") is True
    assert judge.check_loose(*end, "Text.\nGood night") is False


AT_LEAST, AT_MOST, EXACTLY = "at least", "at most", "exactly"
RECOGNISED = [
    ("Answer with at least 600 words.", "number_words", 600, AT_LEAST),
    ("The response must not exceed 50 words in length.", "number_words", 50, AT_MOST),
    ("Your answer should be between 20 and 30 words.", "number_words", 20, "between", 30),
    ("Your answer must be 50 words or less.", "number_words", 50, AT_MOST),
    ("Answer with a number of words less than 15.", "number_words", 15, "less than"),
    ("Limit your response to 50 words.", "number_words", 50, AT_MOST),
    ("Your answer must be limited to exactly 90 words.", "number_words", 90, EXACTLY),
    (
        "Your answer must have a word count of at least 20 words and less than 50 words.",
        *("number_words", 20, "between", 49),
    ),
    ("Your response should contain fewer than four sentences.", "number_sentences", 4, "less than"),
    ("Limit the answer to three sentences.", "number_sentences", 3, AT_MOST),
    ("There should be 3 paragraphs, separated by ***.", "number_paragraphs", 3),
    ("Write exactly 3 paragraphs.", "number_paragraphs", 3, EXACTLY, "\n\n"),
    ("Your answer must not have more than 3 paragraphs.", "number_paragraphs", 3, AT_MOST, "\n\n"),
    ("Your answer must contain exactly 2 bullet points in markdown.", "number_bullet_lists", 2),
    ("Use at least three bullet points.", "number_bullet_lists", 3, AT_LEAST),
    ("Include the words 'save' and \"spend\" in your response.", "existence", ["save", "spend"]),
    ("Your answer must contain the exact text 'to be'.", "existence", ["to be"]),
    ("Include the exact text 'He came.'", "existence", ["He came."]),
    ("Do not include the word 'rain'.", "forbidden_words", ["rain"]),
    ("Do not use the word 'very.'", "forbidden_words", ["very"]),
    ("Do not use the words 'very,' or 'quite.'", "forbidden_words", ["very", "quite"]),
    (
        "Your answer must not include any of the following words: red, green, or blue.",
        *("forbidden_words", ["red", "green", "blue"]),
    ),
    ("The word 'pot' should appear at least twice.", "frequency", "pot", 2, AT_LEAST),
    ("Use the words 'red' and 'blue' 2 times each.", "frequency", ["red", "blue"], 2, EXACTLY),
    ("The letter 'b' must appear at least 5 times.", "letter_frequency", "b", 5, AT_LEAST),
    ("Please avoid using any commas.", "no_comma"),
    ("Your answer must be written without using any commas.", "no_comma"),
    ("There must not be any commas whatsoever.", "no_comma"),
    ("The entire response should be in all lowercase letters.", "english_lowercase"),
    ("Write your entire response in English, in all capital letters.", "english_capital"),
    ("Finish your response with the phrase 'Good night.'", "end_checker", "Good night."),
    ("Start your answer with the phrase 'Once upon'.", "start_checker", "Once upon"),
    ("Start your answer with the phrase 'Well, then.'", "start_checker", "Well, then."),
    ("Wrap your entire response with double quotation marks.", "quotation"),
    ("Your entire response should be in JSON format.", "json_format"),
    (
        "Write your entire response in Dutch, no other language is allowed.",
        *("response_language", "nl"),
    ),
    ("Your response should be in Chinese.", "response_language", "zh"),
    ("At the end of your response, add a postscript starting with 'P.S.'", "postscript", "P.S."),
    ("The second paragraph must start with 'But.'", "nth_paragraph_first_word", 2, "but"),
    ("Highlight the word 'web' in bold.", "highlighted_words", ["web"], True),
    (
        "Highlight the words 'net' and 'web' in your answer using markdown emphasis.",
        *("highlighted_words", ["net", "web"], False),
    ),
    (
        "Your answer must have 2 sections, each marked with PART X, such as PART 1.",
        *("multiple_sections", "PART", 2),
    ),
    ("Include a title in double angular brackets, such as <<tea>>.", "title"),
]


@pytest.mark.parametrize("row", RECOGNISED, ids=lambda row: row[0][:40])
def test_recognised(row):
    sentence, name, *values = row
    id = IDS[name]
    kwargs = dict(zip(judge.RULES[id].kwargs, values))
    assert judge.recognise(sentence) == (id, kwargs)


@pytest.mark.parametrize(
    "sentence",
    [
        "Use exactly 3 bullet points, each under 10 words.",
        # To have some of it is not to be all of it; what may be need not.
        "Your answer must include capital letters.",
        "Your answer must contain lowercase letters.",
        "Your answer must be small.",
        "Your answer must be 'yes'.",
        "All-caps word count: 3 words.",
        "Your answer must mention JSON.",
        "Your answer may include the word 'sun'.",
        # A number in two words is no range; a last word may have a full stop after it.
        "Write two-hundred words.",
        "Your answer must have at least twenty-five words.",
        "End your answer with the word 'tomorrow'.",
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
        "Do not use the word processor.",
        "First repeat the request word for word, then answer in French.",
        "Include the words 'red' or 'blue'.",
        "",
        # What follows an example is not part of it.
        "A title in double angular brackets, such as <<tea>>, and exactly 3 sections.",
        "Use 3 bullet points such as * a, each followed by an explanation.",
        "Use at least 2 placeholders in square brackets, such as [name], and no commas.",
        "Highlight at least 2 sections with markdown, such as *this*, and end with a joke.",
        "Your answer must contain exactly 3 sentences from the text.",
        "Use the words 'red' and 'blue' exactly 2 times.",
        "The letter 'ab' must appear at least 5 times.",
        "Include the following words: red or blue.",
        "Use between 3 sentences.",
        "Use at least ² words.",
        "Include the word ''.",
        "Use 3 words" + "!" * 300,
    ],
)
def test_half_understood_is_not_recognised(sentence):
    assert judge.recognise(sentence) is None


@pytest.mark.parametrize(
    "id, kwargs, start",
    [
        ("x:y", {}, "x:y: no constraint"),
        (WORDS, {"relation": AT_LEAST}, "num_words: missing"),
        (WORDS, {"num_words": None, "relation": AT_LEAST}, "num_words: missing"),
        (WORDS, {"num_words": 3, "relation": "about"}, "relation: 'about'"),
        (WORDS, {"num_words": 3, "relation": ["at least"]}, "relation: "),
        (WORDS, {"num_words": "3", "relation": AT_LEAST}, "num_words: '3'"),
        (WORDS, {"num_words": True, "relation": AT_LEAST}, "num_words: True"),
        (WORDS, {"num_words": -1, "relation": AT_LEAST}, "num_words: -1"),
        ("keywords:existence", {"keywords": "sun"}, "keywords: 'sun' is not a list of texts"),
        ("keywords:existence", {"keywords": [1]}, "keywords: [1]"),
        (IDS["letter_frequency"], {"letter": "ab"}, "letter: 'ab' is not one letter"),
        (IDS["highlighted_words"], {"phrases": ["a"], "bold": "yes"}, "bold: 'yes'"),
    ],
)
def test_problem_names_the_key(id, kwargs, start):
    assert judge.problem(id, kwargs).startswith(start)


def test_problem_passes_what_is_right():
    right = {"num_words": 3, "relation": AT_LEAST, "keywords": None, "max_words": None}
    assert judge.problem(WORDS, right) == ""
    assert judge.problem("keywords:frequency", {"keyword": ["a"], **right, "frequency": 2}) == ""
    assert judge.check(WORDS, right, "one two three") is True


@pytest.mark.parametrize(
    "sentences, clash",
    [
        (["Answer with at most 20 words.", "Do not use any commas.", "Include the word 'sun'."], 0),
        (["Answer with at least 200 words.", "Answer with less than 100 words."], 1),
        (["Answer with at most 2 words.", "Use at least three sentences."], 1),
        (["Your entire response should be in JSON format.", "Use exactly 3 bullet points."], 1),
        (["Write in all capital letters.", "Your response should be in all lowercase letters."], 1),
        (["Include the word 'sun'.", "Do not use the words 'Sun' and 'moon'."], 1),
        (["Use the word 'sun' exactly twice.", "Do not use the word 'sun'."], 1),
        (["Use the words 'ha' and 'ho' 2 times each.", "Use the word 'ho' at least 3 times."], 1),
        (["Use the words 'ha' and 'ho' 2 times each.", "Include the word 'ho'."], 0),
        (["Use only lowercase letters.", "Use at least 2 words in all capital letters."], 1),
        (["Use only lowercase letters.", "Your response should be in German."], 1),
    ],
)
def test_contradiction(sentences, clash):
    for order in permutations(sentences):
        assert bool(judge.contradiction([judge.recognise(s) for s in order])) == bool(clash)


def test_intervals():
    rules = [judge.recognise(s) for s in ("Use at least 9 words.", "Use less than 20 words.")]
    rules.append(judge.recognise("Use the words 'Red' and 'blue' 2 times each."))
    assert judge.intervals(rules) == {
        (WORDS, None): (9, 19),
        ("keywords:frequency", "red"): (2, 2),
        ("keywords:frequency", "blue"): (2, 2),
    }
    assert judge.intervals(rules[:1]) == {(WORDS, None): (9, math.inf)}


ODD = ["²", "٣", "9" * 400, "\ud800", "''", '""', "(?P<", "[", "\\", "***", "\0", "P.S."]
ENTRIES = [(rule.id, kwargs_of(rule)) for rule in judge.RULES.values()]
TEXTS = st.text(st.characters(), max_size=80) | st.lists(st.sampled_from(ODD)).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_any_text_is_survived_as_an_answer(one, two):
    for id, kwargs in ENTRIES:
        assert judge.check(id, kwargs, one) in (True, False, None)
        assert judge.check_loose(id, kwargs, f"{one}\n{two}") in (True, False, None)
        texts = {k: one if type(v) is str and "relation" not in k else v for k, v in kwargs.items()}
        if judge.problem(id, texts) == "":
            assert judge.check(id, texts, two) in (True, False, None)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*judge.RULES.values()]), TEXTS), min_size=3, max_size=3))
def test_any_text_is_survived_as_a_constraint(drawn):
    found = []
    for rule, text in drawn:
        words = rule.sentence.split(" ")
        words[len(text) % len(words)] = text if "'" not in text else f"'{text}'"
        sentences = rule.sentence, " ".join(words), text, f"Use '{text}'."
        found += [judge.recognise(sentence) for sentence in sentences]
    found = [rule for rule in found if rule]
    for id, kwargs in found:
        assert judge.problem(id, kwargs) == ""
        assert judge.check(id, kwargs, drawn[0][1]) in (True, False, None)
        judge.contradiction([(id, kwargs)])
    for three in zip(found, found[1:], found[2:]):
        assert judge.contradiction([*three]) or judge.intervals([*three]) is not None


PIECES = ["a", "a, ", "*", "* ", "**_", "'", "\"a' ", "<<", "[", "\n\n", "\n \n- ", "1 or 2 "]
PIECES += ["at least 3 ", "P. S. ", "U.S.A. ", ".", "!?", "A'", "``", "P.", "<<a", "`{"]
PIECES += ["__a ", "__sea", "**sea ", "1. ", "n't", "P.P.S", "PART ", "PART 1", "\n", "- "]
LONG = [(piece * 20_000)[:20_000] for piece in PIECES]
LONG += ["x" + text + "x" for text in LONG] + ["highlight the word " + "'a' and " * 2_400]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:6]))
def test_twenty_thousand_characters_take_no_time(text, monkeypatch):
    monkeypatch.setattr(constraints, "langdetect", None)
    work = [lambda rule=rule: judge.check(*rule, text) for rule in ENTRIES]
    work += [lambda: judge.recognise(text), lambda: judge.recognise(text[:300])]
    for task in work:
        start = time.process_time()
        task()
        assert time.process_time() - start < 0.1
