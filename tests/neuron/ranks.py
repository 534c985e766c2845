"""Run the NxDI model in CPU mode, one process per rank over gloo, and bring rank 0's logits and
tokens back.

What NxDI has no CPU code for is supplied here, as test support: expert-parallel groups, and
building the quantized layers, which `to_cpu` never does.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One configuration: the directory to load, parallel degrees, dtype, and extra NeuronConfig
    fields.
    """

    directory: str
    tp_degree: int = 1
    moe_tp_degree: int = 1
    moe_ep_degree: int = 1
    dtype: str = "float32"
    through_load_module: bool = (
        False  # as a compile builds the model; the only way to quantized layers
    )
    options: dict[str, Any] = field(default_factory=dict)
    expert_kernel: str = "torch"
    expert_scales: str = "auto"
    expert_placement: str | None = None
    stock: bool = False  # NxDI's own class of the family, over a Hugging Face checkpoint
    forward: bool = True  # False: weights are loaded and counted only


def run(configuration: Run, output: Path, timeout: float = 300.0) -> dict[str, Any]:
    """{"tokens", "logits", "parameters", "routers", "bytes"} of rank 0, the first two and the
    routers unless `forward` is False.

    Raises AssertionError with the output of a rank that failed.
    """
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "NXD_CPU_MODE": "1",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(configuration.tp_degree),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [
        sys.executable,
        "-m",
        "tests.neuron.ranks",
        json.dumps(asdict(configuration)),
        str(output),
    ]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(configuration.tp_degree)
    ]
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=timeout)
            assert rank.returncode == 0, said[-6000:]
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(output, weights_only=True)


def gloo_expert_groups(moe_tp_degree: int, moe_ep_degree: int) -> None:
    """NxD makes these groups with XLA options; the same meshes in gloo, stored where NxD looks for
    them.
    """
    import torch.distributed as dist
    from neuronx_distributed.modules.moe import moe_process_group as groups
    from neuronx_distributed.parallel_layers import parallel_state

    meshes = parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=moe_tp_degree,
        expert_model_parallel_size=moe_ep_degree,
        mesh_only=True,
        lnc_size=1,
    )
    for kind, mesh in (("TENSOR", meshes.tp_groups), ("EXPERT", meshes.ep_model_groups)):
        made = {tuple(ranks): dist.new_group(ranks, backend="gloo") for ranks in mesh}
        mine = next(group for ranks, group in made.items() if dist.get_rank() in ranks)
        for stage in ("TKG", "CTE"):
            setattr(groups, f"_MOE_{stage}_{kind}_MODEL_PARALLEL_GROUP", mine)

    def place_in_mesh(rank: int, expert_parallel_group: Any) -> int:
        """As NxD's, which reads the mesh off an XLA group."""
        return next(ranks.index(rank) for ranks in meshes.ep_model_groups if rank in ranks)

    parallel_state.get_expert_parallel_rank_from_global_rank = place_in_mesh


def build(configuration: Run) -> Any:
    """The application with weights, as `to_cpu` leaves it."""
    import torch
    import torch.distributed as dist
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trace.trace import get_sharded_checkpoint

    from neuron_minimax.backends.nxdi import imports
    from neuron_minimax.backends.nxdi.application import application_class
    from neuron_minimax.backends.nxdi.config import read_config
    from neuron_minimax.backends.nxdi.options import MOE_SETTINGS, quantization_options
    from neuron_minimax.config import ModelConfig
    from tests.neuron.cases import LENGTHS, SEQ_LEN

    options = {
        "on_cpu": True,
        "torch_dtype": getattr(torch, configuration.dtype),
        "attn_kernel_enabled": False,
        "logical_nc_config": 1,
        "enable_bucketing": False,
        "batch_size": len(LENGTHS),
        "seq_len": SEQ_LEN,
        "max_context_length": SEQ_LEN,
        "tp_degree": configuration.tp_degree,
        "moe_tp_degree": configuration.moe_tp_degree,
        "moe_ep_degree": configuration.moe_ep_degree,
        **MOE_SETTINGS,
    }
    if configuration.stock:
        application = stock_application(configuration.directory, options)
    else:
        options |= quantization_options(configuration.directory) | configuration.options
        application_cls = application_class(ModelConfig.from_dir(configuration.directory).family)
        config = application_cls.get_config_cls()(
            imports.MoENeuronConfig(**options),
            load_config=read_config(configuration.directory),
            expert_kernel=configuration.expert_kernel,
            expert_scales=configuration.expert_scales,
            expert_placement=configuration.expert_placement,
        )
        application = application_cls(configuration.directory, config)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=configuration.tp_degree, skip_collective_init=True
    )
    if configuration.moe_ep_degree > 1:
        gloo_expert_groups(configuration.moe_tp_degree, configuration.moe_ep_degree)
    if configuration.through_load_module:
        parallel_state.set_aot_mode(True)
        instance = application.models[0].get_model_instance()
        instance.config = application.config
        instance.neuron_config = application.neuron_config
        instance.load_module()
        module = instance.module
        parallel_state.set_aot_mode(False)
    else:
        module = application.models[0].model_cls(application.config)
    state = application.checkpoint_loader_fn()
    get_sharded_checkpoint(state, module, dist.get_rank(), configuration.tp_degree)
    module.load_state_dict(state, strict=False)
    for wrapper in application.models:
        wrapper.model = module
    return application.eval()


def stock_application(directory: str, options: dict[str, Any]) -> Any:
    """NxDI's own application of the checkpoint's model type; its layer markers, which call the
    compiler on a CPU too, are left out.
    """
    import importlib

    import torch
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    from neuron_minimax.backends.nxdi import imports
    from tests.neuron.standins import stand_in_for

    # A kernel that NxDI's dense MLP imports and runs on devices only. nki-library d2ad3a57 has a
    # part of its docstring twice (line 203: IndentationError).
    stand_in_for("nkilib.core.mlp.mlp")
    model_type = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    package = f"neuronx_distributed_inference.models.{model_type}.modeling_{model_type}"
    module = importlib.import_module(package)
    for marker in ("ModuleMarkerStartWrapper", "ModuleMarkerEndWrapper"):
        if hasattr(module, marker):
            setattr(module, marker, torch.nn.Identity)
    name = {"qwen3_moe": "NeuronQwen3MoeForCausalLM"}.get(
        model_type, f"Neuron{model_type.capitalize()}ForCausalLM"
    )
    # With the method that NxDI 0.8 calls in CPU mode and has not.
    application_cls = type(name, (getattr(module, name), imports.CausalLM), {})
    config_cls = application_cls.get_config_cls()
    if model_type != "qwen3_moe":
        options = {name: value for name, value in options.items() if "moe" not in name}
    config = config_cls(
        config_cls.get_neuron_config_cls()(**options),
        load_config=load_pretrained_config(directory),
    )
    return application_cls(directory, config)


def generate(application: Any) -> dict[str, Any]:
    """Greedy continuation of the four prompts as one right-padded batch."""
    import torch

    from tests.neuron.cases import LENGTHS, STEPS, prompts

    texts = prompts(application.config.vocab_size)
    longest = max(LENGTHS)
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(longest) < lengths).long()
    positions = torch.where(mask.bool(), torch.arange(longest), 1)
    slots = torch.arange(len(texts))
    rows = []
    chosen = []
    with torch.no_grad():
        for step in range(STEPS + 1):
            answer = application(
                input_ids=ids, attention_mask=mask, position_ids=positions, seq_ids=slots
            )
            logits = answer.logits[:, -1, : application.config.vocab_size]
            rows.append(logits.float())
            chosen.append(logits.argmax(-1))
            ids = chosen[-1][:, None]
            positions = lengths + step
            mask = (torch.arange(int(positions.max())) < positions).long()
    module = application.models[0].model
    routers = {name: tensor for name, tensor in module.state_dict().items() if ".router." in name}
    return {
        "tokens": torch.stack(chosen, 1),
        "logits": torch.stack(rows, 1),
        "routers": routers,
    }


def held(module: Any) -> dict[str, Any]:
    """Dtype and shape of every entry of the state dict; bytes of every weight, each once."""
    return {
        "parameters": {
            name: (str(tensor.dtype), list(tensor.shape))
            for name, tensor in module.state_dict().items()
        },
        "bytes": {
            name: tensor.nbytes
            for name, tensor in module.named_parameters()
            if not name.startswith("kv_mgr.")
        },
    }


def interpret_kernel() -> Any:
    """The NKI kernel's module, run by the NumPy interpreter; gives the machine that counts its
    instructions.
    """
    from neuron_minimax.kernels import nki as package
    from tests import nki_interpreter

    name = "neuron_minimax.kernels.nki.expert_mlp"
    module, machine = nki_interpreter.load(ROOT / f"{name.replace('.', '/')}.py")
    sys.modules[name] = module
    vars(package)["expert_mlp"] = module
    return machine


def main() -> None:
    from tests.neuron import standins

    standins.install()
    import torch
    import torch.distributed as dist

    configuration = Run(**json.loads(sys.argv[1]))
    machine = interpret_kernel() if configuration.expert_kernel == "nki" else None
    application = build(configuration)
    result = held(application.models[0].model)
    if configuration.forward:
        result |= generate(application)
    result["kernel_matmuls"] = machine.counts["nc_matmul"] if machine else 0
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    dist.barrier()


if __name__ == "__main__":
    main()
