"""The auction's searches by vector instructions, in LLVM's portable vector types, which Numba does not expose.

LLVM maps vectors of 64 numbers to the registers of the processor at hand (AVX-512, AVX2, NEON). `plain_searches`
documents the searches and implements them in plain Numba.

Only this module uses internals of Numba and llvmlite. `tests/matching/test_simd.py` has a canary for each name; if a
release removes one, `simd` falls back to plain Numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from rsm_probe.matching.compiled.plain_searches import CANDIDATE_LANES, LANES

# Below every real value, but finite after a price is subtracted.
LOWEST = {types.float32: -3e38, types.float64: -1e300}

_BIT, _INT32, _INT64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_DOUBLE = ir.DoubleType()


@intrinsic
def best_lanes(typing_context: Any, affinity: Any, row: Any, prices: Any) -> Any:
    """See `plain_searches.best_lanes`."""
    number = affinity.dtype
    signature = types.Tuple((number, number, types.int64, number))(affinity, types.intp, prices)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers, width = _operands(context, builder, signature, args)
        lanes = ir.VectorType(context.get_value_type(number), LANES)
        lowest = ir.Constant(lanes, [LOWEST[number]] * LANES)
        maxima = _running_maxima(builder, pointers, width, lanes, lowest)
        best = _reduced(builder, maxima)
        holds = builder.fcmp_ordered("==", maxima, _repeat(builder, best, LANES))
        bits = builder.bitcast(holds, ir.IntType(LANES))
        lane = builder.cttz(bits, ir.Constant(_BIT, 1))
        others = builder.and_(bits, builder.sub(bits, ir.Constant(_INT64, 1)))
        tied = builder.icmp_unsigned("!=", others, ir.Constant(_INT64, 0))
        runner_up = builder.select(tied, best, _reduced(builder, builder.select(holds, lowest, maxima)))
        folded = maxima
        for count in (32, 16, 8):
            folded = _larger(builder, _part(builder, folded, 0, count), _part(builder, folded, count, count))
        threshold = _reduced(builder, folded, "fmin")
        return context.make_tuple(builder, signature.return_type, [best, runner_up, lane, threshold])

    return signature, generate


@intrinsic
def best_in_float64(typing_context: Any, affinity: Any, row: Any, prices: Any) -> Any:
    """See `plain_searches.best_in_float64`."""
    signature = types.float64(affinity, types.intp, prices)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers, width = _operands(context, builder, signature, args)
        lanes = ir.VectorType(context.get_value_type(affinity.dtype), LANES)
        lowest = ir.Constant(ir.VectorType(_DOUBLE, LANES), [LOWEST[types.float64]] * LANES)
        return _reduced(builder, _running_maxima(builder, pointers, width, lanes, lowest))

    return signature, generate


@intrinsic
def lanes_above(typing_context: Any, affinity: Any, row: Any, prices: Any, start: Any, threshold: Any) -> Any:
    """See `plain_searches.lanes_above`."""
    signature = types.uint64(affinity, types.intp, prices, types.intp, affinity.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers, _ = _operands(context, builder, signature, args)
        lanes = ir.VectorType(context.get_value_type(affinity.dtype), LANES)
        left, right = (_load(builder, pointer, args[3], lanes) for pointer in pointers)
        above = builder.fcmp_ordered(">", builder.fsub(left, right), _repeat(builder, args[4], LANES))
        return builder.bitcast(above, _INT64)

    return signature, generate


@intrinsic
def best_candidate(typing_context: Any, values: Any, columns: Any, row: Any, count: Any, prices: Any) -> Any:
    """See `plain_searches.best_candidate`."""
    number = values.dtype
    signature = types.Tuple((number, number, types.int64))(values, columns, types.intp, types.intp, prices)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scalar = context.get_value_type(number)
        lanes, indices = ir.VectorType(scalar, CANDIDATE_LANES), ir.VectorType(_INT32, CANDIDATE_LANES)
        held, _ = _row(context, builder, signature.args[0], args[0], args[2])
        named, _ = _row(context, builder, signature.args[1], args[1], args[2])
        cost = context.make_array(signature.args[4])(context, builder, args[4]).data
        lowest = ir.Constant(lanes, [LOWEST[number]] * CANDIDATE_LANES)
        none = ir.Constant(indices, [0] * CANDIDATE_LANES)

        def pick(start: Any, top: Any, next_top: Any, where: Any) -> tuple[Any, ...]:
            prices = _gather(builder, cost, _load(builder, named, start, indices), lanes)
            values = builder.fsub(_load(builder, held, start, lanes), prices)
            better = builder.fcmp_ordered(">", values, top)
            beaten = builder.select(better, top, values)
            here = _repeat(builder, builder.trunc(start, _INT32), CANDIDATE_LANES)
            return (
                builder.select(better, values, top),
                _larger(builder, next_top, beaten),
                builder.select(better, here, where),
            )

        top, next_top, where = _loop(builder, args[3], CANDIDATE_LANES, (lowest, lowest, none), pick)
        best = _reduced(builder, top)
        bits = builder.bitcast(
            builder.fcmp_ordered("==", top, _repeat(builder, best, CANDIDATE_LANES)), ir.IntType(CANDIDATE_LANES)
        )
        lane = builder.cttz(bits, ir.Constant(_BIT, 1))
        # The lane of the best contributes its second value, every other lane its first.
        rest = builder.insert_element(top, builder.extract_element(next_top, lane), lane)
        second = _reduced(builder, rest)
        position = builder.add(builder.zext(builder.extract_element(where, lane), _INT64), builder.zext(lane, _INT64))
        return context.make_tuple(builder, signature.return_type, [best, second, position])

    return signature, generate


@intrinsic
def lowest_bit(typing_context: Any, bits: Any) -> Any:
    """See `plain_searches.lowest_bit`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(_BIT, 1))

    return types.int64(types.uint64), generate


@njit(cache=True, nogil=True)
def search_once(values, columns, prices):
    """Compile every search and run it on a row of ones; return 0 if all results are correct."""
    best, second, lane, threshold = best_lanes(values, 0, prices)
    candidate, _, position = best_candidate(values, columns, 0, columns.shape[1], prices)
    wrong = abs(best) + abs(second) + abs(threshold) + abs(candidate) + abs(best_in_float64(values, 0, prices))
    return wrong + lane + position + lowest_bit(lanes_above(values, 0, prices, 0, -values[0, 0]))


def _operands(context: Any, builder: Any, signature: Any, args: Any) -> tuple[list[Any], Any]:
    """Pointers to the row of the affinity and to the prices, and the number of columns."""
    pointer, width = _row(context, builder, signature.args[0], args[0], args[1])
    prices = context.make_array(signature.args[2])(context, builder, args[2])
    return [pointer, prices.data], width


def _row(context: Any, builder: Any, kind: Any, array: Any, row: Any) -> tuple[Any, Any]:
    """A pointer to a row of a contiguous matrix, and its number of columns."""
    matrix = context.make_array(kind)(context, builder, array)
    width = cgutils.unpack_tuple(builder, matrix.shape)[1]
    return builder.gep(matrix.data, [builder.mul(row, width)]), width


def _gather(builder: Any, pointer: Any, indices: Any, lanes: Any) -> Any:
    gathered = ir.Constant(lanes, ir.Undefined)
    for lane in range(lanes.count):
        position = builder.extract_element(indices, ir.Constant(_INT32, lane))
        gathered = builder.insert_element(
            gathered, builder.load(builder.gep(pointer, [position])), ir.Constant(_INT32, lane)
        )
    return gathered


def _load(builder: Any, pointer: Any, start: Any, lanes: Any) -> Any:
    position = builder.bitcast(builder.gep(pointer, [start]), lanes.as_pointer())
    return builder.load(position, align=4)


def _running_maxima(builder: Any, pointers: list[Any], width: Any, lanes: Any, lowest: Any) -> Any:
    """The largest value in each of 64 lanes, in the precision of `lowest`."""

    def scan(start: Any, maxima: Any) -> tuple[Any, ...]:
        loads = [_load(builder, pointer, start, lanes) for pointer in pointers]
        if lowest.type != lanes:
            loads = [builder.fpext(values, lowest.type) for values in loads]
        return (_larger(builder, builder.fsub(*loads), maxima),)

    return _loop(builder, width, LANES, (lowest,), scan)[0]


def _loop(builder: Any, count: Any, step: int, first: tuple[Any, ...], body: Any) -> tuple[Any, ...]:
    """Emit a loop: repeat `body(start, *values)`, which returns the next values, for start = 0, step, ... < count."""
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    first = (ir.Constant(_INT64, 0), *first)
    now = [builder.phi(value.type) for value in first]
    following = (builder.add(now[0], ir.Constant(_INT64, step)), *body(*now))
    for phi, *values in zip(now, first, following, strict=True):
        phi.add_incoming(values[0], before)
        phi.add_incoming(values[1], loop)
    builder.cbranch(builder.icmp_signed("<", following[0], count), loop, after)
    builder.position_at_end(after)
    return following[1:]


def _repeat(builder: Any, value: Any, count: int) -> Any:
    single = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, ir.Constant(_INT32, 0)
    )
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_INT32, count), [0] * count))


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def _part(builder: Any, vector: Any, start: int, count: int) -> Any:
    indices = ir.Constant(ir.VectorType(_INT32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), indices)


def _reduced(builder: Any, vector: Any, operation: str = "fmax") -> Any:
    """Reduce to the largest or smallest element; no element is NaN, so the order of operands does not matter."""
    suffix = f"v{vector.type.count}f{64 if vector.type.element == _DOUBLE else 32}"
    kind = ir.FunctionType(vector.type.element, [vector.type])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{operation}.{suffix}")
    return builder.call(reduce, [vector], fastmath=("nnan",))
