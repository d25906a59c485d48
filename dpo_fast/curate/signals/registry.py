"""Signals by name: `--signals` -> functions and models that judge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

import dpo_fast.curate.signals as folder
from dpo_fast.config import SignalConfig
from dpo_fast.curate.identity import Identity
from dpo_fast.curate.signals.declare import SIGNALS, Declaration, RowSignal
from dpo_fast.curate.signals.served import ServedSignal
from dpo_fast.curate.verdict import TextSignal
from dpo_fast.errors import UserError

for _module in iter_modules(folder.__path__, f"{folder.__name__}."):
    if _module.name != __name__:
        import_module(_module.name)


@dataclass(frozen=True)
class Signal:
    """A signal with its argument and weight.

    Attributes:
        spec: as the user wrote it.
        weight: factor in the sum.
        declaration: what is known of its kind.
        of_text: judges one answer; None for a row signal.
        of_rows: judges many rows; None for a text signal.
    """

    spec: str
    weight: float
    declaration: Declaration
    of_text: TextSignal | None = None
    of_rows: RowSignal | ServedSignal | None = None

    @property
    def argument(self) -> str:
        """What follows its name."""
        return self.spec.partition(":")[2]

    @property
    def identity(self) -> Identity:
        """Hashes of the files or the model that its scores depend on; None if there are none.

        Raises:
            UserError: a file cannot be read.
        """
        return self.declaration.identity and self.declaration.identity(self.argument)


def known_signals() -> str:
    """How every signal is written, in alphabetical order: `command:PROGRAM ARG..., compiles:python, ...`."""
    return ", ".join(usage for name in sorted(SIGNALS) for usage in SIGNALS[name].usages)


def parse_signals(config: SignalConfig) -> list[Signal]:
    """The signals that a configuration names, with their weights. No model is loaded yet.

    Raises:
        UserError: none is named, one is unknown or cannot be built, or the weights do not fit.
    """
    specs = [config.signals] if isinstance(config.signals, str) else list(config.signals)
    specs = [spec for spec in specs if spec]
    if not specs:
        raise UserError(f"no signals given: pass --signals with one or a list of {known_signals()}")
    if repeated := sorted({spec for spec in specs if specs.count(spec) > 1}):
        raise UserError(f"--signals {repeated[0]}: named twice; to count it more, use --signal_weights")
    weights = [1.0] * len(specs) if config.signal_weights is None else config.signal_weights
    if len(weights) != len(specs) or not all(map(math.isfinite, weights)):
        raise UserError(f"--signal_weights {weights}: expected {len(specs)} numbers, one for each of {specs}")
    return [_build(spec, weight, config) for spec, weight in zip(specs, weights, strict=True)]


def _build(spec: str, weight: float, config: SignalConfig) -> Signal:
    name, _, argument = spec.partition(":")
    declaration = SIGNALS.get(name)
    if declaration is None:
        raise UserError(f"--signals {spec}: unknown; choose from {known_signals()}")
    of_text = declaration.build_text and declaration.build_text(argument, config)
    of_rows = declaration.build_rows and declaration.build_rows(argument, config)
    return Signal(spec, weight, declaration, of_text, of_rows)
