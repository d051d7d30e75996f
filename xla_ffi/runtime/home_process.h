// The process that an object was made in. A forked child has a copy of the object and of its
// sockets, but none of its threads. The child must not disturb its parent through the copy, and a
// lock that another thread held at the fork stays locked in the child for ever.
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
