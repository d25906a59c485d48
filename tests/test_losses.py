"""Losses against hand-written fp64 formulas, and against TRL's and Liger's own code where they have the same loss."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dpo_fast.config import LossConfig
from dpo_fast.losses import LOSSES, PairLogps, loss_at_reference, preference_loss

PAIRS = 7
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
CONFIGS = [
    LossConfig(beta=0.1, label_smoothing=0.05),
    LossConfig(beta=0.5, label_smoothing=0.2, discopop_tau=0.3, dpop_lambda=3.0),
]


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)

    def draw(scale):
        return scale * torch.rand(PAIRS, generator=generator)

    lengths = torch.tensor([1, 2, 3, 5, 8, 13, 400])
    chosen, rejected = -20 - draw(30), -20 - draw(30)
    return PairLogps(chosen, rejected, chosen + draw(16) - 8, rejected + draw(16) - 8, lengths, lengths.flip(0))


def columns(pairs):
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")
    return zip(*(getattr(pairs, name).tolist() for name in names), strict=True)


def logsig(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sig(x):
    return math.exp(logsig(x))


def score(log_t, config):
    """f'(t) of each divergence, 0 at t = 1, from f-DPO's table 1."""
    t, alpha = math.exp(log_t), config.f_alpha_divergence_coef
    return {
        "reverse_kl": math.log(t),
        "forward_kl": 1 - 1 / t,
        "js_divergence": math.log(2 * t / (1 + t)),
        "alpha_divergence": (t ** (alpha - 1) - 1) / (alpha - 1),
    }[config.f_divergence_type]


def formula(name, row, c):
    """One pair in Python floats, from the papers."""
    w, l, rw, rl, nw, nl = row  # noqa: E741
    a, b = w - rw, l - rl
    fa, fb = score(a, c), score(b, c)
    x, eps, beta = c.beta * (fa - fb), c.label_smoothing, c.beta
    mean = fa / nw - fb / nl
    return {
        "sigmoid": lambda: -logsig(x),
        "cdpo": lambda: -(1 - eps) * logsig(x) - eps * logsig(-x),
        "robust": lambda: (-(1 - eps) * logsig(x) + eps * logsig(-x)) / (1 - 2 * eps),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: (mean - 1 / (2 * beta)) ** 2,
        "ipo_sum": lambda: (fa - fb - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: -logsig(beta * mean),
        "exo_pair": lambda: sig(x) * math.log(sig(x) / (1 - eps)) + sig(-x) * math.log(sig(-x) / eps),
        "nca_pair": lambda: -logsig(beta * a) - 0.5 * (logsig(-beta * a) + logsig(-beta * b)),
        "bco_pair": lambda: -logsig(beta * a) - logsig(-beta * b),
        "sppo_hard": lambda: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - sig(beta * a) + sig(beta * b),
        "apo_down": lambda: sig(beta * a) + 1 - sig(beta * (a - b)),
        "discopop": lambda: (1 - sig(x / c.discopop_tau)) * -logsig(x) + sig(x / c.discopop_tau) * math.exp(-x),
        "dpop": lambda: -logsig(beta * (fa - fb - c.dpop_lambda * max(0.0, rw - w))),
        "sft": lambda: -w / nw,
    }[name]()


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("config", CONFIGS, ids=["beta 0.1", "beta 0.5"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_is_the_papers_formula(name, config, divergence, pairs):
    config = LossConfig(**vars(config) | {"loss_type": name, "f_divergence_type": divergence})
    want = torch.tensor([formula(name, row, config) for row in columns(pairs)], dtype=torch.float64)
    torch.testing.assert_close(preference_loss(pairs, config).double(), want, rtol=3e-5, atol=3e-5)


def trl_loss(pairs, config):
    """TRL 1.16's own loss on one pair, its model replaced by one that returns the log-probs in one token each."""
    from trl import DPOConfig, DPOTrainer

    chosen_len, rejected_len = int(pairs.chosen_len), int(pairs.rejected_len)
    width = 1 + max(chosen_len, rejected_len)
    mask = torch.zeros(2, width, dtype=torch.int64)
    mask[0, 1 : 1 + chosen_len] = mask[1, 1 : 1 + rejected_len] = 1
    logps = torch.zeros(2, width - 1)
    logps[:, 0] = torch.cat([pairs.chosen, pairs.rejected])
    zeros = torch.zeros(2, width - 1)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    outputs.log_sum_sq_probs = zeros
    trainer = mock.MagicMock(spec_set=[*dir(DPOTrainer), *TRAINER_ATTRIBUTES])
    trainer.model.training = True
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = lambda x: x
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.ld_alpha, trainer.precompute_ref_logps = None, True
    trainer.f_divergence_type, trainer.f_alpha_divergence_coef = (
        config.f_divergence_type,
        config.f_alpha_divergence_coef,
    )
    trainer.loss_types, trainer.loss_weights = [config.loss_type], [1.0]
    trainer.beta, trainer.label_smoothing = config.beta, config.label_smoothing
    trainer.args = mock.MagicMock(spec=DPOConfig, discopop_tau=config.discopop_tau)
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    inputs = {
        "input_ids": torch.ones(2, width, dtype=torch.int64),
        "attention_mask": torch.ones(2, width, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": pairs.ref_chosen,
        "ref_rejected_logps": pairs.ref_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)


TRAINER_ATTRIBUTES = (
    *("model", "accelerator", "aux_loss_enabled", "use_weighting", "ld_alpha", "precompute_ref_logps", "args"),
    *("f_divergence_type", "f_alpha_divergence_coef", "loss_types", "loss_weights", "beta", "label_smoothing"),
    *("_total_train_tokens", "_tp_size", "_metrics", "state", "ref_model"),
)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cdpo", "ipo_sum", "dpop"}))
@pytest.mark.parametrize("config", CONFIGS, ids=["beta 0.1", "beta 0.5"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_is_trls(name, config, divergence, pairs):
    config = LossConfig(**vars(config) | {"loss_type": name, "f_divergence_type": divergence})
    for i in range(PAIRS):
        pair = PairLogps(*(getattr(pairs, field)[i : i + 1] for field in PairLogps.__dataclass_fields__))
        torch.testing.assert_close(preference_loss(pair, config)[0], trl_loss(pair, config), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "nca_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_loss_is_ligers(name, pairs):
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    want = LigerFusedLinearDPOFunction.preference_loss_fn(
        pairs.chosen,
        pairs.rejected,
        torch.ones(2 * PAIRS, 3, dtype=torch.int64),
        ref_chosen_logps=pairs.ref_chosen,
        ref_rejected_logps=pairs.ref_rejected,
        beta=0.3,
        loss_type=name,
    )[0]
    got = preference_loss(pairs, LossConfig(loss_type=name, beta=0.3)).sum() / PAIRS
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_losses_add_up_by_their_weights(pairs):
    config = LossConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5])
    want = sum(
        weight * preference_loss(pairs, LossConfig(loss_type=name))
        for name, weight in zip(config.loss_type, config.loss_weights, strict=True)
    )
    torch.testing.assert_close(preference_loss(pairs, config), want)


def test_loss_at_the_reference_is_known(pairs):
    at_reference = pairs.at_reference()
    assert torch.equal(at_reference.margin, torch.zeros(PAIRS))
    assert loss_at_reference(LossConfig()) == pytest.approx(math.log(2), abs=1e-7)
    for name in set(LOSSES) - {"sft"}:
        config = LossConfig(loss_type=name, label_smoothing=0.1)
        got = preference_loss(at_reference, config)
        torch.testing.assert_close(got, torch.full((PAIRS,), loss_at_reference(config)))
    assert loss_at_reference(LossConfig(loss_type=["sigmoid", "sft"])) is None


def test_gradient_of_sigmoid_is_the_papers_weight(pairs):
    """DPO section 4: d loss / d log pi(w) = -beta sigmoid(-beta Δ)."""
    chosen = pairs.chosen.clone().requires_grad_()
    moved = PairLogps(
        chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_len, pairs.rejected_len
    )
    preference_loss(moved, LossConfig(beta=0.1)).sum().backward()
    torch.testing.assert_close(chosen.grad, -0.1 * torch.sigmoid(-0.1 * pairs.margin))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence", "alpha_divergence"])
def test_gradients_stay_finite_far_from_the_reference(name, divergence):
    far = torch.tensor([-500.0, 300.0, -1e4], requires_grad=True)
    zero = torch.zeros(3)
    pairs = PairLogps(far, zero, zero, zero, zero.long() + 1, zero.long() + 1)
    config = LossConfig(loss_type=name, label_smoothing=0.1, f_divergence_type=divergence)
    if name == "discopop":
        return  # e^-x is its own nature: it overflows beyond 88 / beta nats
    preference_loss(pairs, config).sum().backward()
    assert far.grad.isfinite().all()
