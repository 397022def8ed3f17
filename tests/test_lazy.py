"""What a command does not use it does not import."""

import subprocess
import sys
from pathlib import Path

import pytest
from commandline import ok, qemu_img

#: runs a command, and prints which of the modules that take long it has imported
_RUN = """
import sys
from cowfs.cli.main import main
assert main(sys.argv[1:]) == 0
print(*(name for name in ("numpy", "rich", "fsspec", "asyncio") if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("format", ["qcow2", "qed", "raw"])
@pytest.mark.parametrize("words", [["info"], ["map"], ["compare", "-q"]], ids=lambda words: words[0])
def test_reading_an_image_needs_none_of_the_large_modules(tmp_path: Path, format: str, words: list[str]) -> None:
    image = tmp_path / f"disk.{format}"
    ok(qemu_img("create", "-q", "-f", format, image, "1M"))
    files = [image, image] if words[0] == "compare" else [image]
    done = subprocess.run([sys.executable, "-c", _RUN, *words, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
