"""A server's loop around kvarn_triton: prompts, a prefix hit, decode steps, finished sequences.

    python docs/server_loop.py

Keys, values and queries are random numbers: put a model's in their place. One layer is shown; more layers have pages of their
own and share the tables (`advance=False` for all of them but the last). It runs on a GPU, or without one on the CPU, where the
same calls run the reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvarn_triton import PageLayout, append_tokens, check_cache, commit_pages, decode_attention, raw_slots, store_pages


class PageAllocator:
    """Hands out page ids and counts the sequences that use each. The package knows ids only: who owns them is the server's."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages))
        self.users = [0] * num_pages

    def allocate(self, count: int) -> list[int]:
        """Return the ids of unused pages."""
        if count > len(self.free):
            raise MemoryError(f"{count} pages wanted, {len(self.free)} free: a server preempts a sequence here")
        return self.share([self.free.pop() for _ in range(count)])

    def share(self, ids: list[int]) -> list[int]:
        """Return the same ids for one more sequence."""
        for page in ids:
            self.users[page] += 1
        return list(ids)

    def release(self, ids: list[int]) -> None:
        """Take pages back from one sequence. Nothing is cleared: whoever gets an id next overwrites the page."""
        for page in ids:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)

    @property
    def num_used(self) -> int:
        """Pages with at least one user."""
        return len(self.users) - len(self.free)


@dataclass
class Sequence:
    """What the host knows of a sequence. It counts tokens itself, so that no step reads a length back from the GPU."""

    row: int
    length: int = 0
    page_ids: list[int] = field(default_factory=list)
    sink_ids: list[int] = field(default_factory=list)
    tail_ids: list[int] = field(default_factory=list)


class Server:
    """Tables of a fixed size for `max_rows` sequences. Rows without one are padding: length 0, position -1."""

    def __init__(
        self,
        layout: PageLayout,
        *,
        num_kv_heads: int,
        max_rows: int,
        max_pages: int,
        num_pages: int,
        sink_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout, self.sink_len, self.device = layout, sink_len, device
        self.num_sink_pages, self.num_tail_slots = -(-sink_len // layout.page_size), 1  # a step writes one token
        columns = self.num_sink_pages + self.num_tail_slots
        self.allocator, self.raw_allocator = PageAllocator(num_pages), PageAllocator(max_rows * columns)
        self.pages = layout.empty_pages(num_pages, num_kv_heads, device)  # refused with another layout
        raw_shape = (max_rows * columns, 2, num_kv_heads, layout.page_size, layout.head_dim)
        self.raw_pages = torch.empty(raw_shape, dtype=dtype, device=device)
        # Updated in place and never allocated anew: a captured graph of `step` would keep reading these very tensors.
        ints = {"dtype": torch.int32, "device": device}
        self.block_table = torch.zeros(max_rows, max_pages, **ints)
        self.raw_table = torch.zeros(max_rows, columns, **ints)
        self.seq_lens = torch.zeros(max_rows, **ints)
        self.num_quantized = torch.zeros(max_rows, **ints)
        self.active = torch.zeros(max_rows, **ints)
        self.free_rows = list(range(max_rows))
        self.running: list[Sequence] = []

    def prefill(self, k: torch.Tensor, v: torch.Tensor, prefix: Sequence | None = None, num_shared: int = 0) -> Sequence:
        """Start a sequence from the keys and values [tokens, kv heads, head_dim] of its prompt.

        With `prefix`, its sink and its first `num_shared` pages, all quantized, are the beginning of the prompt, and k and v
        are those of the tokens behind them. Sink pages are shared like all others: a sink that is full is never written again.
        """
        sequence = Sequence(self.free_rows.pop(0))
        cached = 0
        if prefix is None:
            sequence.sink_ids = self.raw_allocator.allocate(self.num_sink_pages)
        else:
            cached = self.sink_len + num_shared * self.layout.page_size
            sequence.sink_ids = self.raw_allocator.share(prefix.sink_ids)
            sequence.page_ids = self.allocator.share(prefix.page_ids[:num_shared])
        sequence.tail_ids = self.raw_allocator.allocate(self.num_tail_slots)
        self.raw_table[sequence.row] = torch.tensor(sequence.sink_ids + sequence.tail_ids)
        self._grow(sequence, cached + k.shape[0])
        self._write_prompt(sequence, k, v, cached, num_shared)
        self.seq_lens[sequence.row] = sequence.length
        self.active[sequence.row] = 1
        self.running.append(sequence)
        return sequence

    def _write_prompt(self, sequence: Sequence, k: torch.Tensor, v: torch.Tensor, cached: int, num_shared: int) -> None:
        """Quantize full pages straight from the activations, and append the rest. A real server does many prompts per call."""
        page_size, row = self.layout.page_size, sequence.row
        num_full = max(sequence.length - self.sink_len, 0) // page_size
        ids = self.block_table[row, num_shared:num_full]
        body_starts = self.sink_len + page_size * torch.arange(num_shared, num_full, device=self.device)
        store_pages(k, v, self.pages, ids, self.layout, token_starts=body_starts - cached)
        self.num_quantized[row] = num_full
        # Tokens of full pages are skipped: their slots in the ring belong to the tail.
        positions = torch.arange(cached, sequence.length, device=self.device)
        stored = (positions >= self.sink_len) & (positions < self.sink_len + num_full * page_size)
        slots = self._slots(positions.masked_fill(stored, -1)[None], self.raw_table[row : row + 1])
        append_tokens(k, v, self.raw_pages, slots)

    def _slots(self, positions: torch.Tensor, raw_table: torch.Tensor) -> torch.Tensor:
        return raw_slots(positions, raw_table, sink_len=self.sink_len, page_size=self.layout.page_size).flatten()

    def _grow(self, sequence: Sequence, length: int) -> None:
        """Give a sequence the pages for `length` tokens. Ids must be there before pages complete, which the device decides."""
        sequence.length = length
        needed = -(-max(length - self.sink_len, 0) // self.layout.page_size)
        first = len(sequence.page_ids)
        if first < needed:
            sequence.page_ids += self.allocator.allocate(needed - first)
            self.block_table[sequence.row, :needed] = torch.tensor(sequence.page_ids, dtype=torch.int32)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append one token per row, quantize the pages that it completes, and attend.

        q, k and v are [rows, heads, head_dim]. All rows take part, padding too: the launches are the same in every step.
        """
        for sequence in self.running:
            self._grow(sequence, sequence.length + 1)
        positions = torch.where(self.active > 0, self.seq_lens, -1)
        append_tokens(k, v, self.raw_pages, self._slots(positions[:, None], self.raw_table))
        self.seq_lens += self.active
        tables = self.raw_table, self.block_table, self.seq_lens, self.num_quantized
        commit_pages(self.raw_pages, self.pages, *tables, self.layout, sink_len=self.sink_len)
        return decode_attention(q, **self.cache())

    def cache(self) -> dict:
        """Return what attention reads: arguments of `decode_attention` and of `check_cache`."""
        return {
            "pages": self.pages,
            "block_table": self.block_table,
            "seq_lens": self.seq_lens,
            "layout": self.layout,
            "raw_pages": self.raw_pages,
            "raw_table": self.raw_table,
            "num_quantized": self.num_quantized,
            "sink_len": self.sink_len,
        }

    def finish(self, sequence: Sequence) -> None:
        """End a sequence. Pages that others share stay; its row becomes padding."""
        self.allocator.release(sequence.page_ids)
        self.raw_allocator.release(sequence.sink_ids + sequence.tail_ids)
        for table in (self.seq_lens, self.num_quantized, self.active):
            table[sequence.row] = 0
        self.running.remove(sequence)
        self.free_rows.append(sequence.row)

    def report(self, event: str) -> None:
        """Print what is in use, and what it would be with every page at 16 bits and shared the same way.

        `check_cache` reads the tables back: for development, not for a step that is served.
        """
        check_cache(**self.cache())
        num_tokens = sum(sequence.length for sequence in self.running)
        num_shared = sum(users > 1 for users in self.allocator.users)
        num_pages, num_raw = self.allocator.num_used, self.raw_allocator.num_used
        num_sinks = num_raw - self.num_tail_slots * len(self.running)
        raw_bytes = self.raw_pages[0].nbytes
        used, plain = num_pages * self.pages[0].nbytes + num_raw * raw_bytes, (num_pages + num_sinks) * raw_bytes
        print(
            f"{event:<34}{num_tokens:5} tokens, {num_pages:2} pages ({num_shared} shared), {num_raw} raw pages, "
            f"{used / 1024:.0f} KiB ({plain / 1024:.0f} at 16 bits)"
        )


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return float32 attention of q [query heads, head_dim] over the 16-bit k and v [tokens, kv heads, head_dim]."""
    grouped = q.float().unflatten(0, (k.shape[1], -1))
    weights = torch.softmax(torch.einsum("hgd,thd->hgt", grouped, k.float()) * q.shape[-1] ** -0.5, dim=-1)
    return torch.einsum("hgt,thd->hgd", weights, v.float()).flatten(0, 1)


def main() -> None:
    """Serve three prompts, the second of which begins as the first."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout, num_kv_heads, num_q_heads, dtype = PageLayout.from_name("k4v4_g64", head_dim=64), 2, 8, torch.float16
    sizes = {"max_rows": 4, "max_pages": 16, "num_pages": 32, "sink_len": 64}
    server = Server(layout, num_kv_heads=num_kv_heads, **sizes, dtype=dtype, device=device)
    print(f"{layout.name} on {device.type}: a page of {layout.page_size} tokens takes {layout.page_bytes} bytes per kv head")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, layout.head_dim, device=device).to(dtype)

    histories = {}  # 16-bit keys and values, kept for the comparison alone

    def prompt(num_tokens: int, prefix: Sequence | None = None, num_shared: int = 0) -> Sequence:
        tokens = draw(2, num_tokens, num_kv_heads)
        sequence = server.prefill(*tokens, prefix, num_shared)
        cached = sequence.length - num_tokens
        histories[sequence.row] = torch.cat((histories[prefix.row][:, :cached], tokens), dim=1) if prefix else tokens
        return sequence

    def decode(num_steps: int) -> None:
        """Decode, and print the errors of the last step. Random numbers are the worst case: attention averages them away."""
        for _ in range(num_steps):
            q, (k, v) = draw(4, num_q_heads), draw(2, 4, num_kv_heads)
            out = server.step(q, k, v)
            for row in (sequence.row for sequence in server.running):
                histories[row] = torch.cat((histories[row], torch.stack((k[row], v[row]))[:, None]), dim=1)
        server.report(f"{num_steps} decode steps")
        rows = [sequence.row for sequence in server.running]
        exact = torch.stack([exact_attention(q[row], *histories[row]) for row in rows])
        errors = (out[rows] - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
        print("  relative error of attention:", ", ".join(f"{error:.3f}" for error in errors.tolist()))

    first = prompt(500)
    server.report("A: a prompt of 500")
    prompt(90, first, num_shared=5)
    server.report("B: sink and 5 pages of A, 90 more")
    prompt(40)
    server.report("C: a prompt of 40")
    decode(40)
    server.finish(first)
    server.report("A finished, B keeps its prefix")
    decode(10)


if __name__ == "__main__":
    main()
