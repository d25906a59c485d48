"""Chat templates as they are published (TRL carries them; Mistral's is beside this) and tokenizers for them."""

from functools import cache
from importlib import resources
from pathlib import Path

from oracle import tiny_tokenizer

# As of Mistral-7B-Instruct-v0.3: tools before the last question, the system's text within it, call ids of 9 characters.
MISTRAL = Path(__file__).with_name("mistral.jinja")

# Name: (file of TRL's, beginning, end of a turn, further tokens).
FAMILIES = {
    "chatml": ("qwen2_5", None, "<|im_end|>", ["<|im_start|>"]),
    "llama3": ("llama3_1", "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("gemma", "<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "qwen3": ("qwen3", None, "<|im_end|>", ["<|im_start|>"]),
    "deepseek": (
        "deepseek_r1_distill",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ["<｜User｜>", "<｜Assistant｜>"],
    ),
    "mistral": (None, "<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]),
}


@cache
def family_tokenizer(family):
    """A small tokenizer with a family's template and special tokens."""
    file, begin, end, others = FAMILIES[family]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": others})
    if begin:
        tokenizer.add_special_tokens({"bos_token": begin})
    source = MISTRAL if file is None else resources.files("trl") / "chat_templates" / f"{file}.jinja"
    template = source.read_text()
    tokenizer.chat_template = template
    return tokenizer
