"""Seconds of an optimizer step, from a roofline: flop over the card's products, bytes over its bandwidth.

Names as in `memory.py`; P_a the parameters in matrices that a token is multiplied with. Efficiencies are in
`measured.py`.

    products      6·P_a·T flop (2 forward, 2 for the input's gradient, 2 for the weight's, which a frozen weight leaves
                  out) and 6·N·V·D of the head (4 if frozen); `full` checkpointing repeats 2·P_a·T,
                  and a moving reference takes 2 of each
    attention     4·q flop a score forward, 10·q backward; tiles of 128 x 128 scores are computed whole
    elementwise   bytes read and written by what is neither, counted operator by operator in transformers' modules in
                  bf16: (36·norms + 12)·D + 24·(q + k) + 10·F forward, (80·norms + 30)·D + 30·(q + k) + 18·F backward;
                  under autocast or in fp32 the residual stream and norms are wider: half as much again for D
    casts         autocast casts every matrix once a pack and its gradient back: 12·P_l bytes
    4-bit         a weight is written out in bf16 forward and backward: 2·(2.5·P_l) bytes
    optimizer     its measured time a parameter; clipping reads a gradient twice and writes it once
    launches      the host's time between kernels
    offloading    c·D·T·L bytes to the host and back, not overlapped
    links         FSDP2 gathers 2·P bytes twice a pack and reduces them once, DDP reduces gradients once a step;
                  overlapped with products, so only what is longer counts

On a CPU all of it is products: its rate includes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dpo_fast.planning import measured
from dpo_fast.planning.hardware import CARDS, Card
from dpo_fast.planning.memory import gradient_bytes, trainable_parameters
from dpo_fast.planning.setting import TILE, PackLoad, Setting
from dpo_fast.planning.shapes import ModelShape


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by what they go to."""

    products: float = 0
    attention: float = 0
    elementwise: float = 0
    optimizer: float = 0
    launches: float = 0
    offloading: float = 0
    links: float = 0

    @property
    def total(self) -> float:
        """Seconds."""
        return float(sum(asdict(self).values()))


def step_time(shape: ModelShape, setting: Setting, card: Card, packs: Sequence[PackLoad]) -> StepTime:
    """The time of a step of one GPU, which computes these packs."""
    products = sum(_product_flop(shape, setting, pack) for pack in packs)
    scores = 4 * shape.queries * shape.layers * (1 + 2.5 + (setting.policy == "full"))
    if card.is_cpu:
        flop = products + sum(scores * pack.scores for pack in packs)
        return StepTime(products=flop / (1e12 * card.tflops))
    bytes_per_second = 1e9 * card.bandwidth
    product_time = products / (1e12 * card.tflops * measured.PRODUCTS)
    elementwise = sum(_elementwise_bytes(shape, setting, pack) for pack in packs)
    clipping = 3 * gradient_bytes(shape, setting) / (bytes_per_second * measured.CLIPPING)
    recomputed = 1.5 if setting.policy == "full" else 1.2 if setting.policy == "selective" else 1.0
    offloaded = setting.compute_bytes * shape.hidden * shape.layers * sum(pack.tokens for pack in packs)
    return StepTime(
        products=product_time,
        attention=sum(scores * TILE**2 * pack.tiles for pack in packs) / (1e12 * card.tflops * measured.ATTENTION),
        elementwise=elementwise / (bytes_per_second * measured.ELEMENTWISE) + clipping,
        optimizer=_optimizer_time(shape, setting, card),
        launches=measured.SECONDS_PER_LAUNCH * measured.LAUNCHES_PER_LAYER * shape.layers * recomputed * len(packs),
        offloading=2 * offloaded / (1e9 * card.host_link * measured.LINK) if setting.offload else 0.0,
        links=max(0.0, _link_time(shape, setting, card, len(packs)) - product_time),
    )


def _product_flop(shape: ModelShape, setting: Setting, pack: PackLoad) -> float:
    frozen = setting.peft != "none"
    of_layers = (4 if frozen else 6) + (2 if setting.policy == "full" else 0)
    of_head = 4 if frozen else 6
    if setting.moving_reference:
        of_layers, of_head = of_layers + 2, of_head + 2
    return of_layers * shape.active_parameters * pack.tokens + of_head * shape.head_parameters * pack.targets


def _elementwise_bytes(shape: ModelShape, setting: Setting, pack: PackLoad) -> float:
    rotated = shape.queries + shape.keys
    forward = (36 * shape.norms + 12) * shape.hidden, 24 * rotated + 10 * shape.intermediate
    backward = (80 * shape.norms + 30) * shape.hidden, 30 * rotated + 18 * shape.intermediate
    repeats = 1 if setting.policy == "none" else 2
    is_wide = setting.autocast or setting.weight_bytes == 4
    stream, inner = (repeats * f + b for f, b in zip(forward, backward, strict=True))
    width = setting.compute_bytes / 2
    by_token = shape.layers * ((1.5 if is_wide else 1) * stream + width * inner)
    casts = 12 * shape.linear_parameters if setting.autocast else 0
    dequantized = 5 * shape.linear_parameters if setting.peft == "qlora" else 0
    return by_token * pack.tokens + casts + dequantized


def _optimizer_time(shape: ModelShape, setting: Setting, card: Card) -> float:
    optimizer = measured.OPTIMIZERS[setting.optim]
    is_fp32 = setting.weight_bytes == 4 or setting.peft != "none"
    each = (optimizer.ms_fp32 if is_fp32 else optimizer.ms_bf16) * 1e-12
    scale = CARDS[measured.OPTIMIZER_CARD].bandwidth / card.bandwidth
    return each * scale * trainable_parameters(shape, setting) / setting.shards


def _link_time(shape: ModelShape, setting: Setting, card: Card, num_packs: int) -> float:
    if setting.gpus == 1:
        return 0.0
    share = (setting.gpus - 1) / setting.gpus
    rate = 1e9 * card.link * measured.LINK
    if setting.sharded:
        return 3 * 2 * shape.num_parameters * share * num_packs / rate
    return 2 * gradient_bytes(shape, setting) * share / rate
