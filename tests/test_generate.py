"""The decoding loop on a real tiny model, against transformers' own generate and forward."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from neuron_minimax.backends import load
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.generate import generate, room_for_answer, stream_text
from neuron_minimax.generation.sampling import SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.tiny import write_tiny
from tests.tiny_traced import VOCAB, answer_alone, write_traced

PROMPT = [5, 80, 17, 230, 99, 3, 41]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_traced(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backend(traced):
    return load(traced)


@pytest.fixture(scope="module")
def tokenizer(backend):
    return TextTokenizer.from_dir(backend.model_directory)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    directory = write_tiny(
        tmp_path_factory.mktemp("oracle"), dense=True, vocab_size=VOCAB, use_mtp=False
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_greedy_tokens_and_dumped_logits_are_those_of_transformers(backend, oracle, tmp_path):
    result = answer_alone(
        backend, PROMPT, max_new_tokens=20, dump_logits=tmp_path / "logits.safetensors"
    )
    ids = torch.tensor([PROMPT])
    wanted = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    assert result.token_ids == wanted[0, len(PROMPT) :].tolist()
    assert (result.text, result.finish_reason) == ("", "length")
    dump = load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        logits = oracle(wanted[:, :-1]).logits[0]
    assert dump["prefill_logits"].shape == (len(PROMPT), VOCAB)
    assert dump["step_logits"].shape == (20, VOCAB)
    assert dump["prefill_logits"].dtype == dump["step_logits"].dtype == torch.float32
    torch.testing.assert_close(dump["prefill_logits"], logits[: len(PROMPT)], atol=1e-4, rtol=0)
    torch.testing.assert_close(dump["step_logits"], logits[len(PROMPT) - 1 :], atol=1e-4, rtol=0)
    assert dump["step_logits"].argmax(-1).tolist() == result.token_ids


def test_a_backend_without_all_positions_dumps_the_last_one(backend, tmp_path, monkeypatch):
    answer_alone(backend, PROMPT, max_new_tokens=2, dump_logits=tmp_path / "all")
    limited = dataclasses.replace(backend.capabilities, all_position_logits=False)
    monkeypatch.setattr(backend, "capabilities", limited)
    answer_alone(backend, PROMPT, max_new_tokens=2, dump_logits=tmp_path / "last")
    last = load_file(tmp_path / "last")
    whole = load_file(tmp_path / "all")
    assert last["prefill_logits"].shape == (1, VOCAB)
    torch.testing.assert_close(
        last["prefill_logits"][0], whole["prefill_logits"][-1], atol=1e-5, rtol=0
    )


def test_a_stop_token_ends_the_answer_and_is_its_last_token(backend):
    free = answer_alone(backend, PROMPT, max_new_tokens=20).token_ids
    stop = free[6]
    result = answer_alone(backend, PROMPT, stop_token_ids=(stop,), max_new_tokens=20)
    assert result.token_ids == free[: free.index(stop) + 1]
    assert result.finish_reason == "stop"


def test_tokens_arrive_one_by_one(backend):
    steps = generate(backend, PROMPT, max_new_tokens=5)
    first = next(steps)
    assert first.finish_reason is None
    assert [first.token, *(step.token for step in steps)] == answer_alone(
        backend, PROMPT, max_new_tokens=5
    ).token_ids


def test_the_streamed_text_is_the_text_of_the_answer(backend, tokenizer):
    steps = generate(backend, PROMPT, max_new_tokens=40)
    streamed = "".join(text for text, _ in stream_text(steps, tokenizer))
    assert streamed == answer_alone(backend, PROMPT, tokenizer=tokenizer, max_new_tokens=40).text
    assert streamed


def test_every_slot_and_a_long_prompt_in_chunks_give_the_same_tokens(backend, oracle):
    prompt = [(7 * place) % VOCAB for place in range(50)]  # longer than the largest bucket
    ids = torch.tensor([prompt])
    wanted = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    for slot in range(backend.capabilities.slots):
        tokens = [step.token for step in generate(backend, prompt, max_new_tokens=6, slot=slot)]
        assert tokens == wanted[0, len(prompt) :].tolist()


def test_a_seed_gives_the_same_answer_again(backend):
    def run(seed):
        params = SamplingParams(temperature=1.0, top_p=0.95, seed=seed)
        return answer_alone(backend, PROMPT, params=params, max_new_tokens=12).token_ids

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_an_answer_may_fill_the_slot_to_its_last_position(backend):
    can = backend.capabilities
    prompt = [token % VOCAB for token in range(can.seq_len - 3)]
    result = answer_alone(backend, prompt)
    assert len(result.token_ids) == room_for_answer(can, len(prompt)) == 4
    assert len(answer_alone(backend, [*prompt, 1, 2, 3]).token_ids) == 1


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        ([], None, "no tokens"),
        (PROMPT, 0, "expected a positive integer"),
        (PROMPT, 123, "at most 122 new tokens"),
        ([1] * 129, None, "129 tokens"),
        ([1, VOCAB], 1, f"token {VOCAB}"),
        ([-1], 1, "token -1"),
    ],
)
def test_a_request_that_does_not_fit_is_one_clear_error_before_any_work(
    backend, prompt, new, words
):
    with pytest.raises(GenerationError, match=words):
        generate(backend, prompt, max_new_tokens=new)


def test_without_chunks_a_prompt_beyond_the_largest_bucket_is_refused(backend):
    can = dataclasses.replace(backend.capabilities, chunked_encoding=False)
    assert room_for_answer(can, 32) == 97
    with pytest.raises(GenerationError, match="largest bucket"):
        room_for_answer(can, 33)


def test_logits_cannot_be_dumped_into_a_directory_that_is_not_there(backend, tmp_path):
    with pytest.raises(GenerationError, match="directory does not exist"):
        answer_alone(backend, PROMPT, max_new_tokens=1, dump_logits=tmp_path / "nowhere" / "logits")


def test_logits_replace_earlier_logits_and_nothing_else(backend, tmp_path):
    other = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    text = tmp_path / "notes"
    text.write_text("notes")
    for path in (other, text):
        before = path.read_bytes()
        with pytest.raises(GenerationError, match="exists and holds no logits; name another file"):
            generate(backend, PROMPT, max_new_tokens=1, dump_logits=path)
        assert path.read_bytes() == before
    mine = tmp_path / "logits"
    mine.touch()
    for count in (1, 2):
        answer_alone(backend, PROMPT, max_new_tokens=count, dump_logits=mine)
        assert len(load_file(mine)["step_logits"]) == count


def test_logits_cannot_be_dumped_over_a_directory(backend, tmp_path):
    with pytest.raises(GenerationError, match="is a directory; name the file"):
        generate(backend, PROMPT, max_new_tokens=1, dump_logits=tmp_path)
