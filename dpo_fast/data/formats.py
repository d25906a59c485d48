"""Rows of any known form -> one canonical preference.

| form | fields |
|---|---|
| standard | `prompt`, `chosen`, `rejected` as strings; without `prompt`, the strings begin alike |
| conversational | the same as lists of `{"role", "content"}` messages; without `prompt`, the lists begin alike |
| scored | `prompt`, `responses`, `scores`: the best against the worst |
| hh-rlhf | `chosen`, `rejected` as transcripts of `Human:` and `Assistant:` turns |
| sharegpt | `conversations` of `{"from", "value"}` turns, `chosen` and `rejected` as one turn each |
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from dpo_fast.config import DataConfig
from dpo_fast.data.report import RowError

Message = dict[str, Any]
Text = str | list[Message]

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two answers, all of them strings or all of them lists of messages.

    Attributes:
        prompt: None where the prompt is what both answers begin with.
        chosen, rejected: not empty.
        tools: for the chat template.
    """

    prompt: Text | None
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it is rendered by the chat template."""
        return not isinstance(self.chosen, str)


def to_preference(row: Any, config: DataConfig, *, has_chat_template: bool) -> Preference:
    """Recognise a row.

    Raises:
        RowError: it names the field, what was expected and what was found.
    """
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"expected an object with fields, found {type(row).__name__}")
    prompt = row.get(config.prompt_column)
    if row.get(config.chosen_column) is None and row.get(config.responses_column) is not None:
        chosen, rejected = _best_and_worst(row, config)
    else:
        chosen, rejected = (_field(row, name) for name in (config.chosen_column, config.rejected_column))
    if prompt is None and row.get("conversations") is not None:
        prompt = row["conversations"]
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None and _is_transcript(chosen, rejected):
        preference = _from_transcripts(chosen, rejected, as_messages=has_chat_template)
    else:
        preference = _from_fields(prompt, chosen, rejected, config)
    tools = row.get(config.tools_column)
    if isinstance(tools, str):
        tools = _parse_tools(tools, config)
    if config.apply_chat_template and not preference.is_chat and preference.prompt is not None:
        preference = Preference(
            [{"role": "user", "content": preference.prompt}],
            [{"role": "assistant", "content": preference.chosen}],
            [{"role": "assistant", "content": preference.rejected}],
        )
    if preference.chosen == preference.rejected:
        raise RowError("identical_answers", "")
    return Preference(preference.prompt, preference.chosen, preference.rejected, tools or None)


def _field(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowError(
            "missing_field",
            f"field {name!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}. "
            "--chosen_column, --rejected_column and --prompt_column map other names",
        )
    return row[name]


def _best_and_worst(row: dict[str, Any], config: DataConfig) -> tuple[Any, Any]:
    responses, scores = row[config.responses_column], _field(row, config.scores_column)
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise RowError(
            "wrong_type",
            f"expected {config.responses_column!r} and {config.scores_column!r} to be lists of the same length",
        )
    numbers = [s for s in scores if isinstance(s, int | float) and math.isfinite(s)]
    if len(numbers) != len(scores) or len(scores) < 2:
        raise RowError("wrong_type", f"expected at least two finite numbers in {config.scores_column!r}")
    best, worst = max(scores), min(scores)
    if best == worst:
        raise RowError("tied_scores", "")
    return responses[scores.index(best)], responses[scores.index(worst)]


def _from_fields(prompt: Any, chosen: Any, rejected: Any, config: DataConfig) -> Preference:
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        for name, text in ((config.chosen_column, chosen), (config.rejected_column, rejected)):
            if not text:
                raise RowError("empty_answer", f"field {name!r} is an empty string")
        return Preference(prompt, chosen, rejected)
    chosen_messages = _messages(chosen, config.chosen_column)
    rejected_messages = _messages(rejected, config.rejected_column)
    starts_with_user = [m[0]["role"] in ("user", "system") for m in (chosen_messages, rejected_messages)]
    if prompt is None or (isinstance(prompt, str) and all(starts_with_user)):
        # Whole conversations, with the prompt's text in a column beside them (as binarised UltraFeedback has it).
        return _split_conversations(chosen_messages, rejected_messages)
    if isinstance(prompt, str):
        prompt_messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        prompt_messages = _messages(prompt, config.prompt_column)
    return Preference(prompt_messages, chosen_messages, rejected_messages)


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> Preference:
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        raise RowError("identical_answers", "")
    # An answer keeps its last message, also where one conversation goes on after the other's end.
    common = min(common, len(chosen) - 1, len(rejected) - 1)
    if common == 0:
        raise RowError("missing_field", "the conversations have no first message in common, so there is no prompt")
    return Preference(chosen[:common], chosen[common:], rejected[common:])


def _messages(value: Any, name: str) -> list[Message]:
    """Messages with `role` and `content`, from lists or single ones, in either vocabulary."""
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError("wrong_type", f"field {name!r}: expected a string or messages, found {type(value).__name__}")
    messages = [_message(item, name) for item in value]
    last = messages[-1]
    if not last["content"] and not last.get("tool_calls"):
        raise RowError("empty_answer", f"field {name!r}: its last message is empty")
    return messages


def _message(value: Any, name: str) -> Message:
    if isinstance(value, dict) and "from" in value and "value" in value:
        sender = value["from"]
        value = {"role": _ROLES.get(sender, sender), "content": value["value"]}
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
    return {key: item for key, item in value.items() if item is not None} | {"content": content or ""}


def _parse_tools(text: str, config: DataConfig) -> list[Any]:
    try:
        tools = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError("wrong_type", f"field {config.tools_column!r}: not valid JSON: {error.msg}") from error
    if not isinstance(tools, list):
        raise RowError("wrong_type", f"field {config.tools_column!r}: expected a list of tools")
    return tools


def _is_transcript(chosen: str, rejected: str) -> bool:
    return all(text.startswith("\n\nHuman:") and "\n\nAssistant:" in text for text in (chosen, rejected))


def _from_transcripts(chosen: str, rejected: str, *, as_messages: bool) -> Preference:
    """hh-rlhf: whole turns in common are the prompt; as text, the prompt ends in `Assistant:`."""
    turns = [_turns(text) for text in (chosen, rejected)]
    if as_messages:
        return _split_conversations(*([{"role": r, "content": c.strip()} for r, c, _ in t] for t in turns))
    common = 0
    while common < min(map(len, turns)) and turns[0][common] == turns[1][common]:
        common += 1
    common = min(common, len(turns[0]) - 1, len(turns[1]) - 1)
    if any(t[common][0] != "assistant" for t in turns):
        raise RowError("missing_field", "the transcripts part at a turn that is not the assistant's")
    prompt = "".join(raw for _, _, raw in turns[0][:common]) + "\n\nAssistant:"
    answers = ["".join(raw for _, _, raw in t[common:]).removeprefix("\n\nAssistant:") for t in turns]
    if not all(answer.strip() for answer in answers):
        raise RowError("empty_answer", "the last turn of a transcript is empty")
    return Preference(prompt, answers[0], answers[1])


def _turns(text: str) -> list[tuple[str, str, str]]:
    """(role, content, raw text) of each turn of a transcript."""
    marks = list(_HH_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        ({"Human": "user", "Assistant": "assistant"}[mark[1]], text[mark.end() : end], text[mark.start() : end])
        for mark, end in zip(marks, ends, strict=True)
    ]
