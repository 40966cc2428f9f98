"""Speculative decoding in a real vLLM: FlashHead as the head of the draft, and of the target.

    python speculative.py [--runner v1|v2] [--method M] [--jobs N] PLAIN FLASH EAGLE MTP WORK

PLAIN is a model folder, FLASH the FlashHead model made of it, EAGLE a draft for it without a head
of its own (linear_eagle.py), MTP a FlashHead model that predicts several tokens (tiny_mtp.py).
First the model drafts for itself, so that each drafted token is right unless the draft's head
misses it, then EAGLE drafts, then MTP for itself:
- dense draft, dense target: what the others are held against
- FlashHead draft: the same answers, whatever it misses
- FlashHead draft of one probe: likewise, with fewer drafted tokens accepted
- EAGLE, MTP with FlashHead: likewise; with all clusters probed, as many accepted as when dense
- FlashHead target with all clusters probed (FLASHTUNE_VERIFY=1, V2 runner): the same answers
Each is an engine in a process of its own. Exits with 1 where an answer is not what it must be.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare import engines, probing

from flashtune.kernels.model_folder.folder import ModelFolder

N_TOKENS, N_DRAFTED = 48, 3
PROMPTS = [
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "Name three colours.",
    "Explain what a compiler does.",
]
TOKENS = [3 + 1009 * number for number in range(16)]  # whose successors MTP knows
FIRST = 7  # of MTP's prompts: it gets no embedding of a text's first token


@dataclass(frozen=True)
class Pair:
    """What decodes and what drafts for it; `enabled`, `verify`: FlashHead at all, as target."""

    target: Path
    draft: Path
    method: str
    runner: str = "v1"
    enabled: bool = True
    verify: bool = False


def serve(target: str, draft: str, method: str, out: str) -> None:
    """Answer all prompts with one engine, greedily."""
    import model_runner  # before vLLM
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=target,
        dtype="bfloat16",
        enforce_eager=not model_runner.GPU,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
        speculative_config={
            "method": method,
            "model": draft,
            "num_speculative_tokens": N_DRAFTED,
        },
    )
    chats: Any = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ask = llm.chat
    if method == "mtp":
        chats, ask = [{"prompt_token_ids": [FIRST, token]} for token in TOKENS], llm.generate
    sampling = SamplingParams(temperature=0.0, max_tokens=N_TOKENS)
    ask(chats[:1], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    start = time.perf_counter()
    answers = ask(chats, sampling, use_tqdm=False)
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


def used(said: list[str]) -> tuple[bool, bool]:
    """Whether FlashHead answered for the target, and for the draft, to the end."""
    text = "\n".join(said)
    both = "FlashHead answers for target and draft" in text
    target = "FlashHead answers for" in text and "FlashHead is off, the dense" not in text
    draft = both or "FlashHead drafts for" in text
    return target, draft and "FlashHead is off for the draft" not in text


def run(pair: Pair, out: Path) -> list[str]:
    """Serve one pair in a process of its own, which writes what it found; what it said."""
    out.unlink(missing_ok=True)
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "FLASHHEAD_ENABLED": "always" if pair.enabled else "0",
        "FLASHTUNE_VERIFY": str(int(pair.verify)),
        "SERVING_RUNNER": pair.runner,
    }
    command = [sys.executable, __file__, "serve", pair.target, pair.draft, pair.method, out]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    printed = (done.stderr + done.stdout).splitlines()
    return [line for line in printed if "FlashHead " in line]


def main() -> int:
    """Serve each pair, and hold the answers against those of the dense one."""
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description="FlashHead in speculative decoding.")
    parser.add_argument("--runner", choices=("v1", "v2"), help="only pairs with this one")
    parser.add_argument(
        "--method", choices=("draft_model", "eagle", "mtp"), help="only pairs that draft so"
    )
    parser.add_argument("--jobs", type=int, default=1, help="engines that run at a time")
    for name in ("plain", "flash", "eagle", "mtp", "work"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    plain, flash, eagle, mtp = given.plain, given.flash, given.eagle, given.mtp
    every, one, mtp_every, mtp_one = (
        probing(folder, given.work, f"{folder.name}-{n_probes}", n_probes)
        for folder in (flash, mtp)
        for n_probes in (ModelFolder.open(folder).problem().n_clusters, 1)
    )
    verifying = Pair(flash, eagle, "eagle", "v2", verify=True)
    pairs = {
        "dense draft": Pair(plain, plain, "draft_model"),
        "FlashHead draft": Pair(plain, flash, "draft_model"),
        "FlashHead draft, 1 probe": Pair(plain, one, "draft_model"),
        "dense draft, V2": Pair(plain, plain, "draft_model", "v2"),
        "FlashHead draft, V2": Pair(plain, flash, "draft_model", "v2"),
        "dense EAGLE": Pair(plain, eagle, "eagle"),
        "FlashHead EAGLE": Pair(flash, eagle, "eagle"),
        "FlashHead EAGLE, 1 probe": Pair(one, eagle, "eagle"),
        "FlashHead EAGLE, all probed": Pair(every, eagle, "eagle"),
        "dense EAGLE, V2": Pair(plain, eagle, "eagle", "v2"),
        "FlashHead EAGLE, V2": Pair(flash, eagle, "eagle", "v2"),
        "FlashHead EAGLE, all probed, V2": Pair(every, eagle, "eagle", "v2"),
        "FlashHead EAGLE and target, all probed, V2": replace(verifying, target=every),
        "FlashHead EAGLE and target, V2": verifying,
        "dense MTP": Pair(mtp, mtp, "mtp", enabled=False),
        "FlashHead MTP": Pair(mtp, mtp, "mtp"),
        "FlashHead MTP, 1 probe": Pair(mtp_one, mtp_one, "mtp"),
        "FlashHead MTP, all probed": Pair(mtp_every, mtp_every, "mtp"),
        "dense MTP, V2": Pair(mtp, mtp, "mtp", "v2", enabled=False),
        "FlashHead MTP, all probed, V2": Pair(mtp_every, mtp_every, "mtp", "v2"),
    }
    pairs = {
        name: pair
        for name, pair in pairs.items()
        if given.runner in (None, pair.runner) and given.method in (None, pair.method)
    }
    outs = {name: given.work / f"speculative-{number}.json" for number, name in enumerate(pairs)}
    with engines(given.jobs) as pool:
        running = {name: pool.submit(run, pair, outs[name]) for name, pair in pairs.items()}
        good, expected, accepted = True, {}, {}
        for name, pair in pairs.items():
            said = running[name].result()
            found = json.loads(outs[name].read_text())
            accepted[name] = found["accepted"]
            mine, its = found["tokens"], expected.setdefault(pair.method == "mtp", found["tokens"])
            same = sum(one == other for one, other in zip(mine, its, strict=True))
            right = used(said) == (pair.verify, name.startswith("FlashHead"))
            if not pair.verify or "all probed" in name:
                right &= same == len(its)
            if pair.method != "draft_model" and "all probed" in name:
                other = f"dense {pair.method.upper()}{', V2' if pair.runner == 'v2' else ''}"
                right &= accepted[name] == accepted[other]
            if "1 probe" in name:
                right &= accepted[name] < accepted[name.removesuffix(", 1 probe")]
            good &= right
            print(
                f"{'ok  ' if right else 'FAIL'} {name}: {same} of {len(its)} answers as with the "
                f"dense draft, {found['accepted']:.3f} of drafted tokens accepted, "
                f"{found['tokens_a_second']:.1f} tokens/s",
                flush=True,
            )
            if not right:
                print("\n".join(said))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
