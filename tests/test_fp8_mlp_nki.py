"""The NKI kernel, run by the NumPy interpreter (and by `nki.simulate` where it is installed),
against float64.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_minimax.kernels import reference
from neuron_minimax.kernels.nki import memory
from tests import nki_interpreter

KERNEL = Path(reference.__file__).parent / "nki" / "expert_mlp.py"
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).numpy()


@pytest.fixture
def kernel():
    return nki_interpreter.load(KERNEL)


class Case:
    """Random weights within +-240, hidden states, choices; sizes are element counts."""

    def __init__(
        self,
        tokens=3,
        top_k=2,
        experts=5,
        hidden=256,
        intermediate=128,
        dtype=torch.float32,
        seed=0,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden_TH = torch.randn(tokens, hidden, generator=self.generator).to(dtype)
        choices = [torch.randperm(experts, generator=self.generator)[:top_k] for _ in range(tokens)]
        self.expert_index_TK = torch.stack(choices)
        self.affinity_TK = torch.rand(tokens, top_k, generator=self.generator)
        self.gate_up = self.codes(experts, hidden, 2 * intermediate)
        self.down = self.codes(experts, intermediate, hidden)
        columns = -(-intermediate // 128)
        self.gate_up_scale = self.scales(experts, hidden // 128, 2 * columns)
        self.down_scale = self.scales(experts, columns, hidden // 128)

    def codes(self, *shape):
        codes = torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)
        return torch.where(codes & 0x78 == 0x78, codes ^ 0x40, codes).view(torch.float8_e4m3fn)

    def scales(self, *shape):
        return torch.rand(shape, generator=self.generator) * 1e-3 + 1e-4

    def share(self, channels):
        """The weights of some channels, with expanded scales, as a rank holds them."""
        gate, up = self.gate_up.view(torch.uint8).chunk(2, dim=-1)
        channels = range(self.down.shape[1])[channels]
        scales = [
            part.repeat_interleave(128, -1)[..., channels]
            for part in self.gate_up_scale.chunk(2, dim=-1)
        ]
        return reference.ExpertWeights(
            torch.cat([gate[..., channels], up[..., channels]], -1).view(torch.float8_e4m3fn),
            torch.cat(scales, -1),
            self.down.view(torch.uint8)[:, channels].contiguous().view(torch.float8_e4m3fn),
            self.down_scale.repeat_interleave(128, 1)[:, channels].contiguous(),
        )

    def arguments(self):
        weights = reference.ExpertWeights(
            self.gate_up, self.gate_up_scale, self.down, self.down_scale
        )
        return (self.hidden_TH, self.expert_index_TK, self.affinity_TK, weights)


def slow_expert_mlp(case, rounded=torch.float64):
    """One token, one choice at a time, in float64 NumPy; silu(gate) * up is rounded to
    `rounded`.
    """

    def weight(codes, scale, parts=1):
        rows, columns = codes.shape
        wide = np.concatenate(  # gate and up end with blocks of their own
            [
                np.kron(part, np.ones((128, 128)))[:rows, : columns // parts]
                for part in np.split(scale.double().numpy(), parts, axis=1)
            ],
            axis=1,
        )
        return E4M3[codes.view(torch.uint8).numpy()] * wide

    out = np.zeros(case.hidden_TH.shape)
    for token, (experts, affinities) in enumerate(
        zip(case.expert_index_TK, case.affinity_TK, strict=True)
    ):
        for expert, affinity in zip(experts.tolist(), affinities.tolist(), strict=True):
            if not 0 <= expert < len(case.down):
                continue
            hidden = case.hidden_TH[token].double().numpy()
            gate, up = np.split(
                hidden @ weight(case.gate_up[expert], case.gate_up_scale[expert], parts=2), 2
            )
            product = (
                torch.from_numpy(gate * np.exp(-np.logaddexp(0, -gate)) * up)
                .to(rounded)
                .double()
                .numpy()
            )
            out[token] += affinity * (product @ weight(case.down[expert], case.down_scale[expert]))
    return out


def relative_error(out, wanted):
    return np.linalg.norm(out.double().numpy() - wanted) / np.linalg.norm(wanted)


FLOAT32_CASES = {
    "one token": {"tokens": 1, "top_k": 2},
    "one token and every expert": {"tokens": 1, "top_k": 5},
    "few tokens": {"tokens": 3},
    "more choices than experts": {"tokens": 9, "top_k": 3, "experts": 4},
    "128 tokens": {"tokens": 128, "top_k": 1, "experts": 3, "hidden": 640, "intermediate": 384},
    "rows of blocks that do not fill a load": {"hidden": 640, "intermediate": 384, "tokens": 2},
}


@pytest.mark.parametrize("sizes", FLOAT32_CASES.values(), ids=FLOAT32_CASES.keys())
def test_the_float32_mode_equals_float64_within_1e_5(kernel, sizes):
    case = Case(**sizes)
    assert relative_error(kernel[0].expert_mlp(*case.arguments()), slow_expert_mlp(case)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 20, 128])
def test_bfloat16_activations_add_no_error_beyond_their_own_rounding(kernel, tokens):
    """The kernel rounds silu(gate) * up once to bfloat16, as the reference does here; its output is
    float32.
    """
    module, _ = kernel
    case = Case(tokens=tokens, hidden=384, intermediate=256, dtype=torch.bfloat16)
    plan = module.plan_visits(case.expert_index_TK, case.affinity_TK, len(case.down))
    weights = (case.gate_up, case.gate_up_scale, case.down, case.down_scale)
    out = module.expert_mlp_kernel[1](case.hidden_TH, *plan, *weights)[0]
    assert relative_error(out, slow_expert_mlp(case, torch.bfloat16)) < 1e-3
    assert torch.equal(module.expert_mlp(*case.arguments()), out.to(torch.bfloat16))


def test_the_kernel_agrees_with_the_torch_implementation_in_float64(kernel):
    case = Case(tokens=7, top_k=3)
    hidden, *others = case.arguments()
    assert (
        relative_error(
            kernel[0].expert_mlp(hidden, *others),
            reference.expert_mlp(hidden.double(), *others).numpy(),
        )
        < 1e-5
    )


def test_repeated_experts_are_summed_and_moved_once(kernel):
    module, machine = kernel
    case = Case(tokens=2, top_k=2, experts=6)
    case.expert_index_TK = torch.tensor([[4, 4], [1, 4]])
    assert relative_error(module.expert_mlp(*case.arguments()), slow_expert_mlp(case)) < 1e-5
    assert machine.counts["hbm_read_bytes"] - overhead(case, visits=2) == 2 * expert_bytes(case)


def test_experts_of_other_ranks_contribute_nothing_and_move_nothing(kernel):
    module, machine = kernel
    case = Case(tokens=3, top_k=3, experts=4)
    case.expert_index_TK = torch.tensor([[-1, 2, 4], [9, -1, 2], [-1, 4, 7]])
    out = module.expert_mlp(*case.arguments())
    assert relative_error(out, slow_expert_mlp(case)) < 1e-5
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert machine.counts["hbm_read_bytes"] - overhead(case, visits=1) == expert_bytes(case)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_rank_that_holds_no_chosen_expert_returns_zeros_and_neither_moves_nor_multiplies_weights(
    kernel, cores
):
    module, machine = kernel
    case = Case()
    case.expert_index_TK = torch.full_like(case.expert_index_TK, -1)
    assert torch.equal(
        module.expert_mlp(*case.arguments(), cores=cores), torch.zeros_like(case.hidden_TH)
    )
    assert machine.counts["hbm_read_bytes"] == cores * overhead(case, visits=0)
    assert machine.counts["nc_matmul"] == 0


def test_only_experts_that_a_token_chose_pass_through_the_core(kernel):
    """Every other expert holds NaN codes and scales; 0 * NaN would show."""
    for cores in (1, 2):
        case = Case(tokens=2, top_k=3, experts=6)
        case.expert_index_TK = torch.tensor([[4, -1, 1], [1, 3, 9]])
        for expert in (0, 2, 5):
            case.gate_up.view(torch.uint8)[expert] = 0x7F
            case.down.view(torch.uint8)[expert] = 0x7F
            case.gate_up_scale[expert] = torch.nan
            case.down_scale[expert] = torch.nan
        out = kernel[0].expert_mlp(*case.arguments(), cores=cores)
        assert relative_error(out, slow_expert_mlp(case)) < 1e-5


def test_the_work_is_that_of_the_chosen_experts_whatever_the_number_of_choices(kernel):
    module, machine = kernel
    case = Case(tokens=8, top_k=4, experts=6)
    case.expert_index_TK = torch.tensor([[2, 5, -1, 7]]).repeat(8, 1)
    module.expert_mlp(*case.arguments())
    assert machine.counts["nc_matmul"] == 2 * (2 * 2 + 1 * 2)
    assert machine.counts["hbm_read_bytes"] - overhead(case, visits=2) == 2 * expert_bytes(case)


def test_codes_may_come_as_bytes(kernel):
    case = Case()
    wanted = kernel[0].expert_mlp(*case.arguments())
    case.gate_up = case.gate_up.view(torch.uint8)
    case.down = case.down.view(torch.uint8)
    assert torch.equal(kernel[0].expert_mlp(*case.arguments()), wanted)


def test_extreme_scales_and_zero_blocks_keep_their_precision(kernel):
    case = Case(tokens=4, hidden=256, intermediate=256)
    case.gate_up_scale[:, 0] = 1e-6
    case.gate_up_scale[:, 1] = 1e3
    case.down_scale[:, :, 0] = 1e-6
    case.down_scale[:, :, 1] = 1e3
    case.gate_up.view(torch.uint8)[:, :128, 128:256] = 0
    case.down.view(torch.uint8)[:, 128:, :128] = 0x80
    out = kernel[0].expert_mlp(*case.arguments())
    wanted = slow_expert_mlp(case)
    for columns in (slice(0, 128), slice(128, 256)):
        assert relative_error(out[:, columns], wanted[:, columns]) < 1e-5


@pytest.mark.parametrize(
    "chosen", [[[0, 1, 2], [2, 3, 8]], [[0, 1, 2], [1, 2, 8]]], ids=["five", "four"]
)
def test_two_cores_make_the_same_number_of_visits_and_sum_to_the_same_result(kernel, chosen):
    """Of five visits the first is made twice, the second time at affinity 0."""
    module, machine = kernel
    case = Case(tokens=2, top_k=3, experts=9)
    case.expert_index_TK = torch.tensor(chosen)
    shared = module.expert_mlp(*case.arguments(), cores=2)
    rounds = (len({*chosen[0], *chosen[1]}) + 1) // 2
    assert machine.trips == [rounds]
    assert machine.counts["hbm_read_bytes"] == 2 * (
        overhead(case, visits=rounds) + rounds * expert_bytes(case)
    )
    assert relative_error(shared, slow_expert_mlp(case)) < 1e-5
    alone = module.expert_mlp(*case.arguments())
    assert torch.allclose(alone, shared, rtol=1e-5, atol=1e-6 * alone.abs().max().item())


def test_codes_above_240_reach_the_result_as_nan_instead_of_wrong_numbers(kernel):
    case = Case(tokens=1, top_k=1, experts=1)
    case.gate_up.view(torch.uint8)[0, 5, 7] = 0x7A
    assert kernel[0].expert_mlp(*case.arguments()).isnan().all()


def test_codes_up_to_448_are_read_by_the_cores_that_have_them_alone(kernel):
    case = Case(tokens=2)
    *inputs, weights = case.arguments()
    halved = kernel[0].expert_mlp(*inputs, weights)
    doubled = weights._replace(
        gate_up=(weights.gate_up.float() * 1.75).to(torch.float8_e4m3fn),
        down=(weights.down.float() * 1.75).to(torch.float8_e4m3fn),
    )
    assert max(each.float().abs().max() for each in (doubled.gate_up, doubled.down)) > 240
    module, _ = nki_interpreter.load(KERNEL, generation=4)
    out = module.expert_mlp(*inputs, doubled, ocp_codes=True)
    case.gate_up, case.down = doubled.gate_up, doubled.down
    assert relative_error(out, slow_expert_mlp(case)) < 1e-5
    assert torch.equal(module.expert_mlp(*inputs, weights), halved)
    with pytest.raises(nki_interpreter.HardwareError, match="not with float8_e4m3fn"):
        kernel[0].expert_mlp(*inputs, doubled, ocp_codes=True)


def test_what_the_kernel_does_not_take_is_refused_by_name(kernel):
    expert_mlp = kernel[0].expert_mlp
    with pytest.raises(ValueError, match="1 to 128 tokens"):
        expert_mlp(*Case(tokens=129, top_k=1).arguments())
    ragged = Case()
    dense = Case()
    wrong = Case()
    ragged.hidden_TH = ragged.hidden_TH[:, :192]
    ragged.gate_up = ragged.gate_up[:, :192]
    ragged.down = ragged.down[..., :192]
    with pytest.raises(ValueError, match="multiples of 128"):
        expert_mlp(*ragged.arguments())
    dense.gate_up_scale = None
    with pytest.raises(ValueError, match="FP8 weights with block scales"):
        expert_mlp(*dense.arguments())
    wrong.gate_up_scale = wrong.gate_up_scale[:, :1]
    with pytest.raises(ValueError, match="gate_up_scale has shape"):
        expert_mlp(*wrong.arguments())


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_the_plan_visits_each_chosen_local_expert_exactly_once(kernel, cores):
    generator = torch.Generator().manual_seed(1)
    for tokens, top_k, experts in ((1, 8, 256), (1, 1, 4), (5, 4, 7), (16, 8, 64), (2, 2, 4)):
        index_TK = torch.randint(-3, experts + 3, (tokens, top_k), generator=generator)
        affinity_TK = torch.rand(tokens, top_k, generator=generator)
        rounds, visits, affinity_VT = kernel[0].plan_visits(index_TK, affinity_TK, experts, cores)
        chosen = {expert for expert in index_TK.flatten().tolist() if 0 <= expert < experts}
        made = rounds.item() * cores
        assert rounds.item() == (len(chosen) + cores - 1) // cores
        assert made + cores <= len(visits)
        experts_V = visits.flatten().tolist()
        assert sorted(experts_V[: len(chosen)]) == sorted(chosen)
        assert set(experts_V[len(chosen) : made]) <= chosen
        assert set(experts_V[made:]) == {experts}
        dense_TE = torch.zeros(tokens, experts)
        for token in range(tokens):
            for choice in range(top_k):
                if 0 <= index_TK[token, choice] < experts:
                    dense_TE[token, index_TK[token, choice]] += affinity_TK[token, choice]
        for visit, (expert, affinity_T) in enumerate(zip(experts_V, affinity_VT, strict=True)):
            wanted_T = dense_TE[:, expert] if visit < len(chosen) else torch.zeros(tokens)
            assert torch.allclose(affinity_T, wanted_T)


@pytest.mark.parametrize("experts", [4, 256])
def test_the_plan_computes_in_int32_and_float32_only(kernel, experts):
    found = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            found.add(result.dtype)
            return result

    index_TK = torch.randint(-1, experts, (3, 8))
    affinity_TK = torch.rand(3, 8)
    with Dtypes():
        kernel[0].plan_visits(index_TK, affinity_TK, experts, 2)
    assert found == {torch.int32, torch.bool, torch.float32}


def test_every_chosen_block_moves_once_and_ahead_of_its_products_at_the_real_size(kernel):
    module, machine = kernel
    case = Case(tokens=1, top_k=8, experts=8, hidden=3072, intermediate=1536, dtype=torch.bfloat16)
    module.expert_mlp(*case.arguments())
    floor = 8 * (3 * 3072 * 1536 + 4 * (case.gate_up_scale[0].numel() + case.down_scale[0].numel()))
    assert machine.counts["hbm_read_bytes"] / floor <= 1.001
    assert machine.counts["nc_matmul"] == 8 * 3 * 24 * 12
    assert machine.counts["dma_into_busy"] == 0, "a load waits for the products of the previous one"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_128_tokens_fit_the_memories_at_the_real_size(kernel, dtype, tolerance):
    """The tolerance in bfloat16 is for two roundings, of silu(gate) * up and of the result: 2^-9
    each, at random.
    """
    case = Case(tokens=128, top_k=1, experts=2, hidden=3072, intermediate=1536, dtype=dtype)
    hidden, *others = case.arguments()
    out = kernel[0].expert_mlp(hidden, *others, cores=2)
    assert relative_error(out, reference.expert_mlp(hidden.double(), *others).numpy()) < tolerance


MEMORY_CASES = {
    "two blocks": {"hidden": 256, "intermediate": 128, "tokens": 3},
    "rows at once": {"hidden": 640, "intermediate": 384, "tokens": 1},
    "the scalar engine": {"hidden": 640, "intermediate": 256, "tokens": 128},
    "float32": {"hidden": 640, "intermediate": 384, "tokens": 2, "dtype": torch.float32},
}


@pytest.mark.parametrize("expanded", [False, True], ids=["block", "expanded"])
@pytest.mark.parametrize("sizes", MEMORY_CASES.values(), ids=MEMORY_CASES.keys())
def test_what_the_kernel_says_it_needs_is_what_the_interpreter_gives_it(kernel, sizes, expanded):
    """A little more for a few tokens, whose sums of several rows are counted for the most rows."""
    module, machine = kernel
    case = Case(**{"top_k": 1, "experts": 3, "dtype": torch.bfloat16} | sizes)
    *inputs, weights = case.arguments()
    module.expert_mlp(*inputs, case.share(slice(None)) if expanded else weights)
    needed = memory.sbuf_bytes(
        memory.ExpertSizes(
            hidden=sizes["hidden"],
            channels=sizes["intermediate"],
            expanded=expanded,
            itemsize=case.hidden_TH.itemsize,
        ),
        sizes["tokens"],
    )
    assert 0 <= needed - machine.counts["peak_sbuf"] <= 256


def test_what_does_not_fit_is_refused_with_the_bytes_and_the_most_tokens_that_do(kernel):
    sizes = {"hidden": 6144, "channels": 2560, "expanded": False}
    wide = memory.ExpertSizes(**sizes)
    said = memory.overflow(wide, 128)
    fits = int(re.search(r"at most (\d+) tokens fit", said)[1])
    assert memory.sbuf_bytes(wide, fits) <= memory.SBUF_BYTES < memory.sbuf_bytes(wide, fits + 1)
    assert f"need {memory.sbuf_bytes(wide, 128):,} bytes of each partition of SBUF, which" in said
    assert not memory.overflow(wide, fits)
    assert "no number of tokens fits" in memory.overflow(
        memory.ExpertSizes(**sizes | {"channels": 8192}), 1
    )
    case = Case(tokens=1, top_k=1, experts=1, hidden=128, intermediate=16384)
    with pytest.raises(ValueError, match="too little memory: 1 token of 128 features and 16384"):
        kernel[0].expert_mlp(*case.arguments())


EXPANDED_CASES = {
    "whole blocks": {"tokens": 3},
    "24 channels": {"tokens": 1, "intermediate": 24},
    "a block and a half": {"tokens": 2, "intermediate": 192},
    "five blocks, two loads, and a part": {"tokens": 2, "hidden": 640, "intermediate": 648},
    "128 tokens": {"tokens": 128, "top_k": 1, "experts": 3, "hidden": 640, "intermediate": 192},
}


@pytest.mark.parametrize("sizes", EXPANDED_CASES.values(), ids=EXPANDED_CASES.keys())
def test_expanded_scales_equal_float64_within_1e_5(kernel, sizes):
    case = Case(**sizes)
    *inputs, _ = case.arguments()
    out = kernel[0].expert_mlp(*inputs, case.share(slice(None)))
    assert relative_error(out, slow_expert_mlp(case)) < 1e-5


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_that_share_blocks_sum_to_the_whole_expert(kernel, ranks):
    """192 channels over 8 ranks: the sixth has 8 of one block and 16 of the next."""
    case = Case(tokens=2, intermediate=192)
    *inputs, _ = case.arguments()
    step = 192 // ranks
    shares = [case.share(slice(start, start + step)) for start in range(0, 192, step)]
    out = sum(kernel[0].expert_mlp(*inputs, share) for share in shares)
    assert relative_error(out, slow_expert_mlp(case)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 64])
def test_expanded_scales_in_bfloat16_add_no_error_beyond_one_rounding(kernel, tokens):
    """silu(gate) * up times its scale is rounded once, 2^-9 at random; so is the result."""
    case = Case(tokens=tokens, hidden=384, intermediate=192, dtype=torch.bfloat16)
    *inputs, _ = case.arguments()
    out = kernel[0].expert_mlp(*inputs, case.share(slice(None)))
    assert relative_error(out, slow_expert_mlp(case)) < 4e-3


@pytest.mark.parametrize(("channels", "tokens"), [(1536, 1), (192, 1), (24, 1), (24, 4)])
def test_expanded_scales_move_at_most_1_08_of_the_least(kernel, channels, tokens):
    """The least are the codes and a scale per 128 x 128 of them, whatever a rank's share; hidden
    states and choices, which come once to a rank, not counted.
    """
    module, machine = kernel
    case = Case(
        tokens=tokens,
        top_k=2,
        experts=2,
        hidden=3072,
        intermediate=channels,
        dtype=torch.bfloat16,
    )
    *inputs, _ = case.arguments()
    module.expert_mlp(*inputs, case.share(slice(None)))
    codes = 2 * 3 * 3072 * channels
    moved = machine.counts["hbm_read_bytes"] - overhead(case, visits=2)
    assert moved == codes + 4 * codes // 128
    assert moved / (codes + 4 * codes / 128**2) <= 1.08
    assert machine.counts["dma_into_busy"] == 0, "a load waits for the products of the previous one"


def test_scales_of_neither_layout_are_refused(kernel):
    case = Case(intermediate=192)
    *inputs, _ = case.arguments()
    mixed = case.share(slice(None))._replace(down_scale=case.down_scale)
    with pytest.raises(ValueError, match="gate_up_scale has shape"):
        kernel[0].expert_mlp(*inputs, mixed)
    blocks = case.arguments()[-1]
    with pytest.raises(ValueError, match="with expanded scales the hidden one only"):
        kernel[0].expert_mlp(*inputs, blocks)


def test_the_kernel_is_chosen_explicitly_and_only_where_it_can_run():
    from neuron_minimax.backends.nxdi.options import check
    from neuron_minimax.config import ModelConfig
    from neuron_minimax.errors import BackendError
    from tests.full_size import published_config

    config = ModelConfig.from_dict(published_config())
    given = {
        "instance": "trn2.48xlarge",
        "tp_degree": 64,
        "moe_tp_degree": 4,
        "moe_ep_degree": 16,
        "slots": 32,
    }
    assert check(config, given, force=True)["expert_kernel"] == "torch"
    assert check(config, given | {"expert_kernel": "nki"}, force=True)["expert_kernel"] == "nki"
    with pytest.raises(BackendError, match="expected one of torch, nki"):
        check(config, given | {"expert_kernel": "auto"}, force=True)
    with pytest.raises(BackendError, match="needs trn2 or later"):
        check(
            config,
            given | {"expert_kernel": "nki", "instance": "inf2.48xlarge", "tp_degree": 24},
            force=True,
        )


def test_nki_simulate_equals_float64_within_1e_5(monkeypatch):
    nki = pytest.importorskip(
        "nki", reason="the nki package (Neuron SDK 2.29 and later) is not installed"
    )
    if not hasattr(nki, "simulate"):
        pytest.skip(
            "this nki package is the empty one of the public index; Neuron's comes from AWS's own "
            "index"
        )
    from neuron_minimax.kernels.nki import expert_mlp

    case = Case(tokens=4, top_k=2, experts=6, hidden=256, intermediate=256)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    monkeypatch.setenv(
        "NKI_PRECISE_FP", "1"
    )  # FP8 as codes; else the simulator holds it as float32
    plan = expert_mlp.plan_visits(case.expert_index_TK, case.affinity_TK, len(case.down))
    weights = (
        case.gate_up.view(torch.uint8),
        case.gate_up_scale,
        case.down.view(torch.uint8),
        case.down_scale,
    )
    arguments = [tensor.numpy() for tensor in (case.hidden_TH, *plan, *weights)]
    simulated = torch.from_numpy(np.asarray(nki.simulate(expert_mlp.expert_mlp_kernel)(*arguments)))
    assert relative_error(simulated.sum(dim=0), slow_expert_mlp(case)) < 1e-5


def expert_bytes(case):
    """HBM reads of one visit: codes and scales, once each."""
    scales = case.gate_up_scale[0].numel() + case.down_scale[0].numel()
    return case.gate_up[0].numel() + case.down[0].numel() + 4 * scales


def overhead(case, visits):
    """HBM reads of one core beside its experts: hidden, the number of rounds, number and affinities
    of each visit.

    The list of visits is read one further than it is followed.
    """
    tokens = len(case.hidden_TH)
    return (
        case.hidden_TH.numel() * case.hidden_TH.element_size() + 4 + (visits + 1) * 4 * (1 + tokens)
    )
