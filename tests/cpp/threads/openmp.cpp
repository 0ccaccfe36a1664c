// The part of libgomp that g++ calls for csrc/cpu/passes.cpp, over std::thread and std::atomic.
// ThreadSanitizer understands those; of libgomp, which is not instrumented, it sees no barrier and
// reports races where there are none. Whatever else of OpenMP the passes come to use is missing
// here and does not link.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  long end, step;
  std::atomic<long> next;
};

// The threads of one parallel region.
struct Team {
  explicit Team(int size) : barrier(size) {}

  std::barrier<> barrier;
  std::mutex mutex;
  std::vector<Loop*> loops;  // those that some thread has come to
};

// A thread's place in its team.
struct Place {
  Team* team = nullptr;
  int rank = 0;
  size_t loops = 0;  // how many it has come to
  Loop* loop = nullptr;
};

thread_local Place place;

void work(Team* team, int rank, void (*body)(void*), void* data) {
  place = {team, rank};
  body(data);
  place = {};
}

bool take(long* first, long* last) {
  Loop& loop = *place.loop;
  // Relaxed: taking a task makes no order between the threads' writes.
  *first = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
  *last = std::min(*first + loop.step, loop.end);
  return *first < loop.end;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  const int size = static_cast<int>(threads);
  Team team(size);
  std::vector<std::thread> others;
  for (int rank = 1; rank < size; ++rank) others.emplace_back(work, &team, rank, body, data);
  work(&team, 0, body, data);
  for (std::thread& other : others) other.join();
  for (Loop* loop : team.loops) delete loop;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long incr, long chunk, long* first,
                                          long* last) {
  {
    Team& team = *place.team;
    const std::lock_guard<std::mutex> lock(team.mutex);
    if (place.loops == team.loops.size()) team.loops.push_back(new Loop{end, incr * chunk, start});
    place.loop = team.loops[place.loops++];
  }
  return take(first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return take(first, last); }

void GOMP_loop_end() { place.team->barrier.arrive_and_wait(); }

}  // extern "C"
