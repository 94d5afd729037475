"""Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU, and check the result.

    python bench/compile_report.py [--only REGEX] [--arch 90] [--update | --spills]

Reports of each kernel in its production configuration: registers, spilled bytes, shared memory, the
narrowest access to a streamed tensor, programs and warps that fit on a multiprocessor, instructions
and bytes an element of each loop over its data, and from them a predicted time (predict.py). Exit
code 1 when a kernel spills, reads or writes a streamed tensor less than 16 bytes at a time (8 bytes
for 8-bit elements), waits in a loop for all of its asynchronous copies, misses a target, or takes
over 5 % more instructions an element than bench/results/compiled.json says; --update writes that
file and the table compiled.md. With --spills only a kernel that spills or does not compile counts:
for other versions of Triton than the one that the code is fast with.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the kernels must be compiled
# Triton's cache may hold the code of another checkout, whose lines are those of other files.
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import compiled_table
import predict
import sass
import triton
from sodfast_kernels.attention import kernel as attention_kernel
from sodfast_kernels.distillation import row_launch
from sodfast_kernels.launch import Configuration
from sodfast_kernels.layer import kernel as layer_kernel
from sodfast_kernels.parameters import adamw_kernels, teacher_kernels
from sodfast_kernels.sampling import kernel as sampling_kernel
from sodfast_kernels.speculation import kernel as speculation_kernel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
MODULES = (
    *(teacher_kernels, adamw_kernels, row_launch, sampling_kernel),
    *(attention_kernel, layer_kernel, speculation_kernel),
)


def compile_ptx(configuration: Configuration, arch: int) -> tuple[str, int]:
    """PTX and bytes of shared memory."""
    _, kernel, signature, constexprs, options, *_ = configuration
    names = kernel.arg_names
    # Pointers of our own buffers are aligned; ":16" marks an integer that 16 divides.
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        fn=kernel,
        signature={n: signature.get(n, "constexpr").removesuffix(":16") for n in names},
        constexprs=constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    return compiled.asm["ptx"], compiled.metadata.shared


def assemble(ptx: str, arch: int, fuse: bool) -> tuple[int, int, list[sass.Loop]]:
    """Registers a thread, spilled bytes and the loops, by the ptxas that Triton uses."""
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        path.write_text(ptx)
        command = [nvidia.get_ptxas(arch).path, "-v", "-lineinfo", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={nvidia.sm_arch_from_capability(arch)}"]
        command += [] if fuse else ["--fmad=false"]
        result = subprocess.run(
            [*command, str(path), "-o", str(cubin)], capture_output=True, text=True, check=True
        )
        disassembler = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
        return *read_ptxas(result.stdout + result.stderr), sass.memory_loops(disassembler, cubin)


def read_ptxas(log: str) -> tuple[int, int]:
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not spilled or not registers:
        raise RuntimeError(f"ptxas -v reported nothing to read:\n{log}")
    return int(registers[0]), sum(map(int, spilled))


def accesses(ptx: str, parameters: list[str]) -> list[tuple[frozenset[str], int]]:
    """Each access to global memory: where its address comes from, and its bytes a thread.

    An origin "name" stands for a kernel argument, "*name" for something read from memory at an
    address that came from it: a pointer out of a table, or an index to gather by.
    """
    origins: dict[str, frozenset[str]] = defaultdict(frozenset)
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    lines = [re.sub(r"^@!?%p\d+\s+", "", line) for line in lines if line]
    changed = True
    while changed:  # loops carry addresses around, so repeat until nothing is new
        changed = False
        found: list[tuple[frozenset[str], int]] = []
        # Registers that hold a number here: one that later counts starts as the 0 of another.
        numbers: set[str] = set()
        for line in lines:
            if line.startswith(("$L__BB", "bra")):
                numbers.clear()
            opcode, _, operands = line.partition(" ")
            target = re.match(r"\{.*?\}|[^,\[]*", operands.strip())[0]  # none for a store
            written = re.findall(r"%\w+", target)
            sources = [r for r in re.findall(r"%\w+", operands)[len(written) :] if r not in numbers]
            source = _union(origins, sources)
            numbers.difference_update(written)
            if opcode.startswith("mov.") and not sources:
                numbers.update(written)
            brackets = re.findall(r"\[\s*(%\w+)", operands)
            if opcode.startswith("ld.param"):
                index = int(re.findall(r"_param_(\d+)", operands)[0])
                source = frozenset(parameters[index : index + 1])
            elif opcode.startswith(("ld.global", "st.global", "cp.async.ca.", "cp.async.cg.")):
                # The address is the last bracket of a load or cp.async, the first of a store.
                address = origins[brackets[0 if opcode.startswith("st") else -1]]
                found.append((address, _width(opcode, operands)))
                source = frozenset("*" + name for name in address if not name.startswith("*"))
                # What goes through shared memory is followed as one value.
                written = ["shared"] if opcode.startswith("cp") else written
            elif opcode.startswith("st.shared"):
                written = ["shared"]
            elif opcode.startswith(("ld.shared", "ldmatrix")):
                source = origins["shared"]
            for register in written:
                if not source <= origins[register]:
                    origins[register] |= source
                    changed = True
    return found


def _union(origins: dict[str, frozenset[str]], registers: list[str]) -> frozenset[str]:
    return frozenset().union(*(origins[register] for register in registers))


def _width(opcode: str, operands: str) -> int:
    if opcode.startswith("cp.async"):
        return int(re.split(r",\s*", operands.replace(";", ""))[2], 0)
    lanes = re.search(r"\.v(\d)", opcode)
    element = re.search(r"\.[busf](\d+)$", opcode)
    if element is None:
        raise RuntimeError(f"unknown access {opcode}")
    return int(element[1]) // 8 * (int(lanes[1]) if lanes else 1)


def narrowest_accesses(configuration: Configuration, ptx: str) -> tuple[int | None, list[str]]:
    """Bytes of the narrowest access to a streamed tensor, and what is accessed too narrowly."""
    passed = [n for n in configuration.kernel.arg_names if n not in configuration.constexprs]
    found, streamed = accesses(ptx, passed), configuration.streamed
    problems, narrowest = [], []
    for argument in streamed:
        if isinstance(streamed, dict):  # behind a table of pointers
            bits = streamed[argument]
            widths = [width for origin, width in found if "*" + argument in origin]
        else:  # an index read from memory makes it a gather
            bits = int(re.sub(r"\D+", "", configuration.signature[argument]))
            gathers = [any(name.startswith("*") for name in origin) for origin, _ in found]
            widths = [
                width
                for (origin, width), gather in zip(found, gathers, strict=True)
                if argument in origin and not gather
            ]
        if not widths:
            problems.append(f"no access to {argument} found")
            continue
        if bits > 8:
            narrowest.append(min(widths))
        if min(widths) < (16 if bits > 8 else 8):
            problems.append(f"{argument} ({bits} bits) is accessed {min(widths)} bytes at a time")
    return min(narrowest, default=None), problems


def count_sweeps(
    configuration: Configuration, loops: list[sass.Loop]
) -> tuple[dict[str, float], list[str]]:
    """Instructions an element of each sweep, and what of the loops is not as declared.

    A loop that stands twice in the code, on two ways through the kernel, is counted once. How often
    the assembler has unrolled it its bytes tell.
    """
    threads = 32 * configuration.options["num_warps"]
    tile = configuration.constexprs.get("BLOCK_SIZE", 0) // threads
    found: dict[str, float] = {}
    problems = []
    for loop in loops:
        names = [name for name in configuration.sweeps if name in loop.functions]
        if not names:
            if configuration.sweeps and loop.wide:
                problems.append(f"a loop of {sorted(loop.functions)} is not declared")
            continue
        name = min(names, key=list(configuration.sweeps).index)
        sweep = configuration.sweeps[name]
        elements = sweep.elements or loop.bytes / sweep.bytes
        if sweep.elements is None and elements % tile:
            problems.append(f"{name} moves {loop.bytes / tile} bytes an element, not {sweep.bytes}")
        if loop.in_flight == 0:
            problems.append(f"{name} waits for all of its copies: nothing is pipelined")
        found[name] = max(found.get(name, 0.0), loop.instructions / elements)
    missing = [
        name for name, sweep in configuration.sweeps.items() if sweep.share and name not in found
    ]
    problems += [f"no loop of {name} found" for name in missing]
    return found, problems


def examine(configuration: Configuration, arch: int) -> tuple[dict[str, Any], list[str]]:
    """The report of one kernel, and what is wrong with it but for what it spills."""
    ptx, shared = compile_ptx(configuration, arch)
    fuse = configuration.options.get("enable_fp_fusion", True)
    registers, spilled, loops = assemble(ptx, arch, fuse)
    narrowest, problems = narrowest_accesses(configuration, ptx)
    counted, undeclared = count_sweeps(configuration, loops)
    problems += undeclared
    report: dict[str, Any] = {
        "name": configuration.name,
        "arch": f"sm_{arch}",
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": shared,
        "narrowest_streamed_access_bytes": narrowest,
    }
    if configuration.sweeps and not undeclared:
        report |= predictions(configuration, arch, registers, shared, counted)
        problems += compiled_table.missed_targets(report)
    return report, problems


def predictions(
    configuration: Configuration,
    arch: int,
    registers: int,
    shared: int,
    counted: dict[str, float],
) -> dict[str, Any]:
    """Instructions and bytes an element of the row, programs at once, and picoseconds an element
    with their share of what the bytes alone would take, for each GPU of this architecture."""
    sweeps, warps = configuration.sweeps, configuration.options["num_warps"]
    seen = {name: counted[name] for name, sweep in sweeps.items() if sweep.share}
    weighted = [
        (count * sweeps[name].share, sweeps[name].bytes * sweeps[name].share)
        for name, count in seen.items()
    ]
    moved = sum(size for _, size in weighted)
    report: dict[str, Any] = {
        "instructions_of_loops": {name: round(count, 1) for name, count in seen.items()},
        "instructions": round(sum(count for count, _ in weighted), 1),
        "bytes": round(moved, 2),
        "predicted": {},
    }
    for name, gpu in predict.GPUS.items():
        programs = predict.programs_at_once(registers, shared, warps, gpu)
        if gpu.arch == arch:
            seconds = predict.seconds_an_element(weighted, programs * warps, gpu)
            report["programs"], report["warps"] = programs, programs * warps
            report["predicted"][name] = {
                "picoseconds": round(seconds * 1e12, 3),
                "share": round(moved / gpu.copy / seconds, 2),
                "over_the_products": round(
                    predict.over_the_products(seconds, gpu, 8192, 151_936, 4096), 3
                ),
            }
    return report


def spills(report: dict[str, Any]) -> list[str]:
    return [f"spills {report['spill_bytes']} bytes"] if report["spill_bytes"] else []


@functools.cache
def jobs() -> list[tuple[Configuration, int]]:
    """Everything there is to compile."""
    return [
        (configuration, arch)
        for module in MODULES
        for configuration in module.production_configurations()
        for arch in ARCHITECTURES
    ]


def run_job(index: int) -> tuple[dict[str, Any], list[str]]:
    return examine(*jobs()[index])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose name holds this expression")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", action="store_true", help="write bench/results/compiled.*")
    mode.add_argument("--spills", action="store_true", help="of the problems only spills count")
    options = parser.parse_args()
    chosen = [
        index
        for index, (configuration, arch) in enumerate(jobs())
        if re.search(options.only, configuration.name) and arch in (options.arch or ARCHITECTURES)
    ]
    reports, failures = [], 0
    # Spawned, not forked: the compiler has threads. Kernels cannot be sent, their numbers can.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        for report, others in pool.map(run_job, chosen):
            reports.append(report)
            problems = spills(report)
            if not options.spills:
                problems += others
            if not (options.spills or options.update):
                problems += compiled_table.grown(report, triton.__version__)
            failures += bool(problems)
            print(
                f"{report['name']:40} {report['arch']:7} {report['registers']:4} registers "
                f"{report['spill_bytes']:5} spilled {report['shared_bytes']:6} shared "
                f"{report.get('instructions', ''):>5} instructions {report.get('bytes', ''):>5} B ",
                "; ".join(problems) or "ok",
                flush=True,
            )
    if options.update:
        compiled_table.update(reports, triton.__version__)
    print(json.dumps({"kernels": reports}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
