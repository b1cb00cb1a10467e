"""Compiles every kernel for sm_90, without a GPU, and prints what came out as JSON: run by test_compiled.py.

A process of its own: the tests around it define their kernels for the interpreter (TRITON_INTERPRET=1).
"""

import importlib
import json
import re
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import get_sass


def compile_kernel(module: str, name: str, arguments: dict, constants: dict, **options) -> dict:
    """Instruction counts and registers of one kernel; pointers and sizes are multiples of 16, as they mostly are."""
    kernel = getattr(importlib.import_module(f"mbdist_kernels.{module}"), name)
    signature = {key: arguments.get(key, "constexpr") for key in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            attributes |= {(i, j): aligned for j in range(len(kind))}
        elif kind != "constexpr":
            attributes[(i,)] = aligned
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    body = [line.split("\t", 1)[1] if "\t" in line else line for line in get_sass(compiled.asm["cubin"]).splitlines()]
    body = [re.sub(r"^@!?U?P[0-9T]+ ", "", line.strip()) for line in body]
    loop = max(_loops(body), key=lambda lines: sum("HGMMA" in line for line in lines), default=[])
    ops = Counter(line.split()[0].split(".")[0].rstrip(";") for line in body if line and not line.endswith(":"))
    registers = {int(number) for line in body for number in re.findall(r"\bR(\d+)\b", line)}
    return {
        "instructions": sum(ops.values()),
        "registers": max(registers) + 1,
        "shared": compiled.metadata.shared,
        "spills": ops["LDL"] + ops["STL"],
        "tensor_core": ops["HGMMA"],
        "loop_instructions": len(loop),
        "loop_shared_stores": sum(line.startswith("STS") for line in loop),
    }


def _loops(body: list[str]):
    labels = {line.rstrip(":"): i for i, line in enumerate(body) if re.fullmatch(r"\w+:", line)}
    for i, line in enumerate(body):
        target = re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?(\w+);", line)
        if target and labels.get(target[1], i) < i:
            yield body[labels[target[1]] : i]


def all_kernels():
    sizes = {"num_rows": "i32", "num_columns": "i32", "row_words": "i32"}
    scales = {"scale_out": "*fp32", "scale_in": "*fp32"}
    for planes in (1, 2, 3, 4):
        of_planes = {"planes": ("*i32",) * planes, **scales, **sizes}
        constants = {"PLANES": planes}
        yield (
            f"linear_decode, K={planes}",
            ("linear_decode", "_decode_kernel"),
            of_planes
            | {"inputs": "*bf16", "parts": "*fp32", "num_tokens": "i32", "padded": "i32", "split_words": "i32"},
            constants | {"BLOCK_ROWS": 64, "BLOCKS_AT_A_TIME": 8, "SPLIT": 1},
            {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
        )
        yield (
            f"linear_in_tiles, K={planes}",
            ("linear_forward", "_tiles_kernel"),
            of_planes | {"x": "*bf16", "y": "*i16", "num_tokens": "i32"},
            constants | {"BLOCK_ROWS": 128 if planes < 4 else 64, "BLOCK_TOKENS": 128, "BLOCK_WORDS": 2},
            {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True},
        )
        yield (
            f"dequantize, K={planes}",
            ("dequantize", "_dequantize_kernel"),
            of_planes | {"out": "*i16"},
            constants | {"SIXTEEN": True, "BLOCK_ROWS": 8, "BLOCK_WORDS": 16},
            {"num_warps": 4, "enable_fp_fusion": False},
        )
        for as_words in (False, True):
            parts = {"out_parts": "*fp32", "in_parts": "*fp32", "size_parts": "*fp32"}
            factors = {"row_factors": ("*fp32",), "column_factors": ("*fp32",)}
            yield (
                f"linear_backward, K={planes}, {'words' if as_words else 'values'}",
                ("linear_backward", "_epilogue_kernel"),
                of_planes | {"gradient": "*i16", **parts, **factors, "signals": ("*i32" if as_words else "*fp32",)},
                constants | {"SIGNALS": 1, "AS_WORDS": as_words, "BLOCK_ROWS": 32, "BLOCK_WORDS": 4},
                {"num_warps": 4, "enable_fp_fusion": False},
            )
    plain = {"num_warps": 4, "enable_fp_fusion": False}
    yield (
        "linear_decode, inputs",
        ("linear_decode", "_permute_kernel"),
        {
            "x": "*i16",
            "scale_in": "*fp32",
            "inputs": "*i16",
            "num_tokens": "i32",
            "num_columns": "i32",
            "padded": "i32",
        },
        {"BLOCK": 128},
        plain,
    )
    numbers = {key: "i32" for key in ("num_elements", "first_pair", "beta_q15", "limit_q", "bound")}
    for contributions in (1, 8):
        yield (
            f"flip_update, {contributions} contributions",
            ("flip_update", "_accumulate_kernel"),
            {"accumulator": "*i8", "signals": "*fp32", "keys": "*i32", **numbers},
            {"UNIT": float(64 << 15), "CONTRIBUTIONS": contributions, "BLOCK": 2048},
            plain,
        )
    yield (
        "candidate_mask",
        ("flip_update", "_candidate_kernel"),
        {"accumulator": "*i8", "words": "*i32", "mask": "*i32", "num_words": "i32", "threshold": "i32"},
        {"BY_SIZE": False, "BLOCK_WORDS": 64},
        plain,
    )
    yield (
        "pack",
        ("pack", "_pack_kernel"),
        {"values": "*i16", "words": "*i32", **sizes},
        {"INFINITY": 0x7F80, "MAGNITUDE": 0x7FFF, "BLOCK_ROWS": 4, "BLOCK_WORDS": 32},
        plain,
    )
    yield (
        "unpack",
        ("unpack", "_unpack_kernel"),
        {"words": "*i32", "out": "*bf16", **sizes},
        {"BITS": False, "BLOCK_ROWS": 4, "BLOCK_WORDS": 32},
        plain,
    )
    words = {"words": "*i32", "num_words": "i32"}
    yield "popcount", ("popcount", "_popcount_kernel"), words | {"counts": "*i32"}, {"BLOCK": 4096}, plain
    yield "xor_apply", ("xor_apply", "_xor_kernel"), words | {"mask": "*i32"}, {"BLOCK": 4096}, plain
    yield "vote", ("vote", "_vote_kernel"), words | {"majority": "*i32"}, {"RANKS": 8, "BLOCK": 1024}, plain
    yield (
        "signal_accumulate",
        ("signal_codec", "_accumulate_kernel"),
        {"total": "*fp32", "words": "*i32", "magnitudes": "*fp32", **sizes},
        {"RANKS": 8, "BLOCK_ROWS": 4, "BLOCK_WORDS": 16},
        plain,
    )
    yield (
        "flip_apply_sparse",
        ("flip_codec", "_apply_kernel"),
        {"words": "*i32", "positions": "*i16", "ends": "*i32", "counts": "*i32"},
        {"BLOCK": 1024},
        plain,
    )


if __name__ == "__main__":
    found = {
        title: compile_kernel(*where, {key: kind for key, kind in arguments.items()}, constants, **options)
        for title, where, arguments, constants, options in all_kernels()
    }
    print(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1))
