// The kernels of the halves of a combine of few tokens: SendSums and ReceiveSums, each in a kernel
// of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/flights.cuh"
#include "ops/combine/low_latency_cuda.cuh"

namespace jax_ep {

// Sends the sums of peers' tokens. Waits for nobody.
//
// Geometry, traffic and floor: the sending part of LowLatencyCombineKernel.
// Protocol   flight_called and packets to every peer.
template <typename Element, RecvLayout kLayout, bool kIsRounded>
__global__ void __launch_bounds__(kLowLatencyCombineThreads<kIsRounded>, 1)
    CombineSendKernel(const __grid_constant__ LowLatencyCombine launch, int32_t* flight) {
  const Endpoint& self = launch.self;
  const CombineUnits<Element, kIsRounded> units(launch);
  HeldRows held(launch, DynamicShared<int32_t>());
  held.Clear();
  FlightCall call;
  bool is_good = BeginSend(self, OpId::kCombineSend, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) held.Find();
  __syncthreads();
  if (is_good) SendSums<kLayout>(units, call, held);
  EndSend(self, call, is_good, flight);
}

// Receives the sums of the own tokens. Rows of this rank are read out of the operands of the send.
//
// Geometry, traffic and floor: the receiving part of LowLatencyCombineKernel.
// Protocol   waits for flight_called of every peer, and for packets.
template <typename Element, RecvLayout kLayout, bool kIsRounded>
__global__ void __launch_bounds__(kLowLatencyCombineThreads<kIsRounded>, 1)
    CombineRecvKernel(const __grid_constant__ LowLatencyCombine launch, const int32_t* flight) {
  const Endpoint& self = launch.self;
  const CombineUnits<Element, kIsRounded> units(launch);
  const HeldRows tokens(launch, nullptr);  // which tokens are this block's, without rows
  FlightCall call;
  bool is_good = BeginReceive(self, OpId::kCombineRecv, launch.position, flight, call);
  is_good = __syncthreads_and(is_good);
  ReceiveSums<kLayout>(units, call, is_good, tokens);
  EndReceive(self, call, is_good);
}

}  // namespace jax_ep
