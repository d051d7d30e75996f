// Positions of a mesh: devices, slices, ranks.
#pragma once

#include <cstdint>

namespace jax_ep {

/// A rank of a slice of the group. Slices are independent of one another.
struct Member {
  int slice;
  int rank;
};

/// One device of the group's mesh.
struct MeshPosition {
  int64_t device_id;  // XLA's device ordinal
  Member member;
  int64_t position;  // in the row-major order of the mesh
};

}  // namespace jax_ep
