"""What is found out about a user's class or function, in an attribute of it: it lives no longer than that."""

import contextlib


class Remembered:
    """A value, and what it was found of: subclasses see the attributes of a class, and code can be replaced.

    It stays here where a class or a function is pickled by value, as cloudpickle does.
    """

    def __init__(self, of, value):
        self.of = of
        self.value = value

    def __reduce__(self):
        return type(None), ()


def remember(owner, name: str, of, value) -> None:
    """Puts a value into the attribute ``name`` of ``owner``; of an owner that takes none it is found again."""
    with contextlib.suppress(TypeError, AttributeError):
        setattr(owner, name, Remembered(of, value))


def recall(owner, name: str, of) -> Remembered | None:
    """What was remembered of ``of``; None where nothing was."""
    found = getattr(owner, name, None)
    return found if isinstance(found, Remembered) and found.of is of else None
