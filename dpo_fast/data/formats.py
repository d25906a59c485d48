"""Rows of any known form -> one canonical preference.

| form | fields |
|---|---|
| standard | `prompt`, `chosen`, `rejected` as strings; without `prompt`, the strings begin with it |
| conversational | the same as lists of `{"role", "content"}` messages; without `prompt`, the lists begin with it |
| scored | `prompt`, `responses`, `scores`: the pairs that `--pairs` asks for |
| hh-rlhf | `chosen`, `rejected` as transcripts of `Human:` and `Assistant:` turns |
| sharegpt | `conversations` of `{"from", "value"}` turns, `chosen` and `rejected` as one turn each |

A format is a function under `@data_format` that finds the prompt and the answers in a row's columns; their shapes
(strings, messages, sharegpt turns, transcripts) are understood for all formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any, TypeVar

from dpo_fast.config import DataConfig, PairChoice
from dpo_fast.data import columns
from dpo_fast.data.columns import Row
from dpo_fast.data.conversation import Message, Text, common_length, split_conversations, to_messages, with_system
from dpo_fast.data.row_report import RowError
from dpo_fast.data.transcripts import Span, are_transcripts, split_transcripts, transcript_messages
from dpo_fast.packs.layout import Ranking

T = TypeVar("T")
# A shorter prompt may well be what an answer begins with by chance.
REPEATED_PROMPT = 20


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and its answers, all of them strings or all of them lists of messages.

    Attributes:
        prompt: None if the prompt is what all answers begin with.
        answers: two or more, none empty.
        ranking: of the answers; the two of a pair differ.
        tools: for the chat template.
        template_kwargs: for the chat template.
        targets: of strings with several turns, for each answer the spans of characters that are the assistant's.
        changes: what was done to the row, as causes of `row_report.CHANGED`.
        unused: columns that hold something and were not read.
    """

    prompt: Text | None
    answers: tuple[Text, ...]
    ranking: Ranking
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    targets: tuple[list[Span], ...] | None = None
    changes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether it is rendered by the chat template."""
        return not isinstance(self.answers[0], str)


@dataclass(frozen=True, slots=True)
class Draft:
    """What a format finds in a row: values of any shape.

    Attributes:
        prompt: a string, messages, or None if the answers hold it.
        answers: strings, messages or whole conversations.
        names: each answer's column, for messages.
        ranking: of the answers.
    """

    prompt: Any
    answers: list[Any]
    names: list[str]
    ranking: Ranking = field(default_factory=Ranking)


Format = Callable[[Row, DataConfig], Draft | None]
# Asked from the last to the first: the most general format is the first.
FORMATS: dict[str, Format] = {}


def data_format(find: Format) -> Format:
    """Register a format: a function from a row to a draft, or to None if the row is of another form."""
    FORMATS[find.__name__] = find
    return find


@data_format
def chosen_rejected(row: Row, config: DataConfig) -> Draft | None:
    """`chosen` and `rejected`; `margin_column` says by how much the one is better."""
    names = [config.chosen_column, config.rejected_column]
    answers = [row.require(name) for name in names]
    scores = None if config.margin_column is None else (row.number(config.margin_column), 0.0)
    return Draft(columns.find_prompt(row, config), answers, names, Ranking(scores=scores))


@data_format
def scored(row: Row, config: DataConfig) -> Draft | None:
    """`responses` and `scores`."""
    if row.get(config.chosen_column) is not None or row.get(config.responses_column) is None:
        return None
    responses, scores = row.get(config.responses_column), row.require(config.scores_column)
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise RowError(
            "wrong_type",
            f"expected {config.responses_column!r} and {config.scores_column!r} to be lists of the same length",
        )
    # A response that no signal could judge has no score.
    judged = [i for i, score in enumerate(scores) if score is not None]
    responses, scores = [responses[i] for i in judged], [scores[i] for i in judged]
    if not all(map(columns.is_number, scores)) or len(scores) < 2:
        raise RowError("wrong_type", f"expected at least two finite numbers in {config.scores_column!r}")
    pairs = choose_pairs(scores, config.pairs, config.min_score_gap)
    if not pairs:
        raise RowError("tied_scores", "")
    ranking = Ranking(tuple(pairs), tuple(map(float, scores)))
    return Draft(columns.find_prompt(row, config), responses, [config.responses_column] * len(responses), ranking)


def choose_pairs(scores: Sequence[float], which: PairChoice, min_gap: float) -> list[tuple[int, int]]:
    """(better, worse) indices of responses whose scores differ, by `min_gap` at least.

    Args:
        scores: one a response.
        which: `best_worst` the best against the worst, `adjacent` each against the next worse one, `all` every two.
        min_gap: smallest difference of scores; binary fractions may miss it by rounding (0.7 - 0.4 < 0.3).
    """
    if which == "best_worst":
        candidates = [(scores.index(max(scores)), scores.index(min(scores)))]
    else:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        candidates = list(pairwise(order) if which == "adjacent" else combinations(order, 2))
    rounding = 1e-12 * max(map(abs, scores), default=0.0)
    return [(a, b) for a, b in candidates if scores[a] > scores[b] and scores[a] - scores[b] >= min_gap - rounding]


def to_preference(row: Any, config: DataConfig, *, has_chat_template: bool) -> Preference:
    """Recognise a row.

    Raises:
        RowError: it names the field, what was expected and what was found.
    """
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"expected an object with fields, found {type(row).__name__}")
    values = Row(row)
    columns.refuse_media(values)
    found = (find(values, config) for find in reversed(FORMATS.values()))
    draft = next(draft for draft in found if draft is not None)
    draft = _with_gold_and_weight(draft, values, config)
    system = columns.find_system(values, config)
    tools = columns.find_tools(values, config.tools_column)
    kwargs = columns.find_template_kwargs(values, config)
    preference = _with_prompt(draft, values, config, has_chat_template=has_chat_template)
    # Text has neither system turn nor tools, so rows that have them are meant as a chat.
    is_meant_as_chat = bool(system or tools or kwargs) or (system is not None and has_chat_template)
    if config.apply_chat_template or (config.apply_chat_template is None and is_meant_as_chat):
        preference = _as_chat(preference, config)
    elif is_meant_as_chat and system and not preference.is_chat:
        raise RowError(
            "wrong_type",
            f"field {config.system_column!r}: plain text has no system turn; leave --apply_chat_template false out, or "
            "pass --system_column null to drop it",
        )
    prompt = preference.prompt
    if isinstance(prompt, list):
        prompt = with_system(prompt, system)
    used, ranking = only_different(preference.answers, preference.ranking)
    if not ranking.pairs:
        raise RowError("identical_answers", "")
    return replace(
        preference,
        prompt=prompt,
        answers=tuple(preference.answers[i] for i in used),
        ranking=ranking,
        tools=tools,
        template_kwargs=kwargs,
        targets=None if preference.targets is None else tuple(preference.targets[i] for i in used),
        unused=values.unread,
    )


def only_different(answers: Sequence[Any], ranking: Ranking) -> tuple[list[int], Ranking]:
    """Indices of the answers that are in a pair of different ones, or gold, and the ranking of those."""
    return ranking.keep([pair for pair in ranking.pairs if answers[pair[0]] != answers[pair[1]]])


def _with_gold_and_weight(draft: Draft, row: Row, config: DataConfig) -> Draft:
    ranking, names, answers = draft.ranking, draft.names, draft.answers
    if config.gold_column is not None:
        scores = None if ranking.scores is None else (*ranking.scores, math.nan)
        ranking = replace(ranking, gold=len(answers), scores=scores)
        names, answers = [*names, config.gold_column], [*answers, row.require(config.gold_column)]
    if config.weight_column is not None:
        weight = row.number(config.weight_column)
        if weight < 0:
            raise RowError("wrong_type", f"field {config.weight_column!r}: expected 0 or above, found {weight:g}")
        ranking = replace(ranking, weight=weight)
    return Draft(draft.prompt, answers, names, ranking)


def _with_prompt(draft: Draft, row: Row, config: DataConfig, *, has_chat_template: bool) -> Preference:
    """Prompt and answers in one shape, split where the answers begin."""
    prompt, answers, ranking = draft.prompt, draft.answers, draft.ranking
    if are_transcripts(answers) and (prompt is None or _is_text_within(prompt, answers)):
        if has_chat_template:
            prompt, chats = split_conversations(None, [transcript_messages(text) for text in answers])
            return Preference(prompt, tuple(chats), ranking)
        prompt, texts, spans = split_transcripts(answers)
        return Preference(prompt, tuple(texts), ranking, targets=tuple(spans))
    if not all(isinstance(answer, str) for answer in answers) or not isinstance(prompt, str | None):
        chats = [to_messages(answer, name) for answer, name in zip(answers, draft.names, strict=True)]
        if not isinstance(prompt, str | None):
            prompt = to_messages(prompt, config.prompt_column)
        if prompt is None and common_length(chats) == 0:
            columns.check_prompt_is_nowhere(row, config)
        prompt, chats = split_conversations(prompt, chats)
        return Preference(prompt, tuple(chats), ranking)
    for name, text in zip(draft.names, answers, strict=True):
        if not text.strip():
            raise RowError("empty_answer", f"field {name!r} is {'white space alone' if text else 'an empty string'}")
    if prompt is None:
        columns.check_prompt_is_nowhere(row, config)
    elif len(prompt) >= REPEATED_PROMPT and all(a.startswith(prompt) and a[len(prompt) :].strip() for a in answers):
        answers = [answer[len(prompt) :] for answer in answers]
        return Preference(prompt, tuple(answers), ranking, changes=("prompt_repeated",))
    return Preference(prompt, tuple(answers), ranking)


def _is_text_within(prompt: Any, texts: Sequence[str]) -> bool:
    return isinstance(prompt, str) and all(prompt.strip() in text for text in texts)


def _as_chat(preference: Preference, config: DataConfig) -> Preference:
    """Strings as one turn of the user and one of the assistant."""
    if preference.is_chat:
        return preference
    if preference.prompt is None:
        raise RowError(
            "missing_field",
            f"field {config.prompt_column!r} is missing, and a chat needs a user's turn apart from the "
            "answers; --prompt_column maps another name",
        )
    assert isinstance(preference.prompt, str)
    prompt: list[Message] = [{"role": "user", "content": preference.prompt}]
    answers: list[list[Message]] = [[{"role": "assistant", "content": str(a)}] for a in preference.answers]
    return replace(preference, prompt=prompt, answers=tuple(answers), targets=None)


def template_kwargs(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """The arguments of the chat template for a row.

    Raises:
        RowError: they are no object.
    """
    return columns.find_template_kwargs(Row(row), config)


def to_prompt(row: dict[str, Any], config: DataConfig) -> tuple[Text, list[Any] | None]:
    """A row's prompt, its system turn included, if it has no answers yet, and the tools for the chat template.

    Raises:
        RowError: it names the field, what was expected and what was found.
    """
    values = Row(row)
    columns.refuse_media(values)
    prompt = values.get(config.prompt_column)
    if prompt is None:
        raise RowError(
            "missing_field",
            f"field {config.prompt_column!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}. "
            "--prompt_column maps another name",
        )
    if prompt == "":
        raise RowError("wrong_type", f"field {config.prompt_column!r}: expected a prompt, found an empty string")
    system = columns.find_system(values, config)
    if system and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    found: Text = prompt if isinstance(prompt, str) else with_system(to_messages(prompt, config.prompt_column), system)
    return found, columns.find_tools(values, config.tools_column)
