"""Answers of vLLM's OpenAI server: python over_http.py MODEL; its last line is JSON.

As in_process.py, asked with the `openai` client.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from in_process import PROMPTS
from openai import OpenAI

START_SECONDS = 600
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@contextmanager
def server(model: str) -> Iterator[str]:
    """A server that answers, by its address; ended when done with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "model", "--enforce-eager", "--max-model-len", "256"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--port", str(port)]
    command += ["--host", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        end = time.monotonic() + START_SECONDS
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server of {model} did not start: see above")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def cases(client: OpenAI) -> Iterator[tuple[str, list[Any], bool]]:
    """Each case's name, what was said, and whether the dense head has to say it."""

    def complete(prompt: Any, **settings: Any) -> list[Any]:
        reply = client.completions.create(
            model="model", prompt=prompt, **{"temperature": 0, "max_tokens": 10, **settings}
        )
        return [
            [choice.text, choice.logprobs and choice.logprobs.top_logprobs]
            for choice in sorted(reply.choices, key=lambda choice: choice.index)
        ]

    def chat(**settings: Any) -> list[Any]:
        message = {"role": "user", "content": "Name a colour and how many apples have it."}
        reply = client.chat.completions.create(
            model="model",
            messages=[message],  # type: ignore[list-item]
            **{"temperature": 0, "max_tokens": 30, **settings},
        )
        return [choice.message.content for choice in reply.choices]

    yield "greedy", complete(PROMPTS[0]), False
    yield "greedy, batch of 8", complete(PROMPTS), False
    yield "temperature with a seed", complete(PROMPTS[1], temperature=0.8, seed=7), False
    yield "top-p with a seed", complete(PROMPTS[1], temperature=1, top_p=0.9, seed=7), False
    penalties = {"presence_penalty": 0.6, "frequency_penalty": 0.6}
    # Long enough that one cluster, and those that a kernel may probe besides, can't give it all
    yield "penalties", complete(PROMPTS[2], max_tokens=30, **penalties), False
    yield "chat", chat(), False
    yield "logprobs", rounded(complete(PROMPTS[3], logprobs=3)), True
    yield "echoed prompt's logprobs", rounded(complete(PROMPTS[3], logprobs=2, echo=True)), True
    yield "lifted token", complete(PROMPTS[0], logit_bias={"4321": 100}), True
    choice = {"structured_outputs": {"choice": ["elephant", "zebra"]}}
    yield "structured choice", complete(PROMPTS[5], extra_body=choice), True
    schema = {"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS}}
    said = chat(response_format=schema)
    assert json.loads(said[0])["colour"] in COLOURS["properties"]["colour"]["enum"]  # type: ignore[index]
    yield "JSON schema", said, True


def rounded(said: list[Any]) -> list[Any]:
    """The same with logprobs as far as they are steady from run to run."""
    return [
        [text, [place and {t: round(p, 3) for t, p in place.items()} for place in logprobs]]
        for text, logprobs in said
    ]


def main() -> None:
    with server(sys.argv[1]) as address:
        client = OpenAI(base_url=address, api_key="none", timeout=300)
        found = {
            name: {"said": said, "tokens": [], "dense": dense, "differs": not dense}
            for name, said, dense in cases(client)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
