"""qcow2 images made and damaged for tests: what is where in the file, and ways to break it."""

import random
import struct
from pathlib import Path

from commandline import ok, qemu_img, qemu_io

MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63


class Anatomy:
    """The tables of an image as they stand in its bytes; offsets in bytes."""

    def __init__(self, image: Path | bytes) -> None:
        self.data = bytearray(image if isinstance(image, bytes) else image.read_bytes())
        fields = struct.unpack(">4sIQIIQIIQQIIQ", self.data[:72])
        self.version, self.bits = fields[1], fields[4]
        self.l1_entries, self.l1, self.table, self.table_clusters = fields[7:11]
        self.order = int.from_bytes(self.data[96:100], "big") if self.version == 3 else 4
        self.size = 1 << self.bits

    def get(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def put(self, offset: int, value: int, size: int = 8) -> None:
        self.data[offset : offset + size] = value.to_bytes(size, "big")

    def l1_places(self) -> list[int]:
        """Where L1 entries with a table stand."""
        return [self.l1 + 8 * i for i in range(self.l1_entries) if self.get(self.l1 + 8 * i) & MASK]

    def l2_places(self) -> list[int]:
        """Where L2 entries that are not 0 stand."""
        tables = [self.get(place) & MASK for place in self.l1_places()]
        return [t + 8 * i for t in tables for i in range(self.size // 8) if self.get(t + 8 * i)]

    def blocks(self) -> list[int]:
        """Where refcount table entries that are not 0 stand."""
        places = range(self.table, self.table + (self.table_clusters << self.bits), 8)
        return [place for place in places if self.get(place)]

    def snapshot_l1s(self) -> list[tuple[int, int]]:
        """L1 tables of internal snapshots: (offset, entries)."""
        found = []
        place = self.get(64)
        for _ in range(int.from_bytes(self.data[60:64], "big")):
            entries, id_length, name_length = struct.unpack_from(">IHH", self.data, place + 8)
            found.append((self.get(place), entries))
            extra = int.from_bytes(self.data[place + 36 : place + 40], "big")
            place += -(-(40 + extra + id_length + name_length) // 8) * 8
        return found

    def snapshot_tables(self) -> list[int]:
        """Where L1 entries of snapshots stand that lead to a table."""
        places = [l1 + 8 * i for l1, entries in self.snapshot_l1s() for i in range(entries)]
        return [place for place in places if self.get(place) & MASK]

    def bitmap_areas(self) -> list[tuple[int, int]]:
        """The bitmap directory and the tables that it leads to: (offset, bytes)."""
        place = self.data.find((0x23852875).to_bytes(4, "big"), 104, self.size)
        if place < 0:
            return []
        count, _, size, offset = struct.unpack_from(">IIQQ", self.data, place + 8)
        areas = [(offset, size)]
        for _ in range(count):
            table, entries, _, _, _, name, extra = struct.unpack_from(">QIIBBHI", self.data, offset)
            areas.append((table, 8 * entries))
            offset += -(-(24 + name + extra) // 8) * 8
        return areas

    def metadata(self) -> list[tuple[int, int]]:
        """Areas that hold metadata other than L1 and L2 tables: (offset, bytes)."""
        blocks = [(self.get(place) & MASK, self.size) for place in self.blocks()]
        return [(self.table, 64), *blocks, *self.bitmap_areas()]

    def write(self, path: Path) -> None:
        path.write_bytes(self.data)


def make(path: Path, seed: int, *, backing: Path | None = None) -> None:
    """Make an image of 4 MiB with random content, by QEMU; some with compressed clusters or a snapshot."""
    rnd = random.Random(seed)
    bits = rnd.choice([9, 12, 16])
    compat = rnd.choice(["1.1", "1.1", "1.1", "0.10"])
    options = f"cluster_size={1 << bits},compat={compat}"
    order = rnd.choice([1, 4, 16, 64]) if compat == "1.1" else 16
    if compat == "1.1":
        options += f",refcount_bits={order}"
    chain = ["-b", str(backing), "-F", "raw"] if backing else []
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, *chain, path, "4M"))
    fill(path, rnd)
    if order > 1 and rnd.random() < 0.4:
        ok(qemu_img("snapshot", "-c", "one", path))
        fill(path, rnd, count=6, packed=0)


def fill(path: Path, rnd: random.Random, *, count: int = 20, packed: int = 6) -> None:
    """Have QEMU write clusters: first ``packed`` compressed ones, then data and zeros."""
    size = 1 << int.from_bytes(path.read_bytes()[20:24], "big")
    clusters = rnd.sample(range((4 << 20) // size), packed)
    commands = [f"write -c -P {rnd.randrange(1, 256)} {cluster * size} {size}" for cluster in clusters]
    for _ in range(count):
        offset = rnd.randrange((4 << 20) // size) * size
        length = min(rnd.choice([size, 4 * size, 65536]), (4 << 20) - offset)
        flag = "-z" if rnd.random() < 0.2 else f"-P {rnd.randrange(1, 256)}"
        commands.append(f"write {flag} {offset} {length}")
    qemu_io(path, "qcow2", *commands)


def damage_entries(image: Anatomy, rnd: random.Random) -> None:
    """Change one L1 or L2 entry or reference count."""
    places = image.l2_places()
    if not places:
        return
    place = rnd.choice(places)
    other = image.get(rnd.choice(places))
    end = len(image.data) + image.size & -image.size
    far = COPIED | end + rnd.choice([0, 1, 1 << 20]) * image.size
    kind = rnd.randrange(8)
    if kind == 0:
        image.put(place, 0)
    elif kind == 1:
        image.put(place, other)
    elif kind == 2:
        image.data[place] ^= 0x80
    elif kind == 3:
        image.put(place, far)
    elif kind == 4 and image.get(place) & MASK and not image.get(place) & 1 << 62 and image.bits > 9:
        image.put(place, image.get(place) ^ 0x200)
    elif kind == 5 and not image.get(place) & 1 << 62:
        image.put(place, image.get(place) | 1 << 57)
    elif kind == 6:
        image.put(rnd.choice(image.l1_places()), rnd.choice([far, 0, image.get(rnd.choice(image.l1_places()))]))
    else:
        damage_counts(image, rnd)


def damage_counts(image: Anatomy, rnd: random.Random) -> None:
    """Change one reference count."""
    block = image.get(image.blocks()[0]) & MASK
    counts = min(len(image.data) >> image.bits, 8 * image.size >> image.order)
    image.data[block + (rnd.randrange(counts) << image.order) // 8] ^= 1 << rnd.randrange(2)


def wreck_refcounts(image: Anatomy, kind: str, rnd: random.Random) -> None:
    """Destroy the way to the reference counts."""
    entry = rnd.choice(image.blocks())
    if kind == "entry is 0":
        image.put(entry, 0)
    elif kind == "entry out of the file":
        image.put(entry, 1 << 40)
    elif kind == "entry unaligned":
        image.put(entry, image.get(entry) | 512)
    elif kind == "entry has reserved bits":
        image.put(entry, image.get(entry) | 3)
    elif kind == "entry points to data":
        data = [image.get(p) & MASK for p in image.l2_places() if image.get(p) & MASK and not image.get(p) & 1 << 62]
        image.put(entry, rnd.choice(data or [image.l1]) & -image.size)
    elif kind == "entries overlap":
        image.put(image.table + 8, image.get(image.table))
    elif kind == "block points to the table":
        image.put(entry, image.table)
    elif kind == "block is zero":
        block = image.get(entry) & MASK
        image.data[block : block + image.size] = bytes(image.size)
    elif kind == "block is garbage":
        block = image.get(entry) & MASK
        image.data[block : block + image.size] = rnd.randbytes(image.size)
    elif kind == "table is garbage":
        image.data[image.table : image.table + image.size] = rnd.randbytes(image.size)
    elif kind == "table out of the file":
        image.put(48, 1 << 40)
    elif kind == "table unaligned":
        image.put(48, image.table + 512)
    elif kind == "table over the L1 table":
        image.put(48, image.l1)
    elif kind == "no table":
        image.put(56, 0, 4)
    else:
        assert kind == "table too large"
        image.put(56, 0xFFFF_FFFF, 4)


WRECKS = [
    "entry is 0", "entry out of the file", "entry unaligned", "entry has reserved bits", "entry points to data",
    "entries overlap", "block points to the table", "block is zero", "block is garbage", "table is garbage",
    "table out of the file", "table unaligned", "table over the L1 table", "no table", "table too large",
]  # fmt: skip


KINDS = (
    "plain", "version 2", "1-bit counts", "8-bit counts", "64-bit counts", "zstd", "lazy", "snapshots",
    "shared snapshots", "bitmaps", "extended", "extended snapshots", "data file", "raw data file",
)  # fmt: skip


def _options(path: Path, kind: str, rnd: random.Random) -> str:
    bits = rnd.choice([14, 16] if "extended" in kind else [9, 12, 16])
    data = path.with_name("data")
    data.unlink(missing_ok=True)
    what = {
        "version 2": "compat=0.10",
        "1-bit counts": "refcount_bits=1",
        "8-bit counts": "refcount_bits=8",
        "64-bit counts": "refcount_bits=64",
        "zstd": "compression_type=zstd",
        "lazy": "lazy_refcounts=on",
        "extended": "extended_l2=on",
        "extended snapshots": "extended_l2=on",
        "data file": f"data_file={data}",
        "raw data file": f"data_file={data},data_file_raw=on",
    }.get(kind, "compat=1.1")
    return f"cluster_size={1 << bits},{what}"


def make_kind(path: Path, kind: str, rnd: random.Random, *, backing: Path | None = None) -> None:
    """Make an image of 4 MiB with random content, by QEMU, of one of `KINDS`; a data file lies beside it."""
    chain = ["-b", str(backing), "-F", "raw"] if backing and kind != "raw data file" else []
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", _options(path, kind, rnd), *chain, path, "4M"))
    fill(path, rnd, packed=0 if "data file" in kind else 6)
    if "snapshots" in kind:
        for name in ("one", "two"):
            ok(qemu_img("snapshot", "-c", name, path))
            if "shared" not in kind:
                fill(path, rnd, count=6, packed=0)
    if kind == "bitmaps":
        for name in ("one", "two"):
            ok(qemu_img("bitmap", "--add", "-g", "64k", path, name))
        fill(path, rnd, count=6, packed=0)
    if kind == "lazy" and rnd.random() < 0.5:
        image = Anatomy(path)
        image.data[79] |= 1
        image.write(path)


def damage_more(image: Anatomy, rnd: random.Random) -> None:
    """Damage something else: L1 tables of snapshots too, bitmaps, the refcount table, the end of the file."""
    kind = rnd.randrange(6)
    if kind == 0:
        del image.data[-rnd.randrange(1, 3 * image.size) :]
    elif kind == 1:
        image.data += bytes(rnd.randrange(1, 3 * image.size))
    elif kind == 2:
        place = rnd.choice(image.l1_places() + image.snapshot_tables())
        bit = rnd.choice([COPIED, 512, 1 << 60, 1])
        image.put(place, rnd.choice([0, image.get(place) ^ bit, COPIED | 1 << 40, image.l1]))
    else:
        start, length = rnd.choice(image.metadata())
        place = start + rnd.randrange(length) & -8
        image.put(place, rnd.choice([0, image.get(place) ^ 1 << rnd.randrange(64), COPIED | 1 << 40, image.l1]))
