"""cuda.py: a step of sampling is recorded once for each size of the batch, and replayed in one
launch. The numbers are the same (tests, on the CPU and on a GPU).

A token for each sample is little work: without it a GPU waits for a step's thousand launches.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# A recording serves batches up to so many samples more, and up to so many columns.
SAMPLES, COLUMNS = 8, 64
# Rounding may change a token now and then, a wrong recording changes most.
MOST_DIFFERENT = 0.1
# From the oldest torch on which a recording that fails was seen to leave the allocator sound.
ABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


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
