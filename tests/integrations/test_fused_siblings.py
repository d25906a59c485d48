"""CPO, SimPO, ORPO and KTO modules against Liger's; and what training loops do around all of them."""

import liger_kernel.chunked_loss as liger
import pytest
import torch
import torch.multiprocessing as mp
from liger_batches import make, run
from two_ranks import Tiny, batch_of, gradients

import dpo_fast
from dpo_fast import FusedLinearDPOLoss, FusedLinearKTOLoss, FusedLinearORPOLoss

pytestmark = pytest.mark.slow

SETTINGS = [
    ("CPO", {}),
    ("CPO", {"beta": 0.5, "label_smoothing": 0.2, "compute_nll_loss": False, "average_log_prob": True}),
    ("CPO", {"alpha": 0.3, "average_log_prob": True}),
    ("SimPO", {}),
    ("SimPO", {"beta": 2.0, "gamma": 1.4, "label_smoothing": 0.1, "compute_nll_loss": False}),
    ("ORPO", {}),
    ("ORPO", {"beta": 0.7, "compute_nll_loss": False}),
]


def without_reference(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith("ref")}


def assert_alike(got, want):
    """(loss, aux, gradients) of two modules."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert len(got[1]) == len(want[1])
    for ours, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not ours.requires_grad
    for grad, true in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-5, atol=1e-5 * max(1, true.abs().max().item()))


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_values_and_gradients_are_ligers(name, settings, bias):
    tensors = without_reference(make(bias=bias))
    theirs = getattr(liger, f"LigerFusedLinear{name}Loss")(**settings, compiled=False)
    ours = getattr(dpo_fast, f"FusedLinear{name}Loss")(**settings)
    assert_alike(run(ours, tensors), run(theirs, tensors))


def test_orpo_with_other_targets_of_the_cross_entropy_is_ligers():
    tensors = without_reference(make())
    tensors["nll_target"] = torch.randint(0, 67, tensors["target"].shape, generator=torch.Generator().manual_seed(3))
    tensors["nll_target"][:, 7:] = -100
    assert_alike(run(FusedLinearORPOLoss(), tensors), run(liger.LigerFusedLinearORPOLoss(compiled=False), tensors))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("reference", [False, True], ids=["", "reference"])
@pytest.mark.parametrize("kl", [False, True], ids=["", "kl"])
@pytest.mark.parametrize("average", [False, True], ids=["", "average"])
def test_kto_is_ligers(bias, reference, kl, average):
    tensors = make(bias=bias)
    if not reference:
        tensors = without_reference(tensors)
    tensors["preference_labels"] = torch.tensor([True, False, False, True, True, False])
    tensors["kl"] = torch.linspace(0, 2, 6) if kl else None
    settings = {"beta": 0.05, "use_ref_model": reference, "average_log_prob": average}
    got = run(FusedLinearKTOLoss(**settings), tensors)
    # Liger cuts the batch into chunks but not `kl`, so that its result is right for a single chunk alone.
    assert_alike(got, run(liger.LigerFusedLinearKTOLoss(**settings, compiled=False, chunk_size=6), tensors))


def test_kto_names_mistakes():
    tensors = without_reference(make())
    with pytest.raises(ValueError, match=r"preference_labels: expected \(6,\) bool"):
        FusedLinearKTOLoss()(**tensors)
    with pytest.raises(ValueError, match="a reference is expected"):
        FusedLinearKTOLoss(use_ref_model=True)(**tensors, preference_labels=torch.ones(6, dtype=torch.bool))


def test_accumulated_gradients_are_those_of_one_batch():
    tensors = make(pairs=4)
    module = FusedLinearDPOLoss()
    _, _, want = run(module, tensors)
    for half in range(2):
        rows = torch.tensor([2 * half, 2 * half + 1, 4 + 2 * half, 5 + 2 * half])
        part = {k: x[rows] if k in ("_input", "target", "ref_input") else x for k, x in tensors.items()}
        (module(**part)[0] / 2).backward()
    for name, true in zip(("lin_weight", "_input", "bias"), want, strict=True):
        torch.testing.assert_close(tensors[name].grad, true, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler's own look at it
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_loop_has_the_same_gradients(backend):
    """The head stays out of the compiler's hands, what is around it does not."""
    tensors = make()
    module = FusedLinearDPOLoss()

    def step(**tensors):
        loss, aux = module(**tensors)
        return 2 * loss, aux

    want = run(step, tensors)
    torch._dynamo.reset()
    assert_alike(run(torch.compile(step, backend=backend), tensors), want)


def test_autocast_takes_its_dtype_and_returns_fp32():
    tensors = make(vocab=501, dim=64)
    lower = {k: x.bfloat16() if x is not None and x.is_floating_point() else x for k, x in tensors.items()}
    want, _ = FusedLinearDPOLoss()(**lower)
    with torch.autocast("cpu", torch.bfloat16):
        loss, aux = FusedLinearDPOLoss()(**tensors)
        loss.backward()
    assert loss.dtype == aux[0].dtype == torch.float32
    assert torch.equal(loss, want)
    grads = [tensors[name].grad for name in ("lin_weight", "_input", "bias")]
    assert all(grad.dtype == torch.float32 for grad in grads)
    exact = run(FusedLinearDPOLoss(), make(vocab=501, dim=64))[2]
    for grad, true in zip(grads, exact, strict=True):
        assert (grad - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2, head apart"])
def test_two_ranks_average_their_gradients(wrapper, tmp_path):
    """Against one process and the mean of both ranks' losses."""
    mp.spawn(gradients, (2, wrapper, tmp_path), nprocs=2)
    model = Tiny()
    (sum(model(batch_of(rank)) for rank in range(2)) / 2).backward()
    found = torch.load(tmp_path / "grads.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-6)
