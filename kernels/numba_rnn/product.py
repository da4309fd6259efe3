"""Matrix products whose sums stay in registers, with a weight in panels or with the rows of a weight as they are.

The order of a sum does not depend on the other rows and columns of its product. So bits depend on neither the batch nor
the number of threads.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import config, types
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from .functions import compiled, floats
from .tile import SIZE, ZERO, fill, move

FEATURES = (get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")
LANES = 16 if "+avx512f" in FEATURES else 8 if "+avx2" in FEATURES else 4
HEIGHT = 4 if "+sse2" in FEATURES and LANES < 16 else 8  # sums are in 12 of 16 registers, or in 24 of 32
VECTORS = 3
PANEL, HALF = LANES * VECTORS, LANES // 2  # columns of a panel; rows that `dots` multiplies at once
ADDENDS = 128  # the most products that are added one after another; the error of a longer sum would be larger
SEQUENCES = 4  # a thread takes a multiple of so many
TALL, DEEP = 64, 512  # rows and addends of a block of a product of two matrices
REAL, INDEX = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(REAL, LANES)
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)


class Emit:
    """Emits LLVM's instructions for vectors at addresses."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, address: Any, elements: Any) -> Any:
        """Return the address of a float32 number, `elements` numbers after an address."""
        return self.builder.add(address, self.builder.mul(elements, INDEX(4)))

    def load(self, address: Any, kind: ir.Type = VECTOR) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=4)

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))

    def broadcast(self, number: Any) -> Any:
        undefined = ir.Constant(VECTOR, ir.Undefined)
        one = self.builder.insert_element(undefined, number, ir.IntType(32)(0))
        return self.shuffle(one, undefined, [0] * LANES)

    def sums(self, step: int, end: Any, count: int, add: Any) -> list[Any]:
        """Emit a loop over k from 0 to `end`, at least one pass, and return `count` vectors of sums.

        add(k) emits one pass, and returns a pair of factors for each sum.
        """
        builder, before = self.builder, self.builder.block
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        multiply_add = get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        body, done = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        k, sums = builder.phi(INDEX), [builder.phi(VECTOR) for _ in range(count)]
        new = [builder.call(multiply_add, [*factors, old]) for factors, old in zip(add(k), sums)]
        following = builder.add(k, INDEX(step))
        for phi, first, next_ in zip([k, *sums], [INDEX(0), *[ZEROS] * count], [following, *new]):
            phi.add_incoming(first, before)
            phi.add_incoming(next_, body)
        builder.cbranch(builder.icmp_signed("<", following, end), body, done)
        builder.position_at_end(done)
        return new


def emitted(count: int) -> Any:
    """A decorator: turn emit(Emit, *arguments) into a compiled function of one tuple of `count` addresses and sizes.

    It stands once in a loop, and is not inlined, which would take LLVM longer.
    """

    def function(emit: Any) -> Any:
        @intrinsic
        def of(context: Any, arguments: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
                kind = ir.FunctionType(ir.VoidType(), [INDEX] * count)
                function = get_or_insert_function(builder.module, kind, f"gpu_lstm.{emit.__name__}")
                if not function.blocks:
                    function.linkage = "linkonce_odr"
                    function.attributes.add("noinline")
                    of_function = ir.IRBuilder(function.append_basic_block())
                    emit(Emit(of_function), *function.args)
                    of_function.ret_void()
                builder.call(function, [builder.extract_value(given[0], k) for k in range(count)])
                return context.get_dummy_value()

            return types.void(types.UniTuple(types.intp, count)), generate

        return of

    return function


@emitted(9)
def block(
    e: Emit, rows: Any, vectors: Any, x: Any, x_stride: Any, panel: Any, out: Any, out_stride: Any, K: Any, adds: Any
) -> None:
    """out [rows, columns] = x [rows, K] panel [K, columns]. If `adds` is not 0, add the product to `out` instead.

    `vectors` counts vectors of columns, rows are 2^n.
    """
    builder = e.builder
    done = builder.append_basic_block()
    choice = builder.switch(builder.add(builder.mul(rows, INDEX(VECTORS)), vectors), done)

    def emit(count: int, wide: int) -> None:
        of_x = [e.at(x, builder.mul(x_stride, INDEX(r))) for r in range(count)]

        def factors(k: Any) -> list[Any]:
            start = e.at(panel, builder.mul(k, INDEX(LANES * wide)))
            w = [e.load(e.at(start, INDEX(LANES * n))) for n in range(wide)]
            return [(a, each) for row in of_x for a in [e.broadcast(e.load(e.at(row, k), REAL))] for each in w]

        sums = e.sums(1, K, count * wide, factors)
        to = [e.at(out, builder.mul(out_stride, INDEX(r))) for r in range(count)]
        places = [e.at(row, INDEX(LANES * n)) for row in to for n in range(wide)]
        with builder.if_else(builder.icmp_signed("!=", adds, INDEX(0))) as (added, first):
            with added:
                for sum_, place in zip(sums, places):
                    e.store(builder.fadd(e.load(place), sum_), place)
            with first:
                for sum_, place in zip(sums, places):
                    e.store(sum_, place)

    for r, wide in itertools.product(range(HEIGHT.bit_length()), range(1, VECTORS + 1)):
        here = builder.append_basic_block()
        choice.add_case(INDEX((VECTORS << r) + wide), here)
        builder.position_at_end(here)
        emit(1 << r, wide)
        builder.branch(done)
    builder.position_at_end(done)


@emitted(9)
def dots(
    e: Emit,
    rows: Any,
    x: Any,
    x_stride: Any,
    weight: Any,
    weight_stride: Any,
    last: Any,
    out: Any,
    out_stride: Any,
    K: Any,
) -> None:
    """out [rows, HALF] = x [rows, K] weight [HALF, K]^T, two rows at a time, and for at least one whole vector of K.

    Rows of the weight past `last` are not read. Row `last` takes their place.
    """
    builder, of_w = e.builder, []
    for r in range(HALF):
        row = builder.select(builder.icmp_signed("<", INDEX(r), last), INDEX(r), last)
        of_w.append(e.at(weight, builder.mul(row, weight_stride)))

    def emit(count: int, first: Any) -> None:
        of_x = [e.at(x, builder.mul(x_stride, builder.add(first, INDEX(r)))) for r in range(count)]

        def factors(k: Any) -> list[Any]:
            a, w = ([e.load(e.at(row, k)) for row in of] for of in (of_x, of_w))
            return list(itertools.product(a, w))

        sums, size = e.sums(LANES, builder.and_(K, INDEX(-LANES)), count * HALF, factors), 1
        while size < LANES:  # two vectors become one, which has the sums of neighbours
            lanes = [start + t + n for start in range(0, LANES, 2 * size) for t in (0, LANES) for n in range(size)]
            pairs = zip(sums[::2], sums[1::2] or sums)  # with one row, the last vector is added to itself
            sums = [
                builder.fadd(e.shuffle(*pair, lanes), e.shuffle(*pair, [n + size for n in lanes])) for pair in pairs
            ]
            size *= 2
        for r in range(count):
            half = e.shuffle(sums[0], sums[0], range(r * HALF, r * HALF + HALF))
            e.store(half, e.at(out, builder.mul(out_stride, builder.add(first, INDEX(r)))))

    start, (head, two, rest, one, done) = builder.block, [builder.append_basic_block() for _ in range(5)]
    builder.branch(head)
    builder.position_at_end(head)
    first = builder.phi(INDEX)
    first.add_incoming(INDEX(0), start)
    following = builder.add(first, INDEX(2))
    builder.cbranch(builder.icmp_signed("<=", following, rows), two, rest)
    builder.position_at_end(two)
    emit(2, first)
    first.add_incoming(following, builder.block)
    builder.branch(head)
    builder.position_at_end(rest)
    builder.cbranch(builder.icmp_signed("<", first, rows), one, done)
    builder.position_at_end(one)
    emit(1, first)
    builder.branch(done)
    builder.position_at_end(done)


def whole_vectors(n: int) -> int:
    """Return n, rounded up to whole vectors, as panels have columns."""
    return (n + LANES - 1) // LANES * LANES


vectors_of = compiled(whole_vectors)


@compiled
def by_panels(x, x_stride, panels, out, out_stride, count, K, N, scratch, adds=0):
    """out [count, N] = x [count, K] weight [K, N], whose panels are [K, columns] with up to PANEL columns each.

    x, panels, out and scratch are addresses. Rows of x and out are x_stride and out_stride elements apart.
    `scratch` has room for HEIGHT * PANEL numbers. If `adds` is not 0, the product is added to `out`.
    """
    for n in range(0, N, PANEL):
        columns = min(PANEL, N - n)
        vectors, rows, b = vectors_of(columns) // LANES, HEIGHT, 0
        while b < count:
            while rows > count - b:
                rows //= 2
            to = out + SIZE * (b * out_stride + n)
            place, stride = (to, out_stride) if columns % LANES == 0 else (scratch, PANEL)
            of_x, panel, k = x + SIZE * b * x_stride, panels + SIZE * n * K, 0
            if columns % LANES and adds:
                for r in range(rows):
                    move(scratch, r * PANEL, to, r * out_stride, columns)
            while k < K:  # a loop over a range would take longer
                at = of_x + SIZE * k, x_stride, panel + SIZE * k * vectors * LANES
                block((rows, vectors, *at, place, stride, min(ADDENDS, K - k), k + adds))
                k += ADDENDS
            if columns % LANES:
                for r in range(rows):
                    move(to, r * out_stride, scratch, r * PANEL, columns)
            b += rows


@compiled
def by_rows(x, x_stride, weight, weight_stride, out, out_stride, count, K, N, scratch):
    """out [count, N] = x [count, K] weight [N, K]^T. Rows of the weight are weight_stride elements apart."""
    whole, w, of_x = K // LANES * LANES, floats(weight), floats(x)
    for n in range(0, N, HALF):
        columns = min(HALF, N - n)
        most = max(1, count) if columns == HALF else 2  # `scratch` has room for two
        for b in range(0, count, most):
            rows, to = min(most, count - b), out + SIZE * (b * out_stride + n)
            place, stride = (to, out_stride) if columns == HALF else (scratch, HALF)
            if whole:
                at = x + SIZE * b * x_stride, x_stride, weight + SIZE * n * weight_stride, weight_stride
                dots((rows, *at, columns - 1, place, stride, K))
            if columns < HALF or whole < K:
                sums = floats(place)
                for r in range(rows):
                    for j in range(columns):
                        sum_ = sums[r * stride + j] if whole else ZERO
                        for k in range(whole, K):
                            sum_ += of_x[(b + r) * x_stride + k] * w[(n + j) * weight_stride + k]
                        floats(to)[r * out_stride + j] = sum_


@emitted(4)
def transpose(e: Emit, weight: Any, weight_stride: Any, panel: Any, wide: Any) -> None:
    """panel [LANES, LANES] = weight [LANES, LANES]^T. Rows are `wide` and weight_stride elements apart."""
    rows, size = [e.load(e.at(weight, e.builder.mul(weight_stride, INDEX(r)))) for r in range(LANES)], 1
    while size < LANES:  # blocks of `size` lanes and rows are exchanged across the diagonal
        low = [lane if lane & size == 0 else lane - size + LANES for lane in range(LANES)]
        high = [lane + size if lane & size == 0 else lane + LANES for lane in range(LANES)]
        rows = [e.shuffle(rows[r & ~size], rows[r | size], high if r & size else low) for r in range(LANES)]
        size *= 2
    for r, row in enumerate(rows):
        e.store(row, e.at(panel, e.builder.mul(wide, INDEX(r))))


@compiled
def into_rows(weight, stride_k, stride_n, rows, wide, K, N, columns):
    """Copy a weight [K, N] into rows of `columns` numbers, `wide` elements apart, with zeros past N."""
    w, out, given = floats(weight), floats(rows), min(N, columns)
    for k in range(K):
        if stride_n == 1:
            move(rows, k * wide, weight, k * stride_k, given)
        else:
            for j in range(given):
                out[k * wide + j] = w[k * stride_k + j * stride_n]
        fill(rows, k * wide + given, ZERO, columns - given)


@compiled
def turned(t, stride, rows, wide, K, N):
    """rows [K, columns] = t [N, K]^T, with zeros past N in a whole vector. Rows are `stride` and `wide` apart."""
    for k in range(0, K, LANES):
        for j in range(0, N, LANES):
            given, to = t + SIZE * (k + j * stride), rows + SIZE * (k * wide + j)
            if K - k < LANES or N - j < LANES:
                into_rows(given, 1, stride, to, wide, min(LANES, K - k), N - j, LANES)
            else:
                transpose((given, stride, to, wide))


@compiled
def into_panels(weight, stride_k, stride_n, panels, K, N):
    """Copy a weight [K, N] with these strides into panels for `by_panels`, with zeros past N."""
    for n in range(0, N, PANEL):
        columns, at, panel = min(PANEL, N - n), weight + SIZE * n * stride_n, panels + SIZE * n * K
        wide = vectors_of(columns)
        if stride_k == 1:
            turned(at, stride_n, panel, wide, K, columns)
        else:
            into_rows(at, stride_k, stride_n, panel, wide, K, columns, wide)


@compiled
def matrices(p, first, end, memory):
    """Compute the rows from `first` to `end` of a record.MATMUL, in blocks of K and of rows that stay in a cache."""
    rows = memory + SIZE * DEEP * vectors_of(p.N)
    scratch = rows + SIZE * TALL * DEEP
    for k in range(0, p.K, DEEP):
        deep = min(DEEP, p.K - k)
        into_panels(p.b + SIZE * k * p.b_k, p.b_k, p.b_n, memory, deep, p.N)
        for m in range(first, end, TALL):
            count, x, stride = min(TALL, end - m), p.a + SIZE * (m * p.a_m + k * p.a_k), p.a_m
            if p.a_k != 1:
                turned(x, p.a_k, rows, DEEP, count, deep)
                x, stride = rows, DEEP
            by_panels(x, stride, memory, p.out + SIZE * m * p.N, p.N, count, deep, p.N, scratch, k)
