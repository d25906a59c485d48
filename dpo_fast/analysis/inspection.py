"""`dpo-fast inspect`: which words gained and which lost, token by token, under a policy and its reference.

Of a token, the figure that matters is its log-ratio log p - log ref: DPO's reward is beta times their sum. Of a pair,
the loss is -log sigmoid(beta delta) with delta = (chosen's log-ratio) - (rejected's), Rafailov et al. 2023 (arXiv
2305.18290), eq. 7. So a pair is won by raising the chosen answer, by sinking the rejected one, or by both: see which.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from dpo_fast.analysis.inspection_view import print_row, render_page
from dpo_fast.analysis.token_views import AnswerView, PairView, RowView, TokenView, answer_name, token_pieces
from dpo_fast.analysis.xray import check_settings, parse_rows
from dpo_fast.config import InspectConfig
from dpo_fast.console import say
from dpo_fast.data.load import load_groups
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically
from dpo_fast.model.load import tokenizer_of
from dpo_fast.model.placement import pick_device
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fill import reference_logps
from dpo_fast.reference.scores import AnswerLogps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ROWS = 3


def inspect_rows(config: InspectConfig, *, console: Console | None = None) -> list[RowView]:
    """Show `config.rows` of `config.data` in the terminal and, if `out` is given, on an HTML page.

    Both models' log-probs go through the reference store, one model in memory at a time.

    Raises:
        UserError: a mistake in the settings, or a row that is not there or was left out.
    """
    console = console or Console()
    if not config.reference:
        raise UserError("no reference given: pass --reference with the model that training started from")
    check_settings(config)
    pick_device(config.device)
    tokenizer = tokenizer_of(config)
    groups, report = load_groups(config, tokenizer)
    say(console, report.render())
    groups = _wanted(groups, parse_rows(config.rows), config)
    reference, _ = reference_logps(config, config.reference, groups, console=console)
    policy, _ = reference_logps(config, config.model, groups, console=console)
    views = [
        make_view(group, own, ref, tokenizer, config.beta)
        for group, own, ref in zip(groups, policy, reference, strict=True)
    ]
    for view in views:
        print_row(view, console)
    if config.out is not None:
        page = render_page(views, model=config.model, reference=config.reference, data=config.data, beta=config.beta)
        write_file_atomically(Path(config.out), page)
        say(console, f"page: {config.out}")
    return views


def _wanted(groups: list[Group], rows: list[int] | None, config: InspectConfig) -> list[Group]:
    if rows is None:
        return groups[:SHOWN_ROWS]
    known = {group.row: group for group in groups}
    missing = [row for row in rows if row not in known]
    if missing:
        raise UserError(
            f"--rows: row {missing[0]} of {config.data} is not there or was left out (the report above says why); rows "
            f"are counted from 0, and those that can be shown begin with {', '.join(map(str, list(known)[:5]))}"
        )
    return [known[row] for row in rows]


def make_view(
    group: Group, policy: AnswerLogps, reference: AnswerLogps, tokenizer: PreTrainedTokenizerBase, beta: float
) -> RowView:
    """A row with everything that is shown of it.

    Args:
        group: the row's tokens.
        policy: (A_i,) log-probs of each answer's scored tokens, in nats.
        reference: the same under the reference.
        tokenizer: to read the tokens with.
        beta: factor of the implicit reward.
    """
    answers = [
        _answer(group, number, own, ref, tokenizer)
        for number, (own, ref) in enumerate(zip(policy, reference, strict=True))
    ]
    pairs = [_pair(answers[chosen], answers[rejected], beta) for chosen, rejected in group.pairs]
    prompt = str(tokenizer.decode(group.prompt_ids.tolist(), skip_special_tokens=False))
    return RowView(group.row, prompt, answers, pairs)


def _answer(
    group: Group, number: int, policy: np.ndarray, reference: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> AnswerView:
    ids = group.answers[number].tolist()
    pieces = token_pieces(ids, group.prompt_ids.tolist(), tokenizer)
    targets = group.targets(number).tolist()
    tokens = [
        TokenView(ids[place], pieces[place], float(own), float(ref), "".join(pieces[place + 1 : following]))
        for place, following, own, ref in zip(targets, [*targets[1:], len(ids)], policy, reference, strict=True)
    ]
    first = targets[0] if targets else len(ids)
    return AnswerView(answer_name(group, number), "".join(pieces[:first]), tokens)


def _pair(chosen: AnswerView, rejected: AnswerView, beta: float) -> PairView:
    delta = chosen.log_ratio - rejected.log_ratio
    margin = beta * delta
    # log(1 + e^-x) without overflow.
    loss = max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    return PairView(chosen, rejected, beta, delta, loss)
