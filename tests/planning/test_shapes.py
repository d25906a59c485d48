"""A model's sizes, against transformers' own models and published figures."""

import pytest
from oracle import tiny_llama
from transformers import (
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)

from dpo_fast.planning.shapes import NAMED, CannotPlan, named_config, shape_of

# As the models' pages give them, in 1e9.
PUBLISHED = {
    "qwen2.5-0.5b": 0.494,
    "llama-3.2-1b": 1.236,
    "qwen2.5-1.5b": 1.544,
    "llama-3.2-3b": 3.213,
    "qwen2.5-7b": 7.616,
    "llama-3-8b": 8.030,
    "qwen2.5-14b": 14.770,
    "qwen2.5-32b": 32.764,
    "llama-3-70b": 70.554,
    "llama-3.1-405b": 405.85,
}


def test_parameters_are_those_of_the_loaded_model():
    model = tiny_llama()
    shape = shape_of(model.config, "tiny")
    assert shape.num_parameters == model.num_parameters()
    assert shape.linear_parameters == sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert (shape.queries, shape.keys, shape.norms, shape.has_gate, shape.is_tied) == (32, 16, 2, True, True)


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_have_the_published_size(name):
    assert shape_of(named_config(name), name).num_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_norms_and_gates_of_other_families():
    qwen3 = shape_of(Qwen3Config(num_hidden_layers=2), "qwen3")
    assert (qwen3.has_query_norm, qwen3.norms) == (True, 2)
    gemma = shape_of(Gemma2Config(num_hidden_layers=2), "gemma2")
    assert (gemma.norms, gemma.norm_bytes, gemma.softcap) == (4, 8, True)
    for config in (GPT2Config(n_layer=2), OPTConfig(num_hidden_layers=2, ffn_dim=3072)):
        shape = shape_of(config, config.model_type)
        assert (shape.has_gate, shape.intermediate) == (False, 3072)


def test_a_token_of_a_mixture_passes_two_experts():
    config = MixtralConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=100)
    shape = shape_of(config, "mixtral")
    inactive = 2 * 6 * 3 * 64 * 96  # layers, experts that it does not pass, matrices
    assert shape.linear_parameters - shape.active_parameters == inactive
    assert shape.intermediate == 2 * 96


@pytest.mark.parametrize("config", [MambaConfig(num_hidden_layers=2), FalconH1Config(num_hidden_layers=2)], ids=str)
def test_recurrent_models_are_not_planned(config):
    with pytest.raises(CannotPlan, match="cannot be planned"):
        shape_of(config, "recurrent")
