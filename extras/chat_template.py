"""chat_template.py: chat messages -> prompt ids, completion ids -> text.

Templates differ: some raise on a system message or drop it, want contents as lists of parts, start
with <think>, print today's date, or end a message with an EOS that no config names.
"""

import re

from jinja2 import TemplateError

from prompts import THOUGHT_END, THOUGHT_MARKS, THOUGHT_START

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)
DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
YES, NO = ("yes", "Yes", "YES", " yes", " Yes"), ("no", "No", "NO", " no", " No")


class ChatTemplate:
    """A tokenizer's own chat template. ValueError if it loses the user's text.

    eos: ids that end a reply. yes_tokens, no_tokens: first ids of a verdict. date: None for today.
    """

    # Special tokens of some tokenizers that belong to the format of an answer, or of a thought.
    TAGS = re.compile(
        r"</?answer>|.*(?:think|thought|reasoning|channel|inner_).*|<\|message\|>", re.IGNORECASE
    )
    # Probe messages. Private-use characters show where a template puts a content.
    SYSTEM, USER, ASSISTANT = (
        {"role": role, "content": f"\ue000{role}\ue001"} for role in ("system", "user", "assistant")
    )

    def __init__(self, tokenizer, eos: set[int]):
        self.tokenizer = tokenizer
        self.date = None
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_pattern = re.compile("|".join(map(re.escape, special.values())) or r"(?!)")
        self.hidden_ids = {i for i, text in special.items() if not self.TAGS.fullmatch(text)}
        marks = [t for t in special.values() if re.search("think|thought|reasoning", t, re.I)]
        unknown = [t for t in marks if not (THOUGHT_START.search(t) or THOUGHT_END.search(t))]
        if unknown:
            print(f"  unknown thought marks, a thought is judged as an answer: {' '.join(unknown)}")
        self.content_in_parts = False
        self.content_in_parts = not self._keeps(self.USER)
        if not self._keeps(self.USER):
            raise ValueError("its chat template loses the user's text")
        self.merge_system = not self._keeps(self.SYSTEM, self.USER)
        # The special token after an assistant message, if there is one, ends a reply.
        text = self._render([self.USER, self.ASSISTANT], add_prompt=False, ignore=TEMPLATE_ERRORS)
        end = text.rpartition(self.ASSISTANT["content"])[2].strip()
        self.skip_thought = self._skip_thought(text.partition(self.ASSISTANT["content"])[0])
        self.eos = eos | ({*tokenizer.encode(end, add_special_tokens=False)[:1]} & self.hidden_ids)
        self.yes_tokens, self.no_tokens = self._first_tokens(YES), self._first_tokens(NO)

    def _keeps(self, *messages: dict) -> bool:
        text = self._render(list(messages), ignore=TEMPLATE_ERRORS)
        return all(text.count(m["content"]) == 1 for m in messages)

    def _skip_thought(self, before_answer: str) -> str:
        """What stands between the generation prompt and an answer without a thought."""
        prompt = self._render([self.USER])
        channel = before_answer.removeprefix(prompt)
        if before_answer.startswith(prompt) and THOUGHT_END.search(channel):
            return channel
        for start, end in THOUGHT_MARKS:
            if opened := re.search(rf"{start}\s*\Z", prompt):
                # <think> and its like stand on lines of their own.
                closing = opened.expand(end)
                return f"\n{closing}\n\n" if opened.groups() else closing
        return ""

    def _first_tokens(self, words: tuple[str, ...]) -> list[int]:
        """Ids of the words that are a single token at the start of a reply."""
        prompt = self.encode([self.USER], skip_thought=True)
        ids = [self.encode([self.USER, {"role": "assistant", "content": w}]) for w in words]
        return sorted({i[-1] for i in ids if i[:-1] == prompt})

    def _render(self, messages: list[dict], add_prompt=True, ignore=()) -> str:
        if self.content_in_parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        # enable_thinking is Qwen3's switch, ignored by others. Our own format is in the prompt.
        kwargs = {"tokenize": False, "add_generation_prompt": add_prompt, "enable_thinking": False}
        template = self.tokenizer.get_chat_template()
        if self.date:
            # transformers passes no function on to a template that could replace strftime_now().
            template = DATE_CALL.sub(lambda call: repr(self.date.strftime(call[2])), template)
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=template, **kwargs)
        except ignore:
            return ""

    def encode(self, messages: list[dict], skip_thought: bool = False) -> list[int]:
        """Messages -> prompt ids. Special tokens inside a content are encoded as plain text.

        skip_thought: the next token belongs to the answer, not to a thought of the model's own.
        """
        # A last assistant message is a prefill. The reply continues it.
        prefill = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if self.merge_system and messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]
        marks = {}
        if any(self.special_pattern.search(m["content"]) for m in messages):
            marks = {f"\ue000{i}\ue001": m["content"] for i, m in enumerate(messages)}
            messages = [m | {"content": mark} for m, mark in zip(messages, marks)]
        prompt = self._render(messages)
        # Joined as text: encode() may add a space per call. Some templates write <think>, too.
        if not (prefill.startswith("<") and prompt.rstrip().endswith(prefill)):
            # A prefill is part of the answer, but for one that opens a thought.
            skip_thought = skip_thought or (prefill and not THOUGHT_START.match(prefill))
            prompt += (self.skip_thought if skip_thought else "") + prefill
        ids = []
        for part in re.split("(\ue000\\d+\ue001)", prompt) if marks else [prompt]:
            ids += self.tokenizer.encode(
                marks.get(part, part), split_special_tokens=part in marks, add_special_tokens=False
            )
        return ids

    def decode(self, completion: list[int]) -> str:
        """Completion ids -> text, without special tokens other than TAGS."""
        return self.tokenizer.decode([i for i in completion if i not in self.hidden_ids])
