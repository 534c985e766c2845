"""Proof of a conversion: every output taken apart again and compared with its sources, byte by
byte (comparison.py).

From the manifest come the digests, the options and the scale convention; whether that is the
right one the values of the checkpoint say (`neuron-minimax inspect --check-values`).
"""

from dataclasses import dataclass, replace

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.records import damaged_tensors
from neuron_minimax.convert.binding import ConvertedTensor, bind_rules, files_of
from neuron_minimax.convert.comparison import compare_outputs, small_file_differences
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import counted
from neuron_minimax.files import sha256_of
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.progress import Advance, nothing


@dataclass(frozen=True, kw_only=True)
class Verification(Rendered):
    """The number of tensors that were compared, and every difference found."""

    tensors: int
    source_tensors: int
    rounded_codes: int
    differences: tuple[str, ...]
    note: str = ""
    next_step: str = ""

    @property
    def equal(self) -> bool:
        return not self.differences

    def render(self) -> str:
        if self.equal:
            return (
                f"verified: {counted(self.tensors, 'tensor')} equal their "
                f"{self.source_tensors:,} sources; digests match; "
                f"{counted(self.rounded_codes, 'subnormal code')} rounded by halving, each by "
                "2^-9 of its block's stored scale" + (f"\n{self.note}" if self.note else "")
            )
        shown = "\n".join(f"  {difference}" for difference in self.differences[:20])
        return f"NOT equal, {counted(len(self.differences), 'difference')}:\n{shown}" + (
            f"\n{self.next_step}" if self.next_step else ""
        )


def verify(
    source: Checkpoint,
    converted: Converted,
    advance: Advance = nothing,
) -> Verification:
    """Compare a converted directory with the checkpoint it was made of, all of it.

    When all is equal, that and the time stamps of both are recorded in the directory, so that both
    are taken for what was compared here. `advance` is called with the bytes of each output read
    (twice: once for digests, once for values). Raises ConversionError when the directory was made
    of another checkpoint, or a run writes into it.
    """
    source.require_usable()
    converted.require_source(source)
    with converted.reading():
        found = _compare_all(source, converted, advance)
    if found.equal and not converted.accept(source):
        note = "that could not be recorded: the files changed meanwhile, or may only be read"
        found = replace(found, note=note)
    source.files.remove()
    return found


def _compare_all(source: Checkpoint, converted: Converted, advance: Advance) -> Verification:
    stored = converted.tensors
    outputs = bind_rules(
        source.specs, source.config, converted.layout, converted.convention, source.left_out
    )
    wanted = {output.name for output in outputs}
    differences = [
        f"{name} is in the output, but in no rule" for name in stored.entries if name not in wanted
    ]
    damaged = damaged_tensors(stored, converted.records, advance)
    damaged += [
        name
        for name, record in converted.files.items()
        if record.sha256 and sha256_of(converted.directory / name) != record.sha256
    ]
    differences += [f"{name} does not match the digest in its manifest" for name in damaged]
    differences += small_file_differences(source.directory, converted.directory)
    rounded = 0
    shards: dict[str, list[ConvertedTensor]] = {}
    for output in outputs:
        record = converted.records.get(output.name)
        shards.setdefault(record.shard if record else "", []).append(output)
    needs = {shard: files_of(members, source) for shard, members in shards.items()}
    for names in source.files.at_hand(needs):
        group = [output for name in names for output in shards[name]]
        for output, found, count in compare_outputs(group, converted.convention, source, stored):
            differences += found
            differences += _record_differences(converted, output.name, count)
            rounded += count
            advance(output.nbytes)
    if rounded != converted.rounded_codes:
        differences.append(
            f"{counted(rounded, 'code')} rounded, the manifest says {converted.rounded_codes}"
        )
    return Verification(
        tensors=len(wanted),
        source_tensors=sum(len(group) for output in outputs for group in output.groups),
        rounded_codes=rounded,
        differences=tuple(differences),
        next_step=(
            f"run `neuron-minimax convert {source.files.title} {converted.directory} --check"
            f"{source.files.stream_option}` with the options it was made with: it writes what "
            "differs again, from the checkpoint as it is now"
        ),
    )


def _record_differences(converted: Converted, name: str, rounded: int) -> list[str]:
    """Say what the manifest's record of an output should say; its digest is compared elsewhere."""
    record = converted.records.get(name)
    if record is None:
        return [f"{name} has no record in its manifest"]
    if record.rounded_codes != rounded:
        return [
            f"{counted(rounded, 'code')} of {name} rounded, its record says {record.rounded_codes}"
        ]
    entry = converted.tensors.entries.get(name)
    if entry is not None and entry.shard != record.shard:
        return [f"{name} is in {entry.shard}, its record says {record.shard}"]
    return []
