"""A compiled kernel is launched again only for arguments that it was compiled for."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

import triton
from triton.compiler import CompiledKernel

from flash_gsa.ops.triton import launching

CONSTANTS = {"BACK": False, "SIZE": 16}  # in another order than the kernel's
TOLD = {"enable_fp_fusion": True}  # always; Triton's own default differs between releases


class Kernel:
    """What `launch` needs of a `triton.jit` function.

    `compiled` collects (grid, arguments, options) of launches that go through Triton, `launched` (compiled, grid,
    arguments) of the others, `warmed_up` what is compiled without being run.
    """

    arg_names = ("x", "y", "n", "SIZE", "BACK")

    def __init__(self, interpreted=False):
        self.interpreted, self.compiled, self.launched, self.warmed_up = interpreted, [], [], []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self._compile(grid, arguments, options)

    def warmup(self, *arguments, grid, **options):
        self.warmed_up.append((grid, arguments, options))

    def _compile(self, grid, arguments, options):
        self.compiled.append((grid, arguments, options))
        return None if self.interpreted else Compiled(self)


class Compiled:
    """What a launch needs of Triton's own compiled kernel, whose way of launching is the one that is Triton's here."""

    name, function, packed_metadata, src = "kernel", 5, (4, 1, 0), None
    __getitem__, launch_metadata = CompiledKernel.__getitem__, CompiledKernel.launch_metadata

    def __init__(self, kernel):
        self.kernel, self.told = kernel, []

    def _init_handles(self):
        pass

    def run(self, x, y, z, stream, function, packed_metadata, metadata, enter, leave, *arguments):
        assert (stream, function, packed_metadata) == (STREAM, self.function, self.packed_metadata)
        self.told.append((metadata, enter, leave))
        self.kernel.launched.append((self, (x, y, z), arguments))


STREAM = 77


class Driver:
    def get_current_device(self):
        return None

    def get_current_stream(self, device):
        assert device is None  # the index of the tensors' device, the CPU here
        return STREAM


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


X = torch.zeros(9)
assert X.data_ptr() % 16 == 0


def launch(kernel, x=X, y=X, n=3, programs=7, constants=CONSTANTS, warps=4, stages=2, **options):
    variant = launching.variant(kernel, frozenset(constants.items()), warps, stages, frozenset(options.items()))
    return launching.launch(variant, programs, (x, y, n))


def test_the_first_launch_goes_through_triton():
    kernel = Kernel()
    assert isinstance(launch(kernel), Compiled)
    assert kernel.compiled == [((7,), (X, X, 3), CONSTANTS | TOLD | {"num_warps": 4, "num_stages": 2})]
    assert not kernel.launched


def test_tensors_without_memory_only_compile():
    kernel, x = Kernel(), X.to("meta")
    for _ in range(2):
        launch(kernel, x, x)
    assert kernel.warmed_up == 2 * [((7,), (x, x, 3), CONSTANTS | TOLD | {"num_warps": 4, "num_stages": 2})]
    assert not kernel.compiled
    assert not kernel.launched
    # Which says nothing about another device.
    assert isinstance(launch(kernel), Compiled)
    assert len(kernel.compiled) == 1


@pytest.mark.parametrize("change", [{}, {"n": 2**31 - 1}, {"n": -5}, {"x": torch.ones(4, 5)[0]}, {"y": X[4:]}], ids=str)
def test_what_was_compiled_for_the_same_is_launched_with_constants_in_its_order(change):
    kernel = Kernel()
    compiled = launch(kernel)
    assert launch(kernel, programs=8, **change) is compiled
    assert len(kernel.compiled) == 1
    ((of, grid, arguments),) = kernel.launched
    assert (of, grid) == (compiled, (8, 1, 1))
    wanted = {"x": X, "y": X, "n": 3} | change | {"SIZE": 16, "BACK": False}
    assert arguments == tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in wanted.values())


def test_a_launch_is_tritons_own_but_for_what_hooks_are_told():
    kernel = Kernel()
    compiled = launch(kernel)
    launch(kernel)
    ((_, grid, arguments),) = kernel.launched
    compiled[grid](*arguments)
    ours, theirs = kernel.launched
    assert ours == theirs
    assert compiled.told[0] == (None, None, None)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_watches_launches_is_told(name, monkeypatch):
    def hook(metadata):
        pass

    kernel = Kernel()
    compiled = launch(kernel)
    getattr(triton.knobs.runtime, name).add(hook)
    try:
        launch(kernel)
    finally:
        getattr(triton.knobs.runtime, name).remove(hook)
    monkeypatch.setattr(triton.knobs.runtime, name, hook)  # in the place of the chain
    launch(kernel)
    monkeypatch.undo()
    assert [metadata.get()["name"] for metadata, _, _ in compiled.told] == ["kernel", "kernel"]
    chain, alone = (told[1 if name == "launch_enter_hook" else 2] for told in compiled.told)
    assert isinstance(chain, triton.knobs.HookChain)
    assert alone is hook
    assert len(kernel.launched) == 2


def test_fusion_can_be_refused():
    kernel = Kernel()
    launch(kernel, enable_fp_fusion=False)
    ((_, _, options),) = kernel.compiled
    assert options["enable_fp_fusion"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"y": X.double()},
        {"y": X[1:]},
        {"y": None},
        {"n": 2**31 + 1},
        {"n": 1},
        {"n": 32},
        {"n": 3.0},
        {"constants": CONSTANTS | {"SIZE": 32}},
        {"warps": 8},
        {"stages": 3},
        {"maxnreg": 168},
        {"maxnreg": 128, "enable_fp_fusion": False},
    ],
    ids=[
        "dtype",
        "misaligned",
        "None",
        "large",
        "one",
        "multiple of 16",
        "float",
        "constant",
        "warps",
        "stages",
        "registers",
        "options",
    ],
)
def test_what_the_compiled_code_depends_on_compiles_anew(change):
    kernel = Kernel()
    first = launch(kernel)
    other = launch(kernel, **change)
    assert other is not first
    assert len(kernel.compiled) == 2
    # Both are kept.
    assert (launch(kernel), launch(kernel, **change)) == (first, other)
    assert [of for of, _, _ in kernel.launched] == [first, other]


def test_constants_may_be_given_by_name():
    kernel = Kernel()
    launching.run(kernel, 7, (X, X, 3), CONSTANTS, warps=8)
    assert kernel.compiled == [((7,), (X, X, 3), CONSTANTS | TOLD | {"num_warps": 8, "num_stages": 3})]
    launching.run(kernel, 7, (X, X, 3), dict(reversed(CONSTANTS.items())), warps=8)
    assert len(kernel.compiled) == len(kernel.launched) == 1


def test_the_compiler_is_told_of_options():
    kernel = Kernel()
    launch(kernel, maxnreg=168)
    assert kernel.compiled == [((7,), (X, X, 3), CONSTANTS | TOLD | {"num_warps": 4, "num_stages": 2, "maxnreg": 168})]


def test_kernels_are_told_apart():
    one, other = Kernel(), Kernel()
    launch(one)
    launch(other)
    assert len(one.compiled) == len(other.compiled) == 1


def test_in_the_interpreter_nothing_is_kept():
    kernel = Kernel(interpreted=True)
    assert launch(kernel) is launch(kernel) is None
    assert len(kernel.compiled) == 2
