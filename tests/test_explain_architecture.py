"""The architecture tree and diagram: sums, the published numbers, and both sides alike."""

import json
from math import prod
from xml.etree import ElementTree

import pytest
from safetensors import safe_open

from neuron_minimax.families import FAMILIES
from neuron_minimax.studies.explain.architecture import (
    converted_tree,
    published_tree,
    sources_of,
)
from neuron_minimax.studies.explain.diagram import render_diagram
from tests.full_size import published_config
from tests.published import published as published_of
from tests.tiny import tiny_config, write_tiny


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Both trees of the published model, from its config.json alone."""
    directory = tmp_path_factory.mktemp("published")
    (directory / "config.json").write_text(json.dumps(published_config()))
    config, sources = sources_of(directory)
    return published_tree(config, sources), converted_tree(config, sources)


def nodes(tree):
    yield tree
    for child in tree.children:
        yield from nodes(child)


def test_the_published_model_has_its_published_numbers(published):
    for tree in published:
        assert tree.parameters == 228_689_764_864
        attention = 2 * 6144 * 3072 + 2 * 1024 * 3072
        experts = 8 * 3 * 1536 * 3072
        norms = 2 * 3072 + 6144 + 1024
        router = 256 * 3072 + 256
        head = 200064 * 3072 + 3072
        assert tree.active == pytest.approx(
            62 * (attention + experts + norms + router) + head + 3072, rel=1e-12
        )


def test_every_group_is_the_sum_of_its_parts(published):
    for tree in published:
        groups = [node for node in nodes(tree) if node.children]
        assert len(groups) > 5
        for node in groups:
            assert node.parameters == sum(child.parameters for child in node.children)
            assert node.bytes == sum(child.bytes for child in node.children)
            assert node.active == pytest.approx(sum(child.active for child in node.children))


@pytest.mark.parametrize("dense", [False, True])
def test_the_bytes_of_the_tree_are_those_in_the_files(tmp_path, dense):
    directory = write_tiny(tmp_path / "c", dense=dense)
    config, sources = sources_of(directory)
    tree = published_tree(config, sources)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tree.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert tree.parameters == sum(
        prod(t.shape) for name, t in tensors.items() if not name.endswith("_scale_inv")
    )
    assert converted_tree(config, sources).bytes == tree.bytes


def test_the_text_shows_every_module_with_shape_and_dtype(published):
    text = published[0].render()
    assert "layers x 62" in text
    assert "experts x 256, 8 per token" in text
    line = next(line for line in text.splitlines() if "q_proj" in line)
    assert all(part in line for part in ("6144 x 3072", "48 x 24", "F8_E4M3", "1.17 B", "1.17 GB"))
    assert "256 x 24 x 24" in next(
        line for line in published[1].render().splitlines() if "gate_up_proj" in line
    )


def frames(tree):
    """The texts of a tree's diagram and its residual paths, every box checked to lie inside."""
    root = ElementTree.fromstring(render_diagram(tree))
    space = "{http://www.w3.org/2000/svg}"
    _, _, width, height = (float(value) for value in root.get("viewBox").split())
    for box in root.iter(f"{space}rect"):
        x, y, w, h = (float(box.get(key) or 0) for key in ("x", "y", "width", "height"))
        assert min(x, y) >= 0
        assert x + w <= width
        assert y + h <= height
    residuals = [path for path in root.iter(f"{space}path") if path.get("class") == "residual"]
    return [element.text for element in root.iter(f"{space}text")], residuals


def test_the_diagram_shows_every_weight_inside_its_frame(published):
    for tree in published:
        texts, residuals = frames(tree)
        for leaf in tree.leaves():
            assert any(text == leaf.name or text.endswith(f".{leaf.name}") for text in texts), (
                leaf.name
            )
        assert len(residuals) == 2


def config_alone(directory, raw):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return sources_of(directory)


MIXED = {"num_hidden_layers": 3, "mlp_only_layers": [0]}
FAMILY_CASES = [
    *((name, {}) for name in FAMILIES),
    ("qwen3_moe", MIXED),
    ("qwen2", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILY_CASES)
def test_every_family_is_drawn_from_its_files_and_from_its_config_alone(tmp_path, family, changes):
    directory = write_tiny(tmp_path / "files", family=family, **changes)
    config, sources = sources_of(directory)
    raw = tiny_config(family, **changes)
    assert config_alone(tmp_path / "alone", raw) == (config, sources)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        shapes = {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118
    weights = {n: prod(shape) for n, shape in shapes.items() if not n.endswith("_scale_inv")}
    for tree in (published_tree(config, sources), converted_tree(config, sources)):
        assert tree.parameters == sum(weights.values()) == sum(x.parameters for x in tree.leaves())
        texts, residuals = frames(tree)
        assert len(residuals) == 2
        for leaf in tree.leaves():
            assert any(text == leaf.name or text.endswith(f".{leaf.name}") for text in texts), (
                leaf.name
            )
        inside = sum(n for name, n in weights.items() if "embed_tokens" not in name)
        chosen = config.num_experts_per_tok
        idle = sum(
            weights[name] * (config.num_local_experts - chosen) / config.num_local_experts
            for name in weights
            if ".experts." in name
        )
        width = config.hidden_size
        used = config.vocab_size * width if config.tie_word_embeddings else width
        assert tree.active == pytest.approx(inside - idle + used)


def test_layers_of_several_kinds_a_shared_expert_and_a_tied_head_are_said(tmp_path):
    trees = {
        name: published_tree(*config_alone(tmp_path / name, tiny_config(name, **changes)))
        for name, changes in (("qwen3_moe", MIXED), ("minimind2_moe", {}), ("qwen2", {}))
    }
    mixed = trees["qwen3_moe"].render()
    assert "experts x 6, 2 per token, in 2 of 3 layers" in mixed
    assert mixed.count("gate_proj, in 1 of 3 layers") == 1
    assert "gate, in 2 of 3 layers" in mixed
    assert "in 1 of 3 layers" in " ".join(frames(trees["qwen3_moe"])[0])
    converted = converted_tree(*config_alone(tmp_path / "mixed", tiny_config("qwen3_moe", **MIXED)))
    said = [text for text in frames(converted)[0] if text.endswith("in 2 of 3 layers")]
    assert len(said) == 2  # the router and the experts, each one box
    shared = trees["minimind2_moe"].render()
    assert "embed_tokens, also the head" in shared
    assert "shared_experts" in shared
    assert " of 2 layers" not in shared
    biased = trees["qwen2"].render()
    assert biased.count("bias") == 3
    assert "also the head" not in biased


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-30B-A3B", 3.3),
        ("Qwen3-235B-A22B-FP8", 22),
        ("Qwen3-Coder-480B-A35B", 35),
        ("MiniMind-3-MoE", 0.064),
    ],
)
def test_active_parameters_are_as_many_as_the_card_says(tmp_path, name, billions):
    """Cards count the whole embedding where it is no head, and round."""
    config, sources = config_alone(tmp_path / name, published_of(name))
    tree = published_tree(config, sources)
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert tree.active + embedding == pytest.approx(billions * 1e9, rel=0.02)
