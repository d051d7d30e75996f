// Names of calls, in one process and between processes.
//
// Within a process, (call site, launch) identifies a call. Other processes do not share these
// numbers. XLA numbers the launches of an executable from a hash of the executable, which differs
// with the caller's source line or a compilation cache. Call sites are numbered as executables are
// loaded. Between processes, three things together name a call: its content and its place in the
// program (`CallSite::name`), its place among the calls of that name in its executable, and the
// count of the launches in which ranks of the slice have called the group.
#pragma once

#include <atomic>
#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace jax_ep {

/// One custom call of one executable.
struct CallSite {
  uint64_t id = 0;    // in this process; later sites have larger ones
  uint64_t name = 0;  // hash of content and place, equal in all processes
  std::thread::id loaded_by;
  uint64_t program = 0;  // number of programs that had begun when the site was loaded
  // Place among the sites of this name, and their number, known from the site's first call on. A
  // program that calls one jitted function several times holds several sites of one name, in an
  // order that follows from the program.
  int index = 0;
  std::atomic<int> count = 0;  // 0: not known yet
};

/// The call sites of this process. Thread-safe.
class CallSites {
 public:
  CallSites() = default;
  CallSites(const CallSites&) = delete;
  CallSites& operator=(const CallSites&) = delete;

  /// Notes that a program is lowered: sites that are loaded next belong to another executable.
  void BeginProgram();
  /// Adds a site while an executable is loaded, on the thread that loads it.
  std::shared_ptr<CallSite> Add(uint64_t name);
  /// Fills in index and count at the first call of a site. One thread loads an executable, after
  /// the program was lowered and before the executable runs. So the sites of this name that the
  /// same thread has loaded since the lowering are those of this executable, or of copies of it
  /// that were compiled from the same lowering.
  void Settle(CallSite& site);
  /// The largest id so far.
  uint64_t newest() const;

 private:
  mutable std::mutex mutex_;
  uint64_t newest_ = 0;
  uint64_t num_programs_ = 0;
  std::map<uint64_t, std::vector<std::weak_ptr<CallSite>>> waiting_;  // by name, before they run
};

/// One call of one slice.
struct CallKey {
  uint64_t site;   // within a process the site's id, between processes its name
  int64_t launch;  // within a process XLA's run id, between processes the count of the slice
  int slice;
  int index = 0;
  int count = 1;
  auto operator<=>(const CallKey&) const = default;

  /// Whether two processes mean the same call. A process that has loaded copies of an executable
  /// before any of them ran counts the sites of all copies.
  bool Matches(const CallKey& other) const;
  /// Whether the keys are equal but for index and count.
  bool IsAlike(const CallKey& other) const;
};

/// Counts the launches of a slice in one process. The caller locks.
///
/// XLA:CPU runs the programs of a process one after the other on each device. It starts no program
/// on several devices before the previous one has ended on all of them. So the calls of one launch
/// arrive together, and the count agrees between processes that launch the same programs.
class LaunchCount {
 public:
  /// The launch that a call of `site` belongs to. None where the compiler has made several calls
  /// out of one: then nothing tells the call from another one of its launch.
  std::optional<int64_t> Of(const CallSite& site, int64_t run_id, uint64_t newest_site);

 private:
  struct Launch {
    int64_t run_id = 0;
    uint64_t newest_site = 0;                            // when the launch began
    std::map<std::pair<uint64_t, int>, uint64_t> sites;  // (name, index) to id
  };

  bool Continues(const CallSite& site, int64_t run_id) const;

  int64_t count_ = 0;
  Launch current_;
  Launch before_;
};

}  // namespace jax_ep
