"""Raw tokens and page completion: append_tokens, raw_slots and commit_pages give the bits and the counts of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPES, assert_rounded_alike, assert_same_bits, draw, strided, uneven

from kvarn_triton import (
    PUBLISHED,
    PageLayout,
    append_tokens,
    commit_pages,
    decode_attention,
    raw_slots,
    reference,
    store_pages,
)

LAYOUT = PageLayout(64, 64, 3, 2)


@pytest.mark.parametrize(("dtype", "raw_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_append_tokens(dtype, raw_dtype, device):
    """Every pair of dtypes; skipped tokens, shuffled slots, views of everything; other slots keep their bits."""
    page_size, head_dim = (64, 80) if dtype == torch.float16 else (128, 192)
    k, v = (draw(9, 2, head_dim, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    k = strided(k)
    memory = torch.full((6, 3, 2, page_size, head_dim), float("nan"), dtype=raw_dtype, device=device)
    raw_pages = memory[1:, :2]
    expected = raw_pages.clone()
    slots = torch.tensor([5, -1, 4 * page_size - 1, 2 * page_size, 0, -7, page_size, 7, 8], device=device)
    index_dtype = torch.int32 if raw_dtype == torch.float16 else torch.int64
    slots = torch.stack((slots, slots), dim=1).to(index_dtype)[:, 0]  # a column of a matrix: not contiguous
    append_tokens(k, v, raw_pages, slots)
    reference.append_tokens(k, v, expected, slots)
    assert_rounded_alike(raw_pages.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(raw_pages.isnan(), expected.isnan())
    assert memory[:, 2].isnan().all() and memory[0].isnan().all()


def test_append_saturates(device):
    """Rotated numbers beyond float16 are stored as its largest, not as infinity (KF 5)."""
    k = torch.full((1, 1, 64), 6e4, dtype=torch.bfloat16, device=device)  # rotated: 8 times as large in channel 0
    raw_pages, expected = (torch.zeros(1, 2, 1, 64, 64, dtype=torch.float16, device=device) for _ in range(2))
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    append_tokens(k, -k, raw_pages, slots)
    reference.append_tokens(k, -k, expected, slots)
    assert_same_bits(raw_pages, expected)
    assert raw_pages[0, :, 0, 0, 0].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("head_dim", [64, 96, 112, 128, 256, 512])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_append_sizes(head_dim, num_tokens, device):
    """Other head_dims, and no tokens, one, or more than one program takes (KF 7, KF 9)."""
    k, v = (draw(num_tokens, 1, head_dim, seed=seed, device=device) for seed in (0, 1))
    raw_pages = torch.full((2, 2, 1, 64, head_dim), float("nan"), device=device)
    expected = raw_pages.clone()
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:num_tokens].to(device)
    append_tokens(k, v, raw_pages, slots)
    reference.append_tokens(k, v, expected, slots)
    assert_same_bits(raw_pages, expected)


@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (64, 80), (112, 64), (96, 512)])
def test_append_of_different_head_dims(head_dim, v_head_dim, num_tokens, device):
    """Each of keys and values is what `hadamard` makes of it, in the first channels; those after them keep their bits."""
    k, v = (draw(num_tokens, 2, dim, seed=dim, device=device) for dim in (head_dim, v_head_dim))
    raw_pages = torch.full((1, 2, 2, 64, max(head_dim, v_head_dim)), float("nan"), device=device)
    expected = raw_pages.clone()
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:num_tokens].to(device)
    append_tokens(k, v, raw_pages, slots)
    for half, x in ((0, k), (1, v)):
        expected[0, half, :, slots, : x.shape[2]] = reference.hadamard(x).transpose(0, 1)
    assert_same_bits(raw_pages, expected)
    by_reference = torch.full_like(raw_pages, float("nan"))
    reference.append_tokens(k, v, by_reference, slots)
    assert_same_bits(by_reference, expected)


@pytest.mark.parametrize("sink_len", [0, 16, 64, 100])
@pytest.mark.parametrize("num_tail_slots", [1, 3])
def test_raw_slots(sink_len, num_tail_slots, device):
    """Slots of sink and body tokens, counted by a loop; padding positions are skipped."""
    page_size, num_sink_pages = 64, -(-sink_len // 64)
    table = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int()
    table = table[: 2 * (num_sink_pages + num_tail_slots)].view(2, -1)
    positions = torch.tensor([[0, 15, 16, 63, 64, 65, 127, 128, -1], [99, 100, 163, 164, 228, 300, 1000, -5, 192]])
    expected = torch.empty(positions.shape, dtype=torch.int64)
    for (row, column), position in zip(itertools.product(range(2), range(9)), positions.flatten().tolist(), strict=True):
        if position < 0:
            slot = -1
        elif position < sink_len:
            slot = int(table[row, position // page_size]) * page_size + position % page_size
        else:
            body, offset = divmod(position - sink_len, page_size)
            slot = int(table[row, num_sink_pages + body % num_tail_slots]) * page_size + offset
        expected[row, column] = slot
    for dtype in (torch.int32, torch.int64):
        slots = raw_slots(positions.to(dtype).to(device), table.to(device), sink_len=sink_len, page_size=page_size)
        assert_same_bits(slots.cpu(), expected)


class Commit:
    """Arguments of `commit_pages` for random raw pages, and the twin that the reference works on."""

    def __init__(
        self, device, lens, quantized, *, sink_len=0, num_tail_slots=2, max_pages=4, layout=LAYOUT, dtype=torch.float16
    ):
        random = torch.Generator().manual_seed(len(lens))
        batch, columns = len(lens), -(-sink_len // layout.page_size) + num_tail_slots
        raw = uneven(batch * columns + 1, 2, 1, layout.page_size, layout.raw_head_dim).to(dtype)
        raw[:, 0, ..., layout.head_dim :] = float("nan")
        raw[:, 1, ..., layout.v_head_dim :] = float("nan")
        memory = torch.stack((raw, torch.full_like(raw, float("nan"))), dim=2).to(device)
        self.raw_pages = memory[:, :, 0]  # strided
        self.raw_table = torch.randperm(batch * columns + 1, generator=random)[:-1].view(batch, columns).int().to(device)
        table = torch.randperm(batch * max_pages + 2, generator=random)[: batch * max_pages].view(batch, max_pages)
        self.block_table = table.int().to(device)
        self.pages = torch.full(layout.pages_shape(batch * max_pages + 2, 1), 255, dtype=torch.uint8, device=device)
        self.lens = torch.tensor(lens, dtype=torch.int32, device=device)
        self.quantized = torch.tensor(quantized, dtype=torch.int32, device=device)
        self.layout = layout
        self.options = {"sink_len": sink_len}
        self.expected = self.pages.clone(), self.quantized.clone()

    def call(self, function, pages, quantized, **options):
        """Call kernel or reference."""
        tables = self.raw_table, self.block_table, self.lens
        function(self.raw_pages, pages, *tables, quantized, self.layout, **self.options, **options)

    def check(self, **options):
        """Call both and compare everything they wrote."""
        self.call(commit_pages, self.pages, self.quantized, **options)
        self.call(reference.commit_pages, *self.expected, **options)
        assert_same_bits(self.pages, self.expected[0])
        assert_same_bits(self.quantized, self.expected[1])


@pytest.mark.parametrize("sink_len", [0, 16, 64, 128])
def test_commit_pages(sink_len, device):
    """Rows with nothing due, a page just finished, one token short, shorter than the sink; a second call changes nothing."""
    lens = [sink_len + 64, sink_len + 63, max(sink_len - 1, 0), sink_len + 150, 0]
    case = Commit(device, lens, [0, 0, 0, 1, 0], sink_len=sink_len)
    case.check()
    assert case.quantized.tolist() == [1, 0, 0, 2, 0]
    before = case.pages.clone()
    case.check()
    assert_same_bits(case.pages, before)
    assert case.quantized.tolist() == [1, 0, 0, 2, 0]


@pytest.mark.parametrize(
    "index_case",
    [
        (64, 64, 4, 2),
        (80, 64, 8, 3),
        (192, 64, 2, 8),
        (96, 128, 3, 4),
        (192, 64, 4, 2, 128),
        (64, 64, 3, 8, 80),
        (64, 64, 2, 4, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_commit_layouts(index_case, dtype, device):
    """Other layouts and dtypes; the pages are those that store_pages makes of the same rotated tokens."""
    layout = PageLayout(*index_case)
    case = Commit(device, [layout.page_size], [0], layout=layout, dtype=dtype)
    case.check()
    page = case.pages[case.block_table[0, 0].long()]
    raw = case.raw_pages[case.raw_table[0, 0].long()].float()
    rotated = raw[0, ..., : layout.head_dim], raw[1, ..., : layout.v_head_dim]
    assert_same_bits(page, reference.cache.encode_records(*rotated, layout))


def test_all_rows_complete_at_once(device):
    """Every sequence of the batch crosses a page boundary in the same step (KF 15)."""
    case = Commit(device, [128] * 5, [1] * 5)
    case.check()
    assert case.quantized.tolist() == [2] * 5


def test_commit_several_pages(device):
    """max_new_pages bounds what one call does; keep_pages stay raw; max_pages bounds what a sequence has."""
    case = Commit(device, [64 * 5, 64 * 3 + 10, 64], [0, 1, 0], num_tail_slots=5, max_pages=4)
    case.check(max_new_pages=2, keep_pages=1)
    assert case.quantized.tolist() == [2, 2, 0]
    case.check(max_new_pages=3)
    assert case.quantized.tolist() == [4, 3, 1]
    case.check(max_new_pages=3, encoder=PUBLISHED)
    assert case.quantized.tolist() == [4, 3, 1]


def test_commit_with_csr_tables(device):
    """The same pages from ids in CSR form; a sequence gets no more pages than it has ids, and one without ids gets none."""
    case = Commit(device, [64 * 3, 64 * 3, 64, 64 * 2 + 5], [0, 1, 0, 1], num_tail_slots=3)
    counts = [2, 3, 0, 4]
    ids = [row[:count] for row, count in zip(case.block_table, counts, strict=True)]
    indptr = torch.tensor([1, 3, 6, 6, 10], dtype=torch.int32, device=device)
    indices = torch.cat((case.block_table.new_full((1,), -(10**6)), *ids))
    case.block_table = None
    case.check(max_new_pages=3, kv_indptr=indptr, kv_indices=indices)
    assert case.quantized.tolist() == [2, 3, 0, 2]
    assert int((case.pages != 255).any(dim=-1).sum()) == 5


def test_commit_for_layers_that_share_tables(device):
    """advance=False quantizes and leaves the counts, for all layers of a step but the last; then every layer is the same."""
    first, last = Commit(device, [128, 64, 63], [1, 0, 0]), Commit(device, [128, 64, 63], [1, 0, 0])
    first.check(advance=False)
    assert first.quantized.tolist() == [1, 0, 0]
    last.check()
    assert last.quantized.tolist() == [2, 1, 0]
    assert_same_bits(first.pages, last.pages)


def test_commit_without_a_page(device):
    """A due page whose id is below 0 is neither written nor counted: nobody could read it."""
    case = Commit(device, [64, 64], [0, 0])
    case.block_table[1, 0] = -1
    case.check()
    assert case.quantized.tolist() == [1, 0]
    assert int((case.pages != 255).any(dim=-1).sum()) == 1


def test_commit_never_goes_back(device):
    """A shorter length, or a longer tail to keep, doesn't take back pages that are quantized."""
    case = Commit(device, [64, 10, 128], [1, 2, 1], num_tail_slots=3)
    before = case.pages.clone()
    case.check(keep_pages=2)
    assert case.quantized.tolist() == [1, 2, 1]
    assert_same_bits(case.pages, before)


def test_shared_page(device):
    """Two sequences with one prefix complete the same page in one step: the same bytes twice (KF 13)."""
    case = Commit(device, [64, 64], [0, 0])
    case.raw_table[1] = case.raw_table[0]
    case.block_table[1] = case.block_table[0]
    case.check()
    assert case.quantized.tolist() == [1, 1]


class Server:
    """A cache of two sequences driven the way a server drives it: append, commit, attend."""

    def __init__(self, device, layout=LAYOUT, sink_len=16, num_tail_slots=2, dtype=torch.float16):
        self.layout, self.sink_len, self.device = layout, sink_len, device
        self.block_table = torch.tensor([[4, 1, 0], [3, 5, 2]], dtype=torch.int32, device=device)
        columns = -(-sink_len // layout.page_size) + num_tail_slots
        self.raw_table = torch.randperm(2 * columns, generator=torch.Generator().manual_seed(1)).view(2, -1).int().to(device)
        self.pages = torch.full(layout.pages_shape(6, 1), 255, dtype=torch.uint8, device=device)
        raw_shape = (2 * columns, 2, 1, layout.page_size, layout.head_dim)
        self.raw_pages = torch.full(raw_shape, float("nan"), dtype=dtype, device=device)
        self.num_quantized = torch.zeros(2, dtype=torch.int32, device=device)

    def append(self, k, v, starts):
        """Write tokens k, v [2, n, head_dim] from positions `starts` on."""
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(k.shape[1], device=self.device)
        slots = raw_slots(positions, self.raw_table, sink_len=self.sink_len, page_size=self.layout.page_size)
        k, v = (x.flatten(0, 1)[:, None].to(self.device) for x in (k, v))
        append_tokens(k, v, self.raw_pages, slots.flatten())

    def commit(self, lens, **options):
        """Commit tokens below `lens`."""
        lens = torch.tensor(lens, dtype=torch.int32, device=self.device)
        tables = self.raw_table, self.block_table, lens, self.num_quantized
        commit_pages(self.raw_pages, self.pages, *tables, self.layout, sink_len=self.sink_len, **options)

    def attend(self, q, lens, function=decode_attention):
        """Attend with q [2, heads, head_dim] to the tokens below `lens`."""
        return function(
            q,
            self.pages,
            self.block_table,
            torch.tensor(lens, dtype=torch.int32, device=self.device),
            self.layout,
            raw_pages=self.raw_pages,
            raw_table=self.raw_table,
            num_quantized=self.num_quantized,
            sink_len=self.sink_len,
        )


def test_steps_across_a_page_boundary(device):
    """Token by token over the end of the sink and of a page: each step attends to what it just appended."""
    server = Server(device)
    k, v = draw(2, 160, 64, dtype=torch.float16), draw(2, 160, 64, seed=1, dtype=torch.float16)
    q = draw(2, 3, 64, seed=2, dtype=torch.float16, device=device)
    server.append(k[:, :14], v[:, :14], [0, 0])
    server.append(k[1:].expand(2, -1, -1)[:, 14:79], v[1:].expand(2, -1, -1)[:, 14:79], [-100, 14])
    lens = [14, 79]
    for _ in range(4):
        for b, length in enumerate(lens):  # one row at a time; the other is padding
            row = torch.stack([k[b, length : length + 1]] * 2), torch.stack([v[b, length : length + 1]] * 2)
            server.append(*row, [length if b == other else -1 for other in range(2)])
        lens = [length + 1 for length in lens]
        server.commit(lens)
        out, exact = server.attend(q, lens), server.attend(q.double(), lens, reference.decode_attention)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3)  # float16 rounding of q, weights and out
    assert server.num_quantized.tolist() == [0, 1]


def test_rejected_drafts(device):
    """Drafts beyond the committed length, across a page boundary, are never quantized and leave no trace (KF 18)."""
    layout = PageLayout(64, 64, 4, 4)
    k, v = draw(2, 160, 64, dtype=torch.float16), draw(2, 160, 64, seed=1, dtype=torch.float16)
    plain, drafted = Server(device, layout, sink_len=0), Server(device, layout, sink_len=0)
    for server in (plain, drafted):
        server.append(k[:, :62], v[:, :62], [0, 0])
    drafted.append(torch.full((2, 5, 64), 99.0).half(), torch.full((2, 5, 64), -99.0).half(), [62, 62])
    drafted.commit([62, 63])
    assert drafted.num_quantized.tolist() == [0, 0] and (drafted.pages == 255).all()
    for server in (plain, drafted):
        server.append(k[:, 62:66], v[:, 62:66], [62, 62])
        server.commit([66, 65])
    assert drafted.num_quantized.tolist() == [1, 1]
    assert_same_bits(drafted.pages, plain.pages)
    q = draw(2, 2, 64, seed=2, dtype=torch.float16, device=device)
    assert_same_bits(drafted.attend(q, [66, 65]), plain.attend(q, [66, 65]))


def test_prefill_equals_decode(device):
    """store_pages over a prompt gives the bytes that appending in float32 and committing gives; so does resuming (KF 16)."""
    server = Server(device, sink_len=0, dtype=torch.float32)
    k, v = uneven(2, 64, 64), uneven(2, 64, 64, seed=5)
    server.append(k, v, [0, 0])
    server.commit([64, 64])
    pages = torch.full_like(server.pages, 255)
    k, v = (x.flatten(0, 1)[:, None].to(device) for x in (k, v))
    store_pages(k, v, pages, server.block_table[:, 0].contiguous(), LAYOUT)
    assert_same_bits(server.pages, pages)
