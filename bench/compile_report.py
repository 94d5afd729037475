"""Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU, and check the result.

    python bench/compile_report.py

Reports registers, spilled bytes, shared memory and the narrowest access to a streamed tensor of
each kernel in its production configuration. Exit code 1 when a kernel spills, or reads or writes a
streamed tensor less than 16 bytes at a time (8 bytes for 8-bit elements). The last line is JSON.
"""

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

import triton
from sodfast_kernels.distillation import row_launch
from sodfast_kernels.launch import Configuration
from sodfast_kernels.parameters import adamw_kernels, teacher_kernels
from sodfast_kernels.sampling import kernel as sampling_kernel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
MODULES = (teacher_kernels, adamw_kernels, row_launch, sampling_kernel)


def compile_ptx(configuration: Configuration, arch: int) -> tuple[str, int]:
    """PTX and bytes of shared memory."""
    _, kernel, signature, constexprs, options, _ = configuration
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


def assemble(ptx: str, arch: int, fuse: bool) -> tuple[int, int]:
    """Registers a thread and spilled bytes, by the ptxas that Triton uses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [nvidia.get_ptxas(arch).path, "-v", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={nvidia.sm_arch_from_capability(arch)}"]
        command += [] if fuse else ["--fmad=false"]
        result = subprocess.run(
            [*command, str(path), "-o", str(Path(folder, "kernel.cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    return read_ptxas(result.stdout + result.stderr)


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
        for line in lines:
            opcode, _, operands = line.partition(" ")
            target = re.match(r"\{.*?\}|[^,\[]*", operands.strip())[0]  # none for a store
            written = re.findall(r"%\w+", target)
            source = _union(origins, re.findall(r"%\w+", operands)[len(written) :])
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


def examine(configuration: Configuration, arch: int) -> tuple[dict[str, Any], list[str]]:
    """The report of one kernel, and what is wrong with it."""
    name, kernel, signature, constexprs, options, streamed = configuration
    ptx, shared = compile_ptx(configuration, arch)
    registers, spilled = assemble(ptx, arch, options.get("enable_fp_fusion", True))
    passed = [n for n in kernel.arg_names if n not in constexprs]
    found = accesses(ptx, passed)
    problems = [f"spills {spilled} bytes"] if spilled else []
    narrowest: list[int] = []
    for argument in streamed:
        if isinstance(streamed, dict):  # behind a table of pointers
            bits = streamed[argument]
            widths = [width for origin, width in found if "*" + argument in origin]
        else:  # an index read from memory makes it a gather
            bits = int(re.sub(r"\D+", "", signature[argument]))
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
    report = {
        "name": name,
        "arch": f"sm_{arch}",
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": shared,
        "narrowest_streamed_access_bytes": min(narrowest, default=None),
    }
    return report, problems


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
    reports, failures = [], 0
    # Spawned, not forked: the compiler has threads. Kernels cannot be sent, their numbers can.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        for report, problems in pool.map(run_job, range(len(jobs()))):
            reports.append(report)
            failures += bool(problems)
            print(
                f"{report['name']:40} {report['arch']:7} {report['registers']:4} registers "
                f"{report['spill_bytes']:5} spilled {report['shared_bytes']:6} shared ",
                "; ".join(problems) or "ok",
                flush=True,
            )
    print(json.dumps({"kernels": reports}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
