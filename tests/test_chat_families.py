"""Qwen3, Qwen2 and MiniMind in conversation: tiny models through LLM, the command and the server,
and their formats as the official openai client sees them.
"""

import json

import openai
import pytest

import generation_demo
from neuron_minimax.backends import load
from neuron_minimax.cli import main
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.chat import Chat
from neuron_minimax.generation.conversation import Turn
from neuron_minimax.generation.events import collect
from neuron_minimax.generation.llm import LLM
from neuron_minimax.generation.sampling import GREEDY
from tests.served import MODEL, ScriptedBackend, ask, open_client, serving, web
from tests.test_server_format import WEATHER_TOOL
from tests.tiny_chats import write_chat_tokenizer
from tests.tiny_traced import answer_alone, write_traced

FAMILIES = ["qwen3", "qwen2", "minimind"]
CALL = (
    '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}", "days": 2}}}}\n</tool_call>'
)
CALLS = CALL.format("Oslo") + "\n" + CALL.format("São Paulo")
NUMBERS = {
    "type": "object",
    "properties": {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in "ab"},
    "required": ["a", "b"],
}
ADD_TOOL = {"type": "function", "function": {"name": "add", "parameters": NUMBERS}}
QUESTION = [{"role": "user", "content": "Weather?"}]


def thinks(family):
    return family != "qwen2"


def script(prompt):
    """Calls a tool for two cities, then answers from what the tool said; thinks where it may."""
    begin = prompt.rpartition("<|im_start|>assistant\n")[2]
    reasoning = "{}\n</think>\n\n" if begin == "<think>\n" else "<think>\n{}\n</think>\n\n"
    may_think = "</think>" not in begin and "You help." not in prompt
    before = reasoning if may_think else ""
    if "Weather?" not in prompt.rpartition("<|im_start|>user\n")[2] and "Weather?" in prompt:
        said = prompt.rpartition("<tool_response>\n")[2].partition("\n</tool_response>")[0]
        return before.format("They spoke.") + f"It is {said}."
    if "Weather?" in prompt:
        return before.format("I should look.") + "Looking.\n" + CALLS
    return before.format("Hm.") + "I will not call anything."


@pytest.fixture(scope="module")
def open_scripted(tmp_path_factory):
    """A function that makes a backend with a family's tokenizer."""

    def make(family, script):
        directory = write_chat_tokenizer(tmp_path_factory.mktemp(family), family)
        return ScriptedBackend(directory, script)

    return make


@pytest.fixture(scope="module", params=FAMILIES)
def scripted(request, open_scripted):
    """A family, a client of a server that says what the script says, and its backend.

    MiniMind's template has to be asked for reasoning.
    """
    backend = open_scripted(request.param, script)
    with serving(backend) as served:
        yield request.param, open_client(served), backend


def thinking(family):
    """The options with which a family thinks."""
    return (
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
        if thinks(family)
        else {}
    )


def last_prompt(backend):
    """The prompt that was encoded last, as text."""
    return backend.tokenizer.spell(backend.prompt)


def reasoning_of(message):
    return getattr(message, "reasoning_content", None)


def test_a_round_trip_through_tools_keeps_the_reasoning_where_the_template_wants_it(scripted):
    family, client, backend = scripted
    messages = list(QUESTION)
    options = {"model": MODEL, "tools": [WEATHER_TOOL], **thinking(family)}
    first = client.chat.completions.create(messages=messages, **options).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content == "Looking."
    assert reasoning_of(first.message) == ("I should look." if thinks(family) else None)
    calls = first.message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather"] * 2
    assert [call.function.arguments for call in calls] == [
        '{"city": "Oslo", "days": 2}',
        '{"city": "São Paulo", "days": 2}',
    ]
    messages.append(first.message.model_dump(exclude_none=True))
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": f"sunny {place}"}
        for place, call in enumerate(calls)
    ]
    second = client.chat.completions.create(messages=messages, **options).choices[0]
    assert second.message.content == "It is sunny 1."
    prompt = last_prompt(backend)
    assert f"Looking.\n{CALLS}<|im_end|>\n" in prompt
    assert (
        "<|im_start|>user\n<tool_response>\nsunny 0\n</tool_response>\n"
        "<tool_response>\nsunny 1\n</tool_response><|im_end|>\n"
    ) in prompt
    assert ("<think>\nI should look.\n</think>\n\nLooking." in prompt) == thinks(family)
    messages.append(second.message.model_dump(exclude_none=True))
    messages.append({"role": "user", "content": "Thanks"})
    client.chat.completions.create(messages=messages, **options)
    assert ("I should look." in last_prompt(backend)) == (family == "minimind")


def test_a_streamed_call_brings_its_name_and_then_its_arguments_in_pieces(scripted):
    family, client, _ = scripted
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER_TOOL], stream=True, **thinking(family)
    )
    names = {}
    arguments = {}
    texts = {"content": "", "reasoning": ""}
    reasons = []
    for chunk in stream:
        choice = chunk.choices[0]
        texts["content"] += choice.delta.content or ""
        texts["reasoning"] += reasoning_of(choice.delta) or ""
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or ():
            if call.function.name:
                assert call.id
                assert call.index not in names
                names[call.index] = call.function.name
            if call.function.arguments:
                assert call.index in names
                arguments.setdefault(call.index, []).append(call.function.arguments)
    reasoning = "I should look." if thinks(family) else ""
    assert texts == {"content": "Looking.", "reasoning": reasoning}
    assert names == {0: "get_weather", 1: "get_weather"}
    assert len(arguments[0]) > 3
    assert json.loads("".join(arguments[1])) == {"city": "São Paulo", "days": 2}
    assert reasons[-1] == "tool_calls"
    assert not any(reasons[:-1])


def test_tool_choice_none_leaves_tags_as_text_and_one_call_can_be_the_limit(scripted):
    _, client, backend = scripted
    none = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER_TOOL], tool_choice="none"
    )
    assert none.choices[0].message.tool_calls is None
    assert none.choices[0].message.content.endswith(f"Looking.\n{CALLS}")
    assert "get_weather" not in last_prompt(backend)
    one = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER_TOOL], parallel_tool_calls=False
    )
    assert len(one.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_is_made_after_the_reasoning_whatever_the_model_wants_to_say(
    scripted, choice
):
    family, client, _ = scripted
    tools = [ADD_TOOL] if choice == "required" else [WEATHER_TOOL, ADD_TOOL]
    options = {
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "temperature": 1,
        "seed": 1,
    }
    (choice,) = ask(client, **options, **thinking(family)).choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    assert choice.finish_reason == "tool_calls"
    assert not (choice.message.content or "").strip()
    assert reasoning_of(choice.message) == ("Hm." if thinks(family) else None)


def test_json_can_be_forced_after_the_reasoning(scripted):
    family, client, _ = scripted
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    (choice,) = ask(client, response_format=answer, max_tokens=80, **thinking(family)).choices
    assert json.loads(choice.message.content).keys() == {"ok"}
    assert reasoning_of(choice.message) == ("Hm." if thinks(family) else None)


def test_thinking_can_be_switched_off_for_a_request(scripted):
    family, client, backend = scripted
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    if not thinks(family):
        with pytest.raises(openai.BadRequestError, match="has no switch for thinking") as refused:
            ask(client, extra_body=off)
        assert refused.value.param == "chat_template_kwargs.enable_thinking"
        return
    whole = ask(client, max_tokens=80, extra_body=off).choices[0].message
    assert (reasoning_of(whole), whole.content) == (None, "I will not call anything.")
    assert last_prompt(backend).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    forced = ask(client, tools=[ADD_TOOL], tool_choice="required", max_tokens=200, extra_body=off)
    assert reasoning_of(forced.choices[0].message) is None
    assert forced.choices[0].message.tool_calls


def said_under(client, path, **fields):
    """Whether there is reasoning in the answer to a question, in any protocol."""
    url = str(client.base_url).removesuffix("/v1/")
    asked = "input" if path == "responses" else "messages"
    body = {"model": MODEL, asked: [{"role": "user", "content": "Hello"}]}
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    response = web.post(f"{url}/v1/{path}", json=body | {limit: 80} | fields)
    assert response.status_code == 200, response.text
    return "Hm." in response.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *(
            ("chat/completions", fields)
            for fields in (
                {"reasoning_effort": "none"},
                {"reasoning": {"effort": "none"}},
                {"reasoning": {"enabled": False}},
                {"thinking": {"type": "disabled"}},
            )
        ),
        ("messages", {"thinking": {"type": "disabled"}}),
        ("responses", {"reasoning": {"effort": "none"}}),
    ],
    ids=str,
)
def test_a_wish_not_to_reason_turns_the_switch_that_a_template_has(scripted, path, fields):
    family, client, backend = scripted
    assert not said_under(client, path, **fields)
    closed = last_prompt(backend).endswith("<think>\n\n</think>\n\n")
    assert closed == thinks(family)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"reasoning_effort": "low"}),
        ("chat/completions", {"thinking": {"type": "enabled", "budget_tokens": 9}}),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 9}}),
        ("responses", {"reasoning": {"effort": "high", "summary": "auto"}}),
    ],
    ids=str,
)
def test_a_wish_to_reason_turns_it_on(scripted, path, fields):
    family, client, _ = scripted
    assert said_under(client, path, **fields) == thinks(family)


def test_the_switch_itself_counts_before_other_wishes(scripted):
    family, client, _ = scripted
    if thinks(family):
        on = {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}
        assert said_under(client, "chat/completions", **on)


def test_a_prompt_that_has_closed_the_reasoning_leaves_none_before_a_forced_call(open_scripted):
    backend = open_scripted("qwen3", lambda prompt: "<think>\nHm.\n</think>\n\nNo.")
    options = {"tools": [ADD_TOOL], "tool_choice": "required", "max_tokens": 200}
    with serving(backend) as served:
        found = [
            ask(
                open_client(served),
                extra_body={"chat_template_kwargs": {"enable_thinking": switch}},
                **options,
            )
            for switch in (True, False)
        ]
    assert [reasoning_of(each.choices[0].message) for each in found] == ["Hm.", None]
    assert all(each.choices[0].message.tool_calls for each in found)


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        ({"mood": "good"}, "chat_template_kwargs.mood", "mood is no argument of this model's"),
        ({"messages": "x"}, "chat_template_kwargs.messages", "messages is no argument"),
        ({"enable_thinking": []}, "chat_template_kwargs.enable_thinking", "Input should be"),
        ({"a": {"b": 1}}, "chat_template_kwargs.a", "Input should be"),
        ({str(number): 1 for number in range(17)}, "chat_template_kwargs", "at most 16"),
        ([1], "chat_template_kwargs", "should be an object"),
    ],
)
def test_other_arguments_of_the_template_are_refused_by_name(scripted, arguments, param, words):
    _, client, _ = scripted
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(client, extra_body={"chat_template_kwargs": arguments})
    assert refused.value.param.startswith(param)


def test_an_answer_without_reasoning_is_sampled_as_is_recommended_for_it(
    open_scripted, monkeypatch
):
    backend = open_scripted("qwen3", script)
    seen = []
    with serving(backend) as served:
        engine = served.service.model.engine
        submit = engine.submit

        def record(*requests):
            seen.extend(each.request.params for each in requests)
            submit(*requests)

        monkeypatch.setattr(engine, "submit", record)
        client = open_client(served)
        for switch in (True, False):
            arguments = {"chat_template_kwargs": {"enable_thinking": switch}}
            client.chat.completions.create(
                model=MODEL, messages=QUESTION, max_tokens=4, extra_body=arguments
            )
            turn = Turn.after(QUESTION, backend.tokenizer, None, {"enable_thinking": switch})
            seen.append(turn.request(backend, None).params)
    found = [(params.temperature, params.top_p, params.top_k) for params in seen]
    assert found == [(0.6, 0.95, 20)] * 2 + [(0.7, 0.8, 20)] * 2


def test_arguments_that_are_no_unicode_are_refused(scripted):
    _, client, _ = scripted
    function = {"name": "add", "arguments": json.dumps({"a": "\ud800"})}
    call = {"id": "1", "type": "function", "function": function}
    messages = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="no valid Unicode") as refused:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert refused.value.param == "messages"


@pytest.mark.parametrize("family", ["qwen3", "minimind"])
def test_arguments_are_valid_json_in_every_protocol_whatever_the_model_writes(
    open_scripted, family
):
    written = '{"city": "\\ud83d\\u00e9", "days": [1e999, NaN]}'
    says = f'<tool_call>\n{{"name": "get_weather", "arguments": {written}}}\n</tool_call>'
    right = {"city": "\ufffdé", "days": ["1e999", "NaN"]}
    function = WEATHER_TOOL["function"]
    schema = {"name": function["name"], "input_schema": function["parameters"]}
    with serving(open_scripted(family, lambda prompt: says)) as served:

        def post(path, **fields):
            body = {"model": MODEL, "max_tokens": 200, "messages": QUESTION} | fields
            given = {name: value for name, value in body.items() if value is not None}
            response = web.post(f"{served.url}/v1/{path}", json=given)
            assert response.status_code == 200, response.text
            return response

        flat = {"input": "Weather?", "messages": None, "max_tokens": None}
        flat["tools"] = [{"type": "function", **function}]
        (called,) = post("chat/completions", tools=[WEATHER_TOOL]).json()["choices"]
        (call,) = called["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == right
        (used,) = post("messages", tools=[schema]).json()["content"]
        assert used["input"] == right
        (item,) = post("responses", **flat).json()["output"]
        assert json.loads(item["arguments"]) == right
        streams = {
            "chat/completions": {"tools": [WEATHER_TOOL]},
            "messages": {"tools": [schema]},
            "responses": flat,
        }
        for path, fields in streams.items():
            text = post(path, stream=True, **fields).text
            data = [line.removeprefix("data: ") for line in text.splitlines() if "data: {" in line]
            assert pieces_of(path, map(json.loads, data)) == right


def pieces_of(path, events):
    """The arguments of a streamed call."""
    pieces = []
    for event in events:
        if path == "messages":
            pieces.append(event.get("delta", {}).get("partial_json") or "")
        elif path == "responses":
            pieces.append(event["delta"] if event["type"].endswith("arguments.delta") else "")
        else:
            calls = event["choices"][0]["delta"].get("tool_calls") or ()
            pieces.extend(call["function"]["arguments"] for call in calls)
    return json.loads("".join(pieces))


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_at_either_end(open_scripted, end):
    backend = open_scripted("qwen3", lambda prompt: f"Yes.{end} And no.")
    with serving(backend) as served:
        (choice,) = ask(open_client(served), max_tokens=50).choices
    assert (choice.message.content, choice.finish_reason) == ("Yes.", "stop")


def test_reasoning_can_be_left_in_the_content_with_its_tags(open_scripted):
    backend = open_scripted("qwen3", script)
    with serving(backend, split_reasoning=False) as served:
        message = ask(open_client(served), max_tokens=80).choices[0].message
    assert message.content == "<think>\nHm.\n</think>\n\nI will not call anything."
    assert reasoning_of(message) is None


# Real models: random weights, so that what they say has no sense, and is to be the same everywhere.


@pytest.fixture(scope="module", params=FAMILIES)
def traced(request, tmp_path_factory):
    return write_traced(tmp_path_factory.mktemp(request.param), family=request.param, seq_len=512)


@pytest.fixture(scope="module")
def llm(traced):
    return LLM(traced)


@pytest.fixture(scope="module")
def client(traced):
    with serving(load(traced)) as served:
        yield open_client(served)


def test_the_server_says_what_the_model_says_alone(llm, client):
    prompt = llm.tokenizer.encode(llm.tokenizer.render_chat([{"role": "user", "content": "Hello"}]))
    alone = answer_alone(
        llm.backend,
        prompt,
        llm.tokenizer,
        stop_token_ids=llm.tokenizer.stop_token_ids,
        max_new_tokens=12,
    )
    response = ask(client, logprobs=True, top_logprobs=2)
    (choice,) = response.choices
    assert choice.message.content == alone.text
    assert choice.finish_reason == alone.finish_reason
    assert response.usage.prompt_tokens == len(prompt)
    assert response.usage.completion_tokens == len(alone.token_ids)
    spelled = [llm.tokenizer.token_text(token) for token in alone.token_ids]
    assert [entry.token for entry in choice.logprobs.content] == spelled
    assert all(entry.top_logprobs[0].token == entry.token for entry in choice.logprobs.content)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert said == alone.text
    assert chunks[-1].usage == response.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    reply = llm.chat("Hello", GREEDY, max_new_tokens=12)
    assert (reply.text, list(reply.token_ids)) == (alone.text, alone.token_ids)
    chat = Chat(llm, params=GREEDY)
    assert collect(chat.say("Hello", max_new_tokens=12)).content == alone.text


def test_a_model_that_knows_no_tool_calls_one_when_it_has_to(client):
    response = ask(
        client,
        tools=[WEATHER_TOOL, ADD_TOOL],
        tool_choice={"type": "function", "function": {"name": "add"}},
        temperature=1,
        seed=3,
        max_tokens=150,
        n=2,
    )
    for choice in response.choices:
        for call in choice.message.tool_calls:
            assert call.function.name == "add"
            assert set(json.loads(call.function.arguments)) == {"a", "b"}
        assert choice.finish_reason == "tool_calls"


def test_the_switch_for_thinking_reaches_the_prompt_of_every_caller(traced, llm, client, capsys):
    off = {"enable_thinking": False}
    arguments = ["generate", str(traced), "--prompt", "Hello", "--greedy", "--json"]
    arguments += ["--max-new-tokens", "8", "--no-thinking"]
    if "qwen2" in str(traced):
        assert main(arguments) == 1
        assert "has no switch for thinking" in capsys.readouterr().err
        with pytest.raises(GenerationError, match="has no switch for thinking"):
            llm.chat("Hello", GREEDY, chat_template_kwargs=off)
        return
    rendered = llm.tokenizer.render_chat([{"role": "user", "content": "Hello"}], None, off)
    prompt = llm.tokenizer.encode(rendered)
    wanted = llm.generate(prompt, GREEDY, max_new_tokens=8)
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == wanted.token_ids
    reply = llm.chat("Hello", GREEDY, max_new_tokens=8, chat_template_kwargs=off)
    assert list(reply.token_ids) == wanted.token_ids
    events = llm.stream("Hello", GREEDY, max_new_tokens=8, chat_template_kwargs=off)
    assert collect(events).content == reply.text
    chat = Chat(llm, params=GREEDY, chat_template_kwargs=off)
    assert collect(chat.say("Hello", max_new_tokens=8)).content == reply.text
    served = ask(client, max_tokens=8, extra_body={"chat_template_kwargs": off})
    assert served.choices[0].message.content == reply.text
    assert served.usage.prompt_tokens == len(prompt)
    body = {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": off}
    url = str(client.base_url).replace("/v1/", "/tokenize")
    assert web.post(url, json=body).json()["tokens"] == prompt
    script = ["--skip-compile", "--traced-model-dir", str(traced), "--prompt", "Hello"]
    assert generation_demo.main([*script, "--max-new-tokens", "8", "--no-thinking"]) == 0
    assert "(8 tokens, " in capsys.readouterr().out
