"""Preference rows for tests, files of them, and tokenizers to read them with."""

import json

from oracle import tiny_tokenizer

from dpo_fast.config import DataConfig
from dpo_fast.data.load import load_groups

CHATML = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Name a capital."}
PARIS = {"role": "assistant", "content": "Paris."}
LONDON = {"role": "assistant", "content": "London!"}
GOOD = {"prompt": "The", "chosen": " fox", "rejected": " dog"}


def chat_tokenizer(template, *, bos=None):
    tokenizer = tiny_tokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, **({"bos_token": bos} if bos else {})})
    tokenizer.chat_template = template
    return tokenizer


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def load(tmp_path, rows, tokenizer=None, **config):
    return load_groups(DataConfig(data=write(tmp_path, rows), **config), tokenizer or tiny_tokenizer())


def texts(group, tokenizer):
    return [tokenizer.decode(ids) for ids in (group.prompt_ids, *group.answers)]
