"""Cases in a row: each restores its inputs, mutates one, runs what reads it in a child, and judges
what became of it.
"""

import gc
import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from tests.fuzz import child
from tests.fuzz.found import FOUND, SLOW
from tests.fuzz.mutations import edit_count, mutate
from tests.fuzz.pristine import SPECIALS, Pristine, journal, replace_by
from tests.fuzz.readings import Refused
from tests.fuzz.structured import explore
from tests.fuzz.table import STRUCTURED, TARGETS
from tests.fuzz.targets import Case, Codes, Target

# An empty template is one; of a state the run that goes on from it is judged.
MAY_BE_EMPTY = ("template", "state")
LARGEST_OUTPUT = 64 << 20
ROUND = 2000
SAID_EVERY = 1000
PATIENCE = 30  # with what is to end at a limit of processor time
Change = Callable[[bytes], bytes] | str  # of the input's bytes, or the name of a special file


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a case did that no input may lead to; `edits` are the fewest that lead to it."""

    target: str
    seed: str
    edits: tuple[int, ...]
    what: str
    seconds: float
    data: bytes | None = None
    repro: str = ""

    def render(self) -> str:
        return f"{self.target} [{self.seed}] {list(self.edits)} {self.what}\n    {self.repro}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is run: named cases (the slow ones too), then so many examples of hypothesis per
    target and `ROUND` seeded cases in turn, up to a number of all cases or a time.
    """

    seed: int
    cases: int = 10**9
    seconds: float = 3600.0
    named: bool = True
    slow: bool = True
    examples: int = 100


@dataclass
class Tally:
    """How many cases of each target ran, and the faults."""

    cases: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)


class Campaign:
    """The pristine inputs of some targets, and one case after the other on them, each of which may
    take so many seconds.
    """

    def __init__(self, made: Pristine, names: Sequence[str], seconds: float) -> None:
        self.made = made
        self.targets = {name: TARGETS[name] for name in names}
        if "journal" in self.targets:
            self.targets["journal"] = replace(self.targets["journal"], file=journal(made))
        # What each run returns on the pristine input, in this process: children find all imported.
        self.truths = {name: self._warm(target) for name, target in self.targets.items()}
        gc.collect()
        gc.freeze()  # a child's collector does not touch, and so copy, what is there already
        # One for each way to read: what a reader starts once, such as other processes, it keeps.
        self.workers = {
            target.run: child.Worker(self._steps, made.output, seconds)
            for target in self.targets.values()
        }

    def end(self) -> None:
        """End all children."""
        for worker in self.workers.values():
            worker.end()

    def _steps(self, name: str) -> tuple[int, Any]:
        codes, found = self.targets[name].run(self.made.work)
        return max(codes.values()), (codes, found)

    def try_change(
        self, target: Target, change: Change, patience: int = 1
    ) -> tuple[str | None, child.Outcome]:
        """Run one case; return its fault and how it ended. A fault is what a new process shows."""
        fault, outcome = self._try(target, change, False, patience)
        return (fault, outcome) if fault is None else self._try(target, change, True, patience)

    def _try(
        self, target: Target, change: Change, fresh: bool, patience: int
    ) -> tuple[str | None, child.Outcome]:
        made = self.made
        made.restore(target.needs)
        path = made.work / target.file
        data: bytes | None = None
        if isinstance(change, str):
            replace_by(path, change)
        else:
            before = path.read_bytes()
            data = change(before)
            if data != before:  # else its time stays as well
                path.write_bytes(data)
        others = _listing(made.work, target.writes)
        outcome = self.workers[target.run].run(target.name, fresh, patience)
        fault = outcome.fault
        if fault is None and _listing(made.work, target.writes) != others:
            fault = "outside: a file was changed that is no output"
        if fault is None and _largest(made.work, target.writes) > LARGEST_OUTPUT:
            fault = "disk: an output of more than 64 MiB"
        if fault is None:
            codes, found = outcome.value
            special = change if isinstance(change, str) else None
            fault = _judged(self._case(target, data, special, codes, found))
        return fault, outcome

    def _case(
        self, target: Target, data: bytes | None, special: str | None, codes: Codes, found: Any
    ) -> Case:
        return Case(
            made=self.made,
            target=target,
            data=data,
            special=special,
            codes=codes,
            found=found,
            truth=self.truths[target.name],
        )

    def _warm(self, target: Target) -> Any:
        self.made.restore(target.needs)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            codes, found = target.run(self.made.work)
        if 0 not in codes.values():
            raise AssertionError(f"{target.name} refuses what is whole: {said.getvalue()}")
        return found

    def blind_judges(self) -> list[str]:
        """Name the targets whose judge takes a success on an emptied input for a good one: a check
        that cannot fail.
        """
        blind = []
        for target in self.targets.values():
            fault, outcome = self.try_change(target, lambda data: data)
            assert fault is None, (target.name, fault)
            codes, found = outcome.value
            path = self.made.work / target.file
            path.parent.mkdir(exist_ok=True)  # the journals' is gone once the conversion is whole
            path.write_bytes(b"")
            case = self._case(target, b"", None, dict.fromkeys(codes, 0), found)
            if _judged(case) is None and target.name not in MAY_BE_EMPTY:
                blind.append(target.name)
        return blind

    def seeded(self, target: Target, seed: str) -> Fault | None:
        """Run the case of a seed; a fault comes with the fewest edits that lead to it."""
        edits = tuple(range(edit_count(seed)))
        fault, outcome = self._with_edits(target, seed, edits)
        if fault is None:
            return None
        for number in edits if len(edits) > 1 else ():
            fewer = tuple(kept for kept in edits if kept != number)
            found, _ = self._with_edits(target, seed, fewer) if fewer else (None, None)
            if found and _kind(found) == _kind(fault):
                edits = fewer
                fault = found
        return Fault(
            target=target.name,
            seed=seed,
            edits=edits,
            what=fault,
            seconds=outcome.seconds,
        )

    def _with_edits(
        self, target: Target, seed: str, edits: Sequence[int]
    ) -> tuple[str | None, child.Outcome]:
        return self.try_change(target, lambda data: mutate(target.kind, data, seed, edits))

    def named(self, target: Target, title: str, change: Change) -> Fault | None:
        """Run the case of one change: a special file, or one that was found earlier."""
        slow = title.removeprefix("found: ") in SLOW.get(target.name, {})
        fault, outcome = self.try_change(target, change, PATIENCE if slow else 1)
        if fault is None:
            return None
        return Fault(
            target=target.name,
            seed=title,
            edits=(),
            what=fault,
            seconds=outcome.seconds,
        )

    def structured(self, target: Target, examples: int, number: int) -> tuple[int, Fault | None]:
        """Run drawn inputs; return how many ran and the fault of the smallest at fault."""
        strategy = STRUCTURED[target.name]((self.made.kept / target.file).read_bytes())
        ran, data, fault = explore(
            strategy, lambda data: self.try_change(target, lambda _: data)[0], examples, number
        )
        if fault is None:
            return ran, None
        return ran, Fault(
            target=target.name,
            seed=f"hypothesis:{number}",
            edits=(),
            what=fault,
            seconds=0,
            data=data,
        )

    def write_repro(self, fault: Fault, folder: Path) -> Fault:
        """Put the mutated input beside a note of how to run it again."""
        folder.mkdir(parents=True, exist_ok=True)
        target = self.targets[fault.target]
        stem = f"{fault.target}-{''.join(c if c.isalnum() else '-' for c in fault.seed)}"
        again = f"python -m tests.fuzz --target {fault.target} --again"
        note = {name: value for name, value in vars(fault).items() if name != "data"}
        note["again"] = f"{again} '{fault.seed}'"
        data = fault.data
        if fault.edits:
            pristine = (self.made.kept / target.file).read_bytes()
            data = mutate(target.kind, pristine, fault.seed, fault.edits)
        if data is not None:
            note["again"] = f"{again} {folder / stem}.input"
            (folder / f"{stem}.input").write_bytes(data)
        (folder / f"{stem}.json").write_text(json.dumps(note, indent=1) + "\n")
        return replace(fault, repro=str(folder / f"{stem}.json"))


def _judged(case: Case) -> str | None:
    try:
        problem = case.target.judge(case)
    except Refused as refusal:
        problem = f"an independent reading refuses it ({refusal})"
    return problem and f"accepted: {problem} {case.codes}"


def _kind(fault: str) -> str:
    return fault.partition(":")[0]


def _listing(work: Path, leaving_out: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    found = {}
    for folder, names, files in os.walk(work):
        if Path(folder) == work:
            names[:] = [name for name in names if name not in leaving_out]
        for name in files:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def _largest(work: Path, names: Sequence[str]) -> int:
    sizes = [0]
    for name in names:
        for folder, _, files in os.walk(work / name):
            sizes += [os.lstat(os.path.join(folder, file)).st_blocks * 512 for file in files]
    return max(sizes)


def seeded_cases(targets: Sequence[Target], seed: int) -> Iterator[tuple[Target, str]]:
    """Yield targets and seeds without end, each target by its weight."""
    rng = random.Random(seed)
    row = [target for target in targets for _ in range(target.weight)]
    number = 0
    while row:
        rng.shuffle(row)
        for target in row:
            yield target, f"{target.name}:{seed}:{number}"
            number += 1


def named_cases(campaign: "Campaign", slow: bool) -> Iterator[tuple[Target, str, Change]]:
    """Yield what was found earlier, and every special file in the place of every input."""
    for target in campaign.targets.values():
        found = FOUND.get(target.name, {}) | (SLOW.get(target.name, {}) if slow else {})
        for title, change in found.items():
            yield target, f"found: {title}", change
        for name in SPECIALS if target.specials else ():
            yield target, f"special: {name}", name


def run(
    campaign: Campaign, plan: Plan, folder: Path, say: Callable[[str], None] = lambda line: None
) -> Tally:
    """Run a plan until so many cases ran, the time is over, or somebody interrupts it.

    Files that show a fault go into `folder`; `say` gets two lines for each.
    """
    tally = Tally()
    end = time.monotonic() + plan.seconds
    try:
        for target, ran, fault in _all_cases(campaign, plan):
            before = tally.cases.total()
            tally.cases[target.name] += ran
            if tally.cases.total() // SAID_EVERY > before // SAID_EVERY:
                say(f"{tally.cases.total()} cases, {len(tally.faults)} faults")
            if fault is not None:
                tally.faults.append(campaign.write_repro(fault, folder))
                say(tally.faults[-1].render())
            if tally.cases.total() >= plan.cases or time.monotonic() > end:
                break
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        campaign.end()
    return tally


def _all_cases(campaign: Campaign, plan: Plan) -> Iterator[tuple[Target, int, Fault | None]]:
    """Yield, as they run, named cases, and then without end drawn and seeded ones: a target, how
    many of its cases ran, and a fault.
    """
    targets = list(campaign.targets.values())
    for target, title, change in named_cases(campaign, plan.slow) if plan.named else ():
        yield target, 1, campaign.named(target, title, change)
    seeded = seeded_cases(targets, plan.seed)
    drawn = [target for target in targets if target.name in STRUCTURED and plan.examples]
    for number in count(plan.seed):
        for target in drawn:
            yield target, *campaign.structured(target, plan.examples, number)
        for target, seed in islice(seeded, ROUND):
            yield target, 1, campaign.seeded(target, seed)
