"""Sample with transformers from a model without clusters, with its vocabulary screened in 8 bits.

python examples/sampling.py

`screen=` works for any model whose output head is a plain linear layer. With the clusters of
`flashtune cluster` a step reads less: `flashtune.apply(model, assets=FOLDER)`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import flashtune

set_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompts = torch.tensor([[5, 17, 300], [8, 9, 10]])


def sample() -> list[list[int]]:
    """Eight tokens for each prompt, with the same seed at each call."""
    set_seed(1)
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.95}
    return model.generate(prompts, max_new_tokens=8, **settings)[:, 3:].tolist()


# The dense head of so small a model is faster and would answer: always=True keeps FlashHead.
head = flashtune.apply(model, screen="int8", always=True, tune="never")
print(head)
print("FlashHead ", sample())
flashtune.remove(model)
print("dense head", sample())
