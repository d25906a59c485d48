"""A causal language model that reads packs, and the log-probs of a pack's targets."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_fast.config import ModelConfig
from dpo_fast.errors import UserError
from dpo_fast.kernels.gather_rows import RowIndex, gather_rows
from dpo_fast.kernels.head import DEFAULT_MEMORY_BUDGET, HeadKeywords
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_with_stats
from dpo_fast.kernels.prefix_attention import prefix_layout
from dpo_fast.kernels.token_stats import TokenStats
from dpo_fast.packs.layout import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from dpo_fast.model.adapter import Adapter, head_weight, merged
from dpo_fast.model.attention import PACKED_ATTENTION
from dpo_fast.model.checkpointing import Checkpointing, enable_checkpointing
from dpo_fast.model.load import load_adapted, refuse_not_finite
from dpo_fast.model.placement import Placement
from dpo_fast.model.quantize import FourBit
from dpo_fast.model.rotary import LengthRegimes
from dpo_fast.model.sharding import Parallel, decoder_layers, shard, whole_weights

# Part of the reference store's keys: raise it when a change of head or attention moves log-probs beyond rounding.
NUMERICS_VERSION = 2


@dataclass(frozen=True)
class Scored:
    """What a forward over a pack gives.

    Attributes:
        logps: (N,) fp32 log-probs of the targets.
        router_loss: load-balancing loss of a mixture of experts times its coefficient, to be added to a mean loss; None
            for other models.
        stats: (N,) figures of each target's distribution, where they were asked for.
    """

    logps: Tensor
    router_loss: Tensor | None = None
    stats: TokenStats | None = None

    def as_tuple(self) -> tuple[Tensor, Tensor | None, TokenStats | None]:
        """The attributes in their order."""
        return self.logps, self.router_loss, self.stats


@dataclass(frozen=True)
class _Decoded:
    """(N, D) hidden states of the rows before the targets, and one (T, E) tensor of router logits a layer."""

    rows: Tensor
    router_logits: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Policy:
    """A model with what it takes to score packs; a setting is changed by `dataclasses.replace`.

    Attributes:
        model: from `load_model`, on `device` and set to read packs.
        device: of the model.
        bf16: run the model in bfloat16 autocast.
        memory_budget: bytes that the head may keep.
        autotune: time the head's kernels once per size on a GPU and take the fastest.
        deterministic_attention: let attention's backward add in a fixed order on a GPU, too.
        shares_prompts: lay a prompt out once for all its answers; false computes answer by answer.
        static_tokens: fill every pack up to this many tokens, so that compiled layers see one size; None fills none.
        is_compiled: whether the decoder's layers are compiled.
        parallel: what processes share of the model; None if there is one.
        layers: which fused layers the model has; empty if it has its own (see `model/layers.py`).
        router_loss_coef: weight of the load-balancing loss of a mixture of experts; 0 leaves it out, None takes the
            model's own coefficient if its configuration asks for balancing, as in transformers.
        adapter: the adapter in the model, if there is one.
    """

    model: Any
    device: torch.device
    bf16: bool = False
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    autotune: bool = True
    deterministic_attention: bool = True
    shares_prompts: bool = True
    static_tokens: int | None = None
    is_compiled: bool = False
    parallel: Parallel | None = None
    layers: str = ""
    router_loss_coef: float | None = None
    adapter: Adapter | None = None

    @classmethod
    def load(
        cls, config: ModelConfig, name: str | None = None, *, merge: bool = False, parallel: Parallel | None = None
    ) -> Policy:
        """Load a model as the settings say.

        Args:
            config: where and in which numbers it runs.
            name: of the model; `config.model` by default.
            merge: add its adapter to the weights.
            parallel: what the processes of the default group share of it; None for one process.
        """
        place = Placement.of(config)
        name = name or config.model
        model: Any
        model, peft = load_adapted(
            *(name, place.dtype),
            base=config.adapter_base,
            four_bit=FourBit.of(config),
            trust_remote_code=config.trust_remote_code,
        )
        if merge and peft is not None:
            model, peft = merged(peft), None
        model.eval()
        if parallel is None:
            model.to(device=place.device)
        refuse_not_finite(name, model)
        if parallel is not None:
            shard(model, device=place.device, parallel=parallel, dtype=torch.bfloat16 if place.bf16 else None)
        return cls(
            model,
            adapter=None if peft is None else Adapter(peft),
            device=place.device,
            bf16=place.bf16,
            memory_budget=int(config.head_memory_budget_gib * 2**30),
            autotune=config.autotune,
            deterministic_attention=config.deterministic_attention,
            parallel=parallel,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return torch.bfloat16 if self.bf16 else self.model.dtype

    @property
    def numerics(self) -> str:
        """What else than the weights and the configuration can move a log-prob; part of the reference store's keys."""
        layout = PACKED_ATTENTION if self.shares_prompts else "one sequence an answer"
        ways = " compiled" * self.is_compiled + " lengths apart" * (self.length_regimes is not None)
        ways += " gathered weights" * (self.parallel is not None and self.bf16)
        layers = f" {self.layers}" if self.layers else ""
        return f"v{NUMERICS_VERSION} {self.compute_dtype} {layout}{ways}{layers}"

    @cached_property
    def length_regimes(self) -> LengthRegimes | None:
        """How the length of a row decides on its rotary frequencies, if it does."""
        return LengthRegimes.of(self.model)

    @property
    def is_split(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.parallel == "fsdp"

    def sum_gradients(self, *, now: bool) -> None:
        """Let copies of the weights sum their gradients in the next backward, or in a later one of the same step."""
        if self.parallel == "ddp":
            self.model.set_requires_all_reduce(now)
            self.model.set_is_last_backward(now)  # which forgets what has not been summed yet

    @property
    def noise(self) -> float:
        """Nats by which rounding alone may move a token's log-prob from one layout to another."""
        return 2e-3 if self.compute_dtype is torch.float32 else 0.5

    def autocast(self) -> torch.autocast:
        """The context that the decoder's body runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def forward(self, batch: PackedBatch, *, want_stats: bool = False) -> Scored:
        """The decoder's body over the pack, the head over the target rows alone.

        Returns:
            Log-probs in the order of `batch.targets`, differentiable.
        """
        if self.parallel is None:
            return self._forward(batch, want_stats=want_stats)
        # Gathering weights hangs on the model's own forward, and on the tensors in what it returns.
        return Scored(*self.model(packed=lambda: self._forward(batch, want_stats=want_stats).as_tuple()))

    def _forward(self, batch: PackedBatch, *, want_stats: bool) -> Scored:
        decoded = self._decode_pack(batch) if self.shares_prompts else self._decode_answers(batch)
        logps, stats = self._head(decoded.rows, batch.targets, want_stats=want_stats)
        return Scored(logps, self._router_loss(decoded.router_logits), stats)

    def padding(self, batch: PackedBatch) -> int:
        """Tokens that the pack is filled up with, so that all have one size: none unless `static_tokens` is set."""
        return max(0, (self.static_tokens or 0) - batch.num_tokens) if self.shares_prompts else 0

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """(N,) fp32 log-probs of `forward`."""
        return self.forward(batch).logps

    def _decode_pack(self, batch: PackedBatch) -> _Decoded:
        """All of a pack at once, unless the lengths of its answers keep them apart."""
        if self.length_regimes is None:
            return self._decode_packed(batch)
        lengths = batch.cu_seqlens_k.diff().tolist()
        regimes = [self.length_regimes.of_length(lengths[segment]) for segment in batch.answer_segments]
        return self._decode_packed(batch) if len(set(regimes)) == 1 else self._decode_regimes(batch, regimes)

    def _decode_packed(self, batch: PackedBatch) -> _Decoded:
        num_tokens, padding = batch.num_tokens, self.padding(batch)
        layout = prefix_layout(
            *(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, num_tokens + padding),
            deterministic=self.deterministic_attention,
        )
        ids, positions = (nn.functional.pad(x, (0, padding)) for x in (batch.input_ids, batch.position_ids))
        decoded = self._decode(ids, position_ids=positions[None], packed_layout=layout)
        routers = tuple(layer[:num_tokens] for layer in decoded.router_logits)
        # The prompt's last row is read for each of its answers: `gather_rows` sums its gradient in a fixed order.
        rows = gather_rows(decoded.rows, RowIndex.of(batch.hidden_index, num_tokens + padding))
        return _Decoded(rows, routers)

    def _decode_regimes(self, batch: PackedBatch, regimes: list[int]) -> _Decoded:
        """One forward a regime, over sequences side by side, each answer with its own copy of the prompt."""
        sequences = list(_sequences(batch))
        rows: dict[int, Tensor] = {}
        routers = []
        for regime in sorted(set(regimes)):
            answers = [answer for answer, of_answer in enumerate(regimes) if of_answer == regime]
            keys = [sequences[answer][0] for answer in answers]
            bounds = torch.tensor([0, *map(len, keys)]).cumsum(0)
            index = torch.arange(int(bounds[-1]), device=batch.input_ids.device)
            layout = prefix_layout(bounds, bounds, index, len(index), deterministic=self.deterministic_attention)
            positions = torch.cat([index[: len(own)] for own in keys])
            ids = batch.input_ids[torch.cat(keys)]
            decoded = self._decode(ids, position_ids=positions[None], packed_layout=layout)
            routers.append(decoded.router_logits)
            for answer, start in zip(answers, bounds.tolist(), strict=False):
                rows[answer] = decoded.rows[start + sequences[answer][1]]
        return _Decoded(
            torch.cat([rows[answer] for answer in range(len(regimes))]),
            tuple(torch.cat(layer) for layer in zip(*routers, strict=True)),
        )

    def _decode_answers(self, batch: PackedBatch) -> _Decoded:
        """One sequence an answer, no padding: for models whose sequences cannot share a prompt."""
        parts = []
        for keys, before_targets in _sequences(batch):
            decoded = self._decode(batch.input_ids[keys])
            parts.append(replace(decoded, rows=decoded.rows[before_targets]))
        routers = zip(*(part.router_logits for part in parts), strict=True)
        return _Decoded(torch.cat([part.rows for part in parts]), tuple(torch.cat(layer) for layer in routers))

    @property
    def _decoder(self) -> Any:
        """The model without its head."""
        decoder = self.model.get_decoder()
        return self.model.model if decoder is self.model else decoder  # Llama 4 gives itself

    def _decode(self, ids: Tensor, **arguments: Any) -> _Decoded:
        if self.router_loss_weight:
            arguments["output_router_logits"] = True
        if self.length_regimes is not None:
            self.length_regimes.forget()
        with self.autocast():
            outputs = self._decoder(input_ids=ids[None], use_cache=False, **arguments)
        rows = outputs.last_hidden_state[0]
        if self.is_compiled and rows.grad_fn is not None:
            # A compiled backward that recomputes attention knows the layout by its number alone.
            rows.grad_fn.metadata["packed_layout"] = arguments.get("packed_layout")
        return _Decoded(rows, tuple(getattr(outputs, "router_logits", None) or ()))

    @property
    def router_loss_weight(self) -> float:
        """The factor of the load-balancing loss; 0 if there is none."""
        if self.router_loss_coef is not None:
            return self.router_loss_coef
        balanced = getattr(self.model.config, "output_router_logits", False)
        return float(getattr(self.model.config, "router_aux_loss_coef", 0.0)) if balanced else 0.0

    def _router_loss(self, router_logits: tuple[Tensor, ...]) -> Tensor | None:
        """The load-balancing loss of the model's own class, times its coefficient; None if there is none."""
        if not self.router_loss_weight or not router_logits:
            return None
        modules = (sys.modules[kind.__module__] for kind in type(self.model).__mro__)
        balance = next(function for x in modules if (function := getattr(x, "load_balancing_loss_func", None)))
        loss = balance(router_logits, self.model.num_experts, self.model.num_experts_per_tok)
        return self.router_loss_weight * loss

    def _head(self, rows: Tensor, targets: Tensor, *, want_stats: bool) -> tuple[Tensor, TokenStats | None]:
        """Log-probs of `targets` (N,) under the LM head, from the hidden states `rows` (N, D) one position earlier."""
        head = self.model.get_output_embeddings()
        text_config = self.model.config.get_text_config()
        # Granite divides its logits, Cohere multiplies them.
        divisor = getattr(text_config, "logits_scaling", None) or 1 / (getattr(text_config, "logit_scale", None) or 1)
        dtype = self.compute_dtype
        bias = getattr(head, "bias", None)
        arguments = (rows.to(dtype), head_weight(head).to(dtype), targets)
        bias = None if bias is None else bias.to(dtype)
        options = HeadKeywords(
            softcap=getattr(text_config, "final_logit_softcapping", None),
            temperature=divisor,
            memory_budget=self.memory_budget,
            autotune=self.autotune,
            assume_valid=True,  # token ids of the model's own vocabulary: the embedding has read them
        )
        if want_stats:
            return linear_logprob_with_stats(*arguments, bias=bias, **options)
        return linear_logprob(*arguments, bias=bias, **options), None

    @property
    def has_dropout(self) -> bool:
        """Whether training drops anything out: only a new adapter does."""
        return self.adapter is not None and bool(self.adapter.settings.lora_dropout)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """The model as it is used, not as it is trained."""
        if self.has_dropout:
            self.model.eval()
        yield
        if self.has_dropout:
            self.model.train()

    def saved_weights(self) -> dict[str, Tensor]:
        """What `save` writes, by name: those of the adapter, or all parameters."""
        return dict(self.model.named_parameters()) if self.adapter is None else self.adapter.weights()

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Tensor:
        """(N,) fp32 log-probs on the policy's device, without gradients; `batch` may lie anywhere."""
        return self.token_logps(batch.to(self.device))

    def set_trainable(self, *, checkpointing: Checkpointing = "none", offload: bool = False) -> None:
        """Switch to training mode, recomputing each layer's activations as `checkpointing` says.

        With `offload` the inputs of layers, which `full` keeps, wait in the host's memory.
        """
        self.model.train()
        if checkpointing != "none":
            enable_checkpointing(self.model, checkpointing, offload=offload)

    def compiled(self, *, backend: str = "inductor") -> Policy:
        """With the decoder's layers under `torch.compile`, for packs of all sizes or for that of `static_tokens`.

        A layer is one graph: attention is an operator in it (kernels/prefix_attention_op.py). The layers are compiled
        in place.

        Raises:
            UserError: the model does not name its layers.
        """
        layers = decoder_layers(self.model)
        if not layers:
            raise UserError(f"--torch_compile: {type(self.model).__name__} does not name its layers; leave it off")
        for layer in layers:
            # None: for the first size, and once more for all others if another comes, as of a row above the budget.
            layer.compile(dynamic=True if self.static_tokens is None else None, backend=backend)
        return replace(self, is_compiled=True)

    def whole_weights(self) -> dict[str, Tensor]:
        """Whole weights by name: the model's own, or copies on the host of those that processes share.

        Those are in the first process alone, and all have to ask for them.
        """
        return self.model.state_dict() if self.parallel is None else whole_weights(self.model)

    def save(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype | None = None,
        *,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a Hugging Face folder: weights as safetensors, configuration, tokenizer; of an adapter, peft's.

        Args:
            folder: to write into.
            tokenizer: of the model.
            dtype: of the written weights; None is their own, as an adapter's always is.
            weights: from `whole_weights`, if processes share them.
        """
        if self.adapter is not None:
            self.adapter.save(folder)
        elif dtype in (None, self.model.dtype):
            self.model.save_pretrained(folder, state_dict=weights)
        else:
            own = self.model.state_dict() if weights is None else weights
            weights = {name: weight.to(dtype) for name, weight in own.items()}
            self.model.save_pretrained(folder, state_dict=weights)
            config = json.loads((folder / "config.json").read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(folder)


def _sequences(batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """For each answer the rows of its prompt and itself, and the places in them of the rows before its targets."""
    key_bounds, target_bounds = batch.cu_seqlens_k.tolist(), batch.cu_answers.tolist()
    for answer, segment in enumerate(batch.answer_segments):
        keys = batch.kv_index[key_bounds[segment] : key_bounds[segment + 1]]
        before_targets = batch.hidden_index[target_bounds[answer] : target_bounds[answer + 1]]
        yield keys, torch.searchsorted(keys, before_targets)


def warn_if_weights_cannot_move(config: ModelConfig, learning_rate: float) -> None:
    """At DPO's learning rates a plain optimizer step rounds to nothing on most bfloat16 weights; say so."""
    if config.dtype == "bfloat16":
        warnings.warn(
            f"--dtype bfloat16 trains bfloat16 weights without a master copy: at learning rate {learning_rate:g} most "
            "updates round to zero. --optim adamw_8bit_fused keeps 8 more bits of each weight; --dtype float32 with "
            "--bf16 true keeps fp32 weights at the speed of bfloat16.",
            stacklevel=2,
        )
