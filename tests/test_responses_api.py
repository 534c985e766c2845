"""/v1/responses as OpenAI's official client sees it."""

import itertools
import json
import re
import threading

import openai
import pytest

from neuron_minimax.serving.responses_api import store
from neuron_minimax.serving.responses_api.store import Store, Stored
from tests.agent_server import CALL, PARAMETERS, holding, weather_script
from tests.served import MODEL, ScriptedBackend, open_client, serving, web, with_field
from tests.tiny_tokenizer import write_tokenizer
from tests.waiting import wait_until

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather",
    "parameters": PARAMETERS,
    "strict": False,
}


@pytest.fixture(scope="module")
def backend(tokenizer_directory):
    return ScriptedBackend(tokenizer_directory, weather_script)


@pytest.fixture(scope="module")
def served(backend):
    with serving(backend) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return open_client(served)


def answer(client, stream=False, **options):
    """A response, of a stream the one that its last event has."""
    options = {"model": MODEL, "input": "Weather?", "tools": [TOOL]} | options
    if not stream:
        return client.responses.create(**options)
    *_, last = client.responses.create(stream=True, **options)
    return last.response


def without_ids(response):
    return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]


def outputs_of(response):
    """The results of a response's calls."""
    return [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": f"rain in {json.loads(item.arguments)['city']}",
        }
        for item in response.output
        if item.type == "function_call"
    ]


def as_chat(turns):
    """The chat messages of a conversation: of each response one, and the results of its calls."""
    messages = [{"role": "user", "content": "Weather?"}]
    for response, outputs in turns:
        reasoning, message, *calls = response.output
        function_calls = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
        messages.append(
            {
                "role": "assistant",
                "content": message.content[0].text,
                "reasoning_content": reasoning.content[0].text,
                "tool_calls": function_calls,
            }
        )
        messages += [
            {"role": "tool", "tool_call_id": each["call_id"], "content": each["output"]}
            for each in outputs
        ]
    return messages


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_an_agent_goes_several_turns_and_the_prompt_is_that_of_the_same_chat(
    served, backend, client, stored, stream
):
    turns = []
    given = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
    options = {"instructions": "Be brief.", "store": stored}
    response = answer(client, stream, input=given, **options)
    for _ in range(2):
        outputs = outputs_of(response)
        turns.append((response, outputs))
        if stored:
            options["previous_response_id"] = response.id
            given = outputs
        else:
            given += [item.model_dump(exclude_none=True) for item in response.output] + outputs
        response = answer(client, stream, input=given, **options)
    assert response.status == "completed"
    assert response.output_text == "It is rain in Rome."
    chat = [{"role": "system", "content": "Be brief."}, *as_chat(turns)]
    function = {name: TOOL[name] for name in ("name", "description", "parameters", "strict")}
    tools = [{"type": "function", "function": function}]
    rendered = web.post(f"{served.url}/tokenize", json={"messages": chat, "tools": tools}).json()
    assert backend.prompt == rendered["tokens"]
    assert response.usage.input_tokens == rendered["count"]
    assert response.usage.input_tokens_details.cached_tokens > 0
    if stored:
        assert client.responses.retrieve(response.id).output_text == "It is rain in Rome."
    else:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


@pytest.mark.parametrize("kind", [{"type": "item_reference"}, {"type": None}, {}], ids=str)
def test_items_may_be_referred_to_by_their_ids(backend, client, kind):
    response = answer(client)
    asked = {"role": "user", "content": "Weather?"}
    answer(client, input=[asked, *response.output, *outputs_of(response)])
    prompt = backend.prompt
    references = [kind | {"id": item.id} for item in response.output]
    for mixed in (references, [references[0], *response.output[1:3], references[3]]):
        answer(client, input=[asked, *mixed, *outputs_of(response)])
        assert backend.prompt == prompt
    unsaid = {"type": "reasoning", "id": response.output[0].id, "summary": [], "content": []}
    for item in (unsaid, unsaid | {"id": "rs_unknown"}):
        answer(client, input=[asked, item, *response.output[1:], *outputs_of(response)])
        assert (backend.prompt == prompt) == (item is unsaid)
    again = answer(client, input=[references[1], asked], previous_response_id=response.id)
    assert again.status == "completed"


def test_what_is_referred_to_is_stored_and_ones_own(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, weather_script)
    with serving(backend, api_keys=(b"one", b"two")) as served:
        one = open_client(served, api_key="one")
        response = answer(one)
        reference = {"type": "item_reference", "id": response.output[0].id}
        answer(one, input=[reference])
        unstored = {"id": answer(one, store=False).output[0].id}
        other = open_client(served, api_key="two")
        for client, unknown in ((one, {"id": "x"}), (one, unstored), (other, reference)):
            with pytest.raises(openai.NotFoundError, match="no item") as missing:
                answer(client, input=[unknown])
            assert missing.value.param == "input"
        one.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError, match="no item"):
            answer(one, input=[reference])


@pytest.mark.parametrize("name", ["previous_response_id", "previous\\u005fresponse_id"])
def test_a_response_is_gone_on_from_however_its_field_is_spelled(served, backend, client, name):
    first = answer(client, tools=[])
    body = f'{{"model": "{MODEL}", "input": "Go on.", "{name}": "{first.id}"}}'
    headers = {"content-type": "application/json"}
    response = web.post(f"{served.url}/v1/responses", content=body.encode(), headers=headers)
    assert response.json()["previous_response_id"] == first.id
    assert "Weather?" in backend.tokenizer.spell(backend.prompt)


def test_the_streamed_response_is_the_whole_response(client):
    whole = answer(client)
    streamed = answer(client, stream=True)
    assert without_ids(whole) == without_ids(streamed)
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    details = whole.usage.output_tokens_details
    assert details == streamed.usage.output_tokens_details
    assert 0 < details.reasoning_tokens < whole.usage.output_tokens
    assert client.responses.retrieve(streamed.id) == streamed
    with client.responses.stream(model=MODEL, input="Weather?", tools=[TOOL]) as events:
        joined = events.get_final_response()  # as the client puts it together
    assert joined.output_text == "On it."
    assert [item.arguments for item in joined.output[2:]] == [
        item.arguments for item in whole.output[2:]
    ]


def test_a_stream_tells_each_item_in_the_official_order(client):
    events = list(client.responses.create(model=MODEL, input="Weather?", tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    told = [
        event.type if not hasattr(event, "output_index") else f"{event.output_index} {event.type}"
        for event in events
    ]
    wanted = ["response.created", "response.in_progress"]
    for index, kind in enumerate(
        ("reasoning_text", "output_text", "function_call_arguments", "function_call_arguments")
    ):
        parts = index < 2
        wanted += [
            f"{index} response.output_item.added",
            *([f"{index} response.content_part.added"] * parts),
            f"{index} response.{kind}.delta",
            f"{index} response.{kind}.done",
            *([f"{index} response.content_part.done"] * parts),
            f"{index} response.output_item.done",
        ]
    wanted.append("response.completed")
    assert [name for name, _ in itertools.groupby(told)] == wanted
    pieces = {}
    for event in events:
        if event.type.endswith(".delta"):
            pieces.setdefault(event.item_id, []).append(event.delta)
    whole = [
        getattr(event, "text", None) or event.arguments
        for event in events
        if event.type.endswith(("text.done", "arguments.done"))
    ]
    assert list(map("".join, pieces.values())) == whole
    assert all(len(each) > 3 for each in pieces.values())


def test_instructions_hold_for_one_response_and_items_may_come_in_any_form(served, backend, client):
    first = answer(client, instructions="Sing.", tools=[])
    again = answer(client, input="And now?", previous_response_id=first.id, tools=[])
    prompt = backend.tokenizer.spell(backend.prompt)
    assert again.previous_response_id == first.id
    assert "Sing." not in prompt
    given = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        {"role": "assistant", "content": "How are you?"},
        {"role": "user", "content": "Well."},
    ]
    answer(client, input=given, tools=[])
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "assistant", "content": "How are you?"},
        {"role": "user", "content": "Well."},
    ]
    rendered = web.post(f"{served.url}/tokenize", json={"messages": chat}).json()["tokens"]
    assert backend.prompt == rendered


@pytest.mark.parametrize("stream", [False, True])
def test_sealed_reasoning_comes_back_without_the_text_of_it(client, backend, stream):
    response = answer(client, stream, include=["reasoning.encrypted_content"], store=False)
    reasoning, *rest = (item.model_dump(exclude_none=True) for item in response.output)
    assert reasoning.pop("content")
    assert reasoning["encrypted_content"]
    given = [{"role": "user", "content": "Weather?"}, reasoning, *rest, *outputs_of(response)]
    answer(client, input=given, store=False)
    prompt = backend.tokenizer.spell(backend.prompt)
    assert "<think>\nLook 0.\n</think>" in prompt


def test_tool_choice_is_auto_none_required_one_function_or_some(tmp_path):
    silent = ScriptedBackend(write_tokenizer(tmp_path), lambda prompt: "Hm.\n</think>\n\nNo.")
    flag = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    switch = {"type": "function", "name": "set", "parameters": flag, "strict": True}
    named = {"type": "function", "name": "set"}
    with serving(silent) as served:
        client = open_client(served)
        for choice in ("auto", "none"):
            assert answer(client, tools=[TOOL, switch], tool_choice=choice).output_text == "No."
        some = {"type": "allowed_tools", "mode": "required", "tools": [named]}
        for choice, tools in (
            ("required", [switch]),
            (named, [TOOL, switch]),
            (some, [TOOL, switch]),
        ):
            response = answer(client, tools=tools, tool_choice=choice, parallel_tool_calls=False)
            reasoning, call = response.output
            assert reasoning.content[0].text == "Hm."
            assert (call.name, set(json.loads(call.arguments))) == ("set", {"on"})
            assert not response.parallel_tool_calls


def test_text_has_the_form_that_is_asked_for(tmp_path):
    chatty = ScriptedBackend(write_tokenizer(tmp_path), lambda prompt: "Hm.\n</think>\n\nno json")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    with serving(chatty) as served:
        response = answer(open_client(served), tools=[], text={"format": form, "verbosity": "low"})
    assert set(json.loads(response.output_text)) == {"ok"}
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_limit_cuts_off_is_incomplete(client, backend, stream):
    response = answer(client, stream, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["incomplete"]
    limit = len(backend.tokenizer.encode(weather_script("").partition("Paulo")[0]))
    response = answer(client, stream, max_output_tokens=limit)
    kinds = [(item.type, item.status) for item in response.output]
    assert kinds == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "incomplete"),
        ("message", "incomplete"),
    ]
    again = answer(client, input="Go on.", previous_response_id=response.id)
    assert again.status == "completed"


def test_what_agents_send_beside_it_is_taken_and_repeated(client):
    response = answer(
        client,
        reasoning={"effort": "high", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        metadata={"run": "1"},
        prompt_cache_key="k",
        safety_identifier="s",
        service_tier="auto",
        truncation="disabled",
        user="u",
        background=False,
        temperature=0.5,
    )
    assert response.metadata == {"run": "1"}
    assert response.temperature == 0.5
    assert response.reasoning.effort == "high"
    assert [tool.name for tool in response.tools] == ["get_weather"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"seed": 1}, "seed"),
        ({"n": 2}, "n"),
        ({"stop": ["x"]}, "stop"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": 5}]}, "input.0.id"),
        ({"input": [{}]}, "input.0.type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "x"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"},
                ]
            },
            "input.1.tool_calls",
        ),
        (
            {"input": [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}]},
            "input.0.encrypted_content",
        ),
        ({"input": "word " * 3000}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "f"}],
                }
            },
            "tool_choice.tools",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}}}},
            "text.format",
        ),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused_by_its_own_name(served, fields, param):
    body = {"model": MODEL, "input": "Weather?"} | fields
    response = web.post(f"{served.url}/v1/responses", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def conversation():
    """A body that has every kind of item, and a tool."""
    asked = {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "On it."}]}
    called = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"}
    result = [{"type": "input_text", "text": "rain"}]
    returned = {"type": "function_call_output", "call_id": "c", "output": result}
    return {
        "model": MODEL,
        "input": [asked, thought, said, called, returned],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "get_weather"},
    }


PLACES = [
    ("tools", 0),
    ("tool_choice",),
    *(("input", number) for number in range(5)),
    ("input", 0, "content", 0),
    ("input", 1, "content", 0),
    ("input", 2, "content", 0),
    ("input", 4, "output", 0),
]


def test_only_a_strict_server_refuses_what_nobody_knows_wherever_it_stands(
    tokenizer_directory, caplog
):
    caplog.set_level("DEBUG", "neuron_minimax.serving")
    bodies = [with_field(conversation(), place, "mood") for place in PLACES]
    whole = conversation()
    for place in PLACES:
        whole = with_field(whole, place, f"mood_of_{'_'.join(map(str, place))}")
    with serving(ScriptedBackend(tokenizer_directory, weather_script)) as served:
        assert web.post(f"{served.url}/v1/responses", json=whole).status_code == 200
    (said,) = (message for message in caplog.messages if "without effect" in message)
    assert {*re.findall(r"mood_of_(\w+)", said)} == {"_".join(map(str, place)) for place in PLACES}
    with serving(ScriptedBackend(tokenizer_directory, weather_script), strict=True) as served:
        assert web.post(f"{served.url}/v1/responses", json=conversation()).status_code == 200
        responses = [web.post(f"{served.url}/v1/responses", json=body) for body in bodies]
    assert [response.status_code for response in responses] == [400] * len(PLACES)
    assert [response.json()["error"]["param"] for response in responses] == [
        f"{'.'.join(map(str, place))}.mood" for place in PLACES
    ]


def test_stored_responses_are_deleted_and_are_their_owners_alone(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, weather_script)
    with serving(backend, api_keys=(b"one", b"two")) as served:
        one = open_client(served, api_key="one")
        two = open_client(served, api_key="two")
        response = answer(one)
        assert one.responses.retrieve(response.id).output[1].content[0].text == "On it."
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError) as missing:
            answer(two, previous_response_id=response.id)
        assert missing.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError):
            two.responses.delete(response.id)
        with pytest.raises(openai.BadRequestError, match="include"):
            one.responses.retrieve(response.id, include=["reasoning.encrypted_content"])
        one.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            one.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            answer(one, model="gpt")
        with pytest.raises(openai.AuthenticationError):
            answer(open_client(served, api_key="three"))


@pytest.mark.parametrize(("count", "nbytes"), [(3, 1 << 20), (100, 39)])
def test_the_store_makes_room_by_forgetting_what_was_not_used_for_longest(
    monkeypatch, count, nbytes
):
    monkeypatch.setattr(store, "MAX_RESPONSES", count)
    monkeypatch.setattr(store, "MAX_BYTES", nbytes)
    kept = Store()
    for name in "abc":
        kept.put(None, name, Stored(b"x" * 7, b"y" * 6))
    kept.get(None, "a")
    kept.put(None, "d", Stored(b"x" * 7, b"y" * 6))
    for name in "acd":
        kept.get(None, name)
    with pytest.raises(Exception, match="no response 'b' is stored"):
        kept.get(None, "b")
    kept.delete(None, "c")
    kept.put(None, "e", Stored(b"x" * 7, b"y" * 6))
    for name in "ade":
        kept.get(None, name)


@pytest.fixture
def held(tokenizer_directory):
    with holding(tokenizer_directory) as held:
        yield held


def test_a_client_that_leaves_in_the_midst_frees_the_slot_and_leaves_nothing_stored(held):
    served, gate = held
    engine = served.service.model.engine
    client = open_client(served)
    with client.responses.create(model=MODEL, input="Hello", stream=True) as events:
        name = next(events).response.id
        wait_until(lambda: engine.occupied == 1)
    (gone,) = engine._running.values()
    wait_until(lambda: gone.cancelled)
    gate.set()
    wait_until(lambda: engine.occupied == 0)
    assert served.service.model.backend.calls.count("step 1") <= 1
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(name)


@pytest.mark.parametrize(
    ("said", "delta", "kind"),
    [
        ("Hm, hm", "response.reasoning_text.delta", "reasoning"),
        ("Hm.\n</think>\n\nOn it", "response.output_text.delta", "message"),
        (CALL.format("Oslo")[:-30], "response.function_call_arguments.delta", "function_call"),
    ],
    ids=lambda text: text if text.isidentifier() else "",
)
def test_what_a_failure_cuts_off_is_incomplete_and_what_was_said_before_it_is_not(
    tokenizer_directory, said, delta, kind
):
    if "invoke" in said:
        said = f"Hm.\n</think>\n\n<minimax:tool_call>\n{said}"
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: said + "word " * 100)
    allowed = threading.Semaphore(len(backend.tokenizer.encode(said)))
    backend.before_call = allowed.acquire
    with serving(backend) as served:
        failed = None
        for event in open_client(served).responses.create(
            model=MODEL, input="Hello", tools=[TOOL], stream=True
        ):
            failed = event
            if event.type == delta:
                served.service.give_up()
        allowed.release(100)
    assert failed.type == "response.failed"
    *before, last = failed.response.output
    assert (last.type, last.status) == (kind, "incomplete")
    assert [item.status for item in before] == ["completed"] * len(before)


def test_a_stream_that_fails_says_so_last(held):
    served, _ = held
    events = open_client(served).responses.create(model=MODEL, input="Hello", stream=True)
    assert [next(events).type for _ in range(2)] == ["response.created", "response.in_progress"]
    served.service.give_up()
    (failed,) = events
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error.code == "server_error"
