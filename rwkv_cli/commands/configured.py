"""The settings of config.toml as defaults of options, and where each value of a command comes from."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from rwkv_cli.engine import preferences
from rwkv_cli.errors import PreferencesError

_PRESETS = "presets"
"""The table of settings that a model brings along."""


class Defaults(dict[str, Any]):
    """The values that Click takes for the options of a command that are not given, by the names of their parameters.

    Those of the commands in a group are made when they are asked for, so that no other command is loaded.
    """

    def __init__(self, child: Callable[[str], Defaults | None] = lambda _: None) -> None:
        super().__init__()
        self._child = child
        self.keys_in_file: dict[str, str] = {}
        """The key in the file that each value is from."""
        self.presets: dict[str, dict[str, Any]] = {}
        """The presets of models. The defaults of `rwkv` itself have them."""

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the defaults of a command with this name."""
        if name not in self and (found := self._child(name)) is not None:
            self[name] = found
        return super().get(name, default)

    def take(self, param: click.Parameter, key: str, value: Any) -> None:
        """Have the value that the file has under this key. Raises PreferencesError for one of a wrong kind."""
        name = param.name or ""
        self[name], self.keys_in_file[name] = _value(param, key, value), key


def read_defaults(ctx: click.Context) -> Defaults:
    """Read the file as defaults of all commands. Raises PreferencesError for a key that no option has."""
    data = preferences.read()
    if not data:
        return Defaults()
    presets = data.pop(_PRESETS, {})
    shared = {key: value for key, value in data.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in data.items() if isinstance(value, dict)}
    for key in shared:
        _check_some_option(ctx, key, key)
    found = _defaults(ctx.command, ctx, shared, tables, "")
    if not isinstance(presets, dict) or not all(isinstance(preset, dict) for preset in presets.values()):
        raise _wrong(_PRESETS, f'holds tables only, each with the beginning of a name: [{_PRESETS}."rwkv7-g1a"]')
    for name, preset in presets.items():
        for key, value in preset.items():
            if isinstance(value, dict):
                raise _wrong(f"{_PRESETS}.{name}.{key}", "is a table; a name with a dot stands in quotes")
            _check_some_option(ctx, key, f"{_PRESETS}.{name}.{key}")
    found.presets = presets
    return found


def apply_preset(ctx: click.Context, name: str) -> None:
    """Have the options of this command take what the presets of a model say, if they are not given."""
    root = ctx.find_root().default_map
    if not isinstance(root, Defaults) or not root.presets:
        return
    own = Defaults()
    if isinstance(ctx.default_map, Defaults):
        own.update(ctx.default_map)
        own.keys_in_file.update(ctx.default_map.keys_in_file)
    known = options(ctx.command)
    for key, (preset, value) in preferences.presets_for(root.presets, name).items():
        if _spelt(key) in known:
            own.take(known[_spelt(key)], f"{_PRESETS}.{preset}.{key}", value)
    ctx.default_map = own


def options(command: click.Command) -> dict[str, click.Parameter]:
    """List what the file can set for a command, by its long name without dashes: its options, and its model."""
    found = [param for param in command.params if isinstance(param, click.Option) or param.name == "model"]
    return {max(param.opts, key=len).lstrip("-"): param for param in found if param.expose_value}


def parsed(command: click.Command, name: str, parent: click.Context, args: Sequence[str] = ()) -> click.Context:
    """Parse a command line as the command would, but for its arguments. It is not run."""
    bare = click.Command(
        name, {"allow_extra_args": True}, params=list(options(command).values()), add_help_option=False
    )
    return bare.make_context(name, list(args), parent)


def from_file(name: str, args: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the file sets for a command of `rwkv` with these arguments, by the names of its parameters."""
    root = click.get_current_context().find_root()
    assert isinstance(root.command, click.Group)
    command = root.command.get_command(root, name)
    assert command is not None
    ctx = parsed(command, name, root, args)
    given = (param for param in options(command).values() if origin(ctx, param)[0] == "file")
    return {param.name or "": ctx.params[param.name or ""] for param in given}


def leaves(ctx: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield every command that is no group, with its name and the context of the group that it is in."""
    for name, child in _children(ctx.command, ctx):
        if isinstance(child, click.Group):
            yield from leaves(click.Context(child, ctx, name))
        else:
            yield name, child, ctx


def origin(ctx: click.Context, param: click.Parameter) -> tuple[str, str]:
    """Say where the value of a parameter comes from, and what names it there."""
    name = param.name or ""
    source = ctx.get_parameter_source(name)
    if source is ParameterSource.COMMANDLINE:
        return "command line", ""
    if source is ParameterSource.ENVIRONMENT:
        return "environment", f"${param.envvar}"
    if source is ParameterSource.DEFAULT_MAP and isinstance(ctx.default_map, Defaults):
        return "file", ctx.default_map.keys_in_file[name]
    return "default", ""


def worded(error: click.UsageError) -> str | None:
    """Return the sentence for a value that the file has and that the option refuses, or None for another error."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return None
    source, key = origin(error.ctx, error.param)
    return str(_wrong(key, error.message)) if source == "file" else None


def _defaults(
    command: click.Command, ctx: click.Context, shared: Mapping[str, Any], table: Mapping[str, Any], where: str
) -> Defaults:
    """Collect the defaults of a command: those that all share, and those of its own table."""
    children = command.list_commands(ctx) if isinstance(command, click.Group) else []

    def child(name: str) -> Defaults | None:
        """Collect the defaults of a command in this one."""
        inner = command.get_command(ctx, name) if isinstance(command, click.Group) else None
        return None if inner is None else _defaults(inner, ctx, shared, table.get(name, {}), f"{where}{name}.")

    found, known = Defaults(child), options(command)
    for key, value in shared.items():
        if _spelt(key) in known:
            found.take(known[_spelt(key)], key, value)
    for key, value in table.items():
        if key in children and isinstance(value, dict):
            continue
        if isinstance(value, dict) and not where:
            raise _wrong(key, f"is no command{_near(key, [*children, _PRESETS])}")
        _check_known(key, f"{where}{key}", [*known])
        found.take(known[_spelt(key)], f"{where}{key}", value)
    return found


def _children(
    command: click.Command, ctx: click.Context, only: str | None = None
) -> Iterator[tuple[str, click.Command]]:
    """Yield the commands of a group with their names, each loaded when its turn comes; or only the one of a name."""
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name) if only in (None, name) else None
            if child is not None:
                yield name, child


def _all_commands(command: click.Command, ctx: click.Context) -> Iterator[click.Command]:
    """Yield a command and all in it."""
    yield command
    for _, child in _children(command, ctx):
        yield from _all_commands(child, ctx)


def _check_some_option(ctx: click.Context, key: str, where: str) -> None:
    """Refuse a key that no command has as an option. The running command is asked first, as it is loaded already."""
    running = _children(ctx.command, ctx, only=ctx.invoked_subcommand)
    if not any(_spelt(key) in options(inner) for _, command in running for inner in _all_commands(command, ctx)):
        known: list[str] = []
        for command in _all_commands(ctx.command, ctx):
            known += options(command)
            if _spelt(key) in known:
                return
        _check_known(key, where, known)


def _spelt(key: str) -> str:
    """Return a key as options are spelt: the file may have max_tokens, too."""
    return key.replace("_", "-")


def _check_known(key: str, where: str, known: Sequence[str]) -> None:
    """Refuse a key that is none of the known ones."""
    if _spelt(key) not in known:
        raise _wrong(where, f"is no option here{_near(key, known)}")


def _near(key: str, known: Sequence[str]) -> str:
    """Name the nearest of the known keys."""
    near = difflib.get_close_matches(_spelt(key), known, 1)
    return f"; did you mean {near[0]}?" if near else "; rwkv COMMAND --help lists them"


def _wrong(key: str, why: str) -> PreferencesError:
    """Make the error for a key of the file."""
    return PreferencesError(f"{preferences.file()}: {key}: {why}")


def _value(param: click.Parameter, key: str, value: Any) -> Any:
    """Return a value of the file as the option takes it. It has to be of the kind that the option's value is of."""
    if param.multiple:
        return [_one(param, key, each) for each in (value if isinstance(value, list) else [value])]
    return _one(param, key, value)


def _one(param: click.Parameter, key: str, value: Any) -> Any:
    """Check one value."""
    kinds: tuple[type, ...] = (str,)
    wanted = 'text in quotes: "…"'
    if isinstance(param, click.Option) and param.is_flag:
        kinds, wanted = (bool,), "true or false"
    elif isinstance(param.type, click.types.IntParamType):
        kinds, wanted = (int,), "a whole number"
    elif isinstance(param.type, click.types.FloatParamType):
        kinds, wanted = (int, float), "a number"
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _wrong(key, f"has to be {wanted}")
    if isinstance(value, str):
        if "\0" in value:
            raise _wrong(key, "holds a NUL character; leave it out")
        if value.startswith("~") and (isinstance(param.type, click.Path) or param.name in ("model", "compare")):
            return str(Path(value).expanduser())
    return value
