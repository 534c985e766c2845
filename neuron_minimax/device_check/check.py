"""All checks in order: write the probes, have the device run them one after another, judge each
against the CPU.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from neuron_minimax.backends import compile_model
from neuron_minimax.backends.directory import options_module, read_manifest
from neuron_minimax.backends.model_files import fingerprint, model_directory
from neuron_minimax.backends.nxdi.supervise import run_supervised
from neuron_minimax.checkpoint.kinds import Wanted, require
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import Converted
from neuron_minimax.device_check import reference, router, schedule, tokens
from neuron_minimax.device_check.probes import Layer, Probe, write_probe
from neuron_minimax.device_check.reference import Fault, Reference
from neuron_minimax.device_check.run import read_logits
from neuron_minimax.device_check.schedule import Asked, Limits, Round
from neuron_minimax.device_check.verdicts import (
    Expectation,
    KnownFault,
    Report,
    Status,
    Verdict,
    judge_logits,
)
from neuron_minimax.errors import BackendError, ConversionError, NeuronMiniMaxError, counted
from neuron_minimax.families import Role
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.progress import SILENT, Progress

CHECKED = ("neuron", "cpu")  # backends
RUN_SECONDS = 1800.0
LOG_NAME = "run.log"


# Runs the model in a directory: writes the logits that the second file asks for into the third.
Run = Callable[[Path, Path, Path], None]


class Device(Protocol):
    """Runs models, each in a process of its own.

    Raises BackendError when one fails, crashes or hangs.
    """

    def run_probe(self, probe: Path, asked: Path, logits: Path) -> None:
        """Compile a probe, unless that was done, and run it."""

    def run(self, traced: Path, asked: Path, logits: Path) -> None:
        """Run a compiled model."""


@dataclass(frozen=True, kw_only=True)
class CompiledDevice:
    """A backend's compile of each probe, run by a process of its own that may crash or hang.

    `options` are the backend's; compiled directories lie in `work` and are made once.
    """

    work: Path
    backend: str
    options: Mapping[str, Any]
    progress: Progress
    command: Sequence[str] = (sys.executable, "-m", "neuron_minimax.device_check.run")
    limit: float = RUN_SECONDS

    def run_probe(self, probe: Path, asked: Path, logits: Path) -> None:
        traced = self.work / "traced" / probe.name
        compile_model(
            probe, traced, backend=self.backend, options=self.options, progress=self.progress
        )
        self.run(traced, asked, logits)

    def run(self, traced: Path, asked: Path, logits: Path) -> None:
        with self.progress.stage(f"running {traced}") as advance:
            run_supervised(
                [*self.command, str(traced), str(asked), str(logits)],
                os.environ,
                logits.with_name(LOG_NAME),
                lambda line: advance(doing=line),
                limit=self.limit,
                what="the run on the device",
            )


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """The shapes to check; `compute` is the device's dtype, in which the CPU computes too."""

    layer: int
    slots: int
    seq_len: int
    buckets: tuple[int, ...]
    tp_degree: int = 1
    compute: str = "bf16"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of a probe: what is asked, the faults it has to see, and the words for a failure
    without a cause.
    """

    name: str
    probe: Probe
    rounds: Callable[[Limits], list[Round]]
    faults: Callable[[Decoder, int], list[Fault]] = lambda model, tp_degree: []
    if_wrong: str = ""
    next_step: str = ""
    needs: tuple[str, ...] = field(default=())  # checks of parts that this one contains


CHECKS = (
    Check(name=router.CHECK, probe=Probe.ROUTER, rounds=schedule.router_rounds),
    Check(
        name="value and output projection",
        probe=Probe.ATTENTION,
        rounds=schedule.value_rounds,
        faults=lambda model, tp_degree: reference.value_faults(model),
        if_wrong="no known fault explains it: the shards of the value or output projection, or "
        "the sum over ranks",
        next_step="repeat with --tp-degree 1; then look at the head layout (planner/sharding.py)",
    ),
    Check(
        name="QK norm",
        probe=Probe.ATTENTION,
        rounds=schedule.attention_rounds,
        faults=reference.attention_faults,
        if_wrong="no known fault explains it: mask, cache writes, positions, or the query and "
        "key projections",
        next_step=(
            "where context encoding is right and token generation wrong, look at the cache and the "
            "norm of one token; where both are, at the reduction of the norm over ranks and at RoPE"
        ),
        needs=("value and output projection",),
    ),
    Check(
        name="one layer",
        probe=Probe.LAYER,
        rounds=schedule.layer_rounds,
        faults=lambda model, tp_degree: reference.expert_faults(model),
        if_wrong=(
            "router and attention are right, so what is left is the experts: their weights, block "
            "scales, the two halves of {gate_up}, or the expert kernel"
        ),
        next_step="repeat with --expert-kernel torch, then with another --moe-tp-degree",
        needs=(router.CHECK, "value and output projection", "QK norm"),
    ),
)


def check_device(
    converted: Path,
    work: Path,
    options: Mapping[str, Any],
    *,
    backend: str = "neuron",
    layer: int = 0,
    traced: Path | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Compile and run the probes of one layer on this machine's device, then the full model in
    `traced` if given.

    `options` are the backend's, None counts as absent. On backend "cpu" it is a rehearsal. Raises
    BackendError for options that cannot work or packages that are missing, and what `run_checks`
    raises.
    """
    require(converted, Wanted.CONVERTED, ConversionError)
    config = ModelConfig.from_dir(converted)
    if not config.family.has(Role.ROUTER_BIAS):
        raise BackendError(
            f"{converted} is {config.family.title}; the probes are of layers whose router has a "
            "bias, as MiniMax-M2's: compile the model itself, and compare its first tokens with "
            "the CPU backend's"
        )
    module = options_module(backend)
    if backend not in CHECKED:
        raise BackendError(
            f"there are no probes for --backend {backend}; expected {' or '.join(CHECKED)}",
            usage=True,
        )
    resolved = module.check_options(config, options)
    module.environment(resolved)
    if traced is not None and read_manifest(traced).checkpoint != fingerprint(
        Converted.open(converted, read_shards=False)
    ):
        raise BackendError(
            f"{traced} was compiled from another directory than {converted}; give the one it came "
            "from"
        )
    request = CheckRequest(
        layer=layer,
        slots=resolved["slots"],
        seq_len=resolved["seq_len"],
        buckets=tuple(resolved["buckets"]),
        tp_degree=resolved.get("tp_degree", 1),
        compute=resolved.get("compute", "bf16"),
    )
    asked = {**options, **resolved}
    if backend == "neuron":  # the probes' graphs are equal, so only the first is compiled
        asked["compiler_cache"] = str(work.resolve() / "compiler_cache")
    device = CompiledDevice(work=work, backend=backend, options=asked, progress=progress)
    return run_checks(converted, work, request, device, full_model=traced, progress=progress)


def run_checks(
    converted: Path,
    work: Path,
    request: CheckRequest,
    device: Device,
    *,
    full_model: Path | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Run all checks on a device; a check that contains what has failed is skipped.

    `full_model` is a compiled directory, for the first tokens. Probes, compiled probes and logits
    lie in `work`. Raises ConversionError, BackendError or GenerationError for an input that nothing
    can be checked with.
    """
    layer = Layer(converted, request.layer)
    limits = Limits(
        slots=request.slots,
        seq_len=request.seq_len,
        buckets=request.buckets,
        vocabulary=layer.vocabulary,
    )
    if work.resolve().is_relative_to(converted.resolve()) or converted.resolve().is_relative_to(
        work.resolve()
    ):
        raise ConversionError(
            f"{work} and the converted directory {converted} lie in each other; choose another "
            "work directory"
        )
    prompts = [] if full_model is None else _prompts_of(full_model)
    verdicts: list[Verdict] = []
    for check in CHECKS:
        verdict = _skipped(check.name, check.needs, verdicts)
        if verdict is None:
            with progress.stage(check.name):
                verdict = _run_check(check, layer, limits, request, device, work)
        verdicts.append(verdict)
    if full_model is not None:
        verdict = _skipped(tokens.CHECK, ("one layer",), verdicts)
        if verdict is None:
            with progress.stage(tokens.CHECK):
                answer = _answer_directory(work, tokens.CHECK)
                asked = Asked(prompts=tuple(map(tuple, prompts)), tokens=tokens.TOKENS)
                asked.write(answer / "asked.json")
                found_PTV = _ask(device.run, full_model, answer, tokens.CHECK)
                verdict = _first_tokens(converted, prompts, request.compute, found_PTV)
        verdicts.append(verdict)
    title = (
        f"layer {request.layer} of {converted}: {counted(request.slots, 'slot')}, "
        f"tp {request.tp_degree}, {request.compute}"
    )
    return Report(title=title, verdicts=tuple(verdicts))


def _prompts_of(full_model: Path) -> list[list[int]]:
    return tokens.read_prompts(model_directory(full_model, read_manifest(full_model)))


def _answer_directory(work: Path, check: str) -> Path:
    directory = work / "answers" / check.replace(" ", "-")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _skipped(name: str, needs: Sequence[str], verdicts: Sequence[Verdict]) -> Verdict | None:
    """The verdict of a check that holds parts which have failed, or were not checked; None when
    all are right.
    """
    missing = [
        verdict.check
        for verdict in verdicts
        if verdict.check in needs and verdict.status is not Status.PASS
    ]
    if not missing:
        return None
    return Verdict(
        check=name,
        status=Status.SKIPPED,
        finding=f"it contains what has not passed before: {', '.join(missing)}",
        next_step="mend that first",
    )


def _run_check(
    check: Check, layer: Layer, limits: Limits, request: CheckRequest, device: Device, work: Path
) -> Verdict:
    probe = work / f"{check.probe}-layer{layer.number}"
    write_probe(layer, check.probe, probe)
    rounds = check.rounds(limits)
    expected = Reference(probe, limits, request.compute)
    logits_NV, inputs_NH = expected.run(rounds)
    answer = _answer_directory(work, check.name)
    Asked(rounds=tuple(rounds)).write(answer / "asked.json")
    found_NV = _ask(device.run_probe, probe, answer, check.name)
    if isinstance(found_NV, Verdict):
        return found_NV
    rows = schedule.rows_of(rounds)
    case = _router_case(layer, inputs_NH)
    if check.probe is Probe.ROUTER:
        experts = layer.config.num_local_experts
        read_NE = (logits_NV[:, :experts], found_NV[:, :experts])
        return router.judge_router(case, rows, read_NE, found_NV)
    float32_NV = (
        logits_NV
        if request.compute == "float32"
        else Reference(probe, limits, "float32").run(rounds)[0]
    )
    everything = check.probe is Probe.LAYER
    compared_N = (
        ~case.choice().near_tie_N if everything else torch.ones(len(rows), dtype=torch.bool)
    )

    def with_fault(fault: Fault, *, only_steps: bool) -> torch.Tensor:
        return Reference(probe, limits, request.compute, fault, only_steps=only_steps).run(rounds)[
            0
        ]

    faults = [
        KnownFault(
            fault=fault,
            logits_NV=with_fault(fault, only_steps=False),
            only_steps=partial(with_fault, fault, only_steps=True),
        )
        for fault in check.faults(expected.generation_model, request.tp_degree)
    ]
    expectation = Expectation(
        check=check.name,
        rows=rows,
        logits_NV=logits_NV,
        float32_NV=float32_NV,
        compute=request.compute,
        compared_N=compared_N,
        faults=faults,
        if_wrong=check.if_wrong.format(gate_up=layer.config.family.module_name(Role.EXPERT_GATE)),
        next_step=check.next_step,
    )
    return judge_logits(expectation, found_NV)


def _router_case(layer: Layer, inputs_NH: torch.Tensor) -> router.RouterCase:
    gate, bias = (
        layer.tensors.tensor(layer.name_of(role)).float()
        for role in (Role.ROUTER, Role.ROUTER_BIAS)
    )
    return router.RouterCase(
        bias_name=layer.config.family.weight_of(Role.ROUTER_BIAS).module,
        gate_EH=gate,
        bias_E=bias,
        inputs_NH=inputs_NH,
        experts_per_token=layer.config.num_experts_per_tok,
    )


def _ask(run: Run, model: Path, answer: Path, name: str) -> torch.Tensor | Verdict:
    """The device's logits, or a failure when it could not give them."""
    logits = answer / "logits.safetensors"
    logits.unlink(missing_ok=True)
    try:
        run(model, answer / "asked.json", logits)
        return read_logits(logits)
    except (NeuronMiniMaxError, FileNotFoundError) as error:
        return Verdict(
            check=name,
            status=Status.FAIL,
            finding="the device gave no logits",
            meaning=str(error),
            next_step=f"read the log in {answer} or in the compile's graphs directory, mend it "
            "and run again: "
            "what is compiled is not compiled again",
        )


def _first_tokens(
    converted: Path,
    prompts: Sequence[Sequence[int]],
    compute: str,
    found_PTV: torch.Tensor | Verdict,
) -> Verdict:
    if isinstance(found_PTV, Verdict):
        return found_PTV
    answers_PT = found_PTV.argmax(-1)
    expected_PTV = tokens.cpu_logits(converted, prompts, answers_PT, compute)
    float32_PTV = expected_PTV
    if compute != "float32":
        float32_PTV = tokens.cpu_logits(converted, prompts, answers_PT, "float32")
    return tokens.judge_tokens(found_PTV, expected_PTV, float32_PTV)
