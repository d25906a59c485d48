"""Small random models of the families that people use."""

import torch
import transformers

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
# Windows are shorter than most sequences of the tests, so that they cut.
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": {},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8},
    "Gemma2": {
        **{"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
        **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi": {},
    "Phi3": {"sliding_window": 7},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "GPTNeoX": {"rotary_pct": 0.5},
    "SmolLM3": {},
    "Olmo2": {},
    "GptOss": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.5},
    "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.2},
    "Gemma": {"head_dim": 8},
    "Olmo3": {"sliding_window": 6},
    "Starcoder2": {"sliding_window": 6},
    "Glm4": {"head_dim": 8},
    "DeepseekV3": {  # values are of another width than keys
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 12},
        **{"num_key_value_heads": 4, "first_k_dense_replace": 2},
    },
    "Llama4Text": {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 512},
}
# Recurrent models carry a state from token to token, which answers cannot share; the others know positions by distances
# in the row (Falcon, Bloom), or keep the layout from their attention (StableLM).
ONE_BY_ONE = {
    "Falcon": {**COMMON, "alibi": True},
    "Bloom": {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "StableLm": COMMON,
    "Lfm2": {**COMMON, "full_attn_idxs": [1]},
    "Mamba": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
    "FalconH1": {
        **COMMON,
        **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    },
}


def make(family, settings, *, seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    name = family.removesuffix("Text")
    cls = getattr(transformers, f"{name}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide them
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def gradients(logps, model):
    """Gradients of a fixed weighting of the log-probs."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def settings_of(name):
    """The configuration of a family."""
    if name in ONE_BY_ONE:
        return ONE_BY_ONE[name]
    own = {"vocab_size", "initializer_range", "bos_token_id", "eos_token_id"}
    base = {k: v for k, v in COMMON.items() if k in own} if name == "GPT2" else COMMON
    return {**base, **FAMILIES[name]}
