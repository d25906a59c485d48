"""Preferences -> token groups, split where the tokens part, never where the characters do.

Prompt and answer are rendered together and tokenized together, since that is what a model sees. The prompt then is what
all token sequences have in common at their start: the prompt's own rendering, and prompt + answer for each answer.
Where a token spans the boundary (a prompt that ends in "Par" and answers "is" and "ma"), it belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.config import DataConfig
from dpo_fast.data.formats import Message, Preference, Text, only_different
from dpo_fast.data.row_report import RowError
from dpo_fast.errors import UserError
from dpo_fast.packs.layout import Group, Ranking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Tokens:
    """A preference as token ids, before truncation; `changes` names what was done to it (`report.CHANGED`)."""

    prompt: list[int]
    answers: list[list[int]]
    ranking: Ranking
    changes: list[str] = field(default_factory=list)


class PairTokenizer:
    """A tokenizer with what it takes to end a sequence right."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        # Some tokenizers end every text, prompts too; here answers are ended, once, by `_end`.
        self.ends_every_text = self.eos is not None and tokenizer("a")["input_ids"][-1:] == [self.eos]
        added = tokenizer.added_tokens_decoder
        # Chat templates end a turn with a token of their own (<end_of_turn>, say) that need not be the eos token.
        self.end_tokens = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)

    def __call__(self, preferences: Sequence[Preference]) -> list[Tokens | RowError]:
        """Tokens of each preference, or why it cannot be used. One call tokenizes the whole batch in parallel."""
        rendered: list[list[str] | RowError] = []
        for preference in preferences:
            try:
                rendered.append([_checked(text) for text in self._render(preference)])
            except RowError as error:
                rendered.append(error)
        ids = {
            chat: iter(
                self._ids(
                    [
                        text
                        for preference, texts in zip(preferences, rendered, strict=True)
                        if preference.is_chat is chat and not isinstance(texts, RowError)
                        for text in texts
                    ],
                    chat=chat,
                )
            )
            for chat in (False, True)
        }
        return [
            texts
            if isinstance(texts, RowError)
            else self._split([next(ids[preference.is_chat]) for _ in texts], preference)
            for preference, texts in zip(preferences, rendered, strict=True)
        ]

    def _render(self, preference: Preference) -> list[str]:
        """Prompt + answer for each answer, then the prompt; the last is left out where the prompt is implicit."""
        prompt = preference.prompt
        if not preference.is_chat:
            assert prompt is None or isinstance(prompt, str)
            start = prompt or ""
            return [*(f"{start}{answer}" for answer in preference.answers), *([] if prompt is None else [start])]
        assert isinstance(prompt, list)
        wholes = [self._template([*prompt, *_as_list(answer)], preference.tools) for answer in preference.answers]
        return [*wholes, self._template(prompt, preference.tools, add_generation_prompt=True)]

    def prompt_ids(self, prompt: Text, tools: list[Any] | None = None) -> list[int]:
        """What a model goes on from when it answers: the same ids that a prompt has in `__call__`.

        Raises:
            RowError: the chat template refuses the messages.
        """
        if isinstance(prompt, str):
            return self._ids([prompt], chat=False)[0]
        return self._ids([self._template(prompt, tools, add_generation_prompt=True)], chat=True)[0]

    def _template(
        self, messages: list[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the rows are messages, and the tokenizer has no chat template; give one with --chat_template FILE"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:
            # A template is a program: what it meets in a row of a wrong shape may be any error, as may its own.
            raise RowError("template_error", str(error) or type(error).__name__) from error
        assert isinstance(text, str)
        return text

    def _ids(self, texts: list[str], *, chat: bool) -> list[list[int]]:
        if not texts:
            return []
        # A template writes its own special tokens; plain text gets those that the tokenizer adds.
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
        for row in ids:
            if self.bos is not None and row[:2] == [self.bos, self.bos]:
                del row[0]
            if not chat and self.ends_every_text:
                del row[-1]
        return ids

    def _split(self, ids: list[list[int]], preference: Preference) -> Tokens | RowError:
        num_answers = len(preference.answers)
        wholes, prompt = ids[:num_answers], ids[num_answers] if len(ids) > num_answers else None
        changes = [change for whole in wholes for change in self._end(whole, chat=preference.is_chat)]
        beginnings = wholes if prompt is None else [prompt, *wholes]
        boundary = min(common_prefix(beginnings[0], other) for other in beginnings[1:])
        answers, ranking = only_different(wholes, preference.ranking)
        if not ranking.pairs:
            return RowError("identical_answers", "the answers are the same tokens")
        if prompt is not None and boundary < len(prompt):
            changes.append("boundary_moved")
        answers = [whole[boundary:] for whole in answers]
        if not all(answers):
            return RowError("empty_answer", "an answer has no token of its own")
        if boundary == 0:
            changes.append("no_prompt_token")
        return Tokens(wholes[0][:boundary], answers, ranking, list(dict.fromkeys(changes)))

    def _end(self, ids: list[int], *, chat: bool) -> list[str]:
        """End a sequence with an end token, once; returns the changes worth counting."""
        if self._is_ended(ids) if chat else ids[-1:] == [self.eos]:
            return []
        if self.eos is None:
            return ["no_end_token"]
        ids.append(self.eos)
        return ["end_token_added"] if chat else []

    def _is_ended(self, ids: list[int]) -> bool:
        """Whether the last token that is more than white space is special (templates end turns with a line break)."""
        for i in reversed(ids):
            if i in self.end_tokens:
                return True
            if str(self.tokenizer.decode([i])).strip():
                return False
        return False


def truncate(tokens: Tokens, row: int, config: DataConfig, bos: int | None) -> tuple[Group, list[str]]:
    """Cut to `max_length`; returns the group and the changes to count.

    Raises:
        RowError: nothing worth training on is left.
    """
    prompt, answers, ranking = tokens.prompt, tokens.answers, tokens.ranking
    changes = list(tokens.changes)
    longest = max(map(len, answers))
    limit = config.max_length
    if limit is not None and len(prompt) + longest > limit:
        if config.truncation_mode == "drop":
            raise RowError("too_long", f"{len(prompt) + longest} tokens, --max_length is {limit}")
        if config.truncation_mode == "keep_end":
            kept = _keep_end(prompt, max(limit - longest, 1), bos)
            if kept != prompt:
                changes.append("prompt_truncated")
            prompt = kept
        if len(prompt) >= limit:
            raise RowError("prompt_fills_max_length", f"the prompt has {len(prompt)} tokens, --max_length is {limit}")
        cut = [answer[: limit - len(prompt)] for answer in answers]
        if cut != answers:
            changes.append("truncated")
        answers, ranking = only_different(cut, ranking)
        if not ranking.pairs:
            raise RowError("identical_after_truncation", f"--max_length is {limit}")
    arrays = tuple(np.array(answer, dtype=np.int32) for answer in answers)
    return Group(row, np.array(prompt, dtype=np.int32), arrays, ranking), changes


def _keep_end(prompt: list[int], room: int, bos: int | None) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos and room > 1:
        return [bos, *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def _checked(text: str) -> str:
    r"""The text, if it is one: JSON may write half of a character (`\ud83d`), which no tokenizer takes.

    Raises:
        RowError: it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise RowError("wrong_type", f"its text holds half of a character ({half}), as cut text may") from error
    return text


def _as_list(answer: Text) -> list[Message]:
    assert not isinstance(answer, str)
    return answer
