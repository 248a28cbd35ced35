"""What each verifier accepts and rejects."""

import time
from timeit import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extras import verifiers
from extras.verifiers import VERIFIERS, category, check, check_loose, validate_kwargs

IDS = {category(id): id for id in VERIFIERS}
WORDS, EXISTENCE = IDS["number_words"], IDS["existence"]


def constraint(name: str, *values) -> tuple[str, dict]:
    """(id, kwargs) from the category and the values of the verifier's first kwargs."""
    return IDS[name], dict(zip(VERIFIERS[IDS[name]].kwargs, values))


# fmt: off
# (category, values of its first kwargs, response that satisfies it, response that does not)
CHECKS = [
    ("number_words", [3, "at most"], "Two words", "These are four words"),
    ("number_words", [2, "between", 3], "a b c", "a b c d"),
    ("number_words", [1, "more than"], "two words", "one"),
    ("number_sentences", [2, "exactly"], "Dr. Lee came. He sat.", "Hello."),
    ("number_paragraphs", [2], "*** one\n***\ntwo ***", "one\n\ntwo"),
    ("number_paragraphs", [3, "at most"], "a *** b", "a *** *** b"),
    ("number_paragraphs", [2, "exactly", "\n\n"], "a\n\n\nb\nc", "a\nb"),
    ("nth_paragraph_first_word", [2, "but"], "No.\n\n'But, yes", "But\n\nNo"),
    ("nth_paragraph_first_word", [2, "so", 2, "***"], "a *** so b", "so"),
    ("number_bullet_lists", [2], "* tea\n- milk\n**bold** start", "* a\n* b\n* c"),
    ("number_placeholders", [2], "[a] [b]", "[a]"),
    ("number_highlighted_sections", [2], "*a* and *b*", "*a* ** **"),
    ("highlighted_words", [["sea"], True], "The **open sea**.", "The *sea*, **a"),
    ("highlighted_words", [["a", "b"], False], "*a* _b_", "*a* b"),
    ("highlighted_words", [["sea"], False], "* The *sea*.", "* A sea *."),
    ("multiple_sections", ["PART", 2], "PART 1 a PART 2 b", "PART 1"),
    ("title", [], "<<Rain>>\nIt fell.", "<< >>"),
    ("postscript", ["P.S."], "Bye.\nP. S. Call.", "PS call"),
    ("json_format", [], '```json\n{"a": [1]}\n```', 'It is: {"a": 1}'),
    ("constrained_response", [["yes", "no"]], "It is no.", "It is not cheese."),
    ("constrained_response", [], "My answer is maybe.", "Perhaps."),
    ("two_responses", [], "a\n******\nb", "a ****** a"),
    ("two_responses", [], "******\none******two******", "one ****** two ****** three"),
    ("repeat_prompt", ["Say hi."], "Say hi. Hello!", "Hello!"),
    ("capital_word_frequency", [2, "less than"], "GO on", "DON'T go, I say"),
    ("capital_word_frequency", [2, "exactly"], "I'm with IBM", "I'm HERE, at IBM"),
    ("capital_word_frequency", [2, "exactly"], "CANNOT", "CAN'T DO"),
    ("english_capital", [], "THE SUN IS A STAR AND SHINES.", "THE Sun."),
    ("english_lowercase", [], "the sun is a star and it shines.", "The sun is a star."),
    ("response_language", ["de"], "Der Hund schläft heute im warmen Garten.", "The dog sleeps."),
    ("response_language", ["zh-cn"], "學習一門新的語言需要時間和耐心。", "We walk in the park."),
    ("no_comma", [], "No; none.", "Well, yes."),
    ("frequency", [["ha", "ho"], 2, "exactly"], "Ha, ha. Hoho", "ha ha ha ho ho"),
    ("existence", [["sun", "sea"]], "The Sun over the seaside.", "The sun."),
    ("forbidden_words", [["can", "c++"]], "A candle.", "We like C++."),
    ("letter_frequency", ["z", 2, "less than"], "Zoo", "zigzag"),
    ("end_checker", ["The end."], 'So it was. the END."', "The end. Or not"),
    ("start_checker", ["Dear sun"], '"**dear Sun**, hello', "Dear sunflower"),
    ("start_checker", ["News:"], "News:today", "The news: none"),
    ("quotation", [], ' "Hi." ', '"Hi.'),
    # Combining marks belong to words, in Hindi and Thai.
    ("forbidden_words", [["कि"]], "यह किताब है।", "मैंने कहा कि हाँ।"),
    ("highlighted_words", [["क"], False], "*क वह*", "*कि वह*"),
    ("nth_paragraph_first_word", [1, "ที่"], "ที่ นี่", "ที่นี่"),
]
WORD_COUNTS = {
    "don't stop, 3.5 snake_case": 6, "cafe\u0301 ole\u0301": 2,
    "मैं रोज़ सुबह बगीचे में टहलता हूँ और फिर गरम चाय पीता हूँ।": 13,
    "ที่นี่ มีน้ำ": 2, "مُحَمَّدٌ يَقْرَأُ الكِتَابَ": 3,
    # A joiner after a mark does not split a word. An emoji's mark (variation selector) is no word.
    "ශ්\u200dරී ලංකා": 2, "می\u200cخواهم": 2, "I ❤\ufe0f it": 2,
}
SENTENCE_COUNTS = {
    "One. Two! Three?": 3, "Mr. A. Smith came. He left.": 2, "**Note.** Read this.": 2,
    "1. **Boil** the water.\n2. Add tea.": 4, "It costs 3.50 today. Then more.": 2,
    "In the year 5. it rained.": 1, "Well... maybe. He left... The end.": 3,
    '"Stop!" she said. "Why?" he asked.': 4, "The U.S. Senate met at 5 p.m. on Monday.": 1,
}
# (id, kwargs, error)
INVALID = [
    ("x:y", {}, "x:y: no verifier"),
    (WORDS, {"num_words": None, "relation": "at least"}, "num_words: missing"),
    (WORDS, {"num_words": 3, "relation": "about"}, "relation: 'about' is not a relation"),
    (WORDS, {"num_words": True, "relation": "at least"}, "num_words: True is not"),
    (WORDS, {"num_words": -1, "relation": "at least"}, "num_words: -1 is not"),
    (IDS["letter_frequency"], {"letter": "ab"}, "letter: 'ab' is not one letter"),
    (IDS["highlighted_words"], {"phrases": ["a"], "bold": "yes"}, "bold: 'yes' is not true or f"),
]
# Repeated, these make a regular expression that backtracks take minutes.
PIECES = ["a", "a, ", "*", "* ", "**_", "'", "\"a' ", "<<", "[", "\n\n", "\n \n- ", "1 or 2 ",
          "P. S. ", "U.S.A. ", ".", "!?", "A'", "``", "P.", "<<a", "`{", "__a ", "__sea", "**sea ",
          "1. ", "n't", "P.P.S", "PART ", "PART 1", "\n", "- ", "{", '{"a":', "क्\u200d", "\u0301"]
# fmt: on
ODD = ["²", "٣", "9" * 400, "\ud800", "''", '""', "(?P<", "[", "\\", "***", "\0", "P.S.", "\u0301"]
TEXTS = st.text(st.characters(), max_size=80) | st.lists(st.sampled_from(ODD)).map(" ".join)
LONG = [(piece * 20_000)[:20_000] for piece in PIECES]
LONG += [f"x{text}x:b. C" for text in LONG]


@pytest.mark.parametrize("name, values, good, bad", CHECKS)
def test_check(name, values, good, bad):
    if name == "response_language" and verifiers.langdetect is None:
        pytest.skip("needs langdetect")
    id, kwargs = constraint(name, *values)
    assert check(id, kwargs, good) is True and check_loose(id, kwargs, good) is True
    assert check(id, kwargs, bad) is False
    assert check(id, kwargs, " \n") is False and check_loose(id, kwargs, "") is False


def test_words_are_counted_with_their_marks_and_sentences_like_nltk():
    for text, count in WORD_COUNTS.items():
        assert check(*constraint("number_words", count, "exactly"), text) is True, text
    for text, count in SENTENCE_COUNTS.items():
        assert verifiers.count_sentences(text) == count, text


def test_kwargs_are_validated_and_conflicts_are_categories():
    assert {name for name, *_ in CHECKS} == set(IDS) and len(IDS) == 25 + 2
    for id, kwargs, error in INVALID:
        assert validate_kwargs(id, kwargs).startswith(error)
    for name, values, *_ in CHECKS:
        id, kwargs = constraint(name, *values)
        assert set(VERIFIERS[id].conflicts.split()) <= set(IDS)
        assert validate_kwargs(id, kwargs) == ""
        for key in kwargs:
            assert validate_kwargs(id, kwargs | {key: {}}).startswith(f"{key}: {{}} is not ")
    # IFEval's rows contain the kwargs of all verifiers, most of them None, or a text for a list.
    names = dict.fromkeys(name for verifier in VERIFIERS.values() for name in verifier.kwargs)
    words, bullets = names | {"num_words": 3, "relation": "at least"}, names | {"num_bullets": 1}
    assert validate_kwargs(WORDS, words) == "" and check(WORDS, words, "one two three") is True
    assert check(IDS["number_bullet_lists"], bullets, "- a\n- b") is False
    rows = [(IDS["number_bullet_lists"], bullets), constraint("response_language", "en")]
    assert verifiers.find_contradiction(rows) == ""
    assert check(EXISTENCE, {"keywords": "sun"}, "The sunny side.") is True


def test_languages_are_undecidable_without_langdetect(monkeypatch):
    german = constraint("response_language", "de")
    monkeypatch.setattr(verifiers, "langdetect", None)
    assert check(*german, "Der Hund") is None and check_loose(*german, "Der Hund") is None
    assert not verifiers.is_decidable(german) and not verifiers.is_decidable(None)
    assert verifiers.is_decidable(constraint("no_comma"))


def test_loose_removes_asterisks_and_the_first_or_last_line():
    end, lowercase = constraint("end_checker", "bye"), constraint("english_lowercase")
    assert check(*end, "Text. *bye*") is False
    assert check_loose(*end, "Text. *bye*") is True
    assert check_loose(*lowercase, "Sure! Here:\nthe sun is a star and it shines.") is True
    assert check_loose(*end, "Text.\nGood night") is False
    # It is undecidable only if the strict verdict is.
    for strict, first, loose in ((False, False, False), (None, False, None), (None, True, True)):
        verdicts = {"one\ntwo": strict, "two": None, "one": first}
        verify = lambda id, kwargs, text, verdicts=verdicts: verdicts[text]
        assert check_loose("", {}, "one\ntwo", verify) is loose


@settings(max_examples=20, deadline=None)
@given(TEXTS, TEXTS)
def test_no_text_raises(one, two):
    for name, values, *_ in CHECKS:
        id, kwargs = constraint(name, *values)
        assert check_loose(id, kwargs, f"{one}\n{two}") in (True, False, None)
        texts = {k: one if type(v) is str and "relation" not in k else v for k, v in kwargs.items()}
        texts = {k: [one, two] if type(v) is list else v for k, v in texts.items()}
        if validate_kwargs(id, texts) == "":
            assert check(id, texts, two) in (True, False, None)
            assert isinstance(verifiers.find_contradiction([(id, texts), (id, kwargs)]), str)


def is_fast(task) -> bool:
    """Whether one of three runs takes at most 0.1 s of CPU time."""
    return any(timeit(task, timer=time.process_time, number=1) <= 0.1 for _ in range(3))


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:6] + text[-2:]))
def test_long_repetitive_texts_take_no_time(text, monkeypatch):
    monkeypatch.setattr(verifiers, "langdetect", None)
    for name, values in {name: values for name, values, *_ in CHECKS}.items():
        assert is_fast(lambda row=(name, *values): check(*constraint(*row), text)), name
