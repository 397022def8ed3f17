"""All kinds of qcow2 images, all operations, QEMU and cowfs in turns on one file.

The selection has every pair of properties. ``COWFS_MATRIX=3`` asks for every three of them, and ``COWFS_SEED`` for
other layouts and other moves.
"""

import os
from pathlib import Path

import pytest
from covering import Row
from qcow2matrix import Player, layouts

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

STRENGTH = int(os.environ.get("COWFS_MATRIX", "2"))
SEED = int(os.environ.get("COWFS_SEED", "1"))
ROUNDS = 2


def name_of(layout: Row) -> str:
    return ", ".join(value if value[0] not in "on" else f"{name} {value}" for name, value in layout.items())


@pytest.mark.parametrize("layout", layouts(STRENGTH, SEED), ids=name_of)
async def test_qemu_and_cowfs_take_turns(tmp_path: Path, layout: Row) -> None:
    player = Player(tmp_path, layout, SEED)
    await player.make()
    await player.verify()
    for _ in range(ROUNDS):
        await player.cowfs_moves()
        await player.verify()
        player.qemu_moves()
        await player.verify()
