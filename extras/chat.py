"""chat.py: `python seif.py chat RUN`, a conversation with the Follower."""

import argparse
import sys

import judge
from extras.eval import open_run
from prompts import messages


def main(argv: list[str], seif) -> None:
    """`chat RUN`: an empty line or Ctrl-D ends it."""
    parser = argparse.ArgumentParser("seif.py chat", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--turn", type=int, default=0, help="the Follower of; default: the last")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise messages.InputError("--max-new-tokens is at least 1, --temperature at least 0")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    cfg, policy, turn = open_run(seif, args.run, args.turn)
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
        turns = messages.follower_prompt(line, cfg.think)
        opening = [t for t in turns if t["role"] == "assistant"]
        asked = [t for t in turns if t["role"] != "assistant"]
        # The system line stands first, once; what an answer begins with, last.
        history += asked[-1:] if history else asked
        held = len(policy.chat.encode(history + opening)) + args.max_new_tokens
        if held > messages.context_of(policy.model.config):
            print("the conversation has come to the end of the model's context; begin anew")
            return
        with policy.using(None if args.base else "follower"):
            ((sample,),) = policy.sample(
                [history + opening], 1, args.max_new_tokens, args.temperature
            )
        text = sample.text.strip()
        history.append({"role": "assistant", "content": text})
        print(judge.extract_answer(text, cfg.think) or text)
