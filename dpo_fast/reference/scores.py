"""Per-token log-probs of a frozen model in the store, kept by content.

The key of an answer is a hash of the model's fingerprint (weights, names, shapes, dtypes, configuration, adapter,
numerics), the prompt's tokens and the answer's tokens. So a new learning rate, loss, order or folder finds every row,
and a new model, template or truncation finds none. If only some of an answer's tokens are scored, the mask is part of
the key. Values are fp32, one per scored token, so that losses which normalise by length or weight tokens read the same
store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import xxhash
from torch import Tensor

from dpo_fast.errors import UserError
from dpo_fast.packs.layout import Group, PackedBatch, pack
from dpo_fast.ranks import ONE_PROCESS, Ranks
from dpo_fast.reference.store import ReferenceStore

AnswerLogps = tuple[np.ndarray, ...]
Score = Callable[[PackedBatch], Tensor]


class StoredScores:
    """Log-probs that were looked up, as a `Scorer` of packs of their groups."""

    def __init__(self, groups: Sequence[Group], answers: Sequence[AnswerLogps]) -> None:
        """Take each group's answers as `Reference.lookup` gives them; no two groups have the same row."""
        self._of_row = {group.row: logps for group, logps in zip(groups, answers, strict=True)}
        assert len(self._of_row) == len(groups), "two groups of one row"

    def score(self, batch: PackedBatch) -> Tensor:
        """(N,) fp32 on the CPU."""
        rows = dict.fromkeys(batch.pair_rows)
        flat = [logps for row in rows for logps in self._of_row[row]]
        logps = torch.from_numpy(np.concatenate(flat).astype(np.float32))
        assert len(logps) == len(batch.targets), "one reference log-prob per scored token"
        return logps


class Reference:
    """The scores of one model in a store."""

    def __init__(self, store: ReferenceStore, fingerprint: str, ranks: Ranks = ONE_PROCESS) -> None:
        """Take an open store, the `model_fingerprint` of the reference, and the processes that share the model."""
        self._store = store
        self._fingerprint = fingerprint.encode()
        self.ranks = ranks

    def missing(self, groups: Sequence[Group]) -> list[int]:
        """Indices of the groups that have an answer without scores, or with another number of them."""
        return [i for i, answers in enumerate(self._find(groups)) if answers is None]

    def lookup(self, groups: Sequence[Group]) -> list[AnswerLogps]:
        """For each group its answers' (A_i,) fp32 log-probs, as `StoredScores` takes them.

        Raises:
            UserError: a group is not in the store, or is damaged there (zeros are never made up).
        """
        found = self._find(groups)
        absent = [group.row for group, answers in zip(groups, found, strict=True) if answers is None]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(
                f"no reference scores for row {absent[0]}{more} in {self._store.path}: score the data first. If that "
                "was done, the file is damaged: remove it, or name another file with --reference_store"
            )
        return [answers for answers in found if answers is not None]

    def damaged(self, groups: Sequence[Group]) -> list[int]:
        """Indices of the groups that have an answer whose stored scores are damaged; they are `missing`, too."""
        self._find(groups)
        return [
            i
            for i, group in enumerate(groups)
            if any(self._key(group, number) in self._store.damaged for number in range(len(group.answers)))
        ]

    def fill(
        self,
        groups: Sequence[Group],
        score: Score,
        *,
        packs: Sequence[Sequence[int]] | None = None,
        max_tokens: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Score the groups that are missing, and commit each pack as soon as it is scored.

        Args:
            groups: all groups.
            score: (N,) log-probs of a pack's targets, in their order.
            packs: lists of indices into `groups`; others are not scored. A pack that is missing whole, or partly
                damaged, is scored as it is given, so that its numbers are bitwise those that the same pack gives in
                training.
            max_tokens: budget of the packs that all other missing groups are laid into; by default that of the
                largest of `packs`.
            progress: called after each pack with the number of its groups that were missing.

        Processes that share the model each score their own packs, and all of them as many; it returns when all have.

        Raises:
            UserError: a score is not finite; nothing of its pack was stored.
        """
        plan, missing = self._plan(groups, packs, max_tokens)
        num_packs = max(self.ranks.gather(len(plan)))
        is_shared = self.ranks.world_size > 1
        for packed in plan:
            members = [groups[i] for i in packed]
            # Another run may have scored them since the plan was made.
            if is_shared or self.missing(members):
                self._store.put(self._score(members, score))
            if progress:
                progress(len(missing.intersection(packed)))
        for _ in range(num_packs - len(plan)):
            score(pack([min(groups, key=lambda group: group.num_tokens)]))
        self.ranks.wait()

    def _plan(
        self, groups: Sequence[Group], packs: Sequence[Sequence[int]] | None, max_tokens: int | None
    ) -> tuple[list[list[int]], set[int]]:
        """The packs to score, and the indices of the groups that are missing."""
        from dpo_fast.packs.bins import best_fit_decreasing

        assert packs is not None or max_tokens is not None, "without packs, their size must be given"
        if packs is None:
            packs = [range(len(groups))]
            fixed: list[list[int]] = []
            missing = set(self.missing(groups))
        else:
            wanted = [i for packed in packs for i in packed]
            missing = {wanted[i] for i in self.missing([groups[i] for i in wanted])}
            damaged = {wanted[i] for i in self.damaged([groups[i] for i in wanted])} if self._store.damaged else set()
            fixed = [
                list(packed)
                for packed in packs
                if packed and (missing.issuperset(packed) or not damaged.isdisjoint(packed))
            ]
        rest = sorted(missing.difference(*fixed))
        if max_tokens is None:
            max_tokens = max((sum(groups[i].num_tokens for i in packed) for packed in packs), default=0)
        bins = best_fit_decreasing([groups[i].num_tokens for i in rest], max_tokens)
        return fixed + [[rest[i] for i in packed] for packed in bins], missing

    def _score(self, groups: Sequence[Group], score: Score) -> dict[bytes, np.ndarray]:
        items = {}
        for group, answers in zip(groups, score_groups(groups, score), strict=True):
            for number, logps in enumerate(answers):
                if not np.isfinite(logps).all():
                    place = int(np.flatnonzero(~np.isfinite(logps))[0])
                    raise UserError(
                        f"row {group.row}, answer {number}: the reference's log-prob of scored token {place} is "
                        f"{logps[place]}, expected a finite number. Nothing was stored for its pack. Check the model's "
                        "weights and dtype, or leave the row out"
                    )
                items[self._key(group, number)] = logps
        return items

    def verify(
        self, groups: Sequence[Group], score: Score, *, tolerance: float, sample: int = 3, seed: int = 0
    ) -> None:
        """Score a few stored groups again and compare.

        Args:
            groups: candidates; those without scores are skipped.
            score: as for `fill`.
            tolerance: nats that a token may differ by; packs differ by rounding.
            sample: groups that are looked at.
            seed: of the choice.

        Raises:
            UserError: they differ; the message has the row, both values and the cure.
        """
        order = np.random.default_rng(seed).permutation(len(groups)).tolist()
        for i in self._stored(groups, order, sample):
            group = groups[i]
            (stored,), (again,) = self.lookup([group]), score_groups([group], score)
            for number, (old, new) in enumerate(zip(stored, again, strict=True)):
                differing = np.flatnonzero(~(np.abs(old - new) <= tolerance))
                if len(differing):
                    place = int(differing[0])
                    raise UserError(
                        f"the stored reference scores of row {group.row} are not the model's: answer {number}, scored "
                        f"token {place} has {old[place]:.6g} in {self._store.path}, the model gives {new[place]:.6g} "
                        f"(expected to agree to {tolerance:g} nats). The file is damaged or was written by other "
                        "software: remove it (the scores are recomputed), or name another file with --reference_store"
                    )

    def _stored(self, groups: Sequence[Group], order: Sequence[int], count: int) -> list[int]:
        """The first `count` of `order` that are in the store, found without reading the whole store."""
        found: list[int] = []
        for start in range(0, len(order), 64):
            if len(found) >= count:
                break
            part = order[start : start + 64]
            absent = set(self.missing([groups[i] for i in part]))
            found += [i for place, i in enumerate(part) if place not in absent]
        return self.ranks.first(found[:count])

    def _find(self, groups: Sequence[Group]) -> list[AnswerLogps | None]:
        keys = [[self._key(group, number) for number in range(len(group.answers))] for group in groups]
        found = self._store.get([key for answers in keys for key in answers])
        result: list[AnswerLogps | None] = []
        for group, group_keys in zip(groups, keys, strict=True):
            answers = tuple(
                logps
                for number, key in enumerate(group_keys)
                if (logps := found.get(key)) is not None and len(logps) == len(group.targets(number))
            )
            result.append(answers if len(answers) == len(group.answers) else None)
        return result

    def _key(self, group: Group, number: int) -> bytes:
        digest = xxhash.xxh3_128(self._fingerprint)
        # The prompt's length separates it from the answer.
        digest.update(len(group.prompt_ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(group.prompt_ids, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(group.answers[number], dtype="<i4").tobytes())
        mask = group.scored[number] if group.scored else None
        if mask is not None:
            digest.update(b"scored" + np.packbits(mask).tobytes())
        return digest.digest()


def score_groups(groups: Sequence[Group], score: Score) -> list[AnswerLogps]:
    """Score one pack and cut its (N,) log-probs into answers."""
    batch = pack(groups)
    logps = score(batch).detach().float().cpu().numpy()
    assert logps.shape == tuple(batch.targets.shape), "one log-prob per target"
    parts = np.split(logps, batch.cu_answers[1:-1].numpy())
    bounds = np.cumsum([0, *(len(group.answers) for group in groups)])
    return [tuple(parts[a:b]) for a, b in pairwise(bounds)]
