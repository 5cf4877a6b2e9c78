"""The one exception that a user may see: a mistake that a user can make, told in one line."""


class PkuslurmError(Exception):
    """A refusal in words: the field, the value, what is allowed, what to do.

    ``exit_code`` is what the command ends with (2: refused, nothing written, nothing submitted).
    """

    exit_code = 2
