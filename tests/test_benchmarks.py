"""The benchmarks' table and guard, on rows made here; nothing is timed."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_model, rank_layer, training
from benchmarks.conversion import watched
from benchmarks.curves import Curve, Point, fitted
from benchmarks.quick import falls
from benchmarks.speculation import drafts_right
from benchmarks.suite import collect
from benchmarks.synthetic import real_layers
from benchmarks.table import Goal, Row, from_json, render, render_markdown, row, summary, to_json
from neuron_minimax.config import ModelConfig


def rated(what: str, ours: float, peer: float = 10.0) -> Row:
    return row(what, [ours], "GB/s", peer=("cp", [peer]))


def test_a_ratio_says_how_many_times_as_good_ours_is_whichever_way_the_unit_goes():
    assert row("rate", [20.0], "GB/s", peer=("cp", [10.0])).ratio == 2
    assert row("time", [20.0], "s", less_is_better=True, peer=("cp", [10.0])).ratio == 0.5
    assert row("rate", [20.0], "GB/s", limit=("memory", [80.0])).share == 0.25


def test_a_ratio_is_the_median_of_the_pairs_of_a_run():
    found = row("rate", [1.0, 4.0, 9.0], "GB/s", peer=("cp", [1.0, 1.0, 9.0]))
    assert found.peer is not None
    assert (found.ours, found.peer.value, found.ratio) == (4.0, 1.0, 1.0)
    assert (found.peer.lowest, found.peer.highest) == (1.0, 4.0)
    with pytest.raises(ValueError, match="shorter"):
        row("rate", [1.0, 2.0, 3.0], "GB/s", peer=("cp", [1.0, 2.0]))


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal(figure="ratio", value=2.0), True),
        (Goal(figure="ratio", value=2.1), False),
        (Goal(figure="ours", value=19.0, at_most=True), False),
        (Goal(figure="ours", value=20.0, at_most=True), True),
        (Goal(figure="share", value=0.1), False),  # this row has no limit, so no share
    ],
)
def test_a_goal_is_reached_or_the_table_says_that_it_is_not(goal, reached):
    found = row("rate", [20.0], "GB/s", peer=("cp", [10.0]), goal=goal)
    assert found.reached is reached
    assert ("NOT REACHED" in render([found])) is not reached


def test_the_guard_names_what_lost_more_than_a_third_and_what_is_gone():
    kept = [
        rated("kept", 10),
        rated("lower", 10),
        rated("lost", 10),
        rated("gone", 10),
        row("memory", [1.0], "MB"),
    ]
    found = [rated("kept", 6.7), rated("lower", 30, peer=44), rated("lost", 6.6), rated("new", 1)]
    fallen = falls(kept, found)
    assert [each.what for each in fallen] == ["lost", "gone"]
    assert (fallen[0].kept, fallen[0].found) == (1.0, pytest.approx(0.66))
    assert fallen[1].found is None
    assert fallen[0].render().startswith("lost: ratio 1.000 was kept, 0.660 found (34% lost")
    assert falls(kept, kept) == []


def test_rows_come_back_from_json_as_they_were():
    rows = [
        row(
            "all",
            [1.0, 2.0],
            "s",
            less_is_better=True,
            peer=("cp", [3.0, 4.0]),
            limit=("memory", [0.5]),
        ),
        row("goal", [1.0], "MB", goal=Goal(figure="ours", value=2, at_most=True)),
        Row(what="broken", failure="RuntimeError: why"),
    ]
    assert from_json(to_json(rows)) == rows


def test_a_failing_part_is_a_row_that_says_so_and_the_others_rows_stay():
    def broken() -> list[Row]:
        raise RuntimeError("first line\nno compiler was found")

    said: list[str] = []
    rows, seconds = collect(
        [("good", lambda: [rated("a", 1)]), ("bad", broken), ("last", lambda: [rated("b", 1)])],
        said.append,
    )
    assert [each.what for each in rows] == ["a", "bad", "b"]
    assert rows[1].failure == "RuntimeError: no compiler was found"
    assert list(seconds) == ["good", "bad", "last"]
    for text in (render(rows), render_markdown(rows)):
        assert "FAILED: RuntimeError: no compiler was found" in text
    assert summary(rows) == "1 benchmark FAILED"


def test_a_peer_that_is_not_installed_is_a_row_that_says_what_to_do():
    (found,) = [Row(what="peer", skipped="it is not built: make it")]
    assert "skipped: it is not built: make it" in render_markdown([found])
    assert summary([found]) == "1 skipped"
    assert from_json(to_json([found])) == [found]


def test_a_curve_is_superlinear_when_its_largest_point_is_above_its_law():
    def curve(seconds: list[float]) -> Curve:
        points = tuple(
            Point(at=at, measured=value, expected=at)
            for at, value in zip((1, 2, 4, 8), seconds, strict=True)
        )
        return Curve(
            name="layers", axis="layers", unit="ms", law="proportional to the layers", points=points
        )

    linear = curve([1.0, 2.0, 4.0, 8.0])
    steep = curve([1.0, 2.0, 5.0, 16.0])
    assert not linear.superlinear
    assert linear.worst == pytest.approx(1.0)
    assert steep.superlinear
    assert steep.worst == pytest.approx(2.0)


def test_a_law_is_fitted_with_a_constant_and_a_factor_that_are_not_negative():
    exact = fitted("a", "x", "ms", "law", [1, 2, 4], [5.0, 7.0, 11.0], [1, 2, 4])
    assert [point.expected for point in exact.points] == pytest.approx([5, 7, 11])
    steeper = fitted("a", "x", "ms", "law", [1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0], [1, 2, 4, 8])
    assert steeper.superlinear
    falling = fitted("a", "x", "ms", "law", [1, 2, 4], [4.0, 2.0, 1.0], [1, 2, 4])
    assert [point.expected for point in falling.points] == [2.0, 2.0, 2.0]


def test_the_peak_memory_of_a_call_counts_its_child_processes():
    program = "data = bytearray(b'x' * 300_000_000); import time; time.sleep(0.3)"
    small = watched(subprocess.run, [sys.executable, "-c", "import time; time.sleep(0.3)"])[1]
    large = watched(subprocess.run, [sys.executable, "-c", program])[1]
    assert large - small > 250


@pytest.mark.parametrize("experts", [False, True])
def test_the_trainers_that_are_compared_take_the_same_steps(tmp_path, experts):
    from neuron_minimax.training.sizes import SIZES

    tiny = SIZES["qwen3_moe"]["tiny"] if experts else SIZES["qwen3"]["tiny"]
    checkpoint = training.write_model(tmp_path / "model", {**tiny, "num_hidden_layers": 2}, 1280)
    run = training.Run(checkpoint=checkpoint, steps=6, batch_size=4)
    ours = training.ours(run, tmp_path)
    theirs = training.transformers(run, tmp_path)
    assert len(ours.losses) == 5
    assert ours.losses[-1] < ours.losses[0] - 0.1
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-4)
    assert min(ours.rate, theirs.rate, ours.cpu_rate, theirs.cpu_rate) > 0


@pytest.mark.slow
def test_the_page_of_the_kernel_has_the_models_tables_and_what_they_say():
    page = (Path(__file__).parents[1] / "docs" / "fp8_kernel.md").read_text(encoding="utf-8")
    visits = kernel_model.visits_table()
    assert f"\n{visits}\n" in page
    assert f"\n{kernel_model.shares_table(kernel_model.SHARES, [1])}\n" in page
    lines = [line.strip("| ").split(" | ") for line in visits.splitlines()[2:]]
    by_memory = [int(cells[0]) for cells in lines if cells[7] == "DMA"]
    slower = [int(cells[0]) for cells in lines if float(cells[8]) <= 1]
    assert f"Up to {max(by_memory)} tokens the memory is the limit" in page
    assert f"from {min(slower)} tokens on weights kept in BF16 would be faster" in page


def test_a_draft_is_what_followed_the_last_three_tokens_and_is_right_up_to_the_first_other():
    prompt = list("abcdefgh")
    # Nothing ends as "fgh" does, "abc" was followed by "defg", of which "de" is right, and "Xab" by
    # nothing.
    assert drafts_right(prompt, list("abcdeXab"), 4) == [(0, 0)] * 3 + [(4, 2)] + [(0, 0)] * 2
    assert (
        drafts_right(prompt, list("abcdeXab"), 1)
        == [(0, 0)] * 3 + [(1, 1)] + [(1, 0)] + [(0, 0)] * 2
    )
    # An answer that repeats itself is looked up in itself: the nearest time counts.
    assert drafts_right([], list("abcabcabc"), 2)[-1] == (2, 2)


def test_a_layer_with_other_experts_is_another_one(tmp_path):
    small = {"hidden_size": 128, "num_attention_heads": 8, "num_experts_per_tok": 1}
    for experts in (2, 3):
        layer = rank_layer.layer_of(tmp_path, real_layers(1, experts, 64) | small)
        assert ModelConfig.from_dir(layer).num_local_experts == experts
