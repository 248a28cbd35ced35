"""constraints.py: what code can check, IFEval's 25 instructions and two of our own, an entry each.

Ids and kwargs are those of IFEval (Zhou et al. 2023, arXiv 2311.07911); the code is our own.
"""

import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

try:
    import langdetect

    # It samples; the same text must get the same language.
    langdetect.DetectorFactory.seed = 0
except ImportError:
    langdetect = None

# Longer "constraints" are answers or restated seeds.
MAX_CONSTRAINT_CHARS = 300


@dataclass(frozen=True)
class Rule:
    """A constraint that code can check. A new one is one more entry in RULES.

    takes: its kwargs, whose names say their kinds (KINDS); "relation=exactly" may be missing, and
        then is "exactly". A relation is between the first number and what `check` counts.
    patterns: its sentences, once `_plain` has made them plain. In these regular expressions # is
        a relation and a number, Q is quoted text, a word in capitals is a part from PARTS.
    check: (text, kwargs) -> a verdict, a count, or a list of counts.
    sentence, good, bad: a worked example; the answer `good` follows the sentence, `bad` does not.
    clashes: names of constraints that cannot hold beside it; one of two names the other.
    finish: (kwargs, match) -> kwargs, or None if the sentence is not this constraint after all.
    implies: kwargs -> other constraints that hold if this one does.
    """

    id: str
    takes: str
    patterns: list[str]
    check: Callable
    sentence: str
    good: str
    bad: str
    clashes: str = ""
    finish: Callable = lambda kwargs, match: kwargs
    implies: Callable = lambda kwargs: []

    @cached_property
    def kwargs(self) -> dict[str, str | None]:
        """Name -> default, None where it must be given."""
        parts = [part.partition("=") for part in self.takes.split(", ") if part]
        return {name: default if equals else None for name, equals, default in parts}

    def first(self, *kinds: str) -> str | None:
        """Its first kwarg of these kinds."""
        return next((name for name in self.kwargs if _kind(name)[0] in kinds), None)


# Laid out by hand: an entry is one paragraph.
# fmt: off
RULES = {rule.id: rule for rule in [
    Rule("length_constraints:number_words", "num_words, relation, max_words=",
         ["# words?( long)?(, no more,? (and )?no less)?",
          "(a )?(total )?(word count|length|number of words)( of)? #( words)?"],
         lambda text, k: len(re.findall(r"\w+", text)),
         "Answer in at most 3 words.", "Two words", "These are four words",
         finish=lambda k, m: k if ("max_words" in k) == (k["relation"] == "between") else None),
    Rule("length_constraints:number_sentences", "num_sentences, relation",
         ["# (complete )?sentences?( long)?"],
         lambda text, k: count_sentences(text),
         "Your answer should contain exactly 2 sentences.", "Dr. Lee came. He sat.", "Hello."),
    Rule("length_constraints:number_paragraphs", "num_paragraphs, relation=exactly, divider=***",
         ["# paragraphs?DIVIDED?"],
         lambda text, k: len(_parts(text, k["divider"])) or -1,
         "Write 2 paragraphs, separated by ***.", "one\n***\ntwo", "one\n\ntwo",
         "nth_paragraph_first_word",
         lambda k, m: k if m["divider"] else {"relation": "exactly"} | k | {"divider": "\n\n"}),
    Rule("length_constraints:nth_paragraph_first_word",
         "nth_paragraph, first_word, num_paragraphs=, divider=\n\n",
         [r"((exactly )?(?P<num_paragraphs>\d+) paragraphs?DIVIDED?[.,]? ((and|with) )?)?"
          "(the )?paragraph # (MUST )?(start|begin)(n?ing)? with (the )?(word )?Q"],
         lambda text, k: _nth_starts(text.split(k["divider"]), k),
         "Paragraph 2 must start with the word 'But'.", "No.\n\n'but, yes", "But\n\nNo",
         finish=lambda k, m: k | {"first_word": k["first_word"].lower()}
         if k["first_word"].isalnum() else None),
    Rule("detectable_format:number_bullet_lists", "num_bullets, relation=exactly",
         ["(bullet points( MARKDOWN)? and there MUST be )?# (markdown )?bullet( point)?s?"
          r"( MARKDOWN)?(,? (each )?(start|beginn)ing with (\*|-)"
          r"|,? (such as|like):? \* [^*.,;:]*)?"
          r"(. use the markdown bullet points such as:( \* this is point \d.?)+)?"],
         lambda text, k: len(re.findall(r"^[^\S\n]*(?:-|\*[^*])", text, re.M)),
         "Use exactly 2 bullet points in markdown.", "* tea\n- milk", "* tea\n**milk**"),
    Rule("detectable_content:number_placeholders", "num_placeholders, relation=at least",
         ["# ((distinct|different) )?placeholders?,? ((represented|enclosed) )?(by|in|with) "
          "(square )?bracketsEXAMPLE?"],
         lambda text, k: len(re.findall(r"\[[^\[\]\n]*\]", text)),
         "Use at least two placeholders in square brackets, such as [date].", "[a] [b]", "[a]"),
    Rule("detectable_format:number_highlighted_sections", "num_highlights, relation=at least",
         ["highlight # SECTIONS( MARKDOWN)?EXAMPLE?",
          "# (highlighted SECTIONS|SECTIONS (MUST be )?highlighted)( MARKDOWN)?EXAMPLE?"],
         lambda text, k: sum(bool(part.strip()) for mark in (r"\*", r"\*\*")
                             for part in re.findall(rf"{mark}([^\n*]*){mark}", text)),
         "Highlight at least 2 sections with markdown, i.e. *word*.", "*a* and *b*", "*a* ** **"),
    Rule("detectable_format:highlighted_words", "phrases, bold",
         ["highlight KEYWORD Q EMPHASIS", "KEYWORD Q MUST be (highlighted )?EMPHASIS"],
         lambda text, k: all(_emphasised(phrase, text, k["bold"]) for phrase in k["phrases"]),
         "Highlight the word 'sea' in bold.", "The **open sea**.", "The *sea*, **a",
         finish=lambda k, m: k | {"bold": bool(m["bold"])}),
    Rule("detectable_format:multiple_sections", "section_spliter, num_sections, relation=at least",
         ["# sections?[.,;]? (each )?mark(ed)?( the beginning of each section)? with Q x"
          r"(,? such as:?( \w+ \d+( \[[^\]]*\])?)+)?"],
         lambda text, k: len(re.findall(rf"{re.escape(k['section_spliter'])}\s?\d+", text)),
         "Write 2 sections, each marked with PART X.", "PART 1 a PART 2 b", "PART 1"),
    Rule("detectable_format:title", "",
         ["(a )?title,? ((wrapped|enclosed) )?(in|with(in)?) double ang(le|ular) bracketsEXAMPLE?"],
         lambda text, k: any(title.strip("<> ") for title in re.findall(r"<<([^<\n]*)>>", text)),
         "Include a title, wrapped in double angular brackets.", "<<Rain>>\nIt fell.", "<< >>"),
    Rule("detectable_content:postscript", "postscript_marker",
         ["(at the end, )?((please|explicitly|add|include|end with|conclude with) )*a postscript"
          "( (at|to) the end)? (starting|beginning|marked|indicated|that (starts|begins))"
          " (with|by)( a marker like)? Q"
          "( at the end)?"],
         lambda text, k: bool(re.search(
             re.escape(k["postscript_marker"]).replace(r"\.", r"\.\s?"), text, re.I)),
         "Add a postscript starting with 'P.S.' at the end.", "Bye.\nP. S. Call.", "PS call",
         finish=lambda k, m: k if re.fullmatch(r"(P\.)+S\.?", k["postscript_marker"]) else None),
    Rule("detectable_format:json_format", "",
         ["(put TEXT )?((wrapped|formatted|presented) )?((in|as) )?(a )?(valid )?json"
          "( format| object)?"
          "(. you can use markdown ticks such as ```|,? wrapped in markdown code fences)?"],
         lambda text, k: _is_json(text),
         "Your entire output should be in JSON format.", '```json\n{"a": [1]}\n```', "{a: 1}",
         "number_bullet_lists title postscript end_checker repeat_prompt number_paragraphs"
         " nth_paragraph_first_word number_highlighted_sections multiple_sections quotation"
         " constrained_response two_responses"),
    Rule("detectable_format:constrained_response", "options=",
         [r"1 of the following options: \(?Q\)?"],
         lambda text, k: (any(_chosen(option, text) for option in k["options"])
                          if k["options"] else any(option in text for option in OPTIONS)),
         "Answer with one of the following options: 'Red.', 'Blue.'", "Blue.", "Green.",
         "quotation two_responses"),
    Rule("combination:two_responses", "",
         ["(exactly )?2 (different|distinct) responses[.,]? (responses and only responses MUST be"
          r" )?separated by (6 asterisk( symbol)?s:? )?\*{6}"],
         lambda text, k: len(_parts(text, "******")) == len(set(_parts(text, "******"))) == 2,
         "Give two different responses separated by ******.", "a\n******\nb", "a ****** a",
         "quotation number_paragraphs"),
    Rule("combination:repeat_prompt", "prompt_to_repeat=",
         ["(first,? )?(start by repeating|repeat) the request( above)? word[ -]for[ -]word"
          r"( without changes?)?,? (then|before|and then) \w+( it| (the|your) \w+)?"
          r"( \(1\. do not say any words .*\))?"],
         lambda text, k: text.strip().lower().startswith(k["prompt_to_repeat"].strip().lower())
         if k["prompt_to_repeat"] else None,
         "First repeat the request word for word, then answer.", "Say hi. Hello!", "Hello!",
         "quotation english_capital english_lowercase"),
    Rule("change_case:capital_word_frequency", "capital_frequency, capital_relation",
         ["# ((instances|occurrences) of )?(all-caps words?|words? (in|with) CAPITALS)( APPEAR)?"
          "EXAMPLE?", "words with CAPITALS APPEAR # times?"],
         lambda text, k: count_capital_words(text),
         "Use at least 2 words in all capital letters.", "GO now, I say.", "Go NOW"),
    Rule("change_case:english_capital", "",
         ["ENGLISH(in )?CAPITALS"],
         lambda text, k: text.isupper() and _language(text) in (None, "en"),
         "Write in English, in all capital letters.", "THE SUN IS A STAR AND SHINES.", "THE Sun.",
         "english_lowercase",
         implies=lambda k: [("language:response_language", {"language": "en"})]),
    Rule("change_case:english_lowercase", "",
         ["ENGLISH(in )?((all|only) )?(lower[- ]?case( letters)?|small letters)"
          "( language( style)?)?"
          "([.;,]? (with )?no ((capital|uppercase) letters|capitalization)( are)?( allowed)?)?"],
         lambda text, k: text.islower() and _language(text) in (None, "en"),
         "Use only lowercase letters.", "the sun is a star and it shines.", "The sun is a star.",
         implies=lambda k: [("language:response_language", {"language": "en"}),
                            ("change_case:capital_word_frequency",
                             {"capital_frequency": 0, "capital_relation": "exactly"})]),
    Rule("language:response_language", "language",
         ["((entirely|completely|only) )?in (?P<language>[a-z]+)( language)?"
          "(, no other language is allowed)?"],
         lambda text, k: _language(text) and _language(text) == k["language"].split("-")[0],
         "Your entire response should be in German language, no other language is allowed.",
         "Der Hund schläft heute im warmen Garten.", "The dog sleeps in the garden.",
         finish=lambda k, m: {"language": LANGUAGES[k["language"]]}
         if k["language"] in LANGUAGES else None),
    Rule("punctuation:no_comma", "",
         ["not ((the use of )?any )?commas?( at all| whatsoever| throughout| anywhere| APPEAR"
          r"| to (ensure|improve|maintain) \w+( and \w+)?)?"],
         lambda text, k: "," not in text,
         "Avoid using any commas.", "No; none.", "Well, yes."),
    Rule("keywords:frequency", "keyword, frequency, relation",
         ["KEYWORD Q( APPEAR)? # times?(?P<each> each( in any order)?)?",
          "# (occurrence|instance|mention)s? of KEYWORD Q(?P<each>)( exactly as provided)?"],
         lambda text, k: [text.lower().count(word.lower()) for word in k["keyword"]],
         "Use the words 'ha' and 'ho' exactly 2 times each.", "Ha, ha. Hoho", "ha ha ha ho ho",
         finish=lambda k, m: k if m["each"] or isinstance(k["keyword"], str) else None),
    Rule("keywords:existence", "keywords",
         ["KEYWORD:? ?Q( at least 1 times?)?", "KEYWORD: (?P<keywords>LIST)",
          "(an? )?title in the format Q"],
         lambda text, k: all(word.lower() in text.lower() for word in k["keywords"]),
         "Include the keywords 'sun' and 'sea'.", "The Sun over the seaside.", "The sun.",
         implies=lambda k: [("keywords:frequency",
                             {"keyword": k["keywords"], "frequency": 1, "relation": "at least"})]),
    Rule("keywords:forbidden_words", "forbidden_words",
         ["not (any of )?KEYWORD:? ?Q( or Q)*( anywhere)?",
          "not (any (of )?)?KEYWORD: (?P<forbidden_words>LIST(,? or [a-z-]+)?)"],
         lambda text, k: not any(_chosen(word.lower(), text.lower())
                                 for word in k["forbidden_words"]),
         "Do not use the words 'can' or 'may'.", "A candle.", "Yes you CAN.",
         implies=lambda k: [("keywords:frequency", {
             "keyword": k["forbidden_words"], "frequency": 0, "relation": "exactly"})]),
    Rule("keywords:letter_frequency", "letter, let_frequency, let_relation",
         ["(the )?letter Q( APPEAR)? # times?"],
         lambda text, k: text.lower().count(k["letter"].lower()),
         "The letter 'z' should appear less than 2 times.", "Zoo", "zigzag",
         finish=lambda k, m: k | {"letter": k["letter"].lower()}),
    Rule("startend:end_checker", "end_phrase",
         ["(finish|end|conclude)( TEXT)? with ((the|this) )?(exact )?(phrase|sentence|words?)?:? ?Q"
          "([.,]? (no (other )?(words|text)|nothing) MUST follow( this phrase| it)?)?"],
         lambda text, k: text.strip().strip('"').lower().endswith(k["end_phrase"].strip().lower()),
         "Finish with this exact phrase 'The end.'", 'So it was. the END."', "The end. Or not",
         # A last word may have a full stop after it, of which a phrase's check knows nothing.
         finish=lambda k, m: None if re.search(r"words?:? ?Q", m[0]) else k),
    Rule("startend:start_checker", "start_phrase",
         ["(start|begin|open)( TEXT)? with ((the|this) )?(exact )?(phrase|sentence|words?)?:? ?Q"
          "(,? followed by the rest( of the text)?| in the paragraph 1)?"],
         lambda text, k: bool(re.match(
             rf"[\s\"'*_#]*{re.escape(k['start_phrase'].strip())}(\b|\W|$)", text, re.I)),
         "Start with the phrase 'Dear sun'.", '"**dear Sun**, hello', "Dear sunflower"),
    Rule("startend:quotation", "",
         ["(wrap|enclose)(ped|d)?( TEXT)? (in|with(in)?) double (quotation marks|quotes)"],
         lambda text, k: bool(re.fullmatch('".*"', text.strip(), re.S)),
         "Wrap your entire response with double quotation marks.", ' "Hi." ', '"Hi.'),
]}

OPTIONS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
# Quoted texts of which a full stop at the end is a part.
VERBATIM = {"end_phrase", "start_phrase", "options", "postscript_marker"}
# relation -> the least and the greatest count that it allows
RELATIONS = {
    "at least": lambda number, top: (number, math.inf),
    "at most": lambda number, top: (0, number),
    "less than": lambda number, top: (0, number - 1),
    "more than": lambda number, top: (number + 1, math.inf),
    "exactly": lambda number, top: (number, number),
    "between": lambda number, top: (number, top),
}
# what a kwarg must be, the names of those that must, whether a value is
KINDS = [
    ("a number", r"num_\w+|\w*frequency|\w+_paragraph|max_words",
     lambda v: type(v) is int and v >= 0),
    ("a relation", r"\w*relation", lambda v: isinstance(v, str) and v in RELATIONS),
    ("true or false", "bold", lambda v: isinstance(v, bool)),
    ("one letter", "letter", lambda v: isinstance(v, str) and len(v) == 1),
    ("a list of texts", "keywords|forbidden_words|phrases|options",
     lambda v: isinstance(v, list) and v and all(isinstance(text, str) and text for text in v)),
    ("a text or several", "keyword",
     lambda v: v and all(isinstance(text, str) and text for text in _listed(v))),
    ("a text", r"\w+", lambda v: isinstance(v, str) and v != ""),
]

# What the words in capitals in the patterns stand for; they may hold each other.
PARTS = {
    "TEXT": "((the|your|this) )?((entire|whole|full|final|complete|overall) )*"
            "(response|answer|output|reply|text)",
    "MUST": "(must|should|shall|has to|needs? to|is to|will|can|may)",
    "APPEAR": "(MUST )?(appears?|be (used|mentioned))",
    "KEYWORD": "(the )?((following|specific|exact|required|forbidden) )*"
               "((key ?)?words?|phrases?|terms?|text)?",
    "LIST": "[a-z-]+((,|,? and) [a-z-]+)*",
    "SECTIONS": "(section|part|span|phrase)s?",
    "CAPITALS": "(all[- ])?(capital|uppercase)( letters)?|all-caps",
    "ENGLISH": "(entirely )?(in )?(the )?(english,? (and )?)?(using )?",
    "MARKDOWN": r"(with|using|in) (the )?markdown( \w+)?",
    "BOLD": r"(markdown )?bold( \w+)?|\*\*bold\*\*( format)?",
    "EMPHASIS": "(in|with|using) ((?P<bold>BOLD)|markdown emphasis|italics)",
    # An example is no more than what it looks like, so that nothing after it is swallowed.
    "EXAMPLE": r",? (such as|like|i\.e\.|e\.g\.|for example)[:,]? ITEM((,|,? or|,? and) ITEM)*",
    "ITEM": r"Q|<<[^<>]*>>|\[[^\[\]]*\]|\*+[^*]+\*+",
    "DIVIDER": "((the )?markdown divider:? )?(?P<divider>\\*\\*\\*)|(a|1) blank line"
               r"|2 new lines as if it was \\n\\n in python",
    "DIVIDED": "[.,]? ((and )?(they|paragraphs)( and only paragraphs)? (are|MUST be) )?"
               "(separated( with each other)?|and separate them) (by|with) DIVIDER",
}
# What IFEval leaves without quotation marks gets them.
UNQUOTED = [
    (r"(this exact phrase )([^\"'`].*?)\.?(?= No other words)", r"\1`\2`"),
    (r"((?:section|marked|each) with )(\w+)(?= X\b)", r"\1`\2`"),
    (r"(start with word )(\w+)", r"\1`\2`"),
    (r"(the (?:word|letter) )(\w+)(?= should appear)", r"\1`\2`"),
    (r"((?:with|by) )(P\.(?:P\.)?S\b\.?)", r"\1`\2`"),
    (r"(title in the format )(<<[^<>]*>>)", r"\1`\2`"),
    # Every P.P.S. holds a P.S.
    (r"'P\.S\.?' or 'P\.P\.S\.?'", "'P.S.'"),
]
NUMBERS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10", "twelve": "12", "fifteen": "15",
    "twenty": "20", "fifty": "50", "hundred": "100", "a single": "1", "once": "1 times",
    "twice": "2 times", "first paragraph": "paragraph 1", "second paragraph": "paragraph 2",
    "third paragraph": "paragraph 3", "fourth paragraph": "paragraph 4",
}
# Many wordings become one, from top to bottom: numbers, then relations, then the wrapping goes.
REWRITES = [
    (r"\[?Q((,? and|, &|,)? ((the )?(word|phrase|term) )?Q)*\]?", "Q"),
    (r"\b(\d+)-(\d+)(?= words)", r"between \1 and \2"),
    (rf"\b({'|'.join(NUMBERS)})\b", lambda match: NUMBERS[match[0]]),
    (r"\ball caps\b", "all-caps"),
    (r"\b(between|from) (\d+) (and|to) (\d+)", r"between \2 and \4"),
    (r"\b(\d+) to (\d+)(?= words)", r"between \1 and \2"),
    (r"\b(at minimum|(no|not) (fewer|less) than|(a )?minimum( of)?) (?=\d)", "at least "),
    (r"\b((no|not) more than|up to|(a )?maximum( of)?|not exceed(ing)?|within) (?=\d)", "at most "),
    (r"\b(precisely|only|just) (?=\d)", "exactly "),
    (r"\b(fewer than|under|below) (?=\d)", "less than "),
    (r"\b(over|above) (?=\d)", "more than "),
    (r"\b(\d+)( \w+)? or more\b", r"at least \1\2"),
    (r"\b(\d+)( \w+)? or (less|fewer)\b", r"at most \1\2"),
    (r"\bat least (\d+)( words)?,? (and|but) at most (?=\d)", r"between \1 and "),
    (r"\bat least (\d+)( words)?,? (and|but) less than (\d{1,5})",
     lambda match: f"between {match[1]} and {int(match[4]) - 1}"),
    (r"^((please|(ensure|make sure)( that)?|in TEXT,?|(response )?length:"
     r"|all-caps word (count|frequency):(?=.* all-caps )|word (count|frequency):) )+", ""),
    (r",? (in|within|throughout) (length|total|TEXT)\b| of (the|your) (answer|response)\b", ""),
    # What may be is no obligation, but for what may not, or may only be so.
    (r"^(TEXT|there) ((?!(may|can) (?!not |be |only ))MUST |(?=contains|includes|has|is ))", ""),
    (r"^(response )?language:", "in"),
    # To have some of it is not to be all of it.
    (r"^(contains?|includes?|has|have|features?|incorporate|mention|add|provide|give) "
     r"(?=(english )?(capital|uppercase|lower[- ]?case|small|all-caps)( letters)?$"
     r"|(a )?(valid )?json( object)?$)", "some "),
    (r"^(contains?|includes?|has|is|have|uses?|features?|consists? of|incorporate|provide|give|add"
     r"|mention|(answer|respond) (with|in)|write|be(?! Q)( written)?( (with|in)(?= exactly| a ))?)"
     r" (TEXT )?", ""),
    (r"^((do not|don't|not|never) (contain|include|have|use|mention|be)|(be written )?without"
     r"( using)?|(avoid|refrain from)( using| including)?|exclude|omit|no) ", "not "),
    (r"^not more than ", "at most "),
    (r"^not any (?=all-caps)", "less than 1 "),
    (r"^limit(ed)?( TEXT)? to (?=\d)", "at most "),
    (r"^limit(ed)?( TEXT)? to ", ""),
]
LANGUAGES = dict(pair.split(":") for pair in (
    "arabic:ar bengali:bn bulgarian:bg chinese:zh czech:cs danish:da dutch:nl english:en "
    "finnish:fi french:fr german:de greek:el gujarati:gu hebrew:he hindi:hi hungarian:hu "
    "indonesian:id italian:it japanese:ja kannada:kn korean:ko malayalam:ml marathi:mr nepali:ne "
    "norwegian:no persian:fa polish:pl portuguese:pt punjabi:pa romanian:ro russian:ru spanish:es "
    "swahili:sw swedish:sv tamil:ta telugu:te thai:th turkish:tr ukrainian:uk urdu:ur vietnamese:vi"
).split())
# fmt: on


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


@cache
def _kind(name: str) -> tuple[str, str, Callable]:
    return next(kind for kind in KINDS if re.fullmatch(kind[1], name))


def problem(id: str, kwargs: dict) -> str:
    """What is wrong with a constraint's kwargs, or "".

    "keywords:existence", {"keywords": "sun"} -> "keywords: 'sun' is not a list of texts"
    """
    if id not in RULES:
        return f"{id}: no constraint has this id"
    for name, default in RULES[id].kwargs.items():
        (what, _, fits), value = _kind(name), kwargs.get(name)
        if value is None and default is None:
            return f"{name}: missing"
        if value is not None and not fits(value):
            return f"{name}: {value!r} is not {what}"
    return ""


# ---------------------------------------------------------------- recognising a sentence


def _expand(pattern: str) -> str:
    while re.search("[A-Z]{4}", pattern):
        pattern = re.sub("[A-Z]{4,}", lambda match: f"({PARTS[match[0]]})", pattern)
    return pattern


@cache
def _compiled() -> tuple[list, list]:
    """The rewrites, and the patterns of all rules with # written out."""
    patterns = []
    for rule in RULES.values():
        number, relation = rule.first("a number"), rule.first("a relation")
        ranges = "max_words" in rule.kwargs
        names = "|".join(name for name in RELATIONS if ranges or name != "between")
        count = rf"((?P<{relation}>{names}) )?" if relation else ""
        count += rf"(?P<{number}>\d{{1,5}})" + r"( and (?P<max_words>\d{1,5}))?" * ranges
        patterns += [(rule, re.compile(_expand(p.replace("#", count)))) for p in rule.patterns]
    return [(re.compile(_expand(pattern)), to) for pattern, to in REWRITES], patterns


_QUOTED = re.compile(
    r"""(?<!\w)(?:"([^"]{1,200})"|'((?:[^']|(?<=\w)'(?=\w)){1,200})'|`([^`]{1,200})`)(?!\w)"""
)


def _plain(sentence: str) -> tuple[str, list[str]]:
    """The sentence without its wrapping, and what it quotes.

    "Your answer must not use the word 'tea' in your response." -> ("not the word Q", ["tea"])
    """
    quotes: list[str] = []

    def keep(match: re.Match) -> str:
        text = match[1] or match[2] or match[3]
        if re.fullmatch(r"\*+|-|(\\n)+", text):
            return text
        quotes.append(text.strip())
        return "\0"

    text = " ".join(sentence.split()).translate(str.maketrans("‘’“”", "''\"\""))
    for pattern, to in UNQUOTED:
        text = re.sub(pattern, to, text)
    text = _QUOTED.sub(keep, re.sub(r"^[-*\d.)]+ ", "", text)).lower()
    text = text.replace("\0", "Q").rstrip(" .!")
    for pattern, to in _compiled()[0]:
        text = pattern.sub(to, text)
    return text, quotes


def _kwargs(rule: Rule, match: re.Match, quotes: list[str]) -> dict | None:
    """What a matched sentence says, under the names that the rule takes."""
    kwargs = {name: text for name, text in match.groupdict().items() if text and name != "each"}
    for name, text in kwargs.items():
        if _kind(name)[0] == "a number":
            kwargs[name] = int(text)
        if _kind(name)[0] == "a list of texts":
            kwargs[name] = re.split(",? and |,? or |, ", text)
    relation = rule.first("a relation")
    if relation and not rule.kwargs[relation]:
        kwargs.setdefault(relation, "exactly")
    if "bold" in rule.kwargs:
        kwargs["bold"] = bool(match["bold"])
    name = rule.first("a list of texts", "a text or several", "one letter", "a text")
    if quotes and name:
        # The word 'very.' is "very"; in an exact text or one to end with, the full stop is meant.
        if name not in VERBATIM and not re.search("exact |sentence", match[0]):
            quotes = [quote.rstrip(".,;:") or quote for quote in quotes]
        several = _kind(name)[0] == "a list of texts" or len(quotes) > 1
        kwargs[name] = quotes if several else quotes[0]
    if problem(rule.id, kwargs):
        return None
    kwargs = {name: value for name, value in kwargs.items() if value != rule.kwargs[name]}
    return rule.finish(kwargs, match)


@lru_cache(1 << 12)
def recognise(sentence: str) -> tuple[str, dict] | None:
    """The constraint that a sentence is, as (id, kwargs); None unless it is understood whole.

    "Use 9 words." -> ("length_constraints:number_words", {"num_words": 9, "relation": "exactly"})
    """
    if len(sentence) > MAX_CONSTRAINT_CHARS:
        return None
    text, quotes = _plain(sentence)
    for rule, pattern in _compiled()[1]:
        match = pattern.fullmatch(text)
        kwargs = _kwargs(rule, match, quotes) if match else None
        if kwargs is not None:
            return rule.id, kwargs
    return None


def decidable(rule: tuple[str, dict] | None) -> bool:
    """Whether code can decide a recognised constraint: languages need langdetect."""
    return rule is not None and (langdetect is not None or rule[0] != "language:response_language")


# ---------------------------------------------------------------- checking an answer


def _complete(rule: Rule, kwargs: dict) -> dict:
    """With its defaults; a lone text where several may stand is a list of one."""
    given = rule.kwargs | {name: value for name, value in kwargs.items() if value is not None}
    several = {name for name in given if _kind(name)[0] in ("a list of texts", "a text or several")}
    return {name: _listed(v) if name in several and v else v for name, v in given.items()}


def _limits(rule: Rule, kwargs: dict) -> tuple[float, float]:
    relation = RELATIONS[kwargs[rule.first("a relation")]]
    return relation(kwargs[rule.first("a number")], kwargs.get("max_words") or math.inf)


def check(id: str, kwargs: dict, response: str) -> bool | None:
    """Whether a response follows a constraint; None where that cannot be told (its language)."""
    if not response.strip():
        return False
    rule = RULES[id]
    kwargs = _complete(rule, kwargs)
    found = rule.check(response, kwargs)
    if not rule.first("a relation"):
        return found
    low, high = _limits(rule, kwargs)
    return all(low <= count <= high for count in _listed(found))


def check_loose(id: str, kwargs: dict, response: str) -> bool | None:
    """IFEval's loose verdict: by the response, or it without asterisks, first line or last line."""
    lines = response.split("\n")
    texts = [response] + ["\n".join(cut).strip() for cut in (lines[1:], lines[:-1], lines[1:-1])]
    texts += [text.replace("*", "") for text in texts]
    verdicts = [check(id, kwargs, text) for text in texts if text.strip()]
    if True in verdicts:
        return True
    return None if verdicts[:1] == [None] else False


def _parts(text: str, divider: str) -> list[str]:
    """What stands between dividers; nothing if there is an empty part but at the ends."""
    cut = r"\n\s*\n" if divider == "\n\n" else rf"\s?{re.escape(divider)}\s?"
    parts = [part.strip() for part in re.split(cut, text)]
    return [] if "" in parts[1:-1] else [part for part in parts if part]


def _chosen(option: str, text: str) -> bool:
    """Whether an option stands in a text, and not in the midst of a word of it.

    "no", "not now" -> False; "!", "Yes!" -> True
    """
    return bool(re.search(rf"(\b|(?!\w)){re.escape(option)}(\b|(?<!\w))", text))


def _nth_starts(paragraphs: list[str], kwargs: dict) -> bool:
    nth, filled = kwargs["nth_paragraph"], sum(bool(p.strip()) for p in paragraphs)
    if not 1 <= nth <= filled == (kwargs["num_paragraphs"] or filled):
        return False
    # IFEval's first word is cut at the first punctuation, after quotation marks.
    start = (paragraphs[nth - 1].split() or [""])[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", start)[0].lower() == kwargs["first_word"].lower()


def _emphasised(phrase: str, text: str, bold: bool) -> bool:
    """Whether a phrase stands inside **bold** or __bold__, or in any emphasis if not `bold`."""
    phrase = rf"(?<![^\W_]){re.escape(phrase)}(?![^\W_])"
    opened: dict[str, int] = {}
    for mark in re.finditer(r"\*\*|__|\n" if bold else r"\*\*|__|\*|_|\n", text):
        kind, start = mark[0], opened.pop(mark[0], None)
        if kind == "\n":
            opened.clear()
        elif start is not None and text[mark.start() - 1].strip() and start < mark.start():
            if re.search(phrase, text[start : mark.start()], re.I):
                return True
        elif text[mark.end() : mark.end() + 1].strip():
            # A bullet's asterisk, with a space after it, opens nothing.
            opened[kind] = mark.end()
    return False


def _is_json(text: str) -> bool:
    text = re.sub("^```(json)?", "", text.strip(), flags=re.I).removesuffix("```").strip()
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


@cache
def _load_languages() -> None:
    """Whole or not at all: langdetect swallows a Ctrl-C while it loads, and then knows half.

    Another thread is not interrupted; the main one, which waits for it, is.
    """
    thread = threading.Thread(target=langdetect.detector_factory.init_factory, daemon=True)
    thread.start()
    thread.join()


def _language(text: str) -> str | None:
    """The detected language, without its region ("zh-tw" is "zh"); None where it cannot be told."""
    if langdetect is None:
        return None
    _load_languages()
    try:
        code = langdetect.detect(text[:5000]).split("-")[0]
    except langdetect.lang_detect_exception.LangDetectException:
        return None
    # Short traditional Chinese is often taken for Korean; without kana and hangul it is not.
    return "zh" if code in ("ja", "ko") and not re.search("[぀-ヿ가-힣]", text) else code


# Where word_tokenize of nltk, with which IFEval counts, splits words.
_BETWEEN = re.compile(
    r"""[\s;@#$%&?!*()\[\]{}<>"`«»“”‘’„‒–—―]|[:,](?!\d)|--|''|\.\.+"""
    r"|(?<=\w)(?=(?:n't|'(?:s|m|d|ll|re|ve))(?:[^\w'-]|$))"
    r"|(?<=\bcan)(?=not\b)|(?<=\bgon|\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)|(?<=\bgim|\blem)(?=me\b)",
    re.IGNORECASE,
)


def count_capital_words(text: str) -> int:
    """Tokens in capitals, contractions apart and hyphens together: "I'm at IBM-UK" has two."""
    return sum(token.isupper() for token in _BETWEEN.split(text))


# The mark in a word that may end a sentence, and the next word: the last mark before a bracket, a
# quote or white space.
_MARK = re.compile(
    r"(?:(^[ \t]*(?:- )?)|(?<!\S))"
    r"""(\S*[.?!])(?=[)\]};:*@'"({\[!?“”‘’«»]|\s+(\S+))""",
    re.MULTILINE,
)
# Punkt knows most single letters as abbreviations.
_ABBREVIATIONS = set(
    "c d e f g h k l m n p r s t v w mr mrs ms dr prof st jr sr gen rep sen lt col inc co corp ltd"
    " bros vs ft mg ok ave jan feb aug sep sept oct nov dec a.m p.m u.s u.k u.n u.s.a d.c ph.d"
    "".split()
)
_STARTERS = set("the this these there they it he i if in but so however when while some".split())


def _ends_sentence(mark: re.Match) -> bool:
    """Whether a mark ends a sentence, by the rules of punkt (Kiss and Strunk 2006)."""
    starts_line, before, following = mark[1] is not None, mark[2], mark[3] or ""
    if re.search(r"[?!]|(^|[^\w.])\.$", before):
        return True
    word = re.search(r"[^\s()\"`{\[:;*@}\]',!?&#]*$", before[:-1])[0].lower()
    lower, upper = following[:1].islower(), following[:1].isupper()
    starter = upper and re.match(r"\w*", following)[0].lower() in _STARTERS
    if before.endswith("..") or word in _ABBREVIATIONS:
        return starter and len(word) != 1
    if len(word) == 1 and word.isalpha():
        # "A. Smith" is a name, "A. Overview" at the start of a line an item.
        return not lower and (starts_line or starter or not upper)
    if re.fullmatch(r"[\d.,-]+", word):
        return not lower and following[:1] not in set(";:,.!?")
    return True


def count_sentences(text: str) -> int:
    """Sentences as IFEval counts them, with nltk's punkt: "1. Mr. Lee ate. He left." has 3."""
    # A mark that begins a word is a sentence of its own.
    text = re.sub(r"(?<!\S)([.?!])(?=[?!])", r"\1 ", text).strip()
    ends = [mark.end() for mark in _MARK.finditer(text) if _ends_sentence(mark)]
    sentences = [text[start:end].strip() for start, end in zip([0, *ends], [*ends, None])]
    # Quotes and brackets that close a sentence are no sentence.
    return sum(not re.fullmatch("[\"')\\]}‘’“”«»]*", sentence) for sentence in sentences)


# ---------------------------------------------------------------- contradictions


def intervals(rules: list[tuple[str, dict]]) -> dict[tuple, tuple[float, float]]:
    """(id, the keyword or letter or None) -> the (low, high) counts that all rules on it allow."""
    allowed: dict[tuple, tuple[float, float]] = {}
    for id, kwargs in rules:
        rule = RULES[id]
        if not rule.first("a relation"):
            continue
        kwargs = _complete(rule, kwargs)
        low, high = _limits(rule, kwargs)
        for what in _listed(kwargs.get(rule.first("a text or several", "one letter"))):
            key = (id, what and what.lower())
            before = allowed.get(key, (0, math.inf))
            allowed[key] = max(low, before[0]), min(high, before[1])
    return allowed


def contradiction(rules: list[tuple[str, dict]]) -> str:
    """Why the constraints cannot all hold at once; "" if nothing speaks against it."""
    names = {id.split(":")[1]: RULES[id] for id, _ in rules}
    for name, rule in names.items():
        for other in rule.clashes.split():
            if other in names:
                return f"{name} with {other}"
    implied = [more for id, kwargs in rules for more in RULES[id].implies(kwargs)]
    allowed = intervals(rules + implied)
    for (id, what), (low, high) in allowed.items():
        if low > high:
            return f"{id} {what or ''}: at least {low} and at most {high}"
    anything = (0, math.inf)
    words = allowed.get(("length_constraints:number_words", None), anything)
    sentences = allowed.get(("length_constraints:number_sentences", None), anything)
    if sentences[0] > words[1]:
        return "more sentences than words"
    languages = {kwargs["language"] for _, kwargs in rules + implied if "language" in kwargs}
    return "more than one language" if len(languages) > 1 else ""
