"""Checks that need NxDI in a fresh process: `python -m tests.neuron.checks NAME ARGUMENT...` fails
by an exception.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

OPTIONS: dict[str, Any] = {
    "instance": "trn1.32xlarge",
    "tp_degree": 1,
    "moe_tp_degree": 1,
    "moe_ep_degree": 1,
    "slots": 3,
    "seq_len": 64,
    "buckets": (64,),
}
TOLERANCE = 2e-5


def application_on_cpu(model: Path, options: Any = None, **overrides: Any) -> Any:
    """The application that `load` would make, in float32, each submodel built as a compile builds
    it.

    With a tp degree over 1 every rank is a process, placed by RANK, MASTER_ADDR and MASTER_PORT.
    """
    import socket

    import torch
    import torch.distributed as dist
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trace.trace import get_sharded_checkpoint

    from neuron_minimax.backends.nxdi.application import make_application
    from neuron_minimax.backends.nxdi.options import NeuronOptions

    options = options or NeuronOptions(**OPTIONS)
    if options.tp_degree == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", world_size=options.tp_degree)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tp_degree, skip_collective_init=True
    )
    on_cpu = {
        "on_cpu": True,
        "torch_dtype": torch.float32,
        "attn_kernel_enabled": False,
        **overrides,
    }
    application = make_application(model, options, **on_cpu)
    for wrapper in application.models:
        parallel_state.set_aot_mode(True)
        instance = wrapper.get_model_instance()
        instance.load_module()
        parallel_state.set_aot_mode(False)
        state = application.checkpoint_loader_fn()
        get_sharded_checkpoint(state, instance.module, dist.get_rank(), options.tp_degree)
        instance.module.load_state_dict(state)
        wrapper.model = instance.module
    return application.eval()


def slots(model: str, length: str) -> None:
    """Slots of the Neuron backend give what those of the eager one give: in any order, reused, and
    at rest.

    A context of 256 tokens that choose 2 experts each reaches NxD's block of 512, so experts run
    block by block; one of 64 does not.
    """
    import torch

    from neuron_minimax.backends.cpu.backend import EagerBackend
    from neuron_minimax.backends.cpu.options import CPUOptions
    from neuron_minimax.backends.nxdi.application import NeuronBackend
    from neuron_minimax.backends.nxdi.options import NeuronOptions

    sizes = {"seq_len": int(length), "buckets": (int(length),)}
    options = NeuronOptions(**OPTIONS | sizes)
    # Without buckets a CPU run pads every prompt to the one length; bucketing belongs to compiled
    # graphs.
    application = application_on_cpu(Path(model), options, enable_bucketing=False)
    neuron = NeuronBackend(application, Path(model), options)
    eager = EagerBackend(Path(model), CPUOptions(slots=3, engine="eager", **sizes))
    worst = 0.0

    def encode(slot: int, ids: list[int]) -> int:
        nonlocal worst
        ours = neuron.encode(slot, ids)
        theirs = eager.encode(slot, ids)
        worst = max(worst, float((ours - theirs).abs().max()))
        assert ours.argmax() == theirs.argmax()
        return int(theirs.argmax())

    def step(tokens: list[int], positions: list[int], active: list[bool]) -> list[int]:
        nonlocal worst
        arguments = (torch.tensor(tokens), torch.tensor(positions), torch.tensor(active))
        ours = neuron.step(*arguments)
        theirs = eager.step(*arguments)
        chosen = torch.tensor(active)
        worst = max(worst, float((ours - theirs)[chosen].abs().max()))
        assert torch.equal(ours.argmax(-1)[chosen], theirs.argmax(-1)[chosen])
        return theirs.argmax(-1).tolist()

    masks: list[Any] = []
    layer = application.models[0].model.layers[0]
    mlp = layer.get_submodule(layer.mlp_name)
    experts = getattr(mlp, "expert_mlps", None)
    watch = (experts or mlp).register_forward_pre_hook(
        lambda _, __, named: masks.append(named.get("padding_mask")), with_kwargs=True
    )
    first = encode(2, [5, 9, 2, 77, 31])
    watch.remove()
    if experts is not None:
        assert masks[0] is not None, "padding is not masked"
        assert masks[0].flatten().tolist() == [1.0] * 5 + [0.0] * (options.seq_len - 5)
    tokens = step([0, 0, first], [0, 0, 5], [False, False, True])
    second = encode(
        0, [44]
    )  # a prompt of one token, beside a slot that has begun and one that is empty
    tokens = step([second, 0, tokens[2]], [1, 0, 6], [True, False, True])
    for offset in range(4):  # slot 2 rests
        tokens = [*step([tokens[0], 0, 0], [2 + offset, 0, 0], [True, False, False])[:2], tokens[2]]
    tokens = step(tokens, [6, 0, 7], [True, False, True])  # and goes on
    neuron.reset(0)
    eager.reset(0)
    reused = encode(0, list(range(20, 52)))
    step([reused, 0, tokens[2]], [32, 0, 8], [True, False, True])
    longest = options.seq_len - 1
    last = encode(1, [number % 150 for number in range(longest)])
    step([0, last, 0], [0, longest, 0], [False, True, False])  # up to the last position
    assert worst < TOLERANCE, worst
    print(f"largest difference {worst:.1e}")


def probe(model: str, asked: str, logits: str, dtype: str, tp_degree: str, state: str) -> None:
    """The device of the device check: NxDI in CPU mode runs a probe over slots; rank 0 writes its
    logits.

    A "broken" model has lost the router's bias, and each of its ranks takes the QK norm over its
    own heads.
    """
    import torch
    import torch.distributed as dist

    from neuron_minimax.backends.nxdi.application import NeuronBackend
    from neuron_minimax.backends.nxdi.options import NeuronOptions
    from neuron_minimax.device_check.run import answer

    degrees = {"tp_degree": int(tp_degree), "moe_tp_degree": int(tp_degree)}
    options = NeuronOptions(**(OPTIONS | degrees))
    application = application_on_cpu(
        Path(model), options, enable_bucketing=False, torch_dtype=getattr(torch, dtype)
    )
    for wrapper in application.models:
        layer = wrapper.model.layers[0]
        if state == "broken":
            torch.nn.init.zeros_(layer.block_sparse_moe.router.e_score_correction_bias)
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.divisor = norm.divisor / norm.ranks
                norm.ranks = 1
    backend = NeuronBackend(application, Path(model), options)
    answer(backend, Path(asked), Path(f"{logits}.rank{dist.get_rank()}"))
    if dist.get_rank() == 0:
        Path(f"{logits}.rank0").replace(logits)
    dist.barrier()


def adapter(model: str) -> None:
    """NxDI's own generation adapter drives the class: its greedy tokens are the eager model's."""
    import torch
    from neuronx_distributed_inference.utils.hf_adapter import HuggingFaceGenerationAdapter
    from transformers import GenerationConfig

    from neuron_minimax.model.decoder import Decoder

    if (
        "tensor_capture_hook"
        in HuggingFaceGenerationAdapter.prepare_inputs_for_generation.__code__.co_names
    ):
        print(
            "skipped: the adapter of this NxDI (0.8.0) uses a global name, tensor_capture_hook, "
            "that it never defines"
        )
        return
    plain = {
        "is_continuous_batching": False,
        "enable_bucketing": False,
        "ctx_batch_size": 3,
        "max_context_length": 64,
    }
    application = application_on_cpu(Path(model), **plain)
    prompts = torch.tensor([[5, 9, 2, 77, 31], [6, 1, 88, 3, 7], [12, 13, 14, 15, 16]])
    generated = HuggingFaceGenerationAdapter(application).generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=10, pad_token_id=0),
    )
    eager = Decoder.from_converted(model)
    ids = prompts
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, eager(ids)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids), (generated, ids)


def on_device_sampling(model: str) -> None:
    """With sampling in the graph the application returns tokens: greedy ones are the eager
    model's.
    """
    import torch

    from neuron_minimax.model.decoder import Decoder

    sampling = {"on_device_sampling_config": {"do_sample": False, "deterministic": True}}
    plain = {
        "is_continuous_batching": False,
        "enable_bucketing": False,
        "ctx_batch_size": 3,
        "max_context_length": 64,
    }
    application = application_on_cpu(Path(model), **plain, **sampling)
    prompts = torch.tensor([[5, 9, 2, 77, 31], [6, 1, 88, 3, 7], [12, 13, 14, 15, 16]])
    positions = torch.arange(5).expand(3, 5)
    with torch.no_grad():
        tokens = application(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), position_ids=positions
        )
        wanted = Decoder.from_converted(model)(prompts)[0][:, -1].argmax(-1)
    found = getattr(tokens, "tokens", None)
    found = tokens.hidden_states if found is None else found
    assert torch.equal(found.flatten().long(), wanted), (found, wanted)


def rank_files(model: str, graphs: str, name: str, moe_tp_degree: str) -> None:
    """NxD's real sharding writes files that hold what the model needs; a file that lost a tensor of
    this name is refused.
    """
    from safetensors.torch import load_file, save_file

    from neuron_minimax.backends.nxdi.application import (
        check_rank_files,
        make_application,
        rank_file,
        record_parameters,
    )
    from neuron_minimax.backends.nxdi.options import NeuronOptions
    from neuron_minimax.errors import CheckpointError

    os.environ.pop("NXD_CPU_MODE", None)
    shared = int(moe_tp_degree)
    degrees = {"tp_degree": 4, "moe_tp_degree": shared, "moe_ep_degree": 4 // shared}
    options = NeuronOptions(**(OPTIONS | degrees))
    application = make_application(Path(model), options)
    application.shard_weights(graphs)
    record_parameters(application, Path(graphs))
    path = rank_file(Path(graphs), 3)
    tensors = load_file(path)
    for change in ({}, {name: tensors[name].half()}):
        save_file({key: tensor for key, tensor in tensors.items() if key != name} | change, path)
        with pytest.raises(CheckpointError, match=f"(?s){name}.*tp3|tp3.*{name}"):
            check_rank_files(Path(graphs), 4)


def settings(model: str) -> None:
    """Settings that this class does not serve are refused with the reason, dtypes and compiler
    arguments are right.
    """
    import torch

    # NxD's own import of it, whichever package it comes from.
    from neuronx_distributed.modules.moe.moe_configs import BlockShardStrategy

    from neuron_minimax.backends.nxdi import config as neuron_config
    from neuron_minimax.backends.nxdi.application import make_application
    from neuron_minimax.backends.nxdi.options import NeuronOptions
    from neuron_minimax.errors import ConfigError
    from neuron_minimax.planner import blockwise

    torch_blocks = blockwise.BLOCKWISE_MATMULS["torch"].settings
    options = NeuronOptions(**(OPTIONS | {"buckets": (32, 64)}))
    for field, value, said in (
        ("quantized_mlp_kernel_enabled", True, "dense MLP"),
        ("padding_side", "left", "left padding"),
        ("fused_qkv", True, "separate projections"),
        ("sequence_parallel_enabled", True, "not been run"),
        ("moe_tp_degree", 2, "not tp_degree"),
        ("quantization_type", "per_channel_symmetric", "blockwise_symmetric"),
        ("quantization_block_axis", [0, 1], "[1, 2]"),
        ("blockwise_matmul_config", {}, "NotImplementedError while context encoding is traced"),
        (
            "blockwise_matmul_config",
            blockwise.BLOCKWISE_MATMULS["shard_on_block"].settings,
            "kernel for logical_nc",
        ),
        (
            "blockwise_matmul_config",
            torch_blocks | {"logical_nc_config": 2},
            "leave its kernels out",
        ),
    ):
        with pytest.raises(ConfigError, match=f"{field}.*{re.escape(said)}"):
            make_application(Path(model), options, **{field: value})
    two_cores = {
        "logical_nc_config": 2,
        "blockwise_matmul_config": {"use_shard_on_block_dynamic_while": True},
    }
    two_cores["blockwise_matmul_config"] |= {"logical_nc_config": 2}
    if isinstance(BlockShardStrategy, type):  # SDK 2.28 has it from a closed package
        with pytest.raises(
            ConfigError,
            match="block_sharding_strategy is HI_LO; shard_on_block takes PING_PONG only",
        ):
            make_application(Path(model), options, **two_cores)
    application = make_application(Path(model), options)
    assert application.neuron_config.torch_dtype == torch.bfloat16
    encoding, generation = (wrapper.compiler_args for wrapper in application.models)
    for arguments in (encoding, generation):
        assert "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3" in arguments
        assert "--auto-cast=none" in arguments
        assert "--lnc=1" in arguments
        assert "--internal-enable-dge-levels vector_dynamic_offsets" in arguments
    assert "-O1" in encoding
    assert application.models[0].neuron_config.buckets == [32, 64]
    assert [wrapper.neuron_config.batch_size for wrapper in application.models] == [1, 3]
    assert neuron_config.names_module(
        ["gate"], "layers.0.block_sparse_moe.expert_mlps.mlp_op.gate_up_proj"
    )


def family_settings(dense: str, sparse: str) -> None:
    """What of other families cannot work is refused by name before anything is built; a tied head
    is not quantized.
    """
    from neuron_minimax.backends.nxdi.application import make_application
    from neuron_minimax.backends.nxdi.options import NeuronOptions
    from neuron_minimax.errors import ConfigError

    for model, degrees, said in (
        (
            dense,
            {"tp_degree": 8, "moe_tp_degree": 8},
            "the intermediate size of dense layers, 512 over tp_degree 8 leaves 64 channels per "
            "rank, not whole blocks of 128; lower tp_degree, or convert",
        ),
        (dense, {"moe_ep_degree": 2}, "moe_ep_degree is 2, and Qwen3 has no experts to spread"),
        (dense, {"tp_degree": 3}, "hidden_size 256 cannot be shared by tp_degree 3 ranks"),
        (
            sparse,
            {"tp_degree": 4, "moe_tp_degree": 4, "expert_scales": "block"},
            "intermediate_size 256 over moe_tp_degree 4 leaves 64 channels per rank",
        ),
        (sparse, {"tp_degree": 2}, "is not tp_degree 2; every rank needs one share of the experts"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            make_application(Path(model), NeuronOptions(**OPTIONS | degrees))
    for chosen, listed, said in (
        ({"expert_scales": "expanded"}, "mlp_op.down_proj", "and in layers 0, 1 modules_to_not"),
        ({"expert_scales": "expanded"}, "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj", "layer 1 "),
        (
            {"expert_kernel": "nki", "instance": "trn2.3xlarge"},
            "layers.1.mlp.expert_mlps",
            "and in layer 1 modules_to_not",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            make_application(
                Path(sparse), NeuronOptions(**OPTIONS | chosen), modules_to_not_convert=[listed]
            )
    for field in ("fused_qkv", "mlp_kernel_enabled", "qkv_kernel_enabled"):
        with pytest.raises(ConfigError, match=f"{field}=True is refused for Qwen3 "):
            make_application(Path(dense), NeuronOptions(**OPTIONS), **{field: True})
    application = make_application(Path(dense), NeuronOptions(**OPTIONS))
    assert application.config.model_config.tie_word_embeddings
    assert "lm_head" in application.neuron_config.modules_to_not_convert
    flag = "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3"
    assert all(flag in wrapper.compiler_args for wrapper in application.models)


def code_range(model: str, directory: str) -> None:
    """Codes up to 448 are refused but where they are native, and there they are not read as the
    chip's own E4M3.
    """
    import json

    from neuron_minimax.backends.nxdi.application import make_application
    from neuron_minimax.backends.nxdi.options import NeuronOptions
    from neuron_minimax.errors import ConfigError

    raw = json.loads((Path(model) / "config.json").read_text())
    raw["neuron_minimax"]["fp8_range"] = "ocp"
    (Path(directory) / "config.json").write_text(json.dumps(raw))
    flag = "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3"
    native = OPTIONS | {"instance": "trn3 Gen1 server (1/4 of Gen1)"}
    with pytest.raises(
        ConfigError, match="codes up to 448, and trn1 reads those above 240 as infinity"
    ):
        make_application(Path(directory), NeuronOptions(**OPTIONS))
    os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = "trn3"
    application = make_application(Path(directory), NeuronOptions(**native))
    assert not any(flag in wrapper.compiler_args for wrapper in application.models)
    assert all("--verify-hlo=true" in wrapper.compiler_args for wrapper in application.models)
    make_application(Path(directory), NeuronOptions(**native, expert_kernel="nki"))
    halved = make_application(Path(model), NeuronOptions(**native))
    assert all(flag in wrapper.compiler_args for wrapper in halved.models)
    sampling = {"on_device_sampling_config": {"do_sample": True, "top_k_kernel_enabled": False}}
    with pytest.raises(ConfigError, match="known accuracy issue at batches up to 4"):
        make_application(Path(model), NeuronOptions(**native), **sampling)


def vllm(model: str) -> None:
    """Registered twice, found as vllm-neuron looks models up, configured and compiled as it asks
    for it.

    The table is a stand-in with the keys of NxDI 0.9.0, whose own module needs torchvision.
    """
    import json
    import types

    keys = (
        "gpt_oss llama llama4 mllama mistral mixtral pixtral dbrx qwen2 qwen2_vl qwen3 qwen3_moe "
        "gemma3 qwen3_vl"
    )
    table = types.ModuleType("neuronx_distributed_inference.utils.constants")
    table.MODEL_TYPES = {key: {"causal-lm": object} for key in keys.split()}  # type: ignore[attr-defined]
    sys.modules[table.__name__] = table
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    from neuron_minimax.backends.nxdi import vllm_plugin
    from neuron_minimax.backends.nxdi.model import NeuronForCausalLM
    from neuron_minimax.errors import CheckpointError

    assert vllm_plugin.register()
    assert vllm_plugin.register()
    architecture = json.loads((Path(model) / "config.json").read_text())["architectures"][0]
    name, task = architecture.split("For", 1)
    found = table.MODEL_TYPES[name.lower()][re.sub("([a-z])([A-Z])", r"\1-\2", task).lower()]
    assert found is NeuronForCausalLM
    assert len(table.MODEL_TYPES) == len(keys.split()) + 1
    fields = {
        "torch_dtype": "bfloat16",
        "on_cpu": True,
        "logical_nc_config": 1,
        "is_continuous_batching": True,
    }
    overrides = vllm_plugin.override_neuron_config(
        model, moe_tp_degree=1, moe_ep_degree=1, buckets=(32, 64)
    )
    options = found.get_neuron_config_cls()(
        batch_size=2, seq_len=64, **fields, **json.loads(json.dumps(overrides))
    )
    config = found.get_config_cls()(options, load_config=load_pretrained_config(model))
    assert config.model_config.rotary_dim == 64
    reread = found.get_config_cls().from_json_string(config.to_json_string())
    assert reread.model_config == config.model_config
    found(model, config)
    found.save_quantized_state_dict(model, config)
    config.neuron_config.quantized_checkpoints_path = str(Path(model) / "..")
    with pytest.raises(CheckpointError):
        found.save_quantized_state_dict(model, config)


def vllm_families(model: str, key: str) -> None:
    """A family that NxDI has a class of its own for is replaced when asked, and its converted
    directory is configured through the fields that transformers reads.
    """
    import json
    import types

    table = types.ModuleType("neuronx_distributed_inference.utils.constants")
    table.MODEL_TYPES = {name: {"causal-lm": object} for name in ("qwen2", "qwen3", "qwen3_moe")}  # type: ignore[attr-defined]
    sys.modules[table.__name__] = table
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    from neuron_minimax.backends.nxdi import vllm_plugin
    from neuron_minimax.backends.nxdi.model import NeuronForCausalLM
    from neuron_minimax.config import ModelConfig

    assert vllm_plugin.register()
    assert all(table.MODEL_TYPES[name]["causal-lm"] is object for name in ("qwen2", "qwen3_moe"))
    os.environ["NEURON_MINIMAX_FAMILIES"] = key
    assert vllm_plugin.register()
    architecture = json.loads((Path(model) / "config.json").read_text())["architectures"][0]
    name = architecture.split("For", 1)[0].lower()
    found = table.MODEL_TYPES[{"qwen3moe": "qwen3_moe"}.get(name, name)]["causal-lm"]
    assert found is NeuronForCausalLM
    replaced = [name for name in table.MODEL_TYPES if table.MODEL_TYPES[name]["causal-lm"] is found]
    assert sorted(replaced) == sorted(["minimaxm2", key])
    overrides = vllm_plugin.override_neuron_config(model, buckets=(32, 64))
    options = found.get_neuron_config_cls()(
        batch_size=2,
        seq_len=64,
        torch_dtype="bfloat16",
        on_cpu=True,
        logical_nc_config=1,
        is_continuous_batching=True,
        **json.loads(json.dumps(overrides)),
    )
    config = found.get_config_cls()(options, load_config=load_pretrained_config(model))
    own = ModelConfig.from_dir(model)
    for field in ("family", "head_dim", "rope_theta", "num_local_experts", "intermediate_size"):
        assert getattr(config.model_config, field) == getattr(own, field), field
    reread = found.get_config_cls().from_json_string(config.to_json_string())
    assert reread.model_config == config.model_config
    found(model, config)
    if own.declares_fp8:
        found.save_quantized_state_dict(model, config)


def trace(model: str, dtype: str) -> None:
    """Both submodels as XLA graphs, by the real torch_xla on its CPU device: the values are those
    of eager torch, the router is float32, FP8 codes enter as such, and no tensor enters a graph but
    weights, caches and NxDI's inputs.
    """
    import torch
    import torch_xla
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trace.mock_torchdist import mock_distributed
    from neuronx_distributed.trace.trace import get_sharded_checkpoint

    from neuron_minimax.backends.nxdi import imports
    from neuron_minimax.backends.nxdi.application import make_application
    from neuron_minimax.backends.nxdi.options import NeuronOptions
    from neuron_minimax.families.family import RouterKind

    os.environ.pop("NXD_CPU_MODE", None)
    torch.manual_seed(0)  # random prompts meet near-ties of experts, which BF16 flips
    # The layer markers are calls of the closed compiler.
    imports.ModuleMarkerStartWrapper = imports.ModuleMarkerEndWrapper = torch.nn.Identity
    # Four slots choose as many experts as there are, which is NxD's path without an index into FP8
    # tensors.
    options = NeuronOptions(**(OPTIONS | {"slots": 4}))
    compute = getattr(torch, dtype)
    application = make_application(
        Path(model), options, torch_dtype=compute, attn_kernel_enabled=False
    )
    with mock_distributed(world_size=1), torch.no_grad():
        torch.distributed.init_process_group(backend="xla", rank=0, world_size=1)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=1, skip_collective_init=True
        )
        for wrapper in application.models:
            parallel_state.set_aot_mode(True)
            instance = wrapper.get_model_instance()
            instance.load_module()
            module = instance.module
            state = application.checkpoint_loader_fn()
            get_sharded_checkpoint(state, module, 0, 1)
            module.load_state_dict(state)
            instance.get(0)
            inputs = list(wrapper.input_generator()[0])
            batch, tokens = inputs[0].shape
            inputs[0] = torch.randint(0, 150, (batch, tokens), dtype=inputs[0].dtype)
            places = torch.arange(tokens) if tokens > 1 else torch.tensor([5])
            inputs[2] = places.to(inputs[2].dtype).expand(batch, tokens).contiguous()
            eager = module(*inputs)[0].float()
            codes = sum(tensor.dtype == torch.float8_e4m3fn for tensor in module.parameters())
            device = torch_xla.device()
            traced = module.to(device)(*[value.to(device) for value in inputs])[0]
            graph = torch_xla._XLAC._get_xla_tensors_hlo([traced])
            difference = float((traced.cpu().float() - eager).abs().max())
            assert difference < (TOLERANCE if compute == torch.float32 else 0.1), difference
            known = {tuple(tensor.shape) for tensor in (*module.parameters(), *inputs)}
            entered = re.findall(r"= \w+\[([\d,]*)\]\S* parameter\(", graph[graph.index("ENTRY") :])
            shapes = {tuple(map(int, shape.split(","))) for shape in entered if shape}
            assert shapes
            assert shapes <= known, shapes - known
            model_config = module.config.model_config
            scored = {RouterKind.SIGMOID_BIAS: "logistic", RouterKind.SOFTMAX: "exponential"}
            operation = scored.get(model_config.family.architecture.router)
            if operation is not None:
                experts = model_config.num_local_experts
                assert re.search(rf"f32\[\d+,{experts}\]\S* {operation}\(f32", graph)
            entry = graph[graph.index("ENTRY") :]
            assert len(re.findall(r"= f8e4m3fn\[[\d,]*\]\S* parameter\(", entry)) == codes
            print(
                f"{wrapper.tag}: largest difference {difference:.1e}, {len(entered)} graph inputs"
            )


def main() -> None:
    from tests.neuron import standins

    os.environ["NXD_CPU_MODE"] = "1"
    standins.install()
    checks = {
        check.__name__: check
        for check in (
            trace,
            slots,
            probe,
            adapter,
            on_device_sampling,
            rank_files,
            settings,
            family_settings,
            code_range,
            vllm,
            vllm_families,
        )
    }
    checks[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
