"""A header for pages that leave the process: what its reader needs to know, so that it reads them or refuses them."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from .checks import check_count, require
from .layout import FORMAT_VERSION, PageLayout

HEADER_BYTES = 128
"""Bytes of a header: a cache line, so that what follows it is aligned as it."""

_MAGIC = b"KVARNPGS"
_FIELDS = struct.Struct("<8sII16s8IQ52x")
_CHECKSUM = struct.Struct("<I")


class PageHeader(NamedTuple):
    """What a header says of the pages behind it."""

    layout: PageLayout
    num_kv_heads: int
    num_pages: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages, without the header."""
        return self.num_pages * self.num_kv_heads * self.layout.page_bytes


def page_header(layout: PageLayout, num_kv_heads: int, num_pages: int) -> bytes:
    """Return 128 bytes that describe pages, uint8 [num_pages, num_kv_heads, page_bytes], to be stored before them.

    The encoder is no part of it: every reader reads the pages of all encoders. docs/page_format.md has the offsets.

    Args:
        layout: the page format.
        num_kv_heads: key/value heads.
        num_pages: how many pages follow.

    Raises:
        ValueError: for a number that is none of these.
    """
    require(isinstance(layout, PageLayout), "layout", "a PageLayout", type(layout).__name__)
    check_count("num_kv_heads", num_kv_heads, least=1)
    check_count("num_pages", num_pages)
    sizes = layout.head_dim, layout.v_head_dim, layout.page_size, layout.k_bits, layout.v_bits, layout.page_bytes
    fields = _FIELDS.pack(_MAGIC, FORMAT_VERSION, HEADER_BYTES, layout.name.encode(), *sizes, num_kv_heads, 0, num_pages)
    return fields + _CHECKSUM.pack(zlib.crc32(fields))


def read_page_header(header: bytes | bytearray | memoryview) -> PageHeader:
    """Return what a header says, or refuse it: pages that it describes are then not to be read by this version.

    Args:
        header: at least 128 bytes, as `page_header` made them; what follows them is not looked at.

    Raises:
        ValueError: for what is no header, one of another `FORMAT_VERSION`, one whose bytes have changed, or one of a layout
            that this version doesn't know. The message names the field.
    """
    require(isinstance(header, (bytes, bytearray, memoryview)), "header", "bytes", type(header).__name__)
    data = bytes(memoryview(header)[:HEADER_BYTES])
    require(len(data) == HEADER_BYTES, "header", f"at least {HEADER_BYTES} bytes", len(data))
    fields, (checksum,) = data[: _FIELDS.size], _CHECKSUM.unpack(data[_FIELDS.size :])
    magic, version, num_bytes, name, *numbers, num_pages = _FIELDS.unpack(fields)
    require(magic == _MAGIC, "header.magic", repr(_MAGIC), magic)
    require(version == FORMAT_VERSION, "header.format_version", str(FORMAT_VERSION), version)
    require(checksum == zlib.crc32(fields), "header.checksum", f"{zlib.crc32(fields):#010x}", hex(checksum))
    require(num_bytes == HEADER_BYTES, "header.header_bytes", str(HEADER_BYTES), num_bytes)
    head_dim, v_head_dim, page_size, k_bits, v_bits, page_bytes, num_kv_heads, zero = numbers
    require(zero == 0, "header.reserved", "0", zero)
    layout = PageLayout(head_dim, page_size, k_bits, v_bits, v_head_dim)
    require(name.rstrip(b"\0") == layout.name.encode(), "header.name", layout.name, name)
    require(page_bytes == layout.page_bytes, "header.page_bytes", str(layout.page_bytes), page_bytes)
    require(num_kv_heads >= 1, "header.num_kv_heads", "at least 1", num_kv_heads)
    return PageHeader(layout, num_kv_heads, num_pages)
