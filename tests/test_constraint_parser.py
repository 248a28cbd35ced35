"""Which sentences are parsed, which are not, and which contradict each other."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verifiers import PIECES, TEXTS, constraint, is_fast

from extras.constraint_parser import parse_constraint
from extras.verifiers import find_contradiction, validate_kwargs

# fmt: off
LEAST, MOST, EXACTLY, LESS = "at least", "at most", "exactly", "less than"
# (sentence, category, values of its first kwargs). The few-shot examples (test_judge.py) have more.
PARSED = [
    ("The response must not exceed 50 words in length.", "number_words", 50, MOST),
    ("Your answer must have 10-20 words.", "number_words", 10, "between", 20),
    ("Your answer must be 50 words or less.", "number_words", 50, MOST),
    ("Your answer must be limited to exactly 90 words.", "number_words", 90, EXACTLY),
    ("Your answer must have a word count of at least 20 words and less than 50 words.",
     "number_words", 20, "between", 49),
    ("Your response should contain fewer than four sentences.", "number_sentences", 4, LESS),
    ("Limit the answer to three sentences.", "number_sentences", 3, MOST),
    ("There should be 3 paragraphs, separated by ***.", "number_paragraphs", 3),
    ("Write exactly 3 paragraphs.", "number_paragraphs", 3, EXACTLY, "\n\n"),
    ("Your answer must not have more than 3 paragraphs.", "number_paragraphs", 3, MOST, "\n\n"),
    ("The second paragraph must start with 'But.'", "nth_paragraph_first_word", 2, "but"),
    ("Paragraph 1 must start with the word 'हिन्दी'.", "nth_paragraph_first_word", 1, "हिन्दी"),
    ("Your answer must contain exactly 2 bullet points in markdown.", "number_bullet_lists", 2),
    ("Use at least two placeholders in square brackets, such as [date].", "number_placeholders", 2),
    ("Highlight at least 2 sections with markdown, i.e. *word*.", "number_highlighted_sections", 2),
    ("Highlight the word 'web' in bold.", "highlighted_words", ["web"], True),
    ("Highlight the words 'net' and 'web' in your answer using markdown emphasis.",
     "highlighted_words", ["net", "web"], False),
    ("Write 2 sections, each marked with PART X, such as PART 1.", "multiple_sections", "PART", 2),
    ("At the end of your response, add a postscript starting with 'P.S.'", "postscript", "P.S."),
    ("Write your entire response in English, in all capital letters.", "english_capital"),
    ("Write your answer in Dutch, no other language is allowed.", "response_language", "nl"),
    ("Your answer must be written without using any commas.", "no_comma"),
    ("The word 'pot' should appear at least twice.", "frequency", "pot", 2, LEAST),
    ("Include the words 'save' and \"spend\" in your response.", "existence", ["save", "spend"]),
    ("Include the exact text 'He came.'", "existence", ["He came."]),
    ("Your answer may not include the word 'sun'.", "forbidden_words", ["sun"]),
    ("Your answer must not include '!' or '?'.", "forbidden_words", ["!", "?"]),
    ("Do not use the words 'very,' or 'quite.'", "forbidden_words", ["very", "quite"]),
    ("Your answer must not include any of the following words: red, green, or blue.",
     "forbidden_words", ["red", "green", "blue"]),
    ("The letter 'B' must appear at least 5 times.", "letter_frequency", "b", 5, LEAST),
    ("Finish your response with the phrase 'Good night.'", "end_checker", "Good night."),
    ("Start your answer with the phrase 'Well, then.'", "start_checker", "Well, then."),
    ("Use one of the following options: 'Red.', 'No.'", "constrained_response", ["Red.", "No."]),
    # One pair of quotation marks is around a list, or around a text with a comma.
    ('Refrain from using the following words: "a, an, the"', "forbidden_words", ["a", "an", "the"]),
    ("Include the keywords 'sun, sea and sky'.", "existence", ["sun", "sea", "sky"]),
    ("Answer with one of the following options: “yes, no”.", "constrained_response", ["yes", "no"]),
    ("Include the exact words 'Well, then'.", "existence", ["Well, then"]),
]
NOT_PARSED = [
    # A quotation is not an instruction.
    "“No commas.”", "- `Use no commas`", "Please 'use no commas'.", "Your answer must be 'yes'.",
    # No part, or only a part, of the sentence is a known constraint.
    "Use a formal tone.", "Your answer must be small.", "", "Answer in French verse.",
    "Use exactly 3 bullet points, each under 10 words.", "Do not use commas to separate the items.",
    "Include the word 'a' in the first sentence.", "Use 3 words" + "!" * 300,
    "First repeat the request word for word, then answer in French.", "Use at least ² words.",
    "A title in double angular brackets, such as <<tea>>, and exactly 3 sections.",
    "Use 3 bullet points such as * a, each followed by an explanation.", "Write two-hundred words.",
    "Your answer must have at least twenty-five words.", "All-caps word count: 3 words.",
    # Some capital letters are not all letters, and "may" is no obligation.
    "Your answer must include capital letters.", "Your answer must contain lowercase letters.",
    # Keywords are not named, or alternatives. The verifier's last word has no full stop after it.
    "Do not use the forbidden words.", "Do not use the word processor.", "Include the word ''.",
    "Include at least one keyword related to music, such as 'song' or 'melody'.",
    "Your answer may include the word 'sun'.", "Include the words 'red' or 'blue'.",
    "Include the following words: red or blue.", "Use the words 'red' and 'blue' exactly 2 times.",
    "Use the words 'red, blue' 2 times.", "The letter 'ab' must appear at least 5 times.",
    "The first word of each sentence must be 'But'.", "End your answer with the word 'tomorrow'.",
]
CONTRADICTIONS = [
    (["Use the words 'ha' and 'ho' 2 times each.", "Include the word 'ho'."], False),
    (["Use the words 'ha' and 'ho' 2 times each.", "Use the word 'ho' at least 3 times."], True),
    (["Answer with at least 200 words.", "Answer with less than 100 words."], True),
    (["Answer with at most 2 words.", "Use at least three sentences."], True),
    (["Use between 9 and 0 words."], True),
    (["Your entire response should be in JSON format.", "Use exactly 3 bullet points."], True),
    (["Write in all capital letters.", "Your response should be in all lowercase letters."], True),
    (["Include the word 'sun'.", "Do not use the words 'Sun' and 'moon'."], True),
    (["Use only lowercase letters.", "Use at least 2 words in all capital letters."], True),
    (["Use only lowercase letters.", "Your response should be in German."], True),
]
# fmt: on


@pytest.mark.parametrize("row", PARSED, ids=lambda row: row[0][:40])
def test_parsed(row):
    assert parse_constraint(row[0]) == constraint(*row[1:])


@pytest.mark.parametrize("sentence", NOT_PARSED, ids=lambda sentence: sentence[:40])
def test_half_understood_sentences_are_not_parsed(sentence):
    assert parse_constraint(sentence) is None


@pytest.mark.parametrize("sentences, contradictory", CONTRADICTIONS)
def test_contradictions(sentences, contradictory):
    for order in permutations(map(parse_constraint, sentences)):
        assert bool(find_contradiction([*order])) == contradictory


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PARSED), TEXTS)
def test_no_text_raises(row, text):
    words = row[0].split(" ")
    words[len(text) % len(words)] = text if "'" not in text else f"'{text}'"
    for sentence in [" ".join(words), text, f"Use '{text}'."]:
        for id, kwargs in filter(None, [parse_constraint(sentence)]):
            assert validate_kwargs(id, kwargs) == ""
            assert isinstance(find_contradiction([(id, kwargs), constraint(*row[1:])]), str)


@pytest.mark.parametrize("piece", [*PIECES, "'a' and ", "at least 3 ", "please ", "such as *a*, "])
def test_long_repetitive_sentences_take_no_time(piece):
    for start in ["", "Include the words ", "Use at least 2 placeholders in brackets, such as "]:
        assert is_fast(lambda text=start + piece * 20_000: parse_constraint(text))
        assert is_fast(lambda text=start + piece * 300: parse_constraint(text[:300]))
