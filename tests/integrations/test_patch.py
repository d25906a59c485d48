"""Each patched function against the one it stands for, and the originals afterwards."""

import importlib

import pytest
import torch
from transformers.loss import loss_utils
from trl.experimental.cpo import cpo_trainer
from trl.experimental.orpo import orpo_trainer
from trl.trainer import utils

from dpo_fast.integrations import patch
from dpo_fast.integrations.patch import causal_lm_loss, patched


def logits_and_targets(dtype=torch.float32, shape=(3, 7), vocab=41):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(*shape, vocab, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(0, vocab, shape, generator=generator)


def value_and_gradient(function, logits, *args, **kwargs):
    value = function(logits, *args, **kwargs)
    weights = torch.linspace(0.1, 1, value.numel()).view(value.shape)
    (gradient,) = torch.autograd.grad((value.float() * weights).sum(), logits)
    return value, gradient


def assert_alike(ours, theirs, *, tolerance=1e-5):
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_items_in_batch": 13},
        {"num_items_in_batch": torch.tensor(13)},
        {"ignore_index": 5},
        {"shift_labels": True},
    ],
    ids=str,
)
def test_causal_lm_loss_is_transformers(settings):
    logits, labels = logits_and_targets()
    labels[:, :3] = labels[0, 5] = settings.get("ignore_index", -100)
    if "shift_labels" in settings:
        settings, labels = {"shift_labels": labels.roll(1)}, None
    theirs = value_and_gradient(loss_utils.ForCausalLMLoss, logits, labels, 41, **settings)
    assert_alike(value_and_gradient(causal_lm_loss, logits, labels, 41, **settings), theirs)


def test_causal_lm_loss_of_bf16_logits_is_fp32():
    logits, labels = logits_and_targets(torch.bfloat16)
    theirs = value_and_gradient(loss_utils.ForCausalLMLoss, logits, labels, 41)
    assert_alike(value_and_gradient(causal_lm_loss, logits, labels, 41), theirs, tolerance=1e-3)


def test_causal_lm_loss_of_no_labels_is_nan_as_in_transformers():
    logits, labels = logits_and_targets()
    labels.fill_(-100)
    assert causal_lm_loss(logits, labels, 41).isnan()
    assert loss_utils.ForCausalLMLoss(logits, labels, 41).isnan()


def test_a_compiled_model_keeps_the_original():
    logits, labels = logits_and_targets()

    def step(logits):
        return causal_lm_loss(logits, labels, 41)

    want = loss_utils.ForCausalLMLoss(logits, labels, 41)
    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(logits), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_selective_log_softmax_is_trls(dtype, temperature, masked):
    logits, index = logits_and_targets(dtype)
    mask = (index % 3 > 0) if masked else None
    theirs = value_and_gradient(utils.selective_log_softmax, logits, index, temperature, mask)
    with patched():
        ours = value_and_gradient(utils.selective_log_softmax, logits, index, temperature, mask)
    assert_alike(ours, theirs, tolerance=0.04 if dtype is torch.bfloat16 else 1e-5)
    if masked:
        assert (ours[0] == 0).sum() == (~mask).sum()


def test_what_is_not_covered_goes_to_trl(monkeypatch):
    logits, index = logits_and_targets()
    several = index[..., None].expand(-1, -1, 2)
    want = utils.selective_log_softmax(logits, several)
    monkeypatch.setattr(patch, "logprob", None)
    with patched():
        assert torch.equal(utils.selective_log_softmax(logits, several), want)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, None, 0.5), (1.0, 3.0, 1.0), (1.0, 3.0, 0.5)]
)
def test_the_head_is_trls(bias, temperature, softcap, scale):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (11, 41))
    offset = torch.randn(41, generator=generator, requires_grad=True) if bias else None
    targets = torch.randint(0, 41, (11,), generator=generator)
    arguments = (hidden, weight, offset, targets, temperature, 32768, softcap, scale)
    leaves = [x for x in (hidden, weight, offset) if x is not None]

    def run():
        outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        results = utils._ChunkedLogProbFunction.apply(*arguments, outputs)
        return [*results, *torch.autograd.grad((results[0] * torch.linspace(0, 1, 11)).sum(), leaves)]

    theirs = run()
    with patched():
        assert_alike(run(), theirs)
        asked = utils._ChunkedLogProbFunction.apply(*arguments, ("log_probs", "is_top1"))
    assert [x is None for x in asked] == [False, True, True, True, False]


def test_the_heads_entropy_has_no_silent_gradient():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8)
    with patched():
        _, entropy, *_ = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.tensor([1, 2, 3]), 1.0, 32768, None, 1.0, ("log_probs", "entropy")
        )
    with pytest.raises(NotImplementedError, match="has no gradient; leave `patched"):
        entropy.sum().backward()


def test_the_originals_come_back():
    before = (cpo_trainer.selective_log_softmax, utils._ChunkedLogProbFunction, dict(loss_utils.LOSS_MAPPING))
    with patched():
        assert cpo_trainer.selective_log_softmax is not before[0]
        assert loss_utils.LOSS_MAPPING["ForCausalLM"] is causal_lm_loss
        with patched():
            pass
        assert loss_utils.LOSS_MAPPING["ForCausalLM"] is causal_lm_loss
        importlib.reload(orpo_trainer)  # takes what it finds
        assert orpo_trainer.selective_log_softmax is cpo_trainer.selective_log_softmax
    after = (cpo_trainer.selective_log_softmax, utils._ChunkedLogProbFunction, dict(loss_utils.LOSS_MAPPING))
    assert after == before
    assert orpo_trainer.selective_log_softmax is before[0]


def test_another_version_of_trl_is_refused_and_nothing_stays_patched(monkeypatch):
    monkeypatch.setattr(patch, "is_trl_of_our_version", lambda: False)
    with pytest.raises(ImportError, match=r"written for TRL 1\.16"), patched():
        pass
    assert loss_utils.LOSS_MAPPING["ForCausalLM"] is loss_utils.ForCausalLMLoss
