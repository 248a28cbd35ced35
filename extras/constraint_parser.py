"""constraint_parser.py: English sentence -> (id, kwargs) of a verifier, or None.

A sentence is normalized, with Q for quoted text, and must then match one of PATTERNS as a whole.
Half a constraint would give wrong rewards, so all else is left to the LLM Judger.
"""

import re
from functools import lru_cache

from extras.verifiers import RELATIONS, VERIFIERS, WORD, category, validate_kwargs

MAX_CONSTRAINT_CHARS = 300  # longer "constraints" are answers or repeat the seed question
# fmt: off
# (category, regular expression). Words in capitals are FRAGMENTS, Q is quoted text, groups kwargs.
PATTERNS = [
    ("number_words", "WORDCOUNT words?( long)?(, no more,? (and )?no less)?"),
    ("number_words", "(a )?(total )?(word count|length|number of words)( of)? WORDCOUNT( words)?"),
    ("number_sentences", "COUNT (complete )?sentences?( long)?"),
    ("number_paragraphs", "COUNT paragraphs?DIVIDED?"),
    ("nth_paragraph_first_word",
     r"((exactly )?(?P<num_paragraphs>\d+) paragraphs?DIVIDED?[.,]? ((and|with) )?)?"
     "(the )?paragraph NUMBER (MUST )?(start|begin)(n?ing)? with (the )?(word )?Q"),
    ("number_bullet_lists",
     "(bullet points( MARKDOWN)? and there MUST be )?COUNT (markdown )?bullet( point)?s?"
     r"( MARKDOWN)?(,? (each )?(start|beginn)ing with (\*|-)|,? (such as|like):? \* [^*.,;:]*)?"
     r"(. use the markdown bullet points such as:( \* this is point \d.?)+)?"),
    ("number_placeholders", "COUNT ((distinct|different) )?placeholders?,? "
     "((represented|enclosed) )?(by|in|with) (square )?bracketsEXAMPLE?"),
    ("number_highlighted_sections", "highlight COUNT SECTIONS( MARKDOWN)?EXAMPLE?"),
    ("number_highlighted_sections",
     "COUNT (highlighted SECTIONS|SECTIONS (MUST be )?highlighted)( MARKDOWN)?EXAMPLE?"),
    ("highlighted_words", "highlight KEYWORD Q EMPHASIS"),
    ("highlighted_words", "KEYWORD Q MUST be (highlighted )?EMPHASIS"),
    ("multiple_sections",
     "COUNT sections?[.,;]? (each )?mark(ed)?( the beginning of each section)? with Q x"
     r"(,? such as:?( \w+ \d+( \[[^\]]*\])?)+)?"),
    ("title", "(a )?title,? ((wrapped|enclosed) )?(in|with(in)?) double ang(le|ular) brackets"
     "EXAMPLE?"),
    ("postscript",
     "(at the end, )?((please|explicitly|add|include|end with|conclude with) )*a postscript"
     "( (at|to) the end)? (starting|beginning|marked|indicated|that (starts|begins)) (with|by)"
     "( a marker like)? Q( at the end)?"),
    ("json_format",
     "(put TEXT )?((wrapped|formatted|presented) )?((in|as) )?(a )?(valid )?json( format| object)?"
     "(. you can use markdown ticks such as ```|,? wrapped in markdown code fences)?"),
    ("constrained_response", r"1 of the following options: \(?Q\)?"),
    ("two_responses", "(exactly )?2 (different|distinct) responses[.,]? (responses and only "
     r"responses MUST be )?separated by (6 asterisk( symbol)?s:? )?\*{6}"),
    ("repeat_prompt", "(first,? )?(start by repeating|repeat) the request( above)? "
     r"word[ -]for[ -]word( without changes?)?,? (then|before|and then) \w+( it| (the|your) \w+)?"
     r"( \(1\. do not say any words .*\))?"),
    ("capital_word_frequency", "COUNT ((instances|occurrences) of )?"
     "(all-caps words?|words? (in|with) CAPITALS)( APPEAR)?EXAMPLE?"),
    ("capital_word_frequency", "words with CAPITALS APPEAR COUNT times?"),
    ("english_capital", "ENGLISH(in )?CAPITALS"),
    ("english_lowercase",
     "ENGLISH(in )?((all|only) )?(lower[- ]?case( letters)?|small letters)( language( style)?)?"
     "([.;,]? (with )?no ((capital|uppercase) letters|capitalization)( are)?( allowed)?)?"),
    ("response_language", "((entirely|completely|only) )?in (?P<language>LANGUAGE)( language)?"
     "(, no other language is allowed)?"),
    ("no_comma", "not ((the use of )?any )?commas?( at all| whatsoever| throughout| anywhere"
     r"| APPEAR| to (ensure|improve|maintain) \w+( and \w+)?)?"),
    ("frequency", "KEYWORD Q( APPEAR)? COUNT times?(?P<each> each( in any order)?)?"),
    ("frequency", "COUNT (occurrence|instance|mention)s? of KEYWORD Q(?P<each>)"
     "( exactly as provided)?"),
    ("existence", "KEYWORD:? ?Q( at least 1 times?)?"),
    ("existence", "KEYWORD: (?P<keywords>LIST)"),
    ("existence", "(an? )?title in the format Q"),
    ("forbidden_words", "not (any of )?KEYWORD:? ?Q( or Q)*( anywhere)?"),
    ("forbidden_words", "not (any (of )?)?KEYWORD: (?P<forbidden_words>LIST(,? or [a-z-]+)?)"),
    ("letter_frequency", "(the )?letter Q( APPEAR)? COUNT times?"),
    ("end_checker",
     "(finish|end|conclude)( TEXT)? with ((the|this) )?(exact )?(phrase|sentence)?:? ?Q"
     "([.,]? (no (other )?(words|text)|nothing) MUST follow( this phrase| it)?)?"),
    ("start_checker",
     "(start|begin|open)( TEXT)? with ((the|this) )?(exact )?(phrase|sentence|words?)?:? ?Q"
     "(,? followed by the rest( of the text)?| in the paragraph 1)?"),
    ("quotation", "(wrap|enclose)(ped|d)?( TEXT)? (in|with(in)?) double (quotation marks|quotes)"),
]
LANGUAGES = dict(pair.split(":") for pair in """
arabic:ar bengali:bn bulgarian:bg chinese:zh czech:cs danish:da dutch:nl english:en finnish:fi
french:fr german:de greek:el gujarati:gu hebrew:he hindi:hi hungarian:hu indonesian:id italian:it
japanese:ja kannada:kn korean:ko malayalam:ml marathi:mr nepali:ne norwegian:no persian:fa polish:pl
portuguese:pt punjabi:pa romanian:ro russian:ru spanish:es swahili:sw swedish:sv tamil:ta telugu:te
thai:th turkish:tr ukrainian:uk urdu:ur vietnamese:vi""".split())
FRAGMENTS = {
    "NUMBER": r"(?P<number>\d{1,5})",
    "COUNT": f"((?P<relation>{'|'.join(RELATIONS[:-1])}) )?NUMBER",
    "WORDCOUNT": f"((?P<relation>{'|'.join(RELATIONS[:-1])}|(?P<range>between)) )?NUMBER"
                 r"(?(range) and (?P<max_words>\d{1,5}))",
    "LANGUAGE": "|".join(LANGUAGES),
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
    # Only the shapes of examples, so that a further condition after an example is not skipped.
    "EXAMPLE": r",? (such as|like|i\.e\.|e\.g\.|for example)[:,]? ITEM((,|,? or|,? and) ITEM)*",
    "ITEM": r"Q|<<[^<>]*>>|\[[^\[\]]*\]|\*+[^*]+\*+",
    "DIVIDER": "((the )?markdown divider:? )?(?P<divider>\\*\\*\\*)|(a|1) blank line"
               r"|2 new lines as if it was \\n\\n in python",
    "DIVIDED": "[.,]? ((and )?(they|paragraphs)( and only paragraphs)? (are|MUST be) )?"
               "(separated( with each other)?|and separate them) (by|with) DIVIDER",
}
# Quotation marks that IFEval's sentences leave out are added, those around dividers removed.
QUOTE_REWRITES = [
    (r"(this exact phrase )([^\"'`].*?)\.?(?= No other words)", r"\1`\2`"),
    (r"((?:section|marked|each) with )(\w+)(?= X\b)", r"\1`\2`"),
    (r"(start with word |the (?:word|letter) (?=\w+ should appear))(\w+)", r"\1`\2`"),
    (r"((?:with|by) )(P\.(?:P\.)?S\b\.?)", r"\1`\2`"),
    (r"(title in the format )(<<[^<>]*>>)", r"\1`\2`"),
    (r"'P\.S\.?' or 'P\.P\.S\.?'", "'P.S.'"),  # every P.P.S. contains a P.S.
    (r"(?<!\w)([\"'`])(\*+|-|(?:\\n)+)\1(?!\w)", r"\2"),
]
NUMBERS = dict(pair.strip().split(":") for pair in """
zero:0, one:1, two:2, three:3, four:4, five:5, six:6, seven:7, eight:8, nine:9, ten:10, twelve:12,
fifteen:15, twenty:20, fifty:50, hundred:100, a single:1, once:1 times, twice:2 times,
first paragraph:paragraph 1, second paragraph:paragraph 2, third paragraph:paragraph 3,
fourth paragraph:paragraph 4""".split(","))
# Applied from top to bottom: numbers, then relations, then the words around the condition go.
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
    # "may" is no obligation, except in "may not" and "may only".
    (r"^(TEXT|there) ((?!(may|can) (?!not |be |only ))MUST |(?=contains|includes|has|is ))", ""),
    # A quotation alone is not an instruction.
    (r"^Q$", "quotation"),
    (r"^(response )?language:", "in"),
    # "Include capital letters" does not mean that all letters are capital.
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
# fmt: on


def _compile(pattern: str) -> re.Pattern:
    """A regular expression with its fragments filled in. Fragments may contain fragments."""
    while re.search("[A-Z]{4}", pattern):
        pattern = re.sub("[A-Z]{4,}", lambda match: f"({FRAGMENTS[match[0]]})", pattern)
    return re.compile(pattern)


_REWRITES = [(_compile(pattern), new) for pattern, new in REWRITES]
_IDS = {category(id): id for id in VERIFIERS}
_PATTERNS = [(_IDS[name], _compile(pattern)) for name, pattern in PATTERNS]
_SEPARATOR = re.compile(r"[,;](?!\d) ?(?:(?:and|or) )?| (?:and|or) ")
_QUOTED = re.compile(
    r"""(?<!\w)(?:"([^"]{1,200})"|'((?:[^']|(?<=\w)'(?=\w)){1,200})'|`([^`]{1,200})`)(?!\w)"""
)


def _normalize(sentence: str) -> tuple[str, list[str]]:
    """The sentence in the wording of PATTERNS, and its quotes: ("not the word Q", ["tea"])."""
    text = " ".join(sentence.replace("\0", " ").split())
    text = re.sub(r"^[-*\d.)]+ ", "", text.translate(str.maketrans("‘’“”", "''\"\"")))
    for pattern, new in QUOTE_REWRITES:
        text = re.sub(pattern, new, text)
    quotes = [(match[1] or match[2] or match[3]).strip() for match in _QUOTED.finditer(text)]
    # NUL, so that Q is the only capital letter.
    text = _QUOTED.sub("\0", text).lower().replace("\0", "Q").rstrip(" .!")
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text, quotes


def _split_list(quote: str) -> list[str]:
    """A list in one pair of quotation marks: "a, an, or the" -> ["a", "an", "the"]."""
    items = list(filter(None, (item.strip(" '\"`") for item in _SEPARATOR.split(quote))))
    # A longer item is a clause, and the quote a sentence.
    is_list = re.search("[,;]", quote) and all(len(item.split()) <= 3 for item in items)
    return items if is_list and items else [quote]


def _extract_kwargs(id: str, match: re.Match, quotes: list[str]) -> dict:
    """The kwargs that a matching sentence gives. Not validated yet."""
    verifier, kwargs = VERIFIERS[id], {}
    number, relation = verifier.first_kwarg("a number"), verifier.first_kwarg("a relation")
    for group, text in match.groupdict().items():
        name = {"number": number, "relation": relation}.get(group, group)
        if name == "bold":
            kwargs[name] = text is not None
        elif group == "relation" and verifier.kwargs[relation] is ...:
            kwargs[name] = text or "exactly"
        elif text and name in ("keywords", "forbidden_words"):
            kwargs[name] = _SEPARATOR.split(text)
        elif text and name in verifier.kwargs:
            kwargs[name] = int(text) if text.isdecimal() else LANGUAGES.get(text, text)
    list_name = verifier.first_kwarg("a list of texts")
    name = list_name or verifier.first_kwarg("a text or texts", "one letter", "a text")
    if quotes and name:
        plural = re.search(r"(?<!exact )(words|terms|phrases|options):? ?\(?Q", match[0])
        quotes = _split_list(quotes[0]) if plural and len(quotes) == 1 else quotes
        # The word 'very.' is "very". In exact texts and first or last phrases full stops count.
        verbatim = name in ("end_phrase", "start_phrase", "options", "postscript_marker")
        if not verbatim and not re.search("exact |sentence", match[0]):
            quotes = [quote.rstrip(".,;:") or quote for quote in quotes]
        kwargs[name] = quotes if list_name or len(quotes) > 1 else quotes[0]
    return kwargs


def _adapt(id: str, kwargs: dict, match: re.Match) -> dict | None:
    """The kwargs as their verifier needs them, or None if it cannot check the sentence."""
    if validate_kwargs(id, kwargs):
        return None
    name = category(id)
    kwargs = {n: v for n, v in kwargs.items() if v != VERIFIERS[id].kwargs[n]}
    if name == "number_paragraphs" and not match["divider"]:
        return {"relation": "exactly"} | kwargs | {"divider": "\n\n"}
    if name == "nth_paragraph_first_word":
        word = kwargs["first_word"].lower()
        return kwargs | {"first_word": word} if WORD.fullmatch(word) and "_" not in word else None
    if name == "postscript" and not re.fullmatch(r"(P\.)+S\.?", kwargs["postscript_marker"]):
        return None
    if name == "frequency" and isinstance(kwargs["keyword"], list) and not match["each"]:
        return None
    if name == "letter_frequency":
        return kwargs | {"letter": kwargs["letter"].lower()[0]}  # "İ".lower() has two characters
    return kwargs


@lru_cache(4096)
def parse_constraint(sentence: str) -> tuple[str, dict] | None:
    """The verifier's id and kwargs for a constraint, None unless the sentence is fully understood.

    "Use 9 words." -> ("length_constraints:number_words", {"num_words": 9, "relation": "exactly"})
    Results are cached: do not change the kwargs.
    """
    if len(sentence) > MAX_CONSTRAINT_CHARS:
        return None
    text, quotes = _normalize(sentence)
    for id, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            kwargs = _adapt(id, _extract_kwargs(id, match, quotes), match)
            if kwargs is not None:
                return id, kwargs
    return None
