"""Recomputed activations: the same gradients, from less memory."""

import pytest
import torch
from oracle import as_policy, random_groups, tiny_llama
from torch.utils.checkpoint import CheckpointPolicy

from dpo_fast.model.checkpointing import _keep_costly
from dpo_fast.packs.layout import pack

KINDS = [{"checkpointing": "selective"}, {"checkpointing": "full"}, {"checkpointing": "full", "offload": True}]


def gradients(dtype, **options):
    policy = as_policy(tiny_llama(seed=5, dtype=dtype))
    policy.set_trainable(**options)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        policy.token_logps(pack(random_groups(3, seed=4))).sum().backward()
    return [p.grad for p in policy.model.parameters()], sum(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_gradients_are_the_same_bits(options, dtype):
    want, all_kept = gradients(dtype)
    got, kept = gradients(dtype, **options)
    assert kept < all_kept
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_selective_repeats_no_product():
    from torch.utils.flop_counter import FlopCounterMode

    def flop(checkpointing):
        with FlopCounterMode(display=False) as counter:
            gradients(torch.float32, checkpointing=checkpointing)
        return counter.get_total_flops()

    assert flop("selective") == flop("none") < flop("full")


def test_varlen_attention_is_kept():
    from torch.nn.attention import varlen  # noqa: F401 - registers the operator

    operator = torch.ops.torch_attn._varlen_attn.default
    assert _keep_costly(None, operator) is CheckpointPolicy.MUST_SAVE
    assert _keep_costly(None, torch.ops.aten.mul.Tensor) is CheckpointPolicy.PREFER_RECOMPUTE
