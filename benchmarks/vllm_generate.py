"""Tokens per second of a real vLLM, with its dense head and FlashHead in turns.

    python benchmarks/vllm_generate.py make FOLDER llama-3.1-8b qwen3-1.7b …
    python benchmarks/vllm_generate.py run FOLDER llama-3.1-8b --out FILE.json
    python benchmarks/vllm_generate.py draft FOLDER llama-3.1-8b --out FILE.json
    python benchmarks/vllm_generate.py draft FOLDER qwen3-1.7b --by qwen3-0.6b --out FILE.json

`make` writes models of real shapes with random weights and clusters them. The weights are made so
that each token has one clear successor, as in a trained model: agreeing tokens show that
everything is connected, not how well FlashHead retrieves. `run` serves one in this process and
asks for answers of two lengths, so that their difference excludes the prompt. Both heads belong to
one engine, which switches between them at each repeat, so that nothing else differs; for `dense`
the plugin looks up the number of rows and steps aside. By default FlashHead answers if the plugin
found it faster, with `--always` at any number of rows. With `--kernels` the GPU's own time of a
step is shown, too. Last, the FlashHead is dropped, and the tensors' memory with and without it is
reported.

`draft` serves a Llama with an EAGLE draft, which `make` wrote beside it: one layer of real size,
and a linear map that gives the successor, so that nearly all drafted tokens are accepted. With
`--by` another of the models drafts, whose tokens have the same successors. vLLM captures the draft
with its head, so an engine can't switch: FLASHHEAD_ENABLED and FLASHTUNE_VERIFY say who drafts and
who verifies, and runs of several engines are compared.
"""

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the heads must be in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LEAD = 14.0  # of the successor's logit
PROMPT, SHORT = 32, 16  # tokens
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 50},
}


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    kind: str
    vocab: int
    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int


SHAPES = {
    "llama-3.1-8b": Shape("llama", 128256, 4096, 32, 14336, 32, 8, 128),
    "qwen3-1.7b": Shape("qwen3", 151936, 2048, 28, 6144, 16, 8, 128),
    "qwen3-0.6b": Shape("qwen3", 151936, 1024, 28, 3072, 16, 8, 128),
    "gemma-3-1b": Shape("gemma3_text", 262144, 1152, 26, 6912, 4, 1, 256),
    "tiny": Shape("qwen3", 4096, 256, 2, 512, 4, 2, 64),
    "tiny-llama": Shape("llama", 4096, 256, 2, 512, 4, 2, 64),
}


def make(folder: Path, name: str) -> None:
    """A model of that shape at FOLDER/NAME, and its clusters at FOLDER/NAME-flash."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    shape, began = SHAPES[name], time.monotonic()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(where).manual_seed(7)

    def random(*size: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=where) * std).bfloat16()

    config = AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    gemma = shape.kind == "gemma3_text"
    prefix = {"llama": "Llama", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}[shape.kind]
    config.architectures = [f"{prefix}ForCausalLM"]
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, "dtype": "bfloat16"}, indent=1))
    # The second of each pair of rows is the first with signs changed, as the last norm does: each
    # token of a pair answers with the other
    embedding = random(shape.vocab, shape.hidden)
    sign = (
        torch.randint(0, 2, (shape.hidden,), generator=generator, device=where) * 2 - 1
    ).float()
    embedding[1::2] = embedding[0::2] * sign.bfloat16()
    offset = 1.0 if gemma else 0.0  # Gemma's norms multiply by one more than their weights
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": (sign * LEAD / (0.02 * shape.hidden) - offset).bfloat16(),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    if gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        tensors[f"{layer}self_attn.q_proj.weight"] = random(queries, shape.hidden)
        tensors[f"{layer}self_attn.k_proj.weight"] = random(keys, shape.hidden)
        tensors[f"{layer}self_attn.v_proj.weight"] = random(keys, shape.hidden)
        tensors[f"{layer}self_attn.o_proj.weight"] = random(shape.hidden, queries, std=1e-5)
        tensors[f"{layer}mlp.gate_proj.weight"] = random(shape.inner, shape.hidden)
        tensors[f"{layer}mlp.up_proj.weight"] = random(shape.inner, shape.hidden)
        tensors[f"{layer}mlp.down_proj.weight"] = random(shape.hidden, shape.inner, std=1e-5)
        for norm in norms:
            after = gemma and norm.startswith("post")  # normalises what is added to the residual
            weight = torch.full((shape.hidden,), 1e-4 if after else 1.0) - offset
            tensors[f"{layer}{norm}.weight"] = weight.bfloat16()
        if shape.kind != "llama":
            for norm in ("q_norm", "k_norm"):
                weight = torch.full((shape.head_size,), 1.0 - offset)
                tensors[f"{layer}self_attn.{norm}.weight"] = weight.bfloat16()
    kept = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    made = time.monotonic()
    if shape.kind == "llama":
        make_eagle(folder / f"{name}-eagle", config.to_dict(), tensors, sign)
    del tensors, kept, embedding
    n_clusters = shape.vocab // 16
    command = "from flashtune.__main__ import main; main()"
    arguments = ["cluster", "--model", path, "--out", folder / f"{name}-flash", "--link"]
    arguments += ["--probes", n_clusters // 16]
    subprocess.run([sys.executable, "-c", command, *map(str, arguments)], check=True)
    print(
        f"{name}: {made - began:.0f} s, clustered in {time.monotonic() - made:.0f} s", flush=True
    )


def make_eagle(path: Path, config: dict[str, Any], tensors: dict[str, Any], sign: Any) -> None:
    """An EAGLE draft of one layer whose linear map gives a token's successor.

    tensors: the target's, whose first layer it takes; sign: of the pairs, `[hidden]`.
    """
    import torch
    from safetensors.torch import save_file

    hidden = len(sign)
    linear = torch.zeros(hidden, 2 * hidden, dtype=torch.bfloat16, device=sign.device)
    linear[:, :hidden] = (sign * LEAD / (0.02**2 * hidden)).diag()
    own = {"fc.weight": linear}
    own |= {name[6:]: each for name, each in tensors.items() if name.startswith("model.layers.0.")}
    del own["layers.0.input_layernorm.weight"]  # an EAGLE has none
    path.mkdir(parents=True, exist_ok=True)
    kept = {name: each.cpu().contiguous() for name, each in own.items()}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    data = {**config, "num_hidden_layers": 1, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(data, indent=1, default=str))


class Heads:
    """The output heads of an engine in this process, and who answers."""

    def __init__(self) -> None:
        """Find the plugin's heads."""
        from flashtune.kernels.integrations import vllm_head

        self.served = [each for each in vllm_head._SERVED.values() if each._head is not None]
        if not self.served:
            raise SystemExit("this engine has no FlashHead: see its log")
        self.sizes = [each._sizes for each in self.served]

    def use(self, name: str) -> None:
        """Switch to `dense`, `flash` (if it was found faster), or `always`."""
        from flashtune.kernels.runtime.decoder import ROUNDED

        for each, sizes in zip(self.served, self.sizes, strict=True):
            each._sizes = {"dense": {}, "flash": sizes, "always": dict(enumerate(ROUNDED))}[name]

    def resident_bytes(self) -> dict[str, int]:
        """The memory of this process's tensors on the GPU with the heads, and without: drops them.

        `head`: what the heads say that they add.
        """
        import torch

        said = sum(each._head.added_bytes for each in self.served if each._head)
        bytes_with = torch.cuda.memory_allocated()
        for each in self.served:
            each._head, each._sizes = None, {}
        gc.collect()
        return {"with": bytes_with, "without": torch.cuda.memory_allocated(), "head": said}

    def answering(self, name: str, rows: int) -> str:
        """The head that answers for this many rows: `dense` if FlashHead was not found faster."""
        faster = all(rows in sizes for sizes in self.sizes)
        return name if name == "always" or faster else "dense"


def engine(
    folder: Path, name: str, rows: Sequence[int], given: argparse.Namespace, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """An engine for a FlashHead model and at most so many rows, and what is noted of a run."""
    import torch
    from vllm import LLM

    cpu = not torch.cuda.is_available()
    most = max(rows) * (1 + getattr(given, "drafted", 0))  # rows of a step
    settings |= {
        "model": str(folder / f"{name}-flash"),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": max(rows),
        "enable_prefix_caching": False,
        "seed": 0,
        "kv_cache_memory_bytes": (256 << 20) if cpu else (8 << 30),
    }
    if cpu:
        settings["enforce_eager"] = True
    else:
        sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= most]
        settings["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    began = time.monotonic()
    llm = LLM(**settings)
    return llm, {
        "model": name,
        "shape": asdict(SHAPES[name]),
        "device": "cpu" if cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "v2_runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "vLLM's default"),
        "load_s": round(time.monotonic() - began, 1),
        "tokens": given.tokens,
        "repeats": given.repeats,
    }


def answers(
    llm: Any, vocab: int, n_rows: int, n_tokens: int, kind: str
) -> tuple[float, list[list[int]]]:
    """Seconds that so many answers of so many tokens took, and the tokens."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(i * 7919 + j * 104729 + 11) % vocab for j in range(PROMPT)]}
        for i in range(n_rows)
    ]
    sampling = SamplingParams(
        max_tokens=n_tokens, ignore_eos=True, detokenize=False, seed=None, **KINDS[kind]
    )
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - start, [list(each.outputs[0].token_ids) for each in outputs]


def measured_rate(
    llm: Any, vocab: int, n_rows: int, n_tokens: int, kind: str
) -> tuple[float, list[list[int]]]:
    """Tokens per second of answers of so many tokens beyond the first ones, and the answers."""
    short, _ = answers(llm, vocab, n_rows, SHORT, kind)
    long, tokens = answers(llm, vocab, n_rows, SHORT + n_tokens, kind)
    return n_tokens * n_rows / (long - short), tokens


def draft(folder: Path, name: str, given: argparse.Namespace) -> None:
    """Print tokens per second with a draft, and how many drafted tokens are accepted."""
    from flashtune.kernels.integrations import vllm_head

    rows = [int(number) for number in given.rows.split(",")]
    speculative = {
        "method": "draft_model" if given.by else "eagle",
        "model": str(folder / (f"{given.by}-flash" if given.by else f"{name}-eagle")),
        "num_speculative_tokens": given.drafted,
    }
    llm, found = engine(
        folder, name, rows, given, speculative_config=speculative, disable_log_stats=False
    )

    def counted() -> list[float]:
        """Tokens drafted so far, and accepted."""
        seen = {each.name: getattr(each, "value", 0) for each in llm.get_metrics()}
        names = ("draft", "accepted")
        return [seen.get(f"vllm:spec_decode_num_{each}_tokens", 0) for each in names]

    cells: list[dict[str, Any]] = []
    for n_rows in rows:
        answers(llm, SHAPES[name].vocab, n_rows, SHORT, "greedy")
        rates, before = [], counted()
        for _ in range(given.repeats):
            one, tokens = measured_rate(llm, SHAPES[name].vocab, n_rows, given.tokens, "greedy")
            rates.append(one)
        drafted, accepted = (now - then for now, then in zip(counted(), before, strict=True))
        cells.append(
            {
                "rows": n_rows,
                "tokens_a_second": round(statistics.median(rates), 1),
                "all": [round(each, 1) for each in rates],
                "accepted": round(accepted / drafted, 4) if drafted else None,
                "answers": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
            }
        )
        print(f"{name}, {given.drafted} drafted: {cells[-1]}", flush=True)
    heads = {
        "draft" if drafts else "target": str(each._head)
        for (_, drafts), each in vllm_head._SERVED.items()
        if each._head is not None
    }
    found |= {
        "by": given.by or "eagle",
        "drafted": given.drafted,
        "flash_heads": heads,
        "cells": cells,
    }
    print(f"FlashHead: {heads or 'nowhere'}", flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def run(folder: Path, name: str, given: argparse.Namespace) -> None:
    """Print tokens per second of each head for each number of rows and kind of sampling."""
    import torch

    rows = [int(number) for number in given.rows.split(",")]
    llm, found = engine(folder, name, rows, given)
    heads = Heads()
    generate = partial(answers, llm, SHAPES[name].vocab)
    rate_of = partial(measured_rate, llm, SHAPES[name].vocab)

    def kernels_us(n_rows: int, n_tokens: int = 24) -> float:
        """The GPU's own time of a step: the kernels of one answer, less those of a shorter one."""
        times = []
        for length in (SHORT, SHORT + n_tokens):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                generate(n_rows, length, "greedy")
            times.append(sum(each.self_device_time_total for each in seen.key_averages()))
        return (times[1] - times[0]) / n_tokens

    flash = "always" if given.always else "flash"
    cells: list[dict[str, Any]] = []
    found |= {"head": [str(each._head) for each in heads.served], "cells": cells}

    def keep() -> None:
        """Write what was found, after each cell in case the rest fails."""
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

    for kind in given.kinds.split(","):
        for n_rows in rows if kind == "greedy" else [n for n in rows if n in (1, 8)]:
            rates: dict[str, list[float]] = {"dense": [], flash: []}
            tokens: dict[str, list[list[int]]] = {}
            for head in rates:
                heads.use(head)
                generate(n_rows, SHORT, kind)
            for repeat in range(given.repeats):
                for head in list(rates)[:: 1 if repeat % 2 else -1]:
                    heads.use(head)
                    one, tokens[head] = rate_of(n_rows, given.tokens, kind)
                    rates[head].append(one)
            medians = {head: statistics.median(own) for head, own in rates.items()}
            cell: dict[str, Any] = {
                "kind": kind,
                "rows": n_rows,
                "tokens_a_second": {head: round(rate, 1) for head, rate in medians.items()},
                "all": {head: [round(rate, 1) for rate in own] for head, own in rates.items()},
                "step_us": {h: round(1e6 * n_rows / rate, 1) for h, rate in medians.items()},
                "answered_by": heads.answering(flash, n_rows),
            }
            if kind == "greedy":
                pairs = list(zip(tokens["dense"], tokens[flash], strict=True))
                cell["same_answers"] = sum(one == other for one, other in pairs) / len(pairs)
                if given.kernels:
                    cell["kernels_us"] = {}
                    for head in rates:
                        heads.use(head)
                        cell["kernels_us"][head] = round(kernels_us(n_rows), 1)
            # From adjacent turns, so that a drift of the host's speed favours none
            ratios = [f / d for f, d in zip(rates[flash], rates["dense"], strict=True)]
            cell["ratio"] = round(statistics.median(ratios), 4)
            cell["spread"] = [round(min(ratios), 4), round(max(ratios), 4)]
            cells.append(cell)
            keep()
            print(
                f"{name} {kind:11s} {n_rows:3d} rows: dense {medians['dense']:9.1f}, {flash} "
                f"{medians[flash]:9.1f} tokens/s, {cell['ratio']:.3f} "
                f"({cell['spread'][0]:.3f} to {cell['spread'][1]:.3f}), by {cell['answered_by']}"
                f"{', kernels ' + str(cell['kernels_us']) if 'kernels_us' in cell else ''}",
                flush=True,
            )
    if torch.cuda.is_available():
        found["resident_bytes"] = heads.resident_bytes()
        print(found["resident_bytes"], flush=True)
        keep()


def main() -> None:
    """Make models, or measure one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    making, running = parts.add_parser("make"), parts.add_parser("run")
    making.add_argument("folder", type=Path)
    making.add_argument("names", nargs="+", choices=SHAPES)
    drafting = parts.add_parser("draft")
    for part, rows, tokens in ((running, "1,4,8,16,32", 128), (drafting, "1,8", 256)):
        part.add_argument("folder", type=Path)
        part.add_argument("name", choices=SHAPES)
        part.add_argument("--rows", default=rows)
        part.add_argument("--tokens", type=int, default=tokens)
        part.add_argument("--repeats", type=int, default=5)
        part.add_argument("--out", type=Path)
    running.add_argument("--kinds", default=",".join(KINDS))
    running.add_argument("--always", action="store_true")
    running.add_argument("--kernels", action="store_true")
    drafting.add_argument("--drafted", type=int, default=3)
    drafting.add_argument("--by", choices=SHAPES, help="the model that drafts, else an EAGLE")
    given = parser.parse_args()
    if given.part == "make":
        for name in given.names:
            make(given.folder, name)
        return
    (run if given.part == "run" else draft)(given.folder, given.name, given)


if __name__ == "__main__":
    main()
