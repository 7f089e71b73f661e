"""What kernels do with one block of a chunk: find its tokens, load tiles, multiply through the gates.

Time is cut into chunks of C tokens, before each of which the states are in memory, and chunks into one or two blocks
of BT tokens, one program's rows. G_t = Σ_{i≤t} g_i runs from the block's start. A query at t reads what token j ≤ t
of its block wrote with the weight s_j e^{G_t - G_j} in every slot, what one of the block before wrote with
e^{G_t} · s_j e^{G_B - G_j} where G_B is the sum over that block, and the chunk's state with e^{G_t} · e^{G_B}.

As a product of matrices the first of them needs two factors, e^{G_t - r} and s_j e^{r - G_j} for some reference r, and
no factor may overflow. Weak gates take r = 0, the block's start (level 0). A slot that forgets more than e^-RANGE
since then takes the gates' sum at a token near t: the first of its group of 32 (level 1); where that group forgets too
much, the first of its group of 8 (level 2), or the token itself (level 3), with which both factors are at most 1
whatever the gates are. The level of a token and slot follows from tokens up to it only: what comes later changes no bit
of the result. A block pays for the levels that occur in it.

In memory there is one weight for each token and slot, `scaled`: s_j e^{-G_j}, or s_j e^{G_B - G_j} where e^{-G_B} would
overflow. What the state behind the block has of token j is the one times e^{G_B}, the other as it is (`to_end`).
"""

import triton
import triton.language as tl

GROUP_32 = tl.constexpr(32)
GROUP_8 = tl.constexpr(8)
# e^-104 is below the smallest float32: a stronger gate erases no more, and sums of gates keep their digits.
FLOOR = tl.constexpr(-104.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(part, boundaries, part_sequence, first_part, T, SPAN, PACKED: tl.constexpr):
    """Of the part'th stretch of SPAN tokens (chunk or segment): its sequence, its index there, its first token
    (the place among all tokens, int64), the sequence's end, and the first part of the sequence."""
    if PACKED:
        n = tl.load(part_sequence + part)
        end = tl.load(boundaries + n + 1).to(tl.int64)
        first = tl.load(first_part + n)
        index = part - first
        token = tl.load(boundaries + n).to(tl.int64) + index.to(tl.int64) * SPAN
    else:
        parts = tl.cdiv(T, SPAN)
        n = part // parts
        first = n * parts
        index = part % parts
        token = n.to(tl.int64) * T + index * SPAN
        end = (n.to(tl.int64) + 1) * T
    return n, index, token, end, first


@triton.jit
def place_before(chunk, n, FROM_A_STATE: tl.constexpr):
    """Where in memory the state before a chunk of the n'th sequence is. Unless sequences begin FROM_A_STATE, none is
    before their first chunks."""
    place = chunk
    if not FROM_A_STATE:
        place = chunk - n - 1
    return place


@triton.jit
def place_behind(chunk, n, TO_A_STATE: tl.constexpr):
    """Where the gradient of the state behind a chunk of the n'th sequence is. Unless there is one of final states, none
    is behind their last chunks."""
    place = chunk
    if not TO_A_STATE:
        place = chunk - n
    return place


@triton.jit
def blocks_that_last(
    sums, steps, size, FROM_END: tl.constexpr,
    BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """How many of a segment's blocks, from its end or else its start, have not been forgotten at that end.

    sums: of the gates of its blocks at their ends, `size` tokens in all. What lies further away than gates of -104 in
    every slot is multiplied by less than float32's smallest number. Up to 15 blocks too many.
    """
    AT_ONCE: tl.constexpr = 16
    om = tl.arange(0, BM)
    ahead = tl.zeros([BM], tl.float32)
    lasting = 0
    while (lasting < steps) & (tl.max(tl.where(om < M, ahead, FLOOR), axis=0) > FLOOR):
        block = lasting + tl.arange(0, AT_ONCE)
        there = block < steps
        if FROM_END:
            block = steps - 1 - block
        token = tl.minimum((block + 1) * BT, size) - 1
        at = token[:, None] * (H * M) + om[None, :]
        gates = tl.load(sums + at, mask=there[:, None] & (om < M)[None, :], other=0.0)
        ahead += tl.sum(gates.to(tl.float32), axis=0)
        lasting += AT_ONCE
    return tl.minimum(lasting, steps)


@triton.jit
def time_order(i, T, sequences, C: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """The chunk that comes i'th: sequences in step, from their first chunks to the last, or back if REVERSE.

    A kernel thus begins with what the one before touched last, and finds it in the L2 cache.
    """
    if PACKED:
        if REVERSE:
            chunk = T // C + sequences - 1 - i
        else:
            chunk = i
    else:
        chunks = tl.cdiv(T, C)
        turn = i // sequences
        if REVERSE:
            turn = chunks - 1 - turn
        chunk = i % sequences * chunks + turn
    return chunk


@triton.jit
def fast_exp(x):
    """e^x in float32, 0 where it is below the smallest normal number. `tl.exp` keeps what lies below, which takes three
    instructions more for each number.

    Of float64, as sums of gates are for float32 inputs, to float32's last digit, x being below 88. Rounded to float32,
    an x of 60 moves its exponential by 30 of its last digits, and two such factors, one of -60, would not make 1.
    """
    if x.dtype == tl.float64:
        y = x * LOG2_E
        whole = tl.floor(y)
        power = ((tl.maximum(whole, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^whole
        result = tl.exp2((y - whole).to(tl.float32)) * power
    else:
        result = tl.exp2(x * LOG2_E)
    return result


@triton.jit
def exp(x):
    """e^x in float32: of float32 what `tl.exp` gives, of float64 what `fast_exp` does."""
    if x.dtype == tl.float64:
        result = fast_exp(x)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def mm(a, b, acc=None, PRECISION: tl.constexpr = "ieee"):
    """a b, or acc + a b. Tensor cores cut float32 to the 19 bits of tf32; here it is rounded to them, half the error
    and without bias."""
    if PRECISION == "tf32":
        if a.dtype == tl.float32:
            a = (a.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        if b.dtype == tl.float32:
            b = (b.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add_product(total, a, b, left, PRECISION: tl.constexpr):
    """total + a b, in float32 with the sums of a b apart: one after the other, 512 products lose digits that a softmax
    of large logits passes on. left: of the block's tokens, more than 0."""
    if PRECISION == "ieee":
        # 0, unknown to the compiler: what is added to a product that began at 0, it would begin the product with.
        nothing = tl.where(left > 0, 0.0, 1.0)
        total += mm(a, b, tl.zeros(total.shape, tl.float32) + nothing, PRECISION=PRECISION)
    else:
        total = mm(a, b, total, PRECISION=PRECISION)
    return total


@triton.jit
def load_rows(x, left, d, ROWS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """x[0:ROWS, d:d+BD] of rows STRIDE apart, each D long; 0 from row `left` on and outside of the row."""
    rows, od = tl.arange(0, ROWS), d + tl.arange(0, BD)
    at = rows[:, None] * STRIDE + od[None, :]
    if D % BD == 0:
        tile = tl.load(x + at, mask=(rows < left)[:, None], other=0.0)
    else:
        tile = tl.load(x + at, mask=(rows < left)[:, None] & (od < D)[None, :], other=0.0)
    return tile


@triton.jit
def lay_out_by_16(x, left, ROWS: tl.constexpr, BD: tl.constexpr):
    """Writes nothing. Triton lays out all tiles of one shape that a kernel loads for that access which takes most
    numbers at once, for bytes 16 neighbours a thread: half as many rows and addresses a thread as with the 8 that
    numbers of 16 bits get."""
    rows, od = tl.arange(0, ROWS), tl.arange(0, BD)
    never = (rows < tl.minimum(left, 0))[:, None]
    tl.store(x.to(tl.pointer_type(tl.int8)) + rows[:, None] * BD + od[None, :], tl.zeros([ROWS, BD], tl.int8), never)


@triton.jit
def store_rows(x, tile, left, d, ROWS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The reverse of `load_rows`, in x's dtype."""
    rows, od = tl.arange(0, ROWS), d + tl.arange(0, BD)
    at = rows[:, None] * STRIDE + od[None, :]
    if D % BD == 0:
        tl.store(x + at, tile.to(x.dtype.element_ty), mask=(rows < left)[:, None])
    else:
        tl.store(x + at, tile.to(x.dtype.element_ty), mask=(rows < left)[:, None] & (od < D)[None, :])


@triton.jit
def load_sum(until, token, exists, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """G [BM] at a token; 0 unless it exists."""
    om = tl.arange(0, BM)
    return tl.load(until + token * (H * M) + om, mask=om < tl.where(exists, M, 0), other=0.0)


@triton.jit
def forgets(total, RANGE: tl.constexpr):
    """Whether a slot forgets so much in a block, e^total, that `scaled` has the block's end as reference."""
    return total.to(tl.float32) < -RANGE


@triton.jit
def to_end(total, RANGE: tl.constexpr):
    """What makes of a block's `scaled` s_j e^{G_B - G_j}; total: G_B."""
    return tl.where(forgets(total, RANGE), 1.0, fast_exp(total))


@triton.jit
def since_start(sums, RANGE: tl.constexpr):
    """The exponent of s_j e^{-G_j}, cut where it could overflow."""
    return tl.minimum(-sums, RANGE)


@triton.jit
def load_end(until, left, ROWS: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """G [BM] at the last of a block's up to ROWS tokens, of which there are `left`; 0 where there is none."""
    om = tl.arange(0, BM)
    last = until + (tl.minimum(left, ROWS) - 1) * (H * M)
    return tl.load(last + om, mask=om < tl.where(left > 0, M, 0), other=0.0)


@triton.jit
def rolled(D: tl.constexpr, left):
    """D, unknown to the compiler, which would unroll a loop of four turns to code that takes longer to fetch than to
    run."""
    return tl.minimum(D, left * D)


@triton.jit
def products(
    x, y, state, slots, scaled, early, late, left, before, factor,
    BT: tl.constexpr, C: tl.constexpr, X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of x, y [BT, D] and state [slots, D]: factor · x yᵀ [BT, BT], 0 above the diagonal, in the products' format; and
    what x sees of all that was there before its block, factor · late ∘ (early ∘ x stateᵀ + x y₋ᵀ scaled₋) [BT, BM] in
    float32, where y₋ and scaled₋, the tile `scaled`, are of the block before, which has `before` tokens, 0 or BT, and
    whose gates are early ∘ late (`passing`). slots: M, or 0 where there is no state yet."""
    scores = tl.zeros([BT, BT], tl.float32)
    far = tl.zeros([BT, BT], tl.float32)
    old = tl.zeros([BT, BM], tl.float32)
    for d in range(0, rolled(D, left), BD):
        xd = load_rows(x, left, d, BT, X_STRIDE, D, BD)
        yd = load_rows(y, left, d, BT, Y_STRIDE, D, BD)
        hd = load_rows(state, slots, d, BM, D, D, BD)
        scores = add_product(scores, xd, tl.trans(yd), left, PRECISION)
        if C > BT:
            zd = load_rows(y - BT * Y_STRIDE, before, d, BT, Y_STRIDE, D, BD)
            far = add_product(far, xd, tl.trans(zd), left, PRECISION)
        old = add_product(old, xd.to(DOT), tl.trans(hd.to(DOT)), left, PRECISION)
    ot = tl.arange(0, BT)
    near = tl.where(ot[:, None] >= ot[None, :], scores * factor, 0.0).to(DOT)
    if C > BT:
        old *= factor * early[None, :]
        old = mm((far * factor).to(DOT), scaled, old, PRECISION=PRECISION)
        old *= late[None, :]
    else:
        old *= factor
    return near, old


@triton.jit
def write_products(
    near, y, read, state, slots, out, scaled, early, late, left, before, factor,
    BT: tl.constexpr, C: tl.constexpr, Y_STRIDE: tl.constexpr, O_STRIDE: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, ANY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = factor · (near y + ((late ∘ read) scaled₋ᵀ) y₋ + (early ∘ late ∘ read) state), for near [BT, BT],
    y [BT, D], read [BT, BM] in float32, state [slots, D]; y₋, scaled₋, early and late as in `products`."""
    reading = read
    if C > BT:
        reading *= late[None, :]
    far = reading.to(DOT)
    reading = far
    if C > BT:
        if ANY:
            reading = (read * (early * late)[None, :]).to(DOT)
        far = mm(far, tl.trans(scaled), PRECISION=PRECISION).to(DOT)
    for d in range(0, rolled(D, left), BD):
        yd = load_rows(y, left, d, BT, Y_STRIDE, D, BD)
        hd = load_rows(state, slots, d, BM, D, D, BD)
        total = mm(reading, hd.to(DOT), PRECISION=PRECISION)
        total = mm(near, yd.to(DOT), total, PRECISION=PRECISION)
        if C > BT:
            zd = load_rows(y - BT * Y_STRIDE, before, d, BT, Y_STRIDE, D, BD)
            total = mm(far, zd.to(DOT), total, PRECISION=PRECISION)
        store_rows(out, total * factor, left, d, BT, O_STRIDE, D, BD)


@triton.jit
def passing(total, ANY: tl.constexpr, RANGE: tl.constexpr):
    """(early, late) of a block of which this is the gates' sum: what passes it loses `early`, and with what the block's
    `scaled` writes also `late`. Unless ANY, no slot forgets the block's start, and `early` is 1."""
    late = to_end(total, RANGE)
    early = tl.full(total.shape, 1.0, tl.float32)
    if ANY:
        early = tl.where(forgets(total, RANGE), fast_exp(total), 1.0)
    return early, late


@triton.jit
def load_levels(levels, block, exists, SLICES: tl.constexpr):
    """Which levels above 0 occur in a block, if it exists: see `gates.prepare`."""
    found = 0
    for i in tl.static_range(SLICES):
        found |= tl.load(levels + block * SLICES + i, mask=exists, other=0)
    return found


@triton.jit
def find_levels(
    until, sums, left, d, BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, RANGE: tl.constexpr
):
    """The level of each of a block's tokens and of slots d to d+BS; sums: of their gates, which `until` has too."""
    ot, od = tl.arange(0, BT), d + tl.arange(0, BS)
    here = (ot < left)[:, None] & (od < M)[None, :]
    large = tl.load(until + (ot // GROUP_32 * GROUP_32)[:, None] * (H * M) + od[None, :], here, 0.0)
    small = tl.load(until + (ot // GROUP_8 * GROUP_8)[:, None] * (H * M) + od[None, :], here, 0.0)
    beyond = tl.where(sums >= large - RANGE, 1, tl.where(sums >= small - RANGE, 2, 3))
    return tl.where(here & (sums < -RANGE), beyond, 0)


@triton.jit
def from_start(
    scaled, g, s, until, left,
    BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """s e^{-G} [BT, BM] of a block with any levels, whatever reference the tile `scaled` has: of weak gates the same
    bits that `gates.prepare` stores."""
    total = load_sum(until, tl.minimum(left, BT) - 1, True, H, M, BM)
    sums = load_rows(until, left, 0, BT, H * M, M, BM)
    write = load_write(g, s, left, 0, BT, H, M, BM, HAS_S)
    weak = (write * fast_exp(since_start(sums, RANGE))).to(DOT)
    return tl.where(forgets(total, RANGE)[None, :], weak, scaled)


@triton.jit
def references(levels, BT: tl.constexpr):
    """How many references beside its start a block needs in which these levels occur."""
    groups = tl.where((levels & 1) > 0, BT // GROUP_32, 0) + tl.where((levels & 2) > 0, BT // GROUP_8, 0)
    return groups + tl.where((levels & 4) > 0, BT, 0)


@triton.jit
def _factors(
    i, levels, until, sums, left,
    BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Of the i'th reference r: e^{G_t - r} where token and slot use it, else 0; and e^{r - G_j}, finite everywhere.

    sums: G. Which token and slot are at which level is found here, as `find_levels` does, and takes no registers.
    """
    large = tl.where((levels & 1) > 0, BT // GROUP_32, 0)
    small = tl.where((levels & 2) > 0, BT // GROUP_8, 0)
    is_large, is_small = i < large, i < large + small
    token = tl.where(is_large, i * GROUP_32, tl.where(is_small, (i - large) * GROUP_8, i - large - small))
    behind = token + tl.where(is_large, GROUP_32, tl.where(is_small, GROUP_8, 1))
    reference = load_sum(until, token, token < left, H, M, BM)
    of_32 = load_sum(until, token // GROUP_32 * GROUP_32, token < left, H, M, BM)
    of_8 = load_sum(until, token // GROUP_8 * GROUP_8, token < left, H, M, BM)
    below = tl.where(is_large, 0.0, tl.where(is_small, of_32, tl.minimum(of_32, of_8))) - RANGE
    lowest = tl.where(is_large | is_small, reference - RANGE, float("-inf"))
    ot = tl.arange(0, BT)
    uses = ((ot >= token) & (ot < behind))[:, None] & (sums < below[None, :]) & (sums >= lowest[None, :])
    grown = tl.where(uses, exp(tl.minimum(sums - reference[None, :], 0.0)), 0.0)
    inverse = exp(tl.minimum(reference[None, :] - sums, RANGE))
    return grown, inverse


@triton.jit
def near_logits(
    scores, old, grown, weak, PRECISION: tl.constexpr,
):  # fmt: skip
    """e^{G_t} ∘ old_t + Σ_{j≤t} scores_tj s_j e^{G_t - G_j} [BT, BM] in float32 of a block where all is at level 0;
    grown = e^G, weak = s e^{-G}, scores are 0 for j > t."""
    return grown * mm(scores, weak, old, PRECISION=PRECISION)


@triton.jit
def near_logits_any(
    scores, old, grown, weak, g, s, until, levels, left,
    BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`near_logits` of a block with any levels."""
    sums = load_rows(until, left, 0, BT, H * M, M, BM)
    write = load_write(g, s, left, 0, BT, H, M, BM, HAS_S)
    total = near_logits(scores, old, grown, weak, PRECISION)
    total = tl.where(sums >= -RANGE, total, grown * old)
    for i in tl.range(references(levels, BT), num_stages=1):
        grown, inverse = _factors(i, levels, until, sums, left, BT, H, M, BM, RANGE)
        total += grown * mm(scores, (write * inverse).to(DOT), PRECISION=PRECISION)
    return total


@triton.jit
def near_attention(
    read, weak, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_m weights_tm s_jm e^{G_tm - G_jm} for j ≤ t, [BT (t), BT (j)] in the products' format, of a block where all is
    at level 0; read = weights ∘ e^G, weak = s e^{-G} [BT, BM]."""
    oc = tl.arange(0, BT)
    total = mm(read, tl.trans(weak), PRECISION=PRECISION)
    return tl.where(oc[:, None] >= oc[None, :], total, 0.0).to(DOT)


@triton.jit
def near_attention_any(
    read, weights, weak, g, s, until, levels, left,
    BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`near_attention` of a block with any levels."""
    sums = load_rows(until, left, 0, BT, H * M, M, BM)
    write = load_write(g, s, left, 0, BT, H, M, BM, HAS_S)
    total = mm(tl.where(sums >= -RANGE, read, 0.0), tl.trans(weak), PRECISION=PRECISION)
    for i in tl.range(references(levels, BT), num_stages=1):
        grown, inverse = _factors(i, levels, until, sums, left, BT, H, M, BM, RANGE)
        far = (weights * grown).to(DOT)
        total = mm(far, tl.trans((write * inverse).to(DOT)), total, PRECISION=PRECISION)
    oc = tl.arange(0, BT)
    return tl.where(oc[:, None] >= oc[None, :], total, 0.0).to(DOT)


@triton.jit
def near_writes(
    scores, reading, weights, until, levels, left,
    BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{t≥j} scores_jt weights_tm e^{G_tm - G_jm} [BT (j), BM] of a block with any levels; scores [BT (j), BT (t)] are
    0 for t < j, reading = weights ∘ e^G, both of these in the products' format."""
    sums = load_rows(until, left, 0, BT, H * M, M, BM)
    inverse = exp(since_start(sums, RANGE))
    written = inverse * mm(scores, tl.where(sums >= -RANGE, reading, 0.0), PRECISION=PRECISION)
    for i in tl.range(references(levels, BT), num_stages=1):
        grown, far = _factors(i, levels, until, sums, left, BT, H, M, BM, RANGE)
        written += far * mm(scores, (weights * grown).to(DOT), PRECISION=PRECISION)
    return written


@triton.jit
def sums_before_and_from(x, y, BT: tl.constexpr, DOT: tl.constexpr):
    """Σ_{i<t} x_i + Σ_{i≥t} y_i of x, y [BT, ·], in float32.

    A scan goes through shared memory again and again; in bfloat16 products with triangles of ones are faster, with x
    and y in two parts each, together 16 bits.
    """
    if DOT == tl.bfloat16:
        row, column = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
        before = tl.where(column < row, 1.0, 0.0).to(tl.bfloat16)
        since = tl.where(column >= row, 1.0, 0.0).to(tl.bfloat16)
        high_x, high_y = x.to(tl.bfloat16), y.to(tl.bfloat16)
        total = tl.dot(before, (x - high_x.to(tl.float32)).to(tl.bfloat16))
        total = tl.dot(since, (y - high_y.to(tl.float32)).to(tl.bfloat16), total)
        total = tl.dot(before, high_x, total)
        total = tl.dot(since, high_y, total)
    else:
        total = tl.cumsum(x, axis=0) - x + tl.cumsum(y, axis=0, reverse=True)
    return total


@triton.jit
def one_minus_exp(g):
    """1 - e^g without cancellation near 0: a series where |g| is small, the difference elsewhere."""
    series = -g * (1.0 + g * (0.5 + g * (1.0 / 6 + g * (1.0 / 24 + g * (1.0 / 120 + g * (1.0 / 720))))))
    return tl.where(g > -0.25, series, 1.0 - tl.exp(g))


@triton.jit
def load_write(
    g, s, left, d, ROWS: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, HAS_S: tl.constexpr
):  # fmt: skip
    """Write strengths s of ROWS tokens and slots d to d+BS in float32, derived as 1 - e^g where none are given; 0 for
    padding."""
    if HAS_S:
        write = load_rows(s, left, d, ROWS, H * M, M, BS).to(tl.float32)
    else:
        write = one_minus_exp(load_rows(g, left, d, ROWS, H * M, M, BS).to(tl.float32))
    return write
