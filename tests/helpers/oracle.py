"""Independent truths: a plain padded DPO in the textbook's order, and tiny models and tokenizers to try it on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group

HELPERS = Path(__file__).parent
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Paris is the capital of France, London of England.",
    "A preference pair holds a prompt, a chosen answer and a rejected one.",
    "Numbers such as 0 1 2 3 4 5 6 7 8 9 count, too!",
]


def tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences, with an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_llama(vocab_size: int = 320, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama with grouped queries and a tied head; large enough weights that log-probs are not all alike."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if dtype is torch.float64:
        # transformers' RMSNorm rounds to fp32 inside, which would hide errors below 1e-7.
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                exact = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=dtype)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, exact)
    return model


def save_tiny_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """A checkpoint folder with model and tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def as_policy(model: LlamaForCausalLM) -> Policy:
    """The model, reading packs, on a CPU."""
    use_packed_attention(model)
    return Policy(model, device=torch.device("cpu"), memory_budget=2**30)


def masked(groups: list[Group], *, seed: int = 0) -> list[Group]:
    """The same groups with a random part of each answer scored, at least one token; one group's first answer whole."""
    rng = np.random.default_rng(seed)

    def mask(answer: np.ndarray) -> np.ndarray:
        scored = rng.random(len(answer)) < 0.5
        scored[rng.integers(len(answer))] = True
        return scored

    masks = [[mask(answer) for answer in group.answers] for group in groups]
    return [
        replace(group, scored=(None if i == 0 else own[0], *own[1:]))
        for i, (group, own) in enumerate(zip(groups, masks, strict=True))
    ]


def random_groups(num: int, vocab_size: int = 320, *, seed: int = 0, num_answers: int = 2) -> list[Group]:
    """Groups of random tokens, lengths 1 and primes among them."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 3, 5, 7, 11, 13, 17]

    def ids() -> np.ndarray:
        return rng.integers(2, vocab_size, rng.choice(lengths)).astype(np.int32)

    return [Group(i, ids(), tuple(ids() for _ in range(num_answers))) for i in range(num)]


def padded_sequence_logps(model: LlamaForCausalLM, groups: list[Group], answer: int) -> Tensor:
    """(G,) summed log-probs of the given answer: right-padded prompt + answer, attention mask, log_softmax, gather."""
    sequences = [[*group.prompt_ids, *group.answers[answer]] for group in groups]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [1] * (width - len(s)) for s in sequences])
    attention = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    is_answer = torch.zeros_like(attention)
    for row, group in enumerate(groups):
        mask = group.scored[answer] if group.scored else None
        is_answer[row, len(group.prompt_ids) : len(sequences[row])] = 1 if mask is None else torch.from_numpy(mask)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps * is_answer[:, 1:]).sum(1)


def padded_dpo_loss(policy: LlamaForCausalLM, reference: LlamaForCausalLM, groups: list[Group], beta: float) -> Tensor:
    """DPO as its paper writes it (eq. 7), mean over pairs, two padded forwards a model."""
    with torch.no_grad():
        ref = [padded_sequence_logps(reference, groups, answer) for answer in (0, 1)]
    pi = [padded_sequence_logps(policy, groups, answer) for answer in (0, 1)]
    margin = (pi[0] - ref[0]) - (pi[1] - ref[1])
    return torch.log1p(torch.exp(-beta * margin)).mean()
