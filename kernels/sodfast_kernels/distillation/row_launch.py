"""Launches of the row kernels: which one a call takes, with which arguments and options."""

from typing import Any

import torch
from torch import Tensor

from ..launch import Configuration, Sweep, power_of_two
from .arguments import Call
from .bucket_kernels import stored_kernel
from .cross_entropy_kernel import cross_entropy_kernel
from .row_kernel import full_kernel, scale_kernel
from .row_terms import FORWARD, JSD, REVERSE
from .top_k_kernel import GATHERED, top_k_kernel

SCALE_BLOCK_SIZE = 4096
# Programs of the scale kernel, more than any GPU runs at once.
SCALE_PROGRAMS = 2048


def launch_rows(
    call: Call,
    part: slice,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    d_logits_nV: Tensor | None,
    stats: Tensor,
) -> None:
    """One program for each row of a tile.

    part: the tile's rows among all of the call's.
    student_nV, teacher_nV: their logits; columns beyond the vocabulary are padding. The teacher's
        are None where it is stored.
    d_logits_nV: written as wide as the logits; None where no gradient is wanted.
    stats: [6, N] of the call.
    """
    count, width = part.stop - part.start, student_nV.shape[1]
    if count == 0:
        return
    sides, settings = call.sides, call.settings
    per_row = (*call.tokens, call.upstream)
    distill, target, advantage, policy, old, upstream = (
        None if entry is None else entry[part].contiguous() for entry in per_row
    )
    if call.labels_apart:
        policy = None
    columns = tile_columns(student_nV, teacher_nV, d_logits_nV)
    bf16 = d_logits_nV is not None and d_logits_nV.dtype == torch.bfloat16
    if d_logits_nV is not None and bf16:
        d_logits_nV = d_logits_nV.view(torch.int16)
    arguments: dict[str, Any] = {
        "student_ptr": student_nV,
        "student_row_stride": student_nV.stride(0),
        "d_logits_ptr": d_logits_nV,
        "d_logits_row_stride": 0 if d_logits_nV is None else d_logits_nV.stride(0),
        "stats_ptr": stats[:, part],
        "stats_row_stride": stats.stride(0),
        "distill_ptr": distill,
        "target_ptr": target,
        "advantage_ptr": advantage,
        "policy_ptr": policy,
        "old_ptr": old,
        "upstream_ptr": upstream,
        "vocabulary": sides.vocabulary,
        "width": width,
        "alpha": settings.alpha,
        "inverse_temperature": 1 / settings.temperature,
        "softcap": settings.softcap,
        "clip_low": settings.clip_low,
        "clip_high": settings.clip_high,
        "ratio_cap": settings.ratio_cap,
        "dual_clip": settings.dual_clip,
        "KIND": {0.0: FORWARD, 1.0: REVERSE}.get(settings.alpha, JSD),
        "HALF": settings.alpha == 0.5,
        "BF16": bf16,
        "BLOCK_SIZE": BLOCK_SIZE,
        "COLUMNS": columns,
        "num_warps": NUM_WARPS,
    }
    grid = (count,)
    if teacher_nV is None:
        assert sides.stored_ids is not None and sides.stored_logprobs is not None
        ids = sides.stored_ids[part].contiguous()
        stored_kernel[grid](
            **arguments,
            stored_ids_ptr=ids,
            stored_logprobs_ptr=sides.stored_logprobs[part].contiguous(),
            stored_row_stride=ids.shape[1],
            k=ids.shape[1],
            ADD_TAIL=settings.add_tail,
            CAPACITY=power_of_two(ids.shape[1]),
            maxnreg=STORED_REGISTERS,
        )
        return
    arguments |= {"teacher_ptr": teacher_nV, "teacher_row_stride": teacher_nV.stride(0)}
    if settings.top_k is None:
        full_kernel[grid](**arguments, maxnreg=registers(columns, FULL_REGISTERS))
        return
    _launch_top_k(arguments, settings.top_k, settings.add_tail, student_nV)


def _launch_top_k(
    arguments: dict[str, Any], top_k: int, add_tail: bool, student_nV: Tensor
) -> None:
    """The rows by their hot lanes, then those that are left to the search."""
    count, columns = student_nV.shape[0], arguments["COLUMNS"]
    options = top_k_options(top_k, arguments["vocabulary"], columns)
    lanes, slots = lane_count(options, columns), options["CAPACITY"]
    scratch = {
        "lanes_ptr": student_nV.new_empty(count, 7, lanes, dtype=torch.float32),
        "hot_ptr": student_nV.new_empty(count, lanes, dtype=torch.int32),
        "values_ptr": student_nV.new_empty(count, 2, slots, dtype=torch.float32),
        "ids_ptr": student_nV.new_empty(count, slots, dtype=torch.int32),
        "overflow_ptr": student_nV.new_empty(count, dtype=torch.int32),
    }
    for search in (False, True):
        top_k_kernel[(count,)](
            **arguments,
            **options,
            **scratch,
            k=top_k,
            ADD_TAIL=add_tail,
            SEARCH=search,
            maxnreg=registers(columns, top_k_registers(top_k, search)),
        )


def launch_cross_entropy(
    call: Call, part: slice, student_nV: Tensor, d_logits_nV: Tensor | None, stats: Tensor
) -> None:
    """Adds the cross-entropy at temperature 1 to what `launch_rows` has written; arguments as
    there."""
    per_row = (call.tokens.target_ids, call.tokens.policy_weight, call.upstream)
    target, weight, upstream = (
        None if entry is None else entry[part].contiguous() for entry in per_row
    )
    columns = tile_columns(student_nV, d_logits_nV)
    bf16 = d_logits_nV is not None and d_logits_nV.dtype == torch.bfloat16
    if d_logits_nV is not None and bf16:
        d_logits_nV = d_logits_nV.view(torch.int16)
    cross_entropy_kernel[(part.stop - part.start,)](
        student_ptr=student_nV,
        d_logits_ptr=d_logits_nV,
        stats_ptr=stats[:, part],
        target_ptr=target,
        label_weight_ptr=weight,
        upstream_ptr=upstream,
        student_row_stride=student_nV.stride(0),
        d_logits_row_stride=0 if d_logits_nV is None else d_logits_nV.stride(0),
        stats_row_stride=stats.stride(0),
        vocabulary=call.sides.vocabulary,
        width=student_nV.shape[1],
        BF16=bf16,
        BLOCK_SIZE=BLOCK_SIZE,
        COLUMNS=columns,
        num_warps=NUM_WARPS,
        maxnreg=registers(columns, FULL_REGISTERS),
    )


def launch_scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient ← factor · gradient, in place."""
    count, bf16 = gradient.numel(), gradient.dtype == torch.bfloat16
    scale_kernel[(min(-(-count // SCALE_BLOCK_SIZE), SCALE_PROGRAMS),)](
        values_ptr=gradient.view(torch.int16) if bf16 else gradient,
        factor_ptr=factor,
        count=count,
        BF16=bf16,
        BLOCK_SIZE=SCALE_BLOCK_SIZE,
        num_warps=8,
    )


def capacity(top_k: int) -> int:
    """Slots for top-k candidates: about 1.15·k of them are expected, or a few more."""
    return max(256, power_of_two(top_k + top_k // 2))


# Warps of a program wait for few others between two sweeps, and many programs on a multiprocessor
# fill those gaps. Of a tile each thread has eight elements, neighbours where rows are aligned, so
# bf16 is stored 16 bytes wide and columns are reduced within a thread.
BLOCK_SIZE, NUM_WARPS = 1024, 4
ALIGNED_COLUMNS = 8
# Registers of a thread at most. By itself the assembler would spill a few bytes rather than take
# some more; these are enough, and let 5, 5 and 4 programs run at once.
FULL_REGISTERS, TOP_K_REGISTERS, STORED_REGISTERS = 96, 96, 128
UNALIGNED_REGISTERS = 168
# For more than 512 tokens, and for the search, which is rare.
MANY_REGISTERS = 255


def tile_columns(*rows: Tensor | None) -> int:
    """Columns of a tile: one where rows may start anywhere, as of an odd vocabulary's logits."""
    aligned = all(
        tensor.stride(0) % 16 == 0 and tensor.storage_offset() * tensor.itemsize % 16 == 0
        for tensor in rows
        if tensor is not None
    )
    return ALIGNED_COLUMNS if aligned else 1


def registers(columns: int, most: int) -> int:
    """Registers of a thread at most, `most` on aligned rows: others take more addresses."""
    return most if columns > 1 else max(most, UNALIGNED_REGISTERS)


def top_k_registers(top_k: int, search: bool) -> int:
    return MANY_REGISTERS if search or top_k > 512 else TOP_K_REGISTERS


def top_k_scratch(top_k: int, vocabulary: int) -> int:
    """Bytes of what the top-k kernel keeps of an aligned row between its sweeps."""
    options = top_k_options(top_k, vocabulary, ALIGNED_COLUMNS)
    return 32 * lane_count(options, ALIGNED_COLUMNS) + 12 * options["CAPACITY"] + 4


def lane_count(options: dict[str, int], columns: int) -> int:
    """Lanes of a row, from `top_k_options`."""
    return options["SEGMENTS"] * BLOCK_SIZE // columns


def top_k_options(top_k: int, vocabulary: int, columns: int) -> dict[str, int]:
    """The constants of top_k_kernel: 1,024 lanes of a large vocabulary, or twice as many, so that
    few more than k of its elements reach the k-th greatest of their maxima."""
    tiles = -(-vocabulary // BLOCK_SIZE)
    segments = min(columns if top_k <= 512 else 2 * columns, power_of_two(tiles))
    return {
        "CAPACITY": capacity(top_k),
        "SEGMENTS": segments,
        "ROUNDS": -(-tiles // segments),
    }


# The logits' type, that of the d-logits as the kernel sees them, and whether they are bf16.
FORMS = {
    "fp32": ("*fp32", "*i16", True),
    "fp32_to_fp32": ("*fp32", "*fp32", False),
    "bf16": ("*bf16", "*i16", True),
    "fp16": ("*fp16", "*fp32", False),
}
KINDS = {"forward": (0, False), "reverse": (1, False), "jsd": (2, True), "any": (2, False)}
VARIANTS = ("full", "top_20", "top_100", "top_1024", "search_100", "search_1024", "stored_100")


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks: rows padded to multiples of 16, all per-token terms on.

    Every variant on our own fp32 tiles; over other logits those that differ most. Then what need
    not be fast but must compile, without a spill: soft caps, the dual clip, and rows that start
    anywhere.
    """
    found = [
        _with(name, _configuration(variant, "jsd", "fp32"))
        for name in ("softcap", "dual_clip")
        for variant in VARIANTS
    ]
    found += [
        _unaligned(_configuration(variant, "jsd", form), form)
        for variant in ("full", "top_100", "stored_100")
        for form in ("bf16", "fp32_to_fp32")
    ]
    for form in FORMS:
        for kind in KINDS:
            for variant in VARIANTS:
                if form == "fp32" or kind == "jsd" or (form == "bf16" and variant == "full"):
                    found.append(_configuration(variant, kind, form))
    found += [
        _labelled(_configuration(variant, "jsd", "fp32"))
        for variant in ("full", "top_100", "search_100")
    ]
    found += [_cross_entropy(form) for form in ("fp32", "fp32_to_fp32")]
    for name, values, bf16 in (("bf16", "*i16", True), ("fp32", "*fp32", False)):
        found.append(
            Configuration(
                name=f"scale_{name}",
                kernel=scale_kernel,
                signature={"values_ptr": values, "factor_ptr": "*fp32", "count": "i32:16"},
                constexprs={"BF16": bf16, "BLOCK_SIZE": SCALE_BLOCK_SIZE},
                options={"num_warps": 8},
                streamed=["values_ptr"],
                sweeps={"scale_kernel": Sweep(4.0 if bf16 else 8.0)},
            )
        )
    return found


def _with(name: str, configuration: Configuration) -> Configuration:
    """The configuration with a number that is otherwise off."""
    constexprs = {k: v for k, v in configuration.constexprs.items() if k != name}
    return configuration._replace(
        name=f"{configuration.name}_{name}",
        signature={**configuration.signature, name: "fp32"},
        constexprs=constexprs,
        sweeps={},
    )


def _labelled(configuration: Configuration) -> Configuration:
    """With a cross-entropy in place of the policy term."""
    absent = {"advantage_ptr": None, "old_ptr": None, "ratio_cap": None}
    signature = {k: v for k, v in configuration.signature.items() if k not in absent}
    return configuration._replace(
        name=configuration.name + "_labels",
        signature=signature,
        constexprs={**configuration.constexprs, **absent},
    )


def _cross_entropy(form: str) -> Configuration:
    """The kernel of a cross-entropy that has a softmax of its own."""
    logits, d_logits, bf16 = FORMS[form]
    signature = {
        **{"student_ptr": logits, "d_logits_ptr": d_logits, "stats_ptr": "*fp32"},
        **{"target_ptr": "*i64", "label_weight_ptr": "*fp32", "stats_row_stride": "i32"},
        **dict.fromkeys(["student_row_stride", "d_logits_row_stride"], "i32:16"),
        **dict.fromkeys(["vocabulary", "width"], "i32:16"),
    }
    return Configuration(
        name=f"cross_entropy_{form}",
        kernel=cross_entropy_kernel,
        signature=signature,
        constexprs={
            "upstream_ptr": None,
            "BF16": bf16,
            "BLOCK_SIZE": BLOCK_SIZE,
            "COLUMNS": ALIGNED_COLUMNS,
        },
        options={"num_warps": NUM_WARPS, "maxnreg": FULL_REGISTERS},
        streamed=["student_ptr", "d_logits_ptr"],
        sweeps={"student_sums": Sweep(4.0), "_add_tile": Sweep(8.0 if bf16 else 12.0)},
    )


def _unaligned(configuration: Configuration, form: str) -> Configuration:
    variant, _, k = configuration.name.removesuffix(f"_jsd_{form}").partition("_")
    constexprs = {**configuration.constexprs, "COLUMNS": 1}
    if variant == "top":
        constexprs |= top_k_options(int(k), 151_936, 1)
    options = configuration.options
    return configuration._replace(
        name=configuration.name + "_unaligned",
        signature={k: v.removesuffix(":16") for k, v in configuration.signature.items()},
        constexprs=constexprs,
        options={**options, "maxnreg": registers(1, options["maxnreg"])},
        streamed=[],
        sweeps={},
    )


def _configuration(variant: str, kind: str, form: str) -> Configuration:
    logits, d_logits, bf16 = FORMS[form]
    number, half = KINDS[kind]
    name, _, k = variant.partition("_")
    search = name == "search"
    name = "top" if search else name
    kernel = {"full": full_kernel, "top": top_k_kernel, "stored": stored_kernel}[name]
    sizes = {"BLOCK_SIZE": BLOCK_SIZE, "COLUMNS": ALIGNED_COLUMNS}
    constexprs: dict[str, Any] = {
        "KIND": number, "HALF": half, "BF16": bf16, **sizes, "upstream_ptr": None, "softcap": None,
        "dual_clip": None,
    }  # fmt: skip
    most = FULL_REGISTERS
    if name == "top":
        most = top_k_registers(int(k), search)
        constexprs |= {
            "ADD_TAIL": True,
            "SEARCH": search,
            **top_k_options(int(k), 151_936, ALIGNED_COLUMNS),
        }
    elif name == "stored":
        most = STORED_REGISTERS
        constexprs |= {"ADD_TAIL": True, "CAPACITY": power_of_two(int(k))}
    strides = ["student_row_stride", "teacher_row_stride", "d_logits_row_stride"]
    types = {
        **dict.fromkeys(["student_ptr", "teacher_ptr"], logits),
        "d_logits_ptr": d_logits,
        **dict.fromkeys(["ids_ptr", "hot_ptr", "overflow_ptr"], "*i32"),
        **dict.fromkeys(["target_ptr", "stored_ids_ptr"], "*i64"),
        **dict.fromkeys([*strides, "vocabulary", "width"], "i32:16"),
        **dict.fromkeys(["stats_row_stride", "stored_row_stride", "k"], "i32"),
        **dict.fromkeys(["alpha", "inverse_temperature"], "fp32"),
        **dict.fromkeys(["clip_low", "clip_high", "ratio_cap"], "fp32"),
    }
    arguments = [argument for argument in kernel.arg_names if argument not in constexprs]
    streamed = ["student_ptr", "teacher_ptr", "d_logits_ptr"]
    return Configuration(
        name=f"{variant}_{kind}_{form}",
        kernel=kernel,
        signature={argument: types.get(argument, "*fp32") for argument in arguments},
        constexprs=constexprs,
        options={"num_warps": NUM_WARPS, "maxnreg": most},
        streamed=[argument for argument in streamed if argument in arguments],
        sweeps=_sweeps(variant, kind, logits, d_logits),
    )


def _sweeps(variant: str, kind: str, logits: str, d_logits: str) -> dict[str, Sweep]:
    """The loops of a row kernel at V = 151,936, with a sampled token, when a gradient is wanted."""
    read, written = (int(kind.lstrip("*fpib")) // 8 for kind in (logits, d_logits))
    # First what only a row without a teacher takes, or one with nothing.
    rare = {
        "student_sums": Sweep(read, 0),
        "_outside_tile": Sweep(read + written, 0),
        "undistilled_row": Sweep(written, 0),
    }
    name, _, k = variant.partition("_")
    if name == "full":
        rare |= {"_any_diverges": Sweep(2 * read, 0)} if kind in ("forward", "reverse") else {}
        # Of rows whose divergence is 1e-3 about one in ten has no expansion.
        extra = {"jsd": 0.1, "any": 1.0}.get(kind)
        rare |= {} if extra is None else {"_mean_slope2": Sweep(2 * read, extra)}
        return {**rare, "add_tile": Sweep(2 * read), "_gradient": Sweep(2 * read + written)}
    if name == "stored":
        student = {"student_sums": Sweep(read), "_outside_tile": Sweep(read + written)}
        return {**rare, **student, "_whole_mass": Sweep(read)}
    lanes = lane_count(top_k_options(int(k), 151_936, ALIGNED_COLUMNS), ALIGNED_COLUMNS)
    return {
        **rare,
        "_count": Sweep(read, 0),
        "_collect": Sweep(2 * read, int(k) / lanes, GATHERED.value // (32 * NUM_WARPS)),
        "_sum_lanes": Sweep(2 * read),
        "_outside_tile": Sweep(read + written),
    }
