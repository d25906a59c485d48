"""Bytes at the peak of an optimizer step.

P parameters, P_l of them in matrices of the L layers, w bytes a weight, c bytes a number in a product, T tokens of a
pack, K of its rows of keys, N targets, D hidden, F intermediate, q = H·d, k = H_kv·d, V vocabulary.

**Weights, gradients, state.** w·P, w·P' and s·P' with P' trainable parameters; s is the optimizer's (`measured.py`).
LoRA of rank r adds r·(in + out) fp32 parameters a matrix. QLoRA's base takes 4 bits a weight and 0.127 for its doubly
quantized scales (Dettmers et al., "QLoRA", 2023, arXiv:2305.14314, section 3).

**Activations** are what autograd keeps, read off transformers' modules with `saved_tensors_hooks`; per token and layer:

    norm            bf16 weights: x in fp32, normalized in bf16, 4D + 2D; fp32 weights: 4D + 4D
    its output      input of the products after it, c·D for the first and the second norm; under autocast one copy for
                    each product, 3·2D and 2·2D
    query norm      as a norm, of q + k numbers
    attention       q, keys and values gathered for all segments (K/T rows per token), output, logsumexp:
                    c·q + 2c·k·K/T + c·q + 4H; a CPU also keeps each segment's own output, c·q, and a mask per answer
    MLP             gate, its activation, up, their product: 4·c·F; without gate 2·c·F

Outside of the layers: the last norm, rotary tables, target rows, and the exponentials that the head keeps (2NV bytes
on a GPU, 4NV on a CPU, up to its budget). Autocast keeps a bf16 copy of every matrix from the forward to the backward,
with checkpointing only to the end of the forward. A frozen weight needs no input: 2D less
per norm. Its adapter, in fp32 as peft makes it, keeps an fp32 copy of the input of each matrix instead, and 4r.

**Checkpointing.** `full` keeps the input of each layer (D numbers; none with offloading) and recomputes one layer at a
time. `selective` also keeps the results of products and attention: 2q + 2k + 2D + 2F numbers and logsumexp.

**The peak** is the highest of five moments, since gradients appear as activations go:

    forward    its end: all activations, autocast's copies
    head       the head's backward: all activations, exponentials, the gradient of the head's weight
    layer      the last layer's backward: all activations, that layer recomputed, the gradients that it passes through
    first      the first layer's backward: its activations, the gradients of all later ones
    end        all gradients; those of a tied head and embedding, and their sum, at the same time

From the second pack of a step on, all gradients are there at every moment.

**Sharded over G GPUs (FSDP2)**: weights, gradients and state are cut by G. Whole in the compute dtype at any time are
the weights of two layers (this one's, and the next one's, prefetched), the gradient of one, and the root's (embedding,
head) from the forward to the backward: `fully_shard`'s defaults (PyTorch's FSDP2 tutorial). 4-bit weights are whole
on every GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from dpo_fast.planning.measured import OPTIMIZERS
from dpo_fast.planning.setting import PackLoad, Setting
from dpo_fast.planning.shapes import ModelShape

GIB = 2**30
# Bits of a 4-bit weight with its share of the scales.
BITS_4 = 4.127
# Exponentials of a block that are not kept: BLOCK_BYTES of `kernels/linear_logprob_gpu.py`, and TILE on a CPU.
GPU_BLOCK, CPU_TILE = 512 * 2**20, 8 * 2**20
# fp32 sums of rows pass through a norm's backward: x, its gradient and their products.
NORM_BACKWARD = 4


@dataclass(frozen=True)
class Parts:
    """Bytes of a device at the peak, by what they hold.

    Attributes:
        weights: parameters, and under autocast their bf16 copies.
        gradients: those that exist at the peak.
        state: the optimizer's.
        activations: what autograd keeps, and what a backward passes through.
        head: kept exponentials and the target rows.
        packs: token ids, positions, indices.
        sharding: whole weights and gradients of layers whose shards are gathered.
    """

    weights: float = 0
    gradients: float = 0
    state: float = 0
    activations: float = 0
    head: float = 0
    packs: float = 0
    sharding: float = 0

    @property
    def total(self) -> float:
        """Bytes."""
        return float(sum(asdict(self).values()))

    def gib(self) -> dict[str, float]:
        """GiB by name."""
        return {field.name: getattr(self, field.name) / GIB for field in fields(self)}


def peak(
    shape: ModelShape,
    setting: Setting,
    load: PackLoad,
    *,
    with_state: bool = True,
    with_gradients: bool = False,
) -> Parts:
    """The parts at the peak of a step whose largest pack holds `load`.

    Args:
        shape: of the model.
        setting: how it is trained.
        load: of the pack.
        with_state: whether the optimizer's state exists; a run's first backward comes before it.
        with_gradients: whether an earlier pack of the step left its gradients.
    """
    moments = _moments(shape, setting, load, with_state=with_state, with_gradients=with_gradients)
    return max(moments, key=lambda parts: parts.total)


def _moments(
    shape: ModelShape, setting: Setting, load: PackLoad, *, with_state: bool, with_gradients: bool
) -> list[Parts]:
    weights = weight_bytes(shape, setting)
    gradients = gradient_bytes(shape, setting)
    state = trainable_parameters(shape, setting) * state_bytes(setting) / setting.shards
    every_copy = 2.0 * shape.linear_parameters / setting.shards if setting.autocast else 0.0
    copies = every_copy if setting.policy == "none" else every_copy / shape.layers
    head_copy = 2.0 * shape.head_parameters if setting.autocast else 0.0
    kept = kept_activations(shape, setting, load)
    one_layer = layer_activations(shape, setting, load) if setting.policy != "none" else 0.0
    recomputed = max(0.0, one_layer - kept_by_layer(shape, setting, load)) if setting.policy != "none" else 0.0
    accumulated = gradients if with_gradients else 0.0
    # Ids and positions; keys and their way back; targets and their rows: int64.
    packs = 16.0 * (load.tokens + load.keys + load.targets)
    common = {"packs": packs, "sharding": sharded_bytes(shape, setting)}
    during = common | {"weights": weights + copies + head_copy, "state": state if with_state else 0.0}
    of_head = 0.0 if setting.peft != "none" else head_gradient(shape, setting) / setting.shards
    forward = Parts(
        **during | {"weights": weights + every_copy},
        gradients=accumulated,
        activations=kept,
    )
    head = Parts(
        **during,
        gradients=accumulated + of_head,
        activations=kept,
        head=head_bytes(shape, setting, load),
    )
    layer = Parts(
        **during,
        gradients=accumulated + of_head + gradients / max(shape.layers, 1) / 2,
        activations=kept + recomputed + passing(shape, setting, load),
        head=rows_bytes(shape, setting, load),
    )
    first = Parts(
        **common,
        weights=weights + head_copy,
        state=state if with_state else 0.0,
        gradients=gradients * (1 - 1 / shape.layers),
        activations=layer_activations(shape, setting, load) + passing(shape, setting, load),
    )
    tied = 2 * head_gradient(shape, setting) if shape.is_tied and setting.peft == "none" else 0.0
    end = Parts(
        **common,
        weights=weights + head_copy,
        state=state,
        gradients=gradients + tied / setting.shards,
        activations=setting.compute_bytes * shape.hidden * load.tokens,
    )
    return [forward, head, layer, first, end]


def adapter_parameters(shape: ModelShape, setting: Setting) -> int:
    """r·(in + out) for every matrix of the layers."""
    mlp = (3 if shape.has_gate else 2) * (shape.hidden + shape.intermediate)
    attention = 2 * (shape.hidden + shape.queries) + 2 * (shape.hidden + shape.keys)
    return setting.lora_r * shape.layers * (mlp + attention) if setting.peft != "none" else 0


def trainable_parameters(shape: ModelShape, setting: Setting) -> int:
    """P'."""
    return adapter_parameters(shape, setting) if setting.peft != "none" else shape.num_parameters


def weight_bytes(shape: ModelShape, setting: Setting) -> float:
    """Of all weights on one device, adapters included."""
    rest = shape.num_parameters - shape.linear_parameters
    if setting.peft == "qlora":
        by_linear = shape.linear_parameters * BITS_4 / 8
        return by_linear + setting.weight_bytes * rest + 4 * adapter_parameters(shape, setting)
    width = setting.weight_bytes
    models = 2 if setting.moving_reference else 1
    return (width * models * shape.num_parameters + 4 * adapter_parameters(shape, setting)) / setting.shards


def gradient_bytes(shape: ModelShape, setting: Setting) -> float:
    """Of all gradients on one device."""
    width = 4 if setting.peft != "none" else setting.weight_bytes
    shards = 1 if setting.peft == "qlora" else setting.shards
    return width * trainable_parameters(shape, setting) / shards


def head_gradient(shape: ModelShape, setting: Setting) -> float:
    """Of the head's weight, whole."""
    return float(setting.weight_bytes * shape.head_parameters)


def state_bytes(setting: Setting) -> float:
    """Of the optimizer, a trainable parameter."""
    optimizer = OPTIMIZERS[setting.optim]
    width = 4 if setting.peft != "none" else setting.weight_bytes
    return optimizer.state_bytes_fp32 if width == 4 else optimizer.state_bytes_bf16


def layer_activations(shape: ModelShape, setting: Setting, load: PackLoad) -> float:
    """What autograd keeps of one layer."""
    c, tokens = setting.compute_bytes, load.tokens
    frozen = setting.peft != "none"
    half = setting.weight_bytes == 2 or frozen
    norm = (shape.norm_bytes if half else 8) - (2 if frozen and shape.norm_bytes == 6 else 0)
    norms = norm * (shape.norms * shape.hidden + (shape.queries + shape.keys if shape.has_query_norm else 0))
    products = 3 + (2 if shape.has_gate else 1)
    inputs = c * (products if setting.autocast else 2) * shape.hidden
    mlp = (4 if shape.has_gate else 2) * c * shape.intermediate
    attention = c * 2 * shape.queries + 4 * shape.heads
    if frozen:
        ranks = 4 * setting.lora_r * (products + 2)
        inputs = 4 * (products * shape.hidden + shape.queries + shape.intermediate) + ranks
        mlp -= c * shape.intermediate
    by_token = norms + inputs + attention + mlp
    by_key = 2 * c * shape.keys
    on_cpu = (c * shape.queries * tokens + c * load.masked) if setting.on_cpu else 0.0
    return by_token * tokens + by_key * load.keys + on_cpu


def kept_by_layer(shape: ModelShape, setting: Setting, load: PackLoad) -> float:
    """What stays of one layer until its backward."""
    c = setting.compute_bytes
    residual = setting.weight_bytes if setting.peft == "none" else 2
    inputs = 0.0 if setting.offload and not setting.on_cpu else residual * shape.hidden * load.tokens
    if setting.policy == "none":
        return layer_activations(shape, setting, load)
    if setting.policy == "full":
        return inputs
    mlp = (2 if shape.has_gate else 1) * shape.intermediate
    products = c * (2 * shape.queries + 2 * shape.keys + 2 * shape.hidden + mlp) + 4 * shape.heads
    return inputs + products * load.tokens


def kept_activations(shape: ModelShape, setting: Setting, load: PackLoad) -> float:
    """What autograd keeps of the whole decoder."""
    last_norm = (6 if setting.weight_bytes == 2 else 8) * shape.hidden
    rotary = 2 * setting.weight_bytes * shape.head_dim
    return shape.layers * kept_by_layer(shape, setting, load) + (last_norm + rotary) * load.tokens


def passing(shape: ModelShape, setting: Setting, load: PackLoad) -> float:
    """What the backward of one layer passes through: the gradients of an MLP's inner numbers and of the residual."""
    inner = 3 if shape.has_gate else 2
    width = setting.compute_bytes
    return load.tokens * (inner * width * shape.intermediate + (width + NORM_BACKWARD) * shape.hidden)


def rows_bytes(shape: ModelShape, setting: Setting, load: PackLoad) -> float:
    """The target rows."""
    return setting.compute_bytes * shape.hidden * load.targets


def head_bytes(shape: ModelShape, setting: Setting, load: PackLoad) -> float:
    """Target rows and their gradient, exponentials, and what the gradient of the head's weight is summed in."""
    width = 4 if setting.on_cpu or setting.compute_bytes == 4 else 2
    rows = rows_bytes(shape, setting, load) + (4 if setting.on_cpu else width) * shape.hidden * load.targets
    wanted = float(width * shape.vocab * load.targets)
    if setting.peft != "none":
        return rows + min(wanted, CPU_TILE if setting.on_cpu else min(GPU_BLOCK, width * 1024 * shape.vocab))
    block = CPU_TILE if setting.on_cpu else GPU_BLOCK
    fits = wanted <= setting.head_budget
    exponentials = wanted if fits else max(float(setting.head_budget), min(wanted, block))
    # Several blocks are summed in fp32 and rounded at the end.
    sums = 0.0 if fits or setting.on_cpu or width == 4 else 4.0 * shape.head_parameters
    cast = 2.0 * shape.head_parameters if setting.autocast else 0.0
    return rows + exponentials + sums + cast


def sharded_bytes(shape: ModelShape, setting: Setting) -> float:
    """Whole weights and gradients of layers that are gathered."""
    if not setting.sharded or setting.gpus == 1:
        return 0.0
    root = (1 if shape.is_tied else 2) * shape.head_parameters
    if setting.peft == "qlora":
        return 0.0
    gathered = 2.0 * (2 * shape.layer_parameters + root)
    gradient = 0.0 if setting.peft != "none" else 2.0 * (shape.layer_parameters + root)
    return gathered + gradient
