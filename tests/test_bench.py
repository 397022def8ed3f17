"""The benchmark reckons right and draws what it reckons; that it runs is tried on tiny disks, not how fast."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from commandline import PATIENCE

_BENCHES = Path(__file__).parent.parent / "scripts" / "benches"
_SVG = "{http://www.w3.org/2000/svg}"


def bench(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, _BENCHES / "compare.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def result(case: str, rounds: list[dict[str, float]], unit: str = "IOPS") -> dict[str, Any]:
    return {"case": case, "unit": unit, "rounds": rounds, "lower_is_better": unit == "s"}


def stored(path: Path, *results: dict[str, Any]) -> Path:
    """Return a file as a run leaves it, as far as it is read again."""
    machine = {"cores": 2, "kernel": "6.1.0-test", "python": "3.11.7", "qemu": "7.2.0"}
    path.write_text(json.dumps({"machine": machine, "rounds": 3, "results": results}))
    return path


_READS = [
    {"cowfs": 300.0, "qemu": 100.0, "nbd": 50.0, "floor": 1000.0},
    {"cowfs": 400.0, "qemu": 100.0, "nbd": 200.0, "floor": 1000.0},
    {"cowfs": 100.0, "qemu": 200.0, "nbd": 400.0, "floor": 1000.0},
]
_STARTS = [{"cowfs": 2.0, "qemu": 1.0, "nbd": 4.0}]


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    return stored(
        tmp_path / "run.json", result("qcow2/randread-4k-d32", _READS), result("start/first-byte", _STARTS, "s")
    )


def test_ratios_are_medians_of_what_a_round_gives_against_the_fastest_of_that_round(
    figures: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.json"
    done = bench("--from", figures, "--json", again)
    assert (done.returncode, done.stderr) == (0, "")
    cells = {words[0]: words[1:] for line in done.stdout.splitlines() if (words := line.split())}
    # in the rounds 3, 2 and 0.25 times the fastest; the ratio of the medians would be 1.5
    assert cells["qcow2/randread-4k-d32"] == ["IOPS", "300", "100", "200", "1000", "-", "2.00", "0.30", "100%"]
    # of times the shortest is the best
    assert cells["start/first-byte"] == ["s", "2.000", "1.000", "4.000", "-", "-", "0.50", "-", "0%"]
    verdicts = {(goal["case"], goal["other"]): goal for goal in json.loads(again.read_text())["goals"]}
    assert {key: (goal["got"], goal["reached"]) for key, goal in verdicts.items()} == {
        ("qcow2/randread-4k-d32", "best"): (2.0, True),
        ("qcow2/randread-4k-d32", "floor"): (0.3, False),
        ("start/first-byte", "best"): (0.5, False),
    }
    assert "reached qcow2/randread-4k-d32           2.00 of 1.50 against the fastest peer" in done.stdout
    assert "missed  qcow2/randread-4k-d32           0.30 of 0.40 against the C floor" in done.stdout


def test_a_goal_may_be_against_another_case_of_cowfs_itself(tmp_path: Path) -> None:
    deep = result("chain32/randread-4k-d32", [{"cowfs": 90.0}, {"cowfs": 100.0}, {"cowfs": 10.0}])
    flat = result("chain2/randread-4k-d32", [{"cowfs": 100.0}, {"cowfs": 100.0}, {"cowfs": 100.0}])
    done = bench("--from", stored(tmp_path / "run.json", deep, flat))
    assert "reached chain32/randread-4k-d32         0.90 of 0.90 against cowfs in chain2/randread-4k-d32" in done.stdout


def test_the_chart_has_a_bar_for_each_case_on_the_right_side_of_one(figures: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    assert bench("--from", figures, "--svg", chart).returncode == 0
    root = ElementTree.parse(chart).getroot()
    titles = {title.text: box for box in root.iter(f"{_SVG}rect") for title in box.iter(f"{_SVG}title") if title.text}
    assert set(titles) == {"qcow2/randread-4k-d32: 2.00", "0.30 of the C passthrough", "start/first-byte: 0.50"}
    faster, slower = titles["qcow2/randread-4k-d32: 2.00"], titles["start/first-byte: 0.50"]
    # on a scale of powers, twice and half are as long; they meet at 1
    assert float(faster.attrib["width"]) == pytest.approx(float(slower.attrib["width"]), abs=0.2)
    one = float(faster.attrib["x"])
    assert one == pytest.approx(float(slower.attrib["x"]) + float(slower.attrib["width"]), abs=0.2)
    (label,) = (text for text in root.iter(f"{_SVG}text") if text.text == "1×")
    assert float(label.attrib["x"]) == pytest.approx(one, abs=0.2)
    height = float(root.attrib["height"])
    assert all(float(box.attrib["y"]) + float(box.attrib["height"]) < height for box in titles.values())


def test_goals_are_of_cases_that_exist() -> None:
    cases = bench("--list").stdout.split()
    code = "import json, figures; print(json.dumps([[goal.case, goal.versus] for goal in figures.GOALS]))"
    goals = subprocess.run([sys.executable, "-c", code], cwd=_BENCHES, capture_output=True, text=True, check=True)
    named = {name for pair in json.loads(goals.stdout) for name in pair if name}
    assert len(named) > 20
    assert named <= set(cases)


@pytest.mark.parametrize("words", [["--only", "qcow2/nonsense"], ["--peers", "cowfs,nonsense"]])
def test_a_name_that_nothing_has_is_refused(words: list[str]) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert "nonsense" in done.stderr


@pytest.mark.needs("fuse", "fio", "gcc", "qemu-img")
def test_a_round_measures_every_peer_and_leaves_nothing_behind(tmp_path: Path) -> None:
    figures, chart = tmp_path / "run.json", tmp_path / "chart.svg"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["--only", "qcow2/randread-4k-d32,chain2/randwrite-4k-d1,allocate/qed-d1-fsync"]
    words += ["--peers", "cowfs,floor,raw", "--rounds", "2", "--size", "8", "--seconds", "0.1"]
    done = bench(*words, "--folder", scratch, "--json", figures, "--svg", chart)
    assert (done.returncode, done.stderr) == (0, "")
    found = {case["case"]: case for case in json.loads(figures.read_text())["results"]}
    three, one = {"cowfs", "floor", "raw"}, {"cowfs"}
    names = {
        "qcow2/randread-4k-d32": three,
        "chain2/randwrite-4k-d1": three,
        "allocate/qed-d1-fsync": one,
    }
    assert set(found) == set(names)
    for case, facts in found.items():
        assert [set(values) for values in facts["rounds"]] == [names[case]] * 2
        assert all(value > 0 for values in facts["rounds"] for value in values.values())
    ElementTree.parse(chart)
    assert list(scratch.iterdir()) == []


@pytest.mark.needs("root", "fuse", "loop", "gcc", "ip", "nsenter", "qemu-nbd", "qemu-img", "mkfs.ext4", "nbdcopy")
def test_images_on_another_host_are_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    # a short name, since sockets lie in it
    figures, scratch = tmp_path / "run.json", tmp_path / "s"
    scratch.mkdir()
    # QEMU's export is a package of its own, which is not there wherever tests are
    words: list[str | Path] = ["--quick", "--without-qemu", "--delay", "2", "--folder", scratch, "--json", figures]
    command: list[str | Path] = [sys.executable, _BENCHES / "remote.py", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    facts = json.loads(figures.read_text())
    ways = {
        "start": {"nbd", "http", "download"},
        "stream/link": {"cowfs", "nbdcopy"},
        "stream/socket": {"cowfs", "nbdcopy"},
        "read": {"nbd", "http", "link"},
    }
    assert {case: set(found["median"]) for case, found in facts["results"].items()} == ways
    for case, found in facts["results"].items():
        for pair, ratio in found["ratio"].items():
            one, other = pair.split(" / ")
            assert ratio == pytest.approx(found["rounds"][0][one] / found["rounds"][0][other])
            assert f"{pair:20}{ratio:10.2f}" in output, case
    fetched = facts["results"]["start"]["bytes"][0]
    # the download has all of the files, and who reads one of them does not
    assert fetched["download"] > 8 << 20 > fetched["nbd"] > 1 << 20
    assert {goal["case"] for goal in facts["goals"]} == set(ways)
    for goal in facts["goals"]:
        assert goal["reached"] == (goal["got"] >= goal["least"])
    assert list(scratch.iterdir()) == []
    assert (
        f"cowfs-bench-{process.pid}"
        not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    )
