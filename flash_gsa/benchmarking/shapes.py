"""What is measured: shapes of the operator, lengths, decoding steps, and the bytes nothing can avoid."""

from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: B, T batch and time; HQ, H query and key/value heads; K, V head dimensions; M slots.

    `lengths` packs sequences: then B is 1 and T their sum. `name` is the family ("1.3B").
    """

    name: str
    B: int
    T: int
    HQ: int
    H: int
    K: int
    V: int
    M: int
    lengths: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """The name for tables and `--shapes`: "1.3B-8x2048"."""
        return f"{self.name}-{self.B}x{self.T}"

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def boundaries(self) -> list[int] | None:
        """What `cu_seqlens` holds; None where nothing is packed."""
        return [0, *accumulate(self.lengths)] if self.lengths else None

    @property
    def state_numbers(self) -> int:
        """Of both states of all heads and sequences."""
        return (len(self.lengths) or self.B) * self.H * self.M * (self.K + self.V)

    def forward_bytes(self, item: int) -> int:
        """q, k, v, g read once and o written once; `item` bytes a number, g in float32."""
        queries, keys, gates = self._bytes(item)
        return queries + keys + gates

    def both_bytes(self, item: int) -> int:
        """`forward_bytes`, then q, k, v, g and the gradient of o read once and dq, dk, dv, dg written once."""
        queries, keys, gates = self._bytes(item)
        read, written = queries + keys + gates, self.tokens * self.HQ * self.K * item + keys + gates
        return self.forward_bytes(item) + read + written

    def _bytes(self, item: int) -> tuple[int, int, int]:
        """(q and o, k and v, g)."""
        return (
            self.tokens * self.HQ * (self.K + self.V) * item,
            self.tokens * self.H * (self.K + self.V) * item,
            self.tokens * self.H * self.M * 4,
        )


@dataclass(frozen=True)
class Decoding:
    """One token of each of several sequences, in `batches` of so many, by the layer of `shape`; `state`: the format of
    states, which other packages have in float32 alone.
    """

    shape: Shape
    batches: tuple[int, ...]
    state: str = "float32"


@dataclass(frozen=True)
class Suite:
    """One choice of sizes.

    `layers` are those of `shapes` at which the whole layer is timed, d = HQ·K = HQ·V wide.
    `most_tokens` holds up to where an implementation is timed that would take too long beyond, `families` the names of
    shapes at which one is timed, unless it is asked for.
    `sweep` gives the sizes for time against length: at `lengths` with one sequence, and with as many as make
    `tokens`; calls of up to `graph_tokens` are timed in a CUDA graph, too, there ours alone. States of the decoding
    steps in `decodings` are taken in turn from `rotated_bytes`. `implementations` are what is measured unless named,
    where "backends" stands for every backend of the operator but the reference; `layer_implementations` are the ways to
    run a layer; `sweep_implementations` those timed against length. `budget` is in seconds.
    """

    shapes: tuple[Shape, ...]
    layers: tuple[Shape, ...]
    sweep: Shape
    lengths: tuple[int, ...]
    tokens: int
    graph_tokens: int
    decodings: tuple[Decoding, ...]
    rotated_bytes: int
    cold_start: Shape
    copy_bytes: int
    product_size: int
    implementations: tuple[str, ...]
    layer_implementations: tuple[str, ...]
    sweep_implementations: tuple[str, ...]
    decoding_implementations: tuple[str, ...]
    most_tokens: dict[str, int]
    families: dict[str, tuple[str, ...]]
    budget: float
    repeats: int

    def sweep_shapes(self) -> list[Shape]:
        """Time against length: one sequence, and constant tokens; none twice."""
        one = [replace(self.sweep, B=1, T=T) for T in self.lengths]
        batches = ((self.tokens // T, T) for T in self.lengths)
        return [*one, *(replace(self.sweep, B=B, T=T) for B, T in batches if B > 1)]


def _doubling(first: int, last: int) -> tuple[int, ...]:
    lengths = [first]
    while lengths[-1] < last:
        lengths.append(2 * lengths[-1])
    return tuple(lengths)


_LAYER_1_3B = Shape("1.3B", 8, 2048, HQ=4, H=4, K=512, V=512, M=64)
_LAYER_7B = Shape("7B", 4, 4096, HQ=32, H=8, K=128, V=128, M=64)
_LAYER_340M = Shape("340M", 8, 2048, HQ=4, H=4, K=256, V=256, M=64)
# 512 sequences of 1 to 63 tokens.
_SHORT = tuple(1 + 17 * i % 63 for i in range(512))
_SMALL = Shape("small", 1, 2048, HQ=4, H=4, K=64, V=64, M=64)
_TINY = Shape("tiny", 1, 64, HQ=2, H=2, K=16, V=16, M=16)

SUITES = {
    "gpu": Suite(
        shapes=(
            _LAYER_1_3B,
            replace(_LAYER_1_3B, B=1, T=16384),
            replace(_LAYER_1_3B, B=1, T=65536),
            _LAYER_7B,
            _LAYER_340M,
            replace(_LAYER_1_3B, name="packed", B=1, T=sum(_SHORT), lengths=_SHORT),
        ),
        layers=(_LAYER_1_3B, replace(_LAYER_1_3B, B=1, T=16384), _LAYER_340M),
        sweep=_LAYER_1_3B,
        lengths=_doubling(512, 512 * 1024),
        tokens=65536,
        graph_tokens=32768,
        decodings=tuple(
            Decoding(shape, (1, 8, 64, 256, 1024), state)
            for shape in (_LAYER_1_3B, _LAYER_7B)
            for state in ("float32", "bfloat16")
        ),
        rotated_bytes=2**28,
        cold_start=_LAYER_1_3B,
        copy_bytes=2**31,
        product_size=8192,
        implementations=("auto", "recompute", "backends", "sdpa-cudnn", "sdpa-flash", "fla"),
        layer_implementations=("auto", "separate", "fla"),
        sweep_implementations=("auto", "sdpa-cudnn", "fla"),
        decoding_implementations=("auto", "fla"),
        most_tokens={"reference": 2048},
        families={"recompute": ("1.3B",), "fla": ("1.3B", "7B", "340M")},
        budget=0.5,
        repeats=3,
    ),
    "cpu": Suite(
        shapes=(
            _SMALL,
            replace(_SMALL, B=4, T=512),
            replace(_SMALL, name="grouped", HQ=8, H=2),
            replace(_SMALL, name="packed", lengths=(700, 1, 64, 900, 255, 128)),
        ),
        layers=(_SMALL,),
        sweep=_SMALL,
        lengths=_doubling(512, 8192),
        tokens=4096,
        graph_tokens=0,
        decodings=(Decoding(_SMALL, (1, 8, 64)),),
        rotated_bytes=2**26,
        cold_start=_SMALL,
        copy_bytes=2**28,
        product_size=1024,
        implementations=("auto", "backends", "reference", "sdpa-flash"),
        layer_implementations=("auto",),
        sweep_implementations=("auto", "reference", "sdpa-flash"),
        decoding_implementations=("auto",),
        most_tokens={"reference": 2048},
        families={},
        budget=0.6,
        repeats=3,
    ),
    "quick": Suite(
        shapes=(_TINY, replace(_TINY, name="packed", lengths=(40, 1, 23))),
        layers=(_TINY,),
        sweep=_TINY,
        lengths=(32, 64),
        tokens=64,
        graph_tokens=64,
        decodings=(Decoding(_TINY, (1, 2)), Decoding(_TINY, (2,), "bfloat16")),
        rotated_bytes=2**15,
        cold_start=_TINY,
        copy_bytes=2**20,
        product_size=128,
        implementations=("auto", "recompute", "sdpa-flash"),
        layer_implementations=("auto",),
        sweep_implementations=("auto",),
        decoding_implementations=("auto",),
        most_tokens={},
        families={"recompute": ("tiny",)},
        budget=0.01,
        repeats=2,
    ),
}
"""gpu and cpu: what is worth knowing on such a machine; quick: the whole command in seconds, to see that it works."""
