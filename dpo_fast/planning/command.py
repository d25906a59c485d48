"""`dpo-fast plan`: whether a run fits and what it costs, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dpo_fast.config import DPOConfig, PlanConfig
from dpo_fast.errors import UserError
from dpo_fast.planning import hardware, view
from dpo_fast.planning.choose import Free, Planned, choose, ways_out
from dpo_fast.planning.forecast import asked_policy, asked_setting
from dpo_fast.planning.hardware import GIB, Card
from dpo_fast.planning.shapes import NAMED, ModelShape, named_config, shape_of
from dpo_fast.planning.workload import RowWorkload, TypicalWorkload, Workload

# Next-best settings that are shown.
SHOWN = 6


def run_plan(config: PlanConfig, *, optimizers: tuple[str, ...], console: Console | None = None) -> dict[str, Any]:
    """Plan, print and draw.

    Args:
        config: of the run, and where.
        optimizers: that `train` has.
        console: for output.

    Returns:
        What `--json` prints.
    """
    console = console or Console()
    check_plan_config(config)
    card = hardware.card(config.gpu) if config.gpu else _card_here(config.device)
    shape = model_shape(config)
    workload = make_workload(config)
    gpus = max(config.gpus, config.nproc)
    setting = asked_setting(config, card, _max_tokens(config, card, workload))
    setting = replace(setting, gpus=gpus, sharded=gpus > 1 and config.parallel == "fsdp")
    asked = Planned(shape, setting, card, workload)
    free = Free(
        policy=asked_policy(config) is None,
        max_tokens=config.max_tokens_per_batch is None,
        precision=_is_default(config, "dtype") and _is_default(config, "optim"),
        sharding=config.parallel == "auto",
        optimizers=optimizers,
    )
    planned, others = choose(asked, free)
    report = as_json(config, planned, others[:SHOWN], asked)
    if config.json:
        print(json.dumps(report, indent=1))
    else:
        view.show(console, planned, others[:SHOWN], asked=asked)
        if not planned.fits:
            view.show_ways_out(console, planned, ways_out(asked, free), larger_cards(asked, free))
        if "hours" in report:
            console.print(f"{report['hours']:.3g} hours for {report['steps']} steps (planned)", highlight=False)
    if config.out:
        view.draw(planned, others[:SHOWN], Path(config.out))
    return report


def check_plan_config(config: PlanConfig) -> None:
    """Refuse what no plan can have."""
    if config.out and Path(config.out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {config.out}: expected a .png, .svg or .pdf file")


def model_shape(config: PlanConfig) -> ModelShape:
    """The sizes of a checkpoint, a Hub model or one of the shapes that are built in."""
    from dpo_fast.model.load import config_of

    model = config.model
    if model.lower() in NAMED and not Path(model).exists():
        return shape_of(named_config(model.lower()), model.lower())
    if not model:
        raise UserError(f"no model given: pass --model with a checkpoint, a Hub name or one of {', '.join(NAMED)}")
    return shape_of(config_of(config), model)


def make_workload(config: DPOConfig) -> Workload:
    """The rows of `--data`, or typical pairs."""
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if not config.data:
        return TypicalWorkload(rows, config.max_length)
    from dpo_fast.data.load import load_groups
    from dpo_fast.model.load import tokenizer_of

    groups, _ = load_groups(config, tokenizer_of(config))
    return RowWorkload(groups, rows_per_step=rows, seed=config.seed, static_shapes=config.static_shapes)


def larger_cards(asked: Planned, free: Free) -> list[str]:
    """Cards that hold what was asked for, or the same results."""
    cards = [card.name for card in hardware.CARDS.values() if card.memory > asked.card.memory]
    return [name for name in cards if choose(replace(asked, card=hardware.CARDS[name]), free)[0].fits]


def as_json(config: PlanConfig, planned: Planned, others: list[Planned], asked: Planned) -> dict[str, Any]:
    """The object that `--json` prints."""
    report = _facts(planned) | {
        "model": planned.shape.name,
        "parameters": planned.shape.num_parameters,
        "gpu": planned.card.name,
        "gpus": planned.setting.gpus,
        "memory_gib": planned.card.memory / GIB,
        "pairs_per_day": 86_400 * planned.pairs_per_second,
        "fits_as_set": asked.fits,
        "train_lacks": planned.missing,
        "basis": "planned",
        "others": [_facts(other) for other in others],
    }
    if isinstance(planned.workload, RowWorkload):
        pairs = planned.workload.pairs_per_step * planned.setting.gpus
        epochs = planned.workload.num_pairs / pairs
        steps = config.max_steps if config.max_steps > 0 else round(config.num_train_epochs * epochs + 0.5)
        report |= {"steps": steps, "hours": steps * planned.time.total / 3600}
    return report


def _facts(planned: Planned) -> dict[str, Any]:
    return {
        "fits": planned.fits,
        "peak_gib": planned.parts.total / GIB,
        "parts_gib": view.parts_gib(planned),
        "step_seconds": planned.time.total,
        "parts_seconds": dict(vars(planned.time)),
        "pairs_per_second": planned.pairs_per_second,
        "settings": planned.options,
    }


def _card_here(device: str) -> Card:
    is_gpu = torch.cuda.is_available() and device != "cpu"
    return hardware.this_card(torch.device("cuda" if is_gpu else "cpu"))


def _max_tokens(config: PlanConfig, card: Card, workload: Workload) -> int:
    """The budget that `train` would take on that card."""
    from dpo_fast.packs.budget import budget_of, full_pack_of

    full = full_pack_of(None if card.is_cpu else card.memory)
    return budget_of(config, workload.longest, pairs=config.per_device_train_batch_size, full=full)


def _is_default(config: PlanConfig, name: str) -> bool:
    default = next(field.default for field in fields(PlanConfig) if field.name == name)
    return bool(getattr(config, name) == default)
