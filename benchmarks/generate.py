"""Whole decode steps of transformers models, with the dense head and with FlashHead.

    python benchmarks/generate.py [--model NAME]… [--batch N] [--json FILE]
    python benchmarks/generate.py --tiny       # any machine: a toy model, no graphs, no meaning

Prints a Markdown table. Models have real shapes and random weights; clusters are random and of
equal size, so that only the speed is meaningful, not the tokens. A step is a CUDA graph of the
model's decoder, its head and the choice of the next token, over a static cache; steps of all heads
are timed in turns, and medians count. The dense head, and FlashHead's logits, run inside the
model's own forward as `generate` calls it, followed by argmax; the others return token ids
themselves. The head's share is the step less the step without a head; the head alone is timed in
its own graph, over cold centroids. Every FlashHead kernel is verified first.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flashtune
from flashtune import FlashHead, Problem
from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import baseline_config
from flashtune.kernels.epilogues.epilogue import new_out
from flashtune.kernels.measure.judge import Judge
from flashtune.kernels.measure.timing import GraphTimer, Timer, Timing, WallTimer, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, parse_config
from flashtune.kernels.runtime.binding import compile_step
from flashtune.kernels.runtime.decoder import MOST_TOKENS
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.problem import EPILOGUES

# The parts of each model's config.json that decide its speed; all heads are tied to the embedding
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {  # huggingface.co/Qwen/Qwen3-1.7B; the text model of Qwen3-VL-2B
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-3.2-1b": {  # huggingface.co/meta-llama/Llama-3.2-1B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "gemma-3-1b": {  # huggingface.co/google/gemma-3-1b-it
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
    },
}
TINY = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
NO_HEAD = "no head"
CLUSTER_SIZE = 16
PROBES = {"gemma-3-1b": 512, "tiny": 16}
PROMPT, CONTEXT = 128, 256  # tokens in the cache at the start of a sample; its capacity
STEPS = 20  # per sample
ROUNDS, SAMPLES = 8, 3
COLD_SETS = 4  # of centroids, together larger than the cache


class Decoder:
    """A model with a static cache that holds a prompt; `rewind` returns to its end."""

    def __init__(self, config: dict[str, Any], device: torch.device, batch: int) -> None:
        """Make the model, and read the prompt."""
        common = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
        values = {name: value for name, value in config.items() if name != "model_type"}
        torch.manual_seed(0)
        with device:
            self.model: Any = AutoModelForCausalLM.from_config(
                CONFIG_MAPPING[config["model_type"]](**values, **common), dtype=torch.bfloat16
            ).eval()
            self.tokens = torch.randint(0, config["vocab_size"], (batch, PROMPT))
            self.positions = torch.arange(PROMPT)[None]
        self.cache: Any = StaticCache(config=self.model.config, max_cache_len=CONTEXT)
        self.hidden()
        self.tokens, self.positions = self.tokens[:, -1:].clone(), self.positions[:, -1:].clone()
        self.rewind()

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward for the next token."""
        return {
            "input_ids": self.tokens,
            "position_ids": self.positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def rewind(self) -> None:
        """Make the next step the first after the prompt again."""
        self.positions.fill_(PROMPT)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)
            if hasattr(layer, "cumulative_length_int"):  # of sliding windows
                layer.cumulative_length_int = PROMPT

    def hidden(self) -> torch.Tensor:
        """The last position's hidden states `[batch, hidden]`, without a head."""
        states: torch.Tensor = self.model.model(**self.inputs).last_hidden_state[:, -1]
        return states

    def without_head(self) -> None:
        """A step that reads the same token again."""
        self.hidden()
        self.positions.add_(1)

    def by_logits(self) -> None:
        """A step as in `generate`: the model's own head, then the best token."""
        logits = self.model(**self.inputs, logits_to_keep=1).logits
        self.go_on(logits[:, -1].argmax(dim=-1))

    def go_on(self, tokens: torch.Tensor) -> None:
        """Make `tokens` `[batch]` the input of the next step."""
        self.tokens.copy_(tokens[:, None])
        self.positions.add_(1)


class StepTimer:
    """A model's step, captured if there are graphs, timed over several in a row."""

    def __init__(self, decoder: Decoder, in_model: Callable[[], None]) -> None:
        """Warm up, capture, and rewind."""
        self._decoder = decoder
        self._run: Callable[[], object] = in_model
        if not decoder.tokens.is_cuda:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                in_model()
        torch.cuda.synchronize()
        decoder.rewind()
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # a garbage collection during a capture can unload modules
        with torch.cuda.graph(graph):
            in_model()
        gc.enable()
        self._run = graph.replay

    def sample(self, replays: int) -> list[float]:
        """Microseconds per step, one value for STEPS steps from the prompt's end."""
        samples = []
        for _ in range(replays):
            self._decoder.rewind()
            self._wait()
            start = time.perf_counter()
            for _ in range(STEPS):
                self._run()
            self._wait()
            samples.append((time.perf_counter() - start) * 1e6 / STEPS)
        return samples

    def _wait(self) -> None:
        if self._decoder.tokens.is_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way from hidden states to the next token: in a model's step, and alone."""

    in_model: Callable[[], None]
    alone: Step
    chosen: str = ""


def random_head(model: Any, n_probes: int) -> FlashHead:
    """A FlashHead of the model's weight with random unit centroids and random clusters."""
    weight = model.get_output_embeddings().weight
    vocab, hidden = weight.shape
    n_clusters = vocab // CLUSTER_SIZE
    centroids = torch.randn(n_clusters, hidden, device=weight.device)
    assignments = torch.randperm(vocab, device=weight.device) % n_clusters
    unit = torch.nn.functional.normalize(centroids, dim=1).to(weight.dtype)
    return FlashHead(weight, unit, assignments, n_probes=n_probes)


def weights_of(head: FlashHead) -> Weights:
    """The tensors that the head's kernels read."""
    return Weights(weight=head.weight, centroids=head.centroids, ids=head.ids)


def verified_step(problem: Problem, config: Config, weights: Weights) -> Step:
    """The config's kernels, loaded; raises RuntimeError if their output is wrong."""
    where = weights.weight.device
    device = device_of(where)
    assert device is not None
    candidate = Candidate(problem, config, device)
    step = compile_step(candidate, where)()
    hidden = torch.randn(problem.n_tokens, problem.hidden_size, device=where).bfloat16()
    out = new_out(problem, where)
    step(weights, hidden, out)
    judge = Judge(weights, problem, tensor_cores=candidate.plan.tensor_cores)
    reason = judge.why_wrong(out, hidden, candidate.slack)
    if reason:
        raise RuntimeError(f"{problem.describe()}, {config}: {reason}")
    return step


def contenders(decoder: Decoder, head: FlashHead) -> dict[str, Contender]:
    """Dense, the baseline, and FlashHead by logits and by tokens."""
    model, weights = decoder.model, weights_of(head)
    batch, where = len(decoder.tokens), weights.weight.device
    device = device_of(where)
    assert device is not None
    dense = model.get_output_embeddings()
    flashtune.apply(model, head, always=True)
    flash = model.get_output_embeddings()
    chosen = {epilogue: head.explain(batch, epilogue=epilogue) for epilogue in EPILOGUES}
    problems = {epilogue: Problem(**chosen[epilogue]["problem"]) for epilogue in EPILOGUES}
    steps = {
        epilogue: verified_step(
            problems[epilogue], parse_config(chosen[epilogue]["config"]), weights
        )
        for epilogue in EPILOGUES
    }
    baseline = verified_step(
        problems["argmax"], baseline_config(problems["argmax"], device), weights
    )
    logits, tokens = new_out(problems["logits"], where), new_out(problems["argmax"], where)

    def by_model(module: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.set_output_embeddings(module)
            decoder.by_logits()

        return run

    def by_baseline() -> None:
        baseline(weights, decoder.hidden(), tokens)
        decoder.go_on(tokens)

    def dense_alone(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        torch.argmax(torch.nn.functional.linear(hidden, dense.weight), dim=-1, out=out)

    def logits_alone(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        steps["logits"](weights, hidden, logits)
        torch.argmax(logits, dim=-1, out=out)

    return {
        "dense": Contender(in_model=by_model(dense), alone=dense_alone),
        "baseline": Contender(in_model=by_baseline, alone=baseline),
        "flashtune logits": Contender(
            in_model=by_model(flash), alone=logits_alone, chosen=chosen["logits"]["level"]
        ),
        "flashtune tokens": Contender(
            in_model=lambda: decoder.go_on(head(decoder.hidden())),
            alone=steps["argmax"],
            chosen=chosen["argmax"]["level"],
        ),
    }


def compare(
    name: str, config: dict[str, Any], where: torch.device, batch: int, rounds: int
) -> dict[str, Any]:
    """One model: each contender's microseconds per step, and of its head alone."""
    decoder = Decoder(config, where, batch)
    head = random_head(decoder.model, PROBES.get(name, 256))
    ways = contenders(decoder, head)
    problem = Problem(**head.explain(batch)["problem"])
    sets = [replace(weights_of(head), centroids=head.centroids.clone()) for _ in range(COLD_SETS)]
    states = [torch.randn_like(decoder.hidden()) for _ in range(COLD_SETS)]
    heads = Workload(problem, tuple(sets), tuple(states), checks=())
    steps: dict[str, Timer] = {NO_HEAD: StepTimer(decoder, decoder.without_head)}
    steps |= {way: StepTimer(decoder, each.in_model) for way, each in ways.items()}
    alone: dict[str, Timer] = {
        way: (GraphTimer if where.type == "cuda" else WallTimer)(each.alone, heads)
        for way, each in ways.items()
    }
    return {
        "model": name,
        "problem": problem.describe(),
        "step_us": medians(steps, rounds),
        "head_us": medians(alone, rounds),
        "chosen": {way: each.chosen for way, each in ways.items()},
    }


def medians(timers: dict[str, Timer], rounds: int) -> dict[str, float]:
    """Median microseconds of each, timed in turns."""
    samples = interleaved(list(timers.values()), rounds, SAMPLES)
    return {name: Timing.of(own).median_us for name, own in zip(timers, samples, strict=True)}


def print_table(rows: Sequence[dict[str, Any]], batch: int) -> None:
    """The rows as Markdown."""
    headings = ("model", "head", "step us", "tokens/s", "vs dense", "of it head us", "alone us")
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    for row in rows:
        bare, dense = row["step_us"][NO_HEAD], row["step_us"]["dense"]
        print(f"| {row['problem']} ({row['model']}) | {NO_HEAD} | {bare:.1f} | | | | |")
        for way, alone in row["head_us"].items():
            step = row["step_us"][way]
            label = f"{way} ({row['chosen'][way]})" if row["chosen"][way] else way
            cells = (
                f"{step:.1f} | {1e6 * batch / step:.1f} | {dense / step:.2f} | {step - bare:.1f}"
            )
            print(f"| | {label} | {cells} | {alone:.1f} |")


def main() -> None:
    """Time whole steps of each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", choices=[*MODELS], help="one of all")
    parser.add_argument("--batch", type=int, default=1, help="sequences side by side (1)")
    parser.add_argument("--tiny", action="store_true", help="a toy, on any machine")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("this benchmark needs an NVIDIA GPU; --tiny runs it without meaning")
    if not 1 <= options.batch <= MOST_TOKENS:
        parser.error(f"--batch must be 1 to {MOST_TOKENS}: more take the dense head")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_of(where)
    assert device is not None
    print(f"{device.title}, {toolchain(device)}, transformers {transformers.__version__}\n")
    models = {"tiny": TINY} if options.tiny else MODELS
    rounds = 1 if options.tiny else ROUNDS
    rows = []
    with torch.no_grad():
        for name in options.model or models:
            rows.append(compare(name, models[name], where, options.batch, rounds))
            torch.cuda.empty_cache()
    print_table(rows, options.batch)
    if options.json:
        data = {"device": device.name, "batch": options.batch, "prompt": PROMPT, "rows": rows}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
