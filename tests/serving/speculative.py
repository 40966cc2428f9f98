"""Speculative decoding in a real vLLM: FlashHead as the head of the draft, and of the target.

    python speculative.py PLAIN FLASH WORK

PLAIN is a model folder, FLASH the FlashHead model made of it. The model drafts for itself, so that
each drafted token is right unless the draft's head misses it:
- dense draft, dense target: what the others are held against
- FlashHead draft: the same answers, whatever it misses
- FlashHead draft of one probe: likewise, with fewer drafted tokens accepted
- FlashHead target with all clusters probed (FLASHTUNE_VERIFY=1): the same answers
Each is an engine in a process of its own. Exits with 1 where an answer is not what it must be.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compare import probing

from flashtune.kernels.model_folder.folder import ModelFolder

N_TOKENS, N_DRAFTED = 48, 3
PROMPTS = [
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "Name three colours.",
    "Explain what a compiler does.",
]


def serve(target: str, draft: str, out: str) -> None:
    """Answer all prompts with one engine, greedily."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=target,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
        speculative_config={
            "method": "draft_model",
            "model": draft,
            "num_speculative_tokens": N_DRAFTED,
        },
    )
    chats: Any = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0.0, max_tokens=N_TOKENS)
    llm.chat(chats[:1], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    start = time.perf_counter()
    answers = llm.chat(chats, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = [list(each.outputs[0].token_ids) for each in answers]
    counts = {each.name: getattr(each, "value", 0) for each in llm.get_metrics()}
    drafted = counts.get("vllm:spec_decode_num_draft_tokens", 0)
    accepted = counts.get("vllm:spec_decode_num_accepted_tokens", 0)
    found = {
        "tokens": tokens,
        "accepted": accepted / drafted if drafted else None,
        "tokens_a_second": sum(map(len, tokens)) / seconds,
    }
    Path(out).write_text(json.dumps(found))


def main() -> int:
    """Serve each pair, and hold the answers against those of the dense one."""
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
        return 0
    plain, flash, work = map(Path, sys.argv[1:])
    n_clusters = ModelFolder.open(flash).problem().n_clusters
    pairs = {
        "dense draft": (plain, plain, "0"),
        "FlashHead draft": (plain, flash, "0"),
        "FlashHead draft, 1 probe": (plain, probing(flash, work, "one", 1), "0"),
        "FlashHead target, all probed": (probing(flash, work, "all", n_clusters), plain, "1"),
    }
    expected, good = None, True
    for name, (target, draft, verify) in pairs.items():
        out = work / "speculative.json"
        out.unlink(missing_ok=True)
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "FLASHHEAD_ENABLED": "always",
            "FLASHTUNE_VERIFY": verify,
        }
        command = [sys.executable, __file__, "serve", str(target), str(draft), str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:])
            return 1
        said = [line for line in done.stderr.splitlines() if "FlashHead " in line]
        said += [line for line in done.stdout.splitlines() if "FlashHead " in line]
        answers = any("FlashHead answers" in line for line in said)
        found = json.loads(out.read_text())
        expected = expected or found["tokens"]
        same = sum(one == other for one, other in zip(found["tokens"], expected, strict=True))
        right = same == len(PROMPTS) and answers == (name != "dense draft")
        good &= right
        print(
            f"{'ok  ' if right else 'FAIL'} {name}: {same} of {len(PROMPTS)} answers as with the "
            f"dense draft, {found['accepted']:.3f} of drafted tokens accepted, "
            f"{found['tokens_a_second']:.1f} tokens/s",
            flush=True,
        )
        if not right:
            print("\n".join(said))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
