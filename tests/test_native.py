"""The native parts that know neither XLA nor Python, plain and with sanitizers."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE_DIR = Path(__file__).parent.parent / "xla_ffi"
SOURCES = [
    *sorted((SOURCE_DIR / "tests").glob("*_test.cc")),
    SOURCE_DIR / "core" / "plan.cc",
    *(SOURCE_DIR / "runtime" / f"{stem}.cc" for stem in ("exchange", "group")),
    SOURCE_DIR / "runtime" / "thread_pool.cc",
]
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread"]
SANITIZERS = [
    "none",
    pytest.param("thread", marks=pytest.mark.slow),
    pytest.param("address,undefined", marks=pytest.mark.slow),
]
BUILD_SECONDS = 180
RUN_SECONDS = 110


@pytest.mark.timeout(BUILD_SECONDS + RUN_SECONDS + 10)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_native(sanitizer, tmp_path_factory):
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    flags = FLAGS
    if sanitizer != "none":
        flags = [*FLAGS, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        _check_links(compiler, flags, tmp_path_factory.mktemp("probe"))
    program = tmp_path_factory.mktemp("native") / "native_test"
    _run([*compiler, *flags, f"-I{SOURCE_DIR}", *SOURCES, "-o", program], BUILD_SECONDS)
    _run([*_launcher(sanitizer), program], RUN_SECONDS)


def _check_links(compiler: list[str], flags: list[str], folder: Path) -> None:
    source = folder / "probe.cc"
    source.write_text("int main() {}\n")
    command = [*compiler, *flags, source, "-o", folder / "probe"]
    try:
        _run(command, BUILD_SECONDS)
    except AssertionError as error:
        pytest.fail(f"the sanitizer's runtime is missing (libtsan, libasan, libubsan)?\n{error}")


def _launcher(sanitizer: str) -> list[str]:
    """Without randomised addresses: some kernels place memory where the thread sanitizer has none.

    Not every container allows the change.
    """
    setarch = shutil.which("setarch")
    if sanitizer != "thread" or setarch is None:
        return []
    works = subprocess.run([setarch, "-R", "true"], capture_output=True, check=False)
    return [setarch, "-R"] if works.returncode == 0 else []


def _run(command: list[str | Path], timeout: float) -> None:
    try:
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        pytest.fail(f"no such program: {command[0]}")
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        pytest.fail(f"{shlex.join(map(str, command))}: over {timeout} s\n{output}")
    assert result.returncode == 0, (
        f"{shlex.join(map(str, command))}: exit status {result.returncode}\n{result.stdout}"
    )
