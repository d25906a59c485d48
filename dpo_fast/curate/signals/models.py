"""Signals that ask a model on this machine: what they share, and reward models; `judge.py` has the other kind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

from dpo_fast.config import SignalConfig
from dpo_fast.curate.rows import text_of
from dpo_fast.curate.verdict import Question, Unjudged, Verdict, describe, shorten, verdict_of
from dpo_fast.errors import UserError
from dpo_fast.model.load import load_tokenizer
from dpo_fast.model.placement import pick_device

# A tokenizer's reply: `input_ids`, `attention_mask` and the like.
Tokens: TypeAlias = Any


class ModelSignal:
    """A model that reads batches of texts: loaded when it is first asked.

    Attributes:
        name: checkpoint folder or Hub name.
        spec: the signal, for messages.
    """

    kind: str
    padding_side: str

    def __init__(self, name: str, config: SignalConfig) -> None:
        self.name = name
        self.spec = f"{self.kind}:{name}"
        self.batch_size = config.judge_batch_size
        self.device_name = getattr(config, "device", "auto")

    @cached_property
    def device(self) -> torch.device:
        """Where the model runs."""
        return pick_device(self.device_name)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on a CPU."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, padding on the side that `outputs` expects."""
        try:
            tokenizer = load_tokenizer(self.name)
        except UserError as error:
            raise UserError(f"--signals {self.spec}: {error}") from error
        tokenizer.padding_side = self.padding_side
        return tokenizer

    @cached_property
    def model(self) -> Any:
        """The model, on its device."""
        raise NotImplementedError

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) one number for each of B padded sequences."""
        raise NotImplementedError

    @cached_property
    def max_tokens(self) -> int:
        """The longest sequence that the model reads."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(limit or sys.maxsize, self.tokenizer.model_max_length)

    def defuse(self, text: str) -> str:
        """A text in which no special token is one any more: an answer must not end its own turn."""
        for token in self.special_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    @cached_property
    def special_tokens(self) -> list[str]:
        """The texts that the tokenizer takes for one token of control, the longest first."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    def turns(self, value: Any, role: str) -> list[dict[str, str]]:
        """A prompt or an answer as messages."""
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        messages = [messages] if isinstance(messages, dict) else messages
        return [{"role": str(m.get("role") or role), "content": self.defuse(text_of(m))} for m in messages]

    def encode(self, *texts: str) -> Tokens:
        """Tokens of a text, or of a prompt and its answer as a pair of texts.

        Raises:
            Unjudged: they are more than the model reads, or none.
        """
        # Lone surrogates have no tokens. As lists, since an empty text alone would not count as the second of a pair.
        batch = self.tokenizer(*([text.encode(errors="replace").decode()] for text in texts))
        return self.check({name: values[0] for name, values in batch.items()})

    def encode_turns(self, messages: list[dict[str, str]], **options: Any) -> Tokens:
        """Tokens of a conversation in the model's chat template.

        Raises:
            Unjudged: they are more than the model reads, or the template refuses the conversation.
        """
        plain = [{name: text.encode(errors="replace").decode() for name, text in m.items()} for m in messages]
        try:
            return self.check(self.tokenizer.apply_chat_template(plain, return_dict=True, **options))
        except TemplateError as error:
            raise Unjudged(f"the model's chat template refuses it: {error}") from error

    def check(self, tokens: Tokens) -> Tokens:
        """The tokens, if the model can read them."""
        length = len(tokens["input_ids"])
        if not 0 < length <= self.max_tokens:
            raise Unjudged(f"{length} tokens; the model reads 1 to {self.max_tokens}")
        return tokens

    @torch.no_grad()
    def read(self, inputs: Sequence[Tokens]) -> list[float]:
        """`outputs` of each sequence; those of like lengths share a batch."""
        results = [0.0] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda number: len(inputs[number]["input_ids"]))
        size = self.batch_size if self.tokenizer.pad_token_id is not None else 1
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            columns = {name: [inputs[n][name] for n in numbers] for name in inputs[numbers[0]]}
            batch = self.tokenizer.pad(columns, padding=size > 1, return_tensors="pt").to(self.device)
            for number, value in zip(numbers, self.outputs(batch).float().tolist(), strict=True):
                results[number] = value
        return results


class RewardModel(ModelSignal):
    """`reward-model:NAME`: the one logit of a sequence classifier on prompt and answer."""

    kind = "reward-model"
    padding_side = "right"

    @cached_property
    def model(self) -> Any:
        """The classifier.

        Raises:
            UserError: it cannot be loaded, is no classifier, or has several outputs.
        """
        from transformers import AutoModelForSequenceClassification

        tokenizer = self.tokenizer
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.name, dtype=self.dtype, output_loading_info=True
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--signals {self.spec}: cannot load it: {describe(error)}") from error
        if model.config.num_labels != 1:
            raise UserError(f"--signals {self.spec}: gives {model.config.num_labels} numbers; a reward model gives 1")
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"]))
            raise UserError(f"--signals {self.spec}: no reward model, its checkpoint lacks {missing}")
        # The classifier reads its score at the last token that is no padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return model.to(self.device).eval()

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) rewards."""
        return self.model(**batch).logits[:, 0]

    def judge(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        """The reward of each answer."""
        texts = [(question.prompt, answer) for question in questions for answer in question.answers]
        encoded = [attempt(self._encode, prompt, answer) for prompt, answer in texts]
        rewards = iter(self.read([tokens for tokens in encoded if not isinstance(tokens, Verdict)]))
        verdicts = (
            tokens if isinstance(tokens, Verdict) else verdict_of(lambda *_: next(rewards), "", {})
            for tokens in encoded
        )
        return [list(islice(verdicts, len(question.answers))) for question in questions]

    def _encode(self, prompt: Any, answer: str) -> Tokens:
        if self.tokenizer.chat_template:
            return self.encode_turns([*self.turns(prompt, "user"), *self.turns(answer, "assistant")])
        return self.encode(self.defuse(text_of(prompt)), self.defuse(answer))


def attempt(encode: Callable[..., Tokens], *arguments: Any) -> Tokens | Verdict:
    """Tokens, or the verdict that there are none."""
    try:
        return encode(*arguments)
    except Unjudged as error:
        return Verdict(None, shorten(str(error)))
