"""The text that language models are trained on and measured with: the Python sources of the running standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def load_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training and the held-out text, uint8 [num_bytes] each.

    Both come from the .py files of the running Python's standard library, without tests and tables; in sorted order,
    every twentieth file is held out. Four spaces become one tab, lest the model spends itself on indentation.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not _SKIPPED_FOLDERS & set(name.split("/"))]
    splits = ([name for i, name in enumerate(names) if i % 20], names[::20])
    texts = (b"\n".join((root / name).read_bytes() for name in split).replace(b"    ", b"\t") for split in splits)
    train_text, heldout_text = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    return train_text, heldout_text


def heldout_prompts(lengths: list[int], num_tokens: int, *, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Draw passages of held-out text.

    Args:
        lengths: tokens of each prompt.
        num_tokens: tokens of each continuation.
        seed: which passages.

    Returns:
        prompts, int64 [length] each, and what follows them in the text, int64 [len(lengths), num_tokens].
    """
    text = load_text()[1].long()
    generator = torch.Generator().manual_seed(seed)
    last_start = len(text) - max(lengths) - num_tokens
    starts = torch.randint(last_start + 1, (len(lengths),), generator=generator).tolist()
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    prompts = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return prompts, torch.stack([text[end : end + num_tokens] for end in ends])
