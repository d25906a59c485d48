"""Answers: from the right distribution, with the right log-probs, the same after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from oracle import save_tiny_checkpoint
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast import sample
from dpo_fast.cli import main
from dpo_fast.config import SampleConfig
from dpo_fast.curate.sample import answer_rows, without_duplicates
from dpo_fast.data.tokenize import PairTokenizer
from dpo_fast.errors import UserError

QUIET = Console(quiet=True)
PROMPTS = [
    {"prompt": p, "mark": i} for i, p in enumerate(["The quick brown", "Paris is", "Numbers such as 0 1 2", "A"])
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_checkpoint(folder)
    # A model whose own settings would sample from something else.
    settings = {"do_sample": True, "top_k": 3, "temperature": 0.1, "repetition_penalty": 3.0, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def config_of(model, **settings):
    return SampleConfig(**{"model": model, "num_samples": 4, "max_new_tokens": 6} | settings)


def test_log_probs_are_those_of_a_plain_forward(model):
    config = config_of(model, temperature=1.3, num_samples=30, max_new_tokens=3, generation_batch_size=7)
    rows = answer_rows(PROMPTS, config, console=QUIET)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model).double(), AutoTokenizer.from_pretrained(model)
    checked = 0
    for row in rows:
        assert len(row["responses"]) == len(row["samples"]) == 30
        prompt = tokenizer(row["prompt"])["input_ids"]
        for text, how in zip(row["responses"], row["samples"], strict=True):
            answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [0] * how["finished"]
            if len(answer) != how["num_tokens"]:
                continue  # the text of random tokens need not give the same tokens again
            with torch.no_grad():
                logps = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            want = logps.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert how["logp"] == pytest.approx(want, abs=1e-4)
            checked += 1
    assert checked >= 20


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_first_tokens_come_as_often_as_they_are_likely(model, temperature, top_p):
    number = 4000
    config = config_of(
        model, num_samples=number, max_new_tokens=1, generation_batch_size=2000, temperature=temperature, top_p=top_p
    )
    (row,) = answer_rows(PROMPTS[:1], config, console=QUIET)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        logits = plain(torch.tensor([tokenizer(PROMPTS[0]["prompt"])["input_ids"]])).logits[0, -1]
    p = (logits.double() / temperature).softmax(-1)
    ranked, order = p.sort(descending=True)
    p[order[(ranked.cumsum(0) - ranked) >= top_p]] = 0
    p /= p.sum()
    # Tokens are told apart by their log-prob at temperature 1, which is exact; texts of half characters are not.
    own = logits.double().log_softmax(-1)
    drawn = torch.tensor([how["logp"] for how in row["samples"]], dtype=torch.float64)
    tokens = (drawn[:, None] - own[None]).abs().argmin(1)
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    likely = p * number >= 8
    chi2 = ((counts - p * number) ** 2 / (p * number))[likely].sum().item()
    freedom = int(likely.sum())
    # Five standard deviations of the chi-squared distribution.
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_temperature_0_is_greedy(model):
    rows = answer_rows(PROMPTS, config_of(model, num_samples=1, temperature=0), console=QUIET)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        written = []
        with torch.no_grad():
            while len(written) < 6 and 0 not in written:
                token = plain(ids).logits[0, -1].argmax().item()
                written.append(token)
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert row["responses"] == [tokenizer.decode(written, skip_special_tokens=True)]
        assert row["samples"][0]["num_tokens"] == len(written)
        assert row["samples"][0]["finished"] is (written[-1] == 0)


def test_the_seed_decides_and_other_columns_stay(model):
    first, again, other = (answer_rows(PROMPTS, config_of(model, seed=seed), console=QUIET) for seed in (1, 1, 2))
    assert first == again
    assert [r["responses"] for r in first] != [r["responses"] for r in other]
    assert [row["mark"] for row in first] == [0, 1, 2, 3]


def test_answers_are_shared_among_models_and_temperatures(model, tmp_path):
    save_tiny_checkpoint(tmp_path / "second")
    config = config_of([model, str(tmp_path / "second")], temperature=[0.7, 1.5], num_samples=6)
    row = answer_rows(PROMPTS[:1], config, console=QUIET)[0]
    sources = [(how["model"], how["temperature"]) for how in row["samples"]]
    assert [sources.count(source) for source in dict.fromkeys(sources)] == [2, 2, 1, 1]
    assert len(set(sources)) == 4


def test_duplicates_are_removed_and_counted():
    row = {"responses": ["a", "b", "a", "a"], "samples": [{"logp": i} for i in range(4)]}
    assert without_duplicates(row) == {
        "responses": ["a", "b"],
        "samples": [{"logp": 0, "copies": 3}, {"logp": 1, "copies": 1}],
    }
    greedy = {"responses": ["a"] * 3, "samples": [{}] * 3}
    assert without_duplicates(greedy)["samples"] == [{"copies": 3}]


def test_strings_become_turns_if_the_model_has_a_template(model, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    config = config_of(model, chat_template=str(tmp_path / "template.jinja"))
    message = [{"role": "user", "content": "The quick brown"}]
    wrapped, given, plain = (
        answer_rows([{"prompt": prompt}], replace(config, apply_chat_template=wrap), console=QUIET)[0]
        for prompt, wrap in (("The quick brown", None), (message, None), ("The quick brown", False))
    )
    assert wrapped == given
    assert wrapped["prompt"] == message
    assert plain["prompt"] == "The quick brown"
    assert plain["responses"] == answer_rows(PROMPTS[:1], config_of(model), console=QUIET)[0]["responses"]


def test_columns_of_the_template_may_have_other_names(model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ mode }}{{ tone }}" + TEMPLATE + "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}")
    row = {"q": "The", "s": "Be brief.", "t": [{"name": "search"}], "k": {"mode": "fast"}}
    names = {"prompt_column": "q", "system_column": "s", "tools_column": "t", "chat_template_kwargs_column": "k"}
    config = config_of(
        model, chat_template=str(template), chat_template_kwargs={"tone": "calm", "mode": "slow"}, **names
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairTokenizer, "prompt_ids", lambda self, *arguments: seen.append(arguments) or [5])
        (written,) = answer_rows([row], config, console=QUIET)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The"}]
    assert seen == [(turns, [{"name": "search"}], {"mode": "fast", "tone": "calm"})]
    assert {name: written[name] for name in row} == row | {"q": turns}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairTokenizer, "prompt_ids", lambda self, *arguments: seen.append(arguments) or [5])
        answer_rows([row], replace(config, system_column=None, chat_template_kwargs_column=None), console=QUIET)
    assert seen[1] == (turns[1:], [{"name": "search"}], {"mode": "slow", "tone": "calm"})


def test_rows_without_a_prompt_are_dropped_and_named(model, capsys):
    rows = [{"prompt": ""}, {"question": "?"}, {"prompt": 3}, {"prompt": "The"}]
    written = answer_rows(rows, config_of(model), console=Console())
    assert [row["prompt"] for row in written] == ["The"]
    assert "3 rows dropped (row 0: field 'prompt': expected a prompt, found an empty string)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row has a prompt to answer: row 0: field 'prompt' is missing"):
        answer_rows(rows[1:2], config_of(model), console=QUIET)


def test_each_prompt_is_tokenized_once_per_model(model, tmp_path, monkeypatch):
    save_tiny_checkpoint(tmp_path / "second")
    seen, prompt_ids = [], PairTokenizer.prompt_ids
    monkeypatch.setattr(PairTokenizer, "prompt_ids", lambda *args: seen.append(args[1]) or prompt_ids(*args))
    config = config_of([model, str(tmp_path / "second")], temperature=[0.7, 1.5], max_new_tokens=2)
    answer_rows(PROMPTS, config, console=QUIET)
    assert seen == [row["prompt"] for row in PROMPTS] * 2


def test_datasets_in_and_out(model):
    from datasets import Dataset

    written = sample(Dataset.from_list(PROMPTS), model, num_samples=3, max_new_tokens=4, console=QUIET)
    assert written.column_names == ["prompt", "mark", "responses", "samples"]
    assert len(written) == 4
    for row in written:
        assert len(set(row["responses"])) == len(row["responses"]) == len(row["samples"])
        assert sum(how["copies"] for how in row["samples"]) == 3


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_answers(model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS * 6))
    command = ["sample", "--model", model, "--data", "prompts.jsonl", "--max_new_tokens", "8", "--num_samples", "6"]
    command += ["--generation_batch_size", "4", "--out"]
    process = subprocess.Popen([sys.executable, "-m", "dpo_fast.cli", *command, "out.jsonl"], cwd=tmp_path)
    log = tmp_path / "out.jsonl.partial"
    while not log.exists() or log.read_bytes().count(b'{"key"') < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = log.read_bytes().count(b'{"key"')
    assert 3 <= kept < 36
    assert not (tmp_path / "out.jsonl").exists()
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert main([*command, "out.jsonl"]) == 0
        assert main([*command, "whole.jsonl"]) == 0
    finally:
        os.chdir(before)
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not log.exists()


@pytest.mark.parametrize("change", ["model.safetensors", "tokenizer.json", "template.jinja", "versions"])
def test_answers_of_a_changed_model_are_not_mixed(tmp_path, monkeypatch, capsys, change):
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint(tmp_path / "model")
    Path("template.jinja").write_text(TEMPLATE)
    Path("prompts.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    command = ["sample", "--model", "model", "--data", "prompts.jsonl", "--out", "out.jsonl", "--max-new-tokens", "2"]
    command += ["--chat_template", "template.jinja", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("dpo_fast.curate.sample.write_rows", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(command) == 130
    named = "files of the model model"
    if change == "versions":
        named = "versions"
        monkeypatch.setattr("dpo_fast.curate.identity.version", lambda package: "1.0")
    else:
        file = tmp_path / change if change == "template.jinja" else tmp_path / "model" / change
        named = "chat template" if change == "template.jinja" else named
        file.write_bytes(file.read_bytes() + b" ")
    capsys.readouterr()
    assert main(command) == 2
    assert f"left by an interrupted run with other {named}: rerun with those to resume it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "no model given"),
        ({"model": []}, "no model given"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"temperature": -1.0}, "--temperature -1.0: expected a number, 0 or above"),
        ({"temperature": [0.5, 1.0], "num_samples": 1}, "--num_samples 1: expected at least one for each of the 2"),
        ({"top_p": 0.0}, "--top_p 0.0"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"generation_batch_size": 0}, "--generation_batch_size 0"),
        ({"backend": "vllm"}, "pip install vllm"),
    ],
)
def test_settings_that_cannot_work(model, monkeypatch, settings, message):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=message):
        answer_rows(PROMPTS, config_of(**{"model": model} | settings), console=QUIET)


def test_vllm_is_asked_for_the_models_own_log_probs(model, monkeypatch):
    """Against a stand-in with vLLM's interface: the engine itself needs a GPU."""
    asked = {}

    class LLM:
        def __init__(self, **settings):
            asked.update(settings)

        def generate(self, inputs, parameters, use_tqdm):
            asked["prompts"] = [entry["prompt_token_ids"] for entry in inputs]
            asked["parameters"] = parameters
            out = SimpleNamespace(text="x", cumulative_logprob=-1.5, token_ids=(5, 0), finish_reason="stop")
            return [SimpleNamespace(outputs=[out]) for _ in inputs]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    (row,) = answer_rows(PROMPTS[:1], config_of(model, backend="vllm", num_samples=2), console=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert asked["prompts"] == [tokenizer(PROMPTS[0]["prompt"])["input_ids"]] * 2
    assert asked["logprobs_mode"] == "raw_logprobs"
    assert len({p.seed for p in asked["parameters"]}) == 2
    assert row["responses"] == ["x", "x"]
    assert [(how["logp"], how["num_tokens"], how["finished"]) for how in row["samples"]] == [(-1.5, 2, True)] * 2


def test_the_file_has_a_row_a_prompt(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    command = ["sample", "--model", model, "--data", "prompts.jsonl", "--out", "out.jsonl", "--max-new-tokens", "4"]
    assert main(command) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["mark"] for row in rows] == [0, 1, 2, 3]
    assert "32 answers" in capsys.readouterr().out
    assert main(command) == 2
    assert "out.jsonl exists already" in capsys.readouterr().err
