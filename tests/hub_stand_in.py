"""A stand-in for the Hugging Face hub on loopback: the questions that huggingface_hub asks of one
repository, and its files, whole and in parts.
"""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = re.compile(r"bytes=(?P<start>\d+)-(?P<end>\d*)")
SomeHub = TypeVar("SomeHub", bound="Hub")


class Hub(ThreadingHTTPServer):
    """Serves a directory as the repository org/tiny.

    `given` counts the bytes of each file that were asked for whole, `spoiled` says how many more
    times a file arrives with a wrong byte, and `cut` after how many bytes a connection ends, once.
    `before` is called with the name of each file that is asked for whole.
    """

    daemon_threads = True

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.checkpoint = checkpoint
        self.forget()

    def forget(self) -> None:
        """Be as at first."""
        self.commit = COMMIT
        self.given: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self.spoiled: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.has_digests = True
        self.gives_parts = True
        self.before: Callable[[str], None] = lambda name: None

    def environment(self, home: Path) -> dict[str, str]:
        """What a command needs that is to ask this hub."""
        return {
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def serving(hub: SomeHub) -> Iterator[SomeHub]:
    """Serve while the block runs."""
    with hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(SimpleHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(path for path in self.server.checkpoint.iterdir())
        if "/resolve/" in path:
            self._give(self.server.checkpoint / path.rpartition("/")[2])
        elif "/tree/" in path:
            self._send(json.dumps([self._row(file) for file in files]).encode())
        else:
            siblings = [
                {"rfilename": file.name, "blobId": "0" * 40, **self._row(file)} for file in files
            ]
            info = {"id": "org/tiny", "sha": self.server.commit, "siblings": siblings}
            self._send(json.dumps(info).encode())

    def _row(self, file: Path) -> dict[str, object]:
        size = file.stat().st_size
        row: dict[str, object] = {"type": "file", "path": file.name, "size": size, "oid": "0" * 40}
        if file.suffix == ".safetensors" and self.server.has_digests:
            digest = _sha256(file)
            row["lfs"] = {"sha256": digest, "oid": digest, "size": size, "pointerSize": 134}
        return row

    def _give(self, file: Path) -> None:
        if not file.exists():
            self.send_error(404)
            return
        data = file.read_bytes()
        asked = WHOLE.fullmatch(self.headers.get("Range", ""))
        start = int(asked["start"]) if asked and self.server.gives_parts else 0
        end = len(data)
        if self.command == "GET" and (asked is None or not asked["end"]):
            self.server.before(file.name)
            self.server.given[file.name] += len(data) - start
            if self.server.spoiled[file.name]:
                self.server.spoiled[file.name] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
        elif asked and not self.server.gives_parts:
            self.server.given[file.name] += end
        elif asked:
            end = min(end, int(asked["end"]) + 1)
            self.server.parts[file.name] += end - start
        stop = self.server.cut.pop(file.name, end) if self.command == "GET" else end
        self._send(data[start:end], _sha256(file), stop, start if asked else None, len(data))

    def _send(
        self,
        data: bytes,
        digest: str = "",
        stop: int | None = None,
        start: int | None = None,
        size: int = 0,
    ) -> None:
        self.send_response(200 if start is None or not self.server.gives_parts else 206)
        self.send_header("Content-Length", str(len(data)))
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:stop])

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
