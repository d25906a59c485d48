"""Several processes train as one would, whatever they share, and end together."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from oracle import tiny_tokenizer
from rank_runs import finish_ranks, start_ranks, train_on_ranks
from safetensors.torch import load_file
from small_runs import QUIET, assert_same_weights, options, wait_for, weights

from dpo_fast.errors import STOPPED, TrainingError
from dpo_fast.training.checkpoint import load_state, verify_checkpoint
from dpo_fast.training.run import train

pytestmark = pytest.mark.slow

STEP = "dpo_fast.training.loop:Trainer.train_step"


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
        for figure in ("num_pairs", "rewards/margins", "grad_norm"):
            if figure in row:
                assert row[figure] == pytest.approx(other[figure], rel=1e-4, abs=1e-6), (row["step"], figure)
    left, right = (final_weights(run / "final") for run in (ours, theirs))
    assert left.keys() == right.keys()
    assert max((left[name] - right[name]).abs().max().item() for name in left) <= weight


@pytest.fixture
def pair_of_runs(make_config, rows, tmp_path):
    """Settings of one process and of each of two: ten steps of 8 rows, which end an epoch with 6, in small packs."""

    def make(**changes):
        # Adam makes steps of one size of the largest and the smallest gradients, whose signs are rounding's.
        common = {"data": rows, "max_steps": 10, "max_tokens_per_batch": 70, "learning_rate": 1e-4} | changes
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
    # A moment that rounding alone puts into another code differs by a sixteenth.
    "8 bit": {"optim": "adamw_8bit", "learning_rate": 1e-6},
    "8 bit fused": {"optim": "adamw_8bit_fused", "learning_rate": 1e-6},
    "lora": {"peft": "lora", "lora_r": 4},
    "qlora": {"peft": "qlora", "lora_r": 4},
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


@pytest.fixture
def shared(make_config, rows):
    """Settings of each of two processes that share weights and save every second of six steps."""
    settings = {"data": rows, "parallel": "fsdp", "per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 2}
    settings |= {"max_tokens_per_batch": 70, "learning_rate": 1e-4}
    return lambda **changes: make_config(**settings | changes)


@pytest.fixture
def uninterrupted(shared, tmp_path):
    """The folder of two processes' run that nothing happened to."""
    train_on_ranks(shared(output_dir=str(tmp_path / "whole")), tmp_path / "logs")
    return tmp_path / "whole"


def test_two_processes_resume_to_the_bit_and_others_to_rounding(shared, uninterrupted, tmp_path):
    processes = start_ranks(shared(), tmp_path, slow=(STEP,), delay=0.05)
    wait_for(processes[0], tmp_path / "rank-0.log", "begins train_step", count=4)
    os.kill(processes[1].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL]
    assert "another process of the run is gone" in (tmp_path / "rank-0.log").read_text()
    killed = tmp_path / "run"
    (checkpoint,) = killed.glob("checkpoint-*")
    assert verify_checkpoint(checkpoint) == []
    assert_same_weights(checkpoint, uninterrupted / checkpoint.name)
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        shutil.copytree(killed, folder / "run")
        config = shared(output_dir=str(folder / "run"), resume="auto")
        train_on_ranks(config, folder, world_size=world_size)
        assert_equal_runs(folder / "run", uninterrupted)
    assert_same_weights(tmp_path / "2" / "run" / "final", uninterrupted / "final")


@pytest.mark.parametrize(("optim", "dtype"), [("adamw_8bit", "float32"), ("adamw_8bit_fused", "bfloat16")])
def test_8_bit_moments_are_dealt_anew(shared, tmp_path, optim, dtype):
    config = shared(optim=optim, dtype=dtype, learning_rate=1e-6, max_steps=4)
    train_on_ranks(config, tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "final")
    again = train(shared(**vars(config) | {"output_dir": str(tmp_path / "one"), "resume": "auto", "max_steps": 6}))
    assert again.step == 6
    assert again.metrics[-1]["num_pairs"] == 4  # as two processes with two rows each


def test_a_signal_to_one_process_stops_and_saves_all(shared, uninterrupted, tmp_path):
    processes = start_ranks(shared(), tmp_path, slow=(STEP,), delay=0.05)
    wait_for(processes[0], tmp_path / "rank-0.log", "begins train_step", count=3)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish_ranks(processes, tmp_path) == [STOPPED, STOPPED]
    assert "stopped by a signal after step 3; continue with --resume auto" in (tmp_path / "rank-0.log").read_text()
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-3") == []
    train_on_ranks(shared(resume="auto"), tmp_path / "resumed")
    assert_same_weights(tmp_path / "run" / "final", uninterrupted / "final")


def test_a_signal_before_the_first_step_ends_all(shared, tmp_path):
    processes = start_ranks(shared(), tmp_path, slow=("dpo_fast.model.policy:Policy.load",), delay=0.5)
    for rank, process in enumerate(processes):
        wait_for(process, tmp_path / f"rank-{rank}.log", "begins load")
    os.kill(processes[0].pid, signal.SIGTERM)
    assert finish_ranks(processes, tmp_path) == [STOPPED, STOPPED]
    assert not (tmp_path / "run" / "final").exists()


def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_the_update(shared, rows, tmp_path):
    processes = start_ranks(shared(loss_type="losses_of_one_process:nan_in_the_second"), tmp_path)
    assert finish_ranks(processes, tmp_path) == [1, 1]
    first, second = ((tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1))
    said = first + second
    assert said.count("the loss of step 2 is not finite in process 1 (data rows, from 0: ") == 1
    assert said.count("dpo-fast train:") == 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_mistake_is_said_once_and_ends_all_with_its_exit_code(shared, tmp_path):
    processes = start_ranks(shared(data=str(tmp_path / "missing.jsonl")), tmp_path)
    assert finish_ranks(processes, tmp_path) == [2, 2]
    assert "".join((tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1)).count("missing.jsonl") == 1


def test_nproc_starts_the_processes(shared, uninterrupted, tmp_path):
    result = train(shared(nproc=2), console=QUIET)
    assert (result.step, result.stopped) == (6, False)
    assert_same_weights(result.model_dir, uninterrupted / "final")
    with pytest.raises(TrainingError, match="exit code 2"):
        train(shared(nproc=2), console=QUIET)  # the folder holds a run
    command = [
        sys.executable,
        "-m",
        "dpo_fast",
        "train",
        "--nproc",
        "2",
        *options(shared(max_steps=200, overwrite=True)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) >= 1


def test_torchrun_starts_them_too(shared, uninterrupted, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [word for word in options(shared()) if not word.startswith("--nproc")]  # which torchrun takes for its own
    subprocess.run([*launcher, "-m", "dpo_fast", "train", *words], check=True, capture_output=True)
    assert_same_weights(tmp_path / "run" / "final", uninterrupted / "final")


@pytest.mark.parametrize(
    "precision",
    [{}, {"bf16": True}, {"dtype": "bfloat16", "optim": "adamw_8bit_fused"}],
    ids=["fp32", "autocast", "bf16 with 8 more bits"],
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_weights_move_at_the_smallest_rates(shared, base, tmp_path, parallel, precision):
    config = shared(parallel=parallel, learning_rate=5e-7, max_steps=2, save_dtype="auto", **precision)
    train_on_ranks(config, tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    before, after = weights(base), weights(checkpoint)
    moved = {name: after[name] != before[name].to(after[name].dtype) for name in after}
    if config.dtype == "bfloat16":
        files = sorted(checkpoint.glob("part-*.pt")) or [checkpoint / "training_state.pt"]
        states = [state for file in files for state in load_state(file)["optimizer"]["state"].values()]
        count = sum(int((state["remainder"] != 0).sum()) for state in states)
    else:
        count = sum(int(x.sum()) for x in moved.values())
    # The embeddings of tokens that no row has do not move. Of weights of 0.2, 24 bits resolve 2e-6, a few such steps.
    read = sum(x.numel() for name, x in moved.items() if "embed" not in name)
    assert count > (0.5 if config.dtype == "bfloat16" else 0.9) * read
