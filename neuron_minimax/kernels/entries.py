"""The loops as kernels of torch's operators: how each takes its inputs from the stack that dispatch.py describes.

Every function here makes the kernel of a loop for stored numbers and panels of these dtypes, which compiled code takes
as constants. Shapes as in operators.py; R rows, S slots and heads together.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from neuron_minimax.kernels.attention_loops import attend_to_filled
from neuron_minimax.kernels.codes import inlined
from neuron_minimax.kernels.dispatch import answer, cube, flat, matrix, new_matrix, sizes, strides, threads, words_of
from neuron_minimax.kernels.expert_loops import add_expert_products
from neuron_minimax.kernels.linear_loops import linear_of_few, linear_of_many
from neuron_minimax.kernels.prompt_loops import attend_to_prompt


def _few(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def linear_of_few_rows(stack, inputs, outputs):
        words = words_of(stack, inputs)
        hidden_NI, weight_OI = matrix(words[0], np.float32), matrix(words[1], stored)
        scale, block = np.ones((1, 1), np.float32), (weight_OI.shape[0], weight_OI.shape[1])
        if scaled:
            scale, block = matrix(words[2], np.float32), (words[3], words[4])
        made, out_NO = new_matrix(len(hidden_NI), len(weight_OI))
        out_NO[:] = np.float32(0)
        linear_of_few(threads(), hidden_NI, weight_OI, scale, block, out_NO)
        answer(stack, words, 3 if scaled else 2, made)

    return linear_of_few_rows


def _many(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def linear_of_many_rows(stack, inputs, outputs):
        words = words_of(stack, inputs)
        hidden_NI, weight_OI = matrix(words[0], np.float32), matrix(words[1], stored)
        scale, block = matrix(words[2], np.float32), (words[3], words[4])
        made, out_NO = new_matrix(len(hidden_NI), len(weight_OI))
        linear_of_many(threads(), hidden_NI, weight_OI, scale, block, np.empty(0, panels), out_NO.reshape(-1))
        answer(stack, words, 3, made)

    return linear_of_many_rows


def _experts(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def multiply_experts(stack, inputs, outputs):
        words = words_of(stack, inputs)
        hidden_TH, affinity_TK = matrix(words[0], np.float32), matrix(words[2], np.float32)
        gate_up, down = cube(words[3], stored), cube(words[4], stored)
        gate_up_scale, down_scale = np.ones((len(down), 1, 2), np.float32), np.ones((len(down), 1, 1), np.float32)
        block, of_down = (gate_up.shape[1], gate_up.shape[2] // 2), (down.shape[1], down.shape[2])
        if scaled:
            gate_up_scale, down_scale = cube(words[5], np.float32), cube(words[6], np.float32)
            block = of_down = words[7], words[8]
        made, out_TH = new_matrix(len(hidden_TH), down.shape[2])
        out_TH[:] = np.float32(0)
        first, second = (gate_up, gate_up_scale, block), (down, down_scale, of_down)
        index_TK = matrix(words[1], np.int64)
        add_expert_products(threads(), hidden_TH, index_TK, affinity_TK, first, second, np.empty(0, panels), out_TH)
        answer(stack, words, 7 if scaled else 5, made)

    return multiply_experts


@inlined
def _attention(words: Any, dtype: Any) -> Any:
    """Queries [R,D] and positions; keys and values, flat, and how they lie, as the loops take it; the result, zeros."""
    query_RD, positions_ST = matrix(words[0], np.float32), matrix(words[3], np.int64)
    size, stride = sizes(words[1], 4), strides(words[1], 4)
    reach = (size[0] - 1) * stride[0] + (size[1] - 1) * stride[1] + size[2] * size[3]
    of_cache = flat(words[1], reach, dtype), flat(words[2], reach, dtype), (size[1], size[2], stride[0], stride[1])
    made, out_RD = new_matrix(len(query_RD), query_RD.shape[1])
    out_RD[:] = np.float32(0)
    return query_RD, positions_ST, of_cache, made, out_RD


def _filled(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def attend_of_one_token(stack, inputs, outputs):
        words = words_of(stack, inputs)
        query_RD, positions_ST, (keys, values, cache), made, out_RD = _attention(words, stored)
        shape = len(positions_ST), len(query_RD) // len(positions_ST), query_RD.shape[1]
        query_SND, out_SND = query_RD.reshape(shape), out_RD.reshape(shape)
        attend_to_filled(threads(), query_SND, keys, values, cache, positions_ST.reshape(-1), out_SND)
        answer(stack, words, 4, made)

    return attend_of_one_token


def _prompt(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def attend_of_prompt(stack, inputs, outputs):
        words = words_of(stack, inputs)
        query_RD, positions_ST, (keys, values, cache), made, out_RD = _attention(words, stored)
        attend_to_prompt(threads(), query_RD, keys, values, cache, positions_ST, np.empty(0, panels), out_RD)
        answer(stack, words, 4, made)

    return attend_of_prompt


KERNELS = {
    "linear_of_few": _few,
    "linear_of_many": _many,
    "expert_mlp": _experts,
    "attend_to_filled": _filled,
    "attend_to_prompt": _prompt,
}
