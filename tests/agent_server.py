"""A server with a scripted model as agents use it: what the tests of every protocol share."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.served import MODEL, ScriptedBackend, Served, serving, web

USER = {"role": "user", "content": "Go."}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
CALL = (
    '<invoke name="get_weather">\n<parameter name="city">{}</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n'
)


def weather_script(prompt: str) -> str:
    """Call twice in one turn, once in the next, then answer from the last result."""
    results = prompt.rpartition("]~b]user")[2].count("<response>")
    if results < 3:
        cities = ("Oslo", "São Paulo") if not results else ("Rome",)
        calls = "".join(map(CALL.format, cities))
        return (
            f"Look {results}.\n</think>\n\nOn it.\n<minimax:tool_call>\n{calls}</minimax:tool_call>"
        )
    said = prompt.rpartition("<response>")[2].partition("</response>")[0]
    return f"Enough.\n</think>\n\nIt is {said}."


class Agent:
    """A client of a server whose model says what each request has it say."""

    def __init__(self, backend: ScriptedBackend, served: Served) -> None:
        self.backend = backend
        self.url = f"{served.url}/v1/chat/completions"
        self.prompt: list[int] = []

    def post(
        self,
        says: str = "</think>\n\nYes.",
        messages: Sequence[dict[str, Any]] = (USER,),
        **options: Any,
    ) -> httpx.Response:
        backend = self.backend

        def script(prompt: str) -> str:
            self.prompt = backend.prompt
            return says

        backend.script = script
        body = {"model": MODEL, "messages": list(messages), "temperature": 0, "max_tokens": 300}
        return web.post(self.url, json=body | options)

    def ask(self, *arguments: Any, **options: Any) -> Any:
        """Return the choice of an answer."""
        response = self.post(*arguments, **options)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def rendered(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Return the prompt that messages become."""
        self.ask(messages=messages, **options)
        return self.backend.tokenizer.spell(self.prompt)


@contextmanager
def holding(tokenizer_directory: Path) -> Iterator[tuple[Served, threading.Event]]:
    """Serve with one slot, and a backend that waits for the gate before each call."""
    gate = threading.Event()
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 300, slots=1)
    backend.before_call = gate.wait
    with serving(backend) as served:
        yield served, gate
        gate.set()
