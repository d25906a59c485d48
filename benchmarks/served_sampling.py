"""Requests a second and peak memory of `dpo-fast sample --backend openai`, against a stub that answers after a while.

python benchmarks/served_sampling.py [--prompts 10000] [--milliseconds 50] [--concurrency 32]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from dpo_fast.config import SampleConfig
from dpo_fast.curate.sample import run_sample

STUB = Path(__file__).resolve().parent.parent / "tests" / "helpers" / "stub_server.py"


def main():
    """Start the stub, sample from it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--milliseconds", type=float, default=50)
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, port = Path(folder) / "prompts.jsonl", Path(folder) / "port"
        data.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(options.prompts)))
        with subprocess.Popen([sys.executable, str(STUB), str(port), str(options.milliseconds)]) as stub:
            while not (port.exists() and port.read_text()):
                time.sleep(0.01)
            url = f"http://127.0.0.1:{port.read_text()}/v1"
            config = SampleConfig(
                model="stub",
                backend="openai",
                base_url=url,
                data=str(data),
                out=f"{folder}/out.jsonl",
                num_samples=1,
                concurrency=options.concurrency,
            )
            start = time.perf_counter()
            run_sample(config, console=Console(quiet=True))
            seconds = time.perf_counter() - start
            stub.terminate()
    ideal = options.concurrency / options.milliseconds * 1000
    rate = options.prompts / seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"{options.prompts} prompts in {seconds:.2f} s: {rate:.0f} a second, {rate / ideal:.1%} of {ideal:.0f}")
    print(f"peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
