"""The one exception that says: the user's input is wrong, and this is how to fix it."""


class InputError(ValueError):
    """Bad input, reported in one sentence: file, line, field, what was expected, what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """
