"""The embedded demo model behind the server: it answers in words, with reasoning apart, to the
official client.
"""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import openai
import pytest

from neuron_minimax.backends import load
from neuron_minimax.backends.directory import check_compiled, read_manifest
from neuron_minimax.backends.made_demo import MADE_DEMO, note_demo
from neuron_minimax.demo import DEMO
from neuron_minimax.pipeline import Unwatched, make_ready
from neuron_minimax.serving import server
from neuron_minimax.serving.server import demo_model
from tests.served import MODEL, ask, open_client, serving
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer
from tests.tiny_traced import write_traced


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return demo_model(tmp_path_factory.mktemp("demo"), options={"slots": 3, "engine": "eager"})


@pytest.fixture(scope="module")
def client(traced):
    with serving(load(traced)) as served:
        yield open_client(served)


def test_the_demo_model_reasons_and_answers(client):
    choice = ask(client, "What is the capital of France?", max_tokens=200).choices[0]
    assert "Paris" in choice.message.content
    assert choice.message.reasoning_content
    assert choice.finish_reason == "stop"
    assert "<think>" not in choice.message.content


def test_the_demo_model_is_streamed_word_by_word(client):
    chunks = list(ask(client, "What is the capital of France?", max_tokens=200, stream=True))
    content = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(content) > 1
    assert "Paris" in "".join(content)
    assert isinstance(chunks[0], openai.types.chat.ChatCompletionChunk)


def test_a_demo_that_was_made_before_is_recognized(traced):
    before = (traced / "manifest.json").stat().st_mtime_ns
    assert demo_model(traced.parent, options={"slots": 3, "engine": "eager"}) == traced
    assert (traced / "manifest.json").stat().st_mtime_ns == before


@pytest.fixture
def clone(traced, tmp_path, monkeypatch):
    """A current directory in which this user's `make demo` has run; a compile of the demo is just
    listed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled = []
    monkeypatch.setattr(server, "compile_model", lambda _, where, **more: compiled.append(where))
    shutil.copytree(traced, tmp_path / "traced_model/demo", copy_function=os.link)
    assert note_demo(MADE_DEMO) == ""
    return compiled


def test_without_a_model_the_demo_that_is_there_is_served(clone):
    said = []
    assert demo_model(progress=said.append) == MADE_DEMO
    assert said == [f"the embedded demo model: {MADE_DEMO}, as `make demo` has made it"]
    assert clone == []


NOT_MINE = "it is not what you have last compiled"


def note_of(made):
    return made.parents[1] / "cache/neuron-minimax/made-demo"


def compiled_by_another(made):
    """Replace the manifest by one that is as right, and another one."""
    replace(read_manifest(made), compile_seconds=0.125).write(made)
    assert check_compiled(made)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda made: (made / "manifest.json").unlink(), None),
        (lambda made: (made / "model").chmod(0o777), "may be written by others"),
        (lambda made: (made / "model/config.json").unlink(), "config.json"),
        (lambda made: note_of(made).unlink(), NOT_MINE),
        (lambda made: note_of(made).write_text("0" * 64 + "\n"), NOT_MINE),
        (compiled_by_another, NOT_MINE),
    ],
    ids=["unfinished", "open to others", "damaged", "foreign", "not the last", "another compile"],
)
def test_a_demo_that_is_there_and_cannot_be_trusted_or_loaded_is_left_alone_with_the_reason(
    clone, tmp_path, change, reason
):
    change(tmp_path / "traced_model/demo")
    said = []
    where = demo_model(progress=said.append)
    assert where == tmp_path / "cache/neuron-minimax/demo-serving"
    assert clone == [where]
    *why, making = said
    assert making == f"the embedded demo model: compiled once into {where}"
    assert [reason in line for line in why] == ([] if reason is None else [True])


def test_another_model_in_the_place_of_the_demo_is_left_alone(clone, tmp_path):
    shutil.rmtree(tmp_path / "traced_model/demo")
    shutil.copytree(
        write_traced(tmp_path / "other"), tmp_path / "traced_model/demo", copy_function=os.link
    )
    assert note_demo(MADE_DEMO) == ""
    said = []
    assert demo_model(progress=said.append) != MADE_DEMO
    assert "it is no compile of this version's demo model" in said[0]


class Heard(Unwatched):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_the_demo_that_run_has_compiled_is_served_and_one_that_it_has_found_is_not(
    tmp_path, monkeypatch
):
    def make(model, seq_len=64):
        heard = Heard()
        make_ready(model, options={"engine": "eager", "seq_len": seq_len}, watcher=heard)
        return heard.said[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / MADE_DEMO
    make(DEMO)
    digest = hashlib.sha256((made / "manifest.json").read_bytes()).hexdigest()
    assert note_of(made).read_text() == f"{digest}\n"
    assert [path.name for path in note_of(made).parent.iterdir()] == ["made-demo"]
    make(write_tiny(write_tokenizer(tmp_path / "tiny", 384), vocab_size=384))  # no demo
    assert demo_model() == MADE_DEMO
    note_of(made).unlink()  # as if another had made it
    assert "is up to date" in make(DEMO)
    assert not note_of(made).exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "manifest.json"))  # no directory
    assert make(DEMO, seq_len=32).startswith("`serve` will compile a demo of its own: ")


def test_the_demo_model_calls_a_tool_and_answers_from_its_result(client):
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "description": "Get the weather", "parameters": city},
    }
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = {"model": MODEL, "tools": [tool], "temperature": 0, "max_tokens": 200}
    first = client.chat.completions.create(messages=messages, **options).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    messages.append(first.message.model_dump(exclude_none=True))
    messages.append(
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": '{"temperature": 21, "condition": "sunny"}',
        }
    )
    second = client.chat.completions.create(messages=messages, **options).choices[0]
    assert second.finish_reason == "stop"
    assert "21" in second.message.content
