"""What is wrong with a qcow2 header, in the words that a user reads: one sentence, nothing changed, little memory."""

from pathlib import Path

import pytest
from commandline import ok, qemu_img
from goldenqcow2 import (
    BACKING_FORMAT,
    CLUSTER,
    CONTENT,
    DATA_FILE,
    END,
    FEATURE_NAMES,
    L1,
    SNAPSHOTS,
    TABLE,
    UNKNOWN,
    Golden,
    feature_names,
    in_little_memory,
    open_golden,
)  # fmt: skip
from imagetools import disk_content

from cowfs.errors import CowfsError


def names(*entries: tuple[int, int, bytes]) -> tuple[int, bytes]:
    return FEATURE_NAMES, feature_names(*entries)


#: the image, what is said of it
REFUSED: dict[str, tuple[Golden, str]] = {
    "empty": (Golden().cut(0), "is too short for a qcow2 image: 0 bytes"),
    "short": (Golden().cut(40), "is too short for a qcow2 image: 40 bytes"),
    "cut in the header": (Golden().cut(80), "is cut off inside its header"),
    "cut behind version 3": (Golden().cut(108), "is cut off inside its header"),
    "magic": (Golden().set(magic=0x5146_49FA), "is not a qcow2 image"),
    "version 0": (Golden().set(version=0), "is of qcow2 version 0; cowfs knows 2 and 3"),
    "version 1": (Golden().set(version=1), "is of qcow2 version 1; cowfs knows 2 and 3"),
    "version 4": (Golden().set(version=4), "is of qcow2 version 4; cowfs knows 2 and 3"),
    "cluster bits 0": (Golden().set(cluster_bits=0), "has a cluster size of 2^0, which is out of range"),
    "cluster bits 8": (Golden().set(cluster_bits=8), "has a cluster size of 2^8, which is out of range"),
    "cluster bits 22": (Golden().set(cluster_bits=22), "has a cluster size of 2^22, which is out of range"),
    "cluster bits 2^32 - 1": (
        Golden().set(cluster_bits=0xFFFF_FFFF),
        "has a cluster size of 2^4294967295, which is out of range",
    ),
    "refcount order 7": (
        Golden().set(refcount_order=7),
        "has a reference count width of 2^7 bits, which is out of range",
    ),
    "refcount order 2^32 - 1": (
        Golden().set(refcount_order=0xFFFF_FFFF),
        "has a reference count width of 2^4294967295 bits, which is out of range",
    ),
    "header length 0": (Golden().set(header_length=0), "has a header length of 0, which makes no sense"),
    "header length 103": (Golden().set(header_length=103), "has a header length of 103, which makes no sense"),
    "header length 108": (Golden().set(header_length=108), "has a header length of 108, which makes no sense"),
    "header length 4104": (Golden().set(header_length=4104), "has a header length of 4104, which makes no sense"),
    "header length 4e9": (
        Golden().set(header_length=4_000_000_000),
        "has a header length of 4000000000, which makes no sense",
    ),
    "AES": (Golden().set(crypt_method=1), "is encrypted (AES), which cowfs does not support"),
    "LUKS": (Golden().set(crypt_method=2), "is encrypted (LUKS), which cowfs does not support"),
    "crypt method 7": (Golden().set(crypt_method=7), "is encrypted (method 7), which cowfs does not support"),
    "unknown feature": (
        Golden().set(incompatible=1 << 5),
        "needs unknown incompatible feature 5, which cowfs does not support",
    ),
    "unknown features": (
        Golden().set(incompatible=1 << 63 | 1 << 40),
        "needs unknown incompatible feature 40, unknown incompatible feature 63, which cowfs does not support",
    ),
    "feature with a name": (
        Golden().set(incompatible=1 << 33).extend(*names((0, 33, b"time travel"), (1, 33, b"a compatible one"))),
        "needs the feature 'time travel', which cowfs does not support",
    ),
    "features with and without a name": (
        Golden().set(incompatible=1 << 33 | 1 << 34).extend(*names((2, 34, b"autoclear"), (0, 33, b"x" * 46))),
        f"needs the feature '{'x' * 46}', unknown incompatible feature 34, which cowfs does not support",
    ),
    "feature with a name for a terminal": (
        Golden().set(incompatible=1 << 33).extend(*names((0, 33, b"\x1b[2Jgone"))),
        "needs a nameless feature, which cowfs does not support",
    ),
    "feature name table of odd length": (
        Golden().set(incompatible=1 << 33).extend(FEATURE_NAMES, names((0, 33, b"cut"))[1][:47]),
        "needs unknown incompatible feature 33, which cowfs does not support",
    ),
    "compression type without its bit": (
        Golden().set(compression_type=1),
        "has a compression type that contradicts its feature bits",
    ),
    "compression bit without a type": (
        Golden().set(incompatible=8),
        "has a compression type that contradicts its feature bits",
    ),
    "compression type 2": (
        Golden().set(incompatible=8, compression_type=2),
        "uses compression type 2, which is unknown",
    ),
    "small clusters with subclusters": (
        Golden().set(incompatible=16),
        "has extended L2 entries with clusters of 4096 bytes, which are too small",
    ),
    "extension too long": (
        Golden().extend(UNKNOWN, b"abc", length=CLUSTER),
        "has a header extension 0x12345678 that reaches beyond the header",
    ),
    "extension of 4 GiB": (
        Golden().extend(UNKNOWN, b"abc", length=0xFFFF_FFFF),
        "has a header extension 0x12345678 that reaches beyond the header",
    ),
    "extension into the backing file's name": (
        Golden().extend(BACKING_FORMAT, b"raw", length=1000).name(b"base", 1024),
        "has a header extension 0xe2792aca that reaches beyond the header",
    ),
    "backing name of 1024 bytes": (
        Golden().name(b"n" * 1024),
        "has a backing file name that does not lie inside its first cluster",
    ),
    "backing name of 4 GiB": (
        Golden().set(backing_offset=1024, backing_length=0xFFFF_FFFF),
        "has a backing file name that does not lie inside its first cluster",
    ),
    "backing name over the border": (
        Golden().set(backing_offset=CLUSTER - 4, backing_length=5),
        "has a backing file name that does not lie inside its first cluster",
    ),
    "backing name far away": (
        Golden().set(backing_offset=1 << 62, backing_length=5),
        "has a backing file name that does not lie inside its first cluster",
    ),
    "backing name in the header": (
        Golden().set(backing_offset=100, backing_length=5),
        "has a backing file name that does not lie inside its first cluster",
    ),
    "backing name with a NUL": (Golden().name(b"ba\0se"), "has a backing file name with a NUL byte in it"),
    "disk of 2^63 bytes": (Golden().set(size=1 << 63), "claims a disk of 9223372036854775808 bytes"),
    "L1 too small": (Golden().set(size=4 << 20), "has an L1 table that is too small for its disk"),
    "no L1": (Golden().set(l1_entries=0), "has an L1 table that is too small for its disk"),
    "L1 too large": (
        Golden().set(l1_entries=(32 << 20) // 8 + 1),
        "has an L1 table of 4194305 entries, which is too large",
    ),
    "L1 of 2^32 - 1": (
        Golden().set(l1_entries=0xFFFF_FFFF),
        "has an L1 table of 4294967295 entries, which is too large",
    ),
    "L1 of 32 MiB": (
        Golden().set(l1_entries=(32 << 20) // 8),
        "has its L1 table at offset 0x3000, beyond the end of the file",
    ),
    "L1 at 0": (Golden().set(l1_offset=0), "has its L1 table at offset 0x0, which is not a place for one"),
    "L1 misaligned": (
        Golden().set(l1_offset=L1 + 512),
        "has its L1 table at offset 0x3200, which is not a place for one",
    ),
    "L1 beyond the file": (
        Golden().set(l1_offset=END),
        "has its L1 table at offset 0x9000, beyond the end of the file",
    ),
    "L1 far away": (
        Golden().set(l1_offset=(1 << 64) - CLUSTER),
        "has its L1 table at offset 0xfffffffffffff000, beyond the end of the file",
    ),
    "no refcount table": (Golden().set(table_clusters=0), "has no refcount table"),
    "refcount table too large": (
        Golden().set(table_clusters=(8 << 20) // CLUSTER + 1),
        "has a refcount table of 8392704 bytes, which is too large",
    ),
    "refcount table of 2^32 - 1": (
        Golden().set(table_clusters=0xFFFF_FFFF),
        "has a refcount table of 17592186040320 bytes, which is too large",
    ),
    "refcount table at 0": (
        Golden().set(table_offset=0),
        "has its refcount table at offset 0x0, which is not a place for one",
    ),
    "refcount table misaligned": (
        Golden().set(table_offset=TABLE + 8),
        "has its refcount table at offset 0x1008, which is not a place for one",
    ),
    "refcount table beyond the file": (
        Golden().set(table_offset=1 << 50),
        "has its refcount table at offset 0x4000000000000, beyond the end of the file",
    ),
    "too many snapshots": (
        Golden().set(snapshots=65537, snapshots_offset=SNAPSHOTS),
        "claims 65537 internal snapshots, which is too many",
    ),
    "snapshot table misaligned": (
        Golden().snapshot().set(snapshots_offset=SNAPSHOTS + 8),
        "has its snapshot table at offset 0x7008, which is not a place for one",
    ),
    "snapshot table beyond the file": (
        Golden().snapshot().set(snapshots_offset=END),
        "has its snapshot table at offset 0x9000, beyond the end of the file",
    ),
    "data file without a name": (
        Golden().set(incompatible=4),
        "has an external data file without saying what it is called",
    ),
    "data file with an empty name": (
        Golden().set(incompatible=4).extend(DATA_FILE, b""),
        "has an external data file without saying what it is called",
    ),
    "data file with a NUL in its name": (
        Golden().set(incompatible=4).extend(DATA_FILE, b"da\0ta"),
        "has an external data file without saying what it is called",
    ),
    "data file and snapshots": (
        Golden().snapshot().set(incompatible=4).extend(DATA_FILE, b"data"),
        "has internal snapshots and an external data file, which exclude each other",
    ),
    "raw data file and backing file": (
        Golden().set(incompatible=4, autoclear=2).extend(DATA_FILE, b"data").name(b"base"),
        "has a backing file and a raw external data file, which exclude each other",
    ),
}


QEMU_OPENS = {
    "cut behind version 3", "header length 108", "backing name in the header", "L1 of 32 MiB", "L1 at 0",
    "L1 beyond the file", "no refcount table", "refcount table at 0", "refcount table beyond the file",
    "snapshot table beyond the file",
}  # fmt: skip


@pytest.mark.parametrize("with_snapshot", [False, True])
async def test_the_image_without_a_fault(tmp_path: Path, with_snapshot: bool) -> None:
    golden = Golden().snapshot() if with_snapshot else Golden()
    image, _ = await open_golden(golden)
    assert await disk_content(image) == CONTENT
    found = await image.check()
    assert (found.corruptions, found.leaks) == (0, 0), found.messages
    assert [snapshot.name for snapshot in await image.snapshots()] == ["one"] * with_snapshot
    path = tmp_path / "image"
    path.write_bytes(golden.data)
    ok(qemu_img("check", "-q", path))
    ok(qemu_img("convert", "-O", "raw", path, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == CONTENT


@pytest.mark.parametrize("case", REFUSED)
async def test_refused_when_opened(case: str) -> None:
    golden, sentence = REFUSED[case]

    async def attempt() -> None:
        with pytest.raises(CowfsError) as caught:
            await open_golden(golden)
        assert str(caught.value) == f"image: {sentence}"

    await in_little_memory(attempt)


@pytest.mark.parametrize("case", REFUSED)
def test_qemu_does_not_open_these_either(tmp_path: Path, case: str) -> None:
    """It opens some whose tables lie where there is nothing, and what only the specification forbids."""
    path = tmp_path / "image"
    path.write_bytes(REFUSED[case][0].data)
    opened = qemu_img("check", "-U", "-f", "qcow2", path).returncode != 1
    assert opened == (case in QEMU_OPENS)
