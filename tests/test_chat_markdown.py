"""The chat page's Markdown in headless Chromium: as markdown-it reads it, never HTML, and the same
however it streams in.
"""

import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from neuron_minimax.serving.access import PAGE_FILES
from neuron_minimax.serving.app import PAGE_POLICY
from tests.served import ScriptedBackend, serving, web
from tests.webdriver import CHROMIUM, DRIVER, chromium

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"
)
ROOT = Path(__file__).parents[1]

TEXTS = [
    "One line.",
    "**bold**, *italic*, __bold__, _italic_, ~~gone~~, ***both***, `code`, ``a ` b``.",
    "snake_case_name and 2 * 3 * 4, **not closed, *nor this",
    "**bold *and italic* inside** and *a **b** c*",
    "# One\n\n## Two ##\nText right below.\n\n###### Six\n#nothing",
    "- one\n- two\n  - nested\n  - again\n- three\n",
    "1. one\n2. two\n   - a\n   - b\n\n   more of two\n3. three",
    "7. seven\n8. eight",
    "Text\n- item at once\n\nText\n\n2019. was no list, here\n",
    "> quoted *text*\n> goes on\n>\n> - a list\n\nand out",
    "```python\nx = '<b>'\n\n    y = **2**\n```\nAfter.",
    "~~~\ntildes ``` inside\n~~~",
    "````md\n```\ninner\n```\n````",
    "```js\nnever closed <script>alert(1)</script>\n- x",
    "1. Do this:\n   ```sh\n   ls -l\n   ```\n2. Then that",
    "| a | b |\n|:--|--:|\n| 1 | `2` |\n| x \\| y | **z** |\n\nEnd",
    "Above:\n| a | b |\n|---|---|\n| 1 | 2 |",
    "a | b\nno table",
    "---\n\n***\n\n- - -",
    '[text](https://example.com/x_y) and [t](<https://example.com/> "title") and <https://a.b/c>',
    "[**bold** label](https://example.com/a_(b))",
    "[no](javascript:alert(1)) [no](relative/path) [no link] (x) [",
    "\\*not italic\\* \\`not code\\` \\_ 1\\. C:\\path",
    "<b>no</b> <img src=x onerror=alert(1)> a < b & c",
    "Two\n\nparagraphs\nof two lines",
    "- a\n\n- b\n\n  second paragraph of b\n",
    "- [ ] open\n- [x] done",
    "* star\n* list\n\n+ plus",
    "Text\n***bold*** goes on\n---and so\n#hashtag\n```a` b\nx | y\n--|--no\nend",
    "日本語の**太字**です。 😀 `コード`",
]
HOSTILE = [
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](<java\tscript:hacked=1>)",
    "[x](data:text/html,<script>hacked=1</script>)",
    "[x](vbscript:x) [x](file:///etc/passwd) [x](blob:x) [x](//evil.example)",
    "<javascript:hacked=1> <data:text/html,x>",
    '![x](javascript:hacked=1) ![x"onerror=hacked=1](https://x.example/a.png)',
    '[x](https://x.example/"onmouseover="hacked=1)',
    "[<img src=x onerror=hacked=1>](https://x.example)",
    "<img src=x onerror=hacked=1><svg onload=hacked=1><script>hacked=1</script>",
    '```html"><img src=x onerror=hacked=1>\n<script>hacked=1</script>\n```',
    "```\n<script>hacked=1</script>",
    "| <img src=x onerror=hacked=1> | b |\n|---|---|\n| <script>hacked=1</script> | x |",
    "# <iframe srcdoc='<script>parent.hacked=1</script>'>",
    "- <style>*{display:none}</style>\n> <base href=//evil.example>",
    "`</code><script>hacked=1</script>`",
    "> " * 400 + "deep",
    "- " * 400 + "deep",
    "*_" * 3000 + "deep" + "_*" * 3000,
    "[" * 5000 + "](x)" + "`" * 99 + "![" * 5000,
    "\\(" * 3000 + "$$" + "<" * 3000 + "https://" * 1000,
]
# What an answer may be made of, and where its links may lead.
TAGS = set(
    "p h3 h4 h5 h6 ul ol li blockquote hr pre code div span button table thead tbody tr th td "
    "strong em del a".upper().split()
)
RENDER = """
const box = document.createElement("div");
document.body.append(box);
return import("/markdown.js").then(({ Markdown }) => {
  const text = new Markdown(box);
  for (const piece of arguments[0]) { text.append(piece); text.paint(); }
  const result = (RESULT);
  box.remove();
  return result;
});
"""
# The box as [tag, children], without what is the page's own.
TREE = """
(function tree(node) {
  if (node.nodeType === 3) return node.data;
  if (node.className === "code") {
    const info = node.querySelector(".language").textContent;
    return ["pre", [info === "text" ? "" : info, node.querySelector("code").textContent]];
  }
  return [node.tagName.toLowerCase(), [...node.childNodes].map(tree)];
})(box)[1]
"""


@pytest.fixture(scope="module")
def server(tokenizer_directory):
    with serving(ScriptedBackend(tokenizer_directory, lambda prompt: "")) as served:
        yield served


@pytest.fixture(scope="module")
def page(server):
    with chromium() as open_browser:
        browser = open_browser()
        browser.open(server.url)
        yield browser


def rendered(page, pieces, result):
    return page.run(RENDER.replace("RESULT", result), pieces)


class Tree(HTMLParser):
    """HTML as [tag, children]."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[list] = [["div", []]]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        node = [tag, []]
        if tag == "code" and self.stack[-1][0] == "pre":
            node[1].append(dict(attrs).get("class", "").removeprefix("language-"))
        self.stack[-1][1].append(node)
        if tag != "hr":
            self.stack.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag != "hr":
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1][1].append(data)


def plain(nodes: list) -> list:
    """The tree without what the two are free to choose: paragraphs of items, white space, the
    division of texts, and the page's two levels of headings.
    """
    found: list = []
    for node in nodes:
        if isinstance(node, str):
            if found and isinstance(found[-1], str):
                found[-1] += node
            else:
                found.append(node)
            continue
        tag, children = node
        if tag == "pre":  # of markdown-it it holds one code element
            language, code = children if isinstance(children[0], str) else children[0][1]
            found.append(["pre", [language, code.rstrip("\n")]])
        elif tag == "div":  # around a table
            found += plain(children)
        else:
            tag = {f"h{n}": f"h{min(6, n + 2)}" for n in range(1, 7)}.get(tag, tag)
            found.append([{"s": "del"}.get(tag, tag), plain(children)])
    found = [" ".join(node.split()) if isinstance(node, str) else node for node in found]
    return [node for node in found if node]


def unwrapped(nodes: list) -> list:
    """The same without the paragraphs in items."""
    found: list = []
    for node in nodes:
        if isinstance(node, str) or node[0] == "pre":
            found.append(node)
            continue
        children = unwrapped(node[1])
        if node[0] == "li":
            parts = [["", [child]] if isinstance(child, str) else child for child in children]
            children = [
                x for tag, inner in parts for x in (inner if tag in ("", "p") else [[tag, inner]])
            ]
        found.append([node[0], children])
    return found


def shifted(nodes: list) -> list:
    """The page's headings as those of the text."""
    return [
        node
        if isinstance(node, str)
        else [{"h3": "h1", "h4": "h2", "h5": "h3"}.get(node[0], node[0]), shifted(node[1])]
        for node in nodes
    ]


@needs_browser
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_markdown_means_what_markdown_it_says(page, text):
    oracle = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    # There relative links are links, and a scheme it refuses is text.
    oracle.validateLink = lambda url: bool(re.match("https?:|mailto:", url))  # type: ignore
    wanted = unwrapped(plain(Tree(oracle.render(text)).stack[0][1]))
    assert unwrapped(plain(shifted(rendered(page, [text], TREE)))) == wanted


@needs_browser
def test_streaming_in_any_pieces_gives_the_same(page):
    generator = random.Random(7)
    for text in [*TEXTS, "\n\n".join(TEXTS), "\n".join(TEXTS), *HOSTILE[:17]]:
        whole = rendered(page, [text], "box.innerHTML")
        for longest in (1, 3, 40) if len(text) < 500 else (9, 40):
            pieces = []
            rest = text
            while rest:
                size = generator.randint(1, longest)
                pieces.append(rest[:size])
                rest = rest[size:]
            assert rendered(page, pieces, "box.innerHTML") == whole, text


@needs_browser
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_becomes_anything_but_text(page, text):
    found = rendered(
        page,
        [text],
        """({
          tags: [...box.querySelectorAll("*")].map(e => e.tagName),
          links: [...box.querySelectorAll("a")].map(a => [a.protocol, a.rel, a.target]),
          attributes: [...box.querySelectorAll("*")].flatMap(e => e.getAttributeNames()),
          hacked: typeof hacked,
        })""",
    )
    assert set(found["tags"]) <= TAGS
    for protocol, rel, target in found["links"]:
        assert protocol in ("https:", "http:")
        assert (rel, target) == ("noopener noreferrer", "_blank")
    assert set(found["attributes"]) <= {"class", "type", "href", "title", "target", "rel", "start"}
    assert found["hacked"] == "undefined"


@needs_browser
def test_only_the_last_block_is_made_anew(page):
    """A finished block, and the code block that goes on, stay the same elements."""
    paragraphs = [f"Paragraph {n}\nwith **two** lines.\n\n" for n in range(30)]
    found = page.run(
        """
        const box = document.createElement("div");
        return import("/markdown.js").then(({ Markdown }) => {
          const text = new Markdown(box);
          const add = (piece) => { text.append(piece); text.paint(); };
          arguments[0].forEach(add);
          const first = [...box.children].slice(0, 28);
          let made = 0;
          const seen = new MutationObserver(() => {});
          seen.observe(box, { childList: true, subtree: true });
          add("```python\\n");
          const button = box.querySelector("button");
          for (let line = 0; line < 50; line++) add(`x = ${line}\\n`);
          add("```\\n");
          const changes = seen.takeRecords().filter((record) => record.addedNodes.length);
          const stayed = first.every((node) => node.isConnected || node.parentNode === box);
          return [stayed, button === box.querySelector("button"), changes.length];
        });
        """,
        paragraphs,
    )
    stayed, same_button, changes = found
    assert stayed
    assert same_button
    assert changes < 10  # not one for each of the 50 lines


def test_the_page_has_no_way_to_make_html_of_text_or_to_reach_another_host(server):
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|setAttribute\("
        r"['\"](on|style|href|src)|importScripts|\bon\w+\s*="
    )
    for path, file in PAGE_FILES.items():
        text = file.read_text(encoding="utf-8")
        assert not forbidden.search(text), path
        assert not re.search(r"(src|href)=\"(?!/|data:,)|url\(|@import", text), path
        headers = web.get(server.url + path).headers
        assert headers["content-security-policy"] == PAGE_POLICY
    assert "default-src 'none'" in PAGE_POLICY
    assert "unsafe" not in PAGE_POLICY
    assert "require-trusted-types-for 'script'" in PAGE_POLICY
