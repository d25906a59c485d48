"""A preference as text: the conversation as the chat template writes it, and which part of it the model would write.

At inference an engine renders the turns so far with the template's generation prompt, and the model continues until the
end of its turn. Training must score the same text in the same context. So each turn k of the assistant is located in
the whole conversation W by two more renderings:

    before_k = render(turns before k, generation prompt)      the turn starts where W departs from it
    after_k  = render(turns up to k)                          the turn ends where W departs from it

Where before_k is no beginning of W, or the turn is not what the row says, the row differs from inference and says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpo_fast.config import DataConfig
from dpo_fast.data.conversation import Message, common_prefix
from dpo_fast.data.formats import Preference
from dpo_fast.data.row_report import RowError
from dpo_fast.data.template_limits import CHARS, template_limits
from dpo_fast.data.transcripts import Span
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A user's and an assistant's text that stand in no template.
_PROBE = ("0question0", "0answer0")
# Keys in which messages carry reasoning apart from their content.
_REASONING = ("reasoning_content", "reasoning", "thinking")
SHOWN_CHARS = 60


@dataclass(slots=True)
class Rendered:
    """A preference as text.

    Attributes:
        wholes: prompt and answer, one for each answer.
        prompt: what an answer continues, with the generation prompt; None if the answers hold it.
        targets: for each answer the spans of characters that are scored; None if everything after the prompt is.
        changes: causes of `row_report.CHANGED`, each with a message.
        inference: for each answer, prompt and answer as an inference engine would have them; None if as in `wholes`.
    """

    wholes: list[str]
    prompt: str | None
    targets: list[list[Span] | None]
    changes: dict[str, str] = field(default_factory=dict)
    inference: list[str | None] = field(default_factory=list)


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Raises:
            RowError: the template refuses the messages, or fails on them.
            UserError: there is no template, or it knows no end.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                "the rows are messages or have a system turn or tools, and the tokenizer has no chat template; "
                "give one with --chat_template FILE"
            )
        options = {"tools": tools, "add_generation_prompt": generation_prompt, "tokenize": False, **(kwargs or {})}
        called = tool_names(messages)
        reason = ""
        for variant in _variants(messages) if called else [messages]:
            try:
                with template_limits(self.tokenizer.chat_template):
                    text = self.tokenizer.apply_chat_template(variant, **options)
            except UserError:
                raise
            except Exception as error:
                # A template is a program: what it meets in a row of a wrong shape may be any error, as may its own.
                reason = reason or str(error) or type(error).__name__
                continue
            assert isinstance(text, str)
            if len(text) > CHARS:
                raise RowError("template_error", f"it writes {len(text)} characters; expected at most {CHARS}")
            if all(name in text for name in called):
                return text
        raise RowError("template_error", reason or f"it leaves out the tool calls ({', '.join(called)})")

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes after an assistant's last turn; empty without a template."""
        question, answer = _PROBE
        try:
            text = self([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        except (RowError, UserError):
            return ""
        return text.rpartition(answer)[2] if answer in text else ""


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant in a whole conversation.

    Attributes:
        span: its characters.
        before: the rendering that it continues at inference.
        text: what the model would write, its end included.
    """

    span: Span
    before: str
    text: str


class ChatRenderer:
    """Preferences of messages as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.template = ChatTemplate(tokenizer)
        self.train_on = config.train_on
        self.keep_reasoning = config.keep_reasoning

    def __call__(self, preference: Preference) -> Rendered:
        """Render a preference.

        Raises:
            RowError: the template fails, or no turn is the assistant's.
        """
        prompt, answers = preference.prompt, preference.answers
        assert isinstance(prompt, list)
        changes: dict[str, str] = {}
        plain = [self._without_end(messages, changes) for messages in (prompt, *map(_as_list, answers))]
        start, chats = plain[0], plain[1:]
        # A prompt that the user's turns continue is no prompt to generate from.
        continued = all(chat[0]["role"] == "assistant" for chat in chats)
        rendered = Rendered([], self._render(start, preference, generation_prompt=continued), [], changes)
        names = tool_names([{"tool_calls": preference.tools}])
        if rendered.prompt and not all(name in rendered.prompt for name in names):
            changes["tools_lost"] = ""
        for chat in chats:
            whole = self._render([*start, *chat], preference)
            turns = [
                self._turn(whole, start, chat, k, preference, rendered.prompt if continued and k == 0 else None)
                for k, message in enumerate(chat)
                if message["role"] == "assistant"
            ]
            if not turns and self.train_on != "all":
                raise RowError("no_assistant_turn", "--train_on all scores every turn of an answer")
            wanted = turns[-1:] if self.train_on == "last_turn" else turns
            whole, spans = self._as_generated(whole, turns, wanted, changes)
            rendered.inference.append(_inference(whole, wanted))
            rendered.wholes.append(whole)
            is_all_scored = self.train_on == "all" or (continued and len(chat) == 1)
            rendered.targets.append(None if is_all_scored else spans)
        return rendered

    def _render(self, messages: list[Message], preference: Preference, *, generation_prompt: bool = False) -> str:
        return self.template(
            messages, preference.tools, preference.template_kwargs, generation_prompt=generation_prompt
        )

    def _without_end(self, messages: list[Message], changes: dict[str, str]) -> list[Message]:
        """The messages, no assistant's text ending in the template's own end of turn: it would be written twice."""
        ends = tuple(filter(None, (self.template.end_of_turn.strip(), self.template.tokenizer.eos_token)))
        kept = []
        for message in messages:
            text = message["content"].rstrip()
            if message["role"] == "assistant" and text.endswith(ends):
                for end in ends:
                    text = text.removesuffix(end)
                message = message | {"content": text}
                changes["end_token_removed"] = ""
            kept.append(message)
        return kept

    def _turn(
        self,
        whole: str,
        start: list[Message],
        chat: list[Message],
        place: int,
        preference: Preference,
        before: str | None = None,
    ) -> _Turn:
        """Where the assistant's message `chat[place]` lies in the conversation; `before` if it is rendered already."""
        message, turns = chat[place], [*start, *chat[:place]]
        if before is None:
            before = self._render(turns, preference, generation_prompt=True)
        first = common_start(whole, before)
        end = self.template.end_of_turn
        if place == len(chat) - 1:
            return _Turn((first, len(whole)), before, self._generated(whole[first:], before, message))
        after = self._render([*turns, message], preference)
        last = common_start(whole, after)
        if last < len(after) - len(end):
            # Rendered otherwise when it is not the last turn, as by templates that strip past reasoning.
            found = whole.find(end.rstrip(), first) if end.strip() else -1
            if found < 0:
                raise RowError(
                    "template_error",
                    "it is unclear where a turn in the middle of an answer ends; pass --train_on last_turn",
                )
            last = common_start(whole[found:], end) + found
        text = after[common_start(after, before) :]
        return _Turn((first, last), before, self._generated(text, before, message))

    def _generated(self, text: str, before: str, message: Message) -> str:
        """The text of a turn as the model would write it: the template's, unless that loses what the message says."""
        end = self.template.end_of_turn
        reasoning = next((str(message[key]) for key in _REASONING if message.get(key)), "")
        content = message["content"]
        opens = before.rstrip().endswith("<think>")
        if message.get("tool_calls") or (reasoning and reasoning.strip() in text and content.strip() in text):
            return text
        if reasoning:
            content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content.strip()}"
        if opens and content.lstrip().startswith("<think>"):
            content = content.lstrip().removeprefix("<think>").lstrip("\n")
        body = text.removesuffix(end) if end else text
        return text if _letters(body) == _letters(content) else content.strip() + end

    def _as_generated(
        self, whole: str, turns: list[_Turn], wanted: list[_Turn], changes: dict[str, str]
    ) -> tuple[str, list[Span]]:
        """The conversation and the spans of its scored turns, with the reasoning put back if that is wished."""
        spans: list[Span] = []
        shift = 0
        for turn in turns:
            first, last = turn.span[0] + shift, turn.span[1] + shift
            own = whole[first:last]
            lost = bool(_reasoning(turn.text)) and not _reasoning(own)
            if lost and self.keep_reasoning:
                opening = turn.before[turn.span[0] :]
                whole = whole[:first] + opening + turn.text + whole[last:]
                shift += len(opening) + len(turn.text) - (last - first)
                first, last = first + len(opening), first + len(opening) + len(turn.text)
            elif turn in wanted:
                self._compare(whole[:last], own, turn, changes, lost=lost)
            if turn in wanted:
                spans.append((first, last))
        return whole, spans

    def _compare(self, whole: str, own: str, turn: _Turn, changes: dict[str, str], *, lost: bool) -> None:
        """Say how what is trained on differs from what inference would have."""
        inference = turn.before + turn.text
        if lost:
            cause, cure = "reasoning_lost", "--keep_reasoning true keeps it"
        elif not whole.startswith(turn.before) or _letters(own) != _letters(turn.text):
            cause, cure = "differs_from_inference", "see --chat_template_kwargs and --chat_template"
        else:
            return
        if cause not in changes:
            place = max(common_start(whole, inference) - SHOWN_CHARS // 2, 0)
            trained, shown = (repr(text[place : place + SHOWN_CHARS]) for text in (whole, inference))
            changes[cause] = f"trained on ...{trained}; inference has ...{shown} ({cure})"


def _inference(whole: str, wanted: Sequence[_Turn]) -> str | None:
    """The last scored turn as inference has it; None if that is the whole conversation."""
    if not wanted:
        return None
    text = wanted[-1].before + wanted[-1].text
    return None if whole.strip() == text.strip() else text


def render_text(preference: Preference) -> Rendered:
    """A preference of strings: prompt and answers are joined as they are."""
    assert not preference.is_chat
    prompt = preference.prompt
    assert prompt is None or isinstance(prompt, str)
    start = prompt or ""
    targets: list[list[Span] | None] = [None] * len(preference.answers)
    if preference.targets is not None:
        targets = [[(a + len(start), b + len(start)) for a, b in spans] for spans in preference.targets]
    wholes = [f"{start}{answer}" for answer in preference.answers]
    return Rendered(wholes, prompt, targets, inference=[None] * len(wholes))


def tool_names(messages: Sequence[Message]) -> list[str]:
    """The functions that a conversation calls."""
    calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, dict)]
    functions = [call.get("function", call) for call in calls]
    return [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]


def _variants(messages: list[Message]) -> list[list[Message]]:
    """The forms of a tool call that templates read: content empty or null, arguments an object or JSON text."""
    empty = [messages, [with_text_arguments(message) for message in messages]]
    null = [[m | {"content": None} if m.get("tool_calls") and not m["content"] else m for m in form] for form in empty]
    return [empty[0], null[0], empty[1], null[1]]


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    changed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = call | {"function": function | {"arguments": arguments}}
        changed.append(call)
    return message | {"tool_calls": changed}


def _reasoning(text: str) -> str:
    """What stands before the end of thought."""
    return text.partition("</think>")[0].rpartition("<think>")[2].strip() if "</think>" in text else ""


def _letters(text: str) -> str:
    """The text without white space, which templates trim and add."""
    return "".join(text.split())


def common_start(left: str, right: str) -> int:
    """Number of leading characters that two texts share."""
    if left.startswith(right):
        return len(right)
    return common_prefix(left, right)


def _as_list(answer: Any) -> list[Message]:
    assert isinstance(answer, list)
    return answer
