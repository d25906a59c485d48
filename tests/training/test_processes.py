"""Several processes train as one would, whatever they share, and end together."""

import json

import pytest
import torch
from oracle import tiny_tokenizer
from rank_runs import train_on_ranks
from safetensors.torch import load_file
from small_runs import QUIET

from dpo_fast.training.run import train

pytestmark = pytest.mark.slow


def metrics(run):
    """Rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_weights(folder):
    """Those of a model or of an adapter."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_equal_runs(ours, theirs, *, loss=1e-6, weight=1e-5):
    """Compare losses and gradient norms of all steps, and the final weights."""
    rows, others = metrics(ours), metrics(theirs)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        name = "loss" if "loss" in row else "eval_loss"
        assert row[name] == pytest.approx(other[name], abs=loss), row["step"]
        for figure in ("num_pairs", "rewards/accuracies", "grad_norm"):
            if figure in row:
                assert row[figure] == pytest.approx(other[figure], rel=1e-4), (row["step"], figure)
    left, right = (final_weights(run / "final") for run in (ours, theirs))
    assert left.keys() == right.keys()
    assert max((left[name] - right[name]).abs().max().item() for name in left) <= weight


@pytest.fixture
def pair_of_runs(make_config, rows, tmp_path):
    """Settings of one process and of each of two: ten steps of 8 rows, which end an epoch with 6, in small packs."""

    def make(**changes):
        common = {"data": rows, "max_steps": 10, "max_tokens_per_batch": 70} | changes
        one = make_config(**common, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8)
        two = make_config(**common, output_dir=str(tmp_path / "two"), per_device_train_batch_size=4)
        return one, two

    return make


CASES = {
    "plain": {},
    "one process has nothing to do": {"max_tokens_per_batch": 4096, "max_rows": 9},
    "compares pairs": {"loss_type": ["aot", "sft_tokens"], "loss_weights": [1.0, 0.1]},
    "reward shift": {"loss_type": "bco"},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 3},
    "held out": {"eval_split": 0.3, "eval_steps": 4, "use_weighting": True},
    "recomputed": {"checkpointing_policy": "full", "gradient_accumulation_steps": 2},
    "8 bit": {"optim": "adamw_8bit"},
    # A moment that rounding alone puts into another code differs by a sixteenth.
    "8 bit fused": {"optim": "adamw_8bit_fused", "learning_rate": 1e-5},
    "lora": {"peft": "lora", "lora_r": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(pair_of_runs, tmp_path, parallel, case):
    one, two = pair_of_runs(parallel=parallel, **CASES[case])
    if "peft" in CASES[case] and parallel == "fsdp":
        pytest.skip("refused: the weights beneath an adapter are whole in each process")
    train(one, console=QUIET)
    train_on_ranks(two, tmp_path)
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def other_model(request, tmp_path_factory):
    """A mixture of experts, or a model whose head is a weight of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if request.param == "mixture":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("other_model", ["mixture", "untied"], indirect=True)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_other_models_as_one_does(pair_of_runs, other_model, tmp_path, parallel):
    one, two = pair_of_runs(parallel=parallel, model=other_model)
    train(one, console=QUIET)
    train_on_ranks(two, tmp_path)
    assert_equal_runs(tmp_path / "two", tmp_path / "one")
