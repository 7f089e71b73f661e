"""Launches of compiled kernels, without what Triton looks up anew at each of them.

Triton's own path specializes every argument and binds it by name, which for kernels of fifty arguments takes the
processor longer than some of them take the GPU. Here the compiled kernel is found by what decides on it: constants, and
of each argument its type and whether its address is a multiple of 16 bytes.
"""

from typing import Any

from torch import Tensor

_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple,
    constants: dict[str, Any],
    warps: int,
    stages: int = 1,
    **options: Any,
) -> Any:
    """Run `programs` programs of a kernel; the compiled kernel, or None in the interpreter.

    Args:
        kernel: a `triton.jit` function that specializes no numbers (do_not_specialize).
        arguments: tensors, numbers and None, in its order; the first is a tensor on the current device.
        constants: the parameters that follow, by name.
        options: more that the compiler shall know, by Triton's names.
    """
    key = (kernel, arguments[0].device, warps, stages, *options.items(), *constants.items(), *map(_kind, arguments))
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, **options)
        if compiled is not None:
            _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return compiled
    compiled, rest = found
    compiled[(programs, 1, 1)](*arguments, *rest)
    return compiled


def _kind(x: Any) -> Any:
    """All that the compiled code knows of an argument."""
    if isinstance(x, Tensor):
        return x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,)
    if isinstance(x, int):
        return -(2**31) <= x < 2**31
    return type(x)
