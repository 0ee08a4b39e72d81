"""The one exception that is the user's to mend; every other exception is a bug and keeps its traceback."""


class UserError(Exception):
    """Bad input, said in one line: what was found, what was expected, what to do about it.

    The command line prints ``str(error)`` and leaves with exit code 2.
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(found, expected, remedy)
        self.found, self.expected, self.remedy = found, expected, remedy

    def __str__(self) -> str:
        return " ".join(f"{self.found} | expected {self.expected} | {self.remedy}".split())
