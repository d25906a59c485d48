"""Child processes of gpu_step.py: create a model and its rows, or run one contestant.

    python benchmarks/step_contestants.py make|contest JSON

JSON has the fields of `Making` or `Contest`; results go to the file in its field `out`.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = {"learning_rate": 5e-7, "beta": 0.1, "max_grad_norm": 1.0, "seed": 42, "optim": "adamw_8bit"}
# Changes from each library's defaults; TRL's include checkpointing, and a reference model in memory.
CONTESTANTS: dict[str, dict[str, Any]] = {
    "dpo-fast": {"dtype": "bfloat16"},
    "trl-tuned": {"precompute_ref_log_probs": True},
    "trl-default": {},
}
# Words of a prompt and of an answer: exp of a normal with this mean and deviation, at most LONGEST. Fitted to 500 rows
# of UltraFeedback, whose quartiles are 20, 61 and 122 words for prompts, 40, 150 and 290 for answers.
PROMPT_WORDS, ANSWER_WORDS, LONGEST = (4.0, 1.2), (4.6, 1.4), 800

# Kernel classes by name; the first match counts. Flash kernels name CUTLASS types, so attention precedes products.
CLASSES = {
    "copies": r"^Mem(cpy|set)",
    "attention": r"flash|fmha|sdpa|attention",
    "optimizer": r"kOptimizer|[Aa]dam|optimizer_update|FusedOptimizer",
    "products": r"nvjet|gemm|gemv|cutlass|cublas|wgmma|xmma|^fused_kernel|^aten::(linear|matmul|addmm|mm|bmm|baddbmm)$",
}
REST = "elementwise"  # norms, rotary, activations, casts, reductions, clipping: everything else
LARGEST = 15


class Kernel(NamedTuple):
    """One launch on a device (on a CPU: one operator including those that it calls); times in microseconds."""

    name: str
    start: float
    end: float


class Report:
    """The results file, rewritten after every addition, so that a crash or a time limit loses nothing."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._facts: dict[str, Any] = {}

    def add(self, facts: dict[str, Any]) -> None:
        """Add `facts` and write the file."""
        self._facts |= facts
        staging = self._path.with_suffix(".part")
        staging.write_text(json.dumps(self._facts))
        staging.replace(self._path)


def synchronize() -> None:
    """Wait for the device, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Making a model and its rows


@dataclass(frozen=True)
class Making:
    """A random model of an architecture, and rows for it.

    Attributes:
        folder: where `model/` and `rows-N.jsonl` go.
        architecture: arguments of `LlamaConfig`.
        vocabulary: vocabulary size of the tokenizer, at most that of the architecture.
        data: .jsonl with prompt, chosen and rejected; None for synthetic rows.
        rows: numbers of rows; the shorter files are prefixes of the longer ones.
        max_length: tokens of a prompt with one answer.
        out: file for the results.
    """

    folder: str
    architecture: dict[str, Any]
    vocabulary: int
    data: str | None
    rows: list[int]
    max_length: int
    out: str


def make(making: Making, report: Report) -> None:
    """Create tokenizer, rows and weights; keep weights from an earlier call."""
    folder = Path(making.folder)
    candidates = read_rows(making.data) if making.data else made_up_rows(max(making.rows))
    tokenizer = train_tokenizer(candidates, making.vocabulary)
    usable = [(row, tokens) for row in candidates if (tokens := unique_tokens(row, tokenizer, making.max_length))]
    if len(usable) < max(making.rows):
        raise ValueError(f"{len(usable)} of {len(candidates)} rows are usable, {max(making.rows)} are needed")
    for count in making.rows:
        lines = [json.dumps(row) for row, _ in usable[:count]]
        (folder / f"rows-{count}.jsonl").write_text("\n".join(lines) + "\n")
        report.add({f"tokens a pair, {count} rows": statistics.mean(tokens for _, tokens in usable[:count])})
    if not (folder / "model").exists():
        report.add(make_weights(making, tokenizer, folder / "model"))
    tokenizer.save_pretrained(folder / "model")


def read_rows(path: str) -> list[dict[str, str]]:
    """Rows of a .jsonl file, without other columns."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def made_up_rows(count: int) -> list[dict[str, str]]:
    """Rows of made-up words with Zipf frequencies; twice `count`, since some may be too long to use."""
    generator = random.Random(0)
    syllables = [first + vowel for first in "bcdfghklmnprstvwz" for vowel in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def text(mean: float, deviation: float) -> str:
        length = min(LONGEST, math.ceil(generator.lognormvariate(mean, deviation)))
        return " ".join(generator.choices(words, weights, k=length))

    return [
        {"prompt": text(*PROMPT_WORDS), "chosen": text(*ANSWER_WORDS), "rejected": text(*ANSWER_WORDS)}
        for _ in range(2 * count)
    ]


def train_tokenizer(rows: list[dict[str, str]], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((text for row in rows for text in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def unique_tokens(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Tokens of the prompt, counted once, and both answers; 0 if truncation leaves the row unusable."""
    prompt, chosen, rejected = (tokenizer(row[key])["input_ids"] for key in ("prompt", "chosen", "rejected"))
    room = max_length - len(prompt)
    answers = [[*answer, tokenizer.eos_token_id][: max(room, 0)] for answer in (chosen, rejected)]
    return 0 if not prompt or answers[0] == answers[1] else len(prompt) + sum(map(len, answers))


def make_weights(making: Making, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Random bf16 weights, created on the GPU if there is one; the folder appears once it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    start = time.perf_counter()
    config = LlamaConfig(
        **making.architecture,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            spread = model(input_ids=torch.arange(64)[None]).logits.float().std().item()
    staging = folder.with_suffix(".part")
    model.save_pretrained(staging)
    staging.rename(folder)
    facts = {"parameters": model.num_parameters(), "standard deviation of logits": spread}
    return facts | {"seconds to make": time.perf_counter() - start}


# Running a contestant


@dataclass(frozen=True)
class Contest:
    """One contestant's run.

    Attributes:
        contestant: a name of `CONTESTANTS`.
        model: checkpoint folder.
        data: exactly the rows that one pass of the run reads.
        pairs: pairs per optimizer step.
        micro: pairs per micro-batch.
        steps: timed optimizer steps; one more is profiled.
        warmup: how many of the timed steps to discard, at least 1.
        max_length: tokens of a prompt with one answer.
        max_tokens_per_batch: token budget of a pack, for dpo-fast.
        tokens_per_pair: average number of unique tokens.
        fail: raise an error instead of running, for tests.
        out: file for the results.
    """

    contestant: str
    model: str
    data: str
    pairs: int
    micro: int
    steps: int
    warmup: int
    max_length: int
    max_tokens_per_batch: int
    tokens_per_pair: float
    fail: bool
    out: str

    def settings(self, output_dir: str) -> dict[str, Any]:
        """Arguments that TRL's DPOConfig and ours share."""
        return SETTINGS | {
            "output_dir": output_dir,
            "max_steps": self.steps + 1,
            "per_device_train_batch_size": self.micro,
            "gradient_accumulation_steps": self.pairs // self.micro,
            "max_length": self.max_length,
            "logging_steps": 1,
        }


class StepClock:
    """Wall-clock time of each optimizer step, with the device synchronized; profiles the step after the timed ones."""

    def __init__(self, contest: Contest, report: Report) -> None:
        self.contest = contest
        self.report = report
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.profiler: Any = None

    def start(self) -> None:
        """Call right before the library is called."""
        synchronize()  # creates the CUDA context, which is not timed
        self.begin = time.perf_counter()

    def step_done(self) -> None:
        """Call after each optimizer step."""
        synchronize()
        now = time.perf_counter()
        if self.profiler is not None:
            self.profiler.stop()
            kernels = read_kernels(self.profiler.events())
            self.report.add({"profile": time_by_class(kernels, wall=1e6 * (now - self.profiled_from))})
            return
        self.ends.append(now)
        if len(self.ends) == self.contest.steps:
            self.report.add(self.figures())
            self.start_profiler()

    def figures(self) -> dict[str, Any]:
        """Speed, memory and the first loss."""
        import torch

        from dpo_fast.training.metrics import peak_memory_gib

        on_gpu = torch.cuda.is_available()
        ms = [1e3 * (end - start) for start, end in zip(self.ends, self.ends[1:], strict=False)]
        ms = ms[self.contest.warmup - 1 :]
        pairs_per_second = 1e3 * self.contest.pairs / statistics.median(ms)
        return {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "first loss": self.losses[0],
            "until step 1, s": self.ends[0] - self.begin,
            "ms": {"median": statistics.median(ms), "min": min(ms), "max": max(ms), "steps": ms},
            "pairs/s": pairs_per_second,
            "unique tokens/s": pairs_per_second * self.contest.tokens_per_pair,
            "peak GiB": peak_memory_gib(torch.device("cuda" if on_gpu else "cpu")),
        }

    def start_profiler(self) -> None:
        """Profile from here on."""
        import torch
        from torch.profiler import ProfilerActivity

        # On a GPU only kernels: also recording operators would slow down launches and show up as idle time.
        activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        self.profiler = torch.profiler.profile(activities=[activity], acc_events=True)
        self.profiler.start()
        synchronize()
        self.profiled_from = time.perf_counter()


def read_kernels(events: Iterable[Any]) -> list[Kernel]:
    """The kernels among a profiler's events; without a GPU, the operators that no other operator called."""
    import torch
    from torch.autograd import DeviceType

    on_gpu = torch.cuda.is_available()
    kernels = []
    for event in events:
        # `Optimizer.step#...` and other annotations span many kernels and also appear among the GPU's events.
        if event.is_user_annotation or event.name.startswith(("Optimizer.", "ProfilerStep")):
            continue
        if event.device_type == DeviceType.CUDA if on_gpu else is_outermost(event):
            kernels.append(Kernel(event.name, event.time_range.start, event.time_range.end))
    return kernels


def is_outermost(event: Any) -> bool:
    """Whether a CPU event is an operator that no other operator called."""
    parent, parents = event.cpu_parent, []
    while parent is not None:
        parents.append(parent)
        parent = parent.cpu_parent
    return is_operator(event) and not any(map(is_operator, parents))


def is_operator(event: Any) -> bool:
    """Whether a CPU event is an operator, such as `aten::mm`."""
    return "::" in event.name and not event.name.startswith("autograd::")


def kernel_class(name: str) -> str:
    """The class of a kernel."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name)), REST)


def time_by_class(kernels: list[Kernel], wall: float) -> dict[str, Any]:
    """Milliseconds and launches by class, idle time, and the largest kernels by name.

    Args:
        kernels: all kernels of a step.
        wall: wall-clock microseconds of the step.
    """
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    classes = {kind: {"ms": 0.0, "launches": 0} for kind in (*CLASSES, REST)}
    names: dict[str, list[float]] = defaultdict(list)
    for name, start, end in kernels:
        names[name].append((end - start) / 1e3)
    for name, ms in names.items():
        classes[kernel_class(name)]["ms"] += sum(ms)
        classes[kernel_class(name)]["launches"] += len(ms)
    largest = sorted(names, key=lambda name: -sum(names[name]))[:LARGEST]
    return {
        "wall ms": wall / 1e3,
        "classes": classes,
        "idle ms": (wall - covered(kernels)) / 1e3,
        "largest": [
            {"name": name[:120], "class": kernel_class(name), "ms": sum(names[name]), "launches": len(names[name])}
            for name in largest
        ],
    }


def covered(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, until = 0.0, -math.inf
    for _, start, end in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def run_dpo_fast(contest: Contest, clock: StepClock, scratch: str) -> None:
    """Our trainer, with an empty reference store."""
    from dpo_fast.config import DPOConfig
    from dpo_fast.training import run as trainer

    class TimedTrainer(trainer.Trainer):
        """Reports steps to the clock and writes no final model, like TRL with `save_strategy="no"`."""

        def after_step(self, grad_norm: Any, reporter: Any) -> None:
            super().after_step(grad_norm, reporter)
            clock.step_done()

        def read_window(self, grad_norm: Any) -> dict[str, float]:
            row = super().read_window(grad_norm)
            clock.losses.append(row["loss"])
            return row

        def write_model(self, folder: Path) -> None:
            pass

    trainer.Trainer = TimedTrainer  # type: ignore[misc]
    config = DPOConfig(
        model=contest.model,
        data=contest.data,
        reference_store=f"{scratch}/reference.sqlite",
        save_steps=0,
        max_tokens_per_batch=contest.max_tokens_per_batch,
        **contest.settings(f"{scratch}/run"),
        **CONTESTANTS[contest.contestant],
    )
    clock.start()
    trainer.train(config)


def run_trl(contest: Contest, clock: StepClock, scratch: str) -> None:
    """TRL's trainer, given a path, so that it loads the model (and the reference) itself."""
    import torch
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback

    class Timing(TrainerCallback):
        """Reports steps to the clock."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_done()

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    config = trl.DPOConfig(
        **contest.settings(f"{scratch}/run"),
        **CONTESTANTS[contest.contestant],
        model_init_kwargs={"dtype": "bfloat16"},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    dataset = load_dataset("json", data_files=contest.data, split="train", cache_dir=f"{scratch}/cache")
    clock.start()
    trl.DPOTrainer(
        contest.model,
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(contest.model),
        callbacks=[Timing()],
    ).train()


def run(contest: Contest, report: Report) -> None:
    """Run a contestant."""
    if contest.fail:
        raise RuntimeError("made to fail")
    # Imported lazily on first use, which would otherwise be timed.
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, get_scheduler  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    clock = StepClock(contest, report)
    with tempfile.TemporaryDirectory() as scratch:
        (run_dpo_fast if contest.contestant == "dpo-fast" else run_trl)(contest, clock, scratch)


def main() -> int:
    """Run a job; an error goes to the results, its traceback to stderr."""
    what, job = sys.argv[1], json.loads(sys.argv[2])
    report = Report(job["out"])
    try:
        if what == "make":
            make(Making(**job), report)
        else:
            run(Contest(**job), report)
    except Exception as error:
        traceback.print_exc()
        report.add({"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
