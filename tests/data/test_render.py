"""Conversations as the chat template writes them."""

import pytest
from chat_templates import family_tokenizer
from preference_rows import CHATML, GEMMA, LLAMA_2, LONDON, PARIS, USER, chat_tokenizer, load, texts

from dpo_fast.errors import UserError

BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
THINKING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "bos", "prompt", "chosen"),
    [
        (CHATML, None, "<|im_start|>user\nName a capital.<|im_end|>\n<|im_start|>assistant\n", "Paris.<|im_end|>\n"),
        (LLAMA_2, "<bos>", "<bos>[INST] Name a capital. [/INST]", " Paris. <eos>"),
        (
            GEMMA,
            "<bos>",
            "<bos><start_of_turn>user\nName a capital.<end_of_turn>\n<start_of_turn>model\n",
            "Paris.<end_of_turn>\n",
        ),
    ],
)
def test_chat_templates(tmp_path, template, bos, prompt, chosen):
    tokenizer = chat_tokenizer(template, bos=bos)
    (group,), report = load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}], tokenizer)
    assert texts(group, tokenizer)[:2] == [prompt, chosen]
    assert report.causes == {}


def test_a_template_without_an_end_gets_the_tokenizers(tmp_path):
    tokenizer = chat_tokenizer(BARE)
    (group,), report = load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}], tokenizer)
    assert [answer[-1] for answer in group.answers] == [tokenizer.eos_token_id] * 2
    # It has no generation prompt either, so the model has to write "assistant: " itself.
    assert list(report.causes) == ["differs_from_inference", "end_token_added"]


def test_a_generation_prompt_that_the_whole_does_not_have_is_left_out_and_counted(tmp_path):
    tokenizer = chat_tokenizer(THINKING)
    (group,), report = load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}], tokenizer)
    assert texts(group, tokenizer)[0].startswith("user: Name a capital.<|im_end|>assistant: ".rstrip())
    assert "<think>" not in "".join(texts(group, tokenizer))
    assert list(report.causes) == ["differs_from_inference"]
    assert "<|im_end|>assistant: Paris.<|im_end|>'; inference has" in report.render()
    assert "<|im_end|>assistant: <think>Paris.<|im_end|>' (" in report.render()


def test_tools_reach_the_template(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON], "tools": '[{"name": "atlas"}]'}
    (group,), _ = load(tmp_path, [row], tokenizer)
    assert 'TOOLS [{"name": "atlas"}]' in texts(group, tokenizer)[0]


def test_a_template_that_refuses_a_row_drops_it(tmp_path):
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": [PARIS], "rejected": [LONDON]},
        {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]},
    ]
    groups, report = load(tmp_path, rows, chat_tokenizer(GEMMA, bos="<bos>"))
    assert [group.row for group in groups] == [1]
    assert "System role not supported" in report.render()


def test_a_template_that_fails_on_a_row_drops_it(tmp_path):
    """`tool_calls` of a wrong shape give a Python error inside the template, not one of Jinja's."""
    calls = "{% for m in messages %}{{ m['content'] + (m.tool_calls[0] + '' if m.tool_calls else '') }}{% endfor %}"
    rows = [
        {"prompt": [USER], "chosen": [{**PARIS, "tool_calls": [5]}], "rejected": [LONDON]},
        {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]},
    ]
    groups, report = load(tmp_path, rows, chat_tokenizer(calls))
    assert [group.row for group in groups] == [1]
    assert report.causes["template_error"] == ["line 1"]
    assert "unsupported operand" in report.render()


def test_messages_need_a_template(tmp_path):
    with pytest.raises(UserError, match="--chat_template FILE"):
        load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}])


def test_plain_text_is_wrapped_on_request(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": "Name a capital.", "chosen": "Paris.", "rejected": "London!"}
    (plain,), _ = load(tmp_path, [row], tokenizer)
    (wrapped,), _ = load(tmp_path, [row], tokenizer, apply_chat_template=True)
    assert texts(plain, tokenizer) == ["Name a capital.", "Paris.<eos>", "London!<eos>"]
    assert texts(wrapped, tokenizer)[1] == "Paris.<|im_end|>\n"


THOUGHT = "<think>\nThe largest.\n</think>\n\nRome."
ROME = {"role": "assistant", "content": THOUGHT}
MORE = {"role": "user", "content": "Another?"}


def test_keep_reasoning_puts_the_answer_behind_the_generation_prompt(tmp_path):
    """DeepSeek-R1's template strips every thought, and its generation prompt opens one."""
    tokenizer = family_tokenizer("deepseek")
    row = {"prompt": [USER], "chosen": [ROME], "rejected": [{"role": "assistant", "content": THOUGHT + " Or not."}]}
    (stripped,), report = load(tmp_path, [row], tokenizer)
    assert texts(stripped, tokenizer)[1].strip() == "Rome.<｜end▁of▁sentence｜>"
    assert "<｜Assistant｜>\\n\\nRome.<｜end▁of▁sentence｜>'; inference has" in report.render()
    assert "<｜Assistant｜><think>\\nThe largest." in report.render()
    (kept,), report = load(tmp_path, [row], tokenizer, keep_reasoning=True)
    before = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert before.endswith("<think>\n")
    end = tokenizer.eos_token
    assert texts(kept, tokenizer) == [before, *(f"{THOUGHT[8:]}{more}{end}" for more in ("", " Or not."))]
    assert "reasoning_lost" not in report.causes


def test_keep_reasoning_keeps_it_in_turns_that_are_past(tmp_path):
    """Qwen3's template strips thoughts once the user speaks again; each turn was written with one."""
    tokenizer = family_tokenizer("qwen3")
    row = {"prompt": [USER], "chosen": [ROME, MORE, ROME], "rejected": [ROME, MORE, {**ROME, "content": THOUGHT + "!"}]}
    row["rejected"][0] = {**ROME, "content": THOUGHT + "?"}
    _, report = load(tmp_path, [row], tokenizer, max_length=None)
    assert "reasoning_lost" in report.causes
    (kept,), report = load(tmp_path, [row], tokenizer, max_length=None, keep_reasoning=True)
    assert "reasoning_lost" not in report.causes
    user = "<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(kept, tokenizer)[1] == f"{THOUGHT}<|im_end|>\n{user}{THOUGHT}<|im_end|>\n"
    scored = tokenizer.decode(kept.answers[0][kept.targets(0)])
    assert scored == f"{THOUGHT}<|im_end|>\n" * 2


def test_reasoning_in_a_field_of_its_own_is_kept_too(tmp_path):
    tokenizer = family_tokenizer("deepseek")
    chosen = {"role": "assistant", "content": "Rome.", "reasoning_content": "The largest."}
    row = {"prompt": [USER], "chosen": [chosen], "rejected": [ROME]}
    _, report = load(tmp_path, [row], tokenizer)
    assert "reasoning_lost" in report.causes
    row = {"prompt": [USER], "chosen": [chosen], "rejected": [{**ROME, "content": THOUGHT + "!"}]}
    (kept,), _ = load(tmp_path, [row], tokenizer, keep_reasoning=True)
    assert texts(kept, tokenizer)[1] == "The largest.\n</think>\n\nRome.<｜end▁of▁sentence｜>"


def test_strings_beside_a_chat_template_are_shown_as_they_are_read(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": "Name a capital.", "chosen": "Paris.", "rejected": "London!"}
    _, report = load(tmp_path, [row], tokenizer)
    text = report.render()
    assert "noted 1: strings are read as plain text, although" in text
    assert "--apply_chat_template true wraps" in text
    assert "first row, ⟦scored⟧: Name a capital.⟦Paris.<eos>⟧" in text
    for config in ({"apply_chat_template": False}, {"apply_chat_template": True}):
        _, report = load(tmp_path, [row], tokenizer, **config)
        assert "plain_text" not in report.causes
    _, report = load(tmp_path, [row])
    assert "plain_text" not in report.causes


def test_tools_that_a_template_does_not_know_are_counted(tmp_path):
    row = {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    _, report = load(tmp_path, [row | {"tools": [tool]}], family_tokenizer("gemma"))
    assert "tools_lost" in report.causes
    _, report = load(tmp_path, [row | {"tools": [tool]}], family_tokenizer("qwen3"))
    assert "tools_lost" not in report.causes
