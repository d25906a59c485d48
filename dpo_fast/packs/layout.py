"""The one layout that data, model, reference store and loss share.

A group is one prompt and its k answers; a pair is a group with k = 2. A pack is whole groups side by side, each with
its prompt once:

    input_ids      p p p p a a a b b | q q q c c d d d      (T,)  two groups, no padding
    position_ids   0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 3 4 5      every answer continues from its prompt's end
    segment        0 0 0 0 1 1 1 2 2 | 3 3 3 4 4 5 5 5      (M segments) one causal attention call each

The query segments tile the pack. A prompt segment's keys are itself; an answer segment's keys are [its prompt,
itself], gathered by `kv_index`, causal and aligned at the bottom right. So `cu_seqlens_q` and `cu_seqlens_k` differ,
which varlen attention kernels support.

The log-prob of an answer token is read from the hidden state one position earlier; for the first token of each answer
that is the prompt's last token. `hidden_index` and `targets` list these (row, token) pairs answer by answer; no other
rows reach the LM head. `cu_answers` marks where each answer starts. In an answer of several turns only the assistant's
turns are targets; the user's turns in between are context (`Group.scored`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranking:
    """How a row's k answers compare, whatever form they are in.

    Attributes:
        pairs: (chosen, rejected) indices of answers; every answer is in a pair or is the gold one.
        scores: true scores of the answers, non-finite if an answer has none; or None.
        gold: index of an answer that is better than all paired ones, or None.
        weight: factor of the row's loss.
    """

    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    scores: tuple[float, ...] | None = None
    gold: int | None = None
    weight: float = 1.0

    def keep(self, pairs: Sequence[tuple[int, int]]) -> tuple[list[int], Ranking]:
        """Keep only these pairs; returns the indices of the answers still in use, in order, and their ranking."""
        used = sorted({i for pair in pairs for i in pair} | (set() if self.gold is None else {self.gold}))
        place = {i: k for k, i in enumerate(used)}
        return used, Ranking(
            pairs=tuple((place[chosen], place[rejected]) for chosen, rejected in pairs),
            scores=None if self.scores is None else tuple(self.scores[i] for i in used),
            gold=None if self.gold is None else place[self.gold],
            weight=self.weight,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its answers, as token ids.

    Attributes:
        row: index of the row in its source, from 0, for messages.
        prompt_ids: (L,) int32, may be empty.
        answers: k arrays (A_i,) int32, each with at least one token, end token included.
        ranking: how the answers compare.
        scored: for each answer an (A_i,) bool mask of the tokens that are targets, None for all of them; empty if all
            tokens of all answers are.
    """

    row: int
    prompt_ids: np.ndarray
    answers: tuple[np.ndarray, ...]
    ranking: Ranking = Ranking()
    scored: tuple[np.ndarray | None, ...] = ()

    def targets(self, answer: int) -> np.ndarray:
        """(N_i,) positions within an answer of its targets.

        Without a prompt nothing stands before an answer's first token, so that token has no log-prob.
        """
        first = 0 if len(self.prompt_ids) else 1
        mask = self.scored[answer] if self.scored else None
        if mask is None:
            return np.arange(first, len(self.answers[answer]))
        return first + np.flatnonzero(mask[first:])

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(chosen, rejected) indices into `answers`."""
        return self.ranking.pairs

    @property
    def num_tokens(self) -> int:
        """Tokens of the group in a pack, with its prompt counted once."""
        return len(self.prompt_ids) + sum(len(answer) for answer in self.answers)

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens of the group with one copy of the prompt per answer."""
        return len(self.prompt_ids) * len(self.answers) + sum(len(answer) for answer in self.answers)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A pack of whole groups; see the module's diagram.

    Attributes:
        input_ids, position_ids: (T,) int64.
        cu_seqlens_q, cu_seqlens_k: (M + 1,) int64 on the CPU; bounds of each segment's queries and keys.
        kv_index: (K,) int64, rows of the pack that are the keys of all segments, concatenated.
        hidden_index: (N,) int64, the row whose hidden state predicts each target; only these rows reach the LM head.
        targets: (N,) int64 token ids.
        cu_answers: (S + 1,) int64, bounds of each answer's targets.
        answer_segments: S indices of segments, one per answer.
        chosen, rejected: (P,) int64, indices of answers.
        pair_rows: P source rows, for messages.
        num_pair_tokens: scored tokens of all pairs; an answer counts once for each of its pairs.
        weights: (P,) fp32 factors of the pairs' losses; None if all are 1.
        score_gaps: (P,) fp32, true score of the chosen minus that of the rejected answer; None unless all have one.
        gold: (P,) int64, index of an answer better than both; None unless all have one.
        ref_logps: (N,) fp32 reference log-probs of the targets, or None.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_index: Tensor
    hidden_index: Tensor
    targets: Tensor
    cu_answers: Tensor
    chosen: Tensor
    rejected: Tensor
    pair_rows: tuple[int, ...]
    num_pair_tokens: int
    answer_segments: tuple[int, ...]
    weights: Tensor | None = None
    score_gaps: Tensor | None = None
    gold: Tensor | None = None
    ref_logps: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[0]

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.pair_rows)

    @property
    def answer_lengths(self) -> Tensor:
        """(S,) int64 number of scored tokens per answer."""
        return self.cu_answers.diff()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same pack with its tensors on `device`; segment bounds stay on the CPU, where loops read them."""
        on_host = ("cu_seqlens_q", "cu_seqlens_k")
        to_gpu = torch.device(device).type == "cuda"

        def move(value: Tensor) -> Tensor:
            # The host would wait for a copy of pageable memory, and with it for all work that was queued before.
            is_pageable = to_gpu and value.device.type == "cpu"
            return (value.pin_memory() if is_pageable else value).to(device, non_blocking=True)

        moved: dict[str, Any] = {
            name: move(value)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), Tensor) and name not in on_host
        }
        return replace(self, **moved)


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Lay groups side by side, one at least.

    If the prompt is empty, nothing precedes an answer's first token, so that token is not scored.
    """
    assert groups, "a pack holds at least one group"
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    hidden: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    chosen: list[int] = []
    rejected: list[int] = []
    rows: list[int] = []
    weights: list[float] = []
    gaps: list[float] = []
    gold: list[int] = []
    answer_segments: list[int] = []
    start = num_answers = 0
    for group in groups:
        prompt_len = len(group.prompt_ids)
        prompt = np.arange(start, start + prompt_len)
        if prompt_len:
            ids.append(group.prompt_ids)
            positions.append(np.arange(prompt_len))
            keys.append(prompt)
        for pair in group.pairs:
            chosen.append(num_answers + pair[0])
            rejected.append(num_answers + pair[1])
            rows.append(group.row)
            weights.append(group.ranking.weight)
            if group.ranking.scores is not None:
                gaps.append(group.ranking.scores[pair[0]] - group.ranking.scores[pair[1]])
            if group.ranking.gold is not None:
                gold.append(num_answers + group.ranking.gold)
        start += prompt_len
        for number, answer in enumerate(group.answers):
            own = np.arange(start, start + len(answer))
            answer_segments.append(len(ids))
            ids.append(answer)
            positions.append(np.arange(prompt_len, prompt_len + len(answer)))
            keys.append(np.concatenate([prompt, own]))
            target = group.targets(number)
            # The row before each token; a first token's is the prompt's last, and not a target without a prompt.
            before = np.concatenate([prompt[-1:] if prompt_len else own[:1], own[:-1]])
            hidden.append(before[target])
            targets.append(answer[target])
            start += len(answer)
        num_answers += len(group.answers)
    return PackedBatch(
        input_ids=_join(ids),
        position_ids=_join(positions),
        cu_seqlens_q=_bounds(ids),
        cu_seqlens_k=_bounds(keys),
        kv_index=_join(keys),
        hidden_index=_join(hidden),
        targets=_join(targets),
        cu_answers=_bounds(targets),
        chosen=torch.tensor(chosen, dtype=torch.int64),
        rejected=torch.tensor(rejected, dtype=torch.int64),
        pair_rows=tuple(rows),
        num_pair_tokens=sum(len(targets[answer]) for answer in chosen + rejected),
        answer_segments=tuple(answer_segments),
        weights=torch.tensor(weights) if set(weights) - {1.0} else None,
        score_gaps=torch.tensor(gaps) if len(gaps) == len(rows) else None,
        gold=torch.tensor(gold, dtype=torch.int64) if len(gold) == len(rows) else None,
    )


def _join(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))


def _bounds(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, arrays)], dtype=np.int64))
