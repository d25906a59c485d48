"""The demo's task, by hand-made cases."""

import random

import pytest

from dpo_fast.demo.task import BREAKAGES, good_answer, is_right, make_prompts, parses, prompt_text

FIELDS = {"name": "Ada", "age": 36, "pet": "owl"}


def test_prompts_are_distinct_and_seeded():
    prompts = make_prompts(300, random.Random(3))
    assert len({prompt_text(fields) for fields in prompts}) == 300
    assert prompts == make_prompts(300, random.Random(3))
    assert prompts != make_prompts(300, random.Random(4))
    assert {len(fields) for fields in prompts} == {2, 3}


def test_the_good_answer_is_right_and_every_breakage_breaks():
    assert prompt_text(FIELDS) == "name=Ada age=36 pet=owl ->"
    assert is_right(good_answer(FIELDS), {"fields": FIELDS})
    for name, breakage in BREAKAGES.items():
        for seed in range(20):
            broken = breakage(good_answer(FIELDS), random.Random(seed))
            assert not parses(broken), f"{name}: {broken}"


@pytest.mark.parametrize("text", ["", " 7", ' "name"', " [1]", ' {"name": "Ada"} x', "{", "null", "\ud800"])
def test_only_objects_parse(text):
    assert not parses(text)


def test_an_object_of_other_contents_parses_but_is_not_right():
    assert parses(' {"name": "Alan", "age": 36, "pet": "owl"}')
    assert not is_right(' {"name": "Alan", "age": 36, "pet": "owl"}', {"fields": FIELDS})
