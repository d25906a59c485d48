"""Adapters: TRL's losses, what gets a gradient, the shared reference, resuming, and starting from an SFT adapter."""

import io
import json
import math

import pytest
import torch
from adapters import save_adapter
from oracle import save_tiny_checkpoint, tiny_llama, tiny_tokenizer
from rich.console import Console
from safetensors.torch import load_file
from small_runs import QUIET
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl_runs import IGNORED, ROWS, make_trainer

from dpo_fast.errors import UserError
from dpo_fast.kernels import linear_logprob_torch
from dpo_fast.model.attention import own_attention
from dpo_fast.training.loop import Trainer
from dpo_fast.training.run import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(*IGNORED),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
WEIGHTS = "adapter_model.safetensors"
TIMED = {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}


def printed(config):
    """What a run prints, and its result."""
    out = io.StringIO()
    result = train(config, console=Console(file=out, width=200))
    return out.getvalue(), result


def losses(result):
    return [row["loss"] for row in result.metrics if "loss" in row]


def figures(result):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in result.metrics]


@pytest.fixture
def trl_rows(tmp_path):
    path = tmp_path / "trl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:18]))
    return str(path)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_losses_are_those_of_trl(kind, config, trl_rows, base, tmp_path, monkeypatch):
    """From one start, on the same rows in the same order: five steps of TRL 1.16's own trainer."""
    from peft import LoraConfig
    from trl import DPOTrainer

    starts = []
    run = Trainer.run

    def remember(self):
        starts.append({name: tensor.clone() for name, tensor in self.policy.adapter.weights().items()})
        starts.append([self.train_set.groups[i].row for _ in range(5) for pack in next(sampler).packs for i in pack])
        return run(self)

    sampler = None

    def run_with_order(self):
        nonlocal sampler
        sampler = self.plan.sampler(self.train_set.groups)
        return remember(self)

    monkeypatch.setattr(Trainer, "run", run_with_order)
    settings = {"peft": kind, "lora_r": 4, "lora_alpha": 16, "learning_rate": 5e-3, "max_length": 24}
    ours = train(
        config(data=trl_rows, max_steps=5, per_device_train_batch_size=2, max_grad_norm=1.0, **settings), console=QUIET
    )
    start, order = starts

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": quantization, "device_map": {"": "cpu"}} if kind == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    adapter = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", use_dora=kind == "dora", task_type="CAUSAL_LM"
    )
    theirs = make_trainer(
        DPOTrainer,
        tmp_path / "theirs",
        model=model,
        extra={"peft_config": adapter, "train_dataset": in_order(order)},
        max_steps=5,
        learning_rate=5e-3,
        train_sampling_strategy="sequential",
    )
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = start[name.replace(".default", "").replace("vector.weight", "vector")].clone()
    theirs.train()
    expected = [log["loss"] for log in theirs.records.logs if "loss" in log]
    assert losses(ours) == pytest.approx(expected, abs=1e-3)
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in expected) > 0.03, "the adapter must have moved"


def in_order(order):
    from datasets import Dataset

    return Dataset.from_list([ROWS[i] for i in order])


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_only_the_adapter_has_gradients_and_state(kind, config, monkeypatch):
    """Counted in bytes, against peft's own count and one by hand; and the head keeps no exponentials."""
    seen = {}
    heads = []
    train_step, forward = Trainer.train_step, linear_logprob_torch.forward

    def kept(*arguments, **options):
        result = forward(*arguments, **options)
        if "frozen" in options:  # not of scoring
            heads.append((options["frozen"], result[1].kept))
        return result

    monkeypatch.setattr(linear_logprob_torch, "forward", kept)

    def counted(self):
        drop_gradients = self.weights.drop_gradients

        def count():
            model = self.policy.model
            seen["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            drop_gradients()

        monkeypatch.setattr(self.weights, "drop_gradients", count)
        norm = train_step(self)
        moments = [
            x for state in self.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim
        ]
        seen["state"] = sum(x.nbytes for x in moments)
        seen["adapter"], _ = self.policy.adapter.peft.get_nb_trainable_parameters()
        return norm

    monkeypatch.setattr(Trainer, "train_step", counted)
    train(config(peft=kind, lora_r=4, max_steps=1), console=QUIET)
    layers, width, inner, kv = 2, 32, 48, 16
    by_hand = layers * 4 * (2 * (width + width) + 2 * (width + kv) + 3 * (width + inner))
    magnitudes = layers * (2 * width + 2 * kv + 2 * inner + width) if kind == "dora" else 0
    assert seen["adapter"] == by_hand + magnitudes
    assert seen["gradients"] == 4 * seen["adapter"]
    assert seen["state"] == 2 * 4 * seen["adapter"]
    assert heads
    assert all(frozen and not exponentials for frozen, exponentials in heads)


def test_adapters_of_one_base_share_its_reference(config, tmp_path):
    from dpo_fast.analysis.score import score
    from dpo_fast.config import ScoreConfig

    text, _ = printed(config(peft="lora"))
    assert "reference: scored 14 of 14 rows" in text
    text, _ = printed(config(peft="dora", lora_r=2, output_dir=str(tmp_path / "other")))
    assert "reference: 14 rows, all cached" in text
    out = io.StringIO()
    names = ("model", "data", "reference_store", "max_length")
    scoring = ScoreConfig(out=str(tmp_path / "s.jsonl"), **{name: getattr(config(), name) for name in names})
    score(scoring, console=Console(file=out, width=200))
    assert "reference: 14 rows, all cached" in out.getvalue()
    # Nor do weights of other bits have the same scores.
    text, _ = printed(config(peft="qlora", output_dir=str(tmp_path / "4bit")))
    assert "reference: scored 14 of 14 rows" in text


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_step_0_is_exactly_at_the_reference(kind, config):
    first = train(config(max_steps=1, peft=kind), console=QUIET).metrics[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0.0


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputing_activations_changes_nothing(policy, config, tmp_path):
    whole = train(config(peft="lora"), console=QUIET)
    again = train(config(peft="lora", checkpointing_policy=policy, output_dir=str(tmp_path / "other")), console=QUIET)
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)
    assert losses(again)[-1] < 0.69


@pytest.fixture
def untied(tmp_path):
    """A model whose head has a weight of its own."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    return str(tmp_path / "untied")


def test_a_lora_on_the_head_trains(config, untied):
    """Against the plain forward of peft on the written adapter."""
    from dpo_fast.model.load import load_model

    settings = {"peft": "lora", "lora_target_modules": ["lm_head", "q_proj"], "overwrite": True}
    result = train(config(model=untied, max_steps=3, **settings), console=QUIET)
    weights = load_file(result.model_dir / WEIGHTS)
    assert weights["base_model.model.lm_head.lora_B.weight"].abs().max() > 0
    model = load_model(str(result.model_dir), torch.float32)
    plain = peft_logits(untied, result.model_dir)
    with own_attention(model), torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="lm_head shares its weight with the embedding"):
        train(config(**settings), console=QUIET)
    for wrong in ({"lora_dropout": 0.1}, {"peft": "dora"}):
        with pytest.raises(UserError, match="lm_head takes a plain LoRA"):
            train(config(**settings | wrong), console=QUIET)


IDS = torch.arange(2, 22)[None]


def peft_logits(base, folder):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=IDS).logits


REFUSED = {
    "4-bit weights": ({"load_in_4bit": True}, "4-bit weights cannot be trained; add --peft qlora"),
    "a merge of nothing": ({"merge_final": True}, "no adapter is trained"),
    "a reference that moves": ({"peft": "lora", "sync_ref_model": True}, "is frozen; leave one out"),
    "no such layer": ({"peft": "lora", "lora_target_modules": "foo"}, "--lora_target_modules: .*q_proj"),
    "dropout twice": ({"peft": "lora", "lora_dropout": 0.1, "loss_type": "aot"}, "pass --lora_dropout 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_adapter_can_have_is_refused(case, config):
    settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        train(config(**settings), console=QUIET)


def test_without_peft_the_extra_is_named(config, monkeypatch):
    monkeypatch.setattr("dpo_fast.model.adapter.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--peft lora: adapters need peft: pip install 'dpo-fast\[peft\]'$"):
        train(config(use_peft=True), console=QUIET)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_resume_ends_with_the_same_bits(kind, config, tmp_path):
    settings = {"peft": kind, "save_steps": 3, "warmup_steps": 2, "eval_split": 0.2, "lora_dropout": 0.1}
    whole = train(config(output_dir=str(tmp_path / "whole"), **settings), console=QUIET)
    train(config(output_dir=str(tmp_path / "cut"), **settings), console=QUIET)
    for name in ("checkpoint-6", "final"):
        (tmp_path / "cut" / name).rename(tmp_path / name)
    resumed = train(config(output_dir=str(tmp_path / "cut"), resume="auto", **settings), console=QUIET)
    assert_same_adapter(whole.model_dir, resumed.model_dir)
    assert figures(resumed) == figures(whole)


def assert_same_adapter(left, right):
    ours, theirs = load_file(left / WEIGHTS), load_file(right / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_checkpoint_holds_the_adapter_alone(config, tmp_path):
    train(config(peft="lora", lora_r=4, save_steps=3, max_steps=3), console=QUIET)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    weights = load_file(checkpoint / WEIGHTS)
    numbers = sum(x.numel() for x in weights.values())
    assert all("lora_" in name for name in weights)
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    moments = [x for entry in state["optimizer"]["state"].values() for x in entry.values() if x.ndim]
    assert sum(x.numel() for x in moments) == 2 * numbers
    assert not list(checkpoint.glob("model*"))
    assert not list(checkpoint.glob("*.bin"))
    assert "README.md" in {path.name for path in (tmp_path / "run" / "final").iterdir()}


FIXED = {
    "rank": {"lora_r": 8},
    "alpha": {"lora_alpha": 8.0},
    "layers": {"lora_target_modules": "q_proj"},
    "kind": {"peft": "dora"},
    "4 bits": {"load_in_4bit": True},
}


@pytest.mark.parametrize("case", FIXED)
def test_what_may_not_change_is_refused_on_resume(case, config):
    settings = {"peft": "lora", "lora_r": 4, "save_steps": 2, "max_steps": 2}
    train(config(**settings), console=QUIET)
    with pytest.raises(UserError, match=rf"--resume: .*--{next(iter(FIXED[case]))} .*may not change in a run"):
        train(config(**settings | FIXED[case] | {"resume": "auto"}), console=QUIET)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_another_base_is_refused_on_resume(loss, config, base, tmp_path):
    """With and without a reference, by another name and in place."""
    model = tmp_path / "model"
    save_tiny_checkpoint(model)
    settings = {"peft": "lora", "save_steps": 2, "loss_type": loss}
    train(config(model=str(model), max_steps=2, **settings), console=QUIET)
    again = {"max_steps": 3, "resume": "auto", **settings}
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"--model .*other"):
        train(config(model=str(other), **again), console=QUIET)
    (model / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="is not the base that the adapter was trained on"):
        train(config(model=str(model), **again), console=QUIET)


def test_evaluation_has_no_dropout(config, monkeypatch):
    """It gives the same twice, and training goes on with dropout."""
    evaluate = Trainer.evaluate
    seen = []

    def twice(self):
        seen.extend([evaluate(self), evaluate(self), self.policy.model.training])
        return seen[0]

    monkeypatch.setattr(Trainer, "evaluate", twice)
    settings = {"peft": "lora", "eval_split": 0.3, "max_steps": 2, "learning_rate": 1e-2}
    train(config(lora_dropout=0.5, **settings), console=QUIET)
    first, second, is_training = seen
    assert first == second
    assert is_training
    assert abs(first["eval_loss"] - math.log(2)) > 1e-4


def sft_adapter(base, folder, *, tokenizer=False, **settings):
    """An adapter as other tools write it."""
    save_adapter(base, folder, **{"target_modules": ["q_proj", "v_proj"]} | settings)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sft(base, tmp_path):
    return sft_adapter(base, tmp_path / "sft")


@pytest.mark.parametrize("how", ["merge", "keep"])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_sft_adapter_is_the_reference(how, kind, config, sft, base):
    """Whether merged or kept: step 0 is at ln 2, and the result is one adapter of the original base."""
    if (how, kind) == ("merge", "qlora"):
        with pytest.raises(UserError, match="pass --sft_adapter keep"):
            train(config(model=str(sft), peft=kind, sft_adapter=how), console=QUIET)
        return
    text, result = printed(config(model=str(sft), peft=kind, sft_adapter=how if kind == "lora" else "auto"))
    said = {"merge": "merged into the weights", "keep": "kept beneath the new adapter"}[how]
    assert f"the adapter {sft} is {said}; with it, {base} is the reference" in text
    assert losses(result)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(result)[-1] < 0.69
    settings = json.loads((result.model_dir / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"]) == (base, 3 + 16)
    if kind == "lora":
        # peft's own forward, of what was written.
        assert (peft_logits(base, result.model_dir) - peft_logits(base, sft)).abs().max() > 1e-3


def test_merged_and_kept_train_alike(config, sft, tmp_path):
    kept = train(config(model=str(sft), peft="lora", sft_adapter="keep"), console=QUIET)
    merged = train(config(model=str(sft), peft="lora", output_dir=str(tmp_path / "merged")), console=QUIET)
    assert losses(kept) == pytest.approx(losses(merged), abs=1e-4)
    torch.testing.assert_close(
        peft_logits(config().model, kept.model_dir), peft_logits(config().model, merged.model_dir), atol=1e-3, rtol=0
    )


def test_resume_on_top_of_an_sft_adapter_ends_with_the_same_bits(config, sft, tmp_path):
    for how in ("merge", "keep"):
        settings = {"model": str(sft), "peft": "lora", "sft_adapter": how, "save_steps": 3, "lora_alpha": 10.0}
        settings["output_dir"] = str(tmp_path / how)
        whole = train(config(**settings), console=QUIET)
        for name in ("checkpoint-6", "final"):
            (tmp_path / how / name).rename(tmp_path / f"{how}-{name}")
        resumed = train(config(resume="auto", **settings), console=QUIET)
        assert_same_adapter(tmp_path / f"{how}-final", resumed.model_dir)
        assert figures(resumed) == figures(whole)


def test_all_weights_are_trained_from_a_merged_sft_adapter(config, sft, base):
    text, result = printed(config(model=str(sft), max_steps=2))
    assert "merged into the weights" in text
    assert losses(result)[0] == pytest.approx(math.log(2), abs=1e-6)
    trained = AutoModelForCausalLM.from_pretrained(result.model_dir)
    with torch.no_grad():
        assert (trained(input_ids=IDS).logits - peft_logits(base, sft)).abs().max() < 1
    assert (trained.model.norm.weight != 1).any()


def test_a_dora_on_an_sft_adapter_is_written_merged(config, sft, base, tmp_path):
    settings = {"model": str(sft), "peft": "dora", "max_steps": 3}
    with pytest.raises(UserError, match="pass --merge_final true"):
        train(config(**settings), console=QUIET)
    with pytest.raises(UserError, match="pass --sft_adapter merge"):
        train(config(sft_adapter="keep", **settings), console=QUIET)
    result = train(config(merge_final=True, **settings), console=QUIET)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    from peft import PeftModel

    plain = PeftModel.from_pretrained(plain, str(sft)).merge_and_unload()
    vars(plain).pop("peft_config", None)  # which older versions of peft leave behind
    both = PeftModel.from_pretrained(plain, str(result.model_dir)).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, both(input_ids=IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_a_merged_model_is_written(kind, config, base, tmp_path):
    """Against peft's own forward on the base, of which QLoRA's is dequantised."""
    from dpo_fast.model.load import load_model
    from dpo_fast.model.quantize import FourBit

    settings = {"peft": kind, "merge_final": True, "save_dtype": "float32"}
    text, result = printed(config(**settings))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    assert ("dequantised" in text) == (kind == "qlora")
    with torch.no_grad():
        got = merged(input_ids=IDS).logits
        if kind != "qlora":
            want = peft_logits(base, result.model_dir)
        else:
            four_bit = FourBit(torch.device("cpu"), torch.float32)
            model = load_model(str(result.model_dir), torch.float32, four_bit=four_bit)
            with own_attention(model):
                want = model(input_ids=IDS).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert (tmp_path / "run" / "merged" / "tokenizer.json").is_file()
    assert not hasattr(merged.config, "quantization_config")
