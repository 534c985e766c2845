"""/v1/completions: lists of prompts, prompts given back and scored, and how answers end."""

import threading

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuron_minimax.backends import base, load
from neuron_minimax.backends.cpu import backend as cpu_backend
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving import responses
from tests.served import MODEL, ScriptedBackend, ask, open_client, serving
from tests.tiny import write_tiny
from tests.tiny_traced import VOCAB, write_traced
from tests.waiting import wait_until

PROMPTS = [[7], [5, 300, 17, 4, 260], [(7 * place) % 256 for place in range(100)]]
ROWS = 7  # divides no piece of a prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that is served, and the same in transformers, float32."""
    directory = tmp_path_factory.mktemp("completions")
    traced = write_traced(directory, seq_len=192)
    dense = write_tiny(directory / "dense", dense=True, vocab_size=VOCAB)
    oracle = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, experts_implementation="eager"
    )

    @torch.no_grad()
    def logprobs(ids):
        return oracle(torch.tensor([ids])).logits[0].log_softmax(-1)

    with serving(load(traced)) as served:
        yield served, logprobs


@pytest.fixture
def client(model):
    return open_client(model[0])


@pytest.fixture
def logprobs_of(model):
    return model[1]


def complete(client, prompt, **options):
    extra = {
        name: options.pop(name)
        for name in ("ignore_eos", "min_tokens", "stop_token_ids", "skip_special_tokens", "top_k")
        if name in options
    }
    options = {"model": MODEL, "temperature": 0, "extra_body": extra} | options
    return client.completions.create(prompt=prompt, **options)


def joined(chunks):
    """The text, token_logprobs and top_logprobs of each choice of a stream."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text, values, top = found.setdefault(choice.index, ([], [], []))
            text.append(choice.text)
            if choice.logprobs:
                values += choice.logprobs.token_logprobs
                top += choice.logprobs.top_logprobs
    return [("".join(found[index][0]), *found[index][1:]) for index in sorted(found)]


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_the_tokens_of_prompts_are_as_likely_as_transformers_says(
    client, logprobs_of, monkeypatch, new_tokens
):
    """Also where a prompt has more pieces than one, and a piece more rows than are held at once."""
    monkeypatch.setattr(cpu_backend, "LOGIT_ROWS", ROWS)
    options = {"echo": True, "logprobs": 3, "max_tokens": new_tokens}
    response = complete(client, PROMPTS, **options)
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert response.usage.prompt_tokens == sum(map(len, PROMPTS))
    assert response.usage.completion_tokens == 3 * new_tokens
    for prompt, choice in zip(PROMPTS, response.choices, strict=True):
        found = choice.logprobs
        wanted_TV = logprobs_of(prompt)
        tokens = prompt[1:]
        if new_tokens:
            tokens = [*tokens, int(wanted_TV[-1].argmax())]
        wanted = [float(wanted_TV[place, token]) for place, token in enumerate(tokens)]
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
        for place, top in enumerate(found.top_logprobs[1:]):
            value = found.token_logprobs[1 + place]
            named = top[found.tokens[1 + place]]
            # Parts of characters are all spelled alike, and the likeliest of them is named.
            assert named == value or (named > value and found.tokens[1 + place] == "\ufffd")
            assert max(top.values()) == pytest.approx(float(wanted_TV[place].max()), abs=1e-4)
            assert len(top) <= 4
        assert len(found.tokens) == len(prompt) + new_tokens
        ends = [len("".join(found.tokens[:place])) for place in range(len(found.tokens))]
        assert found.text_offset == ends
        assert choice.finish_reason == "length"
    whole = [
        (choice.text, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs)
        for choice in response.choices
    ]
    assert joined(complete(client, PROMPTS, stream=True, **options)) == whole


def test_a_prompt_is_scored_whole_whatever_a_slot_holds_and_leaves_its_cache_to_others(client):
    prompt = PROMPTS[2]
    scoring = {"echo": True, "logprobs": 0, "max_tokens": 2}
    first = complete(client, prompt, **scoring)
    plain = complete(client, prompt, max_tokens=2)
    assert plain.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1
    again = complete(client, prompt, **scoring)
    assert again.usage.prompt_tokens_details.cached_tokens == 0
    assert again.choices == first.choices
    assert again.choices[0].text.endswith(plain.choices[0].text)


def test_no_more_rows_of_logits_are_held_than_is_said(model):
    backend = model[0].service.model.backend
    rows = list(backend.encode_rows(0, PROMPTS[2] + PROMPTS[2][:70]))
    assert max(map(len, rows)) <= base.LOGIT_ROWS
    torch.testing.assert_close(
        torch.cat(rows), backend.encode(0, PROMPTS[2] + PROMPTS[2][:70], all_positions=True)
    )


@pytest.mark.parametrize("form", ["texts", "tokens"])
def test_each_of_several_prompts_is_answered_as_it_is_alone(client, model, form):
    tokenizer = model[0].service.model.tokenizer
    texts = ["one", "two words", "Straße"]
    prompts = texts if form == "texts" else [tokenizer.encode(text) for text in texts]
    options = {"max_tokens": 5, "n": 2, "temperature": 1, "seed": 7}
    together = complete(client, prompts, **options)
    assert [choice.index for choice in together.choices] == list(range(6))
    alone = [complete(client, prompt, **options) for prompt in prompts]
    texts_alone = [choice.text for response in alone for choice in response.choices]
    assert [choice.text for choice in together.choices] == texts_alone
    assert len(set(texts_alone)) > 3
    for name in ("prompt_tokens", "completion_tokens"):
        assert getattr(together.usage, name) == sum(getattr(each.usage, name) for each in alone)
    chunks = list(
        complete(client, prompts, stream=True, stream_options={"include_usage": True}, **options)
    )
    assert [text for text, *_ in joined(chunks)] == texts_alone
    assert chunks[-1].usage.total_tokens == together.usage.total_tokens


def test_echo_gives_the_prompt_back_before_the_answer(client, model):
    text = "]~b]user\nHi é🙂[e~[\n"
    tokens = model[0].service.model.tokenizer.encode(text)
    answer = complete(client, text, max_tokens=4).choices[0].text
    for prompt in (text, tokens):
        assert complete(client, prompt, max_tokens=4, echo=True).choices[0].text == text + answer
        assert complete(client, prompt, max_tokens=0, echo=True).choices[0].text == text
        streamed = complete(client, [prompt, prompt], max_tokens=4, echo=True, stream=True)
        assert [text for text, *_ in joined(streamed)] == [text + answer] * 2


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1, VOCAB]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 17}, "stop_token_ids"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, options, param):
    options = {"prompt": "a", "max_tokens": 5} | options
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **options)
    assert refused.value.param == param
    assert param in str(refused.value)


def test_an_empty_prompt_is_not_called_too_long(client):
    with pytest.raises(openai.BadRequestError, match="has no tokens") as refused:
        complete(client, "")
    assert (refused.value.param, refused.value.code) == ("prompt", None)


def test_a_prompt_with_more_log_probabilities_than_are_kept_is_refused_streamed_too(
    client, monkeypatch
):
    monkeypatch.setattr(responses, "MAX_LOGPROBS", 2 * 100 + 2)
    options = {"echo": True, "logprobs": 1, "max_tokens": 1}
    assert complete(client, PROMPTS[2], **options).choices
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"log probabilities of prompts .* echo"):
            complete(client, [PROMPTS[2], [1, 2]], stream=stream, **options)
    with pytest.raises(
        openai.BadRequestError, match=r" log probabilities in .* max_tokens .* stream"
    ):
        complete(client, PROMPTS[2], **options | {"max_tokens": 2})
    assert list(complete(client, PROMPTS[2], stream=True, **options | {"max_tokens": 2}))


@pytest.fixture(scope="module")
def scripted(tokenizer_directory):
    """A model that says "one two three" and stops; it cannot say how likely its prompts are."""
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "one two three", slots=2)
    with serving(backend, max_waiting=2) as served:
        yield served, open_client(served), TextTokenizer.from_dir(tokenizer_directory)


def test_a_backend_without_the_logits_of_a_prompt_refuses_to_score_it(scripted):
    _, client, _ = scripted
    with pytest.raises(openai.BadRequestError, match="every position of a prompt") as refused:
        complete(client, "a", echo=True, logprobs=1)
    assert refused.value.param == "echo"
    assert complete(client, "a", echo=True).choices[0].text == "aone two three"


def test_an_answer_goes_on_behind_its_end_where_asked_to(scripted):
    _, client, tokenizer = scripted
    said = tokenizer.encode("one two three")
    end = tokenizer.spell(tokenizer.stop_token_ids[:1])
    plain = complete(client, "a", max_tokens=50, logprobs=0)
    assert plain.choices[0].finish_reason == "stop"
    assert plain.usage.completion_tokens == len(said) + 1
    # As in vLLM each token has its log probability, the one that ends the answer too: lm-eval
    # takes the last one off, whatever it is.
    assert plain.choices[0].logprobs.tokens == [*map(tokenizer.token_text, said), end]

    on = complete(client, "a", max_tokens=len(said) + 3, ignore_eos=True)
    assert (on.choices[0].text, on.choices[0].finish_reason) == ("one two three", "length")
    assert on.usage.completion_tokens == len(said) + 3
    options = {"ignore_eos": True, "skip_special_tokens": False}
    shown = complete(client, "a", max_tokens=len(said) + 3, **options)
    assert shown.choices[0].text == "one two three" + 3 * end
    chat = ask(client, max_tokens=len(said) + 3, extra_body={"ignore_eos": True})
    assert chat.usage.completion_tokens == len(said) + 3


def test_an_answer_has_its_least_length_and_stop_strings_count_from_there_on(scripted):
    _, client, tokenizer = scripted
    said = tokenizer.encode("one two three")
    longer = complete(client, "a", max_tokens=50, min_tokens=len(said) + 4)
    assert longer.usage.completion_tokens == len(said) + 4 + 1
    assert longer.choices[0].finish_reason == "stop"
    stopped = complete(client, "a", max_tokens=50, stop=[" t"])
    assert stopped.choices[0].text == "one"
    least = len(tokenizer.encode("one two"))
    later = complete(client, "a", max_tokens=50, stop=[" t"], min_tokens=least)
    assert later.choices[0].text == "one two"
    assert later.choices[0].finish_reason == "stop"


def test_a_token_can_end_an_answer_and_is_not_part_of_it(scripted):
    _, client, tokenizer = scripted
    said = tokenizer.encode("one two three")
    place = next(place for place in range(1, len(said)) if said[place] not in said[:place])
    options = {"max_tokens": 50, "stop_token_ids": [said[place]]}
    ended = complete(client, "a", **options)
    assert ended.choices[0].text == tokenizer.decode(said[:place])
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == place + 1
    on = complete(client, "a", ignore_eos=True, **options)
    assert on.choices == ended.choices


@pytest.mark.parametrize(("name", "value"), [("min_tokens", 3), ("ignore_eos", True)])
def test_going_on_behind_the_end_and_a_grammar_exclude_each_other(scripted, name, value):
    _, client, _ = scripted
    with pytest.raises(openai.BadRequestError, match=f"{name} and .* grammar") as refused:
        ask(client, response_format={"type": "json_object"}, extra_body={name: value})
    assert refused.value.param == name


def test_more_answers_than_ever_find_a_place_are_400_and_not_to_be_tried_again(scripted):
    _, client, _ = scripted
    assert len(complete(client, ["a"] * 4).choices) == 4
    with pytest.raises(openai.BadRequestError, match="at most 4"):
        complete(client, ["a"] * 5)
    with pytest.raises(openai.BadRequestError, match="at most 4"):
        complete(client, "a", n=5)


def test_a_server_that_lets_nobody_wait_answers_as_many_as_it_has_slots(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "one two three", slots=2)
    gate = threading.Event()
    with serving(backend, max_waiting=0) as served:
        client = open_client(served)
        for _ in range(3):
            assert len(complete(client, ["a", "b"]).choices) == 2
        backend.before_call = gate.wait
        first = complete(client, "a", stream=True)
        wait_until(lambda: served.service.model.engine.occupied == 1)
        second = complete(client, "b", stream=True)
        with pytest.raises(openai.RateLimitError):
            complete(client, "c")
        gate.set()
        for stream in (first, second):
            assert [text for text, *_ in joined(stream)] == ["one two three"]


def test_broken_logits_of_a_prompt_fail_its_request_alone(model, monkeypatch):
    served, _ = model
    client = open_client(served)
    backend = served.service.model.backend
    encode_rows = backend.encode_rows

    def broken(*arguments):
        for rows in encode_rows(*arguments):
            yield torch.full_like(rows, torch.nan)

    monkeypatch.setattr(backend, "encode_rows", broken)
    with pytest.raises(openai.InternalServerError, match="NaN"):
        complete(client, [PROMPTS[1]], echo=True, logprobs=0, max_tokens=1)
    assert complete(client, PROMPTS[1], max_tokens=2).choices[0].text
