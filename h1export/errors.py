"""H1ExportError: the exception for everything that the user can put right."""


class H1ExportError(Exception):
    """Bad input or an impossible request. The command line prints it without a traceback and exits with code 2.

    Args:
        where: the file, config key, tensor or option at fault.
        what: what is wrong with it, with the figures.
        next_step: what the user can do about it.
    """

    def __init__(self, where: object, what: str, next_step: str) -> None:
        super().__init__(printable(f"{where}: {what}; {next_step}"))
        self.where = str(where)
        self.what = what
        self.next_step = next_step


def printable(text: str) -> str:
    """Escape unprintable characters, because names from foreign files must not control a terminal or break the line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
