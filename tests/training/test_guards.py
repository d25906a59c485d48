"""Nothing that is not finite is saved, and the message names the last good checkpoint."""

import pytest
import torch
from small_runs import QUIET

from dpo_fast.errors import TrainingError
from dpo_fast.training.checkpoint import newest_checkpoint
from dpo_fast.training.guards import check_tensors
from dpo_fast.training.loop import Trainer
from dpo_fast.training.run import train


def test_the_first_tensor_that_is_not_finite_is_named(tmp_path):
    good, bad = torch.ones(3), torch.tensor([1.0, torch.inf])
    whole = [("a", good), ("count", torch.ones(2, dtype=torch.uint8)), ("none", torch.zeros(0, 3))]
    check_tensors(whole, 3, tmp_path)
    check_tensors([], 3, tmp_path)
    for number in (torch.nan, -torch.inf):
        with pytest.raises(TrainingError, match="after step 3, b holds"):
            check_tensors([*whole, ("b", torch.tensor([[1.0, number], [2.0, 3.0]], dtype=torch.bfloat16))], 3, tmp_path)
    with pytest.raises(TrainingError, match=r"after step 3, b and 1 more of 3 tensors holds numbers .* no good check"):
        check_tensors([*whole, ("b", bad), ("c", bad * 0)], 3, tmp_path)


@pytest.mark.slow
def test_a_learning_rate_that_destroys_the_model_leaves_no_final_model(config, tmp_path):
    """After the only step nothing would look at the weights again."""
    with pytest.raises(TrainingError, match=r"after step 1, \S+ .* not finite.*start over with --overwrite true"):
        train(config(learning_rate=1e38, weight_decay=1e3, max_steps=1), console=QUIET)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_never_made(config, tmp_path, monkeypatch, what):
    plain = Trainer.train_step

    def poisoned(self):
        norm = plain(self)
        parameter = next(self.policy.model.parameters())
        if self.step == 4:
            tensor = parameter.data if what == "weights" else self.optimizer.state[parameter]["exp_avg_sq"]
            tensor.view(-1)[5] = torch.nan
        return norm

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    good = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(TrainingError, match=rf"after step 4, .*not saved.* the last good checkpoint is {good}"):
        train(config(save_steps=2), console=QUIET)
    assert newest_checkpoint(tmp_path / "run") == good
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    import dpo_fast.losses

    exact, calls = dpo_fast.losses.LOSSES["sigmoid"], []

    def poisoned(pairs, config):
        calls.append(1)
        return exact(pairs, config) * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setitem(dpo_fast.losses.LOSSES, "sigmoid", poisoned)
    with pytest.raises(TrainingError, match=rf"the loss of step 4 .*good checkpoint is {tmp_path}/run/checkpoint-3"):
        train(config(save_steps=1), console=QUIET)
