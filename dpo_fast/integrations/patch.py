"""Our log-probs inside TRL's and transformers' own code, where they compute the same.

    from dpo_fast.integrations.patch import patched

    with patched():
        trainer.train()

What is replaced, and by what:

    transformers    the causal-LM loss of all models that look it up       `logprob`
    TRL 1.16        `selective_log_softmax`, wherever it was imported      `logprob`
    TRL 1.16        the product inside of its fused LM head                `linear_logprob_with_stats`

A call that ours do not cover (top-k indices, say, or one inside of `torch.compile`) goes to the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.loss import loss_utils

from dpo_fast.integrations import TRL_VERSION, is_trl_of_our_version
from dpo_fast.kernels.linear_logprob import linear_logprob_with_stats
from dpo_fast.kernels.logprob import logprob

Undo = Callable[[], None]
_undo: list[Undo] = []


def patch() -> None:
    """Replace them until `unpatch`; a second call changes nothing.

    Raises:
        ImportError: another version of TRL is installed than the one whose inside is known.
    """
    if _undo:
        return
    _patch_transformers()
    if find_spec("trl") is not None:
        if not is_trl_of_our_version():
            unpatch()
            raise ImportError(f"patch: written for TRL {TRL_VERSION}; install that one, or use `sequence_logprob`")
        _patch_trl()


def unpatch() -> None:
    """Put the originals back."""
    while _undo:
        _undo.pop()()


@contextmanager
def patched() -> Iterator[None]:
    """`patch` inside, and the originals again afterwards; inside of another `patched` it changes nothing."""
    was_patched = bool(_undo)
    patch()
    try:
        yield
    finally:
        if not was_patched:
            unpatch()


def _patch_transformers() -> None:
    original: Any = loss_utils.ForCausalLMLoss
    names = [name for name, loss in loss_utils.LOSS_MAPPING.items() if loss is original]
    loss_utils.LOSS_MAPPING.update(dict.fromkeys(names, causal_lm_loss))
    _undo.append(lambda: loss_utils.LOSS_MAPPING.update(dict.fromkeys(names, original)))


def _patch_trl() -> None:
    from trl.trainer import utils

    ours = _selective_log_softmax_over(utils.selective_log_softmax)
    _replace_in_trl("selective_log_softmax", utils.selective_log_softmax, ours)
    # A module that is first imported meanwhile takes ours, and so it is looked for again.
    _undo.append(lambda: _replace_in_trl("selective_log_softmax", ours, ours.__wrapped__))
    head = utils._ChunkedLogProbFunction  # type: ignore[attr-defined]
    setattr(utils, "_ChunkedLogProbFunction", _head_over(head))  # noqa: B010 - a private name, which mypy denies
    _undo.append(lambda: setattr(utils, "_ChunkedLogProbFunction", head))


def _replace_in_trl(name: str, old: object, new: object) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "trl" and vars(module).get(name) is old:
            setattr(module, name, new)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, without an fp32 copy of the logits.

    Args:
        logits: (B, L, V) in any floating dtype.
        labels: (B, L); position t of the logits predicts label t + 1.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by; None is the number of labels, which gives the mean.
        ignore_index: a label that is left out.
        shift_labels: (B, L) labels that lie where they are predicted, used in place of `labels`.
        **kwargs: not used, as in transformers.

    Returns:
        Scalar fp32.
    """
    if torch.compiler.is_compiling():
        original: Any = loss_utils.ForCausalLMLoss
        return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        assert labels is not None, "labels or shift_labels"
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    target = target.masked_fill(target == ignore_index, -1)
    total = -logprob(logits.reshape(-1, vocab_size), target).sum()
    if num_items_in_batch is None:
        return total / (target >= 0).sum()
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def _selective_log_softmax_over(original: Any) -> Any:
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        """TRL's, for one index a row."""
        one_a_row = index.shape == logits.shape[:-1] and index.dtype == torch.int64
        if not one_a_row or temperature <= 0 or torch.compiler.is_compiling():
            return original(logits, index, temperature, row_mask)
        target = index if row_mask is None else index.masked_fill(row_mask == 0, -1)
        scaled = logits if temperature == 1 else logits / temperature
        return logprob(scaled, target).to(logits.dtype)

    selective_log_softmax.__wrapped__ = original  # type: ignore[attr-defined]
    return selective_log_softmax


def _head_over(original: Any) -> Any:
    class Head:
        """Called as the autograd function that it stands for."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = (),
        ) -> tuple[Tensor | None, ...]:
            scaled_before_cap = final_logit_softcapping is not None and logit_scale != 1
            is_sharded = hasattr(weight, "ds_id")  # DeepSpeed gathers it for TRL's own backward
            if scaled_before_cap or is_sharded or logit_scale <= 0:
                return original.apply(
                    *(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale),
                    outputs,
                )
            logps, stats = linear_logprob_with_stats(
                *(hidden, weight, targets),
                bias=bias,
                softcap=final_logit_softcapping,
                temperature=temperature / logit_scale,
            )
            entropy = _WithoutGradient.apply(stats.entropy, logps)
            figures = {
                "entropy": entropy,
                "log_sum_sq_probs": stats.sum_p2.log(),
                "mean_logits": stats.mean_logit,
                "is_top1": stats.is_argmax,
            }
            return (logps, *(figure if name in outputs else None for name, figure in figures.items()))

    return Head


class _WithoutGradient(torch.autograd.Function):
    """A figure that says so if someone differentiates it, where a constant would be wrong in silence."""

    @staticmethod
    def forward(ctx: Any, figure: Tensor, source: Tensor) -> Tensor:
        return figure.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise NotImplementedError(
            "the entropy that dpo_fast's head gives has no gradient; leave `patched()` for a loss that contains it"
        )
