// Ends calls that wait for their peers when the user interrupts the process (SIGINT, Ctrl-C).
//
// Python's own handler sets a flag. The main thread sees the flag when it runs Python again, not
// while it waits for results in C++. So a handler in front of Python's wakes a thread here. The
// thread notes which calls wait, gives them a short time to go on by themselves, and ends those
// that still wait. Then the main thread returns, and Python raises KeyboardInterrupt as usual.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

namespace jax_ep {

/// An object whose calls may wait for peers. The first two methods run on the watching thread.
class Interruptible {
 public:
  virtual ~Interruptible() = default;
  /// Notes the calls that wait now, and forgets the ones noted before.
  virtual void NoteWaits() = 0;
  /// Fails the group if a noted call still waits. May throw, as the other methods may.
  virtual void EndNotedWaits() = 0;
  /// Whether a call waits now, or has yet to end.
  virtual bool IsWaiting() = 0;
};

class Interrupts {
 public:
  /// The shortest wait that is ended: a slow peer alone is no reason to end a call.
  static constexpr std::chrono::milliseconds kGrace{300};

  /// The one object of the process. It is never destroyed: its thread may outlive static
  /// destruction.
  static Interrupts& Get();

  /// Installs a handler that calls the present one. Does nothing where the signal is ignored or
  /// ends the process, and where another handler already calls this one. If a handler replaces this
  /// one later, the next call of Watch finds it.
  void Watch();

  /// Number of signals since Watch.
  uint64_t count() const;

  /// Notes that the process ends: from now on, calls that wait are ended without further signals.
  void Leave();

  /// Whether a call of the process waits.
  bool AnyWaits() const;

  /// Adds an object. Virtual for modules that get this object from another module, and so do not
  /// link with this function.
  virtual void Add(std::weak_ptr<Interruptible> interruptible);

 protected:
  Interrupts() = default;
  virtual ~Interrupts() = default;
};

}  // namespace jax_ep
