"""The drop-in module against Liger's own, and its packed form against itself."""

import pytest
import torch
from liger_batches import make, run
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

from dpo_fast import FusedLinearDPOLoss

LIGER_LOSSES = sorted(LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES)
NAMES = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits",
    "rejected_logits",
    "nll",
    "chosen_rewards",
    "rejected_rewards",
)


@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_ref_model": False}, {"average_log_prob": True}, {"compute_nll_loss": True, "alpha": 0.7}],
    ids=str,
)
def test_values_and_gradients_are_ligers(loss_type, bias, options):
    settings = {"loss_type": loss_type, "beta": 0.05, "label_smoothing": 0.1, **options}
    tensors = make(bias=bias)
    want, true_aux, true_grads = run(LigerFusedLinearDPOLoss(**settings, compiled=False), tensors)
    got, aux, grads = run(FusedLinearDPOLoss(**settings), tensors)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name, ours, theirs in zip(NAMES, aux, true_aux, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert not ours.requires_grad
    for grad, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-5, atol=1e-5 * max(1, true.abs().max().item()))


def test_a_gradient_from_above_scales():
    tensors = make()
    module = FusedLinearDPOLoss()
    for grad, thrice in zip(run(module, tensors)[2], run(module, tensors, scale=3.0)[2], strict=True):
        torch.testing.assert_close(3 * grad, thrice)


def test_cached_reference_sums_give_the_same():
    tensors = make()
    module = FusedLinearDPOLoss()
    want, aux, grads = run(module, tensors)
    ref_logps = torch.cat([aux[0] - aux[5] / 0.1, aux[1] - aux[6] / 0.1])
    policy = {name: x for name, x in tensors.items() if not name.startswith("ref")}
    loss, _ = module(**policy, ref_logps=ref_logps)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-5, atol=1e-6)
    inputs = [x for x in policy.values() if x is not None and x.requires_grad]
    for grad, other in zip(torch.autograd.grad(loss, inputs), grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_packed_is_padded(average):
    tensors = make()
    module = FusedLinearDPOLoss(average_log_prob=average, compute_nll_loss=True)
    padded, aux, grads = run(module, tensors)
    keep = tensors["target"] != -100
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    ref_logps = torch.cat([aux[0] - aux[5] / 0.1, aux[1] - aux[6] / 0.1])
    loss, packed_aux = module.packed(
        tensors["lin_weight"],
        tensors["_input"][keep],
        tensors["target"][keep],
        bounds,
        tensors["bias"],
        ref_logps=ref_logps,
    )
    torch.testing.assert_close(loss.detach(), padded, rtol=1e-5, atol=1e-6)
    for ours, other in zip(packed_aux, [aux[i] for i in (0, 1, 4, 5, 6)], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    inputs = [tensors[name] for name in ("lin_weight", "_input", "bias")]
    for grad, other in zip(torch.autograd.grad(loss, inputs), grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def test_bf16_inputs_are_nearer_to_fp64_than_ligers():
    tensors = make(dtype=torch.bfloat16, bias=False, vocab=501, dim=64)
    doubles = {
        k: None if x is None else x.detach().double() if x.is_floating_point() else x for k, x in tensors.items()
    }
    want = FusedLinearDPOLoss()(**doubles)[0]
    ours, theirs = (
        run(module, tensors)[0] for module in (FusedLinearDPOLoss(), LigerFusedLinearDPOLoss(compiled=False))
    )
    assert ours.dtype == torch.float32
    assert abs(ours - want) < 1e-5 * abs(want)
    assert abs(ours - want) <= abs(theirs - want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(5, 11, dtype=torch.int64)}, "even B, chosen first"),
        ({"ref_input": None}, "a reference is expected"),
        ({"ref_logps": torch.zeros(2)}, r"ref_logps: expected \(6,\), got \(2,\)"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss()(**make() | change)


def test_settings_that_no_loss_has_are_refused():
    with pytest.raises(ValueError, match="unknown; choose one of"):
        FusedLinearDPOLoss(loss_type="dpo")
    with pytest.raises(ValueError, match="exo_pair needs a value"):
        FusedLinearDPOLoss(loss_type="exo_pair")
