"""Five fixed runs, for changes that must change nothing: record them before, compare after, on one machine.

    python tests/golden/runs.py record FILE
    python tests/golden/runs.py compare FILE

A plain run with evaluation, two losses mixed over several packs with 8-bit AdamW, a moving reference, a run that is
resumed, and what `eval`, `score` and `inspect` say of a model that was trained. They go through the command line alone,
so that they do not care where the code is. Figures are compared to the last digit and weights to the bit; both hold for
one machine and one set of versions, so none are committed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from oracle import SENTENCES, save_tiny_checkpoint

TIMES = ("tokens_per_second", "pairs_per_second", "peak_memory_gib")
COMMON = ["--max_length", "64", "--learning_rate", "1e-2", "--logging_steps", "1", "--per_device_train_batch_size", "3"]


def run(folder: Path, *words: str) -> str:
    """What a command prints, in `folder`."""
    command = [sys.executable, "-m", "dpo_fast.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def rows() -> list[dict[str, Any]]:
    """Rows of very different lengths, pairs and ranked answers."""
    words = " ".join(SENTENCES).split()
    pairs = [
        {
            "prompt": " ".join(words[i : i + 1 + 3 * (i % 5)]),
            "chosen": " " + " ".join(words[2 * i : 2 * i + 1 + i]),
            "rejected": " " + " ".join(reversed(words[i : i + 12 - i])),
        }
        for i in range(10)
    ]
    answers = [" fox", " lazy dog", " 0 1 2 3 4"]
    ranked = [{"prompt": words[i], "responses": answers, "scores": [i % 3, 2, 1.5]} for i in range(4)]
    return pairs + ranked


def train(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Figures of a run, and a hash of what it left."""
    store = ["--reference_store", "store.sqlite"]
    run(folder, "train", "--model", "m", "--data", "rows.jsonl", "--output_dir", name, *COMMON, *store, *options)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    metrics = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    weights = (folder / name / "final" / "model.safetensors").read_bytes()
    return {"metrics": metrics, "weights": hashlib.sha256(weights).hexdigest()}


def numbers(text: str) -> list[str]:
    """The numbers in a text, whatever stands between them."""
    return re.findall(r"[-+]?\d+\.\d+", text)


def record() -> dict[str, Any]:
    """All five."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_tiny_checkpoint(folder / "m")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        found["plain"] = train(folder, "plain", "--max_steps", "5", "--eval_split", "0.2", "--eval_steps", "2")
        mixed = ["--loss_type", '["sigmoid", "ipo"]', "--loss_weights", "[1.0, 0.5]", "--pairs", "all"]
        packs = ["--max_tokens_per_batch", "90", "--optim", "adamw_8bit"]
        found["mixed"] = train(folder, "mixed", "--max_steps", "4", *mixed, *packs)
        moving = ["--sync_ref_model", "true", "--ref_model_sync_steps", "2"]
        found["moving"] = train(folder, "moving", "--max_steps", "5", *moving)
        found["whole"] = train(folder, "resumed", "--max_steps", "6", "--save_steps", "3")
        for name in ("checkpoint-6", "final"):
            shutil.rmtree(folder / "resumed" / name)
        resumed = ["--max_steps", "6", "--save_steps", "3", "--resume", "auto"]
        found["resumed"] = train(folder, "resumed", *resumed)
        compared = ["--model", "plain/final", "--reference", "m", "--data", "rows.jsonl"]
        run(folder, "eval", *compared, "--out", "eval.json")
        run(folder, "score", "--model", "plain/final", "--data", "rows.jsonl", "--out", "scores.jsonl", "--tokens")
        found["evaluation"] = {
            "eval": json.loads((folder / "eval.json").read_text()),
            "score": [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()],
            "inspect": numbers(run(folder, "inspect", *compared, "--rows", "[0, 3, 11]")),
        }
    return found


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two records differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}/{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    return [] if old == new else [f"{path}: {old} before, {new} now"]


def main() -> int:
    """Command line."""
    what, file = sys.argv[1], Path(sys.argv[2])
    found = record()
    if what == "record":
        file.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    found_before = json.loads(file.read_text())
    different = differences(found_before, json.loads(json.dumps(found)))
    print("\n".join(different) or "the five runs are the same to the bit")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
