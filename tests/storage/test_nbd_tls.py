"""TLS, with certificates that are made for the test, against nbdkit."""

import subprocess
from pathlib import Path

import pytest
from nbdservers import Server, Servers

from cowfs.errors import StorageError
from cowfs.storage.nbd.storage import NbdStorage


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)


def _sign(folder: Path, name: str, who: str) -> None:
    _openssl(
        folder, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}-key.pem", "-out", "r", "-subj", "/CN=x"
    )
    (folder / "ext").write_text(f"subjectAltName=DNS:{who}\n")
    words = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2", "-extfile", "ext"]
    _openssl(folder, "x509", "-req", "-in", "r", "-out", f"{name}-cert.pem", *words)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    _openssl(
        folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca-key.pem", "-out", "ca-cert.pem",
        "-days", "2", "-subj", "/CN=test CA",
    )  # fmt: skip
    _sign(folder, "server", "localhost")
    _sign(folder, "client", "client")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * 16_384)
    return path


def _served(servers: Servers, pki: Path, disk: Path, *words: str, tcp: bool = True) -> Server:
    options = ["--tls=require", f"--tls-certificates={pki}", *words]
    return servers.nbdkit(*options, "file", str(disk), tcp=tcp)


def _uri(server: Server, pki: Path | None, more: str = "") -> str:
    scheme, rest = server.uri.split(":", 1)
    sign = "&" if "?" in rest else "?"
    trust = f"{sign}tls-certificates={pki}" if pki else ""
    return scheme.replace("nbd", "nbds") + ":" + rest + trust + more


async def refusal(uri: str) -> str:
    with pytest.raises(StorageError) as caught:
        await NbdStorage.open(uri, writable=False)
    assert caught.value.file == uri
    return caught.value.message


@pytest.mark.parametrize("tcp", [False, True])
async def test_reading_and_writing_over_tls(servers: Servers, pki: Path, disk: Path, tcp: bool) -> None:
    server = _served(servers, pki, disk, "--tls-verify-peer", tcp=tcp)
    storage = await NbdStorage.open(_uri(server, pki), writable=True)
    assert await storage.read_bytes(1, 4 << 20) == (bytes(range(256)) * 16_384)[1:] + b"\0"
    await storage.write(1_000_000, [b"secret" * 100_000])
    await storage.flush()
    assert await storage.read_bytes(1_000_000, 600_000) == b"secret" * 100_000
    await storage.close()


async def test_whoever_is_not_trusted_is_told_nothing(servers: Servers, pki: Path, disk: Path) -> None:
    server = _served(servers, pki, disk)
    assert "certificate is not accepted: unable to get local issuer" in await refusal(_uri(server, None))
    named = _uri(server, pki, "&tls-hostname=example.org")
    assert "certificate is not accepted: Hostname mismatch" in await refusal(named)
    by_address = _uri(server, pki).replace("localhost", "127.0.0.1")
    assert "certificate is not accepted: IP address mismatch" in await refusal(by_address)
    storage = await NbdStorage.open(f"{by_address}&tls-hostname=localhost", writable=False)
    await storage.close()


async def test_plain_text_is_no_way_out(servers: Servers, pki: Path, disk: Path) -> None:
    assert "it demands TLS; write nbds://" in await refusal(_served(servers, pki, disk).uri)
    plain = servers.nbdkit("--tls=off", "file", str(disk), tcp=True)
    assert "the NBD server refuses" in await refusal(_uri(plain, pki))


async def test_a_client_without_a_certificate(servers: Servers, pki: Path, disk: Path, tmp_path: Path) -> None:
    server = _served(servers, pki, disk, "--tls-verify-peer")
    _copy(pki / "ca-cert.pem", tmp_path)
    with pytest.raises(StorageError):
        await NbdStorage.open(_uri(server, tmp_path), writable=False)


async def test_certificates_that_are_none(servers: Servers, pki: Path, disk: Path, tmp_path: Path) -> None:
    server = _served(servers, pki, disk)
    assert "ca-cert.pem: cannot be used as a certificate: No such file" in await refusal(_uri(server, tmp_path))
    _copy(pki / "ca-cert.pem", tmp_path)
    _copy(disk, tmp_path / "client-cert.pem")
    assert "client-cert.pem: cannot be used as a certificate" in await refusal(_uri(server, tmp_path))


def _copy(source: Path, target: Path) -> None:
    target = target / source.name if target.is_dir() else target
    target.write_bytes(source.read_bytes())
