"""One model writes answers: through transformers on any machine, or through vLLM if it is installed.

The log-prob of an answer is that of the tokens that were sampled, under the model's own distribution (temperature 1,
no top-p), as `dpo-fast score` reports it, so answers sampled at different temperatures can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from dpo_fast.config import ModelConfig, SampleConfig, SamplingConfig
from dpo_fast.errors import UserError
from dpo_fast.model.adapter_folder import is_adapter
from dpo_fast.model.attention import own_attention
from dpo_fast.model.check import refuse_unknown_tokens, with_fitting_layout
from dpo_fast.model.placement import pick_device
from dpo_fast.model.policy import Policy
from dpo_fast.packs.bins import best_fit_decreasing
from dpo_fast.packs.layout import Group, Ranking
from dpo_fast.reference.scores import score_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens per pack when log-probs are computed. That takes little of the time, so the packs are sized for memory.
SCORED_TOKENS = 8192
# No answer is preferred yet.
UNRANKED = Ranking(pairs=())


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without special tokens.
        ids: its tokens, with the end token.
        logp: of all tokens under the model's own distribution, in nats.
        finished: whether an end token came before `max_new_tokens`.
    """

    text: str
    ids: list[int]
    logp: float
    finished: bool


class Writer(Protocol):
    """A loaded model."""

    def __call__(self, prompts: Sequence[list[int]], temperature: float, seed: int) -> list[Answer]:
        """One answer to each prompt (token ids); a prompt may occur several times."""
        ...


def load_writer(name: str, tokenizer: PreTrainedTokenizerBase, config: SampleConfig) -> Writer:
    """Load a model to write with.

    Raises:
        UserError: it cannot be loaded, or vLLM is requested and not installed.
    """
    if config.backend == "vllm":
        if is_adapter(name):
            raise UserError(
                f"--backend vllm: {name} is an adapter; name a merged model (--merge_final true of dpo-fast train), or "
                "use --backend transformers"
            )
        return VllmWriter(name, config, config.dtype)
    return TransformersWriter(name, tokenizer, config)


class TransformersWriter:
    """Batched generation by transformers; log-probs by the packed forward."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, sampling: SampleConfig) -> None:
        """Load the model; a dtype of `auto` is bfloat16 on a GPU, float32 on a CPU."""
        device, dtype = sampling.device, sampling.dtype
        weights: Literal["float32", "bfloat16"] = "float32"
        if dtype == "bfloat16" or (dtype == "auto" and pick_device(device).type == "cuda"):
            weights = "bfloat16"
        self.policy = Policy.load(
            ModelConfig(
                model=name,
                adapter_base=sampling.adapter_base,
                load_in_4bit=sampling.load_in_4bit,
                device=device,
                dtype=weights,
                bf16=False,
                trust_remote_code=sampling.trust_remote_code,
            )
        )
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.end_tokens = _end_tokens(self.policy.model, tokenizer)
        self._is_checked = False

    def __call__(self, prompts: Sequence[list[int]], temperature: float, seed: int) -> list[Answer]:
        """See `Writer`."""
        refuse_unknown_tokens(self.policy.model, prompts, "a prompt")
        written = self._generate(prompts, temperature, seed)
        groups = [
            Group(i, np.array(prompt, dtype=np.int32), (np.array(ids, dtype=np.int32),), UNRANKED)
            for i, (prompt, ids) in enumerate(zip(prompts, written, strict=True))
        ]
        return [
            Answer(
                text=str(self.tokenizer.decode(ids, skip_special_tokens=True)),
                ids=ids,
                logp=logp,
                finished=ids[-1] in self.end_tokens,
            )
            for ids, logp in zip(written, self._score(groups), strict=True)
        ]

    def _generate(self, prompts: Sequence[list[int]], temperature: float, seed: int) -> list[list[int]]:
        """The generated tokens, up to the end token."""
        from transformers import GenerationConfig

        model, device = self.policy.model, self.policy.device
        # Replaces the model's own configuration, whose top-k or penalties would change the distribution.
        model.generation_config = GenerationConfig(
            do_sample=temperature > 0,
            max_new_tokens=self.sampling.max_new_tokens,
            pad_token_id=min(self.end_tokens) if self.end_tokens else 0,
            eos_token_id=sorted(self.end_tokens) or None,
            **({"temperature": temperature, "top_k": 0, "top_p": self.sampling.top_p} if temperature > 0 else {}),
        )
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with own_attention(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            rows = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        return [self._up_to_the_end(row) for row in rows[:, longest:].tolist()]

    def _up_to_the_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_tokens), len(ids) - 1)
        return ids[: end + 1]

    def _score(self, groups: list[Group]) -> list[float]:
        """Log-prob of each group's one answer."""
        if not self._is_checked:
            self.policy = with_fitting_layout(self.policy, groups)
            self._is_checked = True
        # Copies of a prompt are adjacent and form one group, so that their prompt is computed once.
        merged: list[Group] = []
        for group in groups:
            if merged and np.array_equal(merged[-1].prompt_ids, group.prompt_ids):
                merged[-1] = Group(merged[-1].row, group.prompt_ids, merged[-1].answers + group.answers, UNRANKED)
            else:
                merged.append(group)
        sums: dict[int, list[float]] = {}
        for packed in best_fit_decreasing([group.num_tokens for group in merged], SCORED_TOKENS):
            for i, answers in zip(packed, score_groups([merged[i] for i in packed], self.policy.score), strict=True):
                sums[i] = [float(logps.astype(np.float64).sum()) for logps in answers]
        return [logp for i in range(len(merged)) for logp in sums[i]]


class VllmWriter:
    """Generation by vLLM, which does its own batching: `generation_batch_size` may be large."""

    def __init__(self, name: str, sampling: SamplingConfig, dtype: str) -> None:
        """Load the model into vLLM's engine."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                "--backend vllm: vLLM is not installed: pip install vllm, or use --backend transformers"
            ) from error
        # Log-probs under the model's own distribution, as `TransformersWriter` reports them.
        self.engine: Any = LLM(model=name, dtype=dtype, seed=sampling.seed, logprobs_mode="raw_logprobs")
        self.sampling = sampling

    def __call__(self, prompts: Sequence[list[int]], temperature: float, seed: int) -> list[Answer]:
        """See `Writer`."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=temperature,
                top_p=self.sampling.top_p,
                max_tokens=self.sampling.max_new_tokens,
                seed=seed + i,
                logprobs=0,
            )
            for i in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        written = [done.outputs[0] for done in self.engine.generate(inputs, parameters, use_tqdm=False)]
        return [
            Answer(out.text, list(out.token_ids), float(out.cumulative_logprob), out.finish_reason == "stop")
            for out in written
        ]


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation configuration."""
    own = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {int(token) for token in found if token is not None}
