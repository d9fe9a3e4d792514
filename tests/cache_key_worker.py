"""Print the hashes of kernels, by which Triton's cache on disk knows them, after changes: `python cache_key_worker.py`.

A process of its own, because kernels that the interpreter has decorated have no hash. Nothing is compiled.
"""

from __future__ import annotations

import functools
import json
import sys
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

KEPT = ("checks", "encoder", "layout", "reference")
"""Modules that stay as they are when the others are imported anew: those whose constants are changed, and what they import."""


def hashes() -> dict[str, str]:
    """Import all kernels anew and return the hash of each that writes or reads pages."""
    for name in [name for name in sys.modules if name.startswith("kvarn_triton.") and name.split(".")[1] not in KEPT]:
        del sys.modules[name]
    sys.modules.pop("kvarn_triton", None)
    import kvarn_triton as kvarn
    from kvarn_triton.testing.compiler import compile_for

    found = {}

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        found[self.__name__] = self.ASTSource(self, signature, constexprs, attrs).hash()

    layout = kvarn.PageLayout(64, 64, 2, 3)
    pages, ids = torch.zeros(layout.pages_shape(2, 1), dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    tokens, raw_pages = torch.zeros(64, 1, 64, dtype=torch.float16), torch.zeros(2, 2, 1, 64, 64, dtype=torch.float16)
    with compile_for("sm90"), mock.patch.object(JITFunction, "_do_compile", record):
        kvarn.store_pages(tokens, tokens, pages, ids, layout)
        kvarn.commit_pages(raw_pages, pages, ids[None], ids[None], ids, ids, layout)
        kvarn.append_tokens(tokens, tokens, raw_pages, torch.zeros(64, dtype=torch.int64))
        kvarn.dequantize_pages(pages, ids, layout)
        kvarn.decode_attention(tokens[:1], pages, ids[None], ids, layout)
        kvarn.prefill_attention(tokens, pages, ids[None], ids, torch.zeros(2, dtype=torch.int32), layout)
        kvarn.quantize(torch.zeros(64, 64), 2, per="token")
        kvarn.variance_normalize(torch.zeros(64, 64), per="token")
    return found


def changed(value: object) -> object:
    """Return something else of the same kind."""
    if isinstance(value, dict):
        return {key: changed(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(changed, value))
    return value * 2 if isinstance(value, int) else value * 0.75


def main() -> None:
    """Change each constant of the encoder, and each derived number of a layout, one at a time."""
    from kvarn_triton import PageLayout
    from kvarn_triton.reference import codec

    results = {"": hashes()}
    assert hashes() == results[""]  # importing anew changes nothing by itself
    for name, value in list(vars(codec).items()):
        if not name.isupper() or not isinstance(value, (int, float, tuple, dict)):
            continue
        with mock.patch.object(codec, name, changed(value)):
            results[f"codec.{name}"] = hashes()
    for name, value in list(vars(PageLayout).items()):
        if isinstance(value, functools.cached_property) and name != "raw_head_dim":  # of tensors, not of kernels
            with mock.patch.object(PageLayout, name, functools.cached_property(lambda self, f=value.func: f(self) + 64)):
                getattr(PageLayout, name).__set_name__(PageLayout, name)
                results[f"layout.{name}"] = hashes()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
