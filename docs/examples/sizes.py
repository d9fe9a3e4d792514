"""Bytes of a sequence as it is served: a sink of 128 tokens and two tail pages in 16 bits, the rest quantized.

The table is that of README: bytes per token and kv head at head_dim 128, and how many times smaller than 16 bits and than fp8.
Memory counts as a server allocates it: raw pages as a whole, quantized pages for all tokens behind the sink.
"""

from kvarn_triton import PageLayout

SINK_PAGES, TAIL_PAGES, BYTES_16, BYTES_8 = 1, 2, 512, 256


def served_bytes(layout: PageLayout, num_tokens: int) -> int:
    """Return the bytes of one sequence and kv head."""
    raw = (SINK_PAGES + TAIL_PAGES) * layout.page_size * BYTES_16
    body_pages = -(-max(num_tokens - SINK_PAGES * layout.page_size, 0) // layout.page_size)
    return raw + body_pages * layout.page_bytes


def main() -> None:
    """Print the table, and where a cache becomes smaller than its rivals."""
    layouts = [PageLayout.from_name(preset, head_dim=128) for preset in ("k4v4_g128", "k4v2_g128", "k2v2_g128")]
    print("| tokens | 16 bits | fp8 | " + " | ".join(f"`{layout.name}`" for layout in layouts) + " |")
    print("|---" * (3 + len(layouts)) + "|")
    for num_tokens in (1, 4, 32, 128):
        cells = []
        for layout in layouts:
            size = served_bytes(layout, num_tokens * 1024) / (num_tokens * 1024)
            cells.append(f"{size:.0f}: {BYTES_16 / size:.1f}x, {BYTES_8 / size:.1f}x")
        print(f"| {num_tokens}K | {BYTES_16} | {BYTES_8} | " + " | ".join(cells) + " |")
    for layout in layouts:
        # The first length from which on it stays smaller.
        least = [max(n for n in range(1, 4096) if served_bytes(layout, n) >= n * size) + 1 for size in (BYTES_16, BYTES_8)]
        print(f"{layout.name} is smaller than 16 bits from {least[0]} tokens on, than fp8 from {least[1]} on")


if __name__ == "__main__":
    main()
