// The process that an object was made in. A child that it forks has a copy of the object, and the
// sockets behind it, but none of the threads: whatever the child does with it, the parent must not
// feel, and what another thread held at the fork is never let go.
#pragma once

#include <unistd.h>

namespace jax_ep {

class HomeProcess {
 public:
  bool IsThis() const { return getpid() == pid_; }

 private:
  pid_t pid_ = getpid();
};

}  // namespace jax_ep
