"""Repair of QED images: entries that point nowhere are dropped as QEMU does, leaks are given back."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from commandline import ok, qemu_img
from imagetools import check_image, readable_clusters
from powercut import RecordingStorage
from qedtools import M, features_on_disk, header_on_disk, qemu_check, qemu_create, qemu_io

from cowfs.block.check import Repair
from cowfs.errors import CorruptImage
from cowfs.formats import qed
from cowfs.formats.chain import open_disk
from cowfs.formats.qed.check import ClusterSet
from cowfs.formats.qed.layout import Feature

FAR = 1 << 40


def _make(path: Path) -> bytearray:
    qemu_create(path, 16 * M, "-o", "cluster_size=4k,table_size=2")
    qemu_io(path, *[f"write -P {number + 1} {number * 4 * M} 256k" for number in range(4)])
    return bytearray(path.read_bytes())


def _table(image: bytearray, path: Path) -> int:
    """Host offset of the first L2 table."""
    l1 = header_on_disk(path).l1_offset
    return int.from_bytes(image[l1 : l1 + 8], "little")


def _put(image: bytearray, offset: int, value: int) -> None:
    image[offset : offset + 8] = value.to_bytes(8, "little")


def _assert_clean(path: Path) -> None:
    found = qemu_check(path)
    assert not (found.get("corruptions") or found.get("leaks")), found
    assert not features_on_disk(path) & Feature.NEED_CHECK


@pytest.mark.parametrize("value", [FAR + 512, 4096 + 512, 2])
async def test_entries_that_point_nowhere_are_dropped(tmp_path: Path, value: int) -> None:
    image = _make(path := tmp_path / "image")
    table = _table(image, path)
    _put(image, table + 8 * 3, value)
    _put(image, table + 8 * 5, value)
    _put(image, header_on_disk(path).l1_offset + 8, FAR)
    image[16] |= 2
    path.write_bytes(image)
    with pytest.raises(CorruptImage, match="repair it with 'cowfs check -r all'"):
        await open_disk(str(path), "qed", writable=True)
    (copy := tmp_path / "copy").write_bytes(image)
    theirs = json.loads(qemu_img("check", "-f", "qed", "-r", "all", "--output=json", copy).stdout)
    before = await readable_clusters(path, "qed")
    result = await check_image(path, "qed", Repair.ALL)
    assert result.corruptions_fixed == theirs["corruptions-fixed"] == 3
    assert (result.corruptions, result.leaks) == (0, 0)
    _assert_clean(path)
    after = await readable_clusters(path, "qed")
    assert [new if old is not None else None for old, new in zip(before, after, strict=True)] == before
    disk = await open_disk(str(path), "qed", writable=True)
    await disk.write(3 * 4096, b"again")
    await disk.close()
    _assert_clean(path)


async def test_with_leaks_alone_damage_is_left(tmp_path: Path) -> None:
    image = _make(path := tmp_path / "image")
    _put(image, _table(image, path) + 8 * 3, FAR)
    path.write_bytes(image)
    result = await check_image(path, "qed", Repair.LEAKS)
    assert (result.corruptions, result.corruptions_fixed, result.leaks_fixed) == (1, 0, 0)
    assert path.read_bytes() == image


async def test_leaks_are_given_back_and_the_mark_taken_off(tmp_path: Path) -> None:
    image = _make(path := tmp_path / "image")
    table = _table(image, path)
    for index in range(10, 20):
        _put(image, table + 8 * index, 0)
    image[16] |= 2
    path.write_bytes(image)
    before = await readable_clusters(path, "qed")
    assert (await check_image(path, "qed", Repair.LEAKS)).leaks_fixed == 10
    assert path.stat().st_size == len(image) - 10 * 4096
    assert await readable_clusters(path, "qed") == before
    _assert_clean(path)


async def test_clusters_with_two_users_stay_as_they_are(tmp_path: Path) -> None:
    image = _make(path := tmp_path / "image")
    table = _table(image, path)
    image[table : table + 8] = image[table + 8 : table + 16]
    path.write_bytes(image)
    result = await check_image(path, "qed", Repair.ALL)
    assert result.corruptions == qemu_check(path)["corruptions"] == 1
    assert (await readable_clusters(path, "qed"))[0] == (await readable_clusters(path, "qed"))[1]
    ok(qemu_img("info", path))


async def test_a_power_cut_during_a_repair_leaves_what_can_be_repaired(tmp_path: Path) -> None:
    image = _make(path := tmp_path / "image")
    table = _table(image, path)
    _put(image, table + 8 * 3, FAR)
    _put(image, table + 8 * 7, 0)
    path.write_bytes(image)
    before = await readable_clusters(path, "qed")
    storage = RecordingStorage("image", bytes(image))
    await (await qed.open_image(storage, for_repair=True)).check(Repair.ALL)
    for content in [*storage.prefixes(), *storage.cuts(random.Random(1), 3)]:
        path.write_bytes(content)
        await check_image(path, "qed", Repair.ALL)
        _assert_clean(path)
        after = await readable_clusters(path, "qed")
        assert [new if old is not None else None for old, new in zip(before, after, strict=True)] == before


async def test_data_that_a_wrong_l1_entry_takes_for_a_table_is_kept(tmp_path: Path) -> None:
    image = _make(path := tmp_path / "image")
    l1, table = header_on_disk(path).l1_offset, _table(image, path)
    data = int.from_bytes(image[table + 8 * 4 : table + 8 * 5], "little")
    image[data : data + 8192] = noise = random.Random(1).randbytes(8192)
    _put(image, l1 + 8, data)
    _put(image, table + 8 * 20, FAR)
    path.write_bytes(image)
    result = await check_image(path, "qed", Repair.ALL)
    assert (result.corruptions_fixed, result.corruptions) == (1, qemu_check(path)["corruptions"])
    disk = await open_disk(str(path), "qed")
    assert await disk.read(4 * 4096, 8192) == noise
    await disk.close()


def test_a_set_of_clusters_counts_what_is_in_already() -> None:
    """In order or not, once or twice, empty too."""
    chooser = np.random.default_rng(1)
    for _ in range(300):
        end = int(chooser.integers(1, 200))
        ours, model = ClusterSet(end), set[int]()
        for _ in range(5):
            clusters = chooser.integers(0, end, int(chooser.integers(0, 60)), np.int64)
            if chooser.random() < 0.5:
                clusters.sort()
            again = 0
            for cluster in clusters.tolist():
                again += cluster in model
                model.add(cluster)
            assert ours.add(clusters) == again
        assert ours.count_free() == end - len(model)
        assert np.concatenate(list(ours.free(end))).tolist() == sorted(set(range(end)) - model)
