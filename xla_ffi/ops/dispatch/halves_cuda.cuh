// The kernels of the halves of a dispatch of few tokens: SendTokens and ReceiveTokens, each in a
// kernel of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/flights.cuh"
#include "ops/dispatch/low_latency_cuda.cuh"

namespace jax_ep {

// Sends this rank's tokens. Waits for nobody.
//
// Geometry, traffic and floor: the sending part of LowLatencyDispatchKernel.
// Protocol   flight_called and packets to every peer.
template <typename Source>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    DispatchSendKernel(const __grid_constant__ LowLatencyDispatch launch, int32_t* flight) {
  const Endpoint& self = launch.self;
  const DispatchUnits<Source> units(launch);
  typename DispatchUnits<Source>::FirstLoads loaded;
  units.LoadFirst(loaded);
  FlightCall call;
  bool is_good = BeginSend(self, OpId::kDispatchSend, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) SendTokens(units, call, loaded);
  EndSend(self, call, is_good, flight);
}

// Receives the tokens of all ranks. Those of this rank are read out of the operands of the send.
//
// Geometry, traffic and floor: the receiving part of LowLatencyDispatchKernel.
// Protocol   waits for flight_called and packets of every peer.
template <RecvLayout kLayout, typename Source>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    DispatchRecvKernel(const __grid_constant__ LowLatencyDispatch launch,
                       const __grid_constant__ Results results, const int32_t* flight) {
  const Endpoint& self = launch.self;
  const DispatchUnits<Source> units(launch);
  RoutingTable<kLayout, FlightCall> table(launch, DynamicShared<uint32_t>());
  table.Clear();
  FlightCall call;
  bool is_good = BeginReceive(self, OpId::kDispatchRecv, launch.position, flight, call);
  is_good = __syncthreads_and(is_good);
  GroupOfRow<Source> loaded;
  ReceiveTokens(units, call, is_good, table, results, loaded);
  EndReceive(self, call, is_good);
}

}  // namespace jax_ep
