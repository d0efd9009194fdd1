"""Parser of HLO text: computations, instructions, and trip counts of loops.

The text of a compiled program (`jax.stages.Compiled.as_text()`) is available from the CPU, TPU and
GPU compilers alike, and a test can store it.
"""

import bisect
import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# "  ROOT %name = type opcode(operands), attributes"; a tuple's type ends at the first ") opcode(".
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
# Computations for a SparseCore name their thread.
_END = re.compile(r'\}(, execution_thread="\w+")?')
_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_TILES = re.compile(r"T((?:\([\d,]+\))+)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_SCALAR = re.compile(r"[a-z]\w*\[\]")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|branch_computations|true_computation|false_computation"
    r"|called_computations)=(?:%([\w.-]+)|\{([^}]*)\})"
)
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_NUMBER_TYPE = re.compile(r"(s|u|f|bf|c)(\d+)(\w*)")  # f8e4m3fn
_NUMBER_KINDS = {"s": "int", "u": "uint", "f": "float", "bf": "bfloat", "c": "complex"}
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DIGITS = re.compile(r"\d+")

# Scalar operations used to evaluate trip counts. Extrapolation assumes linear loop variables, so
# `minimum` and similar operations are not included.
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_UNCHANGED = (
    "bitcast",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "optimization-barrier",
    "reshape",
)
_MAX_TRIP_COUNT = 2**40

FUSIONS = frozenset({"fusion", "fusion-start"})

# A scalar, a tuple of values, or None if not known at compile time.
Value = int | tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Element type, by XLA's name (bf16, s32, pred), shape, and layout ("1,0:T(8,128)S(1)")."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def numpy_name(self) -> str:
        """The element type by its NumPy name."""
        if match := _NUMBER_TYPE.fullmatch(self.dtype):
            kind, size, variant = match.groups()
            return _NUMBER_KINDS[kind] + size + (f"_{variant}" if variant else "")
        return "bool" if self.dtype == "pred" else self.dtype

    @property
    def bits(self) -> int:
        """Bits of one element; 0 for tokens."""
        if self.dtype == "token":
            return 0
        digits = _DIGITS.search(self.dtype)
        return int(digits.group()) if digits else 8  # pred

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return -(-functools.reduce(operator.mul, self.shape, self.bits) // 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory, where TPUs pad arrays to whole tiles."""
        order, _, properties = self.layout.partition(":")
        tiles = _TILES.search(properties)
        if not tiles:
            return self.num_bytes
        sizes = [self.shape[int(axis)] for axis in reversed(_DIGITS.findall(order))]
        for tile in re.findall(r"[\d,]+", tiles[1]):
            # A tile divides the minor axes into a grid of tiles; the next one divides these.
            lengths = list(map(int, tile.split(",")))
            sizes = [1] * (len(lengths) - len(sizes)) + sizes
            minor = sizes[-len(lengths) :]
            grid = [-(-size // length) for size, length in zip(minor, lengths, strict=True)]
            sizes = sizes[: -len(lengths)] + grid + lengths
        return -(-functools.reduce(operator.mul, sizes, self.bits) // 8)

    @property
    def memory_space(self) -> int:
        """The memory that holds it; 0: main memory."""
        space = _MEMORY_SPACE.search(self.layout)
        return int(space[1]) if space else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is the text after the opening parenthesis of operands."""

    name: str
    type: str
    opcode: str
    rest: str
    is_root: bool

    @functools.cached_property
    def _split(self) -> tuple[str, str]:
        depth = 1
        for match in re.finditer(r"[()]", self.rest):
            depth += 1 if match.group() == "(" else -1
            if not depth:
                return self.rest[: match.start()], self.rest[match.end() :]
        raise ValueError(f"the operands of %{self.name} do not end on its line")

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(_NAME.findall(self._split[0]))

    @property
    def literal(self) -> str:
        """The text in the parentheses of a constant or parameter."""
        return self._split[0]

    @property
    def attributes(self) -> str:
        """The text after the operands."""
        return self._split[1]

    @functools.cached_property
    def op_name(self) -> str:
        """The JAX operation that it comes from, with the functions and scopes around it; or ""."""
        match = _OP_NAME.search(self.attributes)
        return match.group(1) if match else ""

    @functools.cached_property
    def called(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the computations that it calls, by attribute."""
        return {
            match.group(1): tuple(_NAME.findall(match.group(0)))
            for match in _CALLED.finditer(self.attributes)
        }

    def attribute(self, name: str, pattern: str) -> str:
        """Returns the match of the pattern after `name=`; "" if there is none."""
        match = re.search(rf"\b{name}=({pattern})", self.attributes)
        return match.group(1) if match else ""


class Computation:
    """Instructions by name, in printed order."""

    def __init__(self, name: str, instructions: Sequence[Instruction]):
        self.name = name
        self.instructions = {instruction.name: instruction for instruction in instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction marked as root; the last one if none is marked."""
        marked = [i for i in self.instructions.values() if i.is_root]
        return marked[0] if marked else list(self.instructions.values())[-1]

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """The users of each instruction, by its name."""
        users: dict[str, tuple[Instruction, ...]] = {}
        for instruction in self.instructions.values():
            for name in instruction.operands:
                users[name] = (*users.get(name, ()), instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the number of devices that the program is partitioned over."""

    entry: Computation
    computations: Mapping[str, Computation]
    num_devices: int

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Names of the computations called by fusions."""
        return frozenset(
            called.name
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode in FUSIONS
            for called in self.called(instruction)
        )

    def operand_types(self, computation: Computation, names: Sequence[str]) -> list[ArrayType]:
        """Returns the array types of the instructions with these names."""
        types = [computation.instructions[name].type for name in names]
        return [array for text in types for array in array_types(text)]

    def trip_count(self, loop: Instruction, state: Value) -> int | None:
        """Returns the trip count of a `while` loop with the given initial state.

        If the compiler has not recorded it, extrapolates the loop state: scalars that change by the
        same amount in the first two iterations are assumed to continue, and the trip count is the
        first iteration for which the condition is false.

        Returns:
          None if it depends on data.
        """
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known.group(1))
        first = self.after_iteration(loop, state)
        second = self.after_iteration(loop, first)
        (condition,) = self.called(loop, "condition")

        def continues(iteration: int) -> Value:
            extrapolated = _extrapolated(state, first, second, iteration)
            return Evaluation(self, condition, [extrapolated]).value(condition.root)

        return _first_false(continues)

    def after_iteration(self, loop: Instruction, state: Value) -> Value:
        """Returns the state after one iteration of a `while` loop."""
        (body,) = self.called(loop, "body")
        return Evaluation(self, body, [state]).value(body.root)

    def loop_invariant(self, loop: Instruction, state: Value) -> Value:
        """Returns the state with only the values that a `while` loop does not change."""
        return _equal_values(state, self.after_iteration(loop, state))

    def called(self, instruction: Instruction, *attributes: str) -> list[Computation]:
        """Returns the computations that an instruction names in these attributes, or in any."""
        names = [instruction.called.get(a, ()) for a in attributes or instruction.called]
        return [self.computations[name] for group in names for name in group]


class Evaluation:
    """Constant-folds the scalars of a computation, given the known arguments."""

    def __init__(self, program: Program, computation: Computation, arguments: Sequence[Value]):
        self._program = program
        self._computation = computation
        self._arguments = arguments
        self._known: dict[str, Value] = {}

    def value(self, instruction: Instruction) -> Value:
        """Returns the value of an instruction."""
        if instruction.name not in self._known:
            self._known[instruction.name] = self._value(instruction)
        return self._known[instruction.name]

    def operands(self, instruction: Instruction) -> list[Value]:
        """Returns the values of an instruction's operands."""
        return [self.value(self._computation.instructions[name]) for name in instruction.operands]

    def _value(self, instruction: Instruction) -> Value:
        if not instruction.type.startswith("(") and not _SCALAR.match(instruction.type):
            return None
        value: Value = None
        match instruction.opcode:
            case "constant":
                value = _scalar(instruction.literal)
            case "parameter":
                number = int(instruction.literal)
                value = self._arguments[number] if number < len(self._arguments) else None
            case "tuple":
                value = tuple(self.operands(instruction))
            case "get-tuple-element":
                (operand,) = self.operands(instruction)
                index = int(instruction.attribute("index", r"\d+"))
                value = operand[index] if isinstance(operand, tuple) else None
            case opcode if opcode in _UNCHANGED:
                value = self.operands(instruction)[0]
            case "compare":
                compare = _COMPARISONS[instruction.attribute("direction", "[A-Z]+")]
                value = _apply(compare, self.operands(instruction))
            case opcode if opcode in _ARITHMETIC:
                value = _apply(_ARITHMETIC[opcode], self.operands(instruction))
            case "fusion" | "call":
                (called,) = self._program.called(instruction, "calls", "to_apply")
                operands = self.operands(instruction)
                value = Evaluation(self._program, called, operands).value(called.root)
            case "while":
                value = self._program.loop_invariant(instruction, self.operands(instruction)[0])
        return value


def parse(text: str) -> Program:
    """Parses the text of a compiled program.

    Raises:
      ValueError: the text is not a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry = None
    name, lines = "", list[Instruction]()
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            is_entry, name = match.groups()
            lines = []
            entry = name if is_entry else entry
        elif _END.fullmatch(line):
            computations[name] = Computation(name, lines)
            lines = []
        elif match := _INSTRUCTION.match(line):
            is_root, instruction, type_, opcode, rest = match.groups()
            lines.append(Instruction(instruction, type_, opcode, rest, bool(is_root)))
        elif lines:  # attributes given by kernels may have line breaks
            lines[-1] = dataclasses.replace(lines[-1], rest=f"{lines[-1].rest}\n{line}")
    if not text.startswith("HloModule ") or entry not in computations:
        raise ValueError("the text is not that of a compiled program (Compiled.as_text())")
    partitions = _PARTITIONS.search(text)
    return Program(computations[entry], computations, int(partitions.group(1)) if partitions else 1)


@functools.lru_cache(maxsize=2**16)  # the instructions of a program have few types
def array_types(text: str) -> tuple[ArrayType, ...]:
    """Returns the array types of a type, flattening tuples."""
    return tuple(
        ArrayType(dtype, tuple(map(int, _DIGITS.findall(shape))), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _scalar(literal: str) -> int | None:
    if literal in ("true", "false"):
        return int(literal == "true")
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None


def _apply(function: Callable[[int, int], int], operands: Sequence[Value]) -> int | None:
    first, second = operands
    if isinstance(first, int) and isinstance(second, int):
        return int(function(first, second))
    return None


def _equal_values(before: Value, after: Value) -> Value:
    """Returns the values that are equal before and after, and None for the others."""
    if isinstance(before, tuple) and isinstance(after, tuple):
        return tuple(_equal_values(b, a) for b, a in zip(before, after, strict=True))
    return before if before == after else None


def _extrapolated(state: Value, first: Value, second: Value, iteration: int) -> Value:
    """Extrapolates linearly from three states; None for values that are not linear."""
    if isinstance(state, tuple) and isinstance(first, tuple) and isinstance(second, tuple):
        parts = zip(state, first, second, strict=True)
        return tuple(_extrapolated(*part, iteration) for part in parts)
    if isinstance(state, int) and isinstance(first, int) and isinstance(second, int):
        return state + iteration * (first - state) if second - first == first - state else None
    return None


def _first_false(continues: Callable[[int], Value]) -> int | None:
    """Returns the first iteration that does not continue; None if unknown or too far away."""
    iteration = 0
    while answer := continues(iteration):
        iteration = 2 * iteration + 1
        if iteration > _MAX_TRIP_COUNT:
            return None
    if answer is None:
        return None
    return bisect.bisect_left(range(iteration), True, key=lambda earlier: not continues(earlier))
