"""Adapters' folders: of TRL, of axolotl's layout and our own, in every command; and what is wrong with a folder."""

import json
import logging
import shutil

import pytest
import torch
from adapters import save_adapter
from oracle import random_groups, save_tiny_checkpoint, tiny_tokenizer
from safetensors.torch import load_file, save_file
from small_runs import QUIET, write_rows
from transformers import AutoModelForCausalLM
from trl_runs import IGNORED, make_trainer

from dpo_fast.cli import main
from dpo_fast.config import DPOConfig, ModelConfig, SampleConfig
from dpo_fast.errors import UserError
from dpo_fast.model.adapter_join import join, split, why_not_plain
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.load import load_model, load_tokenizer
from dpo_fast.model.placement import Placement
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import pack
from dpo_fast.training.run import train

pytestmark = [
    pytest.mark.filterwarnings(*IGNORED),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_adapter(base, folder, *, dtype=torch.float32, **settings):
    """An adapter by peft, in files of `dtype`."""
    save_adapter(base, folder, **{"target_modules": ["q_proj", "down_proj"]} | settings)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    return make_adapter(base, tmp_path / "adapter")


def edit_config(folder, **changes):
    settings = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(settings))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_log_probs_are_those_of_pefts_forward_in_fp64(settings, base, tmp_path):
    """The packed log-probs of a loaded adapter, in fp32, against peft's own model and a plain softmax in fp64."""
    from peft import PeftModel

    if "modules_to_save" in settings:  # what the tied weight of the embedding must not follow
        settings = settings | {"target_modules": ["q_proj"]}
    folder = make_adapter(base, tmp_path / "adapter", **settings)
    groups = random_groups(5)
    policy = with_fitting_layout(Policy.load(ModelConfig(model=str(folder), device="cpu")), groups)
    ours = policy.score(pack(groups))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    plain = PeftModel.from_pretrained(plain, str(folder)).double().eval()
    expected = []
    with torch.no_grad():
        for group in groups:
            for answer in group.answers:
                ids = torch.tensor([[*group.prompt_ids, *answer]])
                logps = plain(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
                expected.append(logps.gather(-1, torch.tensor(answer[:, None]).long())[:, 0])
    torch.testing.assert_close(ours.double(), torch.cat(expected), atol=2e-5, rtol=0)


def as_axolotl(base, folder):
    """Its output folder: the base's configuration and the tokenizer beside the adapter, and checkpoints below."""
    make_adapter(base, folder, dtype=torch.bfloat16, lora_dropout=0.05)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", folder / name)
    shutil.copytree(folder, folder / "checkpoint-8")
    return folder


def as_checkpoints(base, folder):
    """A run that has not ended: its checkpoints alone."""
    for step, alpha in ((9, 1), (10, 6)):
        make_adapter(base, folder / f"checkpoint-{step}", lora_alpha=alpha)
    return folder


def as_trl(base, folder):
    """What TRL's trainer saves."""
    from peft import LoraConfig
    from trl import DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(DPOTrainer, folder, model=model, extra={"peft_config": settings}, max_steps=1)
    trainer.train()
    trainer.save_model(folder)
    return folder


def as_ours(base, folder):
    """What `train` writes, of steps that are large enough to see."""
    rows = write_rows(folder.with_suffix(".jsonl"))
    places = {"output_dir": str(folder), "reference_store": str(folder.with_suffix(".sqlite"))}
    settings = {"max_length": 64, "learning_rate": 1e-2, "max_steps": 2, "save_steps": 0, "peft": "lora"}
    return train(DPOConfig(model=base, data=rows, **places, **settings), console=QUIET).model_dir


MAKERS = {"axolotl": as_axolotl, "TRL": as_trl, "ours": as_ours}


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_every_command_reads_it(maker, base, rows, tmp_path):
    folder = MAKERS[maker](base, tmp_path / "made")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The quick"}\n')
    store = ["--reference_store", str(tmp_path / "reference.sqlite"), "--max_length", "64"]
    common = ["--data", rows, *store]
    page, figures, scores, answers = (tmp_path / name for name in ("p.html", "f.json", "s.jsonl", "a.jsonl"))
    alone, on_base = ["--model", str(folder)], ["--model", base, "--adapter", str(folder)]
    assert main(["score", *alone, *common, "--out", str(scores)]) == 0
    text = scores.read_text()
    assert main(["score", *on_base, *common, "--out", str(scores)]) == 0
    assert scores.read_text() == text
    assert main(["score", "--model", base, *common, "--out", str(scores)]) == 0
    assert scores.read_text() != text
    assert main(["eval", *on_base, *common, "--reference", base, "--out", str(figures)]) == 0
    assert json.loads(figures.read_text())["pairs"]["pairs"] == 14
    assert main(["inspect", *alone, *common, "--reference", base, "--out", str(page)]) == 0
    sampling = ["--num_samples", "2", "--max_new_tokens", "4", "--out", str(answers)]
    assert main(["sample", *on_base, "--data", str(prompts), *sampling]) == 0
    assert len(answers.read_text().splitlines()) == 1
    run = ["--output_dir", str(tmp_path / "next"), "--max_steps", "1", "--peft", "lora"]
    assert main(["train", *alone, *common, *run]) == 0
    assert main(["report", str(tmp_path / "next")]) == 0


def test_the_newest_checkpoint_is_read(base, tmp_path, caplog):
    folder = as_checkpoints(base, tmp_path / "run")
    with caplog.at_level(logging.INFO, "dpo_fast"):
        model = load_model(str(folder), torch.float32)
    assert "reading the adapter in checkpoint-10" in caplog.text
    assert model.model.layers[0].self_attn.q_proj.scaling == {"default": 2.0}


def test_a_tokenizer_beside_the_adapter_is_used(base, adapter):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "of the adapter"
    assert load_tokenizer(str(adapter)).chat_template != "of the adapter"
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template == "of the adapter"


def pickled(folder, base):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def renamed(folder, base):
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


FAULTS = {
    "pickled": (pickled, r"its weights are pickled \(adapter_model\.bin\).*Convert them"),
    "no weights": (lambda folder, base: (folder / WEIGHTS).unlink(), r"has adapter_config\.json but no adapter_model"),
    "another kind": (lambda folder, base: edit_config(folder, peft_type="IA3"), "of type IA3; expected LORA"),
    "no base": (lambda folder, base: edit_config(folder, base_model_name_or_path=None), "pass --model BASE --adapter"),
    "a base that is gone": (
        lambda folder, base: edit_config(folder, base_model_name_or_path="/nowhere/base"),
        "an adapter of /nowhere/base, which is not on this machine; pass --model BASE --adapter",
    ),
    "itself as base": (lambda folder, base: edit_config(folder, base_model_name_or_path=str(folder)), "of itself"),
    "no JSON": (lambda folder, base: (folder / CONFIG).write_text("{"), r"cannot read .*adapter_config\.json"),
    "a list": (lambda folder, base: (folder / CONFIG).write_text("[]"), r"cannot read .*adapter_config\.json"),
    "another rank": (lambda folder, base: edit_config(folder, r=5), r"does not fit .*size mismatch.*\[3, 32\]"),
    "other layers": (lambda folder, base: edit_config(folder, target_modules=["foo"]), "does not fit .*foo"),
    "other names": (renamed, "does not fit .*tensors, such as"),
    "cut": (lambda folder, base: (folder / WEIGHTS).write_bytes(b"\x08"), "does not fit|cannot load"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_is_one_line(fault, base, adapter, rows, tmp_path, capsys):
    change, message = FAULTS[fault]
    change(adapter, base)
    assert main(["score", "--model", str(adapter), "--data", rows, "--out", str(tmp_path / "o.jsonl")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    with pytest.raises(UserError, match=message):
        load_model(str(adapter), torch.float32)


def test_a_wrong_base_is_refused_by_name(adapter, tmp_path, caplog):
    """Shapes that differ are refused with both; another name with the same shapes is said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"does not fit .*wide: size mismatch for .*\[3, 32\].*\[3, 64\]"):
        load_model(str(adapter), torch.float32, base=str(tmp_path / "wide"))
    other = save_tiny_checkpoint(tmp_path / "other", seed=3)
    load_model(str(adapter), torch.float32, base=str(other))
    assert f"is used on {other}" in caplog.text


def test_two_ways_to_name_an_adapter_are_one():
    for kind in (ModelConfig, DPOConfig, SampleConfig):
        settings = kind(model="base", adapter="a")
        assert (settings.model, settings.adapter_base, settings.adapter) == ("a", "base", None)
        assert kind(adapter="a").adapter_base is None
    with pytest.raises(UserError, match="expected one --model beneath it"):
        SampleConfig(model=["a", "b"], adapter="c")


def test_an_adapter_that_is_none_is_refused(base, rows, tmp_path, capsys):
    for name in ("org/adapter", base):
        words = ["--model", base, "--adapter", name, "--data", rows, "--out", str(tmp_path / "o.jsonl")]
        assert main(["score", *words]) == 2
        assert f"--adapter {name}: no folder with adapter_config.json" in capsys.readouterr().err


def test_trl_and_shorthand_names_are_one_setting():
    assert DPOConfig(use_peft=True).peft == "lora"
    assert DPOConfig(peft="qlora").load_in_4bit
    assert DPOConfig(use_peft=True, load_in_4bit=True).peft == "qlora"
    dora = DPOConfig(peft="dora", load_in_4bit=True, use_peft=True)
    assert (dora.peft, dora.load_in_4bit, dora.use_peft) == ("dora", True, False)


def test_frozen_weights_are_bf16_on_a_gpu(adapter):
    gpu = torch.device("cuda")
    place = Placement.on(gpu, DPOConfig(peft="lora"))
    assert (place.dtype, place.bf16, place.default_optimizer) == (torch.bfloat16, True, "adamw_torch")
    assert Placement.on(gpu, ModelConfig(model=str(adapter))).dtype is torch.bfloat16
    assert Placement.on(gpu, DPOConfig(model=str(adapter))).dtype is torch.float32
    full = Placement.on(gpu, DPOConfig(dtype="bfloat16"))
    assert (full.bf16, full.default_optimizer) == (False, "adamw_8bit_fused")


def test_joined_adapters_are_their_sum():
    """By hand, in fp64, with a layer that only one of them has; and the second comes out as it went in."""
    torch.manual_seed(0)

    def tensors(rank, *names):
        return {f"{n}.lora_A.weight": torch.randn(rank, 8) for n in names} | {
            f"{n}.lora_B.weight": torch.randn(6, rank) for n in names
        }

    below, own = tensors(3, "a", "b"), tensors(2, "a", "c")
    joined = join(below, own, ranks=(3, 2), scales=(0.7, 3.0))
    for layer in "abc":
        parts = [(source, scale) for source, scale in ((below, 0.7), (own, 3.0)) if f"{layer}.lora_A.weight" in source]
        want = sum(
            scale * source[f"{layer}.lora_B.weight"].double() @ source[f"{layer}.lora_A.weight"].double()
            for source, scale in parts
        )
        got = 3.0 * joined[f"{layer}.lora_B.weight"].double() @ joined[f"{layer}.lora_A.weight"].double()
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    again = split(joined, set(own), 3)
    assert all(torch.equal(again[name], own[name]) for name in own)
    assert again.keys() == own.keys()


@pytest.mark.parametrize(
    ("settings", "entry"),
    [
        ({}, ""),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, ""),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_only_plain_adapters_are_joined(settings, entry):
    from peft import LoraConfig

    known = LoraConfig(**{k: v for k, v in settings.items() if k != "init_lora_weights"}).to_dict() | settings
    assert why_not_plain(known) == entry


def test_a_4bit_base_keeps_its_bits(base):
    """A forward without gradients must not repack the weights; scores are those of the training mode."""
    config = ModelConfig(model=base, device="cpu", load_in_4bit=True)
    policy = Policy.load(config)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    batch = pack(random_groups(3))
    scored = policy.score(batch)
    policy.set_trainable()
    with torch.no_grad():
        assert torch.equal(policy.token_logps(batch), scored)
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("absmax" in name for name in before)


def test_weights_that_come_in_4_bits_are_read_as_such(base, tmp_path):
    model = load_model(base, torch.float32, four_bit=four_bit())
    model.save_pretrained(tmp_path / "q")
    again = load_model(str(tmp_path / "q"), torch.float32, four_bit=four_bit())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    with pytest.raises(UserError, match=r"\(bitsandbytes\).*--peft qlora"):
        load_model(str(tmp_path / "q"), torch.float32)


def four_bit():
    from dpo_fast.model.quantize import FourBit

    return FourBit(torch.device("cpu"), torch.float32)
