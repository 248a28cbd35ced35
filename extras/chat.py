"""chat.py: `python seif.py chat RUN`, a conversation with the Follower or the base model."""

import argparse
import sys

from extras.data import InputError
from prompts import assistant, extract_answer, follower_messages


def main(argv: list[str], open_run) -> None:
    """Talk to the Follower. An empty line or Ctrl-D ends the conversation."""
    parser = argparse.ArgumentParser("seif.py chat", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--turn", type=int, default=0, help="the Follower's turn; 0: the last")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="limit of an answer")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise InputError("--max-new-tokens must be at least 1, --temperature at least 0")
    for stream in (sys.stdin, sys.stdout):
        # A terminal may lack a character of an answer, or send bytes that are not its encoding.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    cfg, policy, turn = open_run(args.run, args.turn)
    name = "base model" if args.base else f"Follower of turn {turn}"
    print(f"{name}; an empty line ends the conversation")
    history = []
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        new = follower_messages(line, cfg.think)
        prefill = [new.pop()] if new[-1]["role"] == "assistant" else []
        # The system message comes once, before the first question.
        history += new[-1:] if history else new
        prompt = history + prefill
        if len(policy.chat.encode(prompt)) + args.max_new_tokens > policy.context_length:
            print("the conversation fills the model's context; start a new one")
            return
        with policy.using(None if args.base else "follower"):
            [[sample]] = policy.sample([prompt], 1, args.max_new_tokens, args.temperature)
        history.append(assistant(sample.text.strip()))
        print(extract_answer(sample.text, cfg.think) or sample.text.strip())
