"""A check, and how it ends."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import PluginError, described, is_failure

_ENGINE = f"{__name__.rpartition('.testing')[0]}."
_LIBRARIES = {"accelerate", "diffusers", "numpy", "peft", "PIL", "pyarrow", "pydantic", "torch", "transformers"}


class ConformanceError(AssertionError):
    """A plugin breaks its contract: what was expected, what was found, and how to mend it."""


class NotApplicable(Exception):
    """A check does not apply to this plugin; with the reason."""


@dataclass(frozen=True)
class Check:
    """One promise of a registered class.

    Attributes:
        subject: The class, as ``method lcm``.
        name: A few words.
        function: Raises ConformanceError or NotApplicable.
    """

    subject: str
    name: str
    function: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.subject}: {self.name}"

    def run(self) -> None:
        """Run the check.

        Raises:
            ConformanceError: The class breaks its contract; with the reason.
            NotApplicable: The check does not apply to this class; with the reason.
        """
        self.function()


@dataclass(frozen=True)
class Subject:
    """A class under test.

    Attributes:
        cls: The class.
        kind: The kind of plugin.
        example: Replaces the class's own ``example``, or None. For kinds without one: a function without arguments that
            returns settings.
    """

    cls: type[Any]
    kind: str
    example: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')} {getattr(self.cls, 'name', self.cls.__name__)}"

    def own_example(self, *args: Any) -> Any:
        """Return the result of the given example, or else of the class's own."""
        return (self.example or self.cls.example)(*args)

    def config(self) -> Any:
        """Return settings to try it with, the example's or the defaults. Raises NotApplicable without either."""
        has_example = self.example is not None or hasattr(self.cls, "example")
        given: Mapping[str, Any] = self.own_example() if has_example else {}
        try:
            return self.cls.Config(**given)
        except ValidationError as error:
            missing = [str(item["loc"][0]) for item in error.errors() if item["type"] == "missing" and item["loc"]]
            if given or not missing:
                raise ConformanceError(
                    f"Config does not accept {dict(given) or 'its own defaults'}: {error}"
                ) from error
            raise NotApplicable(
                f"Config needs {', '.join(missing)}, which only you know: in a test of your own, "
                "checks_of(cls, example=lambda: {...}) gives settings"
            ) from error

    def need_packages(self) -> None:
        """Raise NotApplicable where a package that it declares is not installed."""
        from ..utils.packages import missing_packages

        missing = missing_packages(getattr(self.cls, "packages", {}))
        if missing:
            raise NotApplicable(missing)


def expect(condition: object, problem: str, remedy: str) -> None:
    """Raise ConformanceError unless the condition holds."""
    if not condition:
        raise ConformanceError(f"{problem}; {remedy}")


@contextmanager
def failing(what: str, remedy: str) -> Iterator[None]:
    """Turn any exception of the plugin inside the block into a ConformanceError."""
    try:
        yield
    except (ConformanceError, NotApplicable):
        raise
    except PluginError as error:  # the engine has said already what is wrong, and how to mend it
        raise ConformanceError(str(error)) from error
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ConformanceError(f"{what} raised {said(error)}; {remedy}") from error


def said(error: BaseException) -> str:
    """Return an exception's text and the last line of the plugin's code that led to it, or else the last line."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [each for each in frames if not _foreign(str(each[0].f_globals.get("__name__", "")))]
    frame, line = (own or frames)[-1]
    code = frame.f_code
    return f"{described(error)} ({Path(code.co_filename).name}, line {line}, in {code.co_name})"


def _foreign(module: str) -> bool:
    """Return True if a module belongs to the engine or a library."""
    top = module.partition(".")[0]
    return module.startswith(_ENGINE) or top in _LIBRARIES or top in sys.stdlib_module_names


def containers(cls: type[Any]) -> dict[str, Any]:
    """Return copies of the lists, dicts and sets that the class itself holds, by attribute."""
    plain = {name: value for name, value in vars(cls).items() if isinstance(value, list | dict | set)}
    return {name: copy.deepcopy(value) for name, value in plain.items() if not name.startswith("__")}
