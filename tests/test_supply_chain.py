"""What comes from others: no floor admits a known advisory, and nothing is fetched unasked."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from neuron_minimax.demo import DEMO
from tests.audit import judged

ROOT = Path(__file__).parent.parent
# Package to the first version without an advisory that reaches us, and the advisory.
FIXED = {
    "starlette": ("1.3.1", "CVE-2026-54283, CVE-2026-48710, CVE-2025-62727"),
    "fastapi": ("0.133.1", "the first that admits such a starlette"),
    "h11": ("0.16", "CVE-2025-43859"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "pyarrow": ("23.0.1", "CVE-2026-25087"),
    "torch": ("2.8", "CVE-2025-32434, CVE-2025-3730"),
    "transformers": ("4.53", "CVE-2025-5197 and its like"),
    "pydantic": ("2.4", "CVE-2024-3772"),
}


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["parquet"]
    return {each.name: each for each in map(Requirement, texts)}


@pytest.mark.parametrize("name", FIXED)
def test_no_floor_admits_a_known_advisory(name):
    floors = [each.version for each in requirements()[name].specifier if each.operator == ">="]
    assert Version(floors[0]) >= Version(FIXED[name][0]), FIXED[name][1]


def test_the_audit_says_what_it_did_not_look_up():
    unknown = {"name": "here", "skip_reason": "not found"}
    good = {"name": "b", "version": "1", "vulns": []}
    assert judged({"dependencies": [unknown, good]}) == (
        "1 of 2 packages looked up, 0 with advisories\nnot looked up, the index gave nothing: here",
        0,
    )
    text, code = judged({"dependencies": [unknown]})
    assert text.startswith("nothing was looked up")
    assert code == 0
    faulty = {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}
    text, code = judged({"dependencies": [faulty]})
    assert code == 1
    assert text == "a 1: X-1, fixed in 2\n1 of 1 packages looked up, 1 with advisories"


def test_make_takes_the_versions_of_python_that_the_package_takes():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    pattern = r"not \(3, (\d+)\) <= sys\.version_info < \(3, (\d+)\)\).*\n.* is no Python (.*?);"
    first, end, named = re.search(pattern, (ROOT / "Makefile").read_text()).groups()
    assert wanted == f">=3.{first},<3.{end}"
    assert re.findall(r"3\.(\d+)", named) == [str(minor) for minor in range(int(first), int(end))]


# Makes an environment whose python does nothing.
PYTHON = r"""#!/bin/sh
test "$2" = venv || exit 0
mkdir -p "$3/bin" && printf '#!/bin/sh\n' > "$3/bin/python" && chmod +x "$3/bin/python"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("name", [".venv", ".venv-audit", ".venv-neuron", ".venv-xla"])
def test_make_removes_no_environment_but_one_that_it_has_begun(tmp_path, name):
    for file in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    command = ["make", f"{name}/stamp", f"PYTHON={python}"]
    (tmp_path / name).mkdir()
    kept = tmp_path / name / "kept"
    kept.touch()
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert made.stderr.startswith(f"{name} is not make's own (neither ")
    assert list((tmp_path / name).iterdir()) == [kept]
    (tmp_path / name / ".begun").touch()
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert not kept.exists()
    assert (tmp_path / name / "stamp").exists()
    kept.touch()  # one with a stamp stays, also of before make wrote .begun
    (tmp_path / name / ".begun").unlink()
    subprocess.run(
        [*command, "-W", "pyproject.toml"], cwd=tmp_path, capture_output=True, check=True
    )
    assert kept.exists()


def without_network() -> list[str]:
    """Return the command before a command that runs in a namespace without network."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        possible = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("no namespace without network can be made here")
    return command


def test_nothing_reaches_for_the_network_at_import_or_on_the_way_to_tokens(tmp_path):
    finished = subprocess.run(
        [*without_network(), sys.executable, "-m", "tests.offline", str(DEMO), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1]) == {"attempts": [], "codes": [0] * 5}
