"""Two independent caches served on two streams at once, beside the same steps one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import kvarn_triton as kvarn
from kvarn_triton import PageLayout

STEPS = 1000
"""Decode steps of each cache: with a page of 64 tokens, each sequence completes 15 of them."""
LAYOUT = PageLayout(128, 64, 4, 2)
BATCH, KV_HEADS, Q_HEADS, SINK_LEN, NUM_PAGES = 4, 2, 8, 64, 17
AHEAD = 100
"""Steps that the host is ahead: a stream that waits is given so many before it may go on, so that both have work at once."""
WAIT_CYCLES = 200_000_000


class Cache:
    """Buffers of a decode step: append, commit, attend. Lengths live on the GPU, and count up from those of `seed`."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator("cuda").manual_seed(seed)
        self.pages = torch.full(LAYOUT.pages_shape(BATCH * NUM_PAGES, KV_HEADS), 255, dtype=torch.uint8, device="cuda")
        raw_shape = (3 * BATCH, 2, KV_HEADS, LAYOUT.page_size, LAYOUT.head_dim)
        self.raw_pages = torch.zeros(raw_shape, dtype=torch.float16, device="cuda")

        def table(columns: int) -> torch.Tensor:
            return torch.randperm(BATCH * columns, generator=random, device="cuda").int().view(BATCH, columns)

        self.block_table, self.raw_table = table(NUM_PAGES), table(3)
        self.seq_lens = torch.arange(BATCH, dtype=torch.int32, device="cuda") * (7 + seed)
        self.num_quantized = torch.zeros(BATCH, dtype=torch.int32, device="cuda")
        sizes = {"q": Q_HEADS, "k": KV_HEADS, "v": KV_HEADS}
        self.inputs = {
            name: torch.randn(64, BATCH, heads, LAYOUT.head_dim, generator=random, device="cuda").half()
            for name, heads in sizes.items()
        }
        self.current = {name: x[0].clone() for name, x in self.inputs.items()}
        self.out = torch.zeros_like(self.current["q"])
        self.outs = torch.zeros(STEPS, *self.out.shape, dtype=torch.float16, device="cuda")

    def attach(self, step: int) -> None:
        """Take the inputs of a step; their factor differs from one round of them to the next."""
        for name, x in self.inputs.items():
            torch.mul(x[step % len(x)], 1 + step // len(x) / 64, out=self.current[name])

    def step(self) -> None:
        """Append a token to each sequence, complete pages, attend."""
        slots = kvarn.raw_slots(self.seq_lens[:, None], self.raw_table, sink_len=SINK_LEN, page_size=LAYOUT.page_size)
        kvarn.append_tokens(self.current["k"], self.current["v"], self.raw_pages, slots.flatten())
        self.seq_lens += 1
        tables = self.raw_table, self.block_table, self.seq_lens, self.num_quantized
        kvarn.commit_pages(self.raw_pages, self.pages, *tables, LAYOUT, sink_len=SINK_LEN)
        raw = {"raw_pages": self.raw_pages, "raw_table": self.raw_table, "num_quantized": self.num_quantized}
        kvarn.decode_attention(
            self.current["q"], self.pages, self.block_table, self.seq_lens, LAYOUT, **raw, sink_len=SINK_LEN, out=self.out
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that steps wrote."""
        names = ("pages", "raw_pages", "seq_lens", "num_quantized", "outs")
        return {name: getattr(self, name) for name in names}


def captured(cache: Cache) -> Callable[[], None]:
    """Return a replay of a step; the capture itself runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.step()
    return graph.replay


def run(caches: Sequence[Cache], graphs: bool) -> None:
    """Run all steps of some caches, each on a stream of its own, which have their steps in turns."""
    streams = [torch.cuda.Stream() for _ in caches]
    steps = [captured(cache) if graphs else cache.step for cache in caches]
    torch.cuda.synchronize()
    for i in range(STEPS):
        for cache, step, stream in zip(caches, steps, streams, strict=True):
            with torch.cuda.stream(stream):
                if i % AHEAD == 0:
                    torch.cuda._sleep(WAIT_CYCLES)
                cache.attach(i)
                step()
                cache.outs[i].copy_(cache.out)
    torch.cuda.synchronize()


def differing_streams(graphs: bool) -> list[str]:
    """Return what differs, bit for bit, between two caches served at once and the same ones served after each other."""
    Cache(0).step()  # compiles
    together, alone = [Cache(0), Cache(1)], [Cache(0), Cache(1)]
    run(together, graphs)
    for cache in alone:
        run([cache], graphs=False)
    return [
        f"{name} of cache {i}"
        for i, (one, other) in enumerate(zip(together, alone, strict=True))
        for name, x in one.state().items()
        if not torch.equal(x.view(torch.uint8), other.state()[name].view(torch.uint8))
    ]
