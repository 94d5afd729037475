"""How long a kernel takes on a GPU that is not here: a model, from counts.

A streamed loop takes the longer of two times. Its bytes pass at the bandwidth of a copy. Its
instructions are issued at a share of four a cycle and multiprocessor: three quarters, or 0.45 where
at most 8 warps fit on one, too few to hide what they wait for. The loops of a kernel follow one
another. What it does once a row is not counted, nor are launches.
"""

from dataclasses import dataclass

REGISTERS = 65_536  # of a multiprocessor
MAX_WARPS, MAX_PROGRAMS = 64, 32
ISSUED, ISSUED_BY_FEW_WARPS, FEW_WARPS = 0.75, 0.45, 8


@dataclass(frozen=True)
class Gpu:
    """clock: Hz, that of the vendor's dense bf16 rate. copy: bytes/s, both directions counted, as
    measured on an H200 and at nine tenths of nominal elsewhere. shared: bytes a multiprocessor.
    products: bf16 flop/s of large products on random data, as measured on an H200 and in proportion
    elsewhere."""

    arch: int
    multiprocessors: int
    clock: float
    copy: float
    shared: int
    products: float


GPUS = {
    "A100": Gpu(80, 108, 1.41e9, 1.84e12, 164 << 10, 240e12),
    "H100": Gpu(90, 132, 1.83e9, 3.0e12, 228 << 10, 760e12),
    "H200": Gpu(90, 132, 1.83e9, 4.3e12, 228 << 10, 760e12),
}


def programs_at_once(registers: int, shared: int, warps: int, gpu: Gpu) -> int:
    """Programs of `warps` warps that fit on a multiprocessor. registers: of a thread, given out in
    units of 8; shared: bytes of a program, to which a kilobyte is added."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = gpu.shared // (shared + 1024)
    return min(by_registers, by_shared, MAX_WARPS // warps, MAX_PROGRAMS)


def seconds_an_element(loops: list[tuple[float, float]], warps_at_once: int, gpu: Gpu) -> float:
    """loops: instructions and bytes an element of each."""
    share = ISSUED_BY_FEW_WARPS if warps_at_once <= FEW_WARPS else ISSUED
    rate = 32 * 4 * share * gpu.multiprocessors * gpu.clock
    return sum(max(instructions / rate, moved / gpu.copy) for instructions, moved in loops)


def over_the_products(seconds: float, gpu: Gpu, rows: int, vocabulary: int, hidden: int) -> float:
    """Linear layer and divergence with all gradients: the time of four products and of a row kernel
    that takes `seconds` an element, over that of the products alone."""
    floor = 4 * 2 * rows * vocabulary * hidden / gpu.products
    return (floor + rows * vocabulary * seconds) / floor
