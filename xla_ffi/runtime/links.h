// Messages between this process and the others of a group on the same host.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace jax_ep {

/// Another process, and a connected stream socket to it.
struct Link {
  int process;
  int pid;  // as this process sees it
  int fd;
};

class Links {
 public:
  using Receive = std::function<void(int process, std::span<const std::byte> message)>;
  using Lose = std::function<void(int process)>;

  /// Takes the sockets over. One thread receives the messages of all processes, those of each
  /// process in order. `lose` comes last: that process has ended, or has closed its side.
  Links(std::vector<Link> links, std::chrono::milliseconds timeout, Receive receive, Lose lose);
  /// Closes the connections: the others lose this process. Does not wait for the thread, which may
  /// be the caller. Does nothing in a forked child.
  ~Links();
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  /// Sends a message. Gives up on a process that takes nothing for as long as the timeout. A forked
  /// child sends nothing.
  void Send(int process, std::span<const std::byte> message);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace jax_ep
