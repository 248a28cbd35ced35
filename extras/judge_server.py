"""judge_server.py: --judge-url, an OpenAI-compatible server as Judger and Filter.

llama.cpp, Ollama, vLLM or an API. Its key is read from SEIF_JUDGE_KEY and written nowhere.
"""

import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from urllib.request import HTTPErrorProcessor, Request, build_opener

from tqdm import tqdm

from extras.data import InputError
from prompts import THOUGHT_START, extract_answer
from rl import MIN_VERDICT_MASS

PARALLEL, MAX_WAIT = 8, 60.0
# Fields of a request. The next ones if a server rejects them, or the model starts with a thought.
# The last are for OpenAI's reasoning models.
FORMS = [{"temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 20}]
FORMS += [{"temperature": 0, "max_tokens": 2048}, {"max_completion_tokens": 2048}]
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class AnyStatus(HTTPErrorProcessor):
    """Returns every response. No redirect is followed: it could take the key to another host."""

    def http_response(self, request, response):
        """Called by urllib with each response."""
        return response

    https_response = http_response


def leading_word(text: str) -> str:
    """ "yes", "no" or "": "**No**, because" -> "no". Some servers write a space as Ġ."""
    match = re.match(r"[\W_Ġ]*(yes|no)\b", re.sub(r"<[^<>]*>", "", text), re.IGNORECASE)
    return match[1].lower() if match else ""


def p_yes(choice: dict) -> float | None:
    """P(yes) / (P(yes) + P(no)) as the first token, else 1 or 0 by the text's first word.

    NaN for neither, None for a thought without an answer.
    """
    message, logprobs = choice["message"], choice.get("logprobs") or {}
    content = (message.get("content") or "").strip()
    thought = message.get("reasoning_content") or message.get("reasoning")
    thought = thought or THOUGHT_START.match(content)
    mass = {"yes": 0.0, "no": 0.0, "": 0.0}
    for token in (logprobs.get("content") or [{}])[0].get("top_logprobs") or []:
        mass[leading_word(token["token"])] += math.exp(token["logprob"])
    known = mass["yes"] + mass["no"]
    if known > MIN_VERDICT_MASS and not thought:
        return mass["yes"] / known
    missing = None if thought else math.nan
    return {"yes": 1.0, "no": 0.0, "": missing}[leading_word(extract_answer(content, think=False))]


class JudgeServer:
    """Asks `model` at `url` for verdicts. InputError if the URL is malformed.

    timeout: seconds without a byte from the server, then the attempt counts as failed. backoff:
    seconds between the first two attempts, doubled each time.
    """

    def __init__(self, url: str, model: str, timeout=120.0, attempts=6, backoff=2.0):
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?(/[\w.~/-]*)?", url, re.ASCII):
            raise InputError("--judge-url: must be like http://localhost:8080/v1; no ? or password")
        self.url, self.model = url.rstrip("/"), model
        self.timeout, self.attempts, self.backoff = timeout, attempts, backoff
        self.key = re.sub("[^!-~]", "", os.environ.get("SEIF_JUDGE_KEY", ""))
        # Some hosts refuse urllib's own User-Agent.
        self.headers = {"Content-Type": "application/json", "User-Agent": "seif"}
        self.headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.opener = build_opener(AnyStatus)
        # Index into FORMS, and whether a request got a reply.
        self.form, self.works = 0, False

    def ask(self, prompts: list[list[dict]]) -> list[float]:
        """P(yes) per list of messages, NaN for no verdict. InputError if the server fails."""
        stop, pool = threading.Event(), ThreadPoolExecutor(PARALLEL)
        try:
            futures = [pool.submit(self._ask, messages, stop) for messages in prompts]
            for future in tqdm(as_completed(futures), "judge", len(futures), leave=False):
                future.result()
            return [future.result() for future in futures]
        finally:
            # After a failure or Ctrl-C queued requests are cancelled, running ones not awaited.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, messages: list[dict], form: int) -> tuple[int, str, float]:
        """(HTTP status, body, seconds of Retry-After). Without a response (0, error, 0.0)."""
        body = json.dumps({"model": self.model, "messages": messages, **FORMS[form]}).encode()
        request = Request(f"{self.url}/chat/completions", body, self.headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                text = response.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            return 0, str(error), 0.0
        seconds = response.headers.get("Retry-After", "")
        return response.status, text, float(seconds) if seconds.isdecimal() else 0.0

    def _ask(self, messages: list[dict], stop: threading.Event) -> float:
        form, wait, reason = self.form, 0.0, ""
        fix = "start the server; the same command resumes the run"
        for attempt in range(self.attempts):
            if stop.wait(wait):
                break
            status, text, wait = self._post(messages, form)
            wait = min(max(wait, self.backoff * 2**attempt), MAX_WAIT)
            # Some servers repeat a part of a wrong key.
            reason = f"HTTP {status} {'' if status in (401, 403) else text}" if status else text
            try:
                p = p_yes(json.loads(text)["choices"][0]) if status == 200 else None
            except MALFORMED:
                continue
            if status == 200 and (form or p is not None):
                self.works = True
                return math.nan if p is None else p
            rejected = status in (400, 422) and not self.works and form + 1 < len(FORMS)
            if status == 200 or rejected:
                self.form = max(self.form, form + 1)
                return self._ask(messages, stop)
            if status < 500 and status not in (0, 408, 425, 429):
                fix = "check --judge-url, --judge-model and SEIF_JUDGE_KEY"
                break
        reason = reason.replace(self.key, "***") if self.key else reason
        reason = " ".join(reason.split())[:200]
        raise InputError(f"--judge-url {self.url}: {reason}; {fix}")
