"""The drop-in module against Liger's own, and its packed form against itself."""

import liger_kernel.chunked_loss as liger
import pytest
import torch
from liger_batches import make, run
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from loss_formulas import formula

import dpo_fast
from dpo_fast import FusedLinearDPOLoss
from dpo_fast.config import LossConfig
from dpo_fast.losses.facts import facts_of

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
    settings = {"loss_type": loss_type, "beta": 0.05, **options}
    if "label_smoothing" in facts_of(loss_type).options:
        settings["label_smoothing"] = 0.1
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


def rows_of(tensors):
    """What `formula` reads of each pair, from plain log-softmaxes in fp64."""

    def sums(hidden, weight, bias):
        logp = (hidden.detach().double() @ weight.detach().double().t() + bias.detach().double()).log_softmax(-1)
        picked = logp.gather(-1, tensors["target"].clamp(min=0)[..., None])[..., 0]
        return picked.where(tensors["target"] >= 0, 0.0).sum(1).chunk(2)

    lengths = (tensors["target"] >= 0).sum(1).chunk(2)
    policy = sums(tensors["_input"], tensors["lin_weight"], tensors["bias"])
    reference = sums(tensors["ref_input"], tensors["ref_weight"], tensors["ref_bias"])
    columns = [x.tolist() for x in (*policy, *reference, *lengths)]
    return [(*row, 0.0, 0.0, 1) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("average", [False, True], ids=["", "average"])
@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "simpo", "alphapo", "odds_ratio", "orpo", "sft"])
def test_a_loss_that_divides_by_lengths_divides_once(loss_type, average):
    """Whether log-probs are reported as sums or as means, against the papers' formulas in fp64."""
    tensors, config = make(), LossConfig(loss_type=loss_type, beta=0.3)
    rows = rows_of(tensors)
    want = sum(formula(loss_type, k, rows, config) for k in range(len(rows))) / len(rows)
    loss, aux = FusedLinearDPOLoss(loss_type=loss_type, beta=0.3, average_log_prob=average)(**tensors)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    reported = [row[0] / row[4] if average else row[0] for row in rows]
    assert aux[0].tolist() == pytest.approx(reported, rel=1e-5)


def test_a_mean_over_the_tokens_of_a_batch_has_no_mean_log_probs():
    with pytest.raises(ValueError, match="average_log_prob=True: sft_tokens averages over all tokens"):
        FusedLinearDPOLoss(loss_type="sft_tokens", average_log_prob=True)


@pytest.mark.parametrize("name", ["DPO", "CPO", "SimPO", "ORPO"])
def test_without_a_chosen_token_there_is_no_cross_entropy(name):
    """0 of 0 tokens is 0 nats: the loss and its gradients are those without the term."""
    tensors = make()
    tensors["target"][:3] = -100
    if name != "DPO":
        tensors = {key: x for key, x in tensors.items() if not key.startswith("ref")}
    module = getattr(dpo_fast, f"FusedLinear{name}Loss")
    got, want = (run(module(compute_nll_loss=wanted), tensors) for wanted in (True, False))
    assert got[0].isfinite()
    assert torch.equal(got[0], want[0])
    assert got[1][4] == 0
    for grad, true in zip(got[2], want[2], strict=True):
        assert torch.equal(grad, true)


@pytest.mark.parametrize("name", ["DPO", "CPO", "SimPO", "ORPO", "KTO"])
def test_attributes_are_ligers(name):
    theirs = vars(getattr(liger, f"LigerFusedLinear{name}Loss")())
    ours = getattr(dpo_fast, f"FusedLinear{name}Loss")()
    public = {key: value for key, value in theirs.items() if key != "training" and not key.startswith("_")}
    assert public.keys() >= {"ignore_index", "beta", "compiled", "chunk_size"}
    assert {key: getattr(ours, key) for key in public} == public


def test_an_attribute_that_is_set_changes_the_loss():
    tensors, module = make(), FusedLinearDPOLoss()
    module.beta, module.loss_type = 0.3, "ipo"
    assert torch.equal(module(**tensors)[0], FusedLinearDPOLoss(beta=0.3, loss_type="ipo")(**tensors)[0])
    with pytest.raises(ValueError, match="choose one of"):
        module.loss_type = "dpo"
    assert module.loss_type == "ipo"


def test_a_heads_softcap_and_temperature_are_applied():
    """Gemma 2's head; against logits."""
    tensors = make(bias=False)
    module = FusedLinearDPOLoss(use_ref_model=False, softcap=2.0, temperature=1.5)
    logits = 2.0 * torch.tanh(tensors["_input"] @ tensors["lin_weight"].t() / 2.0) / 1.5
    logp = logits.log_softmax(-1).gather(-1, tensors["target"].clamp(min=0)[..., None])[..., 0]
    want = logp.where(tensors["target"] >= 0, 0.0).sum(1)
    torch.testing.assert_close(torch.cat(module(**tensors)[1][:2]), want, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(
        ValueError,
        match=r"^label_smoothing 0.1: not read by loss_type sigmoid; DPO with label smoothing is loss_type cdpo",
    ):
        FusedLinearDPOLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"^label_smoothing 2: expected a number in"):
        FusedLinearDPOLoss(loss_type="cdpo", label_smoothing=2)
