"""The reference store: per-token log-probs of a frozen model, kept by content.

The key of an answer is a hash of the model's fingerprint (weights, names, shapes, dtypes, configuration, adapter,
numerics), the prompt's tokens and the answer's tokens. So a new learning rate, loss, order or folder finds every row,
and a new model, template or truncation finds none. Values are fp32, one per scored token, so that losses which
normalise by length or weigh tokens read the same store.

SQLite in WAL mode: atomic, safe against kill -9, several processes at once, no server. docs/reference_store.md has the
file's layout and what was measured.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

# Entries that say where a model came from or how it is run, not what it computes. Everything else counts, known or
# not: a needless rescoring is cheaper than a stale score. dtype and architecture are hashed with the weights.
_PROVENANCE = {
    *("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"),
}
# What an adapter's layers keep outside of configuration and weights.
_ADAPTER_STATE = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")


def model_fingerprint(model: nn.Module, *, numerics: str) -> str:
    """Hash of everything that can move a log-prob.

    Args:
        model: a transformers model, with or without a peft adapter, on any device.
        numerics: compute dtype and versions of attention and head.

    Returns:
        32 hexadecimal digits of xxh3_128.

    Raises:
        ValueError: a weight is on the meta device, so its bytes cannot be read.
    """
    digest = xxhash.xxh3_128()

    def add(*parts: object) -> None:
        digest.update(json.dumps(_plain(parts), sort_keys=True).encode() + b"\0")

    add(numerics, type(model).__name__)
    config = getattr(model, "config", None)
    if config is not None:
        add(_without_provenance(config.to_dict()))
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        add(name, _without_provenance(adapter.to_dict()))
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            add(name, [getattr(module, attribute, None) for attribute in _ADAPTER_STATE])
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise ValueError(f"{name} has no data (meta device): load the model whole before it is hashed")
        add(name, str(tensor.dtype), tuple(tensor.shape))
        # A tied weight is the same view of the same memory; a transposed or sliced view is not.
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in seen:
            add("tied to", seen[view])
            continue
        seen[view] = name
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def _without_provenance(entries: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in entries.items() if key not in _PROVENANCE}


def _plain(value: object) -> object:
    """The value as JSON can hold it, the same in every process (sets have no order of their own)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


class ReferenceStore:
    """The SQLite file: one table from 16-byte keys to little-endian fp32 blobs."""

    # Written into the file's header: whose it is ("dpof"), and the version of its layout.
    APPLICATION_ID = 0x64706F66
    SCHEMA = 2
    # Below the limit on variables in a statement of the oldest SQLite in use (999).
    _KEYS_PER_QUERY = 500

    def __init__(self, path: Path, *, busy_timeout: float = 60.0) -> None:
        """Open or make the file.

        Args:
            path: its folder is made if it is missing.
            busy_timeout: seconds to wait for another process that is writing.

        Raises:
            UserError: not a store of this version, damaged, or a place that cannot be written.
        """
        self.path = path
        self._busy_timeout = busy_timeout
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the reference store {path} cannot be made ({error}): name another file with --reference_store"
            ) from error
        with self._explained():
            # Without an isolation level Python leaves transactions to us: its own would not cover `create table`.
            self._connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None)
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        with self._connection:
            execute("begin")  # one snapshot: another process may be making the file right now
            application, version, tables = (
                execute(query).fetchone()[0]
                for query in ("pragma application_id", "pragma user_version", "select count(*) from sqlite_master")
            )
        is_empty = not (application or version or tables)
        if not is_empty and application != self.APPLICATION_ID:
            raise UserError(
                f"{self.path} is a SQLite file, but not a reference store of this version: "
                "name another file with --reference_store"
            )
        if not is_empty and version != self.SCHEMA:
            raise UserError(
                f"{self.path} is a reference store of schema {version}, expected {self.SCHEMA}: remove it (the scores "
                "are made anew) or name another file with --reference_store"
            )
        execute("pragma journal_mode = wal")
        # A commit survives the death of the process; the last ones may be lost with the power, and are scored again.
        execute("pragma synchronous = normal")
        if is_empty:
            with self._connection:
                execute("begin immediate")
                # A plain table, not `without rowid`: keys are random, so only the small index is written all over.
                execute("create table if not exists answers (key blob primary key not null, logps blob not null)")
                execute(f"pragma application_id = {self.APPLICATION_ID}")
                execute(f"pragma user_version = {self.SCHEMA}")

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was put stays."""
        self._connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The stored fp32 log-probs of those keys that are there."""
        found: dict[bytes, np.ndarray] = {}
        with self._explained():
            for start in range(0, len(keys), self._KEYS_PER_QUERY):
                part = keys[start : start + self._KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                for key, blob in self._connection.execute(
                    f"select key, logps from answers where key in ({marks})", part
                ):
                    if len(blob) % 4 == 0:  # else damaged, as good as missing
                        found[key] = np.frombuffer(blob, dtype="<f4")
        return found

    def put(self, items: Mapping[bytes, np.ndarray]) -> None:
        """Store all items or none.

        A value that is there already stays, so that a run which is resumed reads the very numbers it began with,
        whoever scored the row again meanwhile; only one of another length is damaged, and replaced.

        Raises:
            UserError: the file cannot be written; what was put before stays.
        """
        assert all(np.isfinite(logps).all() for logps in items.values()), "only finite log-probs are stored"
        rows = [(key, np.ascontiguousarray(logps, dtype="<f4").tobytes()) for key, logps in items.items()]
        with self._explained(), self._connection:
            self._connection.execute("begin immediate")
            self._connection.executemany(
                "insert into answers (key, logps) values (?, ?) on conflict (key) do update "
                "set logps = excluded.logps where length(logps) <> length(excluded.logps)",
                rows,
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into messages with a cure."""
        cures = {
            sqlite3.SQLITE_NOTADB: "it is not a SQLite file",
            sqlite3.SQLITE_CORRUPT: "it is damaged; remove it with its -wal and -shm files (the scores are made anew)",
            sqlite3.SQLITE_READONLY: "make the file and its folder writable",
            sqlite3.SQLITE_CANTOPEN: "make the file and its folder writable",
            sqlite3.SQLITE_FULL: "free disk space and run again, nothing stored is lost",
            sqlite3.SQLITE_IOERR: "free disk space or repair the disk and run again, nothing stored is lost",
            sqlite3.SQLITE_BUSY: f"another process has been writing it for {self._busy_timeout:g} s; end that one",
        }
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the kind of error
            cure = cures.get(code, "it cannot be used")
            raise UserError(
                f"the reference store {self.path} failed ({error}): {cure}, or name another file with --reference_store"
            ) from error


@dataclass
class ScoreStats:
    """What a `Reference.fill` did: groups and packs scored, their tokens, the seconds that it took."""

    groups: int = 0
    packs: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Reference:
    """The scores of one model in a store."""

    def __init__(self, store: ReferenceStore, fingerprint: str) -> None:
        """Take an open store and the `model_fingerprint` of the reference."""
        self._store = store
        self._fingerprint = fingerprint.encode()

    def missing(self, groups: Sequence[Group]) -> list[int]:
        """Indices of the groups that have an answer without scores, or with another number of them."""
        return [i for i, answers in enumerate(self._find(groups)) if answers is None]

    def lookup(self, groups: Sequence[Group]) -> list[AnswerLogps]:
        """For each group its answers' (A_i,) fp32 log-probs, in the form that `pack(ref_logps=...)` takes.

        Raises:
            UserError: a group is not in the store (zeros are never made up), or its scores are damaged.
        """
        found = self._find(groups)
        absent = [group.row for group, answers in zip(groups, found, strict=True) if answers is None]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(
                f"no reference scores for row {absent[0]}{more} in {self._store.path}: score the data first"
            )
        whole = [answers for answers in found if answers is not None]
        for group, answers in zip(groups, whole, strict=True):
            if not all(np.isfinite(logps).all() for logps in answers):
                raise UserError(
                    f"the stored reference scores of row {group.row} are not finite: {self._store.path} is damaged. "
                    "Remove it (the scores are made anew), or name another file with --reference_store"
                )
        return whole

    def fill(
        self,
        groups: Sequence[Group],
        score: Score,
        *,
        packs: Sequence[Sequence[int]] | None = None,
        max_tokens: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> ScoreStats:
        """Score the groups that are missing, and commit each pack as soon as it is scored.

        Args:
            groups: all groups.
            score: (N,) log-probs of a pack's targets, in their order.
            packs: lists of indices into `groups`; others are not scored. A pack that is missing whole is scored as it
                is given, so that its numbers are bitwise those that the same pack gives in training.
            max_tokens: budget of the packs that all other missing groups are laid into; by default that of the
                largest of `packs`.
            progress: called after each pack with the number of its groups; they add up to what was missing.

        Raises:
            UserError: a score is not finite; nothing of its pack was stored.
        """
        stats, start = ScoreStats(), time.perf_counter()
        for packed in self._plan(groups, packs, max_tokens):
            members = [groups[i] for i in packed]
            # Another process may have scored them since the plan was made.
            if self.missing(members):
                self._store.put(self._score(members, score))
                stats.groups += len(members)
                stats.packs += 1
                stats.tokens += sum(group.num_tokens for group in members)
            if progress:
                progress(len(members))
        stats.seconds = time.perf_counter() - start
        return stats

    def _plan(
        self, groups: Sequence[Group], packs: Sequence[Sequence[int]] | None, max_tokens: int | None
    ) -> list[list[int]]:
        from dpo_fast.data.packing import best_fit_decreasing

        assert packs is not None or max_tokens is not None, "without packs, their size must be given"
        if packs is None:
            packs = [range(len(groups))]
            fixed: list[list[int]] = []
            missing = set(self.missing(groups))
        else:
            wanted = [i for packed in packs for i in packed]
            missing = {wanted[i] for i in self.missing([groups[i] for i in wanted])}
            fixed = [list(packed) for packed in packs if packed and missing.issuperset(packed)]
        rest = sorted(missing.difference(*fixed))
        if max_tokens is None:
            max_tokens = max((sum(groups[i].num_tokens for i in packed) for packed in packs), default=0)
        bins = best_fit_decreasing([groups[i].num_tokens for i in rest], max_tokens)
        return fixed + [[rest[i] for i in packed] for packed in bins]

    def _score(self, groups: Sequence[Group], score: Score) -> dict[bytes, np.ndarray]:
        items = {}
        for group, answers in zip(groups, score_groups(groups, score), strict=True):
            for number, (answer, logps) in enumerate(zip(group.answers, answers, strict=True)):
                if not np.isfinite(logps).all():
                    place = int(np.flatnonzero(~np.isfinite(logps))[0])
                    raise UserError(
                        f"row {group.row}, answer {number}: the reference's log-prob of scored token {place} is "
                        f"{logps[place]}, expected a finite number. Nothing was stored for its pack. Check the model's "
                        "weights and dtype, or leave the row out"
                    )
                items[self._key(group, answer)] = logps
        return items

    def verify(
        self, groups: Sequence[Group], score: Score, *, tolerance: float, sample: int = 3, seed: int = 0
    ) -> None:
        """Score a few stored groups again and compare.

        Args:
            groups: candidates; those without scores are passed over.
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
                        "software: remove it (the scores are made anew), or name another file with --reference_store"
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
        return found[:count]

    def _find(self, groups: Sequence[Group]) -> list[AnswerLogps | None]:
        keys = [[self._key(group, answer) for answer in group.answers] for group in groups]
        found = self._store.get([key for answers in keys for key in answers])
        result: list[AnswerLogps | None] = []
        for group, group_keys in zip(groups, keys, strict=True):
            answers = tuple(
                logps
                for key, answer in zip(group_keys, group.answers, strict=True)
                if (logps := found.get(key)) is not None and len(logps) == num_scored(group, answer)
            )
            result.append(answers if len(answers) == len(group.answers) else None)
        return result

    def _key(self, group: Group, answer: np.ndarray) -> bytes:
        digest = xxhash.xxh3_128(self._fingerprint)
        # The prompt's length separates it from the answer.
        digest.update(len(group.prompt_ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(group.prompt_ids, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(answer, dtype="<i4").tobytes())
        return digest.digest()


def num_scored(group: Group, answer: np.ndarray) -> int:
    """Tokens of an answer that have a log-prob: all, but for the first one where there is no prompt before it."""
    return len(answer) - (len(group.prompt_ids) == 0)


def score_groups(groups: Sequence[Group], score: Score) -> list[AnswerLogps]:
    """Score one pack and cut its (N,) log-probs into answers."""
    batch = pack(groups)
    logps = score(batch).detach().float().cpu().numpy()
    assert logps.shape == tuple(batch.targets.shape), "one log-prob per target"
    parts = np.split(logps, batch.cu_answers[1:-1].numpy())
    bounds = np.cumsum([0, *(len(group.answers) for group in groups)])
    return [tuple(parts[a:b]) for a, b in pairwise(bounds)]
