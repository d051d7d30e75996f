// Failures of a group on GPUs: reads records of kernels, and ends calls that wait.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "device/device_group.h"
#include "device/devices.h"
#include "device/turn.h"
#include "runtime/registry.h"

namespace jax_ep {
namespace {

// The public operation that a call belongs to. The host knows it by the call's site.
std::string OpOf(const FailureRecord& record) {
  // The host cannot tell which call it was.
  if (record.kind == FailureKind::kInterrupted) return "call";
  const std::string op = Registry<DeviceGroup>::Get().OpOf(record.site);
  if (!op.empty()) return op;
  // A peer that makes another call may send a site that this process does not know.
  return record.op == OpId::kPullRows ? "dispatch or combine" : NameOf(record.op);
}

}  // namespace

std::optional<ErrorRecord> DeviceGroup::error() const {
  std::optional<FailureRecord> found;
  int slice = 0;
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    const volatile FailureRecord& record = records_[i];
    std::optional<FailureRecord> own;
    if (record.is_set != 0) {
      std::atomic_thread_fence(std::memory_order_acquire);
      own = FailureRecord{.is_set = 1,
                          .kind = record.kind,
                          .op = record.op,
                          .site = record.site,
                          .rank = record.rank,
                          .peer = record.peer,
                          .expected = record.expected,
                          .seen = record.seen};
    } else if (!IsAlone()) {
      own = ToldTo(i);
    }
    // Two calls at once are the cause of a mismatch that their peers record.
    if (own && (!found || own->kind == FailureKind::kArrivedTwice)) {
      found = own;
      slice = positions_[i].member.slice;
    }
  }
  if (!found) return std::nullopt;
  return ErrorRecord{.kind = found->kind,
                     .op = OpOf(*found),
                     .rank = found->rank,
                     .peer = found->peer,
                     .expected = found->expected,
                     .seen = found->seen,
                     .slice = slice};
}

std::optional<FailureRecord> DeviceGroup::ToldTo(size_t index) const {
  const OnDevice on_device(positions_[index].device_id);
  const ControlBlock* control = ControlAt(index);
  FailureRecord told[kMaxRanks];
  const auto find_first = [&] {
    CheckCuda("cudaMemcpyAsync", cudaMemcpyAsync(told, control->told, sizeof(told),
                                                 cudaMemcpyDeviceToHost, copies_[index]));
    CheckCuda("cudaStreamSynchronize", cudaStreamSynchronize(copies_[index]));
    return std::find_if(std::begin(told), std::end(told),
                        [](const FailureRecord& record) { return record.is_set != 0; });
  };
  if (find_first() == std::end(told)) return std::nullopt;
  // The record may have been copied before it was written, and is_set after: copy it once more.
  return *find_first();
}

std::optional<DeviceGroup::Running> DeviceGroup::RunningAt(size_t index) const {
  const auto epoch_of = [&](const Signal* at) {
    Signal turn;
    CopyBeside(index, &turn, at, sizeof(turn), cudaMemcpyDeviceToHost);
    return RunningEpoch(turn);
  };
  const Running running{.call = epoch_of(&ControlAt(index)->turn),
                        .flight = epoch_of(&ControlAt(index)->flight_turn)};
  return running == Running{} ? std::nullopt : std::optional(running);
}

std::vector<int> DeviceGroup::LeftOut() const {
  uint32_t ranks = 0;
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    uint32_t left_out = 0;
    CopyBeside(i, &left_out, &ControlAt(i)->left_out, sizeof(left_out), cudaMemcpyDeviceToHost);
    ranks |= left_out;
  }
  std::vector<int> found;
  for (int r = 0; r < num_ranks_; ++r) {
    if ((ranks >> r & 1) != 0) found.push_back(r);
  }
  return found;
}

void DeviceGroup::NoteWaits() {
  noted_.assign(positions_.size(), std::nullopt);
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (is_here_[i]) noted_[i] = RunningAt(i);
  }
}

void DeviceGroup::EndNotedWaits() {
  for (size_t i = 0; i < noted_.size(); ++i) {
    if (!noted_[i] || noted_[i] != RunningAt(i)) continue;
    FailAt(i, {.is_set = 1,
               .kind = FailureKind::kInterrupted,
               .op = OpId::kDispatch,
               .site = 0,
               .rank = positions_[i].member.rank,
               .peer = kNoIndex,
               .expected = num_ranks_,
               .seen = 0});
  }
}

bool DeviceGroup::IsWaiting() {
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (is_here_[i] && RunningAt(i)) return true;
  }
  return false;
}

void DeviceGroup::FailAt(size_t index, FailureRecord record) {
  uint32_t has_failed = 0;
  CopyBeside(index, &has_failed, &ControlAt(index)->has_failed, sizeof(has_failed),
             cudaMemcpyDeviceToHost);
  if (has_failed != 0) return;  // the rank ends the waits itself
  // The order is that of Fail (device/signals.cuh). The words of `told` are copied before is_set:
  // one copy of both would promise no order.
  record.is_set = 0;
  records_[index] = record;
  std::atomic_thread_fence(std::memory_order_release);
  static_cast<volatile FailureRecord&>(records_[index]).is_set = 1;
  std::vector<size_t> slice;
  for (size_t j = 0; j < positions_.size(); ++j) {
    if (survives_ && !is_here_[j]) continue;
    if (positions_[j].member.slice == positions_[index].member.slice) slice.push_back(j);
  }
  const uint32_t one = 1;
  for (const bool is_whole : {false, true}) {
    for (const size_t j : slice) {
      FailureRecord& told = ControlAt(j)->told[record.rank];
      is_whole ? CopyBeside(index, &told.is_set, &one, sizeof(one), cudaMemcpyHostToDevice)
               : CopyBeside(index, &told, &record, sizeof(record), cudaMemcpyHostToDevice);
    }
  }
  for (const size_t j : slice) {
    CopyBeside(index, &ControlAt(j)->abort, &one, sizeof(one), cudaMemcpyHostToDevice);
  }
}

}  // namespace jax_ep
