"""Trace one layer of the published size as a device compile does, rank 0 of a mocked world, and
record the graphs.

`python -m tests.neuron.tracing CASE` prints one case as JSON; without a case it traces all that
belong to the SDK of the NxDI that is there, and writes them into tests/data/neuron_traces.json.
Needs NxDI, NxD and the real torch_xla (docs/neuron_proof.md); closed kernels are custom calls
(tests/neuron/standins/kernels.py). Weights are never read: a graph has names and shapes only.
"""

import ast
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRACES = ROOT / "tests" / "data" / "neuron_traces.json"
# What decides the graphs, of this project; and what the closed packages are stood in for with.
SOURCES = (
    "neuron_minimax/backends/nxdi/*.py",
    "neuron_minimax/config.py",
    "neuron_minimax/families/*.py",
    "neuron_minimax/kernels/nki/*.py",
    "neuron_minimax/kernels/reference.py",
    "neuron_minimax/model/rope.py",
    "neuron_minimax/planner/blockwise.py",
    "neuron_minimax/planner/memory.py",
    "neuron_minimax/planner/sharding.py",
    "tests/neuron/standins/*.py",
)
CONTEXT_ENCODING = "context_encoding_model"
TOKEN_GENERATION = "token_generation_model"
BYTES = {
    "f64": 8,
    "s64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f8e4m3fn": 1,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A Python number that torch_xla carries as data; torch_neuronx makes it a constant.
SCALAR = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compile: what `neuron-minimax compile` is given, and which of its submodels to trace."""

    instance: str
    degrees: tuple[int, int, int]  # tp, moe_tp, moe_ep
    batch: int
    buckets: tuple[int, ...]
    seq_len: int = 1024
    blockwise_matmul: str = "torch"
    expert_kernel: str = "torch"
    submodels: tuple[str, ...] = (CONTEXT_ENCODING, TOKEN_GENERATION)
    overrides: Mapping[str, Any] = field(default_factory=dict)  # NeuronConfig fields


TRN2: dict[str, Any] = {
    "instance": "trn2.48xlarge",
    "degrees": (64, 1, 64),
    "batch": 32,
    "buckets": (256, 1024),
}
CONTEXT: dict[str, Any] = {"submodels": (CONTEXT_ENCODING,)}
STEPS: dict[str, Any] = {"submodels": (TOKEN_GENERATION,), "buckets": (1024,)}
# Experts split by channels alone, down to parts of blocks, for one sequence.
SPLIT: dict[str, Any] = {"batch": 1, "buckets": (128,)}
SAMPLING = {
    "on_device_sampling_config": {"do_sample": True, "top_k": 40, "top_p": 0.95, "dynamic": True}
}
CASES = {
    "trn2": Case(**TRN2),
    "trn2 shard_on_intermediate": Case(**TRN2, **CONTEXT, blockwise_matmul="shard_on_intermediate"),
    "trn2 shard_on_block": Case(**TRN2, **CONTEXT, blockwise_matmul="shard_on_block"),
    "trn2 batch 128": Case(**TRN2 | STEPS | {"batch": 128}),
    "trn2 nki batch 1": Case(**TRN2 | STEPS | {"batch": 1}, expert_kernel="nki"),
    "trn2 nki": Case(**TRN2 | STEPS, expert_kernel="nki"),
    "trn2 nki batch 128": Case(**TRN2 | STEPS | {"batch": 128}, expert_kernel="nki"),
    "trn2 sampling": Case(**TRN2 | STEPS, overrides=SAMPLING),
    "trn2 tensor parallel": Case(**TRN2 | SPLIT | {"degrees": (64, 64, 1)}),
    "trn2 tensor parallel nki": Case(
        **TRN2 | SPLIT | STEPS | {"degrees": (64, 64, 1)}, expert_kernel="nki"
    ),
    "trn1": Case(instance="trn1.32xlarge", degrees=(32, 2, 16), batch=32, buckets=(256,)),
    "trn1 tensor parallel": Case(instance="trn1.32xlarge", degrees=(32, 32, 1), **STEPS | SPLIT),
    "inf2": Case(instance="inf2.48xlarge", degrees=(24, 3, 8), batch=32, buckets=(256,)),
}


@dataclass(frozen=True)
class Instruction:
    """One line of HLO text: a tuple's result is its first part's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: str
    operands: tuple[str, ...]
    line: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES.get(self.dtype, 4)

    @property
    def type(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = \(?(\w+)\[([\d,]*)\][^=]*? ([a-z][\w-]*)\((.*)$"
)


def instructions(hlo: str) -> list[Instruction]:
    """The entry computation of HLO text."""
    found = []
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        match = INSTRUCTION.match(line)
        if match:
            name, dtype, shape, operation, rest = match.groups()
            sizes = tuple(int(size) for size in shape.split(",") if size)
            operands = tuple(re.findall(r"%([\w.-]+)", rest.split("), ")[0]))
            found.append(Instruction(name, dtype, sizes, operation, operands, line))
    return found


def describe(hlo: str) -> dict[str, Any]:
    """What a graph does: operators, custom calls, products, collectives, float64, and its largest
    tensor.
    """
    entry = instructions(hlo)
    by_name = {instruction.name: instruction for instruction in entry}

    def operands(instruction: Instruction) -> str:
        types = [by_name[name].type for name in instruction.operands if name in by_name]
        return f"{' '.join(types)} -> {instruction.type}"

    computed = [
        instruction
        for instruction in entry
        if instruction.operation not in ("parameter", "constant", "tuple")
    ]
    calls = [instruction for instruction in entry if instruction.operation == "custom-call"]
    targets = [re.search(r'custom_call_target="([^"]*)"', call.line) for call in calls]
    largest = max(computed, key=lambda instruction: instruction.nbytes)
    return {
        "operators": counted(instruction.operation for instruction in entry),
        "custom calls": counted(
            f"{target[1]} {operands(call)}"
            for target, call in zip(targets, calls, strict=True)
            if target
        ),
        "products": counted(
            operands(instruction) for instruction in entry if instruction.operation == "dot"
        ),
        "collectives": [
            f"{instruction.operation} {operands(instruction)} over {group_of(instruction.line)}"
            for instruction in entry
            if instruction.operation in COLLECTIVES
        ],
        "float64": counted(
            f"{instruction.operation} {instruction.type}"
            for instruction in computed
            if instruction.dtype == "f64"
        ),
        "largest": [largest.operation, largest.type, largest.nbytes],
        "router": [
            f"{instruction.operation} {instruction.type}"
            for instruction in entry
            if instruction.operation in ("logistic", "sort", "topk") and 256 in instruction.shape
        ],
    }


def counted(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def group_of(line: str) -> str:
    """The first group of ranks that a collective spans, and how many groups there are."""
    groups = re.findall(r"\{([\d,]+)\}", line.partition("replica_groups=")[2].split("}}")[0] + "}")
    ranks = groups[0].split(",")
    return f"{len(ranks)} ranks ({ranks[0]}, {', '.join(ranks[1:2])}..) in {len(groups)} groups"


def trace(case: Case, directory: Path) -> dict[str, Any]:
    """Every wanted submodel and bucket of a case: {"submodel bucket": description}."""
    import torch

    from neuron_minimax.backends.nxdi.options import NeuronOptions, environment
    from neuron_minimax.planner.settings import default_buckets
    from tests.full_size import published_config
    from tests.neuron.standins import operations

    operations.OPAQUE = True
    raw = published_config() | {"num_hidden_layers": 1, "neuron_minimax": {}}
    raw["quantization_config"]["modules_to_not_convert"] = [
        "lm_head",
        "embed_tokens",
        "router",
        "norm",
    ]
    (directory / "config.json").write_text(json.dumps(raw))
    tp, moe_tp, moe_ep = case.degrees
    options = NeuronOptions(
        instance=case.instance,
        tp_degree=tp,
        moe_tp_degree=moe_tp,
        moe_ep_degree=moe_ep,
        slots=case.batch,
        seq_len=case.seq_len,
        buckets=case.buckets,
        blockwise_matmul=case.blockwise_matmul,
        expert_kernel=case.expert_kernel,
    )
    # As the process that compiles: NxD reads the chip from them when it is imported.
    os.environ.update(environment(directory, directory, options))
    from neuron_minimax.backends.nxdi.application import make_application

    application = make_application(directory, options, **case.overrides)
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trace.mock_torchdist import mock_distributed

    found = {}
    with mock_distributed(world_size=tp), torch.no_grad():
        torch.distributed.init_process_group(backend="xla", rank=0, world_size=tp)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, skip_collective_init=True
        )
        for wrapper in application.models:
            if wrapper.tag not in case.submodels:
                continue
            lengths = (
                case.buckets if wrapper.tag == CONTEXT_ENCODING else default_buckets(case.seq_len)
            )
            for number, length in enumerate(lengths):
                if wrapper.tag == CONTEXT_ENCODING or length == case.seq_len:
                    found[f"{wrapper.tag} {length}"] = trace_bucket(wrapper, number)
    return found


def trace_bucket(wrapper: Any, number: int) -> dict[str, Any]:
    """One graph: a fresh module on the XLA device, called with NxDI's own example inputs."""
    import torch
    import torch_xla
    import torch_xla.debug.metrics as metrics
    from neuronx_distributed.parallel_layers import parallel_state

    parallel_state.set_aot_mode(True)
    instance = wrapper.get_model_instance()
    instance.load_module()
    function, _ = instance.get(number)
    module = instance.module
    device = torch_xla.device()
    shared = aliases(module)
    module.to(device)
    # Collectives of an earlier graph would come along with the token that torch_xla threads through
    # all of them.
    torch_xla._XLAC._set_all_reduce_token(str(device), None)
    inputs = [value.to(device) for value in wrapper.input_generator()[number]]
    held = dict(module.named_parameters(remove_duplicate=False))
    names = {node: shared[name] for name, tensor in held.items() for node in nodes([tensor])}
    sizes = {shared[name]: tensor.nbytes for name, tensor in held.items()}
    given = {node: index for index, value in enumerate(inputs) for node in nodes([value])}
    metrics.clear_all()
    outputs = [value for value in function(*inputs) if isinstance(value, torch.Tensor)]
    entered, values = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)
    foreign = [
        f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, {content(value)}"
        for node, value in zip(entered, values, strict=True)
        if node not in names and node not in given and tuple(value.shape) != SCALAR
    ]
    bound = sorted({names[node] for node in set(entered) & names.keys()})
    hlo = torch_xla._XLAC._get_xla_tensors_hlo(outputs)
    return {
        **describe(hlo),
        "parameters": {
            name: [str(held[name].dtype).removeprefix("torch."), list(held[name].shape)]
            for name in bound
        },
        "parameter bytes": sum(sizes[name] for name in bound),
        "unbound": sorted(set(shared.values()) - set(bound)),
        "inputs": sorted(given[node] for node in set(entered) & given.keys()),
        "foreign inputs": foreign,
        "fallbacks": sorted(name for name in metrics.counter_names() if name.startswith("aten::")),
    }


def content(value: Any) -> str:
    """What a tensor of trace time holds, where that is the same at every call."""
    import torch

    value = value.cpu()
    if not value.any():
        return "zeros"
    steps, counts = torch.unique_consecutive(value, return_counts=True)
    multiples = torch.arange(len(steps)) * steps[1] if len(steps) > 1 else steps
    if counts.unique().numel() == 1 and torch.equal(steps, multiples.to(steps.dtype)):
        return f"multiples of {steps[1]}, {counts[0]} of each"
    return "values"


def aliases(module: Any) -> dict[str, str]:
    """The first name of every parameter by each of its names: NxD names the weight of a quantized
    layer twice, and on the XLA device they are two tensors.
    """
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name)
        for name, tensor in sorted(
            module.named_parameters(remove_duplicate=False), key=lambda named: "master" in named[0]
        )
    }


def nodes(tensors: Sequence[Any]) -> list[int]:
    """Identities of the data that a graph of these tensors reads."""
    import torch_xla

    return list(torch_xla._XLAC._get_tensors_xla_device_data_node(list(tensors))[0])


def sources_digest() -> str:
    """Digest of the code that decides the graphs, the same with every Python version."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update("\n".join(code_lines(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()


def code_lines(text: str) -> list[str]:
    """The lines of a module as its syntax tree is printed, without docstrings: layout and comments
    do not count.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            del body[0]
    return ast.unparse(tree).splitlines()


def _is_text(statement: Any) -> bool:
    value = getattr(statement, "value", None)
    return (
        isinstance(statement, ast.Expr)
        and isinstance(value, ast.Constant)
        and isinstance(value.value, str)
    )


def run(name: str) -> dict[str, Any]:
    """Trace a case in a process of its own: torch_xla's and NxD's state is global."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.neuron.tracing", name]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    """Versions of what a graph is made with."""
    found = {name: metadata.version(name) for name in ("torch", "torch_xla", "transformers")}
    for name in ("neuronx_distributed", "neuronx_distributed_inference"):
        found[name] = importlib.import_module(f"{name}._version").__version__
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the recorded graphs is not as it was, for somebody to look at."""
    found = [f"{graph} is new" for graph in now if graph not in before]
    for graph in now.keys() & before.keys():
        found += [
            f"{graph}: {what}"
            for what, value in now[graph].items()
            if value != before[graph].get(what)
        ]
    return sorted(found)


def belongs_here(case: Case) -> bool:
    """Whether the NxDI that is there is of the SDK for the case's instance."""
    from neuron_minimax.planner.instances import instance
    from neuron_minimax.planner.sdks import sdk_for

    pinned = sdk_for(instance(case.instance).family).python["neuronx-distributed-inference"]
    return pinned.split(".")[:2] == versions()["neuronx_distributed_inference"].split(".")[:2]


def main(argv: Sequence[str]) -> None:
    import tempfile

    from tests.neuron import standins

    os.environ.pop("NXD_CPU_MODE", None)
    standins.install()
    if argv:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(trace(CASES[argv[0]], Path(directory))))
        return
    document = json.loads(TRACES.read_text(encoding="utf-8")) if TRACES.exists() else {}
    for name, case in CASES.items():
        if belongs_here(case):
            graphs = json.loads(json.dumps(run(name)))
            changed = changes(document.get(name, {}).get("graphs", {}), graphs)
            print(f"{name}: {'; '.join(changed) or 'as before'}")
            document[name] = {"versions": versions(), "sources": sources_digest(), "graphs": graphs}
    TRACES.write_text(
        json.dumps({name: document[name] for name in CASES if name in document}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
