"""Attention over packs on a GPU, as parts of gpu_check.py: errors of each backend, and what shared prompts save.

Sharing is timed on a step (forward and backward of body and head) of Qwen2.5-7B's shape with random bf16 weights and 8
of its 28 layers. Packs with each prompt once are compared with packs that have a copy of the prompt per answer, which
is what flash-attn packing gives elsewhere; both use the attention backend chosen for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from gpu_timing import DEVICE, interleaved, relative
from torch import Tensor

from dpo_fast.kernels.prefix_attention import PrefixLayout, prefix_attention, prefix_attention_ref, prefix_layout
from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group, PackedBatch, pack

LAYERS = 8
PACKAGES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface"}
PLAIN, WINDOW, CAP, SINKS = {}, {"window": 40}, {"softcap": 2.0}, {"window": 40, "sinks": True}
CAN = {
    "segments": (PLAIN, WINDOW, CAP, SINKS),
    "flex": (PLAIN, WINDOW, CAP, SINKS),
    "varlen": (PLAIN, WINDOW),
    "flash_attn": (PLAIN, WINDOW, CAP),
    "flash_attn_3": (PLAIN, WINDOW, CAP),
}


def random_groups(num: int, prompt: int, answer: int, vocab: int) -> list[Group]:
    """Pairs of random tokens."""
    rng = np.random.default_rng(prompt + answer)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocab, length).astype(np.int32)

    return [Group(i, ids(prompt), (ids(answer), ids(answer))) for i in range(num)]


def check_attention(ways: list[str] | None = None) -> dict[str, Any]:
    """Relative errors of values and gradients in bf16 against the fp64 formula, by backend and options.

    Also checks that two backwards are bit-identical. If a backend fails or is wrong, the others are still checked.
    """
    batch = pack(random_groups(3, 90, 35, 100))
    layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index.to(DEVICE))
    table: dict[str, Any] = {}
    failed = []
    for way in ways or CAN:
        if way in PACKAGES and not find_spec(PACKAGES[way]):
            table[way] = "not installed"
            continue
        for settings in CAN[way] if DEVICE.type == "cuda" or way == "segments" else ():
            name = f"{way} {settings}"
            try:
                table[name] = errors = attention_errors(way, settings, batch.num_tokens, layout)
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
                continue
            if not errors.pop("same bits"):
                failed.append(f"{name}: two runs differ")
            if not max(errors.values()) < 2e-2:
                failed.append(f"{name}: {errors}")
    return {"errors": table, "failed": failed}


def attention_errors(way: str, settings: dict[str, Any], num_tokens: int, layout: PrefixLayout) -> dict[str, Any]:
    """Relative errors of one backend with one set of options."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = [torch.randn(1, h, num_tokens, 64, device=DEVICE, generator=generator) for h in (8, 2, 2)]
    names = ["out", "dQ", "dK", "dV"]
    if "sinks" in settings:
        inputs.append(torch.linspace(-1, 2, 8, device=DEVICE))
        names.append("dsinks")

    def run(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        sinks = {"sinks": leaves[3]} if "sinks" in settings else {}
        out = function(*leaves[:3], layout, scale=0.125, **settings | sinks, **options)
        weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]

    want = run(prefix_attention_ref, torch.float64)
    got, again = (run(prefix_attention, torch.bfloat16, backend=way) for _ in range(2))
    errors = {name: relative(a, b) for name, a, b in zip(names, got, want, strict=True)}
    return {**errors, "same bits": all(map(torch.equal, got, again))}


def unshared(groups: list[Group]) -> PackedBatch:
    """A pack in which each answer follows its own copy of the prompt, one causal segment each."""
    lengths = [(len(group.prompt_ids), len(answer)) for group in groups for answer in group.answers]
    none = np.zeros(0, dtype=np.int32)
    whole = [
        Group(group.row, none, tuple(np.concatenate([group.prompt_ids, answer]) for answer in group.answers))
        for group in groups
    ]
    batch = pack(whole)
    ends = np.cumsum([prompt + answer for prompt, answer in lengths])
    # The head only reads the rows that predict answer tokens.
    rows = np.concatenate([np.arange(e - a - 1, e - 1) for e, (_, a) in zip(ends, lengths, strict=True)])
    return replace(batch, hidden_index=torch.from_numpy(rows), targets=batch.input_ids[rows + 1])


def make_policy(**sizes: int) -> Policy:
    """Qwen2.5-7B's shape with fewer layers; `sizes` overrides entries of the configuration."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": LAYERS, "vocab_size": 152_064}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768}
        | sizes
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config).bfloat16()
    use_packed_attention(model)
    return Policy(model, device=DEVICE, bf16=False, memory_budget=2**31)


def time_sharing(
    sizes: dict[str, int], lengths: list[tuple[int, int]], pairs: int = 2, rounds: int = 12
) -> dict[str, Any]:
    """Milliseconds of a step with and without sharing, their ratio, and the ratio of tokens.

    Args:
        sizes: overrides of the model's sizes, see `make_policy`.
        lengths: (prompt, answer) tokens.
        pairs: pairs per pack.
        rounds: timed rounds.
    """
    policy = make_policy(**sizes)
    out: dict[str, Any] = {"failed": []}
    for prompt, answer in lengths:
        groups = random_groups(pairs, prompt, answer, policy.model.config.vocab_size)
        batches = {"shared": pack(groups).to(policy.device), "unshared": unshared(groups).to(policy.device)}
        shared, copies = (policy.score(batch) for batch in batches.values())
        error = (shared - copies).abs().max().item()
        if not error < policy.noise:
            out["failed"].append(f"{prompt}/{answer}: the two differ by {error} nats, so no speed is reported")
            continue

        def step(batch: PackedBatch) -> Tensor:
            policy.model.zero_grad()
            loss = policy.token_logps(batch).sum()
            loss.backward()
            return loss

        ms = interleaved({name: lambda batch=batch: step(batch) for name, batch in batches.items()}, rounds)
        out[f"{prompt}/{answer}"] = {
            "ms": ms,
            "faster": ms["unshared"] / ms["shared"],
            "fewer tokens": batches["unshared"].num_tokens / batches["shared"].num_tokens,
        }
    return out


def time_determinism(sizes: dict[str, int], prompt: int, answer: int, pairs: int, rounds: int = 12) -> dict[str, Any]:
    """Milliseconds of a step whose attention sums in a fixed order, and of one that uses any order."""
    policy = make_policy(**sizes)
    batch = pack(random_groups(pairs, prompt, answer, policy.model.config.vocab_size)).to(policy.device)

    def step(fixed: bool) -> list[Tensor]:
        policy.model.zero_grad()
        replace(policy, deterministic_attention=fixed).token_logps(batch).sum().backward()
        return [x.grad for x in policy.model.parameters()]

    runs = {fixed: [[x.clone() for x in step(fixed)] for _ in range(2)] for fixed in (True, False)}
    same = {fixed: all(map(torch.equal, *two)) for fixed, two in runs.items()}
    del runs
    ms = interleaved({"fixed order": lambda: step(True), "any order": lambda: step(False)}, rounds)
    return {
        "ms": ms,
        "same bits in a fixed order": same[True],
        "same bits in any order": same[False],
        "failed": [] if same[True] else ["two runs in a fixed order differ"],
    }
