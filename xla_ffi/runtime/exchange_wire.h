// Messages between the processes of an exchange (links.h). All of them run the same build.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "runtime/call_site.h"
#include "runtime/error_record.h"

namespace jax_ep {

struct WireMessage {
  enum class Kind : uint32_t {
    kJoin,  // a rank of the sender has joined; its operands follow
    kRead,  // the sender does not read the operands of the call any more
    kFail,  // the sender's exchange has failed, and so the receiver's fails
  };
  static constexpr size_t kMaxOpName = 48;
  static constexpr size_t kMaxPlace = 128;

  Kind kind;
  CallKey key;          // kJoin, kRead
  char op[kMaxOpName];  // kJoin, kFail
  int32_t rank;         // kJoin: the rank that has joined; kFail: of the record
  uint64_t gave_up;     // kJoin: address of a word that is not 0 once operands may be gone
  FailureKind error;
  int32_t peer;
  int64_t expected;
  int64_t seen;
  char place[kMaxPlace];  // kFail: of the record
  int32_t slice;          // kFail: of the record

  static WireMessage Of(Kind kind, const CallKey& key) {
    WireMessage message{};
    message.kind = kind;
    message.key = key;
    return message;
  }
  static WireMessage Join(const CallKey& key, const std::string& op, int rank,
                          const std::atomic<uint64_t>& gave_up) {
    WireMessage message = Of(Kind::kJoin, key);
    message.SetOp(op);
    message.rank = rank;
    message.gave_up = reinterpret_cast<uint64_t>(&gave_up);
    return message;
  }
  static WireMessage Fail(const ErrorRecord& record) {
    WireMessage message = Of(Kind::kFail, {});
    message.SetOp(record.op);
    message.rank = record.rank;
    message.error = record.kind;
    message.peer = record.peer;
    message.expected = record.expected;
    message.seen = record.seen;
    std::strncpy(message.place, record.place.c_str(), kMaxPlace - 1);
    message.slice = record.slice;
    return message;
  }

  ErrorRecord Record() const {
    return {.kind = error,
            .op = op,
            .rank = rank,
            .peer = peer,
            .expected = expected,
            .seen = seen,
            .place = place,
            .slice = slice};
  }

  std::vector<std::byte> With(std::span<const std::byte> body = {}) const {
    std::vector<std::byte> bytes(sizeof(*this) + body.size());
    std::memcpy(bytes.data(), this, sizeof(*this));
    std::copy(body.begin(), body.end(), bytes.begin() + sizeof(*this));
    return bytes;
  }

 private:
  void SetOp(const std::string& name) { std::strncpy(op, name.c_str(), kMaxOpName - 1); }
};

}  // namespace jax_ep
