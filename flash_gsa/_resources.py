"""Files shipped with the package: recipes and the list of tested versions.

In a checkout they lie at the top of the repository; in a wheel, under `flash_gsa/_shipped/`.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """Path of a shipped file or folder, e.g. `shipped("recipes")`.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for candidate in (_PACKAGE / "_shipped" / name, _PACKAGE.parent / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        f"flash-gsa's own '{name}' is missing from this installation ({_PACKAGE}); reinstall flash-gsa"
    )
