"""Writes fla_functions.json, what `test_fla.py` knows of flash-linear-attention without having it installed.

    pip download --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0
    python -m tests.integrations.record_fla *.whl

Reads the source in the wheels and imports none of it.
"""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from zipfile import ZipFile

FUNCTIONS = {"chunk_gsa": "fla/ops/gsa/chunk.py", "fused_recurrent_gsa": "fla/ops/gsa/fused_recurrent.py"}
RECORD = Path(__file__).with_name("fla_functions.json")


def main(wheels: list[Path]) -> None:
    sources: dict[str, str] = {}
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            sources |= {n: archive.read(n).decode() for n in archive.namelist() if n.endswith(".py")}
    functions = {name: function(sources[path], name) for name, path in FUNCTIONS.items()}
    record = {
        "version": str(re.search(r'__version__ = "(.+)"', sources["fla/__init__.py"])[1]),
        "wheels": {wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels},
        "functions": {name: {"defined_in": FUNCTIONS[name], **found} for name, found in functions.items()},
        "imported_by": sorted(path for path, source in sources.items() if imports_gsa(source)),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(RECORD.read_text(encoding="utf-8"))


def function(source: str, name: str) -> dict:
    """Parameters of the function `name`: those by position with their defaults, and what takes the rest."""
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    arguments = node.args
    assert not arguments.posonlyargs, name
    assert not arguments.kwonlyargs, name
    assert arguments.vararg is None, name
    required = len(arguments.args) - len(arguments.defaults)
    return {
        "decorators": [ast.unparse(d) for d in node.decorator_list],
        "required": [a.arg for a in arguments.args[:required]],
        "optional": {
            a.arg: ast.literal_eval(d) for a, d in zip(arguments.args[required:], arguments.defaults, strict=True)
        },
        "other_keywords": arguments.kwarg.arg if arguments.kwarg else None,
    }


def imports_gsa(source: str) -> bool:
    """Whether the module binds one of the functions to its own name by `from … import`."""
    imports = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom))
    return any(alias.name in FUNCTIONS and alias.asname in (None, alias.name) for n in imports for alias in n.names)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
