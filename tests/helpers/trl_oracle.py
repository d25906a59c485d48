"""TRL 1.16's own loss code, run on log-probs of our choosing."""

from types import SimpleNamespace
from unittest import mock

import torch

# Every loss of TRL's DPOTrainer.
TRL_LOSSES = frozenset(
    (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    )
)
_ATTRIBUTES = (
    *("model", "accelerator", "aux_loss_enabled", "use_weighting", "ld_alpha", "precompute_ref_logps", "args"),
    *("f_divergence_type", "f_alpha_divergence_coef", "loss_types", "loss_weights", "beta", "label_smoothing"),
    *("_total_train_tokens", "_tp_size", "_metrics", "state", "ref_model"),
)


def trl_token_loss(logps, lengths, ref_chosen, ref_rejected, config, *, log_sum_sq=None):
    """TRL's mean loss.

    Args:
        logps: (2P, L) of tokens, chosen answers first, zero beyond each answer's length.
        lengths: (2P,) tokens of each answer.
        ref_chosen, ref_rejected: (P,) sums of the reference.
        config: a `LossConfig`.
        log_sum_sq: (2P, L) log of the sum of squared probabilities, for WPO.
    """
    from trl import DPOConfig, DPOTrainer

    mask = torch.zeros(len(lengths), logps.shape[1] + 1, dtype=torch.int64)
    for row, length in enumerate(lengths.tolist()):
        mask[row, 1 : 1 + length] = 1
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    outputs.log_sum_sq_probs = zeros if log_sum_sq is None else log_sum_sq
    trainer = mock.MagicMock(spec_set=[*dir(DPOTrainer), *_ATTRIBUTES])
    trainer.model.training = True
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = lambda x: x
    trainer.aux_loss_enabled, trainer.use_weighting = False, config.use_weighting
    trainer.ld_alpha, trainer.precompute_ref_logps = config.ld_alpha, True
    trainer.f_divergence_type = config.f_divergence_type
    trainer.f_alpha_divergence_coef = config.f_alpha_divergence_coef
    trainer.loss_types, trainer.loss_weights = [config.loss_type], [1.0]
    trainer.beta, trainer.label_smoothing = config.beta, config.label_smoothing
    trainer.args = mock.MagicMock(spec=DPOConfig, discopop_tau=config.discopop_tau)
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)
