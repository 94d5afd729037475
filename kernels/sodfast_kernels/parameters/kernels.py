"""Triton: teacher copy, average and distance, gradient norm, AdamW; all parameters in one launch.

Tensors of one kind (dtypes, hyperparameters) share a launch. A table holds their pointers, one
column a tensor, and each program works on CHUNK elements of the tensor it finds there. Accesses are
16 bytes wide (8-bit moments: 8) for tensors whose address and size allow it; others are launched
apart.

Bytes a bf16 parameter: distance 4, copy and average 6, gradient norm 2, AdamW see adamw.py.
Norms: one fp64 partial sum a program, summed afterwards, no atomics. All arithmetic is that of the
PyTorch path in philox.py, formats.py, parameters.py and adamw.py, which defines the results bit for
bit: integer rounding, correctly rounded division and root, no fused multiply-add.

Imported only when a Triton backend runs.
"""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import WORD
from . import adamw, formats

DISTANCE, COPY, AVERAGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK = 1024  # elements handled at a time by a program: 8 a thread
CHUNK = 32 * BLOCK  # elements of a program
QUANTUM = tl.constexpr(formats.BLOCK)
M_UP = tl.constexpr(2.0 ** (formats.M_TOP - 127))
M_DOWN = tl.constexpr(2.0 ** (127 - formats.M_TOP))
V_UP = tl.constexpr(2.0 ** (formats.V_TOP - 127))
V_DOWN = tl.constexpr(2.0 ** (127 - formats.V_TOP))
NO_PROGRAM = 1 << 62  # pads the table
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
INTERPRETED = triton.knobs.runtime.interpret


class Configuration(NamedTuple):
    """One compiled variant of a kernel, for bench/compile_report.py."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    streamed: dict[str, int]  # table of pointers → bits of an element behind it


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _find_work(first_program_table, numel_table, CHUNK: tl.constexpr, TENSORS: tl.constexpr):
    """The tensor that this program works on, and the range of its elements there."""
    program = tl.program_id(0)
    first_programs = tl.load(first_program_table + tl.arange(0, TENSORS))
    tensor = tl.sum((first_programs <= program).to(tl.int32)) - 1
    start = (program - tl.load(first_program_table + tensor)) * CHUNK
    numel = tl.load(numel_table + tensor)
    return tensor, start, tl.minimum(start + CHUNK, numel), numel


@triton.jit
def _pointer(table, tensor, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(table + tensor).to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _random_bits(first_group, seed_low, seed_high, step_low, step_high, GROUPS: tl.constexpr):
    """16 random bits for each of 8·GROUPS elements, as int32 (philox.random_bits)."""
    group = first_group + tl.arange(0, GROUPS)
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = tl.zeros([GROUPS], tl.uint32) + step_low.to(tl.uint32, bitcast=True)
    c3 = tl.zeros([GROUPS], tl.uint32) + step_high.to(tl.uint32, bitcast=True)
    key0 = seed_low.to(tl.uint32, bitcast=True)
    key1 = seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False).to(tl.uint32)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False).to(tl.uint32)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # the last two axes count words 0 … 3
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [GROUPS * 8]).to(tl.int32)


@triton.jit
def _round_nearest(value, DTYPE: tl.constexpr):
    """To nearest even; bf16 in integers because the interpreter would truncate."""
    if tl.bfloat16 == DTYPE:
        raw = value.to(tl.int32, bitcast=True)
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def _round_stochastic(value, bits, DTYPE: tl.constexpr):
    """philox.round_stochastic."""
    raw = value.to(tl.int32, bitcast=True)
    if tl.bfloat16 == DTYPE:
        rounded = tl.where(value != value, 0x7FC0, (raw + bits) >> 16)
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        spacing = tl.maximum(raw & 0x7F800000, 113 << 23) - (10 << 23)
        scaled = tl.abs(value) * ((254 << 23) - spacing).to(tl.float32, bitcast=True)
        whole = tl.floor(scaled)
        up = ((scaled - whole) * 65536.0 > bits.to(tl.float32)).to(tl.float32)
        magnitude = (whole + up) * spacing.to(tl.float32, bitcast=True)
        signed = tl.where(raw < 0, -magnitude, magnitude)
        result = tl.where((raw & 0x7FFFFFFF) < 0x7F800000, signed, value).to(DTYPE)
    return result


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step_low", "step_high"])
def update_kernel(
    squares_ptr,
    first_program_table,
    numel_table,
    offset_table,
    teacher_table,
    student_table,
    rate,
    seed_low,
    seed_high,
    step_low,
    step_high,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    MODE: tl.constexpr,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """φ ← θ or φ + rate·(θ − φ) or nothing, and Σ (θ − φ_before)² of the program's elements."""
    tensor, start, stop, numel = _find_work(first_program_table, numel_table, CHUNK, TENSORS)
    if VECTOR:
        numel = numel // 16 * 16  # which the compiler then knows
    teacher_ptr = _pointer(teacher_table, tensor, TEACHER, VECTOR)
    student_ptr = _pointer(student_table, tensor, STUDENT, VECTOR)
    offset = tl.load(offset_table + tensor)
    squares = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, stop, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < numel
        student = tl.load(student_ptr + at, mask=mask, other=0.0)
        before = tl.load(teacher_ptr + at, mask=mask, other=0.0).to(tl.float32)
        difference = student.to(tl.float32) - before
        wide = difference.to(tl.float64)
        squares = tl.fma(wide, wide, squares)  # the product of two fp32 is exact in fp64
        if MODE == COPY:
            if TEACHER == STUDENT:
                tl.store(teacher_ptr + at, student, mask=mask)
            else:
                rounded = _round_nearest(student.to(tl.float32), TEACHER)
                tl.store(teacher_ptr + at, rounded, mask=mask)
        if MODE == AVERAGE:
            after = before + difference * rate
            if tl.float32 == TEACHER:
                tl.store(teacher_ptr + at, after, mask=mask)
            else:
                first_group = (offset + begin) // 8
                bits = _random_bits(
                    first_group, seed_low, seed_high, step_low, step_high, BLOCK // 8
                )
                tl.store(teacher_ptr + at, _round_stochastic(after, bits, TEACHER), mask=mask)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares))


@triton.jit
def squares_kernel(
    squares_ptr,
    first_program_table,
    numel_table,
    grad_table,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Σ g² of the program's elements."""
    tensor, start, stop, numel = _find_work(first_program_table, numel_table, CHUNK, TENSORS)
    if VECTOR:
        numel = numel // 16 * 16  # which the compiler then knows
    grad_ptr = _pointer(grad_table, tensor, GRAD, VECTOR)
    squares = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, stop, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        wide = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float64)
        squares = tl.fma(wide, wide, squares)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares))


@triton.jit
def _decode(codes, exponent, SIGNED: tl.constexpr):
    """formats.decode of codes [R, 256] and exponents [R]."""
    raw = codes.to(tl.int32)
    if SIGNED:
        raw = ((raw & 127) << 20) | ((raw & 128) << 24)
        unit = raw.to(tl.float32, bitcast=True) * M_DOWN
    else:
        unit = (raw << 20).to(tl.float32, bitcast=True) * V_DOWN
    scale = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return unit * scale[:, None]


@triton.jit
def _encode(value, bits, SIGNED: tl.constexpr):
    """formats.encode of values [R, 256]: codes [R, 256], exponents [R]."""
    raw = value.to(tl.int32, bitcast=True)
    peak = tl.max(raw & 0x7FFFFFFF, axis=1)
    exponent = (tl.minimum(peak, 0x7F800000) + 0xFFFFF) >> 23
    exponent = tl.where(exponent >= 254, 255, exponent)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.abs(value) * scale[:, None]
    scaled = scaled * (M_UP if SIGNED else V_UP)
    codes = (scaled.to(tl.int32, bitcast=True) + ((bits << 4) + 8)) >> 20
    if SIGNED:
        codes = codes | tl.where(value < 0.0, 128, 0)
    else:
        codes = tl.where(value > 0.0, tl.maximum(codes, 1), codes)
    return codes.to(tl.uint8), exponent.to(tl.uint8)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step_low", "step_high"])
def adamw_kernel(
    factor_ptr,
    first_program_table,
    numel_table,
    offset_table,
    weight_table,
    grad_table,
    m_table,
    v_table,
    m_exponent_table,
    v_exponent_table,
    remainder_table,
    mean_rate,
    square_decay,
    square_rate,
    root_scale,
    eps,
    decay,
    step_size,
    seed_low,
    seed_high,
    step_low,
    step_high,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    QUANTIZED: tl.constexpr,
    REMAINDER: tl.constexpr,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """adamw.update_adamw; tiles are [BLOCK / 256, 256], a row for each shared exponent."""
    ROWS: tl.constexpr = BLOCK // QUANTUM
    MOMENT: tl.constexpr = tl.uint8 if QUANTIZED else tl.float32
    tensor, start, stop, numel = _find_work(first_program_table, numel_table, CHUNK, TENSORS)
    if VECTOR:
        numel = numel // 16 * 16  # which the compiler then knows
    weight_ptr = _pointer(weight_table, tensor, WEIGHT, VECTOR)
    grad_ptr = _pointer(grad_table, tensor, GRAD, VECTOR)
    m_ptr = _pointer(m_table, tensor, MOMENT, VECTOR)
    v_ptr = _pointer(v_table, tensor, MOMENT, VECTOR)
    m_exponent_ptr = _pointer(m_exponent_table, tensor, tl.uint8, False)
    v_exponent_ptr = _pointer(v_exponent_table, tensor, tl.uint8, False)
    remainder_ptr = _pointer(remainder_table, tensor, tl.int16, VECTOR)
    offset = tl.load(offset_table + tensor)
    factor = tl.load(factor_ptr)
    stop = tl.where(factor == factor, stop, start)  # NaN: no update

    for begin in range(start, stop, BLOCK):
        at = begin + tl.arange(0, ROWS)[:, None] * QUANTUM + tl.arange(0, QUANTUM)[None, :]
        mask = at < numel
        row = begin // QUANTUM + tl.arange(0, ROWS)
        row_mask = row * QUANTUM < numel

        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        m = tl.load(m_ptr + at, mask=mask, other=0)
        v = tl.load(v_ptr + at, mask=mask, other=0)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
        if QUANTIZED:
            m = _decode(m, tl.load(m_exponent_ptr + row, mask=row_mask, other=0), True)
            v = _decode(v, tl.load(v_exponent_ptr + row, mask=row_mask, other=0), False)
        if REMAINDER:
            high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
            low = tl.load(remainder_ptr + at, mask=mask, other=0).to(tl.int32)
            master = (high + low).to(tl.float32, bitcast=True)
        else:
            master = weight.to(tl.float32)

        m = m + (g - m) * mean_rate
        v = v * square_decay + (g * g) * square_rate
        update = tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)
        master = master * decay - update * step_size

        if QUANTIZED or (tl.float32 != WEIGHT and not REMAINDER):
            first_group = (offset + begin) // 8
            bits = _random_bits(first_group, seed_low, seed_high, step_low, step_high, BLOCK // 8)
            bits = tl.reshape(bits, [ROWS, QUANTUM])
        if REMAINDER:
            raw = master.to(tl.int32, bitcast=True)
            raw = tl.where(master != master, 0x7FC00000, raw)
            high = (raw + 0x8000) >> 16
            low = raw - (high << 16)
            rounded = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
            tl.store(remainder_ptr + at, low.to(tl.int16), mask=mask)
            tl.store(weight_ptr + at, rounded, mask=mask)
        elif tl.float32 == WEIGHT:
            tl.store(weight_ptr + at, master, mask=mask)
        else:
            tl.store(weight_ptr + at, _round_stochastic(master, bits, WEIGHT), mask=mask)
        if QUANTIZED:
            m_codes, m_exponent = _encode(m, bits, True)
            v_codes, v_exponent = _encode(v, bits, False)
            tl.store(m_ptr + at, m_codes, mask=mask)
            tl.store(v_ptr + at, v_codes, mask=mask)
            tl.store(m_exponent_ptr + row, m_exponent, mask=row_mask)
            tl.store(v_exponent_ptr + row, v_exponent, mask=row_mask)
        else:
            tl.store(m_ptr + at, m, mask=mask)
            tl.store(v_ptr + at, v, mask=mask)


def update(work: Sequence[tuple[Tensor, Tensor, int]], rate: float, seed: int, step: int) -> Tensor:
    """Update (teacher_P, student_P, offset of the first element); returns Σ (θ − φ)² in fp64."""
    sums = []
    for group in _alike(work, lambda item: (item[0].dtype, item[1].dtype, _vector(*item[:2]))):
        teachers, students, offsets = zip(*group, strict=True)
        table = Table(teachers)
        squares = table.partial_sums()
        with table.device:
            update_kernel[(table.programs,)](
                squares,
                *table.rows(offsets, _addresses(teachers), _addresses(students)),
                rate,
                *_words(seed),
                *_words(step),
                TEACHER=DTYPES[teachers[0].dtype],
                STUDENT=DTYPES[students[0].dtype],
                MODE={0.0: DISTANCE, 1.0: COPY}.get(rate, AVERAGE),
                VECTOR=_vector(*group[0][:2]),
                TENSORS=table.columns,
                **LAUNCH,
            )
        if rate:
            torch.autograd.graph.increment_version(teachers)
        sums.append(squares.sum())
    return torch.stack(sums).sum()


def gradient_squares(grads: Sequence[Tensor]) -> Tensor:
    """Σ g² over flat gradients, in fp64."""
    sums = []
    for group in _alike(grads, lambda grad_P: (grad_P.dtype, _vector(grad_P))):
        table = Table(group)
        squares = table.partial_sums()
        with table.device:
            squares_kernel[(table.programs,)](
                squares,
                *table.rows(_addresses(group)),
                GRAD=DTYPES[group[0].dtype],
                VECTOR=_vector(group[0]),
                TENSORS=table.columns,
                **LAUNCH,
            )
        sums.append(squares.sum())
    return torch.stack(sums).sum()


def update_adamw(items: Sequence[adamw.Item], factor: Tensor) -> None:
    """adamw.update_adamw, one launch for the items that agree in all but their tensors."""

    def kind(item: adamw.Item) -> tuple[Any, ...]:
        state = [value for name, value in item.state.items() if name in STREAMED_STATE]
        tensors = [item.weight_P, item.grad_P, *state]
        dtypes = tuple(tensor.dtype for tensor in tensors)
        return item.coefficients, item.step, item.seed, dtypes, _vector(*tensors)

    for group in _alike(items, kind):
        first = group[0]
        weights = [item.weight_P for item in group]
        table = Table(weights)
        states = [
            [item.state[name].data_ptr() if name in item.state else 0 for item in group]
            for name in STATE
        ]
        with table.device:
            adamw_kernel[(table.programs,)](
                factor,
                *table.rows(
                    [item.offset for item in group],
                    _addresses(weights),
                    _addresses([item.grad_P for item in group]),
                    *states,
                ),
                *first.coefficients,
                *_words(first.seed),
                *_words(first.step),
                WEIGHT=DTYPES[first.weight_P.dtype],
                GRAD=DTYPES[first.grad_P.dtype],
                QUANTIZED=first.kind == "8bit",
                REMAINDER="remainder" in first.state,
                VECTOR=kind(first)[-1],
                TENSORS=table.columns,
                **LAUNCH,
            )
        torch.autograd.graph.increment_version(weights)


STATE = ("exp_avg", "exp_avg_sq", "exp_avg_exponent", "exp_avg_sq_exponent", "remainder")
STREAMED_STATE = ("exp_avg", "exp_avg_sq", "remainder")
LAUNCH: dict[str, Any] = {"BLOCK": BLOCK, "CHUNK": CHUNK} | OPTIONS


class Table:
    """Which program works on which tensor, and rows of integers for the kernel to look up."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        numels = [tensor.numel() for tensor in tensors]
        counts = [-(-numel // CHUNK) for numel in numels]
        self.programs = sum(counts)
        self.columns = max(2, triton.next_power_of_2(len(numels)))
        self.target = tensors[0].device
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        self.common = [firsts + [NO_PROGRAM] * (self.columns - len(firsts)), numels]

    def rows(self, *values: Sequence[int]) -> tuple[Tensor, ...]:
        """First programs, numbers of elements and `values` as int64 [columns] on the device."""
        padded = [[*row, *[0] * (self.columns - len(row))] for row in (*self.common, *values)]
        table = torch.tensor(padded, dtype=torch.int64)
        if self.target.type == "cuda":
            # From pinned memory, so that the host need not wait.
            table = table.pin_memory().to(self.target, non_blocking=True)
        return table.unbind()

    def partial_sums(self) -> Tensor:
        return torch.empty(self.programs, dtype=torch.float64, device=self.target)

    @property
    def device(self) -> contextlib.AbstractContextManager[object]:
        if self.target.type == "cuda":
            return torch.cuda.device(self.target)
        return contextlib.nullcontext()


Item = TypeVar("Item")


def _alike(items: Sequence[Item], kind: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups of the same kind."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return list(groups.values())


def _vector(*tensors: Tensor) -> bool:
    """Whether 16-byte accesses fit: address and size are multiples of 16."""
    return all(t.data_ptr() % 16 == 0 and t.numel() % 16 == 0 for t in tensors)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _words(number: int) -> tuple[int, int]:
    """Low and high 32 bits, as signed integers so that their type never depends on the value."""
    low, high = number & WORD, (number >> 32) & WORD
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks: bf16 and fp32 models of up to 512 tensors, all sizes
    multiples of 16. Streamed tensors lie behind tables, so their bits an element are given."""
    table = "*i64"
    scalars = dict.fromkeys(["seed_low", "seed_high", "step_low", "step_high"], "i32")
    where = dict.fromkeys(["first_program_table", "numel_table"], table)
    shape = {"VECTOR": True, "TENSORS": 512, "BLOCK": BLOCK, "CHUNK": CHUNK}
    bits = {tl.float32: 32, tl.bfloat16: 16}
    found: list[Configuration] = []

    update_signature = {
        "squares_ptr": "*fp64",
        **where,
        **dict.fromkeys(["offset_table", "teacher_table", "student_table"], table),
        "rate": "fp32",
        **scalars,
    }
    for name, mode in (("distance", DISTANCE), ("copy", COPY), ("average", AVERAGE)):
        for teacher, student in (
            (tl.bfloat16, tl.bfloat16),
            (tl.float32, tl.bfloat16),
            (tl.bfloat16, tl.float32),
            (tl.float32, tl.float32),
        ):
            found.append(
                Configuration(
                    f"{name}_{teacher}_from_{student}",
                    update_kernel,
                    update_signature,
                    {"TEACHER": teacher, "STUDENT": student, "MODE": mode, **shape},
                    OPTIONS,
                    {"teacher_table": bits[teacher], "student_table": bits[student]},
                )
            )
    for grad in (tl.bfloat16, tl.float32):
        found.append(
            Configuration(
                f"gradient_squares_{grad}",
                squares_kernel,
                {"squares_ptr": "*fp64", **where, "grad_table": table},
                {"GRAD": grad, **shape},
                OPTIONS,
                {"grad_table": bits[grad]},
            )
        )

    tables = ["offset", "weight", "grad", "m", "v", "m_exponent", "v_exponent", "remainder"]
    floats = list(adamw.Coefficients._fields)
    adamw_signature = {
        "factor_ptr": "*fp32",
        **where,
        **{f"{name}_table": table for name in tables},
        **dict.fromkeys(floats, "fp32"),
        **scalars,
    }
    for name, weight, quantized, remainder in (
        ("8bit", tl.bfloat16, True, False),
        ("8bit", tl.float32, True, False),
        ("fp32", tl.bfloat16, False, False),
        ("fp32", tl.float32, False, False),
        ("exact", tl.bfloat16, False, True),
    ):
        moment = 8 if quantized else 32
        streamed = {"weight": bits[weight], "grad": bits[weight], "m": moment, "v": moment}
        if remainder:
            streamed["remainder"] = 16
        found.append(
            Configuration(
                f"adamw_{name}_{weight}",
                adamw_kernel,
                adamw_signature,
                {
                    "WEIGHT": weight,
                    "GRAD": weight,
                    "QUANTIZED": quantized,
                    "REMAINDER": remainder,
                    **shape,
                },
                OPTIONS,
                {f"{name}_table": value for name, value in streamed.items()},
            )
        )
    return found
