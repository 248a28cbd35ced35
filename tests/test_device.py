"""What a GPU changes: half precision, the model in every role, memory that runs out, waits.

On whatever device there is. What is counted, host waits and bytes, is counted on the pretended
GPU alone: `python -m pytest -p pretend_cuda`.
"""

import functools
import gc
import json
import sys
import types

import pytest
import tiny
import torch
from conftest import make_model, randomise
from safetensors.torch import load_file

import judge
import rl
import seif
from extras import cuda, packing
from prompts import chat, messages

GPU = getattr(sys.modules.get("pretend_cuda"), "GPU", None)
counted = pytest.mark.skipif(GPU is None, reason="counted on the pretended GPU, -p pretend_cuda")
able = GPU is None and torch.cuda.is_available() and cuda.ABLE
real = pytest.mark.skipif(not able, reason="needs a GPU, and a torch that recovers")
# By type: the capability of a card that computes in it; how far rounding may move a
# log-probability, a cumulated probability, a gradient's direction (1 - cosine) and its length.
CARDS = {"bf16": ((8, 9), 0.12, 0.03, 0.01, 0.15), "fp16": ((7, 5), 0.02, 0.005, 5e-4, 0.02)}
MODELS = [("qwen2", 4), ("gemma3", 16)]


def draws(seed: int):
    """A function that makes token ids, so many."""
    generator = torch.Generator().manual_seed(seed)
    return lambda n: torch.randint(0, 250, (n,), generator=generator).tolist()


def plain_twin(policy: rl.Policy, folder: str) -> rl.Policy:
    """The plain engine in fp32 on the CPU, with the very weights of `policy`."""
    from bitsandbytes.functional import dequantize_4bit

    twin = rl.load(folder, bits=16, device="cpu", engine="plain", dtype="fp32")
    own = dict(twin.model.named_parameters())
    for name, weight in policy.model.named_parameters():
        if hasattr(weight, "quant_state"):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        own[name].data.copy_(weight.detach().float().cpu())
    return twin


@pytest.fixture(scope="module", params=CARDS)
def card(request):
    """A new card and an old one: the name of its type, and what rounding may do."""
    capability, *limits = CARDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        if GPU:
            patch.setattr(GPU, "capability", capability)
        yield request.param, *limits


@pytest.fixture(scope="module")
def sides(card, folders):
    """(kind, bits) -> a packed policy in half precision and its exact twin, with two roles."""

    @functools.cache
    def get(kind: str, bits: int) -> tuple[rl.Policy, rl.Policy]:
        policy = rl.load(folders(kind), bits, dtype=card[0])
        both = policy, plain_twin(policy, folders(kind))
        for side in both:
            for role, seed in (("follower", 3), ("reference", 9)):
                side.add(role)
                randomise(side, role, seed)
        return both

    return get


# ------------------------------------------------------------ half precision


@pytest.mark.parametrize("kind, bits", MODELS)
def test_half_precision_scores_as_fp32_does(sides, card, kind, bits, monkeypatch):
    policy, exact = sides(kind, bits)
    assert rl.fast_dtype(cuda=True) == card[0] and policy.model.dtype == rl.DTYPES[card[0]]
    assert isinstance(policy.engine, packing.PackedEngine)
    assert {p.dtype for p in policy.tensors("follower").values()} == {torch.float32}
    ids = draws(1)
    template = ids(30)
    prompts = [template + ids(5), template + ids(9), ids(4)]
    pairs = [(prompts[i % 3], ids(3 + i)) for i in range(8)]
    asked = [[{"role": "user", "content": text}] for text in ("Is it?", "Is it so?", "Why")]
    for side in (policy, exact):
        words = [list(range(120)), list(range(120, 250))]
        monkeypatch.setattr(side.chat, "verdict_tokens", words)
    for role, budget in ((None, 4096), ("follower", 60)):
        monkeypatch.setattr(policy.engine, "token_budget", budget)
        seen = []
        for side in (policy, exact):
            samples = [rl.Sample(*pair, "", True) for pair in pairs]
            rl.score(side, role, samples, "old", 0.7)
            with side.using(role):
                verdicts = side.yes_probability(asked)
            seen.append(torch.cat([*(s.old.cpu() for s in samples), torch.tensor(verdicts)]))
        torch.testing.assert_close(*seen, rtol=0, atol=card[1])


def gradients(policy: rl.Policy, cfg) -> list[torch.Tensor]:
    """The gradient at each optimiser step of a GRPO step that changes nothing."""
    ids, rewards, prompts = draws(2), [0, 1, 0, 1, 1, 0, 0, 0.5], ([10, 20, 30, 40], [10, 20, 50])
    made = [rl.Sample(prompts[i // 4], ids(12), "", True, reward=r) for i, r in enumerate(rewards)]
    held, seen = list(policy.tensors("follower").values()), []
    step = lambda: seen.append(torch.cat([p.grad.flatten().cpu() for p in held]))
    watch = types.SimpleNamespace(step=step, zero_grad=lambda **_: None)
    metrics = rl.grpo_step(policy, "follower", "reference", [made[:4], made[4:]], watch, cfg)
    assert metrics["updates"] == len(seen) == cfg.updates and metrics["skipped"] == 0
    return seen


@pytest.mark.parametrize("kind, bits", MODELS)
def test_half_precision_has_the_gradient_of_fp32(sides, card, kind, bits, monkeypatch):
    policy, exact = sides(kind, bits)
    monkeypatch.setattr(rl, "MAX_GRAD_NORM", 1e9)
    monkeypatch.setattr(policy.engine, "token_budget", 40)
    for updates, kl, recompute in ((1, 0.0, False), (2, 0.05, True)):
        monkeypatch.setattr(policy.engine, "recompute_all", recompute)
        cfg = types.SimpleNamespace(temperature=0.7, updates=updates, kl=kl)
        for ours, theirs in zip(gradients(policy, cfg), gradients(exact, cfg), strict=True):
            assert 1 - torch.cosine_similarity(ours, theirs, 0) < card[3]
            assert abs(ours.norm() / theirs.norm() - 1) < card[4]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_check_at_loading_tells_a_wrong_mask_from_rounding(card, folders, kind, monkeypatch):
    """Branches of a tree that see each other."""
    sight = packing.RowSight
    monkeypatch.setattr(packing, "RowSight", lambda *args, by_runs: sight(*args, by_runs=False))
    load = lambda: rl.load(folders(kind), bits=16, dtype=card[0]).engine
    assert isinstance(load(), packing.PackedEngine)
    all_seen = lambda row: torch.ones(len(row.tokens), row.prefix + len(row.tokens)).bool()
    monkeypatch.setattr(packing.Row, "mask", lambda row: all_seen(row).tril(row.prefix).numpy())
    assert type(load()) is rl.PlainEngine


def misses(exact: rl.Policy, prompt, tokens, uniform, temperature: float) -> float:
    """How far, at most, a token is from the one that its draw picks without rounding."""
    with torch.no_grad(), exact.using("follower"):
        logits = exact.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    took = lambda values: values.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    if temperature == 0:
        return (logits.amax(-1) - took(logits)).max().item()
    odds = (logits / temperature).softmax(-1)
    high, u = took(odds.cumsum(-1)), uniform[: len(tokens)]
    return torch.maximum(u - high, high - took(odds) - u).max().item()


@pytest.mark.parametrize("shared", [0, 140])
@pytest.mark.parametrize("kind, bits", MODELS)
def test_half_precision_samples_what_the_draws_pick(sides, card, kind, bits, shared, monkeypatch):
    policy, exact = sides(kind, bits)
    ids, after, real = draws(4), [], packing.SlotSight.attend
    head = ids(shared)
    prompts = [head + ids(n) for n in (6, 11, 3)]
    uniform = 1 - torch.rand(3, 4, 16, generator=torch.Generator().manual_seed(5))

    def spy(sight, *args):
        after.extend([] if sight.shared is None else [1])
        return real(sight, *args)

    monkeypatch.setattr(packing.SlotSight, "attend", spy)
    for slots, temperature, ends in ((4, 0.8, set(range(0, 250, 16))), (64, 0.0, set())):
        monkeypatch.setattr(policy.engine, "slots", slots)
        monkeypatch.setattr(policy.engine, "eos", ends)
        with policy.using("follower"), policy.inference():
            groups = policy.engine.sample(prompts, uniform, temperature)
        limit = card[2] if temperature else 2 * card[1]
        for prompt, group, u in zip(prompts, groups, uniform):
            for tokens, own in zip((rl.cut_at_eos(t, ends) for t in group), u):
                assert misses(exact, prompt, tokens, own, temperature) < limit
    # Where no window ends within the prompt, what is shared is read in one place.
    assert bool(after) == (shared > 0 and kind == "qwen2")


@counted
@pytest.mark.parametrize("shared", [0, 140])
@pytest.mark.parametrize("kind, bits", MODELS)
def test_a_decode_step_neither_reads_from_the_device_nor_sends_to_it(sides, kind, bits, shared):
    policy, ids = sides(kind, bits)[0], draws(6)
    head = ids(shared)
    prompts = [head + ids(20) for _ in range(6)]
    with policy.using("follower"), policy.inference():
        sampler = packing.Sampler(policy.engine, prompts, torch.full((6, 2, 30), 0.5), 1.0)
        GPU.reset()
        for _ in range(sampler.look):
            sampler.step()
        assert GPU.launches and not GPU.syncs and not GPU.uploads
        sampler.retire()
        assert sum(GPU.syncs.values()) == 1 and not GPU.uploads


# ------------------------------------------------------------ the model in every role


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Flags of a run in the paper's way, the model as Filter and Judger; sizes are tiny."""
    monkeypatch.setattr(judge, "parse_constraints", tiny.parse)
    monkeypatch.setattr(judge, "recognise", functools.cache(judge.recognise))
    # A random model never writes the think format; a byte is a token here, so no word is one.
    monkeypatch.setattr(judge, "extract_answer", lambda text, think: text.strip())
    monkeypatch.setattr(chat, "YES", ("y", "Y"))
    monkeypatch.setattr(chat, "NO", ("n", "N"))
    monkeypatch.setattr(judge, "TRUSTED_AUC", -1.0)
    monkeypatch.setattr(seif, "QUALIFYING", 8)
    monkeypatch.setattr(tiny, "BANK", [*tiny.BANK[:4], "Be kind.", "Name a river."])
    make_model(tmp_path / "model", **tiny.MODEL)
    tiny.write_inputs(tmp_path)
    names = "filter updates hard_share kl temperature min_words".split()
    usual = {name: seif.ROWS[name].metadata["paper"] for name in names}
    usual |= dict(bits=4, judge="hybrid", shots=2, batch=4, max_new_tokens=16)
    end = ["--think", "--trust-judger"]
    return lambda out, **more: [*tiny.flags(tmp_path, out, **usual | more)[:-1], *end]


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_turns_in_the_papers_way_then_eval_and_chat(job, tmp_path, monkeypatch, capsys):
    assert seif.main(job("run", follower_steps="2,1")) == 0
    run, how = tmp_path / "run", json.loads((tmp_path / "run/config.json").read_text())
    assert (how["bits"], how["updates"], how["think"], how["trust_judger"]) == (4, 4, True, True)
    assert (how["filter"], how["judge"], how["hard_share"]) == ("llm", "hybrid", 0.5)
    rows = rows_of(run / "log.jsonl")
    assert [r["turn"] for r in rows if r["stage"] == "evaluation"] == [1, 2]
    trained = [r for r in rows if r.get("updates")]
    assert {r["stage"] for r in trained} == {"instructor", "follower"}
    assert max(r["updates"] for r in trained) > 1 and not any(r["skipped"] for r in trained)
    assert "rejected by the model" in {reason for r in rows for reason in r.get("rejected", {})}
    made = [messages.read_questions(run / f"turn{turn}/questions.jsonl") for turn in (1, 2)]
    assert "soft" in {q.kind for questions in made for q in questions}
    text = (run / "samples.md").read_text()
    assert "(judger)" in text and "(rule)" in text
    assert seif.main(["eval", str(run), "--paired"]) == 0
    lines = iter(["Say hi.", "And again.", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert seif.main(["chat", str(run), "--max-new-tokens", "5"]) == 0
    said = capsys.readouterr().out
    assert "p = " in said and "Follower of turn 2; an empty line" in said


# ------------------------------------------------------------ memory

ENGINE, FORWARD = packing.PackedEngine, (packing.PackedEngine, "_forward")
# Where a phase is entered, and its pieces.
PHASES = {
    "sampling": ((ENGINE, "sample"), (packing.Sampler, "step")),
    "judging": ((ENGINE, "next_probabilities"), FORWARD),
    "reference": ((rl, "score"), FORWARD),
    "old": ((rl, "score"), FORWARD),
    "backward": ((rl, "backward"), FORWARD),
    "optimiser": ((torch.optim.AdamW, "step"), (torch.optim.AdamW, "_init_group")),
}


def starve(monkeypatch, phase: str, always: bool) -> list[str]:
    """No memory at any piece of a phase, or once, at its second; the list grows as it fails."""
    entry, place = PHASES[phase]
    enter, work, pieces, failed = getattr(*entry), getattr(*place), [], []

    def entered(*args, **how):
        # rl.score serves two phases; the field that it fills tells which.
        if entry[1] != "score" or phase in args:
            pieces[:] = [0]
        try:
            return enter(*args, **how)
        finally:
            pieces.clear()

    def piece(*args, **how):
        if pieces:
            pieces[0] += 1
            if always or (pieces[0] == 2 and not failed):
                failed.append(phase)
                raise torch.OutOfMemoryError("raised by the test")
        return work(*args, **how)

    monkeypatch.setattr(*entry, entered)
    monkeypatch.setattr(*place, piece)
    return failed


def outcome(run) -> tuple[str, dict]:
    """What a run's log says, but for the clock, and its adapters."""
    clock = ("seconds", "wall", "tokens_per_second", "memory_mib")
    rows = [{k: v for k, v in row.items() if k not in clock} for row in rows_of(run / "log.jsonl")]
    files = sorted(run.glob("turn*/*/adapter_model.safetensors"))
    return json.dumps(rows), {(f.parent, n): t for f in files for n, t in load_file(f).items()}


def test_out_of_memory_once_in_every_phase_changes_no_result(job, tmp_path, monkeypatch):
    few = dict(turns=1, instructor_steps="1", follower_steps="1", bits=16, batch=2, shots=0)
    # Small rows, so that a phase has several.
    monkeypatch.setattr(rl, "load", functools.partial(rl.load, token_budget=256))
    assert seif.main(job("whole", **few)) == 0
    # Each time the first thing to be given up; what comes next rounds otherwise: test_packing.py.
    less = lambda engine: setattr(engine, "recompute_all", True) or True
    monkeypatch.setattr(ENGINE, "use_less_memory", less)
    phases = [phase for phase in PHASES if phase != "optimiser"]
    failures = [starve(monkeypatch, phase, always=False) for phase in phases]
    assert seif.main(job("starved", **few)) == 0
    assert failures == [[phase] for phase in phases]
    (rows, whole), (again, starved) = (outcome(tmp_path / run) for run in ("whole", "starved"))
    assert '"updates": 2' in rows and len(whole) > 10
    # A true GPU's kernels may differ in the last digits.
    if GPU or not torch.cuda.is_available():
        assert rows == again
        assert all(map(torch.equal, whole.values(), starved.values()))


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_that_never_fits_ends_in_one_clear_line(tmp_path, job, phase, monkeypatch, capsys):
    failed = starve(monkeypatch, phase, always=True)
    asks = dict(judge="llm") if phase == "judging" else {}
    assert seif.main(tiny.flags(tmp_path, "run", **asks)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "seif: " in line]
    assert len(said) == 1 and "out of GPU memory (raised by the test); take a smaller" in said[0]
    assert set(failed) == {phase}


@counted
def test_each_rollout_and_each_update_has_the_memory_of_the_first(tmp_path, monkeypatch):
    """Though the allocator gives nothing back by itself, and Python's collector may come late."""
    folder = make_model(tmp_path, num_hidden_layers=4)
    policy = rl.load(folder, bits=16, dtype="fp16", token_budget=256)
    policy.add("follower")
    engine, slots, recomputed = policy.engine, [], []
    engine.eos = set()
    real, layers = packing.SlotCache.__init__, engine._layers_to_recompute
    made = lambda cache, n, *args: slots.append(n) or real(cache, n, *args)
    monkeypatch.setattr(packing.SlotCache, "__init__", made)
    chosen = lambda tokens: recomputed.append(layers(tokens)) or recomputed[-1]
    monkeypatch.setattr(engine, "_layers_to_recompute", chosen)
    optimizer = torch.optim.SGD(policy.tensors("follower").values(), lr=0.0)
    group = [([1], [(7 * i + k) % 250 for k in range(200)]) for i in range(4)]
    group = [rl.Sample(*pair, "", True, reward=float(i % 2)) for i, pair in enumerate(group)]
    cfg = types.SimpleNamespace(temperature=1.0, updates=1, kl=0.0)
    prompts, draw = [[i] * 90 for i in range(60)], torch.full((60, 1, 8), 0.5)
    gc.collect()
    torch.cuda.empty_cache()
    monkeypatch.setattr(GPU, "memory", GPU.allocated + (4 << 20))
    allowed = layers(201)
    for _ in range(2):
        before = GPU.allocated
        gc.disable()
        try:
            engine.sample(prompts, draw, 0.0)
        finally:
            gc.enable()
        assert GPU.allocated == before
        rl.grpo_step(policy, "follower", None, [group], optimizer, cfg)
    assert min(slots) > 0.9 * max(slots) and 1 < slots[0] < 60
    assert max(recomputed) <= allowed < 4


# ------------------------------------------------------------ a real GPU


@real
@pytest.mark.parametrize("kind, bits", [("llama", 4), ("qwen2", 16), ("gemma3", 16)])
def test_a_step_recorded_on_a_gpu_picks_the_same_tokens(folders, kind, bits, monkeypatch):
    monkeypatch.setattr(cuda, "COLUMNS", 16)
    policy = rl.load(folders(kind), bits, dtype="fp32")
    policy.add("follower")
    randomise(policy, "follower")
    made, real_one = [], cuda.Replayed
    monkeypatch.setattr(cuda, "Replayed", lambda *args: made.append(real_one(*args)) or made[-1])
    torch.manual_seed(0)
    ids, uniform = draws(2), 1 - torch.rand(5, 6, 40)
    prompts, seen = [ids(n) for n in (3, 30, 7, 30, 150)], []
    with policy.using("follower"):
        for record in (None, cuda.record):
            policy.engine.record = record
            with policy.inference():
                groups = policy.engine.sample(prompts, uniform, 1.0)
            seen.append([[rl.cut_at_eos(row, policy.engine.eos) for row in g] for g in groups])
    (replayed,) = made
    assert len(replayed.recorded) > 2 and not replayed.off
    assert seen[0] == seen[1] and len({tuple(row) for g in seen[0] for row in g}) > 20


@real
def test_a_step_that_a_gpu_cannot_record_goes_on_as_it_is(capsys):
    count = torch.zeros(4, dtype=torch.long, device="cuda")

    def step(n: int, width: int) -> None:
        count[:n] += 1
        # A read waits for the device, which no recording can.
        assert count.sum().item()

    replayed = cuda.Replayed(step, [count])
    for _ in range(3):
        replayed(4, 8)
    assert replayed.off and count.tolist() == [3] * 4
    assert "no CUDA graph, slower" in capsys.readouterr().out
    # Neither the allocator nor a later recording minds.
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        torch.ones(1 << 24, device="cuda").cumsum(0)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == held
    later = cuda.Replayed(lambda n, width: count[:n].add_(1), [count])
    for _ in range(3):
        later(4, 8)
    assert not later.off and count.tolist() == [6] * 4
