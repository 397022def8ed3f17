"""The keys of ``start``: what they mean on a chain, what is refused, and which layers nobody else may use."""

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import Busy, CowfsError, NotFound, UsageError
from cowfs.formats.raw import RawImage
from cowfs.jobs import control
from cowfs.jobs.commit import Pivot
from cowfs.jobs.control import KINDS, JobControl, Kind, Neighbour, parse_keys
from cowfs.jobs.job import Job, OnError
from cowfs.jobs.plan import plan_of

#: layers 3 to 0
NAMES = ("top", "c", "b", "base")
_STREAM = "backing-names, base, on-error, speed, trace"
_COMMIT = "backing-names, base, on-error, pivot, speed, top"


def make_layers(*names: str) -> list[Layer]:
    return [Layer(RawImage(MemoryStorage(name, bytes(4096), read_only=name != "top"))) for name in names]


def parsed(verb: str, text: str, layers: Sequence[Layer]) -> dict[str, Any]:
    """Arguments of a job, with the names of layers in place of these."""
    found = parse_keys(verb, text.split(), layers)
    return {key: value.name if isinstance(value, Layer) else value for key, value in found.items()}


@pytest.mark.parametrize(
    ("verb", "text", "arguments"),
    [
        ("stream", "", {}),
        ("stream", "base=0", {"base": "base"}),
        ("stream", "base=2 speed=1M on-error=stop", {"base": "c", "speed": 1 << 20, "on_error": OnError.STOP}),
        ("stream", "base=000000003", {"base": "top"}),
        ("commit", "top=3 base=0", {"top": "top", "base": "base"}),
        ("commit", "pivot=wait base=1", {"base": "b", "pivot": Pivot.WAIT}),
        ("commit", "pivot=yes pivot=no", {"pivot": Pivot.NO}),
        ("commit", "on-error=ignore speed=0", {"on_error": OnError.IGNORE, "speed": 0}),
    ],
)
def test_keys_become_arguments(verb: str, text: str, arguments: dict[str, Any]) -> None:
    assert parsed(verb, text, make_layers(*NAMES)) == arguments


@pytest.mark.parametrize(
    ("verb", "text", "kind", "sentence"),
    [
        (
            "stream",
            "base",
            UsageError,
            f"stream has no key 'base'; it takes {_STREAM}",
        ),
        (
            "stream",
            "top=1",
            UsageError,
            f"stream has no key 'top'; it takes {_STREAM}",
        ),
        (
            "commit",
            "depth=1",
            UsageError,
            f"commit has no key 'depth'; it takes {_COMMIT}",
        ),
        ("stream", "base=", UsageError, "base=: '' is not the number of a layer"),
        ("stream", "base=1.0", UsageError, "base=1.0: '1.0' is not the number of a layer"),
        ("stream", "base=²", UsageError, "base=²: '²' is not the number of a layer"),
        ("stream", "base=٣", UsageError, "base=٣: '٣' is not the number of a layer"),
        ("stream", "base=4", NotFound, "base=4: there is no such layer; the chain has 0, the deepest, to 3"),
        ("commit", f"top={'9' * 5000}", NotFound, "there is no such layer"),
        ("commit", "pivot=Yes", UsageError, "pivot=Yes is not one of no, yes, wait"),
        ("commit", "on-error=", UsageError, "on-error= is not one of report, stop, ignore"),
        ("commit", "speed=-1", UsageError, "'-1' is not a size"),
    ],
)
def test_keys_that_make_no_sense(verb: str, text: str, kind: type[CowfsError], sentence: str) -> None:
    with pytest.raises(kind) as caught:
        parsed(verb, text, make_layers(*NAMES))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("verb", "text", "claimed", "above", "merged"),
    [
        ("stream", "", "", None, ""),
        ("stream", "base=1", "", None, ""),
        ("commit", "", "c", None, ""),
        ("commit", "base=0", "c b base", None, "c b"),
        ("commit", "pivot=yes", "c", None, "top"),
        ("commit", "pivot=wait base=0", "c b base", None, "top c b"),
        ("commit", "top=2", "c b", "top", "c"),
        ("commit", "top=2 base=0", "c b base", "top", "c b"),
        ("commit", "top=1", "c b base", "c", "b"),
    ],
)
def test_what_a_job_does_to_which_layers(verb: str, text: str, claimed: str, above: str | None, merged: str) -> None:
    layers = make_layers(*NAMES)
    plan = plan_of(verb, layers, parse_keys(verb, text.split(), layers))
    assert [layer.name for layer in plan.claimed] == claimed.split()
    assert (plan.above and plan.above.name) == above
    assert [layer.name for layer in plan.merged] == merged.split()
    entry = plan.describe()
    names = [layer.name for layer in layers]
    assert entry.fits(names)
    assert not entry.is_relinked(names)
    assert type(entry).parse(entry.render()) == entry
    taken_out = set(merged.split()) - {"top"}
    assert entry.is_relinked([name for name in names if name not in taken_out]) == bool(taken_out)


@pytest.mark.parametrize(
    ("verb", "text", "names", "sentence"),
    [
        ("stream", "base=3", NAMES, "top: the base of a stream lies below the active layer"),
        ("commit", "top=1 base=2", NAMES, "c: does not lie below b"),
        ("commit", "base=3", NAMES, "top: does not lie below top"),
        ("commit", "top=0", NAMES, "base: there is no layer below it to commit into"),
        ("commit", "", ("top",), "top: there is no backing file to commit into"),
        ("commit", "top=2 pivot=yes", NAMES, "c: pivot=yes is for commits of the active layer"),
        ("commit", "top=1 pivot=wait", NAMES, "b: pivot=wait is for commits of the active layer"),
    ],
)
async def test_layers_that_do_not_fit_together(verb: str, text: str, names: Sequence[str], sentence: str) -> None:
    async with trio.open_nursery() as nursery:
        jobs = JobControl(Disk(make_layers(*names)), nursery)
        with pytest.raises(UsageError) as caught:
            await jobs.command(verb, f"start {text}")
        assert str(caught.value).startswith(sentence)
        assert jobs.active is None


class _Waiting(Job):
    """Goes on until it is cancelled; takes any arguments."""

    def __init__(self, disk: Disk, **arguments: Any) -> None:
        super().__init__(disk)
        self.verb = "commit"  # type: ignore[misc]
        self.arguments = arguments

    async def work(self) -> None:
        await trio.sleep_forever()


@pytest.mark.parametrize("shared", NAMES[1:])
@pytest.mark.parametrize("text", ["", "base=0", "top=2", "top=1", "pivot=yes base=1"])
async def test_layers_that_others_use_are_left_alone(text: str, shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(control.KINDS, "commit", Kind(_Waiting, KINDS["commit"].keys))
    layers = make_layers(*NAMES)
    disk, other = Disk(layers), Disk(make_layers("elsewhere", shared))
    claimed = {layer.name for layer in plan_of("commit", layers, parse_keys("commit", text.split(), layers)).claimed}
    async with trio.open_nursery() as nursery:
        jobs = JobControl(disk, nursery, lambda: [Neighbour("other", other)])
        if shared in claimed:
            with pytest.raises(Busy, match=f"^its backing file {shared} is in use by 'other'$"):
                await jobs.command("commit", f"start {text}")
            assert jobs.active is None
        else:
            await jobs.command("commit", f"start {text}")
            assert {layer.name for layer in jobs.claimed} == claimed
        nursery.cancel_scope.cancel()
    assert jobs.claimed == ()
