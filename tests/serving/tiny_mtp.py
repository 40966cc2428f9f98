"""Make a tiny model that predicts several tokens (MTP), of the kind of ERNIE 4.5.

    python tiny_mtp.py TOKENIZER OUT

Its weights are random, but so that each token has one clear successor: tokens are pairs whose
embeddings differ by the signs that the last norm changes. The layer that predicts the token after
next knows the same, so with a dense head each of its drafts is right, but for the first token of a
text, whose embedding vLLM does not give to it. TOKENIZER is a model folder
whose tokenizer, and vocabulary's size, it takes.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

HIDDEN, INNER, HEADS = 128, 256, 2
STD, LEAD = 0.02, 14.0  # of embeddings; the successor's logit
MODEL, MTP = "model.layers.0.", "model.mtp_block.0."


def main() -> None:
    """Write the model's folder."""
    source, out = sys.argv[1], Path(sys.argv[2])
    vocab = AutoConfig.from_pretrained(source).vocab_size
    config = Ernie4_5_MoeConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        moe_layer_start_index=1,  # none of the layers has experts
        moe_layer_end_index=1,
        num_nextn_predict_layers=1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(7)
    model = Ernie4_5_MoeForCausalLM(config).to(torch.bfloat16)
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    del tensors["lm_head.weight"]  # is the embedding
    embedding = torch.randn(vocab, HIDDEN) * STD
    sign = torch.randint(0, 2, (HIDDEN,)) * 2 - 1.0
    embedding[1::2] = embedding[0::2] * sign
    tensors["model.embed_tokens.weight"] = embedding.bfloat16()
    tensors["model.norm.weight"] = (sign * LEAD / (STD * HIDDEN)).bfloat16()
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[MODEL + name].zero_()  # the layer adds nothing
    tensors |= {
        name.replace(MODEL, MTP): each.clone()
        for name, each in tensors.items()
        if name.startswith(MODEL)
    }
    linear = torch.zeros(HIDDEN, 2 * HIDDEN)
    linear[:, :HIDDEN] = (sign * LEAD / (STD * HIDDEN)).diag()  # of the token's embedding alone
    tensors["model.mtp_linear_proj.0.weight"] = linear.bfloat16()
    for name in ("emb", "hidden"):
        tensors[f"model.mtp_{name}_norm.0.weight"] = torch.ones(HIDDEN).bfloat16()
    config.architectures = ["Ernie4_5_MoeForCausalLM"]
    config.save_pretrained(out)
    data = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**data, "dtype": "bfloat16"}, indent=1))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    main()
