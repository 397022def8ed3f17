"""Imports run downward only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowfs

_PACKAGE = Path(cowfs.__file__).parent
#: lowest first; a module may import its own layer and those before it
_ORDER = ("errors", "lazy", "units", "storage", "block", "formats", "jobs", "fuse", "cli")
_MODULES = sorted(_PACKAGE.rglob("*.py"))


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("module", _MODULES, ids=[str(path.relative_to(_PACKAGE)) for path in _MODULES])
def test_a_module_imports_nothing_from_above(module: Path) -> None:
    own = module.relative_to(_PACKAGE).with_suffix("").parts[0]
    if own in ("__init__", "__main__"):
        return
    for line, name in _imported(ast.parse(module.read_text())):
        parts = name.split(".")
        if parts[0] == "cowfs" and parts[1] != "__version__":
            assert _ORDER.index(parts[1]) <= _ORDER.index(own), f"line {line} imports {name}"


def test_every_package_has_its_place() -> None:
    names = {path.relative_to(_PACKAGE).with_suffix("").parts[0] for path in _MODULES}
    assert names - {"__init__", "__main__"} == set(_ORDER)
