"""``migrate`` and ``migrate-agent``: the list of commands, and what an error looks like.

A command's module is imported when the command is used, so that ``--help`` is quick and
a part that can't be imported breaks nothing but itself.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import click

from migrate.cli.settings import Settings, add_shared_options, configure_logging, shared_options
from migrate.errors import Interrupted, MigrateError, UsageError

# 128 + SIGPIPE, what a shell reports of `migrate ps | head -1` for other programs.
BROKEN_PIPE = 141


class Entry(NamedTuple):
    """Where a command is (``module:name``), and its line in ``migrate --help``."""

    target: str
    help: str


# In the order of --help. A command is a click.Command; it gets --inventory, --json and -v
# by itself. scenarios is named here, never imported: a layer may not use one above it.
COMMANDS: dict[str, Entry] = {
    "run": Entry("migrate.cli.run:run_command", "Move a running process to another host."),
    "check": Entry("migrate.cli.check:check_command", "Say whether a process can be moved."),
    "checkpoint": Entry(
        "migrate.cli.image:checkpoint_command", "Put a running process into a directory."
    ),
    "restore": Entry("migrate.cli.image:restore_command", "Start a process from a directory."),
    "hosts": Entry("migrate.cli.hosts:hosts_command", "List the hosts and their agents."),
    "ps": Entry("migrate.cli.ps:ps_command", "List a host's GPU processes."),
    "drain": Entry("migrate.cli.drain:drain_command", "Move every GPU process off a host."),
    "history": Entry("migrate.cli.history:history_command", "List past migrations."),
    "show": Entry("migrate.cli.show:show_command", "Show the report of a migration."),
    "watch": Entry("migrate.cli.watch:watch_command", "Follow a migration."),
    "abort": Entry("migrate.cli.abort:abort_command", "Cancel a migration."),
    "recover": Entry("migrate.cli.recover:recover_command", "Have an agent go on, now."),
    "resolve": Entry("migrate.cli.resolve:resolve_command", "Decide an owner nobody can name."),
    "map": Entry("migrate.cli.map:map_command", "Show which GPU would go where, and why."),
    "doctor": Entry("migrate.cli.doctor:doctor_command", "Say what of this machine is in the way."),
    "demo": Entry("migrate.cli.demo:demo_command", "Move a process between two simulated hosts."),
    "drill": Entry("migrate.cli.drill:drill_command", "Hurt agents and see who owns the process."),
    "ca": Entry("migrate.cli.ca:ca_command", "Make certificates for agents and people."),
    "agent": Entry("migrate.cli.agent:agent_command", "The daemon of a host."),
}


class LazyGroup(click.Group):
    """A group that imports a command of *entries* when it is used."""

    def __init__(self, entries: Mapping[str, Entry], help: str, epilog: str) -> None:
        super().__init__(
            params=list[click.Parameter](shared_options()),
            context_settings={"help_option_names": ["-h", "--help"]},
            help=help,
            epilog=epilog,
        )
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; UsageError if its module can't be imported."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        if cmd_name not in self.commands:
            command = load(cmd_name, entry)
            add_shared_options(command)
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of --help, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])


def load(name: str, entry: Entry) -> click.Command:
    """Import a command. Raises UsageError if a part of the installation is missing."""
    module, _, attribute = entry.target.partition(":")
    try:
        command = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"`migrate {name}` is not part of this installation: there is no module {error.name}",
            advice="Install migrate with all that it needs.",
        ) from error
    assert isinstance(command, click.Command)
    return command


def group(entries: Mapping[str, Entry] = COMMANDS) -> LazyGroup:
    """The command ``migrate`` with the commands of *entries*."""
    made = LazyGroup(
        entries,
        help="Live migration of running AMD ROCm processes between hosts.",
        epilog="Exit codes: docs/exit-codes.md. A failed command says what to do.",
    )
    click.version_option(package_name="migrate", prog_name="migrate")(made)
    return made


def run(arguments: Sequence[str], command: click.Command | None = None) -> int:
    """Run one command line and return its exit code; errors are printed, never raised."""
    settings = Settings()
    # A usage error may be found before --json is parsed.
    own = list(arguments)[: list(arguments).index("--")] if "--" in arguments else arguments
    settings.output.json = "--json" in own
    configure_logging(0)
    try:
        result = (command or group()).main(
            list(arguments), prog_name="migrate", standalone_mode=False, obj=settings
        )
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        return BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        return _fail(settings, Interrupted("interrupted"))
    except MigrateError as error:
        return _fail(settings, error, error)
    except click.ClickException as error:
        return _fail(settings, _usage_error(error))
    except Exception as error:
        internal = MigrateError(f"{type(error).__name__}: {error}")
        if not settings.output.verbose:
            internal.hint += " -v shows where it arose."
        return _fail(settings, internal, error)
    # A command returns its exit code, or nothing.
    return result if isinstance(result, int) else 0


def _fail(settings: Settings, error: MigrateError, cause: BaseException | None = None) -> int:
    try:
        settings.output.error(error, cause)
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
    return error.exit_code


def _usage_error(error: click.ClickException) -> UsageError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return UsageError(error.format_message())
    advice = f"{context.get_usage()}\nTry: {context.command_path} --help"
    return UsageError(error.format_message(), advice=advice)


def _forget_stdout() -> None:
    """Keep the interpreter from flushing into the closed pipe once more at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> NoReturn:
    """The console script ``migrate``."""
    # gRPC's C++ core writes each refused handshake to stderr; our errors say it better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(run(sys.argv[1:]))


def agent_main() -> NoReturn:
    """The console script ``migrate-agent``: ``migrate agent serve``."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(run(["agent", "serve", *sys.argv[1:]]))
