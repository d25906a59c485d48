"""Rows of any known form -> one canonical preference.

| form | fields |
|---|---|
| standard | `prompt`, `chosen`, `rejected` as strings; without `prompt`, the strings begin alike |
| conversational | the same as lists of `{"role", "content"}` messages; without `prompt`, the lists begin alike |
| scored | `prompt`, `responses`, `scores`: the pairs that `--pairs` asks for |
| hh-rlhf | `chosen`, `rejected` as transcripts of `Human:` and `Assistant:` turns |
| sharegpt | `conversations` of `{"from", "value"}` turns, `chosen` and `rejected` as one turn each |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, TypeVar

from dpo_fast.config import DataConfig, PairChoice
from dpo_fast.data.row_report import RowError
from dpo_fast.packs.layout import Ranking

Message = dict[str, Any]
Text = str | list[Message]
T = TypeVar("T")

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and its answers, all of them strings or all of them lists of messages.

    Attributes:
        prompt: None where the prompt is what all answers begin with.
        answers: two or more, none empty.
        ranking: of the answers; the two of a pair differ.
        tools: for the chat template.
    """

    prompt: Text | None
    answers: tuple[Text, ...]
    ranking: Ranking
    tools: list[Any] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it is rendered by the chat template."""
        return not isinstance(self.answers[0], str)


def to_preference(row: Any, config: DataConfig, *, has_chat_template: bool) -> Preference:
    """Recognise a row.

    Raises:
        RowError: it names the field, what was expected and what was found.
    """
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"expected an object with fields, found {type(row).__name__}")
    prompt = row.get(config.prompt_column)
    names, values, ranking = _answers(row, config)
    if prompt is None and row.get("conversations") is not None:
        prompt = row["conversations"]
    if prompt is None and _are_transcripts(values):
        prompt, answers = _from_transcripts(values, as_messages=has_chat_template)
    else:
        prompt, answers = _from_fields(prompt, values, names, config)
    tools = _tools(row, config.tools_column)
    if config.apply_chat_template and isinstance(prompt, str) and all(isinstance(a, str) for a in answers):
        prompt = [{"role": "user", "content": prompt}]
        answers = [[{"role": "assistant", "content": answer}] for answer in answers]
    answers, ranking = only_different(answers, ranking)
    if not ranking.pairs:
        raise RowError("identical_answers", "")
    return Preference(prompt, tuple(answers), ranking, tools)


def only_different(answers: Sequence[T], ranking: Ranking) -> tuple[list[T], Ranking]:
    """The pairs whose answers differ, and the answers that are in them or gold."""
    used, ranking = ranking.keep([pair for pair in ranking.pairs if answers[pair[0]] != answers[pair[1]]])
    return [answers[i] for i in used], ranking


def _answers(row: dict[str, Any], config: DataConfig) -> tuple[list[str], list[Any], Ranking]:
    """The fields' names, their values, and how they compare."""
    scores: Sequence[float] | None = None
    if row.get(config.chosen_column) is None and row.get(config.responses_column) is not None:
        values, scores, pairs = _scored(row, config)
        names = [config.responses_column] * len(values)
    else:
        names = [config.chosen_column, config.rejected_column]
        values, pairs = [_field(row, name) for name in names], [(0, 1)]
        if config.margin_column is not None:
            scores = [_number(row, config.margin_column), 0.0]
    gold = None
    if config.gold_column is not None:
        gold = len(values)
        names, values = [*names, config.gold_column], [*values, _field(row, config.gold_column)]
        scores = None if scores is None else [*scores, math.nan]
    weight = 1.0 if config.weight_column is None else _number(row, config.weight_column)
    if weight < 0:
        raise RowError("wrong_type", f"field {config.weight_column!r}: expected 0 or above, found {weight:g}")
    return names, values, Ranking(tuple(pairs), None if scores is None else tuple(map(float, scores)), gold, weight)


def _number(row: dict[str, Any], name: str) -> float:
    value = _field(row, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError("wrong_type", f"field {name!r}: expected a finite number, found {value!r:.40}")
    return float(value)


def _field(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowError(
            "missing_field",
            f"field {name!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}. "
            "--chosen_column, --rejected_column and --prompt_column map other names",
        )
    return row[name]


def _scored(row: dict[str, Any], config: DataConfig) -> tuple[list[Any], list[float], list[tuple[int, int]]]:
    responses, scores = row[config.responses_column], _field(row, config.scores_column)
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise RowError(
            "wrong_type",
            f"expected {config.responses_column!r} and {config.scores_column!r} to be lists of the same length",
        )
    # A response that no signal could judge has no score.
    judged = [i for i, score in enumerate(scores) if score is not None]
    responses, scores = [responses[i] for i in judged], [scores[i] for i in judged]
    if not all(isinstance(s, int | float) and math.isfinite(s) for s in scores) or len(scores) < 2:
        raise RowError("wrong_type", f"expected at least two finite numbers in {config.scores_column!r}")
    pairs = choose_pairs(scores, config.pairs, config.min_score_gap)
    if not pairs:
        raise RowError("tied_scores", "")
    return responses, scores, pairs


def choose_pairs(scores: Sequence[float], which: PairChoice, min_gap: float) -> list[tuple[int, int]]:
    """(better, worse) indices of responses whose scores differ, by `min_gap` at least.

    Args:
        scores: one a response.
        which: `best_worst` the best against the worst, `adjacent` each against the next worse one, `all` every two.
        min_gap: smallest difference of scores.
    """
    if which == "best_worst":
        candidates = [(scores.index(max(scores)), scores.index(min(scores)))]
    else:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        candidates = list(pairwise(order) if which == "adjacent" else combinations(order, 2))
    gaps = {(a, b): scores[a] - scores[b] for a, b in candidates}
    return [pair for pair, gap in gaps.items() if gap > 0 and gap >= min_gap]


def _from_fields(
    prompt: Any, values: list[Any], names: list[str], config: DataConfig
) -> tuple[Text | None, list[Text]]:
    if all(isinstance(value, str) for value in values) and (prompt is None or isinstance(prompt, str)):
        for name, text in zip(names, values, strict=True):
            if not text:
                raise RowError("empty_answer", f"field {name!r} is an empty string")
        return prompt, values
    answers = [_messages(value, name) for name, value in zip(names, values, strict=True)]
    start_with_user = all(answer[0]["role"] in ("user", "system") for answer in answers)
    if prompt is None or (isinstance(prompt, str) and start_with_user):
        # Whole conversations, with the prompt's text in a column beside them (as binarised UltraFeedback has it).
        return _split_conversations(answers)
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], list(answers)
    return _messages(prompt, config.prompt_column), list(answers)


def _common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Number of leading items that all sequences share."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length


def _split_conversations(conversations: list[list[Message]]) -> tuple[Text, list[Text]]:
    common = _common_length(conversations)
    if all(common == len(c) for c in conversations):
        raise RowError("identical_answers", "")
    # An answer keeps its last message, also where one conversation goes on after the other's end.
    common = min(common, *(len(c) - 1 for c in conversations))
    if common == 0:
        raise RowError("missing_field", "the conversations have no first message in common, so there is no prompt")
    return conversations[0][:common], [c[common:] for c in conversations]


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


def to_prompt(row: dict[str, Any], prompt_column: str, tools_column: str) -> tuple[Text, list[Any] | None]:
    """A row's prompt, where it has no answers yet, and the tools that the chat template is given.

    Raises:
        RowError: it names the field, what was expected and what was found.
    """
    prompt = row.get(prompt_column)
    if prompt is None:
        raise RowError(
            "missing_field",
            f"field {prompt_column!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}. "
            "--prompt_column maps another name",
        )
    if prompt == "":
        raise RowError("wrong_type", f"field {prompt_column!r}: expected a prompt, found an empty string")
    return prompt if isinstance(prompt, str) else _messages(prompt, prompt_column), _tools(row, tools_column)


def _tools(row: dict[str, Any], column: str) -> list[Any] | None:
    tools = row.get(column)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError("wrong_type", f"field {column!r}: not valid JSON: {error.msg}") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("wrong_type", f"field {column!r}: expected a list of tools, each a JSON schema")
    return tools or None


def _are_transcripts(values: list[Any]) -> bool:
    return all(isinstance(v, str) and v.startswith("\n\nHuman:") and "\n\nAssistant:" in v for v in values)


def _from_transcripts(texts: list[str], *, as_messages: bool) -> tuple[Text, list[Text]]:
    """hh-rlhf: whole turns in common are the prompt; as text, the prompt ends in `Assistant:`."""
    turns = [_turns(text) for text in texts]
    if as_messages:
        return _split_conversations([[{"role": r, "content": c.strip()} for r, c, _ in t] for t in turns])
    common = min(_common_length(turns), *(len(t) - 1 for t in turns))
    if any(t[common][0] != "assistant" for t in turns):
        raise RowError("missing_field", "the transcripts part at a turn that is not the assistant's")
    prompt = "".join(raw for _, _, raw in turns[0][:common]) + "\n\nAssistant:"
    answers = ["".join(raw for _, _, raw in t[common:]).removeprefix("\n\nAssistant:") for t in turns]
    if not all(answer.strip() for answer in answers):
        raise RowError("empty_answer", "the last turn of a transcript is empty")
    return prompt, list(answers)


def _turns(text: str) -> list[tuple[str, str, str]]:
    """(role, content, raw text) of each turn of a transcript."""
    marks = list(_HH_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        ({"Human": "user", "Assistant": "assistant"}[mark[1]], text[mark.end() : end], text[mark.start() : end])
        for mark, end in zip(marks, ends, strict=True)
    ]
