"""How parameters of launchers get through operators (`registry`), as text: their types have no place in a schema.

Names in what a function makes of a parameter, and an operator of fields, are those of `ops`; of "config" also those of
`mla.operators`.
"""

from __future__ import annotations

from .registry import Form

FORMS = {
    "layout": Form(
        "str layout, int head_dim, int v_head_dim",
        "layout.name, layout.head_dim, layout.v_head_dim",
        "_layout(layout, head_dim, v_head_dim)",
    ),
    "encoder": Form(
        "int iterations, bool equivariant, bool clip, int fits, str norm",
        "encoder.iterations, encoder.equivariant, encoder.clip, encoder.fits, encoder.norm",
        "_encoder(iterations, equivariant, clip, fits, norm)",
    ),
    "step": Form(
        "str layout, int head_dim, int v_head_dim, Tensor seq_lens, Tensor? cu_seqlens_q, Tensor? block_table, "
        "Tensor? kv_indptr, Tensor? kv_indices, Tensor raw_table, Tensor num_quantized, Tensor? sink_lens, Tensor slots, "
        "Tensor tasks, int sink_len, int max_query_len, bool at_once",
        "step.layout.name, step.layout.head_dim, step.layout.v_head_dim, step.seq_lens, step.cu_seqlens_q, step.block_table, "
        "step.kv_indptr, step.kv_indices, step.raw_table, step.num_quantized, step.sink_lens, step.slots, step.tasks, "
        "step.sink_len, step.max_query_len, step.at_once",
        "Step(_layout(layout, head_dim, v_head_dim), seq_lens, cu_seqlens_q, block_table, kv_indptr, kv_indices, raw_table, "
        "num_quantized, sink_lens, slots, tasks, sink_len, max_query_len, at_once)",
    ),
    "table": Form(
        "int[]? table",
        "table if table is None else _row(table, layout, q, pages)",
        "table if table is None else _table(tuple(table))",
    ),
    "schedule": Form(
        "Tensor? schedule=None, str? made_for",
        "schedule and schedule.records, schedule and schedule.made_for",
        "schedule if schedule is None else DecodeSchedule(schedule, made_for)",
    ),
    "config": Form("int[]? config", "config and config.numbers()", "config and _config(tuple(config))"),
}
"""Parameters of types that no schema can have."""

OF_STEP = {"table": FORMS["table"]._replace(apart="table if table is None else _row(table, step.layout, q, pages)")}
"""The same of calls that get their layout in a step."""

LAST = ("token_starts", "kv_indptr", "kv_indices")
"""Parameters that stand last in a schema, wherever the launcher has them: the order of a schema is kept. Behind them are those
that attention has behind `return_lse`; a new one stands at the end of both."""

RESULTS = ("out", "workspace", "scratch", "return_lse")
"""Parameters that choose an overload."""
