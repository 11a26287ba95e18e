"""Calls into plugins: whose fault a failure is, and what is called when (``DISTILL_TRACE``)."""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import pluggy

from ..errors import DistillError, PluginError, described, is_failure
from ..plugin_api import hookspecs
from ..utils.redaction import redacted

TRACE = "DISTILL_TRACE"
"""Environment variable: 1 prints every call of a hook to stderr."""
MARKER = f"{hookspecs.PROJECT}_impl"
_OFF = {"", "0", "false", "no", "off"}
_WIDTH = 60
_owners: dict[str, str] = {}
"""Module of a plugin that is not built in, and the package around it -> how messages name the plugin."""


# -- whose fault ------------------------------------------------------------------------------------------------------


def register_owner(module: str, label: str) -> None:
    """Remember that the code of `module` is that of the plugin `label`, and so is the package around it.

    Of several plugins in one package each has its module; what they share goes by the name of the last.
    """
    _owners[module.partition(".")[0]] = _owners[module] = label


def owner(module: str) -> str | None:
    """How messages name the plugin whose code `module` is; None for what is built in."""
    return _owners.get(module, _owners.get(module.partition(".")[0]))


def attribute_error(error: BaseException) -> PluginError | None:
    """The failure of a plugin's own code with the plugin's name; None where none of its code was running.

    A component's methods are called from everywhere, so that it is the traceback that tells: the deepest frame that is
    a plugin's. That the device's memory is used up is nobody's fault.
    """
    place = place_in_plugin(error)
    if place is None or _device_is_full(error):
        return None
    return PluginError(f"{place}: {described(error)}")


def place_in_plugin(error: BaseException) -> str | None:
    """Return which plugin failed and where, by the frames of an error or of what it came from; None for no plugin."""
    cause: BaseException | None = error
    while cause is not None and _deepest(cause.__traceback__) is None:
        cause = cause.__cause__  # as of the RuntimeError that a StopIteration in a generator becomes
    frame = _deepest(cause.__traceback__) if cause is not None else None
    if cause is None or frame is None:
        return None
    code, label = frame.tb_frame.f_code, owner(_module(_deepest(cause.__traceback__, exact=True) or frame))
    return f"{label} failed in {code.co_qualname} ({Path(code.co_filename).name}, line {frame.tb_lineno})"


def _device_is_full(error: BaseException) -> bool:
    from ..utils.memory import is_out_of_memory

    return not isinstance(error, MemoryError) and is_out_of_memory(error)


def _deepest(frame: TracebackType | None, *, exact: bool = False) -> TracebackType | None:
    """The deepest frame of a plugin, or of a plugin's own module rather than one beside it."""
    found = None
    while frame is not None:
        if _module(frame) in _owners or (not exact and owner(_module(frame))):
            found = frame
        frame = frame.tb_next
    return found


def _module(frame: TracebackType) -> str:
    return str(frame.tb_frame.f_globals.get("__name__", ""))


def plugin_traceback(error: BaseException) -> str:
    """The traceback of `error` from the first frame that is a plugin's; all of it where there is none."""
    if isinstance(error, SystemExit | GeneratorExit):  # the line says where, and nothing else went wrong
        return ""
    first = error.__traceback__
    while first is not None and owner(_module(first)) is None:
        first = first.tb_next
    return redacted("".join(traceback.format_exception(type(error), error, first or error.__traceback__)))


def attributed_hooks(plugin: object, label: str) -> SimpleNamespace:
    """The hook implementations of `plugin`, each reporting its failures with the plugin's name."""
    found = {name: getattr(plugin, name) for name in dir(plugin) if hasattr(getattr(plugin, name, None), MARKER)}
    result = SimpleNamespace()
    for name, function in found.items():
        options = getattr(function, MARKER)
        wraps = options.get("wrapper") or options.get("hookwrapper")
        attributed = _attributed_wrapper if wraps else _attributed
        setattr(result, name, attributed(function, label, options.get("specname") or name))
    return result


def _attributed(function: Callable[..., Any], label: str, hook: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            _trace_end(label, hook, start, f"raised {described(error)}")
            if isinstance(error, DistillError) or not is_failure(error):
                raise
            raise PluginError(f"{label} failed in {hook}: {described(error)}") from error
        _trace_end(label, hook, start, f"returned {short(result)}")
        return result

    return call


def _attributed_wrapper(function: Callable[..., Any], label: str, hook: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return (yield from function(*args, **kwargs))
        except (DistillError, GeneratorExit):  # of what it wraps, too: all others have a name by then
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            raise PluginError(f"{label} failed in {hook}: {described(error)}") from error
        finally:
            _trace_end(label, hook, start, "ended, around the others")

    return call


# -- what is called ---------------------------------------------------------------------------------------------------


def tracing() -> bool:
    """Return whether ``DISTILL_TRACE`` asks for every call of a hook."""
    return os.environ.get(TRACE, "").strip().lower() not in _OFF


def trace_line(line: str) -> None:
    """A line of the trace, where it is on."""
    if tracing():
        print(redacted(f"trace: {line}"), file=sys.stderr, flush=True)


def trace(manager: pluggy.PluginManager) -> None:
    """Say every call of a hook before it happens, also where no plugin listens."""

    def before(hook: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        given = ", ".join(f"{name}={short(value)}" for name, value in arguments.items())
        trace_line(f"{hook}({given}){'' if implementations else ': no plugin listens'}")

    def after(*_: Any) -> None: ...

    if tracing():
        manager.add_hookcall_monitoring(before, after)


def _trace_end(label: str, hook: str, start: float, what: str) -> None:
    if tracing():
        trace_line(f"  {hook} of {label} {what} in {1000 * (time.perf_counter() - start):.1f} ms")


def short(value: object) -> str:
    """A value in at most 60 characters; of what is no plain value, its type alone (tensors would be read)."""
    if isinstance(value, type):
        text = value.__name__
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {short(each)}" for key, each in list(value.items())[:8]) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(short, value[:8])) + "]"
    elif value is None or isinstance(value, str | int | float | Path | BaseException):
        text = str(value) if isinstance(value, Path) else repr(value)
    else:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
