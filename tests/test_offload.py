"""Pages that leave the GPU and come back, by the recipe of `docs/examples/offload.py`, on the device of the tests."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits, draw

from kvarn_triton import PageLayout, decode_attention, store_pages

RECIPE = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "examples" / "offload.py"))
LAYOUT = PageLayout(64, 64, 4, 2)


def test_copies_beside_attention(device):
    """Pages are copied out and in while others are attended to and written; bits come back, to other places."""
    pages = LAYOUT.empty_pages(12, 2, device)
    ids = torch.tensor([3, 0, 7, 9], device=device)
    store_pages(*(draw(256, 2, 64, seed=i, dtype=torch.float16, device=device) for i in range(2)), pages, ids, LAYOUT)
    kept, q = pages[ids].clone(), draw(1, 4, 64, seed=2, dtype=torch.float16, device=device)
    call = {"q": q, "seq_lens": torch.tensor([256], dtype=torch.int32, device=device), "layout": LAYOUT}
    before = decode_attention(pages=pages, block_table=ids.int()[None], **call)
    offloader = RECIPE["Offloader"](device)
    host = offloader.host_memory(pages, 4)
    assert host.device.type == "cpu" and host.is_pinned() == (device.type == "cuda")
    for shift in (1, 2):
        offloader.save(pages, ids, host)
        decode_attention(pages=pages, block_table=ids.int()[None], **call)
        offloader.wait()
        pages[ids] = 255  # given away
        ids = (ids + shift) % 12
        offloader.load(host, pages, ids)
        offloader.wait()
        assert_same_bits(decode_attention(pages=pages, block_table=ids.int()[None], **call), before)
        assert_same_bits(pages[ids], kept)


def test_files(tmp_path):
    """A file is read by its header alone; one that is cut off, or of another version, is refused."""
    path, pages = tmp_path / "pages", torch.randint(0, 256, LAYOUT.pages_shape(3, 2), dtype=torch.uint8)
    RECIPE["write_file"](path, LAYOUT, pages)
    layout, read = RECIPE["read_file"](path)
    assert layout == LAYOUT
    assert_same_bits(read, pages)
    data = path.read_bytes()
    for wrong, message in (
        (data[:-1], f"pages: expected {len(data)} bytes, got {len(data) - 1}"),
        (data[:8] + b"\2" + data[9:], "header.format_version: expected 3, got 2"),
        (data[:100], "header: expected at least 128 bytes, got 100"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            RECIPE["read_file"](path)
