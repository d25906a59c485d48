"""Templates that would run for ever or fill the memory: one line."""

import signal
import threading
import time

import pytest
from oracle import tiny_tokenizer

from dpo_fast.data import template_limits
from dpo_fast.data.render import ChatTemplate
from dpo_fast.data.row_report import RowError
from dpo_fast.errors import UserError

NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)
ENDLESS = {
    "loops in loops": (NESTED, "takes longer than 0.5 s for one conversation"),
    "a long string": ("{{ 'x' * 10000000000 }}", "builds more than 1024 MiB"),
    "a string that doubles": (DOUBLED, "builds more than 1024 MiB"),
    "a filter": ("{{ 'a'|center(10000000000) }}", "builds more than 1024 MiB"),
    "a format": ("{{ '%10000000000d'|format(3) }}", "builds more than 1024 MiB"),
    "a power": ("a\n{{ 10 ** (10 ** 9) }}", r"line 2: uses \*\*"),
}


def rendered(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_knows_no_end_is_one_line(kind, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.5 if kind == "loops in loops" else 30)
    template, message = ENDLESS[kind]
    start = time.monotonic()
    with pytest.raises(UserError, match=f"^the chat template.*{message}") as error:
        rendered(template)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 30
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(
    "template", ["{% for i in range(1000000) %}x{% endfor %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"]
)
def test_what_the_sandbox_stops_concerns_the_row(template):
    with pytest.raises(RowError):
        rendered(template)


def test_a_long_text_concerns_the_row(monkeypatch):
    monkeypatch.setattr("dpo_fast.data.render.CHARS", 100)
    with pytest.raises(RowError, match="it writes 101 characters; expected at most 100"):
        rendered("{{ 'x' * 101 }}")


def test_a_timer_of_somebody_else_goes_on():
    fired = threading.Event()
    previous = signal.signal(signal.SIGALRM, lambda *_: fired.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 30)
        assert rendered("{{ messages[0].content }}") == "a"
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_another_thread_can_render():
    found = []
    thread = threading.Thread(target=lambda: found.append(rendered("{{ messages[0].content }}")))
    thread.start()
    thread.join()
    assert found == ["a"]
