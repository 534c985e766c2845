"""A plugin of pytest that writes down what passes between the tests' clients and their servers: a
request that is answered with 200, and its whole answer, both a line of JSON.
"""

import json
import os
from pathlib import Path
from typing import Any

from tests import served

FILE = "EXCHANGES"  # the variable of the environment that names it


def pytest_configure() -> None:
    served.around = Recorder


class Recorder:
    """An application around another."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = []
        said = []
        status = []

        async def heard() -> Any:
            message = await receive()
            asked.append(message.get("body", b""))
            return message

        async def told(message: Any) -> None:
            status.append(message.get("status"))
            said.append(message.get("body", b""))
            await send(message)

        await self._app(scope, heard, told)
        if scope["type"] == "http" and scope["method"] == "POST" and status[0] == 200:
            exchange = {
                "path": scope["path"],
                "request": json.loads(b"".join(asked)),
                "answer": b"".join(said).decode(),
            }
            with Path(os.environ[FILE]).open("a") as file:
                file.write(json.dumps(exchange) + "\n")
