"""The example of the key/value cache: what it prints, but for the times."""

import re
import runpy
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.tiny import write_tiny

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "kv_cache.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def printed(capsys) -> dict[str, str]:
    """What stands before and after the colon of each line that has one."""
    lines = capsys.readouterr().out.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_example_of_the_cache_makes_a_qwen2_and_gives_the_same_tokens(example, capsys):
    assert example["main"](["--prompt-tokens", "6", "--steps", "5"]) == 0
    found = printed(capsys)
    assert "Qwen2, a prompt of 6 tokens, 5 steps" in found
    assert found["the same tokens"] == "5 of 5"
    size = 2 * 8 * 2 * 32 * (6 + 5 - 1) * 4
    assert found["the cache takes"] == f"{size:,} bytes"
    assert found["the formula"].startswith(
        f"{size:,} bytes = 2 (keys, values) x 8 layers x 2 heads"
    )
    for way in ("without a cache", "with a cache"):
        assert re.fullmatch(r"\d+\.\d\d s, \d+\.\d tokens/s", found[way])


def test_the_example_of_the_cache_takes_a_checkpoint_of_any_family(example, capsys, tmp_path):
    directory = write_tiny(tmp_path / "tiny", family="qwen3_moe")
    raw = AutoConfig.from_pretrained(directory)
    assert example["main"]([str(directory), "--prompt-tokens", "3", "--steps", "4"]) == 0
    found = printed(capsys)
    assert found["the same tokens"] == "4 of 4"
    size = 2 * raw.num_hidden_layers * raw.num_key_value_heads * raw.head_dim * 6 * 4
    assert found["the cache takes"] == f"{size:,} bytes"


def test_the_example_of_the_cache_says_what_is_wrong(example, capsys, tmp_path):
    assert example["main"]([str(tmp_path / "nothing")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "nothing does not exist" in said.err
    for arguments in (["--steps", "0"], ["--prompt-tokens", "-1"]):
        with pytest.raises(SystemExit) as ended:
            example["main"](arguments)
        assert ended.value.code == 2


def test_the_example_fails_where_a_token_differs(example, capsys, monkeypatch):
    slow = example["without_cache"]
    names = example["main"].__globals__
    monkeypatch.setitem(names, "without_cache", lambda *given: slow(*given).flip(1).add(1))
    assert example["main"](["--prompt-tokens", "6", "--steps", "5"]) == 1
    assert printed(capsys)["the same tokens"] != "5 of 5"
