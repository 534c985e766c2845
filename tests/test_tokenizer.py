"""The tokenizer of a checkpoint: its chat template, stop tokens and streaming, against the
tokenizers library.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from neuron_minimax.errors import GenerationError
from neuron_minimax.families import FAMILIES
from neuron_minimax.generation.chat_formats import CHAT_FORMATS
from neuron_minimax.generation.reader import StreamDecoder
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer, read_stop_tokens
from tests.tiny_tokenizer import write_tokenizer

TEXTS = ["Hello, wörld! 12345", "雪 🙂‍↔️ \n\n tabs\t", "<think>\nreason\n</think>\n\nanswer"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (directory / "config.json").write_text(
        json.dumps({"model_type": "minimax_m2", "eos_token_id": None})
    )
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return TextTokenizer.from_dir(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_tokenizer_file(directory, tokenizer, text):
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_gives_the_prompt_of_the_published_model(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\nHi[e~[\n]~b]ai\n<think>\n"
    assert tokenizer.render_chat(messages) == prompt
    ids = tokenizer.encode(prompt)
    assert [tokenizer.token_text(token) for token in ids[:2]] == ["]~!b[", "]~b]"]
    assert "[e~[" not in tokenizer.decode(ids)
    assert "<think>" in tokenizer.decode(ids)


def test_tools_and_calls_with_their_arguments_reach_the_prompt(tokenizer):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
    messages = [
        {"role": "user", "content": "1 + two?"},
        {"role": "assistant", "content": "", "reasoning_content": "Use add.", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    prompt = tokenizer.render_chat(messages, [tool])
    assert '<tool>{"name": "add"' in prompt
    assert '<parameter name="a">1</parameter>\n<parameter name="b">two</parameter>' in prompt
    assert "<think>\nUse add.\n</think>" in prompt


def test_messages_that_the_template_refuses_are_an_error_with_its_words(tokenizer):
    with pytest.raises(GenerationError, match="unknown role clown"):
        tokenizer.render_chat([{"role": "user", "content": "a"}, {"role": "clown", "content": "b"}])


def test_every_family_has_a_chat_format():
    assert {family.chat_format for family in FAMILIES.values()} <= CHAT_FORMATS.keys()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 375), max_size=40))
def test_streamed_pieces_join_to_the_text_of_all_tokens(tokenizer, ids):
    ids = [token for token in ids if token < len(tokenizer.hugging_face)]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids] + [decoder.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_half_character_is_ever_shown(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_join_to_the_bytes_of_the_text(tokenizer, text):
    assert (
        b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)) == text.encode()
    )


@pytest.mark.parametrize(
    ("generation", "config", "fallback", "size", "stops"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, 7, 300, (5,)),
        ({"eos_token_id": [5, 8]}, {}, 7, 300, (5, 8)),
        ({"temperature": 1.0}, {"eos_token_id": 6}, 7, 300, (6,)),
        (None, {"eos_token_id": None}, 7, 300, (7,)),
        (None, None, None, 200064, (200020,)),
        (None, None, None, 300, ()),
        (None, {"eos_token_id": 200020}, 7, 300, (7,)),  # inherited from the large model
        ({"eos_token_id": [5, 999]}, {}, 7, 300, (5,)),
    ],
)
def test_stop_tokens_come_from_the_first_file_that_names_any(
    tmp_path, generation, config, fallback, size, stops
):
    for name, contents in (("generation_config.json", generation), ("config.json", config)):
        if contents is not None:
            (tmp_path / name).write_text(json.dumps(contents))
    assert read_stop_tokens(tmp_path, size, fallback) == stops


def test_without_any_eos_the_end_of_turn_stops_and_pads(tokenizer):
    end_of_turn = tokenizer.hugging_face.convert_tokens_to_ids("[e~[")
    assert tokenizer.stop_token_ids == (end_of_turn,)
    assert tokenizer.pad_token_id == end_of_turn


@pytest.mark.parametrize(
    ("contents", "options"),
    [
        (None, SamplingParams(temperature=1.0, top_p=0.95, top_k=40)),
        ({"temperature": 0.6, "top_k": 20}, SamplingParams(temperature=0.6, top_p=0.95, top_k=20)),
        ({"do_sample": False, "temperature": 0.6}, GREEDY),
    ],
)
def test_sampling_defaults_come_from_the_generation_config(tmp_path, contents, options):
    write_tokenizer(tmp_path)
    if contents is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(contents))
    assert TextTokenizer.from_dir(tmp_path).sampling == options


def test_code_named_by_the_checkpoint_is_not_run(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings_path = tmp_path / "tokenizer_config.json"
    contents = json.loads(settings_path.read_text())
    contents |= {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    settings_path.write_text(json.dumps(contents))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    with pytest.raises(GenerationError, match="cannot be loaded"):
        TextTokenizer.from_dir(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{]", "cannot be loaded"),
        ("generation_config.json", "{]", "generation_config.json cannot be read"),
        ("generation_config.json", "[1]", "expected an object"),
        ("generation_config.json", '{"eos_token_id": "5"}', "'5' is no token"),
        ("generation_config.json", '{"temperature": -3}', "temperature"),
    ],
)
def test_a_broken_tokenizer_directory_is_one_clear_error(tmp_path, name, contents, words):
    path = write_tokenizer(tmp_path) / name
    if contents is None:
        path.unlink()
    else:
        path.write_text(contents)
    with pytest.raises(GenerationError, match=words):
        TextTokenizer.from_dir(tmp_path)


def test_a_checkpoint_without_a_chat_template_says_so(tmp_path):
    (write_tokenizer(tmp_path) / "chat_template.jinja").unlink()
    with pytest.raises(GenerationError, match="no chat template"):
        TextTokenizer.from_dir(tmp_path).render_chat([{"role": "user", "content": "hi"}])
