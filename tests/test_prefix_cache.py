"""Prompts that begin alike share what slots hold, and are answered as if nothing were shared."""

import random
from functools import partial
from pathlib import Path

import pytest
import torch

from neuron_minimax.backends import compile_model, load
from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.generation.engine import Engine, NewToken, Request
from neuron_minimax.generation.prefix_cache import PrefixCache
from neuron_minimax.generation.sampling import GREEDY
from tests.opened import convert
from tests.tiny import write_tiny

# 5e-6 measured, of logits of size 1: chunks of other sizes are added up in another order.
TOLERANCE = 3e-5

VOCABULARY = 50


def hashed(before: int, token: int) -> int:
    return hash((before, token))


class HashingBackend(Backend):
    """A cache in its plainest form: at each position the hash of all tokens up to there, computed
    of what the slot holds before it. The likeliest next token is the hash of all, shortened.
    """

    def __init__(self, slots: int, seq_len: int = 64, **abilities: bool) -> None:
        self.capabilities = Capabilities(
            slots=slots,
            seq_len=seq_len,
            buckets=(4, 8),
            vocab_size=VOCABULARY,
            **{"chunked_encoding": True, "all_position_logits": False, "slot_copies": True}
            | abilities,
        )
        self.held = [[0] * seq_len for _ in range(slots)]
        self.encoded = 0
        self.fails = False

    def reset(self, slot: int) -> None:
        self._check_slot(slot)

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        self.held[target][start:end] = self.held[source][start:end]

    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        if self.fails:
            self.held[slot] = [-1] * len(self.held[slot])
            raise RuntimeError("lost")
        self.encoded += len(ids)
        for place, token in enumerate(ids, start):
            self.held[slot][place] = hashed(self.held[slot][place - 1] if place else 0, token)
        return self._logits(self.held[slot][start + len(ids) - 1])

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        logits_SV = torch.zeros(self.capabilities.slots, VOCABULARY)
        for slot in active.nonzero().flatten().tolist():
            place = int(positions[slot])
            self.held[slot][place] = hashed(self.held[slot][place - 1], int(tokens[slot]))
            logits_SV[slot] = self._logits(self.held[slot][place])
        return logits_SV

    @staticmethod
    def _logits(state: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(state % VOCABULARY), VOCABULARY).float()


def answer_of(prompt: list[int], new_tokens: int) -> list[int]:
    """What a HashingBackend answers, without a cache."""
    state = 0
    for token in prompt:
        state = hashed(state, token)
    tokens = []
    for _ in range(new_tokens):
        tokens.append(state % VOCABULARY)
        state = hashed(state, tokens[-1])
    return tokens


def request_of(prompt: list[int], new_tokens: int = 3, scope: object = None, **more) -> Request:
    return Request(
        prompt_ids=prompt, params=GREEDY, max_new_tokens=new_tokens, cache_scope=scope, **more
    )


def finish(engine: Engine, *requests: Request) -> list[list[int]]:
    """Add requests together, and return the tokens of each."""
    tokens: dict[Request, list[int]] = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.occupied:
        for update in engine.step():
            assert isinstance(update, NewToken), update.cause
            tokens[update.request].append(update.token)
    return list(tokens.values())


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "no copies"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_joins_shares_leaves_and_fails_answers_are_those_without_a_cache(seed, copies):
    """Prompts of a few trunks that branch anywhere, in two scopes, on slots that are too few."""
    chance = random.Random(seed)
    backend = HashingBackend(slots=4, slot_copies=copies)
    engine = Engine(backend)
    trunks = [[chance.randrange(3) for _ in range(50)] for _ in range(3)]
    found: dict[Request, list[int]] = {}
    reused = 0
    for _ in range(500):
        running = [request for request in found if request.output_tokens < request.max_new_tokens]
        if engine.occupied < 4 and chance.random() < 0.5:
            trunk = chance.choice(trunks)
            prompt = [*trunk[: chance.randint(1, 50)], chance.randrange(3)]
            request = request_of(prompt, chance.randint(1, 8), chance.choice("ab"))
            engine.add(request)
            found[request] = []
        elif running and chance.random() < 0.1:
            engine.cancel(chance.choice(running))
        backend.fails = chance.random() < 0.01
        for update in engine.step():
            if isinstance(update, NewToken):
                found[update.request].append(update.token)
        for request in [each for each in found if len(found[each]) == each.max_new_tokens]:
            assert found.pop(request) == answer_of(request.prompt_ids, request.max_new_tokens)
            reused += request.cached_tokens
    assert reused > 300


def test_prompts_that_come_together_are_encoded_once_where_they_are_alike():
    backend = HashingBackend(slots=4)
    system = [place % 7 for place in range(40)]
    requests = [request_of([*system, 10 + number]) for number in range(4)]
    answers = finish(Engine(backend), *requests)
    assert answers == [answer_of(request.prompt_ids, 3) for request in requests]
    assert backend.encoded == 40 + 4
    assert sum(request.cached_tokens for request in requests) == 3 * 40


def test_a_slot_at_work_gives_what_it_has_encoded_and_generated():
    backend = HashingBackend(slots=2)
    engine = Engine(backend)
    long = request_of([1, 2, 3, 4], new_tokens=20)
    engine.add(long)
    tokens = [update.token for _ in range(9) for update in engine.step()]
    assert engine.occupied == 1
    follow_up = request_of([1, 2, 3, 4, *tokens[:6], 49])
    engine.add(follow_up)
    list(engine.step())
    assert follow_up.cached_tokens == 4 + 6
    assert engine.occupied == 2


def test_another_scope_gets_nothing_of_a_slot():
    engine = Engine(HashingBackend(slots=2))
    prompt = list(range(20))
    for scope, cached in (("a", 0), ("b", 0), ("a", 19), ("b", 19)):
        request = request_of(prompt, scope=scope)
        finish(engine, request)
        assert request.cached_tokens == cached


def test_a_prompt_whose_logits_are_all_wanted_is_encoded_whole_and_then_used_by_others():
    engine = Engine(HashingBackend(slots=2))
    prompt = list(range(20))
    for number in range(2):
        whole = request_of(prompt, prompt_logits=[])
        finish(engine, whole)
        assert whole.cached_tokens == 0, number
    other = request_of(prompt)
    finish(engine, other)
    assert other.cached_tokens == 19


@pytest.mark.parametrize(
    ("abilities", "cached"),
    [
        ({}, 40),
        ({"slot_copies": False}, 0),
        ({"slot_copies": False, "chunked_encoding": False}, 0),
    ],
    ids=["copies", "no copies", "no chunks"],
)
def test_only_a_backend_that_can_copy_shares_a_slot_that_is_at_work(abilities, cached):
    backend = HashingBackend(slots=2, **abilities)
    engine = Engine(backend)
    size = 40 if backend.capabilities.chunked_encoding else 7
    system = [place % 7 for place in range(size)]
    engine.add(request_of([*system, 1], new_tokens=20))
    while not any(isinstance(update, NewToken) for update in engine.step()):
        pass
    second = request_of([*system, 2], new_tokens=1)
    engine.add(second)
    while engine.occupied == 2:
        list(engine.step())
    assert second.cached_tokens == cached


def test_a_conversation_stays_while_another_with_the_same_system_prompt_takes_an_older_slot():
    backend = HashingBackend(slots=3)
    engine = Engine(backend)
    system = [place % 7 for place in range(20)]
    turns = {name: [*system, *[name] * 12] for name in (30, 31, 32)}
    for _ in range(3):
        for name, prompt in turns.items():
            request = request_of(prompt)
            (tokens,) = finish(engine, request)
            assert tokens == answer_of(prompt, 3)
            turns[name] = [*prompt, *tokens, 40]
            assert request.cached_tokens == (
                len(prompt) - 2 if len(prompt) > 32 else (20 if name > 30 else 0)
            )


def test_without_copies_a_prompt_takes_the_free_slot_that_holds_most_of_it():
    caches = PrefixCache(HashingBackend(slots=3, slot_copies=False))
    take = partial(caches.take, scope=None, whole=False)
    for slot, tokens in enumerate(([1, 2], [1, 2, 3, *range(20)], [9])):
        assert take([slot], [*tokens, 0]) == slot
        caches.append(slot, tokens)
    assert take([0, 1, 2], [1, 2, 3, 4, 5]) == 1
    assert caches.length(1) == 3
    assert take([0, 2], [1, 2, 3, 4, 5]) == 0
    caches.append(0, [3, 4])
    assert take([0, 1, 2], [7, 7]) == 1, "nothing shared: the least recently used"


def loaded(directory: Path, family: str, count: int, compute: str = "float32") -> list[Backend]:
    """The same small model of random weights, loaded several times."""
    convert(write_tiny(directory / "checkpoint", family=family), directory / "converted")
    options = {"slots": 3, "seq_len": 128, "buckets": (16, 32), "engine": "eager"}
    compile_model(
        directory / "converted", directory / "traced", options=options | {"compute": compute}
    )
    return [load(directory / "traced") for _ in range(count)]


def test_a_copied_prefix_in_bf16_goes_on_bit_for_bit(tmp_path):
    (backend,) = loaded(tmp_path, "minimax_m2", 1, "bf16")
    ids = [(7 * place) % 150 for place in range(60)]
    backend.encode(0, ids[:40])
    backend.copy(0, 2, 0, 40)
    assert torch.equal(backend.encode(2, ids[40:], 40), backend.encode(0, ids[40:], 40))


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_moe", "qwen2", "minimind"])
def test_tokens_and_logits_of_a_model_are_those_without_reuse(family, tmp_path):
    """Conversations on fewer slots than there are, some of them cancelled, some starting inside
    what another has; each against a backend of its own that is given nothing but it.
    """
    backend, alone = loaded(tmp_path, family, 2)
    vocabulary = backend.capabilities.vocab_size
    chance = random.Random(0)
    system = [chance.randrange(vocabulary) for _ in range(40)]
    talks = [[*system[: 40 - 7 * number], number, number, 5] for number in range(5)]
    engine = Engine(backend)
    encoded = 0
    for turn in range(3):
        for first in range(0, 5, 2):
            requests = [request_of(talk, new_tokens=6) for talk in talks[first : first + 2]]
            doomed = request_of([*talks[first][:-3], 9, 9, 9], new_tokens=6)
            steps = {request: [] for request in (doomed, *requests)}
            for request in steps:
                engine.add(request)
            while engine.occupied:
                for update in engine.step():
                    steps[update.request].append(update)
                if len(steps[doomed]) == turn + 1:
                    engine.cancel(doomed)
            for number, request in enumerate(requests, first):
                tokens = [update.token for update in steps[request]]
                wanted = list(Engine(alone).run(request_of(talks[number], new_tokens=6)))
                assert tokens == [update.token for update in wanted]
                for found, expected in zip(steps[request], wanted, strict=True):
                    assert (found.logits - expected.logits).abs().max() < TOLERANCE
                encoded += len(request.prompt_ids) - request.cached_tokens
                talks[number] = [*talks[number], *tokens, chance.randrange(vocabulary)]
    assert encoded < sum(map(len, talks))
