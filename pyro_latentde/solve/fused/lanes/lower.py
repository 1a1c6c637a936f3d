# SPDX-License-Identifier: Apache-2.0
"""Vectors in kernel source: one float for each of the rows that a kernel advances side by side."""

import ast
from collections.abc import Callable

from llvmlite import ir

__all__ = ["BOOL", "FLOAT", "INT", "LANE_CALLS", "LANE_FLAGS", "Lanes", "is_mask"]

FLOAT, INT, BOOL = ir.DoubleType(), ir.IntType(64), ir.IntType(1)

# a row must give the same bits in every lane and any company: products and sums may fuse, as they then do everywhere,
# but nothing is reordered
LANE_FLAGS = ("contract",)

_TO_EXPONENT = 6755399441055744.0 + 1023.0  # 1.5 * 2**52: the sum with a small whole number has it in its lowest bits


def is_mask(value: ir.Value) -> bool:
    """True or False, or one of them for each lane."""
    return value.type == BOOL or (isinstance(value.type, ir.VectorType) and value.type.element == BOOL)


class Lanes:
    """What expressions do with vectors."""

    def spread(self, value: ir.Value, type_: ir.VectorType) -> ir.Value:
        """The same number in every lane; of a mask 1.0 and 0.0."""
        if isinstance(value.type, ir.VectorType):
            return self.b.uitofp(value, type_)
        value = self.cast(value, type_.element)
        if isinstance(value, ir.Constant):
            return ir.Constant(type_, [value.constant] * type_.count)
        one = self.b.insert_element(ir.Constant(type_, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), type_.count), [0] * type_.count)
        return self.b.shuffle_vector(one, ir.Constant(type_, ir.Undefined), mask)

    def lanes_at(self, array: ir.Value, index: ir.Value) -> ir.Value:
        type_ = self.unit.types["Lanes"]
        place = self.b.gep(array, [self.b.mul(index, INT(type_.count), flags=("nsw",))], inbounds=True)
        return self.b.bitcast(place, ir.PointerType(type_))

    def read(self, place: ir.Value) -> ir.Value:
        return self.b.load(place, align=8)

    def write(self, value: ir.Value, place: ir.Value) -> None:
        self.b.store(self.cast(value, place.type.pointee), place, align=8)

    def choice(self, mask: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        if is_mask(a) and is_mask(b):
            a, b = (self.cast(x, mask.type) for x in (a, b))
        else:
            a, b = (self.cast(x, self.unit.types["Lanes"]) for x in (a, b))
        return self.b.select(mask, a, b)

    def all_of(self, op: ast.boolop, masks: list[ir.Value]) -> ir.Value:
        result = masks[0]
        for mask in masks[1:]:
            result = getattr(self.b, "and_" if isinstance(op, ast.And) else "or_")(result, self.cast(mask, result.type))
        return result

    def lane_by_lane(self, function: ir.Function, values: list[ir.Value]) -> ir.Value:
        result = ir.Constant(values[0].type, ir.Undefined)
        for lane in range(values[0].type.count):
            at = ir.Constant(ir.IntType(32), lane)
            one = self.b.call(function, [self.b.extract_element(v, at) for v in values], fastmath=self.unit.flags)
            result = self.b.insert_element(result, one, at)
        return result


def _same(values: Lanes, x: ir.Value) -> ir.Value:
    return values.cast(x, values.unit.types["Lanes"])


def _any(values: Lanes, mask: ir.Value) -> ir.Value:
    type_ = ir.FunctionType(BOOL, [mask.type])
    return values.b.call(values.unit.intrinsic("llvm.vector.reduce.or", mask.type, type_), [mask])


def _whole_bits(values: Lanes) -> ir.VectorType:
    return ir.VectorType(INT, values.unit.types["Lanes"].count)


def _power_of_two(values: Lanes, n: ir.Value) -> ir.Value:
    """2**n of whole numbers from -1022 to 1023, made of the bits of n."""
    b, bits = values.b, _whole_bits(values)
    moved = b.bitcast(b.fadd(n, values.spread(FLOAT(_TO_EXPONENT), n.type)), bits)
    return b.bitcast(b.shl(moved, ir.Constant(bits, [52] * bits.count)), n.type)


def _exponent(values: Lanes, x: ir.Value) -> ir.Value:
    """The whole e with 2**e <= x < 2**(e + 1), for normal positive x."""
    b, bits = values.b, _whole_bits(values)
    raw = b.lshr(b.bitcast(x, bits), ir.Constant(bits, [52] * bits.count))
    return b.sitofp(b.sub(raw, ir.Constant(bits, [1023] * bits.count)), x.type)


def _sums_of(values: Lanes, *vectors: ir.Value) -> ir.Value:
    """As many vectors as there are lanes; lane k of the result is the sum of vector k."""
    width, count, rest = 1, len(vectors), list(vectors)
    while len(rest) > 1:
        places = [[i for i in range(count) if (i // width) % 2 == half] for half in (0, 1)]
        rest = [_joined(values, rest[i], rest[i + 1], width, places) for i in range(0, len(rest), 2)]
        width *= 2
    return rest[0]


def _joined(values: Lanes, a: ir.Value, b: ir.Value, width: int, places: list[list[int]]) -> ir.Value:
    """Runs of ``width`` partial sums of a and b in turn, each added to its neighbour."""
    halves, count = [], a.type.count
    for chosen in places:
        runs = [chosen[i : i + width] for i in range(0, len(chosen), width)]
        order = [place for run in runs for place in (*run, *(count + i for i in run))]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), count), order)
        halves.append(values.b.shuffle_vector(a, b, mask))
    return values.b.fadd(*halves, flags=values.unit.flags)


LANE_CALLS: dict[str, Callable[..., ir.Value]] = {
    "Lanes": _same,
    "any": _any,
    "power_of_two": _power_of_two,
    "exponent": _exponent,
    "sums_of": _sums_of,
}
