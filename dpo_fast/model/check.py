"""Whether packs give a model's own log-probs: the check of every start."""

from __future__ import annotations

import inspect
import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpo_fast.errors import UserError
from dpo_fast.model.attention import CannotPack, NoLayout, use_own_attention, use_packed_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("dpo_fast")
# Names in configurations for how far attention sees.
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")
# Tokens of the group that the packed forward is checked on: enough to show a difference, few enough to cost nothing.
CHECKED_TOKENS = 64


@torch.no_grad()
def check_packed_forward(policy: Policy, groups: list[Group]) -> None:
    """Compare a packed group, and one beyond each window, with the model's own forward, one answer at a time.

    This is what turns an architecture that packs do not fit (a recurrent one, another mask) into answers computed one
    by one, with a warning, and one whose head is another into a message: never a silent wrong answer. It costs one
    short forward a start.

    Raises:
        UserError: even one by one a log-prob differs by more than the dtype's noise.
    """
    telling = _telling_groups(groups, attention_windows(policy.model))
    packed, reason = [], ""
    try:
        packed = [policy.score(pack([group])) for group in telling]
    except NoLayout:
        reason = "its attention is not told where answers begin"
    except CannotPack as feature:
        reason = str(feature)
    use_own_attention(policy.model)
    plain = [
        torch.cat([_plain_logps(policy, group, number) for number in range(len(group.answers))]) for group in telling
    ]
    if packed:
        difference, row = _largest_difference(packed, plain, telling)
        if difference <= policy.noise:
            use_packed_attention(policy.model)
            return
        reason = f"row {row} comes out {difference:.2g} nats off"
    policy.shares_prompts = False
    name = type(policy.model).__name__
    logger.warning(
        "%s cannot share a prompt among answers (%s): each answer is computed with a prompt of its own", name, reason
    )
    difference, row = _largest_difference([policy.score(pack([group])) for group in telling], plain, telling)
    if not difference <= policy.noise:
        raise UserError(
            f"{name} gives other log-probs than its own forward (row {row}: {difference:.2g} nats apart, "
            f"expected at most {policy.noise:g}): its head is not supported yet"
        )


def attention_windows(model: PreTrainedModel) -> set[int]:
    """Lengths beyond which a model's attention may see less than everything, by its configuration."""
    config = model.config.get_text_config()
    return {value for name in WINDOWS if type(value := getattr(config, name, None)) is int}


def _telling_groups(groups: list[Group], windows: set[int]) -> list[Group]:
    """The cheapest group in which a state that leaks from answer to answer would show, else the longest.

    And for each window the cheapest one that does not fit in it: where there is none, it cuts nothing.
    """
    telling = [group for group in groups if len(group.prompt_ids) and min(map(len, group.answers)) > 1]
    kinds = [[group for group in telling if group.num_tokens >= CHECKED_TOKENS] or [max(groups, key=_num_tokens)]]
    for window in sorted(windows):
        kinds.append([group for group in telling if len(group.prompt_ids) + max(map(len, group.answers)) > window])
    cheapest = [min(kind, key=_num_tokens) for kind in kinds if kind]
    return list({id(group): group for group in cheapest}.values())


def _num_tokens(group: Group) -> int:
    return group.num_tokens


def _largest_difference(left: list[Tensor], right: list[Tensor], groups: list[Group]) -> tuple[float, int]:
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
    with policy.autocast():
        logits = policy.model(input_ids=ids[None], use_cache=False, **options).logits[0, -num_targets - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[-num_targets:, None])[:, 0].cpu()
    return logps[torch.from_numpy(group.targets(number)) - (len(answer) - num_targets)]
