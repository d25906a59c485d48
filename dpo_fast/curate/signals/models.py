"""What signals that ask a model on this machine share. PyTorch is imported once a model is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from dpo_fast.config import SignalConfig
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.signals.declare import bad_spec
from dpo_fast.curate.verdict import Unjudged, Verdict, shorten
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A tokenizer's output for one sequence: `input_ids`, `attention_mask` and the like.
Tokens: TypeAlias = Any


class ModelSignal:
    """A model that reads batches of texts; it is loaded at its first use.

    Attributes:
        name: checkpoint folder or Hub name.
        spec: the signal as users write it, for messages.
    """

    kind: str
    padding_side: str

    def __init__(self, name: str, config: SignalConfig) -> None:
        if not name:
            raise bad_spec(self.kind, f"{self.kind}:NAME, a checkpoint folder or Hub name")
        self.name = name
        self.spec = f"{self.kind}:{name}"
        self.batch_size = config.judge_batch_size
        self.device_name = getattr(config, "device", "auto")
        self.trust_remote_code = config.trust_remote_code

    @cached_property
    def device(self) -> torch.device:
        """Where the model runs."""
        from dpo_fast.model.placement import pick_device

        return pick_device(self.device_name)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on a CPU."""
        import torch

        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, padding on the side that `outputs` expects."""
        from dpo_fast.model.load import load_tokenizer

        try:
            tokenizer = load_tokenizer(self.name, trust_remote_code=self.trust_remote_code)
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
        """The text with its special tokens broken up: an answer must not end its own turn."""
        for token in self.special_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    @cached_property
    def special_tokens(self) -> list[str]:
        """The texts that the tokenizer reads as one control token, longest first."""
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
            Unjudged: there are more than the model reads, or none.
        """
        # Lone surrogates have no tokens. As lists, since an empty text alone would not count as the second of a pair.
        batch = self.tokenizer(*([text.encode(errors="replace").decode()] for text in texts))
        return self.check({name: values[0] for name, values in batch.items()})

    def encode_turns(self, messages: list[dict[str, str]], **options: Any) -> Tokens:
        """Tokens of a conversation in the model's chat template.

        Raises:
            Unjudged: there are more than the model reads, or the template refuses the conversation.
        """
        from jinja2 import TemplateError

        from dpo_fast.data.template_limits import template_limits

        plain = [{name: text.encode(errors="replace").decode() for name, text in m.items()} for m in messages]
        try:
            with template_limits(self.tokenizer.chat_template):
                tokens = self.tokenizer.apply_chat_template(plain, return_dict=True, **options)
            return self.check(tokens)
        except TemplateError as error:
            raise Unjudged(f"the model's chat template refuses it: {error}") from error

    def check(self, tokens: Tokens) -> Tokens:
        """The tokens, if the model can read them.

        Raises:
            Unjudged: there are more than the model reads, or none.
            UserError: the tokenizer has tokens that the model lacks.
        """
        from dpo_fast.model.check import refuse_unknown_tokens

        length = len(tokens["input_ids"])
        if not 0 < length <= self.max_tokens:
            raise Unjudged(f"{length} tokens; the model reads 1 to {self.max_tokens}")
        refuse_unknown_tokens(self.model, [tokens["input_ids"]], f"--signals {self.spec}: a text")
        return tokens

    @property
    def can_pad(self) -> bool:
        """Whether the tokenizer has a padding token, and the model an embedding of it."""
        padding = self.tokenizer.pad_token_id
        return padding is not None and padding < self.model.get_input_embeddings().weight.shape[0]

    def read(self, inputs: Sequence[Tokens]) -> list[float]:
        """`outputs` of each sequence; sequences of similar lengths share a batch."""
        import torch

        results = [0.0] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda number: len(inputs[number]["input_ids"]))
        size = self.batch_size if self.can_pad else 1
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            columns = {name: [inputs[n][name] for n in numbers] for name in inputs[numbers[0]]}
            batch = self.tokenizer.pad(columns, padding=size > 1, return_tensors="pt").to(self.device)
            with torch.no_grad():
                values = self.outputs(batch).float().tolist()
            for number, value in zip(numbers, values, strict=True):
                results[number] = value
        return results


def attempt(encode: Callable[..., Tokens], *arguments: Any) -> Tokens | Verdict:
    """Tokens, or a verdict that says why there are none."""
    try:
        return encode(*arguments)
    except Unjudged as error:
        return Verdict(None, shorten(str(error)))
