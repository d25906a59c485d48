"""Fused layers against plain ones, family by family, with Liger's kernels in plain PyTorch (helpers/plain_liger.py)."""

import copy
import sys
from dataclasses import replace

import plain_liger
import pytest
import torch
from families import COMMON, FAMILIES, gradients, make, settings_of
from launches import launches
from oracle import as_policy, random_groups, save_tiny_checkpoint, tiny_llama
from small_runs import QUIET, write_rows

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.model import layers
from dpo_fast.model.layers import DENSE, EXPERTS, fuse_layers, with_fused_layers
from dpo_fast.packs.layout import pack
from dpo_fast.training.run import train
from dpo_fast.training.settings import check_config

pytest.importorskip("liger_kernel")
NAMES = {name: make(name, settings_of(name)).config.model_type for name in FAMILIES}
FUSED = sorted(name for name, model_type in NAMES.items() if model_type in DENSE | EXPERTS)
# Liger has no rotary embedding for these.
WITHOUT_ROTARY = {"Glm4"}


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch):
    plain_liger.use(monkeypatch)


@pytest.fixture
def on_gpu(monkeypatch):
    """Fused layers are tried although there is no GPU."""
    monkeypatch.setattr(layers, "why_unavailable", lambda policy: "")


def modeling_of(model):
    return sys.modules[type(model).__module__]


def test_all_known_families_are_compared():
    assert {NAMES[name] for name in FUSED} == DENSE | EXPERTS


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_the_plain_ones_and_stay_in_their_model(name):
    plain = make(name, settings_of(name))
    fused = copy.deepcopy(plain)
    before = dict(vars(modeling_of(plain)))
    done = fuse_layers(fused)
    assert ("rotary" in done) == (name not in WITHOUT_ROTARY)
    assert dict(vars(modeling_of(plain))) == before
    kinds = {type(module).__name__ for module in fused.modules() if "forward" in vars(module)}
    expected = ["RMSNorm", *["Attention"] * ("rotary" in done), *["MLP"] * (NAMES[name] in DENSE)]
    assert all(any(kind.endswith(part) for kind in kinds) for part in expected), kinds
    assert len(kinds) == len(expected)
    batch = pack(random_groups(5, seed=3, num_answers=3))
    want, got = (as_policy(model).token_logps(batch) for model in (plain, fused))
    assert not torch.equal(want, torch.zeros_like(want))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    true_grads, grads = gradients(want, plain), gradients(got, fused)
    assert grads.keys() == true_grads.keys()
    for parameter, true in true_grads.items():
        assert (grads[parameter] - true).norm() <= 1e-5 * true.norm() + 2e-6, parameter


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_copy_of_a_fused_model_reads_its_own_weights(name):
    """As the reference that follows the policy does."""
    fused = make(name, settings_of(name))
    fuse_layers(fused)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    batch = pack(random_groups(2))
    plain = make(name, settings_of(name))
    plain.load_state_dict(other.state_dict())
    torch.testing.assert_close(as_policy(other).score(batch), as_policy(plain).score(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_gradients_are_the_same_with_checkpointing(checkpointing):
    """Selective checkpointing keeps what the projections returned, in whose memory Liger rotates."""
    batch = pack(random_groups(4))
    grads = {}
    for name in ("none", checkpointing):
        model = tiny_llama()
        fuse_layers(model)
        policy = as_policy(model)
        policy.set_trainable(checkpointing=name)
        grads[name] = gradients(policy.token_logps(batch), model)
    for parameter, want in grads["none"].items():
        torch.testing.assert_close(grads[checkpointing][parameter], want, rtol=1e-5, atol=1e-6)


def test_length_dependent_frequencies_keep_their_own_rotation(on_gpu):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make("Llama", {**COMMON, "max_position_embeddings": 16, "rope_parameters": rope})
    groups = random_groups(4)
    policy = with_fused_layers(as_policy(model), groups, True)
    assert policy.layers
    assert "rotary" not in policy.layers
    assert not any("forward" in vars(layer.self_attn) for layer in model.model.layers)


def test_the_stores_key_tells_fused_layers_apart(on_gpu):
    plain, groups = as_policy(tiny_llama()), random_groups(4)
    fused = with_fused_layers(as_policy(tiny_llama()), groups, "auto")
    assert fused.layers.startswith("liger 0.")
    assert fused.numerics != plain.numerics
    assert with_fused_layers(plain, groups, False) is plain


@pytest.mark.parametrize("fault", ["other numbers", "an error", "nan"])
def test_layers_that_differ_are_taken_out_again(fault, on_gpu, monkeypatch, caplog):
    def faulty(x, *args):
        if fault == "an error":
            raise RuntimeError("no kernel image")
        return x * (torch.nan if fault == "nan" else 1.0)

    monkeypatch.setattr(plain_liger.Norm, "apply", staticmethod(faulty))
    policy, groups = as_policy(tiny_llama()), random_groups(4)
    want = policy.score(pack(groups))
    assert with_fused_layers(policy, groups, "auto") is policy
    assert torch.equal(policy.score(pack(groups)), want)
    assert not any("forward" in vars(module) for module in policy.model.modules())
    reason = "RuntimeError: no kernel image" if fault == "an error" else r"row \d differs by .* nats, expected at most"
    assert "fused layers are off" in caplog.text
    with pytest.raises(UserError, match=f"--fused_layers true: {reason}"):
        with_fused_layers(policy, groups, True)


def test_without_a_gpu_auto_is_off_and_true_is_refused():
    policy = as_policy(tiny_llama())
    assert with_fused_layers(policy, random_groups(2), "auto") is policy
    with pytest.raises(UserError, match="--fused_layers true: they are GPU kernels, and the model is on cpu"):
        with_fused_layers(policy, random_groups(2), True)


def test_unknown_families_and_a_missing_library_are_named(monkeypatch):
    gpu = torch.device("cuda")
    unknown = replace(as_policy(make("Phi", settings_of("Phi"))), device=gpu)
    assert layers.why_unavailable(unknown) == "not known for phi"
    known = replace(as_policy(tiny_llama()), device=gpu)
    assert layers.why_unavailable(known) == ""
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    assert "pip install 'dpo-fast[liger]'" in layers.why_unavailable(known)


def test_fused_layers_and_the_compiler_are_refused_together(tmp_path):
    config = DPOConfig(
        model=str(save_tiny_checkpoint(tmp_path)), data="rows.jsonl", torch_compile=True, fused_layers=True
    )
    with pytest.raises(UserError, match="--fused_layers true --torch_compile true"):
        check_config(config)


@pytest.mark.slow
def test_twenty_steps_end_where_plain_layers_end(on_gpu, tmp_path):
    """With a reference that follows the policy, a second model with layers of its own, and one from the store."""
    model, data = str(save_tiny_checkpoint(tmp_path / "model")), write_rows(tmp_path / "rows.jsonl")
    for sync_ref_model in (False, True):
        runs = {}
        for fused in (False, True):
            config = DPOConfig(
                **{"model": model, "data": data, "output_dir": str(tmp_path / f"run {sync_ref_model} {fused}")},
                **{"reference_store": str(tmp_path / "store.sqlite"), "fused_layers": fused, "device": "cpu"},
                **{"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1},
                **{"sync_ref_model": sync_ref_model, "ref_model_sync_steps": 5, "save_steps": 0},
            )
            runs[fused] = [row["loss"] for row in train(config, console=QUIET).metrics if "loss" in row]
        assert len(runs[True]) == 20
        assert runs[True][-1] < runs[True][0] - 0.05
        assert runs[True] == pytest.approx(runs[False], abs=1e-4)


def test_launches_of_plain_layers_are_those_of_the_docs():
    """docs/measurements.md compares them with Liger's one launch forward and one or two backward."""
    llama = make("Llama", settings_of("Llama")).bfloat16()
    norm, modeling = llama.model.norm, modeling_of(llama)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()

    turns = torch.randn(1, 7, 8, dtype=torch.bfloat16)
    q, k = (random(1, 7, heads, 8).detach().transpose(1, 2).requires_grad_() for heads in (4, 2))
    assert launches(norm, [random(1, 7, 32)], [norm.weight]) == (8, 16)
    assert launches(lambda q, k: modeling.apply_rotary_pos_emb(q, k, turns, turns), [q, k]) == (10, 14)
    assert launches(lambda gate, up: llama.model.layers[0].mlp.act_fn(gate) * up, [random(7, 48), random(7, 48)]) == (
        2,
        3,
    )
