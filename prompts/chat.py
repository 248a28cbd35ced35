"""chat.py: messages <-> token ids, by the tokenizer's own chat template, whatever its habits.

Templates raise on a system line or drop it, want their contents in parts, open the thought
themselves, tell today's date, end a turn with a token that no config names.
"""

import re
from datetime import date

from jinja2 import TemplateError

# What a verdict may begin with.
YES, NO = ("yes", "Yes", "YES", " yes", " Yes"), ("no", "No", "NO", " no", " No")


class Chat:
    """Messages to prompt ids and completions to text, by the tokenizer's own chat template."""

    # Special tokens of some tokenizers that belong to an answer's form.
    TAGS = ("<think>", "</think>", "<answer>", "</answer>")
    # Private-use characters, which no real text has, show where a content went.
    SYSTEM, USER, DONE = (
        {"role": role, "content": f"\ue000{role}\ue001"} for role in ("system", "user", "assistant")
    )

    def __init__(self, tokenizer, eos: set[int]):
        self.tokenizer = tokenizer
        # What a template that asks for the date is told; None: today.
        self.today: date | None = None
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special = re.compile("|".join(map(re.escape, special.values())) or r"(?!)")
        self.hidden = {i for i, text in special.items() if text not in self.TAGS}
        # Templates raise, or lose text, unless they are given messages as they want them.
        self.parts = False
        self.parts = not self._keeps(self.USER)
        if self.parts and not self._keeps(self.USER):
            raise ValueError("its chat template loses the user's text")
        self.merge_system = not self._keeps(self.SYSTEM, self.USER)
        # What the template writes after an assistant's turn ends one, if it is a special token.
        ended = self._try([self.USER, self.DONE], add_generation_prompt=False)
        tail = ended.rpartition(self.DONE["content"])[2].strip()
        self.eos = eos | (set(tokenizer.encode(tail, add_special_tokens=False)[:1]) & self.hidden)
        self.verdict_tokens = [self._first_tokens(words) for words in (YES, NO)]

    def _try(self, messages: list[dict], **how) -> str:
        try:
            return self.render(messages, **how)
        except (TemplateError, TypeError, ValueError, KeyError):
            return ""

    def _keeps(self, *messages: dict) -> bool:
        text = self._try(list(messages))
        return all(text.count(m["content"]) == 1 for m in messages)

    def _first_tokens(self, words: tuple[str, ...]) -> list[int]:
        """The tokens of those words that are one token where an answer begins."""
        prompt = self.encode([self.USER])
        ids = [self.encode([self.USER, {"role": "assistant", "content": w}]) for w in words]
        return sorted({i[-1] for i in ids if i[:-1] == prompt})

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The prompt as text."""
        if self.parts:
            part = lambda text: [{"type": "text", "text": text}]
            messages = [m | {"content": part(m["content"])} for m in messages]
        # enable_thinking: Qwen3's switch, ignored elsewhere; our own format is in the prompt.
        how = dict(add_generation_prompt=add_generation_prompt, enable_thinking=False)
        if self.today:
            how["strftime_now"] = self.today.strftime
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **how)

    def encode(self, messages: list[dict]) -> list[int]:
        """Messages -> prompt ids. A last message of the assistant's is its answer's beginning.

        Special tokens inside a content reach the model as plain text, never as control tokens.
        """
        opening, plain = "", dict(add_special_tokens=False)
        if messages[-1]["role"] == "assistant":
            messages, opening = messages[:-1], messages[-1]["content"]
        if self.merge_system and messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]
        if not any(self.special.search(m["content"]) for m in messages):
            # Prompt and opening as one string: some tokenizers put a space before a lone piece.
            return self.tokenizer.encode(self._open(self.render(messages), opening), **plain)
        marks = {f"\ue000{i}\ue001": m["content"] for i, m in enumerate(messages)}
        text = self.render([m | {"content": mark} for m, mark in zip(messages, marks)])
        text = self._open(text, opening)
        ids = []
        for part in re.split("(\ue000\\d+\ue001)", text):
            given = part in marks
            content = marks[part] if given else part
            ids += self.tokenizer.encode(content, split_special_tokens=given, **plain)
        return ids

    @staticmethod
    def _open(prompt: str, opening: str) -> str:
        # Some templates open the thought themselves: <think> is then there already.
        given = prompt.rstrip().endswith(opening) and opening.startswith("<")
        return prompt if given else prompt + opening

    def decode(self, completion: list[int]) -> str:
        """Completion ids -> text, without special tokens other than an answer's tags."""
        return self.tokenizer.decode([i for i in completion if i not in self.hidden])
