import errno
import subprocess
from pathlib import Path

import pytest

from cowfs.block.image import Backing
from cowfs.errors import CowfsError, NotPermitted
from cowfs.formats import qcow2
from cowfs.formats.chain import backing_source, open_chain, open_disk
from cowfs.storage import FileStorage


async def overlay(path: Path, backing: str, format: str | None = "raw", size: int = 1 << 20) -> Path:
    storage = FileStorage.create(str(path))
    await qcow2.create(storage, size, Backing(backing, format), {})
    await storage.close()
    return path


async def refusal(path: Path) -> CowfsError:
    with pytest.raises(CowfsError) as caught:
        await open_chain(str(path))
    return caught.value


async def test_names_are_relative_to_the_image_that_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "tops").mkdir()
    (tmp_path / "bases" / "base").write_bytes(b"base" * 1000)
    await overlay(tmp_path / "bases" / "middle", "base")
    await overlay(tmp_path / "tops" / "top", "../bases/middle", "qcow2")
    monkeypatch.chdir(tmp_path)
    for name in ("tops/top", str(tmp_path / "tops" / "top")):
        disk = await open_disk(name)
        assert await disk.read(0, 4000) == b"base" * 1000
        await disk.close()


def test_names_that_are_no_files_are_refused() -> None:
    assert backing_source("dir/top", Backing("file:base", "raw")).name == "dir/base"
    assert backing_source("dir/top", Backing("./odd:name", "raw")).name == "dir/./odd:name"
    for name in ("ssh:x", "gluster://host/export"):
        with pytest.raises(CowfsError, match="no local file"):
            backing_source("top", Backing(name, "raw"))


async def test_a_backing_file_that_is_gone_is_named_with_who_needs_it(tmp_path: Path) -> None:
    error = await refusal(await overlay(tmp_path / "top", "base"))
    assert error.errno == errno.ENOENT
    expected = f"{tmp_path}/base: cannot open: No such file or directory (backing file of {tmp_path}/top)"
    assert str(error) == expected


async def test_a_cycle_is_refused_whatever_its_members_are_called(tmp_path: Path) -> None:
    await overlay(tmp_path / "a", "b", "qcow2")
    await overlay(tmp_path / "b", "c", "qcow2")
    (tmp_path / "c").symlink_to("a")
    assert "comes back to this file" in str(await refusal(tmp_path / "a"))
    await overlay(tmp_path / "self", "self", "qcow2")
    assert "comes back to this file" in str(await refusal(tmp_path / "self"))


async def test_a_chain_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"")
    for number in range(1, 300):
        await overlay(tmp_path / str(number), str(number - 1), "qcow2" if number > 1 else "raw")
    assert "more than 256 layers" in str(await refusal(tmp_path / "299"))
    disk = await open_disk(str(tmp_path / "200"), writable=True)
    assert await disk.read(0, 512) == bytes(512)
    assert len(disk.layers) == 201
    await disk.close()
    assert _descriptors() < 60, "what was opened is closed again"


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_the_recorded_format_is_honoured_and_raw_never_probed_into_something_else(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 100)
    await overlay(tmp_path / "base", str(secret))
    top = await overlay(tmp_path / "top", "base", "raw")
    disk = await open_disk(str(top))
    assert [layer.format for layer in disk.layers] == ["qcow2", "raw"]
    assert (await disk.read(0, 4)) == b"QFI\xfb"
    await disk.close()


async def test_a_guest_cannot_turn_a_guessed_disk_into_another_format(tmp_path: Path) -> None:
    disk_file = tmp_path / "disk"
    disk_file.write_bytes(bytes(1 << 20))
    evil = (await overlay(tmp_path / "evil", "/etc/passwd")).read_bytes()
    disk = await open_disk(str(disk_file), writable=True)
    for offset, data in ((0, evil[:4096]), (0, evil[:512]), (0, b"QED\0")):
        assert not disk.write_now(offset, data)
        with pytest.raises(NotPermitted, match="give format=raw"):
            await disk.write(offset, data)
    # piece by piece is no way round
    await disk.write(1, evil[1:512])
    with pytest.raises(NotPermitted):
        await disk.write(0, evil[:1])
    await disk.write(0, b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa")
    await disk.close()
    assert disk_file.read_bytes()[:3] == b"\xeb\x63\x90"
    disk = await open_disk(str(disk_file), "raw", writable=True)
    assert not disk.write_now(0, evil[:512])
    await disk.write(0, evil[:512])
    assert disk.write_now(0, evil[:512]), "a disk that is said to be raw may hold anything"
    await disk.close()


async def test_an_unknown_recorded_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"")
    error = await refusal(await overlay(tmp_path / "top", "base", "vmdk"))
    assert "unknown format 'vmdk'; cowfs knows qcow2, qed, raw" in str(error)


async def test_a_chain_made_by_qemu_of_all_formats(tmp_path: Path) -> None:
    def run(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, cwd=tmp_path)

    run("qemu-img", "create", "-q", "-f", "raw", "a.raw", "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "b.qcow2")
    run("qemu-img", "create", "-q", "-f", "qed", "-b", "b.qcow2", "-F", "qcow2", "c.qed")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "c.qed", "-F", "qed", "d.qcow2")
    for number, name in enumerate(("a.raw", "b.qcow2", "c.qed", "d.qcow2")):
        run("qemu-io", "-f", name[2:], "-c", f"write -P {number + 1} {number * 100_352} 250k", name)
    run("qemu-img", "convert", "-O", "raw", "d.qcow2", "flat")
    disk = await open_disk(str(tmp_path / "d.qcow2"))
    assert [layer.format for layer in disk.layers] == ["qcow2", "qed", "qcow2", "raw"]
    assert await disk.read(0, disk.size) == (tmp_path / "flat").read_bytes()
    await disk.close()
