"""The step's kernels in Triton's interpreter and on a GPU: `step_slots` for states by slots (order "MK"), and `step`.

The interpreter runs programs one after the other, so there none may wait for another: where `step` splits groups,
`wait` is left out and the launch done twice, so that the second finds every part of the first. The interpreter is
chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that starts it, and the
GPU's.
"""

import itertools
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import gated_slot_attention, gated_slot_attention_step
from flash_gsa.ops.reference import reference_step

from .interpreter import run_in_interpreter

triton = pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

import triton.language as tl  # noqa: E402

from flash_gsa.ops.triton import arrivals, step  # noqa: E402
from flash_gsa.ops.triton.step import (  # noqa: E402
    Split,
    choose,
    choose_by_slots,
    launch,
    lies_by_slots,
    triton_step,
)

EPS = torch.finfo(torch.float32).eps
ORDERS = ["KM", "MK"]


def make(B=2, HQ=2, H=1, K=20, V=33, M=9, tau=8.0, strength=False, order="KM", dtype=torch.float32, device="cpu"):
    """(q, k, v, g, s), (hk, hv) of one token; q, k, v in `dtype`."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(device)

    token = [x.to(dtype) for x in (normal(B, HQ, K), normal(B, H, K), normal(B, H, V))]
    g = F.logsigmoid(normal(B, H, M)) / tau
    s = torch.rand(B, H, M, generator=random).to(device) if strength else None
    hk = normal(B, H, K, M) if order == "KM" else normal(B, H, M, K).transpose(2, 3)
    return [*token, g, s], (hk, normal(B, H, M, V))


def exactly(token, state, scale, dtype=torch.float64):
    """(o, hk, hv) in `dtype`."""
    token = [None if x is None else x.to(dtype) for x in token]
    o, new = reference_step(*token, tuple(x.to(dtype) for x in state), scale)
    return o, *new


def judge(found, token, state, scale):
    """At most twice as far from float64 as PyTorch's float32, and a few units of the format."""
    exact, plain = exactly(token, state, scale), exactly(token, state, scale, torch.float32)
    for name, got, want, usual in zip(("o", "hk", "hv"), found, exact, plain, strict=True):
        assert got.isfinite().all(), name
        rounding = 16 * EPS if got.dtype == torch.float32 else 0.6 * torch.finfo(got.dtype).eps
        allowed = 2 * (usual.double() - want).norm() + rounding * want.norm()
        assert (got.double() - want).norm() <= allowed, name


def check(token, state, scale=0.7, split=None):
    """The step against float64; the state it was given stays, the new one lies in memory as that does."""
    kept = [x.clone() for x in state]
    if split is None:
        o, new = triton_step(*token, state, scale)
    else:
        new = tuple(torch.empty_like(x) for x in state)
        o = launch(*token, state, new, scale, split)
    assert o.dtype == token[0].dtype
    for part, before, after in zip(state, kept, new, strict=True):
        assert torch.equal(part, before)
        assert after.stride() == part.stride()
    judge((o, *new), token, state, scale)


def test_programs_are_all_on_the_chip_at_once():
    """Two programs a multiprocessor at most where any waits, none where there is no chip."""
    shapes = (512, 512, 64, 1), (128, 128, 64, 4), (5, 3, 1, 1), (512, 64, 256, 32), (64, 64, 33, 64)
    for processors in (1, 46, 108, 132, 148):
        for groups in (1, 3, 4, 8, 32, 64, 100, 132, 200, 264, 265, 4096):
            for K, V, M, R in shapes:
                P = choose(groups, K, V, M, R, processors).programs
                assert P == 1 or P * groups <= 2 * processors
                assert P == 1 or P * R <= arrivals.PER_MEETING
                assert arrivals.PER_MEETING % P == 0
    assert choose(1, 512, 512, 64, 1, processors=0).programs == 1
    assert choose(4, 512, 512, 64, 1, processors=132).programs == 32
    assert choose(256, 512, 512, 64, 1, processors=132).programs == 1


def test_programs_of_a_pass_over_slots():
    """None without a slot; more programs only where there are fewer heads; none where there is no chip."""
    for processors in (1, 132, 148):
        for M in (1, 33, 64, 256, 4096):
            for D, R in itertools.product((16, 128, 512), (1, 4, 8)):
                for itemsize in (2, 4):
                    counts = [
                        choose_by_slots(groups, M, D, R, itemsize, processors).programs
                        for groups in (1, 4, 32, 128, 132, 264, 512, 4096)
                    ]
                    assert counts == sorted(counts, reverse=True)
                    assert all(P <= M and arrivals.PER_MEETING % P == 0 for P in counts)
                    assert counts[-1] == 1
    assert choose_by_slots(1, 64, 512, 1, 4, processors=0).programs == 1
    assert choose_by_slots(64, 64, 512, 1, 4, processors=132).programs == 8
    assert choose_by_slots(128, 64, 512, 1, 2, processors=132).programs == 1
    assert choose_by_slots(128, 64, 128, 4, 2, processors=132).programs == 4
    assert choose_by_slots(256, 64, 128, 4, 2, processors=132).programs == 1


def test_which_states_lie_by_slots():
    for order in ORDERS:
        assert lies_by_slots(make(order=order)[1]) == (order == "MK")
    hk, hv = make(order="MK")[1]
    assert not lies_by_slots((hk, hv.transpose(2, 3).contiguous().transpose(2, 3)))


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        ({"B": 1}, "step"),
        ({"B": 9, "HQ": 1}, "step_slots"),
        ({"B": 9, "HQ": 1, "order": "KM"}, "step"),
        ({"B": 16, "HQ": 4}, "step"),
        ({"B": 17, "HQ": 4}, "step_slots"),
        ({"B": 33, "HQ": 8}, "step"),
        ({"B": 34, "HQ": 8}, "step_slots"),
        ({"B": 34, "HQ": 9}, "step"),
    ],
    ids=str,
)
def test_which_kernel_runs(monkeypatch, sizes, kernel):
    """On a chip; without one, as in the interpreter, few heads are no reason for `step`."""
    launched = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(self.name)

    for name in ("step", "step_slots"):
        monkeypatch.setattr(step, name, Kernel(name))
    monkeypatch.setattr(step, "meeting_place", lambda groups, numbers, device: (None, None))
    for processors, expected in ((132, kernel), (0, "step_slots" if sizes["B"] in (1, 16, 33) else kernel)):
        monkeypatch.setattr(step, "processors_of", lambda device, processors=processors: processors)
        token, state = make(**{"order": "MK"} | sizes)
        launch(*token, state, state, 0.7)
        assert launched == [expected]
        launched.clear()


def test_counters_are_handed_out_once():
    store = arrivals.Store(torch.zeros(arrivals.A_STREAM + 24, dtype=torch.int32))
    of_one, again, few, more = store.of_stream(1), store.of_stream(1), store.take(3), store.take(9)
    assert of_one is again
    for counters, at_least in ((of_one, 1), (few, 3), (more, 9)):
        assert counters.numel() >= at_least
        assert not counters.any()
        counters.fill_(1)
    assert store.take(1) is None
    assert store.of_stream(2) is None


if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)

    MANY = 40  # sequences, enough for `step_slots` even of one head each
    MODEL_1B = {"HQ": 4, "H": 4, "K": 512, "V": 512, "M": 64}
    MODEL_7B = {"HQ": 32, "H": 8, "K": 128, "V": 128, "M": 64}
    LARGEST = {"HQ": 2, "H": 1, "K": 512, "V": 512, "M": 256}  # heads and slots at their limits

    @pytest.fixture
    def cuda() -> torch.device:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return torch.device("cuda", torch.cuda.current_device())

    def split_in(programs: int) -> Split:
        return Split(programs, tile=1024, warps=4, stages=3)

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(
        ("sizes", "dtype"),
        [
            ({"M": 33, "HQ": 4, "H": 2, "strength": True}, torch.float32),
            ({"K": 5, "V": 3, "M": 1, "HQ": 1}, torch.float32),
            ({"HQ": 8, "K": 100, "V": 36, "M": 16}, torch.float16),
            ({"HQ": 40, "H": 2, "K": 64, "V": 64, "M": 48}, torch.bfloat16),
            ({"HQ": 1, "K": 300, "V": 130, "M": 200}, torch.bfloat16),
            (MODEL_7B, torch.bfloat16),
            (MODEL_7B | {"HQ": 64}, torch.float32),
            (MODEL_1B | {"B": 1}, torch.float32),
            (MODEL_1B | {"B": 80}, torch.bfloat16),
            (LARGEST, torch.float32),
            (LARGEST | {"B": 1}, torch.float32),
            ({"B": 1024, "K": 64, "V": 64, "M": 32}, torch.bfloat16),
        ],
        ids=str,
    )
    def test_accuracy_on_a_gpu(cuda, sizes, dtype, order):
        check(*make(order=order, dtype=dtype, device=cuda, **{"B": MANY} | sizes))

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("programs", [1, 2, 4, 16, 32])
    def test_any_number_of_programs(cuda, programs, order):
        check(*make(**MODEL_1B, order=order, device=cuda), split=split_in(programs))
        check(*make(HQ=2, K=100, V=36, M=33, B=3, order=order, device=cuda), split=split_in(programs))

    @pytest.mark.gpu
    @pytest.mark.parametrize("sizes", [MODEL_1B | {"B": 90}, MODEL_7B | {"B": 60}], ids=["1.3B", "7B"])
    def test_more_programs_than_the_chip_holds(cuda, sizes):
        """Where nobody waits, heads can be split however many there are."""
        check(*make(**sizes, order="MK", device=cuda), split=split_in(16))

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("tau", [0.02, 1e5])
    def test_strong_and_weak_gates_on_a_gpu(cuda, tau, order):
        token, state = make(B=MANY, tau=tau, M=16, K=64, V=64, order=order, device=cuda)
        token[3][:, :, 3] = -torch.inf
        check(token, state)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "sizes", [*(MODEL_7B | {"B": B} for B in (1, 8, 200)), LARGEST | {"B": 1}, LARGEST | {"B": MANY}], ids=str
    )
    def test_bfloat16_states_on_a_gpu(cuda, sizes):
        for order in ORDERS:
            token, state = make(**sizes, order=order, dtype=torch.bfloat16, device=cuda)
            check(token, tuple(x.bfloat16() for x in state))

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    def test_states_of_more_elements_than_32_bits_count(cuda, order, gpu_room):
        """Both of them, in bfloat16 and in place: 9 GB. The first and the last sequence are compared."""
        gpu_room(11)
        H, K, V, M = (MODEL_1B[name] for name in ("H", "K", "V", "M"))
        B = 2**31 // (H * K * M) + 1

        def normal(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device=cuda).normal_()

        hk = normal(B, H, K, M) if order == "KM" else normal(B, H, M, K).transpose(2, 3)
        state = hk, normal(B, H, M, V)
        assert all(x[:-1].numel() >= 2**31 for x in state)
        g = F.logsigmoid(normal(B, H, M, dtype=torch.float32)) / 8
        token = [normal(B, H, K), normal(B, H, K), normal(B, H, V), g, None]
        ends = slice(0, 1), slice(B - 1, B)
        kept = [tuple(x[end].clone() for x in state) for end in ends]
        o, _ = triton_step(*token, state, 0.7, in_place=True)
        for end, before in zip(ends, kept, strict=True):
            mine = [None if x is None else x[end] for x in token]
            judge((o[end], *(x[end] for x in state)), mine, before, 0.7)

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("B", [1, 8, 200])
    def test_every_run_gives_the_same_bits(cuda, B, order):
        token, state = make(**MODEL_1B, B=B, order=order, device=cuda)
        o, new = triton_step(*token, state, 0.7)
        for _ in range(50):
            again, same = triton_step(*token, state, 0.7)
            assert torch.equal(o, again)
            assert all(torch.equal(a, b) for a, b in zip(new, same, strict=True))
        mine = tuple(x.clone() for x in state)
        again, _ = triton_step(*token, mine, 0.7, in_place=True)
        assert torch.equal(o, again)
        assert all(torch.equal(a, b) for a, b in zip(new, mine, strict=True))

    def capture(token, state, steps):
        """A graph of so many steps in place, and what it writes its last output to."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                o, _ = triton_step(*token, state, 0.7, in_place=True)
        return graph, o

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("B", [1, 8, 200])
    @pytest.mark.parametrize("first", [False, True], ids=["warm", "first launch of all"])
    def test_replays_of_a_graph_are_steps(cuda, monkeypatch, B, first, order):
        token, state = make(**MODEL_1B, B=B, order=order, device=cuda)
        eager = tuple(x.clone() for x in state)
        for _ in range(15):
            want, _ = triton_step(*token, eager, 0.7, in_place=True)
        if first:
            monkeypatch.setattr(arrivals, "_stores", {})
        graph, o = capture(token, state, steps=3)
        for _ in range(5):
            graph.replay()
        assert torch.equal(o, want)
        assert all(torch.equal(a, b) for a, b in zip(state, eager, strict=True))

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("captured", [False, True])
    def test_streams_beside_each_other(cuda, captured, order):
        """Launches that meet, on three streams at once, beside others that fill the chip."""
        token, state = make(**MODEL_1B, B=8, order=order, device=cuda)
        want = tuple(x.clone() for x in state)
        for _ in range(200):
            triton_step(*token, want, 0.7, in_place=True)
        states = [tuple(x.clone() for x in state) for _ in range(3)]
        graphs = [capture(token, mine, steps=10)[0] for mine in states] if captured else []
        noise = torch.randn(4096, 4096, device=cuda)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(4)]
        for _ in range(20):
            with torch.cuda.stream(streams[3]):
                noise @ noise
            for n, mine in enumerate(states):
                with torch.cuda.stream(streams[n]):
                    if captured:
                        graphs[n].replay()
                    else:
                        for _ in range(10):
                            triton_step(*token, mine, 0.7, in_place=True)
        torch.cuda.synchronize()
        for mine in states:
            assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=True))

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("counters", [0, 2**31 - 64, -64], ids=["none left", "wrapping", "wrapping to 0"])
    def test_counters_on_a_gpu(cuda, monkeypatch, counters, order):
        size = arrivals.STORE if counters else 0
        store = arrivals.Store(torch.full((size,), counters, dtype=torch.int32, device=cuda))
        token, state = make(**MODEL_1B, B=8, order=order, device=cuda)
        o, new = triton_step(*token, state, 0.7)
        monkeypatch.setattr(arrivals, "_stores", {cuda: store})
        for _ in range(3):
            again, same = triton_step(*token, state, 0.7)
            assert torch.equal(o, again)
            assert all(torch.equal(a, b) for a, b in zip(new, same, strict=True))

else:

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"K": 5, "V": 3, "M": 1, "HQ": 1},
            {"M": 33, "HQ": 4, "H": 2, "strength": True},
            {"HQ": 8, "K": 64, "V": 16, "M": 16},
            {"HQ": 20, "H": 2, "B": 1, "strength": True},
            {"B": 1, "K": 300, "V": 130, "M": 64, "HQ": 1},
            {"B": 1, "K": 17, "V": 40, "M": 200},
            {"K": 32, "V": 32, "M": 64, "HQ": 4},  # several rows of a tile in one thread, several apart
        ],
        ids=str,
    )
    def test_one_program_a_group(sizes, order):
        check(*make(order=order, **sizes))

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("tau", [0.02, 1e5])
    def test_strong_and_weak_gates(tau, order):
        check(*make(tau=tau, M=16, order=order))

    @pytest.mark.parametrize("order", ORDERS)
    def test_slots_that_forget_everything(order):
        token, state = make(order=order)
        token[3][:, :, ::2] = -torch.inf
        token[3][1] = -1e30
        check(token, state)

    def test_no_sequences():
        token, state = make(B=0)
        o, new = triton_step(*token, state, 0.7)
        assert o.shape == (0, 2, 33)
        assert [x.shape for x in new] == [x.shape for x in state]

    @pytest.mark.parametrize("order", ORDERS)
    def test_large_logits(order):
        token, state = make(order=order)
        check(token, (state[0] * 1e4, state[1]))

    def test_in_place_and_new_states_are_the_same_bits():
        for order in ORDERS:
            token, state = make(HQ=2, H=2, order=order)
            o, new = triton_step(*token, state, 0.7)
            again, same = triton_step(*token, state, 0.7, in_place=True)
            assert torch.equal(o, again)
            for old, part, updated in zip(state, new, same, strict=True):
                assert updated is old
                assert torch.equal(part, updated)

    def test_views_of_larger_tensors():
        """Slices of one projection as inputs; a state whose sequences lie apart, or all in one place."""
        token, (hk, hv) = make(HQ=2, H=2, V=20)
        together = torch.cat([x.flatten(1) for x in token[:3]], dim=1)
        views = [y.unflatten(1, (2, -1)) for y in together.split([40, 40, 40], dim=1)]
        assert not views[1].is_contiguous()
        spread = torch.zeros(4, *hk.shape[1:])
        spread[::2] = hk
        strided = [x.repeat_interleave(2, dim=2)[..., ::2] for x in token[:3]]
        want = triton_step(*token, (hk, hv), 0.7)
        for inputs in (views, strided):
            found = triton_step(*inputs, *token[3:], (spread[::2], hv), 0.7)
            for a, b in zip((want[0], *want[1]), (found[0], *found[1]), strict=True):
                assert torch.equal(a, b)
        untouched = spread[1::2].clone()
        triton_step(*token, (spread[::2], hv.clone()), 0.7, in_place=True)
        assert torch.equal(spread[::2], want[1][0])
        assert torch.equal(spread[1::2], untouched)
        one = tuple(x[:1].expand_as(x) for x in (hk, hv))
        o, new = triton_step(*token, one, 0.7)
        judge((o, *new), token, one, 0.7)

    def test_states_too_large_for_offsets_of_32_bits_go_to_the_reference(monkeypatch):
        token, (hk, hv) = make(B=1, K=2, M=1, V=2, HQ=1)
        apart = torch.zeros(2**22)[:: 2**21 + 1].view(1, 1, 2, 1)
        apart.copy_(hk)
        monkeypatch.setattr(step, "launch", None)
        o, new = triton_step(*token, (apart, hv), 0.7)
        judge((o, *new), token, (hk, hv), 0.7)

    @pytest.mark.parametrize("strength", [False, True])
    def test_fifty_steps_are_the_sequence(strength):
        random = torch.Generator().manual_seed(1)
        B, T, HQ, H, K, V, M = 1, 50, 2, 1, 6, 5, 7
        q, k = torch.randn(B, T, HQ, K, generator=random), torch.randn(B, T, H, K, generator=random)
        v, g = torch.randn(B, T, H, V, generator=random), F.logsigmoid(torch.randn(B, T, H, M, generator=random)) / 8
        s = torch.rand(B, T, H, M, generator=random) if strength else None
        whole, final = gated_slot_attention(q, k, v, g, s, output_final_state=True, backend="reference")
        state = (torch.zeros(B, H, K, M), torch.zeros(B, H, M, V))
        for t in range(T):
            token = [None if x is None else x[:, t] for x in (q, k, v, g, s)]
            o, state = gated_slot_attention_step(*token, state=state, backend="triton", in_place=True)
            torch.testing.assert_close(o, whole[:, t], rtol=0, atol=1e-5)
        torch.testing.assert_close(state, final, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("programs", "sizes", "start"),
        [
            (2, {}, 0),
            (8, {"HQ": 4, "H": 2, "K": 64, "V": 40, "M": 33, "strength": True}, 2**31 - 64),
            (16, {"K": 100, "V": 17, "M": 4}, -64),
            (4, {"HQ": 8, "K": 16, "V": 70, "M": 64}, 64),
        ],
        ids=str,
    )
    def test_the_last_of_a_group_adds_up(monkeypatch, programs, sizes, start):
        """Also where programs are left without a slot."""
        counters = torch.full((4,), start, dtype=torch.int32)

        def place(groups, numbers, device):
            return torch.full((numbers,), torch.nan), counters[:groups]

        monkeypatch.setattr(step, "meeting_place", place)
        token, state = make(**sizes, order="MK")
        for tile in (64, 256):
            check(token, state, split=Split(programs, tile, warps=4, stages=2))
        groups = token[1].shape[0] * token[1].shape[1]
        assert ((counters[:groups].long() - start) % 2**32 == 2 * arrivals.PER_MEETING).all()

    @pytest.mark.parametrize(
        ("programs", "sizes"),
        [
            (2, {}),
            (4, {"HQ": 4, "H": 2, "K": 64, "V": 40, "M": 33, "strength": True}),
            (8, {"K": 100, "V": 17, "M": 4}),
            (4, {"HQ": 12, "K": 16, "V": 5, "M": 64}),
        ],
        ids=str,
    )
    def test_split_groups_but_for_the_waiting(monkeypatch, programs, sizes):
        places = []

        def same_place(groups, numbers, device):
            if not places:
                places.append((torch.full((numbers,), torch.nan), torch.zeros(groups, dtype=torch.int32)))
            return places[0]

        @triton.jit
        def no_wait(counter, goal):
            pass

        monkeypatch.setattr(step, "meeting_place", same_place)
        monkeypatch.setattr(step, "wait", no_wait)
        token, state = make(**sizes)
        split = replace(choose(1, 1, 1, 4, 1, 0), programs=programs)
        new = tuple(torch.empty_like(x) for x in state)
        launch(*token, state, new, 0.7, split)
        check(token, state, split=split)
        assert (places[0][1] == 2 * arrivals.PER_MEETING).all()

    @pytest.mark.parametrize("start", [0, 64, 2**31 - 64, -(2**31), -64])
    def test_counters_may_wrap(start):
        @triton.jit
        def alone(counter, PER_MEETING: tl.constexpr):
            arrivals.wait(counter, arrivals.arrive(counter, 1, PER_MEETING))

        counter = torch.tensor([start], dtype=torch.int32)
        alone[(1,)](counter, arrivals.PER_MEETING)
        assert (counter.item() - start) % 2**32 == arrivals.PER_MEETING

    @pytest.mark.parametrize("in_place", [False, True])
    def test_compiles_without_a_break(in_place):
        token, state = make(order="MK")
        want, new = triton_step(*token, state, 0.7)
        compiled = torch.compile(
            lambda *x: triton_step(*x[:5], x[5:], 0.7, in_place), fullgraph=True, backend="aot_eager"
        )
        found, after = compiled(*token, *state)
        assert torch.equal(found, want)
        for part, updated, given in zip(new, after, state, strict=True):
            assert torch.equal(part, updated)
            assert torch.equal(given, updated) is in_place
