"""Serve a FlashHead model with vLLM, and ask it through the OpenAI client.

pip install vllm openai, flashtune beside them; then:
python examples/vllm_openai.py path/to/flash-head-model
"""

import subprocess
import sys
import time

import openai

PORT = 8123


def main(model: str) -> None:
    """Start the server, wait for it, ask once, and stop it."""
    # vLLM finds flashtune's plugin by itself: no other option is needed.
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    server = subprocess.Popen([*serve, "--model", model, "--port", str(PORT)])
    client = openai.OpenAI(base_url=f"http://localhost:{PORT}/v1", api_key="none")
    try:
        while server.poll() is None:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:  # still loading
                time.sleep(2)
        else:
            sys.exit("the server ended before it answered: see its log above")
        answer = client.completions.create(model=model, prompt="The moon is", max_tokens=32)
        print(answer.choices[0].text)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1])
