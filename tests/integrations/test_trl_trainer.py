"""Our DPOTrainer against TRL 1.16's: the same steps, the same logs, the same files."""

import inspect
import re
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.multiprocessing as mp
import transformers
import trl
from datasets import Dataset, DatasetDict
from oracle import tiny_llama, tiny_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOTrainer as TRLTrainer
from trl_runs import IGNORED, ROWS, SPEEDS, assert_same_logs, assert_same_run, make_trainer, train_on_rank, trl_args

import dpo_fast.reference.fill
from dpo_fast.integrations.trl import DPOTrainer
from dpo_fast.integrations.trl_options import refusals

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(line) for line in IGNORED)]
OPTIONS = {
    "defaults": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 8},
    "checkpointing": {"gradient_checkpointing": True},
    "losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ipo": {"loss_type": ["ipo"]},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "divergence": {"f_divergence_type": "js_divergence", "label_smoothing": 0.1, "loss_type": ["robust"]},
    "LD-DPO": {"ld_alpha": 0.5},
    "WPO": {"use_weighting": True},
    "TR-DPO": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "transformers' own": {
        **{
            "optim": "adafactor",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "max_grad_norm": 0.1,
            "data_seed": 3,
        },
        **{"dataloader_drop_last": True, "label_smoothing_factor": 0.1, "auto_find_batch_size": True},
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 3},
}


@pytest.fixture
def store(tmp_path):
    return {"reference_store": tmp_path / "reference.sqlite"}


def trained(trainer_class, folder, **settings):
    trainer = make_trainer(trainer_class, folder, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", OPTIONS)
def test_ten_steps_are_trls(name, tmp_path, store):
    """TRL's reference is a second copy of the starting model, ours the store (but for TR-DPO)."""
    options = OPTIONS[name]
    held_out = {"eval_dataset": Dataset.from_list(ROWS[18:])} if "eval_steps" in options else {}
    reference = {"ref_model": tiny_llama(320)}
    theirs = trained(TRLTrainer, tmp_path, extra=held_out | reference, **options)
    moving = {"ref_model": tiny_llama(320)} if "sync_ref_model" in options else {}
    assert_same_run(trained(DPOTrainer, tmp_path, extra=held_out | store | moving, **options), theirs)


def test_another_reference(tmp_path, store):
    reference = {"ref_model": tiny_llama(320)}
    with torch.no_grad():
        for p in reference["ref_model"].parameters():
            p.mul_(1.02)
    theirs = trained(TRLTrainer, tmp_path, extra=reference)
    assert_same_run(trained(DPOTrainer, tmp_path, extra=reference | store), theirs)
    assert theirs.records.logs[0]["rewards/margins"] != 0


def lora():
    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file", "ignore:Could not find a config file in")
def test_a_new_adapter(tmp_path, store):
    theirs = trained(TRLTrainer, tmp_path, extra={"peft_config": lora()})
    ours = trained(DPOTrainer, tmp_path, extra={"peft_config": lora()} | store)
    assert_same_run(ours, theirs)
    new_rows = Dataset.from_list(ROWS[18:])
    got, want = ours.evaluate(new_rows), theirs.evaluate(new_rows)
    assert_same_logs([got], [want])


def test_a_trained_adapter_is_its_own_reference(tmp_path, store):
    def model():
        adapted = peft.get_peft_model(tiny_llama(320), lora())
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) / 10)
        return adapted

    theirs = trained(TRLTrainer, tmp_path, model=model())
    assert_same_run(trained(DPOTrainer, tmp_path, model=model(), extra=store), theirs)


def test_a_mixture_of_experts_reports_its_balance(tmp_path, store):
    torch.manual_seed(0)
    config = MixtralConfig(
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 1},
    )
    trainer = trained(DPOTrainer, tmp_path, model=MixtralForCausalLM(config), extra=store, max_steps=2)
    coefficient, first = trainer.router_aux_loss_coef, trainer.records.logs[0]
    # Each of four experts has a quarter of the tokens, twice: two are asked for each.
    assert 1.9 < first["aux_loss"] < 2.5
    assert first["loss"] == pytest.approx(0.6931472 + coefficient * first["aux_loss"], abs=1e-5)
    assert not trainer.model.config.output_router_logits


def test_bf16(tmp_path, store):
    theirs = trained(TRLTrainer, tmp_path, extra={"ref_model": tiny_llama(320)}, bf16=True)
    ours = trained(DPOTrainer, tmp_path, extra=store, bf16=True)
    assert next(ours.model.parameters()).dtype == torch.float32
    for got, want in zip(ours.records.logs[:-1], theirs.records.logs[:-1], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=0.02)
        assert got["logps/chosen"] == pytest.approx(want["logps/chosen"], rel=0.01)


def test_a_resumed_run_ends_alike(tmp_path, store):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(DPOTrainer, tmp_path / "run", extra=store, **saving)
    again = make_trainer(DPOTrainer, tmp_path / "run", extra=store, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for got, want in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_the_store_is_read_and_the_model_is_left_plain(tmp_path, store, monkeypatch):
    first = trained(DPOTrainer, tmp_path, extra=store, max_steps=1)
    assert (tmp_path / "reference.sqlite").stat().st_size
    ids = torch.tensor([[5, 6, 7]])
    assert first.model(input_ids=ids).logits.shape == (1, 3, 320)
    assert first.model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)
    scored = []
    # Begun where a row is missing.
    monkeypatch.setattr(dpo_fast.reference.fill, "progress_line", lambda *args: scored.append(args))
    trained(DPOTrainer, tmp_path, extra=store, max_steps=1)
    assert not scored


def test_several_evaluation_sets(tmp_path, store):
    sets = DatasetDict(a=Dataset.from_list(ROWS[18:20]), b=Dataset.from_list(ROWS[20:]))
    theirs = make_trainer(TRLTrainer, tmp_path, extra={"eval_dataset": sets, "ref_model": tiny_llama(320)})
    ours = make_trainer(DPOTrainer, tmp_path, extra={"eval_dataset": sets} | store)
    assert_same_logs([ours.evaluate()], [theirs.evaluate()])


@pytest.mark.parametrize("adapter", [False, True])
def test_streams_are_trained_and_evaluated_as_trls(adapter, tmp_path, store):
    """Rows are scored as they come, by a copy of the starting model or without the adapter."""
    logs = {}
    for trainer_class in (TRLTrainer, DPOTrainer):
        train, held_out = (Dataset.from_list(rows).to_iterable_dataset() for rows in (ROWS[:18], ROWS[18:]))
        extra = {"train_dataset": train, "eval_dataset": held_out}
        extra |= {"peft_config": lora()} if adapter else {}
        if trainer_class is DPOTrainer:
            extra |= store
        elif not adapter:
            extra["ref_model"] = tiny_llama(320)
        logs[trainer_class] = trained(trainer_class, tmp_path, extra=extra, eval_strategy="steps", eval_steps=5)
    assert_same_run(logs[DPOTrainer], logs[TRLTrainer])
    assert logs[DPOTrainer].records.logs[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_stream_that_is_to_be_scored_beforehand_is_refused_at_once(name, tmp_path, monkeypatch):
    """With the error that TRL raises, before anything is scored."""
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    stream = DatasetDict(a=stream) if name == "eval_dataset" else stream
    monkeypatch.setattr(TRLTrainer, "__init__", None)
    with pytest.raises(ValueError, match=f"^{name}: precompute_ref_log_probs=True cannot score a stream"):
        make_trainer(DPOTrainer, tmp_path, extra={name: stream}, precompute_ref_log_probs=True)


def of_pairs(logs):
    return {key: value for key, value in logs.items() if not key.endswith(SPEEDS)}


def test_an_evaluation_does_not_depend_on_its_batches(tmp_path, store):
    """Five rows in batches of two leave a batch of one, which must count as one row."""
    rows = {"eval_dataset": Dataset.from_list(ROWS[17:])} | store
    trainer = trained(DPOTrainer, tmp_path, extra=rows, max_steps=4, learning_rate=1e-2)
    found = []
    for size in (1, 2, 5):
        trainer.args.per_device_eval_batch_size = size
        found.append(of_pairs(trainer.evaluate()))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[0]["eval_rewards/accuracies"] in (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert found[0]["eval_rewards/margins"] != 0


def test_new_rows_are_evaluated_after_training(tmp_path, store):
    """The reference of a model that has a name is loaded again; of another, stored rows are scored, others refused."""
    held_out, new_rows = Dataset.from_list(ROWS[18:20]), Dataset.from_list(ROWS[20:])
    tiny_llama(320).save_pretrained(tmp_path / "base")
    trainer = trained(DPOTrainer, tmp_path, model=str(tmp_path / "base"), extra=store)
    reference = {"ref_model": tiny_llama(320)}
    theirs = trained(TRLTrainer, tmp_path, model=str(tmp_path / "base"), extra=reference)
    assert_same_logs([trainer.evaluate(new_rows)], [theirs.evaluate(new_rows)])
    assert trainer.ref_model is None
    sets = DatasetDict(a=held_out, b=new_rows)
    assert_same_logs([trainer.evaluate(sets)], [theirs.evaluate(sets)])

    other = {"reference_store": tmp_path / "other.sqlite"}
    nameless = trained(DPOTrainer, tmp_path, extra=other | {"eval_dataset": held_out})
    assert of_pairs(nameless.evaluate(held_out)) == of_pairs(nameless.evaluate())
    with pytest.raises(ValueError, match=r"^evaluate: these rows have no stored reference .* no name to load it by"):
        nameless.evaluate(new_rows)
    trainer.model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="base has other weights than training started from"):
        trainer.evaluate(Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]))


def test_an_option_that_the_loss_does_not_read_is_refused(tmp_path):
    """TRL ignores it."""
    with pytest.raises(ValueError, match=r"^label_smoothing 0.1: not read by loss_type sigmoid; .* cdpo"):
        make_trainer(DPOTrainer, tmp_path, label_smoothing=0.1)


def test_two_processes(tmp_path, store):
    logs, weights = {}, {}
    for trainer_class in (TRLTrainer, DPOTrainer):
        folder = tmp_path / trainer_class.__module__
        folder.mkdir()
        extra = {"ref_model": tiny_llama(320)} if trainer_class is TRLTrainer else store
        mp.spawn(train_on_rank, (2, trainer_class, folder, extra), nprocs=2)
        logs[trainer_class], weights[trainer_class] = torch.load(folder / "result.pt")
    assert_same_logs(logs[DPOTrainer], logs[TRLTrainer])
    for name, want in weights[TRLTrainer].items():
        torch.testing.assert_close(weights[DPOTrainer][name], want, rtol=0, atol=1e-5, msg=name)
    (name, tokens), (_, others) = (torch.load(folder / f"batches-{rank}.pt") for rank in range(2))
    assert name == "BalancedSampler"
    assert len(tokens) == 5
    # The first and the last batch are not dealt, since the last is filled up with rows of the first.
    assert sum(abs(a - b) for a, b in zip(tokens[1:-1], others[1:-1], strict=True)) < 0.15 * sum(tokens[1:-1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncation_mode", "keep_end"),
        ("pad_to_multiple_of", 8),
        ("disable_dropout", False),
        ("fp16_full_eval", True),
        ("neftune_noise_alpha", 5.0),
        ("use_liger_kernel", True),
        ("activation_offloading", True),
        ("torch_compile", True),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*'keep_end':FutureWarning")
def test_unsupported_options_are_named(name, value, tmp_path):
    with pytest.raises(NotImplementedError, match=rf"^{name} is not supported"):
        make_trainer(DPOTrainer, tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_collator", list),
        ("processing_class", object()),
        ("peft_config", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    ],
)
def test_unsupported_arguments_are_named(name, value, tmp_path):
    with pytest.raises(NotImplementedError, match=rf"^{name} is not supported"):
        make_trainer(DPOTrainer, tmp_path, extra={name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True),
        ("fsdp", ["full_shard"]),
        ("deepspeed", {"zero_optimization": {}}),
        ("parallelism_config", object()),
    ],
)
def test_what_this_machine_cannot_even_ask_for_is_named(name, value, tmp_path):
    """transformers looks for the hardware or the package of these when they are set, so they are set afterwards."""
    args = trl_args(tmp_path)
    setattr(args, name, value)
    with pytest.raises(NotImplementedError, match=rf"^{name} is not supported"):
        make_trainer(DPOTrainer, tmp_path, extra={"args": args})


def test_the_table_of_the_docs_has_every_option(tmp_path):
    """TRL's own, the constructor's, and what is refused; and nothing that TRL does not have."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "drop_in.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page[page.index("## TRL's options") :], re.M)
    named = {name: meaning for names, meaning in rows for name in re.findall(r"`(\w+)`", names)}
    options = {field.name for field in fields(trl.DPOConfig)}
    arguments = set(inspect.signature(trl.DPOTrainer.__init__).parameters) - {"self"}
    own = options - {field.name for field in fields(transformers.TrainingArguments)}
    assert len(own) > 20
    assert not (own | arguments) - named.keys()
    assert named.keys() <= options | arguments | {"reference_store", "PeftModel", "predict"}
    for name in refusals(trl_args(tmp_path), dict.fromkeys(arguments)):
        # What is refused of the others depends on what they are.
        assert "refused" in named[name] or name in ("processing_class", "train_dataset", "model"), name


def test_an_empty_answer_is_named(tmp_path, store):
    trainer = make_trainer(DPOTrainer, tmp_path, extra=store)
    with pytest.raises(ValueError, match="row 1: an answer is empty"):
        trainer.data_collator([{"prompt_ids": [2], "chosen_ids": [3], "rejected_ids": ids} for ids in ([4], [])])


def test_compute_metrics_and_predict_read_trls_logits(tmp_path, store):
    """Padding is masked: what a model gives there is nobody's business."""
    outputs = {}

    def compute_metrics(prediction):
        return {"hits": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    for trainer_class, reference in ((DPOTrainer, store), (TRLTrainer, {"ref_model": tiny_llama(320)})):
        rows = {"eval_dataset": Dataset.from_list(ROWS[17:]), "compute_metrics": compute_metrics}
        trainer = trained(trainer_class, tmp_path, extra=rows | reference, optim="sgd", per_device_eval_batch_size=5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*are deprecated", FutureWarning)
            outputs[trainer_class] = trainer.evaluate(), trainer.predict(trainer.eval_dataset)
    (figures, got), (trl_figures, want) = outputs.values()
    assert figures["eval_hits"] == pytest.approx(trl_figures["eval_hits"])
    np.testing.assert_array_equal(got.label_ids, want.label_ids)
    mask = want.label_ids != tiny_tokenizer().pad_token_id
    np.testing.assert_allclose(got.predictions[mask], want.predictions[mask], atol=2e-5)
    assert got.metrics["test_loss"] == pytest.approx(want.metrics["test_loss"], abs=1e-6)


def test_the_configuration_is_left_as_it_was(tmp_path, store):
    args = trl_args(tmp_path)
    make_trainer(DPOTrainer, tmp_path, extra={"args": args} | store)
    assert not args.precompute_ref_log_probs
