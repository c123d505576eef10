"""The one exception for wrong input: a single line for the user to act on."""


class QuantError(ValueError):
    """What the user gave cannot be used.

    Its message is one line that names what was given, what is allowed and
    what to do. The command line tools print it and exit with status 2.
    """
