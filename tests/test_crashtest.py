"""The long test of power cuts goes on where it was broken off, and fails if anything is wrong."""

import json
import subprocess
import sys
from pathlib import Path

from commandline import PATIENCE

_SCRIPT = Path(__file__).parent.parent / "scripts" / "crashes" / "powercuts.py"


def crashtest(state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(_SCRIPT), "--state", str(state), "--kind", "relabel", "--jobs", "1", "--qemu", "0"]
    return subprocess.run([*words, *options], capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_it_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    first = crashtest(state, "--states", "10")
    assert (first.returncode, first.stderr) == (0, "")
    runs = json.loads(state.read_text())["runs"]
    done = sum(run["states"] for run in runs.values())
    assert done >= 10
    assert f"{done} states in " in first.stdout
    more = crashtest(state, "--states", str(done + 1))
    assert more.returncode == 0
    after = json.loads(state.read_text())["runs"]
    assert len(after) > len(runs)
    assert {name: after[name] for name in runs} == runs
    assert f"{sum(run['states'] for run in after.values()) - done} states in " in more.stdout
    other = crashtest(state, "--seed", "2")
    assert other.returncode == 1
    assert "is of --seed 1; give another with --state" in other.stderr


def test_what_was_wrong_is_told_and_makes_it_fail(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    run = {"states": 5, "qemu": 0, "failures": [["7.1", "sector 3 is lost"]]}
    state.write_text(json.dumps({"seed": 1, "runs": {"relabel/qcow2/1": run}}))
    result = crashtest(state, "--states", "5")
    assert result.returncode == 1
    assert "scripts/crashtest --again relabel/qcow2/1/7.1   # sector 3 is lost\n" in result.stdout
    again = crashtest(state, "--again", "relabel/qcow2/1/0.0")
    assert (again.returncode, again.stdout) == (0, "1 states\n")
