"""A host file system without space left: errors go to those who need space, and nothing is lost."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img
from mounting import Mounts, shell

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    assert shell(f"mount -t tmpfs -o size=6m tmpfs {folder}").returncode == 0
    yield folder
    shell(f"umount -l {folder}")


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_a_full_host_fails_what_needs_space_and_loses_nothing(
    small: Path, mount: Mounts, tmp_path: Path, format: str
) -> None:
    chooser = random.Random(1)
    base, overlay = tmp_path / "base.raw", small / "overlay"
    model = bytearray(chooser.randbytes(16 * MIB))
    base.write_bytes(model)
    ok(qemu_img("create", "-q", "-f", format, "-b", base, "-F", "raw", overlay))
    mounted = mount("-o", "no-copy-on-read,no-writeback-cache", overlay)
    flat = mounted.flat("overlay")
    assert "No space left" in cowfs("stream", flat).stderr
    refused = 0
    with flat.open("r+b", buffering=0) as file:
        for _ in range(300):
            offset = chooser.randrange(16 * MIB // 4096) * 4096
            data = chooser.randbytes(4096)
            try:
                os.pwrite(file.fileno(), data, offset)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                refused += 1
            else:
                model[offset : offset + 4096] = data
        assert refused
        assert flat.read_bytes() == model
        os.fsync(file.fileno())
        assert flat.read_bytes() == model
        assert shell(f"mount -o remount,size=64m {small}").returncode == 0
        os.fsync(file.fileno())
        os.pwrite(file.fileno(), b"x" * 4096, 0)
        model[:4096] = b"x" * 4096
    ok(cowfs("stream", flat))
    mounted.umount()
    ok(qemu_img("check", "-q", "-f", format, overlay))
    ok(qemu_img("convert", "-f", format, "-O", "raw", overlay, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == model


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_tables_have_their_space_before_anything_is_entered_in_them(
    small: Path, mount: Mounts, tmp_path: Path, format: str
) -> None:
    overlay = small / "overlay"
    ok(qemu_img("create", "-q", "-f", format, overlay, "64G"))
    mounted = mount("-o", "no-writeback-cache", overlay)
    done = {}
    with mounted.flat("overlay").open("r+b", buffering=0) as file:
        # each write needs a table of its own
        for number in range(100):
            data = bytes([number + 1]) * 65536
            try:
                os.pwrite(file.fileno(), data, number << 29)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
            done[number << 29] = data
        assert 5 < len(done) < 100
        os.fsync(file.fileno())
    mounted.umount()
    ok(qemu_img("check", "-q", "-f", format, overlay))
    mounted = mount("-o", "ro", overlay)
    with mounted.flat("overlay").open("rb", buffering=0) as file:
        for offset, data in done.items():
            assert os.pread(file.fileno(), 65536, offset) == data


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_no_write_is_accepted_whose_cluster_has_no_room(
    small: Path, mount: Mounts, tmp_path: Path, format: str
) -> None:
    base, overlay = tmp_path / "base.raw", small / "overlay"
    model = bytearray(random.Random(1).randbytes(16 * MIB))
    base.write_bytes(model)
    ok(qemu_img("create", "-q", "-f", format, "-b", base, "-F", "raw", overlay))
    mounted = mount("-o", "no-copy-on-read,no-writeback-cache,flush-interval=1000", overlay)
    accepted = 0
    with mounted.flat("overlay").open("r+b", buffering=0) as file:
        for offset in range(0, 16 * MIB, 65536):
            try:
                os.pwrite(file.fileno(), b"x" * 4096, offset)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                model[offset : offset + 4096] = b"x" * 4096
                accepted += 1
        # the clusters that fit into the file system, and not all those that are begun
        assert 40 < accepted < 6 * MIB // 65536
        os.fsync(file.fileno())
    mounted.umount()
    ok(qemu_img("check", "-q", "-f", format, overlay))
    ok(qemu_img("convert", "-f", format, "-O", "raw", overlay, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == model
