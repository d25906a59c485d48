"""The reference store: per-token log-probs of a frozen model, kept by content.

The key of an answer is a hash of the model's fingerprint (weights, names, shapes, dtypes, configuration, adapter,
numerics), the prompt's tokens and the answer's tokens. So a new learning rate, loss, order or folder finds every row,
and a new model, template or truncation finds none. Values are fp32, one per scored token, so that losses which
normalise by length or weigh tokens read the same store.

SQLite in WAL mode: atomic, safe against kill -9, several processes at once, no server.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from dpo_fast.batch import Group, PackedBatch, pack
from dpo_fast.config import UserError

AnswerLogps = tuple[np.ndarray, ...]
Score = Callable[[PackedBatch], Tensor]

_SCHEMA = 1
# Entries of a configuration that say where a model came from or how it is run, not what it computes. Everything else
# counts, known or not: a needless rescoring is cheaper than a stale score.
_PROVENANCE = {"_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"}


def model_fingerprint(model: nn.Module, *, numerics: str) -> str:
    """Hash of everything that can move a log-prob.

    Args:
        model: a transformers model, with or without a peft adapter.
        numerics: compute dtype and versions of attention and head.
    """
    digest = xxhash.xxh3_128()

    def add(*parts: object) -> None:
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode() + b"\0")

    config = getattr(model, "config", None)
    add(numerics, type(model).__name__)
    if config is not None:
        add({key: value for key, value in config.to_dict().items() if key not in _PROVENANCE})
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        add(name, adapter.to_dict())
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen and tensor.numel():
            add(name, "tied to", seen[tensor.data_ptr()], tuple(tensor.shape))
            continue
        seen[tensor.data_ptr()] = name
        add(name, str(tensor.dtype), tuple(tensor.shape))
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


class ReferenceStore:
    """The SQLite file; one table from 16-byte keys to fp32 blobs."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            UserError: not a store of ours, or a place that cannot be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=60)
            version = self._connection.execute("pragma user_version").fetchone()[0]
            num_tables = self._connection.execute("select count(*) from sqlite_master").fetchone()[0]
            if version != _SCHEMA and (version or num_tables):
                raise UserError(
                    f"{path} is not a reference store of this version (schema {version}, expected {_SCHEMA}); "
                    "name another file with --reference_store"
                )
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = normal")
            with self._connection:
                self._connection.execute(
                    "create table if not exists answers (key blob primary key, logps blob not null) without rowid"
                )
                self._connection.execute(f"pragma user_version = {_SCHEMA}")
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{path} cannot be used as the reference store ({error}); name another file with --reference_store"
            ) from error

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The stored log-probs of those keys that are there."""
        found = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            try:
                rows = self._connection.execute(f"select key, logps from answers where key in ({marks})", part)
                found.update({key: np.frombuffer(blob, dtype="<f4") for key, blob in rows})
            except sqlite3.Error as error:
                raise self._broken(error) from error
        return found

    def put(self, items: dict[bytes, np.ndarray]) -> None:
        """Store all items or none."""
        rows = [(key, np.ascontiguousarray(logps, dtype="<f4").tobytes()) for key, logps in items.items()]
        try:
            with self._connection:
                self._connection.executemany("insert or replace into answers values (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _broken(self, error: sqlite3.Error) -> UserError:
        return UserError(
            f"the reference store {self.path} failed ({error}); free disk space or repair its folder, or name another "
            "file with --reference_store"
        )


class Reference:
    """The scores of one model in a store."""

    def __init__(self, store: ReferenceStore, fingerprint: str) -> None:
        self._store = store
        self._fingerprint = fingerprint.encode()

    def missing(self, groups: Sequence[Group]) -> list[int]:
        """Indices of the groups that have an answer without scores."""
        return [i for i, answers in enumerate(self._find(groups)) if answers is None]

    def lookup(self, groups: Sequence[Group]) -> list[AnswerLogps]:
        """For each group its answers' log-probs.

        Raises:
            UserError: a group is not in the store; zeros are never made up.
        """
        found = self._find(groups)
        for group, answers in zip(groups, found, strict=True):
            if answers is None:
                raise UserError(f"row {group.row} has no reference scores in {self._store.path}; score it first")
        return [answers for answers in found if answers is not None]

    def fill(
        self,
        groups: Sequence[Group],
        score: Score,
        *,
        packs: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Score the groups of `packs` that are missing and commit each pack as soon as it is scored.

        Args:
            groups: all groups.
            score: (N,) log-probs of a pack's targets.
            packs: indices of groups that are scored together. A pack with any group missing is scored whole, so that
                its numbers are those that the same pack gives in training.
            progress: called with the number of groups done.

        Raises:
            UserError: a score is not finite.
        """
        for packed in packs:
            members = [groups[i] for i in packed]
            num_missing = len(self.missing(members))
            if not num_missing:
                continue
            items = {}
            for group, answers in zip(members, score_groups(members, score), strict=True):
                for answer, logps in zip(group.answers, answers, strict=True):
                    if not np.isfinite(logps).all():
                        raise UserError(
                            f"the reference gives row {group.row} a log-prob that is not finite; nothing was stored "
                            "for its pack. Check the model's weights, or leave the row out"
                        )
                    items[self._key(group, answer)] = logps
            self._store.put(items)
            if progress:
                progress(num_missing)

    def verify(
        self, groups: Sequence[Group], score: Score, *, tolerance: float, sample: int = 3, seed: int = 0
    ) -> None:
        """Score a few stored groups again and compare.

        Args:
            groups: candidates; those without scores are passed over.
            score: as for `fill`.
            tolerance: nats that a token may differ by.
            sample: groups that are looked at.
            seed: of the choice.

        Raises:
            UserError: they differ.
        """
        stored = [(g, a) for g, a in zip(groups, self._find(groups), strict=True) if a is not None]
        order = np.random.default_rng(seed).permutation(len(stored))[:sample]
        for group, answers in (stored[i] for i in order):
            (again,) = score_groups([group], score)
            error = max(float(np.abs(a - b).max(initial=0)) for a, b in zip(answers, again, strict=True))
            if not error <= tolerance:
                raise UserError(
                    f"the stored reference scores of row {group.row} differ from the model's by {error:.3g} nats a "
                    f"token (expected at most {tolerance:g}): {self._store.path} is damaged or was written by other "
                    "software. Remove it, or name another file with --reference_store"
                )

    def _find(self, groups: Sequence[Group]) -> list[AnswerLogps | None]:
        keys = [[self._key(group, answer) for answer in group.answers] for group in groups]
        found = self._store.get([key for answers in keys for key in answers])
        result: list[AnswerLogps | None] = []
        for group, group_keys in zip(groups, keys, strict=True):
            lengths = [len(answer) - (not len(group.prompt_ids)) for answer in group.answers]
            answers = [found.get(key) for key in group_keys]
            whole = all(a is not None and len(a) == n for a, n in zip(answers, lengths, strict=True))
            result.append(tuple(a for a in answers if a is not None) if whole else None)
        return result

    def _key(self, group: Group, answer: np.ndarray) -> bytes:
        digest = xxhash.xxh3_128(self._fingerprint)
        # The prompt's length separates it from the answer.
        digest.update(len(group.prompt_ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(group.prompt_ids, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(answer, dtype="<i4").tobytes())
        return digest.digest()


def score_groups(groups: Sequence[Group], score: Score) -> list[AnswerLogps]:
    """Score one pack and cut its (N,) log-probs into answers."""
    batch = pack(groups)
    parts = np.split(score(batch).float().numpy(), batch.cu_answers[1:-1].numpy())
    bounds = np.cumsum([0, *(len(group.answers) for group in groups)])
    return [tuple(parts[a:b]) for a, b in pairwise(bounds)]
