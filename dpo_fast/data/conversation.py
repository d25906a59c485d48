"""Messages: their forms made one, and where a conversation's prompt ends and its answers begin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dpo_fast.data.row_report import RowError

Message = dict[str, Any]
Text = str | list[Message]

# sharegpt's words for who speaks. A `function_call` is the assistant's, its text the call as JSON.
_ROLES = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"},
    **{"bot": "assistant", "model": "assistant", "observation": "tool", "function_response": "tool"},
}


def to_messages(value: Any, name: str) -> list[Message]:
    """Messages with `role` and `content`, from a list, a single one or the assistant's text, in either vocabulary.

    Args:
        value: of a field.
        name: of the field, for messages.

    Raises:
        RowError: it is something else, or the last message is empty.
    """
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError("wrong_type", f"field {name!r}: expected a string or messages, found {type(value).__name__}")
    messages = [_message(item, name) for item in value]
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise RowError("empty_answer", f"field {name!r}: its last message is empty")
    return messages


def _message(value: Any, name: str) -> Message:
    if isinstance(value, dict) and "from" in value and "value" in value:
        value = _from_sharegpt(value, name)
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowError("wrong_type", f"field {name!r}: expected messages with 'role' and 'content'")
    content = value.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
            raise RowError("wrong_type", f"field {name!r}: only text parts are supported in a message's content")
        content = "".join(str(part) for part in parts)
    if content is not None and not isinstance(content, str):
        raise RowError("wrong_type", f"field {name!r}: expected a message's content to be a string")
    # Columnar files fill the keys that other rows have with null; a template would print them.
    message = {key: item for key, item in value.items() if item is not None} | {"content": content or ""}
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_with_parsed_arguments(call, name) for call in calls]
    return message


def _from_sharegpt(value: dict[str, Any], name: str) -> Message:
    sender, text = value["from"], value["value"]
    if sender != "function_call":
        return {"role": _ROLES.get(sender, sender), "content": text}
    calls = _parsed(text, name, "a function call") if isinstance(text, str) else text
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def _with_parsed_arguments(call: Any, name: str) -> Any:
    """A tool call whose arguments are an object: OpenAI's are JSON text, which templates would encode once more."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_parsed_arguments(call["function"], name)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    parsed = _parsed(arguments, name, "a tool call's arguments") if arguments.strip() else {}
    return call | {"arguments": parsed}


def _parsed(text: str, name: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong_type", f"field {name!r}: {what}: expected JSON, found {text!r:.60}") from error


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with this system turn, unless it has the same one already.

    Raises:
        RowError: it has another one.
    """
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise RowError("wrong_type", "the system column and the conversation's own system turn differ")
        return messages
    return [{"role": "system", "content": system}, *messages]


def split_conversations(
    prompt: list[Message] | str | None, answers: Sequence[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """The prompt with everything that all answers begin with, and what is left of each answer: its last turn at least.

    Args:
        prompt: messages, a user's text, or None if the answers hold it.
        answers: the turns that follow the prompt, or whole conversations that begin with it.

    Raises:
        RowError: there is no prompt, or whole conversations begin with another one.
    """
    if isinstance(prompt, str):
        prompt = _from_text(prompt, answers)
    wholes = [_whole(prompt or [], answer, answers) for answer in answers]
    common = min(common_length(wholes), *(len(whole) - 1 for whole in wholes))
    if common == 0:
        raise RowError("missing_field", "the conversations have no first message in common, so there is no prompt")
    return wholes[0][:common], [whole[common:] for whole in wholes]


def _from_text(prompt: str, answers: Sequence[list[Message]]) -> list[Message] | None:
    """A prompt that is a string: a user's turn, or a copy of one in whole conversations (binarised UltraFeedback)."""
    if not all(answer[0]["role"] in ("user", "system") for answer in answers):
        return [{"role": "user", "content": prompt}]
    text = prompt.strip()
    for answer in answers:
        turns = [message["content"].strip() for message in answer if message["role"] != "assistant"]
        if text and not any(turn and (text in turn or turn in text) for turn in turns):
            raise RowError(
                "wrong_type",
                "the answers are whole conversations, and the prompt's text is in none of their turns; pass "
                "--prompt_column '' if they hold the prompt",
            )
    return None


def _whole(prompt: list[Message], answer: list[Message], answers: Sequence[list[Message]]) -> list[Message]:
    """The conversation that an answer ends, whether or not the answer repeats the prompt."""
    before, own = _turns(prompt), _turns(answer)
    if not before or before[:1] != own[:1]:
        return [*prompt, *answer]
    # The prompt's column may hold one of the conversations whole, too.
    if before != own[: len(before)] and all(before != _turns(other) for other in answers):
        raise RowError("wrong_type", "an answer repeats the prompt's first turn and then departs from the prompt")
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else None
    return with_system(answer, system)


def _turns(messages: list[Message]) -> list[Message]:
    """Without the system turn, white space around the text left out."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return [message | {"content": message["content"].strip()} for message in turns]


def common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Number of leading items that all sequences share."""
    return min(common_prefix(sequences[0], other) for other in sequences[1:])


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Number of leading items that two sequences share."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
