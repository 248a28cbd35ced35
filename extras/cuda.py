"""cuda.py: what is to make sampling faster on a GPU. The numbers are the same (tests, on
the CPU and on a GPU).

A token for each sample is little work: a step waits for its thousand launches, and then for the
weights to be read.

    Replayed   a step is recorded once for each size of the batch, and replayed in one launch
    unpacked   4-bit weights are unpacked once a rollout instead of once a step, where they fit
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.cpu import four_bit, values

# Of a GPU's free memory, what the unpacked weights may take; the rest is for keys and values.
UNPACKED_SHARE = 0.25
# A recording serves batches up to so many samples more, and up to so many columns.
SAMPLES, COLUMNS = 8, 64
# Rounding may change a token now and then, a wrong recording changes most.
MOST_DIFFERENT = 0.1
# From the oldest torch on which a recording that fails was seen to leave the allocator sound.
ABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


@contextmanager
def unpacked(model, free: int) -> Iterator[None]:
    """4-bit layers compute with their values as 16 bits, if a share of `free` bytes holds them.

    For more than a few rows bitsandbytes unpacks at each call: read, written and read again.
    """
    layers = four_bit(model, UNPACKED_SHARE * free).values()
    try:
        for layer in layers:
            weight = values(layer, model.dtype)
            bias = None if layer.bias is None else layer.bias.to(model.dtype)
            layer.forward = partial(F.linear, weight=weight, bias=bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def record(work: Callable[[], None], pool) -> Callable[[], None]:
    """The kernels that `work` launches, as one launch (a CUDA graph)."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    finally:
        # Where recording fails torch leaves its own stream in use.
        torch.cuda.set_stream(stream)
    return graph.replay


class Replayed:
    """step(n, width), recorded at its first call for each size and tried against itself there.

    The step changes the tensors of `state` in place, the first of which are the tokens that it
    picks; it reads nothing back, and leaves nothing else that a later one needs.
    """

    def __init__(self, step: Callable[[int, int], None], state: list[Tensor], record=record):
        self.step, self.state, self.record = step, state, record
        self.recorded: dict[tuple[int, int], Callable[[], None]] = {}
        # Temporary memory of all recordings: no two run at once.
        self.pool = None
        self.off = ""

    @staticmethod
    def sizes(n: int, width: int) -> tuple[int, int]:
        """Up to the sizes of a recording: 1, 2, 4, 8, 16, 24 ... samples, columns by 64."""
        samples = -(-n // SAMPLES) * SAMPLES if n > SAMPLES else 1 << (n - 1).bit_length()
        return samples, -(-width // COLUMNS) * COLUMNS

    def __call__(self, n: int, width: int) -> None:
        """One step."""
        if self.off:
            self.step(n, width)
        elif (n, width) in self.recorded:
            self.recorded[n, width]()
        else:
            self._begin(n, width)

    def _begin(self, n: int, width: int) -> None:
        """The step as it is, then from the same state recorded: what differs is not used."""
        before = [t.clone() for t in self.state]
        self.step(n, width)
        after = [t.clone() for t in self.state]
        restore = lambda values: [t.copy_(value) for t, value in zip(self.state, values)]
        restore(before)
        try:
            if self.pool is None and self.record is record:
                self.pool = torch.cuda.graph_pool_handle()
            replay = self.record(lambda: self.step(n, width), self.pool)
            # What recording itself may have computed does not count.
            restore(before)
            replay()
            differ = (self.state[0][:n] != after[0][:n]).float().mean().item()
            self.off = f"{differ:.0%} of its tokens differ" if differ > MOST_DIFFERENT else ""
            self.recorded[n, width] = replay
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            self.off = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if self.off:
            print(f"  no CUDA graph, slower: {self.off}")
            restore(after)
