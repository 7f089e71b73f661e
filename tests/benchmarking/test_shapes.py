import pytest

from flash_gsa.benchmarking.shapes import SUITES, Shape


def test_bytes_are_those_of_the_tensors():
    shape = Shape("x", B=3, T=10, HQ=4, H=2, K=5, V=7, M=6)
    tokens = 30
    q, k, v, o, g = (tokens * n for n in (4 * 5 * 2, 2 * 5 * 2, 2 * 7 * 2, 4 * 7 * 2, 2 * 6 * 4))
    assert shape.forward_bytes(2) == q + k + v + g + o
    assert shape.both_bytes(2) == (q + k + v + g + o) + (q + k + v + g + o) + (q + k + v + g)
    assert shape.state_numbers == 3 * 2 * 6 * (5 + 7)


def test_packed_shapes_know_their_boundaries():
    shape = Shape("x", B=1, T=9, HQ=1, H=1, K=2, V=2, M=2, lengths=(4, 0, 5))
    assert shape.boundaries == [0, 4, 4, 9]
    assert shape.state_numbers == 3 * 2 * (2 + 2)
    assert SUITES["gpu"].shapes[0].boundaries is None


@pytest.mark.parametrize("name", SUITES)
def test_suites_hold_together(name):
    suite = SUITES[name]
    labels = [shape.label for shape in suite.shapes]
    assert len(set(labels)) == len(labels)
    for shape in (*suite.shapes, suite.sweep, *(d.shape for d in suite.decodings), suite.cold_start):
        assert shape.HQ % shape.H == 0
        assert not shape.lengths or (shape.B, sum(shape.lengths)) == (1, shape.T)
    assert set(suite.layers) <= set(suite.shapes)
    assert all(shape.K == shape.V and not shape.lengths for shape in suite.layers)
    sweep = [(shape.B, shape.T) for shape in suite.sweep_shapes()]
    assert len(set(sweep)) == len(sweep)
    assert {T for B, T in sweep if B == 1} == set(suite.lengths)
    assert {B * T for B, T in sweep if B > 1} == {suite.tokens}
    assert set(suite.sweep_implementations) <= set(suite.implementations)


def test_lengths_go_from_512_to_512k_on_a_gpu():
    assert SUITES["gpu"].lengths[0] == 512
    assert SUITES["gpu"].lengths[-1] == 512 * 1024
