"""Make an EAGLE draft for a Llama model by one linear regression.

    python linear_eagle.py MODEL OUT

EAGLE predicts the target's next hidden state from its last one and the token that followed. Here
a linear map does so, fitted by least squares to what the model itself writes; the draft's
only layer adds nothing to it. It is right often enough to tell good drafting from bad.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ABOUT = "rivers", "bread", "the moon", "trains", "music", "bees", "bridges", "maps"
ASKED = "Write a few sentences about", "Explain to a child", "List facts about"
PROMPTS = [f"{ask} {what}." for ask in ASKED for what in ABOUT]
N_TOKENS = 96
RIDGES = 2.0, 100.0  # of embeddings and of states, whose numbers are larger


def pairs(folder: str) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Inputs [token's embedding, hidden state before it], the hidden state at it, the config."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs, outputs = [], []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        ids = model.generate(ids, max_new_tokens=N_TOKENS, do_sample=False)
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0]
            embedded = model.model.embed_tokens(ids)[0]
        inputs.append(torch.cat([embedded[1:], states[:-1]], dim=1))
        outputs.append(states[1:])
    return torch.cat(inputs), torch.cat(outputs), model.config


def main() -> None:
    """Write the draft's folder."""
    given, wanted, config = pairs(sys.argv[1])
    width, inner = config.hidden_size, config.intermediate_size
    ridge = torch.tensor(RIDGES).repeat_interleave(width).diag()
    linear = torch.linalg.solve(given.T @ given + ridge, given.T @ wanted).T
    heads = config.num_attention_heads
    size = width // heads
    keys = config.num_key_value_heads * size

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    layer = "layers.0"
    tensors = {
        "fc.weight": linear.to(torch.bfloat16).contiguous(),
        f"{layer}.self_attn.q_proj.weight": zeros(width, width),
        f"{layer}.self_attn.k_proj.weight": zeros(keys, width),
        f"{layer}.self_attn.v_proj.weight": zeros(keys, width),
        f"{layer}.self_attn.o_proj.weight": zeros(width, width),
        f"{layer}.mlp.gate_proj.weight": zeros(inner, width),
        f"{layer}.mlp.up_proj.weight": zeros(inner, width),
        f"{layer}.mlp.down_proj.weight": zeros(width, inner),
        f"{layer}.post_attention_layernorm.weight": zeros(width) + 1,
    }
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    data = {**config.to_dict(), "num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
    (out / "config.json").write_text(json.dumps(data, indent=1, default=str))


if __name__ == "__main__":
    main()
