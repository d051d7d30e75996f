#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "ops/cuda_op.h"
#include "ops/get_dispatch_layout/get_dispatch_layout_cuda.cuh"
#include "ops/get_dispatch_layout/get_dispatch_layout_ffi.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 64;
constexpr size_t kMaxSharedBytes = 48 * 1024;

// Counts this rank's tokens per rank, node and expert, and marks the ranks of each token.
//
// Geometry   one thread per token, a grid-stride loop; each block counts in shared memory and adds
//            its counters to the result once. Integer sums do not depend on the order.
// Protocol   none, since the operation is local.
// Traffic    per token: 4 * num_topk bytes read, num_ranks bytes written.
// Floor      num_tokens * (4 * num_topk + num_ranks) / HBM.
__global__ void __launch_bounds__(kThreads)
    GetDispatchLayoutKernel(GetDispatchLayoutArgs args, bool in_shared) {
  extern __shared__ int32_t shared_counters[];
  const int num_ranks = args.experts.num_ranks;
  const int num_counters = num_ranks + args.num_nodes + args.experts.num_experts;
  int32_t* per_rank = in_shared ? shared_counters : args.num_tokens_per_rank;
  int32_t* per_node = in_shared ? per_rank + num_ranks : args.num_tokens_per_node;
  int32_t* per_expert = in_shared ? per_node + args.num_nodes : args.num_tokens_per_expert;
  if (in_shared) {
    for (int i = threadIdx.x; i < num_counters; i += blockDim.x) shared_counters[i] = 0;
    __syncthreads();
  }

  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; token < args.num_tokens;
       token += stride) {
    for (int r = 0; r < num_ranks; ++r) args.is_token_in_rank[token * num_ranks + r] = false;
    CountToken(
        args, token, [](int32_t* counter) { atomicAdd(counter, 1); }, per_rank, per_node,
        per_expert);
  }
  if (!in_shared) return;

  __syncthreads();
  for (int i = threadIdx.x; i < num_counters; i += blockDim.x) {
    const int32_t count = shared_counters[i];
    if (count == 0) continue;
    int32_t* result = i < num_ranks ? args.num_tokens_per_rank + i
                      : i < num_ranks + args.num_nodes
                          ? args.num_tokens_per_node + (i - num_ranks)
                          : args.num_tokens_per_expert + (i - num_ranks - args.num_nodes);
    atomicAdd(result, count);
  }
}

}  // namespace

cudaError_t LoadGetDispatchLayoutKernels(DeviceTraits&) {
  cudaFuncAttributes found{};
  return cudaFuncGetAttributes(&found, GetDispatchLayoutKernel);
}

template <>
ffi::Error RunGetDispatchLayout<Cuda>(const DeviceLocalContext& context,
                                      const GetDispatchLayoutArgs& args) {
  constexpr const char* kName = "get_dispatch_layout";
  const std::pair<int32_t*, int> counters[] = {
      {args.num_tokens_per_rank, args.experts.num_ranks},
      {args.num_tokens_per_node, args.num_nodes},
      {args.num_tokens_per_expert, args.experts.num_experts}};
  size_t counter_bytes = 0;
  for (const auto& [counter, count] : counters) {
    const size_t bytes = count * sizeof(int32_t);
    const cudaError_t status = cudaMemsetAsync(counter, 0, bytes, context.stream);
    if (status != cudaSuccess) return CudaError(kName, status);
    counter_bytes += bytes;
  }
  if (args.num_tokens == 0) return ffi::Error::Success();
  const bool in_shared = counter_bytes <= kMaxSharedBytes;
  const int64_t num_blocks =
      std::min<int64_t>(kMaxBlocks, (args.num_tokens + kThreads - 1) / kThreads);
  GetDispatchLayoutKernel<<<static_cast<unsigned>(num_blocks), kThreads,
                            in_shared ? counter_bytes : 0, context.stream>>>(args, in_shared);
  return CudaError(kName, cudaGetLastError());
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpGetDispatchLayoutCuda, GetDispatchLayout<Cuda>,
                              BindingOf(GetDispatchLayout<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
