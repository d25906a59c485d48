"""What is scored is what the model would write at inference, in the context that inference has, or the row says so."""

import pytest
from chat_templates import family_tokenizer
from inference_rows import ASK, REFUSED, ROWS, SETTINGS, expected_causes, runs, say
from preference_rows import load


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("family", "kwargs"), SETTINGS, ids=lambda value: value if isinstance(value, str) else str(value)
)
def test_scored_text_is_what_inference_has(tmp_path, family, kwargs, kind):
    tokenizer = family_tokenizer(family)
    row = ROWS[kind] | {"chat_template_kwargs": kwargs}
    if (family, kind) in REFUSED:
        good = {"prompt": [ASK], "chosen": [say("Yes.")], "rejected": [say("No.")]}
        groups, report = load(tmp_path, [row, good], tokenizer, max_length=None)
        assert [group.row for group in groups] == [1] or "tools_lost" in report.causes
        return
    (group,), report = load(tmp_path, [row], tokenizer, max_length=None)
    causes = expected_causes(family, kwargs, kind)
    differing = {"differs_from_inference", "reasoning_lost", "boundary_moved"} & report.causes.keys()
    assert differing == causes, report.render()
    options = {"tools": row.get("tools"), "tokenize": False, **kwargs}
    for number, answer in enumerate((row["chosen"], row["rejected"])):
        turns = [*row["prompt"], *answer]
        wanted = [i for i, turn in enumerate(turns) if i >= len(row["prompt"]) and turn["role"] == "assistant"]
        got = runs(group, number)
        assert len(got) == len(wanted)
        if causes:
            continue
        for (context, scored), i in zip(got, wanted, strict=True):
            before = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, **options)
            assert tokenizer.decode(context) == before
            text = tokenizer.decode(scored)
            assert tokenizer.apply_chat_template(turns[: i + 1], **options) == before + text
            # Nothing but the message and the end of the turn.
            body = text.rstrip().removesuffix(tokenizer.eos_token)
            if "tool_calls" not in turns[i]:
                assert body.strip() == turns[i]["content"].strip()
            else:
                assert '{"city": ' in body
