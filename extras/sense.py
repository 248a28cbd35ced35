"""sense.py: is an answer still about its question? And a gate for those that are not.

Rewards that check constraints alone can be had by answers that say nothing ("That is my answer.").
Pointwise mutual information tells, log p(answer | its seed) - log p(answer | another row's seed)
under the base model, and no judge is needed. Given the seed alone, or copying a constraint would
count as sense. After IFDecorator's intent check (arXiv 2508.04632), which asks a model.
"""

import numpy as np
from tqdm import tqdm

import judge
import rl
from prompts import messages

# Answers of the frozen Follower's that a turn's threshold is taken from, at most.
OWN_ANSWERS = 64


def mean_logprobs(policy, prompts: list[str], texts: list[str]) -> list[float]:
    """The base model's mean log p of a text's tokens as the answer to a prompt."""
    samples = []
    for prompt, text in zip(prompts, texts):
        asked = [{"role": "user", "content": prompt}]
        start = policy.chat.encode(asked)
        whole = policy.chat.encode([*asked, {"role": "assistant", "content": text}])
        # Short of its last token where that one has merged with the answer's first.
        at = next((i for i, (a, b) in enumerate(zip(start, whole)) if a != b), len(start))
        samples.append(rl.Sample(whole[:at], whole[at:], text, ended=True))
    policy.with_memory(lambda: rl.score(policy, None, samples, "reference", 1.0))
    return [s.reference.mean().item() for s in samples]


def information(policy, seeds: list[str], texts: list[str]) -> list[float]:
    """Pointwise mutual information per token of answers with their seeds, in nats.

    The other seed of each is the next one that differs.
    """
    others = [
        next((s for s in [*seeds[i + 1 :], *seeds[:i]] if s != seed), "")
        for i, seed in enumerate(seeds)
    ]
    own, other = (mean_logprobs(policy, given, texts) for given in (seeds, others))
    return [a - b for a, b in zip(own, other)]


def least_intent(run, turn: int) -> float:
    """The information that all but a share of the frozen Follower's answers to q_T exceed.

    Greedy ones, so that a resumed run finds the same value.
    """
    cfg, questions = run.cfg, run.questions(turn)[:OWN_ANSWERS]
    prompts = [messages.follower_prompt(q.instruction, cfg.think) for q in questions]
    with run.policy.using("frozen_follower"):
        groups = run.policy.sample(prompts, 1, cfg.max_new_tokens, 0.0)
    texts = [judge.extract_answer(s.text, cfg.think) or s.text for (s,) in groups]
    pairs = [(q.seed, text) for q, text in zip(questions, texts) if text.strip()]
    if not pairs:
        tqdm.write("intent gate: open this turn, the frozen Follower's answers are all empty")
        return -np.inf
    return float(np.quantile(information(run.policy, *map(list, zip(*pairs))), cfg.intent_gate))


def gate(run, turn: int, samples: list) -> None:
    """What is paid and less about its question than most of the frozen Follower's is paid 0."""
    if turn not in run.least:
        run.least = {turn: least_intent(run, turn)}
    paid = [s for s in samples if s.reward]
    if not paid:
        return
    seeds, texts = [s.question.seed for s in paid], [s.answer for s in paid]
    # Where all that are paid share a seed, the other one is from elsewhere in q_T.
    spare = next((q.seed for q in run.questions(turn) if q.seed != seeds[0]), "")
    about = information(run.policy, [*seeds, spare], [*texts, texts[0]])
    for sample, value in zip(paid, about):
        if value <= run.least[turn]:
            sample.reward, sample.reason = 0.0, "not about its question"
