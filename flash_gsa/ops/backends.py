"""Which backends there are. A new one is a module with a `BACKEND` record and its line here."""

from . import chunk, reference
from .registry import register_backend
from .triton import backend as triton

for module in (reference, chunk, triton):
    register_backend(module.BACKEND)
