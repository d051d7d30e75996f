// The plan of core/plan.h against a naive model.
#include "core/plan.h"

#include <climits>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/test.h"

namespace jax_ep {
namespace {

using RowKey = std::tuple<int, int, int>;  // source, token, k
struct PlanModel {
  std::map<int64_t, RowKey> rows;
  std::vector<int32_t> group_sizes;
  int64_t num_recv = 0;
  int64_t num_dropped = 0;
};

// What `dst` receives: tries every prefix of whole tokens, each from scratch. `ids` are those of
// each rank, part behind part.
PlanModel MakeModel(const DispatchShape& shape, const std::vector<std::vector<int32_t>>& ids,
                    int dst) {
  const int num_local = shape.experts.num_experts / shape.experts.num_ranks;
  const bool is_rank = shape.layout == RecvLayout::kRank;
  std::vector<std::vector<std::pair<int, RowKey>>> tokens;  // each with its (local expert, key)s
  for (int src = 0; src < shape.num_parts * shape.experts.num_ranks; ++src) {
    const int rank = src % shape.experts.num_ranks;
    const int64_t first = src / shape.experts.num_ranks * shape.num_tokens;
    for (int t = 0; t < shape.num_tokens; ++t) {
      std::vector<std::pair<int, RowKey>> choices;
      for (int k = 0; k < shape.num_topk; ++k) {
        const int64_t local =
            int64_t{ids[rank][(first + t) * shape.num_topk + k]} - dst * num_local;
        if (local >= 0 && local < num_local)
          choices.push_back({static_cast<int>(local), {src, t, k}});
      }
      if (!choices.empty()) tokens.push_back(choices);
    }
  }
  for (size_t num_kept = tokens.size();; --num_kept) {
    PlanModel model;
    std::vector<std::vector<RowKey>> groups(num_local);
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i >= num_kept) model.num_dropped += is_rank ? 1 : tokens[i].size();
      for (const auto& [local, key] : tokens[i]) {
        if (i < num_kept) groups[local].push_back(key);
      }
    }
    for (const auto& group : groups) {
      int64_t size = group.size();
      while (!is_rank && size % shape.expert_alignment != 0) ++size;
      model.group_sizes.push_back(size);
      for (size_t i = 0; !is_rank && i < group.size(); ++i) {
        model.rows[model.num_recv + i] = group[i];
      }
      if (!is_rank) model.num_recv += size;
    }
    if (is_rank) model.num_recv = num_kept;
    for (size_t i = 0; is_rank && i < num_kept; ++i) {
      const auto& [src, token, k] = tokens[i][0].second;
      model.rows[i] = {src, token, kNoIndex};
    }
    if (model.num_recv <= shape.recv_capacity) return model;
  }
}

void TestPlan() {
  std::mt19937 random(2);
  int num_with_drops = 0;
  int num_parts_with_drops = 0;
  for (int round = 0; round < 6000; ++round) {
    const int num_ranks = 1 + random() % 6;
    const int num_experts = num_ranks * (1 + random() % 4);
    const int num_parts = round % 3 == 0 ? 1 + random() % 4 : 1;
    const int num_tokens = random() % (num_parts == 1 ? 21 : 9);
    const int num_topk = 1 + random() % 5;
    const int alignment = std::vector<int>{1, 3, 8}[random() % 3];
    const int enough = num_parts * num_ranks * num_tokens * num_topk + num_experts * alignment + 1;
    const DispatchShape shape{.layout = round % 2 ? RecvLayout::kRank : RecvLayout::kExpert,
                              .experts = {num_experts, num_ranks},
                              .num_tokens = num_tokens,
                              .num_topk = num_topk,
                              .recv_capacity = 1 + static_cast<int64_t>(random() % enough),
                              .expert_alignment = alignment,
                              .num_parts = num_parts};
    const std::vector<int> strange{-2, INT_MIN, num_experts, num_experts + 7, INT_MAX};
    const uint32_t skew = 1 + random() % num_experts;  // a small one repeats experts in a token
    std::vector<std::vector<int32_t>> ids(num_ranks);
    std::vector<int> num_invalid(num_ranks, 0);
    for (int rank = 0; rank < num_ranks; ++rank) {
      for (int i = 0; i < num_parts * num_tokens * num_topk; ++i) {
        const uint32_t dice = random() % 20;
        num_invalid[rank] += dice == 0;
        ids[rank].push_back(dice == 0   ? strange[random() % strange.size()]
                            : dice <= 2 ? kNoIndex
                                        : static_cast<int32_t>(random() % skew));
      }
    }
    DispatchPlan plan(shape);
    const auto each_rank = [&](const std::function<void(int)>& step) {
      if (round % 40 == 0) return OnThreads(num_ranks, step);
      for (int rank = num_ranks - 1; rank >= 0; --rank) step(rank);
    };
    each_rank([&](int rank) { plan.List(rank, ids[rank].data()); });
    each_rank([&](int dst) { plan.Admit(dst); });
    each_rank([&](int dst) {
      const PlanModel model = MakeModel(shape, ids, dst);
      std::map<int64_t, RowKey> rows;
      for (int src = 0; src < num_parts * num_ranks; ++src) {
        std::pair<int, int> last{-1, -1};
        plan.ForEachRow(src, dst, [&](int token, int k, int64_t row) {
          CHECK(row >= 0 && row < shape.recv_capacity, round, row, shape.recv_capacity);
          CHECK(last < std::pair(token, k), round, last.first, token, last.second, k);
          CHECK((rows.insert({row, {src, token, k}}).second), round, src, dst, row);
          last = {token, k};
        });
      }
      CHECK(rows == model.rows, round, dst, rows.size(), model.rows.size());
      CHECK(plan.group_sizes(dst) == model.group_sizes, round, dst);
      CHECK(plan.num_recv(dst) == model.num_recv, round, plan.num_recv(dst), model.num_recv);
      CHECK(plan.num_dropped(dst) == model.num_dropped, round, plan.num_dropped(dst),
            model.num_dropped);
      CHECK(plan.num_invalid(dst) == num_invalid[dst], round, dst, num_invalid[dst]);
    });
    for (int dst = 0; dst < num_ranks; ++dst) {
      num_with_drops += plan.num_dropped(dst) > 0;
      num_parts_with_drops += num_parts > 1 && plan.num_dropped(dst) > 0;
    }
  }
  CHECK(num_with_drops > 1000, num_with_drops);
  CHECK(num_parts_with_drops > 300, num_parts_with_drops);
}

}  // namespace

Tests PlanTests() {
  return {
      {"plan", TestPlan},
  };
}

}  // namespace jax_ep
