"""What signals that ask a model on a server share: many requests in flight, each reply kept as soon as it arrives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from dpo_fast.config import SignalConfig
from dpo_fast.curate.engines.parallel import Log, in_parallel
from dpo_fast.curate.engines.servers import Refused, Servers
from dpo_fast.curate.identity import Identity, model_identity
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.signals.declare import bad_spec
from dpo_fast.curate.verdict import Question, Verdict, shorten

# What follows the signal's name if the model is on a server.
PREFIX = "openai:"
# A reply as JSON holds it. Requests of a row are numbered; `refused` says why one has no reply.
Reply = dict[str, Any]


class ServedSignal(ABC):
    """Judges rows by requests that do not depend on each other.

    Attributes:
        name: of the model on the server.
        spec: the signal as users write it, for messages and keys of the log.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, config: SignalConfig) -> None:
        if not name:
            raise bad_spec(f"{self.kind}:{PREFIX}", f"{self.kind}:{PREFIX}NAME, a model's name on the server")
        self.name = name
        self.spec = f"{self.kind}:{PREFIX}{name}"
        self.config = config

    @abstractmethod
    def bodies(self, question: Question) -> list[dict[str, Any]]:
        """What to ask about a row."""

    @abstractmethod
    def ask(self, servers: Servers, body: dict[str, Any]) -> Reply:
        """The reply to one request; a `Refused` becomes a reply as well."""

    @abstractmethod
    def verdicts(self, question: Question, replies: list[Reply]) -> list[Verdict]:
        """A verdict on each answer, from the replies in the order of `bodies`."""

    @abstractmethod
    def summary(self) -> str:
        """What was counted while judging."""

    @abstractmethod
    def estimate(self, questions: list[Question]) -> str:
        """Requests and tokens that judging takes."""

    def judge(self, questions: dict[int, Question], log: Log | None) -> Iterator[tuple[int, list[Verdict]]]:
        """Verdicts on each row, in the order in which rows are complete.

        Args:
            questions: rows by number.
            log: replies so far, to which new ones are added at once; rows that it holds are not asked about again.

        Raises:
            EngineError: servers failed too often.
            UserError: no server is given, or the key or the model's name is wrong.
        """
        settings = self.config
        url = settings.base_url if settings.judge_base_url is None else settings.judge_base_url
        servers = Servers(url, settings, api_key_env=settings.judge_api_key_env)
        kept = {} if log is None else log.results
        open_rows: dict[int, list[Reply | None]] = {}
        complete: list[int] = []

        def missing() -> Iterator[tuple[int, int, dict[str, Any]]]:
            for number, question in questions.items():
                bodies = self.bodies(question)
                open_rows[number] = [kept.get(self._key(number, place)) for place in range(len(bodies))]
                if None not in open_rows[number]:
                    complete.append(number)
                for place, body in enumerate(bodies):
                    if open_rows[number][place] is None:
                        yield number, place, body

        def ask(job: tuple[int, int, dict[str, Any]]) -> Reply:
            try:
                return self.ask(servers, job[2])
            except Refused as error:
                return {"refused": shorten(str(error))}

        for batch in in_parallel(missing(), ask, settings.concurrency):
            replies = {(number, place): reply for (number, place, _), reply in batch}
            if log is not None:
                log.add({self._key(number, place): reply for (number, place), reply in replies.items()})
            for (number, place), reply in replies.items():
                open_rows[number][place] = reply
                if None not in open_rows[number]:
                    complete.append(number)
            yield from self._close(complete, questions, open_rows)
        yield from self._close(complete, questions, open_rows)

    def _close(
        self, complete: list[int], questions: dict[int, Question], open_rows: dict[int, list[Reply | None]]
    ) -> Iterator[tuple[int, list[Verdict]]]:
        while complete:
            number = complete.pop()
            replies = [reply for reply in open_rows.pop(number) if reply is not None]
            yield number, self.verdicts(questions[number], replies)

    def _key(self, number: int, place: int) -> str:
        return f"{self.spec} {number} {place}"


def identity_of(argument: str) -> Identity:
    """The hashes of a model on this machine; None for one on a server, which does not show its weights."""
    return None if argument.startswith(PREFIX) else model_identity(argument)


def turns(value: Any, role: str) -> list[dict[str, str]]:
    """A prompt or an answer as messages of plain text."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    messages = [messages] if isinstance(messages, dict) else messages
    return [{"role": str(m.get("role") or role), "content": defuse(text_of(m))} for m in messages]


def defuse(text: str) -> str:
    """The text with `<|` broken up, by which control tokens of most chat templates begin.

    Only the server knows all of them; an answer must not end its own turn.
    """
    return text.replace("<|", "< |")
