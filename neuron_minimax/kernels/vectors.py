"""LLVM vectors: how wide the machine's are, and the few operations that tiles are written in."""

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.core import cgutils

from neuron_minimax.kernels.fp8 import FLOAT32_BITS, SIGN_AND_MAGNITUDE


def _features() -> dict[str, bool]:
    """Of the processor that Numba compiles for."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return {}
    return dict(llvmlite.binding.get_host_cpu_features())


FEATURES = _features()
LANES = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx2") else 4  # float32 numbers of a register
# Sums that a tile may keep; the other registers hold what is added to them.
SUMS_KEPT = 24 if FEATURES.get("avx512f") or platform.machine() in ("aarch64", "arm64") else 12
# Two bfloat16 products are added by one instruction, and bytes are looked up 64 at a time; elsewhere tiles of pairs
# would be slower than those of float32.
HAS_PAIRS = bool(FEATURES.get("avx512bf16") and FEATURES.get("avx512vbmi"))

BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)
SHORTS, BYTES = ir.VectorType(SHORT, 2 * LANES), ir.VectorType(BYTE, 4 * LANES)


class _BFloat(ir.types._BaseFloatType):
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


def at(builder: Any, address: Any, place: Any, kind: Any) -> Any:
    """The address of this element, for a value of this kind."""
    return builder.bitcast(builder.gep(address, [place]), kind.as_pointer())


def fetch(builder: Any, address: Any, place: Any) -> None:
    """Ask for the cache line of this element, which may lie outside the array, into the first cache: llvm.prefetch."""
    element = builder.gep(address, [place])
    kind = ir.FunctionType(ir.VoidType(), [element.type, WORD, WORD, WORD])
    function = builder.module.declare_intrinsic("llvm.prefetch", [element.type], kind)
    read, first_cache, data = WORD(0), WORD(3), WORD(1)
    builder.call(function, [element, read, first_cache, data])


def splat(builder: Any, number: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, WORD(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(WORDS, [0] * LANES))


def words_of(number: int) -> Any:
    return ir.Constant(WORDS, [number] * LANES)


def numbers_at(builder: Any, address: Any, place: Any, stored: Any) -> Any:
    """Numbers of a weight from here: of FP8 codes times 2^-120, exactly; bfloat16; or float32."""
    if stored == types.float32:
        return builder.load(at(builder, address, place, FLOATS), align=4)
    kind = ir.VectorType(BYTE if stored == types.int8 else SHORT, LANES)
    words = builder.sext(builder.load(at(builder, address, place, kind), align=1), WORDS)
    if stored == types.int8:
        words = builder.and_(builder.shl(words, words_of(FLOAT32_BITS)), words_of(SIGN_AND_MAGNITUDE))
    else:
        words = builder.shl(words, words_of(16))
    return builder.bitcast(words, FLOATS)


def add_product(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """total + one * other, in one rounding where the machine has an instruction for that."""
    return builder.fadd(total, builder.fmul(one, other, flags=("contract",)), flags=("contract",))


def add(builder: Any, one: Any, other: Any) -> Any:
    return builder.fadd(one, other)


def larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def over_lanes(builder: Any, vector: Any, operation: Callable[[Any, Any, Any], Any] = add) -> Any:
    """Halves of a vector are added, or whatever the operation does, until one lane is left."""
    size, nothing = LANES // 2, ir.Constant(FLOATS, ir.Undefined)
    while size:
        moved = ir.Constant(WORDS, [(lane + size) % LANES for lane in range(LANES)])
        vector = operation(builder, vector, builder.shuffle_vector(vector, nothing, moved))
        size //= 2
    return builder.extract_element(vector, WORD(0))


def add_pairs(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """total + both products of each word's bfloat16 numbers."""
    kind = ir.FunctionType(FLOATS, [FLOATS, BFLOATS, BFLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}")
    return builder.call(function, [total, builder.bitcast(one, BFLOATS), builder.bitcast(other, BFLOATS)])


def rounded_pairs(builder: Any, lower: Any, upper: Any) -> Any:
    """Two registers' numbers as bfloat16, one behind the other: the nearest, ties to even; subnormal ones are zero."""
    kind = ir.FunctionType(BFLOATS, [FLOATS, FLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512bf16.cvtne2ps2bf16.{32 * LANES}")
    return builder.bitcast(builder.call(function, [upper, lower]), WORDS)


def look_up(builder: Any, places: Any, table: list[int]) -> Any:
    """The bytes of a table of 128 at these places, whose highest bits are ignored."""
    size = 4 * LANES
    halves = [ir.Constant(BYTES, table[start : start + size]) for start in (0, size)]
    kind = ir.FunctionType(BYTES, [BYTES, BYTES, BYTES])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")
    return builder.call(function, [halves[0], places, halves[1]])


def bytes_in_order(builder: Any, one: Any, other: Any, order: list[int]) -> Any:
    """Bytes of two vectors; those of the other are counted on."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(WORD, len(order)), order))


def unpack_argument(context: Any, builder: Any, signature: Any, arguments: Any, number: int) -> Any:
    """(where an array's elements begin, the other numbers) of an argument (array, other numbers)."""
    array, *places = cgutils.unpack_tuple(builder, arguments[number])
    return context.make_array(signature.args[number][0])(context, builder, array).data, *places
