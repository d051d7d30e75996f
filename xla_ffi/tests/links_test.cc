// Messages between processes, and what a forked child must leave alone.
#include "runtime/links.h"

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>

#include "tests/test.h"

namespace jax_ep {
namespace {

// The code that a child exits with after `body`; it is killed if that takes too long.
int InChild(const std::function<void()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    body();
    _exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child, child);
  return status;
}

void TestForkedChild() {
  int ends[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, ends[0]);
  Countdown one(1), two(2), lost(2);
  std::atomic<bool> is_lost = false;
  const auto make = [&](int fd, Links::Receive receive) {
    return std::make_unique<Links>(std::vector<Link>{{1, getpid(), fd}}, std::chrono::minutes(1),
                                   std::move(receive), [&](int) {
                                     is_lost = true;
                                     lost.Down();
                                   });
  };
  auto sender = make(ends[0], [](int, std::span<const std::byte>) {});
  auto receiver = make(ends[1], [&](int, std::span<const std::byte> message) {
    CHECK(message.size() == 3, message.size());
    one.Down();
    two.Down();
  });
  const std::array<std::byte, 3> message{};
  sender->Send(1, message);
  one.Wait();
  const int status = InChild([&] {
    sender->Send(1, std::array<std::byte, 7>{});
    sender.reset();
    receiver.reset();
  });
  CHECK(status == 0, status);
  sender->Send(1, message);
  two.Wait();
  CHECK(!is_lost, "by the child");
  sender.reset();
  lost.Wait();
}

}  // namespace

Tests LinksTests() { return {{"links_of_a_forked_child", TestForkedChild}}; }

}  // namespace jax_ep
