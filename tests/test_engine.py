"""The engine: joining and leaving between steps, fairness, limits, and answers that do not depend
on neighbours.
"""

import dataclasses
import queue
import threading
import time

import pytest

from neuron_minimax.backends import load
from neuron_minimax.generation.engine import Engine, Request
from neuron_minimax.generation.events import Content
from neuron_minimax.generation.reader import AnswerReader
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.serving.engine_thread import (
    DrainingError,
    EngineThread,
    Metrics,
    QueueFullError,
    ServedRequest,
)
from tests.served import ScriptedBackend
from tests.tiny_traced import VOCAB, answer_alone
from tests.waiting import WAIT, wait_until


class Client:
    """One request and what it has received."""

    def __init__(self, tokenizer, prompt_ids, new_tokens=8, params=GREEDY, timeout=600.0):
        self.outputs = queue.SimpleQueue()
        self.request = Request(
            prompt_ids=prompt_ids,
            params=params,
            max_new_tokens=new_tokens,
            stop_token_ids=frozenset(tokenizer.stop_token_ids),
            reader=AnswerReader(tokenizer),
        )
        self.served = ServedRequest(
            request=self.request,
            receive=self.outputs.put,
            deadline=time.monotonic() + timeout,
        )

    def wait(self):
        """(text, last output)."""
        text = ""
        while True:
            output = self.outputs.get(timeout=WAIT)
            text += "".join(event.text for event in output.events if isinstance(event, Content))
            if output.last:
                return text, output


@pytest.fixture
def make_engine():
    engines = []

    def make(backend, **options):
        engine = EngineThread(backend, Metrics(), **options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


def scripted(tokenizer, text, **options):
    return ScriptedBackend(tokenizer.hugging_face.name_or_path, lambda prompt: text, **options)


def value(metric, **labels):
    return (metric.labels(**labels) if labels else metric)._value.get()


@pytest.mark.slow
def test_what_else_is_in_the_batch_does_not_change_an_answer(traced, make_engine, tokenizer):
    engine = make_engine(load(traced))
    alone = load(traced)
    clients = []
    for number in range(14):  # more than there are slots, of all lengths, joining while others run
        prompt = [(11 * number + 7 * place) % VOCAB for place in range(3 + 9 * number)]
        params = (
            GREEDY if number % 2 else SamplingParams(seed=number, top_p=0.9, repetition_penalty=1.2)
        )
        clients.append((Client(tokenizer, prompt, 5 + number, params), prompt, params, 5 + number))
        engine.submit(clients[-1][0].served)
        time.sleep(0.01 * (number % 3))
    for client, prompt, params, new_tokens in clients:
        text, output = client.wait()
        wanted = answer_alone(
            alone,
            prompt,
            tokenizer=tokenizer,
            params=params,
            stop_token_ids=tokenizer.stop_token_ids,
            max_new_tokens=new_tokens,
        )
        assert (text, output.finish_reason) == (wanted.text, wanted.finish_reason)


def test_a_prompt_that_begins_like_an_earlier_one_starts_from_its_cache_and_answers_the_same(
    traced, make_engine, tokenizer
):
    engine = make_engine(load(traced))
    alone = load(traced)
    system = [(5 * place) % VOCAB for place in range(60)]
    for number, cached in ((1, 0), (2, 60), (3, 60)):
        prompt = [*system, number, number + 1]
        client = Client(tokenizer, prompt)
        engine.submit(client.served)
        assert (
            client.wait()[0]
            == answer_alone(alone, prompt, tokenizer=tokenizer, max_new_tokens=8).text
        )
        assert client.request.cached_tokens == cached
    again = Client(tokenizer, prompt)
    engine.submit(again.served)
    again.wait()
    assert (
        again.request.cached_tokens == len(prompt) - 1
    )  # the last token is computed again: its logits are needed


def test_a_prompt_starts_only_from_what_its_own_scope_has_left_in_a_slot(tokenizer):
    """There are as many slots as prompts, so that nothing is overwritten; two prompts share what
    the shorter one takes from the beginning of `system`.
    """
    system = [(5 * place) % 299 for place in range(40)]
    asked = [("a", 40), ("b", 40), (None, 30), ("a", 20), ("b", 35), (("a", "b"), 40), (None, 40)]
    engine = Engine(scripted(tokenizer, "hi", slots=len(asked)))
    for number, (scope, length) in enumerate(asked):
        request = Request(
            prompt_ids=[*system[:length], 300 + number],
            params=GREEDY,
            max_new_tokens=1,
            cache_scope=scope,
        )
        list(engine.run(request))
        shared = [min(length, earlier) for other, earlier in asked[:number] if other == scope]
        assert request.cached_tokens == max(shared, default=0), (number, scope)


def test_a_backend_that_cannot_continue_a_slot_gets_every_prompt_whole(make_engine, tokenizer):
    backend = scripted(tokenizer, "hi", slots=1)
    backend.capabilities = dataclasses.replace(backend.capabilities, chunked_encoding=False)
    engine = make_engine(backend)
    for _ in range(2):
        client = Client(tokenizer, [7] * 50)
        engine.submit(client.served)
        assert client.wait()[0] == "hi"
        assert client.request.cached_tokens == 0
    assert [call for call in backend.calls if "encode" in call] == ["encode 50"] * 2


def test_running_requests_advance_after_every_chunk_of_long_prompts(make_engine, tokenizer):
    backend = scripted(tokenizer, "word " * 40)
    engine = make_engine(backend)
    short = Client(tokenizer, [1, 2, 3], 40)
    long = [Client(tokenizer, [first] * 640, 2) for first in (4, 5)]
    gate = threading.Event()
    backend.before_call = gate.wait
    engine.submit(short.served, *(client.served for client in long))
    gate.set()
    for client in (short, *long):
        client.wait()
    rounds = "; ".join(backend.calls).split("step")
    assert "".join(rounds).count("encode 64") == 20
    assert all(encoded.count("encode") <= 1 for encoded in rounds[1:])


def test_a_short_prompt_is_not_kept_waiting_by_a_long_one_before_it(make_engine, tokenizer):
    backend = scripted(tokenizer, "word " * 40)
    engine = make_engine(backend)
    long = Client(tokenizer, [4] * 640, 2)
    short = Client(tokenizer, [1, 2, 3], 2)
    gate = threading.Event()
    backend.before_call = gate.wait
    engine.submit(long.served)
    engine.submit(short.served)
    gate.set()
    short.wait()
    long.wait()
    assert backend.calls.index("encode 3") <= 2


def test_a_cancelled_request_frees_its_slot_before_the_next_step(make_engine, tokenizer):
    backend = scripted(tokenizer, "word " * 400, slots=1)
    engine = make_engine(backend)
    first = Client(tokenizer, [1, 2, 3], 400)
    second = Client(tokenizer, [4, 5, 6], 2)
    entered = threading.Semaphore(0)
    go_on = threading.Semaphore(0)

    def pause():
        entered.release()
        go_on.acquire()

    backend.before_call = pause
    engine.submit(first.served)
    engine.submit(second.served)
    for _ in range(3):
        entered.acquire()
        go_on.release()
    entered.acquire()  # inside the fourth call, for the first request
    engine.cancel(first.served)
    backend.before_call = lambda: None
    go_on.release()
    second.wait()
    assert backend.calls[:6] == ["encode 3", "step 1", "step 1", "step 1", "encode 3", "step 1"]


def test_requests_beyond_the_queue_are_refused_and_those_in_it_are_served(make_engine, tokenizer):
    backend = scripted(tokenizer, "hi", slots=1)
    engine = make_engine(backend, max_waiting=2)
    gate = threading.Event()
    backend.before_call = gate.wait
    running = Client(tokenizer, [1, 2])
    engine.submit(running.served)
    wait_until(lambda: not value(engine.metrics.waiting))
    waiting = [Client(tokenizer, [3, 4]), Client(tokenizer, [5, 6])]
    engine.submit(*(client.served for client in waiting))
    with pytest.raises(QueueFullError, match="2 requests waiting"):
        engine.submit(Client(tokenizer, [7]).served)
    gate.set()
    assert [client.wait()[0] for client in (running, *waiting)] == ["hi"] * 3


def test_requests_are_admitted_in_the_order_of_their_arrival(make_engine, tokenizer):
    backend = scripted(tokenizer, "hi", slots=1)
    engine = make_engine(backend)
    order = []
    clients = [Client(tokenizer, [number, 9]) for number in range(6)]
    for number, client in enumerate(clients):
        client.served.receive = lambda output, number=number: (
            order.append(number) if output.last else None
        )
    engine.submit(*(client.served for client in clients))
    assert engine.drain(WAIT)
    assert order == list(range(6))


def test_a_deadline_ends_running_and_waiting_requests(make_engine, tokenizer):
    backend = scripted(tokenizer, "word " * 1000, slots=1)
    engine = make_engine(backend)
    backend.before_call = lambda: time.sleep(0.01)
    running = Client(tokenizer, [1], 1000, timeout=0.2)
    waiting = Client(tokenizer, [2], 5, timeout=0.1)
    engine.submit(running.served)
    engine.submit(waiting.served)
    assert waiting.wait()[1].error[0] == "timeout"
    assert running.wait()[1].error[0] == "timeout"
    backend.before_call = lambda: None
    after = Client(tokenizer, [3], 4)
    engine.submit(after.served)
    assert after.wait()[1].finish_reason == "length"


def test_draining_finishes_what_runs_and_waits_and_takes_nothing_new(make_engine, tokenizer):
    backend = scripted(tokenizer, "one two three", slots=1)
    engine = make_engine(backend)
    gate = threading.Event()
    backend.before_call = gate.wait
    clients = [Client(tokenizer, [number], 50) for number in range(3)]
    engine.submit(*(client.served for client in clients))
    assert not engine.drain(timeout=0.0)
    with pytest.raises(DrainingError):
        engine.submit(Client(tokenizer, [1]).served)
    gate.set()
    assert engine.drain(timeout=WAIT)
    assert [client.wait()[0] for client in clients] == ["one two three"] * 3


def test_a_fault_of_the_backend_fails_the_requests_it_had_and_not_the_server(
    make_engine, tokenizer
):
    backend = scripted(tokenizer, "fine")
    engine = make_engine(backend)

    def burst():
        raise RuntimeError("secret internals")

    backend.before_call = burst
    broken = Client(tokenizer, [1, 2, 3])
    engine.submit(broken.served)
    kind, message = broken.wait()[1].error
    assert kind == "backend"
    assert "secret" not in message
    backend.before_call = lambda: None
    after = Client(tokenizer, [1, 2, 3])
    engine.submit(after.served)
    assert after.wait()[0] == "fine"
    assert after.request.cached_tokens == 0  # nothing of a broken slot is reused


def test_a_fault_in_one_request_leaves_the_others_alone(make_engine, tokenizer):
    backend = scripted(tokenizer, "one two three four")
    engine = make_engine(backend)
    broken = Client(tokenizer, [1, 2])
    fine = Client(tokenizer, [3, 4], 50)
    broken.request.reader.push = None
    engine.submit(broken.served, fine.served)
    output = broken.wait()[1]
    assert output.error[0] == "internal_error"
    assert isinstance(output.cause, TypeError)
    assert fine.wait()[0] == "one two three four"


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_panic_ends_the_requests_that_run_and_not_the_server(make_engine, tokenizer):
    backend = scripted(tokenizer, "fine")
    engine = make_engine(backend)

    def burst(*arguments):
        raise Panic("not yours")

    backend.before_call = burst
    broken = Client(tokenizer, [1, 2, 3])
    engine.submit(broken.served)
    assert broken.wait()[1].error[0] == "internal_error"
    backend.before_call = lambda: None
    after = Client(tokenizer, [1, 2, 3])
    engine.submit(after.served)
    assert after.wait()[0] == "fine"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nothing_waits_for_a_thread_that_has_ended(make_engine, tokenizer, monkeypatch):
    engine = make_engine(scripted(tokenizer, "fine"))

    def burst():
        raise Panic("not yours")

    monkeypatch.setattr(engine, "_round", burst)
    waiting = Client(tokenizer, [1, 2, 3])
    engine.submit(waiting.served)
    assert waiting.wait()[1].error[0] == "shutdown"
    with pytest.raises(DrainingError):
        engine.submit(Client(tokenizer, [1, 2, 3]).served)


def test_the_metrics_count_tokens_steps_padding_and_reasons(make_engine, tokenizer):
    backend = scripted(tokenizer, "hi")
    engine = make_engine(backend)
    client = Client(tokenizer, [1] * 40, 50)
    engine.submit(client.served)
    client.wait()
    engine.stop()
    metrics = engine.metrics
    tokens = len(tokenizer.encode("hi")) + 1
    assert value(metrics.prompt_tokens) == 40
    assert value(metrics.output_tokens) == tokens == client.request.output_tokens
    assert value(metrics.encoded, use="prompt") == 40
    assert value(metrics.encoded, use="padding") == 64 - 40
    assert value(metrics.stepped, use="active") == tokens - 1
    assert value(metrics.stepped, use="idle") == 3 * (tokens - 1)
    assert value(metrics.finished, finished_reason="stop") == 1
    assert value(metrics.running) == value(metrics.waiting) == value(metrics.kv_use) == 0
    assert b"neuron_minimax_time_to_first_token_seconds_count 1.0" in metrics.render()
