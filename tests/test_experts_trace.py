"""Traces against transformers' routers; saving, memory, interruption; token classes; similarity;
placement.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.layout import FP8Range, Layout
from neuron_minimax.errors import CheckpointError, ConversionError, GenerationError
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.planner.placement import Placement, as_numbered, place
from neuron_minimax.studies.experts import similarity
from neuron_minimax.studies.experts.statistics import classify
from neuron_minimax.studies.experts.trace import FORMAT, Recorder, Trace, record
from tests.opened import convert
from tests.test_fp32_cache import slow_weight
from tests.tiny import write_tiny

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    made = {"source": write_tiny(root / "source"), "dense": write_tiny(root / "dense", dense=True)}
    convert(made["source"], root / "converted", Layout(fp8_range=FP8Range.OCP))
    return made | {"converted": root / "converted"}


@pytest.fixture(scope="module")
def model(directories) -> Decoder:
    return Decoder.from_converted(directories["converted"])


def run(model: Decoder, **options) -> tuple[Trace, list[int]]:
    recorder = Recorder.of(model)
    answer = [token for token, _ in record(model, PROMPT, recorder, **options)]
    return recorder.trace(), answer


def test_a_trace_equals_the_routing_of_transformers(directories, model):
    from transformers import AutoModelForCausalLM

    trace, answer = run(model, max_new_tokens=5, chunk=3)
    assert trace.tokens.tolist() == PROMPT + answer[:-1]
    assert trace.is_decode.tolist() == [False] * 8 + [True] * 4
    oracle = AutoModelForCausalLM.from_pretrained(directories["dense"], dtype=torch.float32)
    inputs = {}
    for number, layer in enumerate(oracle.model.layers):
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, args, output, number=number: inputs.__setitem__(number, output[0])
        )
    with torch.inference_mode():
        oracle(torch.tensor([trace.tokens.tolist()]))
    checkpoint = Checkpoint(directories["dense"])
    for layer, hidden_TH in inputs.items():
        prefix = f"model.layers.{layer}.block_sparse_moe."
        scores = (hidden_TH @ checkpoint.tensor(prefix + "gate.weight").T).sigmoid()
        chosen = (scores + checkpoint.tensor(prefix + "e_score_correction_bias")).topk(2).indices
        weights = scores.gather(1, chosen)
        assert np.array_equal(np.sort(trace.expert_index[layer]), np.sort(chosen.numpy()))
        found, wanted = (
            np.sort(rows)
            for rows in (trace.affinity[layer], weights / weights.sum(1, keepdim=True))
        )
        assert np.allclose(found, wanted, atol=1e-5)
        assert np.allclose(trace.scores[layer], scores, atol=1e-3)


def test_a_saved_trace_reads_back_as_it_was(model, tmp_path):
    recorder = Recorder.of(model)
    list(record(model, PROMPT, recorder, max_new_tokens=3))
    trace = recorder.trace(
        texts=tuple("abcdefghij"), answer="so", finish_reason="length", name="one"
    )
    trace.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    for name, value in vars(trace).items():
        assert np.array_equal(getattr(loaded, name), value), name
    (tmp_path / "broken").write_bytes(b"no trace")
    for path in (tmp_path / "broken", tmp_path / "absent"):
        with pytest.raises(GenerationError, match="is no routing trace"):
            Trace.load(path)


def test_a_file_of_dtypes_that_numpy_lacks_is_no_trace(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = {"tokens": torch.zeros(2, dtype=torch.bfloat16)}
    for format_, said in (("pt", "expected the format"), (FORMAT, "tokens is BF16; expected one")):
        save_file(weights, path, {"format": format_})
        with pytest.raises(GenerationError, match=f"is no routing trace .{said}"):
            Trace.load(path)


def test_512_tokens_of_the_real_shape_take_little_memory(tmp_path):
    layers = 62
    tokens = 512
    experts = 256
    top_k = 8
    recorder = Recorder(bias=np.zeros((layers, experts), dtype=np.float32))
    from neuron_minimax.model.moe import Routing

    scores = torch.rand(tokens, experts)
    affinity, index = scores.topk(top_k)
    recorder.add([1] * tokens, False, [Routing(scores, index, affinity)] * layers)
    recorder.trace().save(tmp_path / "trace.safetensors")
    assert (tmp_path / "trace.safetensors").stat().st_size < 20e6


def test_an_interrupted_recording_keeps_what_was_done(model):
    recorder = Recorder.of(model)
    for number, _ in enumerate(record(model, PROMPT, recorder, max_new_tokens=50)):
        if number == 3:
            break
    assert recorder.trace().tokens.shape == (len(PROMPT) + 3,)


def test_a_prompt_that_does_not_fit_is_refused(model):
    with pytest.raises(GenerationError, match="exceed the model's 512 positions"):
        run(model, max_new_tokens=600)
    with pytest.raises(GenerationError, match="no tokens"):
        list(record(model, [], Recorder.of(model)))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<think>", "tag"),
        ("</minimax:tool_call>", "tag"),
        ("]~b]", "tag"),
        ("[e~[", "tag"),
        (" 1984", "digits"),
        ("3.14", "digits"),
        ("def foo(", "code"),
        ("camelCase", "code"),
        ("{", "code"),
        (" Straße", "latin"),
        ("東京", "cjk"),
        ("ひら", "cjk"),
        ("привет", "other script"),
        (",", "punctuation"),
        ("\n\n", "space"),
        ("\ufffd", "other"),
        ("", "other"),
    ],
)
def test_tokens_are_classed_by_their_characters(text, kind):
    assert classify(text) == kind


PAIRS = torch.triu_indices(16, 16, 1)


def expert_vectors(checkpoint, layer):
    """All weights of each of a layer's experts, [E,D]."""
    vectors = []
    for expert in range(8):
        parts = [
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{kind}.weight"
            for kind in ("w1", "w2", "w3")
        ]
        vectors.append(
            torch.cat([slow_weight(checkpoint, part).double().flatten() for part in parts])
        )
    return torch.stack(vectors)


@pytest.mark.parametrize("name", ["source", "dense"])
def test_expert_similarity_equals_the_cosine_of_whole_weights(directories, name):
    checkpoint = Checkpoint(directories[name])
    vectors = expert_vectors(checkpoint, 1)
    wanted = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    for jobs in (1, 3):
        assert np.allclose(similarity.expert_similarity(checkpoint, 1, jobs), wanted, atol=1e-6)
    with pytest.raises(CheckpointError, match="has no layer 2; expected 0 to 1"):
        similarity.expert_similarity(checkpoint, 2)


def test_experts_of_two_layers_are_compared_exactly_where_sketches_hold_all_weights(directories):
    checkpoint = Checkpoint(directories["source"])
    vectors = [expert_vectors(checkpoint, layer) for layer in range(2)]
    cosine = torch.nn.functional.cosine_similarity(vectors[0][:, None], vectors[1][None], dim=-1)
    wanted = (cosine.amax(0).mean() + cosine.amax(1).mean()) / 2
    exact = similarity.expert_layer_similarity(checkpoint, 3)
    assert exact.error == 0
    assert exact.matrix[0, 1] == exact.matrix[1, 0] == pytest.approx(float(wanted), abs=1e-6)
    sketched = similarity.expert_layer_similarity(checkpoint, sketch_bytes=4 * 16 * 10_000)
    assert sketched.error == 0.01
    assert sketched.matrix[0, 1] == pytest.approx(float(wanted), abs=0.03)


@pytest.mark.parametrize("numbers", [512, 1000, 10_000])
def test_a_sketch_has_the_error_that_it_says(directories, numbers):
    checkpoint = Checkpoint(directories["source"])
    both = [similarity.expert_sketch(checkpoint, layer, numbers, 2) for layer in range(2)]
    sketches = torch.from_numpy(np.concatenate(both))
    vectors = torch.cat([expert_vectors(checkpoint, layer) for layer in range(2)])
    cosines = [
        torch.nn.functional.cosine_similarity(*(rows[at] for at in PAIRS), dim=-1)
        for rows in (sketches, vectors)
    ]
    deviation = float((cosines[0] - cosines[1]).square().mean().sqrt())
    assert deviation == pytest.approx(numbers**-0.5, rel=0.35)  # of 120 pairs: 5 standard errors


def test_router_similarity_equals_torch_and_a_zero_row_is_like_nothing():
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert np.allclose(similarity.router_similarity(rows.numpy()), wanted, atol=1e-6)
    rows[2] = 0
    assert not similarity.router_similarity(rows.numpy())[2].any()


def test_a_placed_model_computes_the_same(directories, model, tmp_path):
    trace, _ = run(model, max_new_tokens=8)
    counts = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in trace.expert_index])
    placement = place(counts, 4)
    placement.save(tmp_path / "placement.json")
    loaded = Placement.load(tmp_path / "placement.json")
    assert np.array_equal(loaded.order, placement.order)
    assert loaded.ranks == 4
    placed = Decoder(model.config, loaded.apply(model.state_dict(), model.config.family))
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.allclose(placed(tokens)[0], model(tokens)[0], atol=1e-5)
        _, _, routings = placed(tokens, return_routing=True)
    for layer, routing in enumerate(routings):
        original = placement.order[layer][routing.expert_index_TK.numpy()]
        assert np.array_equal(np.sort(original), np.sort(trace.expert_index[layer, : len(PROMPT)]))


def test_a_placement_evens_out_skewed_loads_on_a_trace_it_has_not_seen():
    generator = np.random.default_rng(0)
    popularity = generator.dirichlet(np.full(256, 0.7), size=4)
    seen, held_out = (
        np.stack([generator.multinomial(20_000, row) for row in popularity]) for _ in range(2)
    )
    before = as_numbered(4, 256, 64)
    after = place(seen, 64)
    for layer in range(4):  # the load of a rank is the sum over its experts
        rank = after.order[layer, 4 * 7 : 4 * 8]
        assert after.rank_load(held_out)[layer, 7] == held_out[layer, rank].sum()
    for counts, slack in ((seen, 1.05), (held_out, 1.15)):
        floor = np.maximum(
            counts.max(axis=1) / counts.sum(axis=1) * 64, 1
        )  # one expert is on one rank
        assert (after.max_to_mean(counts) <= slack * floor).all()
    assert (after.max_to_mean(held_out) < 0.85 * before.max_to_mean(held_out)).all()


def test_experts_that_the_ranks_do_not_divide_are_placed_as_evenly():
    load = np.array([[9, 1, 1, 8, 1, 1, 7]])
    placement = place(load, 3)
    assert sorted(placement.rank_load(load)[0]) == [9, 9, 10]
    first, second, third = np.split(placement.order[0], [3, 5])
    assert len(first) == 3
    assert [load[0, rank].sum() for rank in (first, second, third)] == list(
        placement.rank_load(load)[0]
    )
    assert placement.max_to_mean(load)[0] == pytest.approx(10 / (28 / 3))


def test_a_placement_that_cannot_be_is_refused(tmp_path, model):
    with pytest.raises(ConversionError, match="8 experts cannot be split over 9 ranks; expected 1"):
        place(np.ones((2, 8)), 9)
    with pytest.raises(ConversionError, match="exactly once"):
        Placement(order=np.zeros((2, 8), dtype=int), ranks=4)
    with pytest.raises(ConversionError, match="with 16 experts, as placed"):
        as_numbered(2, 16, 4).apply(model.state_dict(), model.config.family)
    with pytest.raises(ConversionError, match=r"has 1 layer, but the state dict has layers\.1"):
        as_numbered(1, 8, 4).apply(model.state_dict(), model.config.family)
    with pytest.raises(
        ConversionError, match="is for 4 expert-parallel ranks, but moe_ep_degree is 2"
    ):
        as_numbered(2, 8, 4).for_ranks(2)
    (tmp_path / "bad.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(ConversionError, match=r"bad\.json cannot be used \(moe_ep_degree"):
        Placement.load(tmp_path / "bad.json")
