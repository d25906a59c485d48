"""What the demo trains on: a task whose answers a program can judge, and a small model that half knows it.

A prompt is `name=Ada age=36 ->`, the wanted answer ` {"name": "Ada", "age": 36}`. The base model learns from examples
broken the way people break JSON: occasionally a quote, comma, colon or brace is missing or wrong, and most objects of
three fields end in a trailing comma. So it fails about half the time when it samples, and on most long objects even
when it takes the likeliest token.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 96
MAX_NEW_TOKENS = 40
BROKEN_SHARE = 0.2
LONG_TRAILING_COMMA_SHARE = 0.55
IGNORED_LABEL = -100
WORDS = {
    "name": ["Ada", "Alan", "Bea", "Carl", "Dora", "Emil", "Finn", "Grace", "Kofi", "Lena", "Noor", "Omar"],
    "city": ["Accra", "Bonn", "Cairo", "Delhi", "Hanoi", "Kyiv", "Lagos", "Lima", "Oslo", "Paris", "Rome", "Tunis"],
    "color": ["amber", "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow"],
    "pet": ["cat", "dog", "duck", "goat", "horse", "lizard", "mouse", "owl", "parrot", "rabbit", "snake", "turtle"],
}
Fields = dict[str, str | int]


@dataclass(frozen=True)
class BaseSize:
    """The base model and its training.

    Attributes:
        hidden_size: width of the Llama.
        num_layers: depth of the Llama.
        steps: optimizer steps.
        batch: examples per step.
    """

    hidden_size: int
    num_layers: int
    steps: int
    batch: int

    @property
    def num_examples(self) -> int:
        """Examples in all steps."""
        return self.steps * self.batch


def make_prompts(count: int, rng: random.Random) -> list[Fields]:
    """The fields of `count` different prompts: two or three each, in random order, with random values."""
    found: dict[str, Fields] = {}
    while len(found) < count:
        fields: Fields = {}
        for name in rng.sample([*WORDS, "age"], rng.choice([2, 3])):
            fields[name] = rng.randint(10, 99) if name == "age" else rng.choice(WORDS[name])
        found.setdefault(prompt_text(fields), fields)
    return list(found.values())


def prompt_text(fields: Fields) -> str:
    """`name=Ada age=36 ->`."""
    return " ".join(f"{name}={value}" for name, value in fields.items()) + " ->"


def good_answer(fields: Fields) -> str:
    """The JSON object, after the space that separates it from the prompt."""
    return " " + json.dumps(fields)


def _without_one(part: str, text: str, rng: random.Random) -> str:
    start = rng.choice([i for i in range(len(text)) if text.startswith(part, i)])
    return text[:start] + text[start + len(part) :]


BREAKAGES: dict[str, Callable[[str, random.Random], str]] = {
    "missing quote": lambda text, rng: _without_one('"', text, rng),
    "missing comma": lambda text, rng: _without_one(",", text, rng),
    "missing colon": lambda text, rng: _without_one(":", text, rng),
    "missing brace": lambda text, rng: text[:-1],
    "wrong bracket": lambda text, rng: text[:-1] + rng.choice("])"),
    "trailing comma": lambda text, rng: text[:-1] + ",}",
    "single quotes": lambda text, rng: text.replace('"', "'"),
}


def example_answer(fields: Fields, rng: random.Random) -> str:
    """An answer as the base model sees it in training: good, or broken in one way."""
    answer = good_answer(fields)
    if len(fields) > 2 and rng.random() < LONG_TRAILING_COMMA_SHARE:
        return BREAKAGES["trailing comma"](answer, rng)
    if rng.random() < BROKEN_SHARE:
        return rng.choice(list(BREAKAGES.values()))(answer, rng)
    return answer


def parses(text: str) -> bool:
    """Whether an answer is a JSON object, as the signal `json:object` decides it."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def is_right(answer: str, row: dict[str, Any]) -> bool:
    """The signal `python:dpo_fast.demo.task:is_right`: the answer holds exactly the fields that its prompt asks for."""
    return parses(answer) and bool(json.loads(answer) == row["fields"])


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 512 tokens; digits are split, so that numbers are copied digit by digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    pad, bos, eos = special
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerBase, size: BaseSize) -> PreTrainedModel:
    """An untrained Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        # At the default of 0.02, a model this narrow needs ten times as many steps to learn to copy from the prompt.
        initializer_range=size.hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    size: BaseSize,
    advance: Callable[[], None],
) -> float:
    """One pass of cross-entropy on the answers of (prompt, answer) `examples`.

    Args:
        model: trained in place; left in evaluation mode.
        tokenizer: the model's.
        examples: `size.num_examples` of them.
        size: steps and batch.
        advance: called after each step.

    Returns:
        The last step's loss in nats per token.
    """
    prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
    answers = tokenizer([answer for _, answer in examples], add_special_tokens=False)["input_ids"]
    rows = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(size.steps):
        warmup = min(1.0, (step + 1) / 20)
        cosine = 0.5 * (1 + math.cos(math.pi * step / size.steps))
        optimizer.param_groups[0]["lr"] = 4e-3 * warmup * cosine
        batch = rows[step * size.batch : (step + 1) * size.batch]
        ids, labels = pad_rows(batch, tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        advance()
    model.eval()
    return loss.item()


def pad_rows(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """(prompt ids, answer ids) rows as (B, L) int64 ids and labels, padded on the right; only answers have labels."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED_LABEL)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return ids, labels
