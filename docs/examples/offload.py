"""Finished pages leave the GPU and come back: to pinned host memory on a stream of its own, and to a file with a header.

A page is plain bytes, and nothing writes to a finished one, so it can be copied while kernels read it.
"""

import contextlib
import tempfile
from pathlib import Path

import torch

from kvarn_triton import PageLayout, decode_attention, page_header, read_page_header, store_pages


class Offloader:
    """Copies of pages beside what the GPU computes; plain copies on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None

    @contextlib.contextmanager
    def beside(self):
        """Work on the side stream, behind what the current one has been given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def host_memory(self, pages: torch.Tensor, count: int) -> torch.Tensor:
        """Return host memory for so many pages."""
        return torch.empty(count, *pages.shape[1:], dtype=torch.uint8, pin_memory=self.on_gpu)

    def save(self, pages: torch.Tensor, ids: torch.Tensor, host: torch.Tensor) -> None:
        """Copy pages to host memory. Their ids may be given away once `wait` has been called."""
        with self.beside():
            host.copy_(pages.index_select(0, ids), non_blocking=True)

    def load(self, host: torch.Tensor, pages: torch.Tensor, ids: torch.Tensor) -> None:
        """Copy host memory to pages. They may be read by what is launched after `wait`."""
        with self.beside():
            pages.index_copy_(0, ids, host.to(pages.device, non_blocking=True))

    def wait(self) -> None:
        """Have the current stream wait for all copies; the host doesn't."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


def write_file(path: Path, layout: PageLayout, host: torch.Tensor) -> None:
    """Write a header and pages in host memory to a file."""
    with path.open("wb") as file:
        file.write(page_header(layout, host.shape[1], len(host)))
        file.write(memoryview(host.flatten().numpy()))


def read_file(path: Path) -> tuple[PageLayout, torch.Tensor]:
    """Return the layout and the pages of a file, or raise a ValueError that says why they can't be read."""
    data = bytearray(path.read_bytes())
    header = read_page_header(data)
    shape = header.layout.pages_shape(header.num_pages, header.num_kv_heads)
    if len(data) != 128 + header.num_bytes:
        raise ValueError(f"{path.name}: expected {128 + header.num_bytes} bytes, got {len(data)}")
    return header.layout, torch.frombuffer(data, dtype=torch.uint8, offset=128).view(shape)


def main(device: torch.device) -> None:
    """Swap a sequence out, use its pages for something else, and swap it in again, elsewhere."""
    layout, num_kv_heads = PageLayout.from_name("k4v2_g64", head_dim=64), 2
    k, v = torch.randn(2, 6 * 64, num_kv_heads, 64, dtype=torch.float16, device=device)
    pages = layout.empty_pages(16, num_kv_heads, device)
    ids = torch.tensor([3, 0, 7, 9, 1, 4], device=device)
    store_pages(k, v, pages, ids, layout)
    q = torch.randn(1, 8, 64, dtype=torch.float16, device=device)
    lens = torch.tensor([6 * 64], dtype=torch.int32, device=device)
    before = decode_attention(q, pages, ids.int()[None], lens, layout)

    offloader = Offloader(device)
    host = offloader.host_memory(pages, len(ids))
    offloader.save(pages, ids, host)
    offloader.wait()
    store_pages(v, k, pages, ids, layout)  # they are another sequence's by now
    with tempfile.TemporaryDirectory() as folder:
        if offloader.stream is not None:
            offloader.stream.synchronize()  # a file is written by the host
        path = Path(folder) / "pages"
        write_file(path, layout, host)
        print(f"a file of {path.stat().st_size:,} bytes for {len(k)} tokens of {num_kv_heads} heads")
        read_layout, read = read_file(path)
    for name, memory in (("host memory", host), ("a file", read)):
        ids = torch.tensor([2, 5, 6, 8, 10, 11] if memory is host else [15, 14, 13, 12, 2, 5], device=device)
        offloader.load(memory, pages, ids)
        offloader.wait()
        after = decode_attention(q, pages, ids.int()[None], lens, read_layout)
        print(f"{name}: attention has {'the same' if torch.equal(before, after) else 'OTHER'} bits")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
