"""Registration of model type "gsa" with transformers' Auto classes, without importing transformers first.

`import flash_gsa` promises that `AutoModelForCausalLM.from_pretrained` knows GSA checkpoints. Importing
torch and transformers takes seconds, which `flash-gsa --help` and shell completion do not have. So where
transformers is not imported yet, a finder waits for that and registers right after it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_WAITED_FOR = "transformers"


def register_when_imported() -> None:
    """Register now if transformers is imported, else as soon as it is."""
    if _WAITED_FOR in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("flash_gsa.models")


class _Finder(MetaPathFinder):
    """Finds transformers as the other finders do, but with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WAITED_FOR:
            return None
        # Others are asked directly: importlib.util.find_spec would come back here. And this finder stays where it
        # is until the import itself, because many packages only look whether transformers is there.
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(spec.loader)
                return spec
        return None


class _Registering(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        _register()
