"""Memory through which GPUs exchange results: what each rank writes and waits for, for ranks in turn and as streams of one GPU.

Processes that exchange results are in `test_parallel.py`.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits

from kvarn_triton import merge_states, parallel
from kvarn_triton.attention.exchange import launch_exchange, plan_exchange
from kvarn_triton.parallel import Exchange


class Gpus:
    """The memory of several ranks on one device."""

    def __init__(self, size: int, max_rows: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.plans = [plan_exchange(rank, size, max_rows, head_dim, dtype) for rank in range(size)]
        ints = {"dtype": torch.int32, "device": device}
        self.memory = [torch.zeros(plan.num_bytes, dtype=torch.uint8, device=device) for plan in self.plans]
        self.table = torch.tensor([x.data_ptr() for x in self.memory], device=device)
        self.epochs = [torch.zeros(plan.num_blocks, **ints) for plan in self.plans]

    def words(self, rank: int) -> torch.Tensor:
        """Return the epochs that others have told a rank, [ranks, blocks]."""
        plan = self.plans[rank]
        return self.memory[rank][: 4 * plan.size * plan.num_blocks].view(torch.int32).view(plan.size, -1)

    def results(self, rank: int) -> torch.Tensor:
        """Return the bytes of what others have written to a rank, [half, bytes]."""
        plan = self.plans[rank]
        num_bytes = 2 * plan.size * plan.max_rows * plan.v_head_dim * plan.itemsize
        return self.memory[rank][plan.out_start :][:num_bytes].view(2, -1)

    def merge(self, rank: int, outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exchange as a rank does."""
        return launch_exchange((outs[rank], lses[rank]), self.memory[rank], self.table, self.epochs[rank], self.plans[rank])


def states_of(size: int, rows: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return results of ranks, of which the first has nothing of row 1, and none has anything of row 2."""
    random = torch.Generator().manual_seed(rows)
    outs, lses = torch.randn(size, rows, head_dim, generator=random), torch.randn(size, rows, generator=random)
    lses[0, 1], lses[:, 2] = -torch.inf, -torch.inf
    outs[0, 1] = torch.nan
    return outs.to(device, dtype), lses.to(device)


@pytest.mark.parametrize(
    ("size", "head_dim", "dtype"), [(2, 128, torch.float16), (3, 80, torch.bfloat16), (5, 64, torch.float32)]
)
def test_exchange(size, head_dim, dtype, device):
    """Each rank writes its result to all others and tells them, and merges what they wrote, in either half of its memory.

    Ranks that follow each other can't wait: in a first round each takes what the others would tell it for told.
    """
    gpus, last = Gpus(size, 20, head_dim, dtype, device), 2**31 - 1
    for epochs in gpus.epochs:
        epochs += last - 1
    for rows, epoch in ((20, last), (3, last + 1 - 2**32), (9, None)):  # counts run over
        states = states_of(size, rows, head_dim, dtype, device)
        blocks = slice(0, -(-rows // gpus.plans[0].block_r))
        told = [epochs[blocks] + 1 for epochs in gpus.epochs]
        for rank, epochs in enumerate(gpus.epochs):
            before = epochs.clone()
            gpus.words(rank)[:, blocks] = told[rank]
            gpus.merge(rank, *states)
            gpus.words(rank)[:, blocks] = 0
            epochs.copy_(before)
        expected = merge_states(*states)
        half = int(told[0][0]) & 1
        older = [gpus.results(rank)[1 - half].clone() for rank in range(size)]
        for rank in range(size):
            gpus.words(rank)[:, blocks] = told[rank]
            for other in set(range(size)) - {rank}:
                gpus.words(other)[rank, blocks] = 0
            found = gpus.merge(rank, *states)
            assert all((gpus.words(other)[rank, blocks] == told[rank]).all() for other in set(range(size)) - {rank})
            assert epoch is None or (gpus.epochs[rank][blocks] == epoch).all()
            for x, y in zip(found, expected, strict=True):
                assert_same_bits(x, y)
        for rank, before in enumerate(older):  # what a slower rank may still read
            assert_same_bits(gpus.results(rank)[1 - half], before)
            assert gpus.results(rank)[half].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_exchange_of_streams():
    """Ranks that run at the same time, and ahead of each other: streams of one GPU."""
    device, size = torch.device("cuda"), 3
    gpus, streams = Gpus(size, 64, 128, torch.float16, device), [torch.cuda.Stream() for _ in range(size)]
    states = [states_of(size, rows, 128, torch.float16, device) for rows in (64, 3, 40, 9, 64)]
    expected, found = [merge_states(*state) for state in states], [[] for _ in range(size)]
    for rank in range(size):  # compiles
        gpus.words(rank)[:] = 1
        gpus.merge(rank, *states[0])
        gpus.words(rank)[:] = 0
        gpus.epochs[rank].zero_()
    torch.cuda.synchronize()
    for _ in range(40):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[rank] += [gpus.merge(rank, *state) for state in states]
    torch.cuda.synchronize()
    for results in found:
        for number, result in enumerate(results):
            for x, y in zip(result, expected[number % len(states)], strict=True):
                assert_same_bits(x, y)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_q_heads": 0}, "num_q_heads: expected an integer of at least 1, got 0"),
        ({"v_head_dim": 72}, "v_head_dim: expected one of 64, 80, 96, 112, 128, 192, 256, 512, got 72"),
        ({"max_tokens": True}, "max_tokens: expected an integer of at least 1, got True"),
        ({"dtype": torch.int8}, "dtype: expected one of torch.float16, torch.bfloat16, torch.float32, got torch.int8"),
        ({"device": "cpu"}, "device: expected an NVIDIA GPU, got 'cpu'"),
    ],
)
def test_wrong_exchanges(changed, message):
    """An exchange that no GPU can have."""
    sizes = {"num_q_heads": 4, "v_head_dim": 64, "max_tokens": 8, "dtype": torch.float16, "device": "cuda"}
    with pytest.raises(ValueError, match=message):
        Exchange(**sizes | changed)
    with pytest.raises(ValueError, match="exchange: expected an Exchange, got 'dict'"):
        parallel.merge_ranks(torch.zeros(3, 64), torch.zeros(3), exchange=sizes)
