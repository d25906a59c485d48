"""Rows of all kinds, the templates that they are rendered by, and where these are not what inference has."""

import numpy as np
from chat_templates import FAMILIES

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Where is it warm?"}
MORE = {"role": "user", "content": "And in winter?"}
THOUGHT = "<think>\nThe south, surely.\n</think>\n\nIn the south."
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def say(text):
    return {"role": "assistant", "content": text}


def call(city):
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}


RESULT = {"role": "tool", "content": "22 degrees", "name": "weather", "tool_call_id": "call00001"}
ROWS = {
    "single": {"prompt": [ASK], "chosen": [say("In Rome.")], "rejected": [say("In Oslo.")]},
    "past turns": {
        "prompt": [ASK, say("In Rome."), MORE],
        "chosen": [say("In Cairo.")],
        "rejected": [say("In Oslo, I think.")],
    },
    "several turns": {
        "prompt": [ASK],
        "chosen": [say("In Rome."), MORE, say("In Cairo.")],
        "rejected": [say("In Oslo."), MORE, say("No idea.")],
    },
    "system": {"prompt": [SYSTEM, ASK], "chosen": [say("In Rome.")], "rejected": [say("In Oslo.")]},
    "tools": {
        "prompt": [ASK],
        "tools": [TOOL],
        "chosen": [call("Rome"), RESULT, say("In Rome.")],
        "rejected": [call("Oslo"), RESULT, say("In Oslo.")],
    },
    "thinking": {"prompt": [ASK], "chosen": [say(THOUGHT)], "rejected": [say(THOUGHT.replace("south", "north"))]},
    "past thinking": {
        "prompt": [ASK],
        "chosen": [say(THOUGHT), MORE, say(THOUGHT)],
        "rejected": [say(THOUGHT.replace("south", "north")), MORE, say(THOUGHT)],
    },
}
SETTINGS = [(family, {}) for family in FAMILIES] + [("qwen3", {"enable_thinking": False})]
# What the templates cannot render, and where their own rendering is not what inference has. All else must agree.
# DeepSeek's reads a tool call only if its content is null, and transformers drops nulls.
REFUSED = {("gemma", "system"), ("gemma", "tools"), ("deepseek", "tools")}
THINKING = {"thinking", "past thinking"}


def expected_causes(family, kwargs, kind):
    if family == "deepseek":
        # Its generation prompt opens a thought that turns do not have, and it strips the thoughts there are.
        return {"reasoning_lost" if kind in THINKING else "differs_from_inference"}
    if family == "qwen3" and not kwargs:
        # A last turn without a thought gets an empty one; past thoughts are stripped.
        return {"thinking": set(), "past thinking": {"reasoning_lost"}}.get(kind, {"differs_from_inference"})
    if family == "qwen3":
        # The generation prompt closes a thought, which past turns do not show; it takes none from an answer.
        one_turn = {"single", "past turns", "system"}
        lost = {"reasoning_lost"} if kind == "past thinking" else set()
        return set() if kind in one_turn else {"differs_from_inference"} | lost
    return set()


def runs(group, number):
    """(context ids, scored ids) of each stretch of scored tokens."""
    ids = np.concatenate([group.prompt_ids, group.answers[number]])
    places = group.targets(number) + len(group.prompt_ids)
    stretches = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [(ids[: part[0]].tolist(), ids[part].tolist()) for part in stretches]
