"""Other kernels of latent attention beside ours: FlashMLA and FA3 (libraries in vLLM's wheel) and FlashInfer.

They read 16-bit latents in pages of 64 tokens. As in `peers`, whatever is importable is timed, each variant's output is
compared with float64 before that, and what a server does once per step for all layers is outside of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from common import say
from peers import Peer, Variants, checked, fa3_arguments, find_all, find_fa3, find_flashinfer, library_of_vllm
from timing import Call

from kvarn_triton.testing import relative_error

LATENT, ROPE = 512, 64
MAX_ERROR = 2**-8
"""Of the last sequence, relative to float64: three roundings to float16, with room."""


@dataclass
class SixteenBitLatents:
    """Queries and 16-bit latents of sequences of one length, in several sets that share the pool but no page.

    Args:
        q: of each set, float16 [batch, heads, 576].
        pages: float16 [num_pages, page_size, 576], tokens are keys, and values without their rotary channels.
        tables: of each set, int32 [batch, pages per sequence].
        context: tokens of each sequence.
        sm_scale: factor of the scores.
    """

    q: list[torch.Tensor]
    pages: torch.Tensor
    tables: list[torch.Tensor]
    context: int
    sm_scale: float

    def __post_init__(self) -> None:
        self.batch, self.heads, _ = self.q[0].shape
        ints = {"dtype": torch.int32, "device": self.pages.device}
        self.lens = torch.full((self.batch,), self.context, **ints)
        self.ends = torch.arange(self.batch + 1, **ints)
        self.out = self.q[0].new_empty(self.batch, self.heads, LATENT)

    def last_tokens(self) -> torch.Tensor:
        """Return the tokens [context, 576] of the first set's last sequence."""
        return self.pages[self.tables[0][-1].long()].flatten(0, 1)[: self.context]

    def error(self, out: torch.Tensor, tokens: torch.Tensor) -> float:
        """Return the relative error of the last sequence, against float64."""
        tokens = tokens.double()
        weights = torch.softmax(self.sm_scale * self.q[0][-1].double() @ tokens.T, dim=-1)
        return relative_error(out.view(self.batch, self.heads, LATENT)[-1], weights @ tokens[:, :LATENT])


def find_flashmla() -> Any:
    """Return the operators of FlashMLA."""
    return library_of_vllm("_flashmla_C")


def flashmla_variants(operators: Any, case: SixteenBitLatents) -> Variants:
    """Return calls that share the scheduler's metadata, which a first call without any makes."""
    cache, out = case.pages[:, :, None], case.out[:, None]

    def call(q: torch.Tensor, table: torch.Tensor, metadata: Any = (None, None)) -> Any:
        return operators.dense_decode_fwd(q[:, None], cache, LATENT, case.lens, table, case.sm_scale, False, *metadata, out)

    metadata = call(case.q[0], case.tables[0])[2:]
    calls = [lambda q=q, t=t: call(q, t, metadata)[0] for q, t in zip(case.q, case.tables, strict=True)]
    return {"FlashMLA": (calls, case.last_tokens())}


def fa3_latent_variants(operators: Any, case: SixteenBitLatents) -> Variants:
    """Return calls of the kernel whose values are wider than its keys, with the library's own number of splits and with 32."""
    found: Variants = {}
    latents, rope = case.pages[:, :, None].split([LATENT, ROPE], dim=-1)
    for num_splits in (0, 32):
        metadata = operators.get_scheduler_metadata(
            case.batch, 1, case.context, case.heads, 1, ROPE, LATENT, case.pages.dtype, case.lens, case.ends, None, None,
            None, None, case.pages.shape[1], 0, True, -1, -1, False, num_splits, None, 0,
        )  # fmt: skip
        given = {
            "k": rope, "v": latents, "out": case.out, "cu_seqlens_q": case.ends, "seqused_k": case.lens, "max_seqlen_q": 1,
            "max_seqlen_k": case.context, "softmax_scale": case.sm_scale, "is_causal": True, "window_size_left": -1,
            "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True, "scheduler_metadata": metadata,
            "num_splits": num_splits,
        }  # fmt: skip
        every = [
            fa3_arguments(
                operators.fwd.default._schema, given | {"q": q[..., LATENT:], "q_v": q[..., :LATENT], "page_table": table}
            )
            for q, table in zip(case.q, case.tables, strict=True)
        ]
        calls = [lambda arguments=arguments: operators.fwd(*arguments)[0] for arguments in every]
        found[f"FA3, {num_splits or 'own'} splits"] = calls, case.last_tokens()
    return found


def flashinfer_latent_variants(flashinfer: Any, case: SixteenBitLatents) -> Variants:
    """Return calls of both of its generations; latents and rotary channels are in memory of their own, as it wants them."""
    found: Variants = {}
    latents, rope = (part.contiguous() for part in case.pages.split([LATENT, ROPE], dim=-1))
    sizes = {"num_heads": case.heads, "head_dim_ckv": LATENT, "head_dim_kpe": ROPE, "page_size": case.pages.shape[1]}
    dtypes = {"q_data_type": case.pages.dtype, "kv_data_type": case.pages.dtype}
    for backend in ("fa2", "fa3"):
        calls: list[Call] = []
        try:
            for q, table in zip(case.q, case.tables, strict=True):
                memory = torch.empty(128 << 20, dtype=torch.int8, device=q.device)
                wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(memory, backend=backend)
                starts = case.ends * table.shape[1]
                ids = {"qo_indptr": case.ends, "kv_indptr": starts, "kv_indices": table.flatten(), "kv_len_arr": case.lens}
                wrapper.plan(**ids, **sizes, **dtypes, causal=False, sm_scale=case.sm_scale)
                parts = q[..., :LATENT].contiguous(), q[..., LATENT:].contiguous(), latents, rope
                calls.append(lambda run=wrapper.run, parts=parts: run(*parts, out=case.out, return_lse=False))
        except Exception as error:  # a generation that the GPU or the heads don't allow
            say(f"mla: FlashInfer, {backend}: {str(error).splitlines()[0][:120]}")
            continue
        found[f"FlashInfer {backend}"] = calls, case.last_tokens()
    return found


MLA_PEERS = (
    Peer("FlashMLA", find_flashmla, flashmla_variants),
    Peer("FA3", find_fa3, fa3_latent_variants),
    Peer("FlashInfer", find_flashinfer, flashinfer_latent_variants),
)


def find_mla_peers() -> tuple[dict[str, Any], dict[str, str]]:
    """Return what was found of each peer by name, and why each of the others wasn't, which is said."""
    found, missing = find_all(MLA_PEERS)
    for name, reason in missing.items():
        say(f"mla: without {name}: {reason}")
    return found, missing


def right_variants(found: dict[str, Any], case: SixteenBitLatents) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """Return the calls of all variants whose output is right, and by peer what is wrong with the others."""
    right: dict[str, list[Call]] = {}
    wrong: dict[str, str] = {}
    for peer in MLA_PEERS:
        if peer.name not in found:
            continue
        try:
            variants = peer.variants(found[peer.name], case)
        except Exception as error:  # a library that doesn't take the shape leaves the others
            wrong[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        calls, notes = checked(variants, case, MAX_ERROR)
        right |= calls
        if notes:
            wrong[peer.name] = notes
    for name, why in wrong.items():
        say(f"mla: {name}: {why}")
    return right, wrong
