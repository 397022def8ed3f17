"""Mounts of images on NBD servers, and over them; and what the commands make of such names."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import PATIENCE, cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounts, shell, wait_for, wait_for_end
from nbdservers import Server, Servers

pytestmark = pytest.mark.needs("fuse", "nbdkit", "qemu-nbd")

SIZE = 8 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(os.urandom(3 << 20) + bytes(2 << 20) + os.urandom(3 << 20))
    return path


def overlay_on(server: Server, path: Path, *words: str) -> Path:
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", server.uri, "-F", "raw", *words, path))
    return path


def test_an_overlay_on_an_export(servers: Servers, base: Path, tmp_path: Path, mount: Mounts) -> None:
    content = bytearray(base.read_bytes())
    server = servers.qemu(base, "-r", "--shared=8", export="golden")
    top = overlay_on(server, tmp_path / "top.qcow2")
    mounted = mount(top)
    flat = mounted.flat("top")
    assert flat.read_bytes() == content
    for offset, length in ((5, 1), (65_000, 3000), (3 << 20, 1 << 20), (SIZE - 1, 1)):
        data = os.urandom(length)
        with flat.open("r+b") as file:
            file.seek(offset)
            file.write(data)
            os.fsync(file.fileno())
        content[offset : offset + length] = data
    assert flat.read_bytes() == content
    lines = mounted.control("top", "chain").read_text().splitlines()
    assert lines[-1].endswith(server.uri)
    mounted.umount()
    assert qemu_img("check", top).returncode == 0
    (tmp_path / "expected").write_bytes(content)
    assert qemu_img("compare", "-F", "raw", top, tmp_path / "expected").returncode == 0


def test_what_is_read_and_then_copied_up_comes_over_the_network_once(
    servers: Servers, base: Path, tmp_path: Path, mount: Mounts
) -> None:
    log = tmp_path / "log"
    server = servers.nbdkit("--filter=log", "file", str(base), f"logfile={log}")
    top = overlay_on(server, tmp_path / "top.qcow2")
    mounted = mount(top)
    assert mounted.flat("top").read_bytes() == base.read_bytes()
    ok(cowfs("stream", "-q", mounted.flat("top")))
    mounted.umount()
    counts = [int(found[1], 16) for found in re.finditer(r" Read id=\d+ offset=\w+ count=0x(\w+)", log.read_text())]
    # the samples that an overlay remembers, three times; and the hole is not fetched by the stream
    assert sum(counts) <= SIZE + 3 * 32 * 4096
    ok(qemu_img("compare", "-F", "raw", top, base))
    assert qemu_img("check", top).returncode == 0


def test_a_stream_makes_an_overlay_independent_of_the_server(
    servers: Servers, base: Path, tmp_path: Path, mount: Mounts
) -> None:
    server = servers.qemu(base, "-r")
    top = overlay_on(server, tmp_path / "top.qcow2")
    mounted = mount(top)
    ok(cowfs("stream", mounted.flat("top")))
    server.kill()
    assert mounted.flat("top").read_bytes() == base.read_bytes()
    mounted.umount()
    assert "backing file" not in ok(cowfs("info", top))
    assert qemu_img("compare", "-F", "raw", top, base).returncode == 0


def test_what_is_local_goes_on_working_without_the_server(
    servers: Servers, base: Path, tmp_path: Path, mount: Mounts
) -> None:
    server = servers.qemu(base, "-r")
    top = overlay_on(server, tmp_path / "top.qcow2")
    mounted = mount("-o", "net-retry=0.5,net-timeout=2", top)
    flat = mounted.flat("top")
    with flat.open("r+b", buffering=0) as file:
        local = os.urandom(1 << 20)
        file.write(local)
        os.fsync(file.fileno())
        server.kill()
        assert mounted.control("top", "status").read_text()
        file.seek(7)
        file.write(b"without")
        os.fsync(file.fileno())
        local = local[:7] + b"without" + local[14:]
        # the page cache of the kernel is asked to forget what it has
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 1 << 20, 0) == local
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(file.fileno(), 4096, 6 << 20)
        assert "is away" in mounted.control("top", "error").read_text()
        # a whole cluster needs nothing from below, part of one does
        assert os.pwrite(file.fileno(), b"w" * 65_536, 4 << 20) == 65_536
        os.fsync(file.fileno())
        server.start()
        wait_for("the server's return", lambda: _reads(file.fileno(), 6 << 20))
        assert os.pread(file.fileno(), 4096, 6 << 20) == base.read_bytes()[6 << 20 :][:4096]
    mounted.umount()
    assert qemu_img("check", top).returncode == 0


def _reads(descriptor: int, offset: int) -> bool:
    try:
        os.pread(descriptor, 4096, offset)
    except OSError as error:
        assert error.errno == errno.EIO
        return False
    return True


def test_requests_are_held_until_the_server_is_back(
    servers: Servers, base: Path, tmp_path: Path, mount: Mounts
) -> None:
    server = servers.qemu(base, "-r")
    mounted = mount("-o", "net-retry=0,net-error=hold", overlay_on(server, tmp_path / "top.qcow2"))
    server.kill()
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(mounted.flat("top").read_bytes)
        assert mounted.control("top", "status").read_text()
        assert not reading.done()
        server.start()
        assert reading.result(PATIENCE) == base.read_bytes()
    mounted.umount()


def test_a_mount_ends_although_requests_are_held(servers: Servers, base: Path, tmp_path: Path, mount: Mounts) -> None:
    server = servers.qemu(base, "-r")
    mounted = mount("-o", "net-error=hold,net-retry=0.1", overlay_on(server, tmp_path / "top.qcow2"))
    server.kill()
    reader = subprocess.Popen(["cat", str(mounted.flat("top"))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("the reader", lambda: mounted.status()["images"][0]["open-files"] > 0)
        subprocess.run(["umount", "-l", str(mounted.point)], check=True)
        os.kill(mounted.pid, signal.SIGTERM)
        wait_for_end(mounted.process)
    finally:
        reader.kill()
        reader.wait()


#: writes bytes, named in the order FILE OFFSET BYTES, and makes them durable
_WRITE = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY)
os.pwrite(file, sys.argv[3].encode(), int(sys.argv[2]))
os.fsync(file)
"""


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_image_on_a_server_is_written(
    servers: Servers, base: Path, tmp_path: Path, mount: Mounts, format: str
) -> None:
    host = tmp_path / "host"
    with host.open("wb") as file:
        file.truncate(32 << 20)
    server = servers.qemu(host, export="vm")
    if format == "qcow2":
        ok(cowfs("create", "-q", "-f", "qcow2", server.uri, str(SIZE)))
    ok(cowfs("convert", "-n", "-f", "raw", "-O", format, base, server.uri))
    mounted = mount("-o", f"format={format}", server.uri)
    flat = mounted.flat("vm")
    content = base.read_bytes()
    with flat.open("r+b") as file:
        assert file.read(SIZE) == content
        file.seek(1000)
        file.write(b"written")
        os.fsync(file.fileno())
    server.kill()
    # not by this process: what is forked from it to be the server would close the file, too, and wait for a flush
    with subprocess.Popen([sys.executable, "-c", _WRITE, flat, "2000", "afterwards"]) as writing:
        server.start()
        assert writing.wait(30) == 0
    assert shell(f"df {mounted.point}").returncode == 0
    mounted.umount()
    expected = bytearray(content)
    expected[1000:1007] = b"written"
    expected[2000:2010] = b"afterwards"
    server.kill()
    (tmp_path / "expected").write_bytes(expected)
    if format == "qcow2":
        assert qemu_img("check", host).returncode == 0
    assert qemu_img("compare", "-f", format, "-F", "raw", host, tmp_path / "expected").returncode == 0


@pytest.mark.parametrize("kind", ["unix", "tcp", "old unix", "old tcp", "json"])
def test_overlays_that_qemu_has_made(servers: Servers, base: Path, tmp_path: Path, mount: Mounts, kind: str) -> None:
    server = servers.qemu(base, "-r", export="a/b", tcp="tcp" in kind)
    where = server.uri.split("socket=")[-1]
    name = {
        "old unix": f"nbd:unix:{where}:exportname=a/b",
        "old tcp": server.uri.replace("nbd://", "nbd:").replace("/a/b", ":exportname=a/b"),
        "json": "json:"
        + json.dumps(
            {"driver": "raw", "file": {"driver": "nbd", "export": "a/b", "server": {"type": "unix", "path": where}}}
        ),
    }.get(kind, server.uri)
    top = tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", top))
    qemu_io(top, "qcow2", "write -P 0x11 64k 64k")
    flat = mount("-o", "ro", top).flat("top").read_bytes()
    assert flat == base.read_bytes()[:65_536] + b"\x11" * 65_536 + base.read_bytes()[131_072:]
    chain = json.loads(ok(cowfs("info", "--backing-chain", "--json", top)))
    # a json: name stays as it is
    known = name if kind == "json" else server.uri
    assert [layer["filename"] for layer in chain] == [str(top), server.uri]
    assert chain[0]["full-backing-filename"] == known
    assert "actual-size" not in chain[1]


def test_commands_take_exports(servers: Servers, base: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    ok(qemu_img("convert", "-f", "raw", "-O", "qcow2", base, image))
    server = servers.qemu(image, "-r", format="raw", export="q")
    facts = json.loads(ok(cowfs("info", "--json", server.uri)))
    assert (facts["format"], facts["virtual-size"], facts["filename"]) == ("qcow2", SIZE, server.uri)
    theirs = json.loads(ok(qemu_img("info", "--output=json", server.uri)))
    assert theirs["filename"] == facts["filename"]
    assert "disk size: unavailable" in ok(cowfs("info", server.uri))
    assert "No errors" in ok(cowfs("check", server.uri))
    assert ok(cowfs("compare", "-F", "raw", server.uri, base)) == "Images are identical.\n"
    assert json.loads(ok(cowfs("map", "--json", server.uri))) == json.loads(
        ok(qemu_img("map", "--output=json", server.uri))
    )
    assert ok(cowfs("measure", "-O", "qcow2", server.uri)) == ok(qemu_img("measure", "-O", "qcow2", server.uri))
    copy = tmp_path / "copy.raw"
    ok(cowfs("convert", "-q", "-O", "raw", server.uri, copy))
    assert copy.read_bytes() == base.read_bytes()
    assert copy.stat().st_blocks * 512 <= 6 << 20, "holes are not copied"
    assert "offers it read-only" in refusal(cowfs("resize", server.uri, "+1M"))


def test_holes_are_never_transferred(servers: Servers, tmp_path: Path) -> None:
    """A terabyte, of which nearly nothing is there."""
    server = servers.nbdkit("memory", "1T")
    ok(cowfs("convert", "-q", "-O", "qcow2", server.uri, tmp_path / "copy.qcow2"))
    assert (tmp_path / "copy.qcow2").stat().st_size < 10 << 20


def test_what_cannot_be_is_refused_in_one_line(servers: Servers, base: Path, tmp_path: Path, mount: Mounts) -> None:
    server = servers.qemu(base, "-r", export="x")
    top = tmp_path / "top.qcow2"
    for name, says in (
        (server.uri_of("y"), "the NBD server has no export 'y'; it has 'x'"),
        ("nbd://localhost:1/x", "cannot connect: Connection refused"),
        ("nbd+unix:///x?socket=relative", "'relative', which is no absolute path"),
        ("nbd://host/x?y=z", "parameter 'y'"),
        ('json:{"driver":"ssh","host":"localhost","path":"/etc/passwd"}', "'ssh'"),
    ):
        assert says in refusal(cowfs("create", "-f", "qcow2", "-b", name, "-F", "raw", top))
        assert not top.exists()
    assert "cannot connect" in refusal(cowfs("mount", "nbd://localhost:1/x", mount.new_point()))
    assert "may be mounted read-only" in refusal(cowfs("mount", server.uri, mount.new_point()))


def test_an_export_that_has_changed_is_noticed(servers: Servers, base: Path, tmp_path: Path) -> None:
    server = servers.qemu(base, "-r")
    top = overlay_on(server, tmp_path / "top.qcow2")
    server.kill()
    with base.open("r+b") as file:
        file.write(b"changed!")
    server.start()
    assert "has changed since" in refusal(cowfs("map", top))


def test_images_from_servers_do_not_lead_into_this_host(servers: Servers, base: Path, tmp_path: Path) -> None:
    evil = tmp_path / "evil.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", evil))
    server = servers.qemu(evil, export="evil")
    assert "comes from a server" in refusal(cowfs("map", server.uri))
    data = tmp_path / "data.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={base}.new,data_file_raw=on", data, "1M"))
    assert "comes from a server" in refusal(cowfs("map", servers.qemu(data, export="data").uri))
