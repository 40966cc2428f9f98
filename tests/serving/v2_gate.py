"""The gate as vLLM's V2 model runner loads it: python v2_gate.py

That runner needs a GPU, but what it loads and tells its logits processors needs none.
"""

from types import SimpleNamespace

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.sample.logits_processor import (
    build_custom_logits_processors_params_validator,
)
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs


def main() -> None:
    build_custom_logits_processors_params_validator(())(SamplingParams(logprobs=1))
    (gate_class,) = _load_v2_logitsprocs(())
    parallel = SimpleNamespace(distributed_executor_backend="uni")
    config = SimpleNamespace(compilation_config=SimpleNamespace(), parallel_config=parallel)
    gate = gate_class(config, object())
    ordinary = SamplingParams(temperature=0.5, seed=3, min_p=0.1, bad_words=["x"], min_tokens=3)
    assert gate.add_request(0, ordinary) is False
    assert not gate.dense
    scored = SamplingParams(logprobs=1)
    confined = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"]))
    gate.add_request(1, scored)
    gate.add_request(2, confined)
    gate.add_request(2, ordinary)  # which takes the place of one that ended
    assert gate.dense
    del scored
    assert not gate.dense, "the parameters of a request that ended should have cleared its mark"
    print("ok   the V2 runner's loader takes the gate, which follows real sampling parameters")


if __name__ == "__main__":
    main()
