"""Each limit that the interpreter enforces is broken once here, and each instruction is checked
against plain NumPy.
"""

import textwrap
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests import nki_interpreter
from tests.nki_interpreter import HardwareError
from tests.nki_interpreter.machine import E4M3_VALUES, round_to_bfloat16

HEADER = """
import nki
import nki.isa as nisa
import nki.language as nl

def filled(shape, dtype, value=1.0, buffer=nl.sbuf):
    tile = nl.ndarray(shape, dtype=dtype, buffer=buffer)
    nisa.memset(dst=tile, value=value)
    return tile

@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
"""


@pytest.fixture
def run(tmp_path):
    """Runs the body of a kernel with argument `x` and result `out`; returns the result and the
    machine.
    """

    def run_body(body, x=None):
        path = tmp_path / "kernel_under_test.py"
        path.write_text(
            HEADER + textwrap.indent(textwrap.dedent(body), "    ") + "    return out\n"
        )
        module, machine = nki_interpreter.load(path)
        return module.kernel(torch.ones(128, 128) if x is None else x), machine

    return run_body


LIMITS = {
    "128 partitions": ("filled((129, 4), nl.float32)\n", "128 partitions, not 129"),
    "SBUF of 24 MB": (
        "held = [filled((128, 16384), nl.float32) for _ in range(4)]\n",
        "196608 bytes per partition",
    ),
    "PSUM bank of 2 KB": (
        "filled((128, 513), nl.float32, buffer=nl.psum)\n",
        "2048 bytes per partition, not 2052",
    ),
    "8 PSUM banks": (
        "held = [filled((1, 1), nl.float32, buffer=nl.psum) for _ in range(9)]\n",
        "8 banks",
    ),
    "stationary of 128 columns": ("matmul((128, 129), (128, 4), (128, 4))\n", "stationary has 129"),
    "moving of 512 columns": ("matmul((128, 4), (128, 513), (4, 512))\n", "moving has 513"),
    "equal contraction": ("matmul((128, 4), (64, 4), (4, 4))\n", "different partition counts"),
    "result shape": ("matmul((128, 4), (128, 8), (8, 4))\n", "does not fit"),
    "float32 on both sides": (
        "matmul((128, 4), (128, 4), (4, 4), nl.bfloat16, nl.float32)\n",
        "both are",
    ),
    "matmul dtypes": (
        "matmul((128, 4), (128, 4), (4, 4), nl.int32, nl.bfloat16)\n",
        "does not take int32",
    ),
    "matmul reads SBUF": (
        "matmul((128, 4), (128, 4), (4, 4), where=nl.psum)\n",
        "reads SBUF, not psum",
    ),
    "matmul writes PSUM": (
        "matmul((128, 4), (128, 4), (4, 4), into=nl.sbuf)\n",
        "writes to PSUM, not sbuf",
    ),
    "DMA reaches no PSUM": (
        "nisa.dma_copy(dst=out, src=filled((128, 128), nl.float32, buffer=nl.psum))\n",
        "not PSUM",
    ),
    "DMA shapes": ("nisa.dma_copy(dst=out[0:64, :], src=x)\n", "between shapes"),
    "DMA moves bytes": (
        "nisa.dma_copy(dst=nl.ndarray((128, 128), dtype=nl.bfloat16), src=x)\n",
        "moves bytes",
    ),
    "engines reach no HBM": (
        "nisa.tensor_copy(dst=filled((128, 128), nl.float32), src=x)\n",
        "not hbm",
    ),
    "one operand from PSUM": (
        "a = filled((4, 4), nl.float32, buffer=nl.psum)\nnisa.tensor_tensor(dst=a, data1=a, "
        "data2=a, op=nl.add)\n",
        "at most one operand from PSUM",
    ),
    "use of unwritten memory": (
        "nisa.tensor_copy(dst=nl.ndarray((4, 4), dtype=nl.float32), src=nl.ndarray((4, 4), "
        "dtype=nl.float32))\n",
        "use of unwritten sbuf",
    ),
    "an unwritten result": ("", "use of unwritten shared_hbm"),
    "transpose dtype": ("transpose((4, 8), (8, 4), nl.bfloat16, nl.float32)\n", "keeps the dtype"),
    "transpose shape": ("transpose((4, 8), (4, 8))\n", "does not fit"),
    "transpose size": ("transpose((4, 129), (128, 4))\n", "transpose of shape"),
    "operand per partition": (
        "a = filled((4, 4), nl.float32)\n"
        "nisa.tensor_scalar(dst=a, data=a, op0=nl.add, operand0=filled((4, 2), nl.float32))\n",
        "operand per partition has shape",
    ),
    "reduced axes": (
        "a = filled((4, 4, 4), nl.float32)\n"
        "nisa.tensor_reduce(dst=filled((4, 4), nl.float32), op=nl.add, data=a, axis=1)\n",
        "last free axes",
    ),
    "memset value": ("filled((4, 4), nl.int32, 1.0)\n", "memset of int32 with 1.0"),
    "partition step": (
        "filled((4, 8), nl.float32).ap(pattern=[[4, 4], [1, 4]])\n",
        "partition step is the free size 8",
    ),
    "start partition": (
        "a = filled((64, 4), nl.float32)\nnisa.tensor_copy(dst=a[0:4, :], src=a[5:9, :])\n",
        "start at partition",
    ),
    "access inside the tensor": (
        "filled((4, 8), nl.float32).ap(pattern=[[8, 4], [1, 9]])\n",
        "leaves its tensor",
    ),
    "index inside the tensor": ("x[0:129, :]\n", "outside a dimension of 128"),
    "dynamic index in range": ("load_row(4)\n", "index out of range"),
    "what a skipped load leaves": (
        "tile = load_row(4, nisa.oob_mode.skip)\nnisa.tensor_copy(dst=tile, src=tile)\n",
        "use of unwritten sbuf",
    ),
    "a loop's one body": (
        "a, size = filled((4, 4), nl.float32), []\n"
        "for _ in nl.dynamic_range(2):\n"
        "    size.append(0)\n"
        "    nisa.tensor_copy(dst=a[:, 0 : len(size)], src=a[:, 0 : len(size)])\n",
        "this pass differs from the first",
    ),
    "a loop's one place": (
        "a, b = [], [filled((4, 4), nl.float32) for _ in range(2)]\n"
        "for _ in nl.dynamic_range(2):\n"
        "    nisa.memset(dst=b[len(a)], value=0.0)\n"
        "    a.append(0)\n",
        "this pass differs from the first",
    ),
    "a loaded register": (
        "for _ in nl.dynamic_range(nisa.register_alloc()):\n    pass\n",
        "nothing was loaded",
    ),
    "an integer register": (
        "nisa.register_load(nisa.register_alloc(), filled((1, 1), nl.float32))\n",
        "takes one integer",
    ),
    "shuffle mask": ("shuffle((32, 4), (32, 4), [0] * 31)\n", "has 32 entries"),
    "shuffle source": ("shuffle((32, 4), (1, 4), [1] * 32)\n", "reads partition 1 of 1"),
    "shuffle shape": ("shuffle((32, 4), (32, 5))\n", "shuffle of shape"),
    "shuffle dtype": ("shuffle((32, 4), (32, 4), None, nl.bfloat16)\n", "keeps the dtype"),
    "shuffle start": (
        "a = filled((128, 4), nl.float32)\n"
        "nisa.nc_stream_shuffle(dst=a[32:96, :], src=a[0:64, :], shuffle_mask=[0] * 32)\n",
        "64 shuffled partitions start at",
    ),
}

HELPERS = """
def shuffle(result, source, mask=None, dtype=nl.float32):
    tile = nl.ndarray(result, dtype=nl.float32, buffer=nl.sbuf)
    nisa.nc_stream_shuffle(dst=tile, src=filled(source, dtype), shuffle_mask=mask or [0] * 32)

def matmul(stationary, moving, result, dtype=nl.float32, other=None, where=nl.sbuf, into=nl.psum):
    value = 1 if dtype == nl.int32 else 1.0
    left = filled(stationary, dtype, value, where)
    right = filled(moving, other or dtype, 1.0 if other else value, nl.sbuf)
    sums = nl.ndarray(result, dtype=nl.float32, buffer=into)
    nisa.nc_matmul(dst=sums, stationary=left, moving=right)

def transpose(shape, result, dtype=nl.float32, other=None):
    target = nl.ndarray(result, dtype=other or dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=target, data=filled(shape, dtype), engine=nisa.engine.tensor)

def load_row(row, mode=nisa.oob_mode.error):
    index = filled((1, 1), nl.int32, row)
    tile = filled((1, 128), nl.float32, 7.0)
    chosen = x.ap(pattern=[[128, 1], [1, 128]], scalar_offset=index)
    nisa.dma_copy(dst=tile, src=chosen, oob_mode=mode)
    return tile

"""


@pytest.mark.parametrize(("body", "message"), LIMITS.values(), ids=LIMITS.keys())
def test_a_program_beyond_the_limit_is_refused(run, body, message):
    x = torch.ones(4, 128) if "load_row" in body else None
    with pytest.raises(HardwareError, match=message):
        run(HELPERS + body, x)


def test_a_dynamic_index_out_of_range_may_be_skipped_and_moves_nothing(run):
    x = torch.arange(4.0)[:, None].repeat(1, 128)
    body = (
        "for r in range(4):\n    nisa.dma_copy(dst=out[r : r + 1, :], src=load_row({}, "
        "nisa.oob_mode.skip))\n"
    )
    loaded, machine = run(HELPERS + body.format("3 - r"), x)
    assert torch.equal(loaded, x.flip(0))
    assert machine.counts["hbm_read_bytes"] == 4 * 128 * 4
    _, machine = run(HELPERS + "load_row(4, nisa.oob_mode.skip)\n" + body.format("3 - r"), x)
    assert machine.counts["hbm_read_bytes"] == 4 * 128 * 4
    assert machine.counts["dma_skipped"] == 1


def test_the_cores_of_a_launch_make_the_same_number_of_passes(run, tmp_path):
    body = "for _ in nl.dynamic_range({}):\n    pass\nnisa.dma_copy(dst=out, src=x)\n"
    for passes, fails in (("2", False), ("nl.program_id(axis=0)", True)):
        path = tmp_path / "launched.py"
        path.write_text(HEADER + textwrap.indent(body.format(passes), "    ") + "    return out\n")
        module, _ = nki_interpreter.load(path)
        with (
            pytest.raises(HardwareError, match="disagree on the passes") if fails else nullcontext()
        ):
            module.kernel[2](torch.ones(2, 2))


def test_a_loop_on_the_device_runs_as_often_as_its_register_says(run):
    body = """
    index = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.dma_copy(dst=index, src=x)
    register = nisa.register_alloc()
    nisa.register_load(register, index)
    for _ in nl.dynamic_range(1, register, 2):
        nisa.tensor_scalar(dst=index, data=index, op0=nl.add, operand0=10)
    nisa.dma_copy(dst=out, src=index)
    """
    for stop in (-1, 0, 1, 2, 3, 4):
        x = torch.tensor([[stop]], dtype=torch.int32)
        assert run(body, x)[0].item() == stop + 10 * len(range(1, stop, 2))


def test_a_shuffle_moves_partitions_within_each_quadrant(run):
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(3))
    body = """
    tile = nl.ndarray((128, 128), dtype=nl.float32)
    nisa.dma_copy(dst=tile, src=x)
    nisa.nc_stream_shuffle(dst=tile, src=tile, shuffle_mask=[(3 * i + 1) % 32 for i in range(32)])
    nisa.dma_copy(dst=out, src=tile)
    """
    wanted = torch.stack([x[32 * (row // 32) + (3 * (row % 32) + 1) % 32] for row in range(128)])
    assert torch.equal(run(body, x)[0], wanted)


def test_ocp_codes_are_read_through_a_view_of_the_chips_own_type_only(run):
    x = torch.randint(0, 0x78, (128, 128), dtype=torch.uint8).view(torch.float8_e4m3fn)
    body = """
    codes = nl.ndarray((128, 128), dtype=nl.{0})
    nisa.dma_copy(dst=codes, src=x.ap(pattern=[[128, 128], [1, 128]], dtype=nl.{0}))
    values = nl.ndarray((128, 128), dtype=nl.float32)
    nisa.tensor_copy(dst=values, src=codes)
    result = nl.ndarray((128, 128), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=result, src=values)
    return result
    """
    assert torch.equal(run(body.format("float8_e4m3"), x)[0], x.float())
    with pytest.raises(HardwareError, match="not with float8_e4m3fn"):
        run(body.format("float8_e4m3fn"), x)


def test_matmul_contracts_partitions_and_accumulates_in_psum(run):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 128, generator=generator)
    body = """
    tile = nl.ndarray((128, 128), dtype=nl.float32)
    nisa.dma_copy(dst=tile, src=x)
    total = nl.ndarray((128, 128), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=total, stationary=tile, moving=tile, accumulate=False)
    nisa.nc_matmul(dst=total, stationary=tile, moving=tile, accumulate=True)
    result = nl.ndarray((128, 128), dtype=nl.float32)
    nisa.tensor_copy(dst=result, src=total)
    nisa.dma_copy(dst=out, src=result)
    """
    out, machine = run(body, x)
    assert torch.allclose(out, 2 * x.T @ x, rtol=1e-5, atol=1e-4)
    assert machine.counts["nc_matmul"] == 2
    assert machine.counts["nc_matmul_elements"] == 256


def test_elementwise_instructions_equal_numpy(run):
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    body = """
    tile = nl.ndarray((128, 128), dtype=nl.float32)
    nisa.dma_copy(dst=tile, src=x)
    column = nl.ndarray((128, 1), dtype=nl.float32)
    nisa.tensor_reduce(dst=column, op=nl.add, data=tile, axis=1, negate=True)
    twice = {'op1': nl.multiply, 'operand1': 2.0}
    nisa.tensor_scalar(
        dst=tile, data=tile, op0=nl.subtract, operand0=column, reverse0=True, **twice
    )
    nisa.activation(dst=tile, op=nl.silu, data=tile, scale=0.5, bias=column)
    other = tile.ap(pattern=[[128, 128], [0, 64], [1, 2]])
    nisa.tensor_tensor(dst=tile, data1=tile, data2=other, op=nl.multiply)
    nisa.dma_copy(dst=out, src=tile)
    """
    column = -x.sum(dim=1, keepdim=True)
    activated = torch.nn.functional.silu((column - x) * 2 * 0.5 + column)
    wanted = activated * activated[:, :2].repeat(1, 64)
    assert torch.allclose(run(body, x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_e4m3_ends_at_240_and_equals_the_ocp_values_below():
    finite = np.isfinite(E4M3_VALUES)
    ocp = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3_VALUES[finite], ocp[finite])
    assert E4M3_VALUES[finite].max() == 240
    assert sorted(np.flatnonzero(~finite)) == [*range(0x78, 0x80), *range(0xF8, 0x100)]
    assert np.isinf(E4M3_VALUES[[0x78, 0xF8]]).all()


def test_bfloat16_rounding_equals_torch():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(2)) * 1e3
    assert np.array_equal(round_to_bfloat16(values.numpy()), values.bfloat16().float().numpy())
