"""Settings: their values, their defaults, and the environment variables.

Environment variables:
  JAX_EP_DEBUG: "1" turns debug mode on (`Group.open(debug=...)` overrides it); read when a group
    opens.
  JAX_EP_STAGING_MB: MiB that a GPU sets aside for copies of operands that its peers have not
    mapped; by default 8 where most are mapped, and 256 where none is; read when a group opens.
  JAX_EP_TUNING: a file of tables that `python -m jax_ep tune` has written; read when a group opens.
  JAX_EP_COORDINATOR, JAX_EP_NUM_PROCESSES, JAX_EP_PROCESS_ID: what `jax_ep.testing.launch` tells
    the processes that it starts.
"""

import enum
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jax_ep.errors import ConfigError

DEFAULT_TIMEOUT_S = 60.0
MAX_TIMEOUT_S = 86400.0
BACKENDS = ("cpu", "cuda", "xla")
ROW_BYTES_MULTIPLE = 16
FP8_BLOCK = 128
MAX_BIASES = 2
DEFAULT_SPARE_STAGING_MB = 8
DEFAULT_STAGING_MB = 256
MAX_STAGING_MB = 64 * 1024
# As in xla_ffi/core/protocol.h.
PACKET_GROUPS = 2048
PACKET_GROUP_PAYLOAD = 96 * 16
MAX_PUSH_PAYLOAD = 4 * 1024 * 1024
MAX_NORM_ROW_BYTES = 64 * 1024  # as kMaxNormRowBytes of ops/all_reduce_residual_rmsnorm
STAGING_ALIGNMENT = 256  # as kStagingAlignment of xla_ffi/ops/cuda_op.h
MAX_TOPK = 32
MAX_CUDA_RANKS = 32  # as kMaxRanks of xla_ffi/core/protocol.h

# What jax.ad_checkpoint.checkpoint_name calls the results of communication.
DISPATCH_NAME = "jax_ep_dispatch"
COMBINE_NAME = "jax_ep_combine"
REDUCE_NAME = "jax_ep_all_reduce"
MAX_INDEX = 2**31 - 1


class Layout(enum.Enum):
    """How received rows are arranged. The integers are those of xla_ffi/core/types.h."""

    RANK = 0
    EXPERT = 1


class Fill(enum.Enum):
    """Which rows without a token are zeroed. The integers are those of xla_ffi/core/types.h."""

    ZEROS = 0
    PADDING = 1
    NONE = 2


class Movement(enum.Enum):
    """What becomes of all ranks' arrays. As in xla_ffi/ops/all_reduce/all_reduce.h."""

    ALL_REDUCE = 0
    REDUCE_SCATTER = 1
    ALL_GATHER = 2


class Algorithm(enum.Enum):
    """How they travel between GPUs. As in xla_ffi/ops/all_reduce/all_reduce.h, but for PSUM."""

    LOW_LATENCY = 0
    ONE_SHOT = 1
    TWO_SHOT = 2
    PSUM = -1  # the stock collective


_Choice = TypeVar("_Choice", bound=enum.Enum)


def choice(
    kind: type[_Choice], value: str, *, op: str, argument: str, also: Sequence[str] = ()
) -> _Choice:
    """The member of `kind` that a public argument names; `also`: what the caller takes besides."""
    for member in kind:
        if member.name.lower() == value:
            return member
    names = ", ".join(map(repr, (*also, *(member.name.lower() for member in kind))))
    raise ConfigError(f"{op}: {argument} must be one of {names}, got {value!r}")


def alternatives(names: Sequence[str]) -> str:
    """As in "bfloat16, float16 or float32"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def require_int(value: Any, *, minimum: int, op: str, argument: str) -> int:
    """A static integer."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, jax.Array):
        raise ConfigError(f"{op}: {argument} must be a static integer, got {value!r}")
    number = int(value)
    if number < minimum:
        raise ConfigError(f"{op}: {argument} must be at least {minimum}, got {number}")
    return number


def to_number(value: Any) -> float:
    """A static number of Python's or NumPy's; NaN for what is none, or beyond every float."""
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if not is_number or isinstance(value, bool):  # an int of Python's
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def why_no_kernel_exchange(num_ranks: int) -> str | None:
    """What keeps kernels of a group from meeting, as far as is known without the devices, or None.

    Options that a program is compiled with (`jax.jit(compiler_options=)`) are not known.
    """
    if num_ranks > MAX_CUDA_RANKS:
        return f"its kernels take at most {MAX_CUDA_RANKS} ranks, got {num_ranks}"
    flag = "--xla_gpu_command_buffer_scheduling_mode"
    if (xla_flag(flag) or "").lower() == "concurrent":
        return f"{flag}=concurrent runs independent calls at once; calls of a group need one order"
    return None


def xla_flag(name: str) -> str | None:
    """The value that XLA_FLAGS gives to a flag; the last one counts.

    As xla/parse_flags_from_env.cc reads it: flags, or else the name of a file of flags.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if flags.strip() and not flags.lstrip().startswith("-"):
        try:
            flags = Path(flags).read_text(errors="replace")
        except OSError:  # XLA ends the process
            return None
    value = None
    for flag, double_quoted, single_quoted, plain in _XLA_FLAG.findall(flags):
        if flag == name:
            value = re.sub(r"\\(.)", r"\1", double_quoted) or single_quoted or plain
    return value


def virtual_devices_environment(num_devices: int) -> dict[str, str]:
    """Environment variables that give a process virtual CPU devices, and threads to wait in.

    JAX's CPU client has as many threads as there are cores. With fewer than these, many launches in
    flight hang, those of stock collectives too.
    """
    threads = max(16, 2 * num_devices)
    return {"JAX_NUM_CPU_DEVICES": str(num_devices), "PJRT_NPROC": str(threads)}


def why_staged() -> str | None:
    """What in XLA's environment variables keeps GPUs from reading operands in place, or None."""
    for name in ("XLA_PYTHON_CLIENT_ALLOCATOR", "TF_GPU_ALLOCATOR"):
        allocator = os.environ.get(name, "").lower()
        if allocator in ("platform", "vmm"):
            return f"{name}={allocator} frees memory that a peer may still read after a failure"
        if allocator in ("cuda_async", "cuda_malloc_async"):
            return f"memory of {name}={allocator} is not mapped for peers"
    return None


def why_pool_grows() -> str | None:
    """What in XLA's environment variables makes it allocate memory later on, or None.

    Between processes one allocation of each device is mapped: the pool that XLA begins with.
    """
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    if os.environ.get(name, "true").lower() in ("false", "0"):
        return f"{name}=false allocates memory that peers have not mapped"
    return None


def staging_bytes_from_environment() -> tuple[int, int]:
    """Room for staged operands on each GPU: where most are read in place, and where none is."""
    value = os.environ.get("JAX_EP_STAGING_MB")
    if value is None:
        return DEFAULT_SPARE_STAGING_MB << 20, DEFAULT_STAGING_MB << 20
    if not value.isdecimal() or int(value) > MAX_STAGING_MB:
        raise ConfigError(
            f"JAX_EP_STAGING_MB must be a whole number from 0 to {MAX_STAGING_MB}, got {value!r}"
        )
    return int(value) << 20, int(value) << 20


def packet_payload(num_ranks: int) -> int:
    """Bytes that one rank can send to another in one low-latency call."""
    return PACKET_GROUPS // num_ranks * PACKET_GROUP_PAYLOAD


def push_payload(num_ranks: int) -> int:
    """Bytes that one rank can push to another in a one-shot; more is read where it lies."""
    if num_ranks <= 4:
        return MAX_PUSH_PAYLOAD
    return MAX_PUSH_PAYLOAD * 4 // num_ranks // 512 * 512


def two_shot_payload(num_ranks: int) -> int:
    """Bytes that one rank can push in a two-shot: a chunk for each rank, and one of the sum."""
    return num_ranks * push_payload(num_ranks) // 2


def tuning_file_from_environment() -> str | None:
    """The file of tables that come before the package's."""
    return os.environ.get("JAX_EP_TUNING") or None


def cuda_compiler() -> str | None:
    """The CUDA compiler that an installation would take, from CUDA_HOME or the PATH."""
    home = os.environ.get("CUDA_HOME")
    found = home and shutil.which("nvcc", path=str(Path(home) / "bin"))
    return found or shutil.which("nvcc")


def debug_from_environment() -> bool:
    """Whether JAX_EP_DEBUG asks for debug mode."""
    value = os.environ.get("JAX_EP_DEBUG", "0")
    if value not in ("", "0", "1"):
        raise ConfigError(f"JAX_EP_DEBUG must be '0' or '1', got {value!r}")
    return value == "1"


@dataclass(frozen=True)
class ProcessPlace:
    """One process of a program of several.

    Attributes:
      coordinator: host:port of JAX's coordination service.
      num_processes: of the program.
      process_id: from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int

    def to_environment(self) -> dict[str, str]:
        """The variables that say it."""
        values = (self.coordinator, str(self.num_processes), str(self.process_id))
        return dict(zip(_PLACE_VARIABLES, values, strict=True))

    @classmethod
    def from_environment(cls) -> "ProcessPlace":
        """That of this process; ConfigError names a variable that is missing."""
        missing = [name for name in _PLACE_VARIABLES if name not in os.environ]
        if missing:
            raise ConfigError(f"launch: {', '.join(missing)} must be set: start it with launch")
        coordinator, num_processes, process_id = (os.environ[n] for n in _PLACE_VARIABLES)
        return cls(coordinator, int(num_processes), int(process_id))


# A flag and its value: quoted, with backslashes between double quotes, or up to the next space.
_XLA_FLAG = re.compile(r"""(?:^|(?<=\s))(--?[\w-]+)=(?:"((?:\\.|[^"\\])*)"?|'([^']*)'?|(\S*))""")
_PLACE_VARIABLES = ("JAX_EP_COORDINATOR", "JAX_EP_NUM_PROCESSES", "JAX_EP_PROCESS_ID")
