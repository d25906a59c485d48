"""What a run reports: TRL's metric names and a few more, summed on the device and brought to the host once a report."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dpo_fast.files import write_errors, write_file_atomically
from dpo_fast.losses.pairs import PairLogps
from dpo_fast.packs.layout import PackedBatch
from dpo_fast.ranks import ONE_PROCESS, Ranks

logger = logging.getLogger("dpo_fast")

CPU = torch.device("cpu")
METRICS_FILE = "metrics.jsonl"
DAMAGED_METRICS_FILE = "metrics.damaged.jsonl"
TRL_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# `rewards/accuracies` counts pairs as TRL does, strictly; ties, which are all pairs at the first step, stand apart.
PAIR_METRICS = (*TRL_METRICS, "lengths/chosen", "lengths/rejected", "rewards/ties")
SPREADS = ("rewards/chosen_std", "rewards/rejected_std", "rewards/margins_std", "lengths/gap_std")
# What every row has, with `eval_` before it in those of evaluations; warning signs read no others.
ROW_FIGURES = (*PAIR_METRICS, *SPREADS, "lengths/margins_correlation", "num_pairs")


def pair_metrics(pairs: PairLogps, losses: Tensor, beta: float) -> Tensor:
    """(len(PAIR_METRICS), P) fp32. A reward is beta times the log-ratio to the reference, as in DPO's section 4."""
    chosen = beta * pairs.chosen_logratio
    rejected = beta * pairs.rejected_logratio
    rows = (losses, chosen, rejected, (chosen > rejected).float(), chosen - rejected, pairs.chosen, pairs.rejected)
    others = (pairs.chosen_len.float(), pairs.rejected_len.float(), (chosen == rejected).float())
    return torch.stack([row.detach() for row in (*rows, *others)])


class PairAverage:
    """Means and spreads of `pair_metrics` over many packs; one host transfer when read."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.num_pairs = 0

    def add(self, metrics: Tensor) -> None:
        """Add a (len(PAIR_METRICS), P) block."""
        figures = metrics.double()
        rewards, (chosen_len, rejected_len) = figures[1:3], figures[len(TRL_METRICS) : len(TRL_METRICS) + 2]
        spread = torch.cat([rewards, (chosen_len - rejected_len)[None]])
        total = torch.cat([figures.sum(1), (spread @ spread.T).flatten()])
        self._sum = total if self._sum is None else self._sum + total
        self.num_pairs += metrics.shape[1]

    def over(self, ranks: Ranks, device: torch.device) -> PairAverage:
        """That of all processes, on the device; itself if there is one."""
        if ranks.world_size == 1:
            return self
        result = PairAverage()
        size = len(PAIR_METRICS) + 9
        own = torch.zeros(size, dtype=torch.float64, device=device) if self._sum is None else self._sum
        result._sum, result.num_pairs = ranks.sum(own), int(ranks.sum(torch.tensor(self.num_pairs)))
        return result

    def total(self, name: str) -> Tensor:
        """Scalar fp64 sum of a figure, on the device."""
        assert self._sum is not None, "nothing was added"
        return self._sum[PAIR_METRICS.index(name)]

    def read(self, also: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Means and spreads by name, and other scalars of the same transfer; empty if nothing was added."""
        if self._sum is None:
            return {}
        also = also or {}
        sums = self._sum / self.num_pairs
        values = torch.cat([sums, *(x.detach().double()[None] for x in also.values())]).tolist()
        means = dict(zip(PAIR_METRICS, values, strict=False))
        products = values[len(PAIR_METRICS) : len(sums)]
        others = dict(zip(also, values[len(sums) :], strict=True))
        return means | pair_spreads(means, products) | {"num_pairs": self.num_pairs} | others


def pair_spreads(means: Mapping[str, float], products: Sequence[float]) -> dict[str, float]:
    """How rewards and lengths differ from pair to pair: standard deviations, and how margins go with lengths.

    Args:
        means: those of `PAIR_METRICS`.
        products: the nine mean products of chosen reward, rejected reward and chosen less rejected length.

    Returns:
        Standard deviations of both rewards, of the margin and of the difference in length, and the correlation of
        these two; 0 where one of them does not vary.
    """
    centre = (means["rewards/chosen"], means["rewards/rejected"], means["lengths/chosen"] - means["lengths/rejected"])
    covariance = [[products[3 * i + j] - centre[i] * centre[j] for j in range(3)] for i in range(3)]
    chosen, rejected, gap = (_root(covariance[i][i], products[4 * i]) for i in range(3))
    margin = _root(covariance[0][0] + covariance[1][1] - 2 * covariance[0][1], products[0] + products[4])
    both = covariance[0][2] - covariance[1][2]
    return dict(zip(SPREADS, (chosen, rejected, margin, gap), strict=True)) | {
        "lengths/margins_correlation": max(-1.0, min(1.0, both / (margin * gap))) if margin and gap else 0.0,
    }


def _root(variance: float, size: float) -> float:
    """The root of a difference of fp64 sums of about `size`; what may be their rounding alone counts as 0."""
    return math.sqrt(variance) if variance > 1e-12 * size else 0.0


class Window:
    """Figures between two reports: means over pairs, and speeds over the time spent on steps."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens` is the token budget of a pack."""
        self.learning_rate = 0.0
        self._average = PairAverage()
        self._tokens = self._pairs = self._room = self._padding = 0
        self._max_tokens = max_tokens
        self._start = time.perf_counter()

    def add(self, batch: PackedBatch, metrics: Tensor, *, padding: int = 0) -> None:
        """Count a pack, and the tokens that it was filled up with."""
        self._average.add(metrics)
        self._tokens += batch.num_tokens
        self._pairs += batch.num_pairs
        self._padding += padding
        # A group above the budget gets its own pack, which is then full.
        self._room += max(self._max_tokens, batch.num_tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(
        self, also: Mapping[str, Tensor] | None = None, *, ranks: Ranks = ONE_PROCESS, device: torch.device = CPU
    ) -> dict[str, float]:
        """Means, speeds, the learning rate and other scalars, over all processes. Waits for the device, once."""
        means = self._average.over(ranks, device).read(also)
        counts = [self._tokens, self._pairs, self._room, self._padding]
        if ranks.world_size > 1:
            counts = ranks.sum(torch.tensor(counts)).tolist()
        tokens, pairs, room, padding = counts
        seconds = time.perf_counter() - self._start
        return means | {
            "learning_rate": self.learning_rate,
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": pairs / seconds,
            "pack_fill": tokens / max(room, 1),
            "padding_share": padding / max(tokens + padding, 1),
        }


def peak_memory_gib(device: torch.device) -> float:
    """Peak GiB so far: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, on its way to the disk when `write` returns.

    Attributes:
        kept: rows of an earlier part of the run.
        num_damaged: lines that were set aside in `metrics.damaged.jsonl`.
    """

    def __init__(self, path: Path, *, keep_up_to_step: int) -> None:
        """Open for appending; lines of later steps, left by a run that died after its checkpoint, are dropped.

        Raises:
            WriteError: there is no room; the file is as it was.
        """
        rows, damaged = split_metrics(path, ROW_FIGURES)
        self._path = path
        self.kept = [row for row in rows if row["step"] <= keep_up_to_step]
        self.num_damaged = len(damaged)
        with write_errors(path):
            if damaged:
                with path.with_name(DAMAGED_METRICS_FILE).open("ab") as aside:
                    aside.write(b"".join(line + b"\n" for line in damaged))
            if damaged or len(self.kept) < len(rows) or not _ends_a_line(path):
                write_file_atomically(path, "".join(map(_line, self.kept)))
            self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row.

        Raises:
            WriteError: there is no room; the file holds whole lines only.
        """
        line = _line(row).encode()
        with write_errors(self._path, needed=len(line)):
            end = self._file.tell()
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(end)
                raise

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _ends_a_line(path: Path) -> bool:
    """Whether a file is empty, missing, or ends by a newline."""
    return not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; none if it is not there. Damaged lines are left out, with a warning."""
    rows, damaged = split_metrics(path, ("loss",))
    if damaged:
        logger.warning("%s: %d damaged lines are left out", path, len(damaged))
    return rows


def split_metrics(path: Path, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Rows of a metrics file, and the lines that are none: cut by a crash, or damaged later.

    Args:
        path: the file; it need not exist.
        names: figures that every row has; of an evaluation, those with `eval_` before their names.
    """
    rows, damaged = [], []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row, names):
            rows.append(row)
        else:
            damaged.append(line)
    return rows, damaged


def _is_row(row: object, names: Sequence[str]) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    numbers = [value for name, value in row.items() if name != "warnings"]
    return (
        all(type(value) in (int, float) for value in numbers)
        and any(all(prefix + name in row for name in names) for prefix in ("", "eval_"))
        and isinstance(row.get("warnings", []), list)
    )
