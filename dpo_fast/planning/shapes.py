"""A model's sizes, counted on the meta device: no weight is loaded, no memory is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CannotPlan(UserError):
    """An architecture that the formula does not describe; the message says why."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer. Parameters are counted, all other sizes are numbers per token.

    Attributes:
        name: what it was asked for as.
        layers: decoder layers.
        hidden: D, width of the residual stream.
        intermediate: F, width between the matrices of an MLP; of a mixture of experts, times the experts of a token.
        queries: H·d, width of all queries.
        keys: H_kv·d, width of all keys, and of all values.
        heads: H.
        head_dim: d.
        vocab: V.
        is_tied: whether the head is the embedding.
        num_parameters: of the whole model, a tied head counted once.
        linear_parameters: of the matrices in the layers.
        active_parameters: of those, what a token is multiplied with.
        norms: norms of width D in a layer.
        has_query_norm: whether queries and keys have norms of their own.
        has_gate: whether an MLP has three matrices instead of two.
        norm_bytes: bytes per number that a norm of half-precision weights keeps.
        softcap: whether attention scores are capped, which no fused attention on a CPU computes.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    vocab: int
    is_tied: bool
    num_parameters: int
    linear_parameters: int
    active_parameters: int
    norms: int = 2
    has_query_norm: bool = False
    has_gate: bool = True
    norm_bytes: int = 6
    softcap: bool = False

    @property
    def head_parameters(self) -> int:
        """V·D."""
        return self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one layer, norms left out."""
        return self.linear_parameters // self.layers


# Sizes of published models whose configuration may not be at hand, as `config.json` has them: layers, hidden,
# intermediate, heads, key heads, vocabulary, tied, and the class of transformers.
_NAMED: dict[str, tuple[int, int, int, int, int, int, bool, str]] = {
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151_936, True, "Qwen2"),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128_256, True, "Llama"),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151_936, True, "Qwen2"),
    "llama-3.2-3b": (28, 3072, 8192, 24, 8, 128_256, True, "Llama"),
    "qwen2.5-7b": (28, 3584, 18_944, 28, 4, 152_064, False, "Qwen2"),
    "llama-3-8b": (32, 4096, 14_336, 32, 8, 128_256, False, "Llama"),
    "qwen2.5-14b": (48, 5120, 13_824, 40, 8, 152_064, False, "Qwen2"),
    "qwen2.5-32b": (64, 5120, 27_648, 40, 8, 152_064, False, "Qwen2"),
    "llama-3-70b": (80, 8192, 28_672, 64, 8, 128_256, False, "Llama"),
    "llama-3.1-405b": (126, 16_384, 53_248, 128, 8, 128_256, False, "Llama"),
}
NAMED = tuple(_NAMED)


def named_config(name: str) -> PretrainedConfig:
    """The configuration of one of `NAMED`."""
    import transformers

    layers, hidden, intermediate, heads, kv_heads, vocab, is_tied, family = _NAMED[name]
    config: PretrainedConfig = getattr(transformers, f"{family}Config")(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=is_tied,
        max_position_embeddings=131_072,
    )
    return config


def shape_of(config: PretrainedConfig, name: str) -> ModelShape:
    """The sizes of the model that `config` describes.

    Raises:
        CannotPlan: it has no attention or no MLP of the usual kind in its layers.
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    missing = [
        key for key in ("num_hidden_layers", "hidden_size", "num_attention_heads") if not getattr(text, key, None)
    ]
    if missing:
        raise CannotPlan(f"{name}: cannot be planned: its configuration has no {missing[0]}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    first = _first_layer(model, text.num_hidden_layers, name)
    experts, used = _experts(text)
    linear = sum(p.numel() for module in _layers(model, text.num_hidden_layers) for p in _matrices(module))
    in_experts = sum(p.numel() for key, p in model.named_parameters() if "experts" in key and "shared" not in key)
    width = (getattr(text, "moe_intermediate_size", None) if experts > 1 else None) or _intermediate(text)
    norms = [
        key
        for key, p in first.named_parameters()
        if p.ndim == 1 and key.endswith("weight") and ("norm" in key or "ln_" in key)
    ]
    of_queries = [key for key in norms if "q_norm" in key or "k_norm" in key]
    is_gemma = "gemma" in text.model_type
    return ModelShape(
        name=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=width * used,
        queries=text.num_attention_heads * head_dim,
        keys=kv_heads * head_dim,
        heads=text.num_attention_heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        is_tied=bool(model.config.get_text_config().tie_word_embeddings),
        num_parameters=sum(p.numel() for p in model.parameters()),
        linear_parameters=linear,
        active_parameters=linear - in_experts + in_experts * used // experts,
        norms=len(norms) - len(of_queries),
        has_query_norm=bool(of_queries),
        has_gate=any("gate" in key for key, _ in first.named_parameters()),
        norm_bytes=8 if is_gemma else 6,
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
    )


def _layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The decoder's layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(lists[0]) if lists else []


def _first_layer(model: nn.Module, count: int, name: str) -> nn.Module:
    layers = _layers(model, count)
    if not layers or not any("attn" in key or "attention" in key for key, _ in layers[0].named_modules()):
        raise CannotPlan(f"{name}: cannot be planned: {type(model).__name__} has no list of layers with attention")
    if any(part in key for key, _ in model.named_modules() for part in ("mamba", "conv.", "linear_attn")):
        raise CannotPlan(f"{name}: cannot be planned: {type(model).__name__} is not a transformer alone")
    return layers[0]


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.ndim >= 2]


def _experts(text: Any) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token takes; (1, 1) without a mixture."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(text, key, None):
            return count, getattr(text, "num_experts_per_tok", 1)
    return 1, 1


def _intermediate(text: Any) -> int:
    """Width of the MLP; GPT-2's configuration leaves it at four times the hidden size."""
    for key in ("intermediate_size", "ffn_dim", "n_inner"):
        if value := getattr(text, key, None):
            return int(value)
    return int(4 * text.hidden_size)
