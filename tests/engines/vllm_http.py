"""Tokens over HTTP of vLLM's OpenAI-compatible server, with its own cache and with pages: what `vllm_cpu.sh` runs.

    python tests/engines/vllm_http.py --model FOLDER

Two servers, one after the other, get the same rounds of requests, those of a round all at once: long and short prompts,
prefixes in common, chats, streams, and clients that hang up. Tokens of those that don't are compared; exits 0 if all are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = tuple(topics[name][:size] for name, size in (("with", 700), ("exceptions", 1000), ("lambda", 400), ("try", 2000)))
"""Text that prompts have in common, of about 100 to 500 tokens: the documentation in Python's standard library."""
QUESTIONS = (
    "In short: ",
    "What is said above is that ",
    "An example in Python:\n\n",
    "This matters, because ",
    "A better text: ",
)
SHORT = "The capital of France is", "1, 2, 3, 4,", "def main():", "Once upon a time"
CHATS = "What is a hash table?", "Name three rivers of Europe."
COUNTED = {
    "prompt tokens": "vllm:prompt_tokens_total",
    "of the prefix cache": "vllm:prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
    "tokens generated": "vllm:generation_tokens_total",
}
"""What vLLM counts."""


@dataclass(frozen=True)
class Request:
    """What a client sends, and when it hangs up."""

    name: str
    text: str
    chat: bool = False
    stream: bool = False
    hangs_up: int | None = None
    """After so many events of a stream; 0: a moment after it has sent the request."""

    def body(self, new_tokens: int) -> dict[str, Any]:
        """Return the request as JSON: greedy, with the ids of tokens and the two best at each."""
        options: dict[str, Any] = {"model": "model", "temperature": 0, "max_tokens": new_tokens, "return_token_ids": True}
        options |= {"stream": self.stream, "ignore_eos": True}
        if self.chat:
            return options | {"messages": [{"role": "user", "content": self.text}], "logprobs": True, "top_logprobs": 2}
        return options | {"prompt": self.text, "logprobs": 2}


@dataclass
class Answer:
    """What a client got."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    best: list[list[float]] = field(default_factory=list)
    """The two largest log-probabilities at each token."""

    def take(self, data: dict[str, Any]) -> None:
        """Add an event of a stream, or a whole answer."""
        for choice in data.get("choices", ()):
            message = choice.get("delta") or choice.get("message") or choice
            self.text += message.get("text") or message.get("content") or ""
            self.tokens += choice.get("token_ids") or []
            found = choice.get("logprobs") or {}
            two = [list(each.values()) for each in found.get("top_logprobs") or ()]
            two += [[one["logprob"] for one in each["top_logprobs"]] for each in found.get("content") or ()]
            self.best += [sorted(each, reverse=True)[:2] for each in two]


def rounds() -> list[list[Request]]:
    """Return what is sent at once, again and again: all prompts twice, then other questions about the same documents."""
    shuffled = random.Random(0)
    first = [
        Request(f"document {i}, question {j}", document + "\n\n" + question, stream=(i + j) % 2 == 0)
        for i, document in enumerate(DOCUMENTS)
        for j, question in enumerate(QUESTIONS[:3])
    ]
    first += [Request(f"short {i}", text, stream=i % 2 == 0) for i, text in enumerate(SHORT)]
    first += [Request(f"chat {i}", text, chat=True, stream=i % 2 == 0) for i, text in enumerate(CHATS)]
    first += [
        Request(f"hangs up {i}", DOCUMENTS[i % 4] + "\n\n" + QUESTIONS[3], stream=True, hangs_up=after)
        for i, after in enumerate((1, 5, 10, 0))
    ]
    first += [Request("hangs up 4", SHORT[0], hangs_up=0), Request("hangs up 5", CHATS[0], True, True, 3)]
    last = [
        Request(f"document {i}, question {j}", document + "\n\n" + QUESTIONS[j], stream=j == 3, hangs_up=None)
        for i, document in enumerate(DOCUMENTS)
        for j in (3, 4)
    ]
    last += [Request("hangs up 6", DOCUMENTS[3] + "\n\n" + QUESTIONS[4], stream=True, hangs_up=7)]
    return [first, shuffled.sample(first, len(first)), shuffled.sample(last, len(last))]


def send(request: Request, port: int, new_tokens: int) -> Answer:
    """Send a request and read the answer, or hang up."""
    answer = Answer()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        connection.request("POST", path, json.dumps(request.body(new_tokens)), {"Content-Type": "application/json"})
        if request.hangs_up == 0:
            time.sleep(0.5)
            return answer
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{request.name}: {response.status} {response.read().decode()[:300]}")
        if not request.stream:
            answer.take(json.loads(response.read()))
            return answer
        events = 0
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                answer.take(json.loads(data))
                events += 1
            if events == request.hangs_up:
                break
    return answer


def get(port: int, path: str) -> str | None:
    """Return what a server answers; None if it doesn't."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read().decode()
        except OSError:
            return None
    return text if response.status == 200 else None


@contextlib.contextmanager
def serving(args: argparse.Namespace, options: list[str], log: Path) -> Iterator[int]:
    """Start a server in a process group of its own and give its port; at the end that group is ended, and nothing else.

    It is what `vllm serve` runs. That command itself ends, because the wheel for CPUs isn't named `vllm`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model, "--served-model-name", "model",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--enable-prefix-caching",
        "--max-model-len", "640", "--max-num-seqs", "6", "--max-num-batched-tokens", "256", "--block-size", "64",
        "--kv-cache-memory-bytes", str(1 << 28), *options,
    ]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        deadline = time.time() + 600
        while get(port, "/health") is None:
            if process.poll() is not None or time.time() > deadline:
                raise RuntimeError(f"the server didn't start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def counted(port: int) -> dict[str, float]:
    """Return what a server counted."""
    lines = (get(port, "/metrics") or "").splitlines()
    return {
        word: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)) for word, name in COUNTED.items()
    }


def ask(args: argparse.Namespace, blocks: int, options: list[str]) -> tuple[list[list[Answer]], str]:
    """Start a server, send it all rounds; return the answers, and a line of what it counted."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with serving(args, [f"--num-gpu-blocks-override={blocks}", *options], log) as port:
            begin = time.time()
            answers = []
            for each in rounds():
                pool = ThreadPoolExecutor(len(each))
                try:
                    answers.append(list(pool.map(lambda request: send(request, port, args.new_tokens), each)))
                finally:  # after a failure the server ends first, and with it what is waited for
                    pool.shutdown(wait=False, cancel_futures=True)
            seconds = time.time() - begin
            time.sleep(2)  # the last client to hang up is noticed
            words = [f"{value:.0f} {name}" for name, value in counted(port).items()]
        cache = [line.partition("kvarn_triton: ")[2] for line in log.read_text().splitlines() if "kvarn_triton: " in line]
    return answers, f"{', '.join(words)}; {seconds:.0f} s" + "".join(f"\n    {line}" for line in cache)


def heading(args: argparse.Namespace) -> str:
    """Return what was measured, at which commit, and how."""
    names = "vllm-cpu", "torch", "triton", "transformers"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return (
        f"GPU: none, a CPU; {versions}\nCommit: {commit or 'unknown'}{'+changes' if changes else ''}\n"
        f"Command: tests/engines/vllm_cpu.sh FOLDER\n\n"
        f"vLLM's OpenAI-compatible server, SmolLM2-135M-Instruct in float32, {args.layout} beside its own cache, both with\n"
        f"prefix caching: 6 requests at a time, steps of 256 tokens, blocks of 64, {args.new_tokens} new tokens each.\n"
    )


def compare(request: Request, own: Answer, ours: Answer, new_tokens: int) -> str | None:
    """Return how two answers differ; None if both are whole and the same."""
    if len(own.tokens) != new_tokens:
        return f"{request.name}: {len(own.tokens)} tokens"
    if (own.tokens, own.text) == (ours.tokens, ours.text):
        return None
    pairs = enumerate(zip(own.tokens, ours.tokens, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(own.tokens), len(ours.tokens)))
    gaps = [f"{best[at][0] - best[at][1]:.4f}" if at < len(best) else "unknown" for best in (own.best, ours.best)]
    return f"{request.name} differs from token {at} on; the two best logits are {gaps[0]} apart there, in pages {gaps[1]}"


def both(args: argparse.Namespace, blocks: int) -> int:
    """Ask a server with its own cache and one with pages; return how many requests differ."""
    plugin = ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"kvarn_layout": args.layout})]
    own, line = ask(args, blocks, [])
    print(f"{blocks} blocks, own cache: {line}", flush=True)
    ours, line = ask(args, blocks, plugin)
    print(f"{blocks} blocks, pages: {line}", flush=True)
    different = 0
    for number, (requests, mine, other) in enumerate(zip(rounds(), own, ours, strict=True)):
        kept = [each for each in zip(requests, mine, other, strict=True) if each[0].hangs_up is None]
        found = [text for each in kept if (text := compare(*each, args.new_tokens))]
        different += len(found)
        tokens = sum(a == b for _, one, two in kept for a, b in zip(one.tokens, two.tokens, strict=False))
        total = sum(len(one.tokens) for _, one, _ in kept)
        equal = f"{len(kept) - len(found)} of {len(kept)} requests and {tokens} of {total} tokens are equal"
        print(f"    round {number + 1}: {equal}, {len(requests) - len(kept)} clients hung up", flush=True)
        for text in found:
            print(f"        {text}", flush=True)
    return different


def main() -> int:
    """Ask both servers and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face's format")
    parser.add_argument("--layout", default="k8v8_g64")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--blocks", type=int, nargs="+", default=[40, 14], help="of each pair of servers; few are preempted")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(heading(args), flush=True)
    different = sum(both(args, blocks) for blocks in args.blocks)
    print("all are equal" if not different else f"{different} requests differ")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
