#include "runtime/links.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "runtime/home_process.h"

namespace jax_ep {
namespace {

constexpr size_t kReadBytes = 64 * 1024;

using Length = uint32_t;  // in front of each message

bool SendAll(int fd, const std::byte* data, size_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    data += sent;
    size -= sent;
  }
  return true;
}

}  // namespace

struct Links::State {
  struct Peer {
    Link link;
    std::mutex sending;
    std::vector<std::byte> received;  // of messages that are not whole yet
  };
  std::vector<std::unique_ptr<Peer>> peers;
  const HomeProcess home;

  ~State() {
    for (const auto& peer : peers) close(peer->link.fd);
  }

  void ShutDown() {
    for (const auto& peer : peers) shutdown(peer->link.fd, SHUT_RDWR);
  }

  // Reads the bytes that are there, and hands on whole messages. False at the end of the stream.
  static bool Drain(Peer& peer, const Receive& receive) {
    std::byte chunk[kReadBytes];
    const ssize_t count = recv(peer.link.fd, chunk, sizeof(chunk), MSG_DONTWAIT);
    if (count < 0) return errno == EINTR || errno == EAGAIN;
    if (count == 0) return false;
    std::vector<std::byte>& held = peer.received;
    held.insert(held.end(), chunk, chunk + count);
    size_t begin = 0;
    Length length = 0;
    while (held.size() - begin >= sizeof(length)) {
      std::memcpy(&length, held.data() + begin, sizeof(length));
      if (held.size() - begin < sizeof(length) + length) break;
      receive(peer.link.process, std::span(held).subspan(begin + sizeof(length), length));
      begin += sizeof(length) + length;
    }
    held.erase(held.begin(), held.begin() + static_cast<std::ptrdiff_t>(begin));
    return true;
  }

  static void Listen(const std::shared_ptr<State>& state, const Receive& receive,
                     const Lose& lose) {
    std::vector<Peer*> open;
    for (const auto& peer : state->peers) open.push_back(peer.get());
    while (!open.empty()) {
      std::vector<pollfd> polled;
      for (const Peer* peer : open) polled.push_back({peer->link.fd, POLLIN, 0});
      poll(polled.data(), polled.size(), -1);
      for (size_t i = polled.size(); i-- > 0;) {
        if (polled[i].revents == 0 || Drain(*open[i], receive)) continue;
        lose(open[i]->link.process);
        open.erase(open.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
  }
};

Links::Links(std::vector<Link> links, std::chrono::milliseconds timeout, Receive receive, Lose lose)
    : state_(std::make_shared<State>()) {
  const timeval limit{.tv_sec = timeout.count() / 1000, .tv_usec = timeout.count() % 1000 * 1000};
  for (const Link& link : links) {
    setsockopt(link.fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    state_->peers.push_back(std::make_unique<State::Peer>());
    state_->peers.back()->link = link;
  }
  std::thread(State::Listen, state_, std::move(receive), std::move(lose)).detach();
}

Links::~Links() {
  if (state_->home.IsThis()) state_->ShutDown();
}

void Links::Send(int process, std::span<const std::byte> message) {
  if (!state_->home.IsThis()) return;
  const auto found = std::find_if(state_->peers.begin(), state_->peers.end(),
                                  [&](const auto& peer) { return peer->link.process == process; });
  if (found == state_->peers.end()) return;
  State::Peer& peer = **found;
  const auto length = static_cast<Length>(message.size());
  const auto prefix = std::as_bytes(std::span(&length, 1));
  std::vector<std::byte> framed(prefix.begin(), prefix.end());
  framed.insert(framed.end(), message.begin(), message.end());
  std::lock_guard<std::mutex> lock(peer.sending);
  // No message may follow half of another one. The listener then notices the loss.
  if (!SendAll(peer.link.fd, framed.data(), framed.size())) shutdown(peer.link.fd, SHUT_RDWR);
}

}  // namespace jax_ep
