"""Random file operations on a flat file and on a plain one."""

import os
from pathlib import Path

import pytest
from commandline import ok, qemu_img
from fsx import Fsx
from mounting import Mounts

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img")]

SIZE = 4 << 20
OPERATIONS = int(os.environ.get("COWFS_FSX", "1500"))
SEED = int(os.environ.get("COWFS_SEED", "1"))

#: name: format, options of creation, size of the backing file, mount options
KINDS = {
    "raw": ("raw", "", 0, "allow-shrink"),
    "qcow2": ("qcow2", "", 0, "allow-shrink"),
    "qcow2-over": ("qcow2", "cluster_size=4k", SIZE, "allow-shrink,flush-interval=0.05"),
    "qcow2-short-base": ("qcow2", "", SIZE // 2 + 700, "detect-zeroes=unmap"),
    "qcow2-v2-over": ("qcow2", "compat=0.10", SIZE, "detect-zeroes=on"),
    "qcow2-extended-over": ("qcow2", "extended_l2=on", SIZE, "no-writeback-cache,detect-zeroes=unmap"),
    "qcow2-data-over": ("qcow2", "data_file=data", SIZE, "no-copy-on-read"),
    "qed-over": ("qed", "", SIZE, "flush-interval=0.05"),
    "qed": ("qed", "cluster_size=4k", 0, "no-writeback-cache"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_difference(mount: Mounts, tmp_path: Path, kind: str) -> None:
    format, options, below, how = KINDS[kind]
    path = tmp_path / f"disk.{format}"
    words = ["-o", options] if options else []
    if below:
        (tmp_path / "base").write_bytes(os.urandom(below))
        words += ["-b", "base", "-F", "raw"]
    ok(qemu_img("create", "-q", "-f", format, *words, path, str(SIZE), cwd=tmp_path))
    mounted = mount("-o", how, path)
    fsx = Fsx(mounted.flat("disk"), tmp_path / "plain", SEED, shrink="allow-shrink" in how)
    try:
        fsx.run(OPERATIONS)
    finally:
        fsx.close()
    mounted.umount()
    if format != "raw":
        checked = qemu_img("check", path, cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    same = qemu_img("compare", "-f", "raw", tmp_path / "plain", "-F", format, path, cwd=tmp_path)
    assert same.returncode == 0, same.stdout + same.stderr
