"""The one exception that a user is meant to read."""


class H1ExportError(Exception):
    """Bad input or an impossible request; the CLI prints it and exits with code 2.

    Args:
        where: file, config key, tensor or option at fault.
        what: what is wrong with it, with the figures.
        next_step: what the user can do about it.
    """

    def __init__(self, where: object, what: str, next_step: str) -> None:
        super().__init__(_printable(f"{where}: {what}; {next_step}"))
        self.where = str(where)
        self.what = what
        self.next_step = next_step


def _printable(text: str) -> str:
    """Names come from files of strangers: nothing in them may steer a terminal or break the line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
