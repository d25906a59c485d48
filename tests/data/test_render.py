"""Conversations as the chat template writes them."""

import pytest
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
