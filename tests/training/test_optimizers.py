"""Optimizers by name: an invented one, transformers' names, and the steps of the built-in ones in fp64 by hand."""

import pytest
import torch
from rich.console import Console

from dpo_fast.cli import main
from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.training.optimizers import OPTIMIZERS, make_optimizer, optimizer
from dpo_fast.training.run import train


@pytest.fixture
def invented():
    made = []

    @optimizer("invented")
    def make(groups, **settings):
        made.append((groups, settings))
        return torch.optim.SGD(groups, lr=settings["lr"])

    yield made
    del OPTIMIZERS["invented"]


def test_a_new_optimizer_is_known_by_its_definition_alone(invented, base, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "chosen": " b", "rejected": " c d"}\n' * 3)
    settings = {"model": base, "data": str(data), "output_dir": str(tmp_path / "run"), "device": "cpu"}
    settings |= {"reference_store": str(tmp_path / "store.sqlite"), "optim": "invented", "max_steps": 1}
    assert train(DPOConfig(**settings), console=Console(quiet=True)).step == 1
    ((groups, rates),) = invented
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]
    assert rates == {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8}
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "invented" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--optim adam: unknown; choose one of .*invented"):
        train(DPOConfig(**settings | {"optim": "adam", "overwrite": True}))


def test_transformers_names_are_known():
    from transformers.training_args import OptimizerNames

    assert {"adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit"} <= set(OPTIMIZERS)
    assert {name.value for name in OptimizerNames} >= {"adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit"}
    assert OPTIMIZERS["adamw_bnb_8bit"] is OPTIMIZERS["adamw_8bit"]


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit"])
def test_the_first_step_is_adamws_and_decays_matrices_only(name):
    """Loshchilov and Hutter 2019, algorithm 2: after one step m / sqrt(v) is the sign of the gradient."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64)
    before = {key: p.detach().double() for key, p in model.named_parameters()}
    config = DPOConfig(optim=name, learning_rate=0.01, weight_decay=0.1)
    made = make_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    made.step()
    for key, p in model.named_parameters():
        decay = 1 - 0.01 * 0.1 if p.ndim == 2 else 1.0
        size = p.grad.double().abs()
        want = before[key] * decay - 0.01 * p.grad.double().sign() * size / (size + 1e-8)
        assert (p.double() - want).abs().max() < 2e-6
