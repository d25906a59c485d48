"""Tables of what fits, by `dpo-fast plan --json`: the part of docs/plan.md between its two markers.

    python benchmarks/plan_tables.py            prints them
    python benchmarks/plan_tables.py --write    writes them to docs/plan.md

A cell is the planned peak in GiB and pairs per second, or a dash if no setting fits; a measured one says so. Only the
cells of one card and all weights can be run by `train`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

from dpo_fast.config import PlanConfig
from dpo_fast.planning.command import run_plan
from dpo_fast.planning.shapes import NAMED
from dpo_fast.training.optimizers import OPTIMIZERS

DOCS = Path(__file__).resolve().parent.parent / "docs" / "plan.md"
BEGIN, END = "<!-- tables by benchmarks/plan_tables.py -->", "<!-- end of tables -->"
CARDS = ("4090-24", "h100-80", "h200-141")
KINDS = {
    "full": {"dtype": "bfloat16", "optim": "adamw_8bit"},
    "lora": {"peft": "lora", "dtype": "bfloat16"},
    "qlora": {"peft": "qlora", "dtype": "bfloat16"},
}
NAMES = {
    "full": "all weights (bf16, 8-bit AdamW)",
    "lora": "LoRA, rank 16 (bf16 weights)",
    "qlora": "QLoRA, rank 16 (4-bit weights)",
}
SHORT = {"none": "", "selective": " s", "full": " f"}
# Peak and speed of `benchmarks/results/h200-step-2026-11-26.json`, at 655 tokens a pair and up to 2,048 tokens a row.
MEASURED = {("llama-3-8b", "full", "h200-141", 1): "81.1 GiB, 10.6 (measured)"}


def cell(model: str, kind: str, card: str, gpus: int) -> str:
    """What the plan says, as `--json` prints it."""
    config = PlanConfig(model=model, gpu=card, gpus=gpus, max_length=2048, json=True, **KINDS[kind])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_plan(config, optimizers=tuple(OPTIMIZERS))
    plan = json.loads(out.getvalue())
    if not plan["fits"]:
        return "–"
    settings = plan["settings"]
    speed = plan["pairs_per_second"]
    mark = SHORT[settings["checkpointing_policy"]] + ("o" if settings["activation_offloading"] else "")
    text = f"{plan['peak_gib']:.0f}, {speed:.0f}{mark}" if speed >= 10 else f"{plan['peak_gib']:.0f}, {speed:.1f}{mark}"
    measured = MEASURED.get((model, kind, card, gpus))
    return f"{text}; {measured}" if measured else text


def tables() -> str:
    """All of them, in Markdown."""
    lines = []
    for kind, title in NAMES.items():
        for gpus in (1, 8):
            can = "`train` runs these" if (kind, gpus) == ("full", 1) else "planned only: `train` cannot run these yet"
            lines += ["", f"**{title}, {gpus} card{'s' * (gpus > 1)}** ({can})", ""]
            lines += ["| | " + " | ".join(CARDS) + " |", "|---" * (1 + len(CARDS)) + "|"]
            for model in NAMED:
                lines.append(f"| {model} | " + " | ".join(cell(model, kind, card, gpus) for card in CARDS) + " |")
    return "\n".join(lines[1:])


def main() -> None:
    """Print the tables or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    made = tables()
    if not parser.parse_args().write:
        print(made)
        return
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
