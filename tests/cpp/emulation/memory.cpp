// Device and pinned memory of the emulated runtime, and the allocator that torch gets.
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>

#include "internal.h"

namespace emulation {
namespace {

struct Block {
  Memory kind = Memory::kHost;
  size_t size = 0;
  int device = 0;
  bool alive = true;                                // in the order of its stream
  bool captured = false;                            // a graph may use it for ever
  int readers = 0;                                  // copies in flight out of it
  EmulatedStream* stream = nullptr;                 // of a block of torch's
  std::vector<EmulatedStream*> users;               // other streams that use it
  std::vector<std::shared_ptr<EmulatedMark>> busy;  // where they were when it was released
};

using Pool = std::map<std::tuple<EmulatedStream*, size_t>, std::vector<char*>>;

// Never destroyed: tensors may be released later than anything else.
std::map<const char*, Block>& blocks() {
  static auto* const all = new std::map<const char*, Block>;
  return *all;
}
Pool& pool() {
  static auto* const all = new Pool;
  return *all;
}

std::pair<const char* const, Block>* find(const void* data) {
  const auto after = blocks().upper_bound(static_cast<const char*>(data));
  if (after == blocks().begin()) return nullptr;
  auto& entry = *std::prev(after);
  return static_cast<const char*>(data) < entry.first + entry.second.size ? &entry : nullptr;
}

constexpr size_t kAlignment = 512;
constexpr int kFresh = 0xa5;  // memory comes with whatever was in it
constexpr int kFreed = 0xdd;

char* make(Memory kind, size_t size, int device) {
  const size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
  char* const data = static_cast<char*>(aligned_alloc(kAlignment, rounded));
  memset(data, kFresh, rounded);
  Block block;
  block.kind = kind;
  block.size = rounded;
  block.device = device;
  blocks()[data] = std::move(block);
  return data;
}

}  // namespace

void* take_memory(Memory kind, size_t size, int device) {
  ++counts().allocations;
  return make(kind, size, device);
}

bool give_back(Memory kind, void* data) {
  const auto entry = find(data);
  if (entry == nullptr || entry->first != data || entry->second.kind != kind ||
      !entry->second.alive) {
    return false;
  }
  if (entry->second.readers > 0) report("pinned memory is freed while copies out of it wait");
  --counts().allocations;
  // Given back to nobody, so that whoever still uses it finds garbage.
  memset(data, kFreed, entry->second.size);
  entry->second.alive = false;
  return true;
}

Memory kind_of(const void* data) {
  const auto entry = find(data);
  return entry == nullptr ? Memory::kHost : entry->second.kind;
}

void count_reader(const void* data, int by) {
  if (const auto entry = find(data)) entry->second.readers += by;
}

std::string check_memory(Memory kind, const void* data, size_t size, int device) {
  const auto entry = find(data);
  const Memory found = entry == nullptr ? Memory::kHost : entry->second.kind;
  if (found != kind) {
    constexpr const char* kNames[] = {"host memory", "device memory", "pinned memory"};
    return std::string(kNames[int(found)]) + " where " + kNames[int(kind)] + " belongs";
  }
  if (entry == nullptr) return "";
  const Block& block = entry->second;
  if (!block.alive) return "memory that is free";
  if (static_cast<const char*>(data) + size > entry->first + block.size) {
    return "memory beyond the end of its block";
  }
  if (device >= 0 && block.device != device) {
    return "memory of device " + std::to_string(block.device);
  }
  return "";
}

void* allocate(size_t size, int device, cudaStream_t handle) {
  if (size == 0) return nullptr;
  const std::lock_guard lock(mutex());
  make_context(device);
  EmulatedStream& stream = handle == nullptr ? default_stream(device) : *handle;
  const size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
  auto& free = pool()[{&stream, rounded}];
  if (!stream.capturing && !free.empty()) {
    char* const data = free.back();
    Block& block = blocks()[data];
    bool ready = true;
    for (const auto& mark : block.busy) ready = ready && mark->reached;
    if (ready) {
      free.pop_back();
      block.busy.clear();
      enqueue(stream, [data, rounded, &block] {
        block.alive = true;
        memset(data, kFresh, rounded);
      });
      return data;
    }
  }
  char* const data = make(Memory::kDevice, size, device);
  blocks()[data].stream = &stream;
  blocks()[data].captured = stream.capturing;
  return data;
}

void release(void* data) {
  if (data == nullptr) return;
  const std::lock_guard lock(mutex());
  Block& block = blocks()[static_cast<char*>(data)];
  if (block.captured) return;
  for (EmulatedStream* user : std::exchange(block.users, {})) block.busy.push_back(mark(*user));
  if (block.busy.empty()) enqueue_outside(*block.stream, [&block] { block.alive = false; });
  pool()[{block.stream, block.size}].push_back(static_cast<char*>(data));
}

void use_on(void* data, cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  const auto entry = find(data);
  if (entry != nullptr && entry->second.stream != stream) entry->second.users.push_back(stream);
}

}  // namespace emulation
