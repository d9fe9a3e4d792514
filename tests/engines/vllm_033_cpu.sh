#!/usr/bin/env bash
# The Python of vLLM 0.33, of which there is no wheel for CPUs, over the compiled functions of 0.32: the plug-in against vLLM's own
# cache, with the cache dtype that 0.33 lets a plug-in register, and the tests of the contract:
#
#     tests/engines/vllm_033_cpu.sh [FOLDER] > perf/results/vllm_033_cpu.txt
#
# FOLDER is that of vllm_cpu.sh. The wheel (330 MB) is unpacked without what is compiled. It works as far as both releases call
# compiled functions alike.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/vllm_environment.sh"

release=0.33.0
if [[ ! -e $folder/vllm-$release ]]; then
    run "$python" -m pip download --quiet --no-deps --dest "$folder/wheel-$release" "vllm==$release" >&2
    rm -rf -- "$folder/unfinished"
    run "$python" "$here/vllm_overlay.py" "$folder/wheel-$release"/*.whl "$folder/unfinished" >&2
    mv -- "$folder/unfinished" "$folder/vllm-$release"
fi
export PYTHONPATH=$folder/vllm-$release VLLM_TARGET_DEVICE=cpu
cases=("prefix caching" "drafts, prefix caching, answers hit")
run "$python" "$here/../../perf/vllm_text.py" --model "$folder/model" --layout kvarn_k8v8_g64 --new-tokens 12 --jobs 4 \
    --command "tests/engines/vllm_033_cpu.sh FOLDER" --only "${cases[@]}"
printf '\npython -m pytest tests/test_vllm.py -k "contract or bytes":\n'
run "$python" -m pip install --quiet pytest >&2
run "$python" -m pytest -q -p no:cacheprovider "$here/../test_vllm.py" -k "contract or bytes" -W ignore | tail -n 1
