"""`AdamW8bitFused` as a PyTorch optimizer: groups, schedules, odd tensors, states that resume with the same bits."""

import copy

import pytest
import torch
from torch import nn

from dpo_fast.kernels import adamw
from dpo_fast.training import fused_adamw
from dpo_fast.training.fused_adamw import AdamW8bitFused

LR = 1e-3


def random_parameters(*shapes, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(dtype)) for shape in shapes]


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(p.dtype)


def run(parameters, optimizer, steps):
    for seed in steps:
        set_gradients(parameters, seed)
        optimizer.step()


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_groups_and_a_schedule_act_as_in_torchs_adamw_in_fp64():
    """Moments have 8 bits: 2.5% of the distance moved, the bound that the kernel's tests explain."""
    ours, theirs = random_parameters((37, 53), (1031,)), []
    made = []
    for parameters, kind in ((ours, AdamW8bitFused), (theirs, torch.optim.AdamW)):
        parameters[:] = parameters or [nn.Parameter(p.detach().double()) for p in ours]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "lr": LR / 4}]
        optimizer = kind(groups, lr=LR, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.0)
        made.append((optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=8)))
    before = [p.detach().clone() for p in theirs]
    for seed in range(10):
        set_gradients(ours, seed)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.double()
        for optimizer, schedule in made:
            optimizer.step()
            schedule.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        assert (made[0][0].exact_weight(p).double() - q).norm() < 0.025 * (q - start).norm()
        assert ((made[0][0].exact_weight(p) - p).abs() <= 2**-8 * p.abs()).all()  # half of bf16's spacing


def test_defaults_are_those_of_torchs_adamw():
    (parameter,) = random_parameters(3)
    defaults = torch.optim.AdamW([parameter]).defaults
    assert AdamW8bitFused([parameter]).defaults == {
        name: defaults[name] for name in ("lr", "betas", "eps", "weight_decay")
    }


def test_odd_tensors_step_as_whole_blocks_do():
    """Scalars, tails of blocks, transposed and strided tensors, both dtypes, against one contiguous vector each."""
    shapes = [(), (1,), (257,), (3, 100), (0,), (5, 0)]
    parameters = random_parameters(*shapes) + random_parameters(*shapes, dtype=torch.float32)
    base = torch.randn(60, 70).bfloat16()
    parameters += [nn.Parameter(base.clone().t()), nn.Parameter(torch.randn(40, 50)[:, ::3])]
    vectors = [nn.Parameter(p.detach().reshape(-1).clone()) for p in parameters]
    assert sum(not p.is_contiguous() for p in parameters) == 2
    odd, plain = AdamW8bitFused(parameters, lr=LR), AdamW8bitFused(vectors, lr=LR)
    for seed in range(3):
        set_gradients(parameters, seed)
        for p, vector in zip(parameters, vectors, strict=True):
            vector.grad = p.grad.reshape(-1)
        odd.step()
        plain.step()
    assert same([p.reshape(-1) for p in parameters], vectors)
    assert not torch.equal(parameters[-2], base.t())


def test_parameters_without_a_gradient_stay_and_join_in_later():
    """Frozen ones, and one whose first gradient comes with the second step: its bias correction starts there."""
    a, b, frozen = random_parameters((300,), (300,), (300,))
    frozen.requires_grad_(False)
    before = [x.detach().clone() for x in (b, frozen)]
    optimizer = AdamW8bitFused([a, b, frozen], lr=LR)
    run([a], optimizer, [0])
    assert same(before, (b, frozen))
    assert not optimizer.state[b]
    run([a, b], optimizer, [1])
    (alone,) = (nn.Parameter(before[0].clone()),)
    alone.grad = b.grad
    AdamW8bitFused([alone], lr=LR).step()
    assert torch.equal(alone, b)
    assert [optimizer.state[p].get("step") for p in (a, b, frozen)] == [2, 1, None]


def test_tied_weights_are_stepped_once():
    embedding, head = nn.Embedding(64, 16, dtype=torch.bfloat16), nn.Linear(16, 64, bias=False, dtype=torch.bfloat16)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    optimizer = AdamW8bitFused(model.parameters(), lr=LR)
    head(embedding(torch.arange(64))).float().square().sum().backward()
    alone = nn.Parameter(head.weight.detach().clone())
    alone.grad = head.weight.grad.clone()
    optimizer.step()
    AdamW8bitFused([alone], lr=LR).step()
    assert torch.equal(alone, embedding.weight)


def test_a_step_at_dpos_learning_rate_is_kept_where_bf16_stands_still():
    (parameter,) = random_parameters((4096,))
    start = parameter.detach().clone()
    optimizer = AdamW8bitFused([parameter], lr=5e-7, weight_decay=0.0)
    run([parameter], optimizer, range(3))
    moved = (optimizer.exact_weight(parameter) - start.float()).abs()
    large = start.abs() > 2.0**-8  # half of bf16's spacing is 7.6e-6 there or more
    assert torch.equal(parameter[large], start[large])
    assert 0.2e-6 < moved[large].mean() < 1.5e-6


def test_the_factor_multiplies_one_steps_gradients():
    ours, scaled = ([*random_parameters((5000,)), *random_parameters((70,), dtype=torch.float32)] for _ in range(2))
    made = [AdamW8bitFused(parameters, lr=LR, eps=1e-3) for parameters in (ours, scaled)]
    for seed in range(2):
        set_gradients(ours, seed)
        for p, q in zip(ours, scaled, strict=True):
            q.grad = p.grad * (0.25 if seed == 0 else 1)  # exact in bf16
        made[0].grad_factor = torch.tensor(0.25) if seed == 0 else None
        for optimizer in made:
            optimizer.step()
        assert made[0].grad_factor is None
    assert same(ours, scaled)


def test_a_step_is_one_launch_for_tensors_that_share_their_settings(monkeypatch):
    """What differs in dtype, step or weight decay cannot share one."""
    counts = []
    monkeypatch.setattr(fused_adamw, "adamw_step_", lambda slots, *rest: counts.append(len(slots)))
    weights, biases = random_parameters(*[(16, 17)] * 5), random_parameters(*[(17,)] * 4)
    norms = random_parameters((8,), (8,), dtype=torch.float32)

    def step(weight_decay, missing=None):
        counts.clear()
        groups = [{"params": weights, "weight_decay": weight_decay}, {"params": biases + norms, "weight_decay": 0.0}]
        optimizer = AdamW8bitFused(groups)
        if missing is not None:
            optimizer.step()
            missing.grad = torch.ones_like(missing)
            counts.clear()
        optimizer.step()
        return sorted(counts)

    set_gradients(weights + biases + norms, 0)
    assert step(0.0) == [2, 9]
    assert step(0.1) == [2, 4, 5]
    weights[0].grad = None
    assert step(0.0, missing=weights[0]) == [1, 2, 8]


def test_bytes_held_per_parameter():
    """2 for a bf16 weight, 1 for its remainder, 2 for the moments, 2 per block of 256 for the exponents."""
    parameters = random_parameters((256, 1024))
    optimizer = AdamW8bitFused(parameters, lr=LR)
    run(parameters, optimizer, [0])
    held = [*parameters, *(x for x in optimizer.state[parameters[0]].values() if isinstance(x, torch.Tensor))]
    assert sum(x.nbytes for x in held) / parameters[0].numel() == 5 + 2 / 256
    assert parameters[0].grad.nbytes / parameters[0].numel() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_dict_resumes_with_the_same_bits(dtype):
    shapes = [(70, 80), (), (257,), (0,)]
    whole = random_parameters(*shapes, dtype=dtype)
    optimizer = AdamW8bitFused([{"params": whole[:2]}, {"params": whole[2:], "lr": 1e-4}], lr=LR)
    run(whole, optimizer, range(3))
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    again = AdamW8bitFused([{"params": resumed[:2]}, {"params": resumed[2:]}], lr=99.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameters, made in ((whole, optimizer), (resumed, again)):
        run(parameters, made, range(3, 6))
    assert same(whole, resumed)
    assert same(map(optimizer.exact_weight, whole), map(again.exact_weight, resumed))
    assert [group["lr"] for group in again.param_groups] == [LR, 1e-4]


def test_a_copy_of_the_optimizer_has_all_it_needs():
    parameters = random_parameters((300,))
    optimizer = AdamW8bitFused(parameters, lr=LR)
    run(parameters, optimizer, [0])
    other = copy.deepcopy(optimizer)
    (copied,) = other.param_groups[0]["params"]
    run(parameters, optimizer, [1])
    run([copied], other, [1])
    assert torch.equal(parameters[0], copied)


def test_a_closure_is_called_with_gradients_enabled():
    (parameter,) = random_parameters((5,), dtype=torch.float32)
    optimizer = AdamW8bitFused([parameter], lr=LR, weight_decay=0.0)
    before = parameter.detach().clone()

    def closure():
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == before.sum().item()
    assert torch.allclose(parameter, before - LR, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: expected 0 or above, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected 0 or above, got nan"),
        ({"eps": 0.0}, "eps: expected a number above 0, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdamW8bitFused(random_parameters((3,)), **settings)


def test_a_parameter_of_another_dtype_is_refused_by_the_step():
    (parameter,) = random_parameters((3,), dtype=torch.float16)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"expected bfloat16 or float32, got torch\.float16"):
        AdamW8bitFused([parameter]).step()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 4), torch.bfloat16, r"expected the shape \(3, 4\), got \(4, 3\)"),
        ((4, 3), torch.float32, "expected step, moments, exponents for a torch.float32 parameter, got .*remainder"),
    ],
)
def test_the_state_of_another_parameter_is_refused(shape, dtype, message):
    saved, other = random_parameters((4, 3)), random_parameters(shape, dtype=dtype)
    optimizer = AdamW8bitFused(saved)
    run(saved, optimizer, [0])
    with pytest.raises(ValueError, match=message):
        AdamW8bitFused(other).load_state_dict(optimizer.state_dict())


def test_empty_moments_are_encoded_and_decoded():
    codes, exponents = adamw.encode_moments(torch.zeros(0, 3), torch.zeros(0, 3))
    assert [x.shape for x in (codes, exponents, *adamw.decode_moments(codes, exponents))] == [
        (0, 3),
        (0, 2),
        (0, 3),
        (0, 3),
    ]
