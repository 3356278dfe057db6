"""Registers h1export's subcommand: optimum-cli reads every file of this namespace package."""

from optimum.commands.export.base import ExportCommand

from h1export.integrations.optimum import H1ExportCommand

REGISTER_COMMANDS = [(H1ExportCommand, ExportCommand)]
