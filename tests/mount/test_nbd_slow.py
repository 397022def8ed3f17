"""Servers that answer in parallel and take long for a write: what was given up is waited for, and comes first."""

import os
import threading
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img
from mounting import Mounts, wait_for
from nbdservers import Server, Servers

pytestmark = pytest.mark.needs("fuse", "nbdkit")

SIZE = 1 << 20
#: a plugin of nbdkit that takes long for the first write that is 'A' all over, and says what becomes of each write
_PLUGIN = r"""#!/bin/bash
disk=FOLDER/disk log=FOLDER/log
case $1 in
    thread_model) echo parallel ;;
    get_size) stat -c %s $disk ;;
    can_write | can_flush | can_multi_conn | flush) ;;
    pread) dd if=$disk bs=64k skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none ;;
    pwrite)
        data=$(mktemp -p FOLDER)
        cat >$data
        first=$(head -c 1 $data)
        echo begin $first $4 >>$log
        if [ $first = A ] && mkdir FOLDER/slow 2>/dev/null; then sleep SECONDS; fi
        dd if=$data of=$disk bs=64k seek=$4 oflag=seek_bytes conv=notrunc status=none
        echo end $first $4 >>$log
        ;;
    *) exit 2 ;;
esac
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def slow_server(servers: Servers, folder: Path, seconds: float) -> Server:
    (folder / "disk").write_bytes(b"0" * SIZE)
    plugin = folder / "plugin"
    plugin.write_text(_PLUGIN.replace("FOLDER", str(folder)).replace("SECONDS", str(seconds)))
    plugin.chmod(0o755)
    return servers.nbdkit("sh", str(plugin))


def write(path: Path, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        assert file.write(data) == len(data)
        os.fsync(file.fileno())


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines()


def test_a_cancelled_commit_is_not_carried_out_after_the_next(
    servers: Servers, tmp_path: Path, mount: Mounts, log: Path
) -> None:
    server = slow_server(servers, tmp_path, 3)
    top = tmp_path / "top.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", server.uri, "-F", "raw", top))
    mounted = mount(top)
    flat = mounted.flat("top")
    write(flat, b"A" * 65_536)
    mounted.control("top", "commit").write_text("start")
    wait_for("the first write", lambda: "begin A 0" in lines(log))
    mounted.control("top", "commit").write_text("cancel")
    assert mounted.job("top", "commit")["state"] == "cancelled"
    write(flat, b"B" * 65_536)
    mounted.control("top", "commit").write_text("start")
    assert mounted.job_ended("top", "commit")["state"] == "completed"
    wait_for("the end of every write", lambda: len(lines(log)) % 2 == 0)
    assert [line for line in lines(log) if line.endswith(" 0")] == ["begin A 0", "end A 0", "begin B 0", "end B 0"]
    expected = b"B" * 65_536 + b"0" * (SIZE - 65_536)
    assert flat.read_bytes() == expected
    mounted.umount()
    assert (tmp_path / "disk").read_bytes() == expected
    assert qemu_img("check", top).returncode == 0


def test_a_write_that_takes_too_long_is_not_carried_out_after_the_next(
    servers: Servers, tmp_path: Path, mount: Mounts, log: Path
) -> None:
    server = slow_server(servers, tmp_path, 3)
    mounted = mount("-o", "net-timeout=1", f"disk={server.uri}")
    flat = mounted.flat("disk")
    # by itself: both a file's own size and what comes behind can be asked for meanwhile
    first = threading.Thread(target=write, args=(flat, b"A" * 65_536))
    first.start()
    wait_for("the first write", lambda: "begin A 0" in lines(log))
    assert mounted.control("disk", "status").read_text()
    first.join()
    write(flat, b"B" * 65_536)
    wait_for("the end of every write", lambda: len(lines(log)) % 2 == 0)
    assert lines(log) == ["begin A 0", "end A 0", "begin B 0", "end B 0"]
    mounted.umount()
    assert (tmp_path / "disk").read_bytes() == b"B" * 65_536 + b"0" * (SIZE - 65_536)


def test_a_write_that_nobody_waits_for_any_longer_is_not_carried_out_after_the_next(
    servers: Servers, tmp_path: Path, mount: Mounts, log: Path
) -> None:
    server = slow_server(servers, tmp_path, 3)
    mounted = mount("-o", "net-timeout=0.5,net-retry=0.5", f"disk={server.uri}")
    flat = mounted.flat("disk")
    with pytest.raises(OSError, match="Input/output error"):
        write(flat, b"A" * 65_536)
    assert lines(log) == ["begin A 0"]
    assert "is away" in mounted.control("disk", "error").read_text()
    wait_for("the server's return", lambda: _writes(flat))
    assert lines(log) == ["begin A 0", "end A 0", "begin B 0", "end B 0"]
    mounted.umount()
    assert (tmp_path / "disk").read_bytes() == b"B" * 65_536 + b"0" * (SIZE - 65_536)


def _writes(flat: Path) -> bool:
    try:
        write(flat, b"B" * 65_536)
    except OSError:
        return False
    return True
