"""What each of several processes holds: its share of weights, gradients and optimizer state, in bytes."""

import json

import pytest
from rank_runs import train_on_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("parallel", "optim"), [("fsdp", "adamw_torch"), ("fsdp", "adamw_8bit_fused"), ("ddp", "adamw_torch")]
)
def test_a_process_holds_its_share(make_config, rows, tmp_path, parallel, optim, world_size):
    """The tiny model's sizes are multiples of four, so that nothing is padded."""
    config = make_config(data=rows, max_steps=1, parallel=parallel, optim=optim)
    train_on_ranks(config, tmp_path, world_size=world_size, count=True)
    shares = [json.loads((tmp_path / f"bytes-{rank}.json").read_text()) for rank in range(world_size)]
    whole = shares[0]["whole"]
    parts = world_size if parallel == "fsdp" else 1
    moments = {"adamw_torch": 8 * whole / 4, "adamw_8bit_fused": 2 * whole / 4}[optim]
    for share in shares:
        assert share["weights"] == share["gradients"] == whole / parts
        # The fused optimizer keeps two bytes of exponents per block of 256, and of what is left of a tensor.
        assert share["state"] == pytest.approx(moments / parts, rel=0 if optim == "adamw_torch" else 0.1)
