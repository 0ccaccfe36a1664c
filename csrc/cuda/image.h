// Host copies of arrays that travel to the device together and lie there one behind the other.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

namespace fusedopt::cuda {

class Image {
 public:
  // Each returns where the array will stand, counted in bytes from the beginning.
  template <typename T>
  size_t add(const std::vector<T>& values) {
    return add(values.data(), values.size() * sizeof(T));
  }
  template <typename T>
  size_t add_zeros(size_t count) {
    return add(nullptr, count * sizeof(T));
  }

  std::byte* data() { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  // Arrays begin at multiples of this, which suits every type.
  static constexpr size_t kAlignment = 16;

  size_t add(const void* values, size_t size) {
    const size_t at = bytes_.size();
    bytes_.resize(at + (size + kAlignment - 1) / kAlignment * kAlignment);
    if (values != nullptr && size > 0) memcpy(bytes_.data() + at, values, size);
    return at;
  }

  std::vector<std::byte> bytes_;
};

}  // namespace fusedopt::cuda
