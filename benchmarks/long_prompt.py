"""A long prompt with two answers: one copy of the prompt fits into memory that two copies exceed.

    python benchmarks/long_prompt.py --out benchmarks/results/NAME.json

A small Llama with random weights runs forward and backward, body and head, with each layout in its own process: shared
(the prompt once) and copies (a copy per answer, one sequence after the other). Both first run without a limit to find
their peaks, then again with a memory limit halfway between the two peaks.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment

from dpo_fast.model.attention import use_own_attention, use_packed_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group, pack

GIB = 2**30


def run(layout: str, prompt: int, answer: int, layers: int, limit: int | None) -> dict[str, Any]:
    """One step in this process: tokens, sum of log-probs, and peak GiB on top of the initial memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": layers, "vocab_size": 8192},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2 * (prompt + answer)},
    )
    model = LlamaForCausalLM(config)
    (use_packed_attention if layout == "shared" else use_own_attention)(model)
    policy = Policy(model, torch.device("cpu"), memory_budget=GIB // 4, shares_prompts=layout == "shared")
    rng = np.random.default_rng(0)
    group = Group(
        0, *(rng.integers(2, 8192, prompt).astype(np.int32),), tuple(rng.integers(2, 8192, (2, answer), np.int32))
    )
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if limit:
        limit += data_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    total = policy.token_logps(pack([group])).sum()
    total.backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024 / GIB
    tokens = group.num_tokens if layout == "shared" else group.num_unshared_tokens
    return {"tokens": tokens, "sum of log-probs": total.item(), "peak GiB": peak}


def data_bytes() -> int:
    """Bytes that the limit counts: this process's private memory."""
    return int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024


def in_process(layout: str, arguments: list[str], limit: float | None = None) -> dict[str, Any]:
    """`run` in a separate process; `fits` says whether it finished."""
    command = [sys.executable, __file__, *arguments, "--layout", layout]
    command += ["--limit_gib", str(limit)] if limit else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        assert limit is not None, done.stderr
        return {"fits": False, "error": done.stderr.strip().splitlines()[-1][:200]}
    return {"fits": True} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=32_768)
    parser.add_argument("--answer", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write a JSON file here")
    parser.add_argument("--layout", choices=("shared", "copies"), help="run one layout in this process")
    parser.add_argument("--limit_gib", type=float, help="memory limit of this process, on top of its initial memory")
    args = parser.parse_args()
    if args.layout:
        limit = None if args.limit_gib is None else int(args.limit_gib * GIB)
        print(json.dumps(run(args.layout, args.prompt, args.answer, args.layers, limit)))
        return
    own = [f"--{name}={getattr(args, name)}" for name in ("prompt", "answer", "layers")]
    free = {layout: in_process(layout, own) for layout in ("shared", "copies")}
    a, b = (free[layout]["sum of log-probs"] for layout in free)
    assert abs(a - b) < 1e-4 * abs(a), f"the two differ: {free}"
    limit = sum(x["peak GiB"] for x in free.values()) / 2
    limited = {layout: in_process(layout, own, limit) for layout in free}
    record = {
        "environment": environment(("dpo-fast", "torch", "transformers")),
        "settings": {name: getattr(args, name) for name in ("prompt", "answer", "layers")},
        "free": free,
        "limit GiB": limit,
        "under the limit": limited,
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
