"""`dpo-fast sample`: prompts -> several answers each, by one or several models at one or several temperatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from rich.console import Console

from dpo_fast.config import DataConfig, SampleConfig
from dpo_fast.console import ProgressLine, progress_line, say
from dpo_fast.curate.engines.parallel import Log
from dpo_fast.curate.engines.sampling import describe_plan, served_answers
from dpo_fast.curate.engines.servers import NEUTRAL_SETTINGS
from dpo_fast.curate.generate import Writer, load_writer
from dpo_fast.curate.identity import file_identity, model_identity, versions
from dpo_fast.curate.rows import (
    Row,
    Rows,
    as_dataset,
    as_rows,
    check_out,
    hold_output,
    read_objects,
    report_dropped,
    write_rows,
)
from dpo_fast.curate.stopping import exit_on_signals
from dpo_fast.curate.worklog import WorkLog
from dpo_fast.data.conversation import Text
from dpo_fast.data.formats import template_kwargs, to_prompt
from dpo_fast.data.row_report import RowError
from dpo_fast.data.tokenize import PairTokenizer
from dpo_fast.errors import UserError
from dpo_fast.model.load import load_tokenizer
from dpo_fast.model.placement import pick_device

if TYPE_CHECKING:
    from datasets import Dataset

RESPONSES, SAMPLES = "responses", "samples"
# Settings that do not change any answer.
_NEUTRAL = ("out", "overwrite", "dry_run", *NEUTRAL_SETTINGS)


@exit_on_signals(resumable=True)
def run_sample(config: SampleConfig, *, console: Console | None = None) -> Path:
    """Answer the prompts of `config.data` and write `config.out`, one row per prompt.

    Answers are kept batch by batch in `OUT.partial`; a killed run resumes after the last complete batch and ends with
    the same answers.

    Raises:
        UserError: a mistake in the settings or the data.
    """
    console = console or Console()
    if config.backend != "openai":
        pick_device(config.device)
    out = check_out(config.out, overwrite=config.overwrite)
    rows = read_objects(config.data, config.max_rows, console)
    if config.dry_run:
        say(console, describe_plan(rows, config, _sources(config), _columns(config), console=console))
        return out
    with hold_output(out), WorkLog(out, _depends_on(rows, config), overwrite=config.overwrite) as log:
        written = sample_rows(rows, config, console=console, log=log)
        write_rows(out, written)
        log.finish()
    say(console, f"{len(written)} prompts with answers: {out}")
    return out


def _depends_on(rows: Sequence[Row], config: SampleConfig) -> dict[str, Any]:
    """All that an answer depends on, by name. What a server runs is not known here."""
    depends_on: dict[str, Any] = {
        "settings": {name: value for name, value in asdict(config).items() if name not in _NEUTRAL},
        "rows": rows,
    }
    if config.backend == "openai":
        return depends_on
    depends_on |= {
        "device": pick_device(config.device).type,
        "versions": versions("torch", "transformers", *(["vllm"] if config.backend == "vllm" else [])),
    }
    if config.chat_template is not None:
        depends_on["chat template"] = file_identity(config.chat_template)
    return depends_on | {
        f"files of the model {name}": model_identity(name, config.adapter_base) for name in _models(config) if name
    }


def _columns(config: SampleConfig) -> DataConfig:
    """Where a row's prompt is, and what its chat template is given."""
    names = ("prompt_column", "tools_column", "system_column", "chat_template_kwargs", "chat_template_kwargs_column")
    return DataConfig(**{name: getattr(config, name) for name in names})


def _models(config: SampleConfig) -> list[str]:
    return [config.model] if isinstance(config.model, str) else list(config.model)


def sample(data: Rows, model: str | list[str], *, console: Console | None = None, **settings: Any) -> Dataset:
    """Several answers to each prompt.

    Args:
        data: a file name, a Hub dataset's name, a list of dicts or a `datasets.Dataset`, with a column `prompt`.
        model: checkpoint folder, Hub name or .gguf file, or a list of them.
        console: where progress is printed.
        settings: fields of `SampleConfig`.

    Returns:
        The rows with `responses` and, for each of them, `samples`: model, temperature, seed, log-prob in nats, number
        of tokens, whether it finished, and how many times it was sampled.

    Raises:
        UserError: a mistake in the settings or the data.
    """
    console = console or Console()
    return as_dataset(sample_rows(as_rows(data, console), SampleConfig(model=model, **settings), console=console))


def sample_rows(
    rows: Sequence[Row], config: SampleConfig, *, console: Console, log: WorkLog | None = None
) -> list[Row]:
    """The rows with their distinct answers; see `sample`. Rows without a usable prompt are dropped and counted."""
    written = answer_rows(rows, config, console=console, log=log)
    distinct = [without_duplicates(row) for row in written if row[RESPONSES]]
    if not distinct:
        raise UserError("no prompt was answered: the server refused every request")
    before, after = (sum(len(row[RESPONSES]) for row in some) for some in (written, distinct))
    say(console, f"{before} answers, {before - after} duplicates")
    return distinct


def without_duplicates(row: Row) -> Row:
    """The row with each answer once and without token ids; `copies` says how many times it was sampled."""
    kept: dict[str, Row] = {}
    for text, sampled in zip(row[RESPONSES], row[SAMPLES], strict=True):
        figures = {name: value for name, value in sampled.items() if name != "ids"}
        kept.setdefault(text, figures | {"copies": 0})["copies"] += 1
    return row | {RESPONSES: list(kept), SAMPLES: list(kept.values())}


class _Memory:
    """A log of a run that nobody will resume."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def add(self, results: dict[str, Any]) -> None:
        self.results |= results


@dataclass(frozen=True)
class _Prompt:
    """A row that has a prompt, with its token ids for the model that is answering."""

    row: Row
    text: Text
    ids: list[int]


@dataclass(frozen=True)
class _Batch:
    """Answers that are written at once; `prompts` are indices of prompts, one per answer."""

    key: str
    model: str
    temperature: float
    seed: int
    prompts: tuple[int, ...]


def answer_rows(
    rows: Sequence[Row], config: SampleConfig, *, console: Console, log: WorkLog | None = None
) -> list[Row]:
    """The rows with all `num_samples` answers in the order of sampling, duplicates and token `ids` included.

    With the same seed, settings and tokens the i-th answers of two models come from the same stream of random numbers.
    """
    sources = _sources(config)
    columns = _columns(config)
    done: Log = log or _Memory()
    if config.backend == "openai":
        served = served_answers(rows, config, sources, columns, console=console, log=done)
        return [_with_responses(found.row, found.prompt, found.answers, config) for found in served]
    prompts: list[_Prompt] = []
    batches: list[_Batch] = []
    with progress_line(console, "sampling", 0) as line:
        for model, group in groupby(enumerate(sources), lambda source: source[1][0]):
            tokenizer = load_tokenizer(
                model, config.chat_template, base=config.adapter_base, trust_remote_code=config.trust_remote_code
            )
            tokenize = PairTokenizer(tokenizer)
            if prompts:
                prompts = [replace(p, ids=prompt_ids(p.row, p.text, tokenize, columns)) for p in prompts]
            else:
                prompts = _prompts(rows, config, tokenize, console)
                line.start(len(prompts) * config.num_samples)
            ids = [prompt.ids for prompt in prompts]
            own = [batch for number, (_, t) in group for batch in _batches(number, model, t, ids, config, len(sources))]
            _write(own, ids, done, partial(load_writer, model, tokenizer, config), line)
            batches += own
    return _with_answers(prompts, batches, done.results, config)


def _write(
    batches: list[_Batch], ids: list[list[int]], done: Log, load: Callable[[], Writer], line: ProgressLine
) -> None:
    """Write the batches that are not done yet; the model is loaded only if there are any."""
    writer: Writer | None = None
    for batch in batches:
        if batch.key not in done.results:
            writer = writer or load()
            answers = writer([ids[i] for i in batch.prompts], batch.temperature, batch.seed)
            done.add({batch.key: [asdict(answer) for answer in answers]})
        line.advance(len(batch.prompts))


def _with_answers(
    prompts: list[_Prompt], batches: list[_Batch], results: dict[str, Any], config: SampleConfig
) -> list[Row]:
    """The prompts' rows with their answers and where each of them comes from."""
    found: list[list[tuple[str, Row]]] = [[] for _ in prompts]
    for batch in batches:
        origin = {"model": batch.model, "temperature": batch.temperature, "seed": batch.seed}
        for i, answer in zip(batch.prompts, results[batch.key], strict=True):
            figures = {name: value for name, value in answer.items() if name != "text"}
            found[i].append((answer["text"], origin | figures | {"num_tokens": len(answer["ids"])}))
    return [
        _with_responses(prompt.row, prompt.text, answers, config)
        for prompt, answers in zip(prompts, found, strict=True)
    ]


def _with_responses(row: Row, prompt: Text, answers: list[tuple[str, Row]], config: SampleConfig) -> Row:
    """The row with its prompt as the model saw it, and each answer with where it comes from."""
    texts, origins = [text for text, _ in answers], [how for _, how in answers]
    return row | {config.prompt_column: prompt, RESPONSES: texts, SAMPLES: origins}


def _sources(config: SampleConfig) -> list[tuple[str, float]]:
    """All combinations of model and temperature.

    Raises:
        UserError: a setting cannot work.
    """
    temperatures = config.temperature if isinstance(config.temperature, list) else [config.temperature]
    sources = [(model, temperature) for model in _models(config) for temperature in temperatures]
    _check(config, sources)
    return sources


def _check(config: SampleConfig, sources: list[tuple[str, float]]) -> None:
    """Reject settings that cannot work."""
    if config.backend == "openai" and config.chat_template is not None:
        raise UserError("--chat_template: a server applies its own template; pass it to the server instead")
    if config.dry_run and config.backend != "openai":
        raise UserError(f"--dry_run: estimates requests to a server; --backend {config.backend} sends none")
    if not all(model for model, _ in sources) or not sources:
        raise UserError("no model given: pass --model with a checkpoint folder, a Hub name or a .gguf file")
    if config.num_samples < len(sources):
        raise UserError(
            f"--num_samples {config.num_samples}: expected at least one for each of the {len(sources)} combinations of "
            "model and temperature"
        )


def _prompts(rows: Sequence[Row], config: SampleConfig, tokenize: PairTokenizer, console: Console) -> list[_Prompt]:
    """The rows that have a prompt, tokenized; strings become a user turn if so configured."""
    wrap = config.apply_chat_template
    if wrap is None:
        wrap = bool(tokenize.tokenizer.chat_template)
    columns = _columns(config)
    usable: list[_Prompt] = []
    dropped: list[str] = []
    for number, row in enumerate(rows):
        try:
            prompt, tools = to_prompt(row, columns)
            if wrap and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            usable_row = row | ({} if tools is None else {config.tools_column: tools})
            ids = prompt_ids(usable_row, prompt, tokenize, columns)
            if not ids:
                raise RowError("wrong_type", "the prompt has no tokens, so there is nothing for a model to continue")
        except RowError as error:
            dropped.append(f"row {number}: {error}")
        else:
            usable.append(_Prompt(usable_row, prompt, ids))
    report_dropped(console, dropped)
    if not usable:
        raise UserError("no row has a prompt to answer" + (f": {dropped[0]}" if dropped else ""))
    return usable


def prompt_ids(row: Row, prompt: Text, tokenize: PairTokenizer, columns: DataConfig) -> list[int]:
    """The tokens of a row's prompt, up to where the answer begins.

    Raises:
        RowError: the chat template refuses it.
    """
    return tokenize.prompt_ids(prompt, row.get(columns.tools_column) or None, template_kwargs(row, columns))


def _batches(
    number: int, model: str, temperature: float, ids: list[list[int]], config: SampleConfig, num_sources: int
) -> Iterator[_Batch]:
    """The batches of one model at one temperature: prompts of similar length together, the longest first."""
    copies = len(range(number, config.num_samples, num_sources))
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    jobs = [i for i in order for _ in range(copies)]
    for start in range(0, len(jobs), config.generation_batch_size):
        key = f"{number}/{start}"
        seed = xxhash.xxh3_64_intdigest(f"{config.seed}/{key}".encode()) >> 1
        yield _Batch(key, model, temperature, seed, tuple(jobs[start : start + config.generation_batch_size]))
