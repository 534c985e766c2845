"""The chat page in headless Chromium: type, stream, stop, edit, export, reload, tools; narrow; by
keyboard alone.
"""

import json
import threading
import time

import pytest

from tests.served import ScriptedBackend, serving, web
from tests.waiting import wait_until
from tests.webdriver import CHROMIUM, DRIVER, chromium

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}},
}
CALL = (
    '<minimax:tool_call>\n<invoke name="add">\n<parameter '
    'name="a">12345678901234567890</parameter>\n</invoke>\n</minimax:tool_call>'
)
MARKDOWN = """# Title

| a | b |
|---|---|
| 1 | a cell of some words, and a few more, so that it does not fit |

- one **bold** item with `code` and [a link](https://example.com)

> quoted

```python
def a_function_with_a_long_name(and_an_argument_with_one: str, and_another: int) -> None: ...
```
"""
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
    if "everything" in question:
        return "All of it.\n</think>\n\n" + MARKDOWN
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
    browser.run("document.getElementById('text').focus()")
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
    wait_until(lambda: not server.service.model.engine.occupied)
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


@pytest.mark.parametrize("kept", ["[{", "null", '[{"role": "assistant"}, null]'])
def test_a_kept_conversation_that_cannot_be_read_is_said_and_a_new_one_begins(page, server, kept):
    page.run("sessionStorage.setItem('messages', arguments[0])", kept)
    page.open(server.url)
    page.wait("document.getElementById('status').value.includes('cannot be read')")
    assert page.run("return document.querySelectorAll('article').length") == 0
    assert answer_to(page, "Fresh") == "You said <b>Fresh</b> after 1 turns."


def test_a_tool_call_is_shown_and_its_result_can_be_typed(page):
    page.run("document.getElementById('tools').value = arguments[0]", json.dumps([TOOL]))
    answer_to(page, "use the tool")
    call = f"{LAST}.querySelector('.call')"
    assert page.run(f"return {call}.querySelector('summary').textContent") == "Calls add"
    shown = page.run(f"return {call}.querySelector('pre').textContent")
    assert shown == '{\n  "a": 12345678901234567890\n}'  # not as JavaScript rounds it
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


def test_thinking_can_be_chosen_where_the_chat_template_has_a_switch(page):
    assert page.run("return document.title") == "tiny"
    page.run("document.getElementById('settings').open = true")
    page.run("document.getElementById('thinking').value = 'off'")
    say(page, "Hello")
    error = page.wait(f"{LAST}?.querySelector('.error')?.textContent")
    assert "has no switch for thinking" in error
    page.run("document.getElementById('thinking').value = ''")
    assert answer_to(page, "Hello").startswith("You said")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_part_is_legible_and_fits(page, width, scheme):
    page.emulate_width(width, 800)
    page.emulate_colours(scheme)
    page.assert_legible()  # the examples
    answer_to(page, "everything")
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.assert_legible()
    assert page.run("return document.documentElement.scrollWidth") <= width
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 23, 27)") == (scheme == "dark")
    page.emulate_width(0, 0)


def test_something_moves_before_the_first_token_and_the_speed_stands_below_the_answer(
    page, backend
):
    gate = threading.Event()
    backend.before_call = gate.wait
    try:
        say(page, "Hello")
        waiting = f"{LAST}?.querySelector('.rate.running')?.textContent"
        page.wait(f"{waiting}?.startsWith('Waiting for the first token')")
        before = page.run(f"return {waiting}")
        page.wait(f"{waiting} !== {json.dumps(before)}")
    finally:
        gate.set()
    page.wait(f"{IDLE} && {LAST}.querySelector('.again')")
    rate = page.run(f"return {LAST}.querySelector('.rate').textContent")
    assert "tokens in" in rate
    assert "the first after" in rate
    assert page.run("return document.querySelectorAll('.running').length") == 0


def test_an_example_can_be_clicked_on_the_empty_page(page):
    page.wait("document.querySelectorAll('#welcome button').length === 3")
    page.click("#welcome button")
    page.wait(f"{LAST}?.querySelector('.rate') && {IDLE}")
    assert "capital of France" in page.run(f"return {LAST}.textContent")
    assert page.run("return document.getElementById('welcome').getClientRects().length") == 0


def test_an_answer_can_be_had_again_and_a_question_changed(page):
    answer_to(page, "First")
    answer_to(page, "Second")
    page.click("article:last-child .again")
    page.wait(f"{IDLE} && {LAST}.querySelector('.again')")
    assert page.run(f"return {LAST}.querySelector('.text').textContent").startswith(
        "You said <b>Second</b> after 2 turns."
    )
    assert page.run("return document.querySelectorAll('article').length") == 4
    page.click("article.user .edit")
    page.press("Escape")
    assert page.run("return document.getElementById('text').value") == ""
    page.click("article.user .edit")
    assert page.run("return document.getElementById('text').value") == "First"
    page.press(" of all")
    page.press("Enter")
    page.wait(f"{IDLE} && document.querySelectorAll('article').length === 2")
    assert page.run(f"return {LAST}.querySelector('.text').textContent").startswith(
        "You said <b>First of all</b> after 1 turns."
    )


def test_code_and_answers_can_be_copied(page):
    """What arrives in the clipboard of a page without navigator.clipboard, too."""
    answer_to(page, "everything")
    for clipboard in (True, False):
        if not clipboard:
            page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        for button, wanted in (
            (".code .copy", MARKDOWN.split("python\n")[1].split("\n```")[0]),
            (".actions .copy", MARKDOWN),
        ):
            page.run("document.getElementById('status').value = ''")
            page.click(f"article.assistant {button}")
            page.wait("document.getElementById('status').value === 'Copied.'")
            page.run("document.getElementById('text').focus()")
            page.press("Control+v")
            pasted = "document.getElementById('text').value"
            assert page.run(f"return {pasted}").strip() == wanted.strip()
            page.run(f"{pasted} = ''")
    page.run("document.execCommand = () => false")
    page.click("article.assistant .actions .copy")
    page.wait("document.getElementById('status').value.startsWith('Not copied: the browser ')")
    assert page.run("return document.querySelector('textarea.hidden')") is None


def test_a_conversation_is_exported_as_markdown_and_as_a_request_that_can_be_sent(
    page, server, tmp_path
):
    page.keep_downloads(tmp_path)
    page.run("document.getElementById('tools').value = arguments[0]", json.dumps([TOOL]))
    page.run("document.getElementById('system').value = 'Be `brief`.'")
    answer_to(page, "use the tool")
    answer_to(page, "eight ``` fences")
    for form in ("markdown", "json"):
        page.click("#export > summary")
        page.click(f"#as-{form}")
    wait_until(lambda: len([*tmp_path.glob("tiny-*.md"), *tmp_path.glob("tiny-*.json")]) == 2)
    (text,) = [path.read_text() for path in tmp_path.glob("*.md")]
    assert text.startswith("# Conversation with tiny\n\n## System\n\nBe `brief`.\n\n## You\n")
    assert 'Calls `add`:\n\n```json\n{\n  "a": 12345678901234567890\n}\n```' in text
    assert "## Tool result\n\n````text\neight ``` fences\n````" in text
    assert text.endswith("It is eight ``` fences\n")
    (body,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert body["messages"][2]["tool_calls"][0]["function"]["name"] == "add"
    assert body["tools"] == [TOOL]
    body["messages"].append({"role": "user", "content": "Hello"})
    answered = web.post(f"{server.url}/v1/chat/completions", json=body)
    assert answered.status_code == 200, answered.text


def test_an_answer_that_breaks_off_says_so_and_can_be_asked_for_again(page):
    page.run(
        """
        const real = window.fetch;
        window.fetch = async (...request) => {
          const body = (await real(...request)).body.pipeThrough(new TransformStream({
            transform(piece, out) {
              const text = new TextDecoder().decode(piece);
              if (text.includes("[DONE]") || text.includes("finish_reason\\":\\"stop")) return;
              out.enqueue(piece);
            },
          }));
          window.fetch = real;
          return new Response(body);
        };
        """
    )
    say(page, "Hello")
    error = page.wait(f"{LAST}?.querySelector('.error')?.textContent")
    assert "the connection ended before the answer did" in error
    page.wait(f"{IDLE} && {LAST}.querySelector('.again')")
    page.click("article:last-child .again")
    page.wait(f"{IDLE} && {LAST}.querySelector('.again')")
    assert page.run("return document.querySelectorAll('article, .error').length") == 2


def test_hostile_names_and_words_are_shown_as_they_are(page):
    attack = "<img src=x onerror=hacked=1>"
    tool = {"type": "function", "function": {"name": "add", "description": attack}}
    page.run("document.getElementById('tools').value = arguments[0]", json.dumps([tool]))
    answer_to(page, attack + " tool")
    answer_to(page, attack)
    assert page.run("return typeof hacked") == "undefined"
    assert page.run("return document.querySelectorAll('#log img').length") == 0
    assert attack in page.run("return document.querySelector('article.user').textContent")
    page.run("document.getElementById('tools').value = '{oops'")
    answer_to(page, "Hello")
    assert "the tools in the settings are no JSON" in page.run(f"return {LAST}.textContent")


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
    page.press("Tab")
    assert page.run(f"return {focused}") == "stop"
    page.press("Space")
    page.wait(f"{LAST}.textContent.includes('Stopped.') && {IDLE}")
    assert page.run(f"return {focused}") == "text"
    page.press("a long", "Shift+Enter", " story")
    assert page.run("return document.getElementById('text').value") == "a long\n story"
    page.press("Enter")
    page.wait(
        "document.querySelectorAll('article.assistant').length === 3 && "
        f"{LAST}.querySelector('.text')"
    )
    page.press("Escape")
    page.wait(f"{LAST}.textContent.includes('Stopped.') && {IDLE}")
    seen = []
    outlined = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
    for _ in range(16):
        page.press("Tab")
        seen.append(page.run(f"return {focused}"))
        assert page.run(f"return {outlined} || document.activeElement === document.body"), seen
    assert {"new", "SUMMARY", "log", "send", "BUTTON"} <= set(seen)
    page.run("document.querySelector('#settings > summary').focus()")
    page.press("Enter")
    assert page.run("return document.getElementById('settings').open")
