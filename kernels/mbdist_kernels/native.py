"""Builds and binds native.cpp, the optional CPU accelerator; everything works without it, only slower.

It is compiled once a machine (a few seconds, ``torch.utils.cpp_extension``) and used for contiguous CPU tensors.
``MBDIST_NATIVE=0`` turns it off; without a compiler one warning says so and the torch versions serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from mbdist_kernels.accumulator import weights_per_entry
from mbdist_kernels.layout import words_per_row

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffp-contract=off",
    "-fopenmp",
    "-fno-math-errno",
]
_MAX_PLANES = 8
_BLOCK_WORDS = 64  # counted together in the search for candidates: most blocks hold none
_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)


class _Planes(ctypes.Structure):
    _fields_ = [
        ("words", ctypes.c_void_p * _MAX_PLANES),
        ("scale_out", ctypes.c_void_p),
        ("scale_in", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "out_stride", "rows", "columns", "words_per_row")),
    ]


_SIGNAL_FIELDS = ("row_factor", "column_factor", "values", "words", "magnitudes")


class _Signals(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p * _MAX_PLANES) for name in _SIGNAL_FIELDS),
        ("count", ctypes.c_int64),
    ]


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _openmp_flags() -> list[str]:
    """Link the OpenMP runtime that torch brings: a second one in the process would fight it for the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    bundled += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    return [str(bundled[0]), f"-Wl,-rpath,{bundled[0].parent}"] if bundled else ["-fopenmp"]


@functools.cache
def accelerator() -> Any:
    """The compiled accelerator (a ``ctypes.CDLL``), or None where it is switched off or cannot be built."""
    if os.environ.get("MBDIST_NATIVE", "1") == "0":
        return None
    built_from = _SOURCE.read_bytes() + " ".join([*_FLAGS, *_openmp_flags(), _processor()]).encode()
    name = "mbdist_native_" + hashlib.sha256(built_from).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbdist"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not (home / f"{name}.so").exists():
            _build(name, home)
        return ctypes.CDLL(str(home / f"{name}.so"))
    except (OSError, RuntimeError, ImportError) as error:
        _log.warning(
            "mbdist: the CPU accelerator could not be built (%s); the slower torch versions are used. "
            "Install g++ and ninja, or set MBDIST_NATIVE=0 to silence this.",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        return None


def _build(name: str, home: Path) -> None:
    """Compile in a folder of this process's own and rename into place. torch's shared build folder is guarded by a lock
    file, which a killed process leaves behind and every later one waits for; ranks that build at once do no harm."""
    from torch.utils import cpp_extension

    # ninja is installed beside this Python, which need not be on the PATH.
    beside = f"{Path(sys.executable).parent}{os.pathsep}"
    if not os.environ["PATH"].startswith(beside):
        os.environ["PATH"] = beside + os.environ["PATH"]
    with tempfile.TemporaryDirectory(dir=home) as folder:
        cpp_extension.load(
            name=name,
            sources=[str(_SOURCE)],
            extra_cflags=_FLAGS,
            extra_ldflags=_openmp_flags(),
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / f"{name}.so", home / f"{name}.so")


def serves(*tensors: torch.Tensor) -> bool:
    """True where the accelerator is at hand and takes these tensors: on the CPU, rows contiguous, of these dtypes."""
    for tensor in tensors:
        if isinstance(tensor, FakeTensor):  # has sizes, no memory: a plan counts it
            return False
        if tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            return False
        if tensor.stride(-1) != 1 or (tensor.dtype == torch.bfloat16 and not tensor.is_contiguous()):
            return False
    return accelerator() is not None


def takes_scales(*scales: torch.Tensor) -> bool:
    """The accelerator computes with fp32 scales alone (a model cast to bf16 has others)."""
    return all(scale.dtype == torch.float32 for scale in scales)


def takes_levels(weight: torch.Tensor, scale_out: torch.Tensor, scale_in: torch.Tensor) -> bool:
    """Levels of up to 8 planes, for fp32 weights that are contiguous."""
    fits = weight.dtype == torch.float32 and weight.is_contiguous() and len(scale_in) <= _MAX_PLANES
    return fits and takes_scales(scale_out, scale_in)


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _describe(
    planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor
) -> tuple[_Planes, list[torch.Tensor]]:
    """The C view of K planes and their scales, and the tensors that must live as long as it."""
    planes = [plane.contiguous() for plane in planes]
    scale_in = scale_in.contiguous()
    if scale_out.stride(1) != 1:
        scale_out = scale_out.contiguous()
    if not 1 <= len(planes) <= _MAX_PLANES:
        raise ValueError(f"the CPU accelerator takes 1 to {_MAX_PLANES} planes, not {len(planes)}")
    words = (ctypes.c_void_p * _MAX_PLANES)(*(plane.data_ptr() for plane in planes))
    view = _Planes(
        words,
        scale_out.data_ptr(),
        scale_in.data_ptr(),
        len(planes),
        scale_out.stride(0),
        scale_out.shape[1],
        scale_in.shape[1],
        planes[0].shape[1],
    )
    return view, [*planes, scale_out, scale_in]


def dequantize(planes, scale_out, scale_in, out) -> None:
    view, _alive = _describe(planes, scale_out, scale_in)
    accelerator().mbdist_dequantize(
        ctypes.byref(view), _pointer(out), ctypes.c_int(out.dtype == torch.bfloat16), torch.get_num_threads()
    )


def pack_signs(values, sums=None) -> torch.Tensor:
    """Of fp32 or bf16; ``sums`` of magnitudes are written where given."""
    values = values.contiguous()
    words = torch.empty(len(values), words_per_row(values.shape[1]), dtype=torch.int32)
    accelerator().mbdist_pack_signs(
        _pointer(values),
        ctypes.c_int(values.dtype == torch.bfloat16),
        *map(ctypes.c_int64, values.shape),
        *map(_pointer, (words, sums)),
        torch.get_num_threads(),
    )
    return words


def scale_gradients_and_signals(gradient, planes, scale_out, scale_in, grad_scale_out, grad_scale_in, signals) -> None:
    view, _alive = _describe(planes, scale_out, scale_in)
    targets = _Signals(count=len(signals))
    for i, signal in enumerate(signals):
        for name, tensor in zip(_SIGNAL_FIELDS, signal, strict=True):
            getattr(targets, name)[i] = 0 if tensor is None else tensor.data_ptr()
    gradient = gradient.contiguous()
    accelerator().mbdist_scale_gradients_and_signals(
        ctypes.byref(view),
        _pointer(gradient),
        ctypes.c_int(gradient.dtype == torch.bfloat16),
        _pointer(grad_scale_out),
        ctypes.c_int64(grad_scale_out.stride(0)),
        _pointer(grad_scale_in),
        ctypes.byref(targets),
        torch.get_num_threads(),
    )


def linear_decode(x, weights) -> torch.Tensor:
    views, _alive = zip(*(_describe(*weight) for weight in weights), strict=True)
    x = x.contiguous()
    y = torch.empty(len(x), sum(view.rows for view in views))
    accelerator().mbdist_linear_decode(
        (_Planes * len(views))(*views),
        ctypes.c_int64(len(views)),
        _pointer(x),
        ctypes.c_int64(len(x)),
        _pointer(y),
        torch.get_num_threads(),
    )
    return y


def column_square_sums(values) -> torch.Tensor:
    values = values.contiguous()
    sums = torch.empty(values.shape[1], dtype=torch.float64)
    accelerator().mbdist_column_square_sums(
        _pointer(values),
        ctypes.c_int(values.dtype == torch.bfloat16),
        *map(ctypes.c_int64, values.shape),
        _pointer(sums),
        torch.get_num_threads(),
    )
    return sums


def accumulate_signal(accumulator, signals, beta_q15, limit_q, keys, first_element, unit, bound) -> None:
    signals = signals.contiguous()
    accelerator().mbdist_accumulate_signal(
        _pointer(accumulator),
        ctypes.c_int(accumulator.dtype == torch.uint8),
        _pointer(signals),
        *map(ctypes.c_int64, signals.shape),
        ctypes.c_int32(beta_q15),
        ctypes.c_int32(limit_q),
        (ctypes.c_uint32 * len(keys))(*keys),
        ctypes.c_int64(first_element),
        ctypes.c_float(unit),
        ctypes.c_int32(bound),
        torch.get_num_threads(),
    )


def encode_rows(values, bits, inverse_of_most) -> tuple[torch.Tensor, torch.Tensor]:
    words, sizes = torch.empty(len(values), values.shape[1] * bits // 32, dtype=torch.int32), torch.empty(len(values))
    accelerator().mbdist_encode_rows(
        _pointer(values),
        *map(ctypes.c_int64, (len(values), values.shape[1] // 32)),
        ctypes.c_int(bits),
        ctypes.c_float(inverse_of_most),
        *map(_pointer, (words, sizes)),
        torch.get_num_threads(),
    )
    return words, sizes


def draw_signs(values, key) -> tuple[torch.Tensor, torch.Tensor]:
    words, sizes = torch.empty(len(values), values.shape[1] // 32, dtype=torch.int32), torch.empty(len(values))
    accelerator().mbdist_draw_signs(
        _pointer(values),
        *map(ctypes.c_int64, words.shape),
        ctypes.c_uint32(key),
        *map(_pointer, (words, sizes)),
        torch.get_num_threads(),
    )
    return words, sizes


def decode_rows(words, sizes, columns, bits, out) -> None:
    accelerator().mbdist_decode_rows(
        *map(_pointer, (words, sizes, columns)),
        *map(ctypes.c_int64, (len(words), len(columns) // 32)),
        ctypes.c_int(bits),
        _pointer(out),
        torch.get_num_threads(),
    )


def find_candidates(accumulator, words, threshold) -> tuple[torch.Tensor, torch.Tensor]:
    num_words = accumulator.numel() * weights_per_entry(accumulator.dtype) // 32
    places = torch.zeros(-(-num_words // _BLOCK_WORDS) + 1, dtype=torch.int64)  # counts, then where each block starts

    def search(found: torch.Tensor | None, values: torch.Tensor | None) -> None:
        accelerator().mbdist_find_candidates(
            _pointer(accumulator),
            ctypes.c_int(accumulator.dtype == torch.uint8),
            _pointer(words),
            ctypes.c_int64(num_words),
            ctypes.c_int64(_BLOCK_WORDS),
            ctypes.c_int(threshold),
            *map(_pointer, (places, found, values)),
            torch.get_num_threads(),
        )

    search(None, None)
    places = places.cumsum(0).roll(1)
    count, places[0] = int(places[0]), 0
    found, values = torch.empty(count, dtype=torch.int32), torch.empty(count, dtype=torch.int8)
    if count:
        search(found, values)
    return found, values


def nearest_levels(weight, scale_out, scale_in) -> torch.Tensor:
    scale_out, scale_in = scale_out.contiguous(), scale_in.contiguous()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    accelerator().mbdist_nearest_levels(
        _pointer(weight),
        *map(ctypes.c_int64, weight.shape),
        _pointer(scale_out),
        _pointer(scale_in),
        ctypes.c_int64(len(scale_in)),
        _pointer(codes),
        torch.get_num_threads(),
    )
    return codes


def feed_errors_forward(columns, scale_out, scale_in, upper) -> tuple[torch.Tensor, torch.Tensor]:
    scale_out, scale_in, upper = scale_out.contiguous(), scale_in.contiguous(), upper.contiguous()
    codes, errors = torch.empty(columns.shape, dtype=torch.uint8), torch.empty_like(columns)
    accelerator().mbdist_feed_errors_forward(
        _pointer(columns),
        *map(ctypes.c_int64, columns.shape),
        _pointer(scale_out),
        _pointer(scale_in),
        ctypes.c_int64(len(scale_in)),
        _pointer(upper),
        _pointer(codes),
        _pointer(errors),
        torch.get_num_threads(),
    )
    return codes, errors
