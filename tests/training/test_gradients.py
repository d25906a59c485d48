"""Clipping by the optimizer's factor against PyTorch's clipping, and gradients released during the backward."""

import json
import math

import pytest
import torch
from oracle import SENTENCES
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.training.fused_adamw import AdamW8bitFused
from dpo_fast.training.gradients import Clipping, GradientRelease
from dpo_fast.training.run import train

QUIET = Console(quiet=True)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 8)).to(dtype)


def backward(model, seed=0, scale=1.0):
    torch.manual_seed(seed)
    dtype = model[0].weight.dtype
    (scale * model(torch.randn(32, 64).to(dtype)).float().square().sum()).backward()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_the_factor_clips_as_pytorch_does(scale):
    """Above the limit, below it, and without a gradient that could be divided by."""
    ours, theirs = make_model(), make_model()
    for model in (ours, theirs):
        backward(model, scale=scale)
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    optimizer = AdamW8bitFused(ours.parameters(), eps=1e-2)
    before = [p.grad.clone() for p in ours.parameters()]
    assert torch.equal(Clipping(optimizer, ours.parameters(), 0.5).clip(), norm)
    assert optimizer.grad_factor.ndim == 0
    for p, q, grad in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)  # not scaled by a pass of its own
        assert torch.allclose(p.grad * optimizer.grad_factor, q.grad, rtol=1e-6, atol=0)
    optimizer.step()
    other = AdamW8bitFused(theirs.parameters(), eps=1e-2)
    other.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-9)


def test_without_a_limit_there_is_no_factor():
    model = make_model()
    backward(model)
    optimizer = AdamW8bitFused(model.parameters())
    norm = Clipping(optimizer, model.parameters(), 0.0).clip()
    assert optimizer.grad_factor is None
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert norm.item() == pytest.approx(exact, rel=1e-6)


def test_an_optimizer_without_a_factor_gets_scaled_gradients():
    model, scaled = make_model(), make_model()
    for of in (model, scaled):
        backward(of)
    want = nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
    assert Clipping(torch.optim.AdamW(model.parameters()), model.parameters(), 0.5).clip() == want
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), scaled.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_gradients_step_with_the_same_bits(dtype):
    plain, released = make_model(dtype), make_model(dtype)
    made = []
    for model in (plain, released):
        groups = [{"params": [p for p in model.parameters() if p.ndim == d], "weight_decay": 0.1 * d} for d in (1, 2)]
        optimizer = AdamW8bitFused(groups, lr=1e-2)
        made.append((optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)))
    clipping = Clipping(made[0][0], plain.parameters(), 0.0)
    release = GradientRelease(made[1][0], released.parameters())
    for seed in range(4):
        norms = []
        for model, gradients, (optimizer, schedule) in zip((plain, released), (clipping, release), made, strict=True):
            backward(model, seed)
            norms.append(gradients.clip())
            optimizer.step()
            schedule.step()
            model.zero_grad(set_to_none=True)
        assert torch.equal(*norms)
        if seed == 1:  # loading replaces the groups that hooks may hold
            made[1][0].load_state_dict(made[1][0].state_dict())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), released.parameters(), strict=True))
    released[0](torch.ones(1, 64, dtype=dtype)).sum().backward()
    plain[0](torch.ones(1, 64, dtype=dtype)).sum().backward()
    assert torch.equal(release.clip(), clipping.clip())  # the last step's norms of other weights are gone


def test_released_gradients_are_never_all_there():
    """Bytes of gradients at each moment at which one is complete: all of them, or the largest alone."""

    def peak(release):
        model = make_model(torch.bfloat16)
        parameters = list(model.parameters())
        held = []
        for p in parameters:
            p.register_post_accumulate_grad_hook(
                lambda _: held.append(sum(q.grad.nbytes for q in parameters if q.grad is not None))
            )
        optimizer = AdamW8bitFused(parameters)
        if release:
            GradientRelease(optimizer, parameters)
        backward(model)
        assert release == all(p.grad is None for p in parameters)
        return max(held), [p.nbytes for p in parameters]

    most, sizes = peak(release=False)
    assert most == sum(sizes)
    assert peak(release=True)[0] == max(sizes) == 96 * 96 * 2


def test_a_tied_weight_is_released_once_with_its_whole_gradient():
    def tied():
        torch.manual_seed(0)
        embedding, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        head.weight = embedding.weight
        return embedding, head

    weights = []
    for release in (False, True):
        embedding, head = tied()
        optimizer = AdamW8bitFused([head.weight], lr=1e-2)
        if release:
            GradientRelease(optimizer, [head.weight])
        for _ in range(2):
            head(embedding(torch.arange(16))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.state[head.weight]["step"] == 2
        weights.append(head.weight.detach())
    assert torch.equal(*weights)


@pytest.fixture
def config(make_config, tmp_path):
    """A run of one pack per step."""
    rows = tmp_path / "rows.jsonl"
    words = " ".join(SENTENCES).split()
    answers = [{"prompt": words[i], "chosen": f" {words[i + 1]}", "rejected": f" {words[i + 2]}"} for i in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in answers))
    settings = {"data": str(rows), "max_steps": 3, "max_tokens_per_batch": 1296, "optim": "adamw_8bit_fused"}
    return lambda **changes: make_config(**settings | {"max_grad_norm": 0.0} | changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_releases_gradients_ends_with_the_same_bits(config, tmp_path, dtype):
    plain, released = (
        train(config(output_dir=str(tmp_path / str(release)), gradient_release=release, dtype=dtype), console=QUIET)
        for release in (False, True)
    )
    left, right = (load_file(result.model_dir / "model.safetensors") for result in (plain, released))
    assert all(torch.equal(left[name], right[name]) for name in left)
    for a, b in zip(plain.metrics, released.metrics, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_torch"}, "--optim adamw_torch steps all weights at once; expected adamw_8bit_fused"),
        ({"max_grad_norm": 1.0}, "--max_grad_norm 1 needs the norm of the whole gradient; pass --max_grad_norm 0"),
        (
            {"max_tokens_per_batch": 12},
            "the gradients of step 1 are the sum over [2-4] packs; pass --max_tokens_per_batch ",
        ),
    ],
)
def test_release_is_refused_where_gradients_are_needed_together(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"--gradient_release true: {message}"):
        train(config(gradient_release=True, **changes), console=QUIET)
    assert not (tmp_path / "reference.sqlite").exists()
