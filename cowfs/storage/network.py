"""How long storages on a network are waited for."""

from dataclasses import dataclass

#: seconds that one request may take
TIMEOUT = 30.0
#: seconds for which requests are tried again while a server is away
RETRY = 60.0


@dataclass(frozen=True)
class Network:
    """Deadlines, in seconds.

    ``timeout`` is that of one request, and of each attempt to connect. ``retry`` is how long a request is tried again
    after the server has gone, before it fails with EIO; with ``hold`` it waits for ever.
    """

    timeout: float = TIMEOUT
    retry: float = RETRY
    hold: bool = False


#: what there is to say if there is nothing
DEFAULT_NETWORK = Network()
