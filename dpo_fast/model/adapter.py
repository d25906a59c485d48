"""Low-rank adapters of peft on a transformers model: a new one, one that was read, and the head's weight under one.

peft replaces linear layers in place, so the model itself stays what packs, checkpointing and compilation know; the
`PeftModel` around it is only needed to write, to merge and to add adapters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_fast.errors import UserError
from dpo_fast.model.adapter_folder import ADAPTER_WEIGHTS, AdapterFolder
from dpo_fast.model.adapter_join import join, scale_of, split

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# Names of adapters in a `PeftModel`: one that was read, as peft calls it by default, and the one that is trained.
READ, TRAINED = "default", "trained"


def require_peft(option: str) -> None:
    """Refuse an option that needs peft if it is not installed.

    Raises:
        UserError: it names the extra.
    """
    if find_spec("peft") is None:
        raise UserError(f"{option}: adapters need peft: pip install 'dpo-fast[peft]'")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in a model.

    Attributes:
        peft: peft's view of the model.
        name: of the adapter in it.
        base: model that its file belongs to.
        below: an adapter of that model which is part of the frozen weights; the file holds the sum of both.
        base_fingerprint: of the frozen weights.
        card: README of the written folder.
    """

    peft: PeftModel
    name: str = READ
    base: str = ""
    below: AdapterFolder | None = None
    base_fingerprint: str = ""
    card: str = ""

    @property
    def settings(self) -> LoraConfig:
        """Its configuration."""
        settings: LoraConfig = self.peft.peft_config[self.name]  # type: ignore[assignment]
        return settings

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the adapter under the names that peft gives them in files; no copies."""
        from peft import get_peft_model_state_dict

        found: dict[str, Tensor] = get_peft_model_state_dict(
            self.peft, adapter_name=self.name, save_embedding_layers=False
        )
        return found

    def save(self, folder: Path) -> None:
        """Write weights, configuration and card as peft reads them."""
        settings, weights = copy.deepcopy(self.settings), self.weights()
        targets = set(settings.target_modules or ())
        if self.below is not None:
            lower = self.below.settings
            scale = scale_of(settings.to_dict())
            weights = join(
                *(load_file(self.below.path / ADAPTER_WEIGHTS), weights),
                ranks=(lower["r"], settings.r),
                scales=(scale_of(lower), scale),
            )
            targets |= set(lower["target_modules"])
            settings.r += lower["r"]
            settings.lora_alpha = scale * settings.r  # type: ignore[assignment]
        settings.base_model_name_or_path = self.base
        settings.inference_mode = True
        settings.target_modules = sorted(targets)  # of a set, the order would change from process to process
        settings.save_pretrained(str(folder))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        if self.card:
            (folder / "README.md").write_text(self.card)

    def restore(self, folder: Path) -> None:
        """Copy back what `save` wrote.

        Raises:
            ValueError: names or shapes differ.
        """
        own, saved = self.weights(), load_file(folder / ADAPTER_WEIGHTS)
        if self.below is not None:
            saved = split(saved, set(own), self.below.settings["r"])
        if own.keys() != saved.keys():
            raise ValueError(f"the adapter's tensors differ, such as {min(own.keys() ^ saved.keys())}")
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise ValueError(f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}")
            tensor.detach().copy_(saved[name])


def attach(model: Any, settings: LoraConfig, *, beneath: PeftModel | None = None) -> PeftModel:
    """Put a new adapter on a model, in fp32; everything else is frozen.

    Args:
        model: from `load_model`; changed in place.
        settings: of the adapter.
        beneath: the adapter that the model already has; it stays active and frozen.

    Raises:
        UserError: no layer has a name that `target_modules` asks for.
    """
    from peft import get_peft_model

    try:
        with _without_warnings():
            if beneath is None:
                peft: Any = get_peft_model(model, settings, adapter_name=TRAINED)
            else:
                peft = beneath
                peft.add_adapter(TRAINED, settings)
                peft.base_model.set_adapter([READ, TRAINED])
    except ValueError as error:
        names = sorted({name.rsplit(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--lora_target_modules: {reason}; the model's linear layers: {', '.join(names)}") from error
    refuse_tied_head(model, "--lora_target_modules")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED in name.split("."))
    return peft


def refuse_tied_head(model: Any, named: str) -> None:
    """Refuse an adapter on a head whose weight is also the embedding's: merged, it would change both.

    Raises:
        UserError: it names the option.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(head, "get_base_layer") and head.get_base_layer().weight is getattr(embedding, "weight", None):
        raise UserError(f"{named}: lm_head shares its weight with the embedding; leave lm_head out")


def read_adapter(model: Any, folder: AdapterFolder, named: str) -> PeftModel:
    """Put an adapter on the model that it belongs to, frozen.

    Args:
        model: its base, without an adapter; changed in place.
        folder: of the adapter.
        named: the option that names it, for messages.

    Raises:
        UserError: peft is not installed, or the adapter does not fit the model.
    """
    require_peft(named)
    from peft import PeftConfig, PeftModel

    misfit = f"{named}: an adapter that does not fit {folder.base}"
    try:
        settings = PeftConfig.from_pretrained(str(folder.path))
        settings.inference_mode = True
        with _without_warnings():
            peft = PeftModel(model, settings, adapter_name=READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are refused below
            found = peft.load_adapter(str(folder.path), READ)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # The first line of torch's message is a title, the next one names a tensor and both shapes.
        reason = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
        raise UserError(f"{misfit}: {reason}") from error
    if strange := [*found.missing_keys, *found.unexpected_keys]:
        what = "lacks" if found.missing_keys else "has, and the model does not know,"
        raise UserError(f"{misfit}: it {what} {len(strange)} tensors, such as {strange[0]}")
    return peft


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without what peft says of a name that transformers 5.23 changed, and of tied heads, which are refused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Model .*tie_word_embeddings=True")
        yield


def merged(peft: PeftModel) -> Any:
    """The model with its adapter added to the weights, as if it had never had one.

    Raises:
        UserError: the adapter cannot be added.
    """
    refuse_tied_head(peft.get_base_model(), "the adapter cannot be merged")
    model: Any = peft.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def head_weight(head: Any) -> Tensor:
    """(V, D) weight of an LM head with its active adapters added; differentiable in them."""
    if not hasattr(head, "get_delta_weight"):
        own: Tensor = head.weight
        return own
    weight: Tensor = head.get_base_layer().weight
    if head.disable_adapters or head.merged:
        return weight
    for name in head.active_adapters:
        if name in head.lora_A:
            weight = weight + head.get_delta_weight(name)
    return weight
