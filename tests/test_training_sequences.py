"""The sequences of a run: windows that lose no token, packs that change no loss, epochs, held-out
rows, and what is said and refused before the first step.
"""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError
from neuron_minimax.model.decoder import Decoder, initial_state
from neuron_minimax.training.data.encoding import Encoder, micro_batches, pad
from neuron_minimax.training.data.sequences import (
    DataOptions,
    MadeSequences,
    Sequences,
    encode_rows,
)
from neuron_minimax.training.data.sources import JsonLines
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.data.windows import Example, joined, pack, windows
from neuron_minimax.training.objective import losses
from neuron_minimax.training.trainer import Trainer, TrainingOptions
from tests.test_training_endings import SMALL, write_inputs
from tests.tiny import tiny_config

Rows = list[dict[str, Any]]
CHINESE = "从前有座山,山上有座庙,庙里有个老和尚在讲故事。"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def encoder(inputs: Path) -> Encoder:
    return Encoder(load_tokenizer(inputs), 64)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Rows], Path]:
    def write_rows(rows: Rows) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    return write_rows


@pytest.fixture
def train(inputs: Path, tmp_path: Path) -> Callable[..., int]:
    def run(rows: Path, *more: str, out: str = "out") -> int:
        arguments = ["--config", inputs, "--tokenizer", inputs, "--data", rows]
        sizes = ("--batch-size", "2", "--max-tokens", "64")
        return main(["train", str(tmp_path / out), *map(str, arguments), *sizes, *more])

    return run


def a_text(length: int) -> Example:
    return Example(list(range(1000, 1000 + length)), [True] * length)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 50])
@pytest.mark.parametrize("stride", [1, 3, 6, 7])
def test_windows_learn_every_token_behind_the_first_once_from_all_before_it_that_fit(
    length: int, stride: int
) -> None:
    size = 8
    found = windows(a_text(length), size, stride)
    assert [window.ids[0] - 1000 for window in found] == [stride * n for n in range(len(found))]
    assert all(len(window.ids) <= size for window in found)
    assert all(len(window.ids) == size for window in found[:-1])
    learned = [
        token
        for window in found
        for token, is_learned in list(zip(window.ids, window.learned, strict=True))[1:]
        if is_learned
    ]
    assert learned == list(range(1001, 1000 + length))
    assert sum(window.learned_count for window in found) == length - 1
    if stride < size - 1:  # then a token behind the first window has size - stride tokens before it
        for window in found[1:]:
            assert window.learned.index(True) == size - stride


def test_a_text_of_thousands_of_tokens_is_learned_whole_in_its_windows(encoder: Encoder) -> None:
    text = CHINESE * 100
    assert encoder.tokenizer.model_max_length > 10**6  # transformers warns of longer ones
    tokens = encoder.tokenizer.encode(text, add_special_tokens=False)
    found = encoder.encode({"text": text})
    assert len(tokens) > 5000
    assert sum(example.learned_count for example in found.examples) == len(tokens)
    whole = found.examples[0].ids + [
        token for example in found.examples[1:] for token in example.ids[1:]
    ]
    assert whole == [*tokens, encoder.end_of_turn]
    assert found.windows == len(found.examples)


def test_a_stride_that_would_skip_tokens_is_refused(encoder: Encoder) -> None:
    with pytest.raises(TrainingError, match="the stride is 64 tokens; expected 1 to 63"):
        Encoder(encoder.tokenizer, 64, 64)


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_every_example_once_and_few_are_half_empty(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 80) for _ in range(300)]
    packs = pack(lengths, 64)
    assert sorted(itertools.chain(*packs)) == list(range(300))
    sizes = [sum(lengths[number] for number in each) for each in packs]
    assert all(size <= 64 or len(each) == 1 for size, each in zip(sizes, packs, strict=True))
    assert sum(size <= 32 for size in sizes) <= 1
    assert pack(lengths, 64) == packs


FAMILIES = ("minimax_m2", "qwen3", "qwen3_moe", "qwen2", "minimind")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_sequence_has_the_losses_and_gradients_of_its_documents(family: str) -> None:
    config = ModelConfig.from_dict(tiny_config(family))
    model = Decoder(config, initial_state(config, 0, 0.05)).requires_grad_()
    rng = random.Random(0)
    documents = []
    for length in (5, 1, 17, 9, 12):
        ids = [rng.randrange(config.vocab_size) for _ in range(length)]
        documents.append(Example(ids, [rng.random() < 0.7 for _ in ids]))
    packed = pad([joined(documents[:2]), joined(documents[2:])])
    apart = pad(documents)
    assert packed.documents == apart.documents == 5
    assert int(packed.learned_BT.sum()) == int(apart.learned_BT.sum()) > 20
    assert apart.documents_BT is None
    found = {}
    for name, batch in (("packed", packed), ("apart", apart)):
        model.zero_grad()
        part = losses(model, batch)
        (part.tokens + 0.1 * part.balance).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        sums = (part.tokens.item(), part.balance.item())
        found[name] = (*sums, part.loads_LE, gradients)
    assert found["packed"][0] == pytest.approx(found["apart"][0], rel=1e-5)
    assert found["packed"][1] == pytest.approx(found["apart"][1], rel=1e-5)
    assert torch.equal(found["packed"][2], found["apart"][2])
    for name, wanted in found["apart"][3].items():
        assert float((found["packed"][3][name] - wanted).norm()) <= 1e-5 * float(wanted.norm()), (
            name
        )


def sequences(path: Path, encoder: Encoder, seed: int = 0, **options: Any) -> Sequences:
    return encode_rows(JsonLines.read(path), encoder, DataOptions(**options), seed)


def test_packing_keeps_every_document_whole(write, encoder: Encoder) -> None:
    path = write([{"text": f"{CHINESE[: number % 9 + 1]} {number}"} for number in range(40)])
    apart = sequences(path, encoder)
    packed = sequences(path, encoder, pack=True)
    assert len(packed) < len(apart) / 2
    assert packed.counts.learned == apart.counts.learned
    assert "packed" in packed.name
    documents = [example.ids[start:end] for example in packed for start, end in example.spans()]
    assert sorted(documents) == sorted(example.ids for example in apart)


def test_an_epoch_has_every_sequence_once_in_an_order_of_its_own(write, encoder: Encoder) -> None:
    path = write([{"text": f"row {number}"} for number in range(20)])
    source = sequences(path, encoder, seed=3)
    epochs = [[source.example(epoch * 20 + n).ids for n in range(20)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(example.ids for example in source)
    assert epochs[0] != epochs[1]
    assert source.example(3).ids == epochs[0][3]
    assert [sequences(path, encoder, seed=4).example(n).ids for n in range(20)] != epochs[0]
    assert source.steps(batch_size=16, epochs=2) == 3
    steps = [source.indices(step, 16) for step in range(3)]
    assert [list(step) for step in steps] == [
        list(range(16)), list(range(16, 32)), list(range(32, 40))
    ]  # fmt: skip


def test_a_lengthened_run_of_epochs_sees_every_sequence_once_an_epoch(
    write, encoder: Encoder
) -> None:
    path = write([{"text": f"row {number}"} for number in range(20)])
    source = sequences(path, encoder)
    taken: list[int] = []
    done = 0
    for epochs, steps in ((1, 2), (3, 4), (5, 7)):  # each ends with a step of fewer sequences
        assert source.steps(batch_size=16, epochs=epochs) == steps
        taken += [index for step in range(done, steps) for index in source.indices(step, 16)]
        assert taken == list(range(20 * epochs))
        done = steps
        source.go_on(done, epochs, 16)


def test_the_last_step_of_an_epoch_has_the_gradient_of_its_own_rows(
    write, encoder: Encoder, tmp_path: Path
) -> None:
    path = write([{"text": f"row {number} of seven"} for number in range(7)])
    source = sequences(path, encoder)
    config = ModelConfig.from_dict(tiny_config(**SMALL))
    options = TrainingOptions(
        steps=source.steps(4, 1), batch_size=4, max_tokens=64, clip_norm=1e9, warmup_steps=0
    )
    trainer = Trainer(
        config=config, options=options, source=source, encoder=encoder, directory=tmp_path / "run"
    )
    reports = trainer.run()
    next(reports)
    model = Decoder(config, {n: t.clone() for n, t in trainer.model.state_dict().items()})
    with torch.no_grad():
        part = losses(model, pad([source.example(index) for index in (4, 5, 6)]))
    last = next(reports)
    learned = sum(source.example(index).learned_count for index in (4, 5, 6))
    assert last.step == options.steps == 2
    assert last.loss == pytest.approx(float(part.tokens) / learned, rel=1e-5)


def test_a_run_of_epochs_is_resumed_to_the_bit_and_sees_every_row(write, train, tmp_path) -> None:
    path = write([{"text": f"row {number} {CHINESE[:number]}"} for number in range(9)])
    options = ("--epochs", "3", "--pack", "--held-out", "0.2", "--precision", "float32")
    assert train(path, *options, out="whole") == 0
    assert train(path, *options, "--until", "2", out="parts") == 0
    assert train(path, *options, out="parts") == 0
    summaries = [
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "parts")
    ]
    assert summaries[0]["losses"] == summaries[1]["losses"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert train(path, "--epochs", "3", "--held-out", "0.2", out="whole") == 1


def test_steps_and_epochs_together_are_a_mistake(write, train, capsys) -> None:
    assert train(write([{"text": "one"}]), "--steps", "1", "--epochs", "1") == 2
    assert "either --steps or --epochs" in capsys.readouterr().err


ASKED = {"role": "user", "content": "one two"}
UNASKED = [{"role": "assistant", "content": "three"}]
LONG = [{"role": "user", "content": "one two " * 50}, {"role": "assistant", "content": "x"}]
NOTHING = {
    "its text is empty": {"text": ""},
    "it has no message of an assistant": {"messages": [ASKED]},
    "its replies answer no message": {"messages": UNASKED},
    "fills the 64 of a sequence": {"conversations": LONG},
}


@pytest.mark.parametrize("cause", NOTHING)
def test_a_row_with_nothing_to_learn_is_refused_by_its_line_or_left_out(
    write, train, tmp_path, capsys, cause: str
) -> None:
    good = [{"text": f"row {number}"} for number in range(3)]
    path = write([good[0], NOTHING[cause], *good[1:], NOTHING[cause]])
    assert train(path, "--steps", "1") == 1
    said = capsys.readouterr().err
    assert "rows.jsonl line 2 has nothing to learn: " in said
    assert cause in said
    assert "(and 1 row more: lines 2, 5)" in said
    assert "--skip-rows" in said
    assert not (tmp_path / "out").exists()
    assert train(path, "--epochs", "1", "--skip-rows") == 0
    said = capsys.readouterr().err
    assert "2 rows with nothing to learn left out (lines 2, 5)" in said
    summary = json.loads((tmp_path / "out/training.json").read_text())
    assert summary["steps"] == 2
    assert all(loss > 1 for loss in summary["losses"])


@pytest.mark.parametrize("cause", NOTHING)
def test_a_file_with_nothing_to_learn_is_refused(write, train, tmp_path, capsys, cause) -> None:
    path = write([NOTHING[cause]] * 3)
    assert train(path, "--steps", "1", "--skip-rows") == 1
    said = capsys.readouterr().err
    assert "rows.jsonl has nothing to learn in 3 rows: " in said
    assert cause in said
    assert not (tmp_path / "out").exists()


def test_a_run_on_the_demo_that_would_learn_nothing_takes_no_step(tmp_path, capsys) -> None:
    arguments = ["--steps", "1", "--batch-size", "1", "--max-tokens", "2"]
    assert main(["train", str(tmp_path / "out"), *arguments]) == 1
    assert "no token of step 1 would be learned" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_first_step_of_many_rows_without_anything_to_learn_is_refused(
    encoder: Encoder,
) -> None:
    class Empty:
        """Rows that are empty up to one of them."""

        name = "empty"
        first = 600

        def row(self, index: int) -> dict[str, Any]:
            return {"text": "" if index < self.first else "one"}

    made = MadeSequences(Empty(), encoder)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="no token of step 1 would be learned"):
        made.count(steps=2, batch_size=600)
    made.count(steps=2, batch_size=601)
    assert made.counts.sequences == 601


def test_a_warm_up_longer_than_the_run_is_said_before_the_first_step(write, train, capsys) -> None:
    path = write([{"text": "one two three"}])
    assert train(path, "--steps", "2") == 0
    lines = capsys.readouterr().err.splitlines()
    [said] = [number for number, line in enumerate(lines) if "warm-up" in line]
    assert "reaches 3e-05, not 0.0015; to reach it: --warmup-steps 0" in lines[said]
    [step] = [number for number, line in enumerate(lines) if "step 2/2" in line]
    assert said < step
    assert "learning rate 3.00e-05" in lines[step]
    assert train(path, "--steps", "2", "--warmup-steps", "2", out="short") == 0
    printed = capsys.readouterr().err
    assert "warm-up" not in printed
    assert "learning rate 1.50e-03" in printed


def test_what_became_of_the_rows_is_said_in_one_line(write, train, encoder, capsys) -> None:
    rows: Rows = [
        {"text": "one two three", "id": 1},
        {"text": CHINESE * 3},
        {"messages": [*UNASKED, ASKED, {"role": "assistant", "content": "four " * 40}]},
    ]
    path = write(rows)
    counts = sequences(path, encoder).counts
    ids = [encoder.tokenizer.encode(row["text"], add_special_tokens=False) for row in rows[:2]]
    texts = sum(map(len, ids))
    found = encoder.encode(JsonLines.read(path).rows[2])
    assert counts.learned == texts + found.examples[0].learned_count
    assert train(path, "--steps", "1") == 0
    [line] = [
        text for text in capsys.readouterr().err.splitlines() if "rows.jsonl, 3 rows:" in text
    ]
    windows_made = counts.windows
    assert windows_made > 2
    assert line == (
        f"rows.jsonl, 3 rows: 3 rows (2 texts, 1 chat), {windows_made + 2} sequences of "
        f"{counts.tokens:,} tokens, {counts.learned:,} of them learned; "
        f"1 text split into {windows_made} windows; "
        f"1 chat cut, {found.lost} tokens of replies not learned; "
        "1 reply to no message not learned; fields that nothing reads: id (1)"
    )


def test_micro_batches_of_packs_learn_what_their_documents_do(write, encoder: Encoder) -> None:
    path = write([{"text": f"{CHINESE[: number % 9 + 1]} {number}"} for number in range(40)])
    packed = sequences(path, encoder, pack=True)
    batches = list(micro_batches(list(packed), 128))
    assert sum(batch.documents for batch in batches) == 40
    assert sum(int(batch.learned_BT.sum()) for batch in batches) == packed.counts.learned
    for batch in batches:
        starts_BT = batch.positions_BT == 0
        assert int(starts_BT.sum()) == batch.documents
        assert not bool((batch.learned_BT & starts_BT).any())


def test_other_options_of_the_data_make_another_run(write, encoder: Encoder) -> None:
    path = write([{"text": CHINESE * 3}])
    plain = sequences(path, encoder)
    strided = sequences(path, Encoder(encoder.tokenizer, 64, 40), stride=40)
    assert len({plain.name, strided.name, sequences(path, encoder, pack=True).name}) == 3
    with pytest.raises(TrainingError, match="epochs is 0"):
        replace(DataOptions(), epochs=0)


def test_a_made_row_of_several_sequences_gives_one_of_them_by_its_number(
    encoder: Encoder,
) -> None:
    class Twice:
        """Rows of two windows each."""

        name = "twice"

        def row(self, index: int) -> dict[str, Any]:
            return {"text": CHINESE[:17] * 2}

    found = encoder.encode(Twice().row(0)).examples
    assert len(found) == 2
    made = MadeSequences(Twice(), encoder)  # type: ignore[arg-type]
    assert [made.example(index) for index in range(4)] == [*found, *found]


def test_a_family_is_trained_on_the_project_s_corpus_with_a_tokenizer_made_from_it(
    tmp_path: Path, capsys
) -> None:
    arguments = ["train", str(tmp_path / "out"), "--family", "minimind", "--size", "tiny"]
    sizes = ["--batch-size", "2", "--max-tokens", "64", "--held-out", "0.1", "--threads", "1"]
    assert main([*arguments, *sizes, "--steps", "2"]) == 0
    said = capsys.readouterr().err
    assert "corpus, the first 4 rows: 4 rows" in said
    assert "corpus, held out: 200 rows (0 texts, 200 chats)" in said
    made = (tmp_path / "out/tokenizer/tokenizer.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == made
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (2048, 2)
    assert main([*arguments, *sizes, "--steps", "2"]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert main([*arguments, *sizes, "--data", "rows.jsonl"]) == 2
    assert "neuron-minimax tokenizer DIR --family minimind --data" in capsys.readouterr().err
    assert main([*arguments, *sizes, "--epochs", "1"]) == 2
    assert "rows are made as they are needed, without an end" in capsys.readouterr().err
