"""Stop strings and the way from tokens to events: nothing is shown too early, nothing is lost."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_minimax.generation.chat_formats.minimax_m2 import MiniMaxM2Parser
from neuron_minimax.generation.events import Content, collect
from neuron_minimax.generation.reader import AnswerReader, StopStrings

TOOL_LIST = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = (
    '<minimax:tool_call>\n<invoke name="f">\n<parameter '
    'name="a">END</parameter>\n</invoke>\n</minimax:tool_call>'
)


def run(tokenizer, text, chat=None, **options):
    """Push the tokens of `text` until the reader stops; returns the message and the text not
    read.
    """
    parser = MiniMaxM2Parser(**chat) if chat else None
    reader = AnswerReader(tokenizer, parser, **options)
    events = []
    ids = tokenizer.encode(text)
    read = 0
    for read, token in enumerate(ids, start=1):  # noqa: B007
        events += reader.push(token)
        if reader.stopped:
            break
    events += reader.finish()
    return collect(events), tokenizer.decode(ids[read:]), reader


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab.", max_size=30),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_text_is_cut_before_the_first_stop_string_however_it_arrives(text, stops, cuts):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stopper = StopStrings(stops)
    shown = ""
    for start, end in itertools.pairwise(bounds):
        shown += stopper.push(text[start:end])
        assert not any(stop in shown for stop in stops)
        if stopper.found:
            break
    shown += stopper.finish()
    seen = text if not stopper.found else text[:end]
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert (stopper.found is not None) == any(stop in text for stop in stops)
    assert shown == (seen[: min(places)] if places else text)


def test_what_cannot_become_a_stop_string_is_shown_at_once():
    stopper = StopStrings(["<end>"])
    assert [stopper.push(piece) for piece in ("a", "<", "e", "x", "<en")] == [
        "a",
        "",
        "",
        "<ex",
        "",
    ]
    assert stopper.finish() == "<en"


def test_a_stop_string_ends_plain_text(tokenizer):
    message, unread, reader = run(tokenizer, "one two three four", stops=[" three"])
    assert (message.content, unread, reader.stopped) == ("one two", " four", True)


def test_stop_strings_do_not_count_inside_the_reasoning(tokenizer):
    chat = {"in_reasoning": True, "tools": None}
    message, _, reader = run(
        tokenizer, "so END it\n</think>\n\nThe END of it", stops=["END"], chat=chat
    )
    assert (message.reasoning, message.content) == ("so END it", "The ")
    assert reader.stopped


def test_stop_strings_do_not_count_inside_a_call(tokenizer):
    message, _, reader = run(
        tokenizer, "Go.\n" + CALL, stops=["END"], chat={"in_reasoning": False, "tools": TOOL_LIST}
    )
    assert [call.arguments for call in message.tool_calls] == ['{"a": "END"}']
    assert not reader.stopped


def test_a_second_call_is_not_awaited_when_only_one_is_allowed(tokenizer):
    two = CALL.replace("</invoke>\n", '</invoke>\n<invoke name="f">\n</invoke>\n')
    chat = {"in_reasoning": False, "tools": TOOL_LIST}
    both, _, _ = run(tokenizer, two, chat=chat)
    one, unread, reader = run(tokenizer, two, chat=chat, one_call=True)
    assert len(both.tool_calls) == 2
    assert one.tool_calls == both.tool_calls[:1]
    assert reader.stopped
    assert "</minimax:tool_call>" in unread


def test_an_unfinished_character_and_a_half_tag_are_shown_at_the_end(tokenizer):
    reader = AnswerReader(tokenizer, MiniMaxM2Parser(in_reasoning=False, tools=TOOL_LIST))
    ids = tokenizer.encode("a <minimax:tool_cal") + tokenizer.encode("é")[:1]
    events = [event for token in ids for event in reader.push(token)] + reader.finish()
    assert (
        "".join(event.text for event in events if isinstance(event, Content))
        == "a <minimax:tool_cal\ufffd"
    )
