"""The saved state of a run: one file with everything that the next step depends on, replaced whole,
and read as data alone. Earlier ones are kept beside it.
"""

import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from neuron_minimax.checkpoint.kinds import STATE_NAME
from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.families import DEFAULT_FAMILY
from neuron_minimax.files import open_regular
from neuron_minimax.processes import first_signal_noted
from neuron_minimax.training.options import CHANGEABLE, Change

KEPT_NAME = re.compile(r"training_state\.([0-9]{1,9})\.pt")
# What a state says of a config's field that the version which saved it did not know.
CONFIG_DEFAULTS: dict[str, Any] = {
    "model_type": DEFAULT_FAMILY.model_type,
    "family": DEFAULT_FAMILY.name,
    **{each.name: each.default for each in fields(ModelConfig) if each.default is not MISSING},
}
# What a state says of an option that the version which saved it did not have.
OPTION_DEFAULTS: dict[str, Any] = {"seq_aux": True, "fp16": False}
# How earlier versions named the epochs, where the last step had fewer sequences, and a single row.
EPOCHS = re.compile(r", ([0-9,]+) epochs?$")
ONE = re.compile(r"\b1 (row|sequence)s\b")
# What AdamW keeps of a parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")
# What GradScaler keeps of FP16's loss scale, beside its options.
SCALER_STATE = ("scale", "_growth_tracker")
# The content of what a run was made from, in the options of a state, and the option that gives it.
INPUTS = {
    "data_sha256": "--data",
    "tokenizer_sha256": "--tokenizer",
    "initial_fingerprint": "--initial",
}
# What earlier versions did not record is taken for the same.
MAY_BE_MISSING = (*INPUTS, "epochs")
WHAT_TO_TRY = (
    "try --on-bad-step skip, or --from-step STEP of a kept state with a lower --learning-rate"
)
START_AGAIN = "put a copy back, take a kept one with --from-step, or remove it to start again"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A run after `step` steps. `options` say which run; `optimizer` is AdamW's state.

    `history` has the loss of every step, those included that were `skipped` (counted from 1), which
    may be no number; `overflows` are those of the skipped that found FP16's scale. `evaluations`
    are pairs of a step and the loss on held-out rows, `changes` what options the run was given on
    the way, `scaler` the state of FP16's loss scale.
    """

    step: int
    history: list[float]
    options: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random_state: torch.Tensor
    skipped: list[int] = field(default_factory=list)
    overflows: list[int] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    scaler: dict[str, float] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name of every tensor that has to be finite, and the tensor."""
        yield from self.model.items()
        for number, kept in self.optimizer["state"].items():
            yield from ((f"{name} of parameter {number}", kept[name]) for name in MOMENTS)

    def first_not_finite(self) -> str | None:
        """Return the name of a tensor that holds an infinity or NaN."""
        found = (name for name, tensor in self.tensors() if not bool(tensor.isfinite().all()))
        return next(found, None)


def save_state(directory: Path, state: TrainingState, kept: int) -> None:
    """Replace the state on disk; the final name only ever holds a whole, synced file.

    Raises TrainingError when the state is not finite, or cannot be written; then the state of step
    `kept` stays.
    """
    path = directory / STATE_NAME
    stays = f"the state of step {kept} is kept" if kept else "no state was saved before"
    name = state.first_not_finite()
    if name is not None:
        raise TrainingError(f"after step {state.step} {name} is not finite; {stays}: {WHAT_TO_TRY}")
    # torch would wrap what goes wrong while it writes into a file of ours, and an interruption.
    buffer = io.BytesIO()
    with first_signal_noted():
        changes = [asdict(change) for change in state.changes]
        torch.save({**vars(state), "changes": changes}, buffer)
    try:
        with replacing(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written at step {state.step} ({error.strerror}); {stays}: mend it "
            "and run the same command again"
        ) from None


def keep_state(directory: Path, step: int) -> None:
    """Give the saved state, of step `step`, a second name that the next save leaves alone.

    One that has the name stays: it was gone on from. Raises TrainingError where the file system
    knows no second names.
    """
    path = directory / STATE_NAME
    kept = _kept_path(directory, step)
    try:
        os.link(path, kept)
    except FileExistsError:
        return
    except OSError as error:
        raise TrainingError(
            f"{kept} cannot be made ({error.strerror}); --keep 1 keeps the last state alone"
        ) from None


def forget_states(directory: Path, step: int, count: int) -> None:
    """Leave `count` states before that of step `step`, the last one, and none behind it: those are
    of another way.
    """
    latest_first = sorted(kept_steps(directory), reverse=True)
    stay = [each for each in latest_first if each < step][:count]
    for each in latest_first:
        if each not in stay:
            _kept_path(directory, each).unlink(missing_ok=True)


def kept_steps(directory: Path) -> list[int]:
    """Return the steps of the states that are kept beside the last one, in order."""
    matches = (KEPT_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _kept_path(directory: Path, step: int) -> Path:
    return directory / f"training_state.{step}.pt"


def load_state(
    directory: Path,
    options: Mapping[str, Any],
    model: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    from_step: int | None = None,
) -> TrainingState | None:
    """Return the saved state, or None where there is none. It has the tensors of `model`, and all
    that the `optimizer` keeps of its parameters. With `from_step` it is the one of that step.

    Raises TrainingError when a run with other `options` saved it, since going on would be neither
    run, and when it is damaged, is not finite, or does not fit the model. A run may be lengthened;
    with `from_step` the options of CHANGEABLE may differ too.
    """
    path = directory / STATE_NAME
    if from_step is None:
        return _load(path, options, model, optimizer)
    kept = _kept_path(directory, from_step)
    found = _load(kept if kept.exists() else path, options, model, optimizer, CHANGEABLE)
    if found is None or found.step != from_step:
        steps = {*kept_steps(directory), *(() if found is None else (found.step,))}
        raise TrainingError(
            f"{directory} has no state of step {from_step}; expected one of "
            f"{', '.join(map(str, sorted(steps))) or 'none, as nothing is saved'}"
        )
    return found


def _load(
    path: Path,
    options: Mapping[str, Any],
    model: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    may_differ: Collection[str] = (),
) -> TrainingState | None:
    try:
        with open(open_regular(path), "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a damaged file
            _require_digests(zipfile.ZipFile(file))
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # of whatever a damaged file makes of the reader
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"{path} cannot be read ({first}); {START_AGAIN}") from None
    try:
        saved = _typed(_typed(contents, dict)["options"], dict)
        require_same_run(path, saved, options, may_differ)
        state = _parsed(contents, model, optimizer)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise TrainingError(f"{path} cannot be used ({problem}); {START_AGAIN}") from None
    name = state.first_not_finite()
    if name is not None:
        raise TrainingError(
            f"{path} holds {name} that is not finite; {START_AGAIN}, with a lower --learning-rate"
        )
    return state


def _require_digests(archive: zipfile.ZipFile) -> None:
    """Raise ValueError when a record is not as its digest says, which torch does not compare."""
    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
        raise ValueError("it is compressed")
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it has other bytes than were written")


def require_same_run(
    path: Path,
    saved: Mapping[str, Any],
    options: Mapping[str, Any],
    may_differ: Collection[str] = (),
) -> None:
    """Raise TrainingError naming an option that differs from that of the run which wrote `path`.

    More steps lengthen a run, as more epochs do that make some.
    """
    found = differences(saved, options)
    longer = ("steps", "epochs") if any(map(_lengthens, found)) else ()
    for change in found:
        if change.name in (*longer, *may_differ):
            continue
        if change.name in INPUTS:
            raise TrainingError(
                f"{path} belongs to a run {_other_input(change, saved, options)} to resume the "
                "run, or give another output directory"
            )
        raise TrainingError(
            f"{path} belongs to a run with {change.name} {json.dumps(change.before)}, not "
            f"{json.dumps(change.after)}; "
            "give the same options to resume it, or another output directory"
        )


def _other_input(change: Change, saved: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Say what a run was made from, and what to do; an input that it had not is empty."""
    option = INPUTS[change.name]
    if not change.before:
        return f"without {option}; leave it out"
    if not change.after:
        return f"with {option}, which is left out; give it"
    then = ""
    if change.name == "data_sha256":
        then = f" (it was {saved.get('source')}; it is {options.get('source')})"
    return f"with another content of {option}{then}; put that back"


def differences(saved: Mapping[str, Any], options: Mapping[str, Any]) -> list[Change]:
    """Return the options that are not as they were saved, sorted by name."""
    before = _flat(saved, CONFIG_DEFAULTS)
    now = _flat(options, {})
    found = []
    for name in sorted(now):
        value = before.get(name, now[name] if name in MAY_BE_MISSING else None)
        if value != now[name]:
            found.append(Change(step=0, name=name, before=value, after=now[name]))
    return found


def _lengthens(change: Change) -> bool:
    numbers = (change.before, change.after)
    return change.name == "steps" and all(map(_is_number, numbers)) and numbers[0] < numbers[1]


def _flat(options: Mapping[str, Any], config_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return each option, and field of the config, as JSON has it."""
    config = options.get("config")
    fields = {**config_defaults, **(config if isinstance(config, dict) else {})}
    flat = {**OPTION_DEFAULTS, **options, **{f"config.{name}": fields[name] for name in fields}}
    del flat["config"]
    mean_over_layers = flat.pop("balance_coefficient", None)  # of versions before aux_loss_alpha
    if isinstance(mean_over_layers, float):
        flat.setdefault("aux_loss_alpha", mean_over_layers / fields["num_hidden_layers"])
    flat |= _parsed_source(flat.get("source"))
    return {name: json.loads(json.dumps(value, default=str)) for name, value in flat.items()}


def _parsed_source(source: Any) -> dict[str, Any]:
    """Return a source's name as it is written now, and the epochs that it had in it before."""
    if not isinstance(source, str):
        return {}
    epochs = EPOCHS.search(source)
    found = {"source": ONE.sub(r"1 \1", EPOCHS.sub("", source))}
    return found if epochs is None else {**found, "epochs": int(epochs[1].replace(",", ""))}


def _parsed(
    contents: dict[str, Any], model: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> TrainingState:
    """Raises KeyError, TypeError or ValueError."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    step = _typed(contents["step"], int)
    history = [_typed(loss, float) for loss in _typed(contents["history"], list)]
    if step < 1 or len(history) != step:
        raise ValueError(f"it has losses of {counted(len(history), 'step')}, and says {step}")
    scaler = _typed(contents.get("scaler", {}), dict)  # this and four more came later
    if scaler.keys() - {*SCALER_STATE} or not all(map(_is_number, scaler.values())):
        raise ValueError("the state of its loss scale is none")
    weights = _typed(contents["model"], dict)
    if weights.keys() != model.keys():
        raise ValueError("its model has other tensors")
    saved = _typed(_typed(contents["optimizer"], dict)["state"], dict)
    skipped = [_typed(each, int) for each in _typed(contents.get("skipped", []), list)]
    # AdamW keeps nothing before its first step.
    numbers = range(len(parameters) if len(skipped) < step else 0)
    if saved.keys() != {*numbers}:
        raise ValueError("its optimizer has other parameters")
    moments = {}
    for number in numbers:
        parameter = parameters[number]
        kept = _typed(saved[number], dict)
        moments[number] = {
            "step": _like("the number of steps", kept["step"], torch.tensor(0.0)),
            **{name: _like(name, kept[name], parameter) for name in MOMENTS},
        }
    return TrainingState(
        step=step,
        history=history,
        options=contents["options"],
        model={name: _like(name, weights[name], tensor) for name, tensor in model.items()},
        optimizer={"state": moments, "param_groups": optimizer.state_dict()["param_groups"]},
        random_state=_like("random_state", contents["random_state"], torch.get_rng_state()),
        skipped=skipped,
        overflows=[_typed(each, int) for each in _typed(contents.get("overflows", []), list)],
        evaluations=[
            (_typed(at, int), _typed(loss, float))
            for at, loss in _typed(contents.get("evaluations", []), list)
        ],
        changes=[
            Change(
                step=_typed(change["step"], int),
                name=_typed(change["name"], str),
                before=change["before"],
                after=change["after"],
            )
            for change in _typed(contents.get("changes", []), list)
        ],
        scaler=scaler,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"a {type(value).__name__} is where a {kind.__name__} belongs")
    return value


def _like(name: str, value: Any, wanted: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, not a tensor")
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        )
    return value
