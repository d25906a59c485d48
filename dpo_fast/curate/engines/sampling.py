"""`dpo-fast sample --backend openai`: prompts -> answers of served models.

Every answer has a key of its own in the log, so any part of the work can be missing when a run resumes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash
from rich.console import Console

from dpo_fast.config import DataConfig, SampleConfig
from dpo_fast.console import progress_line, say
from dpo_fast.curate.engines.chat import Replies, body_of, estimated_tokens, path_of, read_replies
from dpo_fast.curate.engines.parallel import Log, in_parallel, resumable
from dpo_fast.curate.engines.servers import Refused, Servers
from dpo_fast.curate.rows import Row, report_dropped
from dpo_fast.data.conversation import Text
from dpo_fast.data.formats import template_kwargs, to_prompt
from dpo_fast.data.row_report import RowError
from dpo_fast.errors import UserError


@dataclass(frozen=True)
class _Prompt:
    """A row that has a prompt, and what is sent for it."""

    number: int
    row: Row
    text: Text
    body: dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A row, its prompt as it was sent, and each answer with where it comes from."""

    row: Row
    prompt: Text
    answers: list[tuple[str, Row]]


@dataclass(frozen=True)
class _Source:
    """A model at a temperature.

    Attributes:
        number: its place among all.
        copies: which of a prompt's answers it writes.
    """

    number: int
    model: str
    temperature: float
    copies: range


@dataclass(frozen=True)
class _Job:
    """One request: `copies` of a prompt's answers."""

    source: _Source
    prompt: int
    copies: tuple[int, ...]

    @property
    def keys(self) -> list[str]:
        return [f"{self.source.number}/{self.prompt}/{copy}" for copy in self.copies]

    def seed(self, seed: int) -> int:
        """31 bits, since some servers keep seeds in 32 with a sign."""
        return xxhash.xxh3_64_intdigest(f"{seed}/{self.keys[0]}".encode()) >> 33

    def split(self) -> list[_Job]:
        """One request for each answer."""
        return [replace(self, copies=(copy,)) for copy in self.copies]


def served_answers(
    rows: Sequence[Row],
    config: SampleConfig,
    sources: Sequence[tuple[str, float]],
    columns: DataConfig,
    *,
    console: Console,
    log: Log,
) -> list[Answered]:
    """The rows that have a prompt, with all answers that servers gave, duplicates included.

    Args:
        rows: with prompts.
        config: settings of sampling and of the servers.
        sources: models and temperatures.
        columns: where a row's prompt is, and what its chat template is given.
        console: shows progress and what was sent.
        log: results so far; an answer is added as soon as it arrives.

    Returns:
        In order; a row has fewer answers, or none, if the server refused its requests.

    Raises:
        UserError: a setting or the data is wrong, or the server refused every request.
        EngineError: servers failed too often.
    """
    servers = Servers(config.base_url, config)
    prompts = _prompts(rows, config, columns, console)
    sampling = _Sampling(prompts, config, _sources(sources, config), servers, log)
    total = len(prompts) * config.num_samples
    with resumable(log), progress_line(console, "sampling", total, sampling.num_done()) as line:
        for number in sampling.run():
            line.advance(number)
    say(console, sampling.summary())
    return sampling.answered()


def describe_plan(
    rows: Sequence[Row],
    config: SampleConfig,
    sources: Sequence[tuple[str, float]],
    columns: DataConfig,
    *,
    console: Console,
) -> str:
    """What sampling would send, before anything is sent: requests and tokens."""
    prompts = _prompts(rows, config, columns, console)
    requests = [source for source in _sources(sources, config) if source.copies]
    tokens = len(requests) * sum(estimated_tokens(prompt.text) for prompt in prompts)
    answers = len(prompts) * config.num_samples
    return (
        f"dry run: {len(requests) * len(prompts)} requests for {answers} answers, about {tokens:.0f} prompt tokens, "
        f"at most {answers * config.max_new_tokens} answer tokens"
    )


def _sources(sources: Sequence[tuple[str, float]], config: SampleConfig) -> list[_Source]:
    return [
        _Source(number, model, temperature, range(number, config.num_samples, len(sources)))
        for number, (model, temperature) in enumerate(sources)
    ]


class _Sampling:
    """The work of one run."""

    def __init__(
        self, prompts: list[_Prompt], config: SampleConfig, sources: list[_Source], servers: Servers, log: Log
    ) -> None:
        self.prompts = prompts
        self.config = config
        self.sources = sources
        self.servers = servers
        self.log = log
        # Until a server is found to reject `n`; one that ignores it costs no request.
        self.n_is_supported = True
        self.again: deque[_Job] = deque()
        self.split_prompts: set[int] = set()

    def num_done(self) -> int:
        """Answers that the log holds, refused ones included."""
        return len(self.log.results)

    def run(self) -> Iterator[int]:
        """Ask for what the log lacks; yields how many answers were settled each time."""
        answered = refused = 0
        for batch in in_parallel(self._missing(), self._ask, self.config.concurrency, self.again):
            results = {key: result for job, found in batch for key, result in self._settle(job, found).items()}
            self.log.add(results)
            reasons = [result["refused"] for result in results.values() if "refused" in result]
            refused += len(reasons)
            answered += len(results) - len(reasons)
            if reasons and not answered and refused > 2 * self.config.concurrency:
                raise UserError(f"the server refuses every request: {reasons[0]}")
            yield len(results)

    def _missing(self) -> Iterator[_Job]:
        """What the log lacks, with all answers to a prompt in one request as long as servers support that."""
        for source in self.sources:
            for number in range(len(self.prompts)):
                whole = _Job(source, number, tuple(source.copies))
                keys = zip(whole.copies, whole.keys, strict=True)
                copies = tuple(copy for copy, key in keys if key not in self.log.results)
                job = _Job(source, number, copies)
                yield from [job] if self.n_is_supported and copies else job.split()

    def _ask(self, job: _Job) -> Replies | Refused:
        prompt, config = self.prompts[job.prompt], self.config
        body = {
            "model": job.source.model,
            "temperature": job.source.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_new_tokens,
            "seed": job.seed(config.seed),
        }
        if len(job.copies) > 1:
            body["n"] = len(job.copies)
        try:
            return self.servers.post(path_of(prompt.text), prompt.body | body, read_replies)
        except Refused as error:
            return error

    def _settle(self, job: _Job, found: Replies | Refused) -> dict[str, Any]:
        """The results of a request by key; what it did not bring is asked for again, one answer a request."""
        if isinstance(found, Refused):
            if len(job.copies) == 1:
                return {job.keys[0]: {"refused": str(found)}}
            # Either `n` is the reason or the prompt is.
            self.split_prompts.add(job.prompt)
            self.again.extend(job.split())
            return {}
        if len(found.choices) < len(job.copies):
            self.again.extend(replace(job, copies=job.copies[len(found.choices) :]).split())
        elif len(job.copies) == 1 and job.prompt in self.split_prompts:
            self.n_is_supported = False
        results: dict[str, Any] = {
            key: {
                "text": reply.text,
                "finished": reply.finished,
                "finish_reason": reply.finish_reason,
                "num_tokens": found.answer_tokens if len(found.choices) == 1 else None,
                "seed": job.seed(self.config.seed),
            }
            for key, reply in zip(job.keys, found.choices, strict=False)
        }
        results[job.keys[0]]["usage"] = [found.prompt_tokens, found.answer_tokens]
        return results

    def answered(self) -> list[Answered]:
        """The prompts with the answers that the log holds."""
        return [Answered(prompt.row, prompt.text, list(self._answers(prompt))) for prompt in self.prompts]

    def _answers(self, prompt: _Prompt) -> Iterator[tuple[str, Row]]:
        for source in self.sources:
            for key in _Job(source, prompt.number, tuple(source.copies)).keys:
                answer = self.log.results[key]
                if "refused" not in answer:
                    figures = {name: answer[name] for name in ("seed", "finished", "finish_reason", "num_tokens")}
                    origin = {"model": source.model, "temperature": source.temperature, "logp": None}
                    yield answer["text"], origin | figures

    def summary(self) -> str:
        """`800 answers, 25 cut at --max_new_tokens; 9,120 prompt tokens, 20,480 answer tokens; 812 requests`."""
        results = list(self.log.results.values())
        answers = [result for result in results if "refused" not in result]
        cut = sum(answer["finish_reason"] == "length" for answer in answers)
        usages = [answer["usage"] for answer in answers if "usage" in answer]
        prompt_tokens, answer_tokens = (sum(usage[i] or 0 for usage in usages) for i in (0, 1))
        refused = [result["refused"] for result in results if "refused" in result]
        return (
            f"{len(answers)} answers, {cut} cut at --max_new_tokens {self.config.max_new_tokens}; "
            f"{prompt_tokens:,} prompt tokens, {answer_tokens:,} answer tokens; {self.servers.num_requests:,} requests"
            + (f"; {len(refused)} answers refused ({refused[0]})" if refused else "")
        )


def _prompts(rows: Sequence[Row], config: SampleConfig, columns: DataConfig, console: Console) -> list[_Prompt]:
    """The rows that have a prompt; a string becomes a user turn unless the settings say no."""
    usable: list[_Prompt] = []
    dropped: list[str] = []
    for number, row in enumerate(rows):
        try:
            prompt, tools = to_prompt(row, columns)
            if isinstance(prompt, str) and config.apply_chat_template is not False:
                prompt = [{"role": "user", "content": prompt}]
            body = body_of(prompt)
            if tools is not None and not isinstance(prompt, str):
                body["tools"] = tools
            if kwargs := template_kwargs(row, columns):
                body["chat_template_kwargs"] = kwargs
        except RowError as error:
            dropped.append(f"row {number}: {error}")
        else:
            kept = row | ({} if tools is None else {config.tools_column: tools})
            usable.append(_Prompt(len(usable), kept, prompt, body))
    report_dropped(console, dropped)
    if not usable:
        raise UserError("no row has a prompt to answer" + (f": {dropped[0]}" if dropped else ""))
    return usable
