"""A vLLM server on the CPU: an environment of its own (constraints-vllm.txt), and a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / os.environ.get("VENV_VLLM", ".venv-vllm") / "bin" / "python"
START_SECONDS = 300
"""Longest wait for a server; alone on two cores it takes 40 s, most of it imports."""
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned to a core, it would wait there for whatever else runs on it
    "VLLM_NO_USAGE_STATS": "1",
}
_OF_THIS_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy stands before this machine


@dataclass(frozen=True)
class Completion:
    """Answer to one prompt."""

    token: list[int]
    logprob: list[float]
    """At temperature 1, over the full vocabulary, whatever the temperature was."""
    finished: bool
    """True where a stop token ended it."""


@dataclass(frozen=True)
class Server:
    """Server that answers at this address."""

    url: str

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """Post JSON to a route and read the JSON that comes back; AssertionError with the server's words if none."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            with _open(urllib.request.Request(self.url + route, data, headers), timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{route}: {error.code} {error.read().decode(errors='replace')}") from error

    def greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Completion]:
        """Continue each prompt, given and answered as token ids, with the likeliest token each time."""
        body = {"prompt": [list(prompt) for prompt in prompts], "max_tokens": max_tokens, "temperature": 0}
        choices = self.post("/v1/completions", {**body, "logprobs": 0, "return_token_ids": True})["choices"]
        return [
            Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop")
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]


@contextmanager
def serve(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """Serve a model folder until the block ends; whatever fails inside carries the end of the server's log.

    options: further arguments of vLLM's command line.
    """
    port = _free_port()
    # `vllm serve` would ask for the metadata of a distribution `vllm`, and this one is called `vllm-cpu`.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32",
               "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THIS_PYTHON} | _ENVIRONMENT
    with log.open("w") as file:
        # A session of its own: the engine is a child of the server, and both are to end.
        process = subprocess.Popen(
            [*command, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        _wait(server, process)
        yield server
    except BaseException as error:
        lines = [line for line in log.read_text(errors="replace").splitlines() if " Route: " not in line]
        error.add_note("\n".join(["end of the server's log:", *lines[-60:]]))
        raise
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server is healthy; AssertionError when it ends before, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"vLLM ended with status {process.returncode} before it answered"
        try:
            _open(f"{server.url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"vLLM did not answer within {START_SECONDS} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and its engine: asked first, then killed."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the engine, should it outlive the server
    except ProcessLookupError:
        pass
    process.wait()
