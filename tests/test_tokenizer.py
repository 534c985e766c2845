"""The tokenizer of a checkpoint: its chat template, stop tokens and streaming, against the
tokenizers library.
"""

import json
import logging
import os
import pickle

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
from tests.tiny_chats import write_chat_tokenizer
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


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("family", "switch", "ending"),
    [
        ("qwen3", {}, "assistant\n"),
        ("qwen3", {"enable_thinking": True}, "assistant\n"),
        ("qwen3", {"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n"),
        ("minimind", {}, "assistant\n<think>\n\n</think>\n\n"),
        ("minimind", {"open_thinking": True}, "assistant\n<think>\n"),
        ("minimind", {"enable_thinking": True}, "assistant\n<think>\n"),
        ("minimind", {"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_a_switch_for_thinking_has_the_name_that_the_template_knows(
    tmp_path, family, switch, ending
):
    tokenizer = TextTokenizer.from_dir(write_chat_tokenizer(tmp_path, family))
    assert tokenizer.render_chat(CHAT, None, switch).endswith(ending)


@pytest.mark.parametrize("family", ["minimax_m2", "qwen2"])
def test_a_template_without_a_switch_for_thinking_says_so(tmp_path, tokenizer, family):
    if family == "qwen2":
        tokenizer = TextTokenizer.from_dir(write_chat_tokenizer(tmp_path, family))
    for value in (True, False):
        with pytest.raises(GenerationError, match=r"^enable_thinking: .* has no switch for thinki"):
            tokenizer.render_chat(CHAT, None, {"enable_thinking": value})


@pytest.mark.parametrize(
    "name",
    # What every template is given, its functions and its own variables are not to be chosen.
    [
        "messages",
        "tools",
        "add_generation_prompt",
        "eos_token",
        "raise_exception",
        "last",
        "x" * 90,
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused_by_name(tmp_path, name):
    tokenizer = TextTokenizer.from_dir(write_chat_tokenizer(tmp_path, "qwen3"))
    with pytest.raises(GenerationError, match=rf"^{name} is no argument .* has enable_thinking$"):
        tokenizer.render_chat(CHAT, None, {"enable_thinking": False, name: "a"})


def test_arguments_are_told_from_what_a_template_sets_itself_whatever_tags_it_has(tmp_path):
    directory = write_chat_tokenizer(tmp_path, "qwen3")
    (directory / "chat_template.jinja").write_text(
        "{%- if mood is not defined %}{% set mood = '?' %}{% endif -%}"
        "{%- if messages | length > 9 %}{% set text = 'so' %}{% endif %}{{ text -}}"
        "{%- for message in messages %}{% if loop.index0 > 9 %}{% break %}{% endif -%}"
        "{%- generation %}{{ message.content ~ mood }}{% endgeneration -%}{%- endfor -%}"
    )
    tokenizer = TextTokenizer.from_dir(directory)
    assert tokenizer.render_chat(CHAT) == "hi?"
    assert tokenizer.render_chat(CHAT, None, {"mood": "!"}) == "hi!"
    with pytest.raises(GenerationError, match=r"text is no argument .* has mood$"):
        tokenizer.render_chat(CHAT, None, {"text": "?"})


def test_a_tokenizer_that_has_rendered_can_be_pickled(tokenizer):
    chat = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.render_chat(chat)
    assert pickle.loads(pickle.dumps(tokenizer)).render_chat(chat) == prompt


def test_messages_that_the_template_refuses_are_an_error_with_its_words(tokenizer):
    with pytest.raises(GenerationError, match="unknown role clown"):
        tokenizer.render_chat([{"role": "user", "content": "a"}, {"role": "clown", "content": "b"}])


@pytest.mark.parametrize(
    ("token", "number", "message"),
    [
        ("a", 2**30, r"tokenizer.json has a token with number 1073741824; expected at most"),
        ("city", 355, "the tokenizer cannot be made again from what it writes"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(tmp_path, tokenizer, token, number, message):
    """A table of gigabytes, or two tokens of one number, of which only one is written."""
    tokenizer.hugging_face.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    assert token in contents["model"]["vocab"]
    contents["model"]["vocab"][token] = number
    path.write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(GenerationError, match=message):
        TextTokenizer.from_dir(tmp_path).render_chat([{"role": "user", "content": "hi"}])


def test_every_family_has_a_chat_format():
    assert {family.chat_format for family in FAMILIES.values()} <= CHAT_FORMATS.keys()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 375), max_size=40))
def test_streamed_pieces_join_to_the_text_of_all_tokens(tokenizer, ids):
    ids = [token for token in ids if token < len(tokenizer.hugging_face)]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids] + [decoder.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([b"\xff", b"\xf0\x9f\x99\x82", b"\xe2\x82", b"\x82"]), max_size=40))
def test_bytes_that_are_no_characters_are_held_back_for_a_few_tokens_only(tokenizer, parts):
    spelled = {tokenizer.token_bytes(token): token for token in range(len(tokenizer.hugging_face))}
    ids = [spelled[bytes([byte])] for byte in b"".join(parts)]
    decoder = StreamDecoder(tokenizer)
    shown = ""
    for count, token in enumerate(ids, 1):
        shown += decoder.push(token)
        assert tokenizer.decode(ids[: max(0, count - 7)]).rstrip("\ufffd") in shown
        assert count - decoder._shown <= 7
    assert shown + decoder.finish() == tokenizer.decode(ids)


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


HERMES = ["qwen3", "qwen2", "minimind"]


@pytest.mark.parametrize("family", HERMES)
@pytest.mark.parametrize("eos", [None, "<|im_end|>", "<|endoftext|>", ["<|endoftext|>"]])
def test_an_answer_ends_at_the_end_of_a_turn_and_of_a_text_whatever_the_files_say(
    tmp_path, family, eos
):
    write_chat_tokenizer(tmp_path, family)
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    numbers = [vocabulary[each] for each in eos] if isinstance(eos, list) else vocabulary.get(eos)
    config = {"model_type": family, "eos_token_id": numbers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ends = {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}
    assert set(TextTokenizer.from_dir(tmp_path).stop_token_ids) == ends


@pytest.mark.parametrize(("family", "end"), [("qwen3", 151645), ("qwen2", 151645), ("minimind", 2)])
def test_the_published_end_of_a_turn_is_known_without_a_tokenizer(tmp_path, family, end):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert read_stop_tokens(tmp_path, 151936) == (end,)


@pytest.mark.parametrize("family", HERMES)
def test_tags_are_shown_as_text_and_the_marks_of_turns_are_not(tmp_path, family):
    tokenizer = TextTokenizer.from_dir(write_chat_tokenizer(tmp_path, family))
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    ids = tokenizer.encode(f"<|im_start|>{call}<|im_end|><|endoftext|>")
    assert len(tokenizer.encode("<tool_call>")) == 1
    assert tokenizer.decode(ids) == call
    assert tokenizer.spell(ids) == f"<|im_start|>{call}<|im_end|><|endoftext|>"
    assert tokenizer.token_bytes(tokenizer.encode("<tool_call>")[0]) == b"<tool_call>"


def test_only_a_tokenizer_that_lies_alone_is_taken_for_minimax_m2(tmp_path):
    write_tokenizer(tmp_path)
    assert TextTokenizer.from_dir(tmp_path).chat_format is CHAT_FORMATS["minimax_m2"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert TextTokenizer.from_dir(tmp_path).chat_format is CHAT_FORMATS["qwen2"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(GenerationError, match=r"config.json: model_type is 'llama'; expected one"):
        TextTokenizer.from_dir(tmp_path)


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
        ({"top_k": -1}, SamplingParams(temperature=1.0, top_p=0.95, top_k=-1)),
        ({"top_k": 0, "top_p": 1.0}, SamplingParams(temperature=1.0, top_p=1.0, top_k=0)),
        ({"top_k": None, "min_p": None}, SamplingParams(temperature=1.0, top_p=0.95, top_k=40)),
    ],
)
def test_sampling_defaults_come_from_the_generation_config(tmp_path, contents, options):
    write_tokenizer(tmp_path)
    if contents is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(contents))
    assert TextTokenizer.from_dir(tmp_path).sampling == options


@pytest.mark.parametrize(
    ("contents", "thinking", "without"),
    [
        (None, (0.6, 0.95, 20), (0.7, 0.8, 20)),
        # As the published checkpoints have it: the settings recommended for thinking.
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, (0.6, 0.95, 20), (0.7, 0.8, 20)),
        ({"temperature": 0.5, "top_p": 0.95}, (0.5, 0.95, 20), (0.5, 0.8, 20)),
        ({"do_sample": False}, (0.0, 1.0, 0), (0.0, 1.0, 0)),
    ],
)
def test_qwen3_samples_otherwise_where_the_prompt_has_closed_the_reasoning(
    tmp_path, contents, thinking, without
):
    write_chat_tokenizer(tmp_path, "qwen3")
    if contents is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(contents))
    tokenizer = TextTokenizer.from_dir(tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    for switch, wanted in (({}, thinking), ({"enable_thinking": False}, without)):
        found = tokenizer.sampling_after(tokenizer.render_chat(chat, None, switch))
        assert (found.temperature, found.top_p, found.top_k) == wanted


@pytest.mark.parametrize("family", ["minimax_m2", "qwen2", "minimind"])
def test_other_families_sample_alike_with_and_without_reasoning(tmp_path, family):
    if family == "minimax_m2":
        write_tokenizer(tmp_path)
    else:
        write_chat_tokenizer(tmp_path, family)
    tokenizer = TextTokenizer.from_dir(tmp_path)
    assert tokenizer.sampling == tokenizer.sampling_without_reasoning


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", ["1", [], True, -3, "Infinity", "1e999", "9" * 400, {}])
def test_a_default_of_another_type_or_out_of_range_is_one_message(tmp_path, name, value):
    text = value if isinstance(value, str) and len(value) > 1 else json.dumps(value)
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"{name}": {text}}}')
    with pytest.raises(GenerationError, match=rf"generation_config\.json.*({name}|JSON|finite)"):
        TextTokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "vocab.json", "tekken.json"]
)
def test_a_file_that_would_be_waited_for_is_refused_at_once(tmp_path, name):
    path = write_tokenizer(tmp_path) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(GenerationError, match=rf"{name} cannot be read \(it is no regular file"):
        TextTokenizer.from_dir(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(GenerationError, match=rf"{name} cannot be read \(it is no regular file"):
        TextTokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA"}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        ("tokenizer_config.json", {"eos_token": ["x"]}),
    ],
)
def test_a_tokenizer_that_its_library_cannot_use_is_one_message(tmp_path, name, change):
    path = write_tokenizer(tmp_path) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(GenerationError, match="cannot be loaded"):
        TextTokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("length", ["many", None, [1], -1, 0, 2])
def test_the_length_that_a_tokenizer_claims_does_not_matter(tmp_path, tokenizer, length):
    path = write_tokenizer(tmp_path) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    text = "a text of some tokens"
    assert TextTokenizer.from_dir(tmp_path).encode(text) == tokenizer.encode(text)


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
        json.dumps({"model_type": "minimind", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    tokenizer = TextTokenizer.from_dir(tmp_path)
    assert type(tokenizer.hugging_face).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_a_later_transformers_has_saved_is_read_from_its_file(
    directory, tokenizer, tmp_path, caplog
):
    """Version 5 saves `TokenizersBackend` and a list of extra tokens, which version 4 has not."""
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "TokenizerOfTomorrow",
        "backend": "tokenizers",
        "is_local": True,
        "extra_special_tokens": ["]~b]"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    found = TextTokenizer.from_dir(tmp_path)
    logger.removeHandler(caplog.handler)
    assert "class" not in caplog.text  # such as that it is not the class of the file
    for text in TEXTS:
        assert found.encode(text) == tokenizer.encode(text)
    assert found.stop_token_ids == tokenizer.stop_token_ids
    assert found.encode("]~b]")[0] in found.hidden_ids
    assert found.render_chat(CHAT) == tokenizer.render_chat(CHAT)


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{]", "tokenizer.json cannot be used"),
        ("generation_config.json", "{]", "generation_config.json cannot be used"),
        ("generation_config.json", "[1]", r"object, not \[1\]"),
        ("generation_config.json", '{"eos_token_id": "5"}', "eos_token_id.*integer, not '5'"),
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


def test_a_text_that_is_no_unicode_is_one_message(tokenizer):
    text = b"so \xff".decode("utf-8", "surrogateescape")  # as Python reads a program's arguments
    with pytest.raises(GenerationError, match=r"no valid Unicode at character 4 .*UTF-8"):
        tokenizer.encode(text)
