"""The long run: python -m tests.fuzz --hours 1, or --cases 500; every fault is printed with its
seed and the file that shows it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MALLOC_ARENA_MAX", "2")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--target", action="append", help="only these; may be repeated")
    parser.add_argument("--no-named", action="store_true", help="no special files, nothing found")
    parser.add_argument("--quick", action="store_true", help="nothing that takes long")
    parser.add_argument("--examples", type=int, default=100, help="of hypothesis per target")
    parser.add_argument("--again", metavar="SEED_OR_FILE", help="run one case and show it")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that a case may take")
    parser.add_argument("--faults", type=Path, default=Path("fuzz_faults"), help="for repro files")
    parser.add_argument("--report", type=Path, help="write a JSON summary here")
    options = parser.parse_args()

    from tests.fuzz import campaign as campaigns
    from tests.fuzz.pristine import make_pristine
    from tests.fuzz.table import QUICK, TARGETS

    seed = options.seed if options.seed is not None else int(time.time())
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        names = options.target or (QUICK if options.quick else list(TARGETS))
        made = make_pristine(Path(root) / "fuzz")
        campaign = campaigns.Campaign(made, names, options.limit)
        if options.again:
            try:
                return show(campaign, options.target[0], options.again)
            finally:
                campaign.end()
        print(f"seed {seed}", flush=True)
        started = time.monotonic()
        plan = campaigns.Plan(
            seed=seed,
            cases=options.cases,
            seconds=options.hours * 3600,
            named=not options.no_named,
            slow=not options.quick,
            examples=options.examples,
        )
        blind = campaign.blind_judges()
        tally = campaigns.run(campaign, plan, options.faults, lambda line: print(line, flush=True))
        seconds = time.monotonic() - started
    print(f"{sum(tally.cases.values())} cases in {seconds:.0f} s, {len(tally.faults)} faults")
    for name in campaign.targets:
        faults = sum(fault.target == name for fault in tally.faults)
        print(f"  {name:28} {tally.cases[name]:6} cases {faults:5} faults")
    if blind:
        print(f"judges that cannot fail: {', '.join(blind)}")
    if options.report:
        report = {
            "cases": dict(tally.cases),
            "blind": blind,
            "faults": [vars(fault) | {"data": None} for fault in tally.faults],
        }
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if tally.faults or blind else 0


def show(campaign, name, seed) -> int:
    """Run one case again and print all of it."""
    from tests.fuzz.campaign import named_cases
    from tests.fuzz.found import whole
    from tests.fuzz.mutations import mutate

    target = campaign.targets[name]
    named = {title: change for _, title, change in named_cases(campaign, slow=True)}
    change = named.get(seed, lambda data: mutate(target.kind, data, seed))
    if Path(seed).is_file():
        change = whole(Path(seed).read_bytes())
    fault, outcome = campaign.try_change(target, change)
    print(outcome.stdout.decode(errors="replace"))
    print(outcome.stderr.decode(errors="replace"))
    print(
        outcome.code,
        f"{outcome.seconds:.2f} s",
        f"{outcome.memory >> 20} MiB",
        outcome.value and outcome.value[0],
    )
    print(f"fault: {fault}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
