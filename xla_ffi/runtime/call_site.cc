#include "runtime/call_site.h"

#include <algorithm>
#include <utility>

namespace jax_ep {

void CallSites::BeginProgram() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_programs_;
}

std::shared_ptr<CallSite> CallSites::Add(uint64_t name) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto site = std::make_shared<CallSite>();
  site->id = ++newest_;
  site->name = name;
  site->loaded_by = std::this_thread::get_id();
  site->program = num_programs_;
  std::erase_if(waiting_[name], [](const auto& other) { return other.expired(); });
  waiting_[name].push_back(site);
  return site;
}

void CallSites::Settle(CallSite& site) {
  if (site.count.load(std::memory_order_acquire) > 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (site.count.load(std::memory_order_relaxed) > 0) return;
  std::vector<std::shared_ptr<CallSite>> copies;
  std::vector<std::weak_ptr<CallSite>> others;
  for (const auto& waiting : waiting_[site.name]) {
    const auto other = waiting.lock();
    if (other == nullptr) continue;
    if (other->loaded_by == site.loaded_by && other->program == site.program) {
      copies.push_back(other);
    } else {
      others.push_back(waiting);
    }
  }
  for (size_t i = 0; i < copies.size(); ++i) {
    copies[i]->index = static_cast<int>(i);
    copies[i]->count.store(static_cast<int>(copies.size()), std::memory_order_release);
  }
  if (others.empty()) {
    waiting_.erase(site.name);
  } else {
    waiting_[site.name] = std::move(others);
  }
}

uint64_t CallSites::newest() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return newest_;
}

bool CallKey::IsAlike(const CallKey& other) const {
  return site == other.site && launch == other.launch && slice == other.slice;
}

bool CallKey::Matches(const CallKey& other) const {
  const auto [least, most] = std::minmax(count, other.count);
  return IsAlike(other) && most % least == 0 && index % least == other.index % least;
}

bool LaunchCount::Continues(const CallSite& site, int64_t run_id) const {
  // A site that was loaded while the launch ran belongs to another executable.
  if (count_ == 0 || run_id != current_.run_id || site.id > current_.newest_site) return false;
  // Equal executables give their launches equal numbers.
  const auto found = current_.sites.find({site.name, site.index});
  return found == current_.sites.end() || found->second == site.id;
}

std::optional<int64_t> LaunchCount::Of(const CallSite& site, int64_t run_id, uint64_t newest_site) {
  if (!Continues(site, run_id)) {
    const auto found = before_.sites.find({site.name, site.index});
    const bool was_over = current_.run_id == run_id && before_.run_id == run_id &&
                          found != before_.sites.end() && found->second == site.id;
    if (count_ > 1 && was_over) return std::nullopt;
    ++count_;
    before_ = std::exchange(current_, {.run_id = run_id, .newest_site = newest_site, .sites = {}});
  }
  current_.sites[{site.name, site.index}] = site.id;
  return count_;
}

}  // namespace jax_ep
