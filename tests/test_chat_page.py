"""The chat page in headless Chromium: type, stream, stop, reload, tools; narrow; by keyboard
alone.
"""

import json
import time

import pytest

from tests.served import ScriptedBackend, serving
from tests.webdriver import CHROMIUM, DRIVER, chromium

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}},
}
CALL = (
    '<minimax:tool_call>\n<invoke name="add">\n<parameter '
    'name="a">7</parameter>\n</invoke>\n</minimax:tool_call>'
)
LAST = "[...document.querySelectorAll('article.assistant')].at(-1)"
IDLE = "document.getElementById('log').ariaBusy === 'false'"


def script(prompt):
    question = prompt.rpartition("]~b]user\n")[2].partition("[e~[")[0]
    if "<response>" in prompt:
        return (
            "The tool spoke.\n</think>\n\nIt is "
            + prompt.rpartition("<response>")[2].partition("</response>")[0]
        )
    if "long" in question:
        return "On and on.\n</think>\n\n" + "word " * 500
    if "tool" in question:
        return "I need it.\n</think>\n\n" + CALL
    return (
        f"Thinking about it.\n</think>\n\nYou said <b>{question}</b> after "
        f"{prompt.count(']~b]user')} turns."
    )


@pytest.fixture(scope="module")
def backend(tokenizer_directory):
    return ScriptedBackend(tokenizer_directory, script)


@pytest.fixture(scope="module")
def server(backend):
    with serving(backend) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with chromium() as open_browser:
        yield open_browser()


@pytest.fixture
def page(server, browser, backend):
    """The page as a new visitor sees it."""
    backend.before_call = lambda: time.sleep(0.002)
    browser.open(server.url)
    browser.run("sessionStorage.clear()")
    browser.open(server.url)
    browser.wait("document.getElementById('model').textContent === 'tiny'")
    return browser


def say(page, text):
    page.run("document.getElementById('text').focus()")
    page.press(text, "Enter")


def answer_to(page, text):
    say(page, text)
    page.wait(f"{LAST}?.querySelector('.rate') && {IDLE}")
    return page.run(f"return {LAST}.querySelector('.text')?.textContent")


def test_an_answer_streams_in_with_its_reasoning_folded_away(page, server):
    assert answer_to(page, "Hello") == "You said <b>Hello</b> after 1 turns."
    reasoning = f"{LAST}.querySelector('details.reasoning')"
    assert page.run(f"return [{reasoning}.open, {reasoning}.querySelector('pre').textContent]") == [
        False,
        "Thinking about it.",
    ]
    assert "tokens/s" in page.run(f"return {LAST}.querySelector('.rate').textContent")
    assert answer_to(page, "Again") == "You said <b>Again</b> after 2 turns."
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith(server.url) for name in loaded)


def test_text_appears_while_the_answer_is_still_being_made_and_stop_frees_the_slot(
    page, server, backend
):
    backend.before_call = lambda: time.sleep(0.01)
    say(page, "a long story")
    page.wait(f"{LAST}?.querySelector('.text')?.textContent.length > 20")
    assert page.run("return document.getElementById('log').ariaBusy") == "true"
    page.click("#stop")
    page.wait(f"{LAST}.textContent.includes('Stopped.') && {IDLE}")
    end = time.monotonic() + 5
    while server.service.model.engine.occupied:
        assert time.monotonic() < end
        time.sleep(0.01)
    backend.before_call = lambda: None
    assert answer_to(page, "Hello") == "You said <b>Hello</b> after 2 turns."


def test_a_reload_keeps_the_conversation_and_a_new_chat_forgets_it(page, server):
    answer_to(page, "Remember me")
    page.open(server.url)
    assert page.wait("document.querySelectorAll('article').length") == 2
    assert answer_to(page, "And now?") == "You said <b>And now?</b> after 2 turns."
    page.click("#new")
    assert page.run("return document.querySelectorAll('article').length") == 0
    assert answer_to(page, "Fresh") == "You said <b>Fresh</b> after 1 turns."


def test_a_tool_call_is_shown_and_its_result_can_be_typed(page):
    page.run("document.getElementById('tools').value = arguments[0]", json.dumps([TOOL]))
    answer_to(page, "use the tool")
    call = f"{LAST}.querySelector('.call')"
    assert page.run(f"return {call}.querySelector('summary').textContent") == "Calls add"
    assert json.loads(page.run(f"return {call}.querySelector('pre').textContent")) == {"a": 7}
    assert answer_to(page, "eight") == "It is eight"


def test_sampling_settings_reach_the_server_and_its_refusals_are_shown(page):
    page.run("document.getElementById('settings').open = true")
    page.run("document.getElementById('max_tokens').value = '3'")
    say(page, "Hello")
    page.wait(f"{LAST}?.textContent.includes('Cut off') && {IDLE}")
    page.run("document.getElementById('top_p').value = '7'")
    say(page, "Hello")
    error = page.wait(f"{LAST}.querySelector('.error')?.textContent")
    assert "top_p" in error


def test_at_400_pixels_nothing_is_cut_off(page):
    page.emulate_width(400, 700)
    answer_to(page, "x" * 200)
    assert page.run("return innerWidth") == 400
    assert page.run("return document.documentElement.scrollWidth") <= 400
    page.run("document.getElementById('settings').open = true")
    assert page.run("return document.documentElement.scrollWidth") <= 400
    box_of = "(id) => document.getElementById(id).getBoundingClientRect().toJSON()"
    boxes = page.run(f"return ['send', 'text', 'new', 'log'].map({box_of})")
    assert all(box["width"] > 0 and box["left"] >= 0 and box["right"] <= 400 for box in boxes)
    page.emulate_width(0, 0)  # as the window is


def test_the_keyboard_alone_is_enough(page, backend):
    focused = "document.activeElement.id || document.activeElement.tagName"
    assert page.run(f"return {focused}") == "text"
    page.press("Hello", "Enter")
    page.wait(f"{LAST}?.querySelector('.rate') && {IDLE}")
    assert page.run(f"return {focused}") == "text"
    backend.before_call = lambda: time.sleep(0.01)
    page.press("a long story", "Enter")
    page.wait(f"{LAST}?.querySelector('.text')")
    assert page.run(f"return {focused}") == "stop"
    page.press("Space")
    page.wait(f"{LAST}.textContent.includes('Stopped.') && {IDLE}")
    page.press("a long story", "Enter")
    page.wait(
        "document.querySelectorAll('article.assistant').length === 3 && "
        f"{LAST}.querySelector('.text')"
    )
    page.press("Escape")
    page.wait(f"{LAST}.textContent.includes('Stopped.') && {IDLE}")
    seen = []
    for _ in range(12):
        page.press("Tab")
        seen.append(page.run(f"return {focused}"))
    assert {"new", "SUMMARY", "log", "send"} <= set(seen)
    page.run("document.querySelector('#settings > summary').focus()")
    page.press("Enter")
    assert page.run("return document.getElementById('settings').open")
