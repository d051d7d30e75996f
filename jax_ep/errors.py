"""Every exception that jax_ep raises.

Messages name the operation, the argument, what was expected and what came.
"""


class JaxEpError(Exception):
    """Base of all exceptions of this package."""


class ShapeError(JaxEpError, ValueError):
    """An array has the wrong shape, or shapes do not fit together."""


class DTypeError(JaxEpError, TypeError):
    """An array has an element type that the operation does not take."""


class ConfigError(JaxEpError, ValueError):
    """A setting is out of range, or contradicts another one."""


class GroupError(JaxEpError, RuntimeError):
    """A group is closed, unknown, over another mesh, or cannot be opened."""


class RoutingError(JaxEpError, ValueError):
    """Debug mode: the routing holds ids that are no experts, or one expert twice in a token."""


class PeerTimeoutError(JaxEpError, RuntimeError):
    """A peer did not arrive within the group's timeout. The group is unusable from then on.

    Attributes:
      op: the operation that waited.
      rank: the rank that waited.
      peer: the rank that did not come.
      expected: how many ranks the call needs.
      seen: how many had come when the time was up.
    """

    def __init__(self, op: str, rank: int, peer: int, expected: int, seen: int):
        super().__init__(
            f"{op}: rank {rank} waited for rank {peer} until the timeout: "
            f"expected {expected} ranks, got {seen}"
        )
        self.op = op
        self.rank = rank
        self.peer = peer
        self.expected = expected
        self.seen = seen


class LaunchError(JaxEpError, RuntimeError):
    """A program of several processes failed, or did not end in time."""
