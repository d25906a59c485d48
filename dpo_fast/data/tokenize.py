"""Preferences -> token groups, split where the tokens part, never where the characters do.

Prompt and answer are rendered together and tokenized together, since that is what a model sees. The prompt then is what
all token sequences have in common at their start: the prompt's own rendering, and prompt + answer for each answer.
A token that spans the boundary (a prompt that ends in "Par" and answers "is" and "ma") belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.config import DataConfig
from dpo_fast.data.conversation import Text, common_length, common_prefix
from dpo_fast.data.formats import Preference, only_different
from dpo_fast.data.render import ChatRenderer, Rendered, render_text
from dpo_fast.data.row_report import RowError
from dpo_fast.packs.layout import Group, Ranking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Causes that say that the prompt alone is rendered otherwise than before an answer.
_RENDERED_OTHERWISE = {"differs_from_inference", "reasoning_lost"}


@dataclass(slots=True)
class Tokens:
    """A preference as token ids, before truncation.

    Attributes:
        prompt: ids that all answers continue.
        answers: ids of each.
        numbers: which of the preference's answers they are.
        masks: for each answer which of its tokens are scored; None for all of them.
        ranking: of the answers.
        changes: what was done to it (`row_report.CHANGED`), each with a message.
    """

    prompt: list[int]
    answers: list[list[int]]
    numbers: list[int]
    masks: list[list[bool] | None]
    ranking: Ranking
    changes: dict[str, str] = field(default_factory=dict)


class PairTokenizer:
    """A tokenizer with what it takes to end a sequence right."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None) -> None:
        self.tokenizer = tokenizer
        self.render_chat = ChatRenderer(tokenizer, config or DataConfig())
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        # Some tokenizers end every text, prompts too; here answers are ended, once, by `_end`.
        self.ends_every_text = self.eos is not None and tokenizer("a")["input_ids"][-1:] == [self.eos]
        added = tokenizer.added_tokens_decoder
        # Chat templates end a turn with a token of their own (<end_of_turn>, say) that need not be the eos token.
        self.end_tokens = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        end_of_turn = self._ids([self.render_chat.template.end_of_turn], chat=True)[0]
        self.text_ends = {self.eos, *self.end_tokens.intersection(end_of_turn)}

    def __call__(self, preferences: Sequence[Preference]) -> list[Tokens | RowError]:
        """Tokens of each preference, or why it cannot be used. One call tokenizes the whole batch in parallel."""
        return self.tokens(preferences, [self.render(preference) for preference in preferences])

    def tokens(
        self, preferences: Sequence[Preference], rendered: Sequence[Rendered | RowError]
    ) -> list[Tokens | RowError]:
        """Tokens of preferences that `render` has made text of."""
        ids = {
            chat: iter(
                self._ids(
                    [
                        text
                        for preference, own in zip(preferences, rendered, strict=True)
                        if preference.is_chat is chat and not isinstance(own, RowError)
                        for text in _texts(own)
                    ],
                    chat=chat,
                )
            )
            for chat in (False, True)
        }
        return [
            own if isinstance(own, RowError) else self._split(own, ids[preference.is_chat], preference)
            for preference, own in zip(preferences, rendered, strict=True)
        ]

    def render(self, preference: Preference) -> Rendered | RowError:
        """The preference as text, or why there is none."""
        try:
            rendered = self.render_chat(preference) if preference.is_chat else render_text(preference)
            for text in rendered.wholes:
                _check(text)
        except RowError as error:
            return error
        return rendered

    def prompt_ids(
        self, prompt: Text, tools: list[Any] | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """What a model continues when it answers: the same ids that a prompt has in `__call__`.

        Raises:
            RowError: the chat template refuses the messages.
        """
        if isinstance(prompt, str):
            return self._ids([prompt], chat=False)[0]
        text = self.render_chat.template(prompt, tools, template_kwargs, generation_prompt=True)
        return self._ids([text], chat=True)[0]

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

    def _split(self, rendered: Rendered, ids: Iterator[list[int]], preference: Preference) -> Tokens | RowError:
        changes = dict.fromkeys(preference.changes, "") | rendered.changes
        wholes = list(islice(ids, len(rendered.wholes)))
        prompt = next(ids) if rendered.prompt is not None else None
        cuts = [[(next(ids), next(ids)) for _ in spans or ()] for spans in rendered.targets]
        for whole in wholes:
            changes |= dict.fromkeys(self._end(whole, chat=preference.is_chat), "")
        beginnings = wholes if prompt is None else [prompt, *wholes]
        boundary = common_length(beginnings)
        used, ranking = only_different(wholes, preference.ranking)
        if not ranking.pairs:
            return RowError("identical_answers", "the answers are the same tokens")
        if prompt is not None and boundary < len(prompt) and not _RENDERED_OTHERWISE & changes.keys():
            changes["boundary_moved"] = ""
        answers = [wholes[i][boundary:] for i in used]
        if not all(answers):
            return RowError("empty_answer", "an answer has no token of its own")
        masks = [_mask(rendered, i, wholes[i], cuts[i], boundary) for i in used]
        if boundary == 0:
            changes["no_prompt_token"] = ""
        return Tokens(wholes[0][:boundary], answers, used, masks, ranking, changes)

    def _end(self, ids: list[int], *, chat: bool) -> list[str]:
        """End a sequence with an end token, once; returns the changes worth counting."""
        if self._is_ended(ids, self.end_tokens if chat else self.text_ends):
            return []
        if self.eos is None:
            return ["no_end_token"]
        ids.append(self.eos)
        return ["end_token_added"] if chat else []

    def _is_ended(self, ids: list[int], ends: set[int | None] | set[int]) -> bool:
        """Whether the last token that is more than white space is an end (templates end turns with a line break)."""
        for i in reversed(ids):
            if i in ends:
                return True
            if str(self.tokenizer.decode([i])).strip():
                return False
        return False


def _texts(rendered: Rendered) -> Iterator[str]:
    """Everything that is tokenized of a preference, in the order in which `_split` takes it."""
    yield from rendered.wholes
    if rendered.prompt is not None:
        yield rendered.prompt
    for whole, spans in zip(rendered.wholes, rendered.targets, strict=True):
        for first, last in spans or ():
            yield whole[:first]
            yield whole[:last]


def _mask(
    rendered: Rendered, number: int, whole: list[int], cuts: list[tuple[list[int], list[int]]], boundary: int
) -> list[bool] | None:
    """Which tokens of an answer are scored; None for all of them.

    A token that spans the beginning of a turn is scored, as at the prompt's end; one that spans its end is not.
    """
    spans = rendered.targets[number]
    if spans is None:
        return None
    mask = [False] * len(whole)
    for (_, last), (before, up_to) in zip(spans, cuts, strict=True):
        start = common_prefix(before, whole)
        # The end token that the tokenizer adds ends the last turn.
        stop = len(whole) if last == len(rendered.wholes[number]) else common_prefix(up_to, whole)
        mask[start:stop] = [True] * (stop - start)
    return None if all(mask[boundary:]) else mask[boundary:]


def truncate(tokens: Tokens, row: int, config: DataConfig, bos: int | None) -> tuple[Group, dict[str, str]]:
    """Cut to `max_length`; returns the group and the changes to count.

    Raises:
        RowError: nothing worth training on is left.
    """
    prompt, answers, masks, ranking = tokens.prompt, tokens.answers, tokens.masks, tokens.ranking
    changes = dict(tokens.changes)
    longest = max(map(len, answers))
    limit = config.max_length
    if limit is not None and len(prompt) + longest > limit:
        if config.truncation_mode == "drop":
            raise RowError("too_long", f"{len(prompt) + longest} tokens, --max_length is {limit}")
        if config.truncation_mode == "keep_end":
            kept = _keep_end(prompt, max(limit - longest, 1), bos)
            if kept != prompt:
                changes["prompt_truncated"] = ""
            prompt = kept
        if len(prompt) >= limit:
            raise RowError("prompt_fills_max_length", f"the prompt has {len(prompt)} tokens, --max_length is {limit}")
        cut = [answer[: limit - len(prompt)] for answer in answers]
        if cut != answers:
            changes["truncated"] = ""
        used, ranking = only_different(cut, ranking)
        if not ranking.pairs:
            raise RowError("identical_after_truncation", f"--max_length is {limit}")
        answers, masks = [cut[i] for i in used], [masks[i] for i in used]
        masks = [mask and mask[: len(answer)] for mask, answer in zip(masks, answers, strict=True)]
    if not all(mask is None or any(mask) for mask in masks):
        raise RowError("nothing_scored", f"--max_length is {limit}")
    arrays = tuple(np.array(answer, dtype=np.int32) for answer in answers)
    scored = tuple(None if mask is None or all(mask) else np.array(mask) for mask in masks)
    if all(mask is None for mask in scored):
        scored = ()
    return Group(row, np.array(prompt, dtype=np.int32), arrays, ranking, scored), changes


def _keep_end(prompt: list[int], room: int, bos: int | None) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos and room > 1:
        return [bos, *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def _check(text: str) -> None:
    r"""Refuse what is no text: JSON may write half of a character (`\ud83d`), which no tokenizer takes.

    Raises:
        RowError: it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise RowError("wrong_type", f"its text holds half of a character ({half}), as cut text may") from error
