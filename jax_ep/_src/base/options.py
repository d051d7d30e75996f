"""Options that callers write as words, and the numbers that native code has for them."""

import enum
from typing import Literal


class Option(enum.StrEnum):
    """One of a few words. It equals the word, and its members stand in the order of the codes."""

    @property
    def code(self) -> int:
        """Returns the number that stands for the option in xla_ffi."""
        return list(type(self)).index(self)


class Layout(Option):
    """Arrangements of received rows; codes as in xla_ffi/core/types.h."""

    RANK = "rank"
    EXPERT = "expert"


class Fill(Option):
    """Choices of the rows without a token that are zeroed; codes as in xla_ffi/core/types.h."""

    ZEROS = "zeros"
    PADDING = "padding"
    NONE = "none"


class Movement(Option):
    """Collectives over all ranks' arrays; codes as in xla_ffi/ops/all_reduce/all_reduce.h."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"


class Algorithm(Option):
    """Algorithms for sums between GPUs; codes as in xla_ffi/ops/all_reduce/all_reduce.h."""

    LOW_LATENCY = "low_latency"
    ONE_SHOT = "one_shot"
    TWO_SHOT = "two_shot"
    PSUM = "psum"  # XLA's collective; native code never sees this option


class ExchangeMode(Option):
    """Kernels for many tokens, or for few; codes as in xla_ffi/core/types.h."""

    THROUGHPUT = "throughput"
    LOW_LATENCY = "low_latency"


class Pieces(Option):
    """Sources of the pieces of a ragged exchange.

    Codes as in xla_ffi/ops/ragged_all_to_all/ragged_all_to_all.h.
    """

    GIVEN = "given"  # the sender gives all offsets
    PACKED = "packed"  # the sender gives sizes alone, pieces lie side by side
    BACK = "back"  # from the places where an exchange has put the rows, to where they came from


class Scales(Option):
    """Storage formats of the scales of fp8 rows."""

    F32 = "f32"
    E8M0 = "e8m0"


class LowLatencyLayout(Option):
    """Arrangements of the rows that a low-latency dispatch receives."""

    EXPERT = "expert"
    RANK = "rank"
    BATCHED = "batched"


class Quantize(Option):
    """Formats to which a low-latency dispatch rounds its rows; codes as in xla_ffi/core/types.h."""

    NONE = "none"
    FP8 = "fp8"
    FP8_POW2 = "fp8_pow2"
    FP8_E8M0 = "fp8_e8m0"


# Types of public arguments with the same words: editors complete them, and a str from a
# configuration needs no cast. A wrong word raises an error while the function is traced.
LayoutName = Literal["rank", "expert"] | str
LowLatencyLayoutName = Literal["expert", "rank", "batched"] | str
WireName = Literal["fp8"] | str
QuantizeName = Literal["none", "fp8", "fp8_pow2", "fp8_e8m0"] | str
FillName = Literal["zeros", "padding", "none"] | str
ScalesName = Literal["f32", "e8m0"] | str
AlgorithmName = Literal["auto", "low_latency", "one_shot", "two_shot", "psum"] | str
BackendName = Literal["cpu", "cuda", "xla"] | str
