"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Wrong input or settings. One line that names the fault and the fix; scripts print it and exit with 2."""
