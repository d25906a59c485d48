"""The dtype of a trained model's file, and what survives it."""

import json

import pytest
import torch
from oracle import save_tiny_checkpoint
from safetensors.torch import load_file

from dpo_fast.config import ModelConfig
from dpo_fast.model.load import load_model, load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.model.precision import saved_dtype, surviving_share


@pytest.fixture
def base(tmp_path):
    """A base in bfloat16."""
    folder = save_tiny_checkpoint(tmp_path / "base")
    load_model(str(folder), torch.bfloat16).save_pretrained(folder)
    return str(folder)


def trained(base, step):
    """All weights moved by a share of themselves."""
    policy = Policy.load(ModelConfig(model=base))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1 + step)
    return policy


def test_small_steps_keep_the_trained_dtype(base):
    """Half the spacing of bfloat16 is at least 2^-9 of a weight, so that a change of 1e-4 is lost on nearly all."""
    saved = saved_dtype(trained(base, 1e-4).whole_weights(), base, "auto")
    assert saved.dtype is torch.float32
    assert saved.reason.startswith("weights in float32: only 0.0% of the weights that changed")
    assert "--save_dtype bfloat16" in saved.reason


def test_large_steps_take_the_bases(base):
    saved = saved_dtype(trained(base, 0.1).whole_weights(), base, "auto")
    assert saved.dtype is torch.bfloat16
    assert "100.0% of the weights that changed" in saved.reason


def test_the_share_by_hand(base):
    policy, start = trained(base, 0.0), load_model(base, torch.bfloat16)
    flat = next(policy.model.parameters()).data.view(-1)
    flat[0], flat[1] = flat[0] * 1.5, flat[1] * (1 + 1e-5)
    assert surviving_share(policy.whole_weights(), start, torch.bfloat16) == 0.5
    assert surviving_share(policy.whole_weights(), start, torch.float32) == 1.0


def test_what_is_asked_for_is_done_and_said(base):
    policy = trained(base, 1e-4)
    saved = saved_dtype(policy.whole_weights(), base, "bfloat16")
    assert saved.dtype is torch.bfloat16
    assert "% of the weights that changed differ" in saved.reason
    whole = saved_dtype(policy.whole_weights(), base, "float32")
    assert (whole.dtype, whole.reason) == (torch.float32, "")


def test_a_base_that_is_gone_is_said(base, tmp_path):
    saved = saved_dtype(trained(base, 0.1).whole_weights(), str(tmp_path / "a/b/gone"), "auto")
    assert saved.dtype is torch.float32
    assert "cannot be compared with any more" in saved.reason


def test_the_written_folder_says_its_dtype(base, tmp_path):
    policy = trained(base, 0.1)
    policy.save(tmp_path / "final", load_tokenizer(base), torch.bfloat16)
    assert {weight.dtype for weight in load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(str(tmp_path / "final"), torch.float32)
    for (name, got), want in zip(again.named_parameters(), policy.model.parameters(), strict=True):
        torch.testing.assert_close(got, want.to(torch.bfloat16).float(), rtol=0, atol=0, msg=name)
    policy.save(tmp_path / "whole", load_tokenizer(base))
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"
