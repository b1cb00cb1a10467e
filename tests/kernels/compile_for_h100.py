"""Compiles every kernel for sm_90, without a GPU, and prints what came out as JSON: run by test_compiled.py.

A process of its own: the tests around it define their kernels for the interpreter (TRITON_INTERPRET=1). Every kernel is
compiled as it is launched without a measured table, and once more by the front end alone with each integer equal to 1,
which Triton makes a constant of at run time, and the interpreter does not.
"""

import importlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.tools.disasm import get_sass

from mbdist_kernels.accumulator import INT4, INT8
from mbdist_kernels.launch import rule

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
NOT_BLOCKS = ("num_warps", "num_stages")


@dataclass
class Kernel:
    """A kernel as some operation launches it."""

    title: str
    module: str
    name: str
    arguments: dict  # types of what is no constant
    constants: dict = field(default_factory=dict)
    operation: str | None = None  # whose launch settings are taken
    planes: int | None = None
    fuse: bool = False
    other: dict = field(default_factory=dict)  # launch settings than these

    def __post_init__(self):
        chosen = (rule(self.operation, self.planes) if self.operation else {"num_warps": 4}) | self.other
        self.constants |= {key: value for key, value in chosen.items() if key not in NOT_BLOCKS}
        self.options = {key: chosen[key] for key in NOT_BLOCKS if key in chosen} | {"enable_fp_fusion": self.fuse}
        self.function = getattr(importlib.import_module(f"mbdist_kernels.{self.module}"), self.name)
        self.arguments = {key: kind for key, kind in self.arguments.items() if key in self.function.arg_names}

    def source(self, ones: tuple[str, ...] = (), aligned: bool = True) -> ASTSource:
        """With these integers (all of a tuple) equal to 1; the others, and pointers, multiples of 16 if ``aligned``."""
        kinds, hint, hints, constants = {}, [["tt.divisibility", 16]], {}, dict(self.constants)
        for i, key in enumerate(self.function.arg_names):
            kinds[key] = kind = self.arguments.get(key, "constexpr")
            parts = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
            if key in ones:
                kinds[key] = ("constexpr",) * len(kind) if isinstance(kind, tuple) else "constexpr"
                constants |= dict.fromkeys(parts, 1)
            elif kind != "constexpr":
                hints |= dict.fromkeys(parts, hint)
        return ASTSource(self.function, signature=kinds, constexprs=constants, attrs=hints if aligned else {})

    def compile(self) -> dict:
        """Counts of the machine code."""
        compiled = triton.compile(self.source(), target=TARGET, options=self.options)
        lines = [line.split("\t", 1)[-1].strip() for line in get_sass(compiled.asm["cubin"]).splitlines()]
        body = [re.sub(r"^@!?U?P[0-9T]+ ", "", line) for line in lines]
        loop = max(_loops(body), key=lambda part: sum("HGMMA" in line for line in part), default=[])
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

    def errors_with_ones(self) -> list[str]:
        """What the front end says where integers are 1, one by one and all together, and nothing is aligned."""
        never = set(getattr(self.function, "do_not_specialize", None) or ())
        integers = [key for key, kind in self.arguments.items() if "i32" in (kind, *kind[:1]) and key not in never]
        errors = []
        for ones in [*((key,) for key in integers), tuple(integers)]:
            options = BACKEND.parse_options(self.options)
            context = ir.context()
            ir.load_dialects(context)
            BACKEND.load_dialects(context)
            try:
                self.source(ones, aligned=False).make_ir(
                    TARGET, options, BACKEND.get_codegen_implementation(options), BACKEND.get_module_map(), context
                )
            except triton.CompilationError as error:
                errors.append(f"{self.title}, {ones} = 1: {str(error).strip().splitlines()[-1]}")
        return errors


def _loops(body: list[str]):
    labels = {line.rstrip(":"): i for i, line in enumerate(body) if re.fullmatch(r"\w+:", line)}
    for i, line in enumerate(body):
        target = re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?(\w+);", line)
        if target and labels.get(target[1], i) < i:
            yield body[labels[target[1]] : i]


def all_kernels():
    sizes = dict.fromkeys(("num_rows", "num_columns", "row_words"), "i32")
    scales = {"scale_out": "*fp32", "scale_in": "*fp32"}
    together = 3  # queries, keys and values
    most = 4  # planes: with them alone what differs little is compiled too
    for k in range(1, most + 1):
        common = {"planes": ("*i32",) * k, **scales, **sizes}

        def of_planes(operation, name, arguments, constants, what="", fuse=False, other=(), common=common, k=k):
            module = "linear_forward" if operation == "linear_in_tiles" else operation
            title = f"{operation}, K={k}{what}"
            return Kernel(
                title, module, name, common | arguments, {"PLANES": k, **constants}, operation, k, fuse, dict(other)
            )

        more = dict.fromkeys(("num_tokens", "padded", "split_words"), "i32")
        for what, kind, weights, other in (  # the last: for a GPU whose blocks have less memory
            ("", "*i16", 1, {}),
            (f", {together} weights", "*i16", together, {}),
            (", in parts", "*i32", 1, {"SPLIT": 4}),
            (", 3 stages", "*i16", 1, {"num_stages": 3}),
        ):
            constants = {"SIXTEEN": kind == "*i16", "WEIGHTS": weights}
            inputs = {"inputs": "*bf16", "parts": kind, **more, "planes": ("*i32",) * weights * k}
            inputs |= {"scales_out": ("*fp32",) * weights, "rows": ("i32",) * weights}
            if "num_stages" in other and k != most:
                continue
            yield of_planes("linear_decode", "_decode_kernel", inputs, constants, what, True, other)
        inputs = {"x": "*bf16", "y": "*i16", "num_tokens": "i32"}
        yield of_planes("linear_in_tiles", "_tiles_kernel", inputs, {}, fuse=True)
        for what, kind in (("", "*i16"), (", fp32", "*i32"))[: 1 + (k == most)]:
            constants = {"SIXTEEN": kind == "*i16"}
            yield of_planes("dequantize", "_dequantize_kernel", {"out": kind}, constants, what)
        parts = dict.fromkeys(("out_parts", "in_parts", "size_parts"), "*fp32")
        for what, count, kind, gradient in (
            (", values", 1, "*fp32", "*i16"),
            (", words", 1, "*i32", "*i16"),
            (", values, fp32", 1, "*fp32", "*i32"),
            (", words, 2 signals", 2, "*i32", "*i16"),
            (", no signal", 0, "*fp32", "*i16"),
        )[: 5 if k == most else 2]:
            factors = dict.fromkeys(("row_factors", "column_factors"), ("*fp32",) * count)
            inputs = {"gradient": gradient, "signals": (kind,) * count, **parts, **factors}
            constants = {"SIGNALS": count, "AS_WORDS": kind == "*i32"}
            yield of_planes("linear_backward", "_epilogue_kernel", inputs, constants, what, True)
    for what, weights in (("", 1), (f", {together} weights", together)):
        inputs = {"x": "*i16", "scales_in": ("*fp32",) * weights, "inputs": "*i16"}
        inputs |= dict.fromkeys(("num_tokens", "num_columns", "padded"), "i32")
        constants = {"BLOCK": 128, "PLANES": 2, "WEIGHTS": weights}
        yield Kernel(f"linear_decode, inputs{what}", "linear_decode", "_permute_kernel", inputs, constants)
    numbers = dict.fromkeys(("num_elements", "first_pair", "beta_q15", "limit_q", "bound"), "i32")
    words = {"words": "*i32", "num_words": "i32"}
    for what, form, kind in (("", INT8, "*i8"), (", int4", INT4, "*u8")):
        inputs = {"accumulator": kind, "signals": "*fp32", "keys": "*i32", **numbers}
        pairs = {"PAIRS": form.per_entry == 2}
        for count in (1, 8):
            constants = {"UNIT": float(form.threshold << 15), "CONTRIBUTIONS": count, **pairs}
            title = f"flip_update, {count} contributions{what}"
            yield Kernel(title, "flip_update", "_accumulate_kernel", inputs, constants, "flip_update")
        inputs = words | {"accumulator": kind, "mask": "*i32", "threshold": "i32"}
        for by_size in (False, True):
            title, constants = f"candidate_mask{', by size' * by_size}{what}", {"BY_SIZE": by_size, **pairs}
            yield Kernel(title, "flip_update", "_candidate_kernel", inputs, constants, "candidate_mask")
    flips = dict.fromkeys(("words", "mask", "elements", "ends", "counts"), "*i32")
    flips |= {"positions": "*i16", "num_words": "i32"}
    for what, kind, infinity, magnitude in (("", "*i16", 0x7F80, 0x7FFF), (", fp32", "*i32", 0x7F800000, 0x7FFFFFFF)):
        inputs, constants = {"values": kind, "words": "*i32", **sizes}, {"INFINITY": infinity, "MAGNITUDE": magnitude}
        yield Kernel(f"pack{what}", "pack", "_pack_kernel", inputs, constants, "pack")
    for what, kind in (("", "*bf16"), (", bits", "*i8")):
        inputs, constants = {"words": "*i32", "out": kind, **sizes}, {"BITS": kind == "*i8"}
        yield Kernel(f"unpack{what}", "unpack", "_unpack_kernel", inputs, constants, "unpack")
    yield Kernel("popcount", "popcount", "_popcount_kernel", words | {"counts": "*i32"}, {}, "popcount")
    yield Kernel("xor_apply", "xor_apply", "_xor_kernel", words | {"mask": "*i32"}, {}, "xor_apply")
    yield Kernel("vote", "vote", "_vote_kernel", words | {"majority": "*i32"}, {"RANKS": 8}, "vote")
    yield Kernel("flip_mask", "flip_mask", "_mask_kernel", {**flips, "num_elements": "i32"}, {}, "flip_mask")
    inputs = {"signal": "*fp32", "words": "*i32", "parts": "*fp32", **sizes}
    yield Kernel("signal_encode", "signal_codec", "_encode_kernel", inputs, {}, "signal_encode")
    inputs = {"values": "*i16", "parts": "*fp32", "num_tokens": "i32", "num_columns": "i32"}
    title = "column_square_sums"
    yield Kernel(title, title, "_squares_kernel", inputs, {}, title)
    inputs = {"total": "*fp32", "words": "*i32", "magnitudes": "*fp32", **sizes}
    yield Kernel("signal_accumulate", "signal_codec", "_accumulate_kernel", inputs, {"RANKS": 8}, "signal_accumulate")
    of_rows = {
        "values": "*fp32",
        "inverse": "*fp32",
        "sizes": "*fp32",
        "columns": "*fp32",
        "words": "*i32",
        "key": "i32",
    }
    for bits in (8, 4):
        title, constants = f"encode_rows, {bits} bits", {"BITS": bits}
        yield Kernel(title, "row_codes", "_encode_kernel", of_rows | sizes, constants, "row_codes")
    for bits in (8, 4, 1):
        title, constants = f"decode_rows, {bits} bits", {"BITS": bits}
        yield Kernel(title, "row_codes", "_decode_kernel", of_rows | sizes, constants, "row_codes")
    yield Kernel("draw_signs", "row_codes", "_draw_kernel", of_rows | sizes, {}, "row_codes")
    yield Kernel("flip_encode_sparse", "flip_codec", "_encode_kernel", flips, {}, "flip_encode_sparse")
    yield Kernel("flip_apply_sparse", "flip_codec", "_apply_kernel", flips, {}, "flip_apply_sparse")


if __name__ == "__main__":
    kernels = list(all_kernels())
    result = {
        "triton": triton.__version__,
        "functions": sorted({f"{kernel.module}.{kernel.name}" for kernel in kernels}),
        "errors_with_ones": [error for kernel in kernels for error in kernel.errors_with_ones()],
        "kernels": {kernel.title: kernel.compile() for kernel in kernels},
    }
    print(json.dumps(result, indent=1))
