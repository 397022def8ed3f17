"""Images on HTTP servers: what the commands make of them, and mounts of overlays on them."""

import contextlib
import itertools
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import xxhash
from commandline import PATIENCE, cowfs, ok, qemu_img, refusal
from httpservers import Handler, Web, drop, saying, status, web_server
from mounting import Mounts, shell

pytestmark = pytest.mark.needs("fuse", "qemu-img")

SIZE = 6 << 20


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as web:
        yield web


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(os.urandom(3 << 20) + bytes(1 << 20) + os.urandom(2 << 20))
    return path


def put_qcow2(web: Web, base: Path, *words: str) -> tuple[str, Path]:
    path = base.with_name("golden.qcow2")
    ok(qemu_img("convert", "-f", "raw", "-O", "qcow2", *words, base, path))
    return web.put("images/golden.qcow2", path.read_bytes()), path


@pytest.mark.parametrize("kind", ["raw", "qcow2", "compressed"])
def test_an_overlay_lives_on_an_object_and_then_without_it(
    web: Web, base: Path, tmp_path: Path, mount: Mounts, kind: str
) -> None:
    words = ["-c"] if kind == "compressed" else []
    url = web.put("base.raw", base.read_bytes()) if kind == "raw" else put_qcow2(web, base, *words)[0]
    format = "raw" if kind == "raw" else "qcow2"
    top = tmp_path / "top.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", format, top))
    facts = json.loads(ok(cowfs("info", "--json", "--backing-chain", top)))
    assert [fact["filename"] for fact in facts] == [str(top), url]
    assert (
        facts[0]["backing-filename"]
        == json.loads(ok(qemu_img("info", "--output=json", top)))["backing-filename"]
        == url
    )
    assert "actual-size" not in facts[1]
    ok(cowfs("compare", top, base))
    content = bytearray(base.read_bytes())
    mounted = mount(top)
    flat = mounted.flat("top")
    with flat.open("r+b") as file:
        for offset, length in ((5, 1), (65_000, 3000), (4 << 20, 1 << 20), (SIZE - 1, 1)):
            data = os.urandom(length)
            content[offset : offset + length] = data
            file.seek(offset)
            file.write(data)
    assert flat.read_bytes() == content
    ok(cowfs("stream", "-q", flat))
    web.stop()
    web.things.clear()
    assert flat.read_bytes() == content
    mounted.umount()
    assert "backing file" not in ok(cowfs("info", top))
    assert qemu_img("check", top).returncode == 0
    (tmp_path / "expected").write_bytes(content)
    assert qemu_img("compare", "-F", "raw", top, tmp_path / "expected").returncode == 0


def test_an_object_is_an_image_that_can_be_read(web: Web, base: Path, tmp_path: Path, mount: Mounts) -> None:
    url, local = put_qcow2(web, base)
    copy = tmp_path / "copy.raw"
    ok(cowfs("convert", "-O", "raw", url, copy))
    assert copy.read_bytes() == base.read_bytes()
    ok(cowfs("compare", url, base))
    assert ok(cowfs("check", url)) == ok(cowfs("check", local))
    assert json.loads(ok(cowfs("map", "--json", url))) == json.loads(ok(cowfs("map", "--json", local)))
    assert "can only be read" in refusal(cowfs("resize", url, "10M"))
    assert "can only be read" in refusal(cowfs("create", url, "10M"))
    assert "may be mounted read-only, with -o ro" in refusal(cowfs("mount", url, mount.new_point()))
    mounted = mount("-o", "ro", url)
    assert mounted.flat("golden").read_bytes() == base.read_bytes()
    mounted.umount()


def test_an_object_that_has_changed_since_the_overlay_was_made(
    web: Web, base: Path, tmp_path: Path, mount: Mounts
) -> None:
    content = base.read_bytes()
    url = web.put("base.raw", content)
    top = tmp_path / "top.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", top))
    # in a place that no sample of its bytes would see
    web.put("base.raw", content[:70_000] + b"changed" + content[70_007:])
    text = refusal(cowfs("mount", top, mount.new_point()))
    assert f"its backing file {url} has changed since this image was put on it" in text
    web.put("base.raw", content)
    mounted = mount(top)
    with mounted.flat("top").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, 0) == content[:4096]
        web.put("base.raw", os.urandom(SIZE))
        with pytest.raises(OSError, match="Stale file handle"):
            os.pread(file.fileno(), 4096, 5 << 20)
        assert "has changed since it was opened" in mounted.control("top", "error").read_text()
        assert os.pread(file.fileno(), 4096, 0) == content[:4096]
    mounted.umount()


@contextlib.contextmanager
def mirrored(web: Web, contents: Sequence[bytes]) -> Iterator[str]:
    """A URL that leads to one server after the other, each of which has its own name for the same version."""
    with contextlib.ExitStack() as stack:
        mirrors = [stack.enter_context(web_server()) for _ in contents]
        for number, (mirror, content) in enumerate(zip(mirrors, contents, strict=True)):
            mirror.put("base.raw", content, etag=f'"{number}-{zlib.crc32(content)}"')
        turn = itertools.cycle(mirrors)

        def elsewhere(handler: Handler) -> bool:
            handler.say(302, b"", {"Location": next(turn).url("base.raw")})
            return True

        web.fault = elsewhere
        yield web.url("mirrored/base.raw")


def test_mirrors_of_an_object_are_the_same_object(web: Web, base: Path, tmp_path: Path, mount: Mounts) -> None:
    top = tmp_path / "top.qcow2"
    with mirrored(web, [base.read_bytes()] * 3) as url:
        ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", top))
        for _ in range(3):
            ok(cowfs("compare", top, base))
        mounted = mount(top)
        assert mounted.flat("top").read_bytes() == base.read_bytes()
        mounted.umount()
        assert "is the same" in ok(cowfs("verify", top))
        ok(cowfs("verify", "-q", "--accept", top))
        assert "every byte" in ok(cowfs("verify", top))


def test_a_mirror_with_other_content_is_another_object(web: Web, base: Path, tmp_path: Path, mount: Mounts) -> None:
    top = tmp_path / "top.qcow2"
    content = base.read_bytes()
    with mirrored(web, [content]) as url:
        ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", top))
    with mirrored(web, [os.urandom(SIZE)]) as url:
        text = refusal(cowfs("mount", top, mount.new_point()))
        assert "the store calls it another version, and 32 samples of its content are not all the same" in text
    with mirrored(web, [content, os.urandom(SIZE)]) as url:
        result = cowfs("convert", "-O", "raw", url, tmp_path / "copy")
        assert result.returncode == 1
        assert "has changed since it was opened (the store calls it another version, and of" in result.stderr
        assert not (tmp_path / "copy").exists()


def test_one_server_with_another_name_for_the_same_content(web: Web, base: Path, tmp_path: Path, mount: Mounts) -> None:
    """A name that lasts is one of another version; names that come and go are none."""
    top = tmp_path / "top.qcow2"
    content = base.read_bytes()
    url = web.put("base.raw", content)
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", top))
    web.put("base.raw", content, etag='"other"')
    text = refusal(cowfs("mount", top, mount.new_point()))
    assert "the store calls it another version, although 32 samples of its content are the same" in text
    count = itertools.count()
    web.fault = saying(lambda handler: _answer_anew(handler, next(count)))
    ok(cowfs("compare", top, base))
    other = tmp_path / "other.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", other))
    ok(cowfs("compare", other, base))


def _answer_anew(handler: Handler, number: int) -> None:
    handler.server.web.things["/base.raw"].etag = f'"{number}"'
    handler.answer()


def test_a_stamp_from_before_there_were_places(web: Web, base: Path, tmp_path: Path) -> None:
    """It has a digest of the ETag in the place of a sample."""
    top = tmp_path / "top.qcow2"
    url = web.put("base.raw", base.read_bytes())
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", top))
    data = bytearray(top.read_bytes())
    sample = xxhash.xxh3_128(b"")
    sample.update(web.things["/base.raw"].tag.encode())
    old = struct.pack("<B7xQqQ16s16s", 1, SIZE, 0, xxhash.xxh3_64_intdigest(url.encode()), sample.digest(), bytes(16))
    start = data.index(struct.pack("<Q", SIZE), 112) - 8
    data[start : start + len(old) + 8] = old + struct.pack("<Q", xxhash.xxh3_64_intdigest(old))
    assert data[start - 4 : start] == struct.pack(">I", len(old) + 8), "the length of the extension"
    top.write_bytes(data)
    ok(cowfs("compare", top, base))
    web.put("base.raw", base.read_bytes(), etag='"other"')
    assert "has changed since" in refusal(cowfs("map", top))


def test_a_stream_outlives_a_server_that_fails_now_and_then(
    web: Web, base: Path, tmp_path: Path, mount: Mounts
) -> None:
    url = web.put("base.raw", base.read_bytes())
    top = tmp_path / "top.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", top))
    mounted = mount("-o", "net-timeout=5,net-retry=20", top)
    web.faults = [drop] * 5
    ok(cowfs("stream", "-q", mounted.flat("top")))
    assert not web.faults
    web.stop()
    assert mounted.flat("top").read_bytes() == base.read_bytes()
    mounted.umount()


def test_an_image_from_a_server_leads_to_no_local_file(web: Web, base: Path, tmp_path: Path) -> None:
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "evil.qcow2"))
    url = web.put("evil.qcow2", (tmp_path / "evil.qcow2").read_bytes())
    assert "comes from a server" in refusal(cowfs("convert", "-O", "raw", url, tmp_path / "out"), 1)
    assert not (tmp_path / "out").exists()


def test_credentials_stay_out_of_headers_and_messages(base: Path, tmp_path: Path, mount: Mounts) -> None:
    top = tmp_path / "top.qcow2"
    for url in ("https://me:geheim@localhost/base.raw", "https://localhost/base.raw?sig=geheim"):
        for words in (["-u"], []):
            text = refusal(cowfs("create", *words, "-f", "qcow2", "-b", url, "-F", "raw", top, "1M"))
            assert "credentials" in text
            assert "geheim" not in text
            assert not top.exists()
    local = tmp_path / "local.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", local, "1M"))
    text = refusal(cowfs("rebase", "-u", "-b", "https://me:geheim@localhost/x", "-F", "raw", local))
    assert "geheim" not in text
    # others may have written it
    ok(qemu_img("rebase", "-u", "-b", "https://me:geheim@localhost/x", "-F", "raw", local))
    commands: list[list[str | Path]] = [["mount", local, mount.new_point()], ["compare", local, base]]
    commands.append(["info", "--backing-chain", local])
    for command in commands:
        result = cowfs(*command)
        assert result.returncode
        assert "credentials" in result.stderr
        assert "geheim" not in result.stderr


_SIGNED = "?X-Amz-Credential=a%2Fb%2Bc&X-Amz-Signature=geheim"


def test_a_link_that_expires_is_read_once(web: Web, base: Path, tmp_path: Path) -> None:
    """By all who record nothing; the server gets it as it was signed, and nobody else sees the signature."""
    golden, local = put_qcow2(web, base)
    asked: list[str] = []

    def signed_only(handler: Handler) -> bool:
        asked.append(handler.path)
        if handler.path.endswith(_SIGNED):
            return False
        handler.say(403, b"")
        return True

    web.fault = signed_only
    link, shown = golden + _SIGNED, golden + "?…"
    copy = tmp_path / "copy.raw"
    commands: list[list[str | Path]] = [
        ["info", link],
        ["info", "--json", "--backing-chain", link],
        ["check", link],
        ["map", "--json", link],
        ["measure", "-O", "raw", link],
        ["compare", link, base],
        ["snapshot", "-l", link],
        ["convert", "-O", "raw", link, copy],
    ]
    for command in commands:
        result = cowfs(*command)
        assert result.returncode == 0, result
        assert "geheim" not in result.stdout + result.stderr
    assert copy.read_bytes() == base.read_bytes()
    assert json.loads(ok(cowfs("info", "--json", link)))["filename"] == shown
    assert set(asked) == {f"/images/golden.qcow2{_SIGNED}"}
    # and when it has expired
    web.fault = status(403)
    for command in commands:
        text = refusal(cowfs(*command), 2 if command[0] in ("compare",) else 1)
        assert "does not allow it (status 403)" in text
        assert shown in text
        assert "geheim" not in text
    assert local.exists()


def test_a_link_that_expires_is_never_recorded(web: Web, base: Path, tmp_path: Path, mount: Mounts) -> None:
    link = web.put("base.raw", base.read_bytes()) + _SIGNED
    top, local = tmp_path / "top.qcow2", tmp_path / "local.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", local))
    before = local.read_bytes()
    mounted = mount("-o", f"log={tmp_path}/log", local)
    commands: list[list[str | Path]] = [
        ["create", "-f", "qcow2", "-b", link, "-F", "raw", top],
        ["create", "-u", "-f", "qcow2", "-b", link, "-F", "raw", top, "1M"],
        ["convert", "-O", "qcow2", "-B", link, "-F", "raw", base, top],
        ["mount", "-o", "ro", link, mount.new_point()],
        ["mount", "-o", "ro", f"name={link}", mount.new_point()],
        ["add", "-r", mounted.point, link],
        ["add", "-r", mounted.point, f"name={link}"],
    ]
    for command in commands:
        text = refusal(cowfs(*command))
        assert "as links have that expire" in text, command
        assert "geheim" not in text
        assert not top.exists()
    assert shell(f"echo 'add {link} ro' > {mounted.point}/.cowfs/control").returncode
    assert "as links have that expire" in (mounted.point / ".cowfs" / "error").read_text()
    status = (mounted.point / ".cowfs" / "status.json").read_text()
    mounted.umount()
    for text in (status, (tmp_path / "log").read_text()):
        assert "geheim" not in text
    for words in (["-u"], []):
        text = refusal(cowfs("rebase", *words, "-b", link, "-F", "raw", local))
        assert "as links have that expire" in text
        assert "geheim" not in text
    assert local.read_bytes()[:512] == before[:512]
    # others may have written it
    ok(qemu_img("rebase", "-u", "-b", link, "-F", "raw", local))
    commands = [["mount", local, mount.new_point()], ["convert", "-O", "raw", local, top], ["verify", local]]
    for command in commands:
        result = cowfs(*command)
        assert result.returncode
        assert "as links have that expire" in result.stderr
        assert "geheim" not in result.stderr
    assert "geheim" not in ok(cowfs("info", local)) + ok(cowfs("info", "--json", local))


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['{}'] = None; "
    code += "import cowfs.cli.main as m; sys.argv[1:] = ['info', '{}']; sys.exit(m.main())"
    for module, url in (("fsspec", "https://localhost/x"), ("aiohttp", "https://localhost/x"), ("s3fs", "s3://b/x")):
        words = [sys.executable, "-c", code.format(module, url)]
        result = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith(f"cowfs: {url}: ")
        assert result.stderr.endswith(f"needs '{module}', which is not installed: pip install cowfs[remote]\n")
        assert result.stderr.count("\n") == 1


@pytest.mark.needs("openssl")
def test_over_tls_only_with_a_certificate_that_is_accepted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(certificate), "-out", str(tmp_path / "public")]
    subprocess.run(words, check=True, capture_output=True)
    with certificate.open("ab") as file:
        file.write((tmp_path / "public").read_bytes())
    with web_server(certificate=certificate) as web:
        url = web.put("base.raw", base.read_bytes())
        assert "has a certificate that is not accepted" in refusal(cowfs("info", url))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        ok(cowfs("compare", "-f", "raw", "-F", "raw", url, base))
        plain = Web()
        try:
            to_plain = plain.put("base.raw", base.read_bytes())
            web.fault = saying(lambda handler: handler.say(302, b"", {"Location": to_plain}))
            assert "leads to a place without TLS" in refusal(cowfs("info", url))
        finally:
            plain.stop()


def test_what_qemu_wrote_on_top(web: Web, base: Path, tmp_path: Path) -> None:
    url, _ = put_qcow2(web, base)
    top = tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", url, "-F", "qcow2", top, str(SIZE)))
    ok(cowfs("compare", top, base))
