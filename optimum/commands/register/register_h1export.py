"""Found by optimum-cli, which reads every file of this namespace package: optimum's partners register their subcommands so."""

from optimum.commands.export.base import ExportCommand

from h1export.integrations.optimum import H1ExportCommand

REGISTER_COMMANDS = [(H1ExportCommand, ExportCommand)]
