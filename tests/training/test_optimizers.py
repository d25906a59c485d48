"""Optimizers by name: an invented one, transformers' names, and the steps of the built-in ones in fp64 by hand."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dpo_fast.cli import main
from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.training import optimizers
from dpo_fast.training.optimizers import OPTIMIZERS, check_optimizer, make_optimizer, optimizer, optimizer_name
from dpo_fast.training.run import train
from dpo_fast.training.settings import check_config


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
    with pytest.raises(UserError, match=r"--optim adam: unknown; choose one of auto, .*invented"):
        train(DPOConfig(**settings | {"optim": "adam", "overwrite": True}))


def test_transformers_names_are_known():
    from transformers.training_args import OptimizerNames

    theirs = {"adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"}
    assert {name.value for name in OptimizerNames} >= theirs
    assert {*theirs, "adamw_8bit", "adamw_8bit_fused", "flash_adamw"} == set(OPTIMIZERS)
    assert OPTIMIZERS["adamw_bnb_8bit"] is OPTIMIZERS["adamw_8bit"]
    assert OPTIMIZERS["adamw_torch_fused"] is OPTIMIZERS["adamw_torch"]


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "adamw_8bit_fused"])
def test_the_first_step_is_adamws_and_decays_matrices_only(name):
    """Loshchilov and Hutter 2019, algorithm 2: after one step m / sqrt(v) is the sign of the gradient."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64)
    before = {key: p.detach().double() for key, p in model.named_parameters()}
    config = DPOConfig(optim=name, learning_rate=0.01, weight_decay=0.1)
    made = make_optimizer(list(model.parameters()), config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    made.step()
    for key, p in model.named_parameters():
        decay = 1 - 0.01 * 0.1 if p.ndim == 2 else 1.0
        size = p.grad.double().abs()
        want = before[key] * decay - 0.01 * p.grad.double().sign() * size / (size + 1e-8)
        assert (p.double() - want).abs().max() < 2e-6


@pytest.fixture
def _gpu(monkeypatch):
    """A machine with a GPU, as far as settings can tell."""
    monkeypatch.setattr("dpo_fast.model.placement.pick_device", lambda name: torch.device("cuda"))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("bfloat16", "adamw_8bit_fused"), ("float32", "adamw_torch"), ("auto", "adamw_torch")],
)
@pytest.mark.usefixtures("_gpu")
def test_the_default_on_a_gpu_depends_on_the_weights(dtype, name):
    assert optimizer_name(DPOConfig(dtype=dtype)) == name
    assert optimizer_name(DPOConfig(dtype=dtype, optim="adamw_8bit")) == "adamw_8bit"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_default_on_a_cpu_is_pytorchs(dtype):
    config = DPOConfig(dtype=dtype, device="cpu")
    assert optimizer_name(config) == "adamw_torch"
    assert type(make_optimizer(list(torch.nn.Linear(2, 2).parameters()), config)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("name", "package"),
    [("flash_adamw", "flashoptim"), ("adamw_8bit", "bitsandbytes"), ("adamw_bnb_8bit", "bitsandbytes")],
)
@pytest.mark.usefixtures("_gpu")
def test_a_package_that_is_not_installed_is_named_at_once(monkeypatch, name, package):
    monkeypatch.setattr(optimizers, "find_spec", lambda of: None if of == package else find_spec(of))
    message = f"--optim {name}: {package} is not installed; pip install {package}"
    with pytest.raises(UserError, match=f"^{message}$"):
        check_config(DPOConfig(data="rows.jsonl", optim=name))


@pytest.mark.parametrize("name", ["flash_adamw", "paged_adamw_8bit"])
def test_what_only_runs_on_a_gpu_is_refused_elsewhere(monkeypatch, name):
    monkeypatch.setattr(optimizers, "find_spec", lambda of: True)
    with pytest.raises(
        UserError, match=f"--optim {name}: runs on a GPU, and the device is cpu; choose one of .*adamw_8bit"
    ):
        check_optimizer(DPOConfig(optim=name, device="cpu"))


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit_fused"])
def test_bf16_weights_are_warned_of_if_the_optimizer_does_not_move_them(name):
    config = DPOConfig(model="org/model", data="rows.jsonl", dtype="bfloat16", device="cpu", optim=name)
    if name == "adamw_torch":
        with pytest.warns(UserWarning, match="most updates round to zero"):
            check_config(config)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_config(config)


def test_every_optimizer_has_a_row_in_the_docs():
    docs = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    rows = "".join(line.split("|")[1] for line in docs.splitlines() if line.startswith("| `"))
    assert [name for name in OPTIMIZERS if f"`{name}`" not in rows] == []
