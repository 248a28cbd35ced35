"""--judge-url: a server on this machine answers, stalls, hangs up, fails or writes nonsense."""

import functools
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import pytest
from tiny import ONE_STEP, rows_of, run_command

import extras.run
import judge
import seif
from extras import calibration, data, judge_server
from prompts import user
from rl import Policy

KEY, STALL, HANG_UP = "sk-secret", "stall", "hang up"
fast = functools.partial(judge_server.JudgeServer, timeout=5, attempts=3, backoff=0.01)
TROUBLE = [(429, ""), (500, ""), (200, "<html>"), HANG_UP, STALL]


class Handler(BaseHTTPRequestHandler):
    log_message = Mock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        reply = self.server.reply(body)
        if reply == STALL:
            self.server.ended.wait()
        elif reply != HANG_UP:
            status, text = (200, json.dumps(reply)) if isinstance(reply, dict) else reply
            self.send_response(status)
            self.send_header("Retry-After", "60")
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(text.encode())


@pytest.fixture
def server(monkeypatch):
    """Its .reply: body -> a completion, (status, text), STALL or HANG_UP."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("SEIF_JUDGE_KEY", KEY)
    monkeypatch.setattr(judge_server, "MAX_WAIT", 0.05)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.ended = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.ended.set()
        server.shutdown()


def chat(text, top=None, **message) -> dict:
    """A completion. top: {token: probability} of its first token."""
    logprobs = [{"token": token, "logprob": math.log(p)} for token, p in (top or {}).items()]
    choice = {"message": {"content": text, **message}}
    return {"choices": [choice | {"logprobs": top and {"content": [{"top_logprobs": logprobs}]}}]}


def ask(client, texts) -> list[float]:
    return client.ask([[user(str(text))] for text in texts])


def content(body: dict) -> str:
    return body["messages"][0]["content"]


REPLIES = [
    (chat("Yes", {"Yes": 0.6, " yes": 0.1, "ĠNO": 0.2, "Yesterday": 0.1}), 7 / 9),
    (chat("Maybe", {"Maybe": 0.9, "yes": 1e-5}), math.nan), (chat(None), math.nan),
    (chat("**No**, because"), 0), (chat("<b>YES</b>"), 1), (chat("Not sure, yes"), math.nan),
    (chat("<think>\nno\n</think>\n\nYes.", {"no": 1.0}), 1),
    (chat("no", {"Yes": 0.5}, reasoning_content="Yes, or ..."), 0),
]  # fmt: skip


def test_p_yes_is_by_the_first_token_or_the_first_word(server):
    together = threading.Barrier(len(REPLIES))

    def reply(body):
        together.wait(5)
        return REPLIES[int(content(body))][0]

    server.reply = reply
    ps = ask(client := fast(server.url, "big"), range(len(REPLIES)))
    assert ps == pytest.approx([p for _, p in REPLIES], nan_ok=True) and client.ask([]) == []
    for path, key, body in server.seen:
        assert (path, key, body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "big")
        assert body["logprobs"] and body["temperature"] == 0


def test_fields_that_do_not_work_are_left_out_from_then_on(server):
    """A server without logprobs, a model that begins with a thought, OpenAI's reasoning models."""
    rejects = lambda body: (422, "no logprobs") if "logprobs" in body else chat("Yes")
    thinks = lambda body: chat("<think>\nHm" if "logprobs" in body else "<think>\n</think> no")
    openai = lambda body: (400, "max_tokens") if "max_tokens" in body else chat("no")
    for server.reply, p, requests in ((rejects, 1, 3), (thinks, 0, 3), (openai, 0, 4)):
        server.seen.clear()
        client = fast(server.url, "big")
        assert ask(client, "a") + ask(client, "b") == [p, p] and len(server.seen) == requests


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_retried_and_ends_in_one_line(server, trouble):
    replies, client = [trouble, trouble, chat("yes")], fast(server.url, "big", timeout=0.2)
    server.reply = lambda body: replies.pop(0)
    start = time.monotonic()
    assert ask(client, "a") == [1.0]
    # Retry-After counts, up to MAX_WAIT. The backoff alone is 0.03 seconds.
    assert time.monotonic() - start > (0.1 if trouble in TROUBLE[:2] else 0.03)
    server.reply = lambda body: trouble
    with pytest.raises(data.InputError, match="^--judge-url http.*; start the server; the same"):
        ask(client, range(100))
    assert len(server.seen) < 200, "queued requests are cancelled"


@pytest.mark.parametrize("status, requests", [(302, 1), (401, 1), (404, 1), (400, 3)])
def test_a_wrong_url_model_or_key_is_one_line_at_once(server, status, requests):
    server.reply = lambda body: (status, f"not\nfound: {KEY}")
    fix = "check --judge-url, --judge-model and SEIF_JUDGE_KEY"
    with pytest.raises(data.InputError, match=f"^--judge.*: HTTP {status}.*; {fix}$") as error:
        ask(fast(server.url, "big"), "a")
    assert KEY not in str(error.value) and len(server.seen) == requests


def verdict(body: dict) -> dict:
    p = (len(content(body)) % 9 + 0.5) / 9
    return chat("", {"yes": p, "no": 1 - p})


def test_a_run_judged_by_a_server_outlives_it(setup, server, tmp_path, monkeypatch, capsys):
    """The server dies in the first step, and comes back at another address."""
    monkeypatch.setattr(extras.run, "JudgeServer", fast)
    monkeypatch.setattr(calibration, "MIN_AUC", -1.0)
    monkeypatch.setattr(Policy, "yes_probability", None)
    soft = [f"Write like a {name}." for name in ("poet", "child", "king", "cook", "sailor")]
    monkeypatch.setattr(judge, "parse_proposal", lambda text, count: (soft[:count], ""))
    more = {**ONE_STEP, "hard_fraction": 0, "filter": "llm", "judge_model": "big"}
    # It is asked once before a model is loaded.
    server.reply = lambda body: (404, "no model")
    assert "404 no model" in run_command(capsys, setup("run", **more, judge_url=server.url))
    assert not (tmp_path / "run").exists()
    server.reply = lambda body: HANG_UP if "check: Write" in content(body) else verdict(body)
    text = run_command(capsys, setup("run", **more, judge_url=server.url))
    assert text.endswith("; start the server; the same command resumes the run")
    [row] = rows_of(tmp_path / "run/log.jsonl")
    assert row["judger"]["cases"] >= 20 <= row["filter"]["cases"]
    server.reply = verdict
    moved = server.url.replace("127.0.0.1", "localhost")
    assert seif.main(setup("run", **more, judge_url=moved)) == 0
    assert "(judger)" in (tmp_path / "run/samples.md").read_text()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in file for file in files)
    assert KEY not in "".join([text, *capsys.readouterr()])
    # The prompts of a server's Judger need not fit the local model.
    seif.open_run(seif.read_config(setup("long", **more, judge_url=moved, max_new_tokens=1500)))
