// The one order in which squares are added up, on every backend: a norm has the same bits whatever
// computes it, in whatever pieces.
//
// Elements are numbered by their place in the tensor (core/table.h), not by their address. A strip
// is kStrip consecutive ones, in rows of kLanes; each lane adds up the squares in its column, first
// row first. From there on neighbours are added up, then neighbours of those, in a binary tree over
// the lanes of a strip, the strips of a tensor, and the tensors of a table. It is padded with
// zeros, which change no sum. A piece is a power of two of strips long, at a multiple of its
// length, so its sum is a node of that tree, however long the pieces are.
#pragma once

#include <cstdint>

namespace fusedopt {

constexpr int kLanes = 16;
constexpr int kStripRows = 8;
constexpr int kStrip = kStripRows * kLanes;

// Adds up neighbours, then neighbours of those; 0 of nothing. Overwrites the values.
inline double add_neighbours(double* values, int64_t count) {
  if (count == 0) return 0.0;
  for (; count > 1; count = (count + 1) / 2) {
    for (int64_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (count % 2 != 0) values[count / 2] = values[count - 1];
  }
  return values[0];
}

}  // namespace fusedopt
