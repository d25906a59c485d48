"""How a model is trained, and what its packs hold: the two things besides its shape that memory and time depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dpo_fast.packs.layout import Group

# Rows and columns of a tile of scores in flash attention.
TILE = 128
Peft = Literal["none", "lora", "qlora"]
Policy = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class PackLoad:
    """What a pack holds; sums over its groups, which need not be whole numbers for a typical pack.

    Attributes:
        tokens: T.
        keys: K, rows of keys of all segments.
        targets: N, rows that reach the head.
        scores: attention scores computed, causal ones alone.
        masked: scores of answers that have a prompt, for which a CPU keeps a mask.
        tiles: 128 x 128 tiles of scores, which a GPU computes whole.
        pairs: how many.
    """

    tokens: float
    keys: float
    targets: float
    scores: float
    masked: float
    tiles: float
    pairs: float

    @classmethod
    def of(cls, groups: Iterable[Group]) -> PackLoad:
        """Of a pack of these groups."""
        total = [0.0] * 7
        for group in groups:
            answers = [len(answer) for answer in group.answers]
            targets = sum(len(group.targets(i)) for i in range(len(answers)))
            figures = _of_group(len(group.prompt_ids), answers, targets, len(group.pairs))
            total = [a + b for a, b in zip(total, figures, strict=True)]
        return cls(*total)

    @classmethod
    def typical(cls, tokens: float, prompt: int, answer: int) -> PackLoad:
        """A pack of that many tokens, full of pairs with these lengths."""
        figures = _of_group(prompt, [answer, answer], 2 * answer, 1)
        return cls(*(figure * tokens / figures[0] for figure in figures))


def _of_group(prompt: int, answers: list[int], targets: int, pairs: int) -> tuple[float, ...]:
    """The fields of `PackLoad` for one group."""
    segments = [(prompt, prompt)] * (prompt > 0) + [(n, prompt + n) for n in answers]
    return (
        sum(queries for queries, _ in segments),
        sum(keys for _, keys in segments),
        targets,
        sum(queries * (keys - queries) + queries * (queries + 1) / 2 for queries, keys in segments),
        sum(queries * keys for queries, keys in segments[1:]) if prompt else 0,
        sum(_tiles(*segment) for segment in segments),
        pairs,
    )


def _tiles(queries: int, keys: int) -> int:
    """Tiles of a causal segment whose last query stands at the last key."""
    return sum(-(-min(keys, keys - queries + (row + 1) * TILE) // TILE) for row in range(-(-queries // TILE)))


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        weight_bytes: 4 for fp32 weights, 2 for bf16.
        autocast: whether products run in bf16 on fp32 weights.
        optim: name of the optimizer.
        policy: which activations are recomputed: none, all but those of products, or all.
        offload: whether the input of every layer waits in the host's memory; needs `policy` full.
        max_tokens: T of a full pack.
        peft: what is trained: everything, or an adapter on bf16 or 4-bit weights.
        lora_r: rank of the adapter.
        gpus: how many share the work.
        sharded: whether they share the weights as well (FSDP2); 4-bit weights are whole on each.
        head_budget: bytes of exponentials that the head keeps.
        moving_reference: whether a second model stays in memory and scores every pack.
        on_cpu: whether it runs on a CPU, whose head and attention keep more.
    """

    weight_bytes: int = 4
    autocast: bool = False
    optim: str = "adamw_torch"
    policy: Policy = "none"
    offload: bool = False
    max_tokens: int = 8192
    peft: Peft = "none"
    lora_r: int = 16
    gpus: int = 1
    sharded: bool = False
    head_budget: int = 2 * 2**30
    moving_reference: bool = False
    on_cpu: bool = False

    @property
    def compute_bytes(self) -> int:
        """Of a number in a matrix product."""
        return 2 if self.autocast else self.weight_bytes

    @property
    def shards(self) -> int:
        """Into how many parts weights, gradients and state are cut."""
        return self.gpus if self.sharded else 1
