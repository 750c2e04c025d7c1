"""What may go wrong between a request and its answer. No credentials are ever part of an error's text."""


class ServerError(RuntimeError):
    """A server that cannot be used at all; the user sees the text as it is."""


class NotListedError(ServerError):
    """A server that does not say which model it has, though it answers."""


class RowError(Exception):
    """A request that got no whole answer; the text is the reason that is recorded."""


class ContextOverflowError(RowError):
    """A prompt that, with the longest answer asked for, does not fit into the server's context."""


class PassingError(Exception):
    """A failure that another try may mend.

    Args:
        reason: What happened.
        retry_after_s: The wait that the server asks for, 0 if it does not.
        unreachable: Whether the request did not even reach the server.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0, unreachable: bool = False) -> None:
        """Keeps the arguments as attributes."""
        super().__init__(reason)
        self.retry_after_s, self.unreachable = retry_after_s, unreachable
