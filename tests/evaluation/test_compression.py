import random

import pytest

from flash_gsa.evaluation import xz_bits_per_byte


def test_random_bytes_cost_eight_bits_and_repetition_almost_nothing():
    noise = random.Random(0).randbytes(50_000)
    assert 8.0 <= xz_bits_per_byte([noise]) < 8.1
    assert xz_bits_per_byte([noise] * 10) == pytest.approx(xz_bits_per_byte([noise]) / 10, rel=0.02)


def test_refuses_nothing():
    with pytest.raises(ValueError, match="no bytes"):
        xz_bits_per_byte([b""])
