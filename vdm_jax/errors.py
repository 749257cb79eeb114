"""The exception for faults that the user can fix, and the check of a name against the known names."""

import difflib


class UserError(ValueError):
    """Wrong input or settings. The message is one line: the fault and the fix. Commands print it and exit with 2."""


class SaveError(UserError):
    """A run cannot write to its folder."""


def one_of(what, name, known):
    """Returns `name` if it is one of the `known` names of a `what`. Raises a UserError with the nearest known name."""
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        listed = f" (known: {', '.join(known)})" if len(known) < 20 else ""
        raise UserError(f"no {what} {name!r}: did you mean {nearest!r}?{listed}")
    return name
