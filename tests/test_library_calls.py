"""Calls into other libraries, also those that run on a GPU alone, fit what is installed."""

import inspect
from importlib.util import find_spec
from unittest.mock import create_autospec

import pytest
import torch
import torch.nn.functional as F
from library_calls import Uses, library, missing, project_uses, resolve, signatures
from oracle import random_groups
from torch.nn.attention import varlen

from dpo_fast.kernels.prefix_attention import prefix_attention, prefix_attention_ref, prefix_layout
from dpo_fast.packs.layout import pack

# Libraries whose names and keywords change most.
UNSTABLE = {"accelerate", "bitsandbytes", "liger_kernel", "peft", "torch", "transformers", "triton", "trl"}
# What these have without a signature. A name more is a call that nothing checks.
WITHOUT_SIGNATURE = {
    "torch.Generator",
    "torch._C._ForceDispatchKeyGuard",
    "torch._C._dispatch_tls_local_exclude_set",
    "torch._C._dispatch_tls_local_include_set",
    "torch.device",
    "torch.distributed.tensor.Partial",
    "torch.finfo",
    "torch.from_numpy",
    "torch.get_num_threads",
    "torch.is_autocast_enabled",
    "torch.is_grad_enabled",
    "torch.set_num_threads",
    "transformers.PreTrainedTokenizerFast",
    "transformers.loss.loss_utils.LOSS_MAPPING.items",
    "transformers.loss.loss_utils.LOSS_MAPPING.update",
}


@pytest.mark.parametrize("of", sorted({library(name) for _, name in project_uses().names}))
def test_what_is_used_is_there_and_takes_what_it_is_given(of):
    if find_spec(of) is None:
        pytest.skip(f"{of} is not installed")
    faults = project_uses().faults(of)
    assert not faults, "\n" + "\n".join(faults)


def test_no_call_into_what_changes_most_goes_unchecked():
    calls = {name for _, name, _ in project_uses().calls if library(name) in UNSTABLE and not missing(name)}
    assert {name for name in calls if not signatures(resolve(name))} <= WITHOUT_SIGNATURE


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("torch.nn.attention.varlen.varlen_attn", set()),
        ("torch.nn.attention.flex_attention.BlockMask.from_kv_blocks", {"BLOCK_SIZE", "mask_mod"}),
        ("torch.nn.attention.flex_attention.AuxRequest", {"lse"}),
        ("torch.nn.functional.scaled_dot_product_attention", {"enable_gqa"}),
        ("torch.mm", {"out_dtype"}),
        ("torch.addmm", {"out_dtype", "out"}),
        ("bitsandbytes.optim.AdamW8bit", set()),
        ("triton.language.dot", {"out_dtype"}),
        ("trl.trainer.utils.use_adapter", {"adapter_name"}),
        ("trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply", set()),
    ],
)
def test_calls_that_must_be_among_them(name, keywords):
    """So that the tests above do not pass because nothing was found."""
    found = [{x.arg for x in call.keywords} for _, called, call in project_uses().calls if called == name]
    assert any(keywords <= given for given in found)
    assert signatures(resolve(name))


def test_names_that_must_be_among_them():
    assert "trl.trainer.utils._ChunkedLogProbFunction" in {name for _, name in project_uses().names}
    assert "trl.trainer.dpo_trainer.DPOTrainer" in {name for _, name, _ in project_uses().subclasses}


TRAINER = "from trl.trainer.dpo_trainer import DPOTrainer\nclass Ours(DPOTrainer):\n    "


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            "from torch.nn.attention.varlen import varlen_attn as f\nf(*(q, k, v), c, c, m, m, enable_gaq=1)",
            "'enable_gaq'",
        ),
        ("def f():\n    from torch.nn.attention import varlen\n    varlen.varlen_atn", "varlen_atn"),
        ("import torch\ntorch.mm(a, b, out_type=torch.float32)", "'out_type'"),
        ("import torch\ntorch.mm(a, b, c, d, e)", "too many positional"),
        ("import torch.nn.functional as F\nF.scaled_dot_product_attention(q, k)", "'value'"),
        ("from torch.nn.attention.flex_attention import BlockMask\nBlockMask.from_kv_blocks(a, b, block=1)", "'block'"),
        ("import bitsandbytes\nbitsandbytes.optim.AdamW8bit(groups, betta=1, **settings)", "'betta'"),
        ("from peft import LoraConfig\nLoraConfig(rank=8)", "'rank'"),
        (
            "from torch.distributed.device_mesh import init_device_mesh\ninit_device_mesh('cpu', (1,), names=1)",
            "'names'",
        ),
        ("import torch.distributed.checkpoint as dcp\ndcp.save({}, folder='x')", "'folder'"),
        ("import triton.language as tl\ntl.sum(x, dim=0)", "'dim'"),
        ("if TYPE_CHECKING:\n    from trl.trainer.utils import _no_such_name", "_no_such_name"),
        (TRAINER + "def _compute_los(self, model, inputs): pass", "_compute_los"),
        (TRAINER + "def _compute_loss(self, model, batch, return_outputs): pass", "'batch'"),
        (TRAINER + "def train(self, *args, **kwargs): return super().trian(*args, **kwargs)", "trian"),
        (TRAINER + "def log(self, logs, start_time=None): super().log(logs, time=start_time)", "'time'"),
        (TRAINER + "def log(self, logs, start_time=None): self._metricks[0]", "_metricks"),
    ],
)
def test_a_wrong_use_is_found(source, fault):
    uses = Uses().add(source, "file.py")
    (found,) = uses.faults(library(uses.names[0][1]))
    assert found.startswith("file.py:")
    assert fault in found


def test_a_local_name_is_not_the_import_that_it_hides():
    source = "import torch\ndef f(torch): torch.no_such()\ndef g(x): x.torch.no_such()"
    assert not Uses().add(source, "file.py").faults("torch")


def attention_by_segment(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=None):
    """As the installed `varlen_attn`: later versions take fewer heads of keys only where they are told of it."""
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters and not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError("enable_gqa")
    parts = []
    for (q0, q1), (k0, k1) in zip(*(x.unfold(0, 2, 1).tolist() for x in (cu_q, cu_k)), strict=True):
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        heads_first = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_varlen_attention_is_called_as_installed(kv_heads, window, monkeypatch):
    """Its arguments depend on the version, and a CPU has no such kernel: a stand-in takes the real one's arguments."""
    spy = create_autospec(varlen.varlen_attn, side_effect=attention_by_segment)
    monkeypatch.setattr(varlen, "varlen_attn", spy)
    batch = pack(random_groups(4, num_answers=3))
    layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
    query, key, value = (torch.randn(1, heads, batch.num_tokens, 8).double() for heads in (8, kv_heads, kv_heads))
    got = prefix_attention(query, key, value, layout, scale=0.3, window=window, backend="varlen")
    torch.testing.assert_close(got, prefix_attention_ref(query, key, value, layout, scale=0.3, window=window))
    spy.assert_called_once()
