#!/usr/bin/env bash
# vLLM's OpenAI-compatible server on a CPU, with its own cache and then with the plug-in, asked over HTTP; exits 0 if both gave
# the same tokens:
#
#     tests/engines/vllm_cpu.sh [FOLDER] > perf/results/vllm_http_cpu.txt
#
# FOLDER keeps the environment (4 GB) and the model for the next time; without it both are temporary. The server listens on
# loopback, and only what this script started is ended.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/vllm_environment.sh"

run "$python" "$here/vllm_http.py" --model "$folder/model"
