"""The page in a real browser: keys, buttons, undo, hostile answers, narrow windows. Debian's chromium, nothing else."""

import json
import shutil

import pytest
from by_hand_pages import page_of, session_of

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = "/usr/bin/chromium"
if shutil.which(CHROMIUM) is None:
    pytest.skip(f"{CHROMIUM} is not there", allow_module_level=True)
expect = sync_api.expect
expect.set_options(timeout=30_000)

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SIDES = ("#left", "#right")
HTML = "<h1>big</h1><img src=x onerror=alert(1)><script>alert(2)</script></div><style>*{display:none}</style>"
HTML += "<iframe srcdoc='<script>parent.alert(3)</script>'></iframe>&lt;b&gt; <a href='javascript:alert(4)'>x</a>"
CONTROLS = "a\x00b\x1b[31mc\x08\u202etxt.exe\u2028end\ttab"
ROWS = [{"prompt": f"prompt {n}", "responses": [f"answer {n}a", f"answer {n}b"]} for n in range(3)]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens pages; none of them may say anything to the console, open a dialog, or ask another place for anything."""
    wrong, contexts = [], []

    def open_page(address, *, width=1200, height=760, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        root = address.removesuffix("page.html")
        page.on("request", lambda request: request.url.startswith(root) or wrong.append(request.url))
        page.goto(address)
        expect(page.locator("#done")).not_to_have_text("–")  # a key before that has nothing to judge
        return page

    open_page.wrong = wrong
    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def done(page, number, total):
    expect(page.locator("#done")).to_have_text(f"{number} of {total}")


def press(page, key, number, total):
    page.keyboard.press(key)
    done(page, number, total)


def choices(session):
    return [c["choice"] for row in session.rows() for c in row["comparisons"]]


def test_keys_and_buttons_judge_undo_and_end(tmp_path, open_page):
    rows = [{"prompt": f"prompt {n}", "responses": ["a", "b"]} for n in range(9)]
    with session_of(rows, tmp_path, repeat_share=0) as session:
        with page_of(session, seconds_to_end=60) as (server, thread):
            page = open_page(server.address)
            expect(page.locator("#undo")).to_be_disabled()
            keys = ["ArrowLeft", "1", "ArrowRight", "2", "0", "t", "T", "s"]
            for number, key in enumerate(keys, 1):
                shown = session.show()
                expect(page.locator("#prompt")).to_have_text(shown[0].prompt[0][1])
                expect(page.locator("#left")).to_have_text(shown[1])
                expect(page.locator("#right")).to_have_text(shown[2])
                press(page, key, number, 9)
            expected = ["left", "left", "right", "right", "tie", "tie", "tie", "skip"]
            assert [session._judged[place]["choice"] for place in range(8)] == expected
            for key in ("x", "Enter", "ArrowUp", "Control+1", "Alt+2", "Meta+0"):
                page.keyboard.press(key)
            press(page, "u", 7, 9)
            page.get_by_role("button", name="Answer 2 is better").click()
            done(page, 8, 9)
            expect(page.locator("#message")).to_have_text("Saved: answer 2 is better")
            page.get_by_role("button", name="Undo").click()
            done(page, 7, 9)
            page.get_by_role("button", name="Skip").click()
            done(page, 8, 9)
            press(page, "1", 9, 9)
            expect(page.locator("#end")).to_be_visible()
            expect(page.locator("#comparison")).to_be_hidden()
            expect(page.locator("#summary")).to_contain_text("8 judged · 1 skipped")
            page.keyboard.press("1")  # there is nothing to judge
            press(page, "u", 8, 9)
            expect(page.locator("#comparison")).to_be_visible()
            server._seconds_to_end = 0.2
            press(page, "2", 9, 9)
            expect(page.locator("#farewell")).to_contain_text("You can close this page")
            expect(page.locator("#undo")).to_be_disabled()
            thread.join(timeout=30)
            assert not thread.is_alive()
        assert session.is_finished
        assert session._judged[8]["choice"] == "right"


def test_a_held_key_and_a_quick_double_press_judge_once(tmp_path, open_page):
    with session_of(ROWS, tmp_path, repeat_share=0) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        done(page, 0, 3)
        page.keyboard.down("1")
        done(page, 1, 3)
        for _ in range(5):
            page.keyboard.down("1")  # repeats, as of a key that is held
        page.keyboard.up("1")
        assert session.progress().done == 1
        page.evaluate("for (let i = 0; i < 5; i++) document.dispatchEvent(new KeyboardEvent('keydown', {key: '2'}))")
        done(page, 2, 3)
        page.reload()
        done(page, 2, 3)
        assert [session._judged[place]["choice"] for place in (0, 1)] == ["left", "right"]


def test_hostile_answers_are_text(tmp_path, open_page):
    rows = [{"prompt": HTML, "responses": [HTML, CONTROLS]}]
    with session_of(rows, tmp_path, repeat_share=0) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        done(page, 0, 1)
        _, left, _ = session.show()
        html, controls = ("#left", "#right") if left == HTML else ("#right", "#left")
        assert page.locator(html).evaluate("box => box.textContent") == HTML
        assert page.locator(html).evaluate("box => box.childElementCount") == 0
        assert page.locator("#prompt").evaluate("box => box.textContent") == HTML
        assert page.locator("#prompt p").evaluate_all("all => all.map(p => p.childElementCount)") == [0]
        assert page.locator("script, iframe, img, style, a").count() == 1  # the page's own script
        shown = page.locator(controls).evaluate("box => box.textContent")
        assert shown == "a\\x00b\\x1b[31mc\\x08\\u202etxt.exe\u2028end\ttab"
        page.screenshot(path=tmp_path / "hostile.png")
        press(page, "1", 1, 1)


def test_the_policy_would_stop_a_script_that_got_in(tmp_path, open_page):
    with session_of(ROWS, tmp_path) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        done(page, 0, 3)
        page.evaluate(
            "html => { const box = document.createElement('div'); box.innerHTML = html; document.body.append(box);"
            "const script = document.createElement('script'); script.textContent = 'alert(5)'; box.append(script); }",
            HTML,
        )
        for _ in range(2):
            page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        refused = [line for line in open_page.wrong if "Content Security Policy" in line]
        assert len(refused) >= 3
        assert open_page.wrong == refused, "no dialog was opened, nothing was asked for"
        open_page.wrong.clear()


def test_a_long_answer_scrolls_in_its_own_box_and_starts_at_its_top(tmp_path, open_page):
    words = "word " * 20_000
    rows = [{"prompt": "p\n" * 500, "responses": [f"{n}{words}", f"{n}{'x' * 100_000}"]} for n in range(2)]
    with session_of(rows, tmp_path, repeat_share=0) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        done(page, 0, 2)
        _, left, right = session.show()
        assert page.locator("#left").evaluate("box => box.textContent") == left
        assert page.locator("#right").evaluate("box => box.textContent") == right
        expect(page.locator("#left-length")).to_have_text(f"{len(left):,} characters")
        boxes = "['prompt', 'left', 'right'].map(id => document.getElementById(id))"
        for one in page.evaluate(f"{boxes}.map(b => [b.scrollHeight - b.clientHeight, b.scrollWidth - b.clientWidth])"):
            assert one[0] > 1000
            assert one[1] <= 0
        assert page.evaluate("document.documentElement.scrollHeight <= window.innerHeight")
        expect(page.get_by_role("button", name="Tie")).to_be_in_viewport(ratio=1)
        page.evaluate(f"{boxes}.forEach(b => {{ b.scrollTop = 500; }})")
        page.screenshot(path=tmp_path / "long.png")
        press(page, "1", 1, 2)
        assert page.evaluate(f"{boxes}.map(b => b.scrollTop)") == [0, 0, 0]


def test_right_to_left_text_runs_from_the_right_in_its_own_box(tmp_path, open_page):
    rows = [{"prompt": "מה שלומך?", "responses": ["مرحبا بالعالم", "hello world"]}]
    with session_of(rows, tmp_path, repeat_share=0) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        done(page, 0, 1)
        _, left, _ = session.show()
        directions = page.evaluate(
            "['left', 'right'].map(id => getComputedStyle(document.getElementById(id)).direction)"
        )
        assert directions == (["ltr", "rtl"] if left == "hello world" else ["rtl", "ltr"])
        assert page.locator("#prompt p").evaluate("p => getComputedStyle(p).direction") == "rtl"
        assert page.locator("#left-title").evaluate("title => getComputedStyle(title).direction") == "ltr"
        page.screenshot(path=tmp_path / "right_to_left.png")


def test_messages_show_their_roles_and_an_empty_answer_says_so(tmp_path, open_page):
    chat = [{"role": role, "content": f"said by {role}"} for role in ("system", "user", "assistant", "user")]
    with session_of([{"prompt": chat, "responses": ["", "b"]}], tmp_path) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        done(page, 0, 1)
        expect(page.locator("#prompt .role")).to_have_text(["system", "user", "assistant", "user"])
        expect(page.locator(".answer .empty")).to_have_text("empty")


def test_a_second_tab_that_is_behind_judges_nothing_and_catches_up(tmp_path, open_page):
    with session_of(ROWS, tmp_path, repeat_share=0) as session, page_of(session) as (server, _):
        one, two = open_page(server.address), open_page(server.address)
        done(two, 0, 3)
        press(one, "1", 1, 3)
        two.keyboard.press("2")
        expect(two.locator("#message")).to_contain_text("This page was out of date")
        done(two, 1, 3)
        assert choices(session) == ["left"]
        expect(two.locator("#prompt")).to_have_text(session.show()[0].prompt[0][1])
        press(two, "2", 2, 3)
        assert [text for text in open_page.wrong if "409" not in text] == []
        open_page.wrong.clear()


def test_agreement_and_time_are_shown(tmp_path, open_page):
    with session_of(ROWS[:1], tmp_path, repeat_share=1.0) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        expect(page.locator("#agreement")).to_have_text("–")
        press(page, "0", 1, 2)
        press(page, "0", 2, 2)
        expect(page.locator("#agreement")).to_have_text("1 of 1")
        expect(page.locator("#time")).to_have_text("0:00")
        assert [page.evaluate(f"duration({s})") for s in (59.6, 754, 3600 + 65)] == ["1:00", "12:34", "1:01:05"]


def test_a_program_that_is_gone_is_named(tmp_path, open_page):
    with session_of(ROWS, tmp_path) as session:
        with page_of(session) as (server, _):
            page = open_page(server.address)
            done(page, 0, 3)
        page.keyboard.press("1")
        expect(page.locator("#message")).to_contain_text("Rerun the same command")
        assert not choices(session)
    assert [text for text in open_page.wrong if "ERR_CONNECTION_REFUSED" not in text] == []
    open_page.wrong.clear()


@pytest.mark.parametrize("width", [320, 390, 700, 1000])
@pytest.mark.parametrize("height", [400, 700])
def test_everything_is_reached_in_any_window(tmp_path, open_page, width, height):
    rows = [{"prompt": "word " * 300, "responses": ["long " * 1000, "W" * 3000]}]
    with session_of(rows, tmp_path) as session, page_of(session) as (server, _):
        page = open_page(server.address, width=width, height=height)
        done(page, 0, 1)
        page.screenshot(path=tmp_path / f"{width}x{height}.png")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
        for button in page.locator("button").all():
            expect(button).to_be_in_viewport(ratio=1)
        for name in ("#prompt", "#left", "#right"):
            box = page.locator(name)
            box.scroll_into_view_if_needed()
            expect(box).to_be_in_viewport()
            assert box.evaluate("box => box.clientHeight") > 80
        left, right = (page.locator(side).evaluate("box => box.getBoundingClientRect().toJSON()") for side in SIDES)
        assert (left["bottom"] <= right["top"]) == (width < 768)


# Of the text that a person must read, against what is painted behind it.
CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const colour = channels(getComputedStyle(node).backgroundColor);
    return colour.length === 4 && colour[3] === 0 ? behind(node.parentElement) : colour;
  };
  return ["h1", "h2", ".length", "dt", "dd", "#prompt p", "#left", "button", "#undo", "#message"].map((name) => {
    const node = document.querySelector(name);
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    return [name, (a + 0.05) / (b + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_focus_and_names(tmp_path, open_page, scheme):
    with session_of(ROWS, tmp_path) as session, page_of(session) as (server, _):
        page = open_page(server.address, scheme=scheme)
        press(page, "1", 1, 3)
        page.screenshot(path=tmp_path / f"{scheme}.png")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(ground.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")
        for name, contrast in page.evaluate(CONTRAST):
            assert contrast >= 4.5, name
        reached = []
        for _ in range(8):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.dataset.choice"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert reached == ["prompt", "left", "right", "left", "tie", "right", "undo", "skip"]
        tree = page.locator("body").aria_snapshot()
        for named in ('progressbar "Comparisons done"', 'region "Prompt"', "Answer 1", "Answer 2", "status"):
            assert named in tree
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")  # the focused button, undo, and no other
        done(page, 0, 3)


def test_the_log_of_a_browsers_judgements_is_whole(tmp_path, open_page):
    with session_of(ROWS, tmp_path, repeat_share=0) as session, page_of(session) as (server, _):
        page = open_page(server.address)
        done(page, 0, 3)
        for number, key in enumerate("12", 1):
            press(page, key, number, 3)
            # What the page shows as done is on disk already.
            lines = [json.loads(line) for line in (tmp_path / "out.jsonl.partial").read_text().splitlines()]
            assert sum("key" in line for line in lines) == number
            assert lines[-1]["result"]["choice"] == {"1": "left", "2": "right"}[key]
