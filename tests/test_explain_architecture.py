"""The architecture tree and diagram: sums, the published numbers, and both sides alike."""

import json
from math import prod
from xml.etree import ElementTree

import pytest
from safetensors import safe_open

from neuron_minimax.studies.explain.architecture import (
    converted_tree,
    published_tree,
    sources_of,
)
from neuron_minimax.studies.explain.diagram import render_diagram
from tests.full_size import published_config
from tests.tiny import write_tiny


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


def test_the_diagram_shows_every_weight_inside_its_frame(published):
    for tree in published:
        root = ElementTree.fromstring(render_diagram(tree))
        space = "{http://www.w3.org/2000/svg}"
        _, _, width, height = (float(value) for value in root.get("viewBox").split())
        texts = [element.text for element in root.iter(f"{space}text")]
        for leaf in tree.leaves():
            assert any(text == leaf.name or text.endswith(f".{leaf.name}") for text in texts), (
                leaf.name
            )
        for box in root.iter(f"{space}rect"):
            x, y, w, h = (float(box.get(key) or 0) for key in ("x", "y", "width", "height"))
            assert min(x, y) >= 0
            assert x + w <= width
            assert y + h <= height
        assert (
            len([path for path in root.iter(f"{space}path") if path.get("class") == "residual"])
            == 2
        )
