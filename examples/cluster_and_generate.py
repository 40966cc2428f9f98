"""Cluster a causal language model, and generate with FlashHead and with its dense head.

python examples/cluster_and_generate.py

The model is tiny and random. For a real one, give its folder to `flashtune cluster`.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flashtune
from flashtune.tuner.cli.main import cli

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
prompt = torch.tensor([[5, 17, 300]])

with tempfile.TemporaryDirectory() as folder:
    plain, flash = Path(folder, "tiny"), Path(folder, "tiny-flash")
    LlamaForCausalLM(config).save_pretrained(plain)
    command = f"cluster --model {plain} --out {flash} --clusters 32 --probes 24 --device cpu"
    cli(command.split(), standalone_mode=False)

    model = AutoModelForCausalLM.from_pretrained(plain)
    dense = model.generate(prompt, max_new_tokens=8, do_sample=False)
    # The dense head of so small a model is faster and would answer: always=True keeps FlashHead.
    head = flashtune.apply(model, assets=flash, always=True, tune="never")
    found = model.generate(prompt, max_new_tokens=8, do_sample=False)
    print(head)
    print("dense head", dense[0, 3:].tolist())
    print("FlashHead ", found[0, 3:].tolist())
