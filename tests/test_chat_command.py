"""`neuron-minimax chat` and `generate --prompt`: what is shown, what is remembered, how it ends; in
lines from a pipe and at a terminal.
"""

import io
import json
import os
import sys

import pytest
from transformers import AutoTokenizer

from neuron_minimax.backends import load
from neuron_minimax.cli import main
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.messages import template_messages
from neuron_minimax.serving.protocol import ChatRequest, parse_request
from tests.served import MODEL, ScriptedBackend, open_client, serving
from tests.terminal import CTRL_C, CTRL_D, ENTER, terminal
from tests.tiny_chats import write_chat_tokenizer
from tests.tiny_tokenizer import write_tokenizer

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "text": {"type": "string"}},
        },
    },
}
ARGUMENTS = {"a": 1, "text": "one\ntwo"}
SHOWN_CALL = "[tool call] 1: add\n  a: 1\n  text:\n    one\n    two\n"
HERMES = f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': ARGUMENTS})}\n</tool_call>"
MINIMAX = (
    '<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
    '<parameter name="text">one\ntwo</parameter>\n</invoke>\n</minimax:tool_call>'
)
CODER = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=text>\none\ntwo\n"
    "</parameter>\n</function>\n</tool_call>"
)
CALLS = {"minimax_m2": MINIMAX, "qwen3_coder": CODER}
FAMILIES = ["minimax_m2", "qwen3", "qwen3_coder", "qwen2", "minimind"]
REASONS = {"minimax_m2", "qwen3", "minimind"}


@pytest.fixture
def tools(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([ADD]))
    return path


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Let every directory be a model of a family that says what a test tells it to say."""

    def make(script, family="minimax_m2", **options):
        directory = tmp_path / "tokenizer"
        directory.mkdir()
        if family == "minimax_m2":
            write_tokenizer(directory)
        else:
            write_chat_tokenizer(directory, family)
        backend = ScriptedBackend(directory, script, **options)
        monkeypatch.setattr("neuron_minimax.generation.llm.load", lambda traced, progress: backend)
        return backend

    return make


@pytest.fixture
def chat(monkeypatch, capsys):
    """Chat in lines of a pipe, in this process; returns the exit code and what was printed."""

    def run(lines, *options):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        code = main(["chat", "anywhere", *map(str, options)])
        return code, *capsys.readouterr()

    return run


def saved(path):
    return json.loads(path.read_text())


def test_a_pipe_gets_what_the_server_says_to_the_same_messages(
    traced, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "saved.json"
    lines = f"hello\n/save {path}\nand\\\nParis?\n/save {path}\n/quit\nnot read\n"
    options = ["--temperature", "0", "--max-new-tokens", "12", "--system", "Be brief."]
    reading, writing = os.pipe()
    os.write(writing, lines.encode())
    os.close(writing)
    monkeypatch.setattr("sys.stdin", os.fdopen(reading))
    assert main(["chat", str(traced), *options]) == 0
    out, err = capsys.readouterr()
    assert out.count("you> ") == 5
    assert "...> Paris?\n" in out
    assert "\x1b" not in out
    assert "(4 messages saved in" in err
    assert "(cut off after 12 tokens: --max-new-tokens)" in err
    found = saved(path)["messages"]
    assert [message["role"] for message in found] == ["system", *["user", "assistant"] * 2]
    assert found[3]["content"] == "and\nParis?"
    with serving(load(traced)) as served:
        client = open_client(served)
        for place in (2, 4):
            response = client.chat.completions.create(
                model=MODEL, messages=found[:place], temperature=0, max_tokens=12
            )
            said = response.choices[0].message
            assert (said.content or "") == found[place]["content"]
            told = getattr(said, "reasoning_content", None) or ""
            assert told == found[place].get("reasoning_content", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_calls_and_answers_of_every_family_are_apart(
    family, scripted, chat, tools, tmp_path
):
    def script(prompt):
        # A template may have opened the reasoning; MiniMind's closes it unless it is asked for.
        opened = prompt.rstrip().endswith("<think>")
        begin = "" if opened else "<think>\n"
        thought = f"{begin}Hm.\n\nHm.\n</think>\n\n" if family in REASONS else ""
        return thought + ("It is 2." if "three" in prompt else f"I add.\n{call}")

    call = CALLS.get(family, HERMES)
    scripted(script, family)
    thinking = ["--thinking"] if family == "minimind" else []
    path = tmp_path / "saved.json"
    code, out, err = chat(f"1 + 1?\nthree\n/save {path}\n", "--tools", tools, *thinking)
    assert code == 0, err
    thought = "[thinking]\nHm.\n\nHm.\n" if family in REASONS else ""
    answer = "[answer]\n" if family in REASONS else ""
    assert out == (
        f"you> 1 + 1?\n{thought}{answer}I add.\n{SHOWN_CALL}"
        f"result of add> three\n{thought}{answer}It is 2.\n"
        f"you> /save {path}\n"
    )
    _, called, result, _ = saved(path)["messages"]
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
    assert result == {"role": "tool", "content": "three", "tool_call_id": "call_0"}
    assert saved(path)["tools"] == [ADD]
    sent = parse_request(ChatRequest, path.read_bytes())  # a body that the server takes
    directory = write_tokenizer(tmp_path / "tokenizer")
    hugging_face = TextTokenizer.from_dir(directory).hugging_face
    assert len(template_messages(sent.messages, hugging_face)) == 4


def test_reasoning_can_be_left_out(scripted, chat):
    scripted(lambda prompt: "Hm.\n</think>\n\nYes.")
    assert chat("Well?\n", "--no-reasoning")[1] == "you> Well?\nYes.\n"


def test_empty_reasoning_has_no_line_and_empty_lines_before_words_are_left_out(scripted, chat):
    scripted(lambda prompt: "\n\n\n</think>\n\n\n\nYes.\n\nNo.\n")
    assert chat("Well?\n")[1] == "you> Well?\nYes.\n\nNo.\n"


def test_a_terminals_controls_are_shown_and_not_obeyed(scripted, chat, tools):
    hostile = "\x1b]0;owned\x07\x9b2J"
    call = MINIMAX.replace("one\ntwo", hostile)
    scripted(lambda prompt: f"{hostile}\n</think>\n\n{hostile}{call}")
    _, out, _ = chat(f"{hostile}\n", "--tools", tools)
    assert out.count("\\x1b]0;owned\\x07\\x9b2J") == 3  # the message, and the model's twice
    assert '"\\u001b]0;owned\\u0007\\x9b2J"' in out  # an argument
    assert not any(mark in out for mark in "\x1b\x07\x9b")


def test_commands_change_what_the_model_is_told(scripted, chat, tools, tmp_path):
    told = []

    def script(prompt):
        if prompt.endswith("<think>\n"):  # else it is a piece of a long one
            told.append(prompt)
        return "x\n</think>\n\nYes."

    scripted(script)
    path = tmp_path / "saved.json"
    lines = [
        *("one", "/system Be kind.", f"/tools {tools}", "two", "/regenerate"),
        *("/reset", "three", '/system ""', '/tools ""', "four", " /four", f"/save {path}"),
        *("```", "def f():\\", "    pass", "```"),
    ]
    code, _, err = chat("\n".join(lines) + "\n")
    assert code == 0, err
    kind = [("Be kind." in prompt, '"add"' in prompt) for prompt in told]
    changed = (True, True)
    plain = (False, False)
    assert kind == [plain, changed, changed, changed, plain, plain, plain]
    assert told[1] == told[2]
    users = [prompt.count("]~b]user\n") for prompt in told]
    assert users == [1, 2, 2, 1, 2, 3, 4]
    assert [each["content"] for each in saved(path)["messages"]][::2] == ["three", "four", "/four"]
    assert "```\ndef f():\\\n    pass\n```[e~[" in told[-1]
    assert "(tools: add)" in err
    assert "(system message: Be kind.)" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nonsense", "/nonsense is no command; /help"),
        ("/save", "needs the name of a file"),
        ("/save {here}", "exists; name another file"),
        ("/save {here}/nowhere/x.json", "nowhere/x.json cannot be written"),
        ("/tools nosuch.json", "nosuch.json does not exist"),
        ("/regenerate", "nothing was said yet"),
        ("long " * 3000, "shorten it"),
        ("\udcff", "no valid Unicode"),
    ],
)
def test_a_line_that_cannot_be_used_is_one_message_and_the_talk_goes_on(
    line, words, scripted, chat, tmp_path, monkeypatch, capsys
):
    scripted(lambda prompt: "x\n</think>\n\nYes.")
    lines = f"{line.format(here=tmp_path)}\nhello\n".encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["chat", "anywhere"]) == 1
    out, err = capsys.readouterr()
    (error,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert words in error
    assert out.endswith("you> hello\n[thinking]\nx\n[answer]\nYes.\n")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tools", "nosuch.json"], 1, "nosuch.json does not exist"),
        (["--chat-template-kwargs", "[]"], 2, "expected a JSON object"),
        (["--chat-template-kwargs", "{"], 2, "expected a JSON object"),
        (["--chat-template-kwargs", '{"nonsense": 1}'], 1, "nonsense is no argument"),
        (["--no-thinking"], 1, "no switch for thinking"),
        (["--temperature", "-1"], 2, "temperature is -1"),
        (["--top-p", "2"], 2, "top_p is 2"),
        (["--max-new-tokens", "0"], 2, "max-new-tokens"),
    ],
)
def test_an_option_that_cannot_be_used_ends_the_command_before_the_first_message(
    options, code, words, scripted, chat
):
    scripted(lambda prompt: "never")
    found, out, err = chat("hello\n", *options)
    assert (found, out) == (code, "")
    assert words in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["chat", "nosuch", "--temperature", "-1"], "temperature is -1"),
        (["chat", "nosuch", "--top-k", "-2"], "top_k is -2"),
        (["generate", "nosuch", "--prompt", "x", "--top-p", "2"], "top_p is 2"),
        (["generate", "nosuch", "--token-ids", "1", "--greedy", "--seed", str(2**64)], "seed is "),
        (["experts", "nosuch", "--prompt", "x", "--seed", str(2**64)], "seed is "),
    ],
)
def test_sampling_options_are_judged_before_a_model_is_looked_for(command, words, capsys):
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_talk_ends_quietly_when_nobody_reads_it(scripted, monkeypatch, capsys):
    reading, writing = os.pipe()
    reader = os.fdopen(reading)
    # As `head -1` does: it has the line of the message, and is gone when the answer comes.
    scripted(lambda prompt: reader.close() or "x\n</think>\n\nYes.")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\nmore\n")))
    with os.fdopen(writing, "w") as output, monkeypatch.context() as replaced:
        replaced.setattr("sys.stdout", output)
        assert main(["chat", "anywhere"]) == 0
    assert capsys.readouterr().err == "loading anywhere\n"


def test_options_reach_the_prompt_and_the_sampling(scripted, chat):
    told = []
    scripted(lambda prompt: told.append(prompt) or "Yes.", "qwen3")
    chat("hello\n", "--chat-template-kwargs", '{"enable_thinking": false}', "--system", "Be kind.")
    assert told[0].endswith("<think>\n\n</think>\n\n")
    assert "Be kind." in told[0]


def test_the_end_of_the_context_is_told_before_it_is_there(scripted, chat):
    scripted(lambda prompt: "x\n</think>\n\n" + "Yes and no. " * 9, seq_len=256)
    code, _, err = chat("hello\n" * 4)
    assert code == 1  # the last message has no place
    assert "of the context's 256 tokens; when it is full, no message fits any more: /reset" in err
    assert "(cut off: the context of 256 tokens is full; /reset begins anew)" in err
    assert "error: the prompt has" in err
    places = [err.index(words) for words in ("when it is full", "(cut off", "error: the prompt")]
    assert places == sorted(places)


def test_an_input_that_ends_before_a_result_is_an_error(scripted, chat, tools):
    scripted(lambda prompt: f"x\n</think>\n\n{MINIMAX}")
    code, _, err = chat("1 + 1?\n", "--tools", tools)
    assert code == 1
    assert "the input ended before the result of add" in err


def test_generate_sets_reasoning_and_answer_apart(scripted, capsys, tools):
    scripted(lambda prompt: f"Hm.\n</think>\n\nI add.\n{MINIMAX}")

    def generate(*options):
        assert main(["generate", "anywhere", "--prompt", "1 + 1?", *map(str, options)]) == 0
        return capsys.readouterr()

    assert generate().out == f"[thinking]\nHm.\n[answer]\nI add.\n{MINIMAX}\n"
    assert generate("--no-reasoning").out == f"I add.\n{MINIMAX}\n"
    raw = f"Hm.\n</think>\n\nI add.\n{MINIMAX}"
    assert generate("--raw").out == raw + "\n"
    assert json.loads(generate("--raw", "--json").out).keys() == {"token_ids", "text"}
    with_tools = generate("--tools", tools)
    assert with_tools.out == f"[thinking]\nHm.\n[answer]\nI add.\n{SHOWN_CALL}"
    found = json.loads(generate("--tools", tools, "--json").out)
    assert found.pop("token_ids")
    assert found == {
        "text": raw,
        "reasoning": "Hm.",
        "content": "I add.",
        "tool_calls": [{"name": "add", "arguments": ARGUMENTS}],
        "finish_reason": "stop",
    }
    cut = generate("--max-new-tokens", "2")
    assert cut.err == "the answer was cut off after 2 tokens: --max-new-tokens\n"
    assert generate("--stop", " add", "--stop", "never").out == "[thinking]\nHm.\n[answer]\nI\n"
    assert generate("--raw", "--stop", "</think>").out == "Hm.\n\n"


def test_a_raw_prompt_is_the_tokenizer_s_plain_encoding_of_it(scripted, capsys, tmp_path):
    given = []
    backend = scripted(lambda prompt: " more")
    encode = backend.encode
    backend.encode = lambda slot, ids, *more: given.append(list(ids)) or encode(slot, ids, *more)
    text = "Once upon a time,\n  there was <think> and Grüße"
    (tmp_path / "prompt.txt").write_text(text + "\n")
    plain = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").encode(
        text, add_special_tokens=False
    )
    for options in (("--prompt", text), ("--prompt-file", str(tmp_path / "prompt.txt"))):
        assert main(["generate", "anywhere", "--raw", *options]) == 0
        assert given.pop() == plain
        assert capsys.readouterr().out == " more\n"


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize(
    "command",
    [("generate", "anywhere"), ("generate", "anywhere", "--raw"), ("run", "anywhere")],
    ids=" ".join,
)
def test_a_prompt_that_says_nothing_is_refused_before_anything_is_made(command, text, capsys):
    assert main([*command, "--prompt", text]) == 1
    assert capsys.readouterr().err == "error: --prompt is empty; expected a message\n"


@pytest.mark.parametrize(
    "option",
    [("--system", "x"), ("--tools", "x.json"), ("--thinking",), ("--chat-template-kwargs", "{}")],
    ids=lambda option: option[0].strip("-"),
)
def test_what_is_for_the_chat_template_does_not_go_with_raw(option, capsys):
    assert main(["generate", "anywhere", "--prompt", "x", "--raw", *option]) == 2
    assert "which --raw and --token-ids leave out" in " ".join(capsys.readouterr().err.split())


def test_a_prompt_comes_from_a_file_or_from_standard_input(scripted, capsys, tmp_path, monkeypatch):
    prompts = []

    def reply(prompt):
        prompts.append(prompt)
        return "x\n</think>\n\nyes"

    scripted(reply)
    path = tmp_path / "prompt.txt"
    path.write_bytes("Grüße\n1 + 1?\n".encode())
    assert main(["generate", "anywhere", "--prompt-file", str(path)]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert main(["generate", "anywhere", "--prompt-file", "-"]) == 0
    assert all("user\nGrüße\n1 + 1?[e~[" in prompt for prompt in prompts)
    assert len(prompts) == 2
    capsys.readouterr()
    long = "ä".encode() * (8 << 20) + b"\xc3\xa4"  # the limit is amidst a character
    for data, reason in (
        (b"\xff", "no text in UTF-8"),
        (b" \n", "is empty"),
        (b"x" + long, "is longer than 16 MiB"),
        (b" " * len(long), "is longer than 16 MiB"),
    ):
        path.write_bytes(data)
        assert main(["generate", "anywhere", "--prompt-file", str(path)]) == 1
        (message,) = capsys.readouterr().err.splitlines()
        assert reason in message
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "anywhere", "--prompt-file", "-"]) == 1
    assert "no standard input" in capsys.readouterr().err
    assert main(["generate", "anywhere", "--prompt-file", str(tmp_path / "none")]) == 1
    assert "none cannot be read: No such file" in capsys.readouterr().err
    assert main(["generate", "anywhere", "--prompt-file", str(path), "--prompt", "x"]) == 2


def test_a_terminal_shows_reasoning_dimmed_and_takes_a_paste_whole(traced):
    command = ["-m", "neuron_minimax", "chat", str(traced), "--temperature", "0"]
    with terminal(*command, "--max-new-tokens", "12") as opened:
        shown = opened.wait_for("you> ")
        assert "a context of 256 tokens; /help" in shown
        assert "\x1b[?2004h" in shown  # the terminal is asked to mark what is pasted
        opened.type("hello" + ENTER)
        shown = opened.wait_for("you> ")
        assert "\x1b[2m[thinking]\x1b[0m\r\n\x1b[2m" in shown
        assert "(cut off after 12 tokens: --max-new-tokens)" in shown
        opened.type("\x1b[200~/system one\ntwo\x1b[201~" + ENTER)
        opened.wait_for("(system message: one\r\ntwo)")
        opened.wait_for("you> ")
        opened.type(CTRL_D)
        assert opened.code() == 0


# A model that goes on until it is stopped, one token after the other.
ENDLESS = """
import sys, time
from pathlib import Path
import neuron_minimax.generation.llm as llm
from neuron_minimax.cli import main
from tests.served import ScriptedBackend
backend = ScriptedBackend(Path(sys.argv[1]), lambda prompt: "Hm.\\n</think>\\n\\n" + "word " * 1000)
backend.before_call = lambda: time.sleep(0.01)
llm.load = lambda traced, progress: backend
sys.exit(main(["chat", "anywhere"]))
"""


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_talk(tokenizer_directory):
    with terminal("-c", ENDLESS, str(tokenizer_directory)) as opened:
        opened.wait_for("you> ")
        opened.type("hello" + ENTER)
        opened.wait_for("word word")
        opened.type(CTRL_C)
        opened.wait_for("(stopped; what was said stays)")
        opened.wait_for("you> ")
        opened.type("more" + ENTER)
        opened.wait_for("word word")
        opened.type(CTRL_C)
        opened.wait_for("you> ")
        opened.type("not sent")
        opened.wait_for("not sent")
        opened.type(CTRL_C)
        opened.wait_for("(Ctrl-C once more ends the conversation")
        opened.wait_for("you> ")
        opened.type("/tools" + ENTER)
        opened.wait_for("(no tools)")
        opened.wait_for("you> ")
        opened.type(CTRL_C)
        opened.wait_for("once more")
        opened.wait_for("you> ")
        opened.type(CTRL_C)
        opened.wait_for("stopped by SIGINT")
        assert opened.code() == 130
        assert "Traceback" not in opened.shown
