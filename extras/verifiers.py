"""verifiers.py: Python checks for IFEval's 25 verifiable instructions and two of our own.

Ids and kwargs are those of IFEval (Zhou et al. 2023, arXiv 2311.07911), and so are the verdicts,
without nltk. To add a verifier, add a row to VERIFIERS and its new kwargs to KWARG_TYPES.
"""

import json
import math
import re
import unicodedata
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

try:
    import langdetect
except ImportError:
    langdetect = None


@dataclass(frozen=True)
class Verifier:
    """A type of constraint that code can check.

    kwargs: name -> default, or ... if required.
    check: (text, kwargs) -> verdict, or, if there is a relation among the kwargs, the count or
        counts that must have this relation to the first number among the kwargs.
    conflicts: categories that contradict this one. implies: kwargs -> constraints that follow.
    """

    id: str
    kwargs: dict
    check: Callable
    conflicts: str = ""
    implies: Callable = lambda kwargs: []

    def first_kwarg(self, *types: str) -> str | None:
        """Name of the first kwarg that has one of these types."""
        return next((name for name in self.kwargs if KWARG_TYPES[name][0] in types), None)

    def complete(self, kwargs: dict) -> dict:
        """The kwargs with defaults for those that are missing or None."""
        return self.kwargs | {name: v for name, v in kwargs.items() if v is not None}

    def allowed_counts(self, kwargs: dict) -> tuple[float, float]:
        """(lowest, highest) count that the relation among the kwargs allows."""
        kwargs = self.complete(kwargs)
        number = kwargs[self.first_kwarg("a number")]
        relation = kwargs[self.first_kwarg("a relation")]
        low = {"at least": number, "more than": number + 1, "exactly": number, "between": number}
        high = {"at most": number, "less than": number - 1, "exactly": number}
        high["between"] = kwargs.get("max_words", math.inf)
        return low.get(relation, 0), high.get(relation, math.inf)


def validate_kwargs(id: str, kwargs: dict) -> str:
    """The first error in a constraint's kwargs ("num_words: missing"), "" if they are valid."""
    if id not in VERIFIERS:
        return f"{id}: no verifier has this id"
    for name, default in VERIFIERS[id].kwargs.items():
        (type_name, has_type), value = KWARG_TYPES[name], kwargs.get(name)
        if value is None and default is ...:
            return f"{name}: missing"
        if value is not None and not has_type(value):
            return f"{name}: {value!r} is not {type_name}"
    return ""


def category(id: str) -> str:
    """An id without its group: "punctuation:no_comma" -> "no_comma"."""
    return id.split(":")[1]


def is_decidable(parsed: tuple[str, dict] | None) -> bool:
    """Whether code can decide a parsed constraint. Languages need the package langdetect."""
    return parsed is not None and (langdetect is not None or "response_language" not in parsed[0])


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def check(id: str, kwargs: dict, text: str) -> bool | None:
    """IFEval's strict verdict for valid kwargs. None if it is undecidable or the id is unknown."""
    if id not in VERIFIERS:
        return None
    if not text.strip():
        return False
    verifier = VERIFIERS[id]
    result = verifier.check(text, verifier.complete(kwargs))
    if not verifier.first_kwarg("a relation"):
        return result
    low, high = verifier.allowed_counts(kwargs)
    return all(low <= count <= high for count in _as_list(result))


def check_loose(id: str, kwargs: dict, text: str, verify: Callable = check) -> bool | None:
    """IFEval's loose verdict: asterisks, the first line or the last line may be removed first."""
    lines = text.split("\n")
    variants = [text] + ["\n".join(cut).strip() for cut in (lines[1:], lines[:-1], lines[1:-1])]
    variants += [variant.replace("*", "") for variant in variants]
    verdicts = [verify(id, kwargs, variant) for variant in variants if variant.strip()]
    return True in verdicts or (None if verdicts[:1] == [None] else False)


# IFEval's tokenizer, \w+, splits words of Hindi, Tamil, Thai or vowelled Arabic at combining marks.
# Here marks and joiners after them belong to words. Text without marks has the same words in both.
# subtle: the only marks above U+1F000 are variation selectors, from U+E0100 on.
_CATEGORIES = "".join(unicodedata.category(chr(code))[0] for code in range(0x1F000))
_MARKS = "".join(f"{chr(m.start())}-{chr(m.end() - 1)}" for m in re.finditer("M+", _CATEGORIES))
_WORD_CHAR = rf"[\w{_MARKS}\U000e0100-\U000e01ef]"
WORD = re.compile(rf"\w(?:{_WORD_CHAR}|(?<=[{_MARKS}])[\u200c\u200d])*")
# A text repeats itself below this share of distinct trigrams, or of its bytes when compressed.
MIN_DISTINCT, MIN_COMPRESSED = 0.6, 0.32
# Letters of Thai, Lao, Burmese, Khmer, Japanese and Chinese.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
# A position that is not inside a word. \b would find no edge of a word like "c++".
_EDGE = rf"(?:(?<!{_WORD_CHAR})|(?!{_WORD_CHAR}))"


def count_words(text: str) -> int:
    """Number of words."""
    return len(WORD.findall(text))


def estimate_words(text: str) -> float:
    """Number of words, at two characters each in scripts that do not separate them."""
    return count_words(UNSPACED.sub(" ", text)) + len(UNSPACED.findall(text)) / 2


def normalize(text: str) -> str:
    """Lowercase words, single spaces: "Use NO commas!" -> "use no commas"."""
    return " ".join(WORD.findall(text.lower()))


def repeats_itself(text: str) -> bool:
    """Whether a text says the same again and again, by its trigrams or by its compressed size.

    After Welleck et al. 2020 (arXiv 1908.04319), who count n-grams that occur before.
    """
    words = WORD.findall(text.lower())
    trigrams = list(zip(words, words[1:], words[2:]))
    raw = text.encode()
    few = len(set(trigrams)) < MIN_DISTINCT * len(trigrams)
    return few or len(zlib.compress(raw)) < MIN_COMPRESSED * len(raw)


def _contains_word(words: list[str], text: str, flags: int = re.I) -> bool:
    """Whether one of the words is in a text, but not inside a longer word: "no" in "now"."""
    return bool(re.search(f"{_EDGE}(?:{'|'.join(map(re.escape, words))}){_EDGE}", text, flags))


# IFEval counts capital words among the tokens of nltk's word_tokenize, which splits here:
# "I'm at IBM-UK" has two, I and IBM-UK.
_TOKEN_BOUNDARY = re.compile(
    r"""(?i)[\s;@#$%&?!*()\[\]{}<>"`«»“”‘’„‒–—―]|[:,](?!\d)|--|''|\.\.+"""
    rf"|(?<={_WORD_CHAR})(?=(?:n't|'(?:s|m|d|ll|re|ve))(?:[^\w'-]|$))"
    r"|(?<=\bcan)(?=not\b)|(?<=\bgon|\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)|(?<=\bgim|\blem)(?=me\b)"
)

# A possible end of a sentence: (start of a line)? (token up to its last mark) (next token)?
_SENTENCE_MARK = re.compile(
    r"""(?:(^[ \t]*(?:- )?)|(?<!\S))(\S*[.?!])(?=[)\]};:*@'"({\[!?“”‘’«»]|\s+(\S+))""", re.M
)
# Punkt's model treats most single letters as abbreviations.
_ABBREVIATIONS = (
    "c d e f g h k l m n p r s t v w mr mrs ms dr prof st jr sr gen rep sen lt col inc co corp ltd"
    " bros vs ft mg ok ave jan feb aug sep sept oct nov dec a.m p.m u.s u.k u.n u.s.a d.c ph.d"
).split()
_STARTERS = set("the this these there they it he i if in but so however when while some".split())


def _ends_sentence(mark: re.Match) -> bool:
    """Whether a match of _SENTENCE_MARK ends a sentence for punkt (Kiss and Strunk 2006)."""
    starts_line, token, following = mark[1] is not None, mark[2], mark[3] or ""
    if re.search(r"[?!]|(^|[^\w.])\.$", token):
        return True
    # subtle: a search for [^...]*$ would be quadratic in the length of the token.
    word = re.split(r"[\s()\"`{\[:;*@}\]',!?&#]", token[:-1])[-1].lower()
    lower, upper = following[:1].islower(), following[:1].isupper()
    starter = upper and re.match(r"\w*", following)[0].lower() in _STARTERS
    if token.endswith("..") or word in _ABBREVIATIONS:
        return starter and len(word) != 1
    if len(word) == 1 and word.isalpha():
        # "A. Smith" is a name. "A. Overview" at the start of a line is a list item.
        return not lower and (starts_line or starter or not upper)
    is_number = re.fullmatch(r"[\d.,-]+", word)
    return not is_number or not (lower or following.startswith(tuple(";:,.!?")))


def count_sentences(text: str) -> int:
    """Number of sentences that nltk's punkt finds: "1. Mr. Lee ate. He left." -> 3."""
    # A mark at the start of a token is a sentence of its own.
    text = re.sub(r"(?<!\S)([.?!])(?=[?!])", r"\1 ", text).strip()
    ends = [mark.end() for mark in _SENTENCE_MARK.finditer(text) if _ends_sentence(mark)]
    sentences = [text[start:end].strip() for start, end in zip([0, *ends], [*ends, None])]
    # Closing quotes and brackets are not a sentence.
    return sum(not re.fullmatch("[\"')\\]}‘’“”«»]*", sentence) for sentence in sentences)


def _split_parts(text: str, divider: str) -> list[str]:
    """The parts between dividers, [] if any but the first and the last is empty."""
    pattern = r"\n\s*\n" if divider == "\n\n" else rf"\s?{re.escape(divider)}\s?"
    parts = [part.strip() for part in re.split(pattern, text)]
    return [] if "" in parts[1:-1] else [part for part in parts if part]


def _nth_paragraph_starts(paragraphs: list[str], kwargs: dict) -> bool:
    nth, total = kwargs["nth_paragraph"], sum(bool(p.strip()) for p in paragraphs)
    if not 1 <= nth <= total == (kwargs["num_paragraphs"] or total):
        return False
    # IFEval's first word follows quotation marks and ends before the first punctuation.
    first_word = re.match(r"\s*'*\"*([^\s.,?!'\"]*)", paragraphs[nth - 1])[1]
    return first_word.lower() == kwargs["first_word"].lower()


def _is_emphasized(phrase: str, text: str, bold: bool) -> bool:
    """Whether a phrase is in **bold** or __bold__, or in *any* _emphasis_ if not `bold`."""
    phrase = re.compile(rf"(?<![^\W_]|[{_MARKS}]){re.escape(phrase)}(?![^\W_]|[{_MARKS}])", re.I)
    marks = (r"\*\*", "__") if bold else (r"\*\*", "__", r"(?<!\*)\*(?!\*)", "(?<!_)_(?!_)")
    patterns = [rf"{mark}(?=\S)((?:(?!{mark}).)+)(?<=\S){mark}" for mark in marks]
    return any(phrase.search(part) for pattern in patterns for part in re.findall(pattern, text))


def _is_json(text: str) -> bool:
    try:
        json.loads(re.sub("^```(json)?", "", text.strip(), flags=re.I).removesuffix("```").strip())
        return True
    except (ValueError, RecursionError):
        return False


def _language(text: str) -> str | None:
    """The detected language without its region ("zh-tw" -> "zh"), None if undecidable."""
    if langdetect is None:
        return None
    langdetect.DetectorFactory.seed = 0  # langdetect samples
    # Loads in a thread of its own: langdetect would swallow Ctrl-C and keep half of its languages.
    with ThreadPoolExecutor() as executor:
        executor.submit(langdetect.detector_factory.init_factory)
    try:
        code = langdetect.detect(text[:5000]).split("-")[0]
    except langdetect.lang_detect_exception.LangDetectException:
        return None
    # Short traditional Chinese is often taken for Korean. Without kana and hangul it is Chinese.
    return "zh" if code in ("ja", "ko") and not re.search("[぀-ヿ가-힣]", text) else code


# fmt: off
RELATIONS = ("at least", "at most", "less than", "more than", "exactly", "between")
# name -> (type, worded for error messages; whether a value has it)
KWARG_TYPES = {name: (type_name, has_type) for names, type_name, has_type in [
    ("num_words max_words num_sentences num_paragraphs nth_paragraph num_bullets num_placeholders "
     "num_highlights num_sections capital_frequency frequency let_frequency",
     "a number", lambda v: type(v) is int and v >= 0),
    ("relation capital_relation let_relation", "a relation", lambda v: v in RELATIONS),
    ("bold", "true or false", lambda v: isinstance(v, bool)),
    ("letter", "one letter", lambda v: isinstance(v, str) and len(v) == 1),
    ("keywords forbidden_words phrases options", "a list of texts",
     lambda v: type(v) is list and v and all(type(t) is str and t for t in v)),
    ("keyword", "a text or texts", lambda v: v and all(type(t) is str and t for t in _as_list(v))),
    ("divider first_word section_spliter postscript_marker prompt_to_repeat language end_phrase "
     "start_phrase", "a text", lambda v: isinstance(v, str) and v),
] for name in names.split()}
FREQUENCY, ENGLISH = "keywords:frequency", ("language:response_language", {"language": "en"})
NO_CAPITALS = ("change_case:capital_word_frequency",
               {"capital_frequency": 0, "capital_relation": "exactly"})
# The fields of Verifier. In the lambdas, k are the complete kwargs.
VERIFIERS = {row[0]: Verifier(*row) for row in [
    ("length_constraints:number_words", dict(num_words=..., relation=..., max_words=math.inf),
     lambda text, k: count_words(text)),
    ("length_constraints:number_sentences", dict(num_sentences=..., relation=...),
     lambda text, k: count_sentences(text)),
    ("length_constraints:number_paragraphs",
     dict(num_paragraphs=..., relation="exactly", divider="***"),
     lambda text, k: len(_split_parts(text, k["divider"])) or -1, "nth_paragraph_first_word"),
    ("length_constraints:nth_paragraph_first_word",
     dict(nth_paragraph=..., first_word=..., num_paragraphs=None, divider="\n\n"),
     lambda text, k: _nth_paragraph_starts(text.split(k["divider"]), k)),
    ("detectable_format:number_bullet_lists", dict(num_bullets=..., relation="exactly"),
     lambda text, k: len(re.findall(r"^[^\S\n]*(?:-|\*[^*])", text, re.M))),
    ("detectable_content:number_placeholders", dict(num_placeholders=..., relation="at least"),
     lambda text, k: len(re.findall(r"\[[^\[\]\n]*\]", text))),
    ("detectable_format:number_highlighted_sections", dict(num_highlights=..., relation="at least"),
     lambda text, k: sum(bool(part.strip()) for mark in (r"\*", r"\*\*")
                         for part in re.findall(rf"{mark}([^\n*]*){mark}", text))),
    ("detectable_format:highlighted_words", dict(phrases=..., bold=...),
     lambda text, k: all(_is_emphasized(p, text, k["bold"]) for p in _as_list(k["phrases"]))),
    ("detectable_format:multiple_sections",
     dict(section_spliter=..., num_sections=..., relation="at least"),
     lambda text, k: len(re.findall(rf"{re.escape(k['section_spliter'])}\s?\d+", text))),
    ("detectable_format:title", {},
     lambda text, k: any(title.strip("<> ") for title in re.findall(r"<<([^<\n]*)>>", text))),
    ("detectable_content:postscript", dict(postscript_marker=...),
     lambda text, k: bool(re.search(
         re.escape(k["postscript_marker"]).replace(r"\.", r"\.\s?"), text, re.I))),
    ("detectable_format:json_format", {}, lambda text, k: _is_json(text),
     "number_bullet_lists title postscript end_checker repeat_prompt number_paragraphs "
     "nth_paragraph_first_word number_highlighted_sections multiple_sections quotation "
     "constrained_response two_responses"),
    ("detectable_format:constrained_response", dict(options=None),
     lambda text, k: _contains_word(_as_list(k["options"]), text, flags=0) if k["options"]
     else bool(re.search(r"My answer is (yes|no|maybe)\.", text)), "quotation two_responses"),
    ("combination:two_responses", {},
     lambda text, k: len(_split_parts(text, "******")) == len({*_split_parts(text, "******")}) == 2,
     "quotation number_paragraphs"),
    ("combination:repeat_prompt", dict(prompt_to_repeat=None),
     lambda text, k: text.strip().lower().startswith(k["prompt_to_repeat"].strip().lower())
     if k["prompt_to_repeat"] else None, "quotation english_capital english_lowercase"),
    ("change_case:capital_word_frequency", dict(capital_frequency=..., capital_relation=...),
     lambda text, k: sum(token.isupper() for token in _TOKEN_BOUNDARY.split(text))),
    ("change_case:english_capital", {},
     lambda text, k: text.isupper() and _language(text) in (None, "en"),
     "english_lowercase", lambda k: [ENGLISH]),
    ("change_case:english_lowercase", {},
     lambda text, k: text.islower() and _language(text) in (None, "en"),
     "", lambda k: [ENGLISH, NO_CAPITALS]),
    ("language:response_language", dict(language=...),
     lambda text, k: _language(text) and _language(text) == k["language"].split("-")[0]),
    ("punctuation:no_comma", {}, lambda text, k: "," not in text),
    ("keywords:frequency", dict(keyword=..., frequency=..., relation=...),
     lambda text, k: [text.lower().count(word.lower()) for word in _as_list(k["keyword"])]),
    ("keywords:existence", dict(keywords=...),
     lambda text, k: all(word.lower() in text.lower() for word in _as_list(k["keywords"])), "",
     lambda k: [(FREQUENCY, dict(keyword=k["keywords"], frequency=1, relation="at least"))]),
    ("keywords:forbidden_words", dict(forbidden_words=...),
     lambda text, k: not _contains_word(_as_list(k["forbidden_words"]), text), "",
     lambda k: [(FREQUENCY, dict(keyword=k["forbidden_words"], frequency=0, relation="exactly"))]),
    ("keywords:letter_frequency", dict(letter=..., let_frequency=..., let_relation=...),
     lambda text, k: text.lower().count(k["letter"].lower())),
    ("startend:end_checker", dict(end_phrase=...),
     lambda text, k: text.strip().strip('"').lower().endswith(k["end_phrase"].strip().lower())),
    ("startend:start_checker", dict(start_phrase=...),
     lambda text, k: bool(re.match(
         rf"[\s\"'*_#]*{re.escape(k['start_phrase'].strip())}{_EDGE}", text, re.I))),
    ("startend:quotation", {}, lambda text, k: bool(re.fullmatch('".*"', text.strip(), re.S))),
]}
# fmt: on


def count_intervals(parsed: list[tuple[str, dict]]) -> dict[tuple, tuple[float, float]]:
    """The counts that all constraints allow: (id, keyword or letter or None) -> (low, high)."""
    allowed: dict[tuple, tuple[float, float]] = {}
    for id, kwargs in parsed:
        if VERIFIERS[id].first_kwarg("a relation"):
            low, high = VERIFIERS[id].allowed_counts(kwargs)
            for item in _as_list(kwargs.get("keyword") or kwargs.get("letter")):
                key = (id, item and item.lower())
                known_low, known_high = allowed.get(key, (0, math.inf))
                allowed[key] = max(low, known_low), min(high, known_high)
    return allowed


def allowed_count(parsed: list[tuple[str, dict]], unit: str) -> tuple[float, float]:
    """(lowest, highest) number of "words" or "sentences" that all constraints allow."""
    key = (f"length_constraints:number_{unit}", None)
    return count_intervals(parsed).get(key, (0, math.inf))


def find_contradiction(parsed: list[tuple[str, dict]]) -> str:
    """Why constraints cannot be satisfied together, "" if no contradiction is found."""
    categories = {category(id) for id, _ in parsed}
    for id, _ in parsed:
        for other in categories.intersection(VERIFIERS[id].conflicts.split()):
            return f"{category(id)} with {other}"
    constraints = parsed + [more for id, kwargs in parsed for more in VERIFIERS[id].implies(kwargs)]
    allowed = count_intervals(constraints)
    for (id, item), (low, high) in allowed.items():
        if low > high:
            return f"{id} {item or ''}: at least {low} and at most {high}"
    if allowed_count(constraints, "sentences")[0] > allowed_count(constraints, "words")[1]:
        return "more sentences than words"
    languages = {kwargs["language"] for _, kwargs in constraints if kwargs.get("language")}
    return "more than one language" if len(languages) > 1 else ""
