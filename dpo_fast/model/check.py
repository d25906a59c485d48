"""Whether packs give a model's own log-probs: the check at every start."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast.errors import UserError
from dpo_fast.model.attention import CannotPack, NoLayout, own_attention, packed_attention, use_own_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("dpo_fast")
# Names in configurations for how far attention sees.
WINDOWS = (
    *("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention"),
    *("sliding_window_size", "attention_window", "index_topk"),
)
# Tokens of the group that the packed forward is checked on: enough to show a difference, few enough to cost nothing.
CHECKED_TOKENS = 64


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        shares_prompts: whether answers in a pack that share one prompt have the log-probs of the model's own forward.
        reason: why not; empty if they do.
    """

    shares_prompts: bool
    reason: str = ""


def with_fitting_layout(policy: Policy, groups: list[Group]) -> Policy:
    """The policy itself if packs fit its architecture, else one that computes answer by answer, with a warning.

    Raises:
        UserError: neither layout gives the model's own log-probs, or a group holds tokens that the model lacks.
    """
    for group in groups:
        refuse_unknown_tokens(policy.model, (group.prompt_ids, *group.answers), f"row {group.row}")
    verdict = check_packed_forward(policy, groups)
    if verdict.shares_prompts:
        return policy
    logger.warning(
        "%s cannot share a prompt among answers (%s): each answer is computed with its own copy of the prompt",
        type(policy.model).__name__,
        verdict.reason,
    )
    use_own_attention(policy.model)
    return replace(policy, shares_prompts=False)


def refuse_unknown_tokens(model: PreTrainedModel, sequences: Iterable[Any], place: str) -> None:
    """Refuse token ids beyond the model's embedding, which come from tokens that were added to its tokenizer alone.

    Args:
        model: that is to read them.
        sequences: lists or arrays of token ids.
        place: where they are from, for the message.

    Raises:
        UserError: it names the largest id.
    """
    embedding: Any = model.get_input_embeddings()
    size = embedding.weight.shape[0]
    largest = max((int(np.max(ids)) for ids in sequences if len(ids)), default=0)
    if largest >= size:
        raise UserError(
            f"{place} has token {largest}, but the model embeds {size} tokens (0 to {size - 1}): its tokenizer has "
            f"tokens that it lacks. Add them: model.resize_token_embeddings({largest + 1}), then save the model"
        )


@torch.no_grad()
def check_packed_forward(policy: Policy, groups: list[Group]) -> Verdict:
    """Compare packed groups with the model's own forward, one answer at a time; policy and model stay as they are.

    One pack is checked: a short group, and for each length at which the model changes what it does (an attention
    window, rotary frequencies by length) one below and one beyond. An architecture that packs do not fit (recurrent,
    another mask) is thus computed answer by answer, and one with another head is refused: never silently wrong. It
    costs one short forward per start.

    Raises:
        UserError: even answer by answer a log-prob differs by more than the dtype's rounding, or is nan.
    """
    probes = probe_groups(groups, length_thresholds(policy))
    with own_attention(policy.model):
        plain = [torch.cat([_plain_logps(policy, group, i) for i in range(len(group.answers))]) for group in probes]
    if any(logps.isnan().any() for logps in plain):
        raise UserError(
            f"{type(policy.model).__name__} computes nan from weights that are finite: look for a number in its "
            "config.json that cannot be (rms_norm_eps, rope_parameters, ...)"
        )
    reason = _why_not_packed(replace(policy, shares_prompts=True), probes, plain)
    if not reason:
        return Verdict(shares_prompts=True)
    unshared = replace(policy, shares_prompts=False)
    with own_attention(policy.model):
        difference, row = worst_difference(scores(unshared, probes), plain, probes)
    if not difference <= policy.noise:
        raise UserError(
            f"{type(policy.model).__name__} gives other log-probs than its own forward (row {row}: {difference:.2g} "
            f"nats apart, expected at most {policy.noise:g}): its head is not supported yet"
        )
    return Verdict(shares_prompts=False, reason=reason)


def _why_not_packed(policy: Policy, probes: list[Group], plain: list[Tensor]) -> str:
    """Why the packed log-probs are not the plain ones; empty if they are."""
    for module in policy.model.modules():
        # Llama 4's. It shows in packs of 8,192 tokens alone, which would be a costly probe.
        if getattr(module, "attn_temperature_tuning", None) and not getattr(module, "use_rope", True):
            return f"{type(module).__name__} scales queries by their place in the row, not by position_ids"
    try:
        with packed_attention(policy.model):
            packed = scores(policy, probes)
    except NoLayout:
        return "its attention is not told where answers begin"
    except CannotPack as feature:
        return str(feature)
    difference, row = worst_difference(packed, plain, probes)
    return "" if difference <= policy.noise else f"row {row} differs by {difference:.2g} nats"


def scores(policy: Policy, groups: list[Group]) -> list[Tensor]:
    """Log-probs of each group's answers, from one pack of all."""
    lengths = [sum(len(group.targets(i)) for i in range(len(group.answers))) for group in groups]
    return list(policy.score(pack(groups)).cpu().split(lengths))


def length_thresholds(policy: Policy) -> set[int]:
    """Lengths beyond which a model treats a row in another way, by its configuration."""
    config = policy.model.config.get_text_config()
    windows = {value for name in WINDOWS if type(value := getattr(config, name, None)) is int}
    return windows | ({policy.length_regimes.threshold} if policy.length_regimes else set())


def probe_groups(groups: list[Group], thresholds: set[int]) -> list[Group]:
    """The cheapest group in which a state that leaks from answer to answer would show, else the longest.

    And for each threshold the cheapest groups on both sides of it; if none exceeds it, it changes nothing.
    """

    def longest(group: Group) -> int:
        return len(group.prompt_ids) + max(map(len, group.answers))

    candidates = [group for group in groups if len(group.prompt_ids) and min(map(len, group.answers)) > 1]
    kinds = [[group for group in candidates if group.num_tokens >= CHECKED_TOKENS] or [max(groups, key=_num_tokens)]]
    for threshold in sorted(thresholds):
        beyond = [group for group in candidates if longest(group) > threshold]
        kinds += [beyond, [group for group in candidates if beyond and longest(group) <= threshold]]
    cheapest = [min(kind, key=_num_tokens) for kind in kinds if kind]
    return list({id(group): group for group in cheapest}.values())


def _num_tokens(group: Group) -> int:
    return group.num_tokens


def worst_difference(left: list[Tensor], right: list[Tensor], groups: list[Group]) -> tuple[float, int]:
    """The largest one, nan above all, and the row of its group."""
    found = [((a - b).abs().max().item(), group.row) for a, b, group in zip(left, right, groups, strict=True)]
    return max(found, key=lambda pair: (math.isnan(pair[0]), pair[0]))


def _plain_logps(policy: Policy, group: Group, number: int) -> Tensor:
    """Log-probs of one answer's scored tokens by the model's own forward and torch's log_softmax."""
    answer = group.answers[number]
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, answer]).astype(np.int64)).to(policy.device)
    num_targets = min(len(answer), len(ids) - 1)
    # Logits of a long prompt would take more memory than training does.
    can_cut = "logits_to_keep" in inspect.signature(policy.model.forward).parameters
    options = {"logits_to_keep": num_targets + 1} if can_cut else {}
    if policy.length_regimes is not None:
        policy.length_regimes.forget()
    with policy.autocast():
        logits = policy.model(input_ids=ids[None], use_cache=False, **options).logits[0, -num_targets - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[-num_targets:, None])[:, 0].cpu()
    return logps[torch.from_numpy(group.targets(number)) - (len(answer) - num_targets)]
