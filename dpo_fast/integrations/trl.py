"""TRL's DPOTrainer with packs, the fused head and the reference store inside.

    from dpo_fast.integrations.trl import DPOTrainer

takes the constructor and the `DPOConfig` of TRL 1.16 and keeps transformers' loop, callbacks, checkpoints and logs,
with TRL's names. A micro-batch is one pack with each prompt once; the reference is read from the store and not kept as
a model, except for `sync_ref_model`, whose reference moves, and for streams, whose rows are scored as they come. An
unsupported option raises by name; docs/drop_in.md goes through all of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.data_loader import get_sampler
from datasets import IterableDataset
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer as TRLTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from dpo_fast.integrations.trl_metrics import FigureWindow, micro_batch_figures, num_unshared_tokens
from dpo_fast.integrations.trl_options import loss_config, refuse_unsupported, with_stored_reference
from dpo_fast.kernels.autotune import cache_dir
from dpo_fast.losses.objective import any_loss, preference_loss
from dpo_fast.model.attention import own_attention, packed_attention, reads_packs
from dpo_fast.model.check import length_thresholds, with_fitting_layout
from dpo_fast.model.policy import Policy, Scored
from dpo_fast.packs.balance import BalancedSampler, group_cost
from dpo_fast.packs.bins import best_fit_decreasing
from dpo_fast.packs.layout import Group, PackedBatch, pack
from dpo_fast.ranks import Ranks
from dpo_fast.reference.fill import fill_reference
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.reference.scores import Reference, StoredScores
from dpo_fast.reference.store import ReferenceStore
from dpo_fast.training.step import scored_pairs

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def group_of(example: dict[str, Any], row: int, max_length: int | None) -> Group:
    """TRL's tokens as a group, cut at the end as TRL's collator does.

    Raises:
        ValueError: an answer has no token.
    """
    room = None if max_length is None else max_length - len(example["prompt_ids"])
    answers = tuple(np.array(example[name][:room], dtype=np.int32) for name in ("chosen_ids", "rejected_ids"))
    if not all(map(len, answers)):
        raise ValueError(f"row {row}: an answer is empty; leave the row out")
    return Group(row, np.array(example["prompt_ids"], dtype=np.int32), answers)


@dataclass
class PackCollator:
    """The examples of a micro-batch -> one pack, with reference log-probs where the examples have them."""

    max_length: int | None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`packed_batch`; transformers counts pairs by `rows` (P,) and tokens by `input_ids` (1, T)."""
        groups = [group_of(example, row, self.max_length) for row, example in enumerate(examples)]
        batch = pack(groups)
        if all(name in examples[0] for name in REFERENCE_COLUMNS):
            answers = [tuple(np.array(example[name], np.float32) for name in REFERENCE_COLUMNS) for example in examples]
            batch = replace(batch, ref_logps=StoredScores(groups, answers).score(batch))
        return {"rows": torch.arange(len(groups)), "packed_batch": batch, "input_ids": batch.input_ids[None]}


def padded_pairs(batch: PackedBatch, pad_id: int) -> tuple[Tensor, Tensor]:
    """The pairs as TRL's collator lays them out: prompt and answer, chosen ones first, padded on the right.

    Returns:
        (2P, L) token ids and their attention mask, both int64.
    """
    bounds = batch.cu_seqlens_k.tolist()
    segments = [batch.answer_segments[answer] for answer in (*batch.chosen.tolist(), *batch.rejected.tolist())]
    rows = [batch.input_ids[batch.kv_index[bounds[segment] : bounds[segment + 1]]] for segment in segments]
    masks = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True, padding_value=pad_id), masks


class DPOTrainer(TRLTrainer):
    """A drop-in for `trl.DPOTrainer`."""

    model: Any
    ref_model: Any
    args: Any
    train_dataset: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        reference_store: str | Path | None = None,
    ) -> None:
        """TRL's arguments.

        Args:
            model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
                callbacks, optimizers, quantization_config, peft_config: as in `trl.DPOTrainer`.
            reference_store: SQLite file of reference log-probs; None is the file that `dpo-fast train` uses.

        Raises:
            NotImplementedError: an option that is not supported, by name.
        """
        args = args or DPOConfig("dpo")
        given = {name: value for name, value in locals().items() if name not in ("self", "args", "__class__")}
        refuse_unsupported(args, given)
        del given["reference_store"]
        self.loss_config = loss_config(args)
        self._store = Path(reference_store) if reference_store else cache_dir() / "reference.sqlite"
        self._fingerprint: str | None = None
        self._policy: Policy | None = None
        self._moving_reference: Policy | None = None
        self._kept_reference: Policy | None = None
        self._num_tokens = 0
        self._figures = {"train": FigureWindow(), "eval": FigureWindow()}
        super().__init__(args=with_stored_reference(args), **given)
        self.data_collator = PackCollator(args.max_length)
        if args.sync_ref_model:
            self._moving_reference = self._make_policy(self.ref_model)
        self._prepare_policy()

    def _make_policy(self, model: Any) -> Policy:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        bf16 = bool(self.args.bf16) and base.dtype is not torch.bfloat16
        device = self.accelerator.device
        shares_prompts = self._policy is None or self._policy.shares_prompts
        return Policy(base.to(device).eval(), device, bf16=bf16, shares_prompts=shares_prompts, router_loss_coef=0.0)

    def _prepare_policy(self) -> Policy:
        """The model as a `Policy`, checked once on a row; its forward then takes packs, so that wrappers see it run."""
        if self._policy is not None:
            return self._policy
        if self._is_vlm:
            raise NotImplementedError("processing_class: expected a tokenizer; there are no packs of images")
        policy = self._make_policy(self.model)
        plain_forward = self.model.forward

        @functools.wraps(plain_forward)
        def forward(*args: Any, packed_batch: PackedBatch | None = None, **kwargs: Any) -> Any:
            if packed_batch is None:
                return plain_forward(*args, **kwargs)
            assert self._policy is not None
            # Other attention ignores the layout, and every answer would see the ones before it.
            assert reads_packs(policy.model) or not self._policy.shares_prompts, "packs come within `reading_packs`"
            return self._policy.forward(packed_batch, want_stats=True)

        with packed_attention(policy.model):
            policy = with_fitting_layout(policy, self._checked_groups(policy))
        if self.aux_loss_enabled:
            policy = replace(policy, router_loss_coef=self.router_aux_loss_coef)
        self._policy = policy
        self.model.forward = forward
        return policy

    def _checked_groups(self, policy: Policy) -> list[Group]:
        """The first rows; all of them, 64 of a stream, if the model treats long ones in another way."""
        whole = 64 if isinstance(self.train_dataset, IterableDataset) else None
        some = islice(self.train_dataset, whole if length_thresholds(policy) else 8)
        return [group_of(example, row, self.args.max_length) for row, example in enumerate(some)]

    def get_train_dataloader(self) -> Any:
        """Transformers', with the rows of a step dealt to the processes so that their packs cost about the same."""
        loader: Any = super().get_train_dataloader()
        ranks, args = Ranks.current(), self.args
        as_trl_cuts_it = any_loss(self.loss_config, lambda facts: facts.compares_pairs) or self.aux_loss_enabled
        sampler = get_sampler(loader)
        if ranks.world_size == 1 or as_trl_cuts_it or self.accelerator.split_batches or sampler is None:
            return loader
        lengths = [group_of(example, row, args.max_length) for row, example in enumerate(self.train_dataset)]
        hidden_size = self.model.config.get_text_config().hidden_size
        costs = [group_cost(len(x.prompt_ids), map(len, x.answers), hidden_size) for x in lengths]
        loader.set_sampler(
            BalancedSampler(sampler, costs, num_processes=ranks.world_size, batch_size=args.per_device_train_batch_size)
        )
        return loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `Trainer.train`."""
        with reading_packs(self._policy, self._moving_reference, self._kept_reference):
            return super().train(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As TRL's; and for new rows after training as well, if their reference is stored or can be loaded again.

        Raises:
            ValueError: new rows need the reference, whose weights are gone.
        """
        if isinstance(eval_dataset, dict):
            parts = (
                self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in eval_dataset.items()
            )
            return {key: value for part in parts for key, value in part.items()}
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            tokenizer: Any = self.processing_class
            eval_dataset = self._prepare_dataset(eval_dataset, tokenizer, self.args, "eval")
            if self._moving_reference is None:
                batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
                eval_dataset = self._precompute_ref_logps(eval_dataset, "eval", batch_size)
        # TRL's own refuses new rows after training without looking for their reference.
        return super(TRLTrainer, self).evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `Trainer.evaluation_loop`, which `evaluate` and `predict` run."""
        with reading_packs(self._policy, self._moving_reference, self._kept_reference):
            return super().evaluation_loop(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Add per-token reference log-probs to a tokenized dataset, from the store if it has them.

        A stream is returned as it is, and the reference kept as a model.
        """
        if isinstance(dataset, IterableDataset):
            self._keep_reference()
            return dataset
        groups = [group_of(example, row, self.args.max_length) for row, example in enumerate(dataset)]
        was_training = self.model.training
        with ReferenceStore(self._store) as store:
            self._score_reference(store, groups, batch_size)
            Ranks.current().wait()
            assert self._fingerprint is not None
            found = Reference(store, self._fingerprint).lookup(groups)
        self.model.train(was_training)
        dataset = dataset.remove_columns([column for column in REFERENCE_COLUMNS if column in dataset.column_names])
        for side, column in enumerate(REFERENCE_COLUMNS):
            dataset = dataset.add_column(column, _list_column([answers[side] for answers in found]))
        return dataset

    def _score_reference(self, store: ReferenceStore, groups: list[Group], batch_size: int) -> None:
        """This process's share of what the store lacks."""
        if self._fingerprint is not None and not Reference(store, self._fingerprint).missing(groups):
            return
        own = Ranks.current().share(len(groups))
        budget = batch_size * max(group.num_tokens for group in groups)
        packs = [
            [own[i] for i in members] for members in best_fit_decreasing([groups[i].num_tokens for i in own], budget)
        ]
        console = Console(quiet=not Ranks.current().is_writer)
        with self._reference() as policy:
            if self._fingerprint is None:
                scored = self.model if self.ref_model is None else self.ref_model
                self._fingerprint = model_fingerprint(scored, numerics=policy.numerics)
            fill_reference(Reference(store, self._fingerprint), policy, groups, packs, console)
        if self.ref_model is not None and self._kept_reference is None:
            self.ref_model.to("cpu")  # until `evaluate` brings rows that were not scored

    @contextmanager
    def _reference(self) -> Iterator[Policy]:
        """The reference, ready to score packs."""
        adapter: AbstractContextManager[Any] = nullcontext()
        if self._kept_reference is not None:
            policy = self._kept_reference
        elif self.ref_model is not None:
            policy = self._make_policy(self.ref_model)
        elif hasattr(self.model, "peft_config"):
            policy = self._prepare_policy()
            adapter = use_adapter(self.model, adapter_name="ref" if "ref" in self.model.peft_config else None)
        elif self.state.global_step == 0:
            policy = self._prepare_policy()
        else:
            policy = self._make_policy(self._loaded_again())
        was_training = policy.model.training
        policy.model.eval()
        try:
            with reading_packs(policy), adapter:
                yield policy
        finally:
            policy.model.train(was_training)

    def _keep_reference(self) -> None:
        """Hold the reference for rows that are scored as they come; an adapter's is the model without it."""
        if self._kept_reference is not None or (self.ref_model is None and hasattr(self.model, "peft_config")):
            return
        model = self.ref_model
        if model is None:
            model = copy.deepcopy(self.model) if self.state.global_step == 0 else self._loaded_again()
            # Ours and TRL's stand-ins are bound to the model that was copied.
            vars(model).pop("forward", None)
        self._kept_reference = self._make_policy(model.requires_grad_(False))

    def _loaded_again(self) -> Any:
        """The model as it was before training.

        Raises:
            ValueError: it cannot be loaded, or its weights were others.
        """
        name = get_config_model_id(self.model.config)
        cause = "the model has no name to load it by"
        if name:
            try:
                settings = (self.args.model_init_kwargs or {}) | {"dtype": self.model.dtype, "device_map": None}
                model = create_model_from_path(name, **settings)
            except (OSError, ValueError) as error:
                cause = f"{name} cannot be loaded: {error}"
            else:
                # TRL sets it on the model that it trains.
                model.config.get_text_config().pad_token_id = self.model.config.get_text_config().pad_token_id
                policy = self._make_policy(model)
                if self._fingerprint in (None, model_fingerprint(model, numerics=policy.numerics)):
                    return model
                cause = f"{name} has other weights than training started from"
        raise ValueError(
            f"evaluate: these rows have no stored reference log-probs, and training has changed the model that they "
            f"are compared with ({cause}). Pass them as eval_dataset to the trainer, or pass a ref_model"
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As TRL's; what `compute_metrics` and `predict` read takes a second forward, over TRL's padded batch."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        assert self._policy is not None
        tokenizer: Any = self.processing_class
        ids, mask = padded_pairs(inputs["packed_batch"].to(self.accelerator.device), tokenizer.pad_token_id)
        with torch.no_grad(), own_attention(self._policy.model), self.compute_loss_context_manager():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return loss, logits, ids

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        assert not return_outputs, "`prediction_step` computes logits by itself"
        assert self._policy is not None
        batch = inputs["packed_batch"].to(self.accelerator.device)
        if self._moving_reference is not None:
            batch = replace(batch, ref_logps=self._moving_reference.score(batch))
        elif batch.ref_logps is None:
            with self._reference() as reference:
                batch = replace(batch, ref_logps=reference.score(batch))
        scored: Scored = model(packed_batch=batch)
        pairs = scored_pairs(batch, scored, self.loss_config)
        losses = preference_loss(pairs, self.loss_config)
        loss = losses.mean()
        if scored.router_loss is not None:
            loss = loss + scored.router_loss
        figures = micro_batch_figures(
            batch, pairs, losses, scored, beta=self.loss_config.beta, router_loss_coef=self._policy.router_loss_weight
        )
        self._figures["train" if self.model.training else "eval"].add(figures)
        self._num_tokens += num_unshared_tokens(batch) if self.model.training else 0
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add TRL's figures since the last report: the only place where the loop waits for the device."""
        mode = "train" if self.model.training else "eval"
        figures = self._figures[mode].read(Ranks.current().sum, self._num_tokens, by_micro_batch=self.model.training)
        self._metrics[mode].update({name: [value] for name, value in figures.items()})
        super().log(logs, start_time)


def reading_packs(*policies: Policy | None) -> AbstractContextManager[None]:
    """The models read packs inside, and plain batches (generation, say) outside."""
    return packed_attention(*(policy.model for policy in policies if policy and policy.shares_prompts))


def _list_column(arrays: Sequence[np.ndarray]) -> pa.Array:
    """fp32 arrays of any lengths as a column, without a Python number for each."""
    bounds = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(bounds, np.concatenate(arrays).astype(np.float32))
