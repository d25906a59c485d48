"""Broken and foreign models: one line each, and nothing of theirs is run."""

import json
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
from oracle import as_policy, save_tiny_checkpoint, tiny_llama
from safetensors.torch import load_file, save_file

from dpo_fast.cli import main
from dpo_fast.config import ModelConfig
from dpo_fast.errors import UserError
from dpo_fast.files import write_folder_atomically
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.load import load_model, load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_checkpoint(tmp_path / "m")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def weights(change):
    return lambda folder: edit_weights(folder, change)


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def missing_shard(folder):
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def poison(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan


def renamed(tensors):
    for name in list(tensors):
        tensors[f"foo.{name}"] = tensors.pop(name)


UP = "model.layers.0.mlp.up_proj.weight"
FAULTS = {
    "a layer's weight is missing": (weights(lambda w: w.pop(UP)), rf"lacks 1 tensors, which would be random: {UP}"),
    "a layer is missing": (config(num_hidden_layers=3), r"lacks 9 tensors, .*model\.layers\.2\..*num_hidden_layers"),
    "all are named otherwise": (weights(renamed), "lacks 2[01] tensors"),
    "another vocabulary": (config(vocab_size=328), "its tensors have other shapes than its config.json says"),
    "other heads": (config(num_key_value_heads=4), "its tensors have other shapes"),
    "not a number": (weights(poison), r"1 tensors hold nan or infinity: model\.layers\.1\.mlp\.up_proj\.weight"),
    "cut": (cut(WEIGHTS, 5000), "cannot load its weights: SafetensorError"),
    "empty": (write(WEIGHTS, b""), "cannot load its weights: SafetensorError"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"no file named model\.safetensors"),
    "a shard is missing": (missing_shard, "cannot load its weights"),
    "pickled": (pickled, "its weights are pickled .*Convert them"),
    "config is a list": (write("config.json", b"[]"), "cannot load its configuration"),
    "config is no JSON": (write("config.json", b"{"), "cannot load its configuration"),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), "cannot load its configuration"),
    "no heads": (config(num_attention_heads=0), "ZeroDivisionError|num_attention_heads 0"),
    "negative layers": (config(num_hidden_layers=-1), "num_hidden_layers -1; expected a number above 0"),
    "no vocabulary": (config(vocab_size=0), "vocab_size 0; expected"),
    "layers as text": (config(num_hidden_layers="two"), "num_hidden_layers|cannot load its configuration"),
    "a hidden size between": (config(hidden_size=33), "cannot load its (configuration|weights)"),
    "unknown kind": (config(model_type="nope"), "cannot load its configuration: .*nope"),
    "unknown activation": (config(hidden_act="zzz"), "cannot load its weights: KeyError"),
    "unknown rotary": (config(rope_parameters={"rope_type": "x"}), "cannot load its (configuration|weights)"),
    "negative width": (config(intermediate_size=-4), "cannot load its weights: RuntimeError"),
    "padding beyond": (config(pad_token_id=10**9), "cannot load its weights"),
    "quantized": (config(quantization_config={"quant_method": "fp8"}), r"its weights are quantized \(fp8\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_model_is_one_line(fault, folder):
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        Policy.load(ModelConfig(model=str(folder)))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--model {folder}: ")


@pytest.mark.filterwarnings("ignore")
def test_unused_weights_are_said(folder, caplog):
    edit_weights(folder, lambda tensors: tensors.update({"v_head.weight": torch.zeros(3)}))
    with caplog.at_level(logging.WARNING, "dpo_fast"):
        load_model(str(folder), torch.float32)
    assert "1 tensors of its file are not used: v_head.weight" in caplog.text


def test_a_model_of_ours_is_checked_against_its_manifest(tmp_path, folder):
    final = write_folder_atomically(tmp_path / "final", lambda to: save_tiny_checkpoint(to))
    load_model(str(final), torch.float32)
    (final / "notes.txt").write_text("added later")
    load_model(str(final), torch.float32)
    data = bytearray((final / WEIGHTS).read_bytes())
    data[-20] ^= 4
    (final / WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match=r"damaged since it was saved: model\.safetensors: its contents changed"):
        load_model(str(final), torch.float32)
    (folder / "manifest.json").write_text('{"of": "another tool"}')
    load_model(str(folder), torch.float32)


EVIL = "raise SystemExit('code of the model was run')\n"


@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
@pytest.mark.parametrize("command", ["train", "score", "sample", "label"])
@pytest.mark.filterwarnings("ignore")
def test_code_of_a_model_is_not_run_and_nothing_is_asked(kind, command, folder, tmp_path, monkeypatch, capsys):
    """Whatever stdin would answer: the repository's code is refused by name, or not needed."""
    (folder / "evil.py").write_text(EVIL)
    if kind == "tokenizer":
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        file.write_text(json.dumps(settings | {"tokenizer_class": "Evil"}))
    else:
        names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
        changes = {"auto_map": {"AutoConfig": "evil.Config", **dict.fromkeys(names, "evil.Model")}}
        edit_config(folder, **(changes | ({"model_type": "evil"} if kind == "config" else {})))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, out = tmp_path / "d.jsonl", str(tmp_path / "o.jsonl")
    data.write_text('{"prompt": "a", "chosen": " b", "rejected": " c", "responses": ["b", "c"]}\n' * 2)
    arguments = {
        "train": ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"],
        "score": ["--out", out],
        "sample": ["--out", out, "--num_samples", "1", "--max_new_tokens", "2"],
        "label": ["--out", out, "--signals", f"reward-model:{folder}"],
    }[command]
    model = [] if command == "label" else ["--model", str(folder)]
    code = main([command, *model, "--data", str(data), *arguments])
    error = capsys.readouterr().err
    assert "code of the model was run" not in error
    assert code in (0, 2)
    if kind == "config":
        assert code == 2
        assert "--trust_remote_code true" in error
    assert "evil" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_attention_is_never_fetched(folder):
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        edit_config(folder, **{key: "org/kernel"})
    model = load_model(str(folder), torch.float32)
    assert "/" not in str(model.config._attn_implementation)


class Bomb:
    """A pickle that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_not_opened(folder, tmp_path):
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    load_model(str(folder), torch.float32)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="its weights are pickled"):
        load_model(str(folder), torch.float32)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore")
def test_tokens_that_the_model_lacks_are_named_before_anything_runs(folder, tmp_path, monkeypatch, capsys):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(folder)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "the cat", "chosen": " sat", "rejected": " mat <call>"}\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = main(["train", "--model", str(folder), "--data", str(data), "--output_dir", str(tmp_path / "r")])
    error = capsys.readouterr().err
    assert code == 2
    assert "row 0 has token 320, but the model embeds 320 tokens (0 to 319)" in error
    assert "resize_token_embeddings(321)" in error
    ids = np.array([3, 320], dtype=np.int32)
    with pytest.raises(UserError, match="row 7 has token 320"):
        with_fitting_layout(as_policy(tiny_llama()), [Group(7, ids[:1], (ids[:1], ids[1:]))])
