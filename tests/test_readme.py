"""The Python code in README and docs runs exactly as printed."""

import re
from pathlib import Path

import pytest
import torch
from oracle import save_tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.slow
def test_train_block(tmp_path, monkeypatch):
    (block,) = [b for b in BLOCKS if "train(" in b]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny_checkpoint(tmp_path / "my-model")
    row = '{"prompt": "Name a capital.", "chosen": " Paris.", "rejected": " I like trains."}\n'
    (tmp_path / "pairs.jsonl").write_text(row * 2)
    names = {}
    exec(block, names)
    assert names["result"].step == 3
    assert names["result"].model_dir.samefile("runs/first/final")


def test_head_blocks():
    hidden, target = torch.randn(4, 6, 8, requires_grad=True), torch.randint(0, 20, (4, 6))
    head, ref_head = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8)
    blocks = {word: b for word in ("linear_logprob", "FusedLinearDPOLoss") for b in BLOCKS if f"import {word}" in b}
    names = {"hidden": hidden[0], "lm_head_weight": head, "target": target[0]}
    exec(blocks["linear_logprob"], names)
    want = (hidden[0] @ head.t()).log_softmax(-1).gather(1, target[0, :, None])[:, 0]
    torch.testing.assert_close(names["logps"], want, rtol=1e-5, atol=1e-5)
    ref_hidden = torch.randn(4, 6, 8)
    ref_logps = (ref_hidden @ ref_head.t()).log_softmax(-1).gather(2, target[..., None])[..., 0].sum(1)
    first, second = blocks["FusedLinearDPOLoss"].rsplit("loss, metrics", 1)
    names = {
        **{"hidden": hidden, "lm_head_weight": head, "target": target},
        **{"ref_hidden": ref_hidden, "ref_head_weight": ref_head, "ref_logps": ref_logps},
        **{"packed_hidden": hidden.flatten(0, 1), "packed_target": target.flatten()},
        "cu_seqlens": torch.arange(0, 25, 6),
    }
    exec(first, names)
    padded = names["loss"]
    exec("loss, metrics" + second, names)
    torch.testing.assert_close(names["loss"], padded, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_curate_block(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "curate.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint(tmp_path / "my-model")
    names = {}
    exec(block, names)
    assert set(names["pairs"].column_names) >= {"prompt", "chosen", "rejected"}
    assert len(names["samples"]) == 2


def test_signals_block():
    first, own = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "signals.md").read_text(), re.S)
    names = {}
    exec(first, names)
    assert str(names["labelled"]["scores"][:]) in first
    exec(own, names)
    assert names["brevity"]("ab", {"prompt": "abcd"}) == -0.5


def test_the_line_that_architecture_quotes_is_in_the_code():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    (line,) = re.findall(r"`(hidden\.append\(.*\))`", page)
    assert f"    {line}\n" in (ROOT / "dpo_fast" / "packs" / "layout.py").read_text()
