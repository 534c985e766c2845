"""The server as the official openai client and curl see it, over a real tiny model where the point
is the model.
"""

import asyncio
import json
import re
import subprocess

import openai
import pytest
import torch

from neuron_minimax.backends import load
from neuron_minimax.cli import main
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.kernels.reference import KV_CACHE_DTYPES
from tests.served import MODEL, ask, open_client, serving, text_of, web
from tests.tiny_traced import answer_alone, write_traced
from tests.waiting import WAIT


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_traced(tmp_path_factory.mktemp("served"), seq_len=192)


@pytest.fixture(scope="module")
def reference(traced):
    """A second copy of the model, which computes what the server should answer, one request at a
    time.
    """
    backend = load(traced)
    tokenizer = TextTokenizer.from_dir(backend.model_directory)

    def run(content, new_tokens):
        ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": content}]))
        return answer_alone(
            backend,
            ids,
            tokenizer=tokenizer,
            stop_token_ids=tokenizer.stop_token_ids,
            max_new_tokens=new_tokens,
        )

    return run


@pytest.fixture(scope="module")
def server(traced):
    with serving(load(traced)) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return open_client(server)


def test_a_greedy_chat_answer_is_what_the_model_says_alone(client, reference):
    wanted = reference("Hello", 12)
    response = ask(client)
    assert text_of(response.choices[0].message) == wanted.text
    assert response.choices[0].finish_reason == wanted.finish_reason
    assert response.usage.completion_tokens == len(wanted.token_ids)
    assert (
        response.usage.total_tokens
        == response.usage.prompt_tokens + response.usage.completion_tokens
    )


def test_the_streamed_answer_is_the_whole_answer(client, reference):
    chunks = list(ask(client, "Stream", stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(text_of(chunk.choices[0].delta) for chunk in chunks[:-1])
        == reference("Stream", 12).text
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_sixty_four_clients_at_once_each_get_what_they_would_get_alone(server, reference):
    contents = [f"Question {number} " + "x" * (number % 17) for number in range(64)]
    lengths = [2 + number % 5 for number in range(64)]

    async def all_answers():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=2 * WAIT
        ) as client:
            return await asyncio.gather(
                *(
                    ask(client, content, max_tokens=length)
                    for content, length in zip(contents, lengths, strict=True)
                )
            )

    responses = asyncio.run(all_answers())
    for content, length, response in zip(contents, lengths, responses, strict=True):
        assert text_of(response.choices[0].message) == reference(content, length).text


def test_curl_streams_server_sent_events_that_end_in_done(server, reference):
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
    }
    command = [
        "curl",
        "-sN",
        f"{server.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
    ]
    out = subprocess.run(
        [*command, json.dumps(body)], capture_output=True, text=True, check=True
    ).stdout
    events = [line.removeprefix("data: ") for line in out.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert (
        "".join(delta.get("reasoning_content", "") for delta in deltas)
        == reference("Hello", 12).text
    )


def test_plain_completions_take_text_or_tokens_and_give_logprobs(client, server):
    tokens = web.post(f"{server.url}/tokenize", json={"prompt": "one two"}).json()["tokens"]
    options = {"model": MODEL, "temperature": 0, "max_tokens": 6, "logprobs": 2}
    by_text = client.completions.create(prompt="one two", **options).choices[0]
    by_tokens = client.completions.create(prompt=tokens, **options).choices[0]
    assert (by_text.text, by_text.logprobs.tokens) == (by_tokens.text, by_tokens.logprobs.tokens)
    assert by_text.logprobs.token_logprobs == pytest.approx(
        by_tokens.logprobs.token_logprobs, abs=1e-4
    )
    assert by_text.finish_reason == "length"
    assert len(by_text.logprobs.tokens) == 6
    assert "".join(by_text.logprobs.tokens) == by_text.text
    for token, logprob, top in zip(
        by_text.logprobs.tokens,
        by_text.logprobs.token_logprobs,
        by_text.logprobs.top_logprobs,
        strict=True,
    ):
        assert top[token] == logprob == max(top.values())
    streamed = client.completions.create(prompt="one two", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.text


def test_chat_logprobs_cover_every_token_with_its_bytes(client):
    whole = ask(client, logprobs=True, top_logprobs=3).choices[0]
    assert len(whole.logprobs.content) == 12
    assert b"".join(bytes(entry.bytes) for entry in whole.logprobs.content).decode(
        "utf-8", "replace"
    ) == text_of(whole.message)
    assert all(len(entry.top_logprobs) == 3 for entry in whole.logprobs.content)
    chunks = list(ask(client, logprobs=True, top_logprobs=3, stream=True))
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole.logprobs.content]


def test_several_choices_differ_and_a_seed_repeats_them(client):
    def texts():
        response = ask(client, n=3, temperature=1.0, seed=5)
        assert response.usage.completion_tokens == 36
        return [
            text_of(choice.message)
            for choice in sorted(response.choices, key=lambda choice: choice.index)
        ]

    first = texts()
    assert first == texts()
    assert len(set(first)) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(client, n=3, temperature=1.0, seed=5, stream=True):
        streamed[chunk.choices[0].index] += text_of(chunk.choices[0].delta)
    assert [streamed[index] for index in range(3)] == first


def test_tokenize_and_detokenize_are_inverse_and_render_messages(server):
    text = "]~b]user\nHi é🙂[e~[\n"
    tokens = web.post(f"{server.url}/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 192
    assert web.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {
        "prompt": text
    }
    chat = web.post(
        f"{server.url}/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}
    ).json()
    rendered = web.post(f"{server.url}/detokenize", json={"tokens": chat["tokens"]}).json()[
        "prompt"
    ]
    assert rendered.endswith("]~b]user\nHi[e~[\n]~b]ai\n<think>\n")


def test_the_model_is_listed_and_another_name_is_not_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(client, model="gpt-4o")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"extra_body": {"top_k": 1.5}}, "top_k"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "color"}},
                }
            },
            "response_format",
        ),
    ],
)
def test_what_is_out_of_range_or_not_supported_is_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert refused.value.param == param
    assert param.split(".")[0] in str(refused.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages"),
        ([{"role": "clown", "content": "a"}], "role"),
        ([{"role": "user"}], "content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "content",
        ),
        (
            [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "[1"},
                        }
                    ],
                },
            ],
            "no JSON object",
        ),
        ([{"role": "user", "content": "word " * 300}], "seq_len"),
        ([{"role": "user", "content": "x" * 100_000}], "characters"),
    ],
)
def test_messages_that_cannot_be_used_are_refused_with_the_reason(client, messages, words):
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        client.chat.completions.create(model=MODEL, messages=messages)


def test_what_is_too_many_or_too_deep_is_refused(client):
    deep = {"type": "string"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    with pytest.raises(openai.BadRequestError, match="tools is nested deeper"):
        ask(client, tools=[tool])
    json_schema = {"name": "a", "schema": deep}
    with pytest.raises(openai.BadRequestError, match="schema is nested deeper"):
        ask(client, response_format={"type": "json_schema", "json_schema": json_schema})
    with pytest.raises(openai.BadRequestError, match="at most 128"):
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}] * 129)
    with pytest.raises(openai.BadRequestError, match="at most 4096"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}] * 4097
        )
    with pytest.raises(openai.BadRequestError, match="at most 128"):
        client.completions.create(model=MODEL, prompt=["a"] * 129)


def test_an_answer_longer_than_the_model_can_hold_is_refused_and_without_a_limit_it_fills_the_rest(
    client,
):
    with pytest.raises(openai.BadRequestError, match="do not fit seq_len 192") as refused:
        ask(client, max_tokens=190)
    assert refused.value.code == "context_length_exceeded"
    whole = ask(client, max_tokens=None)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == 193  # the last token needs no place


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"host": "evil.example"}, 421),
    ],
)
def test_broken_http_requests_get_an_error_in_openai_form(traced, content, headers, status):
    with serving(load(traced), hosts=frozenset({"127.0.0.1"}), max_body=1 << 20) as served:
        headers = {"content-type": "application/json"} | headers
        response = web.post(f"{served.url}/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in response.text
        large = web.post(
            f"{served.url}/tokenize",
            content=b"x" * (2 << 20),
            headers={"content-type": "application/json"},
        )
        assert large.status_code == 413


def test_an_api_key_is_needed_everywhere_but_for_health_and_the_page(traced):
    with serving(load(traced), api_keys=(b"secret-one", b"secret-two")) as served:
        for key in ("secret-one", "secret-two"):
            assert openai.OpenAI(base_url=f"{served.url}/v1", api_key=key).models.list().data
        for key in ("secret", "secret-one-", "sécret-one", "x"):
            headers = {"authorization": f"Bearer {key}".encode()}
            assert web.get(f"{served.url}/v1/models", headers=headers).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong").models.list()
        for path in ("/metrics", "/v1/models"):
            assert web.get(served.url + path).status_code == 401
        for path in ("/", "/health", "/health/live", "/chat.js"):
            assert web.get(served.url + path).status_code == 200


def test_cached_tokens_tell_nothing_across_api_keys_and_salts(traced):
    def cached(client, **body):
        response = ask(client, "the same secret question", max_tokens=2, extra_body=body)
        return response.usage.prompt_tokens_details.cached_tokens

    with serving(load(traced), api_keys=(b"one", b"two")) as served:
        one, two = (open_client(served, api_key=key) for key in ("one", "two"))
        assert cached(one) == 0
        own = cached(one)
        assert own > 0
        assert cached(two) == 0
        assert cached(two) == own
        assert cached(one, cache_salt="x") == 0
        assert cached(one, cache_salt="x") == own
        with pytest.raises(openai.BadRequestError, match="cache_salt"):
            cached(one, cache_salt="")
    with serving(load(traced)) as served:  # all who need no key are one client
        assert cached(open_client(served, api_key="one")) == 0
        assert cached(open_client(served, api_key="two")) == own


def test_prompts_that_begin_alike_are_encoded_once_and_usage_and_metrics_say_so(traced):
    system = [(5 * place) % 299 for place in range(70)]
    with serving(load(traced)) as served:
        answer = open_client(served).completions.create(
            model=MODEL, prompt=[[*system, 1], [*system, 2], [*system, 3]], max_tokens=1
        )
        lines = web.get(f"{served.url}/metrics").text.splitlines()
    assert answer.usage.prompt_tokens == 3 * 71
    assert answer.usage.prompt_tokens_details.cached_tokens == 2 * 70
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["neuron_minimax_prompt_tokens_total"]) == 3 * 71
    assert float(values["neuron_minimax_prefix_cache_hits_total"]) == 2 * 70


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8"])
def test_a_cache_in_fewer_bits_is_served_and_its_prefixes_are_reused(
    traced, kv_cache_dtype, tmp_path
):
    options = ["--batch-size", "3", "--seq-len", "128", "--buckets", "16,32", "--engine", "eager"]
    directories = [str(traced.parent / "converted"), str(tmp_path / "traced")]
    command = ["compile", *directories, *options, "--kv-cache-dtype", kv_cache_dtype]
    assert main(command) == 0
    system = [(5 * place) % 299 for place in range(70)]
    prompts = [[*system, last] for last in (1, 2, 3)]
    backend, alone = load(tmp_path / "traced"), load(tmp_path / "traced")
    tokenizer = TextTokenizer.from_dir(alone.model_directory)
    stops = tokenizer.stop_token_ids
    wanted = [
        answer_alone(alone, prompt, tokenizer, stop_token_ids=stops, max_new_tokens=12)
        for prompt in prompts
    ]
    with serving(backend) as served:
        answer = open_client(served).completions.create(
            model=MODEL, prompt=prompts, max_tokens=12, temperature=0
        )
    assert answer.usage.prompt_tokens_details.cached_tokens == 2 * 70
    assert [choice.text for choice in answer.choices] == [each.text for each in wanted]
    for held in (backend.cache.keys, backend.cache.values):
        for layer in held:
            assert layer.dtype == KV_CACHE_DTYPES[kv_cache_dtype]
            assert torch.equal(layer[0, :, :70], layer[1, :, :70])
            assert layer[0, :, :70].any()


def test_every_response_has_a_request_id_and_a_client_may_name_it(server):
    assert (
        web.get(f"{server.url}/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"]
        == "abc-1"
    )
    made = web.get(f"{server.url}/nowhere", headers={"x-request-id": "bad;id"}).headers[
        "x-request-id"
    ]
    assert re.fullmatch("[0-9a-f]{32}", made)


def test_cors_is_off(server):
    response = web.options(
        f"{server.url}/v1/chat/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert not any(name.startswith("access-control") for name in response.headers)


def test_metrics_follow_what_was_served(traced):
    with serving(load(traced)) as served:
        ask(open_client(served), max_tokens=5)
        web.post(f"{served.url}/v1/chat/completions", json={"nonsense": 1})
        lines = web.get(f"{served.url}/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(values["neuron_minimax_generation_tokens_total"]) == 5
        assert (
            float(values['neuron_minimax_request_errors_total{kind="invalid_request_error"}']) == 1
        )
        assert float(values["neuron_minimax_time_to_first_token_seconds_count"]) == 1


def test_faults_inside_the_server_show_no_trace_to_the_client(traced, caplog):
    with serving(load(traced)) as served:
        served.service.model.engine.submit = None  # a fault that nobody planned for
        response = web.post(f"{served.url}/v1/completions", json={"prompt": "secret words"})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "internal error; the server's log has it"
        assert "x-request-id" in response.headers
    assert "TypeError" in caplog.text
    assert "secret words" not in caplog.text


@pytest.mark.parametrize("asked_for", [False, True])
def test_the_text_of_requests_is_logged_only_when_asked_for(traced, caplog, asked_for):
    caplog.set_level("INFO", logger="neuron_minimax.serving.access")
    with serving(load(traced), log_requests=asked_for) as served:
        ask(open_client(served), "secret words", max_tokens=2)
    (fields,) = [record.fields for record in caplog.records if record.getMessage() == "request"]
    assert {
        "request_id",
        "method",
        "path",
        "status",
        "seconds",
        "prompt_tokens",
        "completion_tokens",
    } <= set(fields)
    assert ("secret words" in str(fields)) is asked_for
