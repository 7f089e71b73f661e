"""Launches of compiled kernels, without what Triton looks up anew at each of them.

Triton's own path specializes every argument, binds it by name and asks the driver about every pointer, which for
kernels of fifty arguments takes the processor longer than some of them take the GPU. Here the compiled kernel is found
by what decides on it: constants, and of each argument its type and whether its address is a multiple of 16 bytes. It is
then run as `JITFunction.run` does at its end, unless somebody wants to be told of launches.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import triton
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel with all that is known of it beside its arguments.

    kernel: a `triton.jit` function.
    constants: the parameters that follow its arguments, by name.
    options: more that the compiler shall know, by Triton's names.
    compiled: by kinds of arguments what was compiled for them, and the constants in the kernel's order.
    """

    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    options: dict[str, Any]
    compiled: dict[tuple, tuple[Any, tuple]] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        """What Triton is told beside the arguments, by its names."""
        # Multiplications are fused with additions, whatever a release of Triton does where nothing is said.
        always = {"enable_fp_fusion": True, "num_warps": self.warps, "num_stages": self.stages}
        return self.constants | always | self.options


@functools.cache
def variant(
    kernel: Any, constants: frozenset, warps: int, stages: int = 1, options: frozenset = frozenset()
) -> Variant:
    """The one Variant with these constants and options, given as pairs."""
    return Variant(kernel, dict(constants), warps, stages, dict(options))


@functools.cache
def _ordered(kernel: Any, constants: tuple, warps: int, stages: int) -> Variant:
    """The same by constants in an order: one place of the code has one, and a tuple is found sooner."""
    return variant(kernel, frozenset(constants), warps, stages)


def launch(variant: Variant, programs: int, arguments: tuple) -> Any:
    """Run `programs` programs of a kernel; the compiled kernel, or None in the interpreter.

    Args:
        arguments: tensors, numbers and None, in the kernel's order; the first is a tensor on the current device, or
            one without memory ("meta"): then the kernel is compiled for that device and not run.
    """
    values, kinds = [], [arguments[0].device]
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            values.append(address)
            kinds.append((x.dtype,) if address & 15 else x.dtype)
        else:
            values.append(x)
            # Of integers Triton's code may know whether they are 1 or multiples of 16, and it takes 32 bits or 64.
            kinds.append((x == 1, x & 15 == 0, -(2**31) <= x < 2**31) if isinstance(x, int) else type(x))
    found = variant.compiled.get(key := tuple(kinds))
    if found is None:
        return _compile(variant, programs, arguments, key)
    compiled, rest = found
    if _is_watched():
        compiled[(programs, 1, 1)](*values, *rest)
    else:
        stream = triton.runtime.driver.active.get_current_stream(arguments[0].device.index)
        told = None, None, None  # what a launch is called, and the hooks before and after it
        compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, *told, *values, *rest)
    return compiled


def _is_watched() -> bool:
    """Whether a profiler has hooks at launches; Triton's own way prepares at every launch what they would be told."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Triton's chains of hooks, unless somebody has put a hook there instead.
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def run(
    kernel: Any,
    programs: int,
    arguments: tuple,
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
) -> None:
    """`launch` the variant with these constants."""
    launch(_ordered(kernel, tuple(constants.items()), warps, stages), programs, arguments)


def _compile(variant: Variant, programs: int, arguments: tuple, key: tuple) -> Any:
    if arguments[0].is_meta:
        return variant.kernel.warmup(*arguments, grid=(programs,), **variant.told)
    compiled = variant.kernel[(programs,)](*arguments, **variant.told)
    if compiled is not None:
        names = variant.kernel.arg_names[len(arguments) :]
        variant.compiled[key] = compiled, tuple(variant.constants[name] for name in names)
    return compiled
