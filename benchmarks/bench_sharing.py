"""What shared prompts and no padding save on real rows, in tokens and in seconds of the decoder body.

    python benchmarks/bench_sharing.py --model FOLDER --data rows.jsonl --out benchmarks/results/NAME.json

Each batch of pairs runs forward and backward through the same model in three layouts, in turns: padded (two sequences
per pair, padded to the longest in the batch, as a plain DPO trainer does), separate (each answer with its own copy of
the prompt, no padding) and shared (packs). The head is left out, since it costs the same in all three. The layouts'
hidden states of answer tokens must agree. Reported are tokens and seconds over all batches, and their ratios to padded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor

from dpo_fast.config import DPOConfig
from dpo_fast.data.load import load_groups
from dpo_fast.model.attention import use_own_attention, use_packed_attention
from dpo_fast.model.load import load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import PackedBatch, pack

TOLERANCE = 2e-3


def sequences(batch: PackedBatch) -> list[tuple[Tensor, int]]:
    """(prompt + answer ids, number of targets) of each answer."""
    bounds, lengths = batch.cu_seqlens_k.tolist(), batch.answer_lengths.tolist()
    keys = [batch.kv_index[bounds[m] : bounds[m + 1]] for m in batch.answer_segments]
    return [(batch.input_ids[rows], n) for rows, n in zip(keys, lengths, strict=True)]


def padded_rows(policy: Policy, batch: PackedBatch) -> Tensor:
    """(N, D) hidden states before the targets, from one right-padded batch."""
    parts = sequences(batch)
    width = max(len(ids) for ids, _ in parts)
    ids = torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x, _ in parts])
    attention = torch.stack([torch.arange(width) < len(x) for x, _ in parts]).long()
    hidden = policy.model.get_decoder()(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    return torch.cat([row[len(x) - 1 - n : len(x) - 1] for row, (x, n) in zip(hidden, parts, strict=True)])


def layouts(policy: Policy, batch: PackedBatch) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """For each layout, the number of tokens and the function that computes them."""
    lengths = [len(ids) for ids, _ in sequences(batch)]
    return {
        "padded": (max(lengths) * len(lengths), lambda: padded_rows(policy, batch)),
        "separate": (sum(lengths), lambda: policy._decode_answers(batch).rows),
        "shared": (batch.num_tokens, lambda: policy._decode_packed(batch).rows),
    }


def measure(policy: Policy, batches: list[PackedBatch], rounds: int) -> dict[str, Any]:
    """Tokens and best time of each layout, summed over the batches."""
    totals: dict[str, dict[str, float]] = {}
    for batch in batches:
        found = layouts(policy, batch)
        seconds: dict[str, list[float]] = {name: [] for name in found}
        rows: dict[str, Tensor] = {}
        for _ in range(rounds):
            for name, (_, run) in found.items():
                (use_packed_attention if name == "shared" else use_own_attention)(policy.model)
                start = time.perf_counter()
                out = run()
                out.sum().backward()
                seconds[name].append(time.perf_counter() - start)
                rows[name] = out.detach()
                policy.model.zero_grad()
        for name, out in rows.items():
            error = (out - rows["padded"]).abs().max().item() / rows["padded"].abs().max().item()
            assert error < TOLERANCE, f"{name} is wrong, no speed: relative error {error}"
            total = totals.setdefault(name, {"tokens": 0, "seconds": 0.0})
            total["tokens"] += found[name][0]
            total["seconds"] += min(seconds[name])
        print(
            f"{len(batch.pair_rows)} pairs: " + ", ".join(f"{k} {min(v):.2f} s" for k, v in seconds.items()), flush=True
        )
    for name in totals:
        totals[name]["padded tokens / tokens"] = totals["padded"]["tokens"] / totals[name]["tokens"]
        totals[name]["padded seconds / seconds"] = totals["padded"]["seconds"] / totals[name]["seconds"]
    return totals


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder; benchmarks/smollm2.py creates one")
    parser.add_argument("--data", required=True, help="preference rows")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=4, help="pairs per batch")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a JSON file here")
    args = parser.parse_args()
    config = DPOConfig(model=args.model, data=args.data, max_length=args.max_length, device="cpu")
    groups, report = load_groups(config, load_tokenizer(args.model))
    policy = Policy.load(config)
    starts = range(0, args.pairs * args.batches, args.pairs)
    results = measure(policy, [pack(groups[i : i + args.pairs]) for i in starts], args.rounds)
    print(json.dumps(results, indent=1))
    if args.out:
        record = {
            "environment": environment(("dpo-fast", "torch", "transformers")),
            "settings": {name: getattr(args, name) for name in ("max_length", "pairs", "batches", "rounds")},
            "whole file": {key: value for key, value in report.to_dict().items() if key.startswith("tokens")},
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
