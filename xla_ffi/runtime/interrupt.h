// Ends calls that wait for their peers when the user interrupts the process (SIGINT, Ctrl-C).
//
// Python's own handler sets a flag, which the main thread sees when it runs Python again: not while
// it waits for results in C++. A handler in front of it wakes a thread here. This thread notes what
// waits, gives it a short time to go on by itself, and ends what has waited all the time. Then the
// main thread returns, and Python raises KeyboardInterrupt as usual.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

namespace jax_ep {

/// What may wait for peers. The first two methods run on the watching thread.
class Interruptible {
 public:
  virtual ~Interruptible() = default;
  /// Notes the calls that wait now, and forgets those that it has noted before.
  virtual void NoteWaits() = 0;
  /// Fails the group if one of these calls still waits. May throw, as the others may.
  virtual void EndNotedWaits() = 0;
  /// Whether a call waits now, or has yet to end.
  virtual bool IsWaiting() = 0;
};

class Interrupts {
 public:
  /// A slow peer is no reason to end a call: the shortest wait that is ended.
  static constexpr std::chrono::milliseconds kGrace{300};

  /// Of the process. It is never destroyed: its thread may outlive static destruction.
  static Interrupts& Get();

  /// Puts a handler in front of the present one, which it calls. Does nothing where the signal is
  /// ignored or ends the process, and where another handler has been put in front of this one. A
  /// handler that has taken this one's place since is found by the next call.
  void Watch();

  /// Signals since Watch.
  uint64_t count() const;

  /// From now on the process ends: calls that wait are ended without further signals.
  void Leave();

  /// Whether a call of the process waits.
  bool AnyWaits() const;

  /// Virtual for modules that get the object from another one, and so do not link with it.
  virtual void Add(std::weak_ptr<Interruptible> interruptible);

 protected:
  Interrupts() = default;
  virtual ~Interrupts() = default;
};

}  // namespace jax_ep
