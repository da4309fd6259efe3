"""Products on tensor cores, written thread by thread.

[THREADS] is a tensor with as many elements as the program has threads. Element t belongs to thread t.

A product is mma.sync, D = A B + D, of 16 rows of weights and 8 sequences (PTX ISA, "Matrix Fragments for mma.m16n8k16",
and for m16n8k8 with .tf32). K is the dimension that it sums over. It counts words of 32 bits: two neighbouring elements
of half precision, or one of float32. The lane is the place of a thread in its warp. Two numbers, computed from the
lane, say which elements of A, B and D a thread has:

    here      in the PTX ISA      value      in A                     in B            in D
    column    groupID             lane // 4  rows column, column + 8  the sequence    rows column, column + 8
    quarter   threadID_in_group   lane % 4   two words of K           two words of K  sequences 2 quarter, 2 quarter + 1

Each column of B is a sequence. The four threads with the same `column` share it, and `quarter` numbers the four.

The order of K is free as long as A and B agree. Here a thread has a quad, four neighbouring words (16 bytes). The first
mma.sync takes the first two words of each quad, and the next one the other two. For example, quarter 1 has the words 4
to 7: the first product takes 4 and 5, the next one 6 and 7. The four quads of a row are a chunk of K, 16 words.
"""

from collections import namedtuple

import triton
import triton.language as tl

from ..exchange import Words, look, neighbours
from ..features import constexpr_function, constraints, types

SEQUENCES = tl.constexpr(8)  # the number of sequences in a product
# The threads of a program: the number, the warp, and column and quarter as above. Each field is [THREADS].
Threads = namedtuple("Threads", "number warp column quarter")


@triton.jit
def threads(WARPS: tl.constexpr):
    """Return the Threads of a program."""
    number = tl.arange(0, 32 * WARPS)
    return Threads(number, number // 32, number % 32 // 4, number % 4)


@triton.jit
def load_words(
    words_ptr,  # [rows, W] int32
    rows,  # tuple of 2 TILES row numbers [THREADS]: two for each tile, for its rows column and column + 8. -1: zeros
    first,  # [THREADS] the first word of the thread's first quad
    W: tl.constexpr, STRIDE: tl.constexpr, DTYPE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Load A, with TILES x 16 rows and CHUNKS chunks of K: return a tuple of [THREADS] words, which stay in registers.

    The chunks of a thread are STRIDE words apart.
    """
    quads, weights = (), ()
    # `look` loads whole quads here. The weights are published by nobody, and nothing is polled. One load for each word
    # would take Triton many times as long to compile.
    for n in tl.static_range(len(rows)):
        words = Words(words_ptr + rows[n].to(tl.int64) * W + first, tl.where(rows[n] < 0, 0, W - first))
        quads = quads + (look(words, CHUNKS, 4, STRIDE, neighbours(W)),)
    # Let a and b be the rows column and column + 8 of a tile, and 0 to 3 the words of a thread's quad. The words of a
    # chunk are in the order a0 b0 a1 b1 a2 b2 a3 b3, and then come the words of the next tile. The first four are the
    # operand A of one mma.sync, the other four of the next one.
    for chunk in tl.static_range(CHUNKS):
        for n in tl.static_range(4 * len(rows)):
            word = quads[n // 8 * 2 + n % 2][4 * chunk + n % 8 // 2]
            weights = weights + (to_tf32(word) if tl.float32 == DTYPE else word,)
    return weights


@triton.jit
def to_tf32(words):
    """Round words of float32 to the nearest TF32, ties away from zero. Tensor cores would truncate them."""
    return tl.where((words & 0x7F800000) == 0x7F800000, words, (words + 0x1000) & -0x2000)  # except infinity and NaN


@triton.jit
def product(weights, x, DTYPE: tl.constexpr):
    """Return D = A B, a tuple of 4 TILES [THREADS] float32: two rows of each tile, and two sequences of each row.

    A is `weights`, from load_words. B is x, a tuple of 4 CHUNKS [THREADS] words.
    """
    CHUNKS: tl.constexpr = len(x) // 4
    TILES: tl.constexpr = len(weights) // (8 * CHUNKS)
    return tl.inline_asm_elementwise(
        multiplication(CHUNKS, TILES, DTYPE), constraints("=&f", 4 * TILES, "r", len(weights) + len(x)),
        weights + x, dtype=types(tl.float32, 4 * TILES), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def scale(x, factors_ptr, left, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Return x, the operand of `product`, times factors, rounded to DTYPE.

    The factors have the same layout as the Words of x: factors_ptr [THREADS] points to the first word of each thread,
    and `left` [THREADS] counts the words that remain from there.
    """
    scaled = ()
    for n in tl.static_range(len(x)):
        offset = n // 4 * STRIDE + n % 4
        factors = tl.load(factors_ptr + offset, mask=left > offset, other=0)
        if tl.float32 == DTYPE:
            word = (x[n].to(tl.float32, bitcast=True) * factors.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        else:
            word = multiply_halves(x[n], factors, DTYPE) | (multiply_halves(x[n] >> 16, factors >> 16, DTYPE) << 16)
        scaled = scaled + (word,)
    return scaled


@triton.jit
def multiply_halves(a, b, DTYPE: tl.constexpr):
    """Return the product of the low halves of two words, as the low half of an int32."""
    a, b = a.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32), b.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return (a * b).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def to_shared(
    values,  # tuple of [THREADS]
    sequences, elements,  # tuples of [THREADS]: the sequence of each value, cyclically; its element in that row
    buffer,  # 0 and 1 alternately, so that a call does not overwrite the values of the call before it
    CHUNKS: tl.constexpr,  # the number of chunks of a row, which is even
):  # fmt: skip
    """Share 8 rows of K with all warps of the program, through shared memory. Each thread has some of the elements.

    Shared memory is [2, 8 sequences, 16 CHUNKS words]. Returns the address of the rows, for `take`.

    A call has one barrier, after its stores. No second one is needed before the stores: at step 2 a warp overwrites the
    values of step 0. It has then passed the barrier of step 1, which every warp reached after its loads of step 0.
    """
    COUNT: tl.constexpr = len(values)
    SIZE: tl.constexpr = values[0].dtype.primitive_bitwidth // 8
    bits, places = (), ()
    for n in tl.static_range(COUNT):
        bits = bits + (values[n].to(tl.int16 if SIZE == 2 else tl.int32, bitcast=True),)
        places = places + (shared_place(sequences[n % len(sequences)], elements[n] * SIZE, CHUNKS),)
    return tl.inline_asm_elementwise(
        sharing(COUNT, CHUNKS, SIZE), constraints("=&r", 1, "h" if SIZE == 2 else "r", COUNT, "r", COUNT + 1),
        bits + places + (buffer,), dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def take(shared, FIRST: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """Load B for COUNT of a row's CHUNKS chunks, from the even chunk FIRST on, as a tuple of 4 COUNT [THREADS] words.

    The row is the sequence in the thread's column. `shared` is from `to_shared`.
    """
    thread = threads(WARPS)
    even = shared + shared_place(thread.column, 16 * thread.quarter, CHUNKS)
    odd = shared + shared_place(thread.column, 16 * thread.quarter + 64, CHUNKS)
    return tl.inline_asm_elementwise(
        taking(FIRST, COUNT), constraints("=&r", 4 * COUNT, "r", 2),
        [even, odd], dtype=types(tl.int32, 4 * COUNT), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def shared_place(sequence, byte, CHUNKS: tl.constexpr):
    """Return the offset of a byte of a sequence's row in shared memory.

    8 quads of 16 bytes fill the 32 banks, and a row is a multiple of 8 quads. Without a swizzle, the same quad of all
    sequences would be in the same banks. With it, quads 0 to 7 of a row are at these places:

        sequence 0    0 1 2 3 4 5 6 7
        sequence 1    4 5 6 7 0 1 2 3
        sequence 2    1 0 3 2 5 4 7 6
        sequence 3    5 4 7 6 1 0 3 2

    Eight lanes load at a time, quads 0 to 3 of two sequences such as 0 and 1: eight places, and no bank conflict. In
    half precision a warp stores one quad for each of four sequences, all even or all odd, which has no conflict either.
    In float32 it stores two quads for each. The eight quads have only four places, so two words share a bank.
    """
    quad = (byte // 16) ^ (sequence % 2 * 4 + sequence // 2)
    return sequence * (64 * CHUNKS) + quad * 16 + byte % 16


@triton.jit
def sum_over_warps(
    products,  # from `product`, where each warp has multiplied different words of K
    rows, sequences,  # tuples of [THREADS]: the elements of the sum that a thread wants, with sequences cyclically
    wanted,  # [THREADS], the same in all threads of a warp: whether the warp wants any. If not, its sums are undefined
    buffer,  # as for `to_shared`
    WARPS: tl.constexpr,
):  # fmt: skip
    """Return the wanted elements of the sum of all warps' products, a tuple of [THREADS] float32.

    The order of additions is fixed. The products go through shared memory [2, WARPS, 16 TILES rows, 8 sequences]. Warps
    that want no sums load nothing, which leaves bandwidth to the other warps.
    """
    COUNT: tl.constexpr = len(rows)
    TILES: tl.constexpr = len(products) // 4
    thread = threads(WARPS)
    row, sequence = thread.warp * (16 * TILES) + thread.column, 2 * thread.quarter
    places = (place(row, sequence), place(row + 8, sequence))
    for n in tl.static_range(COUNT):
        places = places + (place(rows[n], sequences[n % len(sequences)]),)
    return tl.inline_asm_elementwise(
        summation(COUNT, TILES, WARPS), constraints("=&f", COUNT, "f", 4 * TILES, "r", COUNT + 4),
        products + places + (buffer, wanted.to(tl.int32)), dtype=types(tl.float32, COUNT), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def place(row, sequence):
    """Return the offset of an element of a product in shared memory, in bytes.

    Pairs of sequences are swizzled by the row, so that neither the threads that store a product nor threads that load
    neighbouring rows of one sequence have bank conflicts.
    """
    pair = (sequence // 2) ^ (row // 4 % 4)
    return 4 * (8 * row + 2 * pair + sequence % 2)


@constexpr_function
def multiplication(chunks: int, tiles: int, dtype: tl.dtype) -> str:
    """Return the PTX of `product`. Its operands, from $0 on, are the sums, the weights, and x."""
    shape = {
        tl.float16: "m16n8k16.row.col.f32.f16.f16.f32",
        tl.bfloat16: "m16n8k16.row.col.f32.bf16.bf16.f32",
        tl.float32: "m16n8k8.row.col.f32.tf32.tf32.f32",
    }[dtype]
    a0, b0 = 4 * tiles, 4 * tiles + 8 * tiles * chunks
    zeros = ", ".join(["0f00000000"] * 4)
    # With one tile and many chunks, every other product has its own sums, and does not wait for the one before it.
    chains = 2 if tiles == 1 and chunks >= 4 else 1
    lines = [".reg .f32 odd<4>;"]
    for n in range(2 * chunks):  # a quad has two products
        for tile in range(tiles):  # tiles do not wait for each other
            a, b = a0 + (n // 2 * tiles + tile) * 8 + n % 2 * 4, b0 + 2 * n
            d = ", ".join(f"odd{i}" if n % chains else f"${4 * tile + i}" for i in range(4))
            lines.append(
                f"mma.sync.aligned.{shape} {{{d}}}, {{${a}, ${a + 1}, ${a + 2}, ${a + 3}}}, {{${b}, ${b + 1}}}, "
                f"{{{zeros if n < chains else d}}};"
            )
    if chains == 2:
        lines += [f"add.f32 ${i}, ${i}, odd{i};" for i in range(4)]
    return "\n".join(["{", *lines, "}"])


@constexpr_function
def summation(count: int, tiles: int, warps: int) -> str:
    """Return the PTX of `sum_over_warps`.

    Its operands are the sums, the products, the offsets of the thread's two rows, the offsets of the sums, `buffer`,
    and `wanted`.
    """
    size = 4 * 8 * 16 * tiles  # the bytes of a warp's products
    store, load, buffer = count + 4 * tiles, count + 4 * tiles + 2, 2 * count + 4 * tiles + 2
    lines = [
        f".shared .align 16 .b8 sums[{2 * warps * size}];",
        ".reg .b32 begin, at;", ".reg .f32 element;", ".reg .pred nothing;",
        "mov.u32 begin, sums;", f"mad.lo.u32 begin, ${buffer}, {warps * size}, begin;",
    ]  # fmt: skip
    for half in range(2):
        lines.append(f"add.u32 at, begin, ${store + half};")
        for tile in range(tiles):
            product = count + 4 * tile + 2 * half
            lines.append(f"st.shared.v2.f32 [at + {4 * 8 * 16 * tile}], {{${product}, ${product + 1}}};")
    lines += ["bar.sync 0;", f"setp.eq.s32 nothing, ${buffer + 1}, 0;", "@nothing bra.uni SUMMED;"]
    for n in range(count):
        lines += [f"add.u32 at, begin, ${load + n};", f"ld.shared.f32 ${n}, [at];"]
        for warp in range(1, warps):
            lines += [f"ld.shared.f32 element, [at + {warp * size}];", f"add.f32 ${n}, ${n}, element;"]
    return "\n".join(["{", *lines, "SUMMED:", "}"])


@constexpr_function
def sharing(count: int, chunks: int, size: int) -> str:
    """Return the PTX of `to_shared`. Its operands are the address of the rows, the values, their offsets, `buffer`."""
    size_of_buffer = 8 * 64 * chunks
    lines = [
        f".shared .align 16 .b8 shared[{2 * size_of_buffer}];", ".reg .b32 at;",
        "mov.u32 $0, shared;", f"mad.lo.u32 $0, ${2 * count + 1}, {size_of_buffer}, $0;",
    ]  # fmt: skip
    for n in range(1, count + 1):
        lines += [f"add.u32 at, $0, ${count + n};", f"st.shared.b{8 * size} [at], ${n};"]
    return "\n".join(["{", *lines, "bar.sync 0;", "}"])


@constexpr_function
def taking(first: int, count: int) -> str:
    """Return the PTX of `take`.

    Its operands are the words, and the addresses of the thread's quads in chunk 0 and in chunk 1.
    """
    lines = []
    for n in range(count):
        words = f"${4 * n}, ${4 * n + 1}, ${4 * n + 2}, ${4 * n + 3}"
        lines.append(f"ld.shared.v4.b32 {{{words}}}, [${4 * count + n % 2} + {(first + n) // 2 * 128}];")
    return "\n".join(lines)
