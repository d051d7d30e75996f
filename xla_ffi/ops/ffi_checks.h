// Reading of buffers at the FFI border. Python checks every static fact, with better messages.
// Checks are repeated here only where they protect memory.
#pragma once

#include <sstream>
#include <string>
#include <utility>

#include "core/types.h"
#include "ops/binding.h"

namespace jax_ep {

using I32Buffer = ffi::Buffer<ffi::S32>;
using F32Buffer = ffi::Buffer<ffi::F32>;
using BoolBuffer = ffi::Buffer<ffi::PRED>;
using I32Result = ffi::Result<I32Buffer>;
using F32Result = ffi::Result<F32Buffer>;
using BoolResult = ffi::Result<BoolBuffer>;

/// An error of a handler, which returns it at once or in a future. Every device of the program gets
/// the same error.
class Refusal {
 public:
  explicit Refusal(ffi::Error error) : error_(std::move(error)) {}

  operator ffi::Error() && { return std::move(error_); }
  operator ffi::Future() && {
    ffi::Promise promise;
    ffi::Future future(promise);
    promise.SetError(std::move(error_));
    return future;
  }

 private:
  ffi::Error error_;
};

template <typename... Parts>
Refusal InvalidArgument(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return Refusal(ffi::Error(ffi::ErrorCode::kInvalidArgument, message.str()));
}

#define JAX_EP_REQUIRE(condition, ...)                     \
  do {                                                     \
    if (!(condition)) return InvalidArgument(__VA_ARGS__); \
  } while (false)

/// The data, or null for an empty buffer, which stands for an absent result.
template <typename Buffer>
auto DataOrNull(Buffer buffer) -> decltype(buffer.typed_data()) {
  return buffer.element_count() == 0 ? nullptr : buffer.typed_data();
}

/// Whether the masks of ranks before and after a call have an element for each rank.
inline bool RankMasksFit(BoolBuffer before, BoolBuffer after, int num_ranks) {
  const auto size = static_cast<size_t>(num_ranks);
  return before.element_count() == size && after.element_count() == size;
}

/// Bytes of one row: all dimensions but the first.
inline size_t RowBytes(ffi::AnyBuffer buffer) {
  size_t bytes = ffi::ByteWidth(buffer.element_type());
  for (size_t i = 1; i < buffer.dimensions().size(); ++i) bytes *= buffer.dimensions()[i];
  return bytes;
}

/// The size of an axis, or -1 if the buffer has fewer axes.
template <typename Buffer>
int64_t Dim(Buffer buffer, size_t axis) {
  return axis < buffer.dimensions().size() ? buffer.dimensions()[axis] : -1;
}

inline ffi::Error DecodeDType(const std::string& op, ffi::AnyBuffer buffer, DType& dtype) {
  switch (buffer.element_type()) {
    case ffi::BF16:
      dtype = DType::kBF16;
      return ffi::Error::Success();
    case ffi::F16:
      dtype = DType::kF16;
      return ffi::Error::Success();
    case ffi::F32:
      dtype = DType::kF32;
      return ffi::Error::Success();
    case ffi::S32:
      dtype = DType::kI32;
      return ffi::Error::Success();
    default:
      return InvalidArgument(op, ": elements must be bf16, f16, f32 or int32");
  }
}

}  // namespace jax_ep
