"""A server's loop around kvarn_triton: prompts in chunks, a prefix hit, decode steps, finished sequences.

    python docs/server_loop.py

Keys, values and queries are random numbers: put a model's in their place. One layer is shown; more layers have pages of their
own and share the plan of a step. It runs on a GPU, or without one on the CPU, where the same calls run the reference
implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvarn_triton import PageLayout, attend, check_step, plan_step, write_tokens


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


@dataclass(eq=False)
class Sequence:
    """What the host knows of a sequence. It counts tokens itself, so that no step reads a length back from the GPU."""

    row: int  # of the tables, as long as the sequence lives
    raw_ids: list[int]
    length: int = 0
    page_ids: list[int] = field(default_factory=list)


class Server:
    """Tables with a row for each sequence that is alive, in any order; page i of a row holds the tokens from i * page_size
    on."""

    def __init__(
        self,
        layout: PageLayout,
        num_kv_heads: int,
        max_rows: int,
        max_pages: int,
        num_pages: int,
        sink_len: int,
        device: torch.device,
    ) -> None:
        self.layout, self.sink_len, self.device = layout, sink_len, device
        self.num_sink_pages, self.num_tail_slots = sink_len // layout.page_size, 1  # more for drafts: see `plan_step`
        columns = self.num_sink_pages + self.num_tail_slots
        self.allocator, self.raw_allocator = PageAllocator(num_pages), PageAllocator(max_rows * columns)
        self.pages = layout.empty_pages(num_pages, num_kv_heads, device)  # refused with another layout
        raw_shape = (max_rows * columns, 2, num_kv_heads, layout.page_size, layout.head_dim)
        self.raw_pages = torch.empty(raw_shape, dtype=torch.float16, device=device)
        self.block_table = torch.full((max_rows, max_pages), -1, dtype=torch.int32, device=device)
        self.raw_table = torch.full((max_rows, columns), -1, dtype=torch.int32, device=device)
        self.free_rows = list(range(max_rows))
        self.running: list[Sequence] = []

    def start(self, prefix: Sequence | None = None, num_shared: int = 0) -> Sequence:
        """Start a sequence; with `prefix`, its first `num_shared` pages are the beginning of the new one.

        A sequence that begins in pages has no raw sink: its first pages are read as all others are.
        """
        num_sink_pages = 0 if prefix else self.num_sink_pages
        raw_ids = self.raw_allocator.allocate(num_sink_pages + self.num_tail_slots)
        sequence = Sequence(self.free_rows.pop(0), [-1] * (self.num_sink_pages - num_sink_pages) + raw_ids)
        if prefix:
            sequence.page_ids = self.allocator.share(prefix.page_ids[:num_shared])
            sequence.length = num_shared * self.layout.page_size
        self.raw_table[sequence.row] = torch.tensor(sequence.raw_ids)
        self.running.append(sequence)
        return sequence

    def step(self, counts: dict[Sequence, int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Take the next tokens of some sequences, as many of each as `counts` says: prompts, chunks and decodes in one step.

        q, k and v are [tokens, heads, head_dim], those of one sequence after those of another.
        """
        for sequence, count in counts.items():
            self._grow(sequence, sequence.length + count)
        ints = {"dtype": torch.int32, "device": self.device}
        lens = torch.tensor([sequence.length for sequence in counts], **ints)
        rows = torch.tensor([sequence.row for sequence in counts], **ints)
        options = {"rows": rows, "sink_len": self.sink_len, "sink_columns": True}
        ends = None  # one token for each sequence: decode attention
        if max(counts.values()) > 1:
            ends = torch.tensor([0, *counts.values()]).cumsum(0).to(**ints)
            options |= {"num_tokens": k.shape[0], "max_query_len": max(counts.values())}
        step = plan_step(self.layout, lens, ends, self.block_table, self.raw_table, **options)
        # From here on for each layer, with its own q, k, v, pages and raw pages.
        write_tokens(k, v, self.pages, self.raw_pages, step)
        out = attend(q, self.pages, self.raw_pages, step, k=k, v=v)
        check_step(self.pages, self.raw_pages, step)  # reads tables back: for development, not for a step that is served
        return out

    def _grow(self, sequence: Sequence, length: int) -> None:
        """Give a sequence the pages for `length` tokens. Ids must be there before pages complete, which the device decides."""
        sequence.length, first = length, len(sequence.page_ids)
        needed = -(-length // self.layout.page_size)
        if first < needed:
            sequence.page_ids += self.allocator.allocate(needed - first)
            self.block_table[sequence.row, :needed] = torch.tensor(sequence.page_ids, dtype=torch.int32)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence. Pages that others share stay."""
        self.allocator.release(sequence.page_ids)
        self.raw_allocator.release([page for page in sequence.raw_ids if page >= 0])
        self.running.remove(sequence)
        self.free_rows.append(sequence.row)

    def report(self, event: str) -> None:
        """Print what is in use, and what it would be with every page at 16 bits and shared the same way."""
        num_tokens = sum(sequence.length for sequence in self.running)
        num_shared = sum(users > 1 for users in self.allocator.users)
        num_pages, num_raw = self.allocator.num_used, self.raw_allocator.num_used
        raw_bytes = self.raw_pages[0].nbytes
        used, plain = num_pages * self.pages[0].nbytes + num_raw * raw_bytes, num_pages * raw_bytes
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
    """Serve three prompts, the second of which begins as the first and comes in the same step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout, num_kv_heads, num_q_heads = PageLayout.from_name("k4v4_g64", head_dim=64), 2, 8
    server = Server(layout, num_kv_heads, max_rows=4, max_pages=16, num_pages=32, sink_len=64, device=device)
    print(f"{layout.name} on {device.type}: a page of {layout.page_size} tokens takes {layout.page_bytes} bytes per kv head")
    histories: dict[Sequence, torch.Tensor] = {}  # 16-bit keys and values, kept for the comparison alone

    def step(counts: dict[Sequence, int]) -> list[float]:
        """Run a step of random tokens and return the errors of the last token of each sequence."""
        total = sum(counts.values())
        q, k, v = (torch.randn(total, heads, 64, device=device).half() for heads in (num_q_heads, num_kv_heads, num_kv_heads))
        out, errors, end = server.step(counts, q, k, v), [], 0
        for sequence, count in counts.items():
            end += count
            new = torch.stack((k[end - count : end], v[end - count : end]))
            histories[sequence] = torch.cat((histories[sequence], new), dim=1) if sequence in histories else new
            exact = exact_attention(q[end - 1], *histories[sequence])
            errors.append(((out[end - 1] - exact).norm() / exact.norm()).item())
        return errors

    first = server.start()
    step({first: 300})
    server.report("A: 300 tokens of a prompt")
    second = server.start(first, num_shared=4)
    histories[second] = histories[first][:, :256]
    step({second: 90, first: 200})
    server.report("A: 200 more, B: 4 pages of A, 90")
    third = server.start()
    step({third: 40, first: 1, second: 1})
    server.report("C: a prompt of 40, A and B decode")
    for event, count in (("40 decode steps", 40), ("A finished, 10 decode steps", 10)):
        if count == 10:
            server.finish(first)
        for _ in range(count):
            errors = step(dict.fromkeys(server.running, 1))
        server.report(event)
        # Random numbers are the worst case: attention averages them away.
        print("  relative error of attention:", ", ".join(f"{error:.3f}" for error in errors))


if __name__ == "__main__":
    main()
