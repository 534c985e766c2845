"""What each token of a pass sees: the mask, the positions and the padding that a caller gives.

Shapes: B batch, T tokens, C positions that attention reads, the cache's and those of this pass.
"""

from typing import Any

import torch

from neuron_minimax.errors import GenerationError


def causal_mask(attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mask [B,T,C] of the last T of C positions, out of a tokenizer's `attention_mask` [B,C].

    A token sees what is real and not behind it; padding (0) sees itself alone, so that no row is
    empty. Raises GenerationError when there are more tokens than positions.
    """
    sequences, positions = attention_mask.shape
    if tokens > positions:
        raise GenerationError(
            f"attention_mask {list(attention_mask.shape)} has {positions} positions for {tokens} "
            "tokens; it covers the cache's positions and the new tokens"
        )
    own_TC = torch.eye(positions, dtype=torch.bool)[positions - tokens :]
    earlier_TC = torch.ones(positions, positions, dtype=torch.bool).tril()[positions - tokens :]
    real_BC = attention_mask.bool()
    real_BT = real_BC[:, positions - tokens :]
    seen_BTC = earlier_TC & real_BC[:, None] & real_BT[:, :, None]
    return seen_BTC | own_TC.expand(sequences, tokens, positions)


def checked_mask(
    mask: Any, positions_BT: torch.Tensor, real_B: torch.Tensor, filled: int
) -> torch.Tensor:
    """The mask [B,T,C] of a pass, for a caller's of [T,C] or [B,T,C]: bool, or floats to be added.

    What a sequence does not hold is hidden, whatever the mask says: positions behind its own end,
    when another one is longer. Only the first `real_B` of the T tokens have to see something.
    Raises GenerationError when the mask does not fit, or a token sees nothing.
    """
    batch, tokens = positions_BT.shape
    shapes = [[tokens, filled], [batch, tokens, filled]]
    if not isinstance(mask, torch.Tensor):
        raise GenerationError(f'mask is {mask!r}; expected "causal" or a tensor {shapes[1]}')
    if list(mask.shape) not in shapes:
        raise GenerationError(
            f"mask has shape {list(mask.shape)}; expected {shapes[0]} or {shapes[1]}, for {tokens} "
            f"tokens and {filled} positions, the cache's among them; causal_mask() makes one of a "
            "tokenizer's attention_mask"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise GenerationError(
            f"mask is of {mask.dtype}; expected bool (True is seen), or floats that are added to "
            "the scores"
        )
    if bool(mask.isnan().any() or mask.isposinf().any()):
        raise GenerationError("mask holds NaN or inf; expected finite numbers, or -inf to hide")
    places_C = torch.arange(filled)
    ends_B11 = (positions_BT[:, 0] + real_B)[:, None, None]
    given_BTC = mask.expand(batch, tokens, filled)
    # The lowest finite number hides too, as transformers has it.
    seen_BTC = given_BTC if mask.dtype == torch.bool else given_BTC > torch.finfo(mask.dtype).min
    seen_BTC = seen_BTC & (places_C < ends_B11)
    real_BT = torch.arange(tokens) < real_B[:, None]
    blind_BT = real_BT & ~seen_BTC.any(dim=-1)
    if bool(blind_BT.any()):
        sequence, token = blind_BT.nonzero()[0].tolist()
        raise GenerationError(
            f"mask lets token {token} of sequence {sequence} see nothing; let each see a position, "
            "as causal_mask() lets padding see itself"
        )
    if mask.dtype == torch.bool:
        return seen_BTC
    return given_BTC.masked_fill(~seen_BTC, -torch.inf)


def checked_positions(
    position_ids: torch.Tensor | None, positions_BT: torch.Tensor
) -> torch.Tensor:
    """The positions [B,T] that RoPE turns by: a caller's of [B,T], [1,T] or [T], or the cache's.

    Raises GenerationError for another shape.
    """
    if position_ids is None:
        return positions_BT
    batch, tokens = positions_BT.shape
    if list(position_ids.shape) not in ([tokens], [1, tokens], [batch, tokens]):
        raise GenerationError(
            f"position_ids have shape {list(position_ids.shape)}; expected [{batch}, {tokens}], "
            "one for each token"
        )
    return position_ids.expand(batch, tokens)


def checked_lengths(lengths: torch.Tensor | None, batch: int, tokens: int) -> torch.Tensor:
    """How many of the T tokens of each sequence are real, [B]: all, unless a caller says it.

    Raises GenerationError when there are not B numbers of 0 to T.
    """
    if lengths is None:
        return torch.full((batch,), tokens)
    fits = list(lengths.shape) == [batch] and bool(((lengths >= 0) & (lengths <= tokens)).all())
    if not fits:
        raise GenerationError(
            f"lengths are {lengths.tolist()}; expected {batch} numbers of 0 to {tokens}, the real "
            "tokens of each sequence"
        )
    return lengths
