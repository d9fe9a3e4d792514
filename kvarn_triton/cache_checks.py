from .checks import FLOATS, check_pages, check_tensor


def check_attention(q, batch, pages, block_table, seq_lens, layout, **k):
    num_kv_heads = check_pages(pages, layout.page_bytes)
    check_tensor("q", q, [None, None, layout.head_dim], FLOATS, device=pages.device)
    return num_kv_heads
