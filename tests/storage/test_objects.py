"""Objects of S3, as ``moto`` plays it, and of stores that ``fsspec`` knows and nothing here does."""

import asyncio
import errno
import gc
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.error import URLError
from urllib.request import Request, urlopen

import fsspec  # type: ignore[import-untyped]
import pytest
import trio
from commandline import PATIENCE
from fsspec.asyn import AsyncFileSystem  # type: ignore[import-untyped]
from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped]
from mounting import wait_for
from nbdservers import free_port

from cowfs.errors import CowfsError, NotFound, StorageError, Unsupported
from cowfs.storage import Network, RemoteStorage, open_storage

CONTENT = random.Random(4).randbytes((3 << 20) + 77)
NETWORK = Network(10, 10)
#: moto wants to see one, of whatever kind, and urllib's own type would have it wait for a form
_HEADERS = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host",
    "Content-Type": "application/octet-stream",
}


class Bucket:
    """A bucket of a store."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/bucket"
        self.put("", b"")

    def put(self, key: str, content: bytes) -> None:
        with urlopen(Request(f"{self._url}/{key}", content, _HEADERS, method="PUT"), timeout=PATIENCE) as answer:
            assert answer.status == 200


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=PATIENCE):
            return True
    except URLError:
        return False


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The URL of a store in a process of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for("the store", lambda: _answers(url))
            yield url
        finally:
            process.kill()


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    variables = {"ENDPOINT_URL": moto, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3").clear_instance_cache()
    yield Bucket(moto)


async def content_of(name: str) -> bytes:
    storage = await open_storage(name, writable=False, network=NETWORK)
    try:
        return await storage.read_bytes(0, storage.length)
    finally:
        await storage.close()


async def refused(name: str, kind: type[CowfsError]) -> str:
    with pytest.raises(kind) as caught:
        await content_of(name)
    return str(caught.value)


async def test_an_object_of_s3(bucket: Bucket) -> None:
    bucket.put("images/disk.raw", CONTENT)
    bucket.put("empty", b"")
    assert await content_of("s3://bucket/images/disk.raw") == CONTENT
    assert await content_of("s3://bucket/empty") == b""
    assert "no such object" in await refused("s3://bucket/missing", NotFound)
    assert "no such object" in await refused("s3://elsewhere/missing", NotFound)


async def test_an_object_of_s3_that_changes(bucket: Bucket) -> None:
    bucket.put("disk.raw", CONTENT)
    storage = await open_storage("s3://bucket/disk.raw", writable=False, network=NETWORK)
    assert storage.version.strip('"')
    assert await storage.read_bytes(0, 100) == CONTENT[:100]
    bucket.put("disk.raw", CONTENT[::-1])
    with pytest.raises(StorageError, match="has changed since it was opened") as caught:
        await storage.read_bytes(2 << 20, 100)
    assert caught.value.errno == errno.ESTALE
    await storage.close()


async def test_no_credentials_for_s3(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    fsspec.filesystem("s3").clear_instance_cache()
    assert "does not allow it" in await refused("s3://bucket/disk.raw", StorageError)


class Plain(AbstractFileSystem):  # type: ignore[misc]
    """A store without a loop. ``trouble`` is raised by the next requests, one each."""

    protocol = "dropbox"
    objects: ClassVar[dict[str, bytes]] = {}
    trouble: ClassVar[list[Exception]] = []
    delay = 0.0
    #: replaces an object once it has been read
    change: ClassVar[dict[str, bytes]] = {}

    def info(self, path: str, **words: Any) -> dict[str, Any]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.objects[path]), "type": "file", "mtime": hash(self.objects[path])}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **words: Any) -> bytes:
        time.sleep(self.delay)
        if self.trouble:
            raise self.trouble.pop()
        data = self.objects[path][start:end]
        self.objects.update(self.change)
        return data


class Looped(AsyncFileSystem):  # type: ignore[misc]
    """The same with one."""

    protocol = "webdav"

    async def _info(self, path: str, **words: Any) -> dict[str, Any]:
        return Plain().info(path)

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **words: Any) -> bytes:
        await asyncio.sleep(Plain.delay)
        return Plain(skip_instance_cache=True).cat_file(path, start, end) if not Plain.delay else b""


@pytest.fixture(params=["dropbox", "webdav"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("dropbox", Plain, clobber=True)
    fsspec.register_implementation("webdav", Looped, clobber=True)
    monkeypatch.setattr(Plain, "objects", {"server/disk.raw": CONTENT})
    monkeypatch.setattr(Plain, "trouble", [])
    monkeypatch.setattr(Plain, "change", {})
    return f"{request.param}://server/disk.raw"


async def test_any_store(store: str) -> None:
    assert await content_of(store) == CONTENT
    assert "no such object" in await refused(f"{store}.not", NotFound)


async def test_a_request_that_is_cancelled_before_it_has_begun_is_none(store: str) -> None:
    storage = await open_storage(store, writable=False, network=NETWORK)
    assert isinstance(storage, RemoteStorage)
    for _ in range(20):
        with trio.CancelScope() as scope:
            scope.cancel()
            await storage._store.look(0)
        assert scope.cancelled_caught
    await storage.close()
    # where a coroutine that nobody awaited would be found, which is an error here
    gc.collect()


async def test_any_store_that_fails_for_a_while(store: str) -> None:
    Plain.trouble += [ConnectionResetError(errno.ECONNRESET, "geheim"), RuntimeError("geheim")]
    assert await content_of(store) == CONTENT
    assert not Plain.trouble
    Plain.trouble += [PermissionError("geheim")]
    assert "geheim" not in await refused(store, StorageError)


async def test_any_store_whose_object_changes_between_reading_and_asking(store: str) -> None:
    Plain.change["server/disk.raw"] = CONTENT[::-1]
    assert "has changed since it was opened" in await refused(store, StorageError)


async def test_any_store_that_is_too_slow(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await open_storage(store, writable=False, network=Network(NETWORK.timeout, 0))
    assert isinstance(storage, RemoteStorage)
    # this process may have been too slow until here
    monkeypatch.setattr(storage._store, "_timeout", 0.1)
    monkeypatch.setattr(Plain, "delay", 0.5)
    with pytest.raises(StorageError, match=r"has not answered for 0\.1 seconds"):
        await storage.read_bytes(0, 10)
    await storage.close()


async def test_a_store_that_needs_another_package() -> None:
    assert "pip install cowfs[remote] gcsfs" in await refused("gs://bucket/object", Unsupported)
