"""`python -m tests.audit PIP_AUDIT`: the advisories of every installed package, by pip-audit.

Exits with 1 when there are any. What could not be looked up is counted and named: a run that looked
up nothing says so, and does not fail, since the index may be out of reach.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

OURS = "neuron-minimax"


def installed() -> list[str]:
    """Return every installed package as a requirement, without build tags such as +cpu."""
    found = {
        each.metadata["Name"]: each.version.partition("+")[0] for each in metadata.distributions()
    }
    return sorted(f"{name}=={version}" for name, version in found.items() if name != OURS)


def judged(report: Mapping[str, Any]) -> tuple[str, int]:
    """Return what to say of a report in pip-audit's JSON, and the exit code."""
    packages = report["dependencies"]
    faulty = [each for each in packages if each.get("vulns")]
    unknown = [each["name"] for each in packages if "skip_reason" in each]
    lines = [
        f"{each['name']} {each['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no version yet'}"
        for each in faulty
        for flaw in each["vulns"]
    ]
    looked_up = len(packages) - len(unknown)
    if not looked_up:
        return "nothing was looked up: the index has no advisories of any package", 0
    lines.append(
        f"{looked_up} of {len(packages)} packages looked up, {len(faulty)} with advisories"
    )
    if unknown:
        lines.append(f"not looked up, the index gave nothing: {', '.join(unknown)}")
    return "\n".join(lines), 1 if faulty else 0


def main(pip_audit: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(installed()) + "\n")
        options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        command = [pip_audit, *options, "--requirement", str(requirements)]
        try:
            finished = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            print("nothing was looked up: pip-audit could not be installed")
            return 0
    try:
        text, code = judged(json.loads(finished.stdout))
    except ValueError:
        problem = (finished.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        text, code = f"nothing was looked up: {problem}", 0
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
