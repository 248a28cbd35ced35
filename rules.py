"""rules.py: IFEval's 25 verifiable instructions and two of our own. A table to look things up in; the method reads without it.

    check(id, kwargs, response)    does a response follow an instruction (check_loose: IFEval's loose verdict)
    recognise(sentence)            which instruction a constraint in plain English is, or None
    contradiction(rules)           why several cannot hold at once

Ids, kwargs and what they mean are those of IFEval (Zhou et al. 2023, arXiv 2311.07911); the code is our own.
"""

import json
import math
import re
from functools import cache
from itertools import combinations

try:
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it samples; the same text must get the same language
except ImportError:  # optional: without it language constraints stay undecided
    langdetect = None

MAX_CONSTRAINT_CHARS = 300  # longer "constraints" are answers or restated seeds

# ---------------------------------------------------------------- rules: checking an answer


def _relates(value: int, relation: str, bound: int, upper: int | None = None) -> bool:
    """IFEval has "at least" and "less than"; the others are what Instructors also write."""
    return {
        "at least": value >= bound,
        "less than": value < bound,
        "at most": value <= bound,
        "more than": value > bound,
        "exactly": value == bound,
        "between": upper is not None and bound <= value <= upper,
    }[relation]


ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "e.g", "i.e", "etc", "fig", "no", "inc"}


def count_sentences(text: str) -> int:
    """Sentences as nltk's punkt counts them, near enough: ends at . ? !, not after an abbreviation or an initial."""
    count, rest, tokens = 0, 0, list(re.finditer(r"\S+", text))
    for token, following in zip(tokens, [*tokens[1:], None]):
        if not (match := re.search(r"(?<![.?!])([.?!]+)[\"')\]}*”’]*$", token[0])):
            continue
        word, mark = token[0][: match.start()].lstrip("\"'([{*“").lower(), match[1]
        if following and mark.endswith("."):
            ellipsis = mark.startswith("..") and not {"?", "!"} & set(mark)
            number = word.isdigit() and not following[0][0].isupper()
            initial = len(word) == 1 and word.isalpha()
            if ellipsis or number or initial or word in ABBREVIATIONS:
                continue
        count, rest = count + 1, token.end()
    return count + bool(text[rest:].strip())


def count_capital_words(text: str) -> int:
    """Tokens in capitals, split as the Penn Treebank does (contractions apart, hyphens together)."""
    tokens = re.split(r"""[\s,;:@#$%&?!()\[\]{}<>"`]|--|''""", text)
    parts = (part for token in tokens for part in re.sub(r"(N'T|'(?:S|M|D|LL|RE|VE))$", r" \1", token).split())
    return sum(part.isupper() for part in parts)


def _language(text: str) -> str | None:
    """The detected ISO code; None where it cannot be told."""
    if langdetect is None:
        return None
    try:
        return langdetect.detect(text[:5000])
    except langdetect.lang_detect_exception.LangDetectException:
        return None


def _in_english(text: str) -> bool:
    return _language(text) in (None, "en")


def _is_json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def _count_highlights(text: str) -> int:
    single = [h for h in re.findall(r"\*([^\n*]*)\*", text) if h.strip()]
    double = [h for h in re.findall(r"\*\*([^\n*]*)\*\*", text) if h.strip()]
    return len(single) + len(double)


def _placeholders(text: str) -> int:
    """[...] on one line, from the left."""
    count = 0
    for line in text.split("\n"):
        at = 0
        while (start := line.find("[", at)) >= 0 and (end := line.find("]", start)) >= 0:
            count, at = count + 1, end + 1
    return count


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end and bool(line[start:end].strip("<> "))


def _split_filled(text: str, divider: str) -> int | None:
    """Parts between dividers; empty ones may stand at the ends only, else None."""
    parts = [part.strip() for part in re.split(divider, text)]
    return sum(map(bool, parts)) if all(parts[1:-1]) else None


def _two_responses(text: str) -> bool:
    parts = [p.strip() for p in text.split("******")]
    filled = [p for p in parts if p]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _nth_paragraph_starts(text: str, kwargs: dict) -> bool:
    paragraphs = text.split(kwargs.get("divider", "\n\n"))
    filled, nth = sum(bool(p.strip()) for p in paragraphs), kwargs["nth_paragraph"]
    if not 1 <= nth <= filled or not (words := paragraphs[nth - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return filled == kwargs.get("num_paragraphs", filled) and word.lower() == kwargs["first_word"].lower()


def _has_postscript(text: str, marker: str) -> bool:
    spaced = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\."}
    return bool(re.search(spaced.get(marker.lower(), re.escape(marker.lower())), text.lower()))


def _count(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _emphasised(phrase: str, text: str, bold: bool) -> bool:
    """Whether a phrase stands inside **bold** or __bold__, or (not bold) in any emphasis of markdown's."""
    mark, inner = (r"(\*\*|__)", r"[^*\n]*?") if bold else (r"(\*\*?|__?)", r"[^*_\n]*?")
    return bool(re.search(rf"{mark}{inner}(?<![^\W_]){re.escape(phrase)}(?![^\W_]){inner}\1", text, re.IGNORECASE))


def _starts_with(text: str, phrase: str) -> bool:
    text, phrase = text.strip().lstrip("\"'*_# ").lower(), phrase.strip().lower()
    return text.startswith(phrase) and not (phrase[-1:].isalnum() and text[len(phrase) : len(phrase) + 1].isalnum())


def _outside(word: str, text: str) -> bool:
    return not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)


def _quoted(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


# id -> check(text, kwargs). Kwargs names are IFEval's. Wider than IFEval, for what Instructors write: "relation" where
# IFEval has an exact count, more relations, several keywords in one frequency rule, paragraphs with a "divider", and
# two rules of our own, start_checker and highlighted_words.
RULES = {
    "change_case:capital_word_frequency": lambda t, k: _relates(
        count_capital_words(t), k["capital_relation"], k["capital_frequency"]
    ),
    "change_case:english_capital": lambda t, k: t.isupper() and _in_english(t),
    "change_case:english_lowercase": lambda t, k: t.islower() and _in_english(t),
    "combination:repeat_prompt": lambda t, k: (
        t.strip().lower().startswith(k["prompt_to_repeat"].strip().lower()) if "prompt_to_repeat" in k else None
    ),
    "combination:two_responses": lambda t, k: _two_responses(t),
    "detectable_content:number_placeholders": lambda t, k: _relates(
        _placeholders(t), k.get("relation", "at least"), k["num_placeholders"]
    ),
    "detectable_content:postscript": lambda t, k: _has_postscript(t, k["postscript_marker"]),
    "detectable_format:constrained_response": lambda t, k: any(
        option in t for option in k.get("options", ("My answer is yes.", "My answer is no.", "My answer is maybe."))
    ),
    "detectable_format:highlighted_words": lambda t, k: all(_emphasised(p, t, k["bold"]) for p in k["phrases"]),
    "detectable_format:json_format": lambda t, k: _is_json(t),
    "detectable_format:multiple_sections": lambda t, k: (
        len(re.findall(rf"{re.escape(k['section_spliter'])}\s?\d+", t)) >= k["num_sections"]
    ),
    "detectable_format:number_bullet_lists": lambda t, k: _relates(
        len(re.findall(r"^\s*\*[^*\n].*$", t, re.MULTILINE)) + len(re.findall(r"^\s*-.*$", t, re.MULTILINE)),
        k.get("relation", "exactly"),
        k["num_bullets"],
    ),
    "detectable_format:number_highlighted_sections": lambda t, k: _relates(
        _count_highlights(t), k.get("relation", "at least"), k["num_highlights"]
    ),
    "detectable_format:title": lambda t, k: any(map(_has_title, t.split("\n"))),
    "keywords:existence": lambda t, k: all(_count(word, t) for word in k["keywords"]),
    "keywords:forbidden_words": lambda t, k: all(_outside(word, t) for word in k["forbidden_words"]),
    "keywords:frequency": lambda t, k: all(
        _relates(_count(word, t), k["relation"], k["frequency"])
        for word in ([k["keyword"]] if isinstance(k["keyword"], str) else k["keyword"])
    ),
    "keywords:letter_frequency": lambda t, k: _relates(
        t.lower().count(k["letter"].lower()), k["let_relation"], k["let_frequency"]
    ),
    "language:response_language": lambda t, k: None if (code := _language(t)) is None else code == k["language"],
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_starts,
    "length_constraints:number_paragraphs": lambda t, k: (
        (n := _split_filled(t, r"\n\s*\n" if "divider" in k else r"\s?\*\*\*\s?")) is not None
        and _relates(n, k.get("relation", "exactly"), k["num_paragraphs"])
    ),
    "length_constraints:number_sentences": lambda t, k: _relates(count_sentences(t), k["relation"], k["num_sentences"]),
    "length_constraints:number_words": lambda t, k: _relates(
        len(re.findall(r"\w+", t)), k["relation"], k["num_words"], k.get("max_words")
    ),
    "punctuation:no_comma": lambda t, k: "," not in t,
    "startend:end_checker": lambda t, k: t.strip().strip('"').lower().endswith(k["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, k: _quoted(t),
    "startend:start_checker": lambda t, k: _starts_with(t, k["start_phrase"]),
}


def check(instruction_id: str, kwargs: dict, response: str) -> bool | None:
    """Whether the response follows one verifiable instruction; None where that cannot be told (language)."""
    if not response.strip():
        return False
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return RULES[instruction_id](response, kwargs)


def check_loose(instruction_id: str, kwargs: dict, response: str) -> bool | None:
    """IFEval's loose verdict: followed by the response or by it without asterisks, first line or last line."""
    lines = response.split("\n")
    cuts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(cut).strip() if cut is not lines else response for cut in cuts]
    texts += [text.replace("*", "") for text in texts]
    verdicts = [check(instruction_id, kwargs, text) for text in texts if text.strip()]
    return None if None in verdicts and True not in verdicts else any(verdicts)


# ---------------------------------------------------------------- rules: recognising a constraint in plain English
#
# First the sentence is brought to a short canonical form: quoted strings become Q, numbers digits, "no fewer than five"
# >=5, and the wrapping goes ("Your answer must contain ...", "... in your response."). Then one pattern must match ALL
# of what is left. So what is only half understood is not recognised: "3 bullet points, each under 10 words" leaves a
# rest, and goes to the Judger.

_DIGITS = {
    word: i for i, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
_DIGITS |= {"fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "a single": 1, "hundred": 100}
_NUMBER = rf"(\d{{1,5}}|{'|'.join(_DIGITS)})\b"
_TEXT = (
    r"(?:(?:the|your|this) )?(?:(?:entire|whole|full|final|complete|overall|generated) )*"
    r"(?:response|answer|output|reply|text)"
)
_RELATIONS = {
    ">=": r"(?:at least|at minimum|no fewer than|no less than|not less than|not fewer than|a minimum of|minimum)",
    "<=": r"(?:at most|no more than|not more than|up to|a maximum of|maximum|not exceed|not exceeding|within"
    rf"|limited to|limit(?: {_TEXT}| it)? to)",
    "==": r"(?:exactly|precisely|only|just)",
    "<": r"(?:less than|fewer than|under|below)",
    ">": r"(?:more than|over|above)",
}
_NAMES = {">=": "at least", "<=": "at most", "==": "exactly", "<": "less than", ">": "more than"}
_QUOTE = re.compile(r"""(?<!\w)(?:"([^"]{1,200})"|'((?:[^']|(?<=\w)'(?=\w)){1,200})'|`([^`]{1,200})`)(?!\w)""")
_MODAL = r"(?:must|should|shall|has to|needs to|need to|is to|will|can|may)"
_VERB = (
    r"(?:contains?|includes?|has|is|have|uses?|feature|consist of|comprise|incorporate|present|provide|give|add|insert"
    r"|mention|be written(?: entirely| completely| only)? (?:in|with|using)|be composed of|be|write|answer with|respond with|limit to|keep to)"
)
_NOT = (
    r"(?:(?:do not|don't|must not|should not|not|never) (?:contain|include|have|use|mention|employ)"
    r"|there (?:must|should) not be"
    r"|(?:be )?(?:written )?without(?: using| the use of)?|avoid(?: using| the use of)?|refrain from(?: using| the use of| including)?|exclude|omit|no)"
)
_LEAD = re.compile(
    rf"(?:please |ensure (?:that )?|make sure (?:that )?|keep {_TEXT} |limit {_TEXT} to |in {_TEXT},? "
    r"|(?:the )?(?:word count|response length|length): )+"
)
_TAIL = re.compile(
    rf",? (?:in|within|of|throughout|anywhere in|somewhere in|for|from) (?:{_TEXT}|total|length|your writing)$"
)
_SUBJECT = re.compile(rf"(?:{_TEXT} {_MODAL} |there (?:must|should) be |{_TEXT} (?=contains|includes|is ))")


def _digits(form: str):
    return lambda match: form.format(*(_DIGITS.get(group, group) for group in match.groups()))


def _canonical(sentence: str) -> tuple[str, list[str]]:
    """The sentence in canonical form, and its quoted strings in order."""
    quotes: list[str] = []

    def keep(match):
        text = next(group for group in match.groups() if group).strip().rstrip(",")
        if not text.strip("* "):
            return text  # a divider, not a word
        quotes.append(text)
        return "Q"

    text = re.sub(r"[‘’]", "'", re.sub(r"[“”]", '"', " ".join(sentence.split())))
    # Two of IFEval's own sentences name a phrase or a word without quotes.
    text = re.sub(r"(this exact phrase )([^\"'`].*?)\.? (?=No other words)", r"\1`\2` ", text)
    text = re.sub(r"(section|marked|each|each one) with (\w+)(?= X\b)", r"\1 with `\2`", text)
    text = _QUOTE.sub(keep, re.sub(r"^[-*\d.)]+ ", "", text))
    text = re.sub(r"[A-Z]+", lambda m: m[0] if m[0] == "Q" else m[0].lower(), text)
    text = re.sub(r"\[(Q(?:, Q)*)\]", r"\1", text).rstrip(" .!")
    text = re.sub(r"Q(?:,? and Q|,? Q|, & Q)+", "Q", text)
    text = re.sub(rf"\b(?:between|from) {_NUMBER} (?:and|to) {_NUMBER}", _digits("{}..{}"), text)
    text = re.sub(rf"\b(\d+)(?:-| to ){_NUMBER}(?= words?\b)", _digits("{}..{}"), text)
    for sign, phrase in _RELATIONS.items():
        text = re.sub(rf"\b{phrase} {_NUMBER}", _digits(sign + "{}"), text)
    text = re.sub(rf"(?<![=<>.]){_NUMBER} or more\b", _digits(">={}"), text)
    text = re.sub(rf"(?<![=<>.]){_NUMBER} or (?:fewer|less)\b", _digits("<={}"), text)
    for sign, end in (("<=", "(?:fewer|less)"), (">=", "more")):
        text = re.sub(
            rf"(?<![=<>.]){_NUMBER} (words?|sentences?|paragraphs?) or {end}\b", _digits(sign + "{} {}"), text
        )
    text = re.sub(rf"\b{_NUMBER}(?= [a-z])", _digits("{}"), text)
    for wrapping in (_LEAD, _TAIL, _SUBJECT):
        text = (
            wrapping.sub("", text, 1) if wrapping is _TAIL else text[m.end() :] if (m := wrapping.match(text)) else text
        )
    text = re.sub(rf"^{_NOT} ", "NOT ", re.sub(rf"^{_VERB} ", "", text))
    text = re.sub(r"^NOT >(?=\d)", "<=", re.sub(r"^NOT <(?=\d)", ">=", text))  # "not more than 3" is "at most 3"
    return text, quotes


# Builders: (match, quotes) -> kwargs, or None where the match is not sure after all.


def _count_of(number: str, relation: str = "relation", implied: str = "", bare: str = "exactly"):
    """A count. `implied` is the relation that IFEval's id has built in and its kwargs do not name."""

    def build(match, quotes):
        name = _NAMES[match[1]] if match[1] else bare
        return {number: int(match[2])} | ({} if name == implied else {relation: name})

    return build


def _word_range(match, quotes):
    return {"num_words": int(match[1]), "max_words": int(match[3]) - (match[2] == "<"), "relation": "between"}


def _frequency(match, quotes):
    """The word X, or each of the words X and Y, ... <count> times."""
    part = match.groupdict()
    words = quotes if "Q" in match[0] else [part["bare"]]
    times = {"once": 1, "twice": 2}.get(part["adverb"]) or int(part["n"])
    name = _NAMES[part["sign"]] if part["sign"] else (part["how"] or "exactly").strip()
    if len(words) > 1 and not part["each"]:
        return None
    return {"keyword": words if part["each"] else words[0], "frequency": times, "relation": name}


def _listed(name: str):
    """Words named after a colon without quotes: "the following words: red, green or blue"."""
    return lambda match, quotes: {name: re.split(r",? (?:or|and) |, ", match[1])}


def _letter(match, quotes):
    letter = (quotes[0] if quotes else match["bare"]).lower()
    kwargs = {"letter": letter, "let_frequency": int(match["n"]), "let_relation": _NAMES[match["sign"] or "=="]}
    return kwargs if len(letter) == 1 and letter.isalpha() else None


def _nth_paragraph(match, quotes):
    nth = int(match[3]) if match[3] else _ORDINALS.index(match[4]) + 1
    between, word = match[2] or "", match[5] or quotes[-1]
    # What stands between may only say how the paragraphs are divided: by *** or, IFEval's own way, by blank lines.
    if not re.fullmatch(_DIVIDED, between) or len(quotes) > 2 or not word.isalnum():
        return None
    kwargs = {"nth_paragraph": nth, "first_word": word.lower()} | ({"divider": "***"} if "***" in between else {})
    return kwargs | ({"num_paragraphs": int(match[1])} if match[1] else {})


def _postscript(match, quotes):
    markers = {m.upper().rstrip(".") for m in quotes or [match[1] or ""]}
    if not markers <= {"P.S", "P.P.S"}:
        return None
    # "P.S. or P.P.S.": every P.P.S. holds a P.S., so the shorter marker accepts both.
    return {"postscript_marker": "P.S." if "P.S" in markers else "P.P.S"}


_N = r"(>=|<=|==|<|>)?(\d+)"
_TIMES = r"(?:(?P<how>at least |exactly )?(?P<adverb>once|twice)|(?P<sign>>=|<=|==|<|>)?(?P<n>\d+) times?)"
_WITH_MARKDOWN = r"(?: (?:with|using|in|in the form of) (?:the )?markdown(?: \w+)?)?"
_SUCH = r"(?:,? (?:such as|like|e\.g\.|i\.e\.|for example)[:,]? .*)?"
_CAPITALS = r"(?:in )?(?:all[- ])?(?:capital(?: letters)?|capitalized|caps|uppercase(?: letters)?|capitals)"
_LOWER = r"(?:in )?(?:using )?(?:(?:all|only) )?(?:lowercase|small|lower case|lower-case)(?: letters)?"
_NO_CAPS = r"(?:[.;,]? (?:with )?no (?:capital letters|uppercase letters|capitalization)(?: are)?(?: allowed)?)?"
_HOLD = r"(?:the )?(?:markdown )?(?:dividers?:? )?\*\*\*(?: \(.*\))?(?: (?:as )?(?:dividers?|separators?))?"
_DIVIDED = (
    rf",?(?: each)? ?separated (?:by|with|using) {_HOLD}|\. paragraphs and only paragraphs are .*"
    r"|,? separated by (?:a|1|one)? ?blank lines?|"
)
_KEYWORD = r"(?:the )?(?:following )?(?:specific |exact |required )?(?:key ?)?(?:words?|phrases?|terms?|text|sentence)?"
_LIST = r"([a-z][a-z-]*(?:(?:,|,? or|,? and) [a-z][a-z-]*)*)"
_BOLD = (
    r"(?:(?:the )?(?P<bold>(?:markdown )?bold|\*\*bold\*\*)(?: markdown)?(?: (?:formatting|format|text|type|syntax|font))?"
    r"|(?:markdown )?(?:emphasis|italics?|highlighting)|markdown)"
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_LANGUAGES = dict(
    zip(
        "english chinese spanish french german italian portuguese dutch russian polish ukrainian bulgarian czech swedish "
        "danish norwegian finnish hungarian greek turkish arabic persian hebrew hindi bengali marathi gujarati punjabi "
        "tamil telugu kannada malayalam nepali urdu thai vietnamese indonesian swahili korean japanese romanian".split(),
        "en zh-cn es fr de it pt nl ru pl uk bg cs sv da no fi hu el tr ar fa he hi bn mr gu pa ta te kn ml ne ur th vi "
        "id sw ko ja ro".split(),
    )
)
_HIGHLIGHTS = _count_of("num_highlights", implied="at least", bare="at least")
_CAPITAL_WORDS = _count_of("capital_frequency", "capital_relation")

# (id, builder or fixed kwargs, patterns over the canonical form); the first that matches wins
PATTERNS = [
    (
        "length_constraints:number_words",
        _count_of("num_words"),
        rf"(?:limited to )?{_N} words?(?: long| in length)?(?:, no more,? (?:and )?no less)?",
        rf"(?:a )?(?:total )?(?:word count|length|number of words)(?: of| that is| which is)? {_N}(?: words?)?",
    ),
    (
        "length_constraints:number_words",
        _word_range,
        r"(\d+)(\.\.)(\d+) words?(?: long| in length)?",
        r"(?:a (?:total )?(?:word count|length) of )?>=(\d+)(?: words?)?,? (?:and|but) (<=|<)(\d+) words(?: long| in length)?",
    ),
    ("length_constraints:number_sentences", _count_of("num_sentences"), rf"{_N} (?:complete )?sentences?(?: long)?"),
    (
        "length_constraints:number_paragraphs",
        _count_of("num_paragraphs", implied="exactly"),
        rf"{_N} paragraphs?(?: in {_TEXT})?,?(?: and (?:they|the paragraphs) (?:must|should) be|\. paragraphs are| and separate them)?"
        rf" (?:(?:separated|divided) )?(?:with|by|using) {_HOLD}",
    ),
    (
        "length_constraints:number_paragraphs",
        lambda m, q: {"num_paragraphs": int(m[2]), "relation": _NAMES[m[1] or "=="], "divider": "\n\n"},
        rf"{_N} paragraphs?(?: in {_TEXT})?(?:,? separated (?:by|with) (?:a|1|one)? ?blank lines?)?",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        _nth_paragraph,
        rf"(?:(?:==)?(\d+) paragraphs?(.{{0,130}}?)[.,]? (?:and |with )?)?(?:the )?"
        rf"(?:paragraph (\d+)|({'|'.join(_ORDINALS)}) paragraph) (?:(?:must|should) )?"
        r"(?:start|begin|starting|beginning) with (?:the )?(?:word )?(?:Q|(\w+))",
    ),
    (
        "detectable_format:number_bullet_lists",
        _count_of("num_bullets", implied="exactly"),
        rf"{_N} (?:markdown )?bullet(?: point)?s?(?:,? (?:using|in|with|formatted (?:as|with)) (?:the )?markdown"
        r"(?: bullets?| bullet points?| format| syntax)?(?:,?(?: each)? (?:starting|beginning) with (?:\*|-|Q))?"
        r"(?:,? (?:such as|like)[: ].*)?)?(?:\. use (?:the )?markdown bullet points such as: .*)?",
        rf"bullet points(?: (?:using|in|with) markdown(?: bullets?)?)?,? and there (?:must|should) be {_N} bullet points",
    ),
    (
        "detectable_content:number_placeholders",
        _count_of("num_placeholders", implied="at least", bare="at least"),
        rf"{_N} (?:distinct |different )?placeholders?,?(?: represented| enclosed| wrapped)?(?: by| in| within| with)"
        rf" (?:square )?brackets{_SUCH}",
    ),
    (
        "detectable_format:number_highlighted_sections",
        _HIGHLIGHTS,
        rf"highlight {_N} (?:sections?|parts?|phrases?)(?: (?:in|of|within) {_TEXT})?{_WITH_MARKDOWN}{_SUCH}",
        rf"{_N} (?:highlighted (?:sections?|spans?|parts?|phrases?)|sections? highlighted){_WITH_MARKDOWN}{_SUCH}",
        rf"{_N} (?:sections?|parts?)(?: (?:in|of|within) {_TEXT})? (?:must|should) be highlighted{_WITH_MARKDOWN}{_SUCH}",
    ),
    (
        "detectable_format:highlighted_words",
        lambda m, q: {"phrases": q, "bold": bool(m["bold"])},
        rf"highlight (?:the )?(?:exact )?(?:words?|phrases?|terms?) Q(?: and (?:the )?(?:word|phrase|term) Q)*"
        rf"(?: (?:in|within) {_TEXT})?(?: (?:in|with|using|by using) {_BOLD})",
        rf"(?:the )?(?:words?|phrases?|terms?) Q (?:must|should) be (?:highlighted )?in {_BOLD}",
    ),
    (
        "detectable_format:multiple_sections",
        lambda m, q: {"section_spliter": q[0], "num_sections": int(m[1])},
        r"(?:==)?(\d+) sections?[.,;]? (?:and )?(?:each )?(?:mark|marking|marked)(?: the)?"
        r"(?: beginning of each(?: section| one)?)? (?:with|by|as) Q x(?:, such as:? .*)?",
    ),
    (
        "detectable_format:title",
        {},
        rf"(?:an? )?(?:explicit )?(?:{_TEXT} a )?title,? (?:(?:wrapped|enclosed|written) )?(?:in|with|within) double "
        rf"ang(?:le|ular) brackets{_SUCH}",
    ),
    (
        "detectable_content:postscript",
        _postscript,
        r"(?:at the end(?: of .{1,20})?, )?(?:please )?(?:explicitly )?(?:end with |conclude with |add |include )?a postscript"
        r"(?: (?:at|to) the end(?: of .{1,20})?)?,? (?:starting|beginning|marked|indicated|that (?:starts|begins)) (?:with|by)"
        r"(?: a marker like| the marker)? (?:Q(?: or Q)?|(p\.p\.s|p\.s)\.?)(?: at the end(?: of .{1,20})?)?",
    ),
    (
        "detectable_format:json_format",
        {},
        rf"(?:put {_TEXT} )?(?:(?:wrapped|formatted|presented|returned|given|provided|valid|output) )?(?:in |as |into )?(?:a )?"
        r"(?:valid )?json(?: format| object)?(?:\. you can use markdown ticks such as ```)?(?:,? wrapped in markdown code fences)?",
    ),
    ("change_case:english_capital", {}, rf"(?:entirely )?(?:{_TEXT} )?(?:in )?(?:english,? (?:and )?)?{_CAPITALS}"),
    (
        "change_case:english_lowercase",
        {},
        rf"(?:entirely )?(?:{_TEXT} )?(?:in )?(?:the )?(?:english,? (?:and |using )?)?{_LOWER}{_NO_CAPS}(?: language)?(?: style)?",
    ),
    (
        "change_case:capital_word_frequency",
        _CAPITAL_WORDS,
        rf"{_N} (?:words?|all-caps words?) {_CAPITALS}(?: (?:should|must) appear)?",
        rf"(?:all-caps word frequency: )?{_N} (?:(?:instances|occurrences) of )?"
        rf"(?:all[- ]caps words?|words in all[- ]caps)(?: (?:should|must) (?:appear|be used))?{_SUCH}",
        rf"words with all capital letters should appear {_N} times",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "less than"},
        r"NOT any (?:words )?(?:in )?all[- ]caps(?: words)?",
    ),
    (
        "punctuation:no_comma",
        {},
        r"NOT (?:(?:the use of )?any )?(?:commas?|comma usage)(?: at all| whatsoever| throughout| anywhere| (?:should|may|must) be used"
        r"| (?:should|may|must) appear| are allowed| to (?:ensure|improve|enhance|maintain) \w+(?: and \w+)?)?",
    ),
    (
        "startend:quotation",
        {},
        rf"(?:(?:wrapped|wrap|enclosed|enclose)(?: {_TEXT})? (?:in|with|within) )?double quot(?:ation marks|es)",
    ),
    (
        "keywords:frequency",
        _frequency,
        rf"{_KEYWORD} (?:Q|(?P<bare>\w+))(?: (?:{_MODAL} )?(?:appears?|be used|be mentioned))? {_TIMES}(?P<each> each(?: in any order)?)?",
    ),
    (
        "keywords:frequency",
        lambda m, q: {"keyword": q[0], "frequency": int(m[1]), "relation": "at least"} if len(q) == 1 else None,
        r">=(\d+) (?:occurrences?|instances?|mentions?) of (?:the )?(?:word|phrase|term) Q(?: exactly as (?:provided|given))?",
    ),
    ("keywords:existence", lambda m, q: {"keywords": q}, rf"{_KEYWORD}:? ?Q(?: (?:>=1 times?|at least once))?"),
    ("keywords:existence", _listed("keywords"), rf"(?:all )?(?:of )?(?:the )?(?:following )?(?:key)?words: {_LIST}"),
    ("keywords:existence", lambda m, q: {"keywords": [m[1]]}, r"(?:an? )?title in the format (<<[^<>]+>>)"),
    (
        "keywords:forbidden_words",
        lambda m, q: {"forbidden_words": q},
        rf"NOT (?:any of )?(?:the )?(?:forbidden )?{_KEYWORD}:? ?Q(?: or Q)*(?: anywhere)?",
    ),
    (
        "keywords:forbidden_words",
        _listed("forbidden_words"),
        rf"NOT (?:any )?(?:of )?(?:the )?(?:following )?(?:forbidden )?(?:key)?words: {_LIST}",
    ),
    (
        "keywords:letter_frequency",
        _letter,
        rf"(?:the )?letter (?:Q|(?P<bare>[a-z]))(?: (?:{_MODAL} )?(?:appear|be used))? (?P<sign>>=|<=|==|<|>)?(?P<n>\d+) times?",
    ),
    (
        "startend:end_checker",
        lambda m, q: {"end_phrase": q[0]} if len(q) == 1 else None,
        r"(?:finish|end|conclude)(?: .{1,14})? with (?:the|this)(?: exact)?(?: phrase| sentence| words)?:? ?Q(?:[.,;]? "
        r"(?:no (?:other )?(?:words?|text|content)?|nothing) ?(?:should|must|may) follow (?:this phrase|it|after it))?",
    ),
    (
        "startend:start_checker",
        lambda m, q: {"start_phrase": q[0]} if len(q) == 1 else None,
        rf"(?:start|begin|open)(?: {_TEXT})? with (?:the |this )?(?:exact )?(?:words?|phrase|sentence|line)?:? ?Q"
        r"(?:,? followed by the rest| in the first paragraph)?",
    ),
    (
        "combination:two_responses",
        {},
        r"(?:give |==)? ?2 (?:different|distinct) responses(?:[.,;]| which are|, )* ?(?:responses and only responses should be )?"
        r"separated by (?:(?:==)?6 asterisk(?: symbol)?s:? ?)?\*{6}",
    ),
    (
        "combination:repeat_prompt",
        {},  # the request is the seed: rule_verdict fills it in
        r"(?:first,? )?repeat the request(?: above)? word[ -]for[ -]word(?: without (?:any )?changes?)?,? (?:then|before|and then) .*",
    ),
    (
        "detectable_format:constrained_response",
        lambda m, q: {"options": q},
        r"(?:1|one) of the following options: .{0,3}Q.{0,3}",
    ),
    (
        "language:response_language",
        lambda m, q: {"language": _LANGUAGES[m[1]]} if m[1] in _LANGUAGES else None,
        rf"(?:response language: |entirely |completely |only |{_TEXT} )?(?:in )?(?:the )?(\w+)(?: language)?"
        r"(?:,? (?:and )?no other language is allowed)?",
    ),
]
PATTERNS = [(name, build, re.compile(pattern)) for name, build, *patterns in PATTERNS for pattern in patterns]


@cache
def _recognise(constraint: str) -> tuple[str, str] | None:
    text, quotes = _canonical(constraint)
    for name, build, pattern in PATTERNS:
        if match := pattern.fullmatch(text):
            kwargs = build(match, quotes) if callable(build) else build
            if kwargs is not None:
                return name, json.dumps(kwargs)
    return None


def recognise(constraint: str) -> tuple[str, dict] | None:
    """The verifiable instruction that a sentence asks for, as (id, kwargs); None unless it is understood whole."""
    if len(constraint) > MAX_CONSTRAINT_CHARS or not (found := _recognise(constraint)):
        return None
    return found[0], json.loads(found[1])


# ---------------------------------------------------------------- contradictions between rules

_WHOLE = {  # rules on the whole shape of an answer: no two of them at once
    "detectable_format:json_format",
    "startend:quotation",
    "detectable_format:constrained_response",
    "combination:two_responses",
}
_CLASHES = [frozenset(pair) for pair in combinations(_WHOLE, 2)] + [
    frozenset(("detectable_format:json_format", other))
    for other in (
        "detectable_format:number_bullet_lists",
        "detectable_format:title",
        "detectable_content:postscript",
        "startend:end_checker",
        "combination:repeat_prompt",
        "length_constraints:number_paragraphs",
        "length_constraints:nth_paragraph_first_word",
        "detectable_format:number_highlighted_sections",
        "detectable_format:multiple_sections",
    )
]
_CLASHES += [
    frozenset(("change_case:english_capital", "change_case:english_lowercase")),
    frozenset(("combination:two_responses", "length_constraints:number_paragraphs")),
    frozenset(("length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word")),
    frozenset(("combination:repeat_prompt", "startend:quotation")),
    frozenset(("combination:repeat_prompt", "change_case:english_capital")),
    frozenset(("combination:repeat_prompt", "change_case:english_lowercase")),
]
# counted thing -> the kwargs that hold its relation, its bound, and what is counted
_COUNTS = {
    "length_constraints:number_words": ("relation", "num_words", None),
    "length_constraints:number_sentences": ("relation", "num_sentences", None),
    "length_constraints:number_paragraphs": ("relation", "num_paragraphs", None),
    "detectable_format:number_bullet_lists": ("relation", "num_bullets", None),
    "change_case:capital_word_frequency": ("capital_relation", "capital_frequency", None),
    "keywords:frequency": ("relation", "frequency", "keyword"),
    "keywords:letter_frequency": ("let_relation", "let_frequency", "letter"),
}


def intervals(rules: list[tuple[str, dict]]) -> dict[tuple, tuple[float, float]]:
    """(id, counted thing) -> the (low, high) counts that all rules on it allow together."""
    allowed: dict[tuple, tuple[float, float]] = {}
    for name, kwargs in rules:
        if name not in _COUNTS:
            continue
        relation, number, what = _COUNTS[name]
        n = kwargs[number]
        low, high = {
            "at least": (n, math.inf),
            "more than": (n + 1, math.inf),
            "less than": (0, n - 1),
            "at most": (0, n),
            "exactly": (n, n),
            "between": (n, kwargs.get("max_words", n)),
        }[kwargs.get(relation, "exactly")]
        key = (name, kwargs[what].lower() if what else None)
        before = allowed.get(key, (0, math.inf))
        allowed[key] = max(low, before[0]), min(high, before[1])
    return allowed


def contradiction(rules: list[tuple[str, dict]]) -> str:
    """Why the recognised rules cannot all hold at once; "" if nothing speaks against it."""
    ids = {name for name, _ in rules}
    for clash in _CLASHES:
        if clash <= ids:
            return " with ".join(sorted(name.split(":")[1] for name in clash))
    allowed = intervals(rules)
    for (name, what), (low, high) in allowed.items():
        if low > high:
            return f"{name.split(':')[1]} {what or ''} at least {low} and at most {high}".replace("  ", " ")
    words = allowed.get(("length_constraints:number_words", None), (0, math.inf))
    sentences = allowed.get(("length_constraints:number_sentences", None), (0, math.inf))
    if sentences[0] > words[1]:
        return "more sentences than words"
    if "change_case:english_lowercase" in ids:
        if allowed.get(("change_case:capital_word_frequency", None), (0, 0))[0] > 0:
            return "lowercase with capital words"
    kwargs = [k for _, k in rules]
    wanted = {w.lower() for k in kwargs for w in k.get("keywords", [])}
    wanted |= {word for (name, word), (low, _) in allowed.items() if name == "keywords:frequency" and low > 0}
    banned = {w.lower() for k in kwargs for w in k.get("forbidden_words", [])}
    banned |= {word for (name, word), (_, high) in allowed.items() if name == "keywords:frequency" and high < 1}
    if wanted & banned:
        return f"{min(wanted & banned)!r} both wanted and forbidden"
    cased = ids & {"change_case:english_capital", "change_case:english_lowercase"}
    if cased and any(k.get("language", "en") != "en" for k in kwargs):
        return "English letter case with another language"
    return ""
