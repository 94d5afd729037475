"""Triton: gradient norm and AdamW, all parameters in one launch (see items.py).

Bytes a bf16 parameter: gradient norm 2, AdamW as in adamw.py. All arithmetic is that of the PyTorch
path in adamw.py and formats.py, which defines the results bit for bit: integer rounding, correctly
rounded division and root, no fused multiply-add. Imported only when a Triton backend runs.
"""

import triton
import triton.language as tl

from ..launch import Configuration, Sweep
from ..rounding import random_bits, round_stochastic
from . import formats
from .items import (
    BITS,
    BLOCK_SIZE,
    OPTIONS,
    PRODUCTION,
    find_item,
    item_pointer,
    load_scalar,
    load_words,
)

QUANTUM = tl.constexpr(formats.BLOCK)  # elements that share an exponent
M_UP = tl.constexpr(2.0 ** (formats.M_TOP - 127))
M_DOWN = tl.constexpr(2.0 ** (127 - formats.M_TOP))
V_UP = tl.constexpr(2.0 ** (formats.V_TOP - 127))
V_DOWN = tl.constexpr(2.0 ** (127 - formats.V_TOP))
# The kernel's name of each entry of the state.
STATE = {
    "m": "exp_avg",
    "v": "exp_avg_sq",
    "m_exponent": "exp_avg_exponent",
    "v_exponent": "exp_avg_sq_exponent",
    "remainder": "remainder",
}
STREAMED_STATE = ("exp_avg", "exp_avg_sq", "remainder")
# Numbers of 64 bits that adamw_kernel's `scalars` has room for: the Coefficients in fp64, the seed,
# and the number of the step. 16 divides their bytes, so each launch's stand at an aligned address.
SCALARS = 16


@triton.jit
def squares_kernel(
    squares_ptr,
    first_program_table,
    numel_table,
    grad_table,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Σ g² of the program's elements."""
    tensor, start, stop, numel = find_item(first_program_table, numel_table, VECTOR, TENSORS, CHUNK)
    grad_ptr = item_pointer(grad_table, tensor, GRAD, VECTOR)
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    for begin in range(start, stop, BLOCK_SIZE):
        at = begin + tl.arange(0, BLOCK_SIZE)
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


@triton.jit
def adamw_kernel(
    factor_ptr,
    scalars,
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
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    QUANTIZED: tl.constexpr,
    REMAINDER: tl.constexpr,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """adamw.update_adamw; tiles are [BLOCK_SIZE / 256, 256], a row for each shared exponent."""
    ROWS: tl.constexpr = BLOCK_SIZE // QUANTUM
    MOMENT: tl.constexpr = tl.uint8 if QUANTIZED else tl.float32
    tensor, start, stop, numel = find_item(first_program_table, numel_table, VECTOR, TENSORS, CHUNK)
    weight_ptr = item_pointer(weight_table, tensor, WEIGHT, VECTOR)
    grad_ptr = item_pointer(grad_table, tensor, GRAD, VECTOR)
    m_ptr = item_pointer(m_table, tensor, MOMENT, VECTOR)
    v_ptr = item_pointer(v_table, tensor, MOMENT, VECTOR)
    m_exponent_ptr = item_pointer(m_exponent_table, tensor, tl.uint8, False)
    v_exponent_ptr = item_pointer(v_exponent_table, tensor, tl.uint8, False)
    remainder_ptr = item_pointer(remainder_table, tensor, tl.int16, VECTOR)
    offset = tl.load(offset_table + tensor)
    mean_rate = load_scalar(scalars)
    square_decay = load_scalar(scalars + 1)
    square_rate = load_scalar(scalars + 2)
    root_scale = load_scalar(scalars + 3)
    eps = load_scalar(scalars + 4)
    decay = load_scalar(scalars + 5)
    step_size = load_scalar(scalars + 6)
    seed_low, seed_high = load_words(scalars + 7)
    step_low, step_high = load_words(scalars + 8)
    factor = tl.load(factor_ptr)
    stop = tl.where(factor == factor, stop, start)  # NaN: no update

    for begin in range(start, stop, BLOCK_SIZE):
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
            bits = random_bits(
                first_group, seed_low, seed_high, step_low, step_high, BLOCK_SIZE // 8
            )
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
            tl.store(weight_ptr + at, round_stochastic(master, bits, WEIGHT), mask=mask)
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


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks. Streamed tensors lie behind tables, so their bits an
    element are given."""
    where = dict.fromkeys(["first_program_table", "numel_table"], "*i64")
    found = [
        Configuration(
            f"gradient_squares_{grad}",
            squares_kernel,
            {"squares_ptr": "*fp64", **where, "grad_table": "*i64"},
            {"GRAD": grad, **PRODUCTION},
            OPTIONS,
            {"grad_table": BITS[grad]},
            {"squares_kernel": Sweep(BITS[grad] / 8)},
        )
        for grad in BITS
    ]
    signature = {
        "factor_ptr": "*fp32",
        "scalars": "*i64",
        **where,
        **{f"{name}_table": "*i64" for name in ("offset", "weight", "grad", *STATE)},
    }
    for state, weight in (
        ("8bit", tl.bfloat16),
        ("8bit", tl.float32),
        ("fp32", tl.bfloat16),
        ("fp32", tl.float32),
        ("exact", tl.bfloat16),
    ):
        moment = 8 if state == "8bit" else 32
        streamed = {"weight": BITS[weight], "grad": BITS[weight], "m": moment, "v": moment}
        if state == "exact":
            streamed["remainder"] = 16
        # All but the gradient are written, too.
        sweep = Sweep((2 * sum(streamed.values()) - BITS[weight]) / 8)
        if state == "8bit":
            # Each moment's exponent is read and written once a block, but by many threads.
            moved = sweep.bytes + 2 * 2 / formats.BLOCK
            sweep = Sweep(moved, elements=BLOCK_SIZE // (32 * OPTIONS["num_warps"]))
        kinds = {"QUANTIZED": state == "8bit", "REMAINDER": state == "exact"}
        found.append(
            Configuration(
                f"adamw_{state}_{weight}",
                adamw_kernel,
                signature,
                {"WEIGHT": weight, "GRAD": weight, **kinds, **PRODUCTION},
                OPTIONS,
                {f"{name}_table": value for name, value in streamed.items()},
                {"adamw_kernel": sweep},
            )
        )
    return found
