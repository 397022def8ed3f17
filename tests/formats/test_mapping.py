"""The map of a chain against the one that QEMU prints."""

from pathlib import Path

import pytest
from commandline import ok, qemu_img, qemu_io

from cowfs.formats import mapping
from cowfs.formats.chain import open_disk
from cowfs.formats.mapping import MapEntry, map_entries, render_json

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")


async def rendered(image: Path) -> str:
    disk = await open_disk(str(image))
    try:
        return render_json(await map_entries(disk))
    finally:
        await disk.close()


@pytest.fixture(params=["qcow2", "qed"])
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Raw base of 1 MiB with holes, under 2 MiB, under 3 MiB; zero clusters in both overlays."""
    base, middle, top = (tmp_path / name for name in ("base.raw", "middle", "top"))
    ok(qemu_img("create", "-q", "-f", "raw", base, "1M"))
    qemu_io(base, "raw", "write -P 1 128k 128k", "write -P 1 900k 64k")
    ok(qemu_img("create", "-q", "-f", request.param, "-b", base, "-F", "raw", middle, "2M"))
    qemu_io(middle, request.param, "write -P 2 192k 64k", "write -z 512k 128k", "write -P 3 1920k 128k")
    ok(qemu_img("create", "-q", "-f", request.param, "-b", middle, "-F", request.param, top, "3M"))
    qemu_io(top, request.param, "write -P 2 2500k 64k", "write -z 0 128k", "write -P 2 64k 64k")
    return [base, middle, top]


async def test_equals_qemu(chain: list[Path]) -> None:
    for image in chain:
        assert await rendered(image) == ok(qemu_img("map", "--output=json", image))


async def test_windows_leave_no_seams(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [await rendered(image) for image in chain]
    for window in (65536, 3 * 65536):
        monkeypatch.setattr(mapping, "WINDOW", window)
        assert [await rendered(image) for image in chain] == whole


async def test_compressed_clusters_have_no_offset(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.raw", tmp_path / "packed.qcow2"
    plain.write_bytes(b"compressible" * 40000)
    ok(qemu_img("convert", "-c", "-O", "qcow2", plain, packed))
    assert await rendered(packed) == ok(qemu_img("map", "--output=json", packed))


async def test_zeros_with_and_without_space(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", image, "1M"))
    qemu_io(image, "qcow2", "write 0 256k", "write -z 64k 64k", "write -z 512k 64k")
    assert await rendered(image) == ok(qemu_img("map", "--output=json", image))


async def test_a_part(chain: list[Path]) -> None:
    disk = await open_disk(str(chain[2]))
    try:
        whole = await map_entries(disk)
        part = await map_entries(disk, 100 << 10, 1 << 20)
        assert (part[0].start, part[-1].start + part[-1].length) == (100 << 10, (100 << 10) + (1 << 20))
        assert await map_entries(disk, 2 << 20) == [entry for entry in whole if entry.start >= 2 << 20]
        assert await map_entries(disk, disk.size) == []
    finally:
        await disk.close()


def test_keys_are_those_of_qemu() -> None:
    entry = MapEntry(0, 512, 1, True, False, True, 1024)
    assert list(entry.as_dict()) == ["start", "length", "depth", "present", "zero", "data", "offset"]
    assert "offset" not in entry._replace(offset=None).as_dict()
