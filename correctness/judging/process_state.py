"""What a process holds beside the arguments of a call: random states, modes, flags. A call changes none."""

from __future__ import annotations

import contextlib
import gc
import operator
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.deterministic as torch_deterministic

from correctness.judging.finding import CheckFailed

CLOCKS = tuple(
    name + unit
    for name in ("perf_counter", "monotonic", "process_time", "thread_time", "time")
    for unit in ("", "_ns")
)
# What times and verdicts are made with. Captured when the suite is loaded, before any subject is.
_INSTRUMENTS: dict[tuple[Any, str], Any] = {
    (owner, name): getattr(owner, name)
    for owner, names in (
        (time, CLOCKS),
        (torch.Tensor, ("__eq__", "__le__", "__lt__", "abs", "amax", "max")),
        (torch, ("equal", "allclose", "isfinite", "isnan", "empty", "empty_like")),
        (torch.autograd, ("grad", "gradcheck")),
        (torch.testing, ("assert_close",)),
        (torch.cuda, ("synchronize", "Event")),
    )
    for name in names
}


@contextlib.contextmanager
def instruments_kept() -> Iterator[None]:
    """Put back, when the block ends, the clocks and comparisons that a subject may have replaced."""
    try:
        yield
    finally:
        for (owner, name), value in _INSTRUMENTS.items():
            if getattr(owner, name) is not value:
                setattr(owner, name, value)


_SEED = 2**31 + 1_234_567  # none that an implementation would use


class Setting(NamedTuple):
    """How a setting is read and written, and two values that a call is to find (none: the present one)."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    values: tuple[Any, ...] = ()


def _attribute(owner: object, name: str, values: tuple[Any, ...]) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), values)


def _torch_state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def _numpy_state(generator: Any) -> tuple:
    name, keys, *position = generator.get_state(legacy=True)
    return (name, tuple(keys.tolist()), *position)


_PRODUCTS = operator.attrgetter("cuda.matmul", "mkldnn.matmul")(torch.backends)


def _precisions() -> tuple[str, ...]:
    """Read how float32 is multiplied, by torch's newer interface: after its use the older one raises."""
    return tuple(products.fp32_precision for products in _PRODUCTS)


def _write_precisions(precisions: tuple[str, ...]) -> None:
    level = "medium" if "bf16" in precisions else "high" if "tf32" in precisions else "highest"
    torch.set_float32_matmul_precision(level)  # for those who read it by the older interface
    for products, precision in zip(_PRODUCTS, precisions, strict=True):
        products.fp32_precision = precision


def settings(dtype: torch.dtype) -> dict[str, Setting]:
    """Name all settings, for messages, of a call on tensors of ``dtype``.

    The two values of a setting differ, so that a call which writes the one is seen where it finds the other.
    """
    threads = torch.get_num_threads()
    seeds = (_SEED, _SEED + 1)
    return {
        "the random generator of torch": Setting(
            lambda: _torch_state(torch.default_generator),
            lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
            tuple(_torch_state(torch.Generator().manual_seed(seed)) for seed in seeds),
        ),
        "the random generator of Python": Setting(
            random.getstate, random.setstate, tuple(random.Random(seed).getstate() for seed in seeds)
        ),
        "the random generator of NumPy": Setting(
            lambda: _numpy_state(np.random),
            np.random.set_state,
            tuple(_numpy_state(np.random.RandomState(seed)) for seed in seeds),
        ),
        "the default dtype": Setting(
            torch.get_default_dtype, torch.set_default_dtype, (torch.float32, dtype)
        ),
        "the gradient mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
        "autocast": Setting(
            lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)
        ),
        "the dtype of autocast": Setting(
            lambda: torch.get_autocast_dtype("cpu"),
            lambda low: torch.set_autocast_dtype("cpu", low),
            (torch.bfloat16, torch.float16),
        ),
        "the cache of autocast": Setting(
            torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, (True, False)
        ),
        "the number of threads": Setting(
            torch.get_num_threads, torch.set_num_threads, (threads, 1 if threads > 1 else 2)
        ),
        "deterministic algorithms": Setting(
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
            ((False, False), (True, True)),
        ),
        "the filling of new memory": _attribute(
            torch_deterministic, "fill_uninitialized_memory", (True, False)
        ),
        "the precision of float32 products": Setting(
            _precisions, _write_precisions, (("ieee", "ieee"), ("tf32", "tf32"))
        ),
        "the use of oneDNN": Setting(
            torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, (True, False)
        ),
        "the default device": Setting(torch.get_default_device, torch.set_default_device),
        "the flushing of denormal numbers": Setting(
            lambda: float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0,
            torch.set_flush_denormal,
            (False, True),
        ),
        "cuDNN's search for kernels": _attribute(torch.backends.cudnn, "benchmark", (False, True)),
        "cuDNN's choice of deterministic kernels": _attribute(
            torch.backends.cudnn, "deterministic", (False, True)
        ),
        "anomaly detection": Setting(
            torch.is_anomaly_enabled,
            lambda on: torch.autograd.set_detect_anomaly(on, check_nan=False),
            (False, True),
        ),
        "the filters of warnings": Setting(
            lambda: list(warnings.filters), _write_warning_filters, (_filters("ignore"), _filters("default"))
        ),
        "garbage collection": Setting(
            gc.isenabled, lambda on: gc.enable() if on else gc.disable(), (True, False)
        ),
    }


def _filters(action: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter(action)  # pyright: ignore[reportArgumentType]
        return list(warnings.filters)


def _write_warning_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # tells the module that its filters change, as assigning to them would not
    warnings.filters[:] = filters  # pyright: ignore[reportIndexIssue]


@contextlib.contextmanager
def restored(all_settings: dict[str, Setting]) -> Iterator[None]:
    """Restore the settings when the block ends."""
    before = {name: setting.read() for name, setting in all_settings.items()}
    try:
        yield
    finally:
        for name, setting in all_settings.items():
            if setting.read() != before[name]:
                setting.write(before[name])


@contextlib.contextmanager
def _probed(which: int | None, all_settings: dict[str, Setting]) -> Iterator[None]:
    """Set every setting to its probe value ``which`` (None: leave it), and restore it afterwards."""
    with restored(all_settings):
        if which is not None:
            for setting in all_settings.values():
                if setting.values:
                    setting.write(setting.values[which])
        yield


def require_unchanged(function: Callable[[], object], dtype: torch.dtype, *, vary: bool = True) -> None:
    """Call a function, and raise CheckFailed with the names of the settings that it leaves changed.

    Args:
        vary: call it from two sets of settings that differ in each value; if not, from those as they are.
    """
    all_settings = settings(dtype)
    for which in (0, 1) if vary else (None,):
        with warnings.catch_warnings(record=True), _probed(which, all_settings):
            before = {name: setting.read() for name, setting in all_settings.items()}
            function()
            after = {name: setting.read() for name, setting in all_settings.items()}
        if changed := [name for name in before if after[name] != before[name]]:
            raise CheckFailed(f"a call changes {', '.join(changed)}")
