"""Attention over packs on a GPU: each way's errors, and what sharing prompts saves beside packing alone.

`gpu_check.py` runs both parts. The second one times a step (forward and backward of body and head) of Qwen2.5-7B's
shape with random bf16 weights, 8 of its 28 layers, in packs with each prompt once and in packs with a copy of the
prompt per answer, which is what flash-attn packing gives elsewhere; both by the attention that is chosen for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast.batch import Group, PackedBatch, pack
from dpo_fast.kernels.prefix_attention import prefix_attention, prefix_attention_ref, prefix_layout
from dpo_fast.model import Policy, use_packed_attention

LAYERS = 8
# (prompt, answer): by how much shared packs are to be faster.
GOALS = {(512, 512): 1.22, (2048, 512): 1.5, (4096, 64): 1.75}
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


def check_attention() -> dict[str, Any]:
    """Relative errors of values and gradients in bf16 against the formula in fp64, by way and options."""
    batch = pack(random_groups(3, 90, 35, 100))
    layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index.cuda())
    generator = torch.Generator("cuda").manual_seed(0)
    table: dict[str, Any] = {}
    for way, can in CAN.items():
        if way in PACKAGES and not find_spec(PACKAGES[way]):
            table[way] = "not installed"
            continue
        for settings in can:
            inputs = [torch.randn(1, h, batch.num_tokens, 64, device="cuda", generator=generator) for h in (8, 2, 2)]
            names = ["out", "dQ", "dK", "dV"]
            if "sinks" in settings:
                inputs.append(torch.linspace(-1, 2, 8, device="cuda"))
                names.append("dsinks")
            found = []
            for function, dtype, options in (
                (prefix_attention_ref, torch.float64, {}),
                (prefix_attention, torch.bfloat16, {"way": way}),
            ):
                leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
                sinks = {"sinks": leaves[3]} if "sinks" in settings else {}
                out: Any = function(*leaves[:3], layout, scale=0.125, **settings | sinks, **options)
                weights = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
                found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
            want, got = found
            errors = {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(names, got, want, strict=True)}
            table[f"{way} {settings}"] = errors
            assert max(errors.values()) < 2e-2, f"{way} {settings} is wrong: {errors}"
    return table


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
    # The head reads answers alone: the rows before their tokens.
    rows = np.concatenate([np.arange(e - a - 1, e - 1) for e, (_, a) in zip(ends, lengths, strict=True)])
    return replace(batch, hidden_index=torch.from_numpy(rows), targets=batch.input_ids[rows + 1])


def make_policy() -> Policy:
    """Qwen2.5-7B's shape with fewer layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": LAYERS, "vocab_size": 152_064},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768},
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).bfloat16()
    use_packed_attention(model)
    return Policy(model, device=torch.device("cuda"), bf16=False, memory_budget=2**31)


def time_sharing(
    interleaved: Callable[[dict[str, Callable[[], Any]]], dict[str, float]],
    policy: Policy | None = None,
    pairs: int = 2,
) -> dict[str, Any]:
    """Milliseconds of a step with and without sharing, their ratio, and the ratio of tokens.

    Args:
        interleaved: `gpu_check.interleaved`.
        policy: None makes the one of `make_policy`.
        pairs: in a pack.
    """
    policy = policy or make_policy()
    out: dict[str, Any] = {}
    for (prompt, answer), goal in GOALS.items():
        groups = random_groups(pairs, prompt, answer, policy.model.config.vocab_size)
        batches = {"shared": pack(groups).to(policy.device), "unshared": unshared(groups).to(policy.device)}
        shared, copies = (policy.score(batch) for batch in batches.values())
        error = (shared - copies).abs().max().item()
        assert error < policy.noise, f"{prompt}/{answer}: the two differ by {error} nats, no speed"

        def step(batch: PackedBatch) -> Tensor:
            policy.model.zero_grad()
            loss = policy.token_logps(batch).sum()
            loss.backward()
            return loss

        ms = interleaved({name: lambda batch=batch: step(batch) for name, batch in batches.items()})
        out[f"{prompt}/{answer}"] = {
            "ms": ms,
            "faster": ms["unshared"] / ms["shared"],
            "fewer tokens": batches["unshared"].num_tokens / batches["shared"].num_tokens,
            "goal": goal,
        }
    return out
