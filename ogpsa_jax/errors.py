"""The one exception that means: the user's input is wrong, and this sentence says how to mend it."""


class InputError(ValueError):
    """Bad input, told in one sentence: file, line, field, what was expected, what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """
