"""A repository on the Hugging Face hub: what it holds, and parts of its files."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from re import Match
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.hub import HUB_ID, WANTED_FILES, named_hub_errors
from neuron_minimax.errors import CheckpointError
from neuron_minimax.files import is_plain_name

SECONDS = 60  # for one request


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the hub says of a shard: its size, and the SHA-256 of its bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    nbytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One commit of a repository, its shards, and the names of its small files."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    hub_id: str
    shards: Mapping[str, Published]
    small: tuple[str, ...]

    @classmethod
    def ask(cls, match: Match[str]) -> "Repository":
        """Ask the hub for the files of a repository.

        Raises CheckpointError when it does not give it, or publishes no digest of a shard.
        """
        from huggingface_hub import HfApi

        with named_hub_errors(match):
            info = HfApi().model_info(
                match["name"], revision=match["revision"], files_metadata=True
            )
        shards = {}
        small = []
        for file in info.siblings or ():
            name = file.rfilename
            if not is_plain_name(name):
                continue
            if not name.endswith(".safetensors"):
                wanted = any(Path(name).match(pattern) for pattern in WANTED_FILES)
                small += [name] if wanted else []
                continue
            if file.lfs is None or file.size is None:
                raise CheckpointError(
                    f"the hub publishes no SHA-256 of {name} of {match[0]}, which streaming "
                    "compares; leave out --stream"
                )
            shards[name] = Published(nbytes=file.size, sha256=file.lfs.sha256)
        return cls(hub_id=f"{match['name']}@{info.sha}", shards=shards, small=tuple(small))

    @property
    def match(self) -> Match[str]:
        """The name and the commit, as `download` takes them."""
        match = HUB_ID.fullmatch(self.hub_id)
        assert match is not None
        return match

    def title_of(self, shard: str) -> Path:
        """How messages call a shard."""
        return Path(self.match["name"]) / shard

    def require_parts(self) -> None:
        """Raise CheckpointError when the hub gives a whole file to who asks for a part of it. What
        it gives is not read here: it may be larger than memory.
        """
        from huggingface_hub import utils

        shard = max(self.shards, key=lambda name: self.shards[name].nbytes, default=None)
        if shard is None or self.shards[shard].nbytes < 2:
            return
        with named_hub_errors(self.match, f"a part of {shard} of "):
            url, headers = self._request(shard, 0, 1)
            options: dict[str, Any] = {"headers": headers, "timeout": SECONDS}
            if hasattr(utils, "http_stream_backoff"):
                answer: Any = utils.http_stream_backoff("GET", url, **options)
            else:  # before huggingface_hub 1.0
                answer = utils.http_backoff("GET", url, **options, stream=True)
            with answer as response:
                utils.hf_raise_for_status(response)
                if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                    raise CheckpointError(
                        f"the hub gives no parts of files, as of {self.title_of(shard)}, and "
                        "cannot be streamed from: leave out --stream"
                    )

    def part(self, shard: str, start: int, end: int) -> bytes:
        """Return the bytes of a shard from one place to another.

        Raises CheckpointError when they do not arrive.
        """
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        with named_hub_errors(self.match, f"a part of {shard} of "):
            url, headers = self._request(shard, start, end)
            response = http_backoff("GET", url, headers=headers, timeout=SECONDS)
            hf_raise_for_status(response)
            data: bytes = response.content
        if len(data) != end - start:
            raise CheckpointError(
                f"the hub gave {size_text(len(data))} of {self.title_of(shard)} where "
                f"{size_text(end - start)} were asked for; run again, or leave out --stream"
            )
        return data

    def _request(self, shard: str, start: int, end: int) -> tuple[str, dict[str, str]]:
        """Return the URL and the headers that ask for a part of a shard."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.match["name"], shard, revision=self.match["revision"])
        return url, {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
