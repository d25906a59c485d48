"""Requests for answers and how they are read: `/chat/completions` for messages, `/completions` for plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_fast.data.conversation import Text

# English text has about four characters a token; only the server knows better.
CHARACTERS_PER_TOKEN = 4
# Older servers name the token that ended the answer instead of `stop`.
_FINISHED = ("stop", "eos_token", "stop_sequence")


@dataclass(frozen=True)
class Reply:
    """One answer of a server.

    Attributes:
        text: what it wrote.
        finish_reason: `stop`, or `length` if it was cut at the maximum number of tokens, or the server's own word.
    """

    text: str
    finish_reason: str | None

    @property
    def finished(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.finish_reason in _FINISHED


@dataclass(frozen=True)
class Replies:
    """All answers to one request, at least one.

    Attributes:
        choices: in the server's order.
        prompt_tokens: of the request; None if the server does not say.
        answer_tokens: of all choices together; None if the server does not say.
    """

    choices: list[Reply]
    prompt_tokens: int | None
    answer_tokens: int | None


def path_of(prompt: Text) -> str:
    """Where a prompt is sent: the server's chat template is applied to messages, and nothing to a string."""
    return "/completions" if isinstance(prompt, str) else "/chat/completions"


def body_of(prompt: Text) -> dict[str, Any]:
    """The field that holds a prompt."""
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def read_replies(answer: Any) -> Replies:
    """What a server answered.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is not a completion.
    """
    choices = [_reply(choice) for choice in sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)]
    if not choices:
        raise ValueError("no choices")
    usage = answer.get("usage") or {}
    return Replies(choices, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _reply(choice: Any) -> Reply:
    message = choice.get("message")
    text = choice["text"] if message is None else message.get("content")
    if text is None and message.get("tool_calls"):
        # A call is no text that a model could be trained on without the template of its tool calls.
        return Reply("", "tool_calls")
    # A model that was cut while it reasoned has no content.
    text = "" if text is None and choice.get("finish_reason") == "length" else text
    if not isinstance(text, str):
        raise ValueError(f"an answer without text: {choice}")
    reason = choice.get("finish_reason")
    return Reply(text, None if reason is None else str(reason))


def _count(number: Any) -> int | None:
    return number if isinstance(number, int) and number >= 0 else None


def estimated_tokens(prompt: Text) -> float:
    """About how many tokens a prompt has."""
    if isinstance(prompt, str):
        return len(prompt) / CHARACTERS_PER_TOKEN
    return sum(len(str(message.get("content") or "")) for message in prompt) / CHARACTERS_PER_TOKEN
