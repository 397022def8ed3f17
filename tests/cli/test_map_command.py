"""``cowfs map`` against ``qemu-img map``, byte for byte, on images of every kind."""

import random
from pathlib import Path

import pytest
from commandline import ok, qemu_img, qemu_io

from cowfs.cli.main import main

_SOME = ["write 100k 70k", "write -z 1M 128k", "write -z -u 2M 64k", "discard 2500k 128k", "write 2M 1k"]
_MANY = ["write 0 200k", "write -z 1k 1k", "write -z 50k 20k", "discard 30k 4k", "write 300k 512", "discard 64k 64k"]
#: name: creation options, size, what is done to it
PLAIN: dict[str, tuple[str, str, list[str]]] = {
    "none.qcow2": ("", "0", []),
    "empty.qcow2": ("", "10M", []),
    "metadata.qcow2": ("preallocation=metadata", "3M", _SOME),
    "metadata-v2.qcow2": ("preallocation=metadata,compat=0.10", "3M", _SOME),
    "metadata-ext.qcow2": ("preallocation=metadata,extended_l2=on", "3M", _SOME),
    "metadata-narrow.qcow2": ("preallocation=metadata,refcount_bits=1,cluster_size=4k", "3M", _SOME),
    "falloc.qcow2": ("preallocation=falloc", "3M", _SOME),
    "full.qcow2": ("preallocation=full", "3M", _SOME),
    "zeros.qcow2": ("", "3000320", [*_MANY, *_SOME]),
    "zeros-v2.qcow2": ("compat=0.10", "3M", [*_MANY, *_SOME]),
    "small.qcow2": ("cluster_size=512", "1M", _MANY),
    "large.qcow2": ("cluster_size=2M", "5M", [*_MANY, *_SOME]),
    "ext.qcow2": ("extended_l2=on,cluster_size=16k", "1000448", _MANY),
    "data.qcow2": ("data_file=data.bytes", "3M", [*_MANY, *_SOME]),
    "data-raw.qcow2": ("data_file=data-raw.bytes,data_file_raw=on", "3M", [*_MANY, *_SOME]),
    "data-ext.qcow2": ("data_file=data-ext.bytes,extended_l2=on", "3M", [*_MANY, *_SOME]),
    "data-metadata.qcow2": ("data_file=data-metadata.bytes,preallocation=metadata", "3M", _SOME),
    "zeros.qed": ("", "3M", _SOME),
    "zeros-4k.qed": ("cluster_size=4k,table_size=2", "3000320", [*_MANY, *_SOME]),
    "falloc.raw": ("preallocation=falloc", "1M", []),
    "full.raw": ("preallocation=full", "1M", []),
}
#: the same for overlays, with the name of the backing file
OVERLAYS: dict[str, tuple[str, str, str, list[str]]] = {
    "on-holes.qcow2": ("", "holes.raw", "3M", ["write 1230k 1k"]),
    "on-odd.qcow2": ("", "odd.raw", "2M", []),
    "on-odd.qed": ("", "odd.raw", "999936", ["write -z 64k 64k"]),
    "ext-on-odd.qcow2": ("extended_l2=on", "odd.raw", "2M", ["write 4k 6k", "write 970k 3k", "write -z 1M 2k"]),
    "short.qcow2": ("", "on-odd.qcow2", "700k", ["write 64k 64k"]),
    "longer.qcow2": ("", "short.qcow2", "1500k", ["write -z 680k 64k", "write 1200k 4k"]),
    "longest.qed": ("", "longer.qcow2", "4M", ["write -z 3200k 64k", "write 1480k 1k"]),
    "on-metadata.qcow2": ("", "metadata.qcow2", "4M", ["write 3000k 1k", "write -z 64k 64k"]),
    "on-data.qed": ("", "data.qcow2", "2M", ["write 70k 1k"]),
    "on-packed.qcow2": ("", "packed.qcow2", "3M", ["write 70k 1k"]),
}
PACKED = ["packed.qcow2", "packed-4k.qcow2", "packed-ext.qcow2"]
NAMES = [*PLAIN, *OVERLAYS, *PACKED, "snapshot.qcow2", "holes.raw", "odd.raw"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("images")
    rnd = random.Random(1)
    (here / "odd.raw").write_bytes(rnd.randbytes(999_999))
    with (here / "holes.raw").open("wb") as file:
        file.truncate(1_234_567)
        for place in (0, 300_000, 1_234_566):
            file.seek(place)
            file.write(b"data")
    for name, (options, size, commands) in PLAIN.items():
        _make(here, name, options, size, commands)
    (here / "mix").write_bytes(rnd.randbytes(1_500_000) + bytes(300_000) + b"abc" * 300_000 + b"end.")
    for name, options in zip(PACKED, ("compat=1.1", "cluster_size=4k", "extended_l2=on"), strict=True):
        ok(qemu_img("convert", "-c", "-O", "qcow2", "-o", options, "mix", name, cwd=here))
        qemu_io(here / name, "qcow2", "write 64k 10k", "write -z 1M 64k", "write 1900k 3k", "write -z 2000k 2k")
    for name, (options, below, size, commands) in OVERLAYS.items():
        _make(here, name, options, size, commands, "-b", below, "-F", below.rpartition(".")[2])
    _make(here, "snapshot.qcow2", "", "1M", ["write 0 300k"])
    ok(qemu_img("snapshot", "-c", "one", "snapshot.qcow2", cwd=here))
    qemu_io(here / "snapshot.qcow2", "qcow2", "write 70k 1k", "write -z 128k 64k", "discard 0 64k")
    return here


def _make(here: Path, name: str, options: str, size: str, commands: list[str], *link: str) -> None:
    format = name.rpartition(".")[2]
    words = ["-o", options] if options else []
    ok(qemu_img("create", "-q", "-f", format, *words, *link, name, size, cwd=here))
    if commands:
        qemu_io(here / name, format, *commands, cwd=here)


@pytest.mark.parametrize("name", NAMES)
def test_every_map_is_that_of_qemu_img(
    images: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # both tell names of files as they were given
    monkeypatch.chdir(images)
    parts = [[]] if name == "none.qcow2" else [[], ["-s", "100k", "-l", "1M"], ["-s65537", "--max-length=300001"]]
    for part in parts:
        for output in ("json", "human"):
            words = ["map", *part, f"--output={output}", name]
            theirs = qemu_img(*words)
            assert main(words) == theirs.returncode
            out, err = capsys.readouterr()
            if theirs.returncode == 0:
                assert (out, err) == (theirs.stdout, "")
            else:
                assert "packed" in name
                assert "compressed clusters" in theirs.stderr
                assert (out, err.count("\n")) == ("", 1)
