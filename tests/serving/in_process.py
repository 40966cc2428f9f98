"""Answers of a vLLM engine in this process: python in_process.py MODEL; its last line is JSON.

Each case's answer: what was `said`, the `tokens`, whether the `dense` head has to give it, and
whether it `differs` with one cluster probed.
"""

import json
import sys
from typing import Any

import model_runner  # before vLLM
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three primary colours are",
    "My favourite animal is the elephant because",
    "In 1969, the first man",
    "To bake bread you need flour,",
]


def greedy(max_tokens: int = 10, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **settings)


def answer(outputs: list[Any], *, dense: bool, differs: bool) -> dict[str, Any]:
    said = [
        [
            output.outputs[0].text,
            scores(output.outputs[0].logprobs),
            scores(output.prompt_logprobs),
        ]
        for output in outputs
    ]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {"said": said, "tokens": tokens, "dense": dense, "differs": differs}


def scores(logprobs: Any) -> Any:
    """Tokens and their logprobs, as far as they are steady from run to run."""
    return logprobs and [
        place and {token: round(entry.logprob, 3) for token, entry in place.items()}
        for place in logprobs
    ]


def main() -> None:
    llm = LLM(
        model=sys.argv[1], enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=64 << 20
    )
    found = {}

    def ask(name: str, prompts: list[str], params: Any, *, dense: bool = False) -> None:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found[name] = answer(outputs, dense=dense, differs=not dense)

    ask("greedy, one", PROMPTS[:1], greedy())
    ask("greedy, batch of 8", PROMPTS, greedy())
    ask("seeded sampling", PROMPTS[:3], SamplingParams(temperature=0.8, seed=7, max_tokens=10))
    # Triton's interpreter can't run V2's kernels for top-k, top-p and structured output
    cut = {} if model_runner.INTERPRETED else {"top_p": 0.9, "top_k": 40}
    name = "min-p" if model_runner.INTERPRETED else "top-p, top-k, min-p"
    ask(name, PROMPTS[:2], SamplingParams(**cut, min_p=0.02, seed=3, max_tokens=10))
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    ask("penalties", PROMPTS[:2], greedy(**penalties))
    ask("banned tokens", PROMPTS[:1], greedy(logit_bias={7042: -100.0}, bad_words=["Paris"]))
    ask("logprobs", PROMPTS[:2], greedy(logprobs=3), dense=True)
    ask("prompt logprobs", PROMPTS[:1], greedy(4, prompt_logprobs=2), dense=True)
    ask("lifted token", PROMPTS[:1], greedy(logit_bias={4321: 100.0}), dense=True)
    ask("allowed tokens", PROMPTS[:1], greedy(allowed_token_ids=[260, 30, 28]), dense=True)
    if not model_runner.INTERPRETED:
        choice = StructuredOutputsParams(choice=["elephant", "zebra"])
        ask("choice", PROMPTS[5:6], greedy(structured_outputs=choice), dense=True)

    # While the first is there, the dense head answers both; then FlashHead the other
    mixed = llm.generate(PROMPTS[:2], [greedy(3, logprobs=1), greedy(9)], use_tqdm=False)
    short, long = answer(mixed, dense=True, differs=False), mixed[1].outputs[0].token_ids
    found["mixed: with logprobs"] = {**short, "said": short["said"][0]}
    found["mixed: beside it"] = {**short, "said": list(long[:2])}
    found["mixed: after it"] = {**short, "said": list(long), "dense": False, "differs": True}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
