"""Settings: their values, their defaults, and the environment variables.

Environment variables:
  JAX_EP_DEBUG: "1" turns debug mode on (`Group.open(debug=...)` overrides it); read when a group
    opens.
  JAX_EP_STAGING_MB: MiB that each GPU reserves for copies of operands that its peers have not
    mapped. The default is 8 if most operands are mapped, and 256 if none is. Read when a group
    opens.
  JAX_EP_TUNING: a file of tables that `python -m jax_ep tune` has written; read when a group opens.
  JAX_EP_COORDINATOR, JAX_EP_NUM_PROCESSES, JAX_EP_PROCESS_ID: the place of a process in its
    program; `jax_ep.testing.launch` sets them for the processes that it starts.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from jax_ep._src.base import limits
from jax_ep._src.base.errors import ConfigError

DEFAULT_TIMEOUT_S = 60.0
MAX_TIMEOUT_S = 86400.0
BACKENDS = ("cpu", "cuda", "xla")
FP8_BLOCK = 128
# Rules of every back end; limits of the kernels are in limits.py.
ROW_BYTES_MULTIPLE = 16
MAX_BIASES = 2
DEFAULT_SPARE_STAGING_MB = 8
DEFAULT_STAGING_MB = 256
MAX_STAGING_MB = 64 * 1024
DEFAULT_LOW_LATENCY_BYTES = 16 << 20
MAX_LOW_LATENCY_BYTES = 64 << 30
ALL_SMS = 1 << 15  # more than any GPU has
# Plain dispatches and combines of at most so many tokens of a rank take the kernels for few tokens.
MAX_FEW_TOKENS = 128
# They take at most so many SMs: all blocks must run at once, beside stock collectives.
PLAIN_FEW_SMS = 64
# Every block of such a combine looks at all rows that the rank could have received.
MAX_FEW_ROWS = 8192
MAX_INDEX = 2**31 - 1


def why_no_kernel_exchange(num_ranks: int) -> str | None:
    """Returns why the kernels of a group cannot meet, or None. Looks at no device.

    Options that a program is compiled with (`jax.jit(compiler_options=)`) are not known here.
    """
    if num_ranks > limits.MAX_CUDA_RANKS:
        return f"its kernels take at most {limits.MAX_CUDA_RANKS} ranks, got {num_ranks}"
    flag = "--xla_gpu_command_buffer_scheduling_mode"
    if (xla_flag(flag) or "").lower() == "concurrent":
        return f"{flag}=concurrent runs independent calls at once; calls of a group need one order"
    return None


def xla_flag(name: str) -> str | None:
    """Returns the value that XLA_FLAGS gives to a flag; the last one counts.

    Parses like xla/parse_flags_from_env.cc: the variable holds flags, or the name of a file of
    flags.
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
    """Returns environment variables that give a process virtual CPU devices and enough threads.

    JAX's CPU client has as many threads as the machine has cores. With fewer threads than these
    variables ask for, many launches in flight hang, even those of XLA's collectives.
    """
    threads = max(16, 2 * num_devices)
    return {"JAX_NUM_CPU_DEVICES": str(num_devices), "PJRT_NPROC": str(threads)}


def why_staged() -> str | None:
    """Returns how XLA's environment variables keep GPUs from reading operands in place, or None."""
    for name in ("XLA_PYTHON_CLIENT_ALLOCATOR", "TF_GPU_ALLOCATOR"):
        allocator = os.environ.get(name, "").lower()
        if allocator in ("platform", "vmm"):
            return f"{name}={allocator} frees memory that a peer may still read after a failure"
        if allocator in ("cuda_async", "cuda_malloc_async"):
            return f"memory of {name}={allocator} is not mapped for peers"
    return None


def why_pool_grows() -> str | None:
    """Returns how XLA's environment variables make it allocate memory later on, or None.

    Processes map one allocation of each device: the pool that XLA begins with.
    """
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    if os.environ.get(name, "true").lower() in ("false", "0"):
        return f"{name}=false allocates memory that peers have not mapped"
    return None


def staging_bytes_from_environment() -> tuple[int, int]:
    """Returns bytes for staged operands on each GPU: if most are read in place, and if none is."""
    value = os.environ.get("JAX_EP_STAGING_MB")
    if value is None:
        return DEFAULT_SPARE_STAGING_MB << 20, DEFAULT_STAGING_MB << 20
    if not value.isdecimal() or int(value) > MAX_STAGING_MB:
        raise ConfigError(
            f"JAX_EP_STAGING_MB must be a whole number from 0 to {MAX_STAGING_MB}, got {value!r}"
        )
    return int(value) << 20, int(value) << 20


def tuning_file_from_environment() -> str | None:
    """Returns the file whose tables take precedence over the package's, or None."""
    return os.environ.get("JAX_EP_TUNING") or None


def cuda_compiler() -> str | None:
    """Returns the CUDA compiler that an installation would take, from CUDA_HOME or the PATH."""
    home = os.environ.get("CUDA_HOME")
    found = home and shutil.which("nvcc", path=str(Path(home) / "bin"))
    return found or shutil.which("nvcc")


def debug_from_environment() -> bool:
    """Returns whether JAX_EP_DEBUG asks for debug mode."""
    value = os.environ.get("JAX_EP_DEBUG", "0")
    if value not in ("", "0", "1"):
        raise ConfigError(f"JAX_EP_DEBUG must be '0' or '1', got {value!r}")
    return value == "1"


@dataclass(frozen=True)
class ProcessPlace:
    """The place of one process in a program of several processes.

    Attributes:
      coordinator: host:port of JAX's coordination service.
      num_processes: processes of the program.
      process_id: index of the process, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int

    def to_environment(self) -> dict[str, str]:
        """Returns the environment variables that hold the place."""
        values = (self.coordinator, str(self.num_processes), str(self.process_id))
        return dict(zip(_PLACE_VARIABLES, values, strict=True))

    @classmethod
    def from_environment(cls) -> "ProcessPlace":
        """Returns the place of this process; a ConfigError names the variables that are missing."""
        missing = [name for name in _PLACE_VARIABLES if name not in os.environ]
        if missing:
            raise ConfigError(
                f"launch: {', '.join(missing)} must be set: start the program with launch"
            )
        coordinator, num_processes, process_id = (os.environ[n] for n in _PLACE_VARIABLES)
        return cls(coordinator, int(num_processes), int(process_id))


# A flag and its value: quoted, with backslashes between double quotes, or up to the next space.
_XLA_FLAG = re.compile(r"""(?:^|(?<=\s))(--?[\w-]+)=(?:"((?:\\.|[^"\\])*)"?|'([^']*)'?|(\S*))""")
_PLACE_VARIABLES = ("JAX_EP_COORDINATOR", "JAX_EP_NUM_PROCESSES", "JAX_EP_PROCESS_ID")
