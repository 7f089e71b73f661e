"""What is counted is what the kernels load and store, seen in Triton's interpreter, and what PyTorch allocates.

The interpreter is chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that
starts it, and those of results and tables.
"""

import json
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.ops.interpreter import run_in_interpreter

triton = pytest.importorskip("triton")

from benchmarks import operator_bytes  # noqa: E402
from flash_gsa.benchmarking.gate import with_gradients  # noqa: E402
from flash_gsa.benchmarking.implementations import boundaries  # noqa: E402
from flash_gsa.benchmarking.shapes import SUITES, Shape  # noqa: E402
from flash_gsa.ops.triton import launching  # noqa: E402
from flash_gsa.ops.triton.library import attention  # noqa: E402
from flash_gsa.ops.triton.tiles import Tile, Tiles, using  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.ops.rounding import as_on_a_gpu

    class Touched(operator_bytes.Launch):
        """A launch and the addresses that its programs load from and store to."""

        def __init__(self, *of):
            super().__init__(*of)
            self.loaded, self.stored = [], []

    @contextmanager
    def watched(monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        launches = []
        launch = launching.launch
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def watching(variant, programs, arguments):
            named = dict(zip(variant.kernel.arg_names, arguments, strict=False))
            launches.append(Touched(variant.kernel.fn.__name__, named, variant.constants))
            launch(variant, programs, arguments)

        def loading(self, pointers, mask, *rest):
            launches[-1].loaded.append(pointers.data[mask.data])
            return load(self, pointers, mask, *rest)

        def storing(self, pointers, value, mask, *rest):
            launches[-1].stored.append(pointers.data[mask.data])
            return store(self, pointers, value, mask, *rest)

        monkeypatch.setattr(launching, "launch", watching)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", storing)
        with as_on_a_gpu():
            yield launches

    def touched(x, addresses):
        """Bytes of x among the addresses of elements."""
        begin = x.data_ptr()
        return x.element_size() * int(((addresses >= begin) & (addresses < begin + x.nbytes)).sum())

    @pytest.mark.parametrize(("C", "BT"), [(32, 16), (32, 32)])
    def test_counted_is_what_is_loaded_and_stored(C, BT, monkeypatch):
        shape = Shape("small", B=1, T=64, HQ=2, H=2, K=64, V=32, M=64)
        random = torch.Generator().manual_seed(0)
        x, do = operator_bytes._inputs(shape, torch.bfloat16)
        x, do = (
            {name: torch.randn(y.shape, generator=random).to(y.dtype) for name, y in tensors.items()}
            for tensors in (x, {"do": do})
        )
        x["g"] = -x["g"].abs() / 8
        with using(Tiles(C, BT, *[Tile(32, 4, 1)] * 5)), watched(monkeypatch) as launches:
            with_gradients(operator_bytes._forward, x, do["do"])
        assert {launch.kernel for launch in launches} == operator_bytes.MOVED.keys()
        for launch in launches:
            for expected, seen in ((launch.reads, launch.loaded), (launch.writes, launch.stored)):
                addresses = np.unique(np.concatenate(seen)).astype(np.int64)
                found = {name: touched(launch.arguments[name], addresses) for name in expected}
                assert found == expected, launch.kernel
                # And nothing else was touched.
                elements = sum(found[name] // launch.arguments[name].element_size() for name in found)
                assert elements == len(addresses), launch.kernel

else:

    @pytest.mark.timeout(300)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)

    def test_counts_of_the_1_3b_layer():
        (shape,) = (s for s in SUITES["gpu"].shapes if s.label == "1.3B-8x2048")
        counted = operator_bytes.count(shape)
        tokens, states = 8 * 2048, 2 * 8 * (2048 // 128 - 1) * 4 * 64 * 512
        wide, slots = tokens * 4 * 512 * 2, tokens * 4 * 64
        by_name = {kernel["kernel"]: kernel for kernel in counted["kernels"]}
        walk = by_name["states_forward"]
        assert walk["read"] == (2 * wide + 2 * slots) * 15 // 16 + 4 * slots // 64
        assert walk["written"] == 2 * states
        assert counted["kernels"][-3]["written"] == 2 * wide + (4 + 2) * slots
        # Without gradients, the softmax and its sums are not kept.
        kept = 2 * slots + 4 * tokens * 4
        written = sum(by_name[name]["written"] for name in operator_bytes.FORWARD)
        assert counted["forward_alone"]["written"] == written - kept
        tensors = counted["memory"]["tensors"]
        assert tensors["o"] == tensors["dq"] == wide
        assert tensors["hk"] == states
        # Gradients of states lie in dv and over the states of Ṽ.
        assert not {"dhk", "dhv", "dl", "read_dl"} & tensors.keys()
        # What PyTorch's allocator counts on a GPU, in benchmarks/results/op_gpu.json.
        assert sum(tensors.values()) == 416555008
        # Between forward and backward: what both policies keep, and the states of both passes between chunks.
        assert counted["kept"] == {
            policy: sum(tensors[name] for name in ("o", "until", "scaled", "levels", "p", "lse", *more))
            for policy, more in (("keep", ("hk", "hv")), ("recompute", ()))
        }

    def test_short_packed_sequences_take_no_more_memory_than_a_long_one():
        def most(shape):
            x, do = operator_bytes._inputs(shape, torch.bfloat16)
            bounds = boundaries(shape)

            def forward(x):
                return attention(*(x[name] for name in "qkvg"), None, None, None, bounds, 1.0, False, False)[0]

            with operator_bytes.noted() as launches:
                with_gradients(forward, x, do)
            return max(sum(launch.alive.values()) for launch in launches)

        by_label = {shape.label: shape for shape in SUITES["gpu"].shapes}
        one, packed = by_label["1.3B-1x16384"], by_label["packed-1x16360"]
        assert len(packed.lengths) > 500
        assert most(packed) <= 1.02 * most(one)

    def test_the_program_writes_a_result(tmp_path, monkeypatch):
        path, said = tmp_path / "bytes.json", []
        monkeypatch.setattr(operator_bytes, "LABELS", ("340M-8x2048",))
        operator_bytes.main(["--output", str(path)], say=said.append)
        result = json.loads(path.read_text())
        assert result["about"]["command"] == f"python -m benchmarks.operator_bytes --output {path}"
        assert [found["shape"]["label"] for found in result["shapes"]] == ["340M-8x2048"]
        assert said[0].startswith("340M-8x2048: ")
        assert said[0].endswith(" 239 MiB held")
