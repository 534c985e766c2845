"""Functions compiled by Numba on all threads of torch's own OpenMP pool.

Numba's parallel loops bring a pool of their own, whose idle threads spin on the cores that torch's need, and the other
way round. A team of torch's threads is also quick to start: 1.5 us.
"""

import ctypes
from typing import Any

import llvmlite.binding
import torch  # noqa: F401  brings the OpenMP library
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_NUMBER = ctypes.CFUNCTYPE(ctypes.c_int)
# Where there is no GNU OpenMP the caller works alone.
_ALONE = {
    "GOMP_parallel": _PARALLEL(lambda body, data, threads, flags: _BODY(body)(data)),
    "omp_get_thread_num": _NUMBER(lambda: 0),
    "omp_get_num_threads": _NUMBER(lambda: 1),
}


def _resolve() -> None:
    """Tell LLVM where the functions of the OpenMP library are that torch has loaded."""
    try:
        library = ctypes.CDLL("libgomp.so.1")
        functions: dict[str, Any] = {name: getattr(library, name) for name in _ALONE}
    except (OSError, AttributeError):
        functions = _ALONE
    for name, function in functions.items():
        llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


_resolve()


@intrinsic
def run_in_team(typing_context: Any, function: Any, size: Any, arguments: Any) -> Any:
    """`function(thread, threads, *arguments)` on every thread of a team of this size; returns when all are done.

    The function is a compiled one. Raises RuntimeError when it raised on any thread, which only memory that has run out
    can make a loop do. The protocol is GCC's for `#pragma omp parallel`.
    """
    signature = types.void(function, types.intp, arguments)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = (types.intp, types.intp, *signature.args[2].types)
        function.get_call_type(typing_context, kinds, {})
        made = function.dispatcher.overloads[kinds]
        context.add_linking_libs([made.library])
        address, number = ir.IntType(8).as_pointer(), ir.IntType(32)

        failed = cgutils.alloca_once_value(builder, number(0))
        record = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [values[2], failed]))
        name = f"{builder.function.name}.team.{len(builder.module.functions)}"
        body = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [address]), name)
        body.linkage = "internal"
        inside = ir.IRBuilder(body.append_basic_block())
        packed, failed_inside = cgutils.unpack_tuple(inside, inside.load(inside.bitcast(body.args[0], record.type)))
        count = ir.FunctionType(number, [])
        place = [
            inside.sext(inside.call(cgutils.get_or_insert_function(builder.module, count, name), []), ir.IntType(64))
            for name in ("omp_get_thread_num", "omp_get_num_threads")
        ]
        callee = context.declare_function(builder.module, made.fndesc)
        passed = [*place, *cgutils.unpack_tuple(inside, packed)]
        status, _ = context.call_conv.call_function(inside, callee, made.signature.return_type, kinds, passed)
        with inside.if_then(status.is_error):
            inside.store(number(1), failed_inside)
        inside.ret_void()

        kind = ir.FunctionType(ir.VoidType(), [body.type, address, number, number])
        parallel = cgutils.get_or_insert_function(builder.module, kind, "GOMP_parallel")
        data = builder.bitcast(record, address)
        builder.call(parallel, [body, data, builder.trunc(values[1], number), number(0)])
        with builder.if_then(builder.icmp_signed("!=", builder.load(failed), number(0))):
            context.call_conv.return_user_exc(builder, RuntimeError, ("a loop over weights failed: out of memory?",))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def take(typing_context: Any, counters: Any, number: Any) -> Any:
    """The next item of work: what an int64 counter holds, which is one more afterwards, whoever else takes one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), ir.IntType(64)(1), "monotonic")

    return types.int64(counters, types.intp), generate
