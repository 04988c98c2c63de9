"""What all verbs share: options, exit codes, and who may write where.

Results go to stdout, for a person or (`--json`) as one JSON object; everything else goes to stderr. Exit code 0: done,
or stopped when asked to; 1: it failed; 2: wrong use. Nothing heavy is imported here: `stepstream --help` is fast.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "DebugOption",
    "FormatOption",
    "JsonOption",
    "PosesOption",
    "RateHzOption",
    "SliceUsOption",
    "TimeUnitOption",
    "TopicOption",
    "WrongUse",
    "complain",
    "console",
    "duration",
    "emit_json",
    "key_values",
    "known_model",
    "number",
    "options_from",
    "progress_console",
    "slice_option",
    "sweep_options",
    "time_unit_option",
    "use_current_folder",
    "verb",
    "wrong_use_of",
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="A format, or package.module:Class.", show_default="found from the content"),
]
TimeUnitOption = Annotated[
    str | None,
    typer.Option(
        "--time-unit",
        help="Unit of the times of an edge list: s, ms, us or ns.",
        show_default="judged from the largest",
    ),
]
RateHzOption = Annotated[
    float | None,
    typer.Option("--rate-hz", help="LiDAR: sweeps a second, where there are no times.", show_default="10"),
]
PosesOption = Annotated[
    Path | None,
    typer.Option("--poses", help="LiDAR: a file with 12 numbers a row, the sweeps' poses.", show_default=False),
]
TopicOption = Annotated[
    str | None,
    typer.Option("--topic", help="Of a bag that has several.", show_default="the one with most messages"),
]
SliceUsOption = Annotated[
    int | None,
    typer.Option("--slice-us", help="Events: microseconds of a slice, 1000 to 10000.", show_default="1000"),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")]

P = ParamSpec("P")


class WrongUse(ValueError):
    """A command line that asks for what cannot be done: exit code 2."""


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Turns what a verb raises into one clear line on stderr and an exit code; `debug=True` shows the trace too."""

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            _reader_left()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", 1, debug=False)
        except Exception as error:  # noqa: BLE001 - no user's mistake may end in a stack trace
            _fail(_message(error), _exit_code(error), debug=bool(kwargs.get("debug")), error=error)

    return command


@contextlib.contextmanager
def wrong_use_of(*options: str) -> Iterator[None]:
    """What is wrong with these options is found out late, by what they are options of: it is wrong use all the same."""
    from stepstream.connectors.base import InputError

    try:
        yield
    except InputError as error:
        if any(re.search(rf"(^|\s){option}\b", str(error)) for option in options):
            raise WrongUse(str(error)) from error
        raise


def time_unit_option(unit: str | None) -> dict[str, str]:
    """`--time-unit` as an option of a reader or of `replay`."""
    if unit is None:
        return {}
    if unit not in ("s", "ms", "us", "ns"):
        raise WrongUse(f"--time-unit {unit}: expected s, ms, us or ns")
    return {"time_unit": unit}


def sweep_options(rate_hz: float | None, poses: Path | None, topic: str | None) -> dict[str, Any]:
    """`--rate-hz`, `--poses` and `--topic`, those that are given, as options of a reader or of `replay`."""
    if rate_hz is not None and not 0 < rate_hz <= 10_000:
        raise WrongUse(f"--rate-hz {rate_hz:g}: expected a number above 0, at most 10000")
    given = {"rate_hz": rate_hz, "poses": None if poses is None else str(poses), "topic": topic}
    return {name: value for name, value in given.items() if value is not None}


def slice_option(slice_us: int | None) -> dict[str, int]:
    """`--slice-us` as an option of a reader or of `replay`."""
    if slice_us is None:
        return {}
    if not 1000 <= slice_us <= 10_000:
        raise WrongUse(f"--slice-us {slice_us}: expected 1000 to 10000")
    return {"slice_us": slice_us}


def _reader_left() -> NoReturn:
    """Whoever read our stdout has seen enough (`| head`): not a failure, and nothing more can be said there."""
    _give_up_stdout()
    raise typer.Exit(0)


def _give_up_stdout() -> None:
    """What is still in stdout's buffer goes nowhere: the interpreter would complain that it cannot flush it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(error: Exception) -> int:
    from stepstream.pipeline.registry import NameProblem
    from stepstream.pipeline.tree import ConfigError

    return 2 if isinstance(error, ConfigError | NameProblem | WrongUse) else 1


def _message(error: Exception) -> str:
    """What a user is told. Errors made for users say it themselves; the rest is named as what it is: our fault."""
    from stepstream.connectors.base import InputError
    from stepstream.connectors.output import OutputError
    from stepstream.pipeline.registry import NameProblem
    from stepstream.pipeline.task import OperatorError
    from stepstream.pipeline.tree import ConfigError

    if isinstance(error, ConfigError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, InputError | NameProblem | OperatorError | OutputError | WrongUse) or _is_weights_error(error):
        return text
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or (None if _stdout_works() else "cannot write standard output")
        return f"{where}: {error.strerror}" if where else error.strerror
    return f"{type(error).__name__}: {text or 'no message'} (run again with --debug for the stack trace)"


def _stdout_works() -> bool:
    """Whether stdout takes what is still in its buffer: it stays there where it could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _is_weights_error(error: Exception) -> bool:
    # If it is one, its module was imported to raise it; importing it to ask would import torch.
    module = sys.modules.get("stepstream.models.weights")
    return module is not None and isinstance(error, module.WeightsError)


def _fail(message: str, code: int, *, debug: bool, error: Exception | None = None) -> NoReturn:
    if debug and error is not None:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    complain(message)
    if not _stdout_works():
        _give_up_stdout()
    raise typer.Exit(code)


def complain(message: str) -> None:
    """Writes `error: ...` on stderr, one line for each line of the message."""
    for line in message.splitlines() or [""]:
        typer.echo(f"error: {line}", err=True)


def emit_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of a `--json` run. NaN and infinity, which JSON does not have, become null."""
    typer.echo(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def console(*, stderr: bool = False) -> Console:
    """Where text for a person goes. Not a terminal: no colours, and wide enough that tables stay whole."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 140, highlight=False, soft_wrap=False)


def progress_console() -> Console | None:
    """The console for a progress bar, or None if stderr is not a terminal."""
    return console(stderr=True) if sys.stderr.isatty() else None


def key_values(rows: Mapping[str, Any], title: str | None = None) -> Table:
    """A table of two columns without lines: what, and how much."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.title = title
    table.title_justify = "left"
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value if isinstance(value, str) else number(value))
    return table


def number(value: Any) -> str:
    """A value for a person: thousands separated, four significant digits, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        if not value:
            return "-"
        return ", ".join(number(item) for item in value)
    return str(value)


def duration(seconds: float) -> str:
    """`75` as `1 min 15 s`, `0.0123` as `12 ms`."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


def options_from(settings: Sequence[str]) -> dict[str, Any]:
    """`["lr=0.01", "heads=[1, 2]"]` as a dict; values are YAML. Raises WrongUse."""
    from stepstream.pipeline.yamlfile import YamlProblem, value

    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise WrongUse(f"--set {setting!r}: expected KEY=VALUE")
        try:
            options[key.strip()] = value(text)
        except YamlProblem as error:
            raise WrongUse(f"--set {setting!r}: the value is {error}") from error
    return options


def known_model(name: str, also: Collection[str] = ()) -> None:
    """Raises WrongUse, with a suggestion, if no model or baseline has that name and it is none of `also`."""
    if name in also:
        return
    from stepstream.models.registry import model_class
    from stepstream.models.weights import WeightsError

    use_current_folder()
    try:
        model_class(name)
    except WeightsError as error:
        raise WrongUse(str(error)) from error


def use_current_folder() -> None:
    """Lets a pipeline file name `my_module:Name` of the folder we are in, as a script there could; last on the path."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
